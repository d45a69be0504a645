"""Checks of mmengine configs before anything is built: misspelt keys, values of another type."""

import inspect
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from functools import cache
from typing import Any

from mmengine import registry as registries
from mmengine.config import Config
from mmengine.registry import Registry
from mmengine.runner import Runner
from torch.utils.data import DataLoader

from dense import options

# Top-level keys that the tools, MMEngine and the frameworks read besides the runner's arguments.
_MORE = (
    *("compile", "sync_bn", "find_unused_parameters", "model_wrapper_cfg", "auto_scale_lr"),
    *("runner_type", "custom_imports", "vis_backends", "data", "total_batch_size"),
    *("tta_model", "tta_pipeline", "backend_args", "data_root", "dataset_type"),
)
_OF_RUNNER = set(inspect.signature(Runner.__init__).parameters) - {"self", "cfg"}
TOP_LEVEL = {*_OF_RUNNER, *_MORE}
# What is built when training begins. Models are built with the runner, and raise then; the dicts of
# their norms and convolutions are read by functions of their own.
_BUILT_LATE = (
    *(registries.DATASETS, registries.TRANSFORMS, registries.DATA_SAMPLERS, registries.HOOKS),
    *(registries.LOOPS, registries.OPTIMIZERS, registries.OPTIM_WRAPPERS, registries.METRICS),
    *(registries.PARAM_SCHEDULERS, registries.VISBACKENDS),
)
# Classes that pass keywords on, and the functions that take them.
_PASSED_ON = {"CheckpointHook": Runner.save_checkpoint}
_LOADERS = ("train_dataloader", "val_dataloader", "test_dataloader")
_OF_LOADERS = {*inspect.signature(DataLoader.__init__).parameters, "_delete_"} - {"self"}
# Keys beside "type" that a builder takes out before it calls the class.
_OF_BUILDERS = {
    *("type", "_scope_", "priority", "constructor", "paramwise_cfg", "convert_to_iter_based"),
    *("collate_fn", "init_cfg"),
}


def wrong_overrides(cfg: Config, overrides: Mapping[str, Any]) -> str | None:
    """What is wrong with ``--cfg-options``, or None.

    A key must exist in the config, be an argument of the class that its dict describes, or be one
    that the runner reads.
    """
    for key, value in overrides.items():
        node: Any = cfg._cfg_dict
        parts = key.split(".")
        for depth, part in enumerate(parts):
            place = ".".join(parts[:depth])
            if isinstance(node, list | tuple):
                if not part.isdigit() or int(part) >= len(node):
                    return f"--cfg-options {key}: {place} has the items 0 to {len(node) - 1}"
                node = node[int(part)]
            elif not isinstance(node, Mapping):
                return f"--cfg-options {key}: {place} is {node!r}, which has nothing below it"
            elif part in node:
                node = node[part]
            else:
                valid = {*node, *(TOP_LEVEL if not depth else ())}
                # An override may name another class too.
                described = {**node, "type": overrides.get(f"{place}.type", node.get("type"))}
                known = _arguments(cfg, described, models=True)
                known = _OF_LOADERS if place in _LOADERS else known
                is_open = depth and (known is None or place.endswith("_cfg"))
                valid |= known or set()
                if part not in valid and not is_open:
                    where = f"{place} has" if place else "the config has"
                    return f"--cfg-options {key}: {where} no {part!r}{options.near(part, valid)}"
                node = None
                break
        if wrong := options.wrong_value(key, node, value):
            return f"--cfg-options {wrong}"
    return None


def wrong_keys(cfg: Config) -> str | None:
    """The first misspelt key or value out of range of a config, or None."""
    for key in cfg:
        # A config may have variables of its own: only a runner's key, misspelt, is refused.
        close = get_close_matches(key, _OF_RUNNER, n=1, cutoff=0.85)
        if key not in TOP_LEVEL and close:
            return f"{key} is no key of a config; did you mean {close[0]!r}?"
    for place, node in _typed(cfg._cfg_dict, ""):
        valid = _arguments(cfg, node)
        for key, value in node.items():
            if valid is not None and key not in valid and key not in _OF_BUILDERS:
                near = options.near(key, valid)
                return f"{place}: {node['type']} has no argument {key!r}{near}"
            if wrong := options.wrong_range(f"{place}.{key}", value):
                return wrong
    for place in ("train_cfg", *_LOADERS):
        for key, value in (cfg.get(place) or {}).items():
            if place in _LOADERS and key not in _OF_LOADERS:
                return f"{place} has no {key!r}{options.near(key, _OF_LOADERS)}"
            named = f"{place}.{key}"
            if wrong := options.wrong_range(named, value):
                return wrong
            if key in ("max_iters", "max_epochs", "batch_size", "num_workers") and isinstance(
                value, str
            ):
                return f"{named}={value!r}: a number is needed"
    return None


def _typed(node: Any, place: str) -> Iterator[tuple[str, Mapping]]:
    """All dicts with a ``type`` below a node, by their place."""
    if isinstance(node, Mapping):
        if isinstance(node.get("type"), str):
            yield place or "the config", node
        for key, value in node.items():
            yield from _typed(value, f"{place}.{key}" if place else str(key))
    elif isinstance(node, list | tuple):
        for index, value in enumerate(node):
            yield from _typed(value, f"{place}.{index}")


def _arguments(cfg: Config, node: Mapping, models: bool = False) -> set[str] | None:
    """Arguments of the class that a dict describes; None if it is unknown or takes any."""
    kind = node.get("type")
    if not isinstance(kind, str):
        return None
    registers = (*_BUILT_LATE, registries.MODELS) if models else _BUILT_LATE
    return _arguments_of(kind, cfg.get("default_scope"), registers)


@cache
def _arguments_of(kind: str, scope: str | None, registers: tuple[Registry, ...]) -> set[str] | None:
    found = {id(c): c for c in (_lookup(r, kind, scope) for r in registers) if c is not None}
    if len(found) != 1:
        return None
    [target] = found.values()
    more = inspect.signature(_PASSED_ON[kind]).parameters if kind in _PASSED_ON else ()
    try:
        parameters = inspect.signature(target).parameters.values()
    except (TypeError, ValueError):
        return None
    if any(p.kind is p.VAR_KEYWORD for p in parameters) and not more:
        return None
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return {p.name for p in parameters if p.kind not in kinds} | set(more)


def _lookup(registry: Registry, kind: str, scope: str | None) -> Any:
    for name in dict.fromkeys((f"{scope}.{kind}" if scope else kind, kind)):
        # Unknown scopes and modules that cannot be imported raise various errors.
        try:
            found = registry.get(name)
        except Exception:
            continue
        if found is not None:
            return found
    return None
