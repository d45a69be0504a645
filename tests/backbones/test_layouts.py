"""Swin of four other libraries, random weights, through a file into ours: the outputs agree.

Weights are spread far wider than an initialisation's, so that a wrong name, order or shift shows.
"""

import json
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

import backbones
from backbones.layouts import LAYOUTS, from_ours, layout_of, to_ours
from dense.backbone import DenseBackbone

DEPTHS, HEADS = (1, 1, 2, 1), (2, 4, 8, 16)


def spread(model: nn.Module, seed: int = 0) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in model.named_parameters():
            noise = torch.randn(value.shape, generator=generator)
            if value.ndim == 1:
                value.add_(0.3 * noise)
            else:
                value.copy_(noise if "bias_table" in name else noise * value[0].numel() ** -0.5)
    model.eval()  # MMSegmentation's returns None
    return model


def of_timm() -> nn.Module:
    from timm.models.swin_transformer import SwinTransformer

    return SwinTransformer(
        embed_dim=32, depths=DEPTHS, num_heads=HEADS, num_classes=11, strict_img_size=False
    )


def of_torchvision() -> nn.Module:
    from torchvision.models.swin_transformer import SwinTransformer

    return SwinTransformer([4, 4], 32, DEPTHS, HEADS, [7, 7], num_classes=11)


def of_mmseg() -> nn.Module:
    pytest.importorskip("mmseg")
    from mmseg.models.backbones import SwinTransformer

    return SwinTransformer(embed_dims=32, depths=DEPTHS, num_heads=HEADS)


def of_detectron2() -> nn.Module:
    pytest.importorskip("detectron2")
    from detectron2.modeling.backbone import SwinTransformer

    return SwinTransformer(
        embed_dim=32,
        depths=DEPTHS,
        num_heads=HEADS,
        out_indices=(0, 1, 2, 3),
        drop_path_rate=0.0,
    )


LIBRARIES = {
    "timm": of_timm,
    "torchvision": of_torchvision,
    "openmmlab": of_mmseg,
    "detectron2": of_detectron2,
}
WRAPS = {
    "timm": lambda sd: sd,
    "torchvision": lambda sd: {"model_ema": {f"module.{k}": v for k, v in sd.items()}, "epoch": 3},
    "openmmlab": lambda sd: {"state_dict": {f"backbone.{k}": v for k, v in sd.items()}},
    "detectron2": lambda sd: {"model": {f"backbone.bottom_up.{k}": v for k, v in sd.items()}},
}


def close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()
    assert theirs.std() > 0.05  # so that agreement means something


@pytest.mark.parametrize("library", ["timm", "torchvision"])
@pytest.mark.parametrize("size", [(224, 224), (64, 116), (448, 448)])
def test_logits_are_those_of(library, size, tmp_path):
    if library == "timm" and size == (64, 116):
        pytest.skip("timm shifts where one window covers the map, which the others do not")
    theirs = spread(LIBRARIES[library]())
    torch.save(WRAPS[library](theirs.state_dict()), tmp_path / "theirs.pth")
    ours = timm.create_model("swin_nano", num_classes=11).eval()
    report = backbones.load_checkpoint(ours, tmp_path / "theirs.pth")
    assert not (report.missing or report.unexpected or report.resized)
    x = torch.randn(1, 3, *size)
    if library == "timm":
        theirs.set_input_size(size, window_size=7)
    with torch.no_grad():
        close(ours(x), theirs(x))


@pytest.mark.parametrize("library", ["openmmlab", "detectron2"])
@pytest.mark.parametrize("size", [(256, 320), (260, 332)])
def test_features_are_those_of(library, size, tmp_path):
    theirs = spread(LIBRARIES[library]())
    torch.save(WRAPS[library](theirs.state_dict()), tmp_path / "theirs.pth")
    ours = DenseBackbone("swin_nano", init=str(tmp_path / "theirs.pth")).eval()
    ours.init_weights()
    assert not backbones.load_checkpoint(ours, tmp_path / "theirs.pth").missing
    x = torch.randn(1, 3, *size)
    with torch.no_grad():
        outputs = theirs(x)
        outputs = list(outputs.values()) if isinstance(outputs, dict) else outputs
        for mine, their in zip(ours(x), outputs, strict=True):
            close(mine, their)


def entries(family: str) -> dict[str, torch.Tensor]:
    model = spread(timm.create_model(f"{family}_nano", num_classes=11))
    return {k: v for k, v in model.state_dict().items() if "relative_position_index" not in k}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("family", backbones.FAMILIES)
def test_a_round_trip_is_bit_exact(layout, family):
    ours = entries(family) | {"norms.0.weight": torch.randn(32), "norms.3.bias": torch.randn(256)}
    if family not in layout.inner:
        with pytest.raises(ValueError, match=f"{layout.name}.*holds.*not {family}"):
            from_ours(ours, layout)
        return
    theirs = from_ours(ours, layout)
    back = to_ours(theirs)
    kept = {name for name in ours if not name.startswith(layout.drops)}
    assert set(back) == kept
    assert all(back[name].equal(ours[name]) for name in kept)
    if layout.name not in ("ours", "detectron2"):
        assert layout_of(theirs) is layout


@pytest.mark.parametrize("library", LIBRARIES)
def test_their_own_model_takes_what_is_written_for_it(library):
    ours = spread(timm.create_model("swin_nano", num_classes=11))
    theirs = spread(LIBRARIES[library](), seed=1)
    written = from_ours(ours.state_dict(), LAYOUTS[library])
    result = theirs.load_state_dict(written, strict=False)
    assert not result.unexpected_keys
    # The norms of the outputs, which a classifier has not.
    assert all(name.startswith("norm") for name in result.missing_keys)
    x = torch.randn(1, 3, 256, 320) if library != "timm" else torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        if library in ("timm", "torchvision"):
            assert not result.missing_keys
            close(ours(x), theirs(x))
        else:
            ours = ours.forward_intermediates(x, indices=[3], intermediates_only=True)[0]
            outputs = theirs(x)
            last = outputs["p3"] if isinstance(outputs, dict) else outputs[3]
            close(theirs.norm3(ours.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), last)


@pytest.mark.parametrize("family", ["dw_conv", "d_dw_conv", "i_d_dw_conv"])
def test_the_names_and_shapes_of_the_released_files(family):
    """``released/*.json`` list every entry of the authors' classification files."""
    path = Path(__file__).with_name("released") / f"{family}_tiny.json"
    released = json.loads(path.read_text())
    model = timm.create_model(f"{family}_tiny", num_classes=1000)
    written = from_ours(model.state_dict(), LAYOUTS["original"])
    assert {name: list(value.shape) for name, value in written.items()} == released
