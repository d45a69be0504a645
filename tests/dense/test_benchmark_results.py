"""How the benchmark measures, what it writes, and what its options ask for."""

import argparse
import gc
import json
import platform
import weakref
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from dense.analysis.benchmark import measure, models, networks, operators, report
from dense.analysis.benchmark.measure import Contender, Contest, Result
from tests.support import load_tool, points

CPU, GPU = torch.device("cpu"), torch.device("cuda")
tool = load_tool("benchmark")


# Measuring


@pytest.fixture
def clock(monkeypatch):
    """Seconds that only steps let pass."""
    now = [100.0]
    monkeypatch.setattr(measure, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    return now


def contender(name: str, seconds: list[float], clock: list[float], calls: list[str], **options):
    """Its steps take ``seconds`` in turn, the first and the one for the memory none."""
    left = [0.0] * (1 + options.get("in_torch", True)) + seconds

    def step():
        calls.append(name)
        clock[0] += left.pop(0)

    return Contender(name, lambda: step, **options)


def test_rounds_are_in_turns_and_every_second_one_backwards(clock):
    calls, ticks = [], []
    one = contender("one", [3.0, 1.0, 10.0, 2.0, 4.0], clock, calls, ours=True, multiply_adds=7)
    two = contender("two", [0.5] * 5, clock, calls, in_torch=False)
    contest = Contest("suite", "title", (one, two), images=3, pixels=50)
    found = measure.hold(contest, CPU, rounds=5, tick=ticks.append)
    there = ["one", "two"]
    assert calls == ["one", "one", "two", *there, *there[::-1], *there, *there[::-1], *there]
    assert ticks == ["title: one", "title: two", *(f"title: round {n}" for n in range(1, 6))]
    # Quartiles of 1, 2, 3, 4 and 10.
    assert found[0].as_dict() == {
        **dict(contest="suite: title", name="one", ours=True, seconds=3.0, low=2.0, high=4.0),
        **dict(rounds=5, peak_bytes=0, images=3, pixels=50, error="", multiply_adds=7),
    }
    assert found[1].as_dict() == {
        **dict(contest="suite: title", name="two", ours=False, seconds=0.5, low=0.5, high=0.5),
        **dict(rounds=5, peak_bytes=None, images=3, pixels=50, error="", multiply_adds=None),
    }


@pytest.mark.parametrize(
    "rounds, seconds, number",
    [(1, 60, 3), (3, 60, 3), (9, 0, 3), (9, 5.9, 3), (9, 6, 4), (9, 60, 9), (None, None, 9)],
)
def test_rounds_until_the_time_is_over(rounds, seconds, number, clock):
    """Of 2 seconds each; three at least."""
    one = contender("one", [2.0] * 9, clock, [], in_torch=False)
    options = {} if rounds is None else dict(rounds=rounds, seconds=seconds)
    (result,) = measure.hold(Contest("s", "t", (one,)), CPU, **options)
    assert result.rounds == number


def test_a_minute_of_rounds_is_enough(clock):
    one = contender("one", [21.0] * 9, clock, [], in_torch=False)
    assert measure.hold(Contest("s", "t", (one,)), CPU)[0].rounds == 3


@pytest.mark.parametrize(
    "error, said",
    [
        (ValueError("first\nsecond"), "ValueError: first"),
        (RuntimeError("x" * 121), "RuntimeError: " + "x" * 120),
        (NotImplementedError(), "NotImplementedError: "),
    ],
)
def test_the_first_line_of_an_error(error, said):
    def build():
        raise error

    contest = Contest("s", "t", (Contender("a", build, multiply_adds=3),), images=2, pixels=9)
    (result,) = measure.hold(contest, CPU, rounds=3)
    expected = Result("s: t", "a", False, images=2, pixels=9, error=said, multiply_adds=3)
    assert result == expected and (result.seconds, result.rounds) == (None, 0)


def test_what_failed_holds_no_memory():
    class Cycle:
        pass

    found = []

    def fails():
        cycle = Cycle()
        cycle.own, found[:] = cycle, [weakref.ref(cycle)]
        raise ValueError("no")

    def passes():
        assert found[0]() is None
        return lambda: None

    gc.disable()
    try:
        contest = Contest("s", "t", (Contender("a", fails), Contender("b", passes)))
        assert [one.error for one in measure.hold(contest, CPU)] == ["ValueError: no", ""]
    finally:
        gc.enable()


def test_a_step_on_a_gpu_is_waited_for(monkeypatch, clock):
    did = []

    def noted(name, result=None):
        return lambda *given: did.append((name, *given)) or result

    numbers = dict(memory_allocated=30, max_memory_allocated=100)
    for name in ("synchronize", "empty_cache", "reset_peak_memory_stats", *numbers):
        monkeypatch.setattr(torch.cuda, name, noted(name, numbers.get(name)))
    contest = Contest("s", "t", (Contender("a", lambda: lambda: did.append("step")),))
    (result,) = measure.hold(contest, GPU, rounds=3)
    wait = ("synchronize", GPU)
    before = ["step", ("empty_cache",), ("reset_peak_memory_stats", GPU)]
    before += [("memory_allocated", GPU), "step", wait, ("max_memory_allocated", GPU)]
    assert did == [*before, ("empty_cache",), *[wait, "step", wait] * 3]
    assert result.peak_bytes == 70


# Reports


def test_the_machine(monkeypatch):
    versions = f"torch {torch.__version__}, Python {platform.python_version()}, {platform.system()}"
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    monkeypatch.setattr(report, "_processor", lambda: "Fast One")
    found = report.machine(CPU, torch.float32)
    assert found == f"Fast One, 3 threads, float32; {versions}"
    assert report.machine(CPU, torch.bfloat16).startswith("Fast One, 3 threads, bfloat16 autocast;")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"{device} Pro")
    found = report.machine(GPU, torch.bfloat16)
    assert found == f"cuda Pro, bfloat16 autocast; {versions}"


