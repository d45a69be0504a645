import json

import numpy as np
import pytest
from PIL import Image

from dense import drawing, prediction
from dense.images import UnreadableImage, read_image
from dense.prediction import PredictionError, plan
from dense.recipes import RECIPES, RecipeError, config_beside, framework_of
from tests.support import load_tool, run_tool

DETECTION_CONFIG = RECIPES / "detection/cascade_mask_rcnn_dw_conv_nano.py"
SEGMENTATION_CONFIG = RECIPES / "segmentation/dw_conv_nano_upernet.py"
MMDETECTION_CONFIG = next((RECIPES / "mmdetection").glob("*nano*.py"))
COLOURS = ((250, 10, 10), (10, 250, 10), (10, 10, 250), (240, 240, 20))


@pytest.fixture(scope="module")
def tool():
    return load_tool("predict")


@pytest.fixture
def quadrants():
    """A 40x60 image of four flat colours, so that any turn or swap of channels shows."""
    image = np.zeros((40, 60, 3), np.uint8)
    image[:20, :30], image[:20, 30:], image[20:, :30], image[20:, 30:] = COLOURS
    return image


def write_photos(folder, image):
    folder.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(folder / "a.png")
    (folder / "inside").mkdir()
    Image.fromarray(image[:, ::-1]).convert("L").save(folder / "inside" / "grey.jpg")
    (folder / "notes.txt").write_text("not an image")
    return folder


# Reading


def test_exif_orientation_is_followed(quadrants, tmp_path):
    exif = Image.Exif()
    exif[274] = 6  # stored turned: to be shown after a quarter turn clockwise
    stored = Image.fromarray(np.rot90(quadrants))
    stored.save(tmp_path / "turned.png", exif=exif)
    np.testing.assert_array_equal(read_image(tmp_path / "turned.png"), quadrants)


@pytest.mark.parametrize(
    ("mode", "suffix", "tolerance"),
    [("RGB", "png", 0), ("RGBA", "png", 0), ("P", "png", 2), ("P", "gif", 2), ("CMYK", "tif", 2)],
)
def test_modes_are_read_as_rgb(quadrants, tmp_path, mode, suffix, tolerance):
    image = Image.fromarray(quadrants)
    image = image.quantize(8) if mode == "P" else image.convert(mode)
    assert image.mode == mode
    image.save(tmp_path / f"image.{suffix}")
    found = read_image(tmp_path / f"image.{suffix}")
    assert found.dtype == np.uint8
    np.testing.assert_allclose(found.astype(int), quadrants.astype(int), atol=tolerance)


@pytest.mark.parametrize(("dtype", "mode", "step"), [(np.uint8, "L", 1), (np.uint16, "I;16", 256)])
def test_greyscale_of_8_and_16_bits_reads_alike(tmp_path, dtype, mode, step):
    grey = np.arange(0, 240, dtype=dtype).reshape(12, 20)
    image = Image.fromarray(grey * dtype(step))
    assert image.mode == mode
    image.save(tmp_path / "grey.png")
    expected = np.repeat(grey.astype(np.uint8)[..., None], 3, axis=2)
    np.testing.assert_array_equal(read_image(tmp_path / "grey.png"), expected)


