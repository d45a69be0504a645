"""The demo's page by its sections, and the figures, losses and versions on it."""

import json
from importlib.metadata import version
from pathlib import Path

import pytest

from dense import page, report


def lines(path: Path, *records) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_losses_are_sorted_numbers_with_a_step(tmp_path):
    records = [
        {"iteration": 20, "total_loss": 2, "loss_mask": 0.5, "lr": 0.1},
        {"iteration": 9.0, "total_loss": 3.0, "loss_text": "x"},
        {"total_loss": 9.0},
        {"iteration": 20, "loss_mask": 0.25},
    ]
    assert report.detectron2_losses(lines(tmp_path / "metrics.json", *records)) == {
        "total_loss": [(9, 3.0), (20, 2.0)],
        "loss_mask": [(20, 0.25)],
    }
    with pytest.raises(FileNotFoundError, match=f"{tmp_path} holds no vis_data/scalars.json"):
        report.mmengine_losses(tmp_path)
    for stamp, value in (("2", 1.0), ("1", 2.0)):
        lines(tmp_path / stamp / "vis_data/scalars.json", {"iter": 5, "loss": value, "step": 1})
    assert report.mmengine_losses(str(tmp_path)) == {"loss": [(5, 1.0)]}


def test_results_are_the_last_line_of_the_newest_file(tmp_path):
    for stamp in ("20260101_000000", "20260102_000000"):
        lines(tmp_path / stamp / f"{stamp}.json", {"mIoU": 1.0}, {"mIoU": 2.0, "of": stamp})
        lines(tmp_path / stamp / "z.json", {"mIoU": 9.0})
    path, found = report.mmengine_results(tmp_path)
    assert path == tmp_path / "20260102_000000/20260102_000000.json"
    assert found == {"mIoU": 2.0, "of": "20260102_000000"}


def test_versions_of_what_is_installed(monkeypatch):
    monkeypatch.setattr(report, "PACKAGES", ("numpy", "not-installed", "torch"))
    assert report.versions() == {"numpy": version("numpy"), "torch": version("torch")}


def test_every_section_of_the_demos_page(monkeypatch, tmp_path):
    told = []
    monkeypatch.setattr(page, "render", lambda *arguments: told.append(arguments) or "page")
    photos = [tmp_path / f"{n}.jpg" for n in range(4)]
    colours = {"cat": (1, 2, 3)}
    made = dict(
        title="Title",
        introduction="Why.",
        figures=[
            report.Figure("mIoU", 71.26, 70.4, "a.json"),
            report.Figure("AP", 9.96, 10, "b.json"),
            report.Figure("AR", 50.04, None, "c.json"),
        ],
        plots=[("<svg>", "falls")],
        rows=[
            report.Row("one", {"truth": photos[0], "found": photos[1]}),
            report.Row("two", {"found": photos[3], "truth": photos[2]}),
        ],
        commands=[report.Command("make", "python a.py", 59.6), report.Command("do", "b", 66)],
        facts={"torch": "2.9"},
    )
    assert report.render(**made, legends={"masks": colours}) == "page"
    assert report.render(**{**made, "rows": []}) == "page"
    (title, introduction, sections), (_, _, without) = told
    assert (title, introduction) == ("Title", "Why.")
    results = page.Table(
        ["figure", "result (%)", "at least", "from"],
        [
            [
                "mIoU",
                "71.3",
                page.Cell("70: reached", kind="good"),
                page.Cell("a.json", kind="small"),
            ],
            ["AP", "10.0", page.Cell("10: missed", kind="bad"), page.Cell("b.json", kind="small")],
            ["AR", "50.0", "", page.Cell("c.json", kind="small")],
        ],
    )
    chosen = page.Text("The first held-out scenes, not chosen by how well they went.")
    compared = page.Compared(
        [
            (
                row,
                [
                    page.Picture(photos[first], f"truth, {row}", "truth"),
                    page.Picture(photos[first + 1], f"found, {row}", "found"),
                ],
            )
            for row, first in (("one", 0), ("two", 2))
        ]
    )
    commands = [
        page.Text("Run in this order from the root of the repository, 2:05 minutes in all:"),
        *(page.Code("make, 0:59", "python a.py"), page.Code("do, 1:06", "b")),
    ]
    assert sections == [
        page.Section("Results on the held-out scenes", [results]),
        page.Section("Losses", [page.Plots([("<svg>", "falls")])]),
        page.Section(
            "Prediction beside truth", [chosen, page.Text("Masks:"), page.Legend(colours), compared]
        ),
        page.Section("Commands", commands),
        page.Section("Versions", [page.Facts({"torch": "2.9"})]),
    ]
    assert without[2].blocks == [chosen, page.Compared([])]
