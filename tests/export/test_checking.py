"""Files beside eager networks: errors, cosines, times and words, of networks known by hand."""

import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("onnxruntime")

from dense.export import checking
from dense.export.checking import BAR, COSINE, Comparison
from dense.export.files import ExportError
from dense.export.sources import Source

ABOUT = {
    "outputs": ["one", "other"],
    "channels": "RGB",
    "mean": [1.0, 2.0, 4.0],
    "std": [2.0, 4.0, 5.0],
    "sides": [32, 64],
}
BGR = ABOUT | {"channels": "BGR"}


def network(x):
    return x, x.mean(1)


SOURCE = Source(network, ABOUT, (40, 48))
SIZES = ((40, 48), (25, 37), (40, 72))


@pytest.fixture
def photos():
    rng = np.random.default_rng(0)
    return [rng.integers(0, 255, (50, 60, 3), np.uint8) for _ in range(2)]


def test_the_sizes_are_the_trainings_a_smaller_odd_and_a_wider_one():
    assert checking.sizes_of(SOURCE) == SIZES
    assert checking.sizes_of(Source(network, ABOUT, (512, 513))) == (
        *((512, 513), (321, 385), (512, 769)),
    )


@pytest.mark.parametrize("about", [ABOUT, BGR])
def test_a_photo_as_a_file_takes_it(about, photos):
    photo = photos[0]
    found = checking.normalised(photo, about)
    assert found.shape == (1, 3, 50, 60) and found.dtype == np.float32
    assert found.flags["C_CONTIGUOUS"]
    ordered = photo[..., ::-1] if about is BGR else photo
    for channel, (mean, std) in enumerate(zip(about["mean"], about["std"], strict=True)):
        np.testing.assert_allclose(
            found[0, channel], (ordered[..., channel] - mean) / std, rtol=1e-6
        )
    resized = np.asarray(Image.fromarray(photo).resize((30, 20), Image.Resampling.BILINEAR))
    np.testing.assert_array_equal(
        checking.normalised(photo, about, (20, 30)), checking.normalised(resized, about)
    )


def test_what_differs_is_measured_per_output(photos, monkeypatch):
    """Against float64: the largest error by the largest value, and the smallest cosine."""
    seen = []

    def run(batch):
        seen.append(batch.shape)
        one, other = (x.numpy() for x in network(torch.from_numpy(batch)))
        wrong = other.copy()
        if batch.shape[2] == 25:
            wrong[1, 3, 5] += 8.0
        return [one, wrong]

    monkeypatch.setattr(checking, "seconds", lambda f, image, repeats: len(f(image)) + repeats)
    found = checking.compare(SOURCE, run, photos, 7)
    shapes = [(2, 3, *size) for size in (*SIZES, (32, 32))]
    assert seen[:4] == shapes and found.sizes == (*SIZES, (32, 32))
    assert found.errors["one"] == 0 and found.cosines["one"] == pytest.approx(1, abs=1e-9)
    batch = np.concatenate([checking.normalised(photo, ABOUT, (25, 37)) for photo in photos])
    true = batch.mean(1).astype(np.float64)
    ours = true.copy()
    ours[1, 3, 5] += 8
    assert found.errors["other"] == pytest.approx(8 / np.abs(true).max(), rel=1e-5)
    cosine = (ours * true).sum() / np.sqrt((ours**2).sum() * (true**2).sum())
    assert found.cosines["other"] == pytest.approx(cosine, rel=1e-6) and cosine < 1
    assert found.latency == (9, 9) and seen[4:] == [(1, 3, 40, 48)]
    # Without the smallest; five times if it is not said.
    found = checking.compare(SOURCE, run, photos, smallest=False)
    assert found.sizes == SIZES and found.latency == (7, 7)


def test_another_shape_is_told(photos):
    def run(batch):
        return [batch, batch.mean(1)[:, 1:]]

    with pytest.raises(
        ExportError, match=r"^other is \(2, 39, 48\) at \(40, 48\), eager's is \(2, 40"
    ):
        checking.compare(SOURCE, run, photos)


