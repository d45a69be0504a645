"""MMEngine's optimizer wrapper constructor with the rules of :mod:`dense.optim`."""

from typing import Any

from mmengine.optim import DefaultOptimWrapperConstructor
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS
from torch import nn

from dense.optim import lr_scales, merged, no_weight_decay

# The keys of DefaultOptimWrapperConstructor, which silently ignores unknown ones.
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
    """Optimizer constructor with :mod:`dense.optim`'s weight decay and layer-wise rates::

        optim_wrapper = dict(
            constructor="DenseOptimWrapperConstructor",
            optimizer=dict(type="AdamW", lr=1e-4, weight_decay=0.05),
            paramwise_cfg=dict(layer_decay=0.9),
        )

    Args:
        optim_wrapper_cfg: as in MMEngine.
        paramwise_cfg: ``no_decay_bias`` (default False; True for ImageNet pretraining),
            ``layer_decay`` (default 1.0, none) and MMEngine's keys. Layer-wise factors multiply
            the rates of MMEngine's keys; a ``decay_mult`` in ``custom_keys`` takes precedence.

    Raises:
        ValueError: an unknown key in ``paramwise_cfg``, ``layer_decay`` without a learning rate;
            when called, ``layer_decay`` out of range or no ``group_matcher`` in the model.
    """

    def __init__(self, optim_wrapper_cfg: dict, paramwise_cfg: dict | None = None):
        options: dict[str, Any] = dict(paramwise_cfg or {})
        self.no_decay_bias = options.pop("no_decay_bias", False)
        self.layer_decay = options.pop("layer_decay", 1.0)
        if unknown := sorted(set(options) - set(_MMENGINE)):
            valid = ", ".join(("no_decay_bias", "layer_decay", *_MMENGINE))
            raise ValueError(f"paramwise_cfg has {', '.join(unknown)}: {valid} are valid")
        # MMEngine builds no groups without options; this one has no effect.
        super().__init__(optim_wrapper_cfg, {"bypass_duplicate": False, **options})
        if self.layer_decay != 1 and self.base_lr is None:
            raise ValueError(f"layer_decay={self.layer_decay!r} needs optimizer.lr")

    def add_params(self, params: list[dict], module: nn.Module, prefix: str = "", **kwargs) -> None:
        """As in MMEngine; the call for the whole model then applies the rules."""
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
