"""The chain from photos to detector and segmentor: its commands, its verdict, the whole of it."""

import json
from pathlib import Path

import pytest
from PIL import Image

from tests.support import ROOT, load_tool, points, run_tool

pytest.importorskip("detectron2")
pytest.importorskip("mmseg")


@pytest.fixture(scope="module")
def tool():
    """``tools/demo_chain.py``."""
    return load_tool("demo_chain")


PLACES = dict.fromkeys(("photos", "ade", "out"), "folder") | {
    "d_dw_conv_nano": "d.pth",
    "i_d_dw_conv_nano": "i.pth",
}


def test_both_starts_differ_by_their_weights_alone(tool):
    steps = tool.downstream()
    assert len(steps) == 8
    for pretrained, random in zip(steps[::2], steps[1::2], strict=True):
        words = [step.argv(PLACES) for step in (pretrained, random)]
        more = [word for word in words[0] if word not in words[1]]
        file = "d.pth" if " d_dw" in pretrained.title else "i.pth"
        assert any(word.endswith(f".init={file}") for word in more)
        names = {word.replace("_pretrained", "_random") for word in more}
        assert len(names - set(words[1])) == 1


@pytest.mark.parametrize("phase", [0, 1])
def test_every_config_and_tool_is_there(tool, phase):
    steps = (tool.SCENES, *tool.pretraining(10)[phase], *tool.downstream())
    for step in steps:
        for word in step.argv(PLACES):
            if word.startswith(("tools/", "configs/")):
                assert (ROOT / word).is_file(), word


def test_parts_of_a_training(tool):
    points = [(step, float(step)) for step in range(4, 60, 5)]
    parts = tool.in_parts(points)
    assert len(parts) == tool.PARTS and parts == tuple(sorted(parts))
    assert sum(parts) / len(parts) == pytest.approx(sum(v for _, v in points) / len(points))
    won = tool.Contest("detector", "d_dw_conv_nano", 188, (3.0, 2.0), (3.1, 2.1))
    assert won.won
    # Ahead at the end alone, or level, is not enough.
    for losses in ((3.2, 2.0), (3.0, 2.1)):
        assert not tool.Contest("detector", "d_dw_conv_nano", 188, losses, (3.1, 2.1)).won


def test_what_is_not_a_full_match_is_refused(tool, tmp_path):
    import timm
    import torch

    import backbones  # noqa: F401

    network = timm.create_model("d_dw_conv_nano", num_classes=4)
    torch.save({"state_dict": network.state_dict()}, tmp_path / "whole.pth")
    matched = tool.full_match("d_dw_conv_nano", str(tmp_path / "whole.pth"))
    own = [k for k in network.state_dict() if k.startswith(("patch_embed.", "stages."))]
    assert matched == len(own)
    other = timm.create_model("d_dw_conv_nano", num_classes=4, window_size=5)
    torch.save({"state_dict": other.state_dict()}, tmp_path / "resized.pth")
    with pytest.raises(tool.StepError, match="not a full match"):
        tool.full_match("d_dw_conv_nano", str(tmp_path / "resized.pth"))


def test_missing_data_is_one_line(tool, tmp_path, capsys):
    (tmp_path / "photos/train/a").mkdir(parents=True)
    (tmp_path / "photos/val").mkdir()
    photos = ["--photos", str(tmp_path / "photos"), "--ade", "absent"]
    assert tool.main([*photos, "--out", str(tmp_path / "out")]) == 1
    said = capsys.readouterr().err
    assert said.startswith("demo_chain: --ade absent") and "images/training" in said
    assert said.count("\n") == 1


# The chain over the files that its steps would leave

