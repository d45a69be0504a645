"""Exported files in the place of networks, in the evaluations of the three trainings."""

import os
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from dense.export.files import ExportError, Runner
from dense.export.predictor import instances


def read_for(task: str, path: str | os.PathLike, classes: Sequence[str] | None) -> Runner:
    """An exported file for an evaluation.

    Args:
        task: as its metadata should have it.
        path: written by ``tools/export.py``.
        classes: of the data, by index; None if they have no names.

    Raises:
        ExportError: the file cannot be read, is of another task, or has other classes.
        ImportError: the engine is not installed.
    """
    run = Runner(path, torch.get_num_threads())
    if run.about["task"] != task:
        raise ExportError(f"{path} is of {run.about['task']}, the evaluation of {task}")
    theirs = run.about["classes"]
    if classes is not None and list(classes) != theirs:
        raise ExportError(
            f"{path} has the classes {','.join(theirs)}, the data {','.join(classes)}"
        )
    return run


def logits_of(run: Runner) -> Callable[[Tensor], Tensor]:
    """A file of one output as a function of normalised images, ``(B, 3, H, W)``."""

    def logits(image: Tensor) -> Tensor:
        (out,) = run(image.float().contiguous().cpu().numpy())
        return torch.from_numpy(out).to(image.device)

    return logits


def use_in_segmentor(segmentor: nn.Module, run: Runner) -> None:
    """Have a file compute the logits of an MMSegmentation segmentor, in place.

    The test pipeline, the preprocessor, sliding windows and the metrics stay the segmentor's.
    """
    logits = logits_of(run)
    segmentor.encode_decode = lambda image, metas: logits(image)


class FileDetector:
    """A file as a detector, for Detectron2's ``inference_on_dataset``.

    Args:
        run: the file.
    """

    def __init__(self, run: Runner):
        self._run = run

    def __call__(self, inputs: list[dict]) -> list[dict]:
        """Detectron2's inputs to its ``instances``, in pixels of the photos."""
        from detectron2.modeling.postprocessing import detector_postprocess

        found = []
        for given in inputs:
            pixels = given["image"].numpy().transpose(1, 2, 0)
            rgb = pixels[..., ::-1] if self._run.about["channels"] == "BGR" else pixels
            seen = instances(self._run, np.ascontiguousarray(rgb))
            size = given.get("height", pixels.shape[0]), given.get("width", pixels.shape[1])
            found.append({"instances": detector_postprocess(seen, *size)})
        return found
