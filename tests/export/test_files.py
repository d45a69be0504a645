"""Files of a small network: their metadata, their engines' options, and what they refuse."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

ort = pytest.importorskip("onnxruntime")
openvino = pytest.importorskip("openvino")

from dense.export import files  # noqa: E402
from dense.export.files import ExportError  # noqa: E402

ABOUT = {"task": "features", "outputs": ["one", "other"], "sides": [32, 40], "classes": ["ä", "b"]}


class Two(nn.Module):
    """An output of the image's size and one of half of it."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.near, self.far = nn.Conv2d(3, 64, 3, padding=1), nn.Conv2d(64, 4, 3, 2, 1)

    def forward(self, image):
        near = self.near(image)
        return near, self.far(near.relu())


@pytest.fixture(scope="module")
def network():
    return Two().eval()


@pytest.fixture(scope="module")
def written(network, tmp_path_factory):
    """A function of a format: its file."""
    folder, done = tmp_path_factory.mktemp("files"), {}

    def write(kind: str):
        if kind not in done:
            path = folder / f"two{files.FORMATS[kind]}"
            done[kind] = files.write(network, ABOUT, path)
        return done[kind]

    return write


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["onnx", "openvino", "torch-export"])
def test_metadata_and_outputs(kind, network, written):
    paths = written(kind)
    names = ["two.xml", "two.bin"] if kind == "openvino" else [f"two{files.FORMATS[kind]}"]
    assert [path.name for path in paths] == names and all(path.is_file() for path in paths)
    run = files.Runner(str(paths[0]))
    assert run.about == ABOUT
    # The batch is open, and the sides are, from the least to the most.
    for shape in ((1, 3, 32, 40), (3, 3, 40, 33)):
        image = np.random.default_rng(0).standard_normal(shape, np.float32)
        found = run(image)
        with torch.no_grad():
            expected = network(torch.from_numpy(image))
        assert isinstance(found, list) and len(found) == 2
        for ours, true in zip(found, expected, strict=True):
            np.testing.assert_allclose(ours, true, atol=1e-5)
    for height, width in ((31, 40), (32, 41), (40, 31), (41, 32)):
        with pytest.raises(ExportError) as error:
            run(np.zeros((1, 3, height, width), np.float32))
        assert str(error.value) == (
            f"{paths[0]} is for images of 32 to 40 pixels a side, not {width}x{height}"
        )


@pytest.mark.slow
def test_names_in_the_onnx_file(written):
    (path,) = written("onnx")
    session = ort.InferenceSession(path)
    assert [given.name for given in session.get_inputs()] == ["image"]
    assert [(out.name, out.shape) for out in session.get_outputs()] == [
        ("one", ["batch", 64, "height", "width"]),
        ("other", ["batch", 4, *session.get_outputs()[1].shape[2:]]),
    ]
    assert list(session.get_modelmeta().custom_metadata_map) == [files.KEY]


