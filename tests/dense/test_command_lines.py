"""What the tools of trainings and their pages take: usage, defaults, values and refusals."""

import sys
from importlib.util import find_spec
from typing import Any

import pytest

from tests.support import load_tool

MMENGINE = ("train_segmentor", "pretrain", "test_segmentor")
LAUNCHED = "[--launcher {none,pytorch,slurm,mpi}]"
CHANGED = "[--cfg-options KEY=VALUE [KEY=VALUE ...]]"
RUN = "[--resume] [--overwrite]"
NONE = {"resume": False, "overwrite": False, "early_stop": None}
# MMEngine reads the values of --cfg-options.
OPTIONS = ["--cfg-options", "a.b=3", "c=x,y"]
READ = {"a.b": 3, "c": ["x", "y"]}

USAGE = {
    "report": "[-h] [--out OUT] [--images N] RUN",
    "plot_metrics": "[-h] [--out OUT] WORK_DIR [WORK_DIR ...]",
    "browse_data": "[--out FILE] [--images N] [--check N] [--seed N] TOOL ...",
    "test_segmentor": "[-h] [--work-dir WORK_DIR] [--tta] [--out OUT] [--show-dir SHOW_DIR] "
    f"{LAUNCHED} [--data-root DATA_ROOT] [--test-images TEST_IMAGES] "
    f"[--test-masks TEST_MASKS] {CHANGED} config checkpoint",
    "train_detector": "[-h] --config-file CONFIG_FILE [--ablation NAME] "
    "[--output-dir OUTPUT_DIR] [--train-json TRAIN_JSON] [--train-images TRAIN_IMAGES] "
    "[--val-json VAL_JSON] [--val-images VAL_IMAGES] [--test-json TEST_JSON] "
    f"[--test-images TEST_IMAGES] [--allow-invalid] [--classes CLASSES] {RUN} [--iters N] "
    "[--early-stop N] [--eval-only] [--tta] [--num-gpus NUM_GPUS] "
    "[--num-processes NUM_PROCESSES] [--num-machines NUM_MACHINES] "
    "[--machine-rank MACHINE_RANK] [--dist-url DIST_URL] [key=value ...]",
    "train_segmentor": f"[-h] [--ablation NAME] [--work-dir WORK_DIR] {RUN} [--iters N] "
    f"[--early-stop N] [--amp] {LAUNCHED} [--data-root DATA_ROOT] "
    "[--train-images TRAIN_IMAGES] [--train-masks TRAIN_MASKS] [--val-images VAL_IMAGES] "
    "[--val-masks VAL_MASKS] [--test-images TEST_IMAGES] [--test-masks TEST_MASKS] "
    "[--classes CLASSES] [--ignore-index IGNORE_INDEX] [--reduce-zero-label] "
    f"[--short-side N] {CHANGED} config",
    "pretrain": "[-h] [--work-dir WORK_DIR] [--data-root DATA_ROOT] [--train TRAIN] [--val VAL] "
    "[--num-classes NUM_CLASSES] [--batch-size BATCH_SIZE] [--accumulate ACCUMULATE] "
    f"[--init INIT] [--ablation NAME] {RUN} [--epochs N] [--early-stop N] [--amp] [--compile] "
    "[--grad-checkpointing] [--sync-bn] [--ema [DECAY]] [--anneal-after-warmup] "
    f"[--eval-only CHECKPOINT] [--real-labels [FILE]] {LAUNCHED} {CHANGED} config",
}
# The fewest words of each, and what they mean.
FEWEST: dict[str, tuple[list[str], dict[str, Any]]] = {
    "report": (["run"], {"run": "run", "out": None, "images": 64}),
    "plot_metrics": (["one", "two"], {"runs": ["one", "two"], "out": "metrics.png"}),
    "browse_data": (
        ["pretrain"],
        {"tool": "pretrain", "out": "data.html", "images": 24, "check": 1000, "seed": 0},
    ),
    "test_segmentor": (
        ["c.py", "w.pth"],
        {
            **{"config": "c.py", "checkpoint": "w.pth", "work_dir": None, "tta": False},
            **{"out": None, "show_dir": None, "launcher": "none", "data_root": None},
            **{"test_images": None, "test_masks": None, "cfg_options": None, "local_rank": 0},
        },
    ),
    "train_detector": (
        ["--config-file", "c.py"],
        {
            **NONE,
            **{"config_file": "c.py", "ablation": None, "output_dir": None, "train_json": None},
            **{"train_images": None, "val_json": None, "val_images": None, "test_json": None},
            **{"test_images": None, "allow_invalid": False, "classes": None, "iters": None},
            **{"eval_only": False, "tta": False, "num_gpus": None, "num_processes": 1},
            **{"num_machines": 1, "machine_rank": 0, "dist_url": "auto", "overrides": []},
        },
    ),
    "train_segmentor": (
        ["c.py"],
        {
            **NONE,
            **{"config": "c.py", "ablation": None, "work_dir": None, "iters": None, "amp": False},
            **{"launcher": "none", "data_root": None, "train_images": None, "train_masks": None},
            **{"val_images": None, "val_masks": None, "test_images": None, "test_masks": None},
            **{"classes": None, "ignore_index": None, "reduce_zero_label": False},
            **{"short_side": None, "cfg_options": None, "local_rank": 0},
        },
    ),
    "pretrain": (
        ["c.py"],
        {
            **NONE,
            **{"config": "c.py", "work_dir": None, "data_root": None, "train": None, "val": None},
            **{"num_classes": None, "batch_size": None, "accumulate": None, "init": None},
            **{"ablation": None, "epochs": None, "amp": False, "compile": False, "ema": None},
            **{"grad_checkpointing": False, "sync_bn": False, "anneal_after_warmup": False},
            **{"eval_only": None, "real_labels": None, "launcher": "none", "cfg_options": None},
            "local_rank": 0,
        },
    ),
}
# Of what is None by default, what is read as something else.
NO_TEXT = ("cfg_options", "num_gpus", "ignore_index", "short_side", "iters", "epochs", "ema")
NO_TEXT += ("early_stop", "num_classes", "batch_size", "accumulate")
# More words, and in what these differ.
MORE: list[tuple[str, list[str], dict[str, Any]]] = [
    ("report", ["--images", "0", "--out", "a.html"], {"images": 0, "out": "a.html"}),
    ("plot_metrics", ["--out", "a.svg"], {"out": "a.svg"}),
    (
        "browse_data",
        ["--out", "a.html", "--images", "0", "--check", "0", "--seed", "7"],
        {"out": "a.html", "images": 0, "check": 0, "seed": 7},
    ),
    (
        "test_segmentor",
        ["--tta", "--launcher", "slurm", "--local_rank", "2", *OPTIONS],
        {"tta": True, "launcher": "slurm", "local_rank": 2, "cfg_options": READ},
    ),
    (
        "train_detector",
        [
            *("a.b=1", "--allow-invalid", "--resume", "--overwrite", "--iters", "1", "--tta"),
            *("--early-stop", "1", "--num-gpus", "0", "--num-processes", "3"),
            *("--num-machines", "4", "--machine-rank", "2", "--dist-url", "tcp://a:1", "c=d"),
        ],
        {
            **{"overrides": ["a.b=1", "c=d"], "allow_invalid": True, "resume": True},
            **{"overwrite": True, "iters": 1, "early_stop": 1, "tta": True, "num_gpus": 0},
            **{"num_processes": 3, "num_machines": 4, "machine_rank": 2, "dist_url": "tcp://a:1"},
        },
    ),
    ("train_detector", ["--eval-only", "--auto-resume"], {"eval_only": True, "resume": True}),
    (
        "train_segmentor",
        [
            *("--resume", "--amp", "--launcher", "mpi", "--ignore-index", "7", "--local-rank", "1"),
            *("--reduce-zero-label", "--short-side", "64", *OPTIONS),
        ],
        {
            **{"resume": True, "amp": True, "launcher": "mpi", "ignore_index": 7, "local_rank": 1},
            **{"reduce_zero_label": True, "short_side": 64, "cfg_options": READ},
        },
    ),
    (
        "pretrain",
        [
            *("--num-classes", "1", "--batch-size", "1", "--accumulate", "1", "--epochs", "1"),
            *("--early-stop", "2", "--amp", "--compile", "--grad-checkpointing", "--sync-bn"),
            *("--ema", "--anneal-after-warmup", "--real-labels", "--launcher", "pytorch"),
            *("--local-rank", "1", "--resume", "--overwrite", *OPTIONS),
        ],
        {
            **{"num_classes": 1, "batch_size": 1, "accumulate": 1, "epochs": 1, "early_stop": 2},
            **{"amp": True, "compile": True, "grad_checkpointing": True, "sync_bn": True},
            **{"ema": 0.9999, "anneal_after_warmup": True, "real_labels": "timm"},
            **{"launcher": "pytorch", "local_rank": 1, "resume": True, "overwrite": True},
            "cfg_options": READ,
        },
    ),
    (
        "pretrain",
        ["--ema", "0.5", "--eval-only", "w.pth", "--real-labels", "r.json"],
        {"ema": 0.5, "eval_only": "w.pth", "real_labels": "r.json"},
    ),
]
REFUSED = [
    ("report", ["--images", "-1"], "--images -1: 0 or more is needed"),
    ("plot_metrics", ["--out", "a.txt"], "--out a.txt: a .png or .svg is needed"),
    ("browse_data", ["--out", "a.png"], "--out a.png: a .html is needed"),
    ("browse_data", ["--images", "-1"], "--images -1: 0 to {most}, so that the page stays small"),
    ("browse_data", ["--images", "{more}"], "--images {more}: 0 to {most}, so that the page"),
    ("browse_data", ["--check", "-1"], "--check -1: 0 or more is needed"),
    ("test_segmentor", ["--launcher", "x"], "invalid choice: 'x'"),
    ("train_segmentor", ["--launcher", "x"], "invalid choice: 'x'"),
    ("train_segmentor", ["--iters", "0"], "0: 1 or more is needed"),
    ("pretrain", ["--launcher", "x"], "invalid choice: 'x'"),
    *(
        ("pretrain", [f"--{name}", "0"], f"--{name} 0: 1 or more is needed")
        for name in ("num-classes", "batch-size", "accumulate")
    ),
    *(
        (
            "pretrain",
            [*words, "--eval-only", "w.pth"],
            f"{words[0]} is for training, but --eval-only",
        )
        for words in (["--resume"], ["--overwrite"], ["--epochs", "3"], ["--early-stop", "1"])
    ),
    *(
        ("train_detector", [name, "3", "--eval-only"], f"{name} is for training, but --eval-only")
        for name in ("--iters", "--early-stop")
    ),
]