NAMES = ("d_dw_conv_nano", "i_d_dw_conv_nano")
COMMANDS = {
    "scenes": "tools/make_scenes.py OUT/scenes --overwrite",
    "pretrain_{name}": "tools/pretrain.py configs/pretraining/{name}.py --resume --data-root PHOTOS"
    " --num-classes 3 --work-dir OUT/pretrained/{name} --cfg-options randomness.seed=0"
    " train_cfg.max_epochs=30 train_cfg.val_interval=10 param_scheduler.0.end=1"
    " param_scheduler.1.begin=1 param_scheduler.1.end=30",
    "publish_{name}": "tools/publish_checkpoint.py OUT/pretrained/{name}/epoch_30.pth"
    " --out OUT/published",
    "detector_{name}_random": "tools/train_detector.py"
    " --config-file configs/detection/cascade_mask_rcnn_{name}.py"
    " --train-json OUT/scenes/coco/annotations/instances_train2017.json"
    " --train-images OUT/scenes/coco/train2017 --output-dir OUT/detector/{name}_random --resume"
    " train.seed=0 train.max_iter=50 train.log_period=5 train.checkpointer.period=20"
    " optimizer.lr=1e-3",
    "segmentor_{name}_random": "tools/train_segmentor.py configs/segmentation/{name}_upernet.py"
    " --data-root ADE --short-side 128 --work-dir OUT/segmentor/{name}_random --resume"
    " --cfg-options randomness.seed=0 train_cfg.max_iters=80 train_cfg.val_interval=80"
    " default_hooks.logger.interval=5 default_hooks.checkpoint.interval=20"
    " param_scheduler.0.end=5 param_scheduler.1.begin=5 param_scheduler.1.end=80"
    " optim_wrapper.optimizer.lr=5e-4",
}
INIT = {"detector": " model.backbone.bottom_up.init=", "segmentor": " model.backbone.init="}
LINES = {
    template.format(name=name): command.format(name=name)
    for template, command in COMMANDS.items()
    for name in NAMES
}
LINES |= {
    step.replace("_random", "_pretrained"): command.replace("_random", "_pretrained")
    + INIT[step.partition("_")[0]]
    + f"OUT/published/{step.partition('_')[2].removesuffix('_random')}-9.pth"
    for step, command in LINES.items()
    if step.endswith("_random")
}
TOTALS = {"pretrain": 30, "detector": 50, "segmentor": 80}
# Of each step of a training: from random weights, and how much less from pretrained ones.
LOSSES, LESS = {5: 4.0, 25: 3.0, 26: 2.0, 50: 1.0}, 0.25


@pytest.fixture
def folders(tmp_path):
    """Photos of three classes, and folders as ADE20K's."""
    for part in ("photos/train/a", "photos/train/b", "photos/train/c", "photos/val"):
        (tmp_path / part).mkdir(parents=True)
    (tmp_path / "photos/train/list.txt").touch()
    for part in ("images/training", "annotations/training"):
        (tmp_path / "ade" / part).mkdir(parents=True)
    return tmp_path


@pytest.fixture
def recorded(tool, folders, monkeypatch):
    """Steps that leave their files at once; returns the calls, and what a test may change."""
    import timm
    import torch

    import backbones  # noqa: F401

    calls, change = [], {"less": LESS, "matched": ""}
    networks = {n: timm.create_model(n, num_classes=3).state_dict() for n in NAMES}
    own = ("patch_embed.", "stages.")
    entries = {n: sum(k.startswith(own) for k in w) for n, w in networks.items()}

    def train(step, out):
        head, _, run = step.name.partition("_")
        name, _, start = run.rpartition("_")
        less = change["less"] if start == "pretrained" else 0.0
        folder, log = out / head / run, []
        for iteration, value in LOSSES.items():
            if head == "detector":
                parts = {"loss_rpn_cls": value - less - 0.5, "loss_rpn_loc": 0.5}
                log.append({"iteration": iteration - 1, "total_loss": 9.0} | parts)
            else:
                log.append({"iter": iteration, "step": iteration, "loss": value - less, "lr": 0.1})
        if head == "detector":
            log.append({"iteration": 49, "bbox/AP": 1.0})
        path = folder / ("metrics.json" if head == "detector" else "1/vis_data/scalars.json")
        path.parent.mkdir(parents=True)
        path.write_text("".join(json.dumps(line) + "\n" for line in log))
        said = f"9 matched\n{change['matched'] or entries[name]} matched, 0 missing\n"
        (out / "logs" / f"{step.name}.log").write_text(said)

    def run_all(steps, out, places, state, lock, cwd, jobs):
        assert cwd == ROOT and isinstance(lock, int)
        calls.append(([step.name for step in steps], jobs))
        for step in steps:
            words = " ".join(step.argv(places)).replace(str(folders / "out"), "OUT")
            words = words.replace(str(folders / "photos"), "PHOTOS")
            assert words.replace(str(folders / "ade"), "ADE") == LINES[step.name]
            kind, _, name = step.name.partition("_")
            assert step.total == TOTALS.get(kind, 0)
            if kind == "publish":
                (out / "published").mkdir(exist_ok=True)
                for number in (1, 9):
                    path = out / "published" / f"{name}-{number}.pth"
                    torch.save({"state_dict": networks[name]}, path)
            elif kind in tool.HEADS:
                train(step, out)
            state.note(step, 30.0, True)

    monkeypatch.setattr(tool.steps, "run_all", run_all)
    return calls, change, entries


