"""Files of tools/export.py: right beside eager, complete in themselves, and predicted from."""

import json
from functools import partial

import numpy as np
import pytest
from PIL import Image

from dense.export import files
from tests.export.conftest import exported
from tests.support import load_tool, run_forked, run_without

pytest.importorskip("onnxruntime")
pytest.importorskip("openvino")
tool = load_tool("export")
# A batch, odd sides, a map of one position.
SHAPES = ((1, 3, 32, 33), (2, 3, 97, 131))


@pytest.fixture(scope="module")
def eager(classifier):
    from dense.export.sources import read_source

    return read_source(classifier)


# The segmentor's ONNX file, which the other tests take, is one in the fast suite.
@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=pytest.mark.e2e) for kind in files.FORMATS]
)
def test_a_classifier_in_every_format(kind, classifier, eager, photos, tmp_path, capsys):
    import torch

    file = exported(classifier, photos, tmp_path, kind)
    printed = capsys.readouterr().out
    assert "logits  largest relative error" in printed and "ratio" in printed
    run = files.Runner(file)
    for shape in SHAPES:
        x = np.random.default_rng(0).standard_normal(shape, np.float32)
        with torch.no_grad():
            (expected,) = eager.network(torch.from_numpy(x))
        np.testing.assert_allclose(run(x)[0], expected, atol=1e-4 * float(expected.abs().max()))
    about = run.about
    assert (about["task"], about["format"], about["channels"]) == ("classification", kind, "RGB")
    assert about["classes"][1:] == ["b", "c"] and "tench" in about["classes"][0]
    np.testing.assert_allclose(about["mean"], [123.675, 116.28, 103.53], atol=1e-3)
    np.testing.assert_allclose(about["std"], [58.395, 57.12, 57.375], atol=1e-3)
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {file.name} | ({"file.bin"} if kind == "openvino" else set())
    with pytest.raises(files.ExportError, match="32 to 8192 pixels a side, not 31x64"):
        run(np.zeros((1, 3, 64, 31), np.float32))


@pytest.mark.e2e
def test_a_folder_and_a_backbone(classifier, photos, tmp_path):
    import timm
    import torch

    import backbones

    file = exported(classifier.parent, photos, tmp_path, "onnx", "--part", "backbone")
    run = files.Runner(file)
    network = timm.create_model("dw_conv_nano", features_only=True, depths=[1, 1, 2, 1])
    backbones.load_checkpoint(network, classifier)
    x = np.random.default_rng(0).standard_normal((1, 3, 70, 90), np.float32)
    with torch.no_grad():
        expected = network.eval()(torch.from_numpy(x))
    assert run.about["outputs"] == [f"stage{i}_stride{4 * 2**i}" for i in range(4)]
    for ours, true in zip(run(x), expected, strict=True):
        np.testing.assert_allclose(ours, true, atol=1e-4 * float(true.abs().max()))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["onnx", pytest.param("aotinductor", marks=pytest.mark.e2e)])
def test_predictions_are_the_checkpoints(kind, segmentor, request, photos, tmp_path, capsys):
    """Also of a photo that is resized before and after."""
    predict = load_tool("predict")
    if kind == "onnx":
        file = request.getfixturevalue("segmentor_file")
    else:
        file = exported(segmentor, photos, tmp_path, kind)
    Image.open(photos / "0.png").resize((500, 301)).save(tmp_path / "large.png")
    results = []
    for number, given in enumerate((segmentor, file)):
        out = tmp_path / str(number)
        words = [str(photos), str(tmp_path / "large.png"), "--out", str(out), "--device", "cpu"]
        assert predict.main([*words, "--checkpoint", str(given)]) == 0, capsys.readouterr().err
        results.append({path.name: path for path in out.rglob("*.*")})
    assert results[0].keys() == results[1].keys()
    seen = set()
    for name, path in results[0].items():
        if name.endswith(".png"):
            labels, others = (np.asarray(Image.open(r[name])) for r in results)
            # Of positions between two classes, rounding may decide.
            assert (labels != others).mean() < 1e-3
            seen |= set(np.unique(labels))
        elif name.endswith(".json"):
            assert path.read_text() == results[1][name].read_text()
    assert len(seen) > 1


@pytest.mark.e2e
def test_miou_through_files(segmentor, segmentor_file, sample_data, tmp_path):
    """The truth is eager's labels of photos, changed in every third row: eager's mIoU, to 0.1."""
    from dense.export import predictor
    from dense.export.checking import find_photos
    from dense.segmentation import load_predictor

    checkpoint = load_predictor(str(segmentor.parent / "upernet.py"), str(segmentor))
    photos = find_photos(sample_data / "ADEChallengeData2016/images/validation", 8)
    eager = [checkpoint(photo) for photo in photos]
    truth = [labels.copy() for labels in eager]
    for labels in truth:
        labels[::3] = (labels[::3] + 1) % 3
    expected = mean_iou(eager, truth)
    assert 30 < expected < 90
    openvino = files.to_openvino(segmentor_file, tmp_path / "file.xml")[0]
    for file in (segmentor_file, openvino):
        predict = predictor.load_predictor(file)
        ours = [predict(photo) for photo in photos]
        assert mean_iou(ours, truth) == pytest.approx(expected, abs=0.1)


