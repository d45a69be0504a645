import hashlib
import io
import json
import os
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from dense.demo.scenes import (
    MARKER,
    SHAPES,
    SceneOptions,
    draw_scene,
    polygons,
    read_marker,
    write_scenes,
)
from tests.support import load_tool, run_tool

SMALL = SceneOptions(train=12, val=5, size=96, seed=3)
ADE_SPLITS = {"train": "training", "val": "validation"}


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    out = tmp_path_factory.mktemp("scenes")
    assert write_scenes(out, SMALL)
    return out


def digests(folder):
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def load_coco(out, split):
    coco_api = pytest.importorskip("pycocotools.coco")
    return coco_api.COCO(str(out / "coco" / "annotations" / f"instances_{split}2017.json"))


def ade_mask(out, split, number):
    name = f"ADE_{split}_{number:08d}.png"
    with Image.open(
        out / "ADEChallengeData2016" / "annotations" / ADE_SPLITS[split] / name
    ) as mask:
        assert mask.mode == "L"
        return np.asarray(mask)


@pytest.mark.parametrize("split", ["train", "val"])
def test_coco_masks_are_ades_masks(scenes, split):
    coco = load_coco(scenes, split)
    assert len(coco.imgs) == getattr(SMALL, split)
    assert [c["name"] for c in coco.loadCats(sorted(coco.cats))] == list(SHAPES)
    for number, image_id in enumerate(sorted(coco.imgs), start=1):
        annotations = coco.loadAnns(coco.getAnnIds(imgIds=image_id))
        labels = np.ones((SMALL.size, SMALL.size), np.uint8)
        covered = np.zeros_like(labels)
        for annotation in annotations:
            mask = coco.annToMask(annotation)
            covered += mask
            labels[mask > 0] = annotation["category_id"] + 1
        assert 1 <= len(annotations) <= 3
        assert covered.max() == 1, "visible parts must not overlap"
        np.testing.assert_array_equal(labels, ade_mask(scenes, split, number))


@pytest.mark.parametrize("split", ["train", "val"])
def test_boxes_are_tight_and_areas_true(scenes, split):
    from pycocotools import mask as rle

    coco = load_coco(scenes, split)
    assert len({a["id"] for a in coco.anns.values()}) == len(coco.anns) > 0
    for annotation in coco.anns.values():
        encoded = coco.annToRLE(annotation)
        np.testing.assert_array_equal(annotation["bbox"], rle.toBbox(encoded))
        assert annotation["area"] == rle.area(encoded)
        assert annotation["iscrowd"] == 0


def test_both_layouts_hold_the_same_pictures(scenes):
    for split, long_name in ADE_SPLITS.items():
        coco = load_coco(scenes, split)
        for number, image_id in enumerate(sorted(coco.imgs), start=1):
            here = scenes / "coco" / f"{split}2017" / coco.imgs[image_id]["file_name"]
            there = scenes / "ADEChallengeData2016" / "images" / long_name
            there = there / f"ADE_{split}_{number:08d}.jpg"
            assert here.read_bytes() == there.read_bytes()
            with Image.open(here) as image:
                assert image.mode == "RGB"
                assert image.size == (coco.imgs[image_id]["width"], coco.imgs[image_id]["height"])


def test_shapes_stand_out_from_their_ground(scenes):
    coco = load_coco(scenes, "train")
    for number, image_id in enumerate(sorted(coco.imgs), start=1):
        path = scenes / "coco" / "train2017" / coco.imgs[image_id]["file_name"]
        with Image.open(path) as opened:
            image = np.asarray(opened).astype(float)
        labels = ade_mask(scenes, "train", number)
        ground = image[labels == 1]
        low, high = np.percentile(ground, [5, 95], axis=0)
        assert (high - low).max() < 30, "the ground is plain"
        for annotation in coco.loadAnns(coco.getAnnIds(imgIds=image_id)):
            shape = image[coco.annToMask(annotation) > 0]
            distance = np.linalg.norm(shape - ground.mean(axis=0), axis=1)
            assert np.median(distance) > 45
            assert (shape @ [0.299, 0.587, 0.114]).std() > 20, "the texture shows"


