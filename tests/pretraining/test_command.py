"""What the options of pretrain.py make of a config, and in which order a training is planned,
claimed, run and drawn; nothing is trained."""

from types import SimpleNamespace

import pytest
from mmengine.config import Config

from dense.amp import best_half
from dense.browsing import Photo, Split
from dense.openmmlab.config import ConfigError
from dense.recipes import RECIPES
from tests.pages import Page
from tests.pretraining.conftest import CONFIGS
from tests.support import claiming, differences, load_tool, noting

CONFIG = str(CONFIGS / "dw_conv_nano.py")
FOLDER = "work_dirs/dw_conv_nano"
STOP = {"type": "EarlyStop", "monitor": "top1", "patience": 3}
EMA = {"type": "AveragedWeights", "momentum": pytest.approx(0.1), "update_buffers": True}
CLASSES = (
    *("model.num_classes", "train_dataloader.dataset.num_classes"),
    "val_dataloader.dataset.num_classes",
)


def hook(settings):
    return {f"custom_hooks.3.{key}": value for key, value in settings.items()}


def roots(train, val):
    return {"train_dataloader.dataset.root": train, "val_dataloader.dataset.root": val}


def configured(tool, *words, config=CONFIG):
    return tool.configured(tool.parse_args([str(config), *words]))


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--work-dir w", {"work_dir": "w"}),
        ("--cfg-options work_dir=w", {"work_dir": "w"}),
        ("--work-dir v --cfg-options work_dir=w", {"work_dir": "v"}),
        ("--resume", {"resume": True}),
        ("--cfg-options resume=True", {"resume": True}),
        ("--launcher slurm", {"launcher": "slurm"}),
        ("--data-root d", roots("d/train", "d/val")),
        ("--data-root d --train t", roots("t", "d/val")),
        ("--train t --val v", roots("t", "v")),
        ("--num-classes 3", dict.fromkeys(CLASSES, 3)),
        ("--init w.pth", {"model.init": "w.pth"}),
        # What is evaluated has weights of its own.
        ("--init w.pth --eval-only e.pth", {"model.init": None}),
        ("--eval-only e.pth", {"model.init": None}),
        ("--compile", {"model.compile": True}),
        ("--grad-checkpointing", {"model.grad_checkpointing": True}),
        ("--sync-bn", {"sync_bn": "torch"}),
        ("--early-stop 3", hook(STOP)),
        ("--ema 0.9", hook(EMA)),
        (
            "--ablation dw_conv_se",
            {"work_dir": f"{FOLDER}_dw_conv_se", "model.se_ratio": 1 / 16},
        ),
        (
            "--epochs 10",
            {
                "train_cfg.max_epochs": 10,
                "param_scheduler.0.end": 1,
                "param_scheduler.1.begin": 1,
                "param_scheduler.1.end": 10,
            },
        ),
        (
            "--amp",
            {
                "optim_wrapper.type": "AmpOptimWrapper",
                "optim_wrapper.dtype": best_half(),
                "optim_wrapper.loss_scale": 1.0 if best_half() == "bfloat16" else "dynamic",
            },
        ),
    ],
)
def test_an_option_changes_this_alone(pretrain, words, expected):
    plain = configured(pretrain).to_dict()
    assert differences(configured(pretrain, *words.split()).to_dict(), plain) == expected


def test_without_options_it_is_the_recipe_in_a_folder_of_its_name(pretrain):
    found = differences(configured(pretrain).to_dict(), Config.fromfile(CONFIG).to_dict())
    assert found == {"work_dir": FOLDER, "launcher": "none"}


def test_the_cosine_may_begin_after_warm_up(pretrain):
    recipe = CONFIGS / "swin_tiny_8xb128-300e_in1k-224x224.py"
    plain, found = (
        configured(pretrain, *words, config=recipe).to_dict()
        for words in ([], ["--anneal-after-warmup"])
    )
    assert differences(found, plain) == {"param_scheduler.0.warmup_prefix": True}


def test_a_config_that_does_not_speak_of_resuming_begins(pretrain, tmp_path):
    cfg = Config.fromfile(CONFIG)
    cfg.pop("resume")
    cfg.dump(tmp_path / "own.py")
    cfg = configured(pretrain, config=tmp_path / "own.py")
    assert (cfg.resume, cfg.work_dir) == (False, "work_dirs/own")


def test_a_config_of_another_task_is_refused(pretrain):
    with pytest.raises(ConfigError, match="swin_nano_upernet.py.* no config of classification"):
        configured(pretrain, config=RECIPES / "segmentation/swin_nano_upernet.py")


