"""Our networks in transformers: the same as in timm, saved and read bit for bit."""

import pytest
import timm
import torch

pytest.importorskip("transformers", reason="transformers is not installed")

from transformers import (
    AutoBackbone,
    AutoConfig,
    AutoModel,
    AutoModelForImageClassification,
    UperNetConfig,
    UperNetForSemanticSegmentation,
)

import backbones
import dense.huggingface  # noqa: F401
from backbones.ablations import ABLATIONS
from dense.backbone import DenseBackbone
from tests.support import NANO

FULL = [name for name in backbones.MODEL_NAMES if not name.endswith("nano")]
ABLATION = "swin_sliding"


def config(name, **options):
    return AutoConfig.for_model("dense_backbone", backbone=name, **options)


def built(name, **options):
    torch.manual_seed(0)
    return AutoBackbone.from_config(config(name, **options)).eval()


@pytest.mark.parametrize("name", NANO)
def test_maps_are_those_of_the_dense_backbone(name):
    backbone = built(name, out_indices=(1, 3))
    torch.manual_seed(0)
    plain = DenseBackbone(name, out_indices=(1, 3), norm="BN").eval()
    assert backbone.network.state_dict().keys() == plain.state_dict().keys()
    images = torch.randn(2, 3, 45, 70)
    with torch.no_grad():
        maps, expected = backbone(images).feature_maps, plain(images)
    assert len(maps) == 2 and all(map(torch.equal, maps, expected))
    assert backbone.channels == [x.shape[1] for x in maps]
    assert backbone.out_features == ["stage2", "stage4"]


@pytest.mark.parametrize("name, ablation", [*((name, None) for name in NANO), (NANO[0], ABLATION)])
def test_saved_and_read_bit_for_bit(name, ablation, tmp_path):
    backbone = built(name, ablation=ablation, options=None if ablation else {"window_size": 5})
    with torch.no_grad():
        for p in backbone.parameters():
            p.add_(torch.rand_like(p), alpha=0.01)
    backbone.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path).eval()
    assert type(again.network.stages[0].blocks[0].mixer) is type(
        backbone.network.stages[0].blocks[0].mixer
    )
    _same_bytes(backbone, again)
    images = torch.randn(1, 3, 45, 70)
    with torch.no_grad():
        for one, other in zip(backbone(images)[0], again(images)[0], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def _same_bytes(one, other):
    for kind in ("named_parameters", "named_buffers"):
        first, second = dict(getattr(one, kind)()), dict(getattr(other, kind)())
        assert first.keys() == second.keys()
        for key, value in first.items():
            assert value.equal(second[key]), key


@pytest.mark.e2e
@pytest.mark.parametrize("name", FULL)
def test_full_size_networks_are_saved_and_read(name, tmp_path):
    backbone = built(name)
    backbone.save_pretrained(tmp_path)
    _same_bytes(backbone, AutoModel.from_pretrained(tmp_path))


@pytest.mark.parametrize("name", NANO)
def test_classifier_is_timms(name, tmp_path):
    torch.manual_seed(0)
    model = AutoModelForImageClassification.from_config(config(name, num_labels=5)).eval()
    torch.manual_seed(0)
    plain = timm.create_model(name, num_classes=5).eval()
    images, labels = torch.randn(2, 3, 64, 64), torch.tensor([1, 4])
    with torch.no_grad():
        out, expected = model(images, labels=labels), plain(images)
    assert out.logits.equal(expected)
    torch.testing.assert_close(out.loss, torch.nn.functional.cross_entropy(expected, labels))
    model.save_pretrained(tmp_path)
    again = AutoModelForImageClassification.from_pretrained(tmp_path)
    _same_bytes(model, again)
    assert again.config.num_labels == 5
    # A classifier's folder starts a backbone: all but the norms of its maps.
    backbone, report = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert all(".norms." in key for key in report["missing_keys"])
    assert backbone.network.patch_embed.proj.weight.equal(plain.patch_embed.proj.weight)


def test_gradient_checkpointing_and_frozen_stages():
    backbone = built("dw_conv_nano", frozen_stages=1).train()
    backbone.gradient_checkpointing_enable()
    assert all(stage.grad_checkpointing for stage in backbone.network.stages)
    sum(x.sum() for x in backbone(torch.randn(1, 3, 64, 64)).feature_maps).backward()
    frozen = {name for name, p in backbone.named_parameters() if p.grad is None}
    assert frozen and all("patch_embed" in n or "stages.0." in n for n in frozen)


def test_a_segmentor_of_transformers_trains_with_it():
    upernet = UperNetConfig(
        backbone_config=config("i_d_dw_conv_nano", drop_path_rate=0.1),
        hidden_size=16,
        num_labels=4,
        auxiliary_in_channels=128,
        auxiliary_channels=8,
    )
    model = UperNetForSemanticSegmentation(upernet).train()
    labels = torch.randint(0, 4, (2, 64, 64))
    model(torch.randn(2, 3, 64, 64), labels=labels).loss.backward()
    assert all(p.grad is not None for p in model.backbone.parameters())


@pytest.mark.parametrize(
    "wrong, said",
    [
        (dict(backbone="swin_huge"), "no backbone 'swin_huge': swin_nano, swin_tiny"),
        (dict(ablation="swin_slidin"), "no ablation 'swin_slidin'; near it are swin_sliding"),
        (dict(ablation="volo_d1_dw_conv"), "classifier alone"),
        (dict(out_features=["stage5"]), "out_features must be a subset of stage_names"),
    ],
)
def test_wrong_values_are_named(wrong, said):
    with pytest.raises(Exception, match=said):
        config(wrong.pop("backbone", "swin_nano"), **wrong)


def test_every_ablation_that_is_a_pyramid_has_a_config():
    for name, row in ABLATIONS.items():
        if row.is_pyramid:
            assert config("swin_nano", ablation=name).network()[0] == row.name("nano")
