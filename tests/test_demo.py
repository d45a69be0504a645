import json
import os
import re
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
from PIL import Image

from dense import page as pages
from dense import report, runs, steps
from dense.demo import scenes
from dense.runs import RunError
from dense.steps import Step, StepError
from tests.pages import Page
from tests.support import ROOT, environment, load_tool

TOOL = ROOT / "tools" / "demo.py"


@pytest.fixture
def demo():
    return load_tool("demo")


def write_lines(path, *records):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


# The page


def test_losses_of_a_resumed_detectron2_run(tmp_path):
    write_lines(
        tmp_path / "metrics.json",
        {"iteration": 19, "total_loss": 3.0, "lr": 0.1},
        {"iteration": 39, "total_loss": 2.0, "loss_mask": 0.7, "lr": 0.1},
        {"iteration": 39, "total_loss": 1.5, "loss_mask": 0.6, "lr": 0.1},
    )
    with open(tmp_path / "metrics.json", "a") as file:
        file.write('{"iteration": 59, "total_lo')
    assert report.detectron2_losses(tmp_path / "metrics.json") == {
        "total_loss": [(19, 3.0), (39, 1.5)],
        "loss_mask": [(39, 0.6)],
    }


def test_losses_of_a_resumed_mmengine_run(tmp_path):
    for stamp, first, value in (("20260101_000000", 10, 2.0), ("20260102_000000", 20, 1.0)):
        write_lines(
            tmp_path / stamp / "vis_data" / "scalars.json",
            {"lr": 0.1, "loss": value, "decode.loss_ce": value / 2, "iter": first, "step": first},
            {"lr": 0.1, "loss": value, "decode.loss_ce": value / 2, "iter": 20, "step": 20},
            {"mIoU": 50.0, "step": 20},
        )
    assert report.mmengine_losses(tmp_path) == {
        "loss": [(10, 2.0), (20, 1.0)],
        "decode.loss_ce": [(10, 1.0), (20, 0.5)],
    }


def test_mmengine_results_are_the_newest(tmp_path):
    for stamp, value in (("20260101_000000", 1.0), ("20260102_000000", 2.0)):
        write_lines(tmp_path / stamp / f"{stamp}.json", {"mIoU": value})
        write_lines(tmp_path / stamp / "vis_data" / f"{stamp}.json", {"mIoU": 9.0})
    path, found = report.mmengine_results(tmp_path)
    assert path.parent.name == "20260102_000000" and found == {"mIoU": 2.0}
    with pytest.raises(FileNotFoundError, match=r"holds no .*json"):
        report.mmengine_results(tmp_path / "20260101_000000" / "vis_data")


@pytest.mark.parametrize(
    ("value", "least", "missed"),
    [(70.0, 70.0, False), (69.9, 70.0, True), (float("nan"), 70.0, True), (1.0, None, False)],
)
def test_a_figure_is_missed_below_its_least(value, least, missed):
    assert report.Figure("mIoU", value, least, "file").missed is missed


def test_plot_draws_every_curve_and_leaves_out_what_is_not_finite():
    svg = report.plot({"loss": [(1, 2.0), (2, float("nan")), (3, 1.0)], "aux": [(1, 1.0)]}, "Net")
    page = Page(svg)
    assert svg.startswith("<svg") and page.tags.count("svg") == 1
    assert page.is_self_contained
    assert svg.count('id="line2d_') >= 2


def test_the_page_is_whole_and_escaped(tmp_path):
    picture = tmp_path / "picture.jpg"
    Image.new("RGB", (8, 8), (200, 0, 0)).save(picture)
    text = report.render(
        title="a <title>",
        introduction="Why & how.",
        figures=[
            report.Figure("box AP50", 61.26, 60, "results.json"),
            report.Figure("mIoU", 12.0, 70, "x.json"),
        ],
        plots=[(report.plot({"loss": [(1, 2.0), (2, 1.0)]}, "Net"), "falls & falls")],
        rows=[report.Row("scene", {"truth": picture, "prediction": picture})],
        commands=[report.Command("train", "python train.py a='<b>'", 125.4)],
        facts={"torch": "2.11.0"},
    )
    page = Page(text)
    assert "<title>a &lt;title&gt;</title>" in text and "&lt;b&gt;" in text
    assert "falls &amp; falls" in text
    assert page.is_self_contained
    assert sum(value.startswith("data:image/jpeg;base64,") for value in page.loaded) == 2
    assert ["box AP50", "61.3", "60: reached", "results.json"] in page.rows
    assert ["mIoU", "12.0", "70: missed", "x.json"] in page.rows
    assert ["torch", "2.11.0"] in page.rows
    assert "train, 2:05" in text


