"""Networks side by side: one recipe, results that are kept by network, differences in pairs."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from mmengine.config import Config, DictAction

from dense.analysis import comparison
from dense.analysis.comparison import Entry, Network, Result
from dense.steps import State
from tests.support import ROOT, load_tool, points

PRETRAINING = ROOT / "configs/pretraining"


@pytest.fixture(scope="module")
def tool():
    """``tools/compare_families.py``."""
    return load_tool("compare_families")


@pytest.fixture
def arguments(tool, photos):
    """A function of more words: the parsed command line for the photos."""

    def parse(*words: str):
        return tool.parse_args(["--data-root", str(photos), "--epochs", "8", *words])

    return parse


def result(network: str, seed: int, top1: float) -> Result:
    return Result(
        network, seed, "r", (1.0,), 1_250_000, 16_000_000, 2.0, ((1, 9.0), (8, top1)), 1.5
    )


def log(work_dir: Path, losses: list[float], top1: list[float]) -> Path:
    """A training's log, two iterations an epoch."""
    path = work_dir / "20260101_000000/vis_data/scalars.json"
    path.parent.mkdir(parents=True)
    with open(path, "w") as file:
        for epoch, (loss, accuracy) in enumerate(zip(losses, top1, strict=True), start=1):
            step = 2 * epoch
            line = {"loss": loss, "lr": 0.1, "epoch": epoch, "iter": step, "step": step}
            file.write(json.dumps(line) + "\n")
            file.write(json.dumps({"top1": accuracy, "top5": 99.0, "step": epoch}) + "\n")
    return work_dir


def test_the_log_of_a_run(tmp_path):
    assert comparison.read_log(log(tmp_path / "a", [2.0, 1.0], [50.0, 30.0])) == (
        ((1, 50.0), (2, 30.0)),
        1.0,
    )


def test_a_run_without_a_validation_is_named(tmp_path):
    folder = log(tmp_path / "a", [2.0], [50.0])
    path = next(folder.glob("*/vis_data/scalars.json"))
    path.write_text(path.read_text().splitlines()[0])
    with pytest.raises(ValueError, match="a has no validation in its log"):
        comparison.read_log(folder)


def test_mean_spread_and_paired_difference():
    # Differences of the same seeds are 2, 1 and 3: mean 2, standard deviation 1, t(2 degrees of
    # freedom) 4.3027, so the interval is 2 ± 4.3027 / sqrt(3) = 2 ± 2.484.
    base = tuple(result("dw_conv", seed, top1) for seed, top1 in ((0, 50.0), (1, 60.0), (2, 40.0)))
    ours = tuple(result("other", seed, top1) for seed, top1 in ((2, 43.0), (0, 52.0), (1, 61.0)))
    entry = Entry(ours, base)
    assert sorted(entry.differences) == [1.0, 2.0, 3.0]
    assert entry.interval == pytest.approx((-0.4841, 4.4841), abs=1e-3)
    assert (
        "| 1.25M | 0.016G | 2.0 | 52.0 ± 9.0 | +2.0 | -0.5 to +4.5 | 43.0 52.0 61.0 | - |"
        in entry.row()
    )
    alone = Entry(base[:1])
    assert alone.interval is None and "| 50.0 | - | - | 50.0 | 81.3 |" in alone.row()
    # A seed that the baseline lacks has no pair.
    assert Entry(ours, base[:2]).differences == [2.0, 1.0]


