"""Length of a training, the best checkpoint, early stopping: Detectron2's trainer."""

import json
from pathlib import Path

import pytest
import torch
from detectron2.config import instantiate
from detectron2.solver import LRMultiplier

from dense.detection import engine
from dense.detection.config import load_config, set_length
from dense.recipes import RECIPES

from .test_train import NANO, SMALL, losses, main

pytestmark = pytest.mark.slow

FULL_SIZE = str(RECIPES / "detection/cascade_mask_rcnn_dw_conv_tiny_3x_coco.py")


def test_a_third_of_36_epochs_is_12():
    cfg = load_config(FULL_SIZE)
    set_length(cfg, 117_266 * 12 // 16)
    epoch = 117_266 / 16
    assert cfg.train.max_iter == 87_949
    assert cfg.train.eval_period == pytest.approx(epoch, abs=1)
    assert cfg.train.checkpointer.period == pytest.approx(epoch / 3, abs=1)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    schedule = LRMultiplier(optimizer, instantiate(cfg.lr_multiplier), cfg.train.max_iter)
    rates = {}
    for step in range(cfg.train.max_iter):
        rates.setdefault(round(optimizer.param_groups[0]["lr"], 9), step)
        optimizer.step()
        schedule.step()
    # A third of 500 iterations of warm-up; steps after 9 and 11 epochs.
    assert rates[1.0] == pytest.approx(500 / 3, abs=1)
    assert rates[0.1] == pytest.approx(9 * epoch, abs=1)
    assert rates[0.01] == pytest.approx(11 * epoch, abs=1)


def test_what_is_switched_off_stays_off():
    cfg = load_config(NANO)
    set_length(cfg, 64)
    assert (cfg.train.max_iter, cfg.train.eval_period, cfg.train.checkpointer.period) == (64, 0, 16)


@pytest.fixture
def train(coco_files, tmp_path, monkeypatch):
    """A function of the AP of the evaluations to come, one after each iteration, and of options
    of the tool; returns the folder."""

    def call(values, *options):
        left = iter(values)
        monkeypatch.setattr(
            engine, "inference_on_dataset", lambda *_: {"bbox": {"AP": next(left), "AP50": 1.0}}
        )
        base = ["--config-file", NANO, "--output-dir", str(tmp_path / "out")]
        base += [*coco_files.arguments(), *SMALL, "dataloader.train.total_batch_size=1"]
        # Of 640 in the config, before --iters.
        base += ["train.eval_period=64", "train.checkpointer.period=128"]
        main(monkeypatch, *base, *options)
        assert next(left, None) is None
        return tmp_path / "out"

    return call


def iteration(path: Path) -> tuple[int, int]:
    content = torch.load(path, weights_only=True)
    return content["iteration"], content["trainer"]["iteration"]


def test_the_best_is_kept_and_a_training_that_no_longer_gains_ends(train):
    folder = train([10.0, 30.0, 20.0, 30.0], "--iters", "10", "--early-stop", "2")
    assert iteration(folder / "model_best.pth") == (1, 1)
    assert sorted(losses(folder)) == [0, 1, 2, 3]
    assert iteration(folder / "model_final.pth") == (3, 3)
    log = (folder / "log.txt").read_text()
    assert "bbox/AP has not risen in 2 evaluations: the training ends after iteration 3" in log
    assert json.loads((folder / "results.json").read_text())["bbox"]["AP"] == 30.0
    # It has ended: resumed, it ends again.
    train([], "--iters", "10", "--early-stop", "2", "--resume")
    assert sorted(losses(folder)) == [0, 1, 2, 3]
    assert iteration(folder / "model_final.pth") == (3, 3)


def test_a_resumed_training_knows_what_was_before(train):
    # "--iters" leaves the periods at 1 and 2.
    folder = train([30.0, 20.0], "--iters", "2", "train.max_iter=128")
    assert iteration(folder / "model_best.pth") == (0, 0)
    (folder / "model_final.pth").unlink()
    # The evaluation at the end of a training is logged under another iteration: again.
    train([20.0, 25.0], "--iters", "10", "--early-stop", "2", "--auto-resume")
    assert sorted(losses(folder)) == [0, 1, 2]
    assert iteration(folder / "model_best.pth") == (0, 0)
    # Above the last evaluation, below the best.
    train([28.0, 29.0, 20.0], "--iters", "6", "train.max_iter=384", "--resume")
    assert iteration(folder / "model_best.pth") == (0, 0)
    assert sorted(losses(folder)) == [0, 1, 2, 3, 4, 5]
    # It was written after model_final.pth, which is what a resumed training goes on from.
    train([20.0, 50.0], "--iters", "7", "train.max_iter=448", "--resume")
    assert sorted(losses(folder)) == [0, 1, 2, 3, 4, 5, 6]
    assert iteration(folder / "model_best.pth") == (7, 7)
    assert (folder / "last_checkpoint").read_text() == "model_final.pth"


def test_an_evaluation_that_a_kill_cut_off_counts(train):
    folder = train([30.0, 20.0], "--iters", "2", "train.max_iter=128")
    (folder / "model_final.pth").unlink()
    (folder / "model_best.pth").unlink()
    lines = (folder / "metrics.json").read_text().splitlines()
    kept = [{k: v for k, v in json.loads(line).items() if "AP" not in k} for line in lines]
    (folder / "metrics.json").write_text("".join(json.dumps(line) + "\n" for line in kept))
    # Of the second evaluation, then of the third iteration.
    train([50.0, 40.0], "--iters", "3", "train.max_iter=192", "--resume")
    assert torch.load(folder / "model_best.pth", weights_only=True)["iteration"] == 1


@pytest.mark.parametrize(
    "options, message",
    [
        (["train.eval_period=0"], "--early-stop needs evaluations: train.eval_period=N"),
        (["--val-json", ""], "--early-stop needs evaluations: validation data"),
    ],
)
def test_early_stop_without_evaluations_is_refused(train, options, message):
    with pytest.raises(SystemExit, match=message):
        train([], "--early-stop", "2", *options)


def test_every_evaluation_has_a_table_of_the_classes(coco_files, tmp_path, monkeypatch):
    base = ["--config-file", NANO, "--output-dir", str(tmp_path / "out"), *coco_files.arguments()]
    main(monkeypatch, *base, *SMALL, "--iters", "2", "train.eval_period=320")
    log = (tmp_path / "out/log.txt").read_text()
    tables = log.split("Per-category bbox AP:")[1:]
    assert len(tables) == 2
    assert all("block" in table and "bar" in table for table in tables)
