"""Graphs that are traced: torch.fx as timm and torchvision trace, and torch.jit.trace."""

from pathlib import Path

import pytest
import timm
import torch
from torch import nn
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

import backbones
from backbones.ablations import ABLATIONS, ablated
from dense.backbone import DenseBackbone
from tests.backbones.test_export import scattered
from tests.support import NANO, build

# Odd ones too, and one so small that a window covers every map.
SIZES = ((97, 131), (230, 64), (32, 32), (301, 160))
NODES = {f"stages.{i}": str(i) for i in range(4)}


def last_nodes(model: nn.Module, **kwargs) -> dict[str, list[str]]:
    nodes = get_graph_node_names(model, **kwargs)
    return dict(train_return_nodes=[nodes[0][-1]], eval_return_nodes=[nodes[1][-1]])


@pytest.mark.parametrize("name", NANO)
def test_torchvision_extracts_features(name):
    """By torchvision's own tracer, which has not heard of timm's leaves."""
    model = scattered(build(name))
    extractor = create_feature_extractor(model, NODES).eval()
    for size in ((64, 64), (97, 131)):
        x = torch.randn(2, 3, *size)
        with torch.no_grad():
            expected = model.forward_intermediates(x, output_fmt="NHWC", intermediates_only=True)
            for got, true in zip(extractor(x).values(), expected, strict=True):
                assert got.equal(true)


@pytest.mark.parametrize("name", NANO)
def test_a_traced_classifier_trains(name):
    model, x = build(name), torch.randn(2, 3, 64, 64)
    traced = create_feature_extractor(model, **last_nodes(model))
    (out,) = traced(x).values()
    out.square().sum().backward()
    got = {n: p.grad for n, p in traced.named_parameters()}
    other = build(name)
    other(x).square().sum().backward()
    for parameter_name, parameter in other.named_parameters():
        assert got[parameter_name].equal(parameter.grad), parameter_name


@pytest.mark.parametrize("name", NANO)
def test_a_fused_network_is_traced(name):
    model = backbones.fuse(scattered(build(name)))
    x = torch.randn(1, 3, 50, 70)
    with torch.no_grad():
        traced = torch.fx.symbolic_trace(model)(x)
        # Outside of graphs its weights are packed.
        torch.testing.assert_close(traced, model(x), rtol=1e-4, atol=1e-5)


def test_no_node_after_what_is_extracted():
    """Contexts of autocast stay in every graph: they keep no layer alive."""
    extractor = create_feature_extractor(build("d_dw_conv_nano"), ["patch_embed.norm"]).eval()
    assert not [n for n in extractor.graph.nodes if n.op == "call_module" and "stages" in n.target]


