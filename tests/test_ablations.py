"""The paper's ablations: each row is counted, runs in every framework, fuses and is saved."""

from functools import cache

import pytest
import timm
import torch
from torch._subclasses import FakeTensorMode

import backbones
from backbones.ablations import ABLATIONS, AblationError, ablated
from backbones.families import SIZES
from dense.analysis import complexity
from tests.support import ROOT

PYRAMIDS = [name for name, ablation in ABLATIONS.items() if ablation.is_pyramid]

# Parameters in millions and multiply-adds in billions, counted apart from this code; where the
# comment says so, not what the paper prints.
COUNTS = {
    "swin": (28.288, 4.509),
    "swin_local_mlp": (26.156, 3.745),
    "dw_conv": (24.173, 3.743),
    "d_dw_conv": (51.132, 3.770),
    "i_d_dw_conv": (26.244, 4.391),
    "swin_local_mlp_channels_own": (35.292, 3.745),
    "swin_local_mlp_shared": (24.298, 3.745),
    "dw_conv_positions_own": (26.146, 3.743),  # 26.2
    "dw_conv_channels_shared": (23.963, 3.743),  # 23.9
    "swin_heads_of_1": (29.011, 4.509),
    "swin_heads_of_2": (28.638, 4.509),
    "swin_heads_of_4": (28.452, 4.509),
    "swin_heads_of_8": (28.358, 4.509),
    "swin_heads_of_16": (28.312, 4.509),
    "swin_heads_of_32": (28.288, 4.509),
    "swin_heads_of_96": (28.273, 4.509),
    "swin_local_mlp_heads_of_1": (94.760, 3.745),
    "swin_local_mlp_heads_of_2": (59.352, 3.745),
    "swin_local_mlp_heads_of_4": (41.647, 3.745),
    "swin_local_mlp_heads_of_8": (32.795, 3.745),
    "swin_local_mlp_heads_of_16": (28.369, 3.745),
    "swin_local_mlp_heads_of_32": (26.156, 3.745),
    "swin_local_mlp_heads_of_96": (24.681, 3.745),
    "i_d_dw_conv_local": (26.469, 4.464),  # 27, 4.4
    "swin_batchnorm": (28.288, 4.501),
    "swin_centered_batchnorm": (28.297, 4.501),
    "dw_conv_layernorm": (24.173, 3.760),
    "dw_conv_centered_batchnorm": (24.190, 3.743),
    "volo_d1": (26.632, 6.941),
    "volo_d1_local_attention": (26.558, 7.146),
    "volo_d1_dw_conv": (26.299, 6.889),
    "twins_svt_small": (24.061, 2.942),
    "twins_svt_small_dw_conv": (22.446, 2.685),
    "swin_se": (28.563, 4.509),
    "dw_conv_se": (24.447, 3.743),
    "swin_set": (28.265, 4.509),
    "swin_sliding": (28.288, 4.509),
    "swin_sliding_set": (28.265, 4.509),
    "swin_sliding_static": (28.505, 4.58),
    "swin_sliding_post": (28.290, 4.53),
    "swin_sliding_pre": (28.297, 4.525),
    "swin_sliding_pre_depthwise": (28.337, 4.525),
    "swin_sliding_pre_full": (47.706, 7.633),
}


ROUNDED = ("swin_sliding_static", "swin_sliding_post")


@cache
def count(name: str) -> complexity.Count:
    model, options = ABLATIONS[name].name(), ABLATIONS[name].arguments()
    window = 7 if ABLATIONS[name].is_pyramid else None
    return complexity.classifier(model, window_size=window, **options)


@pytest.mark.slow
@pytest.mark.parametrize("name", COUNTS)
def test_counts(name):
    parameters, flops = COUNTS[name]
    counted = count(name)
    assert round(counted.parameters / 1e6, 3) == parameters
    assert counted.flops / 1e9 == pytest.approx(flops, abs=0.005 if name in ROUNDED else 0.0011)


def test_every_row_is_counted():
    assert set(COUNTS) == set(ABLATIONS)


def test_the_papers_figures_but_for_the_rows_that_say_so():
    """Parameters round to the paper's as it rounds them; a row whose do not has a note."""
    for name, ablation in ABLATIONS.items():
        if ablation.parameters is not None:
            digits = 1 if isinstance(ablation.parameters, float) else 0
            fits = round(COUNTS[name][0], digits) == ablation.parameters
            assert fits == (not ablation.note), name
        if ablation.flops is not None:
            off = abs(COUNTS[name][1] / ablation.flops - 1)
            assert off < (0.06 if name == "twins_svt_small" else 0.02), name


def test_arguments_of_a_size():
    assert ablated("dw_conv_channels_shared", "swin_tiny") == (
        "dw_conv_tiny",
        {"num_heads": (3, 6, 12, 24)},
    )
    assert ablated("dw_conv_positions_own", "swin_base") == (
        "dw_conv_base",
        {"shared": False, "num_heads": (4, 8, 16, 32)},
    )
    assert ablated("volo_d1_dw_conv", "swin_nano") == ("volo_d1_dw_conv", {})
    # At most 96 channels a head, where 96 does not divide.
    assert ablated("swin_heads_of_96", "swin_base")[1] == {"num_heads": (2, 4, 8, 16)}
    for name in PYRAMIDS:
        options = dict(ABLATIONS[name].options)
        for size, line in SIZES.items():
            heads = ABLATIONS[name].arguments(size).get("num_heads", ())
            assert all(line["embed_dim"] * 2**i % n == 0 for i, n in enumerate(heads))
        assert ABLATIONS[name].options == options


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("dw_conv_se", "swin_small"), "dw_conv_se is a dw_conv, which is not small but nano, "),
        (("dw_conv_sse", "dw_conv_nano"), "no ablation 'dw_conv_sse'; near it are dw_conv_se, "),
        (("resnet", "dw_conv_nano"), "no ablation 'resnet'; .*swin_se"),
        (("volo_d1_dw_conv", "dw_conv_nano", True), "volo_d1_dw_conv is a classifier alone: "),
        (("swin_se", "ResNet"), "needs a network of this package.* not 'ResNet'"),
    ],
)
def test_what_is_unknown_is_named(arguments, message):
    with pytest.raises(AblationError, match=message) as error:
        ablated(*arguments)
    assert "\n" not in str(error.value)


