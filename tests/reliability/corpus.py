"""Bad input for the six tools: every case ends in one line, and what was there stays as it was.

Each case spoils a copy of the :mod:`.world` and runs a tool on it. What is asked of it: an exit
status that is not 0, a last line that begins with the tool's name and has the words given here, no
traceback, no change to the runs that were there, and no code of a checkpoint executed.
"""

import json
import os
import pickle
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from tests.reliability.world import World, contents, copy_of, run_tool

EXECUTED = "EXECUTED"
LOG = "detector/log.txt"
NAN, INF = float("nan"), float("inf")
Spoil = Callable[[World], Sequence[str] | None]


@dataclass(frozen=True)
class Case:
    """A tool, a name, what to spoil, and a pattern of what must be said.

    ``spoil`` changes the files of a world and returns the tool's words, None for the usual ones.
    """

    tool: str
    name: str
    spoil: Spoil
    said: str


@dataclass(frozen=True)
class Outcome:
    """What a case came to; all but ``said`` should be False."""

    silent: bool
    traceback: bool
    unsaid: bool
    changed: bool
    executed: bool
    hung: bool
    said: str


def run(case: Case, world: World) -> Outcome:
    """Run a case on a copy of the world."""
    with tempfile.TemporaryDirectory() as folder:
        spoilt = copy_of(world, Path(folder, "world"))
        words = case.spoil(spoilt)
        words = spoilt.words(case.tool) if words is None else list(words)
        before = contents(spoilt["runs"])
        status, printed = run_tool(case.tool, words, cwd=spoilt.root)
        lines = [line for line in printed.strip().splitlines() if line.strip()]
        last = lines[-1] if lines else ""
        named = last.startswith(f"{case.tool}:") or f"{case.tool}.py: error:" in last
        return Outcome(
            silent=status == 0,
            traceback="Traceback (most recent call last)" in printed,
            unsaid=not (named and re.search(case.said, last)),
            changed=_changed(before, contents(spoilt["runs"])),
            executed=any(spoilt.root.rglob(EXECUTED)),
            hung=status is None,
            said=last.replace(str(spoilt.root), "WORLD")[:400],
        )


def _changed(before: dict[str, str], after: dict[str, str]) -> bool:
    """Whether a file of an existing run is gone or differs, its text log left out."""
    return any(after.get(name) != content for name, content in before.items() if name != LOG)


def cases() -> list[Case]:
    """All cases; a name is unique within its tool."""
    found = [
        *_annotations(),
        *_masks(),
        *_photos(),
        *_options(),
        *_checkpoints(),
        *_folders(),
        *_configs(),
    ]
    names = [(case.tool, case.name) for case in found]
    assert len(set(names)) == len(names), sorted(n for n in names if names.count(n) > 1)
    return found


# Annotations


