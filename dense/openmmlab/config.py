"""Config handling shared by the command-line tools on mmengine's Runner."""

from pathlib import Path
from typing import Any

from mmengine.config import Config, ConfigDict
from mmengine.runner import Runner

from backbones.ablations import AblationError, ablated
from dense.amp import best_half
from dense.openmmlab import announcing as announcing  # registers them
from dense.openmmlab import checking
from dense.openmmlab import hooks as hooks
from dense.openmmlab import resuming as resuming
from dense.openmmlab.runner import DenseRunner
from dense.openmmlab.schedule import TIMES
from dense.options import scaled
from dense.waiting import waiting


class ConfigError(ValueError):
    """A config or a command line names something that is missing or invalid."""


def load_config(path: str | Path, overrides: dict[str, Any] | None = None) -> Config:
    """Read an mmengine config.

    >>> cfg = load_config("configs/pretraining/swin_nano.py", {"train_cfg.max_epochs": 5})

    Args:
        path: the ``.py`` file.
        overrides: the values of ``--cfg-options``, by dotted key.

    Raises:
        ConfigError: the file does not exist or is not a valid config, or an override names a key
            that the config cannot have, or has a value of another type.
    """
    if not Path(path).is_file():
        raise ConfigError(f"no config file at {path}")
    try:
        cfg = Config.fromfile(path)
        if overrides:
            if wrong := checking.wrong_overrides(cfg, overrides):
                raise ConfigError(wrong)
            cfg.merge_from_dict(overrides)
    except (ImportError, ConfigError):
        raise
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(f"{path}: {reason}") from error
    return cfg


def require_task(cfg: Config, task: str, *keys: str) -> None:
    """Refuse a config of another task, or one that lacks what its tool reads.

    >>> require_task(cfg, "segmentation", "model", "test_dataloader")

    Args:
        cfg: the config.
        task: ``"segmentation"`` or ``"classification"``.
        keys: the keys of the config that are read.

    Raises:
        ConfigError: a key is missing, or the model is of another task.
    """
    if missing := [key for key in keys if key not in cfg]:
        raise ConfigError(f"{cfg.filename} has no {', '.join(missing)}: it is no config of {task}")
    is_classifier = cfg.model.get("type") == "ImageClassifier"
    if is_classifier != (task == "classification") or (
        task == "segmentation" and cfg.get("default_scope") == "mmdet"
    ):
        raise ConfigError(
            f"{cfg.filename}: model.type={cfg.model.get('type')!r} is of no config of {task}"
        )


def use_amp(cfg: Config, dtype: str | None = None) -> None:
    """Enable mixed precision; the loss is scaled dynamically unless the type is bfloat16.

    Args:
        cfg: changed in place; an ``optim_wrapper.dtype`` in it takes precedence.
        dtype: ``"bfloat16"`` or ``"float16"``; None takes :func:`dense.amp.best_half`.

    Raises:
        ConfigError: the config's optimizer wrapper has no AMP counterpart.
    """
    kind = cfg.optim_wrapper.type
    if kind not in ("OptimWrapper", "AmpOptimWrapper"):
        raise ConfigError(f"--amp needs optim_wrapper.type='OptimWrapper', not {kind!r}")
    cfg.optim_wrapper.type = "AmpOptimWrapper"
    cfg.optim_wrapper.setdefault("dtype", dtype or best_half())
    # bfloat16 has float32's exponent range and needs no scaling.
    scaled = cfg.optim_wrapper.dtype != "bfloat16"
    cfg.optim_wrapper.setdefault("loss_scale", "dynamic" if scaled else 1.0)


def config_values(path: Path) -> dict[str, Any]:
    """A config as plain dicts and lists."""
    return Config.fromfile(path).to_dict()