@pytest.mark.parametrize(
    "text, name",
    [
        ("processor\t: 0\nmodel name\t: Fast One @ 2 GHz\nmodel name\t: Other", "Fast One @ 2 GHz"),
        ("Features : neon", "arch with 5 cores"),
        (None, "arch with 5 cores"),
    ],
)
def test_the_processor(text, name, monkeypatch):
    def path(where):
        assert where == "/proc/cpuinfo"
        if text is None:
            raise FileNotFoundError
        return SimpleNamespace(read_text=lambda: text)

    monkeypatch.setattr(report, "Path", path)
    monkeypatch.setattr("platform.machine", lambda: "arch")
    monkeypatch.setattr("os.cpu_count", lambda: 5)
    assert report._processor() == name


def test_tables():
    def result(contest, name, *measured, **more):
        return Result(contest, name, name.startswith("ours"), *measured, **more)

    results = [
        result("s: one", "peer", 0.5, 0.25, 1.0, 3, 3 * 2**20, images=4, multiply_adds=200),
        result("s: two", "fails", error="ValueError: no"),
        result("s: one", "ours", 0.25, 0.2, 0.3041, 3, None, images=4, multiply_adds=None),
        result("s: one", "a matrix product", 0.1, 0.1, 0.1, 3, 2**20, multiply_adds=80),
        result("s: one", "broken", error="OSError: x", multiply_adds=5),
        result("s: two", "ours", 0.001, 0.001, 0.001, 3, 2**19 * 3),
    ]
    assert report.markdown(results, "here, now") == (
        "Machine: here, now.\n"
        "\n"
        "### s: one\n"
        "\n"
        "|  | ms (quartiles) | images/s | peak memory, MB | speed, peer = 1"
        " | of the speed of a matrix product |\n"
        "| --- | --- | --- | --- | --- | --- |\n"
        "| peer | 500.0 (250.0-1000.0) | 8.00 | 3 | 1.00 | 50% |\n"
        "| **ours** | 250.0 (200.0-304.1) | 16.00 |  | 2.00 |  |\n"
        "| a matrix product | 100.0 (100.0-100.0) |  | 1 |  | 100% |\n"
        "| broken | OSError: x |  |  |  |  |\n"
        "\n"
        "### s: two\n"
        "\n"
        "|  | ms (quartiles) | images/s | peak memory, MB | speed, fails = 1 |\n"
        "| --- | --- | --- | --- | --- |\n"
        "| fails | ValueError: no |  |  |  |\n"
        "| **ours** | 1.0 (1.0-1.0) | 1000.00 | 2 |  |\n"
    )


