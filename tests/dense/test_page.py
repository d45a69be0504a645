"""The writer of pages: everything is escaped, small, embedded and readable."""

import base64
import io

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
    # A longer side of 400 pixels is no less and no more; the quality keeps edges and saves bytes.
    for height, width in ((400, 399), (402, 401)):
        uri, *size = page.Picture(noise[:height, :width], "a").thumbnail
        expected = Image.fromarray(noise[:height, :width])
        expected.thumbnail((400, 400), Image.Resampling.LANCZOS)
        buffer = io.BytesIO()
        expected.save(buffer, "JPEG", quality=82)
        assert base64.b64decode(uri.partition(",")[2]) == buffer.getvalue()
        assert size == [399, 400]


def test_columns_of_numbers_are_aligned():
    table = page.Table(["a", "b", "c"], [["x", 1, Cell(0.5)], ["y", None, 2], [3, 4, "z"]])
    assert table.numeric == [False, True, False]
    assert page.Table(["a", "b"], [[None, True], [None, False]]).numeric == [False, False]
    assert page.Table(["a"], []).numeric == []
    with pytest.raises(ValueError):
        page.Table(["a", "b"], [["x", 1], ["y"]]).numeric  # noqa: B018


def test_a_table_is_written_as_it_is_said():
    rows = [["x", 1234, Cell(0.5, share=0.125, kind="bad")], [Cell("y", kind="small"), None, 3.0]]
    source = page.render("t", "i", [Section("s", [page.Table(["a", "b", "c"], rows)])])
    body = source[source.index("<table") : source.index("</table>")]
    assert body == (
        '<table><thead>\n<tr><th scope="col">a</th><th scope="col" class="number">b</th>'
        '<th scope="col" class="number">c</th></tr>\n</thead><tbody>\n'
        '<tr><td class="" data-column="a">x</td><td class="number " data-column="b">1,234</td>'
        '<td class="number bar bad" data-column="c" style="--share: 12.5%">0.50</td></tr>\n'
        '<tr><td class="small" data-column="a">y</td><td class="number " data-column="b"></td>'
        '<td class="number " data-column="c">3.00</td></tr>\n</tbody>'
    )
    stacked = page.Table(["a"], [["x"]], stacked=True)
    assert '<table class="wide">' in page.render("t", "i", [Section("s", [stacked])])


def test_a_page_has_no_blank_lines():
    blocks = [
        page.Text("a"),
        page.Items(["b"]),
        page.Facts({"c": 1}),
        page.Legend({"d": (1, 2, 3)}),
    ]
    lines = page.render("t", "i", [Section(n, blocks) for n in "abc"]).splitlines()
    assert all(line and line == line.rstrip() for line in lines)
    assert "<p>a</p>" in lines and '<tr><th scope="row">c</th><td>1</td></tr>' in lines


@pytest.mark.parametrize(
    ("value", "text"),
    [(118287, "118,287"), (0.25, "0.25"), (1e-4, "0.0001"), (0, "0"), (None, "")]
    + [(float("nan"), "none"), (1234.5, "1,234.50"), (np.int64(7), "7"), (True, "True")]
    + [(0.1, "0.10"), (-0.0123, "-0.0123"), (0.0, "0.00"), (float("inf"), "inf")]
    + [(np.float32(1.5), "1.50"), (0.012345, "0.0123"), (-1234567, "-1,234,567"), ("a", "a")],
)
def test_numbers_are_written_for_readers(value, text):
    assert page.number(value) == text


def test_durations():
    assert [page.duration(s) for s in (5, 125.4, 3661)] == ["0:05", "2:05", "1:01:01"]
    assert [page.duration(s) for s in (59.9, 60, 3599, 3600)] == [
        "0:59",
        "1:00",
        "59:59",
        "1:00:00",
    ]
    assert page.duration(36 * 3600 + 7) == "36:00:07"


def test_plots_take_the_colour_of_the_page():
    """A dark window has light text: nothing in a plot is black or on white."""
    plots = [
        page.plot({"loss": [(1, 2.0), (2, float("nan"))], "empty": []}, "Net"),
        page.histogram({"a": [1, 10, 100], "b": []}, "Sizes", "pixels"),
    ]
    for svg in plots:
        assert svg.startswith("<svg") and "currentColor" in svg
        assert "#000000" not in svg and 'fill: #ffffff"' not in svg
        assert ">Net</text>" in svg or ">Sizes</text>" in svg, "text stays text"
        assert "<dc:date>" not in svg


