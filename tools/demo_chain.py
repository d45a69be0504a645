"""Pretrain, publish, initialise a detector and a segmentor, and train them on: the whole chain.

    python tools/demo_chain.py --photos tiny_imagenet_10 --ade ADEChallengeData2016

Pretrains d_dw_conv_nano and i_d_dw_conv_nano on folders of photos, publishes them, and trains
Cascade Mask R-CNN (on the scenes of tools/make_scenes.py) and UPerNet (on photos) from each, and
from random weights with the same seed beside it. The published weights must fill the whole
backbone, and the loss must start and stay below the one from random weights, or the demo fails. Of
a detector that is the loss of its region proposals: the other losses are of what was proposed, and
harder the better that is. Every step is a command that you could type. After a kill the same
command goes on; --fresh starts over.
"""

import argparse
import json
import os
import re
import signal
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean

from dense import files, metrics, steps
from dense.steps import State, Step, StepError

ROOT = Path(__file__).resolve().parents[1]
BACKBONES = ("d_dw_conv_nano", "i_d_dw_conv_nano")
HEADS = {"detector": "Cascade Mask R-CNN", "segmentor": "UPerNet"}
STARTS = ("pretrained", "random")
EPOCHS, LOGGED = 30, 5
# Scenes are easy: more would compare what both starts end at.
ITERATIONS = {"detector": 50, "segmentor": 80}
# Each is longer than what single batches differ by.
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
# Rates below those of the configs, which are for random weights: what was learned is to be kept.
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
        " --work-dir {{out}}/segmentor/{run} --resume --cfg-options randomness.seed=0"
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
        backbone: its name.
        matched: entries of the backbone that the published weights filled, all of them.
        pretrained: mean losses of each part of the training.
        random: those from random weights.
    """

    head: str
    backbone: str
    matched: int
    pretrained: tuple[float, ...]
    random: tuple[float, ...]

    @property
    def won(self) -> bool:
        """Whether pretraining's losses are the lower ones from the first part to the last."""
        return all(a < b for a, b in zip(self.pretrained, self.random, strict=True))


def pretraining(classes: int) -> tuple[list[Step], list[Step]]:
    """The steps that train the classifiers, and those that publish them."""
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
    """The trainings of all heads on all backbones, from both starts."""
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
    """The paths in the commands; the published files once they are there."""
    found = {key: str(Path(getattr(args, key)).resolve()) for key in ("photos", "ade")}
    found["out"] = str(out.relative_to(ROOT) if out.is_relative_to(ROOT) else out)
    for name in BACKBONES:
        files = sorted((out / "published").glob(f"{name}-*.pth"))
        found[name] = str(files[-1]) if files else ""
    return found


def check_data(args: argparse.Namespace) -> int:
    """How many classes the photos have.

    Raises:
        StepError: a folder is not what it has to be.
    """
    needed = (
        ("photos", "train"),
        ("photos", "val"),
        ("ade", "images/training"),
        ("ade", "annotations/training"),
    )
    for key, part in needed:
        if not (Path(getattr(args, key)) / part).exists():
            raise StepError(f"--{key} {getattr(args, key)}: it has no {part}")
    return sum(path.is_dir() for path in Path(args.photos, "train").iterdir())


def full_match(name: str, checkpoint: str) -> int:
    """How many entries of a backbone the published weights fill.

    Raises:
        StepError: they leave some out beyond the norms of the outputs, which classifiers lack.
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
    """What the trainings have logged, by parts of their time.

    Raises:
        StepError: a training did not report the full match.
    """
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
    """Of a segmentor the whole loss; of a detector the one whose targets no proposal changes."""
    if head == "segmentor":
        return metrics.read_run(folder).loss
    rows = [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]
    return [
        (row["iteration"] + 1, row["loss_rpn_cls"] + row["loss_rpn_loc"])
        for row in rows
        if "loss_rpn_cls" in row
    ]


def in_parts(points: metrics.Points) -> tuple[float, ...]:
    """Means of equal parts of the training."""
    last = max(step for step, _ in points)
    parts: list[list[float]] = [[] for _ in range(PARTS)]
    for step, value in points:
        parts[min(PARTS - 1, step * PARTS // (last + 1))].append(value)
    return tuple(mean(part) for part in parts)


def draw(out: Path) -> None:
    """All losses in one picture."""
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
    """Do what is left to do, then compare.

    Raises:
        StepError: missing data, a step that failed, or a loss that did not stay below.
    """
    out = Path(args.out).resolve()
    trainings, publications = pretraining(check_data(args))
    digest = steps.sources_digest(ROOT, ("backbones", "dense", "configs", "tools"), ())
    digest += f" {args.photos} {args.ade}"
    with steps.only_one(out) as lock:
        state: State = steps.prepare(out, MADE, digest, args.fresh)
        for row in ([SCENES, *trainings], publications, downstream()):
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
    total = sum(
        state.seconds(step)
        for row in ([SCENES, *trainings], publications, downstream())
        for step in row
    )
    print(f"{total / 60:.1f} minutes of steps, {args.jobs} side by side; {out / 'chain.png'}")
    lost = [f"{c.head} on {c.backbone}" for c in found if not c.won]
    if lost:
        raise StepError(f"pretrained weights did not stay ahead: {', '.join(lost)}")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    sample = os.environ.get("DENSE_SAMPLE_DATA", "data")
    add("--photos", default=f"{sample}/tiny_imagenet_10", help="train/ and val/, a folder a class")
    add("--ade", default=f"{sample}/ADEChallengeData2016", help="images/, annotations/ as ADE20K's")
    add("--out", default="work_dirs/chain", help="folder for all of it (%(default)s)")
    cores = len(os.sched_getaffinity(0))
    add("--jobs", type=int, default=min(4, cores), help="steps side by side (%(default)s)")
    add("--fresh", action="store_true", help="start over, whatever is done already")
    args = parser.parse_args(argv)
    if args.jobs < 1:
        parser.error(f"--jobs {args.jobs}: 1 or more is needed")
    return args


def main(argv: list[str] | None = None) -> int:
    """The chain, or a line that says why not."""
    args = parse_args(argv)
    # Steps side by side: a thread each is faster than threads that share cores.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        chain(args)
    except StepError as error:
        print(f"demo_chain: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ndemo_chain: stopped; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
