"""A comparison's commands to the word, a broken-off one that goes on, its table and its plot."""

import json
import os
import re
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from dense.analysis import comparison
from dense.analysis.comparison import Entry, Network, Result
from tests.pretraining.test_comparison import log, result
from tests.support import ROOT, load_tool, points

FAMILIES = ("swin", "swin_local_mlp", "dw_conv", "d_dw_conv", "i_d_dw_conv")
KEPT = ROOT / "configs/pretraining/comparison"


@pytest.fixture
def tool():
    """``tools/compare_families.py``."""
    return load_tool("compare_families")


@pytest.fixture
def quick_marks(monkeypatch):
    """Fingerprints that cost nothing; what they were asked for."""
    asked = []

    def marks(network, *given):
        asked.append(given)
        return (float(len(network.name)), 2.0, 3.0)

    monkeypatch.setattr(comparison, "fingerprint", marks)
    return asked


def options(tool, photos, *words):
    return tool.parse_args(["--data-root", str(photos), "--seeds", "2", *words])


@pytest.mark.parametrize(
    ("epochs", "warmup", "every"), [(2, 1, 1), (9, 1, 1), (10, 1, 2), (19, 1, 3), (20, 2, 4)]
)
def test_every_command(tool, photos, quick_marks, epochs, warmup, every):
    args = options(tool, photos, "--epochs", str(epochs), "--ablations", "swin_sliding")
    planned = tool.plan(args, 3)
    assert set(quick_marks) == {(3, 64)} and len(quick_marks) == 6
    names = (*FAMILIES, "swin_sliding")
    assert [(run.network.name, run.seed) for run in planned] == [
        (name, seed) for seed in (0, 1) for name in names
    ]
    for run in planned:
        step, name, seed = run.step, run.network.name, run.seed
        family = "swin" if name == "swin_sliding" else name
        assert re.fullmatch(rf"{name}_nano_seed{seed}_[0-9a-f]{{8}}", step.name)
        assert (step.title, step.total) == (f"{name}, seed {seed}", epochs)
        ablation = "--ablation swin_sliding " if name != family else ""
        assert " ".join(step.argv({"data": "DATA", "runs": "RUNS"})) == (
            f"tools/pretrain.py configs/pretraining/{family}_nano.py {ablation}--resume"
            f" --data-root DATA --num-classes 3 --work-dir RUNS/{step.name}"
            f" --cfg-options model.name={family}_nano randomness.seed={seed}"
            f" train_cfg.max_epochs={epochs} train_cfg.val_interval={every}"
            f" param_scheduler.0.end={warmup} param_scheduler.1.begin={warmup}"
            f" param_scheduler.1.end={epochs}"
        )


def test_a_folder_is_of_a_recipe_and_what_its_network_computes(
    tool, photos, quick_marks, tmp_path, monkeypatch
):
    """Of its weights and the loss, not of what follows a step of training."""

    def names(*words) -> set[str]:
        return {run.step.name for run in tool.plan(options(tool, photos, *words), 3)}

    before = names()
    assert names() == before and not before & names("--epochs", "11")
    for marks, same in (((1.0, 2.0), False), ((4.0, 2.5), False), ((4.0, 2.0, 9.0), True)):
        monkeypatch.setattr(comparison, "fingerprint", lambda *_, marks=marks: marks)
        assert (len(before & names()) > 0) == same


def test_a_recipe_knows_the_photos_but_not_where_they_lie(tool, tmp_path):
    """By name and size, in train and val; a folder alone is none."""
    network = Network("swin", "swin_nano")
    recipes = []
    for root, path, size in (
        ("a", "train/x/1.jpg", 5),
        ("b", "train/x/1.jpg", 5),
        ("c", "train/x/1.jpg", 6),
        ("d", "train/x/2.jpg", 5),
    ):
        file = tmp_path / root / path
        file.parent.mkdir(parents=True)
        file.write_bytes(b"x" * size)
        config = "configs/pretraining/swin_nano.py"
        recipes.append(tool.recipe_of(config, network, "train_cfg.max_epochs=3", tmp_path / root))
    (tmp_path / "a/empty").mkdir()
    recipes.append(tool.recipe_of(config, network, "train_cfg.max_epochs=3", tmp_path / "a"))
    recipes.append(tool.recipe_of(config, network, "train_cfg.max_epochs=4", tmp_path / "a"))
    other = replace(network, options={"window_size": 5})
    recipes.append(tool.recipe_of(config, other, "train_cfg.max_epochs=3", tmp_path / "a"))
    assert recipes[0] == recipes[1] == recipes[4] and len(set(recipes)) == 5
    assert all(re.fullmatch("[0-9a-f]{16}", recipe) for recipe in recipes)


def test_epochs_are_counted_by_their_checkpoints(tool, photos, quick_marks, tmp_path):
    assert tool.epochs_done(tmp_path) == 0
    (run, *_) = tool.plan(options(tool, photos), 3)
    folder = tmp_path / "runs" / run.step.name
    folder.mkdir(parents=True)
    for name in ("epoch_2.pth", "epoch_10.pth", "epoch_last.pth", "epoch_11.txt"):
        (folder / name).touch()
    assert tool.epochs_done(folder) == 10
    assert run.step.position(tmp_path) == 10


