"""Which images are read, as what, and how many may be skipped."""

import io
import logging
import warnings

import numpy as np
import pytest
from PIL import Image

from dense.images import (
    Skipped,
    TooManyUnreadable,
    UnreadableImage,
    UnsetRange,
    check_rgb,
    displayed_size,
    read_image,
    to_rgb,
)


@pytest.mark.parametrize(
    "share, total, allowed",
    [({}, 0, 1), ({}, 1999, 1), ({}, 2000, 2), ({}, 3999, 3), ({"share": 0.1}, 29, 2)],
)
def test_as_many_are_skipped_as_the_share_says(share, total, allowed, caplog):
    skipped, error = Skipped(total, **share), OSError("cut")
    with caplog.at_level(logging.WARNING):
        for number in range(allowed):
            skipped.note(f"{number}.jpg", error)
            # A file counts once, and is named once.
            for _ in range(2):
                skipped.note(f"{number}.jpg", error)
    assert [record.getMessage() for record in caplog.records] == [
        f"{n}.jpg cannot be read (cut): skipped, {n + 1} so far, {allowed} allowed"
        for n in range(allowed)
    ]
    with pytest.raises(TooManyUnreadable) as stopped:
        skipped.note("last.jpg", error)
    assert str(stopped.value) == (
        f"{allowed + 1} of {total} images cannot be read, such as last.jpg: at most {allowed} are "
        "skipped"
    )


def test_names_are_told_apart_though_few_bits_are_kept(caplog):
    skipped = Skipped(10**6)
    for number in range(600):
        skipped.note(f"photo {number}.jpg", OSError("cut"))
    assert 580 < int(skipped._seen.sum()) <= 600 and skipped._seen.is_shared()


def test_the_reason_alone_of_a_workers_traceback():
    traceback = "Caught TooManyUnreadable in worker 0.\n  raise\ndense.TooManyUnreadable: 2 of 8\n"
    assert str(TooManyUnreadable(traceback)) == "2 of 8"
    assert str(TooManyUnreadable(f"{traceback} \n")) == "2 of 8"
    assert str(TooManyUnreadable("2 of 8")) == "2 of 8" and str(TooManyUnreadable()) == ""


@pytest.mark.parametrize("orientation", [None, *range(1, 9)])
def test_sizes_are_those_of_the_photo_as_it_is_displayed(tmp_path, orientation):
    exif = Image.Exif()
    if orientation:
        exif[274] = orientation
    Image.new("RGB", (7, 4)).save(tmp_path / "a.jpg", exif=exif)
    stored, displayed = displayed_size(tmp_path / "a.jpg")
    assert stored == (7, 4) and displayed == read_image(tmp_path / "a.jpg").shape[1::-1]


def test_a_palette_with_and_without_transparency():
    colours = Image.new("RGB", (6, 4), (200, 30, 90)).quantize(4)
    assert to_rgb(colours).getpixel((3, 2)) == (200, 30, 90)
    stored = io.BytesIO()
    other = Image.merge("RGB", [Image.linear_gradient("L")] * 3).quantize(8)
    other.save(stored, "PNG", transparency=bytes([0, 128, 255, 255]))
    # Pillow warns of such a palette that becomes RGB at once.
    with warnings.catch_warnings(), Image.open(stored) as image:
        warnings.simplefilter("error")
        assert image.mode == "P" and to_rgb(image).tobytes() == other.convert("RGB").tobytes()
    assert to_rgb(Image.new("RGBA", (6, 4), (200, 30, 90, 0))).getpixel((3, 2)) == (200, 30, 90)
    assert to_rgb(Image.new("LA", (6, 4), (77, 0))).getpixel((3, 2)) == (77, 77, 77)


@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_32_bits_have_no_range(tmp_path, dtype):
    image = Image.fromarray(np.ones((4, 6), dtype))
    with pytest.raises(UnsetRange, match="32-bit pixels have no set range; save it with 8 or 16"):
        to_rgb(image)
    image.save(tmp_path / "a.tif")
    with pytest.raises(UnreadableImage, match="a.tif: 32-bit pixels have no set range"):
        read_image(tmp_path / "a.tif")


def test_16_bits_keep_the_upper_ones():
    stored = io.BytesIO()
    Image.fromarray(np.array([[255, 256, 65535]], np.uint16)).save(stored, "PNG")
    with Image.open(stored) as image:
        assert np.asarray(to_rgb(image))[0, :, 1].tolist() == [0, 1, 255]


@pytest.mark.parametrize(
    "shape, dtype", [((4, 6), "u1"), ((4, 6, 4), "u1"), ((4, 6, 1), "u1"), ((4, 6, 3), "f4")]
)
def test_predictors_take_rgb_alone(shape, dtype):
    image = np.zeros(shape, dtype)
    with pytest.raises(ValueError) as refused:
        check_rgb(image)
    assert str(refused.value) == (
        f"got an image of shape {shape}, {image.dtype}: (H, W, 3), uint8 is needed"
    )
    check_rgb(np.zeros((4, 6, 3), np.uint8))
