"""The trainer from its command line: training, resuming, evaluating, predicting."""

import json
import math
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from backbones import CheckpointError
from dense.detection import load_predictor
from dense.recipes import RECIPES
from tests.support import ROOT, environment, load_tool, run_tool

TOOL = ROOT / "tools/train_detector.py"
NANO = str(RECIPES / "detection/cascade_mask_rcnn_dw_conv_nano.py")
SMALL = ["dataloader.train.num_workers=0", "dataloader.test.num_workers=0", "train.log_period=1"]


def main(monkeypatch, *arguments: str) -> None:
    """The tool, in this process."""
    tool = load_tool("train_detector")
    monkeypatch.setattr(sys, "argv", ["train_detector.py", *arguments])
    tool.main()


def command(*arguments: str) -> list[str]:
    return [sys.executable, str(TOOL), *arguments]


def run(*arguments: str) -> str:
    """The tool, in a process of its own; its output."""
    result = run_tool("train_detector", *arguments)
    output = result.stdout + result.stderr
    assert result.returncode == 0, output[-4000:]
    return output


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]


def losses(folder: Path) -> dict[int, float]:
    return {m["iteration"]: m["total_loss"] for m in metrics(folder) if "total_loss" in m}


def test_train_resume_evaluate_predict(coco_files, tmp_path, monkeypatch):
    out = tmp_path / "out"
    base = ["--config-file", NANO, "--output-dir", str(out), *coco_files.arguments(), *SMALL]
    main(monkeypatch, *base, "train.max_iter=4", "train.checkpointer.period=2", "train.seed=0")
    assert all(math.isfinite(v) for v in losses(out).values())
    assert {"model_0000001.pth", "model_0000003.pth", "model_final.pth"} <= {
        p.name for p in out.iterdir()
    }
    assert list(out.glob("events.out.tfevents.*"))
    assert "eta" in (out / "log.txt").read_text()
    final = torch.load(out / "model_final.pth", weights_only=True)
    assert final["classes"] == ["block", "bar"]
    results = json.loads((out / "results.json").read_text())
    assert {"AP", "AP50"} <= results["bbox"].keys() & results["segm"].keys()

    (out / "model_final.pth").write_bytes(b"cut short")
    main(monkeypatch, *base, "--resume", "train.max_iter=6", "train.eval_period=0")
    log = (out / "log.txt").read_text()
    assert f"checkpoint {out / 'model_final.pth'} is damaged" in log
    assert "Starting training from iteration 4" in log
    assert sorted(losses(out)) == list(range(6))
    # The weights go on from where they were: AdamW moves each by a few learning rates.
    before, after = (
        torch.load(out / f"{n}.pth", weights_only=True) for n in ("model_0000003", "model_final")
    )
    assert after["iteration"] == 5
    name = "roi_heads.box_head.0.conv1.weight"
    assert 0 < (before["model"][name] - after["model"][name]).abs().max() < 0.02

    trained = json.loads((out / "results.json").read_text())
    again = tmp_path / "again"
    main(
        monkeypatch,
        *("--config-file", str(out / "config.yaml"), "--output-dir", str(again), "--eval-only"),
        # An evaluation reads no training data.
        *(f"train.init_checkpoint={out / 'model_final.pth'}", "data.train_json=nowhere.json"),
    )
    evaluated = json.loads((again / "results.json").read_text())
    assert evaluated["bbox"]["AP"] == pytest.approx(trained["bbox"]["AP"], nan_ok=True)

    predict = load_predictor(None, str(out / "model_final.pth"))
    image = np.asarray(Image.open(f"{coco_files.images('val')}/0.png"))
    found = predict(image)
    assert found["class_names"] == ["block", "bar"]
    count = len(found["scores"])
    assert found["boxes"].shape == (count, 4)
    assert found["masks"].shape == (count, 96, 128)
    assert (np.diff(found["scores"]) <= 0).all()
    with pytest.raises(ValueError, match="uint8 is needed"):
        predict(image.astype("float32"))


@pytest.mark.slow
def test_a_predictor_has_the_classes_of_its_checkpoint(coco_files, tmp_path, monkeypatch):
    out = tmp_path / "out"
    data = coco_files.arguments()[:2]
    main(
        monkeypatch,
        *("--config-file", NANO, "--output-dir", str(out), *data, *SMALL, "train.max_iter=1"),
        *("--classes", "bar"),
    )
    predict = load_predictor(NANO, str(out / "model_final.pth"))
    assert predict(np.zeros((64, 64, 3), np.uint8))["class_names"] == ["bar"]
    with pytest.raises(CheckpointError, match="does not fit"):
        load_predictor(NANO.replace("dw_conv", "i_d_dw_conv"), str(out / "model_final.pth"))
    # Other classes in another order would be other results: refused, with what to say.
    with pytest.raises(SystemExit, match="--classes bar puts"):
        main(
            monkeypatch,
            *("--config-file", NANO, "--output-dir", str(out), *data, *SMALL, "--resume"),
            *("--classes", "block"),
        )