@pytest.fixture
def done(monkeypatch):
    """What the tool does, noted in order."""
    noted = []
    part = "dense.pretraining.config"
    monkeypatch.setattr(f"{part}.world_size", noting(noted, "world", 2))
    monkeypatch.setattr(
        f"{part}.plan_batches", lambda cfg, *sizes: noted.append(("plan", *sizes)) or "batches"
    )
    monkeypatch.setattr("dense.runs.claimed", claiming(noted))
    monkeypatch.setattr("dense.metrics.plot_finished", noting(noted, "plot"))
    monkeypatch.setattr("dense.run_report.write_finished", noting(noted, "report"))
    return noted


def running(monkeypatch, done, rank):
    """A runner in the place of a built one."""
    logger = SimpleNamespace(info=noting(done, "log"))
    runner = SimpleNamespace(rank=rank, work_dir="made", logger=logger, train=noting(done, "train"))
    monkeypatch.setattr(
        "dense.pretraining.config.build",
        lambda cfg, *options: done.append(("build", cfg.work_dir, *options)) or runner,
    )
    return runner


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("words", [["--resume"], ["--overwrite", "--launcher", "mpi"]])
def test_a_training_is_planned_claimed_run_and_drawn(pretrain, done, monkeypatch, rank, words):
    running(monkeypatch, done, rank)
    batches = ["--batch-size", "4", "--accumulate", "3", "--real-labels", "r.json"]
    pretrain.main([CONFIG, "--work-dir", "w", *batches, *words])
    again = words == ["--resume"]
    launcher = "none" if again else "mpi"
    assert done == [
        *(("world", launcher), ("plan", 2, 4, 3)),
        ("claim", "w", dict(resume=again, overwrite=not again, launcher=launcher)),
        *(("begin",), ("build", "w", True, "r.json"), ("log", "batches"), ("train",)),
        # One process of all draws.
        *([("plot", "made"), ("report", "made")] if rank == 0 else []),
        ("leave",),
    ]


def test_an_evaluation_claims_no_folder(pretrain, done, monkeypatch, capsys):
    runner = running(monkeypatch, done, 0)
    monkeypatch.setattr(
        "dense.pretraining.config.evaluate",
        lambda of, path: done.append((of is runner, path)) or {"top1": 12.346, "top5": 50.0},
    )
    pretrain.main([CONFIG, "--work-dir", "w", "--eval-only", "e.pth", "--real-labels"])
    plan = [("world", "none"), ("plan", 2, None, None)]
    assert done == [*plan, ("build", "w", False, "timm"), (True, "e.pth")]
    assert capsys.readouterr().out == "top1 12.35, top5 50.00\n"


@pytest.mark.parametrize("name", ["pretrain", "browse_data"])
def test_mmengine_that_is_missing_is_said(monkeypatch, name):
    def refuse(*names):
        raise ImportError(" of ".join(names))

    tool = load_tool(name)
    monkeypatch.setattr("dense.require", refuse)
    with pytest.raises(SystemExit) as ended:
        tool.main([CONFIG] if name == "pretrain" else ["pretrain", CONFIG])
    assert str(ended.value) == f"{name}: mmengine of pretraining"


def test_browsing_says_what_it_looked_at(monkeypatch, tmp_path, capsys):
    asked = []

    def splits(cfg, *numbers):
        asked.append((cfg.train_dataloader.dataset.root, *numbers))
        cut = Photo("cut.jpg", fault="it is cut")
        first = Split("training", total=1234, odd=["one", "two"], photos=[cut])
        return [first, Split("validation", total=5)], {}

    monkeypatch.setattr("dense.pretraining.browsing.splits", splits)
    out = tmp_path / "data.html"
    words = ["--images", "2", "--check", "3", "--seed", "5", "--out", str(out)]
    load_tool("browse_data").main([*words, "pretrain", CONFIG, "--train", "photos"])
    assert asked == [("photos", 2, 3, 5)]
    assert capsys.readouterr().out.splitlines() == [
        "training: 1234 photos, 3 odd things",
        "validation: 5 photos, 0 odd things",
        str(out),
    ]
    page = Page(out.read_text())
    assert "Data of dw_conv_nano" in page.text
    what = "What pretrain sees with these arguments, before any training"
    assert f"{what}: 1,234 training photos, 5 validation photos." in page.text
    assert any(line.startswith("cut.jpg") for line in page.lines)