def mean_iou(labels: list[np.ndarray], truth: list[np.ndarray]) -> float:
    """In percent, over all positions and the classes of the truth."""
    ours, true = (np.concatenate([one.ravel() for one in each]) for each in (labels, truth))
    kinds = np.unique(true)
    both = [((ours == k) & (true == k)).sum() / ((ours == k) | (true == k)).sum() for k in kinds]
    return 100 * float(np.mean(both))


@pytest.mark.slow
def test_classes_are_the_checkpoints(classifier, photos, tmp_path):
    predict = load_tool("predict")
    file = exported(classifier, photos, tmp_path, "torch-export")
    found = []
    for number, given in enumerate((classifier, file)):
        out = tmp_path / str(number)
        words = [str(photos), "--checkpoint", str(given), "--out", str(out), "--device", "cpu"]
        assert predict.main(words) == 0
        found.append([json.loads(p.read_text()) for p in sorted(out.glob("classes/*.json"))])
    for ours, true in zip(*found, strict=True):
        names = [[c["class_name"] for c in one["classes"]] for one in (ours, true)]
        assert names[0] == names[1]
        for one, other in zip(ours["classes"], true["classes"], strict=True):
            assert one["score"] == pytest.approx(other["score"], abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "wrong", "said"),
    [
        ("BAR", 0.0, "0e+00 is allowed: nothing is kept"),
        ("_error", lambda ours, true: float("nan"), "the largest relative error is nan, 1e-03 is"),
    ],
)
def test_nothing_is_kept_of_a_wrong_file(
    name, wrong, said, classifier, photos, tmp_path, monkeypatch, capsys
):
    from dense.export import checking

    monkeypatch.setattr(checking, name, wrong)
    out = tmp_path / "file.pt2"
    words = [str(classifier), "--to", "torch-export", "--photos", str(photos), "--out", str(out)]
    assert tool.main(words) == 1
    assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["CLASSIFIER", "--to", "tflite"],
            "--to tflite: onnx, openvino, torch-export, aotinductor are",
        ),
        (["gone.pth", "--to", "onnx"], "gone.pth does not exist"),
        (["LONELY", "--to", "onnx"], "holds no config; name the training's config by --config"),
        (["EMPTY", "--to", "onnx"], "holds no finished checkpoint: name the .pth file"),
        (["CLASSIFIER", "--to", "onnx", "--photos", "EMPTY"], "holds no photo (.jpg,"),
        (["CLASSIFIER", "--to", "onnx", "--photos", "gone"], "gone: there is no such folder"),
        (["CLASSIFIER", "--to", "onnx", "--out", "a.xml"], "a.xml: a file of onnx ends in .onnx"),
        (
            ["CLASSIFIER", "--to", "torch-export", "--out", "a.aoti.pt2"],
            "a file of torch-export ends in .pt2, one of aotinductor in .aoti.pt2",
        ),
    ],
)
def test_refused_in_one_line(words, message, classifier, tmp_path, capsys):
    lonely, empty = tmp_path / "lonely", tmp_path / "empty"
    for folder in (lonely, empty):
        folder.mkdir()
    (lonely / "model.pth").write_bytes(classifier.read_bytes())
    names = {"CLASSIFIER": classifier, "LONELY": lonely / "model.pth", "EMPTY": empty}
    assert tool.main([str(names.get(word, word)) for word in words]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("export: ") and message in line


@pytest.mark.slow
@pytest.mark.parametrize(
    ("content", "words", "message"),
    [
        (b"no graph", [], "cannot be read as onnx"),
        (None, ["--device", "cuda"], "--device cuda"),
        (None, ["--config", "some.py"], "--config some.py"),
    ],
)
def test_predict_refuses_in_one_line(content, words, message, segmentor_file, tmp_path, capsys):
    file = segmentor_file
    if content is not None:
        file = tmp_path / "broken.onnx"
        file.write_bytes(content)
    args = [str(tmp_path), "--checkpoint", str(file), "--out", str(tmp_path / "out"), *words]
    assert load_tool("predict").main(args) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert message in line and not (tmp_path / "out").exists()


def test_another_onnx_file_is_told(tmp_path):
    onnx = pytest.importorskip("onnx")
    given, out = (
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1]) for name in "xy"
    )
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Relu", ["x"], ["y"])], "relu", [given], [out]
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)])
    onnx.save(model, tmp_path / "other.onnx")
    with pytest.raises(files.ExportError, match="has no metadata of ours"):
        files.Runner(tmp_path / "other.onnx")


def test_a_missing_compiler_is_told_before_anything_is_read(monkeypatch, capsys):
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert tool.main(["gone.pth", "--to", "aotinductor"]) == 2
    assert "needs a C++ compiler: g++, or the one that CXX names" in capsys.readouterr().err


