"""What a file says of its network, and what is predicted from the arrays that it returns."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from dense.export import sources
from dense.export.files import ExportError
from dense.export.sources import read_source

IMAGENET = {"mean": [123.675, 116.28, 103.53], "std": [58.395, 57.12, 57.375]}


def close(found: dict, expected: dict) -> None:
    """Equal, but for the last digits of the mean and the standard deviation."""
    assert list(found) == list(expected) or found.keys() == expected.keys()
    for key, value in expected.items():
        assert found[key] == (pytest.approx(value) if key in IMAGENET else value), key
    assert json.loads(json.dumps(found)) == found


def features(model: str) -> dict:
    names = [f"stage{number}_stride{4 * 2**number}" for number in range(4)]
    about = {"task": "features", "outputs": names, "model": model, "channels": "RGB"}
    return about | IMAGENET | {"sides": [32, 8192]}


@pytest.mark.parametrize("part", ["whole", "backbone"])
def test_a_classifiers(part, classifier):
    source = read_source(classifier, part=part)
    assert source.size == (64, 64) and not source.network.training
    image = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        found = source.network(image)
    assert isinstance(found, tuple)
    if part == "backbone":
        close(source.about, features("small"))
        assert [x.shape[2:] for x in found] == [(16, 24), (8, 12), (4, 6), (2, 3)]
        return
    assert [x.shape for x in found] == [(2, 3)]
    transform = source.about.pop("transform")
    assert transform["input_size"] == 64 and isinstance(transform["crop_pct"], float)
    classes = source.about.pop("classes")
    assert classes[1:] == ["b", "c"] and "tench" in classes[0]
    expected = {"task": "classification", "outputs": ["logits"], "model": "small"}
    close(source.about, expected | {"channels": "RGB"} | IMAGENET | {"sides": [32, 8192]})


@pytest.mark.parametrize("part", ["whole", "backbone"])
def test_a_segmentors(part, segmentor, tmp_path):
    source = read_source(str(segmentor), part=part)
    assert source.size == (96, 128) and not source.network.training
    with torch.no_grad():
        found = source.network(torch.randn(2, 3, 64, 96))
    if part == "backbone":
        close(source.about, features("upernet"))
        assert [x.shape[2:] for x in found] == [(16, 24), (8, 12), (4, 6), (2, 3)]
        return
    assert [x.shape for x in found] == [(2, 3, 64, 96)]
    expected = {"task": "segmentation", "outputs": ["logits"], "model": "upernet"}
    expected |= {"channels": "RGB"} | IMAGENET | {"sides": [32, 8192], "align_corners": False}
    expected |= {"classes": ["sky", "road", "tree"], "resize": [160, 96]}
    close(source.about, expected | {"palette": [[9, 9, 9], [99, 9, 9], [9, 99, 9]]})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model.test_cfg": dict(mode="slide", crop_size=(64, 64), stride=(48, 48))}, "has crops"),
        ({"model.data_preprocessor.test_cfg": dict(size_divisor=32)}, "has crops or padding"),
        ({"model.data_preprocessor.bgr_to_rgb": False}, None),
        ({"model.decode_head.align_corners": True}, None),
        ({"model.decode_head.out_channels": 1, "model.decode_head.threshold": 0.3}, "a threshold"),
    ],
)
def test_other_segmentors(change, said, segmentor, tmp_path):
    from mmengine.config import Config

    cfg = Config.fromfile(segmentor.parent / "upernet.py")
    cfg.merge_from_dict(change)
    if "model.decode_head.out_channels" in change:
        cfg.model.decode_head.num_classes = 2
        cfg.model.auxiliary_head.num_classes = 2
        content = torch.load(segmentor, weights_only=True)
        weights, meta = content["state_dict"], content["meta"]["dataset_meta"]
        for key, rows in (("decode_head", 1), ("auxiliary_head", 2)):
            for name in ("weight", "bias"):
                weights[f"{key}.conv_seg.{name}"] = weights[f"{key}.conv_seg.{name}"][:rows]
        meta |= {"classes": ["a", "b"], "palette": meta["palette"][:2]}
        segmentor = tmp_path / "iter_1.pth"
        torch.save(content, segmentor)
    cfg.dump(tmp_path / "other.py")
    if said:
        with pytest.raises(ExportError, match=f"other.py: .*{said}"):
            read_source(segmentor, str(tmp_path / "other.py"))
        return
    about = read_source(segmentor, str(tmp_path / "other.py")).about
    rgb = "model.data_preprocessor.bgr_to_rgb" not in change
    assert (about["channels"], about["align_corners"]) == ("RGB" if rgb else "BGR", rgb)


@pytest.mark.parametrize("part", ["whole", "backbone"])
def test_a_detectors(part, detector):
    source = read_source(detector.parent, part=part)
    # The short side of the test, and the long one of photos of 4 to 3, within its limit.
    assert source.size == (160, 213) and not source.network.training
    if part == "backbone":
        close(source.about, features("dw_conv_nano") | IMAGENET)
        with torch.no_grad():
            found = source.network(torch.randn(1, 3, 64, 96))
        assert [x.shape[2:] for x in found] == [(16, 24), (8, 12), (4, 6), (2, 3)]
        return
    expected = {"task": "detection", "outputs": ["boxes", "scores", "classes", "masks"]}
    expected |= {"model": "dw_conv_nano", "channels": "RGB"} | IMAGENET | {"sides": [32, 8192]}
    expected |= {"resize": [256, 160], "classes": ["cat", "dog", "bus"], "batch": 1}
    close(source.about, expected)


def test_a_detectors_of_another_test(detector, tmp_path):
    config = (detector.parent / "config.yaml").read_text()
    assert "max_size: 256" in config and "image_format: RGB" in config
    wide = config.replace("max_size: 256", "max_size: 200").replace("format: RGB", "format: BGR")
    (tmp_path / "config.yaml").write_text(wide)
    source = read_source(detector, str(tmp_path / "config.yaml"))
    assert source.size == (160, 200)
    assert (source.about["resize"], source.about["channels"]) == ([200, 160], "BGR")


def test_other_frameworks_and_empty_folders(tmp_path, monkeypatch):
    (tmp_path / "config.yaml").touch()
    with pytest.raises(ExportError, match=f"^{tmp_path} holds no finished checkpoint: name the"):
        read_source(tmp_path)
    (tmp_path / "a.pth").touch()
    monkeypatch.setattr(sources.recipes, "framework_of", lambda config: "mmdetection")
    with pytest.raises(ExportError) as error:
        read_source(tmp_path / "a.pth", "own.py")
    assert str(error.value) == (
        "own.py is of mmdetection: exported are classification and segmentation and detection"
    )


def test_the_newest_checkpoint_of_a_folder(tmp_path, monkeypatch):
    asked = []
    for framework in ("classification", "detection"):
        monkeypatch.setitem(
            sources._READERS, framework, lambda *given, f=framework: asked.append((f, *given))
        )
        folder = tmp_path / framework
        folder.mkdir()
        name = "model_0000009.pth" if framework == "detection" else "epoch_2.pth"
        torch.save(
            {"model": {}, "state_dict": {}, "iteration": 9, "trainer": {}, "meta": {"epoch": 2}},
            folder / name,
        )
        (folder / "last_checkpoint").write_text(name)
        config = folder / ("config.yaml" if framework == "detection" else "own.py")
        config.write_text(
            "model = dict(type='Classifier')\n" if config.suffix == ".py" else "a: 1\n"
        )
        monkeypatch.setattr(sources.recipes, "framework_of", lambda _, f=framework: f)
        read_source(folder, part="backbone")
        assert asked.pop() == (framework, str(config), str(folder / name), "backbone")
        read_source(folder / name, "other.py")
        assert asked.pop() == (framework, "other.py", str(folder / name), "whole")


def test_the_scale_of_a_test_pipeline():
    load, pack = {"type": "LoadImageFromFile"}, {"type": "PackSegInputs"}
    annotations = {"type": "LoadAnnotations"}
    resize = {"type": "Resize", "scale": (2048, 512), "keep_ratio": True}
    assert sources._resize([load, resize, annotations, pack], "c.py") == [2048, 512]
    assert sources._resize([load, pack], "c.py") is None
    for step in (
        resize | {"keep_ratio": False},
        {"type": "Resize", "keep_ratio": True},
        {"type": "Pad"},
    ):
        with pytest.raises(
            ExportError, match=f"^c.py: a file cannot hold the step {step['type']} of"
        ):
            sources._resize([load, step], "c.py")


def test_values_as_json_has_them():
    given = {"a": (1, [2.5, ("x", None)]), "b": {"c": True}}
    assert sources._plain(given) == {"a": [1, [2.5, ["x", None]]], "b": {"c": True}}


# Predictors, of arrays that are known


def stand_in(about: dict, compute):
    def run(image):
        seen.append(image)
        return compute(image)

    seen: list[np.ndarray] = []
    run.about, run.seen = about, seen
    return run


PHOTO = np.random.default_rng(0).integers(0, 255, (50, 60, 3), np.uint8)


def test_a_classifiers_probabilities():
    from PIL import Image
    from timm.data import create_transform

    from dense.export.predictor import Classifier

    logits = np.float32([1.0, 900.0, 898.0])
    transform = {"input_size": 32, "crop_pct": 0.9, "is_training": False}
    run = stand_in({"classes": ["a", "b", "c"], "transform": transform}, lambda _: [logits[None]])
    predict = Classifier(run)
    expected = torch.from_numpy(logits).softmax(0).numpy()
    np.testing.assert_allclose(predict(PHOTO), expected, rtol=1e-5)
    given = create_transform(32, crop_pct=0.9)(Image.fromarray(PHOTO))[None].numpy()
    np.testing.assert_array_equal(run.seen[0], given)
    assert predict.classes == ("a", "b", "c")
    with pytest.raises(ValueError, match="uint8"):
        predict(PHOTO[..., 0])


@pytest.mark.parametrize("align", [True, False])
@pytest.mark.parametrize("scale", [None, [160, 96], [96, 160], [70, 300], [59, 59]])
def test_a_segmentors_labels(scale, align):
    """The photo is resized as MMCV does it, the scores back to the photo."""
    mmcv = pytest.importorskip("mmcv")
    import torch.nn.functional as F

    from dense.export.predictor import Segmentor

    about = IMAGENET | {"channels": "RGB", "resize": scale, "align_corners": align}
    about |= {"classes": ["a", "b", "c"], "palette": [[1, 2, 3], [4, 5, 6], [7, 8, 9]]}
    run = stand_in(about, lambda image: [image[:, :, ::2, ::2]])
    predict = Segmentor(run)
    resized = mmcv.imrescale(PHOTO, tuple(scale)) if scale else PHOTO
    pixels = (resized - np.array(IMAGENET["mean"])) / np.array(IMAGENET["std"])
    labels = predict(PHOTO)
    np.testing.assert_allclose(run.seen[0][0], pixels.transpose(2, 0, 1), atol=1e-4)
    scores = torch.from_numpy(run.seen[0][:, :, ::2, ::2])
    expected = F.interpolate(scores, (50, 60), mode="bilinear", align_corners=align)[0].argmax(0)
    np.testing.assert_array_equal(labels, expected)
    assert labels.dtype == np.int32 and set(np.unique(labels)) == {0, 1, 2}
    assert predict.palette == ((1, 2, 3), (4, 5, 6), (7, 8, 9))
    assert predict.classes == ("a", "b", "c")
    with pytest.raises(ValueError, match="uint8"):
        predict(PHOTO.astype(np.float32))


@pytest.mark.parametrize("masks", [True, False])
@pytest.mark.parametrize("resize", [[256, 100], [90, 100], [1000, 25]])
def test_a_detectors_boxes_return_to_the_photo(resize, masks):
    pytest.importorskip("detectron2")
    from dense.export.predictor import Detector

    # A box of a quarter of the image, and one of nothing, which is dropped.
    def compute(image):
        height, width = image.shape[2:]
        boxes = np.float32([[0, 0, width / 2, height / 2], [3, 3, 3, 3]])
        found = [boxes, np.float32([0.9, 0.8]), np.array([1, 0])]
        return [*found, np.ones((2, 28, 28), np.float32)] if masks else found

    about = IMAGENET | {"channels": "RGB", "resize": resize, "classes": ["a", "b"]}
    run = stand_in(about, compute)
    found = Detector(run)(PHOTO)
    long, short = resize
    factor = min(short / 50, long / 60)
    shape = tuple(int(side * factor + 0.5) for side in (50, 60))
    assert run.seen[0].shape == (1, 3, *shape)
    np.testing.assert_allclose(found["boxes"], [[0, 0, 30, 25]], atol=1e-4)
    assert (found["scores"].tolist(), found["classes"].tolist()) == ([pytest.approx(0.9)], [1])
    assert found["class_names"] == ["a", "b"]
    if masks:
        assert found["masks"].shape == (1, 50, 60) and found["masks"].sum() == 30 * 25
    else:
        assert found["masks"] is None
    with pytest.raises(ValueError, match="uint8"):
        Detector(run)(PHOTO[..., 0])


def test_which_predictor(monkeypatch):
    from dense.export import predictor

    made = {task: SimpleNamespace(task=task) for task in ("classification", "segmentation")}
    for task, value in made.items():
        monkeypatch.setitem(predictor._PREDICTORS, task, lambda run, value=value: (value, run.path))
    monkeypatch.setattr(
        predictor, "Runner", lambda path: SimpleNamespace(path=path, about={"task": path})
    )
    for task, value in made.items():
        assert predictor.load_predictor(task) == (value, task)
    with pytest.raises(ExportError, match="^features has the maps of a backbone alone: nothing is"):
        predictor.load_predictor("features")


# Layers by kind


@pytest.mark.parametrize(
    ("scopes", "kind"),
    [
        ("['', 'network.stages.0.blocks.1.mixer.qkv', '']", "mixer.qkv"),
        ("['', 'backbone.patch_embed.proj', '']", "patch_embed.proj"),
        ("['', 'decode_head.lateral_convs.0.conv', '']", "decode_head.lateral_convs.conv"),
        ("['', 'network.0', '']", "Conv"),
        (None, "Conv"),
    ],
)
def test_a_layers_kind(scopes, kind):
    pytest.importorskip("onnxruntime")
    from dense.export.numbers import _kind

    entries = [SimpleNamespace(key="other", value="x")]
    if scopes:
        entries.append(SimpleNamespace(key="pkg.torch.onnx.name_scopes", value=scopes))
    assert _kind(SimpleNamespace(metadata_props=entries, op_type="Conv")) == kind


@pytest.mark.slow
def test_a_graph_is_of_one_image_where_its_network_says_so():
    """And of the channels and the type that it takes."""
    from dense.export.graphs import captured

    class One(nn.Conv2d):
        images = 1

    network = One(4, 2, 3, padding=1).double().eval()
    program = captured(network, 4)
    assert len(program.range_constraints) == 2
    image = torch.randn(1, 4, 33, 70, dtype=torch.float64)
    torch.testing.assert_close(program.module()(image), network(image))
