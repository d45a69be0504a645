"""Reads LazyConfig files and checks their overrides before anything is built."""

from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path

import yaml
from detectron2.config import LazyConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import OverrideParseException
from omegaconf import DictConfig, ListConfig, OmegaConf

from backbones.ablations import AblationError, ablated
from dense.options import scaled, wrong_value

SECTIONS = ("model", "dataloader", "optimizer", "lr_multiplier", "train")


class LazyConfigError(ValueError):
    """A config, override or data set is invalid; the message is one line."""


ConfigError = LazyConfigError


def load_config(config_file: str, overrides: Sequence[str] = ()) -> DictConfig:
    """Read a LazyConfig ``.py`` or an earlier run's ``config.yaml`` and apply overrides.

    >>> cfg = load_config("work_dirs/mine/config.yaml", ["train.max_iter=100"])

    Args:
        config_file: path of the file.
        overrides: strings ``"path.to.key=value"`` in Hydra's grammar; ``"+path.to.key=value"`` adds
            a new key.

    Raises:
        LazyConfigError: the file does not exist, cannot be read or lacks a section, or an override
            names an unknown key.
    """
    path = Path(config_file)
    if not path.is_file():
        raise LazyConfigError(f"config file {config_file} does not exist")
    if path.suffix not in (".py", ".yaml", ".yml"):
        raise LazyConfigError(
            f"config file {config_file} is neither a LazyConfig .py nor a config.yaml"
        )
    cfg = _read(path)
    missing = [s for s in SECTIONS if s not in cfg]
    if missing:
        raise LazyConfigError(
            f"config file {config_file} has no {', '.join(missing)}: this trainer reads LazyConfig "
            "files (for a yacs YAML use Detectron2's own train_net.py)"
        )
    try:
        parsed = OverridesParser.create().parse_overrides(list(overrides))
    except OverrideParseException as error:
        raise LazyConfigError(
            f"override {error.override!r} is not key=value in Hydra's grammar"
        ) from error
    for text, override in zip(overrides, parsed, strict=True):
        if not override.is_add():
            _check_key(cfg, override.key_or_group, text)
        if override.is_delete():
            raise LazyConfigError(f"override {text!r}: no key can be removed, only set, as to null")
        old = OmegaConf.select(
            cfg,
            override.key_or_group,
            throw_on_resolution_failure=False,
            throw_on_missing=False,
        )
        old = dict(old) if isinstance(old, DictConfig) else old
        if wrong := wrong_value(override.key_or_group, old, override.value()):
            raise LazyConfigError(f"override {wrong}")
    return LazyConfig.apply_overrides(cfg, list(overrides))


def set_length(cfg: DictConfig, iterations: int) -> None:
    """Train for another number of iterations; evaluation and checkpoints move in proportion.

    Warm-up and milestones of ``lr_multiplier`` are parts of ``train.max_iter``.

    Args:
        cfg: changed in place.
        iterations: the new ``train.max_iter``.
    """
    factor = iterations / cfg.train.max_iter
    cfg.train.max_iter = iterations
    cfg.train.eval_period = scaled(cfg.train.eval_period, factor)
    cfg.train.checkpointer.period = scaled(cfg.train.checkpointer.period, factor)


def use_ablation(cfg: DictConfig, name: str) -> None:
    """Replace the backbone by a row of the paper's ablations, in the backbone's size.

    Args:
        cfg: changed in place.
        name: a key of :data:`backbones.ablations.ABLATIONS`.

    Raises:
        LazyConfigError: the name is unknown, or the row cannot replace the config's backbone.
    """
    backbone = cfg.model.get("backbone") or {}
    backbone = backbone.get("bottom_up", backbone)
    try:
        model, options = ablated(name, str(backbone.get("name")), dense=True)
    except AblationError as error:
        raise LazyConfigError(f"--ablation: {error}") from error
    backbone.update(name=model, **options)


def _read(path: Path) -> DictConfig:
    # A .py config runs its author's code, which may raise anything.
    try:
        if path.suffix == ".py":
            return LazyConfig.load(str(path))
        content = yaml.safe_load(path.read_text())
        return OmegaConf.create(content or {}, flags={"allow_objects": True})
    except Exception as error:
        reason = " ".join(str(error).split())
        raise LazyConfigError(f"config file {path}: {type(error).__name__}: {reason}") from error


def _check_key(cfg: DictConfig, key: str, text: str) -> None:
    node = cfg
    parts = key.split(".")
    for depth, part in enumerate(parts):
        keys = _keys(node)
        if part not in keys:
            close = get_close_matches(part, keys)
            here = ".".join(parts[:depth]) or "the config"
            raise LazyConfigError(
                f"override {text!r}: {here} has no {part!r}"
                + (f"; did you mean {close[0]!r}?" if close else "." if keys else "")
                + (f" It has {', '.join(keys)}" if keys else "")
            )
        if depth < len(parts) - 1:
            node = node[int(part) if isinstance(node, ListConfig) else part]


def _keys(node: object) -> list[str]:
    if isinstance(node, DictConfig):
        return [str(k) for k in node]
    if isinstance(node, ListConfig):
        return [str(i) for i in range(len(node))]
    return []
