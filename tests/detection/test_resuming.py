"""A detector that was stopped and resumed is the one that was not; a loss of NaN stops all."""

import itertools
import json
import logging
import os
import signal
from pathlib import Path

import pytest
import torch
from detectron2.data import DatasetFromList, build_detection_train_loader
from detectron2.data.samplers import TrainingSampler
from detectron2.engine import SimpleTrainer
from detectron2.modeling.roi_heads.mask_head import BaseMaskRCNNHead
from torch.utils.data import DataLoader

from backbones import CheckpointError
from dense import files
from dense.detection import PyramidBackbone, engine
from dense.detection.config import LazyConfigError
from dense.detection.resuming import resumable
from dense.runs import RunError, Stopped
from tests.support import assert_same, load_tool

from .test_train import NANO, SMALL, main

pytestmark = pytest.mark.slow

IMAGES = [
    {"file_name": str(i), "width": 40 + 20 * (i % 3 == 0), "height": 50, "id": i} for i in range(11)
]


def noisy(item):
    return {**item, "noise": torch.rand(()).item()}


def loader(seed=5, first=0, **options):
    options = {"aspect_ratio_grouping": True, "num_workers": 0, **options}
    built = build_detection_train_loader(
        IMAGES, mapper=noisy, sampler=TrainingSampler(len(IMAGES)), total_batch_size=3, **options
    )
    return resumable(built, seed, first)


def take(batches, count):
    return list(itertools.islice(batches, count))


def names(batches):
    return [[item["id"] for item in batch] for batch in batches]


@pytest.mark.parametrize("grouping", [True, False])
def test_batches_are_detectron2s(grouping):
    built = build_detection_train_loader(
        IMAGES,
        mapper=noisy,
        sampler=TrainingSampler(len(IMAGES), seed=5),
        total_batch_size=3,
        aspect_ratio_grouping=grouping,
        num_workers=0,
    )
    assert names(take(built, 20)) == names(take(loader(aspect_ratio_grouping=grouping), 20))


@pytest.mark.parametrize("workers", [0, 2])
def test_any_iteration_is_begun_with_and_nothing_before_it_is_read(workers):
    whole = take(loader(), 20)
    assert take(loader(first=13, num_workers=workers), 7) == whole[13:]
    noise = [item["noise"] for batch in whole for item in batch]
    assert len(set(noise)) == len(noise)
    assert take(loader(seed=6), 20) != whole

    read = []
    built = build_detection_train_loader(
        IMAGES, mapper=lambda item: read.append(item["id"]) or item, total_batch_size=3
    )
    found = names(take(resumable(built, 5, 13), 2))
    assert found == names(whole[13:15]) and read == sum(found, [])


def test_one_image_is_a_dataset():
    built = build_detection_train_loader(
        IMAGES[:1], mapper=noisy, sampler=TrainingSampler(1), total_batch_size=2
    )
    assert names(take(resumable(built, 5, 3), 2)) == [[0, 0], [0, 0]]


def test_a_loader_of_another_build_is_left_as_it_is(caplog):
    own = DataLoader(DatasetFromList(IMAGES), batch_size=2)
    assert resumable(own, 5, 0) is own and "not resumed" not in caplog.text
    assert resumable(own, 5, 3) is own
    assert "the order of the data is not resumed" in caplog.text


class Killed(BaseException):
    pass


def content(folder: Path) -> dict:
    return torch.load(folder / "model_final.pth", weights_only=True)


