"""Which contests the benchmark plans, and what their steps compute."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from dense.analysis.benchmark import engines, networks, operators
from dense.analysis.benchmark.measure import Contest

CPU, GPU = torch.device("cpu"), torch.device("cuda")
OURS = ["swin", "swin_local_mlp", "dw_conv", "d_dw_conv", "i_d_dw_conv"]
PEERS = ["timm swin_tiny", "timm convnext_tiny", "torchvision swin_t"]


def described(contest: Contest) -> tuple:
    return contest.suite, contest.title, contest.images, contest.pixels


# Operators

CONTENDERS = {
    "I-D-DW-Conv with its kernels' prediction": [
        "conv2d 1x1, then its 49 taps summed",
        "conv2d 1x1, then unfold",
        "ours",
    ],
    "aggregation by kernels that are given": ["its 49 taps summed", "unfold", "ours"],
    "D-DW-Conv given its kernels": ["conv2d of B*C groups", "ours"],
    "depth-wise 7x7": ["conv2d, NCHW", "conv2d, channels last", "ours"],
    "window attention": [
        "explicit softmax",
        "SDPA, bias and mask given",
        "FlexAttention, compiled",
        "ours",
    ],
    "window attention, shifted": [
        "explicit, mask of -100",
        "SDPA, bias and mask given",
        "FlexAttention, compiled",
        "ours",
    ],
    "sliding attention": ["unfold", "ours", "ours, shifted windows"],
    "local MLP": ["conv1d of one group a head", "ours"],
}


def test_contests_of_operators():
    passes = {"training": "forward + backward", "inference": "forward"}
    expected, names = [], []
    for size, images, pixels in (
        ("8x96x56x56", 8, 25088),
        ("1x96x200x336", 1, 67200),
        ("8x384x14x14", 8, 1568),
    ):
        for name in CONTENDERS if "x96x" in size else ["sliding attention"]:
            for what in passes.values():
                expected.append(("operators", f"{name}, {what}, {size}", images, pixels))
                names.append(CONTENDERS[name])
    found = operators.contests(CPU, list(passes))
    assert [described(contest) for contest in found] == expected
    assert [[one.name for one in contest.contenders] for contest in found] == names
    for one in (one for contest in found for one in contest.contenders):
        assert (one.ours, one.in_torch) == (one.name.startswith("ours"), True)
        assert one.multiply_adds is None
    # The last is the deeper stage's, of twelve heads.
    assert found[-1].contenders[1].build()().shape == (8, 14, 14, 384)


# Shapes and standard deviations of what ours is given for maps (2, 8, 15) and 96 channels.
GIVEN = {
    operators._inhomogeneous: [
        ((2, 8, 15, 96), 1),
        ((2, 8, 15, 24), 1),
        ((32 * 49, 24), 24**-0.5),
        ((32 * 49,), 1),
    ],
    operators._aggregation: [((2, 8, 15, 96), 1), ((2, 8, 15, 32, 7, 7), 1 / 7)],
    operators._dynamic: [((2, 8, 15, 96), 1), ((2, 96, 7, 7), 1 / 7), ((96,), 1)],
    operators._depthwise: [((2, 8, 15, 96), 1), ((96, 1, 7, 7), 1 / 7), ((96,), 1)],
    operators._attention: [((2, 14, 21, 288), 1), ((3, 49, 49), 1)],
    operators._shifted_attention: [((2, 14, 21, 288), 1), ((3, 49, 49), 1)],
    operators._sliding: [((2, 8, 15, 288), 1), ((3, 49), 1)],
    operators._mlp: [((2, 14, 21, 96), 1), ((3, 49, 49), 1 / 7), ((3, 49, 49), 1 / 7)],
}
LAYOUTS = {"conv2d, channels last": torch.channels_last}


@pytest.mark.parametrize("make", GIVEN)
def test_operators_and_their_peers_have_the_same_gradients(make, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda f, **k: compiled.append(k) or f)
    _, functions = make(2, 8, 15, CPU)
    found = {}
    for name, prepare in functions.items():
        torch.manual_seed(0)
        function, inputs = prepare()
        assert {x.dtype for x in inputs} == {torch.float32}
        if name == "ours":
            for x, (shape, deviation) in zip(inputs, GIVEN[make], strict=True):
                assert x.shape == shape and x.std().item() == pytest.approx(deviation, rel=0.2)
        elif name == "ours, shifted windows":
            continue
        # Each in the layout that it prefers.
        if inputs[0].dim() == 4:
            layout = LAYOUTS.get(name, torch.contiguous_format)
            assert inputs[0].is_contiguous(memory_format=layout), name
        inputs = [x.double() for x in inputs]
        if name == "FlexAttention, compiled":
            # It has no gradients on a CPU.
            assert compiled == [{"dynamic": False}]
            found[name] = [function(*inputs)]
            continue
        leaves = [x.requires_grad_() for x in inputs]
        out = function(*leaves)
        found[name] = [out.detach(), *torch.autograd.grad(out.square().sum(), leaves)]
    # In whatever order of axes: the same numbers.
    reference = [x.flatten().sort().values for x in found.pop("ours")]
    assert found
    for name, tensors in found.items():
        for got, expected in zip(tensors, reference, strict=name.startswith("Flex") is False):
            torch.testing.assert_close(
                got.flatten().sort().values, expected, msg=lambda text, n=name: f"{n}: {text}"
            )


def test_another_peer_on_gpus(monkeypatch):
    """mmcv's kernel is given maps in float32, 7x7 taps, 32 groups, at scale 1."""
    given = []

    def carafe_naive(x, kernels, *options):
        given.append((x.dtype, kernels.dtype, *options))
        return operators._summed(x, kernels.unflatten(1, (32, 1, 49)))

    module = SimpleNamespace(carafe_naive=carafe_naive)
    monkeypatch.setitem(__import__("sys").modules, "mmcv.ops", module)
    monkeypatch.setattr(operators, "_dtype", lambda device: torch.float32)
    randn = torch.randn
    monkeypatch.setattr(torch, "randn", lambda *a, device, **k: randn(*a, **k))
    _, functions = operators._inhomogeneous(1, 8, 9, GPU)
    assert list(functions)[3:] == ["conv2d 1x1, then mmcv carafe_naive"]
    outs = []
    for prepare in (*functions.values(),)[::3]:
        torch.manual_seed(0)
        function, inputs = prepare()
        outs.append(function(*inputs))
    torch.testing.assert_close(*outs)
    assert given == [(torch.float32, torch.float32, 7, 32, 1)]


