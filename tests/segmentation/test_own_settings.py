"""Settings of own data, whole: what they make of a config, and what they refuse in which words."""

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from mmengine.config import Config

from dense.openmmlab.config import ConfigError
from dense.recipes import RECIPES
from dense.segmentation import config
from dense.segmentation.config import load_config, set_data_root, set_short_side, use_own_data

NANO = RECIPES / "segmentation/dw_conv_nano_upernet.py"
ABC = ("a", "b", "c")


def test_absolute_folders_are_moved_by_no_root(shapes):
    cfg = load_config(NANO)
    set_data_root(cfg, "mine")
    assert {cfg[loader].dataset.data_root for loader in config._LOADERS} == {"mine"}
    use_own_data(cfg, shapes)
    with pytest.raises(ConfigError) as error:
        set_data_root(cfg, "mine")
    assert str(error.value) == (
        f"--data-root mine: train_dataloader has the absolute path {shapes['train_images']}, which "
        "no data root moves; --cfg-options train_dataloader.dataset.data_prefix.img_path=... does"
    )
    bare = Config({loader: dict(dataset=dict(data_prefix=None)) for loader in config._LOADERS})
    set_data_root(bare, "mine")
    assert bare.val_dataloader.dataset.data_root == "mine"


def test_the_least_short_side_and_its_crops():
    cfg = load_config(NANO)
    crop = cfg.train_dataloader.dataset.pipeline[3].crop_size
    assert min(crop) > 33
    cfg.train_dataloader.dataset.pipeline[3].crop_size = (20, crop[1])
    cfg.tta_pipeline = None
    set_short_side(cfg, 32)
    assert cfg.train_dataloader.dataset.pipeline[3].crop_size == (20, 32)
    assert cfg.model.data_preprocessor.size == (20, 32)
    assert cfg.test_pipeline == cfg.test_dataloader.dataset.pipeline
    assert cfg.test_pipeline is not cfg.test_dataloader.dataset.pipeline
    with pytest.raises(ConfigError, match="^--short-side 31: 32 or more is needed$"):
        set_short_side(cfg, 31)


def test_augmented_tests_keep_their_other_steps():
    cfg = load_config(NANO)
    flips, annotations, packing = cfg.tta_pipeline[1].transforms[1:]
    set_short_side(cfg, 34)
    sizes = [(68, 17), (102, 25), (136, 34), (170, 42), (204, 51), (238, 59)]
    resizes = [dict(type="Resize", scale=size, keep_ratio=True) for size in sizes]
    found = [step.scale for step in cfg.tta_pipeline[1].transforms[0]]
    assert all(isinstance(side, int) for scale in found for side in scale)
    assert cfg.tta_pipeline[1].transforms == [resizes, flips, annotations, packing]


@pytest.mark.parametrize("given", [None, {}, dict(classes="")])
def test_without_own_data_nothing_changes(given):
    cfg, before = load_config(NANO), load_config(NANO)
    cfg.data = None
    use_own_data(cfg, given)
    assert cfg.to_dict() == before.to_dict()


def told_of_own(shapes, **changes):
    with pytest.raises(ConfigError) as error:
        use_own_data(load_config(NANO), {**shapes, **changes})
    return str(error.value)


KEYS = "train_images, train_masks, val_images, val_masks, classes"


def test_keys_of_own_data(shapes):
    more = "test_images, test_masks, ignore_index, reduce_zero_label"
    told = f"data has folder, names: {KEYS}, {more} are valid"
    assert told_of_own(shapes, names="a", folder="b") == told
    told = f"val_images, classes not given: your own data needs {KEYS}"
    assert told_of_own(shapes, classes=None, val_images="") == told
    for key in ("test_images", "test_masks"):
        told = "test_images and test_masks are given together or not at all"
        assert told_of_own(shapes, **{key: "a"}) == told


@pytest.mark.parametrize(
    ("classes", "told"),
    [
        (["a"], "classes=('a',): 2 or more; the background is a class of its own"),
        ([f"c{i}" for i in range(256)], "256 classes: 8-bit masks hold 255 at most"),
        (["b", "a", " b", "c", "a"], "classes has a, b twice"),
        (["a", " "], "classes=('a', ''): a name is empty"),
    ],
)
def test_names_of_own_classes(shapes, classes, told):
    assert told_of_own(shapes, classes=classes) == told


@pytest.mark.parametrize("count", [2, 255])
def test_as_many_classes_as_a_mask_holds(shapes, count):
    cfg = load_config(NANO)
    use_own_data(cfg, {**shapes, "classes": [f"c{i}" for i in range(count)]})
    assert cfg.model.decode_head.num_classes == count


