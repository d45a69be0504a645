"""How a config's data are checked and entered: each message whole, each option of the loaders."""

import json
import logging
from functools import partial
from pathlib import Path

import pytest
from detectron2.config import LazyCall as L
from detectron2.data import DatasetCatalog, DatasetMapper, MetadataCatalog
from omegaconf import OmegaConf

from dense.detection import data
from dense.detection.data import DataError, json_dataset, resolve_data
from dense.detection.mapper import PhotoMapper


@pytest.fixture
def cfg(coco_files, tmp_path):
    """The parts of a config that data change."""
    mapper = L(PhotoMapper)(is_train=True, augmentations=[], image_format="RGB", total=0)
    mapper.update(use_instance_mask=False, recompute_boxes=True, instance_mask_format="polygon")
    loader = dict(dataset=dict(names="registered"))
    loaders = dict(train=dict(**loader, mapper=mapper), test=loader, evaluator=dict(name="x"))
    model = dict(roi_heads=dict(num_classes=80, mask_in_features=["p2"]))
    content = dict(train=dict(output_dir=str(tmp_path / "out")), dataloader=loaders, model=model)
    cfg = OmegaConf.create(content, flags={"allow_objects": True})
    cfg.data = coco_files.named()
    return cfg


def refused(cfg, training=True) -> str:
    with pytest.raises(DataError) as error:
        resolve_data(cfg, training=training)
    return str(error.value)


def test_everything_is_entered(cfg, coco_files):
    resolve_data(cfg, training=True)
    train, test = cfg.dataloader.train.dataset, cfg.dataloader.test.dataset
    for dataset, split in ((train, "train"), (test, "val")):
        path = coco_files.json(split)
        assert {k: v for k, v in dataset.items() if k != "_target_"} == dict(
            names=path,
            json_file=path,
            image_root=coco_files.images(split),
            filter_empty=split == "train",
        )
    assert cfg.dataloader.metadata == {"classes": ["block", "bar"]}
    assert cfg.model.roi_heads.num_classes == 2
    mapper = cfg.dataloader.train.mapper
    assert (mapper.use_instance_mask, mapper.total, mapper.recompute_boxes) == (True, 6, True)
    assert mapper.instance_mask_format == "polygon"
    assert not Path(cfg.train.output_dir).exists()


def test_a_detector_of_boxes_in_one_stage(cfg):
    cfg.model = dict(num_classes=80)
    cfg.dataloader.train.mapper = L(DatasetMapper)(is_train=True, recompute_boxes=True)
    resolve_data(cfg, training=True)
    assert cfg.model == dict(num_classes=2)
    mapper = cfg.dataloader.train.mapper
    assert mapper.use_instance_mask is False and mapper.recompute_boxes is False
    assert "total" not in mapper and "instance_mask_format" not in mapper
    del cfg.dataloader.train.mapper
    resolve_data(cfg, training=True)
    assert "mapper" not in cfg.dataloader.train


def test_objects_that_are_not_said_to_be_crowds(cfg, coco_files):
    def change(content):
        for annotation in content["annotations"]:
            annotation.pop("iscrowd")
            annotation["segmentation"] = {"size": [96, 128], "counts": [0, 96 * 128]}

    coco_files.edit("train", change)
    cfg.data.classes = ["bar"]
    resolve_data(cfg, training=True)
    assert cfg.dataloader.train.mapper.instance_mask_format == "bitmask"
    written = sorted(Path(cfg.train.output_dir, "annotations").iterdir())
    assert [path.name for path in written] == ["train.json", "val.json"]
    kept = json.loads(written[0].read_text())
    assert [a["id"] for a in kept["annotations"]] == [1, 3, 5, 7, 9, 11]


def test_masks_of_runs_are_bitmaps(cfg, coco_files):
    runs = {"size": [96, 128], "counts": [0, 96 * 128]}

    def change(crowd, content):
        content["annotations"][3].update(segmentation=runs, iscrowd=crowd)

    # Those of crowds are not read.
    for crowd, form in ((1, "polygon"), (0, "bitmask")):
        coco_files.edit("train", partial(change, crowd))
        resolve_data(cfg, training=True)
        assert cfg.dataloader.train.mapper.instance_mask_format == form
        assert cfg.dataloader.train.mapper.use_instance_mask is True


def test_photos_without_objects_are_for_validation_alone(coco_files):
    coco_files.edit("val", lambda content: content["annotations"].pop(0))
    coco_files.edit("val", lambda content: content["annotations"].pop(0))
    path, images = coco_files.json("val"), coco_files.images("val")
    assert [d["image_id"] for d in json_dataset("mine", path, images)] == [1]
    assert [d["image_id"] for d in json_dataset("mine", path, images, filter_empty=False)] == [0, 1]
    # The name is of the last file that took it.
    coco_files.edit("val", lambda content: content["images"].pop(0))
    assert [d["image_id"] for d in json_dataset("mine", path, images, False)] == [1]
    assert MetadataCatalog.get("mine").image_root == images
    DatasetCatalog.remove("mine"), MetadataCatalog.remove("mine")


