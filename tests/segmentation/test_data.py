"""Folders of images and masks: what is paired, what the labels become, what is refused."""

import os
from importlib.metadata import packages_distributions
from pathlib import Path

import mmseg
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import DATASETS, TRANSFORMS, init_default_scope
from mmseg.models import CrossEntropyLoss
from PIL import Image

from dense.images import TooManyUnreadable, UnreadableImage
from dense.recipes import RECIPES
from dense.segmentation.config import check, load_config, set_short_side, use_own_data
from dense.segmentation.data import ConfigError, check_masks, check_overlap, image_mask_pairs
from dense.segmentation.dataset import FolderDataset
from dense.segmentation.losses import WeightedCrossEntropyLoss

NANO = RECIPES / "segmentation/i_d_dw_conv_nano_upernet.py"
RECIPE = "8xb2-160k_ade20k-512x512"
CLASSES = ("ground", "box", "bar")


def save(path, array, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(array, np.uint8)).save(path, **options)


@pytest.fixture
def pair(tmp_path):
    image, mask = tmp_path / "images/a.png", tmp_path / "masks/a.png"
    save(image, np.zeros((4, 6, 3)))
    save(mask, np.zeros((4, 6)))
    return image, mask


def test_pairs_by_name_whatever_the_format_and_depth(tmp_path):
    for name in ("b.PNG", "sub/a.JPEG", "c.tif", "d.jpg"):
        save(tmp_path / "images" / name, np.zeros((4, 4, 3)))
    (tmp_path / "images/notes.txt").write_text("no image")
    pairs = image_mask_pairs(tmp_path / "images", tmp_path / "masks")
    assert [mask.relative_to(tmp_path / "masks").as_posix() for _, mask in pairs] == [
        "b.png",
        "c.png",
        "d.png",
        "sub/a.png",
    ]


@pytest.mark.parametrize(
    "ignore_index, reduce_zero_label, expected",
    [
        (255, False, [0, 1, 2, 3, 255]),
        (2, False, [0, 1, 255, 3, 255]),
        (255, True, [255, 0, 1, 2, 255]),
        (3, True, [255, 0, 1, 255, 255]),
        (254, False, [0, 1, 2, 3, 255]),
    ],
)
@pytest.mark.parametrize("palette", [False, True])
def test_labels_of_masks(tmp_path, ignore_index, reduce_zero_label, expected, palette):
    save(tmp_path / "images/a.jpg", np.zeros((2, 5, 3)))
    mask = Image.fromarray(np.array([[0, 1, 2, 3, 255]] * 2, np.uint8))
    if palette:
        mask = mask.convert("L")
        mask.putpalette([v for i in range(256) for v in (255 - i, i, 7)])
        assert mask.mode == "P"
    (tmp_path / "masks").mkdir()
    mask.save(tmp_path / "masks/a.png")
    init_default_scope("mmseg")
    dataset = FolderDataset(
        data_prefix=dict(img_path=str(tmp_path / "images"), seg_map_path=str(tmp_path / "masks")),
        metainfo=dict(classes=("a", "b", "c", "d")),
        ignore_index=ignore_index,
        reduce_zero_label=reduce_zero_label,
        pipeline=[dict(type="LoadImageFromFile"), dict(type="LoadAnnotations")],
    )
    assert dataset[0]["gt_seg_map"].tolist() == [expected] * 2


def test_masks_that_fit_pass(pair):
    image, mask = pair
    save(mask, np.array([[0, 1, 2, 255, 9, 0]] * 4))
    check_masks([pair], CLASSES, ignore_index=9)
    save(mask, np.array([[0, 1, 2, 3, 255, 0]] * 4))
    check_masks([pair], CLASSES, reduce_zero_label=True)
    exif = Image.Exif()
    exif[0x0112] = 6
    save(image, np.zeros((6, 4, 3)), exif=exif)
    check_masks([pair], CLASSES, reduce_zero_label=True)


@pytest.mark.parametrize(
    "mask, message",
    [
        (np.full((4, 6), 3), r"a\.png holds 3: 3 classes are 0 to 2"),
        (np.zeros((6, 4)), r"a\.png is 4x6, its image 6x4"),
        (np.zeros((4, 6, 3)), r"a\.png is RGB: one class index per pixel"),
    ],
)
def test_masks_that_do_not_fit_are_named(pair, mask, message):
    save(pair[1], mask)
    with pytest.raises(ConfigError, match=message):
        check_masks([pair], CLASSES)


def test_unreadable_files_are_named(pair):
    pair[1].write_bytes(b"not a PNG")
    with pytest.raises(ConfigError, match=r"masks/a\.png.* cannot be read"):
        check_masks([pair], CLASSES)


