"""The backend of each operator on this machine, and the reason.

    python -m backbones.ops            # the backends that are used, and the verdicts
    python -m backbones.ops --check    # compare the backends with PyTorch, and time them
    python -m backbones.ops --reset    # forget the verdicts

``--check`` compares the C and oneDNN backends on a CPU, the Triton kernels on a GPU or, with
TRITON_INTERPRET=1, in Triton's interpreter, which is not timed. Outputs and all gradients are held
against float64 over sizes, channels, heads, windows, kernels and dtypes; times are those of forward
and backward together at the first and third stage of a tiny network, on a CPU in float32 alone,
because PyTorch's convolutions take seconds in the other dtypes. The verdicts are kept: a backend
that disagrees is not used any more, nor Triton where it is slower than ``torch``. Exits with 1 if a
backend disagrees or fails, with 2 if ``DENSE_OPS`` is invalid.
"""

import argparse
import math
import os
import sys
from collections.abc import Iterator
from dataclasses import replace

import torch
import torch.nn.functional as F

from backbones.ops import native, verdicts
from backbones.ops.cases import Case, first_case, normal, small_cases, stage_cases
from backbones.ops.common import forced_here
from backbones.ops.dispatch import OPERATORS, choose, explain
from backbones.ops.linear import ACTIVATIONS, Kept, linear
from backbones.ops.linear_layer import convolved
from backbones.ops.residual_mlp import Panels, residual_mlp

HALVES = (torch.bfloat16, torch.float16)
# By which factor Triton's time must exceed that of torch before torch is preferred.
SLOWER = 1.05


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m backbones.ops",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--check", action="store_true", help="compare and time, keep the verdicts")
    what.add_argument("--reset", action="store_true", help="forget the verdicts")
    args = parser.parse_args(argv)
    try:
        if args.check:
            return _check()
        return _reset() if args.reset else _show()
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2


def _show() -> int:
    devices = ["cpu", "cuda:0"] if torch.cuda.is_available() else ["cpu"]
    lines = [
        (device, operator, *explain(operator, device, torch.float32))
        for device in devices
        for operator in OPERATORS
    ]
    for device, operator, backend, reason in lines:
        print(f"{device:<6} {operator:<37} {backend:<10} {reason}")
    if (origin := native.origin()) is not None:
        print(f"C kernels {origin}")
    for verdict in verdicts.every():
        used = "used" if verdict.use else "not used"
        print(f"{verdict.processor}: {verdict.operator}: {used}: {verdict.reason}")
    return 0


def _reset() -> int:
    try:
        print(f"{verdicts.forget()} verdicts forgotten")
    except (OSError, RuntimeError) as error:
        print(f"the verdicts cannot be removed: {error}", file=sys.stderr)
        return 1
    return 0


def _check() -> int:
    interpreted, wrong, last = os.environ.get("TRITON_INTERPRET") == "1", 0, None
    for device, operator, backend, dtype in _subjects(interpreted):
        if device != last:
            print(f"{verdicts.processor(device)}, torch {torch.__version__}", flush=True)
            row = "operator", "backend", "dtype", "cases", "error", "at most", "ms", "torch, ms"
            print(_row(*row, "verdict"))
            last = device
        real = not (interpreted and backend == "triton")
        wrong += not _check_one(device, operator, backend, dtype, real)
    return int(wrong > 0)


def _subjects(interpreted: bool) -> Iterator[tuple[str, str, str, torch.dtype]]:
    """Device, operator, backend and dtype of everything that can be compared on this machine."""
    for operator, backends in OPERATORS.items():
        if "native" in backends and native.missing() is None:
            for dtype in (torch.float64, torch.float32, *HALVES):
                yield "cpu", operator, "native", dtype
        if "onednn" in backends:
            with torch.no_grad():
                for dtype in (torch.float32, torch.bfloat16):
                    if explain(operator, "cpu", dtype)[0] == "onednn":
                        yield "cpu", operator, "onednn", dtype
    device = "cuda:0" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not interpreted:
        return
    for operator, backends in OPERATORS.items():
        for dtype in (torch.float32, *HALVES) if "triton" in backends else ():
            yield device, operator, "triton", dtype


def _check_one(device: str, operator: str, backend: str, dtype: torch.dtype, real: bool) -> bool:
    """Compare on all cases, print a row, keep the verdict; returns whether the backend agrees.

    Without ``real``, in Triton's interpreter, cases are small, and nothing is timed or kept.
    """
    small, stages = _cases(operator)
    # The first stage would take PyTorch minutes in float64.
    cases = [*small, stages[-1]] if real else small
    # PyTorch's convolutions take seconds on a CPU in other dtypes.
    timed = real and (device != "cpu" or dtype == torch.float32)
    start = operator, backend, str(dtype).removeprefix("torch."), len(cases)
    try:
        # NaN is the worst of all.
        errors = [(case.error(backend, device, dtype), case.label) for case in cases]
        error, label = max(errors, key=lambda pair: math.inf if pair[0] != pair[0] else pair[0])
        spent = ["", ""]
        if timed:
            stages = _cases(operator, batch=2 if device == "cpu" else 32)[1]
            spent = [_milliseconds(stages, kind, device, dtype) for kind in (backend, "torch")]
    except Exception as failure:
        said = (str(failure).strip().splitlines() or [""])[0]
        print(_row(*start, *[""] * 4, f"{type(failure).__name__}: {said}"), flush=True)
        return False
    verdict = verdicts.judge(operator, backend, device, dtype, error)
    agrees, word = verdict.use, "agrees" if verdict.use else f"disagrees: {label}"
    if agrees and timed and backend == "triton" and spent[0] > SLOWER * spent[1]:
        word = f"agrees, slower than torch: {spent[0]:.2f} against {spent[1]:.2f} ms"
        verdict = replace(verdict, use=False, reason=f"triton {word} in {start[2]}")
    if real:
        verdicts.remember(verdict, device)
    times = [f"{ms:.2f}" if timed else "" for ms in spent]
    limit = f"{verdicts.TOLERANCES[dtype]:.0e}"
    print(_row(*start, f"{error:.1e}", limit, *times, word), flush=True)
    return agrees