def _json(world: World, change: Callable[[dict], object], split: str = "train") -> None:
    path = world[f"coco/{split}.json"]
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def _annotations() -> Iterator[Case]:
    def case(name: str, change: Callable[[dict], object], said: str, split: str = "train") -> Case:
        return Case("train_detector", name, lambda w: _json(w, change, split), said)

    def of(section: str, index: int = 0, **values) -> Callable[[dict], object]:
        return lambda content: content[section][index].update(values)

    def without(section: str, key: str) -> Callable[[dict], object]:
        return lambda content: content[section][0].pop(key)

    boxes = {
        "negative": [1, 1, -4, 5], "zero": [1, 1, 0, 5], "NaN": [1, 1, NAN, 5],
        "infinite": [1, 1, INF, 5], "strings": ["1", "1", "5", "5"], "short": [1, 2, 3],
        "long": [1, 2, 3, 4, 5], "none": None, "right of": [125, 1, 9, 5], "below": [1, 90, 9, 9],
        "left of": [-9, 1, 20, 5], "outside": [500, 500, 9, 9], "a text": "1 1 5 5",
        "nested": [[1, 1, 5, 5]], "empty": [], "bool": [1, 1, True, 5],
    }  # fmt: skip
    for name, box in boxes.items():
        yield case(f"box {name}", of("annotations", bbox=box), "train.json: 1 annotation.*bbox=")
    yield case("box missing", without("annotations", "bbox"), "bbox=None")
    polygons = {
        "flat": [[1, 1, 5, 5, 9, 9]], "two points": [[1, 1, 5, 5]], "odd": [[1, 1, 5, 5, 2, 8, 9]],
        "NaN": [[1, 1, 5, 5, NAN, 9]], "strings": [["1", "1", "5", "5", "2", "9"]],
        "outside": [[1, 1, 400, 1, 4, 9]], "not nested": [1, 1, 5, 5, 2, 9], "a text": "polygon",
        "RLE of another size": {"size": [128, 96], "counts": [12288]},
        "RLE of another sum": {"size": [96, 128], "counts": [100]},
        "RLE of negative runs": {"size": [96, 128], "counts": [12388, -100]},
        "RLE cut off": {"size": [96, 128], "counts": "PPY"},
        "RLE of a long run": {"size": [96, 128], "counts": "oooooooooo1"},
        "RLE without counts": {"size": [96, 128]}, "RLE without size": {"counts": [12288]},
    }  # fmt: skip
    for name, value in polygons.items():
        change = of("annotations", segmentation=value)
        yield case(f"segmentation {name}", change, "annotation 1: segmentation")
    yield case("no segmentation", without("annotations", "segmentation"), "have no segmentation")
    yield case("annotation id twice", of("annotations", id=2), "id=2 is there 2 times")
    yield case("annotation without id", without("annotations", "id"), "it has no id")
    yield case("annotation id a text", of("annotations", id="x"), "ids are mixed")
    yield case("annotation of no image", of("annotations", image_id=77), "image_id=77")
    yield case("annotation of a text", of("annotations", image_id="0"), "image_id='0'")
    yield case("annotation of no category", of("annotations", category_id=77), "category_id=77")
    yield case("iscrowd 7", of("annotations", iscrowd=7), "iscrowd=7")
    yield case("annotation no object", lambda c: c["annotations"].append(7), "7 is not an object")
    yield case("image id twice", of("images", id=1), "id=1 is there 2 times")
    yield case("image without id", without("images", "id"), "it has no id")
    yield case("image id a text", of("images", id="0"), "ids are mixed")
    yield case("image without name", without("images", "file_name"), "file_name=None")
    yield case("image absent", of("images", file_name="gone.png"), "there is no .*gone.png")
    yield case("image without width", without("images", "width"), "width=None")
    yield case("image of width 0", of("images", width=0), "width=0")
    yield case("image of another size", of("images", width=96, height=128), "is 128x96")
    yield case("image width a text", of("images", width="128"), "width='128'")
    yield case("no images", lambda c: c["images"].clear(), "lists no image")
    yield case("no annotations", lambda c: c["annotations"].clear(), "no annotation to use")
    yield case("no categories", lambda c: c["categories"].clear(), "lists no category")
    yield case("category twice", of("categories", name="block"), "several categories named block")
    yield case("category without id", without("categories", "id"), "category has no 'id'")
    yield case("category without name", without("categories", "name"), "category has no 'name'")
    yield case("categories absent", lambda c: c.pop("categories"), "no list 'categories'")
    yield case("images an object", lambda c: c.update(images={}), "no list 'images'")
    yield case("faulty validation", of("annotations", bbox=[1, 1, 0, 1]), "val.json", "val")
    texts = {"not JSON": "{no", "empty": "", "a list": "[]", "binary": "\x00\x01"}
    for name, text in texts.items():
        yield Case(
            "train_detector",
            f"JSON {name}",
            lambda w, text=text: _write(w["coco/train.json"], text),
            "train.json",
        )


def _write(path: Path, text: str | bytes) -> None:
    path.unlink(missing_ok=True)
    path.write_bytes(text.encode() if isinstance(text, str) else text)


# Masks and photos


def _image(path: Path, pixels: np.ndarray, **options) -> None:
    path.unlink(missing_ok=True)
    Image.fromarray(pixels).save(path, **options)


