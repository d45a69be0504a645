"""The four-stage pyramid that all families share: Swin's skeleton with the mixer left open.

Maps are ``(B, H, W, C)`` from the patch embedding to the last norm, so that a linear layer, a layer
norm and a (channels-last) convolution all read the same memory.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial

import torch
import torch.nn.functional as F
from timm.layers import ClassifierHead, DropPath, to_2tuple
from timm.models import checkpoint
from torch import Tensor, nn

from backbones.checkpoints import load_checkpoint
from backbones.layers import Mlp, Size, ceil_div
from backbones.mixers.base import Mixer, init_linears
from backbones.mixers.norm import normalise, paused_statistics


class Pyramid(nn.Module):
    """Swin's pyramid (Table 8, appendix D) around any mixer, speaking timm's protocol.

    Args:
        mixer: called as ``mixer(dim, stage, block, feat_size)`` for each block, with its position
            and the rows and columns of its map at the training size; :meth:`Mixer.at` of a family.
        img_size: rows and columns of the training image in pixels. Any size can be run; only
            per-window weights depend on it.
        in_chans: channels of the image.
        num_classes: outputs of the classifier, 0 for none.
        global_pool: pooling before the classifier, ``"avg"`` or ``""``.
        embed_dim: C of the first stage; it doubles from stage to stage.
        depths: blocks in each stage.
        mlp_ratio: hidden width of the blocks' MLPs over C.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth of the last block, growing linearly from 0 over all blocks.
    """

    def __init__(
        self,
        mixer: Callable[..., Mixer],
        img_size: int | Size = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dim: int = 96,
        depths: Sequence[int] = (2, 2, 6, 2),
        mlp_ratio: float = 4.0,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ):
        super().__init__()
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.global_pool = global_pool
        self.patch_embed = PatchEmbed(in_chans, embed_dim)

        last = max(1, sum(depths) - 1)
        rates = iter([drop_path_rate * block / last for block in range(sum(depths))])
        self.stages = nn.ModuleList()
        self.feature_info = []
        for i, depth in enumerate(depths):
            dim = embed_dim * 2**i
            feat_size = _feat_size(img_size, i)
            blocks = [
                Block(dim, mixer(dim, i, j, feat_size), Mlp(dim, int(dim * mlp_ratio)), next(rates))
                for j in range(depth)
            ]
            self.stages.append(Stage(PatchMerging(dim // 2) if i else nn.Identity(), blocks))
            info = dict(num_chs=dim, reduction=4 * 2**i, module=f"stages.{i}")
            self.feature_info.append(info)

        self.num_features = self.head_hidden_size = dim
        self.norm = nn.LayerNorm(dim)
        self.head = ClassifierHead(dim, num_classes, global_pool, drop_rate, input_fmt="NHWC")
        self.init_weights()

    @torch.jit.ignore
    def init_weights(self) -> None:
        """Swin's initialisation of MLPs, merging and classifier; mixers initialise themselves."""
        _init_weights(self)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """The parameters that are never decayed beside norms and biases, as the mixers say."""
        return {
            f"{place}.{name}"
            for place, module in self.named_modules()
            if isinstance(module, Mixer)
            for name in module.no_weight_decay()
        }

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict:
        """How timm groups parameters into layers, for layer-wise learning rates."""
        return dict(
            stem=r"^patch_embed",
            blocks=r"^stages\.(\d+)"
            if coarse
            else [
                (r"^stages\.(\d+)\.downsample", (0,)),
                (r"^stages\.(\d+)\.blocks\.(\d+)", None),
                # With the layer before it. Not "norms", a dense backbone's: they learn like heads.
                (r"^norm\.", (99999,)),
            ],
        )

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the blocks in the backward pass instead of storing their activations."""
        for stage in self.stages:
            stage.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """The last linear layer."""
        return self.head.fc

    @torch.jit.ignore
    def load_pretrained(self, path: str) -> None:
        """What timm calls for a file of weights; see :func:`backbones.load_checkpoint`."""
        load_checkpoint(self, path)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier by a fresh one, or by none if ``num_classes`` is 0."""
        self.num_classes = num_classes
        self.head.reset(num_classes, pool_type=global_pool)
        if global_pool is not None:
            self.global_pool = global_pool

    def set_input_size(
        self, img_size: int | Size | None = None, window_size: int | Size | None = None
    ) -> None:
        """Adapt what was learned to another image, window or kernel size (Table 14).

        Args:
            img_size: pixels; resizes the window grid of per-window weights, nothing else.
            window_size: positions; the window of the windowed mixers, the kernel of the others.

        Raises:
            ValueError: the mixer cannot change its window or kernel once built.
        """
        for i, stage in enumerate(self.stages):
            for block in stage.blocks:
                if img_size is not None or window_size is not None:
                    size = _feat_size(img_size, i) if img_size is not None else None
                    block.mixer.set_input_size(size, window_size)
        if img_size is not None:
            # Where timm's get_model_input_config and get_model_args look, from 1.0.31 on.
            changed = {"img_size": to_2tuple(img_size)}
            self._traits = getattr(self, "_traits", {}) | changed
            if window_size is not None:
                changed["window_size"] = window_size
            self._model_args = getattr(self, "_model_args", {}) | changed

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """The maps of the stages that ``indices`` names.

        Args:
            x: ``(B, 3, H, W)``.
            indices: stages to return; an int n for the last n, None for all.
            norm: apply the final norm to the last stage's map.
            stop_early: do not run the stages after the last one that is returned.
            output_fmt: ``"NCHW"`` or ``"NHWC"``.
            intermediates_only: leave out the final features.

        Returns:
            A list of ``(B, C, ceil(H/stride), ceil(W/stride))`` in channels-last memory, and before
            it the final ``(B, H/32, W/32, C)`` features unless ``intermediates_only``.
        """
        if output_fmt not in ("NCHW", "NHWC"):
            raise ValueError(f"output_fmt={output_fmt!r}: NCHW and NHWC are valid")
        take = _taken(len(self.stages), indices)
        last = max(take)
        x = self.patch_embed(x)
        intermediates = []
        for i, stage in enumerate(self.stages[: last + 1] if stop_early else self.stages):
            x = stage(x)
            if i in take:
                taken = self.norm(x) if norm and i == len(self.stages) - 1 else x
                intermediates.append(taken.permute(0, 3, 1, 2) if output_fmt == "NCHW" else taken)
        if intermediates_only:
            return intermediates
        return (self.norm(x) if i == len(self.stages) - 1 else x), intermediates

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop what :meth:`forward_intermediates` does not need for ``indices``."""
        take = _taken(len(self.stages), indices)
        last = max(take)
        shortened = last < len(self.stages) - 1
        self.stages = self.stages[: last + 1]
        if prune_norm or shortened:
            self.norm = nn.Identity()
        if prune_head or shortened:
            self.num_features = self.head_hidden_size = self.feature_info[last]["num_chs"]
            self.reset_classifier(0, "")
        return take

    def forward_features(self, x: Tensor) -> Tensor:
        """``(B, 3, H, W)`` to ``(B, ceil(H/32), ceil(W/32), C)``, normalised."""
        x = self.patch_embed(x)
        for stage in self.stages:
            x = stage(x)
        return self.norm(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """``(B, H, W, C)`` to ``(B, num_classes)``, or to ``(B, C)`` with ``pre_logits``."""
        return self.head(x, pre_logits=pre_logits)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, 3, H, W)`` to ``(B, num_classes)``."""
        return self.forward_head(self.forward_features(x))


