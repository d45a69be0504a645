"""Benchmark operators, networks and whole models beside those of timm, torchvision and frameworks.

    python tools/benchmark.py networks --sizes 224x224 --out work_dirs/benchmark
    python tools/benchmark.py operators networks scaling models --compiled

All contenders of a contest run in turns in one process. Results are median time with quartiles,
peak memory, and speed relative to the first contender. OUT gets results.json (after every contest,
so that --resume continues after a kill), results.md, and scaling.png of the suite scaling. GPUs run
in bfloat16 autocast, CPUs in float32, unless --dtype names the other. Close other programs before
you measure.
"""

import argparse
import json
import sys
from importlib.util import find_spec
from pathlib import Path

from tqdm import tqdm

from dense.waiting import waiting

with waiting("importing PyTorch"):
    import torch

    from dense import files
    from dense.analysis.benchmark import measure, models, networks, operators, report

SUITES = ("operators", "networks", "scaling", "models")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("suites", nargs="+", choices=SUITES, metavar="SUITE", help=", ".join(SUITES))
    add("--out", default="work_dirs/benchmark", help="folder of the results")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", default=device, help="such as cuda:1 (%(default)s)")
    add(
        "--sizes",
        nargs="+",
        type=image_size,
        default=list(networks.SIZES),
        help="image sizes as HEIGHTxWIDTH in pixels, such as 512x2048",
    )
    add("--batch", type=int, help="images in a step; default: chosen by the image size")
    modes = ["inference", "training"]
    add("--modes", nargs="+", choices=modes, default=modes, help="of networks; default: both")
    add("--scale", choices=("nano", "tiny", "base"), default="tiny", help="of our networks (tiny)")
    add("--compiled", action="store_true", help="networks under torch.compile too: minutes each")
    add("--engines", action="store_true", help="ONNX Runtime and OpenVINO too (CPU, inference)")
    add(
        "--limit",
        action="store_true",
        help="networks beside one large matrix product: the share of its multiply-adds a second",
    )
    add(
        "--dtype",
        choices=("float32", "bfloat16"),
        help="of networks and scaling, by autocast; default: bfloat16 on a GPU, float32 on a CPU",
    )
    add("--rounds", type=int, default=9, help="timed steps of each contender (%(default)s)")
    add("--seconds", type=float, default=60, help="time limit of a contest, approximate (60)")
    add("--only", metavar="TEXT", help="contests whose title contains TEXT, such as sliding")
    add("--resume", action="store_true", help="keep the contests in OUT and run the others")
    args = parser.parse_args(argv)
    if args.batch is not None and args.batch < 1:
        parser.error(f"--batch {args.batch}: at least 1 is needed")
    if args.rounds < 3:
        parser.error(f"--rounds {args.rounds}: at least 3 are needed for a median with quartiles")
    if args.device.split(":")[0] not in ("cpu", "cuda"):
        parser.error(f"--device {args.device}: cpu, cuda or cuda:N is needed")
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error(f"--device {args.device}: CUDA is not available")
    if Path(args.out).exists() and not Path(args.out).is_dir():
        parser.error(f"--out {args.out} is a file; a folder is needed")
    if args.engines and (args.device != "cpu" or "inference" not in args.modes):
        parser.error("--engines is for inference on a CPU: --device cpu --modes inference")
    if args.engines and not (find_spec("onnxruntime") or find_spec("openvino")):
        parser.error("--engines: neither onnxruntime nor openvino is installed")
    if args.dtype and not set(args.suites) <= {"networks", "scaling"}:
        parser.error("--dtype is for the suites networks and scaling")
    for option in ("sizes", "batch", "scale", "compiled", "engines", "limit"):
        if getattr(args, option) != parser.get_default(option) and "networks" not in args.suites:
            parser.error(f"--{option} is for the suite networks, which is not selected")
    return args


def image_size(text: str) -> tuple[int, int]:
    rows, _, columns = text.partition("x")
    if not (rows.isdigit() and columns.isdigit() and min(int(rows), int(columns)) >= 32):
        raise argparse.ArgumentTypeError(f"{text}: ROWSxCOLUMNS, 32 or more, is needed")
    return int(rows), int(columns)


def planned(args: argparse.Namespace) -> list[measure.Contest]:
    device, dtype = torch.device(args.device), args.dtype and getattr(torch, args.dtype)
    make = {
        "operators": lambda: operators.contests(device, args.modes),
        "networks": lambda: networks.contests(
            args.sizes,
            args.batch,
            device,
            args.compiled,
            args.scale,
            args.modes,
            dtype,
            args.engines,
            args.limit,
        ),
        "scaling": lambda: networks.scaling_contests(device, args.modes, dtype),
        "models": lambda: models.contests(device),
    }
    found = [contest for suite in dict.fromkeys(args.suites) for contest in make[suite]()]
    chosen = [contest for contest in found if (args.only or "") in contest.title]
    if not chosen:
        titles = "; ".join(contest.title for contest in found)
        raise SystemExit(f"benchmark: --only {args.only}: no contest has it in its title: {titles}")
    return chosen


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    out, device = Path(args.out), torch.device(args.device)
    file = out / "results.json"
    if file.exists() and not args.resume:
        print(f"benchmark: {file} exists; --resume keeps what is in it", file=sys.stderr)
        return 2
    out.mkdir(parents=True, exist_ok=True)
    dtype = getattr(torch, args.dtype) if args.dtype else networks.default_dtype(device)
    where = report.machine(device, dtype)
    results = read(file, where) if file.exists() else []
    done = {result.contest for result in results}
    bar = tqdm(planned(args), unit="contest")
    for contest in bar:
        if contest.key in done:
            continue
        found = measure.hold(contest, device, args.rounds, args.seconds, bar.set_postfix_str)
        results += found
        write(results, where, out)
        tqdm.write(report.markdown(found, where))
    print(f"{out}/results.md, results.json")
    return 0


def read(file: Path, where: str) -> list[measure.Result]:
    """The results of an earlier run on this machine."""
    try:
        content = json.loads(file.read_text())
    except ValueError as error:
        raise SystemExit(f"benchmark: {file} is damaged ({error}): remove it") from error
    if content["machine"] != where:
        raise SystemExit(
            f"benchmark: {file} was measured on another machine ({content['machine']}; here: "
            f"{where}): name another --out"
        )
    return [measure.Result(**entry) for entry in content["results"]]


def write(results: list[measure.Result], where: str, out: Path) -> None:
    content = {"machine": where, "results": [result.as_dict() for result in results]}
    files.write(out / "results.json", json.dumps(content, indent=1))
    files.write(out / "results.md", report.markdown(results, where))
    if any(result.contest.startswith("scaling") for result in results):
        report.plot_scaling(results, out / "scaling.png")


if __name__ == "__main__":
    sys.exit(main())