def test_what_a_file_of_colours_excludes(shapes, tmp_path):
    path = tmp_path / "classes.txt"
    path.write_text("a 0 0 0\nb 1 2 3\n- 4 5 6")
    told = (
        f"{path} has colours: ignore_index and reduce_zero_label are for masks of indices; a line "
        "- R G B ignores a colour"
    )
    for change in (dict(ignore_index=0), dict(ignore_index=7), dict(reduce_zero_label=True)):
        assert told_of_own(shapes, classes=str(path), **change) == told
    for change in ({}, dict(ignore_index=255), dict(reduce_zero_label=False)):
        cfg = load_config(NANO)
        use_own_data(cfg, {**shapes, "classes": str(path), **change})
        meta = cfg.val_dataloader.dataset.metainfo
        assert meta == dict(classes=("a", "b"), palette=[(0, 0, 0), (1, 2, 3)], ignored=[(4, 5, 6)])
    path.write_text("a 0 0 300\nb 1 2 3")
    told = f"--classes: {path}: 'a 0 0 300' has a number above 255"
    assert told_of_own(shapes, classes=str(path)) == told


@pytest.mark.parametrize("given", [dict(ignore_index=0, reduce_zero_label=True), {}])
def test_all_settings_of_own_data(shapes, given, monkeypatch):
    cfg = load_config(NANO)
    heads = dict(loss_cls=dict(class_weight=[1.0] * 150 + [0.1]), loss_decode=None)
    cfg.model.auxiliary_head = (
        dict(cfg.model.auxiliary_head, **heads),
        dict(loss_decode=[dict(type="CrossEntropyLoss", class_weight=[1.0]), dict(type="Dice")]),
        dict(loss_cls=dict(class_weight=None), loss_decode=dict(type="CrossEntropyLoss")),
        dict(loss_decode=dict(type="Dice", class_weight=[1.0])),
    )
    cfg.data = {**shapes, "ignore_index": 9, "classes": ["x", "y"]}
    cfg.pop("custom_imports")
    monkeypatch.chdir(Path(shapes["val_images"]).parent)
    relative = dict(test_images="val", test_masks="../masks/val")
    imported = []
    monkeypatch.setattr(config, "import_modules_from_strings", imported.append)
    use_own_data(cfg, dict(classes="a,b,c", train_images=None, **relative, **given))
    assert imported == [["dense.segmentation.dataset", "dense.segmentation.losses"]]
    assert "data" not in cfg
    first, second, third, fourth = cfg.model.auxiliary_head
    assert first.loss_cls.class_weight == [1.0, 1.0, 1.0, 0.1]
    kinds = [loss.type for loss in (*second.loss_decode, third.loss_decode, fourth.loss_decode)]
    assert kinds == ["WeightedCrossEntropyLoss", "Dice", "CrossEntropyLoss", "Dice"]
    heads = (cfg.model.decode_head, *cfg.model.auxiliary_head)
    assert {head.num_classes for head in heads} == {3}
    assert cfg.custom_imports.imports == ["dense.segmentation.dataset", "dense.segmentation.losses"]
    folders = [("train_images", "train_masks"), ("val_images", "val_masks"), None]
    here = os.getcwd()
    for loader, names in zip(config._LOADERS, folders, strict=True):
        dataset = cfg[loader].dataset
        paths = (
            [shapes[name] for name in names] if names else [f"{here}/val", f"{here}/../masks/val"]
        )
        assert [*dataset.data_prefix.values()] == paths and dataset.data_root is None
        assert dataset.type == "FolderDataset" and dataset.metainfo == dict(classes=("a", "b", "c"))
        found = (dataset.ignore_index, dataset.reduce_zero_label)
        assert found == ((0, True) if given else (9, False))
        assert dataset.pipeline[0] == dict(type="ReadImage")


def test_a_pipeline_is_found_in_data_that_repeat_or_join():
    inner = dict(pipeline=[1])
    for dataset in (
        inner,
        dict(dataset=inner),
        dict(datasets=[inner, dict(pipeline=[2])]),
        dict(dataset=dict(datasets=[dict(dataset=inner)])),
    ):
        assert config.pipeline_of(dataset) == [1]


# Checks before a training