class PatchEmbed(nn.Module):
    """4x4 patches projected to C channels and normalised."""

    def __init__(self, in_chans: int, dim: int):
        super().__init__()
        self.proj = nn.Conv2d(in_chans, dim, 4, stride=4)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, 3, H, W)`` to ``(B, ceil(H/4), ceil(W/4), C)``."""
        height, width = x.shape[-2:]
        rows, columns = ceil_div(height, 4), ceil_div(width, 4)
        x = F.pad(x, (0, 4 * columns - width, 0, 4 * rows - height))
        # In channels-last memory; the views, unlike a memory format, vmap has a rule for.
        x = x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
        return self.norm(self.proj(x).permute(0, 2, 3, 1))


class PatchMerging(nn.Module):
    """2x2 positions side by side, normalised and projected to twice the channels."""

    def __init__(self, dim: int):
        super().__init__()
        self.norm = nn.LayerNorm(4 * dim)
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, H, W, C)`` to ``(B, ceil(H/2), ceil(W/2), 2*C)``."""
        height, width = x.shape[1:3]
        rows, columns = ceil_div(height, 2), ceil_div(width, 2)
        x = F.pad(x, (0, 0, 0, 2 * columns - width, 0, 2 * rows - height))
        x = x.unflatten(2, (columns, 2)).unflatten(1, (rows, 2))
        # Column by column of the 2x2, the order of Swin's released weights.
        return self.reduction(self.norm(x.permute(0, 1, 3, 4, 2, 5).flatten(3)))