def style(axes) -> dict:
    """What a reader sees around the curves."""
    legend = (axes.figure.legends or [axes.get_legend()])[0]
    return {
        "size": axes.figure.get_size_inches().tolist(),
        "text": (axes.get_title(), axes.get_xlabel(), axes.get_ylabel()),
        "frame": [name for name, spine in axes.spines.items() if spine.get_visible()],
        "grid": [line.get_alpha() for line in axes.get_xgridlines()[:1] if line.get_visible()],
        "ground": (axes.figure.patch.get_alpha(), axes.patch.get_alpha()),
        "legend": legend
        and (
            [text.get_text() for text in legend.get_texts()],
            legend.get_texts()[0].get_fontsize(),
            legend.get_frame_on() and legend.get_frame().get_alpha(),
            legend._ncols,
        ),
    }


def test_every_curve_of_a_plot(figures):
    nan = float("nan")
    curves = {
        "total_loss": [(3 * n, 2.0) for n in range(20)],
        "mask": [(n, 0.5 * n) for n in range(19)],
        "loss": [(1, nan), (2, float("inf")), (3, 1.0)],
        "none": [],
    }
    page.plot(curves, "Net", "step", "height")
    page.plot({"loss": [(1, 1.0), (2, 3.0)]}, "Net")
    page.plot({"a": [(1, -1.0), (2, 3.0)]}, "Net")
    page.plot({"a": [(1, 0.0), (2, 3.0)]}, "Net")
    first, second, negative, zero = (figure.axes[0] for figure in figures)
    lines = [
        (line.get_label(), line.get_linewidth(), line.get_marker(), line.get_markersize())
        for line in first.lines
    ]
    assert lines == [
        *(("total_loss", 2.2, "None", 3), ("mask", 1.2, "o", 3)),
        *(("loss", 2.2, "o", 3), ("none", 1.2, "o", 3)),
    ]
    drawn = [list(zip(*line.get_data(), strict=True)) for line in first.lines]
    assert drawn == [curves["total_loss"], curves["mask"], [(3, 1.0)], []]
    plain = {"size": [4.9, 3.3], "frame": ["left", "bottom"], "grid": [0.25], "ground": (0, 0)}
    legend = (list(curves), 7, False, 3)
    assert style(first) == {**plain, "text": ("Net", "step", "height"), "legend": legend}
    assert style(second) == {**plain, "text": ("Net", "iteration", "loss"), "legend": None}
    # Losses stand on zero.
    assert second.get_ylim()[0] == zero.get_ylim()[0] == 0 and negative.get_ylim()[0] < -1
    assert figures[0].get_layout_engine() is not None
    # Below the plot, outside of it.
    below = figures[0].legends[0].get_window_extent().y1
    assert below <= first.get_window_extent().y0


def test_every_bar_of_a_histogram(figures):
    values = {"a": [1, 2, 4.6, 0, -1], "b": [2.0, 2.0]}
    page.histogram(values, "Sizes", "pixels")
    page.histogram({"a": [1, 4.5, 0]}, "Sizes", "pixels")
    page.histogram({"a": [0]}, "Sizes", "pixels")
    both, one, none = (figure.axes[0] for figure in figures)
    legend = (["a", "b"], 7, 0, 1)
    plain = {"size": [4.9, 3.0], "frame": ["left", "bottom"], "grid": [], "ground": (0, 0)}
    plain["text"] = ("Sizes", "pixels", "number")
    assert style(both) == {**plain, "legend": legend}
    assert style(one) == style(none) == {**plain, "legend": None}
    bins = np.geomspace(0.95, 4.6 * 1.05, 24)
    for outline, (name, found) in zip(both.patches, values.items(), strict=True):
        numbers, _ = np.histogram([value for value in found if value > 0], bins)
        x, y = outline.get_xy().T
        np.testing.assert_allclose(np.unique(x), bins)
        assert max(y) == numbers.max()
        assert (outline.get_label(), outline.get_alpha(), outline.get_fill()) == (name, 0.55, True)
    # Logarithmic where the largest is five times the smallest.
    assert (both.get_xscale(), one.get_xscale()) == ("log", "linear")
    assert len(one.patches) == 1 and not none.patches
