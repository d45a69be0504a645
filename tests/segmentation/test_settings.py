"""What the tools' options change in a config, at every border, and what they refuse."""

from copy import deepcopy

import pytest
from mmengine.config import Config, ConfigDict

from dense.openmmlab import config
from dense.openmmlab.backbone import fit_channels
from dense.openmmlab.config import ConfigError
from dense.recipes import RECIPES

NANO = RECIPES / "segmentation/dw_conv_nano_upernet.py"
HOOKS = ("Announce", "SeedEveryIteration", "StopOnNonFiniteLoss", "ValidateOnResume")
HOOKS += ("StopOnSignal",)


def called(**content):
    """A config of a file ``/net.py`` that is not read."""
    return Config(content, "a text", "/net.py")


def test_a_config_that_raises_is_named_with_its_first_line(tmp_path):
    path = tmp_path / "a.py"
    for text, told in (
        ("raise ValueError('one\\ntwo')", "one"),
        ("raise ValueError()", "ValueError"),
    ):
        path.write_text(f"def fail():\n    {text}\nfail()\n")
        with pytest.raises(ConfigError) as error:
            config.load_config(path)
        assert str(error.value) == f"{path}: {told}"
    # What is not installed is said by itself.
    path.write_text("custom_imports = dict(imports=['absent_package'])\n")
    with pytest.raises(ImportError):
        config.load_config(path)


def test_overrides_reach_the_config():
    cfg = config.load_config(NANO, {"train_cfg.max_iters": 7, "param_scheduler.1.end": 7})
    assert (cfg.train_cfg.max_iters, cfg.param_scheduler[1].end) == (7, 7)
    with pytest.raises(ConfigError, match="^--cfg-options modl: the config has no 'modl'"):
        config.load_config(NANO, {"modl": 7})


@pytest.mark.parametrize(
    ("kind", "scope", "task", "fits"),
    [
        *(("ImageClassifier", None, "classification", True),),
        *(("ImageClassifier", None, "segmentation", False),),
        *(("EncoderDecoder", "mmseg", "segmentation", True),),
        *(("EncoderDecoder", None, "segmentation", True),),
        *(("EncoderDecoder", "mmseg", "classification", False),),
        *(("MaskRCNN", "mmdet", "segmentation", False),),
        *((None, None, "segmentation", True), (None, "mmdet", "classification", False)),
        ("ImageClassifier", "mmdet", "classification", True),
    ],
)
def test_a_config_of_another_task_is_refused(kind, scope, task, fits):
    cfg = called(model=dict(type=kind), default_scope=scope)
    if fits:
        config.require_task(cfg, task, "model")
        return
    with pytest.raises(ConfigError) as error:
        config.require_task(cfg, task, "model")
    assert str(error.value) == f"/net.py: model.type={kind!r} is of no config of {task}"


def test_keys_that_a_tool_reads_are_needed():
    cfg = called(model={})
    with pytest.raises(ConfigError) as error:
        config.require_task(cfg, "segmentation", "model", "test_dataloader", "test_cfg")
    told = "/net.py has no test_dataloader, test_cfg: it is no config of segmentation"
    assert str(error.value) == told


@pytest.mark.parametrize(
    ("given", "dtype", "expected"),
    [
        ({}, "bfloat16", dict(dtype="bfloat16", loss_scale=1.0)),
        ({}, "float16", dict(dtype="float16", loss_scale="dynamic")),
        (dict(dtype="float16"), "bfloat16", dict(dtype="float16", loss_scale="dynamic")),
        (dict(loss_scale=512.0), "float16", dict(dtype="float16", loss_scale=512.0)),
    ],
)
@pytest.mark.parametrize("kind", ["OptimWrapper", "AmpOptimWrapper"])
def test_mixed_precision(kind, given, dtype, expected):
    cfg = Config(dict(optim_wrapper=dict(type=kind, **given)))
    config.use_amp(cfg, dtype)
    assert cfg.optim_wrapper == dict(type="AmpOptimWrapper", **expected)


def test_mixed_precision_of_another_wrapper_is_refused():
    cfg = Config(dict(optim_wrapper=dict(type="ApexOptimWrapper")))
    with pytest.raises(ConfigError) as error:
        config.use_amp(cfg, "float16")
    told = "--amp needs optim_wrapper.type='OptimWrapper', not 'ApexOptimWrapper'"
    assert str(error.value) == told


def lengths(**more):
    hooks = dict(checkpoint=more.pop("checkpoint", None))
    return called(train_cfg=dict(max_epochs=20), default_hooks=hooks, **more)