def test_the_plot_of_two_networks(tmp_path, figures):
    def result(name, images, side, seconds=2.0, contest="scaling: x"):
        pixels = images * side**2
        return Result(contest, name, True, seconds, 0, 0, 3, 5 * pixels, images, pixels)

    results = [
        result("a", 1, 224),
        result("b", 1, 320),
        result("a", 2, 224),
        result("a", 1, 320),
        result("a", 4, 320),
        result("c", 1, 640, None),
        result("d", 1, 640, contest="networks: x"),
    ]
    report.plot_scaling(results, tmp_path / "plot.png")
    (figure,) = figures
    assert Image.open(tmp_path / "plot.png").size == (1210, 770)
    sides, batches = [[224, 320], [320]], [[1, 2]]
    labels = ["side of the image in pixels, batch 1", "images of 224x224 in a batch"]
    for number, axes in enumerate(figure.axes):
        row, column = divmod(number, 2)
        expected = [
            [(x, (5 if row else 2e9 / (x**2 if not column else x * 224**2))) for x in line]
            for line in (batches if column else sides)
        ]
        assert points(axes) == [[pytest.approx(point) for point in line] for line in expected]
        assert [line.get_label() for line in axes.lines] == ["a", "b"][: 2 - column]
        assert {line.get_marker() for line in axes.lines} == {"o"}
        quantity = ["ns per pixel", "peak bytes per pixel"][row]
        assert (axes.get_xlabel(), axes.get_ylabel()) == (labels[column], quantity)
        assert (axes.get_xscale(), axes.get_ylim()[0]) == ("log", 0)
        ticks = [1, 2] if column else [224, 320]
        assert axes.get_xticks().tolist() == pytest.approx(ticks)
        assert [text.get_text() for text in axes.get_xticklabels()] == [str(t) for t in ticks]
        assert len(axes.get_xticks(minor=True)) == 0
        lines = axes.get_xgridlines()
        assert all(line.get_visible() and line.get_alpha() == 0.3 for line in lines)
        assert (axes.get_legend() is None) == bool(number)
    assert figure.get_layout_engine().__class__.__name__ == "ConstrainedLayoutEngine"


# Options


def test_what_is_measured_unless_said():
    device = "cuda" if torch.cuda.is_available() else "cpu"
    assert vars(tool.parse_args(["networks", "models"])) == {
        **dict(suites=["networks", "models"], out="work_dirs/benchmark", device=device),
        **dict(sizes=[(224, 224), (512, 512), (512, 2048), (800, 1344)], batch=None),
        **dict(modes=["inference", "training"], scale="tiny", compiled=False, engines=False),
        **dict(limit=False, dtype=None, rounds=9, seconds=60, only=None, resume=False),
    }


