"""The second half of a fused block in C, beside the same in float64 by PyTorch's operators."""

import copy

import pytest
import timm
import torch
import torch.nn.functional as F

import backbones
from backbones import ops
from backbones.inference import InferenceBlock
from backbones.ops import dispatch, native, verdicts
from backbones.ops.dispatch import explain
from backbones.ops.residual_mlp import Panels, by_native, residual_mlp

pytestmark = pytest.mark.skipif(native.missing() is not None, reason=f"{native.missing()}")

# The largest error, as a part of the largest value.
NEAR = {torch.float64: 1e-13, torch.float32: 4e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}
# Rows, channels, hidden channels: less than one tile, vector or panel, odd, and several of each.
SIZES = (
    (1, 1, 1),
    (2, 8, 32),
    (7, 20, 30),
    (11, 300, 40),
    (131, 33, 129),
    (209, 96, 384),
    (431, 70, 200),
)


def values(*shape: int, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(*shape, generator=generator, dtype=torch.float64)


class Given:
    """Maps and weights of one call in a dtype, and what it must return."""

    def __init__(self, size, dtype, projected=True, norm="affine", bias=True):
        rows, channels, hidden = size

        def of(seed: int, *shape: int, scale: float = 1.0) -> torch.Tensor:
            return values(*shape, seed=seed, scale=scale).to(dtype)

        def linear(seed: int, out: int, given: int):
            return of(seed, out, given, scale=given**-0.5), of(seed + 1, out) if bias else None

        self.x, self.mixed = of(1, rows, channels), of(2, rows, channels) if projected else None
        self.linears = linear(5, hidden, channels), linear(7, channels, hidden)
        if projected:
            self.linears = linear(3, channels, channels), *self.linears
        self.norm = None
        if norm is not None:
            scale = 1 + of(9, channels, scale=0.2) if norm == "affine" else None
            self.norm = scale, of(10, channels) if norm == "affine" else None, 1e-3

    def panels(self) -> Panels:
        return Panels.of(self.x.dtype, self.linears, self.norm)

    def run(self) -> torch.Tensor:
        out = torch.full_like(self.x, float("nan"))
        residual_mlp(self.x, self.mixed, self.panels(), out)
        return out

    def expected(self) -> torch.Tensor:
        def wide(t: torch.Tensor | None) -> torch.Tensor | None:
            return None if t is None else t.double()

        linears = [(wide(weight), wide(bias)) for weight, bias in self.linears]
        y = self.x.double()
        if self.mixed is not None:
            y = y + F.linear(self.mixed.double().relu(), *linears.pop(0))
        z = y
        if self.norm is not None:
            scale, shift, epsilon = self.norm
            z = F.layer_norm(y, y.shape[1:], wide(scale), wide(shift), epsilon)
        first, second = linears
        return y + F.linear(F.gelu(F.linear(z, *first)), *second)


def assert_near(got: torch.Tensor, expected: torch.Tensor) -> None:
    error = (got.double() - expected).abs().max() / expected.abs().max()
    assert error < NEAR[got.dtype]


@pytest.mark.parametrize("dtype", NEAR, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_every_part_at_odd_sizes(size, dtype):
    if not native.reads(dtype):
        pytest.skip(f"there are no C kernels for {dtype}")
    for projected in (True, False):
        given = Given(size, dtype, projected)
        assert_near(given.run(), given.expected())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("norm", [None, "plain", "affine"])
@pytest.mark.parametrize("bias", [True, False])
def test_what_may_be_missing(bias, norm, dtype):
    for projected in (True, False):
        given = Given((37, 24, 72), dtype, projected, norm, bias)
        assert_near(given.run(), given.expected())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_number_of_threads_gives_the_same_bits(dtype):
    given, threads = Given((331, 40, 160), dtype), torch.get_num_threads()
    try:
        results = []
        for number in (1, 2, 3, 7):
            torch.set_num_threads(number)
            results.append(given.run())
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(results[0], other) for other in results)


@pytest.mark.parametrize("name", ["x", "mixed"])
def test_a_map_may_take_the_result(name):
    given = Given((331, 40, 160), torch.float32)
    expected, out = given.run(), getattr(given, name)
    residual_mlp(given.x, given.mixed, given.panels(), out)
    assert torch.equal(out, expected)


def test_no_rows():
    """A window may lie wholly in the padding."""
    given = Given((0, 8, 16), torch.float32)
    assert given.run().shape == (0, 8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_gelu_is_the_exact_one_everywhere(dtype):
    # One channel and identities: the result is x + GELU(x).
    extreme = [0.0, -0.0, 1e-30, 5.39, 5.41, 30, 1e4, 3e38, float("inf"), float("nan")]
    x = torch.cat([torch.linspace(-9, 9, 4001), torch.tensor(extreme)]).to(dtype)[:, None]
    x = torch.cat([x, -x[-8:-2]])
    one = torch.ones(1, 1, dtype=dtype), None
    out = torch.empty_like(x)
    residual_mlp(x, None, Panels.of(dtype, (one, one)), out)
    near = 3e-7 if dtype == torch.float32 else 1e-15
    true = (x.double() + F.gelu(x.double())).to(dtype)
    torch.testing.assert_close(out, true, rtol=near, atol=5 * near, equal_nan=True)


def test_maps_are_refused_that_the_kernel_cannot_read():
    given = Given((8, 8, 16), torch.float32)
    panels, out = given.panels(), torch.empty(8, 8)
    with pytest.raises(ValueError, match="takes contiguous CPU tensors"):
        residual_mlp(given.x, given.mixed.t(), panels, out)
    with pytest.raises(ValueError, match="here of torch.float32: got torch.float64"):
        residual_mlp(given.x, given.mixed, panels, out.double())


# The choice


USED = ("native", "C, the fastest on a CPU")


def test_where_it_is_used(monkeypatch):
    monkeypatch.delenv(dispatch.ENVIRONMENT, raising=False)
    monkeypatch.setattr(verdicts, "known", lambda *given: None)
    monkeypatch.setattr(verdicts, "halved_by_mkl", lambda: True)
    for dtype in (torch.float32, torch.bfloat16):
        assert explain("residual_mlp", "cpu", dtype) == USED
    for dtype in (torch.float64, torch.float16):
        why = "C is used for float32 and bfloat16"
        assert explain("residual_mlp", "cpu", dtype) == ("torch", why)
    assert explain("residual_mlp", "cuda", torch.float32)[0] == "torch"
    x = torch.ones(3, 4)
    assert not by_native(x)
    with torch.no_grad():
        assert by_native(x) and not by_native(x[:0]) and not by_native(x.double())
        with ops.force("torch"):
            assert not by_native(x)
    with monkeypatch.context() as patched:
        patched.setattr(torch.compiler, "is_compiling", lambda: True)
        why = "torch.compile chooses its own kernels"
        assert explain("residual_mlp", "cpu", torch.float32) == ("torch", why)
    with torch._subclasses.FakeTensorMode():
        why = "under a mode of fake tensors nothing is computed"
        assert explain("residual_mlp", "cpu", torch.float32) == ("torch", why)
    monkeypatch.setattr(verdicts, "halved_by_mkl", lambda: False)
    why = "C's products were measured on AMD's Zen 5 only"
    assert explain("residual_mlp", "cpu", torch.float32) == ("torch", why)


def test_depthwise_convolutions_without_gradients(monkeypatch):
    monkeypatch.delenv(dispatch.ENVIRONMENT, raising=False)
    monkeypatch.setattr(verdicts, "known", lambda *given: None)
    by_torch = ("torch", "without gradients oneDNN's convolution is faster than C")
    for wide in (True, False):
        monkeypatch.setattr(verdicts, "halved_by_mkl", lambda wide=wide: wide)
        with torch.no_grad():
            assert explain("depthwise_conv", "cpu", torch.float32) == (USED if wide else by_torch)
            assert explain("depthwise_conv", "cpu", torch.bfloat16) == by_torch
        assert explain("depthwise_conv", "cpu", torch.bfloat16) == USED


# In a network


FAMILIES = "swin", "swin_local_mlp", "dw_conv", "d_dw_conv", "i_d_dw_conv"
NANO = dict(embed_dim=32, depths=(2, 1), num_heads=(2, 4), num_classes=5, img_size=48)


def network(family: str, **options) -> torch.nn.Module:
    torch.manual_seed(0)
    kind = {"swin": "swin_tiny", "swin_local_mlp": "swin_local_mlp_tiny"}.get(family)
    options = NANO | options
    if kind is None:
        kind = f"{family}_tiny"
        options = {k: v for k, v in options.items() if k not in ("num_heads", "img_size")}
    model = timm.create_model(kind, **options).eval()
    for name, buffer in model.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            buffer.uniform_(0.5, 1.5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


@pytest.fixture
def calls(monkeypatch):
    """The names of C functions that were called, and the dtype of their maps."""
    made, real = [], native.call

    def call(name, maps, *rest):
        made.append((name, maps[0].dtype))
        return real(name, maps, *rest)

    monkeypatch.setattr(native, "call", call)
    return made


@pytest.mark.parametrize("family", FAMILIES)
def test_networks(family, calls):
    model, x = network(family), values(2, 3, 48, 48).float()
    fused = backbones.fuse(copy.deepcopy(model))
    with torch.no_grad():
        expected = model.double()(x.double())
        with ops.force("native"):
            got = fused(x)
        assert [name for name, _ in calls].count("residual_mlp") >= 3
        assert_near(got, expected)
        with ops.force("native"), torch.autocast("cpu", torch.bfloat16):
            got = fused(x)
        assert ("residual_mlp", torch.bfloat16) in calls
        assert (got.double() - expected).abs().max() < 3e-2 * expected.abs().max()


def test_panels_follow_the_weights(calls):
    fused, x = backbones.fuse(network("dw_conv")), values(1, 3, 48, 48).float()
    other = backbones.fuse(network("dw_conv"))
    with torch.no_grad(), ops.force("native"):
        before = fused(x)
        held = [m.panels._kept[2] for m in fused.modules() if isinstance(m, InferenceBlock)]
        fused(x)
        again = [m.panels._kept[2] for m in fused.modules() if isinstance(m, InferenceBlock)]
        assert len(held) == 3 and all(a is b for a, b in zip(held, again, strict=True))
        other.load_state_dict({k: 1.5 * v for k, v in other.state_dict().items()})
        expected = other(x)
        assert not torch.allclose(before, expected)
        fused.load_state_dict(other.state_dict())
        assert torch.equal(fused(x), expected)
    assert not any("panels" in key for key in fused.state_dict())
    fused.to(torch.float64)
    assert all(m.panels._kept is None for m in fused.modules() if isinstance(m, InferenceBlock))


def test_a_replaced_layer_is_called(calls):
    fused, x = backbones.fuse(network("dw_conv")), values(1, 3, 48, 48).float()
    seen = []
    blocks = [m for m in fused.modules() if isinstance(m, InferenceBlock)]
    blocks[0].mixer.out_proj.register_forward_hook(lambda *given: seen.append("out_proj"))
    blocks[1].mlp.register_forward_hook(lambda *given: seen.append("mlp"))
    with torch.no_grad():
        expected = fused(x)
        seen.clear()
        with ops.force("native"):
            got = fused(x)
    assert set(seen) == {"out_proj", "mlp"}
    assert [name for name, _ in calls].count("residual_mlp") >= 1
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_hooks_of_the_mlps_layers_fire(calls):
    fused, seen = backbones.fuse(network("dw_conv")), []
    block = next(m for m in fused.modules() if isinstance(m, InferenceBlock))
    block.mlp.fc1.register_forward_hook(lambda *given: seen.append("fc1"))
    with torch.no_grad(), ops.force("native"):
        fused(values(1, 3, 48, 48).float())
    assert seen and [name for name, _ in calls].count("residual_mlp") == 2