class Stage(nn.Module):
    """Patch merging (none in the first stage) and the blocks at one resolution."""

    def __init__(self, downsample: nn.Module, blocks: list[nn.Module]):
        super().__init__()
        self.downsample = downsample
        self.blocks = nn.ModuleList(blocks)
        self.grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        """``(B, H, W, C)`` to ``(B, ceil(H/2), ceil(W/2), 2*C)``, the same shape in stage 1."""
        x = self.downsample(x)
        for block in self.blocks:
            if self.grad_checkpointing and self.training and torch.is_grad_enabled():
                contexts = partial(_checkpoint_contexts, block)
                x = checkpoint(block, x, use_reentrant=False, context_fn=contexts)
            else:
                x = block(x)
        return x


class Block(nn.Module):
    """A mixer and an MLP, each with a residual: ``x + mix(norm1 x)``, then ``x + MLP(norm2 x)``.

    Batch-norm families normalise inside the mixer, and have no ``norm1``.

    Args:
        dim: C.
        mixer: what mixes positions; it says which norms.
        mlp: what mixes channels, ``(..., C)`` to ``(..., C)``.
        drop_path: probability of leaving out either branch for an image, in training.
    """

    def __init__(self, dim: int, mixer: Mixer, mlp: nn.Module, drop_path: float):
        super().__init__()
        self.mixer = mixer
        self.norm1 = mixer.norm_layer(dim) if mixer.pre_norm else nn.Identity()
        self.norm2 = mixer.norm_layer(dim)
        self.mlp = mlp
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """``(B, H, W, C)`` to ``(B, H, W, C)``."""
        x = x + self.drop_path(self.mixer(normalise(self.norm1, x)))
        return x + self.drop_path(self.mlp(normalise(self.norm2, x)))


def _checkpoint_contexts(block: nn.Module):
    return nullcontext(), paused_statistics(block)


def _feat_size(img_size: int | Size, stage: int) -> Size:
    """Rows and columns of a stage's map, ``ceil(image / stride)``."""
    stride = 4 * 2**stage
    height, width = to_2tuple(img_size)
    return ceil_div(height, stride), ceil_div(width, stride)


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, Mixer):
        module.init_weights()
        return
    init_linears([module])
    for child in module.children():
        _init_weights(child)


def _taken(count: int, indices: int | Sequence[int] | None) -> list[int]:
    """Stages by number: all for None, the last n for an int n; negative ones from the end."""
    if indices is None or isinstance(indices, int):
        indices = range(-(count if indices is None else indices), 0)
    if not indices or not all(-count <= i < count for i in indices):
        raise IndexError(f"stages {list(indices)}: each from {-count} to {count - 1}, at least one")
    return [i % count for i in indices]