# Of scenes of 64x64 pixels by their seed: the shapes, their visible areas, and the sums of the
# image and of its labels, each pixel times a weight of its own, as they were written down.
DRAWN = {
    0: ((0,), (908,), 402.2, -0.1153),
    1: ((2, 0, 0), (229, 605, 566), -389.3, 22.8463),
    2: ((0, 0), (684, 595), 615.2, 9.5435),
    3: ((0, 0, 2), (527, 731, 387), -7205.8, -5.0016),
    4: ((1, 1, 0), (440, 395, 750), 1029.8, -8.1574),
    5: ((0, 0), (521, 643), -214.5, 4.0056),
    6: ((1, 1), (789, 581), -2926.5, -10.9838),
    7: ((0, 0, 1), (410, 402, 778), 610.0, -2.3664),
    8: ((2, 1), (238, 497), -3184.3, 10.2617),
    9: ((2, 2, 1), (377, 283, 646), -239.6, -5.5701),
    10: ((0, 0), (390, 829), 46696.6, 0.0769),
    11: ((0, 2, 1), (511, 212, 758), -5902.4, 1.2049),
}


def test_a_seed_gives_the_scenes_that_it_always_gave():
    """The demo's and the chain's figures are of these."""
    weights = np.sin(np.arange(64 * 64)).reshape(64, 64)
    for seed, (classes, areas, colours, labels) in DRAWN.items():
        scene = draw_scene(np.random.default_rng(seed), 64)
        assert scene.classes == classes
        assert tuple(mask.sum() for mask in scene.masks) == areas
        # A grey level more or less is rounding of the processor's.
        found = (scene.image * weights[..., None]).sum()
        assert (found, (scene.labels() * weights).sum()) == (
            pytest.approx(colours, abs=10),
            pytest.approx(labels, abs=1e-3),
        )


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [
        *(("train", 1, 999_999), ("val", 1, 999_999)),
        *(("size", 64, 2048), ("seed", 0, 2**32 - 1)),
    ],
)
def test_the_limits_of_each_option(name, low, high):
    assert {getattr(SceneOptions(**{name: value}), name) for value in (low, high)} == {low, high}
    for value in (low - 1, high + 1):
        with pytest.raises(ValueError, match=f"^{name} is {value}; .* between {low} and {high}$"):
            SceneOptions(**{name: value})


def test_the_files_say_what_they_are(scenes):
    for split, count, first in (("train", 12, 1), ("val", 5, 13)):
        path = scenes / f"coco/annotations/instances_{split}2017.json"
        content = json.loads(path.read_text())
        about = {"train": 12, "val": 5, "size": 96, "seed": 3}
        assert content["info"] == {"description": "Generated scenes", "version": "1"} | about
        assert content["categories"] == [
            {"id": number, "name": name, "supercategory": "shape"}
            for number, name in ((1, "disc"), (2, "box"), (3, "triangle"))
        ]
        assert content["licenses"] == []
        ids = range(first, first + count)
        assert content["images"] == [
            {"id": number, "file_name": f"{number:012d}.jpg", "height": 96, "width": 96}
            for number in ids
        ]
        of_image = {number: [] for number in ids}
        for annotation in content["annotations"]:
            of_image[annotation["image_id"]].append(annotation["id"])
        for number, found in of_image.items():
            assert found == [10 * number + index for index in range(len(found))]
        long_name = ADE_SPLITS[split]
        names = [f"ADE_{split}_{number:08d}" for number in range(1, count + 1)]
        for kind, suffix in (("images", ".jpg"), ("annotations", ".png")):
            folder = scenes / "ADEChallengeData2016" / kind / long_name
            assert sorted(os.listdir(folder)) == [name + suffix for name in names]
    with Image.open(scenes / "coco/train2017/000000000001.jpg") as photo:
        again = io.BytesIO()
        Image.new("RGB", (96, 96)).save(again, "JPEG", quality=92, subsampling=0)
        with Image.open(again) as other:
            assert photo.quantization == other.quantization and photo.layer == other.layer
    assert sorted(os.listdir(scenes)) == ["ADEChallengeData2016", "coco", MARKER]


