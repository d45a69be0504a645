"""A detector that was stopped and resumed is the one that was not; a loss of NaN stops all."""

import itertools
import logging
from pathlib import Path

import pytest
import torch
from detectron2.data import DatasetFromList, build_detection_train_loader
from detectron2.data.samplers import TrainingSampler
from detectron2.engine import SimpleTrainer
from detectron2.modeling.roi_heads.mask_head import BaseMaskRCNNHead
from torch.utils.data import DataLoader

from dense.detection import PyramidBackbone
from dense.detection.resuming import resumable
from tests.support import assert_same

from .test_train import NANO, SMALL, main

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
