"""Readers of classification data: what each is opened with, names and places, every message."""

import io
import json
import tarfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from dense.openmmlab.config import ConfigError
from dense.pretraining import data
from dense.pretraining.data import ImageDataset, ImageStream, ListReader
from tests.pretraining.conftest import write_images

PLAIN = dict(input_size=32, crop_pct=1.0, mean=(0, 0, 0), std=(1, 1, 1))


def told(kind, *given, **named):
    with pytest.raises(ConfigError) as error:
        kind(*given, **named)
    return str(error.value)


def listed(tmp_path, text):
    (tmp_path / "list.txt").write_text(text)
    return ListReader(str(tmp_path), str(tmp_path / "list.txt"))


@pytest.mark.parametrize(
    ("pairs", "classes"),
    [
        ([("x/a/1.jpg", 1), ("x/b/2.jpg", 0), ("y/a/3.jpg", 1)], {"b": 0, "a": 1}),
        # A class of which there is no image has its number.
        ([("a/1.jpg", 2), ("b/2.jpg", 0)], {"b": 0, "1": 1, "a": 2}),
        # Two folders of a class, or one of two: numbers are the names.
        ([("a/1.jpg", 0), ("b/2.jpg", 0), ("c/2.jpg", 1)], {"0": 0, "1": 1}),
        ([("a/1.jpg", 0), ("a/2.jpg", 1)], {"0": 0, "1": 1}),
    ],
)
def test_names_of_a_lists_classes(tmp_path, pairs, classes):
    lines = listed(tmp_path, "".join(f"{name}\t{label}\n" for name, label in pairs))
    pairs_of_json = listed(tmp_path, f" [ {json.dumps(pairs)[1:]}")
    for reader in (lines, pairs_of_json):
        assert reader.class_to_idx == classes and reader.samples == pairs
        assert len(reader) == len(pairs)
        assert reader.filename(1) == pairs[1][0]
        assert reader.filename(1, basename=True) == Path(pairs[1][0]).name


def test_a_listed_file_is_opened_below_the_root(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a/1.jpg").write_bytes(b"bytes")
    # A tab in the path belongs to it.
    (tmp_path / "a\tb").write_bytes(b"more")
    reader = listed(tmp_path, "a/1.jpg\t3\na\tb\t 1 ")
    for index, (content, label) in enumerate([(b"bytes", 3), (b"more", 1)]):
        file, found = reader[index]
        with file:
            assert (file.read(), found) == (content, label)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a.jpg\t0\n\nb.jpg\t1", ", line 2: '' is not a path, a tab and a class index"),
        ("a.jpg\t0\n5", ", line 2: '5' is not a path, a tab and a class index"),
        ("a.jpg\tone", ", line 1: 'a.jpg\\tone' is not a path, a tab and a class index"),
        ('[["a.jpg", 0], ["b.jpg"]]', ", entry 2: ['b.jpg'] is not a path and a class index"),
        ("[[3, 0]]", ", entry 1: [3, 0] is not a path and a class index"),
        ('[["a", -1]]', ", entry 1: ['a', -1] is not a path and a class index"),
        ("", " is empty"),
        ("[]", " is empty"),
    ],
)
def test_what_is_wrong_with_a_list(tmp_path, text, reason):
    (tmp_path / "list.txt").write_text(text)
    path = str(tmp_path / "list.txt")
    assert told(ListReader, str(tmp_path), path) == path + reason
    assert told(ListReader, "a", "absent.txt") == "no list of images at absent.txt"


@pytest.fixture
def root(tmp_path):
    return write_images(tmp_path / "photos", {"b": 2, "a": 1, "c": 1})


def test_another_number_of_listed_classes_names_the_list(root, tmp_path):
    path = tmp_path / "list.txt"
    path.write_text("a/a_0.jpg\t0\nb/b_0.jpg\t3")
    assert told(ImageDataset, str(root), PLAIN, str(path), num_classes=5) == (
        f"{path} has 4 classes (a, 1, 2, ...), the config 5: set --num-classes or take another "
        "folder"
    )


def test_classes_of_folders_are_sorted_or_as_named(root):
    dataset = ImageDataset(str(root), PLAIN)
    assert dataset.metainfo == {"classes": ["a", "b", "c"]} and len(dataset) == 4
    assert [(label, dataset.filename(index)) for _, label, index in dataset] == [
        *((0, "a_0.jpg"), (1, "b_0.jpg"), (1, "b_1.jpg"), (2, "c_0.jpg"))
    ]
    named = ImageDataset(str(root), PLAIN, classes=["c", "none", "b", "a"], num_classes=4)
    assert named.metainfo == {"classes": ["c", "none", "b", "a"]}
    labels = {named.filename(index): label for _, label, index in named}
    assert labels == {"a_0.jpg": 3, "b_0.jpg": 2, "b_1.jpg": 2, "c_0.jpg": 0}
    assert told(ImageDataset, str(root), PLAIN, num_classes=4) == (
        f"{root} has 3 classes (a, b, c, ...), the config 4: set --num-classes or take another "
        "folder"
    )


def test_tar_files_of_classes_named_in_an_order(root, tmp_path):
    (tmp_path / "tars").mkdir()
    for folder in root.iterdir():
        with tarfile.open(tmp_path / f"tars/{folder.name}.tar", "w") as archive:
            for path in folder.iterdir():
                archive.add(path, arcname=path.name)
    classes = ["c", "b", "a"]
    dataset = ImageDataset(str(tmp_path / "tars"), PLAIN, classes=classes)
    assert dataset.metainfo == {"classes": classes}
    found = {dataset.filename(index): label for _, label, index in dataset}
    assert found == {"a_0.jpg": 2, "b_0.jpg": 1, "b_1.jpg": 1, "c_0.jpg": 0}


