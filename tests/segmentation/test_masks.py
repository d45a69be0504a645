"""What is told of folders of masks, whole, and what is kept of them; their readers and loss."""

import hashlib
import json
import os

import numpy as np
import pytest
import torch
from mmengine.config import ConfigDict
from PIL import Image

from dense.openmmlab.config import ConfigError
from dense.segmentation import data
from dense.segmentation.data import check_folders, check_masks, check_overlap, image_mask_pairs
from dense.segmentation.dataset import FolderDataset, ReadColouredMask, ReadImage
from dense.segmentation.losses import WeightedCrossEntropyLoss


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """The folder of what is known of masks."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache/dense-backbones/masks-2"


def save(folder, kind, name, pixels):
    path = folder / kind / f"{name}.png"
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(np.asarray(pixels)).save(path)
    return path


def pairs_of(folder, masks):
    """Photos of 3x2 pixels and a mask for each."""
    photo = np.zeros((2, 3, 3), np.uint8)
    return [
        (save(folder, "images", i, photo), save(folder, "masks", i, np.asarray(m, np.uint8)))
        for i, m in enumerate(masks)
    ]


def refused(folder, masks, *given, **named):
    pairs = masks if isinstance(masks[0], tuple) else pairs_of(folder, masks)
    with pytest.raises(ConfigError) as error:
        check_masks(pairs, *given, **named)
    return str(error.value).replace(f"{folder}/masks/", "").replace(f"{folder}/images/", "")


ABC = ("a", "b", "c")


def rows(*values):
    return [list(values)] * 2


@pytest.mark.parametrize(
    ("masks", "options", "told"),
    [
        (
            [rows(0, 1, 3)],
            {},
            "0.png holds 3: 3 classes are 0 to 2, and 255 is ignored; if 3 marks pixels to ignore, "
            "--ignore-index 3 says so",
        ),
        (
            [rows(0, 1, 2), rows(3, 4, 5), rows(4, 0, 0)],
            {},
            "1.png holds 3, 4, 5: 3 classes are 0 to 2, and 255 is ignored (2 of 3 masks cannot be "
            "used)",
        ),
        (
            [rows(3, 0, 0), rows(4, 0, 0)],
            {},
            "0.png holds 3: 3 classes are 0 to 2, and 255 is ignored (2 of 2 masks cannot be used)",
        ),
        (
            [[[3, 4, 5], [6, 7, 8]]],
            dict(ignore_index=9),
            "0.png holds 3, 4, 5, 6, 7: 3 classes are 0 to 2, and 9, 255 are ignored",
        ),
        (
            [rows(0, 1, 4)],
            dict(reduce_zero_label=True),
            "0.png holds 4: 3 classes are 1 to 3, and 0, 255 are ignored; if 4 marks pixels to "
            "ignore, --ignore-index 4 says so",
        ),
        # Beside a fault of another kind, which is told first, values are not said.
        (
            [rows(0, 0), rows(3, 0, 0)],
            {},
            "0.png is 2x2, its image 3x2 (2 of 2 masks cannot be used)",
        ),
    ],
)
def test_values_that_are_no_classes(tmp_path, masks, options, told):
    found = refused(tmp_path, masks, ABC, **options)
    assert found == told or (told.endswith(" u") and found == f"{told}sed)")


@pytest.mark.parametrize(
    ("values", "options"),
    [
        ((0, 1, 2), {}),
        ((255, 0, 0), {}),
        ((1, 2, 3), dict(reduce_zero_label=True)),
        ((0, 3, 255), dict(reduce_zero_label=True)),
        ((0, 1, 9), dict(ignore_index=9)),
        ((0, 1, 255), dict(ignore_index=9)),
        # A class may be ignored.
        ((0, 1, 2), dict(ignore_index=2)),
    ],
)
def test_values_that_are_classes_or_ignored(tmp_path, values, options):
    check_masks(pairs_of(tmp_path, [rows(*values)]), ABC, **options)


@pytest.mark.parametrize(
    ("values", "options"),
    [
        ((255, 255, 255), {}),
        ((0, 255, 0), dict(reduce_zero_label=True)),
        ((2, 2, 255), dict(ignore_index=2)),
    ],
)
def test_masks_without_a_class_are_refused(tmp_path, values, options):
    told = f"all pixels of the 2 masks in {tmp_path}/masks are ignored"
    assert refused(tmp_path, [rows(*values)] * 2, ABC, **options) == told


def test_masks_and_classes_that_are_empty_are_said(tmp_path, caplog):
    names = [f"c{i}" for i in range(12)]
    pairs = pairs_of(tmp_path, [rows(0, 1, 1), rows(255, 255, 255), rows(255, 255, 255)])
    check_masks(pairs, names)
    folder = tmp_path / "masks"
    ten = "c2, c3, c4, c5, c6, c7, c8, c9, c10, c11"
    assert [record.message for record in caplog.records] == [
        f"2 masks have ignored pixels only, such as {folder}/1.png",
        f"no pixel in {folder} is of {ten}: 10 of 12 classes",
    ]
    caplog.clear()
    check_masks(pairs[:1], names, reduce_zero_label=True)
    assert [record.message for record in caplog.records] == [
        f"no pixel in {folder} is of c1, c2, c3, c4, c5, c6, c7, c8, c9, c10, ...: 11 of 12 classes"
    ]
    caplog.clear()
    check_masks(pairs[:1], names[:2])
    assert not caplog.records


BLACK, RED, BLUE, WHITE = (0, 0, 0), (200, 0, 3), (0, 5, 200), (255, 255, 255)


def test_coloured_masks(tmp_path, caplog):
    pairs = pairs_of(tmp_path, [rows(BLACK, RED, WHITE), rows(WHITE, WHITE, WHITE)])
    palette = [RED, BLACK, BLUE, WHITE]
    check_masks(pairs, ABC, palette=palette)
    assert [record.message for record in caplog.records] == [
        f"1 masks have ignored pixels only, such as {tmp_path}/masks/1.png",
        f"no pixel in {tmp_path}/masks is of c: 1 of 3 classes",
    ]
    told = "0.png holds 255 255 255, of no line of --classes (2 of 2 masks cannot be used)"
    assert refused(tmp_path, pairs, ABC, palette=palette[:3]) == told
    told = f"all pixels of the 1 masks in {tmp_path}/masks are ignored"
    assert refused(tmp_path, pairs[1:], ABC, palette=palette).replace("\n", "") == told
    six = [[(1, 0, 0), (2, 0, 0), (3, 0, 0)], [(4, 1, 0), (5, 0, 1), (6, 0, 0)]]
    many = "1 0 0, 2 0 0, 3 0 0, 4 1 0, 5 0 1"
    pairs = pairs_of(tmp_path, [six])
    told = f"0.png holds {many} and 1 more, of no line of --classes"
    assert refused(tmp_path, pairs, ABC, palette=palette) == told
    assert refused(tmp_path, pairs, ABC) == (
        "0.png is RGB: one class index per pixel is needed, a grey or palette PNG. If its colours "
        "are classes, --classes FILE takes a line NAME R G B for each, and - R G B to ignore one; "
        f"it holds {many} and 1 more: 3 classes are 0 to 2, and 255 is ignored"
    )
    six[0][0] = six[0][1]
    assert refused(tmp_path, pairs_of(tmp_path, [six]), ABC).endswith(
        "it holds 2 0 0, 3 0 0, 4 1 0, 5 0 1, 6 0 0: 3 classes are 0 to 2, and 255 is ignored"
    )


def test_absent_colours_are_in_their_order(tmp_path, caplog):
    """Not in that of a set, whose first would be of (1, 0, 0)."""
    palette = [(1, 0, 0), RED, (0, 0, 7)]
    check_masks(pairs_of(tmp_path, [rows(RED, RED, RED)]), ABC, palette=palette)
    assert caplog.messages == [f"no pixel in {tmp_path}/masks is of c, a: 2 of 3 classes"]


def test_masks_of_other_kinds(tmp_path):
    grey = Image.fromarray(np.zeros((2, 3), np.uint8))
    [pair] = pairs_of(tmp_path, [rows(0, 1, 2)])
    for mode in ("LA", "RGBA"):
        grey.convert(mode).save(pair[1])
        told = f"0.png is {mode}: one class index per pixel is needed, a grey or palette PNG"
        assert refused(tmp_path, [pair], ABC) == told
        told = f"0.png is {mode}: colours of --classes are of RGB masks"
        assert refused(tmp_path, [pair], ABC, palette=[BLACK, RED, BLUE]) == told
    for mode in ("1", "L", "P", "I", "I;16"):
        found = grey.convert(mode)
        assert found.mode == mode
        found.save(pair[1], "TIFF")
        check_masks([pair], ABC)
    pair[1].write_bytes(b"")
    assert refused(tmp_path, [pair], ABC).startswith("0.png cannot be read: cannot identify image")
    pair[0].write_bytes(b"")
    assert refused(tmp_path, [pair], ABC).startswith("0.png cannot be read as an image: ")


def test_images_that_share_a_mask(tmp_path):
    pairs = pairs_of(tmp_path, [rows(0, 1, 2)] * 4)
    shared = [pairs[0], (pairs[1][0], pairs[2][1]), pairs[2], pairs[3]]
    told = "1.png, 2.png share the mask 2.png: give each image a name of its own"
    assert refused(tmp_path, shared, ABC) == told


def test_photos_of_both_splits_are_counted(tmp_path, caplog):
    one = pairs_of(tmp_path, [rows(0, 1, 2)] * 4)
    (tmp_path / "link.png").symlink_to(one[2][0])
    other = [(tmp_path / "other.png", None), (tmp_path / "link.png", None), (one[3][0], None)]
    check_overlap(one[:2], other)
    assert not caplog.records
    check_overlap(one, other)
    assert caplog.messages == [
        f"2 of 3 validation images are training images too, such as {tmp_path}/link.png: their "
        "mIoU says nothing about other photos"
    ]


# What is kept


def test_what_is_known_of_masks_is_kept(tmp_path, cache, monkeypatch):
    pairs = pairs_of(tmp_path, [rows(0, 1, 2), rows(2, 1, 255), rows(0, 0, 0)])
    check_masks(pairs[:2], ABC)
    [path] = cache.iterdir()
    assert path.suffix == ".json" and len(path.stem) == 16
    stats = [mask.stat() for _, mask in pairs]

    def entry(number, *values):
        return [stats[number].st_size, stats[number].st_mtime_ns, "L", 3, 2, list(values)]

    two = {str(pairs[0][1]): entry(0, 0, 1, 2), str(pairs[1][1]): entry(1, 1, 2, 255)}
    assert json.loads(path.read_text()) == two
    # The same folder's other masks come into the same file, and those that are not asked for go.
    check_masks(pairs[1:], ABC)
    kept = dict([list(two.items())[1], (str(pairs[2][1]), entry(2, 0))])
    assert json.loads(path.read_text()) == kept and [*cache.iterdir()] == [path]
    written = []
    monkeypatch.setattr(data.files, "write", lambda *given: written.append(given))
    check_masks(pairs[1:], ABC)
    assert written == []
    os.utime(pairs[1][1], ns=(5, 5))
    check_masks(pairs[1:], ABC)
    assert [given[0] for given in written] == [path]


def test_a_mask_that_is_gone_is_said_to_be(tmp_path):
    [pair] = pairs_of(tmp_path, [rows(0, 1, 2)])
    check_masks([pair], ABC)
    pair[1].unlink()
    assert refused(tmp_path, [pair], ABC).startswith("0.png cannot be read: ")


def test_masks_of_several_folders_have_one_file(tmp_path, cache):
    folders = [tmp_path / name for name in "cab"]
    pairs = []
    for folder in folders:
        folder.mkdir()
        pairs += pairs_of(folder, [rows(0, 1, 2)] * 2)
    check_masks(pairs, ABC)
    names = "\n".join(f"{tmp_path}/{name}/masks" for name in "abc")
    [path] = cache.iterdir()
    assert path.name == f"{hashlib.sha256(names.encode()).hexdigest()[:16]}.json"


def test_masks_are_counted_while_they_are_read(tmp_path, bars):
    check_masks(pairs_of(tmp_path, [rows(0, 1, 2)] * 3), ABC)
    assert bars == [("checking masks", 3, 2, False, "it")]


def test_a_mask_of_another_size_or_time_is_read_again(tmp_path, cache):
    [pair] = pairs_of(tmp_path, [rows(0, 1, 2)])
    check_masks([pair], ABC)
    [path] = cache.iterdir()
    [(name, entry)] = json.loads(path.read_text()).items()
    for place, lie in ((0, entry[0] + 1), (1, entry[1] - 1)):
        false = [*entry[:5], [7]]
        path.write_text(json.dumps({name: false}))
        assert "holds 7" in refused(tmp_path, [pair], ABC), "what is kept is believed"
        false[place] = lie
        path.write_text(json.dumps({name: false}))
        check_masks([pair], ABC)
        assert json.loads(path.read_text()) == {name: entry}


def test_folders_have_files_of_their_own_in_the_home(tmp_path, monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        check_masks(pairs_of(tmp_path / folder, [rows(0, 1, 2)]), ABC)
    assert len(list((tmp_path / "home/.cache/dense-backbones/masks-2").iterdir())) == 2


# Folders


def folders(tmp_path, *images, masks=()):
    for kind, names in (("images", images), ("masks", masks)):
        (tmp_path / kind).mkdir(exist_ok=True)
        for name in names:
            path = tmp_path / kind / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
    prefix = dict(img_path="images", seg_map_path="masks")
    return ConfigDict(type="FolderDataset", data_root=str(tmp_path), data_prefix=prefix)


def told_of(dataset):
    with pytest.raises(ConfigError) as error:
        check_folders(dataset, "val_dataloader")
    return str(error.value)


def test_folders_that_are_not_there(tmp_path):
    dataset = folders(tmp_path)
    (tmp_path / "masks").rmdir()
    hint = f": data_root is '{tmp_path}', --data-root names another"
    assert told_of(dataset) == f"no folder {tmp_path}/masks (val_dataloader){hint}"
    dataset.data_root, dataset.data_prefix.img_path = None, f"{tmp_path}/absent"
    assert told_of(dataset) == f"no folder {tmp_path}/absent (val_dataloader)"
    (tmp_path / "masks").mkdir()
    dataset.data_root, dataset.data_prefix.img_path = str(tmp_path), None
    suffixes = ".jpg .jpeg .png .bmp .tif .tiff .webp"
    assert (
        told_of(dataset) == f"no images in {tmp_path} (val_dataloader) with a suffix of {suffixes}"
    )
    dataset.ann_file = "list.txt"
    assert check_folders(dataset, "a") == check_folders(ConfigDict(type="A"), "a") == []


def test_masks_that_are_not_there(tmp_path):
    dataset = folders(tmp_path, "a.jpg", "b.png", "c.jpg", masks=["b.png"])
    others = ".tif, .tiff, _mask.png, _mask.tif, _labelTrainIds.png, _gtFine_labelTrainIds.png"
    assert told_of(dataset) == (
        f"{tmp_path}/images/a.jpg has no mask {tmp_path}/masks/a.png (2 of 3 have none); other "
        f"endings that are found: {others}"
    )
    dataset.type = "ADE20KDataset"
    told = f"{tmp_path}/images/a.jpg has no mask {tmp_path}/masks/a.png (2 of 2 have none)"
    assert told_of(dataset) == told
    dataset.update(img_suffix="g", seg_map_suffix="_b.tif")
    assert told_of(dataset).startswith(
        f"{tmp_path}/images/a.jpg has no mask {tmp_path}/masks/a.jp_b"
    )
    dataset.update(img_suffix=".gif")
    assert told_of(dataset).endswith("(val_dataloader) with a suffix of .gif")
    dataset = folders(tmp_path, masks=["a.png", "c_mask.tif"])
    found = [(image.name, mask.name) for image, mask in check_folders(dataset, "a")]
    assert found == [("a.jpg", "a.png"), ("b.png", "b.png"), ("c.jpg", "c_mask.tif")]


def test_masks_are_paired_in_folders_and_by_upper_case(tmp_path):
    names = ("b/x.JPG", "b/x_leftImg8bit.PNG", "a.Tiff", "y_mask.png", "z.txt")
    folders(tmp_path, *names, masks=["b/x_mask.png", "a.tif", "y_mask.png"])
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "q.webp").touch()
    (tmp_path / "images/linked").symlink_to(elsewhere)
    found = image_mask_pairs(tmp_path / "images", tmp_path / "masks", suffixes=data.IMAGE_SUFFIXES)
    relative = [
        (str(image.relative_to(tmp_path / "images")), str(mask.relative_to(tmp_path / "masks")))
        for image, mask in found
    ]
    assert relative == [
        ("a.Tiff", "a.tif"),
        ("b/x.JPG", "b/x_mask.png"),
        ("b/x_leftImg8bit.PNG", "b/x_mask.png"),
        ("linked/q.webp", "linked/q.png"),
        ("y_mask.png", "y_mask.png"),
    ]
    both = tmp_path / "both"
    both.mkdir()
    for name in ("a.png", "a_mask.png", "b.png", "c.jpg", "c.png"):
        (both / name).touch()
    (tmp_path / "same").symlink_to(both)
    found = [(i.name, m.name) for i, m in image_mask_pairs(both, tmp_path / "same")]
    assert found == [
        *(("a.png", "a_mask.png"), ("b.png", "b.png"), ("c.jpg", "c.png"), ("c.png", "c.png"))
    ]


# The data set and the loss


def test_readers_of_photos_and_masks(tmp_path):
    pixels = np.arange(18, dtype=np.uint8).reshape(2, 3, 3)
    path = save(tmp_path, "images", "a", pixels)
    found = ReadImage().transform(dict(img_path=str(path)))
    np.testing.assert_array_equal(found["img"], pixels[..., ::-1])
    assert found["img"].flags["C_CONTIGUOUS"] and found["img_shape"] == found["ori_shape"] == (2, 3)
    mask = save(tmp_path, "masks", "a", np.uint8([[RED, BLACK, WHITE], [BLUE, (0, 5, 201), BLACK]]))
    found = ReadColouredMask([RED, BLUE, BLACK]).transform(
        dict(seg_map_path=str(mask), seg_fields=["other"])
    )
    assert found["gt_seg_map"].tolist() == [[0, 2, 255], [1, 255, 2]]
    assert found["gt_seg_map"].dtype == np.uint8 and found["seg_fields"] == ["other", "gt_seg_map"]


@pytest.mark.parametrize(
    ("ignore", "reduce", "label_map"),
    [
        *((255, False, None), (255, True, None), (7, False, {7: 255}), (7, True, {6: 255})),
        *((0, False, {0: 255}), (0, True, None), (1, True, {0: 255})),
    ],
)
def test_entries_of_a_folder(tmp_path, ignore, reduce, label_map):
    folders(tmp_path, "b.jpg", "a.jpg", masks=["a.png", "b.png"])
    dataset = FolderDataset(
        data_prefix=dict(img_path=f"{tmp_path}/images", seg_map_path=f"{tmp_path}/masks"),
        **dict(metainfo=dict(classes=ABC), pipeline=[], serialize_data=False),
        **dict(ignore_index=ignore, reduce_zero_label=reduce),
    )
    expected = dict(label_map=label_map, reduce_zero_label=reduce, seg_fields=[])
    assert dataset.load_data_list() == [
        dict(
            img_path=f"{tmp_path}/images/{n}.jpg",
            seg_map_path=f"{tmp_path}/masks/{n}.png",
            **expected,
        )
        for n in "ab"
    ]
    skipped = dataset._skipped
    dataset.full_init()
    assert dataset._skipped is skipped and skipped.total == 2


@pytest.mark.parametrize("weights", [None, [0.5, 2.0, 4.0], [4.0, 2.0, 3.0]])
@pytest.mark.parametrize("ignored", [255, 1])
@pytest.mark.parametrize("given", [{}, dict(avg_factor=3.0), dict(reduction_override="sum")])
def test_weighted_losses_are_pytorchs(weights, ignored, given):
    torch.manual_seed(0)
    scores, label = torch.randn(2, 3, 4, 5), torch.randint(0, 3, (2, 4, 5))
    label[0, :2] = ignored
    loss = WeightedCrossEntropyLoss(class_weight=weights, loss_weight=0.4)
    if given.get("reduction_override"):
        with pytest.raises(ValueError, match="avg_factor can not be used") if weights else _fine():
            loss(scores, label, ignore_index=ignored, **given)
        return
    kind = weights and torch.tensor(weights)
    total = torch.nn.CrossEntropyLoss(kind, ignore_index=ignored, reduction="sum")(scores, label)
    seen = label != ignored
    factor = (kind[label[seen]].sum() if weights else label.numel()) if not given else 3.0
    found = loss(scores, label, ignore_index=ignored, **given)
    torch.testing.assert_close(found, 0.4 * total / factor)
    if ignored == 255:
        assert loss(scores, label, **given).equal(found)
    # A pixel's least weight, where none is seen, and the weight of each pixel.
    none = loss(scores, torch.full_like(label, ignored), ignore_index=ignored)
    assert none == 0
    halves = loss(scores, label, torch.full_like(scores[:, 0], 0.5), ignore_index=ignored, **given)
    torch.testing.assert_close(halves, found / 2)


def _fine():
    from contextlib import nullcontext

    return nullcontext()