def _masks() -> Iterator[Case]:
    def case(name: str, spoil: Callable[[Path], object], said: str) -> Case:
        return Case("train_segmentor", name, lambda w: spoil(w["seg"]) and None, said)

    def mask(pixels: np.ndarray) -> Callable[[Path], object]:
        return lambda at: _image(at / "masks/train/0.png", pixels)

    grey = np.zeros((64, 80), np.uint8)
    yield case("mask of a value too high", mask(grey + 3), "0.png holds 3: 3 classes are 0 to 2")
    yield case("mask of an ignore index", mask(grey + 254), "--ignore-index 254")
    yield case("mask of another size", mask(grey[:60]), "0.png is 80x60, its image 80x64")
    yield case("mask turned", mask(grey.T.copy()), "0.png is 64x80")
    yield case("mask in colour", mask(np.zeros((64, 80, 3), np.uint8)), "0.png is RGB")
    yield case("mask with alpha", mask(np.zeros((64, 80, 4), np.uint8)), "0.png is RGBA")
    yield case("mask of 16 bits", mask(np.full((64, 80), 300, np.uint16)), "0.png holds 300")
    yield case("mask no image", lambda at: _write(at / "masks/train/0.png", "x"), "cannot be read")
    yield case("mask empty", lambda at: _write(at / "masks/train/0.png", ""), "cannot be read")
    yield case("mask cut off", lambda at: _cut(at / "masks/train/0.png"), "0.png cannot be read")
    yield case("mask absent", lambda at: (at / "masks/train/0.png").unlink(), "has no mask")
    yield case("last mask bad", lambda at: _image(at / "masks/val/1.png", grey + 9), "holds 9")
    yield case(
        "all ignored",
        lambda at: [_image(at / f"masks/train/{n}.png", grey + 255) for n in range(4)],
        "all pixels of the 4 masks",
    )
    yield case(
        "two images of one mask",
        lambda at: shutil.copy(at / "images/train/0.png", at / "images/train/0.jpg"),
        "share the mask",
    )
    yield case("no images", lambda at: shutil.rmtree(at / "images/train"), "no folder")
    yield case("no masks", lambda at: shutil.rmtree(at / "masks/train"), "no folder")
    yield case("empty folder", lambda at: _emptied(at / "images/train"), "no images in")
    yield case(
        "a folder a file", lambda at: _emptied(at / "masks/val", False), "no folder .*masks/val"
    )


def _cut(path: Path, share: float = 0.5) -> None:
    content = path.read_bytes()
    _write(path, content[: int(len(content) * share)])


def _emptied(folder: Path, again: bool = True) -> None:
    shutil.rmtree(folder)
    folder.mkdir() if again else folder.write_text("")


def _photos() -> Iterator[Case]:
    kinds = {
        "text": lambda path: _write(path, "no image"),
        "empty": lambda path: _write(path, ""),
        "float": lambda path: _float_tiff(path),
    }
    for name, spoil in kinds.items():
        yield Case(
            "train_segmentor",
            f"photos {name}",
            lambda w, s=spoil: [s(path) for path in w["seg/images/train"].glob("*.png")] and None,
            r"\d.png",
        )
        yield Case(
            "train_detector",
            f"photo {name}",
            lambda w, s=spoil: s(w["coco/train/0.png"]),
            "0.png",
        )
        yield Case("predict", f"photo {name}", lambda w, s=spoil: _all_photos(w, s), "unreadable")
        yield Case("pretrain", f"photos {name}", lambda w, s=spoil: _all_photos(w, s), "cannot be")
    yield Case(
        "train_segmentor",
        "validation photo cut off",
        lambda w: _cut(w["seg/images/val/0.png"]),
        "0.png",
    )
    yield Case("predict", "photos cut off", lambda w: _all_photos(w, _cut), "unreadable")
    yield Case("pretrain", "photos cut off", lambda w: _all_photos(w, _cut), "cannot be read")
    yield Case("predict", "a bomb", lambda w: _all_photos(w, _bomb), "unreadable")
    yield Case("predict", "no such photo", lambda w: _with(w, "predict", 0, "gone.jpg"), "gone.jpg")
    yield Case("predict", "empty folder", lambda w: _emptied(w["photos/val/n01"]), "n01")
    yield Case(
        "pretrain", "a class too few", lambda w: shutil.rmtree(w["photos/val/n01"]), "2 classes"
    )
    yield Case("pretrain", "no train", lambda w: shutil.rmtree(w["photos/train"]), "no images at")
    yield Case("pretrain", "no val", lambda w: shutil.rmtree(w["photos/val"]), "no images at")
    yield Case("pretrain", "empty train", lambda w: _emptied(w["photos/train"]), "no images in")
    yield Case("pretrain", "train a file", lambda w: _emptied(w["photos/train"], False), "train")
    yield Case(
        "pretrain",
        "empty class",
        lambda w: _emptied(w["photos/train/n02"]),
        "2 classes|training has",
    )


