"""Train families and ablations on your own photos with several seeds each, and compare them.

    python tools/compare_families.py --data-root photos      # photos/train and photos/val
    python tools/compare_families.py --data-root photos --ablations all
    python tools/compare_families.py --data-root photos --ablations "dw_conv_*" swin_sliding

All use the recipe configs/pretraining/_base_/nano.py: 64x64 pixels, AdamW, cosine schedule. The
accuracy is that of the last epoch. OUT/<data>_<size>_<epochs>e gets comparison.md (parameters,
FLOPs, minutes, top-1 with its standard deviation over seeds, the difference to the network's family
with the same seeds, with its 95% interval, and the paper's top-1 of the tiny network),
comparison.png, and a JSON file for every finished run in results/ (--results names another folder).
After a kill the same command continues; a larger --seeds adds runs. A run is repeated if its
recipe, or what its own network computes, has changed since.
"""

import argparse
import hashlib
import json
import os
import sys
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from dense import files, runs, steps
from dense.steps import State, Step, StepError
from dense.waiting import waiting

ROOT = Path(__file__).resolve().parents[1]
IMG_SIZE = 64
RUNS = "runs"
MADE = (RUNS, "results", "comparison.md", "comparison.png")
# Figure 2's heads that "all" leaves out: of 2, 8, 16 and 96 channels.
_LEFT_OUT = ("*_heads_of_2", "*_heads_of_8", "*_heads_of_16", "*_heads_of_96")


@dataclass(frozen=True)
class Run:
    """A training: its network, seed, recipe, the network's fingerprint and the command."""

    network: object
    seed: int
    recipe: str
    marks: tuple[float, ...]
    step: Step


def networks(size: str, patterns: list[str]) -> list:
    """The five families, and the ablations that a pattern names, in a size.

    Raises:
        StepError: a pattern names no ablation of a pyramid.
    """
    from backbones import FAMILIES, ablations
    from dense.analysis.comparison import Network

    found = {family: Network(family, f"{family}_{size}", {}, family) for family in FAMILIES}
    pyramids = [n for n, row in ablations.ABLATIONS.items() if row.is_pyramid]
    for pattern in patterns:
        names = [n for n in pyramids if pattern == "all" or fnmatchcase(n, pattern)]
        if pattern == "all":
            names = [n for n in names if not any(fnmatchcase(n, out) for out in _LEFT_OUT)]
        if not names:
            raise StepError(f"--ablations {pattern}: none of {', '.join(pyramids)}")
        for name in names:
            row = ablations.ABLATIONS[name]
            options = row.arguments(size)
            found.setdefault(name, Network(name, row.name(size), options, row.model))
    return list(found.values())


