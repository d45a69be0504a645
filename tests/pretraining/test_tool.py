"""The tool trains, evaluates, goes on, and says in one line what is wrong."""

import csv
import io
import json
import re
import tarfile
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from mmengine.config import Config

import backbones
from dense.openmmlab.config import set_length
from dense.pretraining.metric import ClassificationMetric
from dense.pretraining.model import ImageClassifier
from tests.pretraining.conftest import CONFIGS


def last_metrics(work_dir: Path) -> dict:
    """The last validation in a work folder's log."""
    lines = [
        json.loads(line)
        for path in sorted(work_dir.glob("*/vis_data/scalars.json"))
        for line in path.read_text().splitlines()
    ]
    return [line for line in lines if "top1" in line][-1]


def test_train_then_evaluate_the_checkpoint(run, tmp_path, capsys):
    work = run()
    metrics = last_metrics(work)
    assert {"top1", "top5", "images_per_second"} <= metrics.keys()
    assert list(work.glob("best_top1_*.pth"))
    train = [
        json.loads(line)
        for path in work.glob("*/vis_data/scalars.json")
        for line in path.read_text().splitlines()
    ]
    assert any("images_per_second" in line and "memory_mb" in line for line in train)
    assert list(work.glob("*/vis_data/events.out.tfevents*"))
    assert (work / "metrics.png").is_file()

    capsys.readouterr()
    evaluation = run("--eval-only", work / "epoch_2.pth", work_dir=tmp_path / "evaluated")
    said = re.search(r"top1 ([\d.]+), top5 ([\d.]+)", capsys.readouterr().out)
    assert float(said[1]) == pytest.approx(metrics["top1"], abs=0.01)
    rows = list(csv.DictReader((evaluation / "evaluation/per_class.csv").open()))
    assert [row["class"] for row in rows] == ["n01", "n02", "n03"]
    assert sum(int(row["images"]) for row in rows) == 12
    mean = sum(float(row["top1"]) for row in rows) / 3
    assert mean == pytest.approx(metrics["top1"], abs=0.02)
    confusion = [line[1:] for line in csv.reader((evaluation / "evaluation/confusion.csv").open())]
    counts = torch.tensor([[int(v) for v in line] for line in confusion[1:]])
    assert counts.sum() == 12
    assert 100 * counts.diagonal().sum() / 12 == pytest.approx(metrics["top1"], abs=0.01)

    # The checkpoint starts any network of its name, the classifier included.
    network = timm.create_model("dw_conv_nano", num_classes=3)
    report = backbones.load_checkpoint(network, work / "epoch_2.pth")
    assert not (report.missing or report.unexpected)


def test_the_released_names_are_evaluated_too(run, tmp_path, capsys):
    from backbones.layouts import LAYOUTS, from_ours

    network = timm.create_model("dw_conv_nano", num_classes=3)
    weights = from_ours(network.state_dict(), LAYOUTS["original"])
    torch.save({"model": weights}, tmp_path / "released.pth")
    run("--eval-only", tmp_path / "released.pth")
    assert "top1" in capsys.readouterr().out
    del weights["head.weight"], weights["head.bias"]
    torch.save({"model": weights}, tmp_path / "headless.pth")
    with pytest.raises(SystemExit, match="cannot be evaluated: it has no head.fc.weight"):
        run("--eval-only", tmp_path / "headless.pth")


@pytest.mark.slow
def test_options_of_a_run(run, tmp_path):
    """EMA, accumulation, fine-tuning from a checkpoint."""
    first = run(work_dir=tmp_path / "first")
    second = run(
        *("--ema", "0.9", "--batch-size", "4", "--init", first / "epoch_2.pth"),
        work_dir=tmp_path / "second",
    )
    content = torch.load(second / "epoch_2.pth", weights_only=False)
    assert content["meta"]["weights"] == {
        "state_dict": "averaged, decay 0.9",
        "ema_state_dict": "as trained",
    }
    trained = content["ema_state_dict"]["module.network.head.fc.weight"]
    assert not trained.equal(content["state_dict"]["network.head.fc.weight"])
    assert content["meta"]["dataset_meta"]["classes"] == ["n01", "n02", "n03"]
    log = next(second.glob("*/*.log")).read_text()
    assert "1 x 4 images x 2 accumulated = 8 a step" in log
    assert "0 missing, 0 unexpected" in log
    with pytest.raises(SystemExit, match="--resume needs the same --ema"):
        run("--resume", work_dir=tmp_path / "second")


