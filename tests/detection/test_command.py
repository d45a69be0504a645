"""What the options of train_detector.py make of a config, and in which order a training is checked,
claimed, run and drawn; nothing is trained."""

import os

import pytest
from omegaconf import OmegaConf

from dense.detection.config import LazyConfigError, load_config
from dense.recipes import RECIPES
from tests.support import claiming, differences, load_tool, noting

from .test_train import main

CONFIG = str(RECIPES / "detection/cascade_mask_rcnn_dw_conv_nano.py")
FILES = ("train_json", "train_images", "val_json", "val_images")


@pytest.fixture(scope="module")
def tool():
    return load_tool("train_detector")


def configured(tool, *words):
    cfg = tool.configured(tool.parse_args(["--config-file", CONFIG, *words]))
    return OmegaConf.to_container(cfg)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("", {}),
        ("--output-dir o", {"train.output_dir": "o"}),
        ("train.seed=3 train.log_period=7", {"train.seed": 3, "train.log_period": 7}),
        ("--iters 64", {"train.max_iter": 64, "train.checkpointer.period": 16}),
        ("--ablation dw_conv_se", {"model.backbone.bottom_up.se_ratio": 1 / 16}),
        ("--allow-invalid", {"data.allow_invalid": True}),
        ("--classes dog,cat", {"data.classes": ["dog", "cat"]}),
        (
            "--test-json t.json --test-images t",
            {"data.test_json": "t.json", "data.test_images": "t"},
        ),
        *((f"--{name.replace('_', '-')} x", {f"data.{name}": "x"}) for name in FILES),
    ],
)
def test_an_option_changes_this_alone(tool, words, expected):
    plain = OmegaConf.to_container(load_config(CONFIG))
    assert differences(configured(tool, *words.split()), plain) == expected


def test_a_file_of_classes_has_their_names(tool, tmp_path):
    path = tmp_path / "classes.txt"
    path.write_text("dog 1 2 3\ncat 4 5 6\n")
    assert configured(tool, "--classes", str(path))["data"]["classes"] == ["dog", "cat"]
    path.write_text("dog 1 2 256\n")
    with pytest.raises(LazyConfigError, match="^--classes: .*'dog 1 2 256' has a number above 255"):
        configured(tool, "--classes", str(path))


@pytest.mark.parametrize("text", ["", "dog,,cat"])
def test_an_empty_name_is_refused(tool, text):
    with pytest.raises(LazyConfigError) as error:
        configured(tool, "--classes", text)
    assert str(error.value) == f"--classes {text!r}: a name is empty"


@pytest.fixture
def done(monkeypatch):
    """What the tool does, noted in order."""
    noted = []
    engine, data = "dense.detection.engine", "dense.detection.data"
    for name in ("check", "start"):
        monkeypatch.setattr(
            f"{engine}.{name}",
            lambda cfg, args, name=name: noted.append((name, cfg.train.output_dir, args.dist_url)),
        )
    monkeypatch.setattr(
        f"{data}.resolve_data",
        lambda cfg, training: noted.append(("read", cfg.train.output_dir, training)),
    )
    monkeypatch.setattr("dense.runs.claimed", claiming(noted))
    monkeypatch.setattr("dense.metrics.plot_finished", noting(noted, "plot"))
    monkeypatch.setattr("dense.run_report.write_finished", noting(noted, "report"))
    return noted


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("option", ["--resume", "--overwrite"])
def test_a_training_is_checked_claimed_run_and_drawn(done, monkeypatch, rank, option):
    words = ["--machine-rank", str(rank), option, "--dist-url", "tcp://a:1"]
    main(monkeypatch, "--config-file", CONFIG, "--output-dir", "o", *words)
    claim = dict(resume=option == "--resume", overwrite=option != "--resume", first=rank == 0)
    assert done == [
        *(("check", "o", "tcp://a:1"), ("claim", "o", claim), ("read", "o", True), ("begin",)),
        ("start", "o", "tcp://a:1"),
        # One machine of all draws.
        *([("plot", "o"), ("report", "o")] if rank == 0 else []),
        ("leave",),
    ]


def test_an_evaluation_claims_no_folder(done, monkeypatch):
    main(monkeypatch, "--config-file", CONFIG, "--output-dir", "o", "--eval-only")
    assert done == [("read", "o", False), ("start", "o", "auto")]


@pytest.mark.parametrize(("words", "expected"), [("0", ""), ("1", "3"), ("", "3")])
def test_no_gpus_means_that_none_is_seen(monkeypatch, words, expected):
    seen = []
    tool = load_tool("train_detector")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    monkeypatch.setattr(tool, "run", lambda args: seen.append(os.environ["CUDA_VISIBLE_DEVICES"]))
    given = ["--num-gpus", words] if words else []
    monkeypatch.setattr("sys.argv", ["train_detector.py", "--config-file", CONFIG, *given])
    tool.main()
    assert seen == [expected]