# The demo's own part, over files as the tools write them


@pytest.fixture
def recorded(tmp_path):
    """A demo's folder as its steps leave it, with few scenes."""
    pytest.importorskip("detectron2")
    pytest.importorskip("mmseg")
    out = tmp_path / "demo"
    scenes.write_scenes(out / "scenes", scenes.SceneOptions(train=1, val=3, size=64))
    write_lines(out / "detector/metrics.json", {"iteration": 9, "total_loss": 3.0})
    box, mask = {"AP": 40.0, "AP50": 65.4, "APl": float("nan")}, {"AP": 30.0, "AP50": 55.0}
    write_lines(out / "detector/evaluation/results.json", {"bbox": box, "segm": mask})
    write_lines(out / "segmentor/2026/vis_data/scalars.json", {"iter": 10, "loss": 1.0})
    found = {"aAcc": 95.0, "mIoU": 77.7, "mAcc": 80.0}
    write_lines(out / "segmentor/evaluation/2026/2026.json", found)
    palette = [
        {"index": index, "name": name, "colour": [80 * index, 9, 9]}
        for index, name in enumerate(scenes.SEGMENTATION_CLASSES)
    ]
    (out / "predictions/segmentor/labels").mkdir(parents=True)
    (out / "predictions/segmentor/labels/classes.json").write_text(json.dumps(palette))
    ade = out / "scenes" / scenes.ADE_FOLDER / "images" / "validation"
    coco = out / "scenes" / scenes.COCO_FOLDER / "val2017"
    for folder, kind in ((coco, "detector"), (ade, "segmentor")):
        (out / "predictions" / kind / "overlays").mkdir(parents=True)
        for photo in folder.iterdir():
            target = out / "predictions" / kind / "overlays" / photo.name
            target.write_bytes(photo.read_bytes())
    (out / steps.STATE).write_text("{}")
    return out


def run_recorded(demo, recorded):
    digest = steps.sources_digest(
        ROOT,
        ("backbones", "dense", "configs", "tools"),
        (TOOL, Path(report.__file__), Path(pages.__file__)),
    )
    done = {step.name: {"seconds": 2.0, "done": True} for step in demo.STEPS}
    (recorded / steps.STATE).write_text(json.dumps({"sources": digest, "steps": done}))
    return demo.main(["--out", str(recorded)])


def test_page_of_recorded_files(demo, recorded, capsys):
    assert run_recorded(demo, recorded) == 0
    page = Page((recorded / "index.html").read_text())
    assert page.is_self_contained
    figures = {row[0]: row[1] for row in page.rows if len(row) == 4}
    assert figures["box AP50"] == "65.4" and figures["mask AP"] == "30.0"
    assert figures["mIoU"] == "77.7" and figures["pixel accuracy"] == "95.0"
    pictures = [value for value in page.loaded if value.startswith("data:image/")]
    # The stand-ins for both models' predictions are the photo itself.
    assert len(pictures) == 4 * 3 and len(set(pictures)) == 3 * 3
    assert (
        f"python {demo.STEPS[0].argv(demo.places(recorded))[0]}"
        in (recorded / "index.html").read_text()
    )
    assert "mIoU   77.7" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        (
            "detector/evaluation/results.json",
            {"bbox": {"AP": 9.0, "AP50": 59.9}, "segm": {"AP": 9.0, "AP50": 9.0}},
            "box AP50 is 59.9, below 60",
        ),
        (
            "segmentor/evaluation/2026/2026.json",
            {"aAcc": 9.0, "mIoU": 8.0},
            "mIoU is 8.0, below 70",
        ),
    ],
)
def test_a_missed_figure_fails_the_demo(demo, recorded, capsys, file, content, message):
    write_lines(recorded / file, content)
    assert run_recorded(demo, recorded) == 1
    assert message in capsys.readouterr().err
    assert "missed" in (recorded / "index.html").read_text()


def test_the_demo_counts_as_its_configs_do(demo):
    detectron2 = pytest.importorskip("detectron2.config")
    mmengine = pytest.importorskip("mmengine.config")
    detection = detectron2.LazyConfig.load(str(ROOT / demo.DETECTION_CONFIG))
    segmentation = mmengine.Config.fromfile(ROOT / demo.SEGMENTATION_CONFIG)
    assert detection.train.max_iter >= demo.DETECTION_ITERATIONS
    assert segmentation.train_cfg.max_iters == demo.SEGMENTATION_ITERATIONS
    assert detection.model.backbone.bottom_up.name == demo.BACKBONE
    assert segmentation.model.backbone.type == demo.BACKBONE


