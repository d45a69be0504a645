"""mmengine model of a classifier and its loss."""

from collections.abc import Callable, Mapping
from inspect import signature
from typing import Any

import timm
import torch
from mmengine.model import BaseModel
from mmengine.registry import MODELS
from timm.data import Mixup
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import Tensor, nn

import backbones
from backbones.ablations import ABLATIONS
from backbones.released import source_of
from dense.waiting import waiting


@MODELS.register_module()
class ImageClassifier(BaseModel):
    """One of our networks as an mmengine model, with timm's Mixup, CutMix and label smoothing.

    >>> ImageClassifier("dw_conv_tiny", 10, drop_path_rate=0.2, label_smoothing=0.1)

    Args:
        name: one of ``backbones.MODEL_NAMES``, or a host of :data:`backbones.ablations.ABLATIONS`.
        num_classes: number of logits.
        classes: class names; the classifier's rows in ``init`` are matched by them.
        mixup: arguments of :class:`timm.data.Mixup` except ``num_classes`` and
            ``label_smoothing``; None disables mixing.
        label_smoothing: share of the target spread over all classes, 0 to 1.
        init: a checkpoint or a tag of released weights, loaded by
            :func:`backbones.load_checkpoint`; None starts from random weights.
        grad_checkpointing: recompute blocks in the backward pass to save memory.
        compile: run the network under ``torch.compile`` with dynamic shapes.
        **kwargs: other arguments of the network, such as ``drop_path_rate``, ``img_size``,
            ``window_size`` and ``se_ratio``.

    Raises:
        ValueError: an unknown name; the message lists the valid ones.
    """

    def __init__(
        self,
        name: str,
        num_classes: int,
        *,
        classes: list[str] | None = None,
        mixup: dict[str, Any] | None = None,
        label_smoothing: float = 0.0,
        init: str | None = None,
        grad_checkpointing: bool = False,
        compile: bool = False,
        **kwargs: Any,
    ):
        super().__init__()
        others = [a.model for a in ABLATIONS.values() if not a.is_pyramid]
        if name not in (valid := (*backbones.MODEL_NAMES, *others)):
            raise ValueError(f"no network {name!r}: {', '.join(valid)} are valid")
        self.name, self.classes, self.init = name, classes, init
        self.network = timm.create_model(name, num_classes=num_classes, **kwargs)
        if grad_checkpointing:
            self.network.set_grad_checkpointing()
        # In a list, so that it is not a submodule: the weights are the network's.
        self._run = [torch.compile(self.network, dynamic=True) if compile else self.network]
        self.mixup = None
        if mixup:
            self.mixup = Mixup(num_classes=num_classes, label_smoothing=label_smoothing, **mixup)
            self.criterion: nn.Module = SoftTargetCrossEntropy()
        else:
            self.criterion = LabelSmoothingCrossEntropy(label_smoothing)

    def use(self, network: Callable[[Tensor], Tensor]) -> None:
        """Have a function of images, ``(B, 3, H, W)`` to logits, compute what the network does."""
        self._run = [network]

    def init_weights(self) -> None:
        """Load ``init``, if given, and keep the ``load_report``.

        Raises:
            backbones.CheckpointError: ``init`` cannot be read or does not fit.
        """
        if self.init is not None:
            with waiting(f"reading the weights of {self.init}"):
                source = source_of(self.name, self.init)
                self.load_report = backbones.load_checkpoint(
                    self.network, source, classes=self.classes
                )

    def forward(
        self, inputs: Tensor, labels: Tensor, indices: Tensor, mode: str = "tensor"
    ) -> Tensor | dict[str, Tensor] | list[dict[str, Any]]:
        """Logits, the loss, or the top five classes of each image.

        Args:
            inputs: ``(B, 3, H, W)`` float32, normalised.
            labels: ``(B,)`` int64.
            indices: ``(B,)`` int64, the images' indices in the data set.
            mode: ``"tensor"``, ``"loss"`` or ``"predict"``.

        Returns:
            ``"tensor"``: logits ``(B, num_classes)``. ``"loss"``: ``{"loss": scalar}``.
            ``"predict"``: a dict per image of ``label``, ``index`` and ``best``, up to five class
            indices by descending logit.
        """
        inputs = inputs.contiguous(memory_format=torch.channels_last)
        if mode == "loss":
            targets = labels
            if self.mixup is not None:
                inputs, targets = self.mixup(inputs, labels)
            return {"loss": self.criterion(self._run[0](inputs), targets)}
        logits = self._run[0](inputs)
        if mode == "tensor":
            return logits
        best = logits.topk(min(5, logits.shape[1]), dim=1).indices.cpu()
        rows = zip(labels.cpu().tolist(), indices.cpu().tolist(), best, strict=True)
        return [{"label": label, "index": index, "best": row} for label, index, row in rows]


def network_options(model: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a config's ``model`` that its network is built with, beside name and classes.

    >>> network_options(dict(type="ImageClassifier", name="swin_nano", num_classes=3, img_size=64))
    {'img_size': 64}
    """
    own = {"type", *signature(ImageClassifier).parameters}
    return {key: value for key, value in model.items() if key not in own}
