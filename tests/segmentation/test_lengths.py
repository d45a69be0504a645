"""Length of a training and early stopping as configs have them; nothing is trained."""

from pathlib import Path

import pytest
from mmengine.config import Config

from dense.openmmlab.config import ConfigError, set_length, use_early_stop, use_tta
from dense.recipes import RECIPES
from dense.segmentation.config import load_config

CONFIGS = RECIPES / "segmentation"
FULL_SIZE = "dw_conv_tiny_upernet_8xb2-160k_ade20k-512x512"


def test_half_of_160k_is_mmsegmentations_80k():
    """But for warm-up, which is halved too."""
    import mmseg

    ours = load_config(CONFIGS / f"{FULL_SIZE}.py")
    set_length(ours, "iters", 80_000)
    package = Path(mmseg.__file__).parent
    theirs = Config.fromfile(package / ".mim/configs/_base_/schedules/schedule_80k.py")
    assert ours.train_cfg.max_iters == theirs.train_cfg.max_iters
    assert ours.train_cfg.val_interval == theirs.train_cfg.val_interval
    assert ours.param_scheduler[1].end == theirs.param_scheduler[0].end
    assert (ours.param_scheduler[0].end, ours.param_scheduler[1].begin) == (750, 750)
    assert ours.default_hooks.checkpoint.interval == 2000


def test_a_few_iterations_have_a_warm_up_and_an_evaluation():
    cfg = load_config(CONFIGS / "dw_conv_nano_upernet.py")
    set_length(cfg, "iters", 6)
    warm_up, decay = cfg.param_scheduler
    assert (warm_up.begin, warm_up.end, decay.begin, decay.end) == (0, 1, 1, 6)
    assert (cfg.train_cfg.max_iters, cfg.train_cfg.val_interval) == (6, 3)
    assert cfg.default_hooks.checkpoint.interval == 1
    with pytest.raises(ConfigError, match="--epochs: .*nano_upernet.py has no train_cfg.max_epoch"):
        set_length(cfg, "epochs", 6)


def test_whatever_is_a_time_of_a_config_moves():
    cfg = load_config(CONFIGS / "dw_conv_nano_upernet.py")
    cfg.param_scheduler = [
        dict(type="MultiStepLR", begin=60, end=600, milestones=[400, 550], gamma=0.1),
        dict(type="StepLR", step_size=300),
        dict(type="CosineAnnealingLR", T_max=540, eta_min=0.5),
        dict(type="ConstantLR", factor=0.5, total_iters=30),
    ]
    cfg.train_cfg.dynamic_intervals = [(450, 50)]
    set_length(cfg, "iters", 60)
    steps, step, cosine, constant = cfg.param_scheduler
    assert (steps.begin, steps.end, steps.milestones, steps.gamma) == (6, 60, [40, 55], 0.1)
    assert (step.step_size, cosine.T_max, constant.total_iters) == (30, 54, 3)
    assert (cosine.eta_min, constant.factor) == (0.5, 0.5)
    assert cfg.train_cfg.dynamic_intervals == [(45, 5)]


@pytest.mark.parametrize("name", [FULL_SIZE, *(p.stem for p in CONFIGS.glob("methods/*.py"))])
def test_every_recipe_has_a_best_checkpoint_and_test_time_augmentation(name):
    [path] = CONFIGS.rglob(f"{name}.py")
    cfg = load_config(path)
    use_early_stop(cfg, 2)
    assert cfg.custom_hooks[-1].monitor == "mIoU"
    use_tta(cfg)
    assert cfg.model.type == "SegTTAModel"


def test_early_stop_needs_a_metric():
    cfg = load_config(CONFIGS / "dw_conv_nano_upernet.py")
    cfg.default_hooks.checkpoint.pop("save_best")
    with pytest.raises(ConfigError, match="--early-stop: default_hooks.checkpoint.save_best"):
        use_early_stop(cfg, 2)


def test_the_command_line_reaches_the_config(tools):
    words = [str(CONFIGS / "dw_conv_nano_upernet.py"), "--iters", "6", "--early-stop", "3"]
    cfg = tools.train.configured(tools.train.parse_args(words))
    assert cfg.train_cfg.max_iters == 6
    assert cfg.custom_hooks[-1] == dict(type="EarlyStop", monitor="mIoU", patience=3)
    assert not cfg.resume
    cfg = tools.train.configured(tools.train.parse_args([*words, "--auto-resume"]))
    assert cfg.resume