@pytest.mark.slow
def test_a_file_for_images_of_one_size(segmentor_file, tmp_path, monkeypatch):
    import openvino

    file, compiled = files.to_openvino(segmentor_file, tmp_path / "file.xml")[0], []
    image = np.random.default_rng(0).standard_normal((2, 3, 65, 96), np.float32)
    expected, compile_model = files.Runner(file)(image)[0], openvino.Core.compile_model
    monkeypatch.setattr(
        openvino.Core,
        "compile_model",
        lambda core, model, *given: compiled.append(model) or compile_model(core, model, *given),
    )
    run = files.Runner(file, shape=image.shape)
    assert tuple(compiled[0].inputs[0].shape) == image.shape
    np.testing.assert_allclose(run(image)[0], expected, atol=1e-4 * np.abs(expected).max())
    with pytest.raises(files.ExportError, match=r"read for .2, 3, 65, 96., not for .1, 3, 65, 96."):
        run(image[:1])
    with pytest.raises(files.ExportError, match="a shape is for openvino, not for onnx"):
        files.Runner(segmentor_file, shape=image.shape)


def test_openvino_computes_once_for_all_outputs(tmp_path, monkeypatch):
    onnx, openvino = pytest.importorskip("onnx"), pytest.importorskip("openvino")
    values = [
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1, 3, 4, 4])
        for name in ("image", "a", "b")
    ]
    nodes = [
        onnx.helper.make_node(op, ["image"], [out]) for op, out in (("Relu", "a"), ("Neg", "b"))
    ]
    graph = onnx.helper.make_graph(nodes, "two", values[:1], values[1:])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)])
    model.metadata_props.add(key=files.KEY, value=json.dumps({"sides": [1, 9]}))
    onnx.save(model, tmp_path / "two.onnx")
    run = files.Runner(files.to_openvino(tmp_path / "two.onnx", tmp_path / "two.xml")[0])
    calls, compute = [], openvino.CompiledModel.__call__
    monkeypatch.setattr(
        openvino.CompiledModel, "__call__", lambda *given: calls.append(1) or compute(*given)
    )
    a, b = run(np.full((1, 3, 4, 4), -2, np.float32))
    assert len(calls) == 1 and (a == 0).all() and (b == 2).all()


@pytest.mark.slow
@pytest.mark.parametrize("package", ["onnxruntime", "openvino"])
def test_a_missing_engine_names_the_extra(package):
    code = (
        "from importlib.util import find_spec\nimport dense\n"
        f"dense.find_spec = lambda name: None if name == {package!r} else find_spec(name)\n"
        "from dense.export.files import require_engine\n"
        f"require_engine({'openvino' if package == 'openvino' else 'onnx'!r})\n"
    )
    done = run_without(("torch",), code)
    last = done.stderr.splitlines()[-1]
    assert f"{package} is not installed: run pip install 'dense-backbones[export]'" in last


@pytest.mark.slow
def test_a_file_runs_without_pytorch(segmentor_file):
    code = (
        "import numpy as np\nfrom dense.export.files import Runner\n"
        f"run = Runner({str(segmentor_file)!r})\n"
        "print(run(np.zeros((1, 3, 50, 64), np.float32))[0].shape, run.about['classes'])"
    )
    done = run_without(("torch", "timm", "mmengine", "onnx", "onnxscript"), code)
    assert done.stdout.strip() == "(1, 3, 50, 64) ['sky', 'road', 'tree']", done.stderr


def test_the_size_of_a_segmentors_example(segmentor, tmp_path):
    from mmengine.config import Config

    from dense.export.sources import read_source

    assert read_source(segmentor).size == (96, 128)
    cfg = Config.fromfile(segmentor.parent / "upernet.py")
    cfg.model.data_preprocessor.size = None
    cfg.dump(tmp_path / "upernet.py")
    assert read_source(segmentor, str(tmp_path / "upernet.py")).size == (512, 512)


def _dropped_in_a_thread(path):
    import gc
    import subprocess
    import threading

    from torch.utils.data import DataLoader

    kept = [files.Runner(path)]
    kept.append(kept)
    del kept
    thread = threading.Thread(target=gc.collect)
    thread.start()
    thread.join()
    # PyTorch handles the signal of every process that ends from now on.
    list(DataLoader(range(2), num_workers=1))
    subprocess.run(["true"])


def test_an_openvino_file_may_be_dropped_in_a_thread(tmp_path):
    import openvino
    from openvino import opset13

    image = opset13.parameter([1, 3, -1, -1], np.float32)
    model = openvino.Model([opset13.relu(image)], [image])
    model.set_rt_info(json.dumps({"sides": [32, 8192]}), files.KEY)
    openvino.save_model(model, tmp_path / "file.xml")
    (done,) = run_forked(partial(_dropped_in_a_thread, tmp_path / "file.xml"))
    assert done.returncode == 0, done.stderr[-2000:]
