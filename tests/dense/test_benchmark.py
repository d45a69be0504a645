"""The benchmark compares like with like, counts memory, and keeps what it has measured."""

import json

import pytest
import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

from dense.analysis.benchmark import engines, measure, models, networks, operators, report
from dense.analysis.benchmark.measure import Contender, Contest
from tests.support import build, load_tool, points, run_without

CPU = torch.device("cpu")
tool = load_tool("benchmark")


@pytest.mark.parametrize(
    "make",
    [
        operators._inhomogeneous,
        operators._aggregation,
        operators._dynamic,
        operators._depthwise,
        operators._attention,
        operators._shifted_attention,
        operators._sliding,
        operators._mlp,
    ],
)
def test_operators_and_their_peers_compute_the_same(make):
    _, functions = make(2, 14, 21, CPU)
    found = {}
    for name, prepare in functions.items():
        # Minutes of a compiler; and another operator, for its time alone.
        if "compiled" in name or name == "ours, shifted windows":
            continue
        torch.manual_seed(0)
        function, inputs = prepare()
        inputs = [x.double() for x in inputs]
        out = function(*inputs)
        # Peers of the convolutions are channels first.
        found[name] = out if out.shape[-1] == operators.CHANNELS else out.permute(0, 2, 3, 1)
    reference = found.pop("ours")
    assert found
    for name, out in found.items():
        torch.testing.assert_close(out, reference, msg=lambda text, n=name: f"{n}: {text}")


def test_only_some_contests(capsys):
    titles = [c.title for c in tool.planned(tool.parse_args(["operators", "--only", "sliding"]))]
    assert len(titles) == 6 and all("sliding attention, forward" in title for title in titles)
    with pytest.raises(SystemExit, match="--only nothing: no contest .*local MLP, forward"):
        tool.planned(tool.parse_args(["operators", "--only", "nothing"]))


def test_sliding_attention_of_a_deeper_stage():
    _, functions = operators._sliding(1, 9, 8, CPU, channels=384)
    function, (qkv, bias) = functions["ours"]()
    assert function(qkv, bias).shape == (1, 9, 8, 384) and bias.shape[0] == 12
    function, (qkv, bias) = functions["ours, shifted windows"]()
    assert qkv.shape == (1, 14, 14, 3 * 384) and function(qkv, bias).shape == (1, 14, 14, 384)


@pytest.mark.e2e
def test_whole_models_take_a_step():
    pytest.importorskip("mmseg")
    pytest.importorskip("detectron2")
    contests = models.contests(CPU, sizes=((96, 128), (160, 224)))
    assert len(contests) == 2
    for contest in contests:
        for contender in (contest.contenders[0], contest.contenders[3]):
            contender.build()()


def test_memory_is_what_a_step_holds_at_once():
    x = torch.zeros(1000)

    def build():
        def step():
            a = x + 1
            b = a * 2
            del a
            c = b + 1
            return c

        return step

    (result,) = measure.hold(Contest("s", "t", (Contender("adds", build),)), CPU, rounds=3)
    assert result.peak_bytes == pytest.approx(2 * 4000, abs=64)  # and the scalars
    assert result.rounds == 3 and 0 < result.low <= result.seconds <= result.high


def test_who_cannot_run_is_named_with_the_reason():
    def build():
        raise ValueError("no such shape")

    contest = Contest("s", "t", (Contender("a", lambda: lambda: None), Contender("b", build)))
    first, second = measure.hold(contest, CPU, rounds=3)
    assert first.seconds is not None and second.seconds is None
    assert "ValueError: no such shape" in report.markdown([first, second], "here")