def _float_tiff(path: Path) -> None:
    path.unlink()
    Image.fromarray(np.zeros((64, 80), np.float32)).save(path, format="TIFF")


def _bomb(path: Path) -> None:
    """A PNG of a megabyte that says it has 40000x40000 pixels."""
    path.unlink()
    Image.new("1", (40000, 40000)).save(path, format="PNG")


def _all_photos(world: World, spoil: Callable[[Path], object]) -> None:
    for path in world["photos"].rglob("*.jpg"):
        if spoil is not _bomb or path.parent == world["photos/val/n01"]:
            spoil(path)


# Options


def _with(world: World, tool: str, index: int, word: str) -> list[str]:
    words = world.words(tool)
    words[index] = word
    return words


def _plus(tool: str, *more: str) -> Spoil:
    """Words in front: those of ``--cfg-options`` take all that follow."""
    return lambda world: [*more, *world.words(tool)]


def _cfg(tool: str, *options: str) -> Spoil:
    return lambda world: [*world.words(tool), *options]


def _options() -> Iterator[Case]:
    mmengine = {
        "train_cfg.max_iters=many" : "many", "train_cfg.max_iters=-3": "-3",
        "train_cfg.max_iter=3": "max_iters", "train_cgf.max_iters=3": "train_cfg",
        "optim_wrapper.optimizer.lr=fast": "fast", "optim_wrapper.optimizer.lr=-0.1": "-0.1",
        "optim_wrapper.optimizer.rl=0.1": "lr", "train_dataloader.batch_size=0": "batch_size",
        "train_dataloader.batch_size=two": "two", "train_dataloader.num_workers=-1": "num_workers",
        "train_dataloader.workers=1": "num_workers", "model=swin": "model",
        "nonsense=1": "nonsense",
        "model.backbon.type=swin_nano": "backbone", "train_cfg=3": "train_cfg",
        "default_hooks.checkpoint.intervall=3": "interval", "param_scheduler.9.end=3": "0 to",
        "param_scheduler.end=3": "param_scheduler", "train_dataloader.batch_size.x=3": "below",
    }  # fmt: skip
    epochs = {
        "train_cfg.max_epochs=many": "many", "train_cfg.max_epochs=-3": "-3",
        "train_cfg.max_epoch=3": "max_epochs", "optim_wrapper.optimizer.lr=fast": "fast",
        "train_dataloader.batch_size=0": "batch_size", "model.naem=swin_nano": "naem",
        "model.name=swin_nanno": "swin_nanno", "train_cfg.val_interval=0": "val_interval",
        "nonsense=1": "nonsense", "train_dataloader.num_workers=-1": "num_workers",
        "model.img_size=big": "big", "total_batch_size=0": "total_batch_size",
    }  # fmt: skip
    lazy = {
        "train.max_iter=many": "many", "train.max_iter=-3": "-3", "train.maxiter=3": "max_iter",
        "optimizer.lr=fast": "fast", "optimizer.lr=-1": "-1", "trian.max_iter=3": "train",
        "dataloader.train.total_batch_size=0": "total_batch_size", "nonsense": "key=value",
        "dataloader.train.num_workers=-1": "num_workers", "model.nonsense=1": "nonsense",
        "dataloader.train.total_batch_size=two": "two", "train.eval_period=-5": "eval_period",
        "model.backbone.bottom_up.name=swin_nanno": "swin_nanno",
        "train.log_period=0": "log_period",
    }  # fmt: skip
    for tool, table in (
        ("train_segmentor", mmengine), ("pretrain", epochs), ("train_detector", lazy),
    ):  # fmt: skip
        for option, said in table.items():
            yield Case(tool, f"option {option}", _cfg(tool, option), said)
    flags = {
        ("train_detector", "--num-gpus", "-1"): "--num-gpus -1",
        ("train_detector", "--num-gpus", "99"): "--num-gpus 99",
        ("train_detector", "--num-gpus", "many"): "many",
        ("train_detector", "--machine-rank", "5"): "--machine-rank 5",
        ("train_detector", "--num-machines", "0"): "--num-machines 0",
        ("train_detector", "--num-machines", "2"): "--dist-url",
        ("train_detector", "--num-processes", "3"): "cannot be shared by 3 processes",
        ("train_detector", "--num-processes", "0"): "--num-processes 0",
        ("train_detector", "--classes", ""): "name is empty",
        ("train_detector", "--classes", "bar,unicorn"): "unicorn",
        ("train_detector", "--classes", "bar,bar"): "twice",
        ("train_detector", "--eval-only"): "train.init_checkpoint",
        ("train_detector", "--ablation", "dw_con"): "dw_conv",
        ("train_detector", "--nonsense"): "nonsense",
        ("train_detector", "--resume", "--overwrite"): "name one",
        ("train_segmentor", "--classes", ""): "classes",
        ("train_segmentor", "--classes", "one"): "2 or more",
        ("train_segmentor", "--classes", "a,a,b"): "twice",
        ("train_segmentor", "--classes", "a,,b"): "empty",
        ("train_segmentor", "--ignore-index", "x"): "ignore-index",
        ("train_segmentor", "--short-side", "5"): "32 or more",
        ("train_segmentor", "--short-side", "-64"): "32 or more",
        ("train_segmentor", "--launcher", "x"): "launcher",
        ("train_segmentor", "--ablation", "volo_d1"): "no backbone",
        ("train_segmentor", "--nonsense"): "nonsense",
        ("train_segmentor", "--resume", "--overwrite"): "name one",
        ("pretrain", "--num-classes", "0"): "1 or more",
        ("pretrain", "--num-classes", "7"): "3 classes",
        ("pretrain", "--batch-size", "-1"): "1 or more",
        ("pretrain", "--accumulate", "0"): "1 or more",
        ("pretrain", "--ema", "2"): "between 0 and 1",
        ("pretrain", "--init", "gone.pth"): "gone.pth",
        ("pretrain", "--init", "no_such_tag"): "no_such_tag",
        ("pretrain", "--eval-only", "gone.pth"): "gone.pth",
        ("pretrain", "--real-labels", "gone.json"): "gone.json",
        ("pretrain", "--resume", "--overwrite"): "name one",
        ("predict", "--score-thr", "2"): "between 0 and 1",
        ("predict", "--score-thr", "x"): "score-thr",
        ("predict", "--device", "tpu"): "cpu, cuda",
        ("predict", "--device", "cuda:9"): "cuda:9",
        ("predict", "--resume", "--overwrite"): "name one",
        ("predict", "--config", "gone.py"): "gone.py",
        ("publish_checkpoint", "--weights", "x"): "weights",
        ("publish_checkpoint", "--config", "gone.py"): "gone.py",
        ("test_segmentor", "--launcher", "x"): "launcher",
        ("test_segmentor", "--data-root", "gone"): "gone",
    }  # fmt: skip
    for (tool, *words), said in flags.items():
        # argparse takes the last of a flag; behind --cfg-options none may follow.
        behind = tool in ("train_detector", "predict", "publish_checkpoint", "test_segmentor")
        if behind:
            spoil = _cfg(tool, *words)
        else:
            spoil = _replaced(tool, *words)
        yield Case(tool, f"option {' '.join(words)}", spoil, said)


