"""What the report of a training says of its logs, without a training."""

import json
import logging
import shutil
import signal
from types import SimpleNamespace

import numpy as np
import pytest

from dense import page as pages
from dense import report, run_report
from dense.run_report import Judged, ReportError, Verdict
from tests.pages import Page
from tests.support import load_tool

Config = pytest.importorskip("mmengine.config").Config

from dense.recipes import RECIPES  # noqa: E402

NANO = RECIPES / "pretraining/dw_conv_nano.py"


@pytest.fixture
def folder(tmp_path):
    """A training in two starts: four epochs of ten iterations, its accuracies and its costs."""
    cfg = Config.fromfile(NANO)
    cfg.train_cfg.max_epochs = 4
    cfg.dump(tmp_path / "dw_conv_nano.py")
    log = tmp_path / "20261128_120000/vis_data/scalars.json"
    log.parent.mkdir(parents=True)
    lines = []
    for epoch, top1 in enumerate((50.0, 70.0, 60.0, 65.0), 1):
        costs = {"time": 0.25 * epoch, "data_time": 0.1, "images_per_second": 10.0 * epoch}
        step = {"epoch": epoch, "iter": 10 * epoch, "step": 10 * epoch, "lr": 1e-3}
        lines.append({"loss": 3.0 / epoch, "memory_mb": 400.0 + epoch, **costs, **step})
        lines.append({"top1": top1, "top5": 90.0, "step": epoch})
    log.write_text("".join(json.dumps(line) + "\n" for line in lines))
    start = {
        **{"config": str(NANO), "machine": "x86_64, 2 cores", "device": "CPU, 2 threads"},
        **{"precision": "float32", "batch": 8, "images": 1024, "steps": 40},
        **{"versions": {"python": "3.11.7", "torch": "2.9.0"}},
    }
    first = {"command": "python pretrain.py", "began": "2026-11-28T12:00:00", "weights": "random"}
    second = {"command": "python pretrain.py --resume", "began": "2026-11-28T13:00:00"}
    second |= {"weights": "resumed", "seconds": 90.0, "peak_memory_mb": 512}
    (tmp_path / "run.json").write_text(json.dumps([start | first, start | second]))
    return tmp_path


def test_the_report_says_what_the_logs_do(folder):
    page = Page(run_report.write(folder, images=0).read_text())
    assert [float(cell) for cell in page.row("top1")] == [65.0, 40, 70.0, 20]
    assert [float(cell) for cell in page.row("top5")] == [90.0, 40, 90.0, 10]
    assert page.row("peak memory (MB)") == ["512"]
    assert page.row("seconds an iteration, median") == ["0.62"]
    assert float(page.row("images a second, median")[0]) == 25
    assert page.row("device") == ["CPU, 2 threads"] and page.row("torch") == ["2.9.0"]
    assert "python pretrain.py --resume" in page.text
    assert page.row("train_cfg.max_epochs")[1] == "4"
    assert all(title in page.text for title in ("Losses", "Validation", "Learning rate"))
    assert "in 2 starts, finished" in page.text
    assert not page.pictures


def test_the_tools_options_reach_the_report(monkeypatch):
    given = []
    monkeypatch.setattr(run_report, "write", lambda *options: given.append(options))
    assert load_tool("report").main(["mine", "--images", "3", "--out", "page.html"]) == 0
    assert given == [("mine", 3, "page.html")]


