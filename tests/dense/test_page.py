"""The writer of pages: everything is escaped, small, embedded and readable."""

import numpy as np
import pytest
from PIL import Image

from dense import page
from dense.page import Cell, Section
from tests.pages import Page

NASTY = "<script>alert('x')</script> & \"more\""


def test_all_text_is_escaped():
    image = np.zeros((4, 6, 3), np.uint8)
    blocks = [
        page.Text(NASTY),
        page.Items([NASTY]),
        page.Facts({NASTY: NASTY}),
        page.Table([NASTY, "n"], [[NASTY, Cell(1, share=0.5)]]),
        page.Pictures([page.Picture(image, NASTY, NASTY)]),
        page.Compared([(NASTY, [page.Picture(image, NASTY, NASTY)])]),
        page.Legend({NASTY: (1, 2, 3)}),
        page.Code(NASTY, NASTY),
        page.Plots([(page.plot({NASTY: [(1, 2.0)], "b": [(1, 1.0)]}, NASTY), NASTY)]),
    ]
    found = Page(page.render(NASTY, NASTY, [Section(NASTY, blocks), Section("empty")]))
    assert "script" not in found.tags and found.is_self_contained
    assert found.text.count(NASTY) >= 16
    assert [NASTY, "1"] in found.rows and NASTY in found.lines
    assert "empty" not in found.text


def test_a_picture_is_a_small_jpeg_with_its_proportions(tmp_path):
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 255, (900, 1800, 3)).astype(np.uint8)
    Image.fromarray(noise).save(tmp_path / "noise.png")
    Image.new("L", (20, 10)).save(tmp_path / "grey.png")
    pictures = [
        page.Picture(p, "a") for p in (noise, tmp_path / "noise.png", tmp_path / "grey.png")
    ]
    found = Page(page.render("t", "i", [Section("s", [page.Pictures(pictures)])]))
    sides = [picture.shape[:2] for picture in found.pictures]
    assert sides == [(200, 400), (200, 400), (10, 20)]
    # Noise is the worst case of a JPEG; photos are half of it.
    assert all(len(uri) < 80_000 for uri in found.loaded)
    assert 'loading="lazy"' in found.source


def test_columns_of_numbers_are_aligned():
    table = page.Table(["a", "b", "c"], [["x", 1, Cell(0.5)], ["y", None, 2], [3, 4, "z"]])
    assert table.numeric == [False, True, False]


@pytest.mark.parametrize(
    ("value", "text"),
    [(118287, "118,287"), (0.25, "0.25"), (1e-4, "0.0001"), (0, "0"), (None, "")]
    + [(float("nan"), "none"), (1234.5, "1,234.50"), (np.int64(7), "7"), (True, "True")],
)
def test_numbers_are_written_for_readers(value, text):
    assert page.number(value) == text


def test_durations():
    assert [page.duration(s) for s in (5, 125.4, 3661)] == ["0:05", "2:05", "1:01:01"]


def test_plots_take_the_colour_of_the_page():
    """A dark window has light text: nothing in a plot is black or on white."""
    plots = [
        page.plot({"loss": [(1, 2.0), (2, float("nan"))], "empty": []}, "Net"),
        page.histogram({"a": [1, 10, 100], "b": []}, "Sizes", "pixels"),
    ]
    for svg in plots:
        assert svg.startswith("<svg") and "currentColor" in svg
        assert "#000000" not in svg and 'fill: #ffffff"' not in svg