def test_a_folder_may_be_called_as_a_tar_file(root, tmp_path):
    root.rename(tmp_path / "unpacked.tar")
    assert len(ImageDataset(str(tmp_path / "unpacked.tar"), PLAIN)) == 4


def test_damaged_tar_files_are_named(tmp_path):
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "a.tar", tmp_path / "folder/a.tar"):
        path.write_bytes(b"no archive")
    for root in (f"{tmp_path}/a.tar", f"{tmp_path}/folder"):
        assert told(ImageDataset, root, PLAIN).startswith(f"no images in {root}: ")


def test_folders_without_images(tmp_path):
    (tmp_path / "empty").mkdir()
    assert told(ImageDataset, f"{tmp_path}/absent", PLAIN) == (
        f"no images at {tmp_path}/absent: expected a folder with a subfolder per class"
    )
    assert told(ImageDataset, f"{tmp_path}/empty", PLAIN).startswith(
        f"no images in {tmp_path}/empty: "
    )


@pytest.mark.parametrize("index", [-1, 4, 5])
def test_an_index_out_of_range_ends_a_loop(root, index):
    dataset = ImageDataset(str(root), PLAIN)
    with pytest.raises(IndexError, match=f"^image {index} of 4$"):
        dataset[index]


def test_the_next_image_takes_a_damaged_ones_place(root, monkeypatch):
    dataset = ImageDataset(str(root), PLAIN)
    last = next(root.glob("c/*"))
    last.write_bytes(b"no image")
    noted = []
    monkeypatch.setattr(dataset._skipped, "note", lambda *given: noted.append(given))
    image, label, index = dataset[3]
    assert (label, index) == (0, 0) and image.equal(dataset[0][0])
    [(name, error)] = noted
    assert Path(name).name == "c_0.jpg" and "cannot identify" in str(error)
    for path in root.glob("*/*"):
        path.write_bytes(b"no image")
    with pytest.raises(data.TooManyUnreadable, match="^no image decodes$"):
        dataset[1]
    assert len(noted) == 5


@pytest.mark.parametrize(("share", "allowed"), [(0.001, 1), (0.5, 2), (0.75, 3)])
def test_so_many_may_be_damaged(root, share, allowed, monkeypatch):
    dataset = ImageDataset(str(root), PLAIN, unreadable_share=share)
    assert (dataset._skipped.allowed, dataset._skipped.total) == (allowed, 4)
    given = []
    monkeypatch.setattr(data, "Skipped", lambda *counts: given.append(counts))
    ImageDataset(str(root), PLAIN)
    assert given == [(4, 0.001)]


# Streams


class Reader:
    def __init__(self, samples=()):
        self.samples, self.epochs = samples, []

    def __iter__(self):
        return iter(self.samples)

    def __len__(self):
        return 7

    def set_epoch(self, epoch):
        self.epochs.append(epoch)


@pytest.fixture
def opened(monkeypatch):
    """What timm's readers are created with; ``answer`` is the reader, or an error."""
    found = SimpleNamespace(calls=[], answer=Reader())

    def create(*given, **named):
        found.calls.append((given, named))
        if isinstance(found.answer, Exception):
            raise found.answer
        return found.answer

    monkeypatch.setattr(data, "create_reader", create)
    return found


def test_a_stream_is_opened_with_its_settings(opened, tmp_path):
    stream = ImageStream(str(tmp_path), PLAIN, 2)
    given = ("wds/imagenet",), dict(root=str(tmp_path), split="train", is_training=False)
    given[1].update(batch_size=1, seed=42)
    assert opened.calls.pop() == given and stream.metainfo == {"classes": ["0", "1"]}
    options = dict(split="validation", is_training=True, batch_size=8, seed=3)
    stream = ImageStream(str(tmp_path), PLAIN, 2, "wds/a", classes=("x", "y"), **options)
    assert opened.calls.pop() == (("wds/a",), dict(root=str(tmp_path), **options))
    assert stream.metainfo == {"classes": ["x", "y"]} and len(stream) == 7
    stream.set_epoch(5)
    assert opened.answer.epochs == [5]
    opened.answer = []
    assert ImageStream(str(tmp_path), PLAIN, 2).set_epoch(5) is None
    assert stream.filename(3) == "sample 3 of rank 0"


def test_images_of_a_stream_are_rgb_opened_or_not(opened, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8)
    grey = Image.fromarray(pixels).convert("L")
    file = io.BytesIO()
    grey.save(file, "PNG")
    opened.answer = Reader([(grey, 1), (file, 0)])
    stream = ImageStream(str(tmp_path), PLAIN, 2)
    (one, *labels), (two, *others) = stream
    assert one.shape == (3, 32, 32) and one.equal(two) and one[0].equal(one[2])
    assert (labels, others) == ([1, -1], [0, -1])
    assert one.dtype == torch.float32


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ImportError("no module"), "wds/a: no module; pip install webdataset"),
        *(
            (kind("odd"), "wds/a in ROOT, split b: odd")
            for kind in (FileNotFoundError, AssertionError, RuntimeError, ValueError)
        ),
    ],
)
def test_shards_that_cannot_be_read(opened, tmp_path, error, reason):
    opened.answer = error
    found = told(ImageStream, str(tmp_path), PLAIN, 2, "wds/a", "b")
    assert found == reason.replace("ROOT", str(tmp_path))
    assert told(ImageStream, "/absent", PLAIN, 2) == "no folder of shards at /absent"
