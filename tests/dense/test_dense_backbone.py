"""The dense backbone: one network whoever builds it, and what users ask of it."""

import contextlib
import copy
import logging

import pytest
import timm
import torch
from torch import nn

import backbones
from backbones.layouts import LAYOUTS, from_ours
from dense.backbone import DenseBackbone, _warn_of_fallback, revert_sync_batchnorm
from tests.support import NANO

X = torch.randn(2, 3, 70, 101)


@pytest.mark.parametrize("name", NANO)
def test_features_are_timms(name):
    torch.manual_seed(0)
    classifier = timm.create_model(name).eval()
    backbone = DenseBackbone(name, norm="BN").eval()
    backbones.checkpoints.fit(classifier.state_dict(), backbone, "classifier")
    backbone.load_state_dict(classifier.state_dict(), strict=False)
    for norm in backbone.norms.values():
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    with torch.no_grad():
        maps = classifier.forward_intermediates(X, intermediates_only=True)
        outputs = backbone(X)
        for i, (got, features) in enumerate(zip(outputs, maps, strict=True)):
            norm = backbone.norms[str(i)]
            if name.startswith("swin"):
                features = features.permute(0, 2, 3, 1)
                expected = nn.functional.layer_norm(
                    features, features.shape[-1:], norm.weight, norm.bias
                ).permute(0, 3, 1, 2)
            else:
                weight, bias = norm.weight[:, None, None], norm.bias[:, None, None]
                expected = features / (1 + norm.eps) ** 0.5 * weight + bias
            torch.testing.assert_close(got, expected)
            assert backbone.strides[i] == 4 * 2**i and backbone.channels[i] == got.shape[1]