def _cases(operator: str, batch: int = 1) -> tuple[list[Case], list[Case]]:
    """Small cases, and those of a network's stages."""
    if operator == "residual_mlp":
        small = [_half_block(*size) for size in ((1, 3, 5), (50, 33, 130), (209, 96, 384))]
        return small, [_half_block(batch * side**2, c, 4 * c) for side, c in ((56, 96), (14, 384))]
    if operator == "linear_layer":
        sizes = (1, 3, 5), (130, 96, 384)
        return [_layer(*size) for size in sizes], [_layer(batch * 56**2, 96, 384)]
    if operator != "linear":
        small = [*small_cases(operator), first_case(operator)]
        return small, stage_cases(operator, batch)
    sizes = (1, 3, 5), (50, 96, 384)
    small = [
        _linear(*size, then, p) for size in sizes for then in ACTIVATIONS for p in (False, True)
    ]
    stages = [(56, 96), (14, 384)]
    return small, [_linear(batch * side**2, c, 4 * c, "gelu", True) for side, c in stages]


def _linear(rows: int, channels: int, out: int, activation: str, pack: bool) -> Case:
    """The linear layer of fused models, which has no backward pass of its own."""
    tensors, packed = (normal(1, rows, channels), normal(2, out, channels), normal(3, out)), Kept()
    label = f"{rows} rows, {channels} to {out}, {activation}{', packed' if pack else ''}"

    def run(*given: torch.Tensor) -> torch.Tensor:
        return linear(*given, activation, packed if pack else None)

    return Case("linear", label, run, None, tensors)


def _layer(rows: int, channels: int, out: int) -> Case:
    """A call of ``nn.Linear``, with autograd's backward pass."""
    tensors = normal(1, rows, channels), normal(2, out, channels), normal(3, out)

    def run(*given: torch.Tensor) -> torch.Tensor:
        by = choose("linear_layer", *given)
        return convolved(*given) if by == "onednn" else F.linear(*given)

    def gradients(grad: torch.Tensor, *given: torch.Tensor) -> tuple[torch.Tensor, ...]:
        given = [t.detach().requires_grad_() for t in given]
        with torch.enable_grad():
            return torch.autograd.grad(run(*given), given, grad)

    return Case("linear_layer", f"{rows} rows, {channels} to {out}", run, gradients, tensors)


def _half_block(rows: int, channels: int, hidden: int) -> Case:
    """The second half of a fused block, with a projection and without a norm's weight."""
    sizes = (channels, channels), (hidden, channels), (channels, hidden)
    weights = [normal(3 + i, *size) * size[1] ** -0.5 for i, size in enumerate(sizes)]
    tensors = normal(1, rows, channels), normal(2, rows, channels), *weights
    panels = Kept()

    def run(x: torch.Tensor, mixed: torch.Tensor, *given: torch.Tensor) -> torch.Tensor:
        if choose("residual_mlp", x) == "native":
            x, mixed, out = native.maps(x, mixed, torch.empty_like(x))
            linears = tuple((weight, None) for weight in given)

            def laid_out() -> Panels:
                return Panels.of(x.dtype, linears, (None, None, 1e-5))

            residual_mlp(x, mixed, panels.of(given, x.dtype, laid_out), out)
            return out.to(given[0].dtype)
        project, first, second = given
        y = x + F.linear(mixed.relu(), project)
        return y + F.linear(F.gelu(F.linear(F.layer_norm(y, y.shape[1:]), first)), second)

    label = f"{rows} rows, {channels} channels, {hidden} hidden"
    return Case("residual_mlp", label, run, None, tensors)


def _milliseconds(cases: list[Case], backend: str, device: str, dtype: torch.dtype) -> float:
    """The sum over the cases of the median time of forward and backward."""
    # Its import looks for CUDA's compiler, and says so where there is none.
    from torch.utils.benchmark import Timer

    total = 0.0
    for case in cases:
        tensors = [x.to(device, dtype) for x in case.tensors]
        timer = Timer(
            "run(*tensors)",
            globals={"run": case.run, "tensors": tensors},
            num_threads=torch.get_num_threads(),
        )
        with forced_here(backend):
            total += 1000 * timer.blocked_autorange(min_run_time=0.3).median
    return total


def _row(*cells: object) -> str:
    widths = (37, 8, 9, 6, 9, 8, 9, 10, 0)
    return "".join(f"{cell!s:<{width}}" for cell, width in zip(cells, widths, strict=True))


if __name__ == "__main__":
    sys.exit(main())