@pytest.fixture
def checked(shapes, monkeypatch):
    """A function of a config: which loaders' folders and masks are checked."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    def call(cfg, training):
        seen = []
        monkeypatch.setattr(
            config, "check_folders", lambda dataset, loader: seen.append(loader) or [loader]
        )
        monkeypatch.setattr(config, "check_masks", lambda *given: seen.append(given))
        monkeypatch.setattr(config, "check_overlap", lambda *given: seen.append(given))
        config.check(cfg, training)
        return seen

    return call


def own(shapes, **more):
    cfg = load_config(NANO)
    use_own_data(cfg, {**shapes, **more})
    return cfg


def test_what_is_checked_of_own_data(checked, shapes, tmp_path):
    classes = ("ground", "box", "bar")
    train, val, test = config._LOADERS

    def masks(loader, ignore=255, reduce=False, palette=()):
        return [loader, ([loader], classes, ignore, reduce, list(palette))]

    assert checked(own(shapes), True) == [*masks(train), *masks(val), ([train], [val])]
    assert checked(own(shapes, ignore_index=4, reduce_zero_label=True), False) == masks(
        test, 4, True
    )
    more = dict(test_images=shapes["train_images"], test_masks=shapes["train_masks"])
    expected = [*masks(train), *masks(val), *masks(test), ([train], [val])]
    assert checked(own(shapes, **more), True) == expected
    (tmp_path / "classes.txt").write_text("ground 0 0 0\nbox 1 1 1\nbar 2 2 2\n- 3 3 3")
    cfg = own(shapes, classes=str(tmp_path / "classes.txt"))
    palette = [(0, 0, 0), (1, 1, 1), (2, 2, 2), (3, 3, 3)]
    assert checked(cfg, False) == masks(test, palette=palette)
    cfg.test_dataloader.dataset.metainfo.pop("ignored")
    assert checked(cfg, False) == masks(test, palette=palette[:3])


def test_of_standard_data_only_folders_are_checked(checked):
    train, val, test = config._LOADERS
    cfg = load_config(NANO)
    assert checked(cfg, True) == [train, val, ([train], [val])]
    assert checked(cfg, False) == [test]
    cfg.test_dataloader = None
    assert checked(cfg, True) == [train, val, ([train], [val])]


@pytest.mark.parametrize(
    ("cuda", "launcher", "heads", "batch", "refused"),
    [
        *((False, "none", ["UPerHead"], 1, True), (False, "pytorch", ["UPerHead"], 1, True)),
        *((True, "none", ["UPerHead"], 1, True), (True, None, ["FCNHead", "PSPHead"], 1, True)),
        *((True, "pytorch", ["UPerHead"], 1, False), (False, "none", ["FCNHead"], 1, False)),
        (False, "none", ["UPerHead", "FCNHead"], 2, False),
    ],
)
def test_batch_norm_needs_two_values(checked, monkeypatch, cuda, launcher, heads, batch, refused):
    cfg = load_config(NANO)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    cfg.train_dataloader.batch_size = batch
    cfg.model = dict(
        zip(("decode_head", "auxiliary_head"), [dict(type=h) for h in heads], strict=False)
    )
    if launcher:
        cfg.launcher = launcher
    # One of one process on a GPU is not synchronised either.
    monkeypatch.setattr(config, "check_folders", lambda *_: [])
    monkeypatch.setattr(config, "check_overlap", lambda *_: None)
    config.check(cfg, training=False)
    if not refused:
        config.check(cfg, training=True)
        return
    with pytest.raises(ConfigError) as error:
        config.check(cfg, training=True)
    assert str(error.value) == (
        "train_dataloader.batch_size=1: the head pools an image to one value per channel, and "
        "batch norm needs 2 or more values: take 2 or more images per process"
    )


@pytest.mark.parametrize("distributed", [False, True])
def test_an_exported_file_computes_for_the_runners_segmentor(monkeypatch, distributed):
    from dense.export import evaluation

    given = []
    monkeypatch.setattr(evaluation, "read_for", lambda *read: read)
    monkeypatch.setattr(evaluation, "use_in_segmentor", lambda *used: given.append(used))
    dataset = SimpleNamespace(metainfo=dict(classes=ABC))
    loop = SimpleNamespace(dataloader=SimpleNamespace(dataset=dataset))
    held = SimpleNamespace(module="module") if distributed else "model"
    runner = SimpleNamespace(model=held, distributed=distributed, test_loop=loop)
    config.use_exported(runner, "a.onnx")
    expected = ("segmentation", "a.onnx", ABC)
    assert given == [("module" if distributed else "model", expected)]


def test_other_folders_to_test_on_need_the_config_of_own_data(shapes):
    cfg = load_config(NANO)
    with pytest.raises(ConfigError) as error:
        config.set_test_data(cfg, "a", "b")
    assert str(error.value) == (
        f"--test-images: {cfg.filename} tests on ADE20KDataset; the config that a training on own "
        "data saved is needed"
    )
    for given in (("a", None), (None, "b")):
        told = "^--test-images and --test-masks are given together or not at all$"
        with pytest.raises(ConfigError, match=told):
            config.set_test_data(own(shapes), *given)
    cfg = own(shapes)
    config.set_test_data(cfg, "a", "b")
    here = os.getcwd()
    assert cfg.test_dataloader.dataset.data_prefix == dict(
        img_path=f"{here}/a", seg_map_path=f"{here}/b"
    )
