"""What stands in for mmcv's compiled operators, and how it gets to where mmcv looks for it."""

import importlib.util
import itertools
import os
import shutil
import sys
import zipfile
from functools import partial
from importlib import metadata
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torchvision

pytest.importorskip("mmcv", reason="mmcv is not installed")

import mmcv.ops
from torch.autograd import gradcheck

import dense.segmentation  # noqa: F401
from dense.openmmlab import mmcv_ext, mmcv_lite
from tests.support import run_bare, run_code

USING = [sys.modules[f"mmcv.ops.{m}"] for m in ("nms", "roi_align", "focal_loss")]
USING.append(sys.modules["mmcv.ops.multi_scale_deform_attn"])
ROI_ALIGN = {"aligned": [True, False], "sampling_ratio": [0, 1, 2], "output_size": [(7, 7), (3, 5)]}


@pytest.fixture
def stand_in(monkeypatch):
    """mmcv's own Python over the stand-in, whichever mmcv is installed."""
    use(mmcv_ext, monkeypatch)
    return mmcv_ext


def use(extension, monkeypatch):
    for module in USING:
        monkeypatch.setattr(module, "ext_module", extension)


def boxes_and_scores(count, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    corners = 60 * torch.rand(count, 2, generator=g, dtype=dtype)
    boxes = torch.cat([corners, corners + 40 * torch.rand(count, 2, generator=g, dtype=dtype)], 1)
    return boxes, torch.rand(count, generator=g, dtype=dtype)


def rois_of(count, dtype=torch.float32, images=2):
    boxes, _ = boxes_and_scores(count, dtype)
    return torch.cat([torch.arange(count, dtype=dtype)[:, None] % images, 4 * boxes - 20], 1)


def kept_one_by_one(boxes, scores, threshold, offset):
    """Greedy suppression as its definition says, a pair at a time."""
    kept = []
    for i in sorted(range(len(boxes)), key=lambda i: -scores[i].item()):
        left, top, right, bottom = boxes[i].double().tolist()
        for j in kept:
            a, b, c, d = boxes[j].double().tolist()
            width = max(0, min(right, c) - max(left, a) + offset)
            height = max(0, min(bottom, d) - max(top, b) + offset)
            area = (right - left + offset) * (bottom - top + offset)
            other = (c - a + offset) * (d - b + offset)
            if width * height / (area + other - width * height) > threshold:
                break
        else:
            kept.append(i)
    return kept


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("threshold", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("count", [0, 1, 2, 40, 200])
def test_nms_keeps_what_its_definition_keeps(stand_in, count, threshold, offset):
    boxes, scores = boxes_and_scores(count)
    expected = kept_one_by_one(boxes, scores, threshold, offset)
    dets, kept = mmcv.ops.nms(boxes, scores, threshold, offset=offset)
    assert kept.tolist() == expected
    assert dets.equal(torch.cat([boxes[kept], scores[kept, None]], 1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_nms_of_half_precision_on_a_cpu(stand_in, dtype):
    boxes, scores = (x.to(dtype) for x in boxes_and_scores(100))
    kept = stand_in.nms(boxes, scores, 0.5, 0)
    assert kept.equal(stand_in.nms(boxes.float(), scores.float(), 0.5, 0))


def test_roi_align_is_the_mean_of_bilinear_samples(stand_in):
    """On a map linear in x and y the mean over a box is the value in its middle."""
    x = torch.arange(40.0).expand(30, 40)
    y = torch.arange(30.0)[:, None].expand(30, 40)
    maps = torch.stack([x, y, 2 * x - 3 * y])[None].double()
    rois = torch.tensor([[0, 8.0, 12, 40, 60], [0, 20.0, 4, 52, 52]]).double()
    for sampling_ratio in (0, 1, 3):
        out = mmcv.ops.roi_align(maps, rois, 1, 0.5, sampling_ratio, "avg", True)
        middle = (rois[:, 1:3] + rois[:, 3:5]) / 2 * 0.5 - 0.5
        expected = torch.stack([*middle.T, 2 * middle[:, 0] - 3 * middle[:, 1]], 1)
        torch.testing.assert_close(out[..., 0, 0], expected)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("values", itertools.product(*ROI_ALIGN.values()))
def test_roi_align_gradients(stand_in, values, memory_format):
    options = dict(zip(ROI_ALIGN, values, strict=True))
    maps = torch.randn(2, 3, 9, 11, dtype=torch.float64).contiguous(memory_format=memory_format)
    rois = rois_of(4, torch.float64)

    def align(x):
        args = options["output_size"], 0.1, options["sampling_ratio"], "avg", options["aligned"]
        return mmcv.ops.roi_align(x, rois, *args)

    assert gradcheck(align, maps.requires_grad_())


def test_roi_align_of_no_boxes(stand_in):
    maps = torch.randn(2, 3, 9, 11, requires_grad=True)
    out = mmcv.ops.roi_align(maps, torch.zeros(0, 5), (7, 7), 0.25, 0, "avg", True)
    out.sum().backward()
    assert out.shape == (0, 3, 7, 7) and not maps.grad.any()


def test_roi_align_takes_boxes_of_another_dtype(stand_in):
    """Autocast gives maps of 16 bits and boxes of 32."""
    maps, rois = torch.randn(2, 3, 9, 11), rois_of(5)
    out = mmcv.ops.roi_align(maps.bfloat16(), rois, (7, 7), 0.1, 2, "avg", True)
    expected = mmcv.ops.roi_align(maps.bfloat16().float(), rois, (7, 7), 0.1, 2, "avg", True)
    torch.testing.assert_close(out.float(), expected, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_roi_align_gradients_of_other_dtypes(stand_in, dtype):
    maps, rois = torch.randn(2, 3, 9, 11).to(dtype), rois_of(5, torch.float64)

    def gradient(x):
        x.requires_grad_()
        mmcv.ops.roi_align(x, rois.to(x.dtype), (7, 7), 0.1, 2, "avg", True).sum().backward()
        return x.grad

    found, expected = gradient(maps.clone()), gradient(maps.double())
    assert found.dtype == dtype
    tolerance = 0.02 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)
    # Boxes in another dtype than the gradient's.
    output, grad = torch.ones(5, 3, 7, 7, dtype=dtype), torch.zeros_like(maps)
    options = None, None, grad, 7, 7, 0.1, 2, 1, True
    stand_in.roi_align_backward(output, rois, *options)
    torch.testing.assert_close(grad.double(), expected, rtol=tolerance, atol=tolerance)


def test_roi_align_has_no_maximum_in_either_direction(stand_in):
    tensors = [torch.zeros(1)] * 5
    for name in ("roi_align_forward", "roi_align_backward"):
        with pytest.raises(NotImplementedError, match="^roi_align with pool_mode='max' is one"):
            getattr(stand_in, name)(*tensors, 2, 2, 1.0, 0, 0, True)


@pytest.mark.parametrize("gamma, alpha", [(2.0, 0.25), (0.0, 0.5), (0.5, 0.9), (1.5, 0.1)])
def test_focal_loss_is_torchvisions(stand_in, gamma, alpha):
    logits = 6 * torch.randn(50, 4, dtype=torch.float64)
    target = torch.arange(50) % 5  # 4 is the background
    ours = mmcv.ops.sigmoid_focal_loss(logits, target, gamma, alpha, None, "none")
    one_hot = torch.nn.functional.one_hot(target, 5)[:, :4].double()
    theirs = torchvision.ops.sigmoid_focal_loss(logits, one_hot, alpha, gamma)
    torch.testing.assert_close(ours, theirs)
    weight = torch.rand(4, dtype=torch.float64)
    weighted = mmcv.ops.sigmoid_focal_loss(logits, target, gamma, alpha, weight, "none")
    torch.testing.assert_close(weighted, theirs * torch.cat([weight, torch.ones(1)])[target, None])

    def loss(x):
        return mmcv.ops.sigmoid_focal_loss(x, target, gamma, alpha, weight, "sum")

    assert gradcheck(loss, logits.requires_grad_())


def test_focal_loss_of_sure_logits_is_finite(stand_in):
    logits = torch.tensor([[200.0, -200.0], [-200.0, 200.0]], requires_grad=True)
    mmcv.ops.sigmoid_focal_loss(logits, torch.tensor([0, 0]), 0.5, 0.25, None, "sum").backward()
    assert logits.grad.isfinite().all()


def test_deformable_attention_samples_bilinearly(stand_in):
    """Against each sample taken and weighted by itself, and by finite differences."""
    shapes = [(3, 4), (2, 2)]
    heads, depth, points, queries = 2, 3, 2, 3
    keys = sum(h * w for h, w in shapes)
    value = torch.randn(1, keys, heads, depth, dtype=torch.float64)
    locations = 1.2 * torch.rand(1, queries, heads, len(shapes), points, 2).double() - 0.1
    weights = torch.rand(1, queries, heads, len(shapes), points).double()
    starts = torch.tensor([0, 12])

    def attend(*inputs):
        return mmcv.ops.multi_scale_deform_attn.MultiScaleDeformableAttnFunction.apply(
            inputs[0], torch.tensor(shapes), starts, *inputs[1:], 64
        )

    expected = torch.zeros(1, queries, heads, depth, dtype=torch.float64)
    for q, h, level, p in itertools.product(
        range(queries), range(heads), range(len(shapes)), range(points)
    ):
        rows, columns = shapes[level]
        x, y = (locations[0, q, h, level, p] * torch.tensor([columns, rows]) - 0.5).tolist()
        for row, column in itertools.product(range(rows), range(columns)):
            share = max(0, 1 - abs(x - column)) * max(0, 1 - abs(y - row))
            key = starts[level] + row * columns + column
            expected[0, q, h] += weights[0, q, h, level, p] * share * value[0, key, h]
    torch.testing.assert_close(attend(value, locations, weights), expected.flatten(2))
    inputs = [x.requires_grad_() for x in (value, locations, weights)]
    assert gradcheck(attend, inputs)


def test_another_operator_is_named_when_it_is_called(stand_in):
    assert stand_in.deform_conv_forward is not None  # mmcv looks every one up at import
    for call, name in (
        (lambda: stand_in.softnms(), "softnms"),
        (
            lambda: mmcv.ops.roi_align(torch.zeros(1, 1, 4, 4), rois_of(1), 2, 1.0, 0, "max", True),
            "roi_align with pool_mode='max'",
        ),
    ):
        with pytest.raises(
            NotImplementedError, match=rf"^{name} is one of .*MMCV=compiled"
        ) as info:
            call()
        assert "\n" not in str(info.value)
    assert not hasattr(stand_in, "__path__")


def test_mmcvs_report_of_the_environment(stand_in, monkeypatch):
    assert stand_in.get_compiler_version() == "none: torchvision's operators stand in"
    for version, told in (("12.4", "torchvision's, of CUDA 12.4"), (None, "none")):
        monkeypatch.setattr(torch.version, "cuda", version)
        assert stand_in.get_compiling_cuda_version() == told
    assert stand_in.softnms.__name__ == "softnms"
    with pytest.raises(AttributeError, match="__path__"):
        stand_in.__path__  # noqa: B018
    with pytest.raises(NotImplementedError) as error:
        stand_in.softnms(1, offset=0)
    assert str(error.value) == (
        "softnms is one of mmcv's compiled operators, and this is mmcv-lite: compile mmcv by `make "
        "setup MMCV=compiled`, or in an environment of your own by `pip uninstall mmcv-lite` and "
        "`MMCV_WITH_OPS=1 pip install --no-build-isolation mmcv==2.1.0`"
    )


# How it gets there


def test_it_is_offered_once_and_under_its_name_alone(monkeypatch):
    monkeypatch.setattr(sys, "meta_path", others := [object()])
    for _ in range(2):
        mmcv_lite.offer()
    first, finder = others
    assert isinstance(finder, mmcv_lite._StandIn) and not isinstance(first, mmcv_lite._StandIn)
    assert finder.find_spec("mmcv._ext").origin == str(mmcv_lite.STAND_IN)
    assert finder.find_spec("mmcv._extra") is finder.find_spec("mmcv") is None


@pytest.fixture
def bare_mmcv(tmp_path):
    """A folder for PYTHONPATH with an mmcv-lite in it, as a package manager leaves it."""
    package = tmp_path / "site" / "mmcv"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("__version__ = '2.1.0'\n")
    about = package.parent / "mmcv_lite-2.1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: mmcv-lite\nVersion: 2.1.0\n")
    (tmp_path / "cached").write_text(f"mmcv/__init__.py,,\n{about.name}/RECORD,,\n")
    os.link(tmp_path / "cached", about / "RECORD")
    return package


def python(package, code):
    return run_bare(partial(run_code, code, first=package.parent))


INSTALL = "import runpy; runpy.run_module('dense.openmmlab.mmcv_lite', run_name='__main__')"
WHERE = "import mmcv._ext; print(mmcv._ext.__file__)"


def test_what_installing_says_and_records(bare_mmcv, tmp_path, monkeypatch):
    """Of this process's packages none is touched."""
    about = bare_mmcv.parent / "mmcv_lite-2.1.0.dist-info"
    found = metadata.Distribution.at(about)
    asked = []
    # Another package's list has no file of its name, and a package may have no list.
    names = [SimpleNamespace(name="METADATA"), *found.files]
    package = SimpleNamespace(
        distribution=lambda name: asked.append(name) or found,
        files=lambda name: asked.append(name) or names,
        PackageNotFoundError=metadata.PackageNotFoundError,
    )
    spec = SimpleNamespace(origin=str(bare_mmcv / "__init__.py"))
    util = SimpleNamespace(find_spec=lambda name: asked.append(name) or spec)
    monkeypatch.setattr(mmcv_lite, "importlib", SimpleNamespace(util=util))
    monkeypatch.setattr(mmcv_lite, "metadata", package)
    monkeypatch.setattr(mmcv_lite, "require", lambda *given: asked.append(given))
    installed = bare_mmcv / "_ext.py"
    record = ["mmcv/__init__.py,,", f"{about.name}/RECORD,,", "mmcv/_ext.py,,"]
    for _ in range(2):
        assert mmcv_lite.install() == f"{installed} stands in for mmcv's compiled operators"
        assert installed.read_text() == Path(mmcv_ext.__file__).read_text()
        assert (about / "RECORD").read_text() == "\n".join([*record, ""])
    assert asked[:4] == [("mmcv", "segmentation"), "mmcv", "mmcv-lite", "mmcv-lite"]
    for files in ([], None, [SimpleNamespace(name="METADATA")]):
        package.files = lambda name, files=files: files
        assert mmcv_lite.install().endswith(" stands in for mmcv's compiled operators")
    compiled = bare_mmcv / f"_ext{EXTENSION_SUFFIXES[-1]}"
    compiled.touch()
    installed.unlink()
    assert mmcv_lite.install() == f"mmcv is compiled ({compiled}): nothing to do"
    assert not installed.exists()


@pytest.mark.slow
def test_our_import_offers_it_where_there_is_none(bare_mmcv):
    assert "No module named 'mmcv._ext'" in python(bare_mmcv, WHERE).stderr
    done = python(bare_mmcv, f"import dense.segmentation\n{WHERE}")
    assert done.stdout.strip() == str(mmcv_lite.STAND_IN), done.stderr


@pytest.mark.e2e
def test_our_import_leaves_a_compiled_one_alone(bare_mmcv):
    (bare_mmcv / "_ext.py").touch()
    done = python(bare_mmcv, f"import dense.segmentation\n{WHERE}")
    assert done.stdout.strip() == str(bare_mmcv / "_ext.py"), done.stderr


@pytest.mark.slow
def test_installing_it_serves_programs_that_do_not_import_us(bare_mmcv, tmp_path):
    for _ in range(2):
        done = python(bare_mmcv, INSTALL)
        assert done.returncode == 0 and "stands in for" in done.stdout, done.stderr
    done = python(bare_mmcv, f"{WHERE}\nmmcv._ext.nms")
    assert done.stdout.strip() == str(bare_mmcv / "_ext.py"), done.stderr
    record = (bare_mmcv.parent / "mmcv_lite-2.1.0.dist-info/RECORD").read_text().splitlines()
    assert record.count("mmcv/_ext.py,,") == 1 and len(record) == 3
    # The file that the package manager keeps for other environments is not written to.
    assert "_ext" not in (tmp_path / "cached").read_text()


@pytest.mark.slow
def test_installing_it_leaves_a_compiled_one_alone(bare_mmcv):
    compiled = bare_mmcv / f"_ext{EXTENSION_SUFFIXES[0]}"
    compiled.touch()
    done = python(bare_mmcv, INSTALL)
    assert done.returncode == 0 and f"mmcv is compiled ({compiled})" in done.stdout
    assert not (bare_mmcv / "_ext.py").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "code",
    [
        "from dense import require; require('mmseg', 'segmentation')",
        "from dense import require; require('mmdet', 'mmdetection')",
        "from dense.openmmlab.mmcv_lite import install; install()",
    ],
)
def test_a_missing_mmcv_is_named_with_what_installs_it(bare_mmcv, code):
    done = python(bare_mmcv, f"import sys; sys.modules['mmcv'] = None\n{code}")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(
        "ImportError: mmcv is not installed: run pip install mmcv-lite==2.1.0"
    )


# Beside compiled mmcv


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """The module of the compiled mmcv in the folder that WHEELHOUSE names."""
    folder = os.environ.get("WHEELHOUSE")
    tag = "cp{}{}".format(*sys.version_info)
    wheels = sorted(Path(folder).glob(f"mmcv-2*-{tag}-*.whl")) if folder else []
    if not wheels:
        pytest.skip(f"no mmcv-2*-{tag}-*.whl to compare with: WHEELHOUSE is {folder}")
    out = tmp_path_factory.mktemp("compiled")
    with zipfile.ZipFile(wheels[-1]) as wheel:
        (name,) = (n for n in wheel.namelist() if n.startswith("mmcv/_ext"))
        wheel.extract(name, out)
    spec = importlib.util.spec_from_file_location("compiled._ext", out / name)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    shutil.rmtree(out)


def on_each(compiled, monkeypatch, function):
    results = []
    for extension in (mmcv_ext, compiled):
        with monkeypatch.context() as patch:
            use(extension, patch)
            results.append(function())
    return results


@pytest.mark.e2e
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("count", [0, 1, 7, 1000])
@pytest.mark.parametrize("seed", range(20))
def test_nms_is_compiled_mmcvs(compiled, monkeypatch, seed, count, offset):
    """In float32: compiled mmcv takes nothing else on a CPU."""
    boxes, scores = boxes_and_scores(count, seed=seed)

    def kept(boxes, scores):
        nms = mmcv.ops.nms
        return on_each(compiled, monkeypatch, lambda: nms(boxes, scores, 0.5, offset=offset)[1])

    ours, theirs = kept(boxes, scores)
    assert ours.equal(theirs)
    # Which of two equal scores comes first is nobody's promise: boxes that do not touch.
    ours, theirs = kept(boxes + 200 * torch.arange(count)[:, None], (scores * 8).round())
    assert len(ours) == count and ours.sort()[0].equal(theirs.sort()[0])


@pytest.mark.e2e
@pytest.mark.parametrize("classes", [1, 3, 80])
@pytest.mark.parametrize("count", [1, 7, 1000, 12000])
def test_nms_by_class_is_compiled_mmcvs(compiled, monkeypatch, count, classes):
    boxes, scores = boxes_and_scores(count)
    index, options = torch.arange(count) % classes, dict(type="nms", iou_threshold=0.6)
    ours, theirs = on_each(
        compiled, monkeypatch, lambda: mmcv.ops.batched_nms(boxes, scores, index, options)
    )
    assert all(a.equal(b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.e2e
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("values", itertools.product(*ROI_ALIGN.values()))
@pytest.mark.parametrize("count", [0, 1, 100])
def test_roi_align_is_compiled_mmcvs(compiled, monkeypatch, count, values, dtype):
    options = dict(zip(ROI_ALIGN, values, strict=True))
    maps = torch.randn(2, 8, 25, 37, dtype=dtype, requires_grad=True)
    rois = rois_of(count, dtype)

    def align():
        # A scale that float32 holds: compiled mmcv keeps it in that whatever the maps are.
        args = options["output_size"], 0.125, options["sampling_ratio"], "avg", options["aligned"]
        out = mmcv.ops.roi_align(maps, rois, *args)
        weights = torch.linspace(-1, 1, max(out.numel(), 1), dtype=dtype)[: out.numel()]
        return out, torch.autograd.grad((out.flatten() * weights).sum(), maps)[0]

    for ours, theirs in zip(*on_each(compiled, monkeypatch, align), strict=True):
        assert ours.equal(theirs)


@pytest.mark.e2e
def test_a_detectors_first_losses_are_compiled_mmcvs(compiled, monkeypatch):
    pytest.importorskip("mmdet", reason="MMDetection is not installed")
    from dense.backbone import revert_sync_batchnorm
    from tests import test_mmdetection as detectors

    def losses_and_features():
        model = revert_sync_batchnorm(detectors.build(detectors.config(detectors.NANO))).train()
        data = model.data_preprocessor(detectors.batch((96, 128), (64, 75)), training=True)
        torch.manual_seed(0)
        maps = model.extract_feat(data["inputs"])
        features = model.roi_head.bbox_roi_extractor[0](maps[:4], rois_of(50))
        loss, each = model.parse_losses(model(**data, mode="loss"))
        loss.backward()
        gradients = torch.cat([p.grad.flatten() for p in model.parameters()])
        return each, features, gradients

    ours, theirs = on_each(compiled, monkeypatch, losses_and_features)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