@pytest.mark.parametrize("out_indices", [(0,), (1, 3), (0, 1, 2, 3)])
def test_only_what_is_asked_for_is_built(out_indices):
    backbone = DenseBackbone("dw_conv_nano", out_indices=out_indices)
    outputs = backbone(X)
    assert type(outputs) is type(backbone.channels) is type(backbone.out_indices) is tuple
    assert [o.shape[1] for o in outputs] == [32 * 2**i for i in out_indices]
    sum(o.square().sum() for o in outputs).backward()
    assert [n for n, p in backbone.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("name", NANO)
@pytest.mark.parametrize("frozen_stages", [0, 2, 4])
def test_frozen_stages_stay(name, frozen_stages):
    backbone = DenseBackbone(name, frozen_stages=frozen_stages)
    before = copy.deepcopy(backbone.state_dict())
    optimizer = torch.optim.AdamW(backbone.parameters(), lr=0.1, weight_decay=0.1)
    for _ in range(2):
        assert backbone.train() is backbone
        optimizer.zero_grad()
        sum(o.square().mean() for o in backbone(X)).backward()
        optimizer.step()
    frozen = ("patch_embed", *(f"stages.{i}." for i in range(frozen_stages)))
    for key, value in backbone.state_dict().items():
        if key.startswith(frozen):
            assert value.equal(before[key]), key
        elif not key.endswith("bias_table"):
            assert not value.equal(before[key]), key
    assert backbone.eval() is backbone and not backbone.training


@pytest.mark.parametrize("frozen_stages", [-1, 0, 1, 4])
def test_what_is_frozen_is_so_from_the_beginning(frozen_stages):
    backbone = DenseBackbone("dw_conv_nano", norm="BN", frozen_stages=frozen_stages)
    for _ in range(2):
        parts = {"patch_embed": backbone.patch_embed} | dict(backbone.stages.named_children())
        for number, part in enumerate(parts.values()):
            frozen = number <= frozen_stages
            assert {module.training for module in part.modules()} == {not frozen}
            assert {p.requires_grad for p in part.parameters()} == {not frozen}
        assert all(p.requires_grad for p in backbone.norms.parameters())
        assert backbone.training and backbone.norms["0"].training
        backbone.eval()
        assert not any(module.training for module in backbone.modules())
        assert backbone.train(False) is backbone and not backbone.training
        backbone.train()


def test_init_loads_a_classifier(tmp_path, caplog):
    classifier = timm.create_model("i_d_dw_conv_nano")
    torch.save({"model": classifier.state_dict()}, tmp_path / "init.pth")
    backbone = DenseBackbone("i_d_dw_conv_nano", init=str(tmp_path / "init.pth"))
    assert not backbone.patch_embed.proj.weight.equal(classifier.patch_embed.proj.weight)
    with caplog.at_level(logging.INFO):
        backbone.init_weights()
    assert backbone.patch_embed.proj.weight.equal(classifier.patch_embed.proj.weight)
    assert "188 matched, 20 missing, 4 unexpected" in caplog.text

    with pytest.raises(backbones.CheckpointError, match="looks like i_d_dw_conv_nano"):
        DenseBackbone("dw_conv_nano", init=str(tmp_path / "init.pth")).init_weights()


def test_a_shorter_backbone_takes_a_whole_checkpoint(tmp_path):
    torch.save(timm.create_model("swin_nano").state_dict(), tmp_path / "init.pth")
    DenseBackbone("swin_nano", out_indices=(1, 2), init=str(tmp_path / "init.pth")).init_weights()


def test_init_that_is_nothing_is_named():
    backbone = DenseBackbone("swin_nano", init="imagenet.pth")
    with pytest.raises(backbones.CheckpointError, match="'imagenet.pth' is no file, URL or tag"):
        backbone.init_weights()


def test_what_is_asked_for_reaches_the_network(monkeypatch):
    given = dict(drop_path_rate=0.4, grad_checkpointing=True, window_size=5, output_stride=16)
    plain, other = DenseBackbone("swin_nano"), DenseBackbone("swin_nano", **given, fuse=True)
    assert (plain.name, plain.init, plain.frozen_stages, plain.fuse) == (
        "swin_nano",
        None,
        -1,
        False,
    )
    assert plain.out_indices == (0, 1, 2, 3) and other.fuse is True
    assert plain.strides == (4, 8, 16, 32) and other.strides == (4, 8, 16, 16)

    def found(backbone):
        rates = [m.drop_prob for m in backbone.modules() if hasattr(m, "drop_prob")]
        tables = backbone.stages[0].blocks[0].mixer.relative_position_bias_table.shape[0]
        return rates, tables, {stage.grad_checkpointing for stage in backbone.stages}

    rates, table, checkpointed = found(plain)
    assert not any(rates) and table == 13**2 and checkpointed == {False}
    rates, table, checkpointed = found(other)
    assert max(rates) == 0.4 and table == 9**2 and checkpointed == {True}


def test_weights_that_are_read_are_waited_for_and_reported(tmp_path, monkeypatch):
    torch.save(timm.create_model("swin_nano").state_dict(), tmp_path / "init.pth")
    said = []
    monkeypatch.setattr(
        "dense.backbone.waiting", lambda what: said.append(what) or contextlib.nullcontext()
    )
    backbone = DenseBackbone("swin_nano", init=str(tmp_path / "init.pth"))
    backbone.init_weights()
    DenseBackbone("swin_nano").init_weights()
    assert said == [f"reading the weights of {tmp_path / 'init.pth'}"]
    report = backbone.load_report
    assert str(report.source) == str(tmp_path / "init.pth") and len(report.missing) == 2 * 4


@pytest.mark.parametrize("prefix", ["", "backbone."])
def test_the_authors_names_are_taken_beside_a_heads(prefix):
    ours = DenseBackbone("d_dw_conv_nano", norm="BN")
    renamed = from_ours(ours.state_dict(), LAYOUTS["original"])
    assert any(name.startswith("layers.0.") for name in renamed)
    model = DenseBackbone("d_dw_conv_nano", norm="BN")
    head = nn.Linear(2, 2)
    state = {f"{prefix}{name}": value for name, value in renamed.items()}
    if prefix:
        model = nn.ModuleDict({"backbone": model, "head": nn.Linear(2, 2)})
        state |= {f"head.{name}": value for name, value in head.state_dict().items()}
    assert not any(model.load_state_dict(state, strict=True))
    found = model["backbone"] if prefix else model
    assert all(v.equal(ours.state_dict()[k]) for k, v in found.state_dict().items())
    assert not prefix or model["head"].weight.equal(head.weight)


def test_a_fused_copy_is_for_evaluation_without_gradients():
    backbone = DenseBackbone("dw_conv_nano", fuse=True).eval()
    stages = backbone._folded_stages
    assert stages() is backbone.stages, "gradients are wanted"
    with torch.no_grad():
        folded = stages()
        assert folded is not backbone.stages and stages() is folded
        backbone.stages[1].blocks[0].norm1.train()
        assert stages() is backbone.stages
        backbone.eval()
        again = stages()
        assert again is not folded and again is not backbone.stages
        for change in (
            lambda: backbone.load_state_dict(backbone.state_dict()),
            lambda: backbone.double(),
            lambda: backbone.eval(),
        ):
            before = stages()
            change()
            assert stages() is not before and stages() is not backbone.stages
        assert {parameter.dtype for parameter in backbone.parameters()} == {torch.float64}
        backbone.train()
        assert stages() is backbone.stages
        backbone.eval().fuse = False
        assert stages() is backbone.stages


@pytest.mark.parametrize(
    "kwargs, message",
    [
        (dict(name="swin_huge"), "no backbone 'swin_huge': swin_nano, swin_tiny"),
        (dict(name="swin_nano", out_indices=(0, 4)), r"out_indices=\(0, 4\): .*0, 1, 2, 3"),
        (dict(name="swin_nano", out_indices=(2, 1)), "ascending"),
        (dict(name="swin_nano", out_indices=()), "one or more"),
        (dict(name="swin_nano", norm="GN"), "norm='GN': BN, SyncBN, FrozenBN are valid"),
        (dict(name="swin_nano", frozen_stages=5), "frozen_stages=5: -1"),
        (dict(name="swin_nano", frozen_stages=-2), "frozen_stages=-2: -1"),
        (dict(name="swin_nano", out_indices=(1, 1)), "ascending"),
        (dict(name="swin_nano", out_indices=(-1, 0)), r"out_indices=\(-1, 0\): .*0, 1, 2, 3"),
    ],
)
def test_bad_input_is_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        DenseBackbone(**kwargs)


@pytest.mark.parametrize("name", ["dw_conv_nano", "d_dw_conv_nano", "i_d_dw_conv_nano"])
def test_frozen_bn_does_not_move(name):
    backbone = DenseBackbone(name, norm="FrozenBN")
    before = copy.deepcopy(backbone.state_dict())
    backbone(X)
    assert all(v.equal(before[k]) for k, v in backbone.state_dict().items())
    assert not any(
        "norm" in n
        for n, _ in backbone.named_parameters()
        if "patch" not in n and "downsample" not in n
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="steps back only without CUDA")
def test_sync_bn_steps_back_with_its_statistics():
    plain = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sequential(nn.BatchNorm2d(4, eps=1e-3)))
    plain(X)
    synced = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(plain))
    assert isinstance(synced[1][0], nn.SyncBatchNorm)
    back = revert_sync_batchnorm(synced)
    assert type(back[1][0]) is nn.BatchNorm2d
    assert back.eval()(X).equal(plain.eval()(X))
    assert isinstance(revert_sync_batchnorm(nn.SyncBatchNorm(4)), nn.BatchNorm2d)
    assert not any(isinstance(m, nn.SyncBatchNorm) for m in DenseBackbone("dw_conv_nano").modules())