@pytest.mark.slow
def test_converted_to_openvino(written, tmp_path):
    """By a precision with weights of half the size, which the metadata says."""
    (graph,) = written("onnx")
    sizes = {}
    for precision in (None, "fp16", "bf16"):
        given = (precision,) if precision else ()
        made = files.to_openvino(graph, tmp_path / f"{precision}.xml", *given)
        assert made == [tmp_path / f"{precision}.xml", tmp_path / f"{precision}.bin"]
        expected = ABOUT | ({"precision": precision} if precision else {})
        assert files.Runner(made[0]).about == expected
        sizes[precision] = made[1].stat().st_size
    assert sizes["fp16"] == sizes["bf16"] == pytest.approx(sizes[None] / 2, rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("threads", [None, 1, 3])
def test_what_the_engines_are_told(threads, written, tmp_path, monkeypatch):
    sessions, compiled, session_of = [], [], ort.InferenceSession
    (graph,) = written("onnx")

    def session(path, options, providers):
        sessions.append((path, options.intra_op_num_threads, providers))
        return session_of(path, options, providers=providers)

    monkeypatch.setattr(ort, "InferenceSession", session)
    run = files.Runner(graph, threads)
    assert sessions == [(graph, threads or 0, ["CPUExecutionProvider"])] and run.path == graph

    compile_model = openvino.Core.compile_model

    def compiling(core, model, *given):
        compiled.append(given)
        return compile_model(core, model, *given)

    monkeypatch.setattr(openvino.Core, "compile_model", compiling)
    for precision, hint in (("bf16", "bf16"), ("fp16", "f32"), (None, "f32")):
        path = files.to_openvino(graph, tmp_path / f"{precision}.xml", precision)[0]
        files.Runner(path, threads)
        options = {"INFERENCE_PRECISION_HINT": hint, "INFERENCE_NUM_THREADS": threads or 0}
        assert compiled.pop() == ("CPU", options)


def test_openvinos_core_is_one():
    assert files.openvino_core() is files.openvino_core()


def test_a_format_by_the_suffix():
    suffixes = {"a.onnx": "onnx", "b/c.xml": "openvino", "d.e.pt2": "torch-export"}
    suffixes |= {"f.aoti.pt2": "aotinductor", "g.pth": None, "h.onnx/i.pth": None, "onnx": None}
    assert {path: files.kind_of(path) for path in suffixes} == suffixes
    for path, kind in suffixes.items():
        assert files.is_exported(path) is (kind is not None)


@pytest.mark.parametrize("kind", files.FORMATS)
def test_what_a_format_needs(kind, monkeypatch):
    asked, compilers = [], []
    monkeypatch.setattr(files, "require", lambda *given: asked.append(given))
    monkeypatch.setattr(files.shutil, "which", lambda name: compilers.append(name) or name)
    monkeypatch.delenv("CXX", raising=False)
    files.require_engine(kind)
    needs = {"onnx": ["onnx", "onnxscript", "onnxruntime"]}
    needs["openvino"] = [*needs["onnx"], "openvino"]
    assert asked == [(package, "export") for package in needs.get(kind, ())]
    assert compilers == (["g++"] if kind == "aotinductor" else [])
    monkeypatch.setenv("CXX", "clang")
    files.require_engine(kind)
    assert compilers == (["g++", "clang"] if kind == "aotinductor" else [])


@pytest.mark.parametrize("kind", files.FORMATS)
def test_what_reads_a_format(kind, tmp_path, monkeypatch):
    """Each by its own engine, whose absence is told before the file is opened."""
    path, asked, read = tmp_path / f"a{files.FORMATS[kind]}", [], []

    def reader(*given):
        read.append(given)
        return json.dumps({"sides": [2, 4], "batch": 1}), lambda image: ["out", image.shape]

    monkeypatch.setattr(files, "require", lambda *given: asked.append(given))
    monkeypatch.setitem(files._READERS, kind, reader)
    with pytest.raises(ExportError, match=f"^{path} does not exist$"):
        files.Runner(path)
    path.touch()
    shape = (1, 3, 4, 4) if kind == "openvino" else None
    run = files.Runner(path, 3, shape)
    assert read == [(path, 3, shape)]
    package = {"onnx": "onnxruntime", "openvino": "openvino"}.get(kind)
    assert asked == ([(package, "export")] if package else [])
    assert run(np.zeros((1, 3, 4, 4))) == ["out", (1, 3, 4, 4)]
    with pytest.raises(ExportError, match=f"^{path} is for one image at a time, not 2$"):
        run(np.zeros((2, 3, 4, 4)))
    if shape:
        with pytest.raises(ExportError) as error:
            run(np.zeros((1, 3, 2, 4)))
        assert str(error.value) == f"{path} was read for (1, 3, 4, 4), not for (1, 3, 2, 4)"
    else:
        assert run(np.zeros((1, 3, 2, 4)))[1] == (1, 3, 2, 4)
        with pytest.raises(ExportError, match=f"^{path}: a shape is for openvino, not for {kind}$"):
            files.Runner(path, shape=(1, 3, 4, 4))


@pytest.mark.parametrize(
    ("error", "said"), [(ValueError("\n first\nsecond"), "first"), (KeyError(), "KeyError")]
)
def test_the_first_line_of_what_an_engine_says(error, said, tmp_path, monkeypatch):
    def reader(*_):
        raise error

    monkeypatch.setitem(files._READERS, "onnx", reader)
    (tmp_path / "a.onnx").touch()
    with pytest.raises(ExportError) as found:
        files.Runner(tmp_path / "a.onnx")
    assert str(found.value) == f"{tmp_path / 'a.onnx'} cannot be read as onnx: {said}"


def test_what_is_no_exported_file(tmp_path):
    (tmp_path / "a.pth").touch()
    (tmp_path / "a.onnx").mkdir()
    with pytest.raises(ExportError, match="a.pth: .onnx, .xml, .pt2, .aoti.pt2 are the exported"):
        files.Runner(tmp_path / "a.pth")
    with pytest.raises(ExportError, match="a.onnx does not exist"):
        files.Runner(tmp_path / "a.onnx")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["openvino", "torch-export"])
def test_files_of_others_are_told(kind, tmp_path):
    path = tmp_path / f"a{files.FORMATS[kind]}"
    if kind == "openvino":
        image = openvino.opset13.parameter([1, 3, -1, -1], np.float32)
        openvino.save_model(openvino.Model([openvino.opset13.relu(image)], [image]), path)
    else:
        torch.export.save(torch.export.export(nn.ReLU(), (torch.zeros(1),)), path)
    with pytest.raises(ExportError, match="has no metadata of ours: tools/export.py did not write"):
        files.Runner(path)


# In the evaluations


def test_a_file_as_a_network(monkeypatch):
    from dense.export import evaluation

    given, about = [], {"task": "segmentation", "classes": ["a", "b"]}

    def runner(path, threads):
        def run(image):
            given.append(image)
            return [image[:, :1] * 2]

        run.about = about
        assert (path, threads) == ("a.onnx", torch.get_num_threads())
        return run

    monkeypatch.setattr(evaluation, "Runner", runner)
    for classes in (("a", "b"), ["a", "b"], None):
        run = evaluation.read_for("segmentation", "a.onnx", classes)
    for task, classes, said in (
        ("detection", None, "a.onnx is of segmentation, the evaluation of detection"),
        ("segmentation", ["b", "a"], "a.onnx has the classes a,b, the data b,a"),
        ("segmentation", [], "a.onnx has the classes a,b, the data "),
    ):
        with pytest.raises(ExportError, match=f"^{said}$"):
            evaluation.read_for(task, "a.onnx", classes)
    image = torch.randn(2, 3, 4, 5, dtype=torch.float64).mT
    segmentor = SimpleNamespace()
    evaluation.use_in_segmentor(segmentor, run)
    for logits in (evaluation.logits_of(run)(image), segmentor.encode_decode(image, [{}])):
        assert logits.dtype == torch.float32 and logits.equal(image[:, :1].float() * 2)
        assert given[-1].dtype == np.float32 and given[-1].flags["C_CONTIGUOUS"]
