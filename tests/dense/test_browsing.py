"""Odd files are found by what they are."""

import numpy as np
from PIL import ExifTags, Image

from dense import browsing


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
