"""MMEngine's optimizer wrapper constructor with the rules of :mod:`dense.optim`."""

from typing import Any

from mmengine.optim import DefaultOptimWrapperConstructor
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS
from torch import nn

from dense.optim import lr_scales, merged, no_weight_decay

# What DefaultOptimWrapperConstructor reads; it overlooks anything else in silence.
_MMENGINE = (
    "custom_keys",
    "bias_lr_mult",
    "bias_decay_mult",
    "norm_decay_mult",
    "flat_decay_mult",
    "dwconv_decay_mult",
    "dcn_offset_lr_mult",
    "bypass_duplicate",
)


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class DenseOptimWrapperConstructor(DefaultOptimWrapperConstructor):
    """No weight decay where :func:`dense.optim.no_weight_decay` says so; layer-wise rates::

        optim_wrapper = dict(
            constructor="DenseOptimWrapperConstructor",
            optimizer=dict(type="AdamW", lr=1e-4, weight_decay=0.05),
            paramwise_cfg=dict(layer_decay=0.9),
        )

    Args:
        optim_wrapper_cfg: as MMEngine's.
        paramwise_cfg: ``no_decay_bias`` (False; True for ImageNet pretraining), ``layer_decay``
            (1.0, no decay) and all of MMEngine's: layer-wise factors multiply the learning rates
            that those give, and a ``decay_mult`` under ``custom_keys`` outweighs the rule.

    Raises:
        ValueError: an unknown key in ``paramwise_cfg``; a ``layer_decay`` without a learning rate,
            out of range, or for a model without layers (when called).
    """

    def __init__(self, optim_wrapper_cfg: dict, paramwise_cfg: dict | None = None):
        options: dict[str, Any] = dict(paramwise_cfg or {})
        self.no_decay_bias = options.pop("no_decay_bias", False)
        self.layer_decay = options.pop("layer_decay", 1.0)
        if unknown := sorted(set(options) - set(_MMENGINE)):
            valid = ", ".join(("no_decay_bias", "layer_decay", *_MMENGINE))
            raise ValueError(f"paramwise_cfg has {', '.join(unknown)}: {valid} are valid")
        # MMEngine asks for no groups if there are no options; this one changes nothing.
        super().__init__(optim_wrapper_cfg, {"bypass_duplicate": False, **options})
        if self.layer_decay != 1 and self.base_lr is None:
            raise ValueError(f"layer_decay={self.layer_decay!r} needs optimizer.lr")

    def add_params(self, params: list[dict], module: nn.Module, prefix: str = "", **kwargs) -> None:
        """As MMEngine's, with the rules applied once all parameters are there."""
        super().add_params(params, module, prefix, **kwargs)
        if prefix:
            return
        exempt = no_weight_decay(module, no_decay_bias=self.no_decay_bias)
        scales = lr_scales(module, self.layer_decay)
        names = {parameter: name for name, parameter in module.named_parameters()}
        for group in params:
            name = names[group["params"][0]]
            if name in exempt and "decay_mult" not in group:
                group["weight_decay"] = 0.0
            if scales[name] != 1:
                group["lr"] = group.get("lr", self.base_lr) * scales[name]
        params[:] = merged(params)
