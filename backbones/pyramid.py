"""The four-stage pyramid that all families share: Swin with an exchangeable mixer.

Maps are ``(B, H, W, C)`` from the patch embedding to the last norm, the memory layout that linears,
layer norms and channels-last convolutions all read.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial

import torch
import torch.nn.functional as F
from timm.layers import ClassifierHead, DropPath, to_2tuple
from timm.models import checkpoint
from torch import Tensor, nn

from backbones import ops
from backbones.checkpoints import load_checkpoint
from backbones.layers import Mlp, Size, SqueezeExcite, ceil_div, crop, is_plain
from backbones.mixers.base import Mixer, init_linears
from backbones.mixers.norm import NORM_LAYERS, normalise, paused_statistics
from backbones.ops.common import leaf
from backbones.ops.linear_layer import fast_linears


class Pyramid(nn.Module):
    """Swin's pyramid (Table 8, appendix D) with any mixer, and timm's model interface.

    >>> model = Pyramid(backbones.mixers.DepthwiseConv.at, num_classes=10)

    Args:
        mixer: called as ``mixer(dim, stage, block, feat_size)`` for each block; see
            :meth:`Mixer.at`.
        img_size: training image size in pixels, an int or (rows, columns). The model runs at any
            size; only the per-window weights of Swin-Local-MLP depend on this one.
        in_chans: channels of the image.
        num_classes: outputs of the classifier; 0 for none.
        global_pool: pooling before the classifier, ``"avg"`` or ``""``.
        embed_dim: channels of the first stage; each stage has twice those of the one before.
        depths: number of blocks in each stage.
        mlp_ratio: hidden channels of the MLPs divided by C.
        drop_rate: dropout before the classifier.
        drop_path_rate: drop path of the last block; it grows linearly from 0 in the first.
        norm_layer: ``"layernorm"``, ``"batchnorm"`` or ``"centered_batchnorm"`` for all norms of
            the blocks (Table 12); None keeps the family's. Patch embedding, merging and the final
            norm have layer norm.
        se_ratio: hidden channels of a squeeze-and-excitation of each mixer's output, divided by C;
            Table 15's is 1/16, 0 has none.
        local_kernel: side of the kernel of a depth-wise convolution between mixer and MLP, as in
            Shuffle Transformer; Table 6's is 7, 0 has none.
        output_stride: 32, 16 or 8, the largest stride of a map. The stages beyond it keep their
            weights and compute each position from the pixels that it would see at stride 32.

    Raises:
        ValueError: an unknown ``norm_layer`` or ``output_stride``, or a ratio or kernel out of
            range.
    """

    # Of forward_features, for timm.
    output_fmt = "NHWC"

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
        norm_layer: str | None = None,
        se_ratio: float = 0.0,
        local_kernel: int = 0,
        output_stride: int = 32,
    ):
        super().__init__()
        if output_stride not in (8, 16, 32):
            raise ValueError(f"output_stride={output_stride!r}: 8, 16 and 32 are valid")
        if norm_layer is not None and norm_layer not in NORM_LAYERS:
            raise ValueError(f"norm_layer={norm_layer!r}: {', '.join(NORM_LAYERS)} are valid")
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.global_pool = global_pool
        self.patch_embed = PatchEmbed(in_chans, embed_dim)

        last = max(1, sum(depths) - 1)
        rates = iter([drop_path_rate * block / last for block in range(sum(depths))])
        self.stages = nn.ModuleList()
        self.feature_info = []
        for i, depth in enumerate(depths):
            dim, stride = embed_dim * 2**i, 4 * 2**i
            feat_size = _feat_size(img_size, i)
            blocks = [
                Block(
                    dim,
                    mixer(dim, i, j, feat_size),
                    Mlp(dim, int(dim * mlp_ratio)),
                    next(rates),
                    NORM_LAYERS.get(norm_layer),
                )
                for j in range(depth)
            ]
            reduction = min(stride, output_stride)
            merging = PatchMerging(dim // 2) if i else nn.Identity()
            self.stages.append(Stage(merging, blocks, stride // reduction))
            info = dict(num_chs=dim, reduction=reduction, module=f"stages.{i}")
            self.feature_info.append(info)

        self.num_features = dim
        self.norm = nn.LayerNorm(dim)
        self.head = ClassifierHead(dim, num_classes, global_pool, drop_rate, input_fmt="NHWC")
        self.head_hidden_size = self.head.num_features
        self.init_weights()
        # Last, so that all else has the random draws of the family without them.
        for info, stage in zip(self.feature_info, self.stages, strict=True):
            for block in stage.blocks:
                block.add(info["num_chs"], se_ratio, local_kernel)

    @torch.jit.ignore
    def init_weights(self) -> None:
        """Initialise all linears as Swin does; mixers have an ``init_weights`` of their own."""
        _init_weights(self)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Names of parameters without weight decay, in addition to norms and biases."""
        return {
            f"{place}.{name}"
            for place, module in self.named_modules()
            if isinstance(module, Mixer)
            for name in module.no_weight_decay()
        }

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict:
        """timm's patterns that group parameters into layers, for layer-wise learning rates."""
        return dict(
            stem=r"^patch_embed",
            blocks=r"^stages\.(\d+)"
            if coarse
            else [
                (r"^stages\.(\d+)\.downsample", (0,)),
                (r"^stages\.(\d+)\.blocks\.(\d+)", None),
                # The final norm joins the last layer. A DenseBackbone's "norms" match no pattern
                # on purpose: they are trained like heads.
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
        """The classifier's linear layer, an ``nn.Identity`` without classes."""
        return self.head.fc

    @torch.jit.ignore
    def load_pretrained(self, path: str) -> None:
        """timm's hook for custom loading: :func:`backbones.load_checkpoint`."""
        load_checkpoint(self, path)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier by a newly initialised one; ``num_classes=0`` removes it.

        ``global_pool=None`` keeps the pooling.
        """
        self.num_classes = num_classes
        like = next(self.parameters())
        made = dict(device=like.device, dtype=like.dtype)
        self.head.reset(num_classes, global_pool, in_features=self.num_features, **made)
        self.head_hidden_size = self.head.num_features
        if global_pool is not None:
            self.global_pool = global_pool

    def set_input_size(
        self, img_size: int | Size | None = None, window_size: int | Size | None = None
    ) -> None:
        """Resize the weights in place for another image, window or kernel size (Table 14).

        >>> model.set_input_size(384, window_size=12)

        Args:
            img_size: pixels; resizes the window grid of per-window weights. None keeps it.
            window_size: side of the window, or of the kernel in the convolutional families, in
                positions; None keeps it.

        Raises:
            ValueError: the family cannot change its window or kernel size once built.
        """
        for i, stage in enumerate(self.stages):
            size = None if img_size is None else _feat_size(img_size, i)
            for block in stage.blocks:
                block.mixer.set_input_size(size, window_size)
        # Read by timm's get_model_input_config and get_model_args.
        changed = {} if window_size is None else {"window_size": window_size}
        if img_size is not None:
            changed["img_size"] = to_2tuple(img_size)
            self._traits = getattr(self, "_traits", {}) | {"img_size": changed["img_size"]}
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
        """Return the feature maps of chosen stages.

        >>> maps = model.forward_intermediates(x, indices=2, intermediates_only=True)

        Args:
            x: ``(B, 3, H, W)``.
            indices: indices of the stages; an int n means the last n, None all.
            norm: apply the final norm to the last stage's map.
            stop_early: skip the stages after the last chosen one.
            output_fmt: ``"NCHW"`` (channels-last memory) or ``"NHWC"``.
            intermediates_only: return the list without the final features.

        Returns:
            ``(features, maps)`` or ``maps``: features are those of :meth:`forward_features`, maps a
            list of ``(B, C, ceil(H/stride), ceil(W/stride))``. With ``stop_early``, features are
            the last map that was computed.

        Raises:
            ValueError: another ``output_fmt``.
            IndexError: a stage index out of range.
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
        """Remove the layers that :meth:`forward_intermediates` does not need for ``indices``."""
        take = _taken(len(self.stages), indices)
        last = max(take)
        shortened = last < len(self.stages) - 1
        self.stages = self.stages[: last + 1]
        if prune_norm or shortened:
            self.norm = nn.Identity()
        if prune_head or shortened:
            self.num_features = self.feature_info[last]["num_chs"]
            self.reset_classifier(0, "")
        return take

    def forward_features(self, x: Tensor) -> Tensor:
        """``(B, 3, H, W)`` to ``(B, ceil(H/32), ceil(W/32), C)``, after the final norm.

        An ``output_stride`` of 16 or 8 takes 32's place.
        """
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
    """4x4 convolution with stride 4, then layer norm."""

    def __init__(self, in_chans: int, dim: int):
        super().__init__()
        self.proj = nn.Conv2d(in_chans, dim, 4, stride=4)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, 3, H, W)`` to ``(B, ceil(H/4), ceil(W/4), C)``."""
        return self.norm(self.proj(_whole_patches(x)).permute(0, 2, 3, 1))


class PatchMerging(nn.Module):
    """Concatenate 2x2 positions, then layer norm and a linear from 4C to 2C channels."""

    def __init__(self, dim: int):
        super().__init__()
        self.norm = nn.LayerNorm(4 * dim)
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)

    @fast_linears
    def forward(self, x: Tensor) -> Tensor:
        """``(B, H, W, C)`` to ``(B, ceil(H/2), ceil(W/2), 2*C)``."""
        return self.reduction(self.norm(in_fours(x)))


class Stage(nn.Module):
    """Patch merging (an identity in the first stage), then the blocks of one resolution.

    Args:
        downsample: halves rows and columns.
        blocks: of the resolution.
        dilation: more than 1 takes the stride away, whatever the mixer: the stage runs on
            ``dilation**2`` shifted copies of its input as a larger batch, and the outputs are
            interleaved. Rows and columns ``0, dilation, ...`` of the result are the result with
            the stride.
    """

    def __init__(self, downsample: nn.Module, blocks: list[nn.Module], dilation: int = 1):
        super().__init__()
        self.downsample = downsample
        self.blocks = nn.ModuleList(blocks)
        self.dilation = dilation
        self.grad_checkpointing = False
        for block in blocks:
            block.mixer.copies = dilation**2

    def forward(self, x: Tensor) -> Tensor:
        """``(B, H, W, C)`` to ``(B, ceil(H/2), ceil(W/2), 2*C)``; stage 0 keeps the shape.

        With a dilation, ``(B, H, W, 2*C)``.
        """
        height, width = x.shape[1], x.shape[2]
        if self.dilation > 1:
            x = _shifted_copies(x, self.dilation)
        x = self.downsample(x)
        for block in self.blocks:
            if self.grad_checkpointing and self.training and torch.is_grad_enabled():
                contexts = partial(_checkpoint_contexts, block)
                x = checkpoint(block, x, use_reentrant=False, context_fn=contexts)
            else:
                x = block(x)
        return x if self.dilation == 1 else _interleaved(x, height, width, self.dilation)


class Block(nn.Module):
    """Residual mixer and residual MLP: ``x + mixer(norm1(x))``, then ``x + mlp(norm2(x))``.

    The convolutional families normalise inside the mixer, so their ``norm1`` is an identity. Two
    parts can be added: ``x + se(mixer(norm1(x)))``, and ``x + local(x)`` before the MLP.

    Args:
        dim: C.
        mixer: mixes positions; its ``norm_layer`` and ``pre_norm`` choose the norms.
        mlp: mixes channels, ``(..., C)`` to ``(..., C)``.
        drop_path: drop path probability of each branch.
        norm_layer: class of the norms, the mixer's included; None keeps the mixer's choice.
    """

    def __init__(
        self,
        dim: int,
        mixer: Mixer,
        mlp: nn.Module,
        drop_path: float,
        norm_layer: type[nn.Module] | None = None,
    ):
        super().__init__()
        if norm_layer is not None:
            mixer.set_norm_layer(norm_layer)
        self.mixer = mixer
        self.norm1 = mixer.norm_layer(dim) if mixer.pre_norm else nn.Identity()
        self.norm2 = mixer.norm_layer(dim)
        self.mlp = mlp
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.se = self.local = None

    def add(self, dim: int, se_ratio: float = 0.0, local_kernel: int = 0) -> None:
        """Add a squeeze-and-excitation, a local convolution, or both; see :class:`Pyramid`."""
        if se_ratio:
            self.se = SqueezeExcite(dim, se_ratio)
        if local_kernel:
            self.local = LocalConv(dim, local_kernel, self.mixer.norm_layer)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, H, W, C)`` to ``(B, H, W, C)``."""
        x = self.mixed(x)
        return x + self.drop_path(self.mlp(normalise(self.norm2, x)))

    def mixed(self, x: Tensor) -> Tensor:
        """All before ``norm2``, ``(B, H, W, C)`` to ``(B, H, W, C)``."""
        mixed = self.mixer(normalise(self.norm1, x))
        if self.se is not None:
            mixed = self.se(mixed)
        x = x + self.drop_path(mixed)
        # Without drop path, as in Shuffle Transformer.
        return x if self.local is None else x + self.local(x)


class LocalConv(nn.Module):
    """Norm, then depth-wise convolution with zero padding and without bias (Table 6).

    Args:
        dim: C.
        kernel_size: side of the square kernel.
        norm_layer: class of the norm, called with C.

    Raises:
        ValueError: ``kernel_size`` is below 1.
    """

    def __init__(self, dim: int, kernel_size: int, norm_layer: type[nn.Module]):
        super().__init__()
        if kernel_size < 1:
            raise ValueError(f"local_kernel={kernel_size}: 1 or more is needed, or 0 for none")
        self.norm = norm_layer(dim)
        self.conv = nn.Conv2d(dim, dim, kernel_size, padding="same", groups=dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, H, W, C)`` to ``(B, H, W, C)``."""
        x = normalise(self.norm, x)
        if is_plain(self.conv, nn.Conv2d):
            return ops.depthwise_conv(x, self.conv.weight)
        return self.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


@torch.fx.wrap
@leaf
def _whole_patches(x: Tensor) -> Tensor:
    """Pad an image ``(B, 3, H, W)`` with zeros, right and below, to whole 4x4 patches."""
    height, width = x.shape[-2:]
    rows, columns = ceil_div(height, 4), ceil_div(width, 4)
    x = F.pad(x, (0, 4 * columns - width, 0, 4 * rows - height))
    # Channels-last memory by permuting, because vmap has no rule for memory_format.
    return x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)


@torch.fx.wrap
@leaf
def in_fours(x: Tensor) -> Tensor:
    """``(B, H, W, C)`` to ``(B, ceil(H/2), ceil(W/2), 4*C)``, zeros where a position is missing."""
    height, width = x.shape[1:3]
    rows, columns = ceil_div(height, 2), ceil_div(width, 2)
    x = F.pad(x, (0, 0, 0, 2 * columns - width, 0, 2 * rows - height))
    x = x.unflatten(2, (columns, 2)).unflatten(1, (rows, 2))
    # The channels are ordered (column, row, C), as in Swin's released weights.
    return x.permute(0, 1, 3, 4, 2, 5).flatten(3)


@torch.fx.wrap
@leaf
def _shifted_copies(x: Tensor, dilation: int) -> Tensor:
    """``(B, H, W, C)`` to ``(B*dilation**2, 2*ceil(H/dilation), 2*ceil(W/dilation), C)``.

    The input is ``dilation / 2`` times as fine as patch merging expects. Copy ``(a, b)`` has the
    rows ``a``, ``a + dilation / 2``, ..., and the columns from ``b``; zeros are beyond the map.
    """
    step, (height, width) = dilation // 2, x.shape[1:3]
    rows, columns = 2 * ceil_div(height, dilation), 2 * ceil_div(width, dilation)
    x = F.pad(x, (0, 0, 0, step * (columns + 1) - width, 0, step * (rows + 1) - height))
    # Copy a has the rows step*(k + a//step) + a%step: first all of a//step, then of a%step.
    ends = (0, -step), (-step, 0)
    copies = torch.stack([F.pad(x, (0, 0, *across, *down)) for down in ends for across in ends])
    copies = copies.unflatten(3, (columns, step)).unflatten(2, (rows, step)).unflatten(0, (2, 2))
    return copies.permute(2, 0, 4, 1, 6, 3, 5, 7).flatten(0, 4)


@torch.fx.wrap
@leaf
def _interleaved(x: Tensor, height: int, width: int, dilation: int) -> Tensor:
    """``(B, H, W, C)`` of what a stage made of :func:`_shifted_copies` of a map of H and W."""
    x = x.unflatten(0, (-1, dilation, dilation)).permute(0, 3, 1, 4, 2, 5)
    return crop(x.flatten(3, 4).flatten(1, 2), height, width)


def _checkpoint_contexts(block: nn.Module):
    return nullcontext(), paused_statistics(block)


def _feat_size(img_size: int | Size, stage: int) -> Size:
    """Rows and columns of a stage's map, ``ceil(img_size / stride)``."""
    stride = 4 * 2**stage
    height, width = to_2tuple(img_size)
    return ceil_div(height, stride), ceil_div(width, stride)


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, Mixer):
        module.init_weights()
        return
    # Its linears have PyTorch's, as SENet's: with smaller weights all gates would be near 1/2.
    if isinstance(module, SqueezeExcite):
        return
    init_linears([module])
    for child in module.children():
        _init_weights(child)


def _taken(count: int, indices: int | Sequence[int] | None) -> list[int]:
    """Non-negative stage indices: all for None, the last n for an int n."""
    if indices is None or isinstance(indices, int):
        indices = range(-(count if indices is None else indices), 0)
    if not indices or not all(-count <= i < count for i in indices):
        raise IndexError(f"stages {list(indices)}: each from {-count} to {count - 1}, at least one")
    return [i % count for i in indices]
