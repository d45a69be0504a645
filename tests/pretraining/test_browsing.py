"""What browsing tells of classes and samples, whole, and the report of a run of a classifier."""

import csv
import io
import json
import tarfile
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from dense import page
from dense.browsing import Split, chosen
from dense.openmmlab.config import load_config
from dense.pretraining import browsing, reporting
from dense.pretraining.config import set_data
from dense.pretraining.data import ImageDataset, ImageStream
from tests.pretraining.conftest import CONFIGS, write_images

PLAIN = dict(input_size=32, crop_pct=1.0, mean=(0, 0, 0), std=(1, 1, 1))


def folder_of(root, counts):
    """Photos 48x40 in class folders; an absent class has a number that no photo has."""
    write_images(root, {name: count for name, count in counts.items() if count})
    dataset = ImageDataset(str(root), PLAIN, classes=list(counts))
    return dataset, list(counts)


def test_all_that_is_told_of_folders(tmp_path):
    counts = {"cat": 1, "dog": 4, "bee": 0, "ant": 3}
    dataset, classes = folder_of(tmp_path, counts)
    split = browsing._split("training", dataset, classes, check=5, seed=3)
    assert len(split.photos) == 5 and {photo.size for photo in split.photos} == {(48, 40)}
    assert {photo.name.partition("/")[0] for photo in split.photos} <= {"cat", "dog", "ant"}
    rows = [["cat", page.Cell(1, share=0.25)], ["dog", page.Cell(4, share=1.0)]]
    rows += [["bee", page.Cell(0, share=0.0)], ["ant", page.Cell(3, share=0.75)]]
    assert split == Split(
        "training",
        facts={
            **{"photos": 8, "classes": 4},
            **{"photos of the smallest class": 0, "photos of the largest class": 4},
        },
        frequencies=page.Table(["class", "photos"], rows),
        photos=split.photos,
        total=8,
        odd=["no training photo is of bee"],
    )


@pytest.mark.parametrize(("absent", "more"), [(10, ""), (11, " and 1 more"), (13, " and 3 more")])
def test_ten_absent_classes_are_named(tmp_path, absent, more):
    counts = {f"c{i}": int(i == 0) for i in range(absent + 1)}
    split = browsing._split("validation", *folder_of(tmp_path, counts), check=1, seed=0)
    named = ", ".join(f"c{i}" for i in range(1, 11))
    assert split.odd == [f"no validation photo is of {named}{more}"]


def test_photos_of_one_name_are_told_apart():
    """As in tar files of which each has its own folders."""
    files = {name: io.BytesIO() for name in "ab"}
    for colour, file in enumerate(files.values()):
        Image.new("RGB", (40, 48 + colour), (colour, 0, 0)).save(file, "PNG")

    class Reader:
        samples = [("x.png", 0), ("y.png", 1), ("x.png", 1)]

        def __getitem__(self, index):
            return io.BytesIO(files["aab"[index]].getvalue()), 0

        def filename(self, index):
            return self.samples[index][0]

    class Data(list):
        reader = Reader()

    split = browsing._split("training", Data(range(3)), ["a", "b"], check=3, seed=0)
    found = {photo.name: photo.size for photo in split.photos}
    assert found == {"x.png (0)": (40, 48), "y.png": (40, 48), "x.png (2)": (40, 49)}


@pytest.fixture
def shards(photos, tmp_path):
    """A config on shards of the photos."""
    pytest.importorskip("webdataset")
    cfg = load_config(CONFIGS / "dw_conv_nano.py")
    for split in ("train", "val"):
        with tarfile.open(tmp_path / f"photos-{split}-0000.tar", "w") as archive:
            for path in sorted((photos / split).rglob("*.jpg")):
                label = str(int(path.parent.name[1:]) - 1).encode()
                for suffix, content in ((".jpg", path.read_bytes()), (".cls", label)):
                    info = tarfile.TarInfo(path.stem + suffix)
                    info.size = len(content)
                    archive.addfile(info, io.BytesIO(content))
        count = 24 if split == "train" else 12
        dataset = cfg[f"{split}_dataloader"].dataset
        cfg[f"{split}_dataloader"].dataset = dict(
            **dict(type="ImageStream", root=str(tmp_path), transform=dataset.transform),
            **dict(num_classes=3, name="wds/photos"),
            split=f"{tmp_path}/photos-{split}-0000.tar|{count}",
        )
    return cfg