def _replaced(tool: str, *words: str) -> Spoil:
    """The words before ``--cfg-options``, after the others."""

    def spoil(world: World) -> list[str]:
        usual = world.words(tool)
        at = usual.index("--cfg-options")
        return [*usual[:at], *words, *usual[at:]]

    return spoil


# Checkpoints


class _Touch:
    def __reduce__(self):
        return os.system, (f"touch {EXECUTED}",)


def _spoilt_checkpoint(path: Path, how: str) -> None:
    if how == "absent":
        path.unlink()
    elif how == "cut off":
        _cut(path)
    elif how == "empty":
        _write(path, "")
    elif how == "text":
        _write(path, "no checkpoint")
    elif how == "pickle":
        _write(path, pickle.dumps({"model": _Touch(), "state_dict": _Touch()}))
    elif how == "code":
        path.unlink()
        torch.save({"model": _Touch(), "state_dict": _Touch(), "meta": _Touch()}, path)
    else:
        content = torch.load(path, weights_only=False)
        weights = content["model" if "model" in content else "state_dict"]
        name = next(n for n in weights if n.endswith("stages.0.blocks.0.mixer.conv.weight"))
        if how in ("NaN", "infinite"):
            weights[name].view(-1)[0] = NAN if how == "NaN" else INF
        elif how == "a weight less":
            del weights[name]
        elif how == "another shape":
            weights[name] = torch.zeros(3, 3)
        elif how == "of another network":
            weights.clear()
            weights["layer.weight"] = torch.zeros(3, 3)
        path.unlink()
        torch.save(content, path)