def run(tool, folders, *more):
    words = [f"--{key}={folders / key}" for key in ("photos", "ade", "out")]
    return tool.main([*words, "--jobs", "2", *more])


def test_a_chain_that_is_won(tool, folders, recorded, figures, capsys, monkeypatch):
    calls, _, entries = recorded
    prepared, prepare = [], tool.steps.prepare
    monkeypatch.setattr(
        tool.steps, "prepare", lambda *given: prepared.append(given) or prepare(*given)
    )
    monkeypatch.setattr(tool.steps, "sources_digest", lambda *given: str(given))
    assert run(tool, folders) == 0
    out = folders / "out"
    assert calls == [
        (["scenes", *(f"pretrain_{name}" for name in NAMES)], 2),
        ([f"publish_{name}" for name in NAMES], 2),
        (
            [
                f"{head}_{name}_{start}"
                for head in ("detector", "segmentor")
                for name in NAMES
                for start in ("pretrained", "random")
            ],
            2,
        ),
    ]
    made = ("scenes", "pretrained", "published", "detector", "segmentor", "chain.json", "chain.png")
    sources = (ROOT, ("backbones", "dense", "configs", "tools"), ())
    digest = f"{sources} {folders / 'photos'} {folders / 'ade'}"
    assert prepared == [(out, made, digest, False)]
    # Of halves of 25 iterations: the first two values and the last two.
    expected = [
        {"head": head, "backbone": name, "matched": entries[name]}
        | {"pretrained": [3.25, 1.25], "random": [3.5, 1.5]}
        for head in ("detector", "segmentor")
        for name in NAMES
    ]
    assert json.loads((out / "chain.json").read_text()) == expected
    titles = {"detector": "Cascade Mask R-CNN", "segmentor": "UPerNet"}
    assert capsys.readouterr().out.splitlines() == [
        *(
            f"{titles[c['head']]} on {c['backbone']}: {c['matched']} entries matched; "
            "loss pretrained/random 3.250/3.500 1.250/1.500"
            for c in expected
        ),
        f"6.5 minutes of steps, 2 in parallel; {out / 'chain.png'}",
    ]
    (figure,) = figures
    assert (out / "chain.png").read_bytes()[:4] == b"\x89PNG"
    assert [axes.get_title() for axes in figure.axes] == [
        f"{titles[c['head']]}, {c['backbone']}" for c in expected
    ]
    labels = ["loss of proposals"] * 2 + ["loss"] * 2
    for axes, label in zip(figure.axes, labels, strict=True):
        assert (axes.get_xlabel(), axes.get_ylabel()) == ("iteration", label)
        drawn = [list(LOSSES.items()), [(step, value - LESS) for step, value in LOSSES.items()]]
        assert points(axes) == drawn[::-1]
        legend = [text.get_text() for text in axes.get_legend().get_texts()]
        assert legend == ["pretrained", "random"]
        assert any(line.get_visible() for line in axes.get_xgridlines())
    with Image.open(out / "chain.png") as picture:
        assert picture.size == (2 * 5 * 110, 2 * 3.4 * 110)
    run(tool, folders, "--fresh")
    assert prepared[1][3] is True