def test_a_folder_with_spaces_stays_one_word(demo, tmp_path):
    places = demo.places(tmp_path / "my demo")
    assert demo.STEPS[0].argv(places) == ["tools/make_scenes.py", f"{tmp_path}/my demo/scenes"]
    assert f"'{tmp_path}/my demo/scenes'" in demo.STEPS[0].line(places)


# Running steps


def script(folder, name, text):
    path = folder / f"{name}.py"
    path.write_text(text)
    return Step(name, f"do {name}", f"{path} {{out}}")


def run(steps_to_run, out, digest="code", fresh=False, jobs=1):
    with runs.locked(out) as lock:
        state = steps.prepare(out, ("made",), digest, fresh)
        steps.run_all(steps_to_run, out, {"out": str(out)}, state, lock, out, jobs)
        return state


COUNTING = "import sys, pathlib; open(pathlib.Path(sys.argv[1], 'made'), 'a').write('x')"


def test_what_is_known_is_kept_before_the_last_step_ends(tmp_path):
    """The second step ends only after the first one's result is kept."""
    out, kept = tmp_path / "out", tmp_path / "kept"
    wait = (
        "import time, pathlib\n"
        "end = time.monotonic() + 60\n"
        f"while not pathlib.Path({str(kept)!r}).exists():\n"
        "    assert time.monotonic() < end\n"
        "    time.sleep(0.05)\n"
    )
    todo = [script(tmp_path, "first", COUNTING), script(tmp_path, "second", wait)]
    with runs.locked(out) as lock:
        state = steps.prepare(out, ("made",), "code", False)
        steps.run_all(todo, out, {"out": str(out)}, state, lock, out, keep=kept.touch)
    assert all(map(state.done, todo))


def test_sequences_run_side_by_side_each_in_order(tmp_path):
    """The first step of either sequence waits for the other's, the second for its own first."""
    out = tmp_path / "out"
    meet = (
        "import sys, time, pathlib\n"
        "out, me, other = pathlib.Path(sys.argv[1]), {me!r}, {other!r}\n"
        "(out / me).touch()\n"
        "end = time.monotonic() + 60\n"
        "while not (out / other).exists():\n"
        "    assert time.monotonic() < end\n"
        "    time.sleep(0.05)\n"
        "(out / (me + '_met')).touch()"
    )
    after = "import sys, pathlib; assert (pathlib.Path(sys.argv[1]) / {name!r}).exists()"
    chains = [
        [
            script(tmp_path, me, meet.format(me=me, other=other)),
            script(tmp_path, f"after_{me}", after.format(name=f"{me}_met")),
        ]
        for me, other in (("a", "b"), ("b", "a"))
    ]
    state = run(chains, out, jobs=2)
    assert all(state.done(step) for chain in chains for step in chain)


def test_done_steps_are_not_done_again_until_the_code_changes(tmp_path):
    step, out = script(tmp_path, "counting", COUNTING), tmp_path / "out"
    state = run([step], out)
    assert state.done(step)
    run([step], out)
    assert (out / "made").read_text() == "x"
    (out / "theirs").write_text("kept")
    for change in ({"fresh": True}, {"digest": "other code"}):
        (out / "made").write_text("old")
        run([step], out, **{"digest": "code", **change})
        assert (out / "made").read_text() == "x"
    assert (out / "theirs").read_text() == "kept"


def test_a_failing_step_shows_its_log_and_is_tried_again(tmp_path):
    good = script(tmp_path, "good", COUNTING)
    bad = script(tmp_path, "bad", "raise SystemExit('the reason')")
    out = tmp_path / "out"
    with pytest.raises(StepError, match=r"(?s)do bad.*exit status 1.*bad\.py.*the reason"):
        run([good, bad], out)
    script(tmp_path, "bad", COUNTING)
    run([good, bad], out)
    assert (out / "made").read_text() == "xx"


def test_foreign_folders_are_refused(tmp_path):
    (tmp_path / "made").mkdir()
    with pytest.raises(StepError, match=r"made is there and was not made here"):
        steps.prepare(tmp_path, ("made",), "code", fresh=True)
    assert (tmp_path / "made").is_dir()
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="is a file"), runs.locked(tmp_path / "file"):
        pass


