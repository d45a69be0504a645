"""Parameter groups for every framework: exemptions from weight decay, layer-wise learning rates.

- Detection and segmentation: no weight decay on weights and biases of norms (batch norms
  included), relative position bias tables and absolute position embeddings.
- ImageNet pretraining (``no_decay_bias=True``): none on any other bias either, as in Swin's code
  and timm's ``param_groups_weight_decay``.
- Layer-wise learning rates: ``base_lr * layer_decay ** depth``. Depth is 0 outside the backbone
  (heads, output norms), 1 for the last block, largest for the patch embedding. The layers are those
  of :meth:`backbones.Pyramid.group_matcher`, as in timm's ``create_optimizer_v2``.
"""

from collections.abc import Iterator
from types import SimpleNamespace

from timm.models import group_parameters
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from backbones.mixers.norm import CenteredBatchNorm2d

_NORMS = (_NormBase, CenteredBatchNorm2d, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
_POSITIONS = ("relative_position_bias_table", "absolute_pos_embed")


def no_weight_decay(model: nn.Module, *, no_decay_bias: bool = False) -> set[str]:
    """Names of the parameters without weight decay.

    >>> exempt = no_weight_decay(model, no_decay_bias=True)

    Args:
        model: a backbone, or a whole classifier, detector or segmentor.
        no_decay_bias: also exempt every other bias and 1-d parameter, as in ImageNet pretraining.
    """
    return {
        f"{prefix}.{name}" if prefix else name
        for prefix, module in model.named_modules(remove_duplicate=False)
        for name, parameter in module.named_parameters(recurse=False)
        if isinstance(module, _NORMS)
        or name in _POSITIONS
        or (no_decay_bias and (name == "bias" or parameter.ndim <= 1))
    }


def lr_scales(model: nn.Module, layer_decay: float) -> dict[str, float]:
    """The learning rate factor of each parameter, by name.

    >>> lr_scales(model, layer_decay=0.9)["backbone.patch_embed.proj.weight"]

    Args:
        model: a backbone, or a model that contains one. Every submodule with timm's
            ``group_matcher`` is a backbone.
        layer_decay: ratio of a layer's learning rate to the next layer's, in (0, 1].

    Raises:
        ValueError: ``layer_decay`` is out of range, or below 1 and no submodule has a
            ``group_matcher``.
    """
    if not 0 < layer_decay <= 1:
        raise ValueError(f"layer_decay={layer_decay!r}: above 0 and at most 1 is valid")
    scales = {name: 1.0 for name, _ in model.named_parameters(remove_duplicate=False)}
    if layer_decay == 1:
        return scales
    backbones = dict(_grouped(model))
    if not backbones:
        raise ValueError(
            f"layer_decay={layer_decay!r}: no part of {type(model).__name__} has a group_matcher "
            "(timm's protocol), which names the layers"
        )
    for prefix, backbone in backbones.items():
        # No pattern matches the empty name, so it is grouped like heads, even if there are none.
        named = [*backbone.named_parameters(), ("", None)]
        parameters = SimpleNamespace(named_parameters=lambda named=named: named)
        layers = group_parameters(parameters, backbone.group_matcher(), reverse=True)
        head = layers.pop("")
        for name, layer in layers.items():
            scales[f"{prefix}.{name}" if prefix else name] = layer_decay ** (head - layer)
    return scales


def param_groups(
    model: nn.Module,
    base_lr: float | None = None,
    *,
    layer_decay: float = 1.0,
    no_decay_bias: bool = False,
) -> list[dict]:
    """Group the trainable parameters for any torch optimizer.

    In a Detectron2 LazyConfig it replaces ``get_default_optimizer_params``::

        optimizer = L(torch.optim.AdamW)(
            params=L(param_groups)(base_lr="${..lr}", layer_decay=0.9), lr=1e-4, weight_decay=0.05
        )

    Args:
        model: a backbone, or a whole classifier, detector or segmentor.
        base_lr: the optimizer's learning rate; required with ``layer_decay``.
        layer_decay: see :func:`lr_scales`.
        no_decay_bias: see :func:`no_weight_decay`.

    Returns:
        Groups with ``weight_decay=0`` for exempt parameters (others take the optimizer's), and
        with ``lr`` if ``base_lr`` is given.

    Raises:
        ValueError: ``layer_decay`` is out of range, fits no submodule, or lacks ``base_lr``.
    """
    if layer_decay != 1 and base_lr is None:
        raise ValueError(f"layer_decay={layer_decay!r} needs base_lr, the rate that it scales")
    exempt = no_weight_decay(model, no_decay_bias=no_decay_bias)
    scales = lr_scales(model, layer_decay)
    singles = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            settings = {} if base_lr is None else {"lr": base_lr * scales[name]}
            if name in exempt:
                settings["weight_decay"] = 0.0
            singles.append({"params": [parameter], **settings})
    return merged(singles)


def merged(groups: list[dict]) -> list[dict]:
    """Merge groups with equal settings: optimizers step the parameters of a group together."""
    found: dict[str, dict] = {}
    for group in groups:
        settings = {k: v for k, v in group.items() if k != "params"}
        first = found.setdefault(repr(sorted(settings.items())), {"params": [], **settings})
        first["params"].extend(group["params"])
    return list(found.values())


def _grouped(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The outermost modules with a ``group_matcher``, with their names."""
    outer: list[str] = []
    for name, module in model.named_modules():
        inside = any(not o or name.startswith(f"{o}.") for o in outer)
        if hasattr(module, "group_matcher") and not inside:
            outer.append(name)
            yield name, module