def test_what_cannot_be_reported_is_one_line(tmp_path, capsys):
    assert load_tool("report").main([str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert said.startswith("report: ") and said.count("\n") == 1


def test_an_image_is_judged_by_the_classes_that_truth_or_prediction_has():
    reporting = pytest.importorskip("dense.segmentation.reporting")
    truth, found = np.array([[0, 0, 255]]), np.array([[0, 1, 2]])
    # 1 of 2 pixels of the first class, 0 of 1 of the second; the third is where none counts.
    assert reporting._miou(found, truth, 4) == 25.0
    assert reporting._miou(found, np.full_like(truth, 255), 4) is None


@pytest.fixture
def provider(monkeypatch) -> SimpleNamespace:
    """In place of a training's own module: values by the config's name, a table, no pictures."""

    def config_values(path):
        if path.suffix == ".yaml":
            raise ValueError("no\n  config")
        lr = 0.1 if path == NANO else 0.2
        return {"a": {"lr": lr, "steps": (1, 2)}, "b": [1, 2]}

    table = pages.Table(["class", "top-1"], [["cat", 5.0]])
    found = SimpleNamespace(config_values=config_values, per_class=lambda run: table)
    found.judged = lambda run, images: Verdict((), "x", "y")
    found.table, found.named = table, []
    monkeypatch.setattr(run_report, "import_module", lambda n: found.named.append(n) or found)
    return found


@pytest.fixture
def written(provider, monkeypatch):
    """A function that writes a report: its title, its introduction, and the blocks by section.

    Plots are what is plotted.
    """
    told = []
    monkeypatch.setattr(pages, "render", lambda *arguments: told.append(arguments) or "the page")
    monkeypatch.setattr(pages, "plot", lambda curves, *names, **more: (curves, *names, more))

    def write(folder, **options):
        path = run_report.write(folder, **options)
        assert path.read_text() == "the page"
        title, introduction, sections = told.pop()
        return title, introduction, {section.title: section.blocks for section in sections}

    return write


def entries(folder, *changes: dict):
    """Rewrite ``run.json``: an entry for each change to the last one."""
    last = json.loads((folder / "run.json").read_text())[-1]
    (folder / "run.json").write_text(json.dumps([last | change for change in changes]))


def lines(folder, *found: dict):
    [log] = folder.glob("*/vis_data/scalars.json")
    log.write_text("".join(json.dumps(line) + "\n" for line in found))


def test_every_section_of_a_report(folder, written, provider):
    title, introduction, blocks = written(folder)
    assert title == folder.name and provider.named == ["dense.pretraining.reporting"]
    assert introduction == (
        "40 steps of 8 of 1,024 images on CPU, 2 threads in float32, random; begun 2026-11-28 at "
        "12:00:00, in 2 starts, finished."
    )
    config = folder / "dw_conv_nano.py"
    curves = [
        [(10 * n, value) for n, value in enumerate(v, 1)] for v in ((50, 70, 60, 65), [90] * 4)
    ]
    validation = dict(zip(("top1", "top5"), curves, strict=True))
    losses = {"loss": [(10, 3.0), (20, 1.5), (30, 1.0), (40, 0.75)]}
    rates = {"learning rate": [(10 * n, 1e-3) for n in range(1, 5)]}
    assert blocks == {
        "Result": [
            pages.Table(
                ["measure (%)", "last", "iteration", "best", "at iteration"],
                [["top1", 65.0, 40, 70.0, 20], ["top5", 90.0, 40, 90.0, 10]],
            )
        ],
        "Curves": [
            pages.Plots(
                [
                    ((losses, "Losses", {}), ""),
                    ((validation, "Validation", {"ylabel": "%"}), ""),
                    ((rates, "Learning rate", {"ylabel": ""}), ""),
                ]
            )
        ],
        "Classes": [provider.table],
        "Best and worst validation images": [
            pages.Text("No pictures: no validation image has a truth to compare with.")
        ],
        "Time and memory": [
            pages.Facts(
                {
                    "training, of the starts that came to an end": "1:30",
                    "seconds an iteration, median": 0.625,
                    "of these, waiting for data": "16%",
                    "images a second, median": 25.0,
                    "peak memory (MB)": 512,
                }
            )
        ],
        "Config": [
            pages.Text("1 values differ from dw_conv_nano.py:"),
            pages.Table(["key", "there", "here"], [["a.lr", "0.1", "0.2"]], stacked=True),
            pages.Code("The whole config, dw_conv_nano.py:", config.read_text()),
        ],
        "Environment": [
            pages.Code("Begun 2026-11-28T12:00:00:", "python pretrain.py"),
            pages.Code("Begun 2026-11-28T13:00:00:", "python pretrain.py --resume"),
            pages.Facts(
                {
                    **{"device": "CPU, 2 threads", "machine": "x86_64, 2 cores"},
                    **{"python": "3.11.7", "torch": "2.9.0"},
                }
            ),
        ],
    }


def test_a_report_of_a_folder_without_what_is_recorded_now(folder, written, provider):
    (folder / "run.json").unlink()
    provider.per_class = lambda run: None
    (introduction, blocks) = written(folder, images=0)[1:]
    assert introduction == "A training of dw_conv_nano.py."
    assert blocks["Classes"] == [pages.Text("There is no evaluation by class yet.")]
    assert blocks["Best and worst validation images"] == []
    missing = "Which recipe it is based on is not recorded, or it was moved."
    assert blocks["Config"][0] == pages.Text(missing) and len(blocks["Config"]) == 2
    assert blocks["Environment"] == [
        pages.Text("Not recorded; now there are:"),
        pages.Facts(report.versions()),
    ]
    facts = blocks["Time and memory"][0].values
    assert list(facts)[0] == "seconds an iteration, median" and facts["peak memory (MB)"] == 404


def test_a_report_of_a_training_that_has_just_begun(folder, written):
    entries(folder, {"images": None, "steps": 4000, "began": "2026-11-28T09:00:00"})
    content = json.loads((folder / "run.json").read_text())
    del content[0]["seconds"]
    (folder / "run.json").write_text(json.dumps(content))
    lines(folder, {})
    introduction, blocks = written(folder)[1:]
    assert introduction == (
        "4,000 steps of 8 images on CPU, 2 threads in float32, resumed; begun 2026-11-28 at "
        "09:00:00, not finished, or stopped."
    )
    [text] = blocks["Result"]
    assert "no losses and no metrics yet" in text.text and blocks["Curves"] == []
    assert blocks["Time and memory"] == [pages.Facts({"time": "not logged yet"})]
    # Losses without a validation, and a validation of nothing.
    lines(folder, {"loss": 2.0, "iter": 5, "step": 5, "memory": 700.6, "time": 0.01234})
    blocks = written(folder)[2]
    assert blocks["Result"] == [pages.Text("There is no validation yet.")]
    assert blocks["Curves"] == [pages.Plots([(({"loss": [(5, 2.0)]}, "Losses", {}), "")])]
    facts = {"seconds an iteration, median": 0.0123, "peak memory (MB)": 701}
    assert blocks["Time and memory"] == [pages.Facts(facts)]
    nan = float("nan")
    lines(
        folder,
        *({"mIoU": 7.0, "mAcc": nan, "step": 5}, {"mIoU": nan, "mAcc": nan, "step": 9}),
    )
    blocks = written(folder)[2]
    rows = [["mIoU", None, 9, 7.0, 5], ["mAcc", None, 9, None, None]]
    assert blocks["Result"][0].rows == rows
    assert [names for (_, names, _), _ in blocks["Curves"][0].plots] == ["Validation"]
    lines(folder, {"mIoU": nan, "step": 5})
    assert written(folder)[2]["Curves"] == [pages.Plots([])]


def test_what_a_config_is_based_on(folder, written, tmp_path):
    other = tmp_path / "kept/dw_conv_nano.py"
    other.parent.mkdir()
    shutil.copy(NANO, other)
    (other.parent / "broken.yaml").touch()
    unknown = "Which recipe it is based on is not recorded, or it was moved."
    for config, said in (
        (other, "As dw_conv_nano.py."),
        (folder / "dw_conv_nano.py", unknown),
        (tmp_path / "gone.py", unknown),
        (other.parent / "broken.yaml", f"{other.parent / 'broken.yaml'} cannot be read: no config"),
    ):
        # Of two starts the first that has one.
        entries(folder, {"config": None}, {"config": str(config)}, {"config": str(NANO)})
        blocks = written(folder)[2]["Config"]
        assert blocks[0] == pages.Text(said) and len(blocks) == 2
        assert isinstance(blocks[1], pages.Code)


def judged(score: float, *shown: str) -> Judged:
    pictures = {name: lambda name=name: f"{name} of {score}" for name in shown or ("both",)}
    return Judged(f"{score:.0f}.jpg", score, pictures)


@pytest.mark.parametrize(
    "count, best, worst",
    [
        (1, [0], []),
        (2, [1], [0]),
        (3, [2, 1], [0]),
        (5, [4, 3, 2], [0, 1]),
        (8, [7, 6, 5, 4], [0, 1, 2, 3]),
        (11, [10, 9, 8, 7], [0, 1, 2, 3]),
    ],
)
def test_the_best_and_the_worst_are_shown_once(folder, written, provider, count, best, worst):
    asked = []
    images = [judged(float(n)) for n in range(0, count, 2)] + [
        judged(float(n)) for n in range(1, count, 2)
    ]
    verdict = Verdict(images, "its score", "a model", {"cat": (1, 2, 3)})
    provider.judged = lambda *arguments: asked.append(arguments) or verdict
    text, legend, found = written(folder, images=7)[2]["Best and worst validation images"]
    assert asked == [(folder, 7)]
    assert text.text == (
        f"Of {count} validation images drawn at random, by its score; median "
        f"{(count - 1) / 2:.1f}. Predictions: a model."
    )
    assert legend == pages.Legend({"cat": (1, 2, 3)})
    assert found == pages.Pictures(
        [
            pages.Picture(
                f"both of {float(n)}", f"both, {n}.jpg", f"{what} {place}: {n}.jpg, {n}.0. both"
            )
            for what, group in (("best", best), ("worst", worst))
            for place, n in enumerate(group, 1)
        ]
    )


def test_truth_stands_beside_prediction(folder, written, provider):
    images = [judged(1.25, "truth", "found"), judged(7.0, "truth")]
    provider.judged = lambda *_: Verdict(images, "score", "model")
    text, compared = written(folder)[2]["Best and worst validation images"]
    assert "median 4.1." in text.text
    assert compared == pages.Compared(
        [
            ("best 1: 7.jpg, 7.0", [pages.Picture("truth of 7.0", "truth, 7.jpg", "truth")]),
            (
                "worst 1: 1.jpg, 1.2",
                [
                    pages.Picture("truth of 1.25", "truth, 1.jpg", "truth"),
                    pages.Picture("found of 1.25", "found, 1.jpg", "found"),
                ],
            ),
        ]
    )


def test_a_report_goes_without_pictures_that_cannot_be_drawn(folder, written, provider, caplog):
    def moved(*_):
        raise FileNotFoundError("the data\n was moved")

    provider.judged = moved
    said = [pages.Text("No pictures: the data was moved")]
    assert written(folder)[2]["Best and worst validation images"] == said
    assert "no pictures: the data\n was moved" in caplog.text


def test_what_no_report_can_be_of(folder, written, provider, tmp_path):
    with pytest.raises(ReportError, match=f"there is no folder {tmp_path}/gone$"):
        run_report.write(tmp_path / "gone")
    other = tmp_path / "other"
    other.mkdir()
    with pytest.raises(ReportError, match="no config"):
        run_report.write(other)
    (other / "cascade.py").write_text("default_scope = 'mmdet'")
    with pytest.raises(ReportError, match="no log of a training"):
        run_report.write(other)
    (other / "metrics.json").touch()
    with pytest.raises(ReportError, match=f"{other} is a training of MMDetection, of which there"):
        run_report.write(other)
    assert run_report.write(folder) == folder / "report.html"
    assert run_report.write(folder, out=tmp_path / "page.html") == tmp_path / "page.html"


def test_a_training_ends_though_its_report_fails(folder, monkeypatch, caplog, reports):
    handlers, ends = [], iter((None, KeyboardInterrupt, ValueError("no")))
    monkeypatch.setattr(signal, "signal", lambda *pair: handlers.append(pair))

    def write(run):
        if error := next(ends):
            raise error
        return f"{run}/report.html"

    monkeypatch.setattr(run_report, "write", write)
    with caplog.at_level(logging.INFO):
        for _ in range(3):
            run_report.write_finished(folder)
    assert [record.getMessage() for record in caplog.records] == [
        *(f"writing {folder}/report.html", f"report: {folder}/report.html"),
        f"writing {folder}/report.html",
        f"the report was stopped; python tools/report.py {folder} writes it",
        f"writing {folder}/report.html",
        f"no report of {folder}: ValueError: no; python tools/report.py {folder} writes it",
    ]
    pair = [(signal.SIGINT, signal.default_int_handler), (signal.SIGTERM, signal.SIG_DFL)]
    assert handlers == 3 * pair


def test_differences_are_of_dotted_keys():
    base = {
        **{"same": (1, 2), "gone": 1, "empty": {}, "deep": {"a": {"b": 1, "c": [1, 2]}}},
        **{"steps": [{"type": "Flip", "prob": 0.5}, {"type": "Crop"}], "text": "a" * 200},
    }
    values = {
        **{"same": [1, 2], "new": None, "empty": {"x": 1}, "deep": {"a": {"b": 2, "c": [1, 3]}}},
        **{"steps": ({"type": "Flip", "prob": 0.3}, 7), "text": "b" * 199},
    }
    assert run_report.differences(base, values) == [
        ["deep.a.b", "1", "2"],
        ["deep.a.c", "[1, 2]", "[1, 3]"],
        ["empty", "{}", "(removed)"],
        ["empty.x", "-", "1"],
        ["gone", "1", "(removed)"],
        ["new", "-", "None"],
        ["steps.0.prob", "0.5", "0.3"],
        ["steps.1", "-", "7"],
        ["steps.1.type", "Crop", "(removed)"],
        ["text", "a" * 197 + "...", "b" * 199],
    ]
    assert run_report.differences({}, {}) == []