def test_shards_have_samples_and_no_counts(shards):
    (training, validation), colours = browsing.splits(shards, images=5, check=3, seed=0)
    assert colours == {}
    for split, total, shown in ((training, 24, 5), (validation, 12, 2)):
        assert (split.total, split.facts) == (total, {"photos": total, "classes": 3})
        assert split.odd == ["shards are read in order: classes and files are not counted"]
        assert not split.photos and split.frequencies is None
        named = [picture.caption.partition(": ")[2] for picture in split.samples]
        assert named == [f"sample {i}" for i in range(shown)]
    assert reporting.ImageStream is ImageStream


def test_samples_are_of_both_splits(photos, bars):
    cfg = load_config(CONFIGS / "dw_conv_nano.py")
    set_data(cfg, str(photos), num_classes=3)
    one, two = (browsing.splits(cfg, images=5, check=4, seed=seed)[0] for seed in (1, 1))
    training, validation = one
    assert bars[:4] == [
        (f"{what} {name} {kind}", count, 2, False, unit)
        for name, samples in (("training", 5), ("validation", 2))
        for what, kind, count, unit in (
            ("reading", "photos", 4, "photo"),
            ("drawing", "samples", samples, "it"),
        )
    ]
    assert [len(split.samples) for split in one] == [5, 2]
    assert [len(split.photos) for split in one] == [4, 4]
    assert training.about_samples == (
        "Drawn at random, with the config's augmentation, as the network gets them."
    )
    assert validation.about_samples == (
        "Drawn at random, resized and cropped as evaluation gets them."
    )
    for split, again in zip(one, two, strict=True):
        for sample, same in zip(split.samples, again.samples, strict=True):
            name, _, file = sample.caption.partition(": ")
            assert sample.caption == sample.alt and file.startswith(f"{name}_")
            np.testing.assert_array_equal(sample.image, same.image)
    # As they are: the shorter side of the crop is the photo's 40 pixels.
    for sample in validation.samples:
        name, _, file = sample.caption.partition(": ")
        photo = np.asarray(Image.open(photos / f"val/{name}/{file}")).mean((0, 1))
        np.testing.assert_allclose(sample.image.mean((0, 1)), photo, atol=6)


@pytest.mark.parametrize(("count", "mixed"), [(2, 2), (3, 2), (7, 2), (8, 2), (9, 2), (12, 4)])
def test_mixed_samples_are_of_pairs(count, mixed):
    """timm's Mixup takes an even number, and pairs the first with the last."""
    samples = [(torch.full((3, 4, 4), float(i)), 1997 + i % 3, "") for i in range(count)]
    mixup = dict(mixup_alpha=1.0, cutmix_alpha=0.0, label_smoothing=0.1)
    cfg = SimpleNamespace(model=SimpleNamespace(mixup=mixup, num_classes=2000))
    mean, std = torch.full((3, 1, 1), 0.25), torch.full((3, 1, 1), 0.05)

    def mix():
        split = Split("training", about_samples="Drawn.")
        browsing._add_mixed(split, cfg, samples, mean, std, seed=1)
        return split

    split = mix()
    assert split.about_samples == (
        "Drawn. The last ones are mixed with another by Mixup or CutMix, as the config has it for "
        "every batch."
    )
    assert len(split.samples) == mixed
    even = count // 2 * 2
    for index, picture in enumerate(split.samples):
        assert (picture.alt, picture.caption) == ("mixed photo", "mixed")
        low, high = sorted((index, even - 1 - index))
        value = (picture.image.astype(float) / 255 - 0.25) / 0.05
        assert (low - 0.1 < value).all() and (value < high + 0.1).all()
    if count > 8:
        # Every photo has its own share.
        shares = {int(picture.image[0, 0, 0]) for picture in split.samples}
        assert len(shares) > 1
    for picture, same in zip(split.samples, mix().samples, strict=True):
        np.testing.assert_array_equal(picture.image, same.image)


@pytest.mark.parametrize(
    ("mixup", "images", "mixed"),
    [({"mixup_alpha": 0.8}, 2, 2), ({"mixup_alpha": 0.8}, 1, 0), (None, 4, 0)],
)
def test_a_pair_of_training_is_mixed_where_the_config_mixes(photos, mixup, images, mixed):
    cfg = load_config(CONFIGS / "dw_conv_nano.py")
    set_data(cfg, str(photos), num_classes=3)
    cfg.model.mixup = mixup
    (training, validation), _ = browsing.splits(cfg, images, check=0, seed=0)
    captions = [picture.caption for picture in training.samples]
    assert captions.count("mixed") == mixed and len(captions) == images + mixed
    assert "mixed" not in [picture.caption for picture in validation.samples]


