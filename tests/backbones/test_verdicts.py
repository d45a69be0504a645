"""How a backend is judged on a processor that nobody has tried; the CPU stands in for a GPU."""

import json
import os
import subprocess
import sys
import threading

import pytest
import torch

pytest.importorskip("triton")

from triton.runtime.errors import OutOfResources  # noqa: E402

from backbones import ops  # noqa: E402
from backbones.ops import __main__ as command  # noqa: E402
from backbones.ops import cases, dispatch, native, reference, verdicts  # noqa: E402
from backbones.ops.common import forced_here  # noqa: E402
from backbones.ops.dispatch import explain  # noqa: E402
from backbones.ops.triton_kernels import local_mlp as kernels  # noqa: E402
from tests.support import environment, run_forked  # noqa: E402

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="the stand-in needs TRITON_INTERPRET=1"
)
CONVOLUTIONS = [name for name in dispatch.ON_GPUS if "depthwise" in name or "aggregation" in name]


def tiny(operator: str) -> cases.Case:
    """A first case that the interpreter runs in less than a second."""
    if operator in CONVOLUTIONS:
        return cases._MAKERS[operator]((2, 3), 2, kernel=3, batch=1)
    if operator == "sliding_attention":
        return cases.sliding((2, 3), 1, 3, (3, 3), 1)
    return cases._MAKERS[operator]((1, 2), 1, 3, (2, 2), (1, 1), 1)


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """The CPU is taken for a GPU, whose kernels Triton's interpreter runs, with an empty cache."""
    monkeypatch.delenv("DENSE_OPS", raising=False)
    native.missing()  # loads the C kernels from their own cache
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(dispatch, "GPUS", ("cpu",))
    monkeypatch.setattr(dispatch, "first_case", tiny)
    monkeypatch.setattr(dispatch, "_broken", {})
    monkeypatch.setattr(verdicts, "_known", {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return tmp_path / "cache/dense-backbones/verdicts"


def mix():
    """A call of ``local_mlp``, checked against float64."""
    torch.manual_seed(0)
    x, weight, bias = (torch.randn(*s) for s in ((1, 4, 4, 6), (2, 4, 4), (2, 4, 4)))
    options = (2, 2), (1, 1)
    expected = reference.local_mlp(*(t.double() for t in (x, weight, bias)), *options)
    out = ops.local_mlp(x, weight, bias, *options)
    torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-4)
    return out


def chosen(operator: str = "local_mlp") -> str:
    return explain(operator, "cpu", torch.float32)[0]


def counting(monkeypatch) -> list[str]:
    """The operators that are compared from now on."""
    compared, original = [], verdicts.compare

    def compare(case, *args):
        compared.append(case.operator)
        return original(case, *args)

    monkeypatch.setattr(verdicts, "compare", compare)
    return compared


@pytest.mark.parametrize("operator", dispatch.ON_GPUS)
def test_kernels_that_agree_are_used_and_a_later_process_knows(gpu, monkeypatch, operator):
    assert explain(operator, "cpu", torch.float32) == ("torch", dispatch._UNCOMPARED)
    assert dispatch.choose(operator, torch.ones(1)) == "triton"
    (path,) = gpu.glob("*/*.json")
    assert json.loads(path.read_text())["use"] is True
    monkeypatch.setattr(verdicts, "_known", {})
    compared = counting(monkeypatch)
    assert dispatch.choose(operator, torch.ones(1)) == "triton" and not compared
    # Another dtype is another verdict.
    assert explain(operator, "cpu", torch.float16)[0] == "torch"


@pytest.mark.parametrize("operator", dispatch.ON_GPUS)
def test_the_first_case_finds_a_mistake_in_any_output(gpu, monkeypatch, operator):
    """One value of one output or gradient is off, of which the others know nothing."""
    case = tiny(operator)
    count = len(case.run(*case.tensors))
    for place in range(count):
        true = cases.Case.run

        def wrong(self, *tensors, place=place, true=true, **given):
            results = list(true(self, *tensors, **given))
            if tensors[0].dtype == torch.float32:
                results[place] = results[place].clone()
                results[place].view(-1)[-1] += 0.01 * results[place].abs().max()
            return tuple(results)

        monkeypatch.setattr(verdicts, "_known", {})
        verdicts.forget()
        with monkeypatch.context() as patch:
            patch.setattr(cases.Case, "run", wrong)
            with pytest.warns(RuntimeWarning, match="disagrees .*; torch is used"):
                assert dispatch.choose(operator, torch.ones(1)) == "torch"


@pytest.mark.parametrize(
    "wrong", [lambda t: 1.01 * t, lambda t: t * float("nan"), torch.zeros_like]
)
def test_wrong_kernels_are_said_once_and_not_used(gpu, monkeypatch, recwarn, wrong):
    original = kernels.forward
    monkeypatch.setattr(kernels, "forward", lambda *args: wrong(original(*args)))
    for _ in range(2):
        mix()
    said = [str(w.message) for w in recwarn if "torch is used" in str(w.message)]
    assert len(said) == 1 and said[0].startswith(
        "local_mlp: triton disagrees with torch in float32"
    )
    assert chosen() == "torch"


def test_wrong_gradients_are_found(gpu, monkeypatch):
    original = kernels.backward
    wrong = lambda *args: (original(*args)[0], 1.01 * original(*args)[1])  # noqa: E731
    monkeypatch.setattr(kernels, "backward", wrong)
    with pytest.warns(RuntimeWarning, match="disagrees"):
        mix()
    assert chosen() == "torch"


def test_slow_kernels_are_not_used_after_a_check(gpu, monkeypatch, capsys):
    monkeypatch.setattr(command, "_cases", lambda operator, batch=1: ([tiny(operator)],) * 2)
    monkeypatch.setattr(
        command, "_milliseconds", lambda cases, backend, *_: {"triton": 3.0, "torch": 2.0}[backend]
    )
    assert command._check_one("cpu", "local_mlp", "triton", torch.float32, real=True)
    assert "agrees, slower than torch: 3.00 against 2.00 ms" in capsys.readouterr().out
    backend, reason = explain("local_mlp", "cpu", torch.float32)
    assert backend == "torch" and "slower" in reason
    mix()


def test_a_compiler_that_fails_leaves_no_file(gpu, monkeypatch):
    def fails(*args):
        raise OutOfResources(114688, 101376, "shared memory")

    monkeypatch.setattr(kernels, "forward", fails)
    with pytest.warns(RuntimeWarning, match="Triton did not compile it: out of resource"):
        mix()
    assert chosen() == "torch" and not list(gpu.glob("*/*"))


@pytest.mark.parametrize(
    "error",
    [
        torch.AcceleratorError("CUDA error: an illegal memory access was encountered"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_errors_of_the_device_come_through_and_judge_nothing(gpu, monkeypatch, error):
    def fails(*args):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(kernels, "forward", fails)
        with pytest.raises(type(error)):
            mix()
    assert explain("local_mlp", "cpu", torch.float32) == ("torch", dispatch._UNCOMPARED)
    mix()
    assert chosen() == "triton"


def test_during_a_capture_the_known_verdict_holds(gpu, monkeypatch):
    compared = counting(monkeypatch)
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        mix()
        assert not compared and chosen() == "torch"
    mix()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert dispatch.choose("local_mlp", torch.ones(1)) == "triton"
    assert compared == ["local_mlp"]


def test_a_graph_is_compiled_by_the_known_verdict(gpu, monkeypatch):
    compared, graphs = counting(monkeypatch), []

    def backend(graph, example):
        graphs.append([str(node.target) for node in graph.graph.nodes])
        return graph

    def compiled():
        torch._dynamo.reset()
        x, weight = torch.randn(1, 4, 4, 6), torch.randn(2, 4, 4)
        torch.compile(ops.local_mlp, backend=backend, fullgraph=True)(
            x, weight, weight, (2, 2), (1, 1)
        )
        return any(target.startswith("dense.") for target in graphs[-1])

    assert not compiled() and not compared
    mix()
    assert compiled() and compared == ["local_mlp"]


@pytest.mark.parametrize(
    "mode",
    [
        torch.no_grad,
        torch.inference_mode,
        lambda: torch.autocast("cpu", torch.bfloat16),
        lambda: torch.device("meta"),
    ],
    ids=["no_grad", "inference_mode", "autocast", "default device"],
)
def test_the_caller_s_modes_do_not_reach_the_comparison(gpu, mode):
    with mode():
        assert dispatch.choose("local_mlp", torch.ones(1, device="cpu")) == "triton"


def test_a_backward_pass_may_come_first(gpu):
    """Inside of a registered operator nothing is differentiated."""
    x, weight = torch.randn(1, 4, 4, 6), torch.randn(2, 4, 4)
    sizes = [2, 2], [1, 1]
    torch.ops.dense.local_mlp_backward(x, x, weight, *sizes)
    assert chosen() == "triton"


def test_random_numbers_are_not_consumed(gpu):
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    dispatch.choose("local_mlp", torch.ones(1))
    assert torch.rand(2).equal(expected)


def test_fake_tensors_are_not_compared(gpu, monkeypatch):
    from torch._subclasses import FakeTensorMode

    compared = counting(monkeypatch)
    with FakeTensorMode():
        x, weight = torch.randn(1, 4, 4, 6), torch.randn(2, 4, 4)
        assert ops.local_mlp(x, weight, weight, (2, 2), (1, 1)).shape == x.shape
    assert not compared


def test_without_a_folder_verdicts_hold_for_the_process(gpu, monkeypatch, tmp_path):
    (tmp_path / "cache").write_text("a file where the folder should be")
    compared = counting(monkeypatch)
    for _ in range(2):
        mix()
    assert compared == ["local_mlp"] and chosen() == "triton"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(verdicts, "_known", {})
    monkeypatch.setattr(verdicts.Path, "home", classmethod(no_home))
    mix()
    assert chosen() == "triton"


def no_home(cls):
    raise RuntimeError("Could not determine home directory.")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"use": "yes"}'])
def test_a_damaged_file_is_as_none(gpu, monkeypatch, text):
    mix()
    (path,) = gpu.glob("*/*.json")
    path.write_text(text)
    monkeypatch.setattr(verdicts, "_known", {})
    compared = counting(monkeypatch)
    mix()
    assert compared == ["local_mlp"] and json.loads(path.read_text())["use"] is True


def test_threads_compare_once(gpu, monkeypatch):
    compared, runs, original = [], [], cases.Case.error

    def error(self, *args):
        compared.append(self.operator)
        return original(self, *args)

    monkeypatch.setattr(cases.Case, "error", error)

    def first_call():
        runs.append(dispatch.choose("local_mlp", torch.ones(1)))

    threads = [threading.Thread(target=first_call) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert compared == ["local_mlp"] and runs == ["triton"] * 4


def decide() -> None:
    """What the fixture ``gpu`` does, in another process."""
    dispatch.GPUS, dispatch.first_case = ("cpu",), tiny
    torch.cuda.is_current_stream_capturing = lambda: False
    print(dispatch.choose("local_mlp", torch.ones(1)))


@pytest.mark.slow
def test_processes_decide_each_by_itself_and_share_the_files(gpu):
    assert [done.stdout for done in run_forked(decide, decide)] == ["triton\n"] * 2
    (path,) = gpu.glob("*/*")
    assert json.loads(path.read_text())["use"] is True


def test_what_a_verdict_depends_on(gpu, monkeypatch):
    mix()
    for name, value in (
        ("processor", lambda device: "another processor"),
        ("_versions", lambda backend: "another version"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(verdicts, "_known", {})
            patch.setattr(verdicts, name, value)
            assert chosen() == "torch"
    monkeypatch.setattr(verdicts, "_known", {})
    assert chosen() == "triton"


def test_processors_are_told_apart(monkeypatch):
    class Properties:
        name, major, minor, gcnArchName = "Card", 9, 0, "gfx942"

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    plain = verdicts.processor.__wrapped__
    assert plain("cuda:0") == "cuda Card sm_90"
    monkeypatch.setattr(torch.version, "hip", "6.2")
    assert plain("cuda:0") == "rocm Card gfx942"
    assert plain("cpu").startswith("cpu ") and plain("mps").startswith("mps ")


def test_a_cpu_backend_that_was_refuted_is_not_used(gpu, monkeypatch):
    monkeypatch.setattr(dispatch, "GPUS", ("cuda",))
    if chosen() != "native":
        pytest.skip("there are no C kernels")
    verdicts.remember(verdicts.judge("local_mlp", "native", "cpu", torch.float32, 0.5), "cpu")
    backend, reason = explain("local_mlp", "cpu", torch.float32)
    assert backend == "torch" and "native disagrees with torch in float32" in reason
    assert explain("local_mlp", "cpu", torch.float64)[0] == "native"
    mix()


def test_kernels_that_fail_later_leave_torch(gpu, monkeypatch):
    """Not the reference, which stores what the kernels do not."""
    mix()

    def fails(*args):
        raise OutOfResources(114688, 101376, "shared memory")

    monkeypatch.setattr(kernels, "forward", fails)
    monkeypatch.setattr(reference, "local_mlp", None)
    x, weight = torch.randn(1, 4, 4, 6), torch.randn(2, 4, 4)
    with pytest.warns(RuntimeWarning, match="did not compile"):
        ops.local_mlp(x, weight, weight, (2, 2), (1, 1))


@pytest.mark.skipif(native.missing() is not None, reason="there are no C kernels to compare with")
@pytest.mark.parametrize("operator", dispatch.ON_GPUS)
def test_every_registered_operator_has_a_torch_form(operator):
    """What runs in a compiled graph when a backend fails, against the C kernels."""
    case = tiny(operator)
    with forced_here("torch"):
        got = case.run(*case.tensors)
    with forced_here("native"):
        expected = case.run(*case.tensors)
    assert len(got) > 2
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


# The command


@pytest.mark.slow
def test_a_check_of_cpu_backends_passes_and_is_kept(gpu, monkeypatch, capsys):
    monkeypatch.setattr(dispatch, "GPUS", ("cuda",))
    monkeypatch.setattr(command, "_cases", small)
    monkeypatch.delenv("TRITON_INTERPRET")
    assert command.main(["--check"]) == 0
    out = capsys.readouterr().out
    if chosen() == "native":
        for operator, backends in dispatch.OPERATORS.items():
            if "native" in backends:
                rows = [line for line in out.splitlines() if line.startswith(f"{operator} ")]
                assert [row.split()[2] for row in rows] == [
                    "float64", "float32", "bfloat16", "float16"
                ]  # fmt: skip
                assert all(row.endswith("agrees") for row in rows)
    assert command.main([]) == 0
    shown = capsys.readouterr().out
    assert shown.count(": used: ") == len(list(gpu.glob("*/*.json"))) > 0
    assert command.main(["--reset"]) == 0
    assert "verdicts forgotten" in capsys.readouterr().out and not list(gpu.glob("*/*.json"))


def small(operator, batch=1):
    if operator == "linear":
        return ([command._linear(1, 3, 5, "gelu", True)],) * 2
    return ([tiny(operator) if operator in dispatch.ON_GPUS else cases.depthwise((2, 3), 2)],) * 2


def test_a_check_that_fails_says_where_and_exits_with_1(gpu, monkeypatch, capsys):
    monkeypatch.setattr(dispatch, "GPUS", ("cuda",))
    monkeypatch.setattr(command, "_cases", small)
    monkeypatch.setattr(command, "OPERATORS", {"local_mlp": ("reference", "torch", "triton")})
    original = kernels.forward
    monkeypatch.setattr(kernels, "forward", lambda *args: 1.1 * original(*args))
    assert command.main(["--check"]) == 1
    assert f"disagrees: {tiny('local_mlp').label}" in capsys.readouterr().out

    def fails(*args):
        raise RuntimeError("CUDA error: misaligned address\nmore")

    monkeypatch.setattr(kernels, "forward", fails)
    assert command.main(["--check"]) == 1
    assert "RuntimeError: CUDA error: misaligned address" in capsys.readouterr().out


@pytest.mark.parametrize("operator", dispatch.ON_GPUS)
def test_speed_is_judged_on_maps_of_a_tiny_network(operator):
    first, third = cases.stage_cases(operator, 8)
    for case, side, channels in ((first, 56, 96), (third, 14, 384)):
        maps = case.tensors[0]
        # Window attention and sliding attention take queries, keys and values.
        times = 3 if operator in ("window_attention", "sliding_attention") else 1
        assert maps.shape[:3] == (8, side, side)
        assert maps.shape[3:].numel() == times * channels


@pytest.mark.parametrize(
    "interpreted",
    [pytest.param("0", marks=pytest.mark.e2e), pytest.param("1", marks=pytest.mark.kernels)],
    ids=["C and oneDNN", "Triton too"],
)
def test_the_whole_check_passes_on_this_machine(tmp_path, interpreted):
    done = subprocess.run(
        [sys.executable, "-m", "backbones.ops", "--check"],
        env=environment(TRITON_INTERPRET=interpreted, XDG_CACHE_HOME=str(tmp_path)),
        capture_output=True,
        text=True,
    )
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    rows = [line.split()[:3] for line in done.stdout.splitlines() if line.endswith("agrees")]
    for operator in dispatch.ON_GPUS:
        assert [operator, "native", "float64"] in rows or native.missing()
        assert [operator, "triton", "bfloat16"] in rows or interpreted == "0"