def test_entries_are_in_order_and_sorted_by_seed(tmp_path, figures):
    networks = [Network("swin", "swin_nano", {}, "swin"), Network("b", "b", {}, "swin")]
    results = [result("b", 1, 10.0), result("swin", 1, 30.0), result("b", 0, 20.0)]
    first, second = comparison.entries(networks, results)
    assert first.baseline == () and second.top1 == [20.0, 10.0]
    assert second.differences == [-20.0]
    assert comparison.plot([first, second], tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"
    left, right = figures[0].axes
    # Each seed and the mean; the interval, the difference's mean, and zero.
    assert points(left) == [[(30.0, 0)], [(30.0, 0)], [(20.0, 1), (10.0, 1)], [(15.0, 1)]]
    assert points(right)[:2] == [[(-20.0, 1), (-20.0, 1)], [(-20.0, 1)]]
    assert comparison.table([first, second]).count("\n") == 3


# Which results still count


def test_a_result_is_of_its_recipe_and_network(tmp_path):
    one = result("a", 0, 5.0)
    assert Result.read(one.write(tmp_path)) == one
    assert one.is_of("r", (1.0 + 1e-9,)) and not one.is_of("s", (1.0,))
    assert not one.is_of("r", (1.0001,)) and not one.is_of("r", (1.0, 2.0))


@pytest.mark.parametrize(
    "change",
    [
        dict(top1=[]),
        dict(top1=[[1]]),
        dict(top1=[[1, "x"]]),
        dict(fingerprint=["x"]),
        dict(minutes="x"),
        dict(other=1),
        None,
    ],
)
def test_a_damaged_result_is_named(change, tmp_path):
    path = result("a", 0, 5.0).write(tmp_path)
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | change) if change else "{}")
    with pytest.raises(ValueError, match="a_seed0.json is no result of a comparison"):
        Result.read(path)


@pytest.mark.parametrize("family", ["swin", "i_d_dw_conv"])
def test_the_fingerprint_repeats_and_leaves_the_random_state(family):
    network = Network("a", f"{family}_nano")
    before = torch.random.get_rng_state()
    one = comparison.fingerprint(network, 10, 32)
    assert one == comparison.fingerprint(network, 10, 32)
    assert torch.random.get_rng_state().equal(before)
    # Without batch norms, training and evaluation agree.
    assert len(set(one)) == (4 if family == "swin" else 5)


def _scaled_weights(model):
    model.stages[0].blocks[0].mlp.fc1.weight.data.mul_(1.001)


def _no_gelu(model):
    model.stages[1].blocks[0].mlp.act = torch.nn.Identity()


def _momentum(model):
    model.stages[0].blocks[0].norm2.momentum = 0.2


def _no_gradient(model):
    model.patch_embed.proj.weight.register_hook(torch.zeros_like)


@pytest.mark.parametrize("change", [_scaled_weights, _no_gelu, _momentum, _no_gradient])
def test_the_fingerprint_notices_a_change_of(change, monkeypatch):
    network = Network("a", "dw_conv_nano")
    before = comparison.fingerprint(network, 10, 32)
    create = timm.create_model

    def changed(*args, **kwargs):
        model = create(*args, **kwargs)
        change(model)
        return model

    monkeypatch.setattr(timm, "create_model", changed)
    after = comparison.fingerprint(network, 10, 32)
    assert not replace(result("a", 0, 1.0), fingerprint=before).is_of("r", after)


# The plan


@pytest.fixture
def quick_marks(monkeypatch):
    """Fingerprints that cost nothing."""
    monkeypatch.setattr(comparison, "fingerprint", lambda network, *_: (float(len(network.name)),))


@pytest.mark.usefixtures("quick_marks")
def test_all_networks_have_one_recipe(tool, arguments):
    planned = tool.plan(arguments("--seeds", "2", "--ablations", "dw_conv_se", "swin_s*"), 3)
    names = list({run.network.name: None for run in planned})
    assert names[:6] == [*names[:5], "dw_conv_se"] and {"swin_se", "swin_sliding"} <= set(names)
    assert [run.seed for run in planned] == [0] * len(names) + [1] * len(names)
    recipes = set()
    for run in planned:
        words = run.step.argv({"data": "photos", "runs": "runs"})
        cfg = Config.fromfile(ROOT / words[1])
        options = dict(word.split("=") for word in words[words.index("--cfg-options") + 1 :])
        cfg.merge_from_dict({k: DictAction._parse_iterable(v) for k, v in options.items()})
        family = run.network.baseline
        assert cfg.model.pop("name") == f"{family}_nano"
        assert cfg.randomness.pop("seed") == run.seed
        assert ("--ablation" in words) == (run.network.name != family)
        if "--ablation" in words:
            assert words[words.index("--ablation") + 1] == run.network.name
        assert cfg.train_cfg.max_epochs == cfg.param_scheduler[1].end == 8
        assert cfg.param_scheduler[0].end == cfg.param_scheduler[1].begin == 1
        recipes.add(json.dumps(cfg.to_dict(), sort_keys=True, default=str))
    assert len(recipes) == 1


