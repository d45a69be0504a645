"""Detectron2's checkpointer, made to survive a kill and to refuse what it cannot trust."""

import logging
import os
from pathlib import Path
from typing import Any

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.utils import comm
from torch import nn

from backbones import CheckpointError
from dense import files
from dense.detection.backbone import PyramidBackbone

_logger = logging.getLogger(__name__)


class WholeCheckpointer(DetectionCheckpointer):
    """Writes a checkpoint whole or not at all, and resumes from the last whole one.

    Args:
        model: the detector, or the DDP module around it.
        save_dir: where checkpoints lie.
        classes: class names, saved with every checkpoint under ``"classes"``.
        seed: the run's, saved under ``"seed"``.
        **checkpointables: as Detectron2 has it; ``trainer=`` for one.
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
        """Write beside its place, move it there whole, then tag it as the last one."""
        if not self.save_dir or not self.save_to_disk:
            return
        about = {"classes": self.classes, "seed": self.seed}
        data = {"model": self.model.state_dict(), **about, **kwargs}
        data.update((key, obj.state_dict()) for key, obj in self.checkpointables.items())
        path = Path(self.save_dir, f"{name}.pth")
        _logger.info(f"Saving checkpoint to {path}")
        files.write(path, lambda partial: torch.save(data, partial))
        files.write(Path(self.save_dir, "last_checkpoint"), path.name)

    @staticmethod
    def read_classes(path: str) -> list[str] | None:
        """Class names saved in a checkpoint file; None where it has none or is not a local file.

        Raises:
            CheckpointError: the file is damaged or needs more than weights to be read.
        """
        return _read(path, mmap=True).get("classes") if os.path.isfile(path) else None

    def last_whole(self) -> str | None:
        """Path of the newest checkpoint to resume from; the log names the damaged ones before it.

        The main process decides for all.
        """
        path = self._find_last_whole() if comm.is_main_process() else None
        return comm.all_gather(path)[0]

    def load_weights(self, path: str, *, complete: bool) -> dict[str, Any]:
        """Load a detector's weights alone and report what fitted.

        Args:
            path: a ``.pth`` of Detectron2's layout, or a URL of one.
            complete: whether every weight must be there, as evaluation and prediction need it;
                else, to fine-tune on other classes, only the backbone's.

        Returns:
            What else the file holds.

        Raises:
            CheckpointError: no such file, it is damaged or needs more than weights to be read, or
                it leaves the network, or the backbone, partly random.
        """
        if "://" not in path and not os.path.isfile(path):
            raise CheckpointError(f"checkpoint {path} does not exist")
        extra = self.load(path, checkpointables=[])
        self._report(path, prefixes=("",) if complete else self._backbones())
        return extra

    def resume(self, path: str) -> dict[str, Any]:
        """Load everything from a checkpoint of this training; returns what else it holds.

        Raises:
            CheckpointError: it is damaged, or of another model.
        """
        extra = self.load(path)
        self._report(path, prefixes=("",))
        return extra

    def _report(self, path: str, prefixes: tuple[str, ...]) -> None:
        """Log what the last load matched; refuse it when tensors below a prefix are absent."""
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
                f"{path} does not fit: {len(needed)} tensors of this model are missing or of "
                f"another shape in it, {needed[0]} for one (a backbone's own weights, from "
                "ImageNet say, go in model.backbone.bottom_up.init)"
            )

    def _backbones(self) -> tuple[str, ...]:
        """Prefixes of our backbones in the detector; of anything, where it has none of ours."""
        modules = self.model.named_modules()
        return tuple(f"{n}." for n, m in modules if isinstance(m, PyramidBackbone)) or ("",)

    def _find_last_whole(self) -> str | None:
        newest_first = sorted(
            Path(self.save_dir).glob("*.pth"), key=lambda p: p.stat().st_mtime_ns, reverse=True
        )
        for path in newest_first:
            try:
                content = _read(str(path), mmap=True)
            except CheckpointError as error:
                _logger.warning(f"{error}; going on with the one before it")
                continue
            if "trainer" in content and "iteration" in content:
                return str(path)
        return None

    def _load_file(self, filename: str) -> dict[str, Any]:
        content = _read(filename)
        return content if "model" in content else {"model": content}

    def _load_model(self, checkpoint: Any):
        self._incompatible = super()._load_model(checkpoint)
        return self._incompatible


def _read(path: str, mmap: bool = False) -> dict[str, Any]:
    """A checkpoint's content, weights and plain values only."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    # What is raised for a damaged file depends on where the damage is.
    except Exception as error:
        reason = str(error).strip().splitlines()[:1] or [type(error).__name__]
        raise CheckpointError(
            f"checkpoint {path} is damaged, or not of weights alone ({reason[0]})"
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"checkpoint {path} holds a {type(content).__name__}, no state dict")
    return content