@pytest.mark.e2e
def test_the_tool_goes_on_where_it_was(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(networks, "_PEERS", {"timm resnet10t": lambda size: _resnet()})
    args = ["networks", "--sizes", "64x64", "--scale", "nano", "--batch", "1", "--rounds", "3"]
    args += ["--out", str(tmp_path)]
    assert tool.main([*args, "--modes", "inference"]) == 0
    first = json.loads((tmp_path / "results.json").read_text())["results"]
    assert [entry["name"] for entry in first][:2] == ["timm resnet10t", "swin_nano"]
    assert all(entry["seconds"] for entry in first)
    assert tool.main(args) == 2 and "--resume" in capsys.readouterr().err
    assert tool.main([*args, "--resume"]) == 0
    second = json.loads((tmp_path / "results.json").read_text())["results"]
    assert second[: len(first)] == first and len(second) == 2 * len(first)
    assert tool.main([*args, "--scale", "tiny", "--modes", "inference", "--resume"]) == 0
    third = json.loads((tmp_path / "results.json").read_text())["results"]
    assert third[-1]["name"] == "i_d_dw_conv_tiny"
    table = (tmp_path / "results.md").read_text()
    assert "training, 64x64, batch 1" in table and "**i_d_dw_conv_nano**" in table


def test_other_rows_need_no_onnx():
    done = run_without(("onnx", "onnxscript"), "import dense.analysis.benchmark.networks")
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_engines_compute_what_the_network_does():
    pytest.importorskip("onnxruntime", reason="ONNX Runtime is not installed")
    model = build("dw_conv_nano").eval()
    images = torch.randn(2, 3, 64, 96)
    expected = model(images).detach()
    builders = engines.steps(lambda: (model, images), torch.float32)
    assert "ONNX Runtime" in builders
    for name, make in builders.items():
        got = make()()
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.slow
def test_speed_beside_a_product():
    """Three forward passes' multiply-adds for a training step; the product's rate is 100%."""
    (contest,) = networks.contests([(64, 64)], 2, CPU, False, "nano", ["training"], limit=True)
    counts = {contender.name: contender.multiply_adds for contender in contest.contenders}
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        timm.create_model("swin_tiny_patch4_window7_224", img_size=64).eval()(
            torch.randn(2, 3, 64, 64)
        )
    assert counts["timm swin_tiny"] == pytest.approx(3 * counter.get_total_flops() / 2, rel=0.01)
    results = [
        measure.Result("networks: a", name, False, seconds, seconds, seconds, 3, multiply_adds=adds)
        for name, seconds, adds in (
            ("one", 2.0, 100),
            (report.PRODUCT, 0.5, 50),
            ("two", 1.0, None),
        )
    ]
    one, product, two = report.markdown(results, "here").splitlines()[-3:]
    assert one.endswith("| 1.00 | 50% |") and product.endswith("|  | 100% |")
    assert two.endswith("| 2.00 |  |")


def test_the_plot_of_cost_against_size(tmp_path, figures):
    results = [
        measure.Result(
            f"scaling: {i}", "dw_conv_tiny", True, 0.1, 0.1, 0.1, 3, 10**6, images, images * side**2
        )
        for i, (images, side) in enumerate([(1, 224), (1, 448), (4, 224)])
    ]
    report.plot_scaling(results, tmp_path / "scaling.png")
    assert (tmp_path / "scaling.png").read_bytes().startswith(b"\x89PNG")
    by_side, by_batch = [(224, 224**2), (448, 448**2)], [(1, 224**2), (4, 4 * 224**2)]
    # Nanoseconds, then bytes, of a pixel; by side, then by batch.
    expected = [(x, 1e8) for x in (by_side, by_batch)] + [(x, 1e6) for x in (by_side, by_batch)]
    for axes, (steps, whole) in zip(figures[0].axes, expected, strict=True):
        [line] = points(axes)
        assert line == [(at, pytest.approx(whole / pixels)) for at, pixels in steps]


@pytest.mark.parametrize(
    ("args", "reason"),
    [
        (["nothing"], "invalid choice"),
        (["networks", "--sizes", "224"], "ROWSxCOLUMNS"),
        (["networks", "--rounds", "1"], "at least 3"),
        (["networks", "--batch", "0"], "--batch 0"),
        (["networks", "--device", "foo"], "--device foo"),
        (["networks", "--out", __file__], "is a file"),
        (["operators", "--scale", "nano"], "--scale is for the suite networks"),
    ],
)
def test_bad_requests(args, reason, capsys):
    with pytest.raises(SystemExit):
        tool.main(args)
    assert reason in capsys.readouterr().err


def _resnet():
    import timm

    return timm.create_model("resnet10t")
