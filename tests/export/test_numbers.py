"""int8: what is quantised, what stays in float32, and what the file still says."""

import numpy as np
import pytest

from dense.export import files, numbers
from tests.export.conftest import exported
from tests.support import load_tool

pytest.importorskip("onnxruntime")

pytestmark = pytest.mark.slow


def images(count: int) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.standard_normal((1, 3, 64, 96), np.float32) for _ in range(count)]


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float((a * b).sum() / np.sqrt((a * a).sum() * (b * b).sum()))


def test_layers_by_kind(segmentor_file):
    kinds = numbers.layers(segmentor_file)
    # Five blocks; the products of attention have no constant.
    assert len(kinds["mixer.qkv"]) == len(kinds["mixer.proj"]) == 5 and len(kinds["mlp"]) == 10
    assert len(kinds["downsample.reduction"]) == 3 and len(kinds["patch_embed.proj"]) == 1
    assert not {"mixer", "matmul"} & set(kinds)


def test_an_int8_file(segmentor_file, tmp_path):
    import onnx

    out, float32 = tmp_path / "int8.onnx", files.Runner(segmentor_file)
    kept = numbers.layers(segmentor_file)["mlp"]
    numbers.quantise(segmentor_file, out, images(3), kept)
    run = files.Runner(out)
    assert run.about == float32.about
    for image in images(2):
        (ours,), (true,) = run(image), float32(image)
        assert 0.9 < cosine(ours, true) < 1 - 1e-7
    # Other sizes and batches, from the same file.
    other = np.concatenate([images(1)[0]] * 2)[:, :, :33, :70]
    assert run(other)[0].shape == float32(other)[0].shape
    model = onnx.load_model(out)
    made_by = {name: node for node in model.graph.node for name in node.output}
    for node in model.graph.node:
        if node.name in kept:
            assert node.input[1] not in made_by
        if node.name in numbers.layers(segmentor_file)["mixer.qkv"]:
            dequantised = made_by[node.input[1]]
            assert dequantised.op_type == "DequantizeLinear"
            (scale,) = (t for t in model.graph.initializer if t.name == dequantised.input[1])
            assert len(scale.dims) == 1 and scale.dims[0] > 1, "a scale per channel"
            quantised = made_by[made_by[node.input[0]].input[0]]
            (zero,) = (t for t in model.graph.initializer if t.name == quantised.input[2])
            assert zero.data_type == onnx.TensorProto.UINT8
            # A bias is added to the sum in float.
            (user,) = (n for n in model.graph.node if node.output[0] in n.input)
            assert user.op_type == "Add"


def test_layers_return_to_float_until_the_bar_is_met(tmp_path, monkeypatch):
    """Of kinds a, b, c and d, two must stay in float32 together."""
    kinds = {name: [f"{name}{i}" for i in range(2)] for name in "abcd"}
    harm = {"a": 0.001, "b": 0.2, "c": 0.05, "d": 0.0}
    written = {}
    monkeypatch.setattr(numbers, "layers", lambda graph: kinds)
    monkeypatch.setattr(numbers, "quantise", lambda g, out, b, kept: written.update(kept=kept))

    def cosine_of(path) -> float:
        return 1 - sum(harm[k] for k in kinds if kinds[k][0] not in written["kept"])

    found = numbers.quantise_within(tmp_path, tmp_path, [], cosine_of, 0.99)
    assert found.kept == {"b": 2, "c": 2} and found.cosine == pytest.approx(0.999)
    assert sorted(written["kept"]) == ["b0", "b1", "c0", "c1"]
    assert found.lines() == [
        "int8: float32 stay b (2), c (2); with all in int8 the cosine is 0.7490"
    ]
    # No choice meets it: what helps least stays in int8, which the file would not be otherwise.
    found = numbers.quantise_within(tmp_path, tmp_path, [], cosine_of, 2.0)
    assert list(found.kept) == ["b", "c", "a"] and found.cosine == pytest.approx(1)
    found = numbers.quantise_within(tmp_path, tmp_path, [], cosine_of, 0.7)
    assert not found.kept and found.lines() == ["int8: all convolutions and linears"]


@pytest.mark.e2e
@pytest.mark.parametrize("kind, precision", [("openvino", p) for p in ("fp16", "bf16", "int8")])
def test_by_the_tool(kind, precision, classifier, photos, tmp_path, capsys):
    pytest.importorskip("openvino")
    from dense.export.sources import read_source

    source = read_source(classifier)
    file = exported(classifier, photos, tmp_path, kind, f"--{precision}")
    run, printed = files.Runner(file), capsys.readouterr().out
    assert (run.about["precision"], run.about["format"]) == (precision, kind)
    assert ("int8: " in printed) == (precision == "int8")
    assert {path.name for path in tmp_path.iterdir()} == {"file.xml", "file.bin"}
    # A weight of float32 has 4 bytes.
    weights = sum(p.numel() for p in source.network.parameters())
    assert (tmp_path / "file.bin").stat().st_size < (1.7 if precision == "int8" else 2.2) * weights


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--to", "torch-export", "--int8"], "--int8 --to torch-export: onnx, openvino can be"),
        (["--to", "onnx", "--bf16"], "--bf16 --to onnx: openvino can be written in it"),
        (["--to", "onnx", "--fp16"], "--fp16 --to onnx: openvino can be written in it"),
    ],
)
def test_refused_in_one_line(words, message, capsys):
    assert load_tool("export").main(["any.pth", *words]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert message in line
