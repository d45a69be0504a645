"""What the three trainings share: the options of a run, evaluations in a log, the best of them."""

import argparse
import json

import pytest

from dense.metrics import evaluated, since_best
from dense.options import add_run_options, scaled


@pytest.mark.parametrize(
    "values, waited",
    [
        ([], 0),
        ([3.0], 0),
        ([1.0, 2.0, 3.0], 0),
        ([3.0, 2.0, 1.0], 2),
        # As high is no rise.
        ([3.0, 3.0, 3.0], 2),
        ([float("nan"), float("nan"), 0.0], 0),
        ([float("nan")] * 3, 2),
        ([1.0, float("nan")], 1),
    ],
)
def test_evaluations_since_the_best(values, waited):
    assert since_best(values) == waited


def test_evaluations_of_a_log(tmp_path):
    assert evaluated(tmp_path, "bbox/AP", 100) == []
    lines = [{"iteration": i, "total_loss": 1.0, "bbox/AP": 10.0 * i} for i in (1, 3, 5)]
    (tmp_path / "metrics.json").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert evaluated(tmp_path, "bbox/AP", 3) == [10.0, 30.0]
    assert evaluated(tmp_path, "mIoU", 3) == []


def test_numbers_in_proportion():
    assert [scaled(n, 0.1) for n in (500, 15, 3, 0, -1)] == [50, 2, 1, 0, -1]
    assert scaled(1500, 0.5) == 750 and scaled(1, 0.01) == 1 and scaled(1, 3) == 3


def test_the_help_of_the_shared_options(monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    parser = argparse.ArgumentParser("train", add_help=False)
    add_run_options(parser.add_argument, "epochs", "work dir")
    moved = "warm-up, milestones, evaluation and checkpoints move in proportion"
    options = [
        (
            "--resume, --auto-resume",
            "continue from the last complete checkpoint; without one, begin",
        ),
        ("--overwrite", "remove the training that the work dir holds"),
        ("--epochs N", f"train N epochs: {moved}"),
        (
            "--early-stop N",
            "stop when the metric of the best checkpoint has not risen in N evaluations",
        ),
    ]
    words = parser.format_help().partition("options:\n")[2].split()
    assert " ".join(words) == " ".join(" ".join(pair) for pair in options)
    defaults = dict(resume=False, overwrite=False, epochs=None, early_stop=None)
    assert vars(parser.parse_args([])) == defaults
    assert parser.parse_args(["--resume", "--overwrite", "--epochs", "1"]).overwrite is True


def test_both_names_of_resuming_and_numbers_below_one(capsys):
    parser = argparse.ArgumentParser()
    add_run_options(parser.add_argument, "iters", "work dir")
    assert parser.parse_args(["--auto-resume"]).resume
    assert not parser.parse_args([]).resume
    args = parser.parse_args(["--iters", "20", "--early-stop", "3"])
    assert (args.iters, args.early_stop) == (20, 3)
    for wrong in (["--iters", "0"], ["--early-stop", "-1"], ["--iters", "1.5"], ["--iters", "x"]):
        with pytest.raises(SystemExit):
            parser.parse_args(wrong)
        assert f"{wrong[1]}: 1 or more is needed" in capsys.readouterr().err
