"""The authors' whole UPerNet files, written by MMSegmentation 0.11, in our configs."""

import json

import numpy as np
import pytest
import torch
from mmseg.registry import MODELS

from backbones import CheckpointError
from dense.recipes import RECIPES
from dense.segmentation import load_predictor
from dense.segmentation.config import load_config
from tests.support import ROOT

pytestmark = pytest.mark.slow

WIDTHS = (96, 192, 384, 768)


def conv(name: str, outputs: int, inputs: int, kernel: int = 1) -> dict[str, tuple]:
    """A convolution without bias and its batch norm, as MMCV's ConvModule names them."""
    shapes = {f"{name}.conv.weight": (outputs, inputs, kernel, kernel)}
    for key in ("weight", "bias", "running_mean", "running_var"):
        shapes[f"{name}.bn.{key}"] = (outputs,)
    return shapes | {f"{name}.bn.num_batches_tracked": ()}


def released_upernet(family: str) -> dict[str, torch.Tensor]:
    """Every entry of ``upernet_{family}_tiny.pth``, filled with random values."""
    listed = json.loads((ROOT / f"tests/backbones/released/{family}_tiny.json").read_text())
    shapes = {
        f"backbone.{name}": shape
        for name, shape in listed.items()
        if not name.startswith(("norm.", "head."))
    }
    for i, width in enumerate(WIDTHS):
        for key in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"backbone.norm{i}.{key}"] = (width,)
        shapes[f"backbone.norm{i}.num_batches_tracked"] = ()
    for i in range(4):
        shapes |= conv(f"decode_head.psp_modules.{i}.1", 512, 768)
    shapes |= conv("decode_head.bottleneck", 512, 768 + 4 * 512, 3)
    for i in range(3):
        shapes |= conv(f"decode_head.lateral_convs.{i}", 512, WIDTHS[i])
        shapes |= conv(f"decode_head.fpn_convs.{i}", 512, 512, 3)
    shapes |= conv("decode_head.fpn_bottleneck", 512, 4 * 512, 3)
    shapes |= conv("auxiliary_head.convs.0", 256, 384, 3)
    for head, width in (("decode_head", 512), ("auxiliary_head", 256)):
        shapes |= {f"{head}.conv_seg.weight": (150, width, 1, 1), f"{head}.conv_seg.bias": (150,)}
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.rand(shape, generator=generator) if shape else torch.tensor(7)
        for name, shape in shapes.items()
    }


@pytest.mark.parametrize("family", ["dw_conv", "d_dw_conv"])
def test_a_released_file_runs_in_our_config(family, tmp_path):
    name = f"{family}_tiny_upernet_8xb2-160k_ade20k-512x512.py"
    config = tmp_path / "small.py"
    config.write_text(
        f'_base_ = "{RECIPES / "segmentation" / name}"\n'
        "test_pipeline = [dict(type='LoadImageFromFile'), dict(type='Resize', scale=(64, 48)),\n"
        "    dict(type='PackSegInputs')]\n"
    )
    released = released_upernet(family)
    classes = tuple(f"class {i}" for i in range(150))
    palette = [[i, i, i] for i in range(150)]
    meta = {"mmseg_version": "0.11.0", "CLASSES": classes, "PALETTE": palette}
    path = tmp_path / "upernet.pth"
    torch.save({"meta": meta, "state_dict": released}, path)
    predict = load_predictor(str(config), str(path))
    assert len(predict.report.matched) == len(released)
    assert "0 missing, 0 unexpected" in str(predict.report)
    assert predict.classes == classes and predict.palette[2] == (2, 2, 2)
    assert predict(np.zeros((60, 80, 3), np.uint8)).shape == (60, 80)

    model = MODELS.build(load_config(RECIPES / "segmentation" / name).model)
    model.load_state_dict(released)
    first = "backbone.layers.1.blocks.1.attn2conv.conv0.weight"
    assert model.backbone.stages[1].blocks[1].mixer.in_proj.weight.equal(released[first].flatten(1))
    assert model.backbone.norms["3"].running_var.equal(released["backbone.norm3.running_var"])

    del released["decode_head.fpn_bottleneck.conv.weight"]
    torch.save({"meta": meta, "state_dict": released}, path)
    with pytest.raises(CheckpointError, match="missing: decode_head.fpn_bottleneck.conv.weight"):
        load_predictor(str(config), str(path))