def build(name: str, seed: int = 0):
    model, options = ablated(name, "swin_nano")
    torch.manual_seed(seed)
    return timm.create_model(model, num_classes=5, **options)


@pytest.mark.parametrize("name", PYRAMIDS)
def test_a_row_trains_fuses_and_is_saved(name, tmp_path):
    """As a timm model at an odd image size."""
    model, x = build(name), torch.randn(2, 3, 45, 38)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    model(x).square().sum().backward()
    optimizer.step()
    assert all(p.grad is not None and p.isfinite().all() for p in model.parameters())
    model.eval()
    with torch.no_grad():
        logits = model(x)
        assert logits.shape == (2, 5)
        torch.testing.assert_close(backbones.fuse(model)(x), logits, rtol=1e-3, atol=1e-4)
        torch.save({"model": model.state_dict()}, tmp_path / "row.pth")
        other = build(name, seed=1).eval()
        report = backbones.load_checkpoint(other, tmp_path / "row.pth")
        assert not (report.missing or report.unexpected or report.resized)
        assert other(x).equal(logits)


def step(backbone: torch.nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """One training step; the maps of an evaluation."""
    maps = backbone(x)
    maps = maps.values() if isinstance(maps, dict) else maps
    sum(m.square().mean() for m in maps).backward()
    trained = [p for p in backbone.parameters() if p.requires_grad]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trained)
    with torch.no_grad():
        maps = backbone.eval()(x)
    return list(maps.values() if isinstance(maps, dict) else maps)


@pytest.mark.parametrize("name", PYRAMIDS)
def test_a_row_in_mmsegmentation(name):
    pytest.importorskip("mmseg")
    from mmengine.registry import MODELS

    import dense.segmentation  # noqa: F401

    model, options = ablated(name, "swin_nano", dense=True)
    backbone = MODELS.build(dict(type=model, norm="BN", fuse=True, **options))
    maps = step(backbone, torch.randn(2, 3, 45, 38))
    assert [m.shape[1:] for m in maps] == [(32, 12, 10), (64, 6, 5), (128, 3, 3), (256, 2, 2)]


@pytest.mark.parametrize("name", PYRAMIDS)
def test_a_row_in_detectron2(name):
    pytest.importorskip("detectron2")
    from detectron2.config import LazyCall as L
    from detectron2.config import instantiate

    from dense.detection import PyramidBackbone

    model, options = ablated(name, "swin_nano", dense=True)
    cfg = L(PyramidBackbone)(name=model, norm="FrozenBN", **options)
    maps = step(instantiate(cfg), torch.randn(2, 3, 45, 38))
    assert [m.shape[1] for m in maps] == [32, 64, 128, 256]


@pytest.mark.parametrize("name", [name for name in PYRAMIDS if "heads_of" not in name])
def test_every_tensor_is_on_the_networks_device(name):
    """Fake tensors of two devices refuse to meet; those of "meta" need no such device."""
    model, arguments = ablated(name, "swin_nano")
    with FakeTensorMode(allow_non_fake_inputs=True):
        with torch.device("meta"):
            network = timm.create_model(model, **arguments)
        scores = network(torch.randn(2, 3, 70, 94, device="meta"))
        scores.sum().backward()
        found = {p.grad.device.type for p in network.parameters()}
    assert found == {scores.device.type} == {"meta"}


def test_what_is_near_a_name():
    """At most four that are like it; all where none is."""
    near = "swin_batchnorm, swin_centered_batchnorm, swin_set, dw_conv_centered_batchnorm"
    with pytest.raises(AblationError) as error:
        ablated("swin_btchnorm", "swin_nano")
    assert str(error.value) == f"no ablation 'swin_btchnorm'; near it are {near}"
    with pytest.raises(AblationError) as error:
        ablated("x", "swin_nano")
    assert str(error.value) == f"no ablation 'x'; near it are {', '.join(ABLATIONS)}"


def test_the_readme_has_the_papers_figures():
    """Without a count of any network: what the paper says of a row, its options, and the notes."""
    page = (ROOT / "backbones/README.md").read_text()
    block = page.partition("complexity.py ablations --write -->")[2].partition("<!-- End")[0]
    lines = [line.strip("| ").split(" | ") for line in block.splitlines() if line[:3] == "| `"]
    assert [line[0].strip("`") for line in lines] == list(ABLATIONS)
    for (_, table, row, model, _, millions, _, _, billions, _, top1), ablation in zip(
        lines, ABLATIONS.values(), strict=True
    ):
        assert (table, row) == (ablation.table, ablation.row)
        options = "".join(f", {key}={value!r}" for key, value in ablation.arguments().items())
        assert model == f'`create_model("{ablation.name()}"{options})`'
        told = (ablation.parameters, ablation.flops, ablation.top1)
        expected = [
            "-" if value is None else f"{value}{unit}"
            for value, unit in zip(told, "MG%", strict=True)
        ]
        assert [millions, billions, top1] == expected
    notes = [f"- `{name}`: {row.note}" for name, row in ABLATIONS.items() if row.note]
    assert [line for line in block.splitlines() if line[:2] == "- "] == notes
