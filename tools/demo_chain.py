"""Pretrain backbones, then train detectors and segmentors from them and from random weights.

    python tools/demo_chain.py --photos tiny_imagenet_10 --ade ADEChallengeData2016

Pretrains d_dw_conv_nano and i_d_dw_conv_nano on folders of photos, publishes them, and trains
Cascade Mask R-CNN (on the scenes of tools/make_scenes.py) and UPerNet (on photos) from each, and
from random weights with the same seed. The demo fails unless the published weights fill the whole
backbone and the loss stays below that from random weights. The loss of a detector is that of its
RPN: the losses of the RoI heads grow when proposals improve. After a kill the same command
continues; --fresh starts over.
"""

import argparse
import json
import os
import re
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean

from dense import files, metrics, runs, steps
from dense.steps import State, Step, StepError

ROOT = Path(__file__).resolve().parents[1]
BACKBONES = ("d_dw_conv_nano", "i_d_dw_conv_nano")
HEADS = {"detector": "Cascade Mask R-CNN", "segmentor": "UPerNet"}
STARTS = ("pretrained", "random")
EPOCHS, LOGGED = 30, 5
# Few: the scenes are easy, and after more iterations both starts reach the same loss.
ITERATIONS = {"detector": 50, "segmentor": 80}
# The losses are compared in so many equal parts of the training, to average over batches.
PARTS = 2
MADE = ("scenes", "pretrained", "published", "detector", "segmentor", "chain.json", "chain.png")

PRETRAIN = (
    "tools/pretrain.py configs/pretraining/{name}.py --resume --data-root {{photos}}"
    " --num-classes {classes} --work-dir {{out}}/pretrained/{name} --cfg-options"
    f" randomness.seed=0 train_cfg.max_epochs={EPOCHS} train_cfg.val_interval=10"
    f" param_scheduler.0.end=1 param_scheduler.1.begin=1 param_scheduler.1.end={EPOCHS}"
)
PUBLISH = (
    "tools/publish_checkpoint.py {{out}}/pretrained/{name}/"
    f"epoch_{EPOCHS}.pth --out {{{{out}}}}/published"
)
SCENES = Step("scenes", "generate scenes", "tools/make_scenes.py {out}/scenes --overwrite")
# Learning rates below those of the configs, which are tuned for random weights.
TRAIN = {
    "detector": (
        "tools/train_detector.py --config-file configs/detection/cascade_mask_rcnn_{name}.py"
        " --train-json {{out}}/scenes/coco/annotations/instances_train2017.json"
        " --train-images {{out}}/scenes/coco/train2017 --output-dir {{out}}/detector/{run} --resume"
        f" train.seed=0 train.max_iter={ITERATIONS['detector']} train.log_period={LOGGED}"
        " train.checkpointer.period=20 optimizer.lr=1e-3"
    ),
    "segmentor": (
        "tools/train_segmentor.py configs/segmentation/{name}_upernet.py --data-root {{ade}}"
        " --short-side 128 --work-dir {{out}}/segmentor/{run} --resume"
        " --cfg-options randomness.seed=0"
        f" train_cfg.max_iters={ITERATIONS['segmentor']}"
        f" train_cfg.val_interval={ITERATIONS['segmentor']}"
        f" default_hooks.logger.interval={LOGGED} default_hooks.checkpoint.interval=20"
        " param_scheduler.0.end=5 param_scheduler.1.begin=5"
        f" param_scheduler.1.end={ITERATIONS['segmentor']}"
        " optim_wrapper.optimizer.lr=5e-4"
    ),
}
INIT = {
    "detector": " model.backbone.bottom_up.init={{{name}}}",
    "segmentor": " model.backbone.init={{{name}}}",
}


