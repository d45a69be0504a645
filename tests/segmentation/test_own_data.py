"""Own data in the forms that people have: endings of masks, coloured masks, a test split."""

import sys
from pathlib import Path

import numpy as np
import pytest
from mmengine.registry import init_default_scope
from PIL import Image

from dense.recipes import RECIPES
from dense.segmentation.config import (
    ConfigError,
    check,
    load_config,
    set_data_root,
    set_test_data,
    use_own_data,
)
from dense.segmentation.data import image_mask_pairs
from dense.segmentation.dataset import FolderDataset

NANO = str(RECIPES / "segmentation/dw_conv_nano_upernet.py")
COLOURS = {"ground": (0, 0, 0), "box": (128, 64, 128), "bar": (0, 200, 7)}
IGNORED = (255, 255, 255)


def touch(*paths):
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")


@pytest.mark.parametrize(
    "image, mask",
    [
        ("a.jpg", "a.png"),
        ("a.jpg", "a.tif"),
        ("a.png", "a_mask.png"),
        ("a.png", "a_mask.tif"),
        ("a.jpg", "a_labelTrainIds.png"),
        ("aachen/a_0_leftImg8bit.png", "aachen/a_0_gtFine_labelTrainIds.png"),
    ],
)
def test_masks_are_found_by_their_endings(tmp_path, image, mask):
    images, masks = tmp_path / "images", tmp_path / "masks"
    touch(images / image, masks / mask, masks / "b_mask.png")
    # What Cityscapes has beside them.
    touch(masks / mask.replace("labelTrainIds", "labelIds").replace("a_mask", "a_other"))
    assert image_mask_pairs(images, masks) == [(images / image, masks / mask)]


def test_masks_beside_their_images(tmp_path):
    touch(*(tmp_path / name for name in ("a.png", "a_mask.png", "b.jpg", "b_mask.png")))
    pairs = image_mask_pairs(tmp_path, tmp_path)
    assert [(image.name, mask.name) for image, mask in pairs] == [
        ("a.png", "a_mask.png"),
        ("b.jpg", "b_mask.png"),
    ]


@pytest.fixture
def coloured(shapes, tmp_path):
    """The shapes' folders with masks in colours, a corner of each in one to ignore."""
    palette = np.array(list(COLOURS.values()), np.uint8)
    given = dict(shapes)
    for split in ("train", "val"):
        folder = tmp_path / split
        folder.mkdir()
        for path in Path(shapes[f"{split}_masks"]).iterdir():
            picture = palette[np.asarray(Image.open(path))]
            picture[:4, :4] = IGNORED
            Image.fromarray(picture).save(folder / path.name)
        given[f"{split}_masks"] = str(folder)
    lines = [f"{name} {' '.join(map(str, colour))}" for name, colour in COLOURS.items()]
    path = tmp_path / "classes.txt"
    path.write_text("\n".join([*lines, "- 255 255 255"]))
    return {**given, "classes": str(path)}


def configured(given):
    cfg = load_config(NANO)
    use_own_data(cfg, given)
    return cfg


def dataset_of(cfg):
    init_default_scope("mmseg")
    options = dict(cfg.val_dataloader.dataset)
    options.pop("type")
    return FolderDataset(**options, test_mode=True)


def labels_of(cfg):
    return [sample["data_samples"].gt_sem_seg.data[0].numpy() for sample in dataset_of(cfg)]


@pytest.mark.parametrize("suffix, dtype", [(".tif", "uint8"), (".tiff", "uint16")])
def test_tiffs_are_read_as_pngs(shapes, tmp_path, suffix, dtype):
    given = dict(shapes)
    for kind in ("images", "masks"):
        given[f"val_{kind}"] = str(tmp_path / kind)
        (tmp_path / kind).mkdir()
        for path in Path(shapes[f"val_{kind}"]).iterdir():
            pixels = np.asarray(Image.open(path))
            pixels = pixels.astype(dtype) if kind == "masks" else pixels
            Image.fromarray(pixels).save(tmp_path / kind / f"{path.stem}{suffix}")
    cfg = configured(given)
    check(cfg, training=True)
    for ours, expected in zip(labels_of(cfg), labels_of(configured(shapes)), strict=True):
        np.testing.assert_array_equal(ours, expected)