def test_steps_of_an_operator():
    def prepare():
        x, y = torch.randn(3, 4), torch.randn(3, 4)
        return (lambda x, y, index: x[index] * y[index]), [x, y, torch.tensor([2, 0])]

    torch.manual_seed(0)
    x, y, grad = torch.randn(3, 4), torch.randn(3, 4), torch.randn(2, 4)
    for _ in range(2):
        out = operators._builder(prepare, "inference")()()
        assert out.equal((x * y)[[2, 0]]) and not out.requires_grad
        step = operators._builder(prepare, "training")()
        for _ in range(2):
            for got, other in zip(step(), (y, x), strict=True):
                expected = torch.zeros(3, 4)
                expected[[2, 0]] = grad * other[[2, 0]]
                assert got.equal(expected)
    assert operators._dtype(GPU) == torch.bfloat16 and operators._dtype(CPU) == torch.float32


# Networks


class Probe(nn.Module):
    """Notes how it is run."""

    def __init__(self, seen: list):
        super().__init__()
        self.conv, self.seen = nn.Conv2d(3, 4, 2), seen

    def forward(self, x):
        out = self.conv(x)
        last = torch.channels_last
        assert self.conv.weight.is_contiguous(memory_format=last)
        assert x.is_contiguous(memory_format=last)
        self.seen.append((tuple(x.shape), self.training, torch.is_grad_enabled(), out.dtype))
        return out