@dataclass(frozen=True)
class Contest:
    """One head on one backbone, from pretrained and from random weights.

    Attributes:
        head: ``"detector"`` or ``"segmentor"``.
        backbone: model name.
        matched: number of backbone entries that the published weights filled.
        pretrained: mean loss in each part of the training, from pretrained weights.
        random: the same from random weights.
    """

    head: str
    backbone: str
    matched: int
    pretrained: tuple[float, ...]
    random: tuple[float, ...]

    @property
    def won(self) -> bool:
        """Whether the pretrained weights' loss is lower in all parts."""
        return all(a < b for a, b in zip(self.pretrained, self.random, strict=True))


def pretraining(classes: int) -> tuple[list[Step], list[Step]]:
    """The steps that train the classifiers, and the steps that publish them."""
    trainings, publications = [], []
    for name in BACKBONES:
        command = PRETRAIN.format(name=name, classes=classes)
        trainings.append(
            Step(f"pretrain_{name}", f"pretrain {name}", command, EPOCHS, _epochs(name))
        )
        command = PUBLISH.format(name=name)
        publications.append(Step(f"publish_{name}", f"publish {name}", command))
    return trainings, publications


def downstream() -> list[Step]:
    found = []
    for head, title in HEADS.items():
        for name in BACKBONES:
            for start in STARTS:
                run = f"{name}_{start}"
                template = TRAIN[head] + (INIT[head] if start == "pretrained" else "")
                found.append(
                    Step(
                        f"{head}_{run}",
                        f"train {title} on {name}, {start}",
                        template.format(name=name, run=run),
                        ITERATIONS[head],
                        _iterations(head, run),
                    )
                )
    return found


def _epochs(name: str):
    def position(out: Path) -> int:
        files = (out / "pretrained" / name).glob("epoch_*.pth")
        return max((int(path.stem.removeprefix("epoch_")) for path in files), default=0)

    return position


def _iterations(head: str, run: str):
    def position(out: Path) -> int:
        try:
            return metrics.read_run(out / head / run).loss[-1][0]
        except (OSError, ValueError, IndexError):
            return 0

    return position


def places(out: Path, args: argparse.Namespace) -> dict[str, str]:
    """The paths in the commands; a published file that does not exist yet is empty."""
    found = {key: str(Path(getattr(args, key)).resolve()) for key in ("photos", "ade")}
    found["out"] = str(out.relative_to(ROOT) if out.is_relative_to(ROOT) else out)
    for name in BACKBONES:
        files = sorted((out / "published").glob(f"{name}-*.pth"))
        found[name] = str(files[-1]) if files else ""
    return found


def check_data(args: argparse.Namespace) -> int:
    """Check the data's folders (StepError) and return the number of classes."""
    needed = {"photos": ("train", "val"), "ade": ("images/training", "annotations/training")}
    for key, parts in needed.items():
        for part in parts:
            if not Path(getattr(args, key), part).exists():
                raise StepError(f"--{key} {getattr(args, key)}: it has no {part}")
    return sum(path.is_dir() for path in Path(args.photos, "train").iterdir())


def full_match(name: str, checkpoint: str) -> int:
    """The number of backbone entries that the published weights fill.

    Raises:
        StepError: an entry is not filled, except output norms, which classifiers do not have.
    """
    import backbones
    from dense.backbone import DenseBackbone

    try:
        found = backbones.load_checkpoint(DenseBackbone(name, norm="BN"), checkpoint)
    except backbones.CheckpointError as error:
        raise StepError(f"not a full match: {error}") from error
    random = [entry for entry in found.missing if not entry.startswith("norms.")]
    unused = [entry for entry in found.unexpected if not entry.startswith(("norm.", "head."))]
    if random or unused or found.resized:
        raise StepError(f"not a full match: {found}")
    return len(found.matched)


def contests(out: Path, published: dict[str, str]) -> list[Contest]:
    """The losses of all trainings; a StepError if one did not log that all entries matched."""
    found = []
    for head in HEADS:
        for name in BACKBONES:
            matched = full_match(name, published[name])
            log = (out / steps.LOGS / f"{head}_{name}_pretrained.log").read_text()
            if str(matched) not in re.findall(r"(\d+) matched", log):
                raise StepError(f"{head} on {name} did not take the {matched} published entries")
            runs = [losses(head, out / head / f"{name}_{start}") for start in STARTS]
            found.append(Contest(head, name, matched, *map(in_parts, runs)))
    return found