@pytest.mark.parametrize("name", ["d_dw_conv_nano", "i_d_dw_conv_nano", "dw_conv_nano"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_in_a_graph_is_that_of_the_network(name, dtype):
    model = scattered(build(name, **({"se_ratio": 1 / 16} if name == "dw_conv_nano" else {})))
    traced = torch.fx.symbolic_trace(model)
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad(), torch.autocast("cpu", dtype):
        expected = model(x)
        assert traced(x).equal(expected)
        assert torch.is_autocast_enabled("cpu")
    assert not torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("ablation", [name for name, a in ABLATIONS.items() if a.options])
def test_ablations_are_traced(ablation):
    name, options = ablated(ablation, "swin_nano")
    model = scattered(build(name, **options))
    x = torch.randn(1, 3, 50, 70)
    with torch.no_grad():
        traced = torch.fx.symbolic_trace(model)(x)
        # Outside of graphs its weights are packed.
        torch.testing.assert_close(traced, model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NANO)
def test_scripting_ends_in_one_line(name):
    model = build(name).eval()
    line = r"torch\.jit\.script does not compile .* torch\.export, or torch\.jit\.trace"
    features = timm.create_model(name, features_only=True)
    for given in (model, features, DenseBackbone(name, norm="BN"), torch.fx.symbolic_trace(model)):
        with pytest.raises(RuntimeError, match=line) as caught:
            torch.jit.script(given)
        assert "\n" not in str(caught.value)


# torch.jit.trace


class Listed(nn.Module):
    """A network whose maps are a tuple, which torch.jit.trace asks for."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, x):
        return tuple(self.network(x))


KINDS = {
    "classifier": build,
    "features": lambda name: Listed(timm.create_model(name, features_only=True)),
    "dense": lambda name: DenseBackbone(name, norm="BN", fuse=True),
}
# The windowed families have what depends on the size, inside of each kind.
TRACED = [(name, "classifier") for name in NANO]
TRACED += [(name, kind) for name in NANO if "swin" in name for kind in ("features", "dense")]


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("name, kind", TRACED)
def test_traced_at_one_size_right_at_others(name, kind, tmp_path):
    model = scattered(KINDS[kind](name))
    traced_right(model, torch.randn(1, 3, 96, 96), tmp_path / "model.pt")


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("ablation", ["swin_sliding", "swin_sliding_post", "dw_conv_positions_own"])
def test_a_traced_ablation(ablation, tmp_path):
    name, options = ablated(ablation, "swin_nano")
    model = scattered(build(name, **options))
    traced_right(model, torch.randn(1, 3, 96, 96), tmp_path / "model.pt")


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_traced_where_one_window_covers_all(tmp_path):
    model = scattered(build("swin_local_mlp_nano"))
    traced_right(model, torch.randn(1, 3, 28, 28), tmp_path / "model.pt")


def traced_right(model: nn.Module, example: torch.Tensor, file: Path) -> None:
    """Traced with one image and saved, it computes what the network does of others."""
    # Unoptimised: TorchScript would compile anew for each size.
    with torch.no_grad(), torch.jit.optimized_execution(False):
        torch.jit.trace(model, example, check_trace=False).save(file)
        traced = torch.jit.load(file)
        for size in SIZES:
            x = torch.randn(2, 3, *size)
            for got, expected in zip(maps(traced(x)), maps(model(x)), strict=True):
                assert relative_error(got, expected) < 1e-5, size


def maps(out) -> list[torch.Tensor]:
    return [out] if isinstance(out, torch.Tensor) else out


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    assert got.shape == expected.shape
    return float((got - expected).abs().max() / expected.abs().max())


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_a_traced_mask_rcnn():
    """Swin-Local-MLP in Detectron2's TracingAdapter."""
    pytest.importorskip("detectron2")
    from detectron2.config import LazyConfig, instantiate
    from detectron2.export import TracingAdapter

    from dense.recipes import RECIPES

    config = RECIPES / "detection/cascade_mask_rcnn_swin_local_mlp_nano.py"
    cfg = LazyConfig.load(str(config)).model
    for predictor in cfg.roi_heads.box_predictors:
        predictor.test_score_thresh = 0.0
    torch.manual_seed(0)
    model = instantiate(cfg).eval()

    def detect(model: nn.Module, inputs: list[dict]):
        return model.inference(inputs, do_postprocess=False)

    def photo(*size: int) -> list[dict]:
        return [dict(image=torch.rand(3, *size) * 255)]

    adapter = TracingAdapter(model, photo(96, 128), detect)
    with torch.no_grad(), torch.jit.optimized_execution(False):
        traced = torch.jit.trace(adapter, adapter.flattened_inputs, check_trace=False)
        for size in ((160, 101), (231, 300)):
            inputs = photo(*size)
            expected = detect(model, inputs)[0]
            got = adapter.outputs_schema(traced(inputs[0]["image"]))[0]
            assert len(got) == len(expected) > 0
            assert relative_error(got.scores, expected.scores) < 1e-5
            assert relative_error(got.pred_boxes.tensor, expected.pred_boxes.tensor) < 1e-5
