"""MMEngine's Runner with CPU fallbacks, safe resuming and safe checkpoint files."""

import copy
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.dist import master_only
from mmengine.hooks import EMAHook
from mmengine.optim import AmpOptimWrapper, OptimWrapper
from mmengine.registry import DATASETS, MODELS, RUNNERS
from mmengine.runner import Runner
from torch import nn
from torch.utils.data import DataLoader

import backbones
from backbones.reading import not_finite, refuse_not_finite
from dense import files
from dense.amp import warn_of_float16
from dense.backbone import revert_sync_batchnorm
from dense.openmmlab import announcing as announcing  # registers a hook of every saved config
from dense.openmmlab import checkpoints
from dense.openmmlab.backbone import fit_channels
from dense.openmmlab.schedule import TIMES, without_empty
from dense.runs import earlier
from dense.seeding import SeededDataset
from dense.waiting import waiting


@RUNNERS.register_module()
class DenseRunner(Runner):
    """MMEngine's Runner with fallbacks for CPUs and checkpoints that survive a kill.

    ``runner_type = "DenseRunner"`` in a config selects it, in MMSegmentation's and MMDetection's
    own tools too. Without CUDA, SyncBN becomes BN, AMP float32 and NCCL gloo. Checkpoints are
    written atomically and read with ``weights_only``; ``resume`` takes the newest intact one and
    ignores ``init``; weights that do not fit raise CheckpointError.
    """

    def __init__(
        self,
        model: nn.Module | dict,
        work_dir: str,
        *,
        load_from: str | None = None,
        resume: bool = False,
        **kwargs: Any,
    ):
        found, damaged = None, []
        search = resume and load_from is None
        if search:
            with waiting(f"reading the checkpoints in {work_dir}"):
                found, damaged = checkpoints.newest_whole(work_dir)
            if damaged and found is None:
                raise backbones.CheckpointError(
                    f"{damaged[0]} is truncated or damaged, and {work_dir} has no other "
                    "checkpoint to resume: without it the training starts from the beginning"
                )
            load_from, resume = (str(found), True) if found else (None, False)
        super().__init__(model, work_dir, load_from=load_from, resume=resume, **kwargs)

        for path in damaged:
            self.logger.warning(f"{path} is truncated or damaged and is not used")
        if search and found is None:
            self.logger.warning(f"no checkpoint to resume in {work_dir}: training from scratch")
        elif resume:
            self.logger.info(f"resuming from {load_from}")
            for module in self.model.modules():
                # Of a backbone or a classifier: the weights that a new training starts from.
                if isinstance(getattr(module, "init", None), str):
                    module.init = None
        if self.distributed and not torch.cuda.is_available():
            self.logger.info(f"no CUDA: {self.world_size} processes on the CPU over gloo")

    @classmethod
    def from_cfg(cls, cfg: Config) -> "DenseRunner":
        """As in MMEngine; necks and heads take the channels of the backbone that is named."""
        cfg = copy.deepcopy(cfg)
        if isinstance(cfg.get("model"), dict):
            fit_channels(cfg["model"])
        return super().from_cfg(cfg)

    def setup_env(self, env_cfg: dict) -> None:
        """As in MMEngine, with gloo instead of NCCL if there is no CUDA.

        Raises:
            ValueError: the launcher assigns GPUs and there are none.
        """
        if self.distributed and not torch.cuda.is_available():
            if self.launcher != "pytorch":
                raise ValueError(
                    f"launcher {self.launcher!r} needs a GPU per process and there is none: "
                    "start CPU processes with torchrun and --launcher pytorch"
                )
            if not torch.distributed.is_initialized():
                torch.distributed.init_process_group("gloo")
        super().setup_env(env_cfg)

    def build_model(self, model: nn.Module | dict) -> nn.Module:
        """As in MMEngine, with SyncBN replaced by BN if there is no CUDA.

        Raises:
            ValueError: the backbone's type is not registered; the message lists ours.
        """
        if isinstance(model, dict):
            # With test-time augmentation the model is another one's module.
            _refuse_unknown_backbone(model.get("module", model).get("backbone"))
        return revert_sync_batchnorm(super().build_model(model))

    def wrap_model(self, model_wrapper_cfg: dict | None, model: nn.Module) -> nn.Module:
        """As in MMEngine, without ``device_ids`` if there is no CUDA."""
        if self.distributed and not torch.cuda.is_available():
            model_wrapper_cfg = {
                "type": "MMDistributedDataParallel",
                "broadcast_buffers": False,
                "find_unused_parameters": self.cfg.get("find_unused_parameters", False),
                **(model_wrapper_cfg or {}),
                "device_ids": None,
            }
        return super().wrap_model(model_wrapper_cfg, model)

    def build_optim_wrapper(self, optim_wrapper: OptimWrapper | dict) -> OptimWrapper:
        """As in MMEngine, with float32 instead of AMP if there is no CUDA.

        Float16 AMP with I-D-DW-Conv logs a warning.
        """
        if (
            isinstance(optim_wrapper, dict)
            and optim_wrapper.get("type") == "AmpOptimWrapper"
            and not torch.cuda.is_available()
        ):
            self.logger.warning("no CUDA: AMP falls back to float32")
            amp_only = ("loss_scale", "dtype", "use_fsdp")
            optim_wrapper = {k: v for k, v in optim_wrapper.items() if k not in amp_only}
            optim_wrapper["type"] = "OptimWrapper"
        wrapper = super().build_optim_wrapper(optim_wrapper)
        if isinstance(wrapper, AmpOptimWrapper):
            # Without a dtype, it is autocast's default.
            dtype = wrapper.cast_dtype or torch.float16
            warn_of_float16(self.model, dtype, "optim_wrapper.dtype")
        return wrapper

    @staticmethod
    def build_dataloader(
        dataloader: DataLoader | dict, seed: int | None = None, diff_rank_seed: bool = False
    ) -> DataLoader:
        """As in MMEngine; a data set under a ResumableSampler becomes a SeededDataset."""
        if isinstance(dataloader, dict):
            sampler = dataloader.get("sampler")
            if isinstance(sampler, dict) and sampler.get("type") == "ResumableSampler":
                dataset = dataloader["dataset"]
                if isinstance(dataset, dict):
                    dataset = DATASETS.build(dataset)
                    if hasattr(dataset, "full_init"):
                        dataset.full_init()
                dataloader = dict(dataloader, dataset=SeededDataset(dataset))
        return Runner.build_dataloader(dataloader, seed, diff_rank_seed)

    def load_checkpoint(
        self,
        filename: str,
        map_location: Any = "cpu",
        strict: bool = True,
        revise_keys: list = [(r"^module.", "")],  # noqa: B006
    ) -> dict:
        """As in MMEngine, but read with ``weights_only``.

        Raises:
            CheckpointError: the file cannot be read, does not fit, has NaN or infinite weights, was
                trained on other classes than the resumed run, or has averaged weights and the
                resumed run has no EMA hook.
        """
        try:
            with checkpoints.refusing(filename), checkpoints.safe_reading():
                content = super().load_checkpoint(filename, map_location, strict, revise_keys)
        except backbones.CheckpointError as error:
            raise _named(error, filename, self.cfg) from error
        refuse_not_finite(content, filename)
        if self._resume:
            meta = getattr(self.train_dataloader.dataset, "metainfo", None) or {}
            checkpoints.refuse_other(content, meta.get("classes"), filename)
        averaging = any(isinstance(hook, EMAHook) for hook in self.hooks)
        if self._resume and "ema_state_dict" in content and not averaging:
            raise backbones.CheckpointError(
                f"{filename} is from a run with averaged weights: --resume needs the same --ema"
            )
        return content

    @master_only
    def save_checkpoint(self, out_dir: str, filename: str, *args: Any, **kwargs: Any) -> None:
        """As in MMEngine; local files are written atomically, see :func:`dense.files.write`.

        Raises:
            FloatingPointError: a weight is NaN or infinite; nothing is written.
            OSError: the disk has too little space for the file.
        """
        weights = self.model.state_dict()
        if bad := not_finite(weights):
            raise FloatingPointError(
                f"iteration {self.iter + 1}: {bad[0]} and {len(bad) - 1} other weights have NaN "
                f"or infinite values: {filename} is not written; a lower learning rate may help"
            )
        save = super().save_checkpoint
        if "://" in str(out_dir):
            save(out_dir, filename, *args, **kwargs)
            return
        # Optimizers that train keep tensors in addition to the weights: this is the least.
        size = sum(value.nbytes for value in weights.values())
        files.write(
            Path(out_dir, filename),
            lambda partial: save(out_dir, partial.name, *args, **kwargs),
            size=size,
        )

    def build_param_scheduler(self, scheduler: Any) -> Any:
        """As in MMEngine, without empty schedules; :meth:`resume` keeps the times of the others."""
        if isinstance(scheduler, list):
            scheduler = without_empty(scheduler, self.train_dataloader)
        built = super().build_param_scheduler(scheduler)
        lists = built.values() if isinstance(built, dict) else [built]
        self._times = [
            (one, {key: vars(one)[key] for key in TIMES & set(vars(one))})
            for schedulers in lists
            for one in schedulers
        ]
        return built

    def resume(self, *args: Any, **kwargs: Any) -> None:
        """As in MMEngine, with a warning if the checkpoint's schedules have another length.

        MMEngine goes on with theirs: a training that had ended learns nothing more.
        """
        super().resume(*args, **kwargs)
        changed = {
            f"{type(scheduler).__name__}.{key} is {vars(scheduler)[key]}, the config's is {value}"
            for scheduler, times in getattr(self, "_times", ())
            for key, value in times.items()
            if vars(scheduler)[key] != value
        }
        if changed:
            self.logger.warning(
                f"the checkpoint's schedule stays ({'; '.join(sorted(changed))}): for another "
                "length begin a training from its weights, load_from=CHECKPOINT without --resume"
            )

    def load_or_resume(self) -> None:
        """As in MMEngine; then write the config over an earlier run's, whose checkpoint fits."""
        super().load_or_resume()
        self._write_config()

    def dump_config(self) -> None:
        """As in MMEngine, but atomically, and not into the folder of an earlier training.

        There :meth:`load_or_resume` writes it, when the checkpoint has been found to fit.
        """
        if not earlier(Path(self.work_dir)):
            self._write_config()

    @property
    def _config_path(self) -> Path:
        named = self.cfg.filename
        return Path(self.work_dir, Path(named).name if named else f"{self.timestamp}.py")

    @master_only
    def _write_config(self) -> None:
        files.write(self._config_path, self.cfg.pretty_text)


def _named(
    error: backbones.CheckpointError, filename: str, cfg: Config
) -> backbones.CheckpointError:
    """The error, with both networks if the checkpoint was trained with another one."""
    ours = checkpoints.network_of({"meta": {"cfg": cfg.pretty_text}})
    try:
        with checkpoints.safe_reading():
            content = torch.load(filename, map_location="cpu", weights_only=True, mmap=True)
    # The error at hand says more.
    except Exception:
        return error
    trained = checkpoints.network_of(content)
    if trained is None or trained == ours:
        return error
    return backbones.CheckpointError(f"{filename} is of {trained}, the config of {ours}")


def _refuse_unknown_backbone(backbone: dict | None) -> None:
    kind = backbone.get("type") if isinstance(backbone, dict) else None
    if not isinstance(kind, str):
        return
    with MODELS.switch_scope_and_registry(None) as registry:
        known = registry.get(kind) is not None
    if not known:
        raise ValueError(
            f"model.backbone.type={kind!r}: {', '.join(backbones.MODEL_NAMES)} and the framework's "
            "own are valid"
        )