def test_own_data_reaches_every_head_and_loader(shapes):
    cfg = load_config(NANO)
    # As MMSegmentation's own ADE20K pipelines have it.
    cfg.train_dataloader.dataset.pipeline[1].reduce_zero_label = True
    cfg.model.auxiliary_head = [cfg.model.auxiliary_head]
    use_own_data(cfg, shapes)
    check(cfg, training=True)
    assert cfg.model.decode_head.num_classes == cfg.model.auxiliary_head[0].num_classes == 3
    for loader in (cfg.train_dataloader, cfg.val_dataloader, cfg.test_dataloader):
        assert loader.dataset.metainfo.classes == CLASSES
        assert "reduce_zero_label" not in loader.dataset.pipeline[1]
    assert cfg.train_dataloader.dataset.data_prefix.img_path == shapes["train_images"]
    assert cfg.test_dataloader.dataset.data_prefix.seg_map_path == shapes["val_masks"]


def test_five_lines_of_config_are_enough(shapes, tmp_path):
    folders = {k: v for k, v in shapes.items() if k != "classes"}
    (tmp_path / "mine.py").write_text(
        f"_base_ = {str(NANO)!r}\ndata = dict(classes={list(CLASSES)}, **{folders})\n"
    )
    mine, named = load_config(tmp_path / "mine.py"), load_config(NANO)
    use_own_data(mine, {"ignore_index": None, "classes": None})
    use_own_data(named, shapes)
    for key in ("train_dataloader", "val_dataloader", "test_dataloader", "model"):
        assert mine[key] == named[key]


def steps(cfg, loader: str) -> list:
    init_default_scope("mmseg")
    return [TRANSFORMS.build(step) for step in cfg[loader].dataset.pipeline]


def test_own_photos_keep_their_scale(shapes):
    """Crops are of half to one and a half times a photo's size; tests take all of it as it is."""
    cfg = load_config(NANO)
    use_own_data(cfg, shapes)
    paths = (f"{shapes[key]}/0.{end}" for key, end in (("val_images", "jpg"), ("val_masks", "png")))
    found = dict(zip(("img_path", "seg_map_path"), paths, strict=True))
    found |= dict(label_map=None, reduce_zero_label=False, seg_fields=[])

    sizes = set()
    for seed in range(40):
        np.random.seed(seed)
        sample = dict(found)
        for step in steps(cfg, "train_dataloader")[:3]:
            sample = step(sample)
        assert sample["img"].shape[:2] == sample["gt_seg_map"].shape
        sizes.add(sample["img"].shape[:2])
    assert sizes == {(32, 40), (48, 60), (64, 80), (80, 100), (96, 120)}
    for loader in ("val_dataloader", "test_dataloader"):
        sample = dict(found)
        for step in steps(cfg, loader):
            sample = step(sample)
        assert sample["inputs"].shape == (3, 64, 80)


@pytest.mark.parametrize("config", ["dw_conv_nano_upernet", f"swin_tiny_upernet_{RECIPE}"])
def test_a_short_side_resizes_photos_and_narrows_crops(config):
    cfg = load_config(NANO.parent / f"{config}.py")
    set_short_side(cfg, 96)
    load = [dict(type="LoadImageFromFile"), dict(type="LoadAnnotations")]
    train, test = (
        [step.to_dict() for step in cfg[loader].dataset.pipeline]
        for loader in ("train_dataloader", "val_dataloader")
    )
    ratio = cfg.train_dataloader.dataset.pipeline[3].cat_max_ratio
    assert train[:4] == [
        *load,
        dict(type="RandomResize", scale=(384, 96), ratio_range=(0.75, 1.5), keep_ratio=True),
        dict(type="RandomCrop", crop_size=(96, 96), cat_max_ratio=ratio),
    ]
    assert train[4]["type"] == "RandomFlip" and train[-1]["type"] == "PackSegInputs"
    assert cfg.model.data_preprocessor.size == (96, 96)
    resize = dict(type="Resize", scale=(384, 96), keep_ratio=True)
    assert test == [load[0], resize, load[1], dict(type="PackSegInputs")]
    assert cfg.test_dataloader.dataset.pipeline == cfg.val_dataloader.dataset.pipeline
    with pytest.raises(ConfigError, match="--short-side 16: 32 or more"):
        set_short_side(cfg, 16)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(val_masks=None), "val_masks not given"),
        (dict(classes="one"), "the background is a class of its own"),
        (dict(classes="a,b,a"), "a twice"),
        (dict(classes="a,,b"), "empty"),
        (dict(train_images="/nowhere"), r"no folder /nowhere \(train_dataloader\)"),
        (dict(class_names="a,b"), "data has class_names"),
    ],
)
def test_bad_own_data_is_named(shapes, change, message):
    cfg = load_config(NANO)
    with pytest.raises(ConfigError, match=message):
        use_own_data(cfg, {**shapes, **change})
        check(cfg, training=True)