def test_what_is_measured_if_said(tmp_path):
    words = ["networks", "--out", str(tmp_path), "--device", "cpu", "--sizes", "32x48", "64x32"]
    words += ["--batch", "1", "--modes", "inference", "--scale", "base", "--compiled", "--engines"]
    words += ["--limit", "--dtype", "bfloat16", "--rounds", "3", "--seconds", "0.5"]
    words += ["--only", "32x48", "--resume"]
    assert vars(tool.parse_args(words)) == {
        **dict(suites=["networks"], out=str(tmp_path), device="cpu", sizes=[(32, 48), (64, 32)]),
        **dict(batch=1, modes=["inference"], scale="base", compiled=True, engines=True),
        **dict(limit=True, dtype="bfloat16", rounds=3, seconds=0.5, only="32x48", resume=True),
    }


@pytest.mark.parametrize(
    "words, message",
    [
        ([], "the following arguments are required: SUITE"),
        (["networks", "--sizes", "31x32"], "31x32: ROWSxCOLUMNS, 32 or more, is needed"),
        (["networks", "--sizes", "32x"], "32x: ROWSxCOLUMNS, 32 or more, is needed"),
        (["networks", "--sizes", "x32"], "x32: ROWSxCOLUMNS, 32 or more, is needed"),
        (["networks", "--sizes", "32x3a"], "32x3a: ROWSxCOLUMNS, 32 or more, is needed"),
        (["networks", "--rounds", "2"], "--rounds 2: at least 3 are needed for a median"),
        (["networks", "--device", "tpu:0"], "--device tpu:0: cpu, cuda or cuda:N is needed"),
        (["networks", "--device", "cuda:1"], "--device cuda:1: CUDA is not available"),
        (["networks", "--engines", "--modes", "training"], "--engines is for inference on a CPU"),
        (["models", "--dtype", "float32"], "--dtype is for the suites networks and scaling"),
        (["networks", "models", "--dtype", "float32"], "--dtype is for the suites networks and"),
        (["networks", "--scale", "small"], "argument --scale: invalid choice: 'small'"),
        (["networks", "--modes", "both"], "argument --modes: invalid choice: 'both'"),
        (["networks", "--dtype", "float16"], "argument --dtype: invalid choice: 'float16'"),
        *(
            (["scaling", *words], f"{words[0]} is for the suite networks, which is not selected")
            for words in (
                ["--sizes", "64x64"],
                ["--batch", "1"],
                ["--scale", "base"],
                ["--compiled"],
                ["--engines", "--device", "cpu"],
                ["--limit"],
            )
        ),
    ],
)
def test_what_cannot_be_measured(words, message, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as ended:
        tool.parse_args(words)
    assert ended.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_engines_that_are_not_there(monkeypatch, capsys):
    words = ["networks", "--engines", "--device", "cpu"]
    for there in ("onnxruntime", "openvino"):
        monkeypatch.setattr(tool, "find_spec", lambda name, there=there: name == there or None)
        assert tool.parse_args(words).engines
    monkeypatch.setattr(tool, "find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        tool.parse_args(words)
    assert "--engines: neither onnxruntime nor openvino is installed" in capsys.readouterr().err


def test_engines_are_for_cpus(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert tool.parse_args(["networks"]).device == "cuda"
    for device in ("cuda", "cuda:1"):
        with pytest.raises(SystemExit):
            tool.parse_args(["networks", "--engines", "--device", device])
        assert "--engines is for inference on a CPU" in capsys.readouterr().err


@pytest.mark.parametrize("dtypes", [["--dtype", "bfloat16"], []])
def test_suites_get_their_options(dtypes, monkeypatch):
    def noted(name):
        return lambda *given: [Contest(name, f"{name} {given}", ())]

    monkeypatch.setattr(operators, "contests", noted("operators"))
    monkeypatch.setattr(networks, "contests", noted("networks"))
    monkeypatch.setattr(networks, "scaling_contests", noted("scaling"))
    monkeypatch.setattr(models, "contests", noted("models"))
    dtype = torch.bfloat16 if dtypes else None
    suites = ["networks", "scaling", "networks"] + ([] if dtypes else ["operators", "models"])
    words = [*suites, "--device", "cpu", "--sizes", "32x48", "--batch", "5", "--scale", "nano"]
    words += ["--modes", "inference", "--compiled", "--engines", *dtypes]
    given = {
        "networks": ([(32, 48)], 5, CPU, True, "nano", ["inference"], dtype, True, False),
        "scaling": (CPU, ["inference"], dtype),
        "operators": (CPU, ["inference"]),
        "models": (CPU,),
    }
    found = tool.planned(tool.parse_args(words))
    assert [one.title for one in found] == [
        f"{name} {given[name]}" for name in dict.fromkeys(suites)
    ]
    found = tool.planned(tool.parse_args([*words, "--only", "scaling ("]))
    assert [one.suite for one in found] == ["scaling"]


@pytest.fixture
def contests(monkeypatch):
    """Two, one of the suite scaling, in place of those that are planned."""
    done = []

    def build(name):
        return lambda: lambda: done.append(name)

    found = [
        Contest(suite, "title", (Contender(name, build(name)),), 1, 224**2)
        for suite, name in (("networks", "one"), ("scaling", "two"))
    ]
    monkeypatch.setattr(tool, "planned", lambda args: found[: len(args.sizes)])
    return done


def test_a_run_and_its_rest(contests, tmp_path, capsys):
    out = tmp_path / "deep" / "folder"
    words = ["networks", "scaling", "--out", str(out), "--device", "cpu", "--rounds", "4"]
    assert tool.main([*words, "--sizes", "32x32"]) == 0
    first = capsys.readouterr().out
    where = report.machine(CPU, torch.float32)
    table = (out / "results.md").read_text()
    assert first.endswith(f"{out}/results.md, results.json\n") and table in first
    assert table.startswith(f"Machine: {where}.\n\n### networks: title\n")
    held = json.loads((out / "results.json").read_text())
    assert held["machine"] == where and [one["rounds"] for one in held["results"]] == [4]
    assert contests == ["one"] * 6 and not (out / "scaling.png").exists()
    # Only what is missing.
    assert tool.main(words) == 2
    said = f"benchmark: {out}/results.json exists; --resume keeps what is in it\n"
    assert capsys.readouterr().err.endswith(said) and contests == ["one"] * 6
    assert tool.main([*words, "--resume"]) == 0
    assert contests[6:] == ["two"] * 6
    both = json.loads((out / "results.json").read_text())["results"]
    assert [one["name"] for one in both] == ["one", "two"] and both[:1] == held["results"]
    assert "### scaling: title" in (out / "results.md").read_text()
    assert (out / "scaling.png").exists()
    # As they were written.
    assert [one.as_dict() for one in tool.read(out / "results.json", where)] == both


def test_a_run_in_another_dtype(contests, tmp_path):
    words = ["networks", "--device", "cpu", "--sizes", "32x32", "--out", str(tmp_path)]
    assert tool.main([*words, "--dtype", "bfloat16", "--seconds", "0"]) == 0
    held = json.loads((tmp_path / "results.json").read_text())
    assert "bfloat16 autocast" in held["machine"] and held["results"][0]["rounds"] == 3
    with pytest.raises(SystemExit) as ended:
        tool.main([*words, "--resume"])
    here = report.machine(CPU, torch.float32)
    assert str(ended.value) == (
        f"benchmark: {tmp_path}/results.json was measured on another machine ({held['machine']}; "
        f"here: {here}): name another --out"
    )
    (tmp_path / "results.json").write_text("{")
    with pytest.raises(SystemExit, match=r"results.json is damaged \(.*\): remove it"):
        tool.main([*words, "--resume"])


def test_the_help():
    parser = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", lambda self, _: parser.append(self))
        with pytest.raises(AttributeError):
            tool.parse_args([])
    text = parser[0].format_help()
    # As it is written, lines and all.
    assert tool.__doc__ in text