def set_length(cfg: Config, unit: str, length: int) -> None:
    """Train for another number of iterations or epochs.

    Warm-up, milestones, the ends of schedules, evaluation and checkpoints move in proportion.

    >>> set_length(cfg, "iters", 4000)

    Args:
        cfg: changed in place.
        unit: ``"iters"`` or ``"epochs"``.
        length: how many.

    Raises:
        ConfigError: the config counts the other.
    """
    loop, key = cfg.train_cfg, f"max_{unit}"
    if key not in loop:
        raise ConfigError(f"--{unit}: {cfg.filename} has no train_cfg.{key}")
    factor = length / loop[key]
    loop[key] = length
    if "val_interval" in loop:
        loop.val_interval = scaled(loop.val_interval, factor)
    if changes := loop.get("dynamic_intervals"):
        loop.dynamic_intervals = [tuple(scaled(n, factor) for n in pair) for pair in changes]
    hook = cfg.default_hooks.get("checkpoint")
    if hook and "interval" in hook:
        hook.interval = scaled(hook.interval, factor)
    schedulers = cfg.get("param_scheduler") or []
    for schedule in schedulers if isinstance(schedulers, list) else [schedulers]:
        # Parts of an epoch are whole iterations after the conversion.
        exact = schedule.get("convert_to_iter_based")
        for name in TIMES & set(schedule):
            value = schedule[name]
            if name == "milestones":
                schedule[name] = [scaled(n, factor) for n in value]
            elif value:
                schedule[name] = value * factor if exact else scaled(value, factor)


def use_early_stop(cfg: Config, patience: int) -> None:
    """Stop when the metric of the best checkpoint has not risen in ``patience`` evaluations.

    Raises:
        ConfigError: the config keeps no best checkpoint.
    """
    monitor = (cfg.default_hooks.get("checkpoint") or {}).get("save_best")
    if not isinstance(monitor, str) or monitor == "auto":
        raise ConfigError(
            f"--early-stop: default_hooks.checkpoint.save_best of {cfg.filename} names no metric"
        )
    hooks = cfg.get("custom_hooks") or []
    cfg.custom_hooks = [*hooks, dict(type="EarlyStop", monitor=monitor, patience=patience)]


def use_tta(cfg: Config) -> None:
    """Test with augmentation: the config's ``tta_pipeline``, and ``tta_model`` around its model.

    Args:
        cfg: changed in place, after everything else that reads ``cfg.model``.

    Raises:
        ConfigError: the config has none.
    """
    if missing := [key for key in ("tta_pipeline", "tta_model") if not cfg.get(key)]:
        raise ConfigError(f"--tta: {cfg.filename} has no {' and no '.join(missing)}")
    cfg.test_dataloader.dataset.pipeline = cfg.tta_pipeline
    cfg.model = dict(cfg.tta_model, module=cfg.model)


def use_ablation(network: ConfigDict, name: str, key: str, dense: bool = True) -> None:
    """Replace a network by a row of the paper's ablations, in the network's size.

    >>> use_ablation(cfg.model.backbone, "dw_conv_se", "type")

    Args:
        network: the part of a config that describes the network; changed in place.
        name: a key of :data:`backbones.ablations.ABLATIONS`.
        key: the key of the network's name.
        dense: whether it is for dense prediction.

    Raises:
        ConfigError: the name is unknown, or the row cannot replace the network.
    """
    try:
        network[key], options = ablated(name, network[key], dense)
    except AblationError as error:
        raise ConfigError(f"--ablation: {error}") from error
    network.update(options)


# Added to the custom_hooks of a config: one that names hooks of its own would lose them.
_HOOKS = (
    *("Announce", "SeedEveryIteration", "StopOnNonFiniteLoss", "ValidateOnResume"),
    "StopOnSignal",
)


def build_runner(cfg: Config) -> Runner:
    """Build a :class:`.runner.DenseRunner` from a config, ignoring its ``runner_type``.

    The hooks that seed, stop and validate are added to the config's ``custom_hooks``.

    Raises:
        ConfigError: the config describes a model or a run that cannot be built.
    """
    if wrong := checking.wrong_keys(cfg):
        raise ConfigError(f"{cfg.filename}: {wrong}")
    own = list(cfg.get("custom_hooks") or [])
    named = {hook.get("type") for hook in own}
    cfg.custom_hooks = own + [dict(type=name) for name in _HOOKS if name not in named]
    try:
        with waiting("building the model"):
            return DenseRunner.from_cfg(cfg)
    except (IndexError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{cfg.filename}: {error.args[0] if error.args else error}") from error
