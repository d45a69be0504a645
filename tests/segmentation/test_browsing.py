"""What browsing tells of masks and samples, whole, and the report of a run of a segmentor."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmseg.registry import DATASETS
from PIL import Image

from dense import drawing, page
from dense.browsing import Split
from dense.images import UnreadableImage
from dense.openmmlab.config import ConfigError
from dense.recipes import RECIPES
from dense.segmentation import browsing, reporting
from dense.segmentation.config import load_config, set_data_root, use_own_data
from tests.segmentation.conftest import CLASSES
from tests.support import flat

NANO = RECIPES / "segmentation/dw_conv_nano_upernet.py"


class Folder:
    """A data set of photos, 3x2 pixels each, and a name for each one's mask."""

    def __init__(self, folder, count):
        self.infos = [
            dict(img_path=str(folder / f"{i}.png"), seg_map_path=f"{i}") for i in range(count)
        ]
        for info in self.infos:
            Image.fromarray(np.zeros((2, 3, 3), np.uint8)).save(info["img_path"])

    def __len__(self):
        return len(self.infos)

    def get_data_info(self, index):
        return self.infos[index]


def split_of(folder, masks, classes, check=99):
    """The split of masks, each an array or an error."""

    def read(info):
        mask = masks[int(info["seg_map_path"])]
        if isinstance(mask, Exception):
            raise mask
        return {"gt_seg_map": np.asarray(mask)}

    return browsing._split("training", Folder(folder, len(masks)), classes, read, check, 0)


def test_all_that_is_told_of_masks(tmp_path):
    masks = [
        [[0, 0, 0], [1, 1, 255]],
        ValueError("cut\n  off " + 300 * "x"),
        np.zeros((2, 3, 4), int),
        [[0, 1], [255, 7], [3, 255]],
        [[255] * 3] * 2,
        [[256, 0, 0], [300, 0, 0]],
        [[254, 254, 255]] * 2,
        [[256, 0, 0], [1, 1, 1]],
    ]
    split = split_of(tmp_path, masks, list(CLASSES))
    photos = split.photos
    assert [photo.name for photo in photos] == [str(tmp_path / f"{i}.png") for i in range(8)]
    # 10 pixels of the first class, 6 of the second, of 33 that are no more than 255.
    rows = [["ground", page.Cell(62.5, share=1.0), 4]]
    rows += [["box", page.Cell(37.5, share=pytest.approx(0.6)), 3]]
    rows += [["bar", page.Cell(0.0, share=0.0), 0]]
    assert split == Split(
        "training",
        facts={
            **{"photos": 8, "masks read": 6, "classes": 3, "pixels in them": 33},
            "ignored pixels (%)": 33.33,
        },
        frequencies=page.Table(["class", "pixels (%)", "masks"], rows),
        photos=photos,
        total=8,
        odd=[
            f"1 cannot be read: cut off {192 * 'x'}",
            "2 has 4 channels: class indices need one",
            "3 is 2x3, its photo 3x2",
            "3 holds 3, 7: 3 classes are 0 to 2",
            "4 has ignored pixels only",
            "5 holds 256, 300: 3 classes are 0 to 2",
            "6 holds 254: 3 classes are 0 to 2",
            "6 has ignored pixels only",
            "7 holds 256: 3 classes are 0 to 2",
            "no pixel of these masks is of bar",
        ],
    )


def test_shares_are_rounded(tmp_path):
    masks = [[[0, 0, 0], [0, 1, 1]], [[0, 255, 255], [255, 255, 255]]]
    split = split_of(tmp_path, masks, ["a", "b"])
    assert [row[1].value for row in split.frequencies.rows] == [71.429, 28.571]
    assert split.facts["ignored pixels (%)"] == 41.67


@pytest.mark.parametrize(("mask", "share", "ignored"), [(0, 100.0, 0.0), (255, 0.0, 100.0)])
def test_masks_of_a_pixel(tmp_path, mask, share, ignored):
    split = split_of(tmp_path, [[[mask]]], ["a", "b"])
    assert split.facts["ignored pixels (%)"] == ignored
    shares = [(row[1].value, row[1].share) for row in split.frequencies.rows]
    assert shares == [(share, share / 100), (0.0, 0.0)]


