"""tools/export.py without a network: what is written by what, compared on what, and kept."""

import os
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from dense.demo.scenes import draw_scene
from dense.export import checking, detections, files, numbers, sources
from tests.support import load_tool

PHOTOS = 20


@pytest.fixture
def tool():
    return load_tool("export")


@pytest.fixture
def made(tool, monkeypatch, tmp_path):
    """What the tool called, of stand-ins for all that takes long.

    ``missed`` is why a comparison fails, ``task`` the network's.
    """
    calls, state = [], SimpleNamespace(missed=None, task="segmentation")
    network = object()

    def read_source(checkpoint, config, part):
        calls.append(("read", checkpoint, config, part))
        about = {"task": state.task, "mean": [0, 0, 0], "std": [1, 1, 1], "channels": "RGB"}
        return sources.Source(network, about, (4, 6))

    def put(path, size):
        path.write_bytes(b"x" * size)
        return path

    def write(given, about, path):
        assert given is network
        calls.append(("write", path.name, dict(about)))
        if path.suffix == ".xml":
            return [put(path, 1000), put(path.with_suffix(".bin"), 1_250_000)]
        return [put(path, 1_250_000)]

    def to_openvino(graph, path, precision=None):
        assert graph.is_file()
        calls.append(("to_openvino", graph.name, path.name, precision))
        return [put(path, 1000), put(path.with_suffix(".bin"), 250_000)]

    def quantise_within(graph, out, batches, cosine_of, bar):
        assert graph.is_file()
        shapes = {batch.shape for batch in batches}
        calls.append(("quantise", graph.name, out.name, len(batches), shapes, cosine_of, bar))
        put(out, 300_000)
        return SimpleNamespace(lines=lambda: ["int8: some", "others"])

    class Found:
        def lines(self, engine):
            return [f"beside {engine}:", "  like it"]

        def missed(self, precision):
            return state.missed and f"{state.missed} of {precision}"

    def compare(of, source, run, photos, **more):
        calls.append((of, source.about["task"], run, len(photos), more))
        return Found()

    monkeypatch.setattr(tool, "require_engine", lambda kind: calls.append(("engine", kind)))
    monkeypatch.setattr(sources, "read_source", read_source)
    monkeypatch.setattr(files, "write", write)
    monkeypatch.setattr(files, "to_openvino", to_openvino)
    monkeypatch.setattr(files, "Runner", lambda path, threads: ("run", path.name, threads))
    monkeypatch.setattr(numbers, "quantise_within", quantise_within)
    monkeypatch.setattr(checking, "cosines_with", lambda source, photos: ("cosines", len(photos)))
    monkeypatch.setattr(checking, "compare", partial(compare, "compare"))
    monkeypatch.setattr(detections, "compare_detections", partial(compare, "detections"))
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(PHOTOS):
        Image.new("RGB", (9, 7), (number, 0, 0)).save(folder / f"{number:02d}.png")
    state.calls, state.words = calls, ["--photos", str(folder)]
    (tmp_path / "run").mkdir()
    (tmp_path / "run/epoch_3.pth").touch()
    state.run = tmp_path / "run"
    return state


SUFFIXES = {"onnx": ".onnx", "openvino": ".xml"}
SUFFIXES |= {"torch-export": ".pt2", "aotinductor": ".aoti.pt2"}


@pytest.mark.parametrize("kind", SUFFIXES)
def test_float32(kind, tool, made, capsys):
    checkpoint = str(made.run / "epoch_3.pth")
    assert tool.main([checkpoint, "--to", kind, *made.words]) == 0
    name = f"epoch_3{SUFFIXES[kind]}"
    about = {"task": "segmentation", "mean": [0, 0, 0], "std": [1, 1, 1], "channels": "RGB"}
    run = ("run", name, torch.get_num_threads())
    assert made.calls == [
        ("engine", kind),
        ("read", checkpoint, None, "whole"),
        ("write", name, about | {"format": kind, "precision": "float32"}),
        ("compare", "segmentation", run, 2, {"smallest": True}),
    ]
    weights = {"openvino": ["epoch_3.bin"]}.get(kind, [])
    assert sorted(os.listdir(made.run)) == sorted(["epoch_3.pth", name, *weights])
    size = "1.3 MB" if kind == "openvino" else "1.2 MB"
    assert capsys.readouterr().out.splitlines() == [
        *(f"beside {kind}:", "  like it"),
        f"{made.run / name}: segmentation, {kind}, {size}",
    ]


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_smaller_weights(precision, tool, made):
    checkpoint = str(made.run / "epoch_3.pth")
    assert tool.main([checkpoint, "--to", "openvino", f"--{precision}", *made.words]) == 0
    assert made.calls[2][:2] == ("write", ".float32.onnx")
    assert made.calls[2][2]["precision"] == precision
    run = ("run", "epoch_3.xml", torch.get_num_threads())
    assert made.calls[3:] == [
        ("to_openvino", ".float32.onnx", "epoch_3.xml", precision),
        ("compare", "segmentation", run, 2, {"smallest": False}),
    ]
    assert sorted(os.listdir(made.run)) == ["epoch_3.bin", "epoch_3.pth", "epoch_3.xml"]