@pytest.fixture
def probes(monkeypatch):
    """Networks that note how they are run, in place of peers."""
    seen, sizes = [], []
    make = {name: lambda size: sizes.append(size) or Probe(seen) for name in PEERS}
    monkeypatch.setattr(networks, "_PEERS", make)
    return seen, sizes


def test_contests_of_networks():
    found = networks.contests([(224, 224), (64, 96)], None, CPU)
    expected = [
        ("networks", "tiny, inference, 224x224, batch 4", 4, 4 * 224 * 224),
        ("networks", "tiny, training, 224x224, batch 4", 4, 4 * 224 * 224),
        ("networks", "tiny, inference, 64x96, batch 32", 32, 32 * 64 * 96),
        ("networks", "tiny, training, 64x96, batch 32", 32, 32 * 64 * 96),
    ]
    assert [described(contest) for contest in found] == expected
    for contest in found:
        named = [(one.name, one.ours, one.in_torch) for one in contest.contenders]
        assert named == [(name, False, True) for name in PEERS] + [
            (f"{name}_tiny", True, True) for name in OURS
        ]
        assert {one.multiply_adds for one in contest.contenders} == {None}


@pytest.mark.parametrize(
    "size, images, of_gpu",
    [((224, 224), 4, 64), ((512, 512), 1, 12), ((800, 1344), 1, 2), ((2000, 2000), 1, 1)],
)
def test_as_many_images_as_have_the_pixels_of_some_of_224(size, images, of_gpu):
    assert networks._default_batch(size, CPU) == images
    assert networks._default_batch(size, GPU) == of_gpu
    assert networks.default_dtype(GPU) == torch.bfloat16
    assert networks.default_dtype(CPU) == torch.float32


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_steps_of_a_network(probes, dtype):
    seen, sizes = probes
    shown = torch.float32 if dtype is None else dtype
    infer, train = networks.contests([(5, 7)], 2, CPU, scale="nano", dtype=dtype)
    steps = [contest.contenders[1].build() for contest in (infer, train)]
    torch.manual_seed(0)
    model, x = Probe([]), torch.randn(2, 3, 5, 7)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype is not None):
        expected = model.conv(x.contiguous(memory_format=torch.channels_last))
    for step in steps:
        out = step(), step()
    assert out == (None, None)
    torch.testing.assert_close(steps[0](), expected.detach())
    assert seen[:-1] == [((2, 3, 5, 7), mode, mode, shown) for mode in (False, False, True, True)]
    assert sizes == [(5, 7)] * 2


def test_gradients_of_a_training_step_are_of_one():
    made = []

    def make(size):
        made.append(Probe([]))
        return made[-1]

    step = networks._builder(make, (5, 7), 2, "training", CPU, torch.float32)()
    torch.manual_seed(0)
    model, x = Probe([]), torch.randn(2, 3, 5, 7)
    model.conv(x).square().mean().backward()
    for _ in range(2):
        step()
        torch.testing.assert_close(made[0].conv.weight.grad, model.conv.weight.grad)