def test_masks_that_cannot_be_read_are_said_alone(tmp_path):
    split = split_of(tmp_path, [ValueError("no PNG")], ["a", "b"])
    assert split.odd == ["0 cannot be read: no PNG"]
    assert [(row[1].value, row[1].share) for row in split.frequencies.rows] == [(0.0, 0.0)] * 2


@pytest.mark.parametrize(("absent", "more"), [(10, ""), (11, " and 1 more"), (13, " and 3 more")])
def test_ten_absent_classes_are_named(tmp_path, absent, more):
    split = split_of(tmp_path, [[[0, 0, 0]] * 2], [f"c{i}" for i in range(absent + 1)])
    named = ", ".join(f"c{i}" for i in range(1, 11))
    assert split.odd == [f"no pixel of these masks is of {named}{more}"]


def test_so_many_masks_are_read_as_asked_for(tmp_path):
    masks = [[[0, 0, 0]] * 2] * 5
    split = split_of(tmp_path, masks, ["a"], check=3)
    assert (len(split.photos), split.facts["masks read"], split.facts["photos"]) == (3, 3, 5)


def test_what_takes_long_is_counted(tmp_path, bars):
    split_of(tmp_path, [[[0, 0, 0]] * 2] * 5, ["a"], check=3)
    assert bars == [
        ("reading training photos", 3, 2, False, "photo"),
        ("reading training masks", 3, 2, False, "mask"),
    ]


class Packed:
    """A data set whose samples are packed as MMSegmentation's: BGR, planes first."""

    def __init__(self, pixels, labels):
        self.pixels, self.labels = torch.as_tensor(pixels), torch.as_tensor(labels)

    def get_data_info(self, index):
        return {"img_path": "folder/a.jpg"}

    def __getitem__(self, index):
        sample = SimpleNamespace(gt_sem_seg=SimpleNamespace(data=self.labels[None]))
        return {"inputs": self.pixels, "data_samples": sample}