def test_pictures_are_undone_of_what_normalised_them():
    steps = [object(), SimpleNamespace(mean=[0.5, 0.25, 0.0], std=np.array([0.5, 2.0, 1.0]))]
    mean, std = browsing._normalisation(SimpleNamespace(transforms=steps))
    assert (mean.shape, std.shape) == ((3, 1, 1), (3, 1, 1))
    assert (mean.flatten().tolist(), std.flatten().tolist()) == ([0.5, 0.25, 0], [0.5, 2, 1])
    assert mean.dtype == std.dtype == torch.float32
    for transform in (SimpleNamespace(transforms=[SimpleNamespace(mean=[0.5])]), object()):
        mean, std = browsing._normalisation(transform)
        assert mean.equal(torch.zeros(3, 1, 1)) and std.equal(torch.ones(3, 1, 1))
    pixels = torch.tensor([[[-1.0, 0.0, 0.4989]], [[0.5, 0.502, 1.0]], [[2.0, 0.1, 0.2]]])
    assert browsing._rgb(pixels).tolist() == [[[0, 128, 255], [0, 128, 26], [127, 255, 51]]]


# The report


def test_the_table_of_classes_has_readable_names_the_best_first(tmp_path):
    assert reporting.per_class(tmp_path) is None
    rows = [("class", "images", "top1"), ("dog, small", 4, "25.50"), ("n02123045", 2, "75.00")]
    (tmp_path / "evaluation").mkdir()
    with open(tmp_path / "evaluation/per_class.csv", "w", newline="") as file:
        csv.writer(file).writerows([*rows, ("bee", 0, "")])
    assert reporting.per_class(tmp_path) == page.Table(
        ["class", "top-1 (%)", "images"],
        [
            ["tabby, tabby cat", page.Cell(75.0, share=0.75), 2],
            ["dog, small", page.Cell(25.5, share=0.255), 4],
            ["bee", page.Cell(None, share=0.0), 0],
        ],
    )


@pytest.fixture
def judge(tmp_path, monkeypatch):
    """A function of a config: the verdict on two of its images by a network of fixed scores."""
    opened = []

    class Fake:
        classes = ("cat", "dog", "bee", "ant", "fly")

        def __init__(self, *given):
            opened.append(given)

        def __call__(self, image):
            return np.array([0.1, 0.404, 0.3, 0.146, 0.05], np.float32)

    monkeypatch.setattr(reporting, "Predictor", Fake)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    def call(cfg, images):
        cfg.dump(tmp_path / "net.py")
        return reporting.judged(tmp_path, images)

    return call, tmp_path, opened


def test_photos_are_judged_by_the_probability_of_their_class(judge, photos, bars):
    call, folder, opened = judge
    cfg = load_config(CONFIGS / "dw_conv_nano.py")
    set_data(cfg, str(photos), num_classes=3)
    with pytest.raises(FileNotFoundError, match="there is no checkpoint yet"):
        call(cfg, 99)
    torch.save({"meta": {"iter": 7}}, folder / "epoch_7.pth")
    verdict = call(cfg, 99)
    assert bars == [("judging validation images", 12, 2, False, "it")]
    assert opened == [(str(folder / "net.py"), str(folder / "epoch_7.pth"), "cpu")]
    assert verdict.measure == "the probability of its class in percent"
    assert verdict.source == "those of epoch_7.pth" and verdict.colours == {}
    captions = {
        "n01": "cat 10% (truth), dog 40%, bee 30%, ant 15%",
        "n02": "dog 40% (truth), bee 30%, ant 15%",
        "n03": "bee 30% (truth), dog 40%, ant 15%",
    }
    scores = {"n01": 10.0, "n02": 40.4, "n03": 30.0}
    assert sorted(judged.name for judged in verdict.images) == sorted(
        path.name for path in photos.glob("val/*/*")
    )
    for judged in verdict.images:
        name = judged.name[:3]
        assert judged.score == pytest.approx(scores[name])
        [(caption, draw)] = judged.pictures.items()
        assert caption == captions[name]
        photo = np.asarray(Image.open(photos / f"val/{name}/{judged.name}"))
        np.testing.assert_array_equal(draw(), photo)
    two = [judged.name for judged in call(cfg, 2).images]
    assert two == [verdict.images[index].name for index in chosen(12, 2, seed=0)]


def test_shards_are_not_judged(judge, shards):
    call, folder, _ = judge
    torch.save({"meta": {"iter": 7}}, folder / "epoch_7.pth")
    with pytest.raises(FileNotFoundError, match="shards are read in order, none at random"):
        call(shards, 2)


def test_the_values_of_a_config_are_plain(tmp_path):
    (tmp_path / "net.py").write_text("model = dict(name='a', sizes=[1, dict(b=2)])\n")
    values = reporting.config_values(tmp_path / "net.py")
    assert json.dumps(values) == '{"model": {"name": "a", "sizes": [1, {"b": 2}]}}'
