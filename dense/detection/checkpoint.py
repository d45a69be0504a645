"""Detectron2's checkpointer with atomic writes, safe reads and checked loads."""

import logging
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.utils import comm
from torch import nn

from backbones import CheckpointError
from backbones.reading import not_finite, refuse_not_finite, why_unsafe
from dense import files
from dense.detection.backbone import PyramidBackbone

_logger = logging.getLogger(__name__)


BEST = "model_best"
# As Detectron2 names it.
FINAL = "model_final"


class WholeCheckpointer(DetectionCheckpointer):
    """Checkpointer that writes files atomically and resumes from the newest intact one.

    Args:
        model: the detector, or the DDP module around it.
        save_dir: the folder of the checkpoints.
        classes: class names, saved under ``"classes"``.
        seed: the run's seed, saved under ``"seed"``.
        **checkpointables: as in Detectron2, such as ``trainer=trainer``.
    """

    def __init__(
        self,
        model: nn.Module,
        save_dir: str = "",
        *,
        classes: list[str] | None = None,
        seed: int | None = None,
        **checkpointables: Any,
    ):
        super().__init__(model, save_dir, **checkpointables)
        self.classes, self.seed = classes, seed

    def save(self, name: str, **kwargs: Any) -> None:
        """Write ``<name>.pth`` atomically, then name it in ``last_checkpoint`` unless the best.

        Raises:
            FloatingPointError: a weight is NaN or infinite; nothing is written.
            OSError: the disk has too little space for the file.
        """
        if not self.save_dir or not self.save_to_disk:
            return
        about = {"classes": self.classes, "seed": self.seed}
        weights = self.model.state_dict()
        if bad := not_finite(weights):
            raise FloatingPointError(
                f"{bad[0]} and {len(bad) - 1} other weights have NaN or infinite values: "
                f"{name}.pth is not written; a lower optimizer.lr may help"
            )
        data = {"model": weights, **about, **kwargs}
        data.update((key, obj.state_dict()) for key, obj in self.checkpointables.items())
        path = Path(self.save_dir, f"{name}.pth")
        _logger.info(f"Saving checkpoint to {path}")
        # Optimizers that train keep tensors in addition to the weights: this is the least.
        size = sum(value.nbytes for value in weights.values())
        files.write(path, lambda partial: torch.save(data, partial), size=size)
        if name != BEST:
            files.write(Path(self.save_dir, "last_checkpoint"), path.name)

    def copy(self, path: str, name: str) -> None:
        """Write a checkpoint again as ``<name>.pth``, the last one then."""
        other = Path(self.save_dir, f"{name}.pth")
        size = os.path.getsize(path)
        files.write(other, lambda partial: shutil.copyfile(path, partial), size=size)
        files.write(Path(self.save_dir, "last_checkpoint"), other.name)

    @staticmethod
    def read_classes(path: str) -> list[str] | None:
        """Class names saved in a checkpoint; None if it has none or is not a local file.

        Raises:
            CheckpointError: the file is damaged or holds more than weights and plain values.
        """
        return _read(path, mmap=True).get("classes") if os.path.isfile(path) else None

    def last_whole(self) -> str | None:
        """Path of the newest intact checkpoint, None without one; skipped files are logged.

        The main process chooses for all processes.

        Raises:
            CheckpointError: all checkpoints are damaged.
        """
        found = self._find_last_whole() if comm.is_main_process() else None
        path, damaged = comm.all_gather(found)[0]
        if damaged and path is None:
            raise CheckpointError(
                f"{damaged[0]}, and {self.save_dir} has no other to resume: without it the "
                "training starts from the beginning"
            )
        return path

    def load_weights(self, path: str, *, complete: bool) -> dict[str, Any]:
        """Load a detector's weights, without optimizer or iteration, and log which matched.

        Args:
            path: a ``.pth`` with Detectron2's keys, or its URL.
            complete: require all weights, for evaluation and prediction. False requires the
                backbone's only, to fine-tune on other classes.

        Returns:
            The other entries of the file.

        Raises:
            CheckpointError: the file does not exist, is damaged, holds more than weights and plain
                values, or lacks a required weight.
        """
        if "://" not in path and not os.path.isfile(path):
            raise CheckpointError(f"checkpoint {path} does not exist")
        extra = self.load(path, checkpointables=[])
        self._report(path, prefixes=("",) if complete else self._backbones())
        return extra

    def resume(self, path: str) -> dict[str, Any]:
        """Load model, optimizer and iteration of an earlier run; returns the other entries.

        Raises:
            CheckpointError: the file is damaged or belongs to another model.
        """
        try:
            extra = self.load(path)
        except ValueError:
            # The optimizer's state does not fit; that of the model says why.
            self._report(path, prefixes=("",))
            raise
        self._report(path, prefixes=("",))
        return extra

    def _report(self, path: str, prefixes: tuple[str, ...]) -> None:
        """Log the matches of the last load; raise if a tensor under a prefix is absent."""
        unfit = self._incompatible
        absent = {k for k, *_ in unfit.incorrect_shapes} | set(unfit.missing_keys)
        absent = sorted(k for k in absent if not k.endswith("num_batches_tracked"))
        total = len(self.model.state_dict())
        _logger.info(
            f"{path}: {total - len(absent)} of {total} tensors matched, {len(absent)} missing or "
            f"of another shape, {len(unfit.unexpected_keys)} unexpected"
        )
        needed = [k for k in absent if k.startswith(prefixes)]
        if needed:
            raise CheckpointError(
                f"{path} does not fit: {len(needed)} tensors of this model are missing or have "
                f"another shape, such as {needed[0]} (weights of a backbone alone belong in "
                "model.backbone.bottom_up.init)"
            )

    def _backbones(self) -> tuple[str, ...]:
        """Prefixes of our backbones in the detector; the empty prefix if there are none."""
        modules = self.model.named_modules()
        return tuple(f"{n}." for n, m in modules if isinstance(m, PyramidBackbone)) or ("",)

    def _find_last_whole(self) -> tuple[str | None, list[str]]:
        """The newest intact checkpoint, and what is wrong with the newer ones."""
        # The best one repeats another; written after the last iteration, it counts one more.
        found = [p for p in Path(self.save_dir).glob("*.pth") if p.stem != BEST]
        newest_first = sorted(found, key=lambda p: p.stat().st_mtime_ns, reverse=True)
        damaged = []
        for path in newest_first:
            try:
                content = _read(str(path), mmap=True)
            except CheckpointError as error:
                _logger.warning(f"{error}; trying the one before it")
                damaged.append(str(error))
                continue
            if "trainer" in content and "iteration" in content:
                return str(path), damaged
        return None, damaged

    def _load_file(self, filename: str) -> dict[str, Any]:
        content = _read(filename)
        refuse_not_finite(content, filename)
        return content if "model" in content else {"model": content}

    def _load_model(self, checkpoint: Any):
        self._incompatible = super()._load_model(checkpoint)
        return self._incompatible


def _read(path: str, mmap: bool = False) -> dict[str, Any]:
    """Read a checkpoint of weights and plain values."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:
        raise CheckpointError(why_unsafe(error, f"checkpoint {path}")) from error
    # The type of exception depends on where the file is damaged.
    except Exception as error:
        reason = str(error).strip().splitlines()[:1] or [type(error).__name__]
        raise CheckpointError(
            f"checkpoint {path} is damaged or holds more than weights ({reason[0]})"
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"checkpoint {path} holds a {type(content).__name__}, not a dict")
    return content
