"""`python -m backbones.ops`: what it compares, times and prints; and the cases that it compares."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from backbones.ops import __main__ as command
from backbones.ops import cases, dispatch, native, reference, verdicts
from backbones.ops.common import forced_here
from backbones.ops.linear import ACTIVATIONS, Kept
from tests.support import randn

WINDOWED = ("window_attention", "local_mlp")


# The cases


def labels(found: list[cases.Case]) -> list[str]:
    return [case.label for case in found]


SMALL = {
    "depthwise_conv": [
        *(f"2x{c}x{s}, 7x7" for s in ("1x1", "1x13", "5x3") for c in (1, 7, 33)),
        *(f"2x5x4x9, {k}x{k}" for k in (1, 2, 3, 5)),
    ],
    "inhomogeneous_aggregation": [
        *(f"2x6x{s}, 7x7, 2 groups" for s in ("1x1", "1x13", "5x3")),
        *(f"2x{3 * g}x2x3, 3x3, {g} groups" for g in (1, 5, 40)),
        *(f"2x{2 * s}x2x3, 3x3, 2 groups" for s in (1, 17, 40)),
        *(f"2x6x2x3, {k}x{k}, 2 groups" for k in (1, 2, 5)),
    ],
    "window_attention": [
        *(f"2x{2 * d}x6x4, 2 heads, windows 3x2, shift 1 1" for d in (1, 7, 24, 48, 96)),
        *(f"2x48x{s}, 3 heads, windows {w}" for s, w in (("7x14", "7x7"), ("2x10", "2x5"))),
        "2x48x1x4, 3 heads, windows 1x2",
        *(f"2x16x8x10, 1 heads, windows 4x5, shift {s}" for s in ("2 0", "0 2")),
    ],
    "sliding_attention": [
        *(
            f"2x{2 * d}x{s}, 2 heads, windows 3x5"
            for s in ("1x1", "1x13", "5x3")
            for d in (1, 7, 24)
        ),
        *(f"2x15x4x9, 3 heads, windows {w}" for w in ("1x1", "3x3", "7x7", "9x1")),
    ],
}
SMALL["dynamic_depthwise_conv"] = SMALL["depthwise_conv"]
SMALL["inhomogeneous_dynamic_depthwise_conv"] = [
    f"{label}, depth 24" for label in SMALL["inhomogeneous_aggregation"]
]
by_window = "2x32x6x4, 2 heads, windows 3x2, shift 1 1, weights by window"
SMALL["local_mlp"] = [*SMALL["window_attention"], by_window]
FIRST = {
    "depthwise_conv": "2x40x9x19, 7x7",
    "dynamic_depthwise_conv": "2x40x9x19, 7x7",
    "inhomogeneous_dynamic_depthwise_conv": "2x96x9x19, 7x7, 32 groups, depth 24",
    "inhomogeneous_aggregation": "2x96x9x19, 7x7, 32 groups",
    "window_attention": "2x64x14x21, 2 heads, windows 7x7, shift 3 3",
    "local_mlp": "2x64x14x21, 2 heads, windows 7x7, shift 3 3",
    "sliding_attention": "2x64x9x19, 2 heads, windows 7x7",
}
STAGES = {
    "depthwise_conv": ["2x96x56x56, 7x7", "2x384x14x14, 7x7"],
    "dynamic_depthwise_conv": ["2x96x56x56, 7x7", "2x384x14x14, 7x7"],
    "inhomogeneous_dynamic_depthwise_conv": [
        "2x96x56x56, 7x7, 32 groups, depth 24",
        "2x384x14x14, 7x7, 32 groups, depth 24",
    ],
    "inhomogeneous_aggregation": ["2x96x56x56, 7x7, 32 groups", "2x384x14x14, 7x7, 32 groups"],
    "window_attention": [
        "2x96x56x56, 3 heads, windows 7x7, shift 3 3",
        "2x384x14x14, 12 heads, windows 7x7, shift 3 3",
    ],
    "sliding_attention": ["2x96x56x56, 3 heads, windows 7x7", "2x384x14x14, 12 heads, windows 7x7"],
}
STAGES["local_mlp"] = STAGES["window_attention"]


@pytest.mark.parametrize("operator", FIRST)
def test_the_cases_of_an_operator(operator):
    small = cases.small_cases(operator)
    assert labels(small) == SMALL[operator]
    first, stages = cases.first_case(operator), cases.stage_cases(operator, 2)
    assert first.label == FIRST[operator] and labels(stages) == STAGES[operator]
    assert {case.operator for case in (*small, first, *stages)} == {operator}
    assert labels(command._cases(operator)[0]) == [*SMALL[operator], FIRST[operator]]
    for batch in (1, 2):
        label = STAGES[operator][0].replace("2x", f"{batch}x", 1)
        given = {} if batch == 1 else dict(batch=batch)
        assert command._cases(operator, **given)[1][0].label == label


def sizes(label: str) -> dict:
    """What a label says."""
    whole, *rest = label.split(", ")
    said = dict(zip("bchw", map(int, whole.split("x")), strict=True))
    for part in rest:
        number = part.split()[0]
        if part.endswith(("groups", "heads")):
            said["parts"] = int(number)
        elif part.startswith("depth"):
            said["depth"] = int(part.split()[1])
        elif part.startswith("windows"):
            said["window"] = [int(side) for side in part.split()[1].split("x")]
        elif part.startswith("shift"):
            said["shift"] = [int(by) for by in part.split()[1:]]
        elif part[0].isdigit():
            said["kernel"] = int(part.split("x")[0])
    return said


@pytest.mark.parametrize("operator", FIRST)
def test_cases_are_what_their_labels_say_and_the_reference_s(operator):
    """Of every shape, normally distributed, and each tensor different."""
    for case in (*cases.small_cases(operator), cases.first_case(operator)):
        said = sizes(case.label)
        b, c, h, w, k = *(said[name] for name in "bchw"), said.get("kernel", 0)
        n, parts = math.prod(said.get("window", [0])), said.get("parts", 1)
        grid = ()
        if "by window" in case.label:
            grid = h // said["window"][0], w // said["window"][1]
        depth = said.get("depth", 0)
        expected = {
            "depthwise_conv": [(b, h, w, c), (1, k * k, c), (c,)],
            "dynamic_depthwise_conv": [(b, h, w, c), (b, k * k, c), (c,)],
            "inhomogeneous_dynamic_depthwise_conv": [
                *((b, h, w, parts, c // parts), (b, h, w, depth)),
                *((parts * k * k, depth), (parts * k * k,)),
            ],
            "inhomogeneous_aggregation": [(b, h, w, parts, c // parts), (b, h, w, parts, k * k)],
            "window_attention": [(b, h, w, 3 * c), (parts, n, n)],
            "local_mlp": [(b, h, w, c), (*grid, parts, n, n)],
            "sliding_attention": [(b, h, w, 3 * c), (parts, n)],
        }[operator]
        assert [tuple(x.shape) for x in case.tensors] == expected, case.label
        assert len({x.flatten()[0].item() for x in case.tensors}) == len(expected)
        for x in case.tensors:
            scale = depth**0.5 if x.shape == (parts * k * k, depth) else 1
            if x.numel() > 500:
                assert (x * scale).std().item() == pytest.approx(1, rel=0.2), case.label
        with forced_here("torch"):
            out = case.run(*case.tensors)[0]
        x, *others = case.tensors
        if "depthwise_conv" in operator and "inhomogeneous" not in operator:
            kernels = others[0].mT.unflatten(2, (k, k))
            kernels = kernels.transpose(0, 1) if operator == "depthwise_conv" else kernels
            true = getattr(reference, operator)(x, kernels, others[1])
        elif operator.startswith("inhomogeneous"):
            given = [k] if depth else []
            others = others if depth else [others[0].unflatten(4, (k, k))]
            true = getattr(reference, operator)(x.flatten(3), *others, *given)
        elif operator == "local_mlp":
            bias = torch.zeros_like(others[0][0, 0] if grid else others[0])
            shift = said.get("shift", [0, 0])
            true = reference.local_mlp(x, others[0], bias, said["window"], shift)
        else:
            given = [said.get("shift", [0, 0])] if operator in WINDOWED else []
            true = getattr(reference, operator)(x, *others, parts, said["window"], *given)
        torch.testing.assert_close(out.flatten(3), true)


def test_the_error_of_a_backend():
    """The largest of any output, over its largest value; of inputs that are rounded before."""

    def forward(x, y):
        from backbones.ops.common import here

        return x + y + (0.25 if here.backend == "native" else 0)

    def backward(grad, x, y):
        from backbones.ops.common import here

        wrong = 0.5 if here.backend == "native" else 0
        given.append(grad)
        return grad * 0 + 1, grad * 0 + 2 + wrong

    given = []
    x, y = torch.tensor([1.0, 3.0]).double(), torch.tensor([1 / 3, 1.0]).double()
    case = cases.Case("linear", "", forward, backward, (x, y))
    assert case.error("torch", "cpu", torch.bfloat16) < 2e-3
    grads = [grad.double() for grad in given]
    assert grads[0].equal(grads[1]) and grads[0].equal(cases.normal(0, 2).bfloat16().double())
    assert given[0].dtype == torch.float64 and given[1].dtype == torch.bfloat16
    assert case.error("native", "cpu", torch.float64) == 0.25
    assert case.error("native", "cpu", torch.float32) == 0.25
    alone = cases.Case("linear", "", forward, None, (x, y))
    assert alone.error("native", "cpu", torch.float64) == 0.0625
    assert len(alone.run(x, y)) == 1
    # Without a gradient of the output, that is the output itself.
    given.clear()
    out, *_ = case.run(x, y)
    assert given[0].equal(out) and not out.requires_grad
    empty = cases.Case("linear", "", lambda x: x[:0], lambda g, x: (x,), (x,))
    assert empty.error("torch", "cpu", torch.float64) == 0
    zero = cases.Case("linear", "", lambda x: x * 0, None, (x,))
    assert zero.error("torch", "cpu", torch.float64) == 0


# The command


def test_what_the_linear_layer_is_compared_on():
    small, stages = command._cases("linear", batch=2)
    expected = [
        f"{rows} rows, {channels} to {out}, {then}{packed}"
        for rows, channels, out in ((1, 3, 5), (50, 96, 384))
        for then in ("none", "gelu", "relu")
        for packed in ("", ", packed")
    ]
    assert labels(small) == expected
    assert labels(stages) == [
        "6272 rows, 96 to 384, gelu, packed",
        "392 rows, 384 to 1536, gelu, packed",
    ]
    assert labels(command._cases("linear")[1])[0].startswith("3136 rows")
    for case in small:
        x, weight, bias = case.tensors
        rows, channels, out = x.shape[0], x.shape[1], weight.shape[0]
        assert case.label.startswith(f"{rows} rows, {channels} to {out}, ")
        assert bias.shape == (out,) and weight.shape == (out, channels)
        assert len({t.flatten()[0].item() for t in case.tensors}) == 3
        with torch.no_grad():
            true = ACTIVATIONS[case.label.split(", ")[2]](x @ weight.T + bias)
        torch.testing.assert_close(case.run(*case.tensors), (true,))
    assert case.operator == "linear" and case.backward is None


def test_what_called_layers_are_compared_on():
    small, stages = command._cases("linear_layer", batch=2)
    assert labels(small) == ["1 rows, 3 to 5", "130 rows, 96 to 384"]
    assert labels(stages) == ["6272 rows, 96 to 384"]
    assert labels(command._cases("linear_layer")[1]) == ["3136 rows, 96 to 384"]
    for case in small:
        x, weight, bias = case.tensors
        assert case.label == f"{len(x)} rows, {x.shape[1]} to {len(weight)}"
        assert weight.shape[1] == x.shape[1] and bias.shape == weight.shape[:1]
        assert len({t.flatten()[0].item() for t in case.tensors}) == 3
        grad, true = torch.randn(len(x), len(weight)), [t.requires_grad_() for t in case.tensors]
        expected = x @ weight.T + bias
        gradients = torch.autograd.grad(expected, true, grad.double())
        for backend in ("torch", "onednn"):
            with forced_here(backend):
                got = case.run(*(t.detach().float() for t in true), grad=grad)
            for one, other in zip(got, (expected, *gradients), strict=True):
                near = 1e-5 * float(other.detach().abs().max())
                torch.testing.assert_close(one.double(), other.detach(), rtol=0, atol=near)


def test_what_the_half_of_a_block_is_compared_on():
    small, stages = command._cases("residual_mlp", batch=2)
    assert labels(small) == [
        f"{rows} rows, {channels} channels, {hidden} hidden"
        for rows, channels, hidden in ((1, 3, 5), (50, 33, 130), (209, 96, 384))
    ]
    assert labels(stages) == [
        "6272 rows, 96 channels, 384 hidden",
        "392 rows, 384 channels, 1536 hidden",
    ]
    for case in small:
        x, mixed, project, first, second = case.tensors
        assert case.operator == "residual_mlp" and case.backward is None
        y = x + mixed.relu() @ project.T
        true = y + F.gelu(F.layer_norm(y, y.shape[1:]) @ first.T) @ second.T
        for backend in ("torch", *(["native"] if native.missing() is None else [])):
            with forced_here(backend):
                torch.testing.assert_close(case.run(*case.tensors), (true,))
            assert case.error(backend, "cpu", torch.float32) < 1e-5


@pytest.mark.parametrize("packed", [False, True])
def test_packed_weights_are_kept_for_a_case(packed, monkeypatch):
    given = []
    monkeypatch.setattr(command, "linear", lambda *a: given.append(a) or a[0])
    case = command._linear(2, 3, 4, "relu", packed)
    for _ in range(2):
        case.run(*case.tensors)
    assert [a[3] for a in given] == ["relu"] * 2
    kept = {id(a[4]) for a in given}
    assert len(kept) == 1 and isinstance(given[0][4], Kept) == packed


def test_what_is_shown(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(command, "OPERATORS", {"linear": (), "local_mlp": ()})

    def explain(operator, device, dtype):
        assert dtype == torch.float32
        return "triton" if device == "cuda:0" else "torch", f"why {operator}"

    monkeypatch.setattr(command, "explain", explain)
    monkeypatch.setattr(native, "origin", lambda: "from here")
    found = [
        verdicts.Verdict("linear", "onednn", "float32", use, f"reason {use}", "cpu Fast")
        for use in (True, False)
    ]
    monkeypatch.setattr(verdicts, "every", lambda: found)
    assert command.main([]) == 0
    name = "{:<37}".format
    assert capsys.readouterr().out.splitlines() == [
        f"cpu    {name('linear')} torch      why linear",
        f"cpu    {name('local_mlp')} torch      why local_mlp",
        f"cuda:0 {name('linear')} triton     why linear",
        f"cuda:0 {name('local_mlp')} triton     why local_mlp",
        "C kernels from here",
        "cpu Fast: linear: used: reason True",
        "cpu Fast: linear: not used: reason False",
    ]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(native, "origin", lambda: None)
    assert command.main([]) == 0
    shown = capsys.readouterr().out
    assert "cuda" not in shown and "C kernels" not in shown


def test_what_cannot_be_done(monkeypatch, capsys):
    monkeypatch.setattr(verdicts, "forget", lambda: 3)
    assert command.main(["--reset"]) == 0
    assert capsys.readouterr().out == "3 verdicts forgotten\n"
    for error in (PermissionError("read-only"), RuntimeError("read-only")):

        def fails(error=error):
            raise error

        monkeypatch.setattr(verdicts, "forget", fails)
        assert command.main(["--reset"]) == 1
        assert capsys.readouterr().err == "the verdicts cannot be removed: read-only\n"
    monkeypatch.setenv("DENSE_OPS", "fast")
    assert command.main([]) == 2
    assert capsys.readouterr().err.startswith("DENSE_OPS='fast': ")
    for words in (["--check", "--reset"], ["more"]):
        with pytest.raises(SystemExit):
            command.main(words)
    said = capsys.readouterr().err
    assert "usage: python -m backbones.ops [-h] [--check | --reset]" in said
    with pytest.raises(SystemExit):
        command.main(["--help"])
    assert command.__doc__ in capsys.readouterr().out


@pytest.mark.usefixtures("unforced")
@pytest.mark.parametrize("gpu, interpreted", [(False, False), (False, True), (True, False)])
def test_what_is_compared(gpu, interpreted, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(native, "missing", lambda: None)
    asked = []

    def explain(operator, device, dtype):
        asked.append((operator, device, dtype, torch.is_grad_enabled()))
        return "onednn" if dtype == torch.float32 else "torch", ""

    monkeypatch.setattr(command, "explain", explain)
    halves = [torch.bfloat16, torch.float16]
    of_c = [torch.float64, torch.float32, *halves]
    others = "linear", "linear_layer", "convolutional_attention", "residual_mlp"
    own = [name for name in dispatch.OPERATORS if name not in others]
    expected = [("cpu", name, "native", dtype) for name in own for dtype in of_c]
    expected += [("cpu", name, "onednn", torch.float32) for name in others[:2]]
    expected += [("cpu", "residual_mlp", "native", dtype) for dtype in of_c]
    if gpu or interpreted:
        device = "cuda:0" if gpu else "cpu"
        expected += [
            (device, name, "triton", dtype) for name in own for dtype in (torch.float32, *halves)
        ]
    assert list(command._subjects(interpreted)) == expected
    pair = (torch.float32, torch.bfloat16)
    assert asked == [(name, "cpu", dtype, False) for name in others[:2] for dtype in pair]
    monkeypatch.setattr(native, "missing", lambda: "no compiler")
    assert "native" not in {backend for _, _, backend, _ in command._subjects(interpreted)}


@pytest.mark.parametrize("agree", [[True] * 4, [True, False, False, True]])
@pytest.mark.parametrize("interpret", ["0", "1"])
def test_a_check_prints_a_table_of_each_device(agree, interpret, monkeypatch, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", interpret)
    calls, left = [], list(agree)
    subjects = [
        ("cpu", "linear", "onednn", torch.float32),
        ("cpu", "local_mlp", "triton", torch.float32),
        ("cuda:0", "local_mlp", "triton", torch.float16),
        ("cuda:0", "local_mlp", "native", torch.float16),
    ]
    interpreted = interpret == "1"
    monkeypatch.setattr(
        command, "_subjects", lambda given: iter(subjects) if given == interpreted else ()
    )
    monkeypatch.setattr(command, "_check_one", lambda *given: calls.append(given) or left.pop(0))
    monkeypatch.setattr(verdicts, "processor", lambda device: f"{device} Fast")
    assert command.main(["--check"]) == int(not all(agree))
    head = (
        "operator".ljust(37) + "backend dtype    cases error    at most ms       torch, ms verdict"
    )
    assert capsys.readouterr().out.splitlines() == [
        *(f"cpu Fast, torch {torch.__version__}", head),
        *(f"cuda:0 Fast, torch {torch.__version__}", head),
    ]
    reals = [True, not interpreted, not interpreted, True]
    assert calls == [(*one, real) for one, real in zip(subjects, reals, strict=True)]


class Stub:
    """A case with an error."""

    def __init__(self, label, error):
        self.label, self.given, self.found = label, [], error

    def error(self, *given):
        self.given.append(given)
        if isinstance(self.found, Exception):
            raise self.found
        return self.found


@pytest.fixture
def checked(monkeypatch, capsys):
    """A function that checks one operator: whether it agrees, its row, and what is remembered."""
    remembered, timed = [], []
    monkeypatch.setattr(verdicts, "remember", lambda *given: remembered.append(given))
    monkeypatch.setattr(verdicts, "processor", lambda device: "Fast")

    def run(found, dtype=torch.float32, backend="triton", device="cpu", real=True, times=(1, 2)):
        small, stages = found[:-2], found[-2:]
        batches = []

        def all_cases(operator, batch=1):
            batches.append(batch)
            return small, stages

        def milliseconds(cases_, kind, *given):
            timed.append((cases_, kind, *given))
            return times[kind == "torch"]

        monkeypatch.setattr(command, "_cases", all_cases)
        monkeypatch.setattr(command, "_milliseconds", milliseconds)
        del remembered[:], timed[:]
        agrees = command._check_one(device, "local_mlp", backend, dtype, real)
        return agrees, capsys.readouterr().out, list(remembered), list(timed), batches

    return run


def test_a_row_of_a_check(checked):
    found = [Stub("a", 1e-6), Stub("b", 3.14e-5), Stub("first stage", 1.0), Stub("third", 2e-5)]
    agrees, out, remembered, timed, batches = checked(found, times=(1.234, 2))
    assert agrees is True
    name = "local_mlp".ljust(37)
    assert out == f"{name}triton  float32  3     3.1e-05  1e-04   1.23     2.00      agrees\n"
    ((verdict, device),) = remembered
    assert (verdict.use, device, verdict.backend) == (True, "cpu", "triton")
    stages = found[2:]
    assert timed == [(stages, kind, "cpu", torch.float32) for kind in ("triton", "torch")]
    assert batches == [1, 2]
    assert found[0].given == [("triton", "cpu", torch.float32)] and not found[2].given


def test_what_is_timed(checked):
    found = [Stub("a", 1e-6), Stub("first stage", 1.0), Stub("third", 2e-5)]
    *_, timed, _ = checked(found, torch.bfloat16)
    assert timed == []
    *_, timed, batches = checked(found, torch.bfloat16, device="cuda:0")
    assert len(timed) == 2 and batches == [1, 32]
    agrees, out, remembered, timed, _ = checked(found, real=False, times=(9, 1))
    assert (
        agrees
        and not remembered
        and not timed
        and out.split()[3:] == ["1", "1.0e-06", "1e-04", "agrees"]
    )
    # Which is a little slower, is used all the same.
    for mine, use in ((2.1, True), (2.11, False)):
        agrees, out, ((verdict, _),), *_ = checked(found, times=(mine, 2))
        assert agrees and verdict.use == use
        if not use:
            word = "agrees, slower than torch: 2.11 against 2.00 ms"
            assert verdict.reason == f"triton {word} in float32" and out.endswith(f"{word}\n")
    agrees, out, ((verdict, _),), *_ = checked(found, backend="native", times=(9, 1))
    assert verdict.use and out.endswith("agrees\n")


@pytest.mark.parametrize("error", [0.02, math.nan, math.inf])
def test_the_worst_case_is_named(error, checked):
    found = [Stub("a", 0.01), Stub("b", error), Stub("c", 0.015), Stub("first", 0), Stub("d", 0.0)]
    agrees, out, ((verdict, _),), *_ = checked(found, backend="native", times=(9, 1))
    assert agrees is False and verdict.use is False and out.endswith("disagrees: b\n")


@pytest.mark.parametrize(
    "error, said", [(ValueError("\n one\ntwo"), "ValueError: one"), (OSError(), "OSError: ")]
)
def test_a_backend_that_raises(error, said, checked):
    found = [Stub("a", error), Stub("first stage", 1.0), Stub("third", 2e-5)]
    agrees, out, remembered, *_ = checked(found)
    assert agrees is False and not remembered
    blank = " " * 36
    assert out == f"{'local_mlp'.ljust(37)}triton  float32  2     {blank}{said}\n"


def test_times_are_of_a_forced_backend(monkeypatch):
    import torch.utils.benchmark as benchmark

    from backbones.ops.common import here

    made = []

    class Timer:
        def __init__(self, text, globals, num_threads):
            made.append((text, globals["tensors"], num_threads))
            self.run = globals["run"]

        def blocked_autorange(self, min_run_time):
            made.append((min_run_time, here.backend, self.run))
            return SimpleNamespace(median=0.25)

    monkeypatch.setattr(benchmark, "Timer", Timer)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    case = cases.Case("linear", "", lambda x: x, None, (randn(2),))
    assert command._milliseconds([case, case], "native", "cpu", torch.float16) == 500
    assert len(made) == 4 and made[1] == (0.3, "native", case.run)
    text, (x,), threads = made[0]
    assert (text, threads, x.dtype) == ("run(*tensors)", 3, torch.float16)
