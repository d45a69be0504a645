"""Small COCO-style data, drawn here."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("detectron2", reason="Detectron2 is not installed")


@dataclass
class CocoFiles:
    """Where the drawn data lies, and how to change it for a test."""

    root: Path

    def json(self, split: str) -> str:
        return str(self.root / f"{split}.json")

    def images(self, split: str) -> str:
        return str(self.root / split)

    def arguments(self) -> list[str]:
        return [
            f"--{split}-{kind}={getattr(self, kind)(split)}"
            for split in ("train", "val")
            for kind in ("json", "images")
        ]

    def named(self) -> dict:
        return {
            f"{split}_{kind}": getattr(self, kind)(split)
            for split in ("train", "val")
            for kind in ("json", "images")
        }

    def edit(self, split: str, change) -> None:
        """Rewrite a JSON after ``change(content)``."""
        path = Path(self.json(split))
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))


@pytest.fixture
def coco_files(tmp_path) -> CocoFiles:
    """Eight photos of bars and blocks on grey; the category ids are neither dense nor sorted."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 6), ("val", 2)):
        folder = tmp_path / "data" / split
        folder.mkdir(parents=True)
        images, annotations = [], []
        for i in range(count):
            picture = np.full((96, 128, 3), 120, np.uint8)
            for category, (w, h), colour in (
                (9, (60, 20), (220, 30, 30)),
                (4, (30, 40), (20, 60, 220)),
            ):
                x, y = int(rng.integers(0, 128 - w)), int(rng.integers(0, 96 - h))
                picture[y : y + h, x : x + w] = colour
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": i,
                        "category_id": category,
                        "bbox": [x, y, w, h],
                        "area": w * h,
                        "iscrowd": 0,
                        "segmentation": [[x, y, x + w, y, x + w, y + h, x, y + h]],
                    }
                )
            Image.fromarray(picture).save(folder / f"{i}.png")
            images.append({"id": i, "file_name": f"{i}.png", "height": 96, "width": 128})
        categories = [{"id": 9, "name": "bar"}, {"id": 4, "name": "block"}]
        content = {"images": images, "annotations": annotations, "categories": categories}
        (tmp_path / "data" / f"{split}.json").write_text(json.dumps(content))
    return CocoFiles(tmp_path / "data")
