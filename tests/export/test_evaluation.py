"""Exported files in the trainings' own evaluations: the checkpoint's figures, or one clear line."""

import json
import sys

import numpy as np
import pytest
from PIL import Image

from tests.export.conftest import exported
from tests.support import load_tool

pytest.importorskip("onnxruntime")
pytest.importorskip("openvino")


def run_tool(monkeypatch, name: str, *words) -> None:
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, words)])
    load_tool(name).main()


@pytest.fixture
def config(photos, segmentor, tmp_path):
    """The segmentor's config on the photos, with masks of which each class has some rows."""
    from mmengine.config import Config

    for path in photos.glob("*.png"):
        width, height = Image.open(path).size
        rows = np.repeat(np.arange(height)[:, None] * 3 // height, width, axis=1)
        (tmp_path / "masks").mkdir(exist_ok=True)
        Image.fromarray(rows.astype(np.uint8)).save(tmp_path / "masks" / path.name)
    cfg = Config.fromfile(segmentor.parent / "upernet.py")
    folders = {f"{split}_images": str(photos) for split in ("train", "val")}
    folders |= {f"{split}_masks": str(tmp_path / "masks") for split in ("train", "val")}
    cfg.data = dict(folders, classes="sky,road,tree")
    cfg.test_dataloader.update(num_workers=0, persistent_workers=False)
    cfg.dump(tmp_path / "upernet.py")
    return tmp_path / "upernet.py"


@pytest.mark.e2e
@pytest.mark.parametrize("mode", ["whole", "slide"])
def test_the_miou_of_a_segmentors_file(
    mode, config, segmentor, segmentor_file, tmp_path, monkeypatch
):
    options = ["--cfg-options", f"model.test_cfg.mode={mode}"]
    if mode == "slide":
        options += ["model.test_cfg.crop_size=(64,64)", "model.test_cfg.stride=(48,48)"]
    found = []
    for number, given in enumerate((segmentor, segmentor_file)):
        out = tmp_path / str(number)
        run_tool(monkeypatch, "test_segmentor", config, given, "--work-dir", out, *options)
        (path,) = out.glob("*/2*.json")
        found.append(json.loads(path.read_text()))
    assert found[0]["mIoU"] > 5
    for name in ("mIoU", "mAcc", "aAcc"):
        assert found[1][name] == pytest.approx(found[0][name], abs=0.1)


@pytest.mark.slow
def test_a_detectors_file_finds_what_the_detector_finds(detector, detector_file, photos):
    """In pixels of photos that the mapper resized, from the channels in its order."""
    pytest.importorskip("detectron2")
    import torch
    from detectron2.config import instantiate

    from dense.detection.predictor import load_model
    from dense.export.detections import Found, differences
    from dense.export.evaluation import FileDetector, read_for

    model, cfg, names = load_model(None, str(detector))
    mapper = instantiate(cfg.dataloader.test.mapper)
    inputs = [mapper({"file_name": str(photos / f"{number}.png")}) for number in range(3)]
    assert {tuple(given["image"].shape[1:]) for given in inputs} == {(160, 213)}
    for given in inputs:
        given.update(height=150, width=200)
    inputs.append({"image": inputs[0]["image"]})
    with torch.inference_mode():
        expected = model(inputs)
    found = FileDetector(read_for("detection", detector_file, names))(inputs)
    for ours, true in zip(found, expected, strict=True):
        assert ours["instances"].image_size == true["instances"].image_size
        ours, true = (
            Found(
                one["instances"].pred_boxes.tensor.numpy(),
                one["instances"].scores.numpy(),
                one["instances"].pred_classes.numpy(),
                one["instances"].pred_masks.numpy().mean((1, 2)),
            )
            for one in (ours, true)
        )
        errors, pairs, alone = differences(ours, true)
        assert (pairs, alone) == (len(true.scores), 0) and pairs
        assert errors["boxes"] < 1e-3 and errors["scores"] < 1e-4 and errors["masks"] < 1e-3


@pytest.mark.e2e
def test_the_ap_of_a_detectors_file(detector, detector_file, photos, tmp_path, monkeypatch):
    """By the tool, on what the detector finds itself: AP far from 0."""
    pytest.importorskip("detectron2")
    from dense.detection import load_predictor

    predict, images, annotations = load_predictor(None, str(detector)), [], []
    for number, path in enumerate(sorted(photos.glob("*.png"))):
        image = np.asarray(Image.open(path).convert("RGB"))
        images.append({"id": number, "file_name": path.name, "height": 150, "width": 200})
        found = predict(image)
        for (x1, y1, x2, y2), kind in list(
            zip(found["boxes"].tolist(), found["classes"], strict=True)
        )[::2]:
            bbox = [x1, y1, x2 - x1, y2 - y1]
            corners = [x1, y1, x2, y1, x2, y2, x1, y2]
            about = {"image_id": number, "category_id": int(kind), "bbox": bbox, "iscrowd": 0}
            about |= {"area": bbox[2] * bbox[3], "segmentation": [corners]}
            annotations.append(about | {"id": len(annotations) + 1})
    kinds = [{"id": number, "name": name} for number, name in enumerate(("cat", "dog", "bus"))]
    truth = {"images": images, "categories": kinds, "annotations": annotations}
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    found = []
    for number, given in enumerate((detector, detector_file)):
        out = tmp_path / str(number)
        words = ["--config-file", detector.parent / "config.yaml", "--eval-only", "--num-gpus", 0]
        words += ["--test-json", tmp_path / "truth.json", "--test-images", photos]
        words += ["--output-dir", out, f"train.init_checkpoint={given}"]
        run_tool(monkeypatch, "train_detector", *words, "dataloader.test.num_workers=0")
        found.append(json.loads((out / "results.json").read_text()))
    with pytest.raises(SystemExit, match="--tta is for checkpoints, .* is exported"):
        run_tool(monkeypatch, "train_detector", *words, "--tta")
    assert found[0]["bbox"]["AP"] > 20
    for kind in ("bbox", "segm"):
        assert found[1][kind]["AP"] == pytest.approx(found[0][kind]["AP"], abs=0.1)


@pytest.mark.e2e
def test_the_accuracy_of_a_classifiers_file(classifier, photos, tmp_path, capsys):
    """The logits that the network computes, for an evaluation in batches."""
    import torch

    from dense.export.evaluation import logits_of, read_for
    from dense.export.sources import read_source
    from tests.pretraining.conftest import write_images

    # Names in the order of folders; ImageNet's are of synsets, of which files have descriptions.
    names = ("b", "c", "n01440764")
    content = torch.load(classifier, weights_only=True)
    content["meta"]["dataset_meta"]["classes"] = list(names)
    checkpoint = tmp_path / "trained/epoch_1.pth"
    checkpoint.parent.mkdir()
    torch.save(content, checkpoint)
    config = checkpoint.with_name("small.py")
    config.write_text((classifier.parent / config.name).read_text())
    file = exported(checkpoint, photos, tmp_path, "onnx")
    source = read_source(checkpoint)
    classes = source.about["classes"]
    assert "tench" in classes[2]
    image = torch.randn(5, 3, 64, 64)
    with torch.no_grad():
        (expected,) = source.network(image)
    logits = logits_of(read_for("classification", file, classes))(image)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)

    write_images(tmp_path / "data/train", dict.fromkeys(names, 1))
    write_images(tmp_path / "data/val", dict.fromkeys(names, 4))
    said = []
    for given in (checkpoint, file):
        words = [config, "--work-dir", tmp_path / "work", "--eval-only", given]
        words += ["--num-classes", "3", "--data-root", tmp_path / "data", "--cfg-options"]
        words += ["val_dataloader.num_workers=0", "val_dataloader.persistent_workers=False"]
        words += ["train_dataloader.num_workers=0", "train_dataloader.persistent_workers=False"]
        load_tool("pretrain").main([*map(str, words)])
        printed = capsys.readouterr().out.splitlines()[-1]
        said.append([part for part in printed.split(", ") if part.startswith("top")])
    assert said[0] == said[1] and said[0]


@pytest.mark.slow
def test_files_that_do_not_fit_are_refused(segmentor, segmentor_file, monkeypatch):
    from dense.export.evaluation import read_for
    from dense.export.files import ExportError

    with pytest.raises(ExportError, match="is of segmentation, the evaluation of detection"):
        read_for("detection", segmentor_file, None)
    with pytest.raises(ExportError, match="has the classes sky,road,tree, the data sky,road"):
        read_for("segmentation", segmentor_file, ["sky", "road"])
    assert read_for("segmentation", segmentor_file, None)
    config = segmentor.parent / "upernet.py"
    with pytest.raises(SystemExit, match="--tta is for checkpoints, .* is exported"):
        run_tool(monkeypatch, "test_segmentor", config, segmentor_file, "--tta")
