"""Folders, tar files, lists and shards give the same images, in RGB, and name what is wrong."""

import io
import json
import logging
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import ImageNetInfo
from torch.utils.data import DataLoader

from dense.openmmlab.config import ConfigError
from dense.pretraining.data import ImageDataset, ImageStream, TooManyUnreadable
from tests.support import assert_same

PLAIN = dict(input_size=32, crop_pct=1.0, mean=(0, 0, 0), std=(1, 1, 1))


def everything(dataset) -> dict[str, tuple]:
    return {dataset.filename(i): (image, label) for image, label, i in dataset}


def test_folder_tar_folder_of_tars_and_list_agree(photos, tmp_path):
    root = photos / "val"
    expected = everything(ImageDataset(str(root), PLAIN))
    assert len(expected) == 12 and {label for _, label in expected.values()} == {0, 1, 2}

    with tarfile.open(tmp_path / "all.tar", "w") as archive:
        archive.add(root, arcname=".")
    assert_same(everything(ImageDataset(str(tmp_path / "all.tar"), PLAIN)), expected)

    (tmp_path / "tars").mkdir()
    for folder in sorted(root.iterdir()):
        with tarfile.open(tmp_path / f"tars/{folder.name}.tar", "w") as archive:
            for path in sorted(folder.iterdir()):
                archive.add(path, arcname=path.name)
    tars = ImageDataset(str(tmp_path / "tars"), PLAIN)
    assert tars.metainfo["classes"] == ["n01", "n02", "n03"]
    assert_same(everything(tars), expected)

    lines = [
        f"{p.relative_to(root)}\t{int(p.parent.name[1:]) - 1}" for p in sorted(root.rglob("*.jpg"))
    ]
    (tmp_path / "list.txt").write_text("\n".join(lines))
    listed = ImageDataset(str(root), PLAIN, list_file=str(tmp_path / "list.txt"))
    assert listed.metainfo["classes"] == ["n01", "n02", "n03"]
    assert_same(everything(listed), expected)

    # Swin's list of ImageNet-22K is JSON in a .txt; its own reader converts labels with int().
    pairs = [line.split("\t") for line in lines]
    pairs = [[name, label if i % 2 else int(label)] for i, (name, label) in enumerate(pairs)]
    for indent in (None, 1):
        (tmp_path / "map.txt").write_text(json.dumps(pairs, indent=indent))
        listed = ImageDataset(str(root), PLAIN, list_file=str(tmp_path / "map.txt"))
        assert listed.metainfo["classes"] == ["n01", "n02", "n03"]
        assert_same(everything(listed), expected)


def test_shards(photos, tmp_path):
    pytest.importorskip("webdataset")
    expected = [
        (image.sum().item(), label) for image, label, _ in ImageDataset(str(photos / "val"), PLAIN)
    ]
    paths = sorted((photos / "val").rglob("*.jpg"))
    for shard in range(2):
        with tarfile.open(tmp_path / f"photos-val-{shard:04d}.tar", "w") as archive:
            for path in paths[shard::2]:
                label = str(int(path.parent.name[1:]) - 1).encode()
                for name, content in ((".jpg", path.read_bytes()), (".cls", label)):
                    info = tarfile.TarInfo(path.stem + name)
                    info.size = len(content)
                    archive.addfile(info, io.BytesIO(content))
    info = {"name": "photos", "splits": {"val": {
        "name": "val", "num_samples": 12,
        "filenames": [f"photos-val-{i:04d}.tar" for i in range(2)], "shard_lengths": [6, 6],
    }}}  # fmt: skip
    (tmp_path / "_info.json").write_text(json.dumps(info))
    stream = ImageStream(str(tmp_path), PLAIN, 3, name="wds/photos", split="val", batch_size=4)
    assert len(stream) == 12 and stream.metainfo["classes"] == ["0", "1", "2"]
    # Networks of ImageNet are known by their classes, as timm orders them.
    for count, names in ((1000, "imagenet-1k"), (21841, "imagenet-22k")):
        named = ImageStream(str(tmp_path), PLAIN, count, name="wds/photos", split="val")
        assert named.metainfo["classes"] == ImageNetInfo(names).label_names()
    loader = DataLoader(stream, batch_size=4)
    found = [
        (image.sum().item(), int(label)) for images, labels, _ in loader
        for image, label in zip(images, labels, strict=True)
    ]  # fmt: skip
    assert sorted(found) == sorted(expected)