def test_sync_bn_stays_with_cuda_and_keeps_its_options_without(monkeypatch, caplog):
    kinds = {True: nn.SyncBatchNorm, False: nn.BatchNorm2d}
    for available, kind in kinds.items():
        monkeypatch.setattr(torch.cuda, "is_available", lambda found=available: found)
        backbone = DenseBackbone("dw_conv_nano")
        assert {type(norm) for norm in backbone.norms.values()} == {kind}
        assert any(type(m) is kind for m in backbone.stages.modules())
        norm = nn.SyncBatchNorm(4)
        assert (revert_sync_batchnorm(norm) is norm) is available
    options = dict(eps=1e-3, momentum=0.3, affine=False, track_running_stats=False)
    back = revert_sync_batchnorm(nn.SyncBatchNorm(4, **options).eval())
    assert {name: getattr(back, name) for name in options} == options and not back.training
    assert revert_sync_batchnorm(nn.SyncBatchNorm(4)).training
    # Said once, and not of a model without one.
    _warn_of_fallback.cache_clear()
    caplog.clear()
    revert_sync_batchnorm(nn.BatchNorm2d(4))
    assert caplog.text == ""
    for _ in range(2):
        revert_sync_batchnorm(nn.Sequential(nn.SyncBatchNorm(4)))
    assert caplog.text.count("no CUDA: SyncBN falls back to BN, statistics are per process") == 1
