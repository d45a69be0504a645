"""What builds a network of this project in transformers."""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.backbone_utils import BackboneConfigMixin

import backbones
from backbones import ablations

STAGES = ("stage1", "stage2", "stage3", "stage4")


@strict
class DenseBackboneConfig(BackboneConfigMixin, PreTrainedConfig):
    """The config of :class:`.DenseBackboneModel` and :class:`.DenseBackboneForImageClassification`.

    >>> config = DenseBackboneConfig(backbone="i_d_dw_conv_tiny", out_indices=(1, 2, 3))

    Args:
        backbone: one of ``backbones.MODEL_NAMES``.
        ablation: a key of ``backbones.ablations.ABLATIONS`` that is a pyramid, built in the size of
            ``backbone``; None is the network itself.
        options: other arguments of the model, such as ``{"window_size": 12}``.
        num_channels: channels of the image.
        image_size: side of the training images, in pixels. The networks run at any size; only the
            per-window weights of Swin-Local-MLP depend on this one.
        drop_path_rate: drop path rate of the last block; it grows linearly from 0 over all blocks.
        frozen_stages: of the backbone alone: freezes the patch embedding and this many stages;
            -1 freezes nothing.
        norm: of the backbone alone: ``"BN"``, ``"SyncBN"`` or ``"FrozenBN"``, the type of its batch
            norms.
        out_features, out_indices: the stages that the backbone returns, names among ``"stage1"`` to
            ``"stage4"`` (strides 4 to 32) or numbers from 0 to 3, ascending; all four by default.
        num_labels, id2label, label2id: classes of the classifier, as everywhere in transformers.

    Raises:
        ValueError: an unknown backbone, ablation or stage; the message lists the valid ones.
    """

    model_type = "dense_backbone"

    backbone: str = "i_d_dw_conv_tiny"
    ablation: str | None = None
    options: dict[str, Any] | None = None
    num_channels: int = 3
    image_size: int = 224
    drop_path_rate: float | int = 0.0
    frozen_stages: int = -1
    norm: str = "BN"
    _out_features: list[str] | None = None
    _out_indices: list[int] | None = None

    def __post_init__(self, **kwargs: Any):
        if self.backbone not in backbones.MODEL_NAMES:
            valid = ", ".join(backbones.MODEL_NAMES)
            raise ValueError(f"no backbone {self.backbone!r}: {valid} are valid")
        if self.ablation is not None:
            ablations.ablated(self.ablation, self.backbone, dense=True)
        self.stage_names = list(STAGES)
        features, indices = kwargs.pop("out_features", None), kwargs.pop("out_indices", None)
        if features is None and indices is None:
            features = list(STAGES)
        self.set_output_features_output_indices(features, indices)
        super().__post_init__(**kwargs)

    def network(self) -> tuple[str, dict[str, Any]]:
        """The name of the timm model and its arguments."""
        name, arguments = self.backbone, {}
        if self.ablation is not None:
            name, arguments = ablations.ablated(self.ablation, self.backbone, dense=True)
        arguments |= dict(img_size=self.image_size, in_chans=self.num_channels)
        return name, {**arguments, **(self.options or {})}
