"""What every canvas is told to draw, and where: in a small picture, a large one, and between."""

import zlib

import numpy as np
import pytest

from dense import drawing

WHITE = (255, 255, 255)
BOXES = np.array([[2, 3, 20, 16], [30, 20, 56, 38], [1, 1, 5, 9]], np.float32)


class Font:
    """Letters ten pixels wide, whatever the version of Pillow."""

    def __init__(self, size):
        self.size = size

    def getlength(self, text):
        return 10 * len(text) + 0.3


class Pen:
    """In place of Pillow's: it notes what it is to draw."""

    made = []

    def __init__(self, picture, mode=None):
        self.size, self.mode, self.rectangles, self.texts = picture.size, mode, [], []
        self.made.append(self)

    def rectangle(self, box, **options):
        self.rectangles.append((box, options))

    def text(self, place, text, font, **options):
        self.texts.append((place, text, font.size, options))

    multiline_text = text

    def multiline_textbbox(self, place, text, font):
        return *place, place[0] + 100, place[1] + 30


@pytest.fixture
def pens(monkeypatch) -> list[Pen]:
    monkeypatch.setattr(Pen, "made", [])
    monkeypatch.setattr(drawing.ImageDraw, "Draw", Pen)
    monkeypatch.setattr(drawing.ImageFont, "load_default", Font)
    return Pen.made


class Canvas:
    """In place of a visualizer: it notes what it is told."""

    _instance_dict = {}
    made = []

    def __init__(self, *arguments, **options):
        self.told = []
        self.__getattr__("new")(*arguments, **options)
        self.made.append(self.told)

    def __getattr__(self, name):
        return lambda *a, **k: self.told.append((name, plain(a), plain(k)))

    @property
    def output(self):
        return self

    def get_image(self):
        return np.zeros((1, 1, 3), np.uint8)


