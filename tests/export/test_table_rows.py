"""The command of the page's tables without its engines: heads, rows, and what is measured."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("onnxruntime")

from dense.analysis import export_table as table
from dense.demo.scenes import draw_scene
from dense.export import checking

FAMILIES = ["swin", "swin_local_mlp", "dw_conv", "d_dw_conv", "i_d_dw_conv"]
PHOTOS = [np.full((9, 7, 3), number, np.uint8) for number in range(4)]


def head(*cells: str) -> list[str]:
    return [f"| {' | '.join(cells)} |", f"|{' --- |' * len(cells)}"]


SMALLER = ("backbone", "numbers", "engine")
HEADS = {
    "": ("backbone", "format", "largest relative error", "MB", "latency over eager's"),
    "--no-latency": ("backbone", "format", "largest relative error", "MB"),
    "--detectors": (
        *("backbone", "format", "detections", "boxes, pixels", "scores", "masks", "MB"),
        "latency over eager's",
    ),
    "--detectors --no-latency": (
        *("backbone", "format", "detections", "boxes, pixels", "scores", "masks", "MB"),
    ),
    "--smaller": (*SMALLER, "MB", "speed over float32's"),
    "--smaller --checkpoints a.pth b.pth": (
        *(*SMALLER, "cosines of strides 4, 8, 16, 32", "stay in float32"),
    ),
    "--smaller --checkpoints a.pth b.pth --no-latency": (
        *(*SMALLER, "cosines of strides 4, 8, 16, 32", "stay in float32"),
    ),
}


@pytest.mark.parametrize("words", HEADS)
def test_heads_and_rows(words, monkeypatch, capsys):
    """Cells are cut where the table has no latency; what is measured is as the words ask."""
    cells, photos = [f"cell {number}" for number in range(1, 9)], []

    def rows(kind):
        return lambda given, *_: iter([[f"{kind} of {given}", *cells], [kind, *cells]])

    for kind in ("rows", "detector_rows", "smaller_rows", "trained_rows"):
        monkeypatch.setattr(table, kind, rows(kind))
    monkeypatch.setattr(table, "photos_of", lambda *given: photos.append(given))
    monkeypatch.setattr(table, "random_source", lambda name, side: f"{name} at {side}")
    asked = []

    class Read(str):
        about = {"model": "trained"}

    monkeypatch.setattr(table, "read_source", lambda *given: asked.append(given) or Read(given[0]))
    table.main([*words.split(), "--photos", "folder"])
    assert photos == [("folder", 8)]
    heads = HEADS[words]
    kind = "rows"
    if "--detectors" in words:
        kind, given = "detector_rows", [(f"{f}_nano", f) for f in FAMILIES]
    elif "--checkpoints" in words:
        kind, given = "trained_rows", [("trained", "a.pth"), ("trained", "b.pth")]
        assert asked == [("a.pth", None, "backbone"), ("b.pth", None, "backbone")]
    else:
        kind = "smaller_rows" if "--smaller" in words else "rows"
        given = [(f"{f}_nano", f"{f}_nano at 224") for f in FAMILIES]
    expected = [
        [f"`{name}`", first, *cells][: len(heads)]
        for name, source in given
        for first in (f"{kind} of {source}", kind)
    ]
    lines = [f"| {' | '.join(row)} |" for row in expected]
    assert capsys.readouterr().out.splitlines() == [*head(*heads), *lines]


def test_options_reach_what_they_name(monkeypatch, capsys):
    photos = []
    monkeypatch.setattr(table, "photos_of", lambda *given: photos.append(given))
    monkeypatch.setattr(table, "random_source", lambda name, side: (name, side))
    monkeypatch.setattr(table, "rows", lambda source, photos: [list(map(str, source))])
    words = "--families swin dw_conv --size tiny --side 96 --calibrated 3".split()
    table.main(words)
    assert photos == [(None, 3)]
    rows = capsys.readouterr().out.splitlines()[2:]
    assert rows == [f"| `{name}` | {name} | 96 |" for name in ("swin_tiny", "dw_conv_tiny")]
    with pytest.raises(SystemExit):
        table.main(["--families", "resnet"])
    assert "invalid choice: 'resnet'" in capsys.readouterr().err


def test_the_help_is_the_modules_own_text(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit):
        table.main(["--help"])
    usage, text = capsys.readouterr().out.split("\n\n", 1)
    assert text.startswith(table.__doc__.strip() + "\n")
    assert " ".join(usage.partition("[-h] ")[2].split()) == (
        "[--families FAMILY [FAMILY ...]] [--size SIZE] [--side SIDE] [--no-latency] [--smaller]"
        " [--checkpoints CHECKPOINTS [CHECKPOINTS ...]] [--detectors] [--photos PHOTOS]"
        " [--calibrated CALIBRATED]"
    )
    for line in (
        *("of the networks (nano)", "rows and columns in pixels (224)", "drawn scenes"),
        *("leave out what another load would change", "the table of bfloat16, float16 and int8"),
        *("cosines of trained classifiers", "the table of whole detectors, nano"),
        "photos that int8 is calibrated on (8)",
    ):
        assert line in text


def test_photos(tmp_path):
    for number in range(3):
        Image.new("RGB", (9, 7), (number, 0, 0)).save(tmp_path / f"{number}.png")
    assert [int(photo[0, 0, 0]) for photo in table.photos_of(str(tmp_path), 2)] == [0, 1]
    for ours, seed in zip(table.photos_of(None, 3), range(3), strict=True):
        np.testing.assert_array_equal(ours, draw_scene(np.random.default_rng(seed), 256).image)


# Rows, of engines that only write down what they are asked


@pytest.fixture
def engines(monkeypatch):
    """What was called; files hold their size in 10 kB."""
    calls, threads = [], torch.get_num_threads()

    def put(path, size):
        path.write_bytes(b"x" * (10_000 * size))
        return path

    def write(network, about, path):
        calls.append(("write", network, about["task"], path.name))
        return [put(path, 11)]

    def to_openvino(graph, path, precision=None):
        assert graph.is_file()
        calls.append(("to_openvino", graph.name, path.name, precision))
        return [
            put(path, 1),
            put(path.with_suffix(".bin"), {"bf16": 50, "fp16": 60}.get(precision, 30)),
        ]

    def runner(path, given, shape=None):
        assert Path(path).is_file() and given == threads
        return Path(path).name, shape

    def compare(source, run, photos, smallest=True):
        calls.append(("compare", run, len(photos), smallest))
        errors = {"a": 1e-5, "b": 3.4e-5, "c": 2e-5}
        cosines = {"a": 0.99, "b": 0.98766, "c": 1.0, "d": 0.5}
        return SimpleNamespace(errors=errors, cosines=cosines, ratio=0.456)

    monkeypatch.setattr(table.files, "write", write)
    monkeypatch.setattr(table.files, "to_openvino", to_openvino)
    monkeypatch.setattr(table.files, "Runner", runner)
    monkeypatch.setattr(checking, "compare", compare)
    monkeypatch.setattr(
        table.numbers,
        "quantise",
        lambda g, out, *given: (
            put(out, 20) and calls.append(("quantise", g.name, out.name, *map(len, given)))
        ),
    )
    return calls


ABOUT = {"task": "features", "mean": [0, 0, 0], "std": [1, 1, 1], "channels": "RGB"}
SOURCE = table.Source("network", ABOUT, (4, 6))


def test_a_row_for_each_format(engines):
    found = [*table.rows(SOURCE, PHOTOS)]
    names = {"onnx": "backbone.onnx", "openvino": "backbone.xml"}
    names |= {"torch-export": "backbone.pt2", "aotinductor": "backbone.aoti.pt2"}
    sizes = {"onnx": "0.1", "openvino": "0.3", "torch-export": "0.1", "aotinductor": "0.1"}
    assert found == [[kind, "3.4e-05", sizes[kind], "0.46"] for kind in names]
    assert [call[1][0] for call in engines if call[0] == "compare"] == list(names.values())
    assert {call[2:] for call in engines if call[0] == "compare"} == {(2, True)}
    assert [call[1:] for call in engines if call[0] == "write"] == [
        ("network", "features", name) for kind, name in names.items() if kind != "openvino"
    ]


@pytest.mark.parametrize(("alone", "count"), [(0, "7"), (3, "3 alone")])
def test_a_detectors_rows(alone, count, engines, monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(table, "write_detector", lambda folder, family: folder / f"{family}.pth")
    monkeypatch.setattr(table, "read_source", lambda path: asked.append(path.name) or SOURCE)

    def compare(source, run, photos):
        asked.append((source, run[0], len(photos)))
        errors = {"boxes": 1.23e-3, "scores": 2e-5, "masks": 0.0}
        return SimpleNamespace(errors=errors, pairs=7, alone=alone, ratio=2.0)

    monkeypatch.setattr(table, "compare_detections", compare)
    assert [*table.detector_rows("swin", PHOTOS)] == [
        ["onnx", count, "1.2e-03", "2.0e-05", "0.0e+00", "0.1", "2.00"],
        ["openvino", count, "1.2e-03", "2.0e-05", "0.0e+00", "0.3", "2.00"],
    ]
    assert asked == ["swin.pth", (SOURCE, "detector.onnx", 2), (SOURCE, "detector.xml", 2)]


FILES = [("bf16", "OpenVINO"), ("fp16", "OpenVINO"), ("int8", "OpenVINO"), ("int8", "ONNX Runtime")]
CONVERTED = [
    *(("to_openvino", "float32.onnx", f"{name}.xml", name) for name in ("bf16", "fp16")),
    ("to_openvino", "int8.onnx", "int8.xml", None),
]


def test_speeds_of_smaller_numbers(engines, monkeypatch):
    """Over float32's in the same engine."""
    timed = []

    def seconds(paths, image):
        timed.append(([path.name for path in paths], image.shape))
        times = {"float32.xml": 8, "float32.onnx": 6, "bf16.xml": 4, "fp16.xml": 5}
        times |= {"int8.xml": 2, "int8.onnx": 1}
        return {path: times[path.name] for path in paths}

    monkeypatch.setattr(table, "_seconds", seconds)
    sizes, ratios = ("0.5", "0.6", "0.3", "0.2"), ("2.00", "1.60", "4.00", "6.00")
    assert [*table.smaller_rows(SOURCE, PHOTOS)] == [
        [*names, size, ratio] for names, size, ratio in zip(FILES, sizes, ratios, strict=True)
    ]
    assert engines == [
        ("write", "network", "features", "float32.onnx"),
        ("to_openvino", "float32.onnx", "float32.xml", None),
        ("quantise", "float32.onnx", "int8.onnx", 4, 0),
        *CONVERTED,
    ]
    names = ["float32.xml", "float32.onnx", "bf16.xml", "fp16.xml", "int8.xml", "int8.onnx"]
    assert timed == [(names, (1, 3, 4, 6))]