@pytest.mark.parametrize("mode", ["L", "P", "CMYK", "RGBA", "LA", "I;16", "exif"])
def test_every_mode_comes_out_as_rgb(mode, tmp_path):
    (tmp_path / "a").mkdir()
    image = Image.new("RGB", (64, 32), (200, 200, 200))
    if mode == "exif":
        image.paste((20, 20, 20), (0, 0, 32, 32))  # the left half is dark
        exif = Image.Exif()
        exif[0x0112] = 6  # turned right: what was left is above
        image.save(tmp_path / "a/x.jpg", exif=exif)
    elif mode == "I;16":
        Image.fromarray(np.full((32, 64), 200 * 257, np.uint16)).save(tmp_path / "a/x.png")
    else:
        image = image.convert(mode, palette=Image.Palette.ADAPTIVE) if mode == "P" else image
        image.convert(mode).save(tmp_path / ("a/x.jpg" if mode == "CMYK" else "a/x.png"))
    pixels = ImageDataset(str(tmp_path), PLAIN)[0][0]
    assert pixels.shape == (3, 32, 32)
    if mode == "exif":
        assert pixels[:, :12].mean() < 0.3 < 0.6 < pixels[:, 20:].mean()
    else:
        torch.testing.assert_close(pixels, torch.full_like(pixels, 200 / 255), atol=0.02, rtol=0)


def test_what_does_not_decode_is_named_and_skipped_up_to_a_share(tmp_path, caplog):
    for name, colour in (("a", 10), ("b", 200)):
        (tmp_path / name).mkdir()
        for i in range(4):
            Image.new("RGB", (32, 32), (colour,) * 3).save(tmp_path / name / f"{i}.png")
    (tmp_path / "a/1.png").write_bytes(b"no image")
    dataset = ImageDataset(str(tmp_path), PLAIN, unreadable_share=0.2)
    with caplog.at_level(logging.WARNING):
        image, label, index = dataset[1]
    assert index == 2 and label == 0 and image.mean() < 0.1
    assert "1.png cannot be read" in caplog.text and "1 allowed" in caplog.text
    assert len(list(dataset)) == 8  # the next one takes its place

    (tmp_path / "b/0.png").write_bytes((tmp_path / "b/1.png").read_bytes()[:40])
    with pytest.raises(TooManyUnreadable, match=r"2 of 8 images cannot be read, .*0.png"):
        list(dataset)

    # Workers count together, and hand on one line.
    dataset = ImageDataset(str(tmp_path), PLAIN, unreadable_share=0.2)
    order = [1, 2, 3, 4]
    with pytest.raises(TooManyUnreadable) as error:
        list(DataLoader(dataset, batch_size=2, sampler=order, num_workers=2))
    assert str(error.value).startswith("2 of 8 images cannot be read")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (dict(root="ROOT/absent"), "no images at .*absent"),
        (dict(root="ROOT/empty"), "no images in .*empty"),
        (dict(num_classes=5), r"has 3 classes \(n01, n02, n03, ...\), the config 5"),
        (dict(list_file="ROOT/absent.txt"), "no list of images at"),
        (dict(list_file="ROOT/bad.txt"), "bad.txt, line 2: 'b.jpg 1' is not a path"),
        (dict(list_file="ROOT/bad.json"), r"bad.json, entry 2: \['b.jpg', 1.5\] is not a path"),
        (dict(list_file="ROOT/cut.json"), "cut.json is not JSON: "),
        (dict(list_file="ROOT/none.json"), "none.json is empty"),
    ],
)
def test_what_is_missing_is_named(photos, tmp_path, change, reason):
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.txt").write_text("a.jpg\t0\nb.jpg 1\n")
    (tmp_path / "bad.json").write_text('[["a.jpg", 0], ["b.jpg", 1.5]]')
    (tmp_path / "cut.json").write_text('[["a.jpg", 0], ["b.')
    (tmp_path / "none.json").write_text("[]")
    change = {
        k: v.replace("ROOT", str(tmp_path)) if k != "num_classes" else v for k, v in change.items()
    }
    with pytest.raises(ConfigError, match=reason):
        ImageDataset(**{"root": str(photos / "val"), "transform": PLAIN, **change})
    with pytest.raises(ConfigError, match="no folder of shards at"):
        ImageStream(str(tmp_path / "absent"), PLAIN, 3)


def test_labels_without_folders_of_their_own_keep_their_numbers(photos, tmp_path):
    root = photos / "val"
    lines = [f"{p.relative_to(root)}\t{i % 2}" for i, p in enumerate(sorted(root.rglob("*.jpg")))]
    (tmp_path / "list.txt").write_text("\n".join(lines))
    dataset = ImageDataset(str(root), PLAIN, list_file=str(tmp_path / "list.txt"))
    assert dataset.metainfo["classes"] == ["0", "1"]


def test_labels_after_the_first_shared_folder_are_counted(photos, tmp_path):
    root = photos / "val"
    files = sorted(root.rglob("*.jpg"))
    first = [f"{p.relative_to(root)}\t0" for p in (files[0], files[-1])]
    assert files[0].parent != files[-1].parent
    (tmp_path / "list.txt").write_text("\n".join([*first, f"{files[1].relative_to(root)}\t2"]))
    dataset = ImageDataset(str(root), PLAIN, list_file=str(tmp_path / "list.txt"))
    assert dataset.metainfo["classes"] == ["0", "1", "2"]
