"""Every recipe is the paper's, and builds."""

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS

import backbones
from backbones.released import RELEASED
from dense.pretraining.config import plan_batches
from dense.recipes import RECIPES

CONFIGS = RECIPES / "pretraining"
FULL = sorted(path.stem for path in CONFIGS.glob("*.py") if "nano" not in path.stem)
NANO = sorted(path.stem for path in CONFIGS.glob("*nano*.py"))
# Epochs, images a step, learning rate, its last value, warm-up epochs, weight decay, classes.
RECIPES = {
    "300e_in1k-224x224": (300, 1024, 1e-3, 5e-6, 20, 0.05, 1000),
    "90e_in22k-224x224": (90, 4096, 1e-3, 1e-5, 5, 0.05, 21841),
    "30e_in1k-224x224": (30, 1024, 4e-5, 4e-7, 5, 1e-8, 1000),
    "30e_in1k-384x384": (30, 1024, 1e-5, 1e-5, 0, 1e-8, 1000),
}
DROP_PATH = {"300e_in1k-224x224": {"tiny": 0.2, "base": 0.5}}


def config(name: str) -> Config:
    return Config.fromfile(CONFIGS / f"{name}.py")


def test_there_is_one_for_every_network_and_recipe():
    assert len(NANO) == len(backbones.FAMILIES)
    wanted = [f"{f}_{s}_8xb128-300e_in1k" for f in backbones.FAMILIES for s in ("tiny", "base")]
    wanted += [f"{f}_{s}_16xb64-30e_in1k" for f in backbones.FAMILIES for s in ("tiny", "base")]
    wanted += [f"{f}_base_16xb256-90e_in22k" for f in backbones.FAMILIES]
    wanted += [f"{f}_base_in22k-pre_8xb128-30e_in1k" for f in backbones.FAMILIES]
    wanted += [f"{f}_{s}_w12_16xb64" for f in ("swin", "dw_conv") for s in ("tiny", "base")]
    assert all(any(name.startswith(start) for name in FULL) for start in wanted)
    assert len(FULL) == len(wanted)


@pytest.mark.parametrize("name", FULL)
def test_the_recipe_is_the_papers(name):
    cfg = config(name)
    recipe = name.split("-", 1)[1].removeprefix("pre_8xb128-")
    epochs, total, rate, last, warm_up, decay, classes = RECIPES[recipe]
    gpus, images = name.split("xb")[0].rsplit("_", 1)[1], name.split("xb")[1].split("-")[0]
    assert cfg.train_dataloader.batch_size == int(images)
    assert total % (int(gpus) * int(images)) == 0
    assert cfg.total_batch_size == total and cfg.train_cfg.max_epochs == epochs
    optimizer = cfg.optim_wrapper.optimizer
    assert (optimizer.type, optimizer.lr, optimizer.weight_decay) == ("AdamW", rate, decay)
    assert cfg.optim_wrapper.clip_grad.max_norm == 5.0
    assert cfg.optim_wrapper.paramwise_cfg.no_decay_bias is True
    schedule = {entry.type: entry for entry in cfg.param_scheduler}
    assert bool(schedule) == (warm_up > 0)
    if warm_up:
        assert schedule["LinearLR"].end == warm_up == schedule["CosineAnnealingLR"].begin
        assert schedule["CosineAnnealingLR"].end == epochs
        assert schedule["CosineAnnealingLR"].eta_min == pytest.approx(last)

    model = cfg.model
    size = "tiny" if "_tiny" in name else "base"
    assert model.name == f"{name.split(f'_{size}')[0]}_{size}"
    default = 0.1 if "384" in name else 0.2
    assert model.drop_path_rate == DROP_PATH.get(recipe, {}).get(size, default)
    assert model.num_classes == classes == cfg.train_dataloader.dataset.num_classes
    assert cfg.val_dataloader.dataset.num_classes == classes
    assert (model.mixup.mixup_alpha, model.mixup.cutmix_alpha) == (0.8, 1.0)
    assert model.label_smoothing == 0.1
    side = 384 if "384" in name else 224
    transform = cfg.train_dataloader.dataset.transform
    assert transform.auto_augment == "rand-m9-mstd0.5-inc1" and transform.input_size == side
    assert (transform.re_prob, transform.color_jitter) == (0.25, 0.4)
    assert transform.interpolation == "bicubic"
    assert model.get("window_size", 7) == (12 if "_w12" in name else 7)


@pytest.mark.parametrize("name", [name for name in FULL if "300e" not in name])
def test_what_a_fine_tuning_starts_from(name):
    model = config(name).model
    if "90e" in name:
        assert model.get("init") is None
        return
    data = "in22k" if "in22k-pre" in name else "in1k"
    tags = {f"ms_{data}", f"atten4vis_{data}"} & set(RELEASED.get(model.name, {}))
    assert model.init == (tags.pop() if tags else f"checkpoints/{model.name}_{data}.pth")


@pytest.mark.parametrize("name", FULL)
def test_builds_at_full_size(name):
    cfg = config(name)
    with torch.device("meta"):
        cfg.model.mixup = None
        model = MODELS.build(cfg.model)
    side = cfg.train_dataloader.dataset.transform.input_size
    window = cfg.model.get("window_size", 7)
    mixer = model.network.stages[0].blocks[0].mixer
    assert getattr(mixer, "kernel_size", window) == window
    assert getattr(mixer, "window_size", (window, window)) == (window, window)
    if "local_mlp" in name:
        assert mixer.weight.shape[:2] == (-(-side // 28), -(-side // 28))


@pytest.mark.parametrize(
    ("world", "batch", "accumulate", "steps", "rate"),
    [
        (8, None, None, 1, 1e-3),
        (1, None, None, 8, 1e-3),
        (1, 64, None, 16, 1e-3),
        (16, None, None, 1, 2e-3),
        (1, 96, None, 11, 1e-3 * 1056 / 1024),
        (8, None, 4, 4, 4e-3),
    ],
)
def test_the_total_batch_is_kept_or_the_rate_scaled(world, batch, accumulate, steps, rate):
    cfg = config("swin_tiny_8xb128-300e_in1k-224x224")
    said = plan_batches(cfg, world, batch, accumulate)
    assert cfg.optim_wrapper.accumulative_counts == steps
    assert cfg.optim_wrapper.optimizer.lr == pytest.approx(rate)
    assert cfg.param_scheduler[1].eta_min == pytest.approx(5e-6 * rate / 1e-3)
    assert f"x {steps} accumulated" in said