@pytest.mark.parametrize(
    "content, message",
    [
        ("[]", "{json}: expected a COCO-style object, not list"),
        ('{"images": {}}', "{json} has no list 'images': it is not COCO-style"),
        (
            '{"images": [], "annotations": 3}',
            "{json} has no list 'annotations': it is not COCO-style",
        ),
        ('{"images": [], "annotations": [], "categories": []}', "{json} lists no image"),
        (dict(categories=[]), "{json} lists no category"),
        (dict(categories=[{"id": 1}]), "{json}: a category has no 'name'"),
        (dict(categories=[{"name": "a"}, {"name": "b"}]), "{json}: a category has no 'id'"),
        (
            dict(categories=[{"id": n, "name": name} for n, name in enumerate("babca")]),
            "{json} has several categories named a, b",
        ),
    ],
)
def test_what_is_not_coco_style(cfg, coco_files, content, message):
    path = Path(coco_files.json("train"))
    if isinstance(content, dict):
        content = json.dumps(json.loads(path.read_text()) | content)
    path.write_text(content)
    assert refused(cfg) == message.format(json=path)


def test_classes_that_a_split_lacks(cfg, coco_files, caplog):
    caplog.set_level("WARNING", "dense")
    path = coco_files.json("val")

    def only_bars(content):
        content["categories"] = [{"id": 9, "name": "bar"}, {"id": 5, "name": "other"}]
        content["annotations"] = [a for a in content["annotations"] if a["category_id"] == 9]

    coco_files.edit("val", only_bars)
    with caplog.at_level(logging.WARNING):
        resolve_data(cfg, training=True)
    assert [record.getMessage() for record in caplog.records] == [
        f"{path} has no category block: no objects of these",
        f"{path}: objects of other are ignored",
    ]
    written = json.loads(Path(cfg.train.output_dir, "annotations/val.json").read_text())
    assert written["categories"] == [{"id": 1, "name": "block"}, {"id": 2, "name": "bar"}]
    assert [(a["id"], a["category_id"]) for a in written["annotations"]] == [(1, 2), (3, 2)]
    assert cfg.dataloader.test.dataset.json_file.endswith("out/annotations/val.json")
    # All of them, or of the training data any, is an error.
    coco_files.edit("val", lambda content: content["categories"].pop(0))
    message = f"{path} has no category block, bar; it has other"
    assert refused(cfg) == message
    cfg.data.classes = ["bar", "cat"]
    path = coco_files.json("train")
    assert refused(cfg) == f"{path} has no category cat; it has block, bar"
    cfg.data.classes = ["bar", "block", "bar"]
    assert refused(cfg) == "data.classes names a class twice: bar, block, bar"


def test_objects_of_a_class_alone(cfg, coco_files, caplog):
    caplog.set_level("WARNING", "dense")
    cfg.data.classes = ["block"]
    cfg.data.val_json = cfg.data.val_images = None
    resolve_data(cfg, training=True)
    path = coco_files.json("train")
    assert [record.getMessage() for record in caplog.records] == [
        f"{path}: objects of bar are ignored",
        "no validation data (--val-json): training without evaluation",
    ]
    assert "evaluator" not in cfg.dataloader and cfg.dataloader.test_evaluator == {"name": "x"}
    written = json.loads(Path(cfg.dataloader.train.dataset.json_file).read_text())
    assert written["categories"] == [{"id": 1, "name": "block"}]
    assert [a["id"] for a in written["annotations"]] == [2, 4, 6, 8, 10, 12]
    # Crowds alone teach nothing.
    coco_files.edit(
        "train",
        lambda content: [
            a.update(iscrowd=int(a["category_id"] == 4)) for a in content["annotations"]
        ],
    )
    assert refused(cfg) == f"{path} has no annotation of block"
    cfg.data.classes = None
    coco_files.edit("train", lambda content: [a.update(iscrowd=1) for a in content["annotations"]])
    assert refused(cfg) == f"{path} has no annotation to use"
    coco_files.edit("train", lambda content: content["annotations"].clear())
    assert refused(cfg) == f"{path} has no annotation to use"


def test_entries_that_are_dropped_are_named(cfg, coco_files, caplog):
    caplog.set_level("WARNING", "dense")

    def break_it(content):
        content["images"][0]["width"] = 7
        content["annotations"][2]["iscrowd"] = 3

    coco_files.edit("train", break_it)
    path = coco_files.json("train")
    faults = (
        f"{path}: 1 image and 1 annotation cannot be used: image 0: width, height=7, 96: 0.png is "
        "128x96; annotation 3: iscrowd=3: 0 or 1 is needed"
    )
    assert refused(cfg) == f"{faults}. --allow-invalid drops them"
    cfg.data.allow_invalid = True
    resolve_data(cfg, training=True)
    assert [record.getMessage() for record in caplog.records] == [f"{faults}. They are dropped"]
    assert cfg.dataloader.train.mapper.total == 5
    kept = json.loads(Path(cfg.dataloader.train.dataset.json_file).read_text())
    assert [a["id"] for a in kept["annotations"]] == [4, *range(5, 13)]
    # Its categories are numbered anew, in their order.
    assert kept["categories"] == [{"id": 1, "name": "block"}, {"id": 2, "name": "bar"}]
    coco_files.edit("train", lambda content: [i.update(width=7) for i in content["images"]])
    assert refused(cfg) == f"{path} lists no image that can be used"