def test_scenes_are_easy_by_their_make():
    """One to three shapes of like frequency, mostly visible, textured with two colours apart."""
    counts, kinds, noise = Counter(), Counter(), []
    for seed in range(40):
        scene = draw_scene(np.random.default_rng(seed), 64)
        counts[len(scene.classes)] += 1
        kinds.update(scene.classes)
        ground = scene.image[~scene.masks.any(0)].astype(float)
        noise.append(ground.std(0).mean())
    assert set(counts) == {1, 2, 3} and set(kinds) == {0, 1, 2}
    assert min(counts.values()) >= 6 and np.mean(noise) == pytest.approx(4, abs=0.1)


def test_same_options_give_the_same_bytes(scenes, tmp_path):
    write_scenes(tmp_path, SMALL)
    assert digests(tmp_path) == digests(scenes)


def test_another_seed_gives_other_scenes(scenes, tmp_path):
    write_scenes(tmp_path, SceneOptions(train=12, val=5, size=96, seed=4))
    mine, theirs = digests(tmp_path), digests(scenes)
    assert mine.keys() == theirs.keys()
    assert all(mine[name] != theirs[name] for name in mine)


def test_more_scenes_begin_with_the_same_ones(scenes, tmp_path):
    write_scenes(tmp_path, SceneOptions(train=13, val=5, size=96, seed=3))
    for number in range(1, 13):
        np.testing.assert_array_equal(
            ade_mask(scenes, "train", number), ade_mask(tmp_path, "train", number)
        )


def test_train_and_val_differ(scenes):
    folder = scenes / "coco"
    train, val = (set(digests(folder / f"{split}2017").values()) for split in ("train", "val"))
    assert not train & val


def test_polygons_give_back_any_mask_without_holes():
    from pycocotools import mask as rle
    from scipy.ndimage import binary_fill_holes

    rng = np.random.default_rng(0)
    for size in (1, 2, 7, 33):
        for density in (0.2, 0.5, 0.9):
            mask = binary_fill_holes(rng.random((size, size)) < density)
            mask[0, 0] = True
            decoded = rle.decode(rle.merge(rle.frPyObjects(polygons(mask), size, size)))
            np.testing.assert_array_equal(decoded.astype(bool), mask)


def test_rerun_writes_nothing_and_other_options_replace(tmp_path):
    options = SceneOptions(train=2, val=1, size=64)
    assert write_scenes(tmp_path, options)
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    assert not write_scenes(tmp_path, options)
    assert before == {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}

    assert write_scenes(tmp_path, SceneOptions(train=1, val=1, size=64))
    assert len(list((tmp_path / "coco" / "train2017").iterdir())) == 1


def test_what_the_tool_says(tmp_path, capsys):
    tool, out = load_tool("make_scenes"), tmp_path / "scenes"
    words = [str(out), *"--train 3 --val 2 --size 64 --seed 5".split()]
    for state in ("written to", "already in"):
        assert tool.main(words) == 0
        said = capsys.readouterr()
        assert said.out == f"3 training and 2 held-out scenes {state} {out}\n"
        bars = [f"{name} scenes: 100%" in said.err for name in ("train", "val")]
        assert bars == [state == "written to"] * 2
    marker = {"version": 1, "train": 3, "val": 2, "size": 64, "seed": 5, "complete": True}
    assert read_marker(out) == marker
    (out / MARKER).unlink()
    assert tool.main(words) == 2
    assert capsys.readouterr().err == (
        f"make_scenes: {out / 'coco'} is there and holds no scenes made by this tool; name another "
        "folder, or pass --overwrite to replace it\n"
    )
    assert tool.main([*words, "--overwrite"]) == 0 and read_marker(out) == marker
    assert tool.main([*words, "--train", "0"]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        "make_scenes: train is 0; it must be between 1 and 999999"
    )