def test_unreadable_images_are_named(tmp_path, quadrants):
    Image.fromarray(quadrants).save(tmp_path / "whole.jpg")
    content = (tmp_path / "whole.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(content[: len(content) // 2])
    (tmp_path / "text.jpg").write_text("hello")
    (tmp_path / "empty.png").touch()
    Image.fromarray(np.ones((4, 4), np.float32)).save(tmp_path / "float.tif")
    for name in ("cut.jpg", "text.jpg", "empty.png", "float.tif"):
        with pytest.raises(UnreadableImage, match=name):
            read_image(tmp_path / name)


# Whose config it is


def test_every_config_of_ours_is_told_apart():
    for framework in ("detection", "segmentation"):
        configs = list((RECIPES / framework).glob("*.py"))
        assert configs
        assert {framework_of(config) for config in configs} == {framework}


@pytest.mark.parametrize(
    ("text", "framework"),
    [
        ("_base_ = './other.py'\nimport os\n", "segmentation"),
        ("model = dict(type='EncoderDecoder')\n", "segmentation"),
        ("from mmengine.config import read_base\nwith read_base():\n    pass\n", "segmentation"),
        ("from .base import model\nmodel.x = 1\n", "detection"),
        ("from detectron2.config import LazyConfig\n", "detection"),
    ],
)
def test_framework_of_other_styles(tmp_path, text, framework):
    (tmp_path / "config.py").write_text(text)
    assert framework_of(tmp_path / "config.py") == framework


def test_configs_that_mmengine_and_detectron2_saved_are_told_apart(tmp_path):
    mmengine = pytest.importorskip("mmengine.config")
    detectron2 = pytest.importorskip("detectron2.config")
    mmengine.Config.fromfile(SEGMENTATION_CONFIG).dump(tmp_path / "saved.py")
    config = detectron2.LazyConfig.load(str(DETECTION_CONFIG))
    detectron2.LazyConfig.save(config, str(tmp_path / "config.yaml"))
    assert framework_of(tmp_path / "saved.py") == "segmentation"
    assert framework_of(tmp_path / "config.yaml") == "detection"


def test_config_errors_are_clear(tmp_path):
    (tmp_path / "broken.py").write_text("model = (")
    (tmp_path / "config.json").write_text("{}")
    for name, message in [
        ("absent.py", "does not exist"),
        ("broken.py", "is not Python"),
        ("config.json", "a .py or .yaml file is needed"),
    ]:
        with pytest.raises(RecipeError, match=f"{name}.*{message}"):
            framework_of(tmp_path / name)


def test_config_beside_the_checkpoint(tmp_path):
    checkpoint = tmp_path / "model.pth"
    with pytest.raises(RecipeError, match=r"model\.pth does not exist"):
        config_beside(checkpoint)
    checkpoint.touch()
    with pytest.raises(RecipeError, match="holds no config"):
        config_beside(checkpoint)
    (tmp_path / "upernet.py").touch()
    assert config_beside(checkpoint) == tmp_path / "upernet.py"
    (tmp_path / "other.py").touch()
    with pytest.raises(RecipeError, match=r"other\.py, upernet\.py"):
        config_beside(checkpoint)


# What is predicted and where it goes


def test_plan_keeps_the_tree_and_tells_equal_stems_apart(tmp_path, quadrants):
    photos = write_photos(tmp_path / "photos", quadrants)
    Image.fromarray(quadrants).save(photos / "a.jpg")
    out = tmp_path / "out"
    jobs = plan([photos], out, "detection")
    assert {job.source: job.result for job in jobs} == {
        photos / "a.jpg": out / "detections/a_jpg.json",
        photos / "a.png": out / "detections/a_png.json",
        photos / "inside/grey.jpg": out / "detections/inside/grey.json",
    }
    assert {job.result.suffix for job in plan([photos], out, "segmentation")} == {".png"}


def test_plan_refuses_two_images_for_one_place(tmp_path, quadrants):
    first, second = (write_photos(tmp_path / name, quadrants) for name in ("one", "two"))
    with pytest.raises(PredictionError, match="written to one place"):
        plan([first, second], tmp_path / "out", "detection")


def test_one_image_named_twice_is_one_job(tmp_path, quadrants):
    photos = write_photos(tmp_path / "photos", quadrants)
    assert len(plan([photos, photos], tmp_path / "out", "detection")) == 2


def test_plan_never_takes_its_own_overlays_for_photos(tmp_path, quadrants):
    photos = write_photos(tmp_path / "photos", quadrants)
    before = plan([photos], photos, "segmentation")
    for job in before:
        for path in (job.overlay, job.result):
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(quadrants).save(path)
    assert plan([photos], photos, "segmentation", overwrite=True) == before


def test_results_are_not_replaced_unless_told(tmp_path, quadrants):
    photos = write_photos(tmp_path / "photos", quadrants)
    jobs = plan([photos], tmp_path / "out", "detection")
    jobs[0].result.parent.mkdir(parents=True)
    jobs[0].result.write_text("{}")
    with pytest.raises(PredictionError, match=r"a\.json is there already \(1 results"):
        plan([photos], tmp_path / "out", "detection")
    assert plan([photos], tmp_path / "out", "detection", resume=True) == jobs[1:]
    assert plan([photos], tmp_path / "out", "detection", overwrite=True) == jobs


def test_missing_and_empty_inputs_are_named(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(PredictionError, match="absent does not exist"):
        plan([tmp_path / "absent"], tmp_path / "out", "detection")
    with pytest.raises(PredictionError, match="empty holds no image"):
        plan([tmp_path / "empty"], tmp_path / "out", "detection")


# What is written


def fake_detector(image):
    masks = np.zeros((3, *image.shape[:2]), bool)
    masks[0, 2:12, 5:25] = True
    masks[1, 20:40, 30:60] = True
    return {
        "boxes": np.array([[5, 2, 25, 12], [30, 20, 60, 40], [0, 0, 1, 1]], np.float32),
        "scores": np.array([0.9, 0.6, 0.1], np.float32),
        "classes": np.array([1, 0, 1]),
        "masks": masks,
        "class_names": ["cat", "dog"],
    }


def test_detections_are_cocos_results(tmp_path, quadrants):
    rle = pytest.importorskip("pycocotools.mask")
    pytest.importorskip("detectron2")
    photos = write_photos(tmp_path / "photos", quadrants)
    jobs = plan([photos / "a.png"], tmp_path / "out", "detection")
    write = prediction.detection_writer(fake_detector, 0.5, legend=False)
    assert prediction.run(jobs, write) == []
    content = json.loads(jobs[0].result.read_text())
    assert (content["height"], content["width"]) == (40, 60)
    assert content["classes"] == ["cat", "dog"]
    first, second = content["instances"]
    assert (first["class_id"], first["class_name"], first["bbox"]) == (1, "dog", [5, 2, 20, 10])
    assert (second["class_name"], second["bbox"]) == ("cat", [30, 20, 30, 20])
    assert first["score"] == pytest.approx(0.9, abs=1e-5)
    for instance, mask in zip(
        content["instances"], fake_detector(quadrants)["masks"], strict=False
    ):
        np.testing.assert_array_equal(rle.decode(instance["segmentation"]), mask)
        np.testing.assert_array_equal(rle.toBbox(instance["segmentation"]), instance["bbox"])

    with Image.open(jobs[0].overlay) as overlay:
        drawn = np.asarray(overlay.resize((60, 40), Image.Resampling.BOX)).astype(int)
    changed = np.abs(drawn - quadrants).max(axis=2) > 40
    assert changed[22:38, 32:58].mean() > 0.9, "the mask is drawn where it is"
    assert changed[2:18, 34:58].mean() < 0.2, "and nothing where there is none"


def test_an_image_without_detections_has_an_empty_list(tmp_path, quadrants):
    pytest.importorskip("detectron2")
    photos = write_photos(tmp_path / "photos", quadrants)
    jobs = plan([photos / "a.png"], tmp_path / "out", "detection")
    prediction.run(jobs, prediction.detection_writer(fake_detector, 0.95))
    assert json.loads(jobs[0].result.read_text())["instances"] == []
    with Image.open(jobs[0].overlay) as overlay:
        drawn = np.asarray(overlay.resize((60, 40), Image.Resampling.NEAREST)).astype(int)
    assert np.abs(drawn - quadrants)[5:15, 5:25].mean() < 12


class FakeSegmentor:
    def __init__(self, count):
        self.classes = [f"class {i}" for i in range(count)]
        self.palette = [(i % 256, 3, 7) for i in range(count)]

    def __call__(self, image):
        return np.arange(image.shape[0] * image.shape[1]).reshape(image.shape[:2]) % len(
            self.classes
        )


@pytest.mark.parametrize("count", [4, 256, 257, 300])
def test_label_maps_hold_class_indices(tmp_path, quadrants, count):
    pytest.importorskip("mmseg")
    segmentor = FakeSegmentor(count)
    photos = write_photos(tmp_path / "photos", quadrants)
    jobs = plan([photos / "a.png"], tmp_path / "out", "segmentation")
    prediction.run(jobs, prediction.segmentation_writer(segmentor))
    with Image.open(jobs[0].result) as labels:
        assert labels.format == "PNG" and labels.mode == ("L" if count <= 256 else "I;16")
        np.testing.assert_array_equal(np.asarray(labels), segmentor(quadrants))


def test_segmentation_is_drawn_in_its_colours(quadrants):
    pytest.importorskip("mmengine")
    draw = drawing.segmentation_drawer(["a", "b"], [(0, 0, 0), (200, 200, 200)])
    labels = np.zeros((40, 60), np.int32)
    labels[:, 30:] = 1
    drawn = draw(quadrants, labels)
    assert drawn.shape[0] % 40 == 0 and drawn.shape[1] % 60 == 0
    scale = drawn.shape[0] // 40
    bottom = drawn[::scale, ::scale][30:38].astype(int)
    expected = quadrants[30:38] * 0.4 + np.where(labels[30:38, :, None], 200, 0) * 0.6
    np.testing.assert_allclose(bottom, expected, atol=2)


def test_labels_without_a_class_are_left_alone(quadrants):
    pytest.importorskip("mmengine")
    draw = drawing.segmentation_drawer(["a", "b"], [(0, 0, 0), (200, 200, 200)])
    drawn = draw(quadrants, np.full((40, 60), 255))
    scale = drawn.shape[0] // 40
    np.testing.assert_array_equal(drawn[::scale, ::scale], quadrants)


# The tool, with networks of random weights


@pytest.fixture(scope="module")
def detector(tmp_path_factory):
    pytest.importorskip("detectron2")
    import torch
    from detectron2.config import LazyConfig, instantiate

    folder = tmp_path_factory.mktemp("detector")
    config = LazyConfig.load(str(DETECTION_CONFIG))
    config.model.roi_heads.num_classes = 2
    torch.manual_seed(0)
    weights = instantiate(config.model).state_dict()
    torch.save({"model": weights, "classes": ["cat", "dog"]}, folder / "model_final.pth")
    LazyConfig.save(config, str(folder / "config.yaml"))
    return folder / "model_final.pth"


@pytest.fixture(scope="module")
def segmentor(tmp_path_factory):
    pytest.importorskip("mmseg")
    import torch
    from mmengine.config import Config
    from mmseg.registry import MODELS
    from mmseg.utils import register_all_modules

    register_all_modules()
    folder = tmp_path_factory.mktemp("segmentor")
    config = Config.fromfile(SEGMENTATION_CONFIG)
    for head in ("decode_head", "auxiliary_head"):
        config.model[head].num_classes = 3
    torch.manual_seed(0)
    meta = {"classes": ["sky", "road", "tree"], "palette": [[9, 9, 9], [99, 9, 9], [9, 99, 9]]}
    torch.save(
        {"state_dict": MODELS.build(config.model).state_dict(), "meta": {"dataset_meta": meta}},
        folder / "iter_1.pth",
    )
    config.dump(folder / "upernet.py")
    return folder / "iter_1.pth"


@pytest.fixture(scope="module")
def mmdetector(tmp_path_factory):
    pytest.importorskip("mmdet")
    import torch
    from mmdet.registry import MODELS
    from mmdet.utils import register_all_modules
    from mmengine.config import Config

    import dense.mmdetection  # noqa: F401

    register_all_modules()
    folder = tmp_path_factory.mktemp("mmdetector")
    config = Config.fromfile(MMDETECTION_CONFIG)
    count = config.model.roi_head.bbox_head[0].num_classes
    meta = {"classes": [f"class {number}" for number in range(count)]}
    weights = MODELS.build(config.model).state_dict()
    torch.save({"state_dict": weights, "meta": {"dataset_meta": meta}}, folder / "iter_1.pth")
    config.dump(folder / "cascade.py")
    return folder / "iter_1.pth"


@pytest.mark.slow
@pytest.mark.parametrize("trained", ["classifier", "detector", "mmdetector", "segmentor", "bgr"])
def test_networks_see_red_green_and_blue(trained, request, detector, tmp_path, monkeypatch):
    """Normalised by ImageNet's figures, in the order of the config (blue first: "bgr")."""
    from importlib import import_module

    from backbones.pyramid import PatchEmbed

    folder = {"classifier": "pretraining.predictor", "mmdetector": "mmdetection"}
    folder |= {"detector": "detection", "bgr": "detection", "segmentor": "segmentation"}
    checkpoint = detector if trained == "bgr" else request.getfixturevalue(trained)
    config = next(path for path in checkpoint.parent.iterdir() if path.suffix in (".py", ".yaml"))
    if trained == "bgr":
        text = config.read_text().replace("image_format: RGB", "image_format: BGR")
        config = tmp_path / "config.yaml"
        config.write_text(text)
    load = import_module(f"dense.{folder[trained]}").load_predictor
    predict, seen = load(str(config), str(checkpoint)), []
    forward = PatchEmbed.forward
    monkeypatch.setattr(PatchEmbed, "forward", lambda self, x: seen.append(x) or forward(self, x))
    colour = np.array([200, 100, 20], np.uint8)
    predict(np.broadcast_to(colour, (64, 80, 3)).copy())
    ordered = colour[::-1] if trained == "bgr" else colour
    expected = (ordered - np.array([123.675, 116.28, 103.53])) / np.array([58.395, 57.12, 57.375])
    np.testing.assert_allclose(seen[0][0, :, 5, 5].numpy(), expected, atol=1e-3)


@pytest.mark.slow
def test_tool_detects_beside_an_unreadable_photo(detector, tmp_path, quadrants):
    photos = write_photos(tmp_path / "photos", quadrants)
    (photos / "broken.jpg").write_bytes(b"\xff\xd8 no")
    Image.new("RGB", (3000, 2)).save(photos / "thin.png")
    out = tmp_path / "out"
    result = run_tool("predict", photos, "--checkpoint", detector, "--out", out, "--score-thr", 0)
    assert result.returncode == 1, result.stderr
    assert "broken.jpg cannot be read as an image" in result.stderr
    assert "thin.png (3000x2) cannot be predicted" in result.stderr
    assert "2 of 4 images were unreadable" in result.stderr and "Traceback" not in result.stderr
    for name in ("a", "inside/grey"):
        content = json.loads((out / "detections" / f"{name}.json").read_text())
        assert content["classes"] == ["cat", "dog"]
        assert all(i["segmentation"]["size"] == [40, 60] for i in content["instances"])
        assert (out / "overlays" / f"{name}.jpg").is_file()
    assert not list(out.rglob("*.partial"))

    result = run_tool("predict", photos / "a.png", "--checkpoint", detector, "--out", out)
    assert result.returncode == 2
    assert "a.json is there already" in result.stderr and "Traceback" not in result.stderr
    result = run_tool(
        "predict", photos / "a.png", "--checkpoint", detector, "--out", out, "--resume"
    )
    assert result.returncode == 0 and "already" in result.stdout


@pytest.mark.e2e
def test_tool_takes_a_released_detector_of_mmdetection(tmp_path, quadrants):
    """Cascade Mask R-CNN as MMDetection 2 wrote it: the authors' names inside, CLASSES beside."""
    pytest.importorskip("mmdet", reason="MMDetection is not installed")
    import torch
    from mmdet.registry import MODELS
    from mmengine.config import Config
    from mmengine.registry import init_default_scope

    from backbones.layouts import LAYOUTS, from_ours

    config = Config.fromfile(MMDETECTION_CONFIG)
    config.model.backbone.update(type="d_dw_conv_nano", init="not-needed.pth")
    config.model.test_cfg.rcnn.score_thr = 0.0
    config.dump(tmp_path / "cascade.py")
    init_default_scope("mmdet")
    torch.manual_seed(0)
    weights = MODELS.build(config.model).state_dict()
    own = {k.removeprefix("backbone."): v for k, v in weights.items() if k.startswith("backbone.")}
    released = {k: v for k, v in weights.items() if not k.startswith("backbone.")}
    renamed = from_ours(own, LAYOUTS["original"])
    assert "layers.0.blocks.0.attn2conv.conv.conv1.weight" in renamed and "norm0.weight" in renamed
    released |= {f"backbone.{k}": v for k, v in renamed.items()}
    classes = tuple(f"class {i}" for i in range(80))
    file = {"state_dict": released, "meta": {"CLASSES": classes, "mmdet_version": "2.11.0"}}
    torch.save(file, tmp_path / "cascade.pth")

    photos = write_photos(tmp_path / "photos", quadrants)
    out = tmp_path / "out"
    args = ("--checkpoint", tmp_path / "cascade.pth", "--config", tmp_path / "cascade.py")
    result = run_tool("predict", photos, *args, "--out", out, "--score-thr", 0)
    assert result.returncode == 0, result.stderr
    assert f"{len(released)} matched, 0 missing, 0 unexpected" in result.stdout + result.stderr
    for name in ("a", "inside/grey"):
        content = json.loads((out / "detections" / f"{name}.json").read_text())
        assert content["instances"] and content["classes"] == list(classes)
        assert all(i["segmentation"]["size"] == [40, 60] for i in content["instances"])
        assert (out / "overlays" / f"{name}.jpg").is_file()

    del released["neck.fpn_convs.0.conv.bias"]
    torch.save(file, tmp_path / "cascade.pth")
    result = run_tool("predict", photos, *args, "--out", out, "--overwrite")
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert "missing: neck.fpn_convs.0.conv.bias" in result.stderr


@pytest.mark.slow
def test_tool_segments(segmentor, tmp_path, quadrants):
    photos = write_photos(tmp_path / "photos", quadrants)
    out = tmp_path / "out"
    result = run_tool("predict", photos, "--checkpoint", segmentor, "--out", out, "--device", "cpu")
    assert result.returncode == 0, result.stderr
    classes = json.loads((out / "labels" / "classes.json").read_text())
    assert [entry["name"] for entry in classes] == ["sky", "road", "tree"]
    for name in ("a", "inside/grey"):
        with Image.open(out / "labels" / f"{name}.png") as labels:
            assert labels.size == (60, 40) and np.asarray(labels).max() < 3
        assert (out / "overlays" / f"{name}.jpg").is_file()


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    pytest.importorskip("mmengine")
    import timm
    import torch
    from mmengine.config import Config

    folder = tmp_path_factory.mktemp("classifier")
    torch.manual_seed(0)
    network = timm.create_model("d_dw_conv_nano", num_classes=7)
    wnids = ["n01440764", "n01443537", "n04399382", "a", "b", "c", "d"]
    weights = {f"network.{k}": v for k, v in network.state_dict().items()}
    content = {"state_dict": weights, "meta": {"dataset_meta": {"classes": wnids}}}
    torch.save(content, folder / "epoch_1.pth")
    Config.fromfile(RECIPES / "pretraining/d_dw_conv_nano.py").dump(folder / "config.py")
    return folder / "epoch_1.pth"


@pytest.mark.slow
def test_tool_classifies(classifier, tmp_path, quadrants):
    photos = write_photos(tmp_path / "photos", quadrants)
    out = tmp_path / "out"
    result = run_tool("predict", photos, "--checkpoint", classifier, "--out", out)
    assert result.returncode == 0, result.stderr
    classes = json.loads((out / "classes/a.json").read_text())["classes"]
    assert len(classes) == 5 and classes[0]["score"] >= classes[4]["score"] > 0
    names = {"tench", "goldfish", "teddy"}
    for entry in classes:
        if entry["class_id"] < 3:
            assert any(name in entry["class_name"] for name in names)
    assert (out / "overlays/inside/grey.jpg").is_file()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["gone", "--checkpoint", "DETECTOR"], "gone does not exist"),
        (["PHOTO", "--checkpoint", "gone.pth"], "gone.pth does not exist"),
        (["PHOTO", "--checkpoint", "DETECTOR", "--config", "gone.py"], "gone.py does not exist"),
        (["PHOTO", "--checkpoint", "DETECTOR", "--device", "quantum"], "--device quantum"),
        (["PHOTO", "--checkpoint", "DETECTOR", "--device", "cuda:77"], "--device cuda:77"),
        (["PHOTO", "--checkpoint", "DETECTOR", "--score-thr", "7"], "--score-thr 7.0"),
        (["PHOTO", "--checkpoint", "DETECTOR", "--resume", "--overwrite"], "name one"),
        (["PHOTO", "--checkpoint", "DETECTOR", "--config", "SEGMENTATION"], "model_final.pth"),
        (["PHOTO", "--checkpoint", "SEGMENTOR", "--config", "DETECTION"], "iter_1.pth"),
    ],
)
def test_tool_refuses_in_one_line(
    args, message, detector, segmentor, tmp_path, quadrants, capsys, tool
):
    photo = tmp_path / "a.png"
    Image.fromarray(quadrants).save(photo)
    names = {
        "PHOTO": photo,
        "DETECTOR": detector,
        "SEGMENTOR": segmentor,
        "DETECTION": DETECTION_CONFIG,
        "SEGMENTATION": SEGMENTATION_CONFIG,
    }
    args = [str(names.get(word, word)) for word in args]
    try:
        status = tool.main([*args, "--out", str(tmp_path / "out")])
    except SystemExit as stop:
        status = stop.code
    assert status == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out").exists()