def test_two_classes_are_enough(tool, tmp_path):
    (tmp_path / "train/a").mkdir(parents=True)
    (tmp_path / "train/list.txt").touch()
    with pytest.raises(tool.StepError, match="train: it needs a folder for every class"):
        tool.count_classes(tmp_path)
    (tmp_path / "train/b").mkdir()
    with pytest.raises(tool.StepError, match="no photos to validate on: .*val is missing"):
        tool.count_classes(tmp_path)
    (tmp_path / "val").mkdir()
    assert tool.count_classes(tmp_path) == 2


def test_networks_of_another_size(tool):
    found = {n.name: n for n in tool.networks("tiny", ["swin_heads_of_*", "dw_conv_se"])}
    assert found["d_dw_conv"] == Network("d_dw_conv", "d_dw_conv_tiny", {}, "d_dw_conv")
    # A pattern names what "all" leaves out.
    heads = found["swin_heads_of_8"]
    assert (heads.model, heads.baseline) == ("swin_tiny", "swin") and heads.options
    # All options are of the size.
    assert (
        heads.options != {n.name: n for n in tool.networks("nano", ["swin*"])}[heads.name].options
    )
    assert found["dw_conv_se"].baseline == "dw_conv"


def test_a_comparison_that_breaks_off_goes_on(
    tool, photos, quick_marks, tmp_path, monkeypatch, capsys
):
    asked, prepared, prepare = [], [], tool.steps.prepare
    monkeypatch.setattr(
        tool.steps, "prepare", lambda *given: prepared.append(given) or prepare(*given)
    )

    def run_all(todo, out, places, state, lock, cwd, jobs, keep):
        asked.append(([step.title for step in todo], out, places, cwd, jobs))
        for number, step in enumerate(todo[:2] if len(asked) == 1 else todo):
            log(out / "runs" / step.name, [2.0, 1.25], [40.0, 50.0 + number])
            state.note(step, 90.0, True)
            if number == 0:
                keep()
                assert len(list(folder.glob("*.json"))) == (1, 3, 1)[len(asked) - 1]
        if len(asked) == 1:
            raise tool.StepError("killed")

    monkeypatch.setattr(tool.steps, "run_all", run_all)
    words = ["--data-root", str(photos), "--seeds", "1", "--jobs", "2", "--out", str(tmp_path)]
    out = tmp_path / f"{photos.name}_nano_10e"
    folder = out / "results"
    assert tool.main(words) == 1
    said = capsys.readouterr()
    assert "looking at the networks: 100%" in said.err
    assert said.err.endswith("\ncompare_families: killed\n")
    assert f"0 of 5 runs are in {folder}\n" in said.out
    found = [Result.read(path) for path in sorted(folder.glob("*.json"))]
    assert [(r.network, r.seed, r.minutes, r.loss) for r in found] == [
        ("swin_local_mlp", 0, 1.5, 1.25),
        ("swin", 0, 1.5, 1.25),
    ]
    assert [r.top1 for r in found] == [((1, 40.0), (2, 51.0)), ((1, 40.0), (2, 50.0))]
    assert (out / "comparison.md").read_text().count("\n") == 4
    assert tool.main(words) == 0
    said = capsys.readouterr().out
    table = (out / "comparison.md").read_text()
    assert [line.split(" | ")[0] for line in table.splitlines()[2:]] == [
        f"| `{n}`" for n in FAMILIES
    ]
    assert said.startswith(f"2 of 5 runs are in {folder}\n")
    end = f"2 runs in parallel; plot: {out}/comparison.png; each run: {folder}\n"
    assert said.endswith(f"{table}{end}") and (out / "comparison.png").is_file()
    places = {"data": str(photos.resolve()), "runs": str(out / "runs")}
    titles = [f"{name}, seed 0" for name in FAMILIES]
    assert asked == [(titles, out, places, ROOT, 2), (titles[2:], out, places, ROOT, 2)]
    made = ("runs", "results", "comparison.md", "comparison.png")
    assert prepared == [(out, made, str(photos.resolve()), False)] * 2
    assert tool.main([*words, "--fresh"]) == 0
    assert prepared[2][3] is True and asked[2][0] == titles


# The figures


@pytest.mark.parametrize("name", ["swin", "i_d_dw_conv", "dw_conv_channels_shared"])
def test_the_kept_results_are_of_todays_networks(tool, name):
    """What they compute, and their size: or the page's table is of others."""
    kept = Result.read(KEPT / f"{name}_seed0.json")
    (network,) = (
        n for n in tool.networks("nano", [name] if name not in FAMILIES else []) if n.name == name
    )
    assert kept.is_of(kept.recipe, comparison.fingerprint(network, 10, 64))
    assert not kept.is_of(kept.recipe, [mark * (1 + 2e-6) for mark in kept.fingerprint])
    assert kept.is_of(kept.recipe, [mark * (1 + 5e-7) for mark in kept.fingerprint])