@pytest.mark.parametrize("name", ["dw_conv_channels_shared", "twins_svt_small_dw_conv"])
def test_a_row_of_the_ablations(run, capsys, tmp_path, name):
    """In place of the config's network; its checkpoint is evaluated by the same option."""
    shared = name.startswith("dw_conv")
    # Fewer blocks of the host.
    options = ["train_cfg.max_epochs=1", *([] if shared else ["model.depths=[2,1,2,1]"])]
    work = run("--ablation", name, options=options)
    saved = Config.fromfile(work / "dw_conv_nano.py").model
    assert saved.name == ("dw_conv_nano" if shared else name)
    assert saved.get("num_heads") == ((1, 2, 4, 8) if shared else None)
    trained = last_metrics(work)["top1"]
    capsys.readouterr()
    evaluated = dict(work_dir=tmp_path / "evaluated", options=options)
    run("--ablation", name, "--eval-only", work / "epoch_1.pth", **evaluated)
    said = re.search(r"top1 ([\d.]+)", capsys.readouterr().out)
    assert float(said[1]) == pytest.approx(trained, abs=0.01)


def test_the_work_folder_is_named_after_the_ablation(pretrain, photos, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = str(CONFIGS / "swin_nano.py")
    with pytest.raises(SystemExit, match="no checkpoint at absent.pth"):
        pretrain.main(
            [config, "--ablation", "swin_se", "--data-root", str(photos), "--num-classes", "3"]
            + ["--eval-only", "absent.pth"]
        )
    assert [p.name for p in (tmp_path / "work_dirs").iterdir()] == ["swin_nano_swin_se"]


def test_going_on(run, tmp_path):
    """From the newest whole checkpoint, without the weights that the training started from."""
    start = tmp_path / "start.pth"
    torch.save(timm.create_model("dw_conv_nano", num_classes=3).state_dict(), start)
    work = run("--init", start)
    start.unlink()
    (work / "epoch_2.pth").write_bytes((work / "epoch_2.pth").read_bytes()[:5000])
    run("--resume", "--init", start)
    logs = "".join(path.read_text() for path in work.glob("*/*.log"))
    assert "epoch_2.pth is truncated" in logs and "resuming from" in logs
    assert backbones.read_checkpoint(work / "epoch_2.pth")


@pytest.mark.parametrize(
    ("args", "options", "reason"),
    [
        (["--data-root", "/absent"], [], "no images at /absent/train"),
        (["--num-classes", "7"], [], r"has 3 classes .* the config 7"),
        (["--init", "absent.pth"], [], "no file, URL or tag"),
        ([], ["model.name=resnet50"], "no network 'resnet50'.*swin_nano"),
        (["--ema", "1.5"], [], "--ema 1.5"),
        (["--anneal-after-warmup"], [], "dw_conv_nano.py has no WarmupCosineLR"),
        (["--eval-only", "absent.pth"], [], "no checkpoint at absent.pth"),
        (["--real-labels", "absent.json"], [], "no label file at absent.json"),
        (
            ["--ablation", "dw_conv_s"],
            [],
            "--ablation: no ablation 'dw_conv_s'; near it are dw_conv_se",
        ),
    ],
)
def test_what_is_wrong_is_one_line(run, args, options, reason):
    with pytest.raises(SystemExit) as error:
        run(*args, options=options)
    message = str(error.value)
    assert re.search(reason, message) and message.startswith("pretrain: ")


def test_a_config_that_is_not_there(pretrain):
    with pytest.raises(SystemExit, match="pretrain: no config file at absent.py"):
        pretrain.main(["absent.py"])


def test_real_labels(tmp_path):
    names = [f"ILSVRC2012_val_{i:08d}.JPEG" for i in (3, 1, 2)]
    (tmp_path / "real.json").write_text(json.dumps([[1, 2], [0], []]))
    metric = ClassificationMetric(str(tmp_path / "real.json"), filenames=names)
    metric.dataset_meta = {"classes": ["a", "b", "c"]}
    rows = [(0, 0, 0, 1), (1, 1, 2, 1), (2, 2, 1, 0)]  # label, index, best, second
    metrics = metric.compute_metrics(rows)
    # Image 3 has no valid label and is not judged; 1 is right by its second label, 2 is wrong.
    assert metrics["real"] == 50
    assert metrics["top1"] == pytest.approx(100 / 3) and metrics["top5"] == pytest.approx(200 / 3)


def test_an_image_in_anothers_place_counts_once():
    metric = ClassificationMetric()
    rows = [(0, 0, 0, 1), (1, 2, 0, 1), (1, 2, 0, 1)]  # label, index, best, second
    assert metric.compute_metrics(rows)["top1"] == 50
    # Shards have no indices.
    rows = [(label, -1, *best) for label, _, *best in rows]
    assert metric.compute_metrics(rows)["top1"] == pytest.approx(100 / 3)


def test_timm_brings_the_real_labels():
    metric = ClassificationMetric("timm", filenames=[])
    assert len(metric.real) == 50_000
    assert 5 < sum(not valid for valid in metric.real.values()) / 500 < 10  # about 3200 have none


@pytest.mark.parametrize("mixup", [None, {"mixup_alpha": 0.8}, {"cutmix_alpha": 1.0}])
def test_the_loss_is_of_the_mixed_images_and_their_smoothed_targets(mixup):
    """The shares of the two images are read from what the network gets."""
    torch.manual_seed(0)
    np.random.seed(0)
    classes, smoothing = 5, 0.2  # timm has 0.1 by default
    # timm mixes by Mixup unless CutMix alone is asked for.
    mixing = mixup and {"mixup_alpha": 0.0, "cutmix_alpha": 0.0, **mixup}
    model = ImageClassifier("dw_conv_nano", classes, mixup=mixing, label_smoothing=smoothing)
    model.eval().double()
    x, labels = torch.rand(4, 3, 32, 32, dtype=torch.float64), torch.tensor([0, 1, 2, 3])
    seen = []
    model.network.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].clone()))
    loss = model(x.clone(), labels, torch.arange(4), mode="loss")["loss"]

    (mixed,), other = seen, x.flip(0)
    share = ((mixed - other) / (x - other)).mean((1, 2, 3))
    assert (share == 1).all() if mixup is None else (0.01 < share).all() and (share < 0.99).all()
    assert (mixed.eq(x) | mixed.eq(other)).all() != (mixup is not None and "mixup_alpha" in mixup)
    targets = torch.eye(classes, dtype=torch.float64)[labels] * (1 - smoothing)
    targets = targets + smoothing / classes
    targets = share[:, None] * targets + (1 - share[:, None]) * targets.flip(0)
    expected = -(targets * model.network(mixed).log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(loss, expected)


def test_the_five_best_of_more_classes_count():
    torch.manual_seed(0)
    model = ImageClassifier("dw_conv_nano", 7).eval()
    x = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        order = model.network(x).argsort(1, descending=True)
    # In the fifth place, the sixth and the first.
    labels = torch.stack([order[0, 4], order[1, 5], order[2, 0]])
    with torch.no_grad():
        found = model(x, labels, torch.arange(3), mode="predict")
    assert [row["best"].tolist() for row in found] == order[:, :5].tolist()
    metric = ClassificationMetric()
    metric.process(None, found)
    metrics = metric.compute_metrics(metric.results)
    assert metrics["top1"] == pytest.approx(100 / 3) and metrics["top5"] == pytest.approx(200 / 3)


def test_training_on_shards(run, photos, tmp_path):
    pytest.importorskip("webdataset")
    for split in ("train", "val"):
        paths = sorted((photos / split).rglob("*.jpg"))
        with tarfile.open(tmp_path / f"photos-{split}-0000.tar", "w") as archive:
            for path in paths:
                label = str(int(path.parent.name[1:]) - 1).encode()
                for suffix, content in ((".jpg", path.read_bytes()), (".cls", label)):
                    info = tarfile.TarInfo(path.stem + suffix)
                    info.size = len(content)
                    archive.addfile(info, io.BytesIO(content))
    stream = ["type=ImageStream", f"root={tmp_path}", "name=wds/photos"]
    options = [f"{loader}.dataset.{entry}" for loader in ("train_dataloader", "val_dataloader")
               for entry in stream]  # fmt: skip
    options += [
        f"train_dataloader.dataset.split={tmp_path}/photos-train-0000.tar|24",
        "train_dataloader.dataset.is_training=True",
        "train_dataloader.dataset.batch_size=8",
        f"val_dataloader.dataset.split={tmp_path}/photos-val-0000.tar|12",
    ]
    work = run("--num-classes", "3", data=False, options=options)
    assert last_metrics(work)["top1"] >= 0
    lines = next(work.glob("*/vis_data/scalars.json")).read_text()
    assert backbones.read_checkpoint(work / "epoch_2.pth") and "loss" in lines


def test_epochs_move_the_schedule_and_blocks_are_recomputed(run, tmp_path, monkeypatch):
    """The config's 20 epochs are 2 here (the fixture's); half of them have half of its warm-up."""
    seen = []
    forward = backbones.Pyramid.forward

    def noting(self, x):
        seen.append({stage.grad_checkpointing for stage in self.stages})
        return forward(self, x)

    monkeypatch.setattr(backbones.Pyramid, "forward", noting)
    work = run("--epochs", "1", "--grad-checkpointing")
    assert seen and all(stages == {True} for stages in seen)
    cfg = Config.fromfile(work / "dw_conv_nano.py")
    assert (cfg.train_cfg.max_epochs, cfg.train_cfg.val_interval) == (1, 1)
    warm_up, cosine = cfg.param_scheduler
    assert (warm_up.end, cosine.begin, cosine.end) == (1.0, 1.0, 10.0)
    # The checkpoint is evaluated, published and started from as any other.
    run("--eval-only", work / "epoch_1.pth", work_dir=tmp_path / "evaluated")


def test_photos_for_less_than_a_batch_are_said_to_be(run, monkeypatch):
    with pytest.raises(SystemExit, match="24 photos to train on are less than a batch of 25"):
        run("--batch-size", "25")
    monkeypatch.setattr("dense.pretraining.config.world_size", lambda launcher: 2)
    with pytest.raises(SystemExit, match="less than a batch of 26 over all processes"):
        run("--batch-size", "13")


def test_a_warm_up_of_less_than_an_iteration_is_none(run):
    """Of the nano recipe's 20 epochs one is left, of 3 iterations, and a tenth of it."""
    work = run("--epochs", "1", options=["train_cfg.max_epochs=20"])
    lines = next(work.glob("*/vis_data/scalars.json")).read_text().splitlines()
    assert (work / "epoch_1.pth").is_file() and lines


def test_a_tenth_of_300_epochs():
    cfg = Config.fromfile(CONFIGS / "dw_conv_tiny_8xb128-300e_in1k-224x224.py")
    set_length(cfg, "epochs", 30)
    assert cfg.train_cfg.max_epochs == 30
    [schedule] = cfg.param_scheduler
    assert schedule.warmup == pytest.approx(2) and "end" not in schedule
    # Of a schedule by iteration, a part of an epoch is no whole one.
    set_length(cfg, "epochs", 3)
    assert schedule.warmup == pytest.approx(0.2)


@pytest.mark.slow
def test_a_training_that_no_longer_gains_ends(run, monkeypatch):
    left = iter([50.0, 40.0, 50.0])
    monkeypatch.setattr(
        ClassificationMetric, "compute_metrics", lambda *_: {"top1": next(left), "top5": 100.0}
    )
    ten = ["train_cfg.max_epochs=10"]
    work = run("--early-stop", "2", options=ten)
    assert [path.name for path in work.glob("best_*")] == ["best_top1_epoch_1.pth"]
    assert (work / "epoch_3.pth").is_file() and not (work / "epoch_4.pth").is_file()
    with pytest.raises(SystemExit):
        run("--early-stop", "0")
    # It has ended: resumed, it ends again.
    run("--early-stop", "2", "--auto-resume", options=ten)
    assert not (work / "epoch_4.pth").is_file()


def test_every_evaluation_logs_each_class(run):
    work = run("--epochs", "2")
    (log,) = work.glob("*/*.log")
    tables = log.read_text().split("per class:")[1:]
    assert len(tables) == 2
    for table in tables:
        rows = [line.split() for line in table.splitlines()[2:5]]
        assert [row[:2] for row in rows] == [["n01", "4"], ["n02", "4"], ["n03", "4"]]


def test_of_many_classes_the_least_accurate_are_logged():
    metric = ClassificationMetric()
    metric.dataset_meta = {"classes": [f"c{i:02}" for i in range(60)]}
    # Two images of each: the first 25 classes are missed, by the next.
    results = [(i, 2 * i + n, i + (i < 25), 0) for i in range(60) for n in (0, 1)]
    logged = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dense.pretraining.metric.print_log", lambda text, **_: logged.append(text))
        metric.compute_metrics(results)
    title, _, *rows = logged[0].splitlines()
    assert title == "the 20 least accurate of 60 classes:"
    assert [row.split() for row in rows] == [[f"c{i:02}", "2", "0.00"] for i in range(20)]