def losses(head: str, folder: Path) -> metrics.Points:
    """A segmentor's total loss, or a detector's RPN loss, whose targets no proposal changes."""
    if head == "segmentor":
        return metrics.read_run(folder).loss
    rows = [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]
    return [
        (row["iteration"] + 1, row["loss_rpn_cls"] + row["loss_rpn_loc"])
        for row in rows
        if "loss_rpn_cls" in row
    ]


def in_parts(points: metrics.Points) -> tuple[float, ...]:
    """The mean loss in each of PARTS equal parts of the training."""
    last = max(step for step, _ in points)
    parts: list[list[float]] = [[] for _ in range(PARTS)]
    for step, value in points:
        parts[min(PARTS - 1, step * PARTS // (last + 1))].append(value)
    return tuple(mean(part) for part in parts)


def draw(out: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5 * len(BACKBONES), 3.4 * len(HEADS)), layout="constrained")
    grid = figure.subplots(len(HEADS), len(BACKBONES), squeeze=False)
    for (head, title), row in zip(HEADS.items(), grid, strict=True):
        for name, axes in zip(BACKBONES, row, strict=True):
            for start in STARTS:
                points = losses(head, out / head / f"{name}_{start}")
                axes.plot(*zip(*points, strict=True), label=start)
            label = "loss of proposals" if head == "detector" else "loss"
            axes.set(title=f"{title}, {name}", xlabel="iteration", ylabel=label)
            axes.grid(alpha=0.25)
            axes.legend()
    files.write(out / "chain.png", lambda partial: figure.savefig(partial, format="png", dpi=110))


def chain(args: argparse.Namespace) -> None:
    """Run the steps and compare; a StepError if a loss from pretrained weights is not lower."""
    out = Path(args.out).resolve()
    trainings, publications = pretraining(check_data(args))
    digest = steps.sources_digest(ROOT, ("backbones", "dense", "configs", "tools"), ())
    digest += f" {args.photos} {args.ade}"
    rows = ([SCENES, *trainings], publications, downstream())
    with runs.locked(out) as lock:
        state: State = steps.prepare(out, MADE, digest, args.fresh)
        for row in rows:
            steps.run_all(row, out, places(out, args), state, lock, ROOT, args.jobs)
        found = contests(out, places(out, args))
        files.write(out / "chain.json", json.dumps([asdict(c) for c in found], indent=1))
        draw(out)
    for contest in found:
        line = " ".join(
            f"{a:.3f}/{b:.3f}" for a, b in zip(contest.pretrained, contest.random, strict=True)
        )
        title = f"{HEADS[contest.head]} on {contest.backbone}"
        print(f"{title}: {contest.matched} entries matched; loss pretrained/random {line}")
    total = sum(state.seconds(step) for row in rows for step in row)
    print(f"{total / 60:.1f} minutes of steps, {args.jobs} in parallel; {out / 'chain.png'}")
    lost = [f"{c.head} on {c.backbone}" for c in found if not c.won]
    if lost:
        raise StepError(f"pretrained weights did not stay ahead: {', '.join(lost)}")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    sample = os.environ.get("DENSE_SAMPLE_DATA", "data")
    add("--photos", default=f"{sample}/tiny_imagenet_10", help="train/, val/, a folder per class")
    add("--ade", default=f"{sample}/ADEChallengeData2016", help="images/, annotations/ as ADE20K's")
    add("--out", default="work_dirs/chain", help="output folder (%(default)s)")
    cores = len(os.sched_getaffinity(0))
    add("--jobs", type=int, default=min(4, cores), help="steps in parallel (%(default)s)")
    add("--fresh", action="store_true", help="remove earlier results and start over")
    args = parser.parse_args(argv)
    if args.jobs < 1:
        parser.error(f"--jobs {args.jobs}: 1 or more is needed")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    return steps.run_tool("demo_chain", lambda: chain(args))


if __name__ == "__main__":
    sys.exit(main())