def test_colours_become_class_indices(coloured, shapes):
    cfg, plain = configured(coloured), configured(shapes)
    check(cfg, training=True)
    assert cfg.model.decode_head.num_classes == 3
    # Overlays are drawn in the same colours.
    assert list(dataset_of(cfg).metainfo["palette"]) == list(COLOURS.values())
    for ours, expected in zip(labels_of(cfg), labels_of(plain), strict=True):
        expected[:4, :4] = 255
        np.testing.assert_array_equal(ours, expected)
        assert set(np.unique(ours)) == {0, 1, 2, 255}
    [augment] = [step for step in cfg.tta_pipeline if step["type"] == "TestTimeAug"]
    assert augment["transforms"][2][0]["type"] == "ReadColouredMask"


def test_the_message_that_finds_coloured_masks_says_what_reads_them(coloured, shapes):
    with pytest.raises(ConfigError) as error:
        check(configured({**coloured, "classes": shapes["classes"]}), training=True)
    text = str(error.value)
    assert "is RGB: one class index per pixel is needed" in text
    assert "--classes FILE takes a line NAME R G B for each" in text
    assert "it holds 0 0 0, 0 200 7, 128 64 128, 255 255 255" in text


def test_a_colour_without_a_line_is_named(coloured, tmp_path):
    path = tmp_path / "classes.txt"
    path.write_text(path.read_text().replace("- 255 255 255", ""))
    with pytest.raises(ConfigError, match="holds 255 255 255, of no line of --classes .6 of 6"):
        check(configured(coloured), training=True)
    with pytest.raises(ConfigError, match="has colours: ignore_index and reduce_zero_label are"):
        configured({**coloured, "ignore_index": 3})


def test_masks_of_indices_are_no_coloured_ones(coloured, shapes):
    masks = {key: shapes[key] for key in ("train_masks", "val_masks")}
    with pytest.raises(ConfigError, match="is L: colours of --classes are of RGB masks"):
        check(configured({**coloured, **masks}), training=True)


def test_a_test_split_beside_the_validations(shapes, tools):
    test = ["--test-images", shapes["train_images"], "--test-masks", shapes["train_masks"]]
    words = [w for key, value in shapes.items() for w in (f"--{key.replace('_', '-')}", value)]
    cfg = tools.train.configured(tools.train.parse_args([NANO, *words, *test]))
    folders = [cfg[f"{s}_dataloader"].dataset.data_prefix.img_path for s in ("val", "test")]
    assert folders == [shapes["val_images"], shapes["train_images"]]
    check(cfg, training=True)
    cfg.test_dataloader.dataset.data_prefix.seg_map_path += "/absent"
    with pytest.raises(ConfigError, match="no folder .*absent .test_dataloader"):
        check(cfg, training=True)
    with pytest.raises(ConfigError, match="test_images and test_masks are given together"):
        configured({**shapes, "test_images": shapes["val_images"]})


def test_a_training_needs_no_standard_test_data(ade_layout):
    cfg = load_config(NANO)
    set_data_root(cfg, str(ade_layout))
    cfg.test_dataloader.dataset.data_prefix.img_path = "absent"
    check(cfg, training=True)
    with pytest.raises(ConfigError, match="no folder .*absent .test_dataloader"):
        check(cfg, training=False)


def test_testing_on_other_folders(shapes):
    cfg = configured(shapes)
    set_test_data(cfg, None, None)
    assert cfg.test_dataloader.dataset.data_prefix.img_path == shapes["val_images"]
    set_test_data(cfg, shapes["train_images"], shapes["train_masks"])
    assert cfg.test_dataloader.dataset.data_prefix.img_path == shapes["train_images"]
    assert cfg.val_dataloader.dataset.data_prefix.img_path == shapes["val_images"]
    with pytest.raises(ConfigError, match="--test-images and --test-masks are given together"):
        set_test_data(cfg, shapes["train_images"], None)
    with pytest.raises(ConfigError, match="tests on ADE20KDataset; the config that a training"):
        set_test_data(load_config(NANO), shapes["train_images"], shapes["train_masks"])


def test_the_tool_tests_on_the_folders_that_it_is_given(shapes, tools, tmp_path, monkeypatch):
    built = []

    class Runner:
        def __init__(self, cfg):
            built.append(cfg)

        def test(self):
            pass

    monkeypatch.setattr("dense.segmentation.config.build_runner", Runner)
    configured(shapes).dump(tmp_path / "net.py")
    words = [str(tmp_path / "net.py"), str(tmp_path / "net.pth")]
    words += ["--test-images", shapes["train_images"], "--test-masks", shapes["train_masks"]]
    monkeypatch.setattr(sys, "argv", ["test_segmentor.py", *words])
    tools.test.main()
    [cfg] = built
    assert cfg.test_dataloader.dataset.data_prefix == dict(
        img_path=shapes["train_images"], seg_map_path=shapes["train_masks"]
    )
