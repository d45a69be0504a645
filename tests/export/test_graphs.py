"""One graph is right at every batch, height and width, for all families and ablations."""

import io

import pytest
import torch
from torch import nn

from backbones.ablations import ABLATIONS, ablated
from backbones.ops.dispatch import graphs_for
from dense.backbone import DenseBackbone
from dense.export import files
from dense.export.graphs import ExactPool, captured, exact_pooling, folded
from tests.backbones.test_export import scattered
from tests.support import NANO, build

pytestmark = pytest.mark.slow

# Maps of a single position or window in every stage or in some, odd sides, larger than the example.
SIZES = ((1, 32, 32), (3, 33, 64), (1, 225, 50), (2, 101, 300), (1, 449, 330))
# The windowed and the convolutional family whose graphs have the most in them.
FAST = ("swin_nano", "i_d_dw_conv_nano")
ABLATED = [name for name, a in ABLATIONS.items() if a.options and a.is_pyramid]


def dense(name: str, **options) -> DenseBackbone:
    """With shifted windows in a stage of which one covers some images' maps."""
    torch.manual_seed(0)
    return scattered(DenseBackbone(name, norm="BN", depths=(1, 1, 2, 1), **options))


def agrees(run, model: nn.Module, sizes=SIZES) -> None:
    for size in sizes:
        x = torch.randn(size[0], 3, *size[1:])
        with torch.no_grad():
            for got, expected in zip(run(x), model(x), strict=True):
                assert got.shape == expected.shape
                error = float((got - expected).abs().max() / expected.abs().max())
                assert error < 1e-5, (size, error)


LONG = [pytest.param(n, marks=() if n in FAST else pytest.mark.e2e) for n in NANO]


@pytest.mark.parametrize("name", LONG)
def test_every_size_of_a_saved_program(name):
    model, file = dense(name), io.BytesIO()
    program = captured(model)
    torch.export.save(program, file)
    file.seek(0)
    agrees(torch.export.load(file).module(), model)
    sides = [(v.lower, v.upper) for v in program.range_constraints.values()]
    assert sorted(sides) == [(1, 2**20), (32, 8192), (32, 8192)]
    # PyTorch's own operators alone, so that a saved program loads without this package.
    assert not [n for n in program.graph.nodes if "dense" in str(n.target)]


@pytest.mark.parametrize(
    "name", ["i_d_dw_conv_nano", pytest.param("d_dw_conv_nano", marks=pytest.mark.e2e)]
)
def test_every_size_of_predicted_kernels_in_onnx(name):
    ort = pytest.importorskip("onnxruntime")
    from dense.export.operators import to_onnx

    model = dense(name)
    made = to_onnx(model)
    # ONNX's own operators alone; not even as functions, which OpenVINO does not read.
    assert {node.domain for node in made.graph.node} == {""} and not made.functions
    session = ort.InferenceSession(made.SerializeToString())
    assert session.get_inputs()[0].shape == ["batch", 3, "height", "width"]
    assert [out.shape[0] for out in session.get_outputs()] == ["batch"] * 4
    agrees(lambda x: map(torch.from_numpy, session.run(None, {"image": x.numpy()})), model)


def test_graphs_for_aotinductor_fix_no_batch():
    """Inductor compiles the number of groups of the example: here, that of its images."""
    model = dense("d_dw_conv_nano")
    with graphs_for("aotinductor"):
        program = captured(model)
    nodes = [n for n in program.graph.nodes if "conv2d" in str(n.target)]
    assert nodes and not any(isinstance(n.args[6], torch.fx.Node) for n in nodes if len(n.args) > 6)
    agrees(program.module(), model, SIZES[:4])


@pytest.mark.e2e
def test_d_dw_conv_by_aotinductor(tmp_path):
    model = scattered(DenseBackbone("d_dw_conv_nano", norm="BN", depths=(1, 1, 1, 1)))
    about = dict(sides=[32, 8192], outputs=[])
    (package,) = files.write(model, about, tmp_path / "d_dw_conv.aoti.pt2")
    run = files.Runner(package)
    agrees(lambda x: map(torch.from_numpy, run(x.numpy())), model)


@pytest.mark.e2e
@pytest.mark.parametrize("stride", [8, 16])
def test_output_stride(stride):
    model = dense("swin_nano", output_stride=stride)
    agrees(captured(model).module(), model, SIZES[:4])


@pytest.mark.e2e
@pytest.mark.parametrize("ablation", ABLATED)
def test_ablations(ablation):
    name, options = ablated(ablation, "swin_nano", dense=True)
    model = dense(name, **options)
    agrees(captured(model).module(), model)


def entries(model: nn.Module) -> dict[str, int]:
    found = {name: id(t) for name, t in model.named_parameters()}
    return found | {name: id(m) for name, m in model.named_modules()}


@pytest.mark.parametrize("name", NANO)
def test_norms_are_folded_meanwhile(name):
    """Half of a graph's nodes are transpositions around norms, which engines keep."""
    model = scattered(build(name))
    before, x = entries(model), torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = model(x)
        with folded(model):
            left = [n for n, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)]
            torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    # Channels that share a predicted kernel have different scales.
    assert all(n.endswith("mixer.mid_norm") for n in left)
    assert bool(left) == (name == "i_d_dw_conv_nano")
    assert entries(model) == before
    with pytest.raises(KeyError), folded(model):
        raise KeyError
    assert entries(model) == before and list(model.state_dict()) == list(build(name).state_dict())


def test_norms_in_training_are_not_folded():
    model = build("dw_conv_nano").train()
    before = entries(model)
    with folded(model):
        assert entries(model) == before


def test_graphs_for_onnx_hold_no_autocast():
    """It and conversions of a dtype to itself took an eighth of the time of an export."""
    model = build("i_d_dw_conv_nano")
    with graphs_for("onnx"):
        nodes = {str(node.target) for node in captured(model).graph.nodes}
    assert not [name for name in nodes if "autocast" in name or "aten.to" in name]
    assert "aten.batch_norm.default" in nodes


def test_a_classifier():
    model = scattered(build("d_dw_conv_nano"))
    program = captured(model).module()
    agrees(lambda x: [program(x)], lambda x: [model(x)], SIZES[:4])


@pytest.mark.parametrize("bins", [1, 2, 3, 6, (4, 7)])
def test_pooling_is_pytorchs(bins):
    model = nn.Sequential(nn.AdaptiveAvgPool2d(bins))
    for size in ((1, 1), (2, 5), (6, 6), (7, 13), (31, 40)):
        x = torch.randn(2, 3, *size, dtype=torch.float64)
        expected = model(x)
        with exact_pooling(model):
            assert isinstance(model[0], ExactPool)
            torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)
        assert isinstance(model[0], nn.AdaptiveAvgPool2d)