def test_the_pages_table_is_of_the_kept_results(tool):
    results = [Result.read(path) for path in (PRETRAINING / "comparison").glob("*.json")]
    found = comparison.entries(tool.networks("nano", ["all"]), results)
    assert {tuple(run.seed for run in entry.results) for entry in found} == {(0, 1, 2)}
    assert comparison.table(found) in (PRETRAINING / "README.md").read_text()


def test_all_rows_but_heads_in_between(tool):
    names = [network.name for network in tool.networks("nano", ["all"])]
    assert {"swin_heads_of_1", "swin_local_mlp_heads_of_32", "i_d_dw_conv_local"} <= set(names)
    assert not [name for name in names if re.search("_of_(2|8|16|96)$", name)]
    assert not [name for name in names if name.startswith(("volo", "twins"))]


@pytest.mark.usefixtures("quick_marks")
def test_a_recipe_is_of_its_data_and_options(tool, arguments, photos, tmp_path):
    args = arguments("--seeds", "1")
    before = {run.network.name: run.recipe for run in tool.plan(args, 3)}
    assert len(set(before.values())) == len(before)
    assert {r.network.name: r.recipe for r in tool.plan(args, 3)} == before
    # Whatever the order that they are named in.
    given = {"se_ratio": 0.1, "window_size": 5}
    networks = (Network("a", "swin_nano", o) for o in (given, dict(reversed(given.items()))))
    config = "configs/pretraining/swin_nano.py"
    assert len({tool.recipe_of(config, network, "", photos) for network in networks}) == 1
    args.epochs = 10
    assert not set(before.values()) & {run.recipe for run in tool.plan(args, 3)}


@pytest.mark.usefixtures("quick_marks")
def test_finished_runs_are_kept_and_others_run(tool, arguments, photos, tmp_path, monkeypatch):
    """A second call runs nothing; another network's change runs that network alone."""
    ran = []

    def run_all(todo, out, places, state: State, *_):
        for number, step in enumerate(todo):
            ran.append(step.title)
            log(out / "runs" / step.name, [2.0], [50.0 + number])
            state.note(step, 60.0, True)

    monkeypatch.setattr(tool.steps, "run_all", run_all)
    args = arguments("--seeds", "1", "--out", str(tmp_path), "--results", str(tmp_path / "kept"))
    tool.run(args)
    assert len(ran) == 5 and len(list((tmp_path / "kept").glob("*.json"))) == 5
    args = arguments(
        "--seeds", "1", "--out", str(tmp_path / "b"), "--results", str(tmp_path / "kept")
    )
    tool.run(args)
    assert len(ran) == 5
    marks = comparison.fingerprint

    def changed(network, *rest):
        found = marks(network, *rest)
        return (found[0] * 1.01, *found[1:]) if network.name == "swin" else found

    monkeypatch.setattr(comparison, "fingerprint", changed)
    tool.run(args)
    assert ran[5:] == ["swin, seed 0"]


@pytest.mark.parametrize(
    ("args", "reason"),
    [
        (["--data-root", "absent"], "no photos in .*absent/train"),
        (["--data-root", "{photos}/train"], "no photos in"),
        (["--data-root", "{photos}", "--ablations", "nonsense"], "--ablations nonsense: none of"),
        (["--data-root", "{photos}", "--ablations", "volo_d1"], "--ablations volo_d1: none of"),
    ],
)
def test_what_is_wrong_is_one_line(tool, photos, tmp_path, capsys, args, reason):
    argv = [arg.format(photos=photos) for arg in args]
    assert tool.main([*argv, "--out", str(tmp_path / "out")]) == 1
    said = capsys.readouterr().err
    assert said.startswith("compare_families: ") and said.count("\n") == 1
    assert re.search(reason, said)


def test_options_without_sense(tool, capsys):
    with pytest.raises(SystemExit):
        tool.parse_args(["--data-root", "photos", "--epochs", "1"])
    assert "--epochs 1: 2 or more" in capsys.readouterr().err