@pytest.mark.slow
def test_a_row_of_the_ablations(coco_files, tmp_path, monkeypatch):
    """In place of the config's backbone; what is saved builds it again."""
    out = tmp_path / "out"
    base = ["--config-file", NANO, "--output-dir", str(out), *coco_files.arguments(), *SMALL]
    main(monkeypatch, *base, "--ablation", "dw_conv_positions_own", "train.max_iter=1")
    predict = load_predictor(None, str(out / "model_final.pth"))
    weights = torch.load(out / "model_final.pth", weights_only=True)["model"]
    kernels = weights["backbone.bottom_up.stages.1.blocks.0.mixer.kernels"]
    assert kernels.shape == (28, 28, 2, 1, 7, 7)
    assert predict(np.zeros((64, 64, 3), np.uint8))["class_names"] == ["block", "bar"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--num-gpus", "99"], "--num-gpus 99, but there are"),
        (["--num-machines", "2"], "need --dist-url"),
        (["--eval-only"], "train.init_checkpoint=PATH"),
        (["train.max_itr=3"], "did you mean 'max_iter'"),
        (["train.init_checkpoint=nowhere.pth"], "nowhere.pth does not exist"),
        (["model.backbone.bottom_up.init=nowhere.pth"], "init='nowhere.pth' is no file"),
        (["--val-json", "nowhere.json"], "there is no file nowhere.json"),
        (["--ablation", "volo_d1_dw_conv"], "--ablation: volo_d1_dw_conv is a classifier"),
        (["--ablation", "dw_con_se"], "no ablation 'dw_con_se'; near it are dw_conv_se"),
    ],
)
def test_wrong_arguments_are_one_line(coco_files, tmp_path, monkeypatch, arguments, message):
    base = ["--config-file", NANO, "--output-dir", str(tmp_path / "out"), *coco_files.arguments()]
    with pytest.raises(SystemExit, match=message) as stopped:
        main(monkeypatch, *base, *arguments)
    assert "\n" not in str(stopped.value)


@pytest.mark.e2e
def test_two_processes_train_on_a_cpu(coco_files, tmp_path):
    out = tmp_path / "out"
    base = ["--config-file", NANO, "--output-dir", str(out), *coco_files.arguments(), *SMALL]
    log = run(*base, "--num-processes", "2", "train.amp.enabled=true", "train.max_iter=3")
    assert "World size: 2" in log
    assert "AMP falls back to float32" in log
    assert "SyncBN falls back to BN" in log
    assert all(math.isfinite(v) for v in losses(out).values())
    assert json.loads((out / "results.json").read_text())["bbox"]


@pytest.mark.e2e
def test_real_photos(sample_data, tmp_path):
    out = tmp_path / "out"
    coco = Path(sample_data) / "coco"
    base = [
        *("--config-file", NANO, "--output-dir", str(out)),
        *("--train-json", str(coco / "annotations/instances_train2017.json")),
        *("--train-images", str(coco / "train2017")),
        *("--val-json", str(coco / "annotations/instances_val2017.json")),
        *("--val-images", str(coco / "val2017")),
        *("train.max_iter=160", "train.checkpointer.period=20", "train.log_period=1"),
    ]
    with subprocess.Popen(
        command(*base), env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        try:
            while not (out / "model_0000059.pth").exists():
                assert process.poll() is None, (out / "log.txt").read_text()[-4000:]
                time.sleep(0.5)
        finally:
            process.send_signal(signal.SIGKILL)

    log = run(*base, "--resume")
    assert "Starting training from iteration 0" not in log
    values = [v for _, v in sorted(losses(out).items())]
    assert len(values) == 160
    tenth = len(values) // 10
    assert np.mean(values[-tenth:]) < 0.8 * np.mean(values[:tenth])
    results = json.loads((out / "results.json").read_text())
    assert results["bbox"]["AP"] >= 0
    assert results["segm"]["AP"] >= 0

    predict = load_predictor(None, str(out / "model_final.pth"))
    photo = next((coco / "val2017").iterdir())
    image = np.asarray(Image.open(photo).convert("RGB"))
    assert predict(image)["masks"].shape[1:] == image.shape[:2]