@pytest.mark.parametrize("kind", ["onnx", "openvino"])
def test_int8(kind, tool, made, capsys):
    """Calibrated on sixteen photos, compared on two of them."""
    assert tool.main([str(made.run), "--to", kind, "--int8", *made.words]) == 0
    name = f"run{SUFFIXES[kind]}"
    more = [("to_openvino", "run.onnx", name, None)] if kind == "openvino" else []
    assert made.calls[2][:2] == ("write", ".float32.onnx")
    assert made.calls[3:-1] == [
        ("quantise", ".float32.onnx", "run.onnx", 16, {(1, 3, 4, 6)}, ("cosines", 2), 0.99),
        *more,
    ]
    assert made.calls[-1][2][1] == name and made.calls[-1][3:] == (2, {"smallest": False})
    weights = ["run.bin"] if kind == "openvino" else []
    assert sorted(os.listdir(made.run)) == sorted(["epoch_3.pth", name, *weights])
    assert capsys.readouterr().out.startswith("int8: some\nothers\nbeside ")


def test_detectors_are_compared_by_their_detections(tool, made, capsys):
    made.task = "detection"
    for kind in ("onnx", "openvino"):
        assert tool.main([str(made.run), "--to", kind, *made.words]) == 0
        assert made.calls[-1][0] == "detections" and made.calls[-1][3:] == (2, {})
    capsys.readouterr()
    for words in (["torch-export"], ["aotinductor"], ["onnx", "--int8"], ["openvino", "--fp16"]):
        count = len(made.calls)
        assert tool.main([str(made.run), "--to", *words, *made.words]) == 2
        said = "export: detectors are written in float32 as onnx or openvino\n"
        assert capsys.readouterr().err == said
        assert [call[0] for call in made.calls[count:]] == ["engine", "read"]


def test_what_misses_is_not_kept(tool, made, capsys):
    made.missed = "an error"
    words = [str(made.run), "--to", "onnx", *made.words]
    assert tool.main(words) == 1
    said = capsys.readouterr()
    assert said.err == "export: an error of float32: nothing is kept\n"
    assert said.out == "beside onnx:\n  like it\n"
    assert os.listdir(made.run) == ["epoch_3.pth"]


def test_where_it_is_written(tool, made, tmp_path, monkeypatch, capsys):
    """Beside the checkpoint, in the folder of a run by its own name, or where one says."""
    monkeypatch.chdir(made.run)
    for given, part, expected in (
        (".", "whole", "run.onnx"),
        (".", "backbone", "run-backbone.onnx"),
        ("epoch_3.pth", "backbone", "epoch_3-backbone.onnx"),
    ):
        assert tool.main([given, "--to", "onnx", "--part", part, *made.words]) == 0
        assert (made.run / expected).is_file()
        assert made.calls[-3] == ("read", given, None, part)
    out = tmp_path / "new/folder/mine.xml"
    words = ["epoch_3.pth", "--to", "openvino", "--out", str(out), "--config", "own.py"]
    assert tool.main([*words, *made.words]) == 0
    assert made.calls[-3] == ("read", "epoch_3.pth", "own.py", "whole")
    assert sorted(os.listdir(out.parent)) == ["mine.bin", "mine.xml"]
    assert capsys.readouterr().out.endswith(f"{out}: segmentation, openvino, 1.3 MB\n")


def test_the_file_that_names_the_others_comes_last(tool, made, monkeypatch):
    moved, replace = [], os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: moved.append(Path(b).name) or replace(a, b))
    assert tool.main([str(made.run), "--to", "openvino", *made.words]) == 0
    assert moved == ["run.bin", "run.xml"]


def test_the_scratch_folder_is_on_the_disk_of_the_file(tool, made, monkeypatch):
    """So that nothing is copied, and what is unfinished is hidden."""
    seen, write = [], files.write

    def written(network, about, path):
        seen.append(path.parent)
        return write(network, about, path)

    monkeypatch.setattr(files, "write", written)
    assert tool.main([str(made.run), "--to", "onnx", *made.words]) == 0
    assert seen[0].parent == made.run and seen[0].name.startswith(".export-")


@pytest.mark.parametrize("error", [ValueError, ImportError, OSError, RuntimeError])
def test_what_frameworks_raise_is_one_line(tool, made, error, monkeypatch, capsys):
    def read_source(*_):
        raise error("a long\n    reason")

    monkeypatch.setattr(sources, "read_source", read_source)
    assert tool.main([str(made.run), "--to", "onnx", *made.words]) == 2
    assert capsys.readouterr().err == "export: a long reason\n"


# Photos


def colours(photos) -> list[int]:
    return [int(photo[0, 0, 0]) for photo in photos]


def test_which_photos(tool, made, tmp_path, monkeypatch):
    """Those of a folder that is named, then of the sample data, then drawn ones."""
    monkeypatch.delenv("DENSE_SAMPLE_DATA", raising=False)
    for ours, seed in zip(tool.find_photos(None, 2), range(2), strict=True):
        np.testing.assert_array_equal(ours, draw_scene(np.random.default_rng(seed), 256).image)
    sample = tmp_path / "sample"
    sample.mkdir()
    monkeypatch.setenv("DENSE_SAMPLE_DATA", str(sample))
    assert tool.find_photos(None, 1)[0].shape == (256, 256, 3)
    # Label maps are images too.
    for number, name in ((3, "annotations/validation"), (2, "images/validation")):
        folder = sample / "ADEChallengeData2016" / name
        folder.mkdir(parents=True)
        Image.new("RGB", (9, 7), (number, 0, 0)).save(folder / "a.png")
    assert colours(tool.find_photos(None, 3)) == [2]
    (sample / "imagenet/val").mkdir(parents=True)
    Image.new("RGB", (9, 7), (1, 0, 0)).save(sample / "imagenet/val/a.png")
    assert colours(tool.find_photos(None, 3)) == [1]
    assert colours(tool.find_photos(made.words[1], 3)) == [0, 1, 2]
    with pytest.raises(files.ExportError, match="--photos .*absent: there is no such folder"):
        tool.find_photos(str(tmp_path / "absent"), 3)
