"""Which parameters decay, and how fast each layer learns: one rule for every framework.

- Downstream (Detectron2, MMEngine): no weight decay on norms, batch norms among them, with their
  biases, nor on relative position bias tables and absolute position embeddings.
- ImageNet pretraining (``no_decay_bias``): on no other bias either, as Swin's code has it. For our
  networks this is what timm's own ``param_groups_weight_decay`` does.
- Layer-wise decay of the learning rate: ``base_lr * layer_decay ** depth``, where depth is 0 for
  what is not the backbone (heads, norms of outputs), 1 for the last block, and largest for the
  patch embedding. The layers are those of :meth:`backbones.Pyramid.group_matcher`, so that timm's
  ``create_optimizer_v2(model, layer_decay=...)`` scales alike.
"""

from collections.abc import Iterator
from types import SimpleNamespace

from timm.models import group_parameters
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

_NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
_POSITIONS = ("relative_position_bias_table", "absolute_pos_embed")


def no_weight_decay(model: nn.Module, *, no_decay_bias: bool = False) -> set[str]:
    """Names of the parameters that are not decayed.

    Args:
        model: a backbone, or a whole classifier, detector or segmentor.
        no_decay_bias: add every other bias and vector, the rule of ImageNet pretraining.
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
    """The factor of each parameter's learning rate, by name.

    Args:
        model: a backbone, or anything that holds some; what has a ``group_matcher`` (timm's
            protocol) is a backbone.
        layer_decay: the factor from a layer to the one before it, above 0 and at most 1.

    Raises:
        ValueError: ``layer_decay`` is out of range, or below 1 and nothing in ``model`` has a
            ``group_matcher``.
    """
    if not 0 < layer_decay <= 1:
        raise ValueError(f"layer_decay={layer_decay!r}: above 0 and at most 1 is valid")
    scales = {name: 1.0 for name, _ in model.named_parameters(remove_duplicate=False)}
    if layer_decay == 1:
        return scales
    found = False
    for prefix, backbone in _grouped(model):
        found = True
        # A name that nothing matches stands for the heads, whether or not the backbone has one.
        named = [*backbone.named_parameters(), ("", None)]
        parameters = SimpleNamespace(named_parameters=lambda named=named: named)
        layers = group_parameters(parameters, backbone.group_matcher(), reverse=True)
        head = layers.pop("")
        for name, layer in layers.items():
            scales[f"{prefix}.{name}" if prefix else name] = layer_decay ** (head - layer)
    if not found:
        raise ValueError(
            f"layer_decay={layer_decay!r}: no part of {type(model).__name__} has a group_matcher "
            "that says what its layers are; ours and timm's backbones have"
        )
    return scales


def param_groups(
    model: nn.Module,
    base_lr: float | None = None,
    *,
    layer_decay: float = 1.0,
    no_decay_bias: bool = False,
) -> list[dict]:
    """The parameters that learn, in as few groups as the rules need, for any torch optimizer.

    In a Detectron2 LazyConfig it takes the place of ``get_default_optimizer_params``::

        optimizer = L(torch.optim.AdamW)(
            params=L(param_groups)(base_lr="${..lr}", layer_decay=0.9), lr=1e-4, weight_decay=0.05
        )

    Args:
        model: a backbone, or a whole classifier, detector or segmentor.
        base_lr: the optimizer's learning rate; ``layer_decay`` needs it.
        layer_decay: see :func:`lr_scales`.
        no_decay_bias: see :func:`no_weight_decay`.

    Returns:
        Groups with ``weight_decay`` 0 where nothing decays (elsewhere the optimizer's own holds),
        and ``lr`` if ``base_lr`` is given.

    Raises:
        ValueError: ``layer_decay`` cannot be used, or lacks ``base_lr``.
    """
    if layer_decay != 1 and base_lr is None:
        raise ValueError(f"layer_decay={layer_decay!r} needs base_lr, what it is a fraction of")
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
    """Groups of the same settings as one group; optimizers step a group at once."""
    found: dict[str, dict] = {}
    for group in groups:
        settings = {k: v for k, v in group.items() if k != "params"}
        first = found.setdefault(repr(sorted(settings.items())), {"params": [], **settings})
        first["params"].extend(group["params"])
    return list(found.values())


def _grouped(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The outermost modules that know their layers, with their names."""
    outer: list[str] = []
    for name, module in model.named_modules():
        inside = any(not o or name.startswith(f"{o}.") for o in outer)
        if hasattr(module, "group_matcher") and not inside:
            outer.append(name)
            yield name, module