def test_networks_compiled_and_in_engines(probes, monkeypatch):
    seen, sizes = probes
    compiled, exported = [], []
    monkeypatch.setattr(torch, "compile", lambda model, **k: compiled.append(k) or model)

    def steps(make, dtype):
        exported.append((make, dtype))
        return {"one": lambda: lambda: make()[1].sum(), "two": lambda: None}

    monkeypatch.setattr(engines, "steps", steps)
    infer, train = networks.contests(
        [(5, 7)], 2, CPU, compiled=True, scale="nano", engines=True, limit=False
    )
    ending = ", 5x7, batch 2, eager and compiled, with engines"
    assert [infer.title, train.title] == [f"nano, {m}{ending}" for m in ("inference", "training")]
    ours = [f"{name}_nano" for name in OURS]
    plain = ("", ", compiled")
    both = [*plain, ", one", ", two"]
    expected = [(PEERS[0], both), (PEERS[1], both), (PEERS[2], plain), *((o, both) for o in ours)]
    named = [(one.name, one.ours, one.in_torch) for one in infer.contenders]
    assert named == [
        (f"{name}{end}", name in ours, end not in both[2:])
        for name, ends in expected
        for end in ends
    ]
    assert [one.name for one in train.contenders] == [
        f"{name}{end}" for name, _ in expected for end in plain
    ]
    infer.contenders[0].build()
    assert compiled == []
    infer.contenders[1].build()()
    assert compiled == [{"dynamic": True}]
    # An engine is given the network in evaluation mode and the same images each time.
    make, dtype = exported[0]
    model, x = make()
    assert dtype == torch.float32 and not model.training and x.shape == (2, 3, 5, 7)
    torch.manual_seed(0)
    Probe([])
    assert x.equal(torch.randn(2, 3, 5, 7)) and sizes[-1] == (5, 7)
    # Ours before it is fused: an export fuses it itself.
    assert any(isinstance(m, nn.BatchNorm2d) for m in exported[-1][0]()[0].modules())


def test_ours_is_of_the_size_and_fused_for_inference():
    for mode in ("inference", "training"):
        model = networks._our("swin_local_mlp_nano", mode)((64, 96))
        assert model(torch.zeros(2, 3, 64, 96)).shape == (2, 1000)
        model = networks._our("dw_conv_nano", mode)((64, 96))
        assert any(isinstance(m, nn.BatchNorm2d) for m in model.modules()) == (mode == "training")


def test_peers():
    size = (64, 96)
    parameters = {}
    for name, make in networks._PEERS.items():
        model = make(size).eval()
        parameters[name] = sum(p.numel() for p in model.parameters())
        with torch.no_grad():
            assert model(torch.zeros(1, 3, *size)).shape == (1, 1000)
    # Millions, of the papers.
    assert {name: round(n / 1e6) for name, n in parameters.items()} == {
        "timm swin_tiny": 28,
        "timm convnext_tiny": 29,
        "torchvision swin_t": 28,
    }


def test_contests_of_scaling(monkeypatch):
    monkeypatch.setattr(networks, "_builder", lambda *given: given)
    monkeypatch.setattr(networks, "_our", lambda *given: given)
    found = networks.scaling_contests(CPU, ["inference", "training"])
    shapes = [(1, side) for side in (224, 320, 448, 640, 896, 1344)]
    shapes += [(batch, 224) for batch in (2, 4, 8, 16, 32, 64)]
    for contest, (mode, images, side) in zip(
        found, [(m, *s) for m in ("inference", "training") for s in shapes], strict=True
    ):
        title = f"{mode}, {side}x{side}, batch {images}"
        assert described(contest) == ("scaling", title, images, images * side * side)
        names = [f"{name}_tiny" for name in OURS]
        assert [(one.name, one.ours) for one in contest.contenders] == [(n, True) for n in names]
        for one in contest.contenders:
            expected = (one.name, mode), (side, side), images, mode, CPU, torch.float32
            assert one.build == expected
    assert len(networks.scaling_contests(CPU)) == 12
    last = networks.scaling_contests(CPU, dtype=torch.bfloat16)[-1].contenders[-1]
    assert last.build[-1] == torch.bfloat16


def test_the_product_that_limits_networks():
    product = networks._product(CPU, torch.bfloat16)
    assert (product.name, product.ours) == ("a matrix product", False)
    assert product.multiply_adds == 4096 * 1024 * 1024
    step = product.build()
    out = step()
    assert out.shape == (4096, 1024) and out.dtype == torch.bfloat16
    assert out.is_inference() and out.float().std() > 0.1
