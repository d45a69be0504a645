"""Odd files are found by what they are."""

import hashlib
import io
from functools import partial

import numpy as np
import pytest
from PIL import ExifTags, Image

from dense import browsing, page
from dense.browsing import Photo, Split


def test_odd_files(tmp_path):
    rng = np.random.default_rng(0)

    def photo(name, width, height, mode="RGB", **options):
        pixels = rng.integers(0, 255, (height, width, 3)).astype(np.uint8)
        Image.fromarray(pixels).convert(mode).save(tmp_path / name, **options)

    photo("fine.png", 64, 48)
    photo("small.png", 64, 20)
    photo("long.png", 400, 40)
    photo("grey.png", 64, 48, "L")
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    photo("turned.jpg", 64, 48, exif=exif)
    (tmp_path / "copy.png").write_bytes((tmp_path / "fine.png").read_bytes())
    content = (tmp_path / "turned.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(content[: len(content) // 2])
    (tmp_path / "text.jpg").write_text("hello")

    names = sorted(str(path) for path in tmp_path.iterdir())
    photos = browsing.look_at(browsing.files_of([*names, tmp_path / "absent.png"]))
    assert [photo.name for photo in photos] == [*names, str(tmp_path / "absent.png")]
    sizes = {photo.name.rpartition("/")[2]: photo.size for photo in photos}
    assert sizes["turned.jpg"] == (48, 64) and sizes["long.png"] == (400, 40)
    assert sizes["cut.jpg"] is sizes["text.jpg"] is sizes["absent.png"] is None
    lines = [line.replace(f"{tmp_path}/", "") for line in browsing.oddities(photos)]
    unreadable = {line.partition(" ")[0] for line in lines if "cannot be read" in line}
    assert unreadable == {"cut.jpg", "text.jpg", "absent.png"}
    assert set(lines) >= {
        "the same photo 2 times: copy.png, fine.png",
        "small.png is small: 64x20",
        "long.png is long: 400x40",
        "1 of mode L, such as grey.png: read as RGB",
        "1 are turned by their EXIF orientation, such as turned.jpg",
    }
    assert len(lines) == 3 + 5
    assert browsing.shared(photos[:1], photos[1:]) == [str(tmp_path / "fine.png")]


def test_samples_follow_the_seed():
    assert browsing.chosen(100, 5, 1) == browsing.chosen(100, 5, 1) != browsing.chosen(100, 5, 2)
    assert browsing.chosen(3, 5, 0) == [0, 1, 2]


def test_small_long_and_double_at_the_border():
    photos = [
        Photo("a", "1", (32, 128), "RGB"),
        Photo("b", "1", (31, 128), "RGB"),
        Photo("c", "1", (129, 32), "L"),
        Photo("d", "1", (400, 100), "CMYK"),
        Photo("e", "1", (64, 64), "CMYK", turned=True),
        Photo("f", "2", (31, 31), "RGB", turned=True),
        Photo("g", fault="cut"),
        Photo("h", fault="torn"),
    ]
    assert browsing.oddities(photos) == [
        "g cannot be read: cut",
        "h cannot be read: torn",
        "the same photo 5 times: a, b, c, d",
        "b is small: 31x128",
        "c is long: 129x32",
        "f is small: 31x31",
        "2 of mode CMYK, such as d: read as RGB",
        "1 of mode L, such as c: read as RGB",
        "2 are turned by their EXIF orientation, such as e",
    ]
    assert browsing.oddities(photos[:1]) == []
    # A file that could not be read is no file of training.
    assert browsing.shared(photos, [Photo("x"), Photo("y", "2"), Photo("z", "3")]) == ["y"]


def test_what_is_known_of_a_file():
    def stored(mode, **options):
        buffer = io.BytesIO()
        Image.effect_noise((60, 40), 99).convert(mode).save(buffer, "JPEG", **options)
        return buffer.getvalue()

    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 1
    upright, mirrored, grey = stored("RGB", exif=exif), Image.Exif(), stored("L")
    mirrored[ExifTags.Base.Orientation] = 2
    mirrored, cut = stored("RGB", exif=mirrored), upright[:-400]

    def refused():
        raise OSError

    contents = {
        "upright": upright,
        "mirrored": mirrored,
        "grey": grey,
        "text": b"hello",
        "cut": cut,
    }
    read = {name: partial(bytes, content) for name, content in contents.items()}
    *fine, text, cut, gone = browsing.look_at({**read, "gone": refused})
    digests = {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
    assert fine == [
        Photo("upright", digests["upright"], (60, 40), "RGB"),
        Photo("mirrored", digests["mirrored"], (60, 40), "RGB", turned=True),
        Photo("grey", digests["grey"], (60, 40), "L"),
    ]
    assert text == Photo("text", digests["text"], fault="cannot identify image file")
    assert cut.digest == digests["cut"] and "truncated" in cut.fault and cut.size is None
    assert gone == Photo("gone", fault="OSError")


def test_the_bar_counts_photos(monkeypatch):
    told = []
    monkeypatch.setattr(browsing, "tqdm", lambda found, *a, **k: told.append((*a, k)) or found)
    assert [photo.name for photo in browsing.look_at({"a": bytes, "b": bytes})] == ["a", "b"]
    browsing.look_at({"a": bytes}, "reading training photos")
    options = dict(delay=2, leave=False, unit="photo")
    assert told == [("reading photos", 2, options), ("reading training photos", 1, options)]


def frequencies(*rows) -> page.Table:
    return page.Table(["class", "objects", "photos"], [[n, page.Cell(c), p] for n, c, p in rows])


def test_a_page_of_both_splits(figures):
    splits = [
        Split(
            **dict(name="training", facts={"photos": 1200, "objects": 5}, total=1200),
            frequencies=frequencies(("cat", 3, 2), ("dog", 9, 1), ("bird", 4, 4)),
            photos=[Photo(f"{n}.jpg", str(n), (40 + n, 80), "RGB") for n in range(3)],
            odd=[f"odd {n}" for n in range(21)],
            histograms={"object side": [5.0, 6.25, 8.5], "depth": [1.0]},
            **dict(samples=[page.Picture(np.zeros((4, 6, 3), np.uint8), "a")]),
            about_samples="Drawn at random.",
        ),
        Split(
            **dict(name="validation", facts={"photos": 2, "crowds": 1}, total=2),
            frequencies=frequencies(("cat", 1, 1), ("dog", 0, 0), ("bird", 2, 2)),
            photos=[Photo("v.jpg", "1", (100, 60), "RGB"), Photo("w.jpg", fault="cut")],
            histograms={"object side": [7.0], "depth": []},
        ),
    ]
    sections = browsing.sections(splits, {"cat": (1, 2, 3)})
    titles = ["Overview", "Odd and unreadable", "Samples", "Classes", "Sizes"]
    assert [section.title for section in sections] == titles
    overview, odd, samples, classes, sizes = (section.blocks for section in sections)
    rows = [["photos", 1200, 2], ["objects", 5, None], ["crowds", None, 1]]
    assert overview == [page.Table(["", "training", "validation"], rows)]
    assert odd == [
        page.Text("3 of 1,200 training photos were decoded: 21 are odd."),
        page.Items([*(f"odd {n}" for n in range(20)), "and 1 more"]),
        page.Text("2 of 2 validation photos were decoded: 2 are odd."),
        page.Items(["1 are training photos too, such as v.jpg", "w.jpg cannot be read: cut"]),
    ]
    legend, about, pictures = samples
    assert legend == page.Legend({"cat": (1, 2, 3)})
    assert about == page.Text("Training. Drawn at random.")
    assert pictures == page.Pictures(splits[0].samples)
    [table] = classes
    assert table.columns == ["class", "training objects", "photos", "validation objects", "photos"]
    assert [[cell.value for cell in row] for row in table.cells] == [
        *(["dog", 9, 1, 0, 0], ["bird", 4, 4, 2, 2], ["cat", 3, 2, 1, 1]),
    ]
    assert sizes[0] == page.Table(
        ["pixels", "least", "median", "most"],
        [
            ["photo width, training", 40, 41, 42],
            ["photo height, training", 80, 80, 80],
            ["object side, training", 5, 6.2, 8.5],
            ["depth, training", 1, 1, 1],
            ["photo width, validation", 100, 100, 100],
            ["photo height, validation", 60, 60, 60],
            ["object side, validation", 7, 7, 7],
        ],
    )
    assert len(sizes[1].plots) == 3 and all(caption == "" for _, caption in sizes[1].plots)
    axes = [figure.axes[0] for figure in figures]
    assert [(a.get_title(), a.get_xlabel()) for a in axes] == [
        *(("Photos", "longer side, pixels"), ("Object side", "pixels"), ("Depth", "pixels")),
    ]
    names = [[patch.get_label() for patch in a.patches] for a in axes]
    assert names == [["training", "validation"], ["training", "validation"], ["training"]]
    # The longer sides: 80 of all of training, 100 of the other.
    assert [patch.get_xy()[:, 1].max() for patch in axes[0].patches] == [3, 1]
    edges = axes[0].patches[0].get_xy()[:, 0]
    assert (edges.min(), edges.max()) == pytest.approx((0.95 * 80, 1.05 * 100))


def test_a_page_of_nothing_odd(tmp_path):
    one = Split("training", photos=[Photo("a", "1", (64, 64), "RGB")], total=1, odd=["x"])
    for lines, said in (
        (["x"], "one thing is odd"),
        ([], "nothing is odd"),
        (["x"] * 20, "20 are"),
    ):
        one.odd = list(lines)
        blocks = browsing.sections([one], {})[1].blocks
        assert blocks[0].text.startswith(f"1 of 1 training photos were decoded: {said}")
        assert [block.lines for block in blocks[1:]] == ([lines] if lines else [])
    # Nor samples, classes or sizes: sections without blocks are left out.
    empty = Split("training")
    assert [bool(section.blocks) for section in browsing.sections([empty], {"a": (0, 0, 0)})] == [
        *(True, True, False, False, False),
    ]
    path = browsing.write(tmp_path / "a/b/page.html", "title", "why", browsing.sections([one], {}))
    assert path == tmp_path / "a/b/page.html" and "<h1>title</h1>\n<p>why</p>" in path.read_text()
    browsing.write(tmp_path / "a/b/page.html", "again", "why", [])
    assert "<h1>again</h1>" in path.read_text()