@pytest.mark.parametrize("workers", [2])
def test_resumed_is_bit_for_bit_the_same(coco_files, tmp_path, monkeypatch, workers):
    options = [
        *SMALL,
        *("train.max_iter=5", "train.checkpointer.period=2", "dataloader.train.total_batch_size=2"),
        "model.backbone.bottom_up.drop_path_rate=0.3",
    ]

    def run(name, *more):
        data = coco_files.arguments()[:2]
        main(
            monkeypatch,
            *("--config-file", NANO, "--output-dir", str(tmp_path / name), *data, *options, *more),
        )

    # metrics.json has medians over the iterations since the start.
    write, step = SimpleTrainer.write_metrics, SimpleTrainer.run_step
    losses: dict[int, dict[str, float]] = {}

    def kept(loss_dict, data_time, iteration, *args):
        losses[iteration] = {name: value.item() for name, value in loss_dict.items()}
        write(loss_dict, data_time, iteration, *args)

    monkeypatch.setattr(SimpleTrainer, "write_metrics", staticmethod(kept))
    run("whole", "train.seed=3")
    expected, losses = losses, {}

    def killed_after_the_third(trainer):
        step(trainer)
        if trainer.iter == 2:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(SimpleTrainer, "run_step", killed_after_the_third)
        with pytest.raises(Killed):
            run("parts", "train.seed=3")
    assert not (tmp_path / "parts/model_final.pth").exists()
    assert losses == {step: expected[step] for step in range(3)}
    losses = {}
    # The seed is the checkpoint's: another one would be drawn now.
    run("parts", "--resume", "train.seed=-1", f"dataloader.train.num_workers={workers}")
    assert losses == {step: expected[step] for step in (2, 3, 4)}
    assert_same(content(tmp_path / "whole"), content(tmp_path / "parts"))


@pytest.fixture
def quiet_filter():
    yield
    logging.getLogger("detectron2.engine.train_loop").filters.clear()


@pytest.mark.parametrize("where", ["features", "mask loss"])
def test_what_is_not_finite_stops_in_a_line(
    coco_files, tmp_path, monkeypatch, capfd, quiet_filter, where
):
    out = tmp_path / "out"
    owner = PyramidBackbone if where == "features" else BaseMaskRCNNHead
    forward, calls = owner.forward, itertools.count(1)

    def broken(*args):
        result = forward(*args)
        factor = float("nan") if next(calls) == 3 else 1.0
        return {name: value * factor for name, value in result.items()}

    monkeypatch.setattr(owner, "forward", broken)
    with pytest.raises(SystemExit) as stopped:
        main(
            monkeypatch,
            *("--config-file", NANO, "--output-dir", str(out), *coco_files.arguments()[:2]),
            *(*SMALL, "train.max_iter=5", "train.checkpointer.period=2"),
        )
    message = str(stopped.value)
    named = "largest objectness logit=nan" if where == "features" else "loss_mask=nan"
    assert message.startswith(f"train_detector: iteration 3: {named}") and "\n" not in message
    assert "learning rate" in message and ("loss_rpn_cls=" in message or where == "features")
    captured = capfd.readouterr()
    # What Detectron2 puts before the traceback.
    told = captured.out + captured.err + (out / "log.txt").read_text()
    assert "Starting training" in told and "Exception during training" not in told
    assert [path.name for path in out.glob("*.pth")] == ["model_0000001.pth"]
    good = torch.load(out / "model_0000001.pth", weights_only=True)
    assert all(value.isfinite().all() for value in good["model"].values())


@pytest.fixture
def keep_handlers():
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    yield
    for number, handler in zip((signal.SIGINT, signal.SIGTERM), before, strict=True):
        signal.signal(number, handler)