def test_the_result_of_a_run(tmp_path):
    log(tmp_path, [2.0, 1.23456], [30.0, 40.0])
    network = Network("a", "dw_conv_nano", {"window_size": 5})
    kept = Result.read(KEPT / "dw_conv_seed0.json")
    found = comparison.result_of(network, 3, "r", (1.0, 2.0), tmp_path, 100.0, 10, 64)
    assert found == Result(
        *("a", 3, "r", (1.0, 2.0), found.parameters, found.flops, 1.67),
        *(((1, 30.0), (2, 40.0)), 1.2346),
    )
    assert 0.8 * kept.parameters < found.parameters < kept.parameters
    plain = comparison.result_of(replace(network, options={}), 3, "r", (), tmp_path, 1.0, 10, 64)
    assert (plain.parameters, plain.flops) == (kept.parameters, kept.flops)


@pytest.mark.parametrize("count", [2, 3, 5, 10, 11])
def test_the_interval_is_students(count):
    from scipy.stats import t

    base = tuple(result("a", seed, 50.0) for seed in range(count))
    ours = tuple(result("b", seed, 50.0 + seed % 3) for seed in range(count))
    differences = [seed % 3 for seed in range(count)]
    middle = sum(differences) / count
    variance = sum((d - middle) ** 2 for d in differences) / (count - 1)
    half = t.ppf(0.975, count - 1) * (variance / count) ** 0.5
    low, high = Entry(ours, base).interval
    assert (low, high) == pytest.approx((middle - half, middle + half), rel=1e-3)


def test_more_seeds_than_the_table_has_are_as_its_last():
    count = 12
    base = tuple(result("a", seed, 50.0) for seed in range(count))
    ours = tuple(result("b", seed, 50.0 + seed % 2) for seed in range(count))
    low, high = Entry(ours, base).interval
    # A standard deviation of half a point, of 12: sqrt(3 / 11).
    assert (high - low) / 2 == pytest.approx(2.228 * (3 / 11 / 12) ** 0.5)


def test_the_table_and_the_plot(tmp_path, figures):
    networks = [Network(n, n, {}, "swin") for n in ("swin", "b", "absent", "c")]
    runs = [result("swin", 0, 30.0), result("swin", 1, 32.0), result("b", 0, 33.0)]
    runs += [result("b", 1, 34.0), replace(result("c", 2, 35.0), minutes=3.25)]
    compared = comparison.entries(networks, runs)
    assert comparison.table(compared).splitlines() == [
        *comparison.HEAD,
        "| `swin` | 1.25M | 0.016G | 2.0 | 31.0 ± 1.4 | - | - | 30.0 32.0 | 81.3 |",
        "| `b` | 1.25M | 0.016G | 2.0 | 33.5 ± 0.7 | +2.5 | -3.9 to +8.9 | 33.0 34.0 | - |",
        "| `c` | 1.25M | 0.016G | 3.2 | 35.0 | - | - | 35.0 | - |",
    ]
    comparison.plot(compared, tmp_path / "a.png")
    left, right = figures[0].axes
    half = 12.706 * 0.5**0.5 * 0.5**0.5
    assert points(left)[:2] == [[(30.0, 0), (32.0, 0)], [(31.0, 0)]]
    (interval, middle, zero) = points(right)
    assert [x for x, _ in interval] == pytest.approx([2.5 - half, 2.5 + half], abs=0.1)
    assert [y for _, y in interval] == [1, 1] and middle == [(2.5, 1)]
    assert [x for x, _ in zero] == [0, 0]
    labels = [text.get_text() for text in left.get_yticklabels()]
    assert labels == ["swin", "b", "c"] and list(left.get_yticks()) == [0, 1, 2]
    # The first one is at the top, of both.
    for axes in (left, right):
        low, high = axes.get_ylim()
        assert low > high
        assert any(line.get_visible() for line in axes.get_xgridlines())
    assert left.get_xlabel() == "top-1, % (each seed, mean)"
    assert right.get_xlabel().startswith("difference to its family with the same seed")
    # Each seed is a dot, its mean a line; differences have another colour than zero.
    assert [line.get_marker() for line in left.lines] == ["o", "|"] * 3
    assert [line.get_marker() for line in right.lines] == ["None", "o", "None"]
    assert len({line.get_color() for line in (*left.lines, *right.lines)}) == 3
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.size == (11 * 110, int((1.2 + 0.28 * 3) * 110))


def test_a_result_is_written_whole(tmp_path):
    path = result("a", 4, 5.0).write(tmp_path / "new/folder")
    assert path == tmp_path / "new/folder/a_seed4.json"
    assert list(json.loads(path.read_text())) == list(Result.__dataclass_fields__)
    assert path.read_text().endswith("\n}\n") and os.listdir(path.parent) == [Path(path).name]