def test_a_mask_head_needs_masks_of_all_but_crowds(cfg, coco_files):
    def change(content):
        for annotation in content["annotations"][:3]:
            annotation.pop("segmentation")
        content["annotations"][0]["iscrowd"] = 1
        # Without the key it is no crowd.
        del content["annotations"][1]["iscrowd"]

    coco_files.edit("val", change)
    assert refused(cfg) == (
        f"{coco_files.json('val')}: 2 of 3 objects have no segmentation, and the model has a mask "
        "head; model.roi_heads.mask_in_features=null removes it"
    )
    cfg.model.roi_heads.mask_in_features = None
    resolve_data(cfg, training=True)
    mapper = cfg.dataloader.train.mapper
    assert mapper.use_instance_mask is False and mapper.recompute_boxes is False


@pytest.mark.parametrize(
    "key, value, training, message",
    [
        ("train_json", None, True, "data.train_json is not set (--train-json)"),
        ("val_images", None, True, "data.val_images is not set (--val-images)"),
        ("val_json", "gone.json", False, "data.val_json: there is no file gone.json"),
        ("val_images", "gone", False, "data.val_images: there is no folder gone"),
        ("train_images", "gone", True, "data.train_images: there is no folder gone"),
    ],
)
def test_what_is_not_there(cfg, key, value, training, message):
    cfg.data[key] = value
    assert refused(cfg, training) == message


def test_an_evaluation_reads_the_test_data_or_those_of_validation(cfg, coco_files):
    before = cfg.copy()
    cfg.data.train_json = "gone.json"
    resolve_data(cfg, training=False)
    assert cfg.dataloader.test.dataset.json_file == coco_files.json("val")
    assert cfg.dataloader.train == before.dataloader.train and "evaluator" in cfg.dataloader
    cfg.data.update(test_json=coco_files.json("train"), test_images=coco_files.images("train"))
    resolve_data(cfg, training=False)
    dataset = cfg.dataloader.test.dataset
    assert dataset.json_file == coco_files.json("train") and dataset.filter_empty is False


# Registered in Detectron2


@pytest.fixture
def registered(cfg, tmp_path):
    """Data sets by name, with a folder and a file that are there."""
    (tmp_path / "a.json").touch()
    names = ("mine_train", "mine_more", "mine_bare")
    for name in names:
        DatasetCatalog.register(name, list)
    known = dict(json_file=str(tmp_path / "a.json"), image_root=str(tmp_path))
    MetadataCatalog.get("mine_train").set(thing_classes=["a", "b"], **known)
    MetadataCatalog.get("mine_more").set(thing_classes=["c"], image_root=str(tmp_path / "gone"))
    cfg.data = {}
    cfg.dataloader.train.dataset.names = "mine_train"
    cfg.dataloader.test.dataset.names = ["mine_bare", "mine_train"]
    yield cfg
    for name in names:
        DatasetCatalog.remove(name), MetadataCatalog.remove(name)


def test_registered_data_are_checked(registered, tmp_path, monkeypatch):
    cfg = registered
    resolve_data(cfg, training=True)
    assert cfg.dataloader.metadata == {"classes": ["a", "b"]}
    assert cfg.model.roi_heads.num_classes == 2
    monkeypatch.setenv("DETECTRON2_DATASETS", "/data")
    cfg.dataloader.train.dataset.names = ["mine_train", "mine_more"]
    advice = (
        "DETECTRON2_DATASETS (now {}) is the folder that holds coco/; for your own data use "
        "--train-json, --train-images, --val-json, --val-images"
    )
    gone = f"data set mine_more: {tmp_path}/gone does not exist. "
    assert refused(cfg) == gone + advice.format("/data")
    monkeypatch.delenv("DETECTRON2_DATASETS")
    assert refused(cfg) == gone + advice.format("./datasets")
    resolve_data(cfg, training=False)
    cfg.dataloader.train.dataset.names = ["mine_none"]
    assert refused(cfg) == "dataloader.train: no data set 'mine_none' in Detectron2"
    cfg.dataloader.train.dataset.names = "mine_train"
    cfg.dataloader.test.dataset.names = "mine_none"
    assert refused(cfg, False) == "dataloader.test: no data set 'mine_none' in Detectron2"
    # Without an evaluation its data are not needed, nor any names.
    del cfg.dataloader.evaluator
    resolve_data(cfg, training=True)
    cfg.dataloader.train.dataset.names = None
    resolve_data(cfg, training=True)
    assert cfg.dataloader.metadata == {"classes": None}
    cfg.model.roi_heads.num_classes = 5
    cfg.dataloader.train.dataset.names = "mine_bare"
    resolve_data(cfg, training=True)
    assert cfg.model.roi_heads.num_classes == 5
    assert data._check_registered(cfg, False) is None