def test_signals_and_evaluations_cut_off(coco_files, tmp_path, monkeypatch, keep_handlers):
    tool = load_tool("train_detector")
    step = SimpleTrainer.run_step

    def run(name: str, *more: str) -> None:
        words = ["--config-file", NANO, "--output-dir", str(tmp_path / name), "--num-gpus", "0"]
        options = ["train.max_iter=4", "train.checkpointer.period=2", "train.eval_period=2"]
        options += ["train.seed=3", "dataloader.train.total_batch_size=2"]
        tool.run(tool.parse_args([*words, *coco_files.arguments(), *SMALL, *options, *more]))

    def logged(name: str) -> tuple[list[int], list[int]]:
        lines = files.json_lines(tmp_path / name / "metrics.json")
        trained = {line["iteration"] for line in lines if "total_loss" in line}
        evaluated = {line["iteration"] for line in lines if "bbox/AP" in line}
        return sorted(trained), sorted(evaluated)

    def interrupted(trainer):
        step(trainer)
        if trainer.iter == 2:
            os.kill(os.getpid(), signal.SIGINT)

    run("whole")
    assert logged("whole") == ([0, 1, 2, 3], [1, 4])
    with monkeypatch.context() as patch:
        patch.setattr(SimpleTrainer, "run_step", interrupted)
        with pytest.raises(Stopped) as stopped:
            run("stopped")
    assert stopped.value.status == 130
    assert stopped.value.checkpoint == str(tmp_path / "stopped/model_0000002.pth")
    assert not (tmp_path / "stopped/model_0000003.pth").exists()

    with monkeypatch.context() as patch:
        patch.setattr(engine, "inference_on_dataset", lambda *_: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            run("killed")
    # The checkpoint of iteration 1 is there and so are its metrics, but not its evaluation.
    assert logged("killed") == ([0, 1], [])
    for name in ("stopped", "killed"):
        run(name, "--resume")
        assert logged(name) == logged("whole")
        assert_same(content(tmp_path / "whole"), content(tmp_path / name))


@pytest.mark.parametrize("final", [False, True])
def test_what_a_kill_cut_off_after_the_last_iteration(coco_files, tmp_path, monkeypatch, final):
    """The last checkpoint of the period is there, perhaps the final one, not the validation."""

    def run(*more):
        options = ["train.max_iter=2", "train.checkpointer.period=2", "train.eval_period=2"]
        words = ["--config-file", NANO, "--output-dir", str(tmp_path / "run")]
        main(monkeypatch, *words, *coco_files.arguments(), *SMALL, *options, *more)

    run()
    whole, folder = content(tmp_path / "run"), tmp_path / "run"
    lines = (folder / "metrics.json").read_text().splitlines(keepends=True)
    assert any("bbox/AP" in line for line in lines)
    (folder / "metrics.json").write_text("".join(n for n in lines if "bbox/AP" not in n))
    (folder / "model_best.pth").unlink()
    if not final:
        (folder / "model_final.pth").unlink()
        (folder / "last_checkpoint").write_text("model_0000001.pth")
    run("--resume")
    assert_same(content(folder), whole)
    again = files.json_lines(folder / "metrics.json")
    evaluated = [line["iteration"] for line in again if "bbox/AP" in line]
    assert evaluated == [line["iteration"] for line in map(json.loads, lines) if "bbox/AP" in line]
    assert (folder / "model_best.pth").is_file()
    # All is there: nothing is written twice.
    run("--resume")
    assert files.json_lines(folder / "metrics.json") == again


def test_what_cannot_be_resumed_is_named_and_left_as_it_is(coco_files, tmp_path):
    tool = load_tool("train_detector")
    out = tmp_path / "out"

    def run(*more: str) -> None:
        words = ["--config-file", NANO, "--output-dir", str(out), "--num-gpus", "0"]
        options = ["train.max_iter=1", "dataloader.train.total_batch_size=2"]
        tool.run(tool.parse_args([*words, *coco_files.arguments()[:2], *SMALL, *options, *more]))

    run()
    kept = {
        path.name: path.read_bytes() for path in out.glob("*") if path.suffix in (".pth", ".yaml")
    }
    assert {"config.yaml", "model_final.pth"} <= kept.keys()

    def refused(error: type, reason: str, *more: str) -> None:
        with pytest.raises(error, match=reason):
            run(*more)
        assert {name: (out / name).read_bytes() for name in kept} == kept

    refused(RunError, "holds a training .*--overwrite")
    swin = "model.backbone.bottom_up.name=swin_nano"
    refused(CheckpointError, "model_final.pth does not fit: 35 tensors", "--resume", swin)
    refused(LazyConfigError, "has the classes block,bar", "--resume", "--classes", "bar,block")
    data = torch.load(out / "model_final.pth", weights_only=True)
    data["model"]["backbone.bottom_up.patch_embed.proj.bias"][0] = float("inf")
    torch.save(data, out / "model_final.pth")
    kept["model_final.pth"] = (out / "model_final.pth").read_bytes()
    refused(CheckpointError, "proj.bias has NaN or infinite values", "--resume")
    kept["model_final.pth"] = b"cut off"
    for path in out.glob("*.pth"):
        path.write_bytes(b"cut off")
    kept = {name: (out / name).read_bytes() for name in kept}
    refused(CheckpointError, "and .*out has no other to resume", "--resume")