def test_not_a_number_is_not_lost(photos):
    """Whichever image has it."""
    for size in SIZES:

        def run(batch, size=size):
            wrong = np.nan if batch.shape[2:] == size else 0
            return [batch + wrong, batch.mean(1)]

        found = checking.compare(SOURCE, run, photos, 1)
        assert np.isnan(found.errors["one"]) and np.isnan(found.cosines["one"])
        assert found.missed("float32") and found.missed("int8")


@pytest.mark.parametrize(
    ("errors", "cosines", "precision", "said"),
    [
        ((0.0, BAR), (1.0, 0.5), "float32", None),
        ((0.0, 1.01e-3), (1.0, 1.0), "float32", "the largest relative error is 1.0e-03, 1e-03 is"),
        ((2e-3, 0.0), (1.0, 1.0), "float32", "the largest relative error is 2.0e-03, 1e-03 is"),
        ((0.5, 0.5), (1.0, COSINE), "int8", None),
        ((0.0, 0.0), (0.98994, 1.0), "bf16", "a cosine is 0.9899, 0.99 is needed"),
    ],
)
def test_bars(errors, cosines, precision, said):
    names = ("one", "other")
    given = (dict(zip(names, values, strict=True)) for values in (errors, cosines))
    missed = Comparison(SIZES, *given, (1.0, 2.0)).missed(precision)
    assert missed is None if said is None else missed.startswith(said)


