"""The networks of this project as transformers' models."""

import timm
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.backbone_utils import BackboneMixin
from transformers.modeling_outputs import BackboneOutput, ImageClassifierOutputWithNoAttention
from transformers.utils.generic import can_return_tuple

import backbones
from backbones.mixers.windowed import WindowedMixer
from dense.backbone import DenseBackbone
from dense.huggingface.configuration import DenseBackboneConfig


class _Model(PreTrainedModel):
    config_class = DenseBackboneConfig
    base_model_prefix = "network"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _no_split_modules = ["Block"]
    network: nn.Module

    def _init_weights(self, module: nn.Module) -> None:
        """The networks draw their weights as they are built; what the meta device had, is made."""
        if isinstance(module, WindowedMixer):
            module.init_non_persistent_buffers()

    def _set_gradient_checkpointing(self, enable: bool = True, **_) -> None:
        backbones.Pyramid.set_grad_checkpointing(self.network, enable)


class DenseBackboneModel(BackboneMixin, _Model):
    """A pyramid that returns the normalised feature maps of some stages.

    >>> maps = DenseBackboneModel(DenseBackboneConfig(backbone="dw_conv_nano"))(images).feature_maps
    """

    has_attentions = False

    def __init__(self, config: DenseBackboneConfig):
        super().__init__(config)
        name, arguments = config.network()
        self.network = DenseBackbone(
            name,
            out_indices=config.out_indices,
            drop_path_rate=config.drop_path_rate,
            frozen_stages=config.frozen_stages,
            norm=config.norm,
            **arguments,
        )
        first = self.network.channels[0] // 2 ** self.network.out_indices[0]
        self.num_features = [first * 2**i for i in range(len(config.stage_names))]
        self.post_init()

    @can_return_tuple
    def forward(
        self, pixel_values: Tensor, output_hidden_states: bool | None = None, **kwargs
    ) -> BackboneOutput:
        """``(B, 3, H, W)`` to ``feature_maps``, ``(B, C, ceil(H/stride), ceil(W/stride))`` each.

        ``hidden_states``, if asked for, are the same maps.
        """
        maps = self.network(pixel_values)
        return BackboneOutput(
            feature_maps=maps, hidden_states=maps if output_hidden_states else None
        )


class DenseBackboneForImageClassification(_Model):
    """The classifier: timm's, whose state dict lies under ``network``.

    >>> logits = DenseBackboneForImageClassification(config)(images).logits
    """

    def __init__(self, config: DenseBackboneConfig):
        super().__init__(config)
        name, arguments = config.network()
        self.network = timm.create_model(
            name, num_classes=config.num_labels, drop_path_rate=config.drop_path_rate, **arguments
        )
        self.post_init()

    @can_return_tuple
    def forward(
        self, pixel_values: Tensor, labels: Tensor | None = None, **kwargs
    ) -> ImageClassifierOutputWithNoAttention:
        """``(B, 3, H, W)`` to ``logits``, ``(B, num_labels)``; labels ``(B,)`` give a ``loss``."""
        logits = self.network(pixel_values)
        loss = None
        if labels is not None:
            loss = self.loss_function(labels, logits, self.config)
        return ImageClassifierOutputWithNoAttention(loss=loss, logits=logits)
