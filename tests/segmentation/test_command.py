"""What the options of train_segmentor.py and test_segmentor.py make of a config, and in which order
a training is checked, claimed, run and drawn; nothing is trained."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from dense.amp import best_half
from dense.openmmlab.config import ConfigError
from dense.recipes import RECIPES
from dense.segmentation.config import load_config
from tests.support import claiming, differences, noting

CONFIG = str(RECIPES / "segmentation/dw_conv_nano_upernet.py")
FOLDER = "work_dirs/dw_conv_nano_upernet"
LOADERS = ("train_dataloader", "val_dataloader", "test_dataloader")
STOP = {"type": "EarlyStop", "monitor": "mIoU", "patience": 3}


def configured(tools, *words, config=CONFIG):
    return tools.train.configured(tools.train.parse_args([str(config), *words]))


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--work-dir w", {"work_dir": "w"}),
        ("--cfg-options work_dir=w", {"work_dir": "w"}),
        ("--work-dir v --cfg-options work_dir=w", {"work_dir": "v"}),
        ("--resume", {"resume": True}),
        ("--cfg-options resume=True", {"resume": True}),
        ("--launcher slurm", {"launcher": "slurm"}),
        ("--data-root d", {f"{loader}.dataset.data_root": "d" for loader in LOADERS}),
        ("--early-stop 3", {f"custom_hooks.2.{key}": value for key, value in STOP.items()}),
        (
            "--ablation dw_conv_se",
            {"work_dir": f"{FOLDER}_dw_conv_se", "model.backbone.se_ratio": 1 / 16},
        ),
        (
            "--iters 60",
            {
                "train_cfg.max_iters": 60,
                "train_cfg.val_interval": 30,
                "default_hooks.checkpoint.interval": 10,
                "param_scheduler.0.end": 5,
                "param_scheduler.1.begin": 5,
                "param_scheduler.1.end": 60,
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
def test_an_option_changes_this_alone(tools, words, expected):
    plain = configured(tools)
    found = differences(configured(tools, *words.split()).to_dict(), plain.to_dict())
    assert found == expected


def test_without_options_it_is_the_recipe_in_a_folder_of_its_name(tools):
    found = differences(configured(tools).to_dict(), load_config(CONFIG).to_dict())
    assert found == {"work_dir": FOLDER, "launcher": "none"}


def test_a_config_that_does_not_speak_of_resuming_begins(tools, tmp_path):
    cfg = load_config(CONFIG)
    cfg.pop("resume")
    cfg.dump(tmp_path / "own.py")
    cfg = configured(tools, config=tmp_path / "own.py")
    assert (cfg.resume, cfg.work_dir) == (False, "work_dirs/own")


def test_a_short_side_is_set(tools):
    steps = configured(tools, "--short-side", "64").test_dataloader.dataset.pipeline
    assert steps[1] == dict(type="Resize", scale=(256, 64), keep_ratio=True)


def test_own_data_are_of_the_folders_named(tools, shapes):
    names = ("train_images", "train_masks", "val_images", "val_masks")
    words = [f"--{name.replace('_', '-')}={shapes[name]}" for name in names]
    words += ["--test-images=a", "--test-masks=b", "--classes=sky,sea"]
    words += ["--ignore-index=7", "--reduce-zero-label"]
    cfg = configured(tools, *words)
    found = [cfg[loader].dataset for loader in LOADERS]
    folders = [shapes[name] for name in names] + [str(Path(name).absolute()) for name in "ab"]
    prefixes = [(d.data_prefix.img_path, d.data_prefix.seg_map_path) for d in found]
    assert [folder for prefix in prefixes for folder in prefix] == folders
    assert {(d.ignore_index, d.reduce_zero_label, *d.metainfo.classes) for d in found} == {
        (7, True, "sky", "sea")
    }
    assert cfg.model.decode_head.num_classes == cfg.model.auxiliary_head.num_classes == 2


def test_a_config_of_another_task_is_refused(tools):
    with pytest.raises(ConfigError, match="swin_nano.py.* no config of segmentation"):
        configured(tools, config=RECIPES / "pretraining/swin_nano.py")


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("words", [["--resume"], ["--overwrite", "--launcher", "mpi"]])
def test_a_training_is_checked_claimed_run_and_drawn(tools, monkeypatch, rank, words):
    done = []
    runner = SimpleNamespace(rank=rank, work_dir="made", train=noting(done, "train"))
    part = "dense.segmentation.config"
    monkeypatch.setattr(f"{part}.check", lambda cfg, training: done.append(("check", training)))
    monkeypatch.setattr(
        f"{part}.build_runner", lambda cfg: done.append(("build", cfg.work_dir)) or runner
    )
    monkeypatch.setattr("dense.runs.claimed", claiming(done))
    monkeypatch.setattr("dense.metrics.plot_finished", noting(done, "plot"))
    monkeypatch.setattr("dense.run_report.write_finished", noting(done, "report"))
    monkeypatch.setattr(sys, "argv", ["tool", CONFIG, "--work-dir", "w", *words])
    tools.train.main()
    again = words == ["--resume"]
    launcher = "none" if again else "mpi"
    assert done == [
        ("check", True),
        ("claim", "w", dict(resume=again, overwrite=not again, launcher=launcher)),
        *(("begin",), ("build", "w"), ("train",)),
        # One process of all draws.
        *([("plot", "made"), ("report", "made")] if rank == 0 else []),
        ("leave",),
    ]


@pytest.fixture
def tested(tools, monkeypatch, tmp_path):
    """A function of a checkpoint's name and words: what test_segmentor.py changes of the config,
    and what it does."""

    def call(name, *words, config=CONFIG):
        done, built = [], []
        runner = SimpleNamespace(test=noting(done, "test"))
        part = "dense.segmentation.config"
        monkeypatch.setattr(f"{part}.check", lambda cfg, training: done.append(("check", training)))
        monkeypatch.setattr(f"{part}.build_runner", lambda cfg: built.append(cfg) or runner)
        monkeypatch.setattr(
            f"{part}.use_exported", lambda of, path: done.append(("export", of is runner, path))
        )
        monkeypatch.setattr(sys, "argv", ["tool", str(config), str(tmp_path / name), *words])
        tools.test.main()
        return differences(built[0].to_dict(), load_config(CONFIG).to_dict()), done

    return call


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        # As the config of a resumed training has it.
        ("--cfg-options resume=True", {}),
        ("--work-dir w", {"work_dir": "w"}),
        ("--launcher pytorch", {"launcher": "pytorch"}),
        ("--data-root d", {f"{loader}.dataset.data_root": "d" for loader in LOADERS}),
        ("--out o", {"test_evaluator.output_dir": "o"}),
        (
            "--show-dir s",
            {
                "default_hooks.visualization.draw": True,
                "default_hooks.visualization.interval": 1,
                "visualizer.save_dir": "s",
            },
        ),
        (
            "--test-images /a --test-masks /b "
            "--cfg-options test_dataloader.dataset.type=FolderDataset",
            {
                "test_dataloader.dataset.type": "FolderDataset",
                "test_dataloader.dataset.data_prefix.img_path": "/a",
                "test_dataloader.dataset.data_prefix.seg_map_path": "/b",
            },
        ),
    ],
)
def test_an_option_of_a_test_changes_this_alone(tested, tmp_path, words, expected):
    found, done = tested("w.pth", *words.split())
    # Beside the checkpoint, whose weights are loaded.
    always = {"work_dir": str(tmp_path / "test"), "load_from": str(tmp_path / "w.pth")}
    assert found == always | {"launcher": "none"} | expected
    assert done == [("check", False), ("test",)]


def test_a_config_may_name_own_data(tested, shapes, tmp_path):
    (tmp_path / "own.py").write_text(f"_base_ = {CONFIG!r}\ndata = dict({shapes!r})\n")
    found, _ = tested("w.pth", config=tmp_path / "own.py")
    assert found["test_dataloader.dataset.data_prefix.img_path"] == shapes["val_images"]
    assert found["model.decode_head.num_classes"] == 3


def test_a_config_of_another_task_is_not_tested(tested):
    with pytest.raises(SystemExit, match="^test_segmentor: .*swin_nano.py has no test_dataloader"):
        tested("w.pth", config=RECIPES / "pretraining/swin_nano.py")


def test_an_exported_file_is_put_in_the_networks_place(tested, tmp_path):
    found, done = tested("w.onnx")
    assert found == {"work_dir": str(tmp_path / "test"), "launcher": "none"}
    assert done == [("check", False), ("export", True, str(tmp_path / "w.onnx")), ("test",)]
    with pytest.raises(
        SystemExit, match=r"^test_segmentor: --tta is for checkpoints, .*w\.onnx is"
    ):
        tested("w.onnx", "--tta")


def test_augmentation_is_around_the_model(tested):
    found, _ = tested("w.pth", "--tta")
    assert (found["model.type"], found["model.module.type"]) == ("SegTTAModel", "EncoderDecoder")
    assert found["test_dataloader.dataset.pipeline.1.type"] == "TestTimeAug"


@pytest.mark.parametrize("name", ["train", "test"])
def test_mmsegmentation_that_is_missing_is_said(tools, monkeypatch, name):
    def refuse(*names):
        raise ImportError(" of ".join(names))

    monkeypatch.setattr("dense.require", refuse)
    monkeypatch.setattr(sys, "argv", ["tool", CONFIG, "w.pth"][: 2 if name == "train" else 3])
    with pytest.raises(SystemExit) as ended:
        getattr(tools, name).main()
    tool = {"train": "train_segmentor", "test": "test_segmentor"}[name]
    assert str(ended.value) == f"{tool}: mmseg of segmentation"