def test_the_words_of_a_comparison(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX9")
    found = Comparison(
        ((40, 48), (25, 37)), {"a": 1.26e-5, "map": 0.0}, {"a": 0.123456, "map": 1.0}, (0.002, 0.01)
    )
    assert found.ratio == pytest.approx(0.2)
    assert found.lines("onnx") == [
        "beside eager, on photos of 48x40, 37x25:",
        "  a    largest relative error 1.3e-05  smallest cosine 0.12346",
        "  map  largest relative error 0.0e+00  smallest cosine 1.00000",
        "  latency at 48x40: onnx 2.0 ms, eager 10.0 ms, ratio 0.20 (3 threads, AVX9)",
    ]


def test_the_smallest_cosine_of_a_file(photos, monkeypatch):
    """Of any output on any size; eager runs once for all files."""
    ran = []

    def counted(x):
        ran.append(tuple(x.shape))
        return network(x)

    def run(batch):
        one, other = (x.numpy().copy() for x in network(torch.from_numpy(batch)))
        if batch.shape[2:] == SIZES[1]:
            other[0] *= -1
        return [one, other]

    monkeypatch.setattr(checking, "Runner", lambda path: run)
    cosine_of = checking.cosines_with(Source(counted, ABOUT, (40, 48)), photos)
    batch = np.concatenate([checking.normalised(p, ABOUT, SIZES[1]) for p in photos]).mean(1)
    squares = (batch.astype(np.float64) ** 2).sum((1, 2))
    expected = (squares[1] - squares[0]) / squares.sum()
    for _ in range(2):
        assert cosine_of("any") == pytest.approx(expected, rel=1e-5)
    assert ran == [(2, 3, *size) for size in SIZES]


def test_the_first_readable_photos_of_a_folder(tmp_path):
    (tmp_path / "b/c.png").mkdir(parents=True)
    for number, name in enumerate(("a.PNG", "b/x.jpg", "d.png", "e.png")):
        Image.new("RGB", (9, 7), (40 * number, 0, 0)).save(tmp_path / name)
    (tmp_path / "a0.png").write_text("broken")
    (tmp_path / "notes.txt").write_text("text")

    def found(count):
        return [int(photo[0, 0, 0]) // 30 for photo in checking.find_photos(tmp_path, count)]

    assert [found(count) for count in (1, 2, 3, 9)] == [[0], [0, 1], [0, 1, 2], [0, 1, 2, 4]]
    with pytest.raises(ExportError, match=r"c.png holds no photo \(.jpg, .jpeg, .png, .bmp, "):
        checking.find_photos(tmp_path / "b/c.png", 1)


@pytest.mark.parametrize("repeats", [1, 3, 4])
def test_the_median_without_the_first(repeats, monkeypatch):
    """Which compiles, or fills caches."""
    clock, seen, now = iter([90.0, 1.0, 5.0, 2.0, 7.0]), [], [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def function(image):
        seen.append(image)
        now[0] += next(clock)

    assert checking.seconds(function, "image", repeats) == {1: 1.0, 3: 2.0, 4: 3.5}[repeats]
    assert seen == ["image"] * (repeats + 1)


# Detections


def test_detections_are_compared_photo_by_photo(photos, monkeypatch):
    pytest.importorskip("detectron2")
    from dense.export import detections
    from dense.export.detections import Found

    about = ABOUT | {"outputs": ["boxes", "scores", "classes"]}
    source, asked, timed = Source(network, about, (40, 48)), [], []

    def eager(of, photo, size):
        assert of is source
        asked.append((int(photo[0, 0, 0]), size))
        score = 0.2 if size == (40, 72) else 0.9
        return Found(np.float32([[0, 0, 9, 9]]), np.float32([score]), np.array([1]))

    def run(image):
        score = 0.2 if image.shape[2:] == (40, 72) else 0.9
        moved = image.shape[2] / 1000
        found = np.float32([[0, 0, 9, 9 + moved]]), np.float32([score]), np.array([1])
        return (
            found
            if image.shape[2:] != (32, 32)
            else [np.tile(x, (2,) + (1,) * (x.ndim - 1)) for x in found]
        )

    monkeypatch.setattr(detections, "eager_detections", eager)
    monkeypatch.setattr(
        detections,
        "seconds",
        lambda f, image, repeats: timed.append((image.shape, repeats, f(image))) or len(timed),
    )
    found = detections.compare_detections(source, run, photos)
    sizes = (*SIZES, (32, 32))
    kinds = [int(photo[0, 0, 0]) for photo in photos]
    assert asked[:8] == [(kind, size) for size in sizes for kind in kinds]
    assert (found.sizes, found.pairs, found.below, found.alone) == (sizes, 8, 2, 2)
    assert found.errors["boxes"] == pytest.approx(0.04, rel=1e-3) and found.errors["scores"] == 0
    assert list(found.errors) == ["boxes", "scores"] and found.latency == (1, 2)
    assert [(shape, repeats) for shape, repeats, _ in timed] == [
        ((1, 3, 40, 48), 3),
        ((50, 60, 3), 3),
    ]
    assert asked[8:] == [(kinds[0], (40, 48))] and found.ratio == 0.5
    monkeypatch.setattr(detections, "latency_line", lambda *given: f"  {given}")
    assert found.lines("onnx") == [
        "beside eager, on photos of 48x40, 37x25, 72x40, 32x32:",
        "  8 detections above a score of 0.3, 2 of them the best of photos without any, "
        "matched one to one",
        "  boxes   largest error 4.0e-02 pixels",
        "  scores  largest error 0.0e+00",
        "  ('onnx', (40, 48), (1, 2))",
    ]


def test_what_detectron2_is_given(photos):
    """Pixels in its channels' order, resized; masks where it has them."""
    pytest.importorskip("detectron2")
    from dense.export.detections import eager_detections

    for masks in (False, True):
        given = []

        def inference(inputs, do_postprocess, masks=masks, given=given):
            given.append((inputs[0]["image"].numpy(), do_postprocess))
            found = SimpleNamespace(
                pred_boxes=SimpleNamespace(tensor=torch.zeros(2, 4)),
                scores=torch.ones(2),
                pred_classes=torch.arange(2),
                pred_masks=torch.arange(2.0).reshape(2, 1, 1, 1).expand(2, 1, 5, 6),
                has=lambda name: masks,
            )
            return [found]

        model = SimpleNamespace(model=SimpleNamespace(inference=inference))
        found = eager_detections(Source(model, BGR, (40, 48)), photos[0], (20, 30))
        resized = Image.fromarray(photos[0]).resize((30, 20), Image.Resampling.BILINEAR)
        ((image, processed),) = given
        np.testing.assert_array_equal(image, np.asarray(resized)[..., ::-1].transpose(2, 0, 1))
        assert processed is False and found.classes.tolist() == [0, 1]
        assert found.masks.shape == (2, 5, 6) if masks else found.masks is None