@pytest.mark.slow
@pytest.mark.parametrize("folder", ["coco", "ADEChallengeData2016"])
def test_foreign_folders_are_kept_unless_told(tmp_path, folder):
    foreign = tmp_path / folder / "precious.txt"
    foreign.parent.mkdir()
    foreign.write_text("mine")
    result = run_tool("make_scenes", tmp_path, "--train", 1, "--val", 1, "--size", 64)
    assert result.returncode == 2
    assert f"{tmp_path / folder} is there" in result.stderr and "--overwrite" in result.stderr
    assert "Traceback" not in result.stderr
    assert foreign.read_text() == "mine"
    assert [p.name for p in tmp_path.iterdir()] == [folder]

    neighbour = tmp_path / "other" / "kept.txt"
    neighbour.parent.mkdir()
    neighbour.write_text("kept")
    result = run_tool(
        "make_scenes", tmp_path, "--train", 1, "--val", 1, "--size", 64, "--overwrite"
    )
    assert result.returncode == 0, result.stderr
    assert not foreign.exists() and neighbour.read_text() == "kept"


def test_a_link_is_replaced_and_its_folder_kept(tmp_path):
    theirs, out = tmp_path / "theirs", tmp_path / "out"
    theirs.mkdir()
    out.mkdir()
    (theirs / "precious.txt").write_text("mine")
    (out / "coco").symlink_to(theirs)
    (out / "ADEChallengeData2016").write_text("a file")
    assert write_scenes(out, SceneOptions(train=1, val=1, size=64), overwrite=True)
    assert not (out / "coco").is_symlink() and (out / "coco/val2017").is_dir()
    assert [path.name for path in theirs.iterdir()] == ["precious.txt"]


def test_a_kill_leaves_no_half_set(tmp_path):
    def killed(items, label):
        for item in items:
            if label == "val":
                raise KeyboardInterrupt
            yield item

    options = SceneOptions(train=2, val=1, size=64)
    with pytest.raises(KeyboardInterrupt):
        write_scenes(tmp_path, options, progress=killed)
    assert list(tmp_path.iterdir()) == []

    # Killed between the two renames: the marker says that what is there is ours, and not whole.
    write_scenes(tmp_path, options)
    marker = json.loads((tmp_path / MARKER).read_text())
    (tmp_path / MARKER).write_text(json.dumps({**marker, "complete": False}))
    os.rename(tmp_path / "ADEChallengeData2016", tmp_path / "gone")
    assert write_scenes(tmp_path, options)
    assert read_marker(tmp_path)["complete"]
    assert (tmp_path / "ADEChallengeData2016").is_dir()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--size", "20"], "size is 20; it must be between 64 and 2048"),
        (["--train", "0"], "train is 0; it must be between 1"),
        (["--val", "-1"], "val is -1"),
        (["--seed", "-5"], "seed is -5"),
    ],
)
def test_bad_options_are_named_before_anything_is_written(tmp_path, args, message):
    result = run_tool("make_scenes", tmp_path / "new", *args)
    assert result.returncode == 2
    assert message in result.stderr and "Traceback" not in result.stderr
    assert not (tmp_path / "new").exists()


@pytest.mark.slow
def test_a_file_as_target_is_refused(tmp_path):
    target = tmp_path / "file"
    target.write_text("mine")
    result = run_tool("make_scenes", target)
    assert result.returncode == 2 and f"{target} is a file" in result.stderr
    assert target.read_text() == "mine"