def plan(args: argparse.Namespace, num_classes: int) -> list[Run]:
    """All trainings, seed by seed: an interrupted comparison has the first seeds of all."""
    from tqdm import tqdm

    from dense.analysis import comparison

    warmup = max(1, args.epochs // 10)
    options = (
        f"train_cfg.max_epochs={args.epochs} train_cfg.val_interval={max(1, args.epochs // 5)}"
        f" param_scheduler.0.end={warmup} param_scheduler.1.begin={warmup}"
        f" param_scheduler.1.end={args.epochs}"
    )
    planned = []
    for network in tqdm(networks(args.size, args.ablations), desc="looking at the networks"):
        marks = comparison.fingerprint(network, num_classes, IMG_SIZE)
        config = f"configs/pretraining/{network.baseline}_nano.py"
        ablation = f" --ablation {network.name}" if network.name != network.baseline else ""
        recipe = recipe_of(config, network, options, Path(args.data_root))
        short = hashlib.sha256(f"{recipe} {marks[:2]}".encode()).hexdigest()[:8]
        for seed in range(args.seeds):
            name = f"{network.name}_{args.size}_seed{seed}_{short}"
            command = (
                f"tools/pretrain.py {config}{ablation} --resume"
                f" --data-root {{data}} --num-classes {num_classes} --work-dir {{runs}}/{name}"
                f" --cfg-options model.name={network.baseline}_{args.size}"
                f" randomness.seed={seed} {options}"
            )
            step = Step(
                name,
                f"{network.name}, seed {seed}",
                command,
                args.epochs,
                lambda out, run=name: epochs_done(out / RUNS / run),
            )
            planned.append(Run(network, seed, recipe, marks, step))
    return sorted(planned, key=lambda run: run.seed)


def recipe_of(config: str, network, options: str, data_root: Path) -> str:
    """A digest of the config, the network's arguments and the names and sizes of the photos."""
    from mmengine.config import Config, DictAction

    cfg = Config.fromfile(ROOT / config)
    pairs = dict(option.split("=") for option in options.split())
    cfg.merge_from_dict({k: DictAction._parse_iterable(v) for k, v in pairs.items()})
    content = cfg.to_dict()
    content["model"] |= {"name": network.model, **network.options}
    for loader in ("train_dataloader", "val_dataloader"):
        del content[loader]["dataset"]["root"]
    photos = sorted(
        (str(path.relative_to(data_root)), path.stat().st_size)
        for path in data_root.rglob("*")
        if path.is_file()
    )
    text = json.dumps([content, photos], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def epochs_done(work_dir: Path) -> int:
    numbers = [path.stem.removeprefix("epoch_") for path in work_dir.glob("epoch_*.pth")]
    return max((int(number) for number in numbers if number.isdigit()), default=0)


def count_classes(data_root: Path) -> int:
    """The number of folders in ``train``; raises a StepError if there are less than two."""
    train = data_root / "train"
    found = [path for path in train.iterdir() if path.is_dir()] if train.is_dir() else []
    if len(found) < 2:
        raise StepError(f"no photos in {train}: it needs a folder for every class")
    if not (data_root / "val").is_dir():
        raise StepError(f"no photos to validate on: {data_root / 'val'} is missing")
    return len(found)


def finished(planned: list[Run], folder: Path) -> list:
    """The results in a folder that still count, of the planned runs."""
    from dense.analysis.comparison import Result

    wanted = {f"{run.network.name}_seed{run.seed}.json": run for run in planned}
    found = []
    for path in sorted(folder.glob("*.json")):
        run = wanted.get(path.name)
        if run and (result := Result.read(path)).is_of(run.recipe, run.marks):
            found.append(result)
    return found


def run(args: argparse.Namespace) -> None:
    from dense import require

    require("mmengine", "pretraining")
    with waiting("importing PyTorch"):
        from dense.analysis import comparison

    data = Path(args.data_root).resolve()
    num_classes = count_classes(data)
    out = Path(args.out).resolve() / f"{data.name}_{args.size}_{args.epochs}e"
    folder = Path(args.results).resolve() if args.results else out / "results"
    planned = plan(args, num_classes)
    places = {"data": str(data), "runs": str(out / RUNS)}
    with runs.locked(out) as lock:
        state: State = steps.prepare(out, MADE, str(data), args.fresh)
        done = {(r.network, r.seed) for r in finished(planned, folder)}
        open_ = [r for r in planned if (r.network.name, r.seed) not in done]
        print(f"{len(done)} of {len(planned)} runs are in {folder}")

        def keep() -> None:
            """Write the results of the runs that have finished since."""
            for r in open_:
                if state.done(r.step) and (r.network.name, r.seed) not in done:
                    comparison.result_of(
                        *(r.network, r.seed, r.recipe, r.marks, out / RUNS / r.step.name),
                        *(state.seconds(r.step), num_classes, IMG_SIZE),
                    ).write(folder)
                    done.add((r.network.name, r.seed))

        try:
            steps.run_all([r.step for r in open_], out, places, state, lock, ROOT, args.jobs, keep)
        finally:
            keep()
            unique = list({r.network.name: r.network for r in planned}.values())
            if results := finished(planned, folder):
                compared = comparison.entries(unique, results)
                text = comparison.table(compared)
                files.write(out / "comparison.md", text + "\n")
                comparison.plot(compared, out / "comparison.png")
    print(text)
    print(f"{args.jobs} runs in parallel; plot: {out}/comparison.png; each run: {folder}")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data-root", required=True, help="has train/ and val/, each with a folder per class")
    add("--out", default="work_dirs/families", help="output folder (%(default)s)")
    add("--results", metavar="FOLDER", help="a JSON file for every finished run (OUT/*/results)")
    add(
        "--ablations",
        nargs="+",
        default=[],
        metavar="NAME",
        help="rows of backbones/ablations.py beside the families, * as in file names; all: every "
        "pyramid, of Figure 2 heads of 1, 4 and 32 channels",
    )
    add("--size", choices=("nano", "tiny"), default="nano", help="network size (%(default)s)")
    add("--seeds", type=int, default=3, help="runs of each network (%(default)s)")
    add("--epochs", type=int, default=10, help="epochs of each run, 2 or more (%(default)s)")
    cores = len(os.sched_getaffinity(0))
    add("--jobs", type=int, default=min(4, cores), help="runs in parallel (%(default)s)")
    add("--fresh", action="store_true", help="remove earlier runs in OUT and start over")
    args = parser.parse_args(argv)
    for name, least in (("seeds", 1), ("epochs", 2), ("jobs", 1)):
        if getattr(args, name) < least:
            parser.error(f"--{name} {getattr(args, name)}: {least} or more is needed")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    return steps.run_tool("compare_families", lambda: run(args), ImportError, ValueError)


if __name__ == "__main__":
    sys.exit(main())