def test_a_missing_mask_is_named(shapes, tmp_path):
    cfg = load_config(NANO)
    (tmp_path / "masks").mkdir()
    use_own_data(cfg, {**shapes, "train_masks": str(tmp_path / "masks")})
    with pytest.raises(ConfigError, match=r"0\.jpg has no mask .*0\.png \(6 of 6 have none\)"):
        check(cfg, training=True)


def test_a_missing_data_root_is_named_before_anything_is_built():
    cfg = load_config(NANO.parent / "swin_tiny_upernet_8xb2-160k_ade20k-512x512.py")
    with pytest.raises(ConfigError, match=r"no folder data/ade/.* data_root is 'data/ade"):
        check(cfg, training=True)


def test_one_image_a_batch_is_refused(shapes):
    cfg = load_config(NANO, {"train_dataloader.batch_size": 1})
    use_own_data(cfg, shapes)
    with pytest.raises(ConfigError, match="batch_size=1"):
        check(cfg, training=True)


def test_unreadable_configs_are_named(tmp_path):
    with pytest.raises(ConfigError, match="no config file at nowhere.py"):
        load_config("nowhere.py")
    (tmp_path / "bad.py").write_text("model = dict(\n")
    with pytest.raises(ConfigError, match="bad.py: "):
        load_config(tmp_path / "bad.py")
    assert isinstance(load_config(NANO), Config)