_HOW = (
    *("absent", "cut off", "empty", "text", "pickle", "code", "NaN", "infinite"),
    *("a weight less", "another shape", "of another network"),
)


def _checkpoints() -> Iterator[Case]:
    uses = {
        "train_detector": ("runs/detector/model_final.pth", ("train.init_checkpoint={}",)),
        "train_segmentor": ("runs/segmentor/iter_1.pth", ("model.backbone.init={}",)),
        "pretrain": ("runs/classifier/epoch_1.pth", ("model.init={}",)),
    }
    for how in _HOW:
        for tool, (file, words) in uses.items():
            if how == "a weight less" and tool != "train_detector":
                continue  # A classifier's or a head's first weight may be missing.

            def spoil(world: World, tool=tool, file=file, words=words, how=how) -> list[str]:
                _spoilt_checkpoint(world[file], how)
                return [*world.words(tool), *(word.format(world[file]) for word in words)]

            name = Path(file).name
            yield Case(tool, f"initial checkpoint {how}", spoil, name)
        for tool, file in (
            ("test_segmentor", "runs/segmentor/iter_1.pth"),
            ("predict", "runs/classifier/epoch_1.pth"),
            ("publish_checkpoint", "runs/classifier/epoch_1.pth"),
        ):
            yield Case(
                tool,
                f"checkpoint {how}",
                lambda w, file=file, how=how: _spoilt_checkpoint(w[file], how),
                Path(file).name,
            )
        if how in ("a weight less", "absent"):
            continue
        for tool, run_ in (("train_detector", "detector"), ("train_segmentor", "segmentor"),
                           ("pretrain", "classifier")):  # fmt: skip

            def spoil(world: World, tool=tool, run_=run_, how=how) -> list[str]:
                folder = world["runs"] / run_
                for path in folder.glob("*.pth"):
                    if how == "of another network" and "model_0" in path.name:
                        path.unlink()
                    elif path.name.startswith("best"):
                        path.unlink()
                    else:
                        _spoilt_checkpoint(path, how)
                return _resumed(world, tool, run_)

            yield Case(tool, f"resumed checkpoint {how}", spoil, r"\.pth")


def _resumed(world: World, tool: str, run_: str, *more: str) -> list[str]:
    words = [w.replace(str(world["new"]), str(world["runs"] / run_)) for w in world.words(tool)]
    words = [w.replace("max_iter=1", "max_iter=3").replace("max_iters=1", "max_iters=3")
             .replace("max_epochs=1", "max_epochs=3") for w in words]  # fmt: skip
    at = words.index("--cfg-options") if "--cfg-options" in words else len(words)
    return [*words[:at], "--resume", *more, *words[at:]]


# Folders and configs