@pytest.mark.parametrize(
    ("kept", "said"), [({}, "none"), ({"mlp": 4, "head": 1}, "mlp (4), head (1)")]
)
def test_cosines_of_smaller_numbers(kept, said, engines, monkeypatch):
    asked = []

    def quantise_within(graph, out, batches, cosine_of, bar):
        asked.append((graph.name, out.name, len(batches), batches[0].shape, cosine_of, bar))
        out.write_bytes(b"x")
        return SimpleNamespace(kept=kept)

    monkeypatch.setattr(table.numbers, "quantise_within", quantise_within)
    monkeypatch.setattr(checking, "cosines_with", lambda source, photos: len(photos))
    cosines = "0.9900, 0.9877, 1.0000, 0.5000"
    assert [*table.trained_rows(SOURCE, PHOTOS)] == [
        [*names, cosines, said if names[0] == "int8" else "-"] for names in FILES
    ]
    assert asked == [("float32.onnx", "int8.onnx", 4, (1, 3, 4, 6), 2, 0.99)]
    compared = [call for call in engines if call[0] == "compare"]
    names = ("bf16.xml", "fp16.xml", "int8.xml", "int8.onnx")
    assert compared == [("compare", (name, None), 2, False) for name in names]


def test_times_are_taken_in_turns(engines, monkeypatch, tmp_path):
    """The median of each file's, OpenVINO's read for the shape of the image."""
    paths, order = [tmp_path / name for name in ("a.xml", "b.onnx")], []
    for path in paths:
        path.touch()
    times = {"a.xml": iter([1.0, 9.0, 2.0]), "b.onnx": iter([5.0, 4.0, 6.0])}

    def seconds(run, image, repeats):
        assert repeats == 1
        order.append(run)
        return next(times[run[0]])

    monkeypatch.setattr(checking, "seconds", seconds)
    image = np.zeros((1, 3, 4, 6))
    assert table._seconds(paths, image, 3) == {paths[0]: 2.0, paths[1]: 5.0}
    assert order == [("a.xml", (1, 3, 4, 6)), ("b.onnx", None)] * 3


def test_a_random_network_repeats_and_has_its_maps_statistics():
    one, same = (table.random_source("dw_conv_nano", 48) for _ in range(2))
    assert one.size == (48, 48) and not one.network.training
    names = [f"stage{i}_stride{4 * 2**i}" for i in range(4)]
    assert (
        one.about
        == same.about
        == {
            "task": "features",
            "outputs": names,
            "channels": "RGB",
            "mean": [123.675, 116.28, 103.53],
            "std": [58.395, 57.12, 57.375],
            "sides": [32, 8192],
        }
    )
    torch.manual_seed(1)
    with torch.no_grad():
        images = torch.randn(4, 3, 64, 64)
        maps, again = one.network(images), same.network(images)
    for x, y in zip(maps, again, strict=True):
        assert x.equal(y)
        # Normalised by the statistics of like images.
        assert abs(x.mean()) < 0.2 and 0.5 < x.std() < 2
    # Of the batch norms only those of the maps are not in the layers before them.
    assert sum(isinstance(m, torch.nn.BatchNorm2d) for m in one.network.modules()) == 4