def test_all_masks_are_checked_and_counted(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    pairs = []
    for number in range(12):
        image, mask = tmp_path / f"images/{number}.png", tmp_path / f"masks/{number}.png"
        save(image, np.zeros((4, 6, 3)))
        save(mask, np.full((4, 6), 254 if number > 8 else number % 3))
        pairs.append((image, mask))
    told = (
        r"9\.png holds 254: 3 classes are 0 to 2, and 255 is ignored; if 254 marks pixels to ignore"
    )
    with pytest.raises(ConfigError, match=told) as refused:
        check_masks(pairs, CLASSES)
    assert "--ignore-index 254" in str(refused.value) and "3 of 12 masks" in str(refused.value)
    check_masks(pairs, CLASSES, ignore_index=254)


def test_masks_are_read_again_only_if_they_change(pair, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    check_masks([pair], CLASSES)
    opened = []
    read = Image.open
    monkeypatch.setattr(Image, "open", lambda path, *a: opened.append(path) or read(path, *a))
    check_masks([pair], CLASSES)
    assert pair[1] not in opened
    save(pair[1], np.full((4, 6), 3))
    os.utime(pair[1], ns=(1, 1))
    with pytest.raises(ConfigError, match="holds 3"):
        check_masks([pair], CLASSES)
    (cache,) = (tmp_path / "cache").rglob("*.json")
    cache.write_text("{not json")
    with pytest.raises(ConfigError, match="holds 3"):
        check_masks([pair], CLASSES)


def test_a_cache_that_cannot_be_written_is_said(pair, tmp_path, monkeypatch, caplog):
    """A file lies in the folder's place, which no user may write through, not root either."""
    (tmp_path / "cache").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    check_masks([pair], CLASSES)
    assert "the next run reads all masks again" in caplog.text
    assert str(tmp_path / "cache") in caplog.text


def test_what_is_odd_is_said(pair, caplog):
    save(pair[1], np.zeros((4, 6)))
    check_masks([pair], CLASSES)
    assert "no pixel in" in caplog.text and "is of box, bar: 2 of 3 classes" in caplog.text
    check_overlap([pair], [pair])
    assert "1 of 1 validation images are training images too" in caplog.text
    save(pair[1], np.full((4, 6), 255))
    with pytest.raises(ConfigError, match="all pixels of the 1 masks .* are ignored"):
        check_masks([pair], CLASSES)


def test_two_images_with_one_mask(pair):
    other = pair[0].with_suffix(".jpg")
    save(other, np.zeros((4, 6, 3)))
    with pytest.raises(ConfigError, match=r"a\.png, .*a\.jpg share the mask"):
        check_masks([pair, (other, pair[1])], CLASSES)


@pytest.fixture
def photos_of_kinds(tmp_path):
    """A 16-bit grey photo and a good one, each with a mask."""
    values = np.linspace(0, 65535, 24).reshape(4, 6)
    (tmp_path / "images").mkdir()
    Image.fromarray(values.astype(np.uint16)).save(tmp_path / "images/deep.png")
    save(tmp_path / "images/good.png", np.full((4, 6, 3), (10, 20, 30)))
    for name in ("deep", "good"):
        save(tmp_path / f"masks/{name}.png", np.zeros((4, 6)))
    return tmp_path, (values / 256).astype(np.uint8)


def folder_dataset(root, **options):
    init_default_scope("mmseg")
    return FolderDataset(
        data_prefix=dict(img_path=str(root / "images"), seg_map_path=str(root / "masks")),
        metainfo=dict(classes=("a", "b")),
        pipeline=[dict(type="ReadImage"), dict(type="LoadAnnotations")],
        **options,
    )


def test_training_reads_as_prediction_does(photos_of_kinds):
    root, expected = photos_of_kinds
    dataset = folder_dataset(root)
    deep, good = dataset[0], dataset[1]
    assert (deep["img"] == expected[..., None]).all() and deep["img"].dtype == np.uint8
    assert deep["img_shape"] == deep["ori_shape"] == (4, 6)
    # MMSegmentation's order of channels.
    assert good["img"][0, 0].tolist() == [30, 20, 10]


def test_a_damaged_photo_is_named_and_replaced_up_to_a_share(photos_of_kinds, caplog):
    root, _ = photos_of_kinds
    (root / "images/deep.png").write_bytes(b"no image")
    dataset = folder_dataset(root)
    assert dataset[0]["img_path"].endswith("good.png")
    assert "deep.png cannot be read" in caplog.text and "1 so far, 1 allowed" in caplog.text
    (root / "images/good.png").write_bytes(b"no image")
    with pytest.raises(TooManyUnreadable, match="2 of 2 images cannot be read"):
        for _ in range(8):
            dataset[1]
    with pytest.raises(UnreadableImage, match="deep.png"):
        folder_dataset(root, test_mode=True)[0]


def test_class_weights_and_ignored_pixels():
    torch.manual_seed(0)
    scores = torch.randn(2, 3, 5, 4, dtype=torch.float64, requires_grad=True)
    label = torch.randint(0, 3, (2, 5, 4))
    label[0, 1:4] = 255
    weights = [0.5, 1.0, 4.0]
    loss = WeightedCrossEntropyLoss(class_weight=weights)(scores, label, ignore_index=255)
    expected = torch.nn.CrossEntropyLoss(scores.new_tensor(weights), ignore_index=255)
    torch.testing.assert_close(loss, expected(scores, label))
    alone = WeightedCrossEntropyLoss(class_weight=weights)(scores, torch.full_like(label, 255))
    assert alone == 0
    # What it replaces fails on the index of ignored pixels; the maintained fork's does not.
    if not mmseg_is_the_fork():
        with pytest.raises(IndexError):
            CrossEntropyLoss(class_weight=weights)(scores, label, ignore_index=255)


def mmseg_is_the_fork():
    return "onedl-mmsegmentation" in packages_distributions()["mmseg"]


STOCK = (
    *(
        "fcn/fcn_r50-d8_4xb4-20k_voc12aug-512x512.py",
        "pspnet/pspnet_r50-d8_4xb4-80k_ade20k-512x512.py",
    ),
    *(
        "upernet/upernet_r50_4xb4-20k_voc12aug-512x512.py",
        "segformer/segformer_mit-b0_8xb2-160k_ade20k-512x512.py",
    ),
    "deeplabv3plus/deeplabv3plus_r50-d8_4xb2-40k_cityscapes-512x1024.py",
)


@pytest.mark.parametrize("name", STOCK)
def test_own_data_in_a_stock_config(name, shapes, tmp_path):
    stock = Path(mmseg.__file__).parent / ".mim/configs" / name
    cfg = Config.fromfile(stock)
    cfg.model.decode_head.loss_decode.class_weight = [1.0, 2.0, 3.0]
    use_own_data(cfg, shapes)
    check(cfg, training=True)
    assert cfg.model.decode_head.loss_decode.type == "WeightedCrossEntropyLoss"
    init_default_scope("mmseg")
    dataset = DATASETS.build(cfg.train_dataloader.dataset)
    assert dataset.metainfo["classes"] == CLASSES
    assert dataset[0]["inputs"].dtype == torch.uint8
    # A config that was saved imports what it needs.
    cfg.dump(tmp_path / "saved.py")
    assert (
        "dense.segmentation.dataset"
        in Config.fromfile(tmp_path / "saved.py").custom_imports.imports
    )