def _folders() -> Iterator[Case]:
    runs_ = {"train_detector": "detector", "train_segmentor": "segmentor", "pretrain": "classifier"}
    for tool, run_ in runs_.items():

        def into(world: World, tool=tool, run_=run_) -> list[str]:
            words = _resumed(world, tool, run_)
            words.remove("--resume")
            return words

        yield Case(tool, "into a folder with a training", into, "holds a training.*--overwrite")

        def a_file(world: World) -> None:
            world["new"].write_text("")

        yield Case(tool, "into a file", a_file, "new is a file")

        def below_a_file(world: World, tool=tool) -> list[str]:
            world["file"].write_text("")
            return [w.replace(str(world["new"]), str(world["file/new"])) for w in world.words(tool)]

        yield Case(tool, "below a file", below_a_file, "file")

    def classes(world: World) -> list[str]:
        return _resumed(world, "train_detector", "detector", "--classes", "bar,block")

    yield Case("train_detector", "resumed with other classes", classes, "block,bar.*bar,block")

    def names(world: World) -> list[str]:
        return _resumed(world, "train_segmentor", "segmentor", "--classes", "a,b,c")

    yield Case("train_segmentor", "resumed with other classes", names, "ground,box,bar.*a,b,c")
    for tool, run_, option in (
        ("train_detector", "detector", "model.backbone.bottom_up.name=swin_nano"),
        ("train_segmentor", "segmentor", "model.backbone.type=swin_nano"),
        ("pretrain", "classifier", "model.name=swin_nano"),
    ):

        def other(world: World, tool=tool, run_=run_, option=option) -> list[str]:
            return [*_resumed(world, tool, run_), option]

        yield Case(tool, "resumed with another backbone", other, r"\.pth")
    yield Case(
        "predict",
        "results are there",
        lambda w: _write_result(w["predicted/classes"]),
        "--resume|--overwrite",
    )
    yield Case("predict", "out a file", lambda w: _write(w["predicted"], ""), "is a file")
    yield Case(
        "publish_checkpoint", "out a file", lambda w: _write(w["published"], ""), "published"
    )


def _write_result(folder: Path) -> None:
    folder.mkdir(parents=True)
    for number in range(2):
        (folder / f"{number}.json").write_text("{}")


def _configs() -> Iterator[Case]:
    texts = {
        "not Python": "model = (", "that raises": "1 / 0", "empty": "", "of nothing": "a = 1\n",
    }  # fmt: skip
    for tool, index in (("train_segmentor", 0), ("pretrain", 0), ("train_detector", 1),
                        ("test_segmentor", 0)):  # fmt: skip
        for name, text in texts.items():

            def spoil(world: World, tool=tool, index=index, text=text) -> list[str]:
                _write(world["mine.py"], text)
                return _with(world, tool, index, str(world["mine.py"]))

            yield Case(tool, f"config {name}", spoil, "mine.py|no config|has no")
        yield Case(
            tool,
            "config absent",
            lambda w, tool=tool, index=index: _with(w, tool, index, "gone.py"),
            "gone.py",
        )
    from tests.reliability.world import NANO

    others = {
        "train_segmentor": (0, "classifier"), "pretrain": (0, "segmentor"),
        "train_detector": (1, "segmentor"), "test_segmentor": (0, "classifier"),
    }  # fmt: skip
    for tool, (index, kind) in others.items():
        yield Case(
            tool,
            "config of another task",
            lambda w, tool=tool, index=index, kind=kind: _with(w, tool, index, str(NANO[kind])),
            "",
        )
    misspelt = {
        "optim_wraper = dict(optimizer=dict(lr=1.0))": "optim_wrapper",
        "train_cfg = dict(max_itres=3)": "max_iters|max_epochs",
        "train_dataloader = dict(batchsize=3)": "batch_size|batchsize",
        "default_hooks = dict(checkpoint=dict(intervall=3))": "interval",
        "optim_wrapper = dict(optimizer=dict(lrr=3))": "lr",
        "optim_wrapper = dict(optimizer=dict(lr=-3))": "lr=-3",
    }
    for tool, kind in (("train_segmentor", "segmentor"), ("pretrain", "classifier")):
        for text, said in misspelt.items():

            def spoil(world: World, tool=tool, kind=kind, text=text) -> list[str]:
                _write(world["mine.py"], f"_base_ = {str(NANO[kind])!r}\n{text}\n")
                return _with(world, tool, 0, str(world["mine.py"]))

            yield Case(tool, f"config with {text}", spoil, said)