def test_a_chain_that_is_lost(tool, folders, recorded, capsys):
    recorded[1]["less"] = -0.5
    assert run(tool, folders) == 1
    said = capsys.readouterr()
    pairs = [f"{head} on {name}" for head in ("detector", "segmentor") for name in NAMES]
    assert said.err == f"demo_chain: pretrained weights did not stay ahead: {', '.join(pairs)}\n"
    assert "loss pretrained/random 4.000/3.500 2.000/1.500" in said.out


def test_a_training_that_took_other_weights_is_told(tool, folders, recorded, capsys):
    recorded[1]["matched"] = "7"
    assert run(tool, folders) == 1
    count = recorded[2]["d_dw_conv_nano"]
    assert capsys.readouterr().err == (
        f"demo_chain: detector on d_dw_conv_nano did not take the {count} published entries\n"
    )


def test_the_progress_of_each_step(tool, tmp_path):
    trainings, publications = tool.pretraining(3)
    assert [step.position(tmp_path) for step in (*trainings, *tool.downstream())] == [0] * 10
    for epoch in (3, 12, 9):
        path = tmp_path / f"pretrained/i_d_dw_conv_nano/epoch_{epoch}.pth"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    assert [step.position(tmp_path) for step in trainings] == [0, 12]
    log = tmp_path / "detector/i_d_dw_conv_nano_random/metrics.json"
    log.parent.mkdir(parents=True)
    log.write_text('{"iteration": 4, "total_loss": 1.0}\n{"iteration": 19, "total_loss": 1.0}\n')
    assert [step.position(tmp_path) for step in tool.downstream()] == [0, 0, 0, 19, 0, 0, 0, 0]
    log.write_text('{"iteration": 4, "bbox/AP": 1.0}\n')
    assert tool.downstream()[3].position(tmp_path) == 0
    assert [step.title for step in (*trainings, *publications)] == [
        f"{verb} {name}" for verb in ("pretrain", "publish") for name in NAMES
    ]
    assert tool.downstream()[6].title == "train UPerNet on i_d_dw_conv_nano, pretrained"


def test_an_output_folder_in_the_checkout_is_named_from_there(tool, folders):
    args = tool.parse_args([f"--photos={folders}/photos/../photos", "--ade=ade"])
    found = tool.places(ROOT / "work_dirs/no_such_chain", args)
    assert found == {
        "photos": str(folders / "photos"),
        "ade": str(Path("ade").resolve()),
        "out": "work_dirs/no_such_chain",
        **dict.fromkeys(NAMES, ""),
    }


@pytest.mark.parametrize(
    ("missing", "said"),
    [
        ("photos/val", "--photos {}/photos: it has no val"),
        ("ade/annotations/training", "--ade {}/ade: it has no annotations/training"),
    ],
)
def test_every_folder_of_the_data_is_needed(tool, folders, missing, said, capsys):
    (folders / missing).rmdir()
    assert run(tool, folders) == 1
    assert capsys.readouterr().err == f"demo_chain: {said.format(folders)}\n"


@pytest.mark.chain
def test_the_whole_chain(tool, sample_data, tmp_path):
    if not (sample_data / "tiny_imagenet_10").is_dir():
        pytest.skip("DENSE_SAMPLE_DATA has no tiny_imagenet_10/: no photos to pretrain on")
    done = run_tool("demo_chain", "--out", tmp_path)
    print(done.stdout[-2500:])
    assert done.returncode == 0, done.stderr[-3000:]
    contests = json.loads((tmp_path / "chain.json").read_text())
    assert {(c["head"], c["backbone"]) for c in contests} == {
        (head, name) for head in tool.HEADS for name in tool.BACKBONES
    }
    for contest in contests:
        assert contest["matched"] > 150
        for pretrained, random in zip(contest["pretrained"], contest["random"], strict=True):
            assert pretrained < random
    assert (tmp_path / "chain.png").read_bytes()[:4] == b"\x89PNG"
    suffixes = {path.suffix for path in (tmp_path / "published").iterdir()}
    assert suffixes == {".pth", ".safetensors"}