@pytest.mark.parametrize("rows, columns", [(4, 6), (2, 3), (8, 18), (3, 4)])
def test_a_sample_is_drawn_with_its_mask_in_its_size(rows, columns):
    """The mask is resized to the photo by the nearest label."""
    pixels = torch.arange(72.0).view(3, 4, 6) * 7 - 100
    labels = np.arange(rows * columns).reshape(rows, columns)
    drawn = []
    picture = browsing._sample(
        Packed(pixels, labels), 0, lambda image, mask: drawn.append((image, mask)) or image
    )
    [(image, mask)] = drawn
    expected = pixels.numpy().transpose(1, 2, 0)[..., ::-1].clip(0, 255).astype(np.uint8)
    np.testing.assert_array_equal(image, expected)
    assert picture.image is image and picture.alt == picture.caption == "a.jpg: 6x4"
    places = [(y * rows // 4, x * columns // 6) for y in range(4) for x in range(6)]
    assert mask.ravel().tolist() == [labels[place] for place in places]


def test_a_photo_that_cannot_be_read_has_no_sample():
    class Damaged(Packed):
        def __getitem__(self, index):
            raise UnreadableImage("cut")

    assert browsing._sample(Damaged([0], [0]), 0, None) is None


def test_samples_are_of_both_splits(shapes, bars):
    cfg = load_config(NANO)
    use_own_data(cfg, shapes)
    (training, validation), colours = browsing.splits(cfg, images=2, check=4, seed=0)
    palette = DATASETS.build(cfg.val_dataloader.dataset).metainfo["palette"]
    assert list(colours.items()) == [(c, tuple(p)) for c, p in zip(CLASSES, palette, strict=True)]
    assert [split.name for split in (training, validation)] == ["training", "validation"]
    assert [len(split.samples) for split in (training, validation)] == [2, 1]
    assert [len(split.photos) for split in (training, validation)] == [4, 2]
    for sample in validation.samples:
        name = sample.caption.partition(".")[0]
        photo = np.asarray(Image.open(f"{shapes['val_images']}/{name}.jpg"))
        mask = np.asarray(Image.open(f"{shapes['val_masks']}/{name}.png"))
        draw = drawing.segmentation_drawer(CLASSES, palette, named=False)
        np.testing.assert_array_equal(sample.image, draw(photo, mask))
    drawn = [bar for bar in bars if bar[0].startswith("drawing")]
    assert drawn == [
        (f"drawing {name} samples", count, 2, False, "it")
        for name, count in (("training", 2), ("validation", 1))
    ]
    ignored = " Pixels without a colour are ignored."
    assert training.about_samples == (
        "Drawn at random, with the config's pipeline: resized, cropped, flipped and with the "
        f"colours changed as training gets them.{ignored}"
    )
    assert validation.about_samples == (
        f"Drawn at random, resized as evaluation gets them.{ignored}"
    )


def test_standard_data_has_its_own_colours_and_labels(ade_layout):
    cfg = load_config(NANO)
    set_data_root(cfg, str(ade_layout))
    (_, validation), colours = browsing.splits(cfg, images=0, check=9, seed=0)
    assert (colours["wall"], colours["building"]) == ((120, 120, 120), (180, 120, 120))
    # Its masks' 0 is ignored: the shapes' ground.
    masks = [
        np.asarray(Image.open(path)) for path in (ade_layout / "annotations/validation").iterdir()
    ]
    zeros = sum((mask == 0).sum() for mask in masks) / sum(mask.size for mask in masks)
    assert validation.facts["ignored pixels (%)"] == round(100 * zeros, 2)
    assert validation.samples == []


@pytest.fixture
def registered(monkeypatch):
    """What is registered from MMSegmentation, and in which scope it is looked for."""
    called = []
    register, look_in = browsing.register_all_modules, browsing.init_default_scope

    def registering(**named):
        called.append(named)
        register(**named)

    def looking(scope):
        called.append(scope)
        look_in("mmseg")

    for module in (browsing, reporting):
        monkeypatch.setattr(module, "register_all_modules", registering)
        monkeypatch.setattr(module, "init_default_scope", looking)
    return called


def test_missing_folders_are_said_by_the_loader(shapes, registered):
    cfg = load_config(NANO)
    use_own_data(cfg, shapes)
    cfg.train_dataloader.dataset.data_prefix.seg_map_path += "/absent"
    with pytest.raises(ConfigError, match=r"^no folder .*/absent \(train_dataloader\)$"):
        browsing.splits(cfg, images=0, check=0, seed=0)
    assert registered == [dict(init_default_scope=False), "mmseg"]
    cfg.default_scope = "mine"
    with pytest.raises(ConfigError):
        browsing.splits(cfg, images=0, check=0, seed=0)
    assert registered[-1] == "mine"


# The report

TABLE = """2026/11/28 12:00:00 - mmengine - INFO - per class results:
2026/11/28 12:00:00 - mmengine - INFO -
+--------+-------+-------+
| Class  |  IoU  |  Acc  |
+--------+-------+-------+
{}
+--------+-------+-------+
2026/11/28 12:00:00 - mmengine - INFO - Iter(val) [2/2]    aAcc: 60.0
| after  |  1.0  |  1.0  |
"""


def write_log(run, started, *tables):
    log = run / started / f"{started}.log"
    log.parent.mkdir(parents=True)
    log.write_text("".join(TABLE.format("\n".join(table)) for table in tables))


def test_the_table_of_classes_is_the_last_of_all_logs(tmp_path, monkeypatch):
    glob = type(tmp_path).glob
    backwards = lambda folder, pattern: sorted(glob(folder, pattern), reverse=True)  # noqa: E731
    monkeypatch.setattr(type(tmp_path), "glob", backwards)
    assert reporting.per_class(tmp_path) is None
    write_log(tmp_path, "20261128_120000", ["|  old   |  9.0  |  9.0  |"])
    rows = [
        "| a road |  5.5  | 50.25 |",
        "|  tree  |  nan  |  nan  |",
        "|  sky   |  80.0 |  nan  |",
    ]
    write_log(tmp_path, "20261128_130000", ["|  old   |  8.0  |  8.0  |"], rows)
    write_log(tmp_path, "20261128_140000")
    # A table of something else.
    (tmp_path / "20261128_140000/20261128_140000.log").write_text("| stray |  1.0  |  1.0  |\n")
    assert reporting.per_class(tmp_path) == page.Table(
        ["class", "IoU (%)", "accuracy (%)"],
        [
            ["sky", page.Cell(80.0, share=0.8), None],
            ["a road", page.Cell(5.5, share=0.055), 50.25],
            ["tree", page.Cell(None, share=0.0), None],
        ],
    )


@pytest.fixture
def run(shapes, tmp_path, monkeypatch):
    """The work folder of a training whose network finds the first class alone."""
    cfg = load_config(NANO)
    use_own_data(cfg, shapes)
    folder = tmp_path / "run"
    folder.mkdir()
    cfg.dump(folder / "net.py")
    opened = []

    class Fake:
        classes, palette = CLASSES, ((1, 2, 3), (200, 0, 0), (0, 200, 0))

        def __init__(self, *given):
            opened.append(given)

        def __call__(self, image):
            return np.zeros(image.shape[:2], np.int32)

    monkeypatch.setattr(reporting, "Predictor", Fake)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return folder, opened


def test_validation_images_are_judged_one_by_one(run, shapes, bars):
    folder, opened = run
    with pytest.raises(FileNotFoundError, match="there is no checkpoint yet"):
        reporting.judged(folder, 9)
    torch.save({"meta": {"iter": 7}}, folder / "iter_7.pth")
    verdict = reporting.judged(folder, 9)
    assert bars == [("judging validation images", 2, 2, False, "it")]
    assert opened == [(str(folder / "net.py"), str(folder / "iter_7.pth"), "cpu")]
    assert (verdict.measure, verdict.source) == ("mIoU of the image alone", "those of iter_7.pth")
    assert verdict.colours == dict(zip(CLASSES, reporting.Predictor.palette, strict=True))
    assert [judged.name for judged in verdict.images] == ["0.jpg", "1.jpg"]
    draw = drawing.segmentation_drawer(CLASSES, reporting.Predictor.palette, named=False)
    for judged in verdict.images:
        photo = np.asarray(Image.open(f"{shapes['val_images']}/{judged.name}"))
        mask = np.asarray(Image.open(f"{shapes['val_masks']}/{judged.name[0]}.png"))
        # Of the first class as much as there is; of the other two nothing.
        assert judged.score == pytest.approx(100 * (mask == 0).mean() / 3)
        assert list(judged.pictures) == ["photo", "truth", "prediction"]
        shown = [judged.pictures[name]() for name in judged.pictures]
        np.testing.assert_array_equal(shown[0], photo)
        np.testing.assert_array_equal(shown[1], draw(photo, mask.astype(int)))
        np.testing.assert_array_equal(shown[2], draw(photo, np.zeros(mask.shape, int)))
    assert [judged.name for judged in reporting.judged(folder, 1).images] == ["1.jpg"]


def test_an_image_without_labels_is_not_judged(run, shapes, tmp_path, registered):
    folder, _ = run
    torch.save({"meta": {"iter": 7}}, folder / "iter_7.pth")
    masks = tmp_path / "masks"
    masks.mkdir()
    Image.fromarray(np.full((64, 80), 255, np.uint8)).save(masks / "0.png")
    half = np.zeros((64, 80), np.uint8)
    half[:32] = 255
    Image.fromarray(half).save(masks / "1.png")
    cfg = Config.fromfile(folder / "net.py")
    cfg.val_dataloader.dataset.data_prefix.seg_map_path = str(masks)
    cfg.dump(folder / "net.py")
    [judged] = reporting.judged(folder, 2).images
    assert (judged.name, judged.score) == ("1.jpg", 100.0)
    assert registered == [dict(init_default_scope=False), "mmseg"]


def test_the_values_of_a_config_are_plain(run):
    folder, _ = run
    values = flat(reporting.config_values(folder / "net.py"))
    assert values["model.decode_head.num_classes"] == 3
