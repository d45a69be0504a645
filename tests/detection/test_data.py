"""Their own data: what is checked before anything is built, and what the loaders then read."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from detectron2.config import instantiate
from detectron2.data import MetadataCatalog
from PIL import Image
from pycocotools import mask as mask_util

from dense.detection.config import ConfigError, load_config
from dense.detection.data import DataError, resolve_data
from dense.detection.mapper import PhotoMapper
from dense.recipes import RECIPES

NANO = str(RECIPES / "detection/cascade_mask_rcnn_dw_conv_nano.py")


@pytest.fixture
def cfg(coco_files, tmp_path):
    cfg = load_config(NANO)
    cfg.train.output_dir = str(tmp_path / "out")
    cfg.dataloader.train.num_workers = cfg.dataloader.test.num_workers = 0
    cfg.data = coco_files.named()
    return cfg


def test_loaders_read_the_named_files(cfg):
    resolve_data(cfg, training=True)
    # Detectron2's order: ascending category ids, 4 and 9 here.
    assert cfg.dataloader.metadata.classes == ["block", "bar"]
    assert cfg.model.roi_heads.num_classes == 2
    assert instantiate(cfg.model).roi_heads.box_predictor[0].num_classes == 2
    batch = next(iter(instantiate(cfg.dataloader.train)))
    assert len(batch) == 4
    item = batch[0]
    assert item["image"].dtype == torch.uint8
    boxes, masks = item["instances"].gt_boxes, item["instances"].gt_masks
    torch.testing.assert_close(boxes.tensor, masks.get_bounding_boxes().tensor)
    assert len(instantiate(cfg.dataloader.test)) == 2
    evaluator = instantiate(cfg.dataloader.evaluator)
    assert evaluator._metadata.thing_classes == ["block", "bar"]


def test_images_are_rgb(cfg):
    resolve_data(cfg, training=True)
    item = next(iter(instantiate(cfg.dataloader.test)))[0]
    reds = item["image"].flatten(1).T.tolist()
    assert [220, 30, 30] in reds
    assert [30, 30, 220] not in reds


def test_a_choice_of_classes_in_their_order(cfg, coco_files):
    cfg.data.classes = ["bar", "block"]
    resolve_data(cfg, training=True)
    instantiate(cfg.dataloader.test)
    name = cfg.dataloader.test.dataset.names
    assert MetadataCatalog.get(name).thing_classes == ["bar", "block"]
    written = json.loads(Path(name).read_text())
    original = json.loads(Path(coco_files.json("val")).read_text())
    index = {9: 1, 4: 2}
    assert [a["category_id"] for a in written["annotations"]] == [
        index[a["category_id"]] for a in original["annotations"]
    ]


def test_one_class_leaves_the_others_out(cfg):
    cfg.data.classes = ["bar"]
    resolve_data(cfg, training=True)
    batch = next(iter(instantiate(cfg.dataloader.train)))
    assert all(len(item["instances"]) == 1 for item in batch)
    assert cfg.model.roi_heads.num_classes == 1


def test_validation_ids_are_matched_by_name(cfg, coco_files):
    def swap(content):
        for category in content["categories"]:
            category["id"] = 13 - category["id"]
        for annotation in content["annotations"]:
            annotation["category_id"] = 13 - annotation["category_id"]

    before = json.loads(Path(coco_files.json("val")).read_text())["annotations"]
    coco_files.edit("val", swap)
    resolve_data(cfg, training=True)
    written = json.loads(Path(cfg.dataloader.test.dataset.json_file).read_text())
    names = {c["id"]: c["name"] for c in written["categories"]}
    assert [names[i] for i in sorted(names)] == ["block", "bar"]
    expected = ["bar" if a["category_id"] == 9 else "block" for a in before]
    assert [names[a["category_id"]] for a in written["annotations"]] == expected


def test_rle_masks_are_read_as_bitmaps(cfg, coco_files):
    def encode(content):
        for annotation in content["annotations"]:
            rle = mask_util.merge(mask_util.frPyObjects(annotation["segmentation"], 96, 128))
            annotation["segmentation"] = {"size": [96, 128], "counts": rle["counts"].decode()}

    coco_files.edit("train", encode)
    resolve_data(cfg, training=True)
    item = next(iter(instantiate(cfg.dataloader.train)))[0]
    assert type(item["instances"].gt_masks).__name__ == "BitMasks"


def test_boxes_alone(cfg, coco_files):
    for split in ("train", "val"):
        coco_files.edit(split, lambda c: [a.pop("segmentation") for a in c["annotations"]])
    with pytest.raises(DataError, match="12 of 12 objects have no segmentation.*mask_in_features"):
        resolve_data(cfg, training=True)
    cfg.model.roi_heads.mask_in_features = None
    resolve_data(cfg, training=True)
    item = next(iter(instantiate(cfg.dataloader.train)))[0]
    assert not item["instances"].has("gt_masks")


def test_without_validation_data(cfg, caplog):
    cfg.data.val_json = cfg.data.val_images = None
    resolve_data(cfg, training=True)
    assert "evaluator" not in cfg.dataloader
    assert "training without evaluation" in caplog.text


@pytest.mark.parametrize("training", [True, False])
def test_validation_data_that_come_later(cfg, coco_files, training):
    """The saved config of a training without them evaluates: alone, and as the training goes on."""
    evaluator = cfg.dataloader.evaluator
    cfg.data.val_json = cfg.data.val_images = None
    resolve_data(cfg, training=True)
    cfg.data = coco_files.named()
    resolve_data(cfg, training=training)
    assert cfg.dataloader.evaluator == evaluator
    assert len(instantiate(cfg.dataloader.test)) == 2


def test_a_five_line_config(coco_files, tmp_path):
    configs = shutil.copytree(Path(NANO).parent, tmp_path / "configs")
    path = configs / "mine.py"
    path.write_text(
        "from .cascade_mask_rcnn_dw_conv_tiny_3x_coco import (\n"
        "    dataloader, lr_multiplier, model, optimizer, train)\n"
        f"data = dict({', '.join(f'{k}={v!r}' for k, v in coco_files.named().items())})\n"
        "train.update(max_iter=5000)\n"
        "model.backbone.bottom_up.init = 'mine.pth'\n"
    )
    cfg = load_config(str(path))
    resolve_data(cfg, training=True)
    assert cfg.dataloader.metadata.classes == ["block", "bar"]
    assert cfg.train.max_iter == 5000
    assert cfg.model.backbone.bottom_up.init == "mine.pth"


def drop(key):
    return lambda content: content.pop(key)


def change_first(section, **values):
    return lambda content: content[section][0].update(values)


@pytest.mark.parametrize(
    "change, message",
    [
        (drop("categories"), "no list 'categories'"),
        (drop("annotations"), "no list 'annotations'"),
        (lambda c: c["images"].clear(), "lists no image"),
        (lambda c: c["categories"].clear(), "lists no category"),
        (lambda c: c["annotations"].clear(), "has no annotation to use"),
        (change_first("categories", name="block"), "several categories named block"),
        (
            change_first("images", file_name="gone.png"),
            "1 image cannot be used: .*there is no .*gone.png",
        ),
        (
            change_first("annotations", image_id=99),
            "annotation 1: image_id=99 is of no listed image",
        ),
        (
            change_first("annotations", category_id=99),
            "annotation 1: category_id=99 is of no listed category",
        ),
        (
            change_first("annotations", bbox=[1, 2]),
            r"annotation 1: bbox=\[1, 2\]: four finite numbers",
        ),
        (change_first("annotations", segmentation=[]), "1 of 12 objects have no segmentation"),
        (lambda c: c["images"][0].pop("width"), "image 0: width=None: the photo's pixels"),
    ],
)
def test_a_broken_json_is_named(cfg, coco_files, change, message):
    coco_files.edit("train", change)
    with pytest.raises(DataError, match=message) as error:
        resolve_data(cfg, training=True)
    assert coco_files.json("train") in str(error.value)
    assert "\n" not in str(error.value)


def test_faulty_entries_are_dropped_if_allowed(cfg, coco_files, caplog):
    coco_files.edit("train", change_first("annotations", bbox=[1, 2, -3, 4]))
    cfg.data.allow_invalid = True
    resolve_data(cfg, training=True)
    assert "1 annotation cannot be used: annotation 1: bbox=[1, 2, -3, 4]" in caplog.text
    dataset = cfg.dataloader.train.dataset
    assert dataset.json_file != coco_files.json("train")
    kept = json.loads(Path(dataset.json_file).read_text())["annotations"]
    assert [annotation["id"] for annotation in kept] == list(range(2, 13))


def test_not_json(cfg, coco_files):
    Path(coco_files.json("train")).write_text("{not json")
    with pytest.raises(DataError, match="train.json is not JSON"):
        resolve_data(cfg, training=True)


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("train_json", "nowhere.json", "data.train_json: there is no file nowhere.json"),
        ("val_images", "nowhere", "data.val_images: there is no folder nowhere"),
        ("train_images", None, "data.train_images is not set .--train-images"),
        ("classes", ["bar", "unicorn"], "no category unicorn; it has block, bar"),
        ("classes", ["bar", "bar"], "names a class twice"),
    ],
)
def test_wrong_names(cfg, key, value, message):
    cfg.data[key] = value
    with pytest.raises(DataError, match=message):
        resolve_data(cfg, training=True)


def test_coco_that_is_not_there_is_named():
    cfg = load_config(NANO)
    metadata = MetadataCatalog.get("coco_2017_train")
    if Path(metadata.json_file).exists():
        pytest.skip("COCO is here")
    with pytest.raises(DataError, match="instances_train2017.json does not exist. DETECTRON2_DATA"):
        resolve_data(cfg, training=True)


@pytest.mark.parametrize(
    "override, message",
    [
        ("train.maxiter=3", "train has no 'maxiter'; did you mean 'max_iter'"),
        ("model.roi_heads.box_heads.7.conv_dims=1", "box_heads has no '7'"),
        ("nonsense", "is not key=value"),
    ],
)
def test_wrong_overrides(override, message):
    with pytest.raises(ConfigError, match=message):
        load_config(NANO, [override])


def test_overrides():
    cfg = load_config(
        NANO,
        [
            "train.max_iter=7",
            "model.roi_heads.box_heads.1.conv_dims=[8]",
            "model.backbone.bottom_up.window_size=5",
            "+model.backbone.bottom_up.shared=true",
        ],
    )
    assert cfg.train.max_iter == 7
    assert cfg.model.roi_heads.box_heads[1].conv_dims == [8]
    assert cfg.model.roi_heads.box_heads[0].conv_dims == [48, 48]
    assert cfg.model.backbone.bottom_up.window_size == 5
    assert cfg.model.backbone.bottom_up.shared


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.py", None, "does not exist"),
        ("a.json", "{}", "LazyConfig .py"),
        ("a.py", "import nowhere", "ModuleNotFoundError.*nowhere"),
        ("a.py", "model = {}", "has no dataloader, optimizer, lr_multiplier, train"),
        ("a.yaml", "MODEL: {}", "yacs"),
        ("a.yaml", "a: !!python/object/apply:os.getcwd []", "ConstructorError"),
    ],
)
def test_wrong_config_files(tmp_path, name, content, message):
    path = tmp_path / name
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match=message) as error:
        load_config(str(path))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("order", ["RGB", "BGR"])
def test_photos_are_read_in_the_models_order(tmp_path, order):
    colour = [200, 100, 20]
    Image.new("RGB", (8, 6), tuple(colour)).save(tmp_path / "a.png")
    mapper = PhotoMapper(is_train=False, augmentations=[], image_format=order, total=1)
    entry = mapper({"file_name": str(tmp_path / "a.png"), "height": 6, "width": 8})
    assert entry["image"][:, 2, 2].tolist() == (colour if order == "RGB" else colour[::-1])


def test_a_test_split_is_evaluated_after_training(cfg, coco_files):
    test = {"test_json": coco_files.json("train"), "test_images": coco_files.images("train")}
    cfg.data = {**coco_files.named(), **test}
    trained = cfg.copy()
    resolve_data(trained, training=True)
    # While it trains, it is evaluated on the validation data.
    assert len(instantiate(trained.dataloader.test)) == 2
    resolve_data(cfg, training=False)
    assert len(instantiate(cfg.dataloader.test)) == 6

    cfg.data.val_json = cfg.data.val_images = None
    trained = cfg.copy()
    resolve_data(trained, training=True)
    assert "evaluator" not in trained.dataloader
    # Its saved config evaluates.
    resolve_data(trained, training=False)
    assert trained.dataloader.evaluator == cfg.dataloader.evaluator
    resolve_data(cfg, training=False)
    cfg.data.test_images = None
    with pytest.raises(DataError, match="data.test_images is not set .--test-images"):
        resolve_data(cfg, training=False)
    # Faults are found before a training, not after it.
    cfg.data = {**coco_files.named(), **test, "test_json": "nowhere.json"}
    with pytest.raises(DataError, match="data.test_json: there is no file nowhere.json"):
        resolve_data(cfg, training=True)
    coco_files.edit("val", lambda content: content["annotations"][0].update(bbox=[-500, 0, 5, 5]))
    faulty = {"test_json": coco_files.json("val"), "test_images": coco_files.images("val")}
    cfg.data = {**coco_files.named(), "val_json": None, "val_images": None, **faulty}
    with pytest.raises(DataError, match="val.json"):
        resolve_data(cfg, training=True)


def test_a_file_of_classes(coco_files, tmp_path):
    from tests.support import load_tool

    (tmp_path / "classes.txt").write_text("bar\nblock\n")
    tool = load_tool("train_detector")
    words = ["--config-file", NANO, *coco_files.arguments()]
    args = tool.parse_args([*words, "--classes", str(tmp_path / "classes.txt")])
    cfg = tool.configured(args)
    resolve_data(cfg, training=True)
    assert cfg.dataloader.metadata.classes == ["bar", "block"]


def test_the_tools_options_name_the_data(coco_files):
    from tests.support import load_tool

    tool = load_tool("train_detector")
    test = ["--test-json", "test.json", "--test-images", "test", "--allow-invalid"]
    words = ["--config-file", NANO, *coco_files.arguments(), *test, "--classes", "bar, block"]
    cfg = tool.configured(tool.parse_args([*words, "--iters", "64", "--output-dir", "mine"]))
    test = {"test_json": "test.json", "test_images": "test", "allow_invalid": True}
    assert cfg.data == {**coco_files.named(), **test, "classes": ["bar", "block"]}
    assert (cfg.train.max_iter, cfg.train.output_dir) == (64, "mine")