def test_what_has_no_time_stays():
    cfg = lengths()
    config.set_length(cfg, "epochs", 10)
    assert cfg.train_cfg == dict(max_epochs=10) and cfg.default_hooks.checkpoint is None
    for never in (-1, 0):
        cfg = lengths(checkpoint=dict(interval=never))
        config.set_length(cfg, "epochs", 10)
        assert cfg.default_hooks.checkpoint.interval == never
    cfg = lengths(checkpoint=dict(type="CheckpointHook"), param_scheduler=None)
    config.set_length(cfg, "epochs", 10)
    assert cfg.default_hooks.checkpoint == dict(type="CheckpointHook")
    with pytest.raises(ConfigError, match="^--iters: /net.py has no train_cfg.max_iters$"):
        config.set_length(cfg, "iters", 10)


def test_one_schedule_is_as_a_list_of_one():
    schedule = dict(type="PolyLR", begin=0, end=20, milestones=[5, 15], power=2, T_max=None)
    one, listed = lengths(param_scheduler=schedule), lengths(param_scheduler=[schedule])
    for cfg in (one, listed):
        config.set_length(cfg, "epochs", 10)
    expected = dict(type="PolyLR", begin=0, end=10, milestones=[2, 8], power=2, T_max=None)
    assert one.param_scheduler == listed.param_scheduler[0] == expected


def test_parts_of_epochs_are_exact_where_they_become_iterations():
    schedule = dict(type="WarmupCosineLR", begin=0, end=5, warmup=1.5, milestones=[5, 15])
    cfg = lengths(param_scheduler=[dict(schedule, convert_to_iter_based=True), schedule])
    cfg.train_cfg |= dict(val_interval=8, dynamic_intervals=[(0, 4), (16, 2)])
    config.set_length(cfg, "epochs", 5)
    exact, whole = cfg.param_scheduler
    assert (exact.begin, exact.end, exact.warmup) == (0, 1.25, 0.375)
    assert (whole.begin, whole.end, whole.warmup) == (0, 1, 1)
    assert cfg.train_cfg.val_interval == 2
    assert cfg.train_cfg.dynamic_intervals == [(0, 1), (4, 1)]


@pytest.mark.parametrize("checkpoint", [None, {}, dict(save_best="auto"), dict(save_best=["a"])])
def test_early_stopping_needs_the_metric_of_the_best(checkpoint):
    with pytest.raises(ConfigError) as error:
        config.use_early_stop(lengths(checkpoint=checkpoint), 3)
    assert str(error.value) == (
        "--early-stop: default_hooks.checkpoint.save_best of /net.py names no metric"
    )


@pytest.mark.parametrize("own", [None, [dict(type="Mine")]])
def test_early_stopping_is_one_more_hook(own):
    cfg = lengths(checkpoint=dict(save_best="mIoU"), custom_hooks=own)
    config.use_early_stop(cfg, 3)
    stop = dict(type="EarlyStop", monitor="mIoU", patience=3)
    assert cfg.custom_hooks == [*(own or []), stop]


@pytest.mark.parametrize(
    ("absent", "told"),
    [
        (("tta_pipeline",), "tta_pipeline"),
        (("tta_model",), "tta_model"),
        (("tta_pipeline", "tta_model"), "tta_pipeline and no tta_model"),
    ],
)
def test_augmentation_of_tests_needs_both_parts(absent, told):
    cfg = called(tta_pipeline=[1], tta_model=dict(a=1))
    cfg.merge_from_dict(dict.fromkeys(absent))
    with pytest.raises(ConfigError, match=f"^--tta: /net.py has no {told}$"):
        config.use_tta(cfg)


@pytest.mark.parametrize("dense", [False, True])
def test_an_ablation_replaces_the_network(dense):
    network = ConfigDict(type="swin_nano", drop_path_rate=0.3)
    config.use_ablation(network, "dw_conv_channels_shared", "type", dense)
    assert network == dict(type="dw_conv_nano", drop_path_rate=0.3, num_heads=(1, 2, 4, 8))
    network = ConfigDict(name="swin_nano")
    if dense:
        with pytest.raises(ConfigError, match="^--ablation: volo_d1_dw_conv is a classifier alone"):
            config.use_ablation(network, "volo_d1_dw_conv", "name")
    else:
        config.use_ablation(network, "volo_d1_dw_conv", "name", dense)
        assert network.name == "volo_d1_dw_conv"


@pytest.fixture
def built(monkeypatch):
    """The configs from which a runner was to be built; the last one is raised if it is an error."""
    given = []

    def from_cfg(cfg):
        given.append(cfg)
        if isinstance(cfg.get("fails"), Exception):
            raise cfg.fails
        return "runner"

    monkeypatch.setattr(config.DenseRunner, "from_cfg", from_cfg)
    return given


