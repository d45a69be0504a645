"""Train all five families on your own photos with several seeds each, and compare their accuracy.

    python tools/compare_families.py --data-root photos      # photos/train and photos/val

All use the recipe configs/pretraining/_base_/nano.py: 64x64 pixels, AdamW, cosine schedule. The
accuracy is that of the last epoch. OUT/<data>_<size>_<epochs>e gets comparison.md (parameters,
FLOPs, minutes, top-1 with its standard deviation over seeds), .json and .png. After a kill the same
command continues; a larger --seeds adds runs.
"""

import argparse
import os
import sys
from pathlib import Path

from dense import steps
from dense.steps import State, Step, StepError

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("backbones", "dense/pretraining", "dense/openmmlab", "configs/pretraining")
IMG_SIZE = 64
RUNS = "runs"
MADE = (RUNS, "comparison.json", "comparison.md", "comparison.png")


def plan(args: argparse.Namespace, num_classes: int) -> dict[str, list[Step]]:
    """The trainings of each network, one step for each seed."""
    from backbones import FAMILIES

    warmup = max(1, args.epochs // 10)
    options = (
        f"train_cfg.max_epochs={args.epochs} train_cfg.val_interval={max(1, args.epochs // 5)}"
        f" param_scheduler.0.end={warmup} param_scheduler.1.begin={warmup}"
        f" param_scheduler.1.end={args.epochs}"
    )
    planned = {}
    for family in FAMILIES:
        name = f"{family}_{args.size}"
        planned[name] = [
            Step(
                f"{name}_seed{seed}",
                f"{name}, seed {seed}",
                f"tools/pretrain.py configs/pretraining/{family}_nano.py --resume"
                f" --data-root {{data}} --num-classes {num_classes}"
                f" --work-dir {{runs}}/{name}_seed{seed}"
                f" --cfg-options model.name={name} randomness.seed={seed} {options}",
                args.epochs,
                lambda out, run=f"{name}_seed{seed}": epochs_done(out / RUNS / run),
            )
            for seed in range(args.seeds)
        ]
    return planned


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


def run(args: argparse.Namespace) -> None:
    from dense import require

    require("mmengine", "pretraining")
    from dense.analysis import comparison

    data = Path(args.data_root).resolve()
    num_classes = count_classes(data)
    out = Path(args.out).resolve() / f"{data.name}_{args.size}_{args.epochs}e"
    planned = plan(args, num_classes)
    digest = f"{steps.sources_digest(ROOT, SOURCES, ())} {data}"
    places = {"data": str(data), "runs": str(out / RUNS)}
    with steps.only_one(out) as lock:
        state: State = steps.prepare(out, MADE, digest, args.fresh)
        # Seed by seed: an interrupted comparison has the first seeds of all families.
        trainings = [step for seed in zip(*planned.values(), strict=True) for step in seed]
        steps.run_all(trainings, out, places, state, lock, ROOT, args.jobs)
        entries = comparison.compare(
            {name: [out / RUNS / s.name for s in taken] for name, taken in planned.items()},
            {out / RUNS / s.name: state.seconds(s) for s in trainings},
            num_classes,
            IMG_SIZE,
            out,
        )
    print(comparison.table(entries))
    print(f"{args.jobs} runs in parallel; plot and numbers: {out}/comparison.png, .md, .json")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data-root", required=True, help="has train/ and val/, each with a folder per class")
    add("--out", default="work_dirs/families", help="output folder (%(default)s)")
    add("--size", choices=("nano", "tiny"), default="nano", help="network size (%(default)s)")
    add("--seeds", type=int, default=3, help="runs of each network (%(default)s)")
    add("--epochs", type=int, default=10, help="epochs of each run, 2 or more (%(default)s)")
    cores = len(os.sched_getaffinity(0))
    add("--jobs", type=int, default=min(4, cores), help="runs in parallel (%(default)s)")
    add("--fresh", action="store_true", help="remove earlier results and start over")
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
