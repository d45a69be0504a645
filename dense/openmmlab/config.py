"""Configs as the command lines over mmengine's Runner take them."""

from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.runner import Runner

from dense.openmmlab.runner import DenseRunner


class ConfigError(ValueError):
    """Something a config or a command line names is missing or wrong."""


def load_config(path: str | Path, overrides: dict[str, Any] | None = None) -> Config:
    """Read a config.

    Args:
        path: the ``.py`` file.
        overrides: what ``--cfg-options`` gave, such as ``{"model.backbone.init": None}``.

    Raises:
        ConfigError: no such file, or it cannot be read as a config.
    """
    if not Path(path).is_file():
        raise ConfigError(f"no config file at {path}")
    try:
        cfg = Config.fromfile(path)
        if overrides:
            cfg.merge_from_dict(overrides)
    except ImportError:
        raise
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(f"{path}: {reason}") from error
    return cfg


def use_amp(cfg: Config, dtype: str | None = None) -> None:
    """Train in mixed precision, with dynamic loss scaling in float16.

    Args:
        cfg: changed in place.
        dtype: ``"bfloat16"``, ``"float16"``, or None for what autocast takes by itself.

    Raises:
        ConfigError: the config's optimizer wrapper is none that has an AMP twin.
    """
    kind = cfg.optim_wrapper.type
    if kind not in ("OptimWrapper", "AmpOptimWrapper"):
        raise ConfigError(f"--amp: optim_wrapper.type={kind!r} has no AMP form, OptimWrapper has")
    cfg.optim_wrapper.type = "AmpOptimWrapper"
    if dtype is not None:
        cfg.optim_wrapper.setdefault("dtype", dtype)
    # bfloat16 has float32's range: nothing is to be scaled.
    scaled = cfg.optim_wrapper.get("dtype") != "bfloat16"
    cfg.optim_wrapper.setdefault("loss_scale", "dynamic" if scaled else 1.0)


def best_half() -> str:
    """The half precision of this device: bfloat16 where it has that."""
    bfloat16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    return "bfloat16" if bfloat16 else "float16"


def build_runner(cfg: Config) -> Runner:
    """Build a :class:`.runner.DenseRunner` from a config, ignoring its ``runner_type``.

    Raises:
        ConfigError: the model cannot be built as the config describes it.
    """
    try:
        return DenseRunner.from_cfg(cfg)
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{cfg.filename}: {error.args[0] if error.args else error}") from error
