"""Every family and every ablation's mixer, against tests/references.py: outputs and gradients."""

import pytest
import torch
from torch import Tensor, nn

import backbones
from tests import references
from tests.references import Options, Weights
from tests.support import build

HEADS = (2, 4, 8, 16)
SHARES = (1, 2, 4, 8)
# (37, 53) has maps of 10x14, 5x7, 3x4 and 2x2: several windows with padding, one, and less.
FAMILIES = {
    "swin": Options("swin", "layernorm", HEADS),
    "swin_local_mlp": Options("local_mlp", "layernorm", HEADS),
    "dw_conv": Options("dw_conv", "batchnorm"),
    "d_dw_conv": Options("d_dw_conv", "batchnorm"),
    "i_d_dw_conv": Options("i_d_dw_conv", "batchnorm"),
}
SLIDING = Options("sliding", "layernorm", HEADS)
SHARED = Options("shared_dw_conv", "batchnorm", SHARES)
FORMS = [
    ("swin", dict(sliding=True), SLIDING),
    ("swin", dict(sliding=True, position_bias=False, window_size=(3, 5)), SLIDING),
    ("swin", dict(position_bias=False, window_size=(4, 3)), FAMILIES["swin"]),
    *(
        ("swin", dict(conv=conv, window_size=5), SLIDING)
        for conv in ("static", "post", "pre", "pre_depthwise", "pre_full")
    ),
    ("swin", dict(norm_layer="batchnorm", se_ratio=1 / 16), FAMILIES["swin"]),
    ("swin", dict(norm_layer="centered_batchnorm", local_kernel=3), FAMILIES["swin"]),
    ("swin_local_mlp", dict(shared=True, window_size=(3, 4)), FAMILIES["swin_local_mlp"]),
    ("dw_conv", dict(num_heads=SHARES, window_size=4), SHARED),
    ("dw_conv", dict(num_heads=SHARES, shared=False), SHARED),
    ("dw_conv", dict(norm_layer="layernorm", se_ratio=1 / 8), FAMILIES["dw_conv"]),
    ("dw_conv", dict(norm_layer="centered_batchnorm", window_size=4), FAMILIES["dw_conv"]),
    ("d_dw_conv", dict(norm_layer="centered_batchnorm", window_size=3), FAMILIES["d_dw_conv"]),
    ("i_d_dw_conv", dict(local_kernel=7, num_groups=8), FAMILIES["i_d_dw_conv"]),
]
# Two blocks, whose windows are shifted in the second.
CASES = [
    *((name, dict(depths=(2, 2, 1, 1)), options) for name, options in FAMILIES.items()),
    *((name, given | dict(depths=(2, 1)), options) for name, given, options in FORMS),
]


@pytest.fixture(params=CASES, ids=lambda case: f"{case[0]}-{case[1]}")
def case(request) -> tuple[nn.Module, Options]:
    """A network in float64 whose every parameter matters, and what the reference is told of it."""
    name, given, options = request.param
    window = given.get("window_size", 7)
    told = dict(window=window if isinstance(window, tuple) else (window, window))
    if "norm_layer" in given:
        told["norm"] = given["norm_layer"]
    model = build(f"{name}_nano", drop_path_rate=0.5, **given).double()
    return scattered(model), Options(**vars(options) | told)


def scattered(model: nn.Module) -> nn.Module:
    torch.manual_seed(1)
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if not value.is_floating_point():
                continue
            if name.endswith("running_var"):
                value.uniform_(0.5, 2)
            elif value.ndim == 1:
                near = 1 if "norm" in name and name.endswith("weight") else 0
                value.normal_(near, 0.3)
            elif "table" in name or "post" in name or "theta" in name:
                value.normal_()
            else:
                # Of the order of the inputs' number, so that no activation is nearly linear.
                value.normal_(std=1.5 * value[0].numel() ** -0.5 if value.ndim < 6 else 0.2)
    return model


def images(batch: int = 3, size: tuple[int, int] = (37, 53)) -> Tensor:
    torch.manual_seed(2)
    return torch.randn(batch, 3, *size, dtype=torch.float64)


def ours(model: nn.Module, x: Tensor) -> list[Tensor]:
    features, maps = model.forward_intermediates(x)
    return [*maps, model.forward_head(features)]


def expected(model: nn.Module, x: Tensor, options: Options) -> tuple[list[Tensor], Weights, dict]:
    """The reference's maps and logits, its weights and those that have gradients."""
    state = {name: value.detach().clone() for name, value in model.state_dict().items()}
    learned = {name: state[name].requires_grad_() for name, _ in model.named_parameters()}
    weights = Weights(state, model.training)
    maps, logits = references.network(weights, x, options)
    assert weights.read == state.keys()
    return [*maps, logits], weights, learned


def gradients(outputs: list[Tensor], leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    torch.manual_seed(3)
    total = sum((out * torch.randn(out.shape, dtype=out.dtype)).sum() for out in outputs)
    return dict(zip(leaves, torch.autograd.grad(total, list(leaves.values())), strict=True))


def assert_close(got: list[Tensor] | dict, wanted: list[Tensor] | dict, tolerance: float) -> None:
    """The largest error is a small part of the largest value of each."""
    names = list(wanted) if isinstance(wanted, dict) else range(len(wanted))
    # Gradients of what a norm takes away again are rounding errors alone.
    least = max(wanted[name].abs().max() for name in names) / 100
    for name in names:
        one, other = got[name].double(), wanted[name]
        assert one.shape == other.shape, name
        assert (one - other).abs().max() <= tolerance * max(least, other.abs().max()), name


def compare(model: nn.Module, x: Tensor, options: Options) -> None:
    """Outputs, gradients and, in training, the statistics; the same paths are dropped."""
    options = Options(**vars(options) | dict(drop_path=0.5))
    leaf, other = (x.clone().requires_grad_() for _ in range(2))
    torch.manual_seed(4)
    wanted, weights, learned = expected(model, other, options)
    torch.manual_seed(4)
    got = ours(model, leaf)
    assert_close(got, wanted, 1e-10)
    own = dict(model.named_parameters())
    assert own.keys() == learned.keys()
    assert_close(gradients(got, own | {"x": leaf}), gradients(wanted, learned | {"x": other}), 1e-9)
    state = {name: value.double() for name, value in (weights.values | weights.statistics).items()}
    assert_close(model.state_dict(), state, 1e-10)


def test_training(case):
    model, options = case
    compare(model.train(), images(), options)


def test_training_on_one_image():
    """D-DW-Conv's kernels, which the norm of the one pooled map cannot predict."""
    name, options = "d_dw_conv", FAMILIES["d_dw_conv"]
    model = scattered(build(f"{name}_nano", depths=(2,), drop_path_rate=0.5).double())
    compare(model.train(), images(1), options)


def test_evaluation(case):
    """With gradients, without, in float32, and fused."""
    model, options = case
    model.eval()
    x = images(2)
    compare(model, x, options)
    with torch.no_grad():
        wanted, _, _ = expected(model, x, options)
        fused = backbones.fuse(model)
        assert_close(ours(model, x), wanted, 1e-10)
        assert_close(ours(fused, x), wanted, 1e-10)
    assert_close(ours(fused, x), wanted, 1e-10)
    model.float(), fused.float()
    for network in (model, fused):
        with torch.no_grad():
            assert_close(ours(network, x.float()), wanted, 1e-4)
    assert_close(ours(model, x.float()), wanted, 1e-4)