def test_a_step_that_outlives_its_run_keeps_others_out(tmp_path):
    step = script(tmp_path, "slow", "import time; time.sleep(60)")
    out = tmp_path / "out"
    program = (
        "import sys; from pathlib import Path; from dense import runs, steps\n"
        f"step = steps.Step('slow', 'slow', {step.template!r})\n"
        f"out = Path({str(out)!r})\n"
        "with runs.locked(out) as lock:\n"
        "    state = steps.prepare(out, (), 'code', False)\n"
        "    steps.run_all([step], out, {'out': str(out)}, state, lock, out)\n"
    )
    runner = subprocess.Popen(
        [sys.executable, "-c", program], env=environment(), start_new_session=True
    )
    try:
        wait_for(lambda: (out / steps.LOGS / "slow.log").exists())
        time.sleep(0.5)
        os.kill(runner.pid, signal.SIGKILL)
        runner.wait()
        with pytest.raises(RunError, match="outlived one"), runs.locked(out, patience=1):
            pass
    finally:
        os.killpg(runner.pid, signal.SIGKILL)
    wait_for(lambda: lock_is_free(out))


def lock_is_free(out):
    try:
        with runs.locked(out, patience=0):
            return True
    except RunError:
        return False


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.1)


def test_digest_sees_changes_in_code_alone(tmp_path):
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "a.py").write_text("a = 1")
    left_out = tmp_path / "package" / "page.py"
    left_out.write_text("p = 1")

    def digest():
        return steps.sources_digest(tmp_path, ("package",), (left_out,))

    before = digest()
    left_out.write_text("p = 2")
    (tmp_path / "package" / "notes.md").write_text("text")
    assert digest() == before
    (tmp_path / "package" / "a.py").write_text("a = 2")
    assert digest() != before


# The whole of it


@pytest.mark.e2e
def test_the_whole_demo_goes_on_after_a_kill(tmp_path):
    out = tmp_path / "demo"
    command = [sys.executable, str(TOOL), "--out", str(out)]
    killed = subprocess.Popen(command, env=environment(), start_new_session=True)
    try:
        wait_for(lambda: list((out / "detector").glob("model_*.pth")), seconds=3600)
    finally:
        os.killpg(killed.pid, signal.SIGKILL)
        killed.wait()
    wait_for(lambda: lock_is_free(out))

    finished = subprocess.run(
        command, env=environment(), capture_output=True, text=True, check=False
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    log = (out / "logs" / "train_detector.log").read_text()
    resumed = [int(n) for n in re.findall(r"Starting training from iteration (\d+)", log)]
    assert resumed[0] == 0 and resumed[-1] > 0

    page = Page((out / "index.html").read_text())
    assert page.is_self_contained
    measured = ("box AP50", "mIoU")
    figures = {row[0]: float(row[1]) for row in page.rows if row[0] in measured}
    print(figures)
    assert figures["box AP50"] >= 60 and figures["mIoU"] >= 70
    results = json.loads((out / "detector/evaluation/results.json").read_text())
    assert figures["box AP50"] == pytest.approx(results["bbox"]["AP50"], abs=0.06)
    assert sum(value.startswith("data:image/") for value in page.loaded) == 24
    assert page.tags.count("svg") == 2
    if find_spec("onnxruntime"):
        figures_through_onnx(out)


def figures_through_onnx(out: Path) -> None:
    """The demo's detector and segmentor as ONNX files have its AP and mIoU, to 0.1."""
    coco, tested = out / "scenes" / scenes.COCO_FOLDER, out / "through_onnx"
    photos, truth = coco / "val2017", coco / "annotations/instances_val2017.json"
    for part in ("detector", "segmentor"):
        tool("export", out / part, "--to", "onnx", "--photos", photos)
    tool(
        *("train_detector", "--config-file", out / "detector/config.yaml", "--eval-only"),
        *("--num-gpus", 0, "--output-dir", tested / "detector"),
        *("--val-json", truth, "--val-images", photos),
        f"train.init_checkpoint={out / 'detector/detector.onnx'}",
    )
    (config,) = (out / "segmentor").glob("*.py")
    file = out / "segmentor/segmentor.onnx"
    tool("test_segmentor", config, file, "--work-dir", tested / "segmentor")
    ours, true = (
        json.loads((folder / "results.json").read_text())
        for folder in (tested / "detector", out / "detector/evaluation")
    )
    for kind in ("bbox", "segm"):
        for name in ("AP", "AP50"):
            assert ours[kind][name] == pytest.approx(true[kind][name], abs=0.1)
    ours, true = (
        report.mmengine_results(folder)[1]
        for folder in (tested / "segmentor", out / "segmentor/evaluation")
    )
    assert ours["mIoU"] == pytest.approx(true["mIoU"], abs=0.1)


def tool(name: str, *words) -> None:
    command = [sys.executable, str(ROOT / f"tools/{name}.py"), *map(str, words)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