def test_a_run_has_our_hooks_once(built):
    for own in (None, [dict(type="Mine"), dict(type="StopOnSignal", priority="LOW")]):
        cfg = Config(dict(custom_hooks=own))
        assert config.build_runner(cfg) == "runner"
        named = [name for name in HOOKS if own is None or name != "StopOnSignal"]
        assert cfg.custom_hooks == [*(own or []), *(dict(type=name) for name in named)]
    assert len(built) == 2


@pytest.mark.parametrize("kind", [IndexError, KeyError, TypeError, ValueError])
def test_what_cannot_be_built_is_named_with_the_config(built, kind):
    cfg = called()
    for given, told in ((("is wrong", 3), "is wrong"), ((), "")):
        dict.__setitem__(cfg._cfg_dict, "fails", kind(*given))
        with pytest.raises(ConfigError) as error:
            config.build_runner(cfg)
        assert str(error.value) == f"/net.py: {told}"


def test_a_misspelt_key_is_said_before_anything_is_built(built):
    cfg = called(train_dataloadr=1)
    told = "^/net.py: train_dataloadr is no key of a config; did you mean 'train_dataloader'"
    with pytest.raises(ConfigError, match=told):
        config.build_runner(cfg)
    assert built == []


# Channels of necks and heads


WIDTHS = [32, 64, 128, 256]
TWO = dict(type="dw_conv_nano", out_indices=(1, 3))


@pytest.mark.parametrize(
    ("backbone", "parts", "fitted"),
    [
        ({}, dict(neck=dict(in_channels=[1])), dict(neck=dict(in_channels=WIDTHS))),
        (TWO, dict(neck=dict(in_channels=(1,))), dict(neck=dict(in_channels=[64, 256]))),
        # The neck's own maps go to the heads.
        (
            TWO,
            dict(
                neck=[dict(in_channels=[1]), dict(in_channels=[7])], decode_head=dict(in_channels=3)
            ),
            dict(
                neck=[dict(in_channels=[64, 256]), dict(in_channels=[7])],
                decode_head=dict(in_channels=3),
            ),
        ),
        ({}, dict(neck=dict(in_channels=1)), dict(neck=dict(in_channels=1))),
        ({}, dict(neck=dict(type="A")), dict(neck=dict(type="A"))),
        (
            {},
            dict(
                decode_head=dict(in_channels=[1, 2]), auxiliary_head=dict(in_channels=1, in_index=2)
            ),
            dict(
                decode_head=dict(in_channels=WIDTHS),
                auxiliary_head=dict(in_channels=128, in_index=2),
            ),
        ),
        (
            TWO,
            dict(auxiliary_head=[dict(in_channels=1, in_index=i) for i in (0, -1, 1, -2)]),
            dict(
                auxiliary_head=[
                    dict(in_channels=c, in_index=i)
                    for c, i in ((64, 0), (256, -1), (256, 1), (64, -2))
                ]
            ),
        ),
        (
            {},
            dict(decode_head=dict(in_channels=[1], in_index=[3, 0])),
            dict(decode_head=dict(in_channels=[256, 32], in_index=[3, 0])),
        ),
        # A head of a map that there is not is the head's to refuse, and the next one is fitted.
        *(
            (
                TWO,
                dict(
                    auxiliary_head=[
                        dict(in_channels=1, in_index=i),
                        dict(in_channels=1, in_index=0),
                    ]
                ),
                dict(
                    auxiliary_head=[
                        dict(in_channels=1, in_index=i),
                        dict(in_channels=64, in_index=0),
                    ]
                ),
            )
            for i in (2, -3)
        ),
        # One that takes all maps and has a single number is not ours to know.
        ({}, dict(decode_head=dict(in_channels=5)), dict(decode_head=dict(in_channels=5))),
        ({}, dict(decode_head=None), dict(decode_head=None)),
        *(
            (other, dict(neck=dict(in_channels=[1])), dict(neck=dict(in_channels=[1])))
            for other in (dict(type="ResNet"), dict(embed_dim=48))
        ),
    ],
)
@pytest.mark.parametrize("augmented", [False, True])
def test_necks_and_heads_take_the_backbones_channels(backbone, parts, fitted, augmented):
    backbone = dict(type="dw_conv_nano") | backbone
    model = deepcopy(dict(backbone=backbone, **parts))
    fit_channels(dict(type="TTA", module=model) if augmented else model)
    assert model == dict(backbone=backbone, **fitted)


def test_a_model_without_a_backbone_of_a_config_stays():
    for model in ({}, dict(backbone=None), dict(backbone=object(), neck=dict(in_channels=[1]))):
        before = dict(model)
        fit_channels(model)
        assert model == before