@pytest.fixture
def parsed(monkeypatch):
    """A function: what the parser of a tool makes of words."""

    def call(name, words):
        if name in MMENGINE and not find_spec("mmengine"):
            pytest.skip("MMEngine is not installed")
        monkeypatch.setattr(sys, "argv", [f"{name}.py"])
        monkeypatch.setenv("COLUMNS", "2000")
        return load_tool(name).parse_args(words)

    return call


def values(name, found):
    if name == "browse_data":
        # The rest is the other tool's.
        found, rest = found
        assert rest == []
    return vars(found)


@pytest.mark.parametrize("name", USAGE)
def test_help_is_the_usage_and_the_files_own_text(parsed, capsys, monkeypatch, name):
    """And needs no framework of dense prediction."""
    for framework in ("detectron2", "omegaconf", "mmseg", "mmdet"):
        monkeypatch.setitem(sys.modules, framework, None)
    with pytest.raises(SystemExit) as ended:
        parsed(name, ["--help"])
    said = capsys.readouterr().out
    assert ended.value.code == 0
    assert said.splitlines()[0] == f"usage: {name}.py {USAGE[name]}"
    # With its lines as they are.
    assert load_tool(name).__doc__.strip() in said


@pytest.mark.parametrize("name", FEWEST)
def test_what_is_not_said_has_a_default(parsed, name):
    words, expected = FEWEST[name]
    assert values(name, parsed(name, words)) == expected