def plain(value):
    """Arrays as lists, large ones as their shape and a checksum."""
    if isinstance(value, dict):
        return {key: plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [plain(part) for part in value]
    if isinstance(value, np.ndarray) and value.size > 1000:
        return value.shape, zlib.crc32(value.astype(float).tobytes())
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else value


def picture(height, width):
    return np.random.default_rng(0).integers(0, 255, (height, width, 3)).astype(np.uint8)


@pytest.fixture
def canvases(monkeypatch) -> list:
    pytest.importorskip("mmengine")
    monkeypatch.setattr(Canvas, "made", [])
    monkeypatch.setattr("mmengine.visualization.Visualizer", Canvas)
    return Canvas.made


def test_the_first_colours_stay():
    """Pages and pictures of different versions can be compared."""
    first = [(238, 43, 43), (16, 69, 198), (185, 243, 104), (238, 43, 213)]
    assert drawing.class_colours(4) == first


@pytest.mark.parametrize(
    "shape, factor",
    [((40, 60), 8), ((60, 40), 8), ((320, 9), 2), ((9, 321), 1), ((2, 1), 240), ((1500, 1500), 1)],
)
def test_small_pictures_are_enlarged(shape, factor):
    drawn = drawing.draw_lines(np.zeros((*shape, 3), np.uint8), ["a"])
    assert drawn.shape == (factor * shape[0], factor * shape[1], 3)


def test_a_legend_is_laid_out_in_lines(pens):
    image, colours = picture(40, 94), {"ab": (1, 2, 3), "c": (4, 5, 6), "defg": (7, 8, 9)}
    low, narrow = (drawing.with_legend(image[:, :width], colours) for width in (94, 93))
    # Text of 11 pixels in lines of 16; a gap of 5 around all.
    assert low.shape == (40 + 21 + 16, 94, 3) and narrow.shape == (40 + 37 + 16, 93, 3)
    assert (low[:40] == image).all() and (low[40:] == 255).all()
    drawing.with_legend(image, {"a name that is wider": (1, 2, 3)})
    assert pens.pop().rectangles[0][0] == (5, 45, 16, 56)
    for pen, places in zip(
        pens, ([(5, 45), (57, 45), (5, 61)], [(5, 45), (5, 61), (5, 77)]), strict=True
    ):
        assert pen.rectangles == [
            ((x, y, x + 11, y + 11), dict(fill=colour, outline="black"))
            for (x, y), colour in zip(places, colours.values(), strict=True)
        ]
        assert pen.texts == [
            ((x + 16, y - 1), name, 11, dict(fill="black"))
            for (x, y), name in zip(places, colours, strict=True)
        ]


def test_a_legend_grows_with_its_picture_and_ends_after_forty(pens):
    colours = {f"{i}": [i, 0, 0] for i in range(42)}
    drawn = drawing.with_legend(picture(900, 1500), colours)
    drawing.with_legend(picture(1500, 900), dict(list(colours.items())[:40]))
    long, whole = pens
    assert drawn.shape == (900 + 16 + 4 * 48, 1500, 3)
    # A name of one digit takes 64 + 16 + 10 pixels, one of two 64 + 16 + 20, and a gap of 16.
    corners = [box[:2] for box, _ in long.rectangles]
    assert corners[:2] == [(16, 916), (122, 916)]
    assert corners[12:14] == [(1308, 916), (16, 964)]
    names = [name for _, name, size, _ in long.texts if size == 32]
    assert names == [*list(colours)[:40], "and 2 more"]
    assert long.rectangles[-1][1]["fill"] == WHITE and long.rectangles[1][1]["fill"] == (1, 0, 0)
    assert [name for _, name, size, _ in whole.texts if size == 32] == list(colours)[:40]


@pytest.mark.parametrize(
    "shape, size, factor", [((40, 60), 13, 8), ((100, 33), 10, 5), ((1000, 700), 29, 1)]
)
def test_lines_stand_on_a_dark_ground_in_the_corner(pens, shape, size, factor):
    drawing.draw_lines(picture(*shape), ["one", "two"])
    [pen] = pens
    half = size // 2
    assert pen.size == (factor * shape[1], factor * shape[0]) and pen.mode == "RGBA"
    box = (0, 0, half + 100 + half, half + 30 + half)
    assert pen.rectangles == [(box, dict(fill=(0, 0, 0, 150)))]
    assert pen.texts == [((half, half), "one\ntwo", size, dict(fill=WHITE))]


def test_lines_are_read_over_the_picture():
    drawn = drawing.draw_lines(np.full((400, 500, 3), 200, np.uint8), ["one", "two"])
    assert abs(int(drawn[0, 0, 0]) - 200 * 105 // 255) <= 1, "the photo is seen through the ground"
    assert (drawn[:60, :60] == 255).any() and (drawn[200:] == 200).all()


def test_openmmlabs_canvas(canvases):
    image, masks = picture(40, 60), np.zeros((3, 40, 60), np.uint8)
    masks[1, 7, 9] = 1
    colours = [(1, 2, 3), (4, 5, 6)]
    drawing.draw_instances_openmmlab(image, BOXES, masks, ("a", "b", "c"), colours)
    large = np.kron(masks, np.ones((1, 8, 8))).astype(bool)
    repeated = [[1, 2, 3], [4, 5, 6], [1, 2, 3]]
    style = dict(facecolor="black", alpha=0.6, pad=1, edgecolor="none")
    style = dict(colors="white", vertical_alignments="top", bboxes=style)
    assert canvases[0] == [
        ("new", [], {"image": plain(np.kron(image, np.ones((8, 8, 1))))}),
        ("draw_binary_masks", [plain(large)], dict(colors=repeated, alphas=0.5)),
        ("draw_bboxes", [plain(8 * BOXES)], dict(edge_colors=repeated, line_widths=1)),
        ("draw_texts", [["a", "b", "c"], plain(8 * BOXES[:, :2])], dict(font_sizes=8, **style)),
    ]
    # Boxes alone, in Matplotlib's colours, on a photo that is not enlarged.
    drawing.draw_instances_openmmlab(picture(400, 500), BOXES, None, "abc")
    _, boxes, texts = canvases[1]
    assert boxes[2]["edge_colors"] == [[31, 119, 180], [255, 127, 14], [44, 160, 44]]
    assert boxes[1] == [plain(BOXES)] and texts[2]["font_sizes"] == 10
    drawing.draw_instances_openmmlab(image, BOXES[:0], masks[:0], [])
    assert [name for name, *_ in canvases[2]] == ["new"]


def test_detectron2s_canvas(monkeypatch):
    pytest.importorskip("detectron2")
    monkeypatch.setattr(Canvas, "made", [])
    monkeypatch.setattr("detectron2.utils.visualizer.Visualizer", Canvas)
    image, masks = picture(40, 60), np.zeros((3, 40, 60), bool)
    masks[1, 7, 9] = True
    drawing.draw_instances(image, BOXES, masks, ("a", "b", "c"), [(51, 0, 255), (0, 102, 0)])
    colours = [[0.2, 0, 1], [0, 0.4, 0], [0.2, 0, 1]]
    told = dict(boxes=plain(BOXES), labels=["a", "b", "c"])
    assert Canvas.made[0] == [
        ("new", [plain(image)], dict(scale=8)),
        (
            "overlay_instances",
            [],
            dict(masks=plain([*(1 * masks)]), assigned_colors=colours, **told),
        ),
    ]
    drawing.draw_instances(picture(400, 500), BOXES, None, "abc")
    (_, _, new), (_, _, drawn) = Canvas.made[1]
    assert new == dict(scale=1) and drawn["masks"] is None
    # The first ones of its own palette, RGB.
    own = [[0, 0.447, 0.741], [0.85, 0.325, 0.098], [0.929, 0.694, 0.125]]
    np.testing.assert_allclose(drawn["assigned_colors"], own, atol=1e-3)


def test_label_maps_on_a_canvas(canvases):
    image, palette = picture(40, 60), [(1, 2, 3), [4, 5, 6], (7, 8, 9)]
    labels = np.full((40, 60), 3)
    # Of the first class a field of 7x5 pixels, of the last one of 5x9 in a corner.
    labels[3:10, 20:25], labels[35:, 51:], labels[0, 0] = 0, 2, -1
    for named in (True, False):
        drawing.segmentation_drawer(["a", "b", "c"], palette, named)(image, labels)
    shown, unnamed = canvases
    large, field = np.kron(image, np.ones((8, 8, 1))), np.kron(labels, np.ones((8, 8)))
    masks = plain(np.stack([field == 0, field == 2]))
    style = dict(horizontal_alignments="center", vertical_alignments="center", colors="white")
    style["bboxes"] = dict(facecolor="black", alpha=0.6, pad=2, edgecolor="none")
    assert shown[1:] == [
        ("set_image", [plain(large)], {}),
        ("draw_binary_masks", [masks], dict(colors=[[1, 2, 3], [7, 8, 9]], alphas=0.6)),
        ("draw_texts", [["a", "c"], shown[3][1][1]], dict(font_sizes=8, **style)),
    ]
    # The farthest from a border: in the middle of a field.
    (x, y), (right, low) = shown[3][1][1]
    assert abs(x - 8 * 22.5) <= 1 and 8 * 5.5 - 1 <= y <= 8 * 7.5 + 1
    assert abs(low - 8 * 37.5) <= 1 and 8 * 53.5 - 1 <= right <= 8 * 57.5 + 1
    assert unnamed == shown[:3]
    drawing.segmentation_drawer(["a"], palette)(picture(400, 600), np.zeros((400, 600), int))
    drawing.segmentation_drawer(["a"], palette)(image, np.full((40, 60), 255))
    assert canvases[2][-1][2]["font_sizes"] == 10
    assert [name for name, *_ in canvases[3]] == ["new", "set_image"]
