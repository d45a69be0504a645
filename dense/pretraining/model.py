"""A network and its losses as mmengine wants to train it."""

from typing import Any

import timm
import torch
from mmengine.model import BaseModel
from mmengine.registry import MODELS
from timm.data import Mixup
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import Tensor, nn

import backbones
from backbones.released import source_of


@MODELS.register_module()
class ImageClassifier(BaseModel):
    """A classifier of this package, with Mixup, CutMix and label smoothing by timm.

    Args:
        name: one of ``backbones.MODEL_NAMES``.
        num_classes: outputs.
        classes: their names, by which a checkpoint of other classes finds its rows.
        mixup: arguments of :class:`timm.data.Mixup` but ``num_classes`` and ``label_smoothing``;
            None trains on plain labels.
        label_smoothing: the share of the target that is spread over all classes.
        init: a checkpoint or a tag of released weights to start from; what of it does not fit is
            reported or refused as :func:`backbones.load_checkpoint` does.
        compile: whether the network runs under ``torch.compile``, with dynamic shapes.
        **kwargs: of the network: ``drop_path_rate``, ``img_size``, ``window_size``, ``shared``.

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
        compile: bool = False,
        **kwargs: Any,
    ):
        super().__init__()
        if name not in backbones.MODEL_NAMES:
            raise ValueError(f"no network {name!r}: {', '.join(backbones.MODEL_NAMES)} are valid")
        self.name, self.classes, self.init = name, classes, init
        self.network = timm.create_model(name, num_classes=num_classes, **kwargs)
        # Not a submodule of its own: its weights are the network's.
        self._run = [torch.compile(self.network, dynamic=True) if compile else self.network]
        self.mixup = None
        if mixup:
            self.mixup = Mixup(num_classes=num_classes, label_smoothing=label_smoothing, **mixup)
            self.criterion: nn.Module = SoftTargetCrossEntropy()
        else:
            self.criterion = LabelSmoothingCrossEntropy(label_smoothing)

    def init_weights(self) -> None:
        """Load ``init`` if there is one.

        Raises:
            backbones.CheckpointError: it cannot be read or does not fit.
        """
        if self.init is not None:
            source = source_of(self.name, self.init)
            backbones.load_checkpoint(self.network, source, classes=self.classes)

    def forward(
        self, inputs: Tensor, labels: Tensor, indices: Tensor, mode: str = "tensor"
    ) -> Tensor | dict[str, Tensor] | list[dict[str, Any]]:
        """Logits, the loss, or the best five classes of every image.

        Args:
            inputs: ``(B, 3, H, W)`` float32, normalised.
            labels: ``(B,)`` int64.
            indices: ``(B,)`` int64, the images' places in the data set.
            mode: ``"tensor"``, ``"loss"`` or ``"predict"``.

        Returns:
            ``(B, num_classes)``; ``{"loss": scalar}``; or for every image a dict of ``label``,
            ``index`` and ``best``, up to five classes, the best one first.
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
