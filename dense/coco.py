"""COCO's results file of a folder of predictions, for anybody's evaluation.

>>> ids = CocoIds("annotations.json")
>>> write_results("predictions", ids)
"""

import json
import os
from pathlib import Path, PurePath

from dense import files
from dense.prediction import DETECTIONS, PredictionError

RESULTS = "coco_results.json"


class CocoIds:
    """The ids that COCO-style annotations give to images and categories.

    Args:
        path: the annotations' JSON.

    Raises:
        PredictionError: it cannot be read, or lacks the lists ``images`` and ``categories``.
    """

    def __init__(self, path: str | os.PathLike):
        self._path = path
        try:
            content = json.loads(Path(path).read_text())
            self._images = {PurePath(i["file_name"]).parts: i["id"] for i in content["images"]}
            self._categories = {c["name"]: c["id"] for c in content["categories"]}
        except OSError as error:
            raise PredictionError(f"--coco {path}: {error.strerror}") from error
        except (ValueError, TypeError, KeyError) as error:
            raise PredictionError(f"--coco {path} is not COCO-style: {error!r}") from error

    def image(self, source: str | os.PathLike) -> int:
        """The ``image_id`` of an image, by as much of its path as ``file_name`` has.

        Raises:
            PredictionError: the annotations do not list it.
        """
        parts = PurePath(source).parts
        for start in range(len(parts)):
            if parts[start:] in self._images:
                return self._images[parts[start:]]
        raise PredictionError(f"--coco {self._path} lists no image {source}")

    def category(self, name: str) -> int:
        """The ``category_id`` of a class.

        Raises:
            PredictionError: the annotations do not list it.
        """
        if name not in self._categories:
            raise PredictionError(
                f"--coco {self._path} has no category {name!r}; it has "
                f"{', '.join(self._categories)}"
            )
        return self._categories[name]


def write_results(out: str | os.PathLike, ids: CocoIds) -> Path:
    """Write ``coco_results.json``: the instances of all results in ``out``, with COCO's ids.

    Args:
        out: a folder that ``tools/predict.py`` wrote.
        ids: of the images and categories.

    Raises:
        PredictionError: the annotations lack an image or a class.
    """
    entries = []
    for path in sorted(Path(out, DETECTIONS).rglob("*.json")):
        content = json.loads(path.read_text())
        image = ids.image(content["image"])
        for instance in content["instances"]:
            kept = {k: instance[k] for k in ("bbox", "score", "segmentation") if k in instance}
            category = ids.category(instance["class_name"])
            entries.append({"image_id": image, "category_id": category, **kept})
    return files.write(Path(out, RESULTS), json.dumps(entries))