@pytest.mark.parametrize(("name", "words", "expected"), MORE)
def test_what_is_said_is_read(parsed, name, words, expected):
    fewest, defaults = FEWEST[name]
    # The options of browse_data.py stand before the other tool's name.
    words = [*words, *fewest] if name == "browse_data" else [*fewest, *words]
    assert values(name, parsed(name, words)) == defaults | expected


@pytest.mark.parametrize("name", FEWEST)
def test_every_option_of_text_is_read_as_it_is(parsed, name):
    fewest, defaults = FEWEST[name]
    given = {key: f"{key}.x" for key, value in defaults.items() if value is None}
    given = {key: value for key, value in given.items() if key not in NO_TEXT}
    words = [word for key, value in given.items() for word in (f"--{key}".replace("_", "-"), value)]
    assert values(name, parsed(name, [*fewest, *words])) == defaults | given


@pytest.mark.parametrize(("name", "words", "message"), REFUSED)
def test_what_cannot_be_is_refused(parsed, capsys, name, words, message):
    from dense.browsing import MOST_SAMPLES

    places = {"most": MOST_SAMPLES, "more": MOST_SAMPLES + 1}
    words = [word.format(**places) for word in words]
    with pytest.raises(SystemExit) as ended:
        parsed(name, [*words, *FEWEST[name][0]])
    assert ended.value.code == 2
    assert message.format(**places) in capsys.readouterr().err.splitlines()[-1]


def test_most_samples_are_browsed(parsed):
    from dense.browsing import MOST_SAMPLES

    args, _ = parsed("browse_data", ["--images", str(MOST_SAMPLES), "pretrain"])
    assert args.images == MOST_SAMPLES


def test_what_follows_a_tool_is_its_own(parsed):
    """Not a short form of an option here either: ``--im`` would be ``--images``."""
    args, rest = parsed("browse_data", ["pretrain", "c.py", "--im", "3", "--seed", "2"])
    assert (args.tool, args.images, args.seed, rest) == ("pretrain", 24, 2, ["c.py", "--im", "3"])
    with pytest.raises(SystemExit):
        parsed("browse_data", ["elsewhere"])
