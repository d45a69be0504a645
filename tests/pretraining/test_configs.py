"""Every recipe has the figures of the originals, and builds."""

import math
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, PARAM_SCHEDULERS
from PIL import Image
from timm.data import create_transform
from timm.scheduler import CosineLRScheduler
from torchvision import transforms

import backbones
from backbones.released import RELEASED
from dense.openmmlab.config import ConfigError
from dense.pretraining.config import anneal_after_warmup, plan_batches
from dense.pretraining.data import ImageDataset
from dense.recipes import RECIPES
from tests.support import MISSING, differences, flat

CONFIGS = RECIPES / "pretraining"
FULL = sorted(path.stem for path in CONFIGS.glob("*.py") if "nano" not in path.stem)
NANO = sorted(path.stem for path in CONFIGS.glob("*nano*.py"))
KINDS = ("300e_in1k-224x224", "90e_in22k-224x224", "30e_in1k-224x224", "30e_in1k-384x384")


def each(*values: Any) -> dict[str, Any]:
    """A value for each of KINDS."""
    return dict(zip(KINDS, values, strict=True))


# Every field of the full recipes. Figures are those of microsoft/Swin-Transformer (config.py and
# configs/swin/*.yaml; learning rates there are for 512 images), for 384x384 the paper's appendix E.
FIELDS: dict[str, Any] = {
    "total_batch_size": each(1024, 4096, 1024, 1024),
    "train_cfg.type": "ResumableEpochTrainLoop",
    "train_cfg.max_epochs": each(300, 90, 30, 30),
    "train_cfg.val_interval": 1,
    "optim_wrapper.type": "OptimWrapper",
    "optim_wrapper.optimizer.type": "AdamW",
    "optim_wrapper.optimizer.lr": each(
        5e-4 * 1024 / 512, 1.25e-4 * 4096 / 512, 2e-5 * 1024 / 512, 1e-5
    ),
    "optim_wrapper.optimizer.betas": (0.9, 0.999),
    "optim_wrapper.optimizer.eps": 1e-8,
    "optim_wrapper.optimizer.weight_decay": each(0.05, 0.05, 1e-8, 1e-8),
    "optim_wrapper.constructor": "DenseOptimWrapperConstructor",
    "optim_wrapper.paramwise_cfg.no_decay_bias": True,
    "optim_wrapper.clip_grad.max_norm": 5.0,
    "param_scheduler": each(None, None, None, []),
    "param_scheduler.0.type": each(*["WarmupCosineLR"] * 3, None),
    "param_scheduler.0.warmup": each(20, 5, 5, None),
    "param_scheduler.0.warmup_lr": each(
        5e-7 * 1024 / 512, 1.25e-7 * 4096 / 512, 2e-8 * 1024 / 512, None
    ),
    "param_scheduler.0.eta_min": each(
        5e-6 * 1024 / 512, 1.25e-6 * 4096 / 512, 2e-7 * 1024 / 512, None
    ),
    "param_scheduler.0.convert_to_iter_based": each(*[True] * 3, None),
    "model.type": "ImageClassifier",
    "model.num_classes": each(1000, 21841, 1000, 1000),
    "model.drop_path_rate": each({"tiny": 0.2, "base": 0.5}, 0.2, 0.2, 0.1),
    "model.label_smoothing": 0.1,
    "model.mixup.mixup_alpha": 0.8,
    "model.mixup.cutmix_alpha": 1.0,
    "model.img_size": each(None, None, None, 384),
    "train_dataloader.batch_size": each(128, 256, 128, 64),
    "train_dataloader.drop_last": True,
    "train_dataloader.sampler.type": "ResumableSampler",
    "train_dataloader.sampler.shuffle": True,
    "train_dataloader.dataset.root": each(
        "data/imagenet/train", "data/imagenet22k/train", *["data/imagenet/train"] * 2
    ),
    "train_dataloader.dataset.num_classes": each(1000, 21841, 1000, 1000),
    "train_dataloader.dataset.transform.input_size": each(224, 224, 224, 384),
    "train_dataloader.dataset.transform.is_training": True,
    "train_dataloader.dataset.transform.interpolation": "bicubic",
    "train_dataloader.dataset.transform.auto_augment": "rand-m9-mstd0.5-inc1",
    "train_dataloader.dataset.transform.color_jitter": 0.4,
    "train_dataloader.dataset.transform.re_prob": 0.25,
    "train_dataloader.dataset.transform.re_mode": "pixel",
    "val_dataloader.batch_size": 128,
    "val_dataloader.sampler.type": "DefaultSampler",
    "val_dataloader.sampler.shuffle": False,
    "val_dataloader.dataset.root": each(
        "data/imagenet/val", "data/imagenet22k/val", *["data/imagenet/val"] * 2
    ),
    "val_dataloader.dataset.num_classes": each(1000, 21841, 1000, 1000),
    "val_dataloader.dataset.transform.input_size": each(224, 224, 224, 384),
    "val_dataloader.dataset.transform.interpolation": "bicubic",
    "val_dataloader.dataset.transform.crop_pct": each(*[0.875] * 3, 1.0),
    "val_dataloader.dataset.transform.crop_mode": each(*[None] * 3, "squash"),
    "val_cfg.type": "ValLoop",
    "val_evaluator.type": "ClassificationMetric",
    "default_hooks.checkpoint.type": "CheckpointHook",
    "default_hooks.checkpoint.interval": 1,
    "default_hooks.checkpoint.save_best": "top1",
    "default_hooks.checkpoint.rule": "greater",
    "default_hooks.checkpoint.max_keep_ckpts": 3,
    "default_hooks.param_scheduler.type": "ParamSchedulerHook",
    "default_hooks.timer.type": "IterTimerHook",
    "default_hooks.logger.type": "LoggerHook",
    "default_hooks.logger.interval": 50,
    "default_hooks.sampler_seed.type": "DistSamplerSeedHook",
    "load_from": None,
    "resume": False,
    # No averaged weights.
    "custom_hooks.0.type": "SeedEveryIteration",
    "custom_hooks.1.type": "StopOnNonFiniteLoss",
    "custom_hooks.2.type": "ProgressBar",
    # As in Swin's main.py; the rest is MMEngine's way of saying what its trainings do.
    "env_cfg.cudnn_benchmark": True,
    "env_cfg.mp_cfg.mp_start_method": "fork",
    "env_cfg.mp_cfg.opencv_num_threads": 0,
    "env_cfg.dist_cfg.backend": "nccl",
    "vis_backends.0.type": "LocalVisBackend",
    "vis_backends.1.type": "TensorboardVisBackend",
    "visualizer.type": "Visualizer",
    "visualizer.vis_backends.0.type": "LocalVisBackend",
    "visualizer.vis_backends.1.type": "TensorboardVisBackend",
    "log_level": "INFO",
    "runner_type": "DenseRunner",
    "default_scope": "mmengine",
}
for loader in ("train_dataloader", "val_dataloader"):
    FIELDS |= {
        f"{loader}.num_workers": 8,
        f"{loader}.pin_memory": True,
        f"{loader}.persistent_workers": True,
        f"{loader}.collate_fn.type": "default_collate",
        f"{loader}.dataset.type": "ImageDataset",
    }
# The backbone, tested below, and modules without which no recipe builds.
OTHER = ("model.name", "model.init", "model.window_size", "custom_imports.")


def config(name: str) -> Config:
    return Config.fromfile(CONFIGS / f"{name}.py")


def kind_of(name: str) -> str:
    return name.rsplit("xb", 1)[1].split("-", 1)[1]


def size_of(name: str) -> str:
    return "tiny" if "_tiny" in name else "base"


def a_recipe(kind: str) -> Config:
    return config(next(name for name in FULL if kind_of(name) == kind))


@cache
def fields(name: str) -> dict[str, Any]:
    return flat(config(name).to_dict())


def test_there_is_one_for_every_network_and_recipe():
    assert len(NANO) == len(backbones.FAMILIES)
    assert {fields(name)["total_batch_size"] for name in NANO} == {32}
    wanted = [f"{f}_{s}_8xb128-300e_in1k" for f in backbones.FAMILIES for s in ("tiny", "base")]
    wanted += [f"{f}_{s}_16xb64-30e_in1k" for f in backbones.FAMILIES for s in ("tiny", "base")]
    wanted += [f"{f}_base_16xb256-90e_in22k" for f in backbones.FAMILIES]
    wanted += [f"{f}_base_in22k-pre_8xb128-30e_in1k" for f in backbones.FAMILIES]
    wanted += [f"{f}_{s}_w12_16xb64" for f in ("swin", "dw_conv") for s in ("tiny", "base")]
    assert all(any(name.startswith(start) for name in FULL) for start in wanted)
    assert len(FULL) == len(wanted)


@pytest.mark.parametrize("key", FIELDS)
def test_a_field_has_the_figure_of_the_originals(key):
    for name in FULL:
        expected = FIELDS[key]
        for choice in (kind_of(name), size_of(name)):
            expected = expected[choice] if isinstance(expected, dict) else expected
        assert fields(name).get(key) == expected, name


@pytest.mark.parametrize("name", FULL)
def test_the_table_of_fields_has_them_all(name):
    assert [key for key in fields(name) if key not in FIELDS and not key.startswith(OTHER)] == []
    gpus, images = name.rsplit("xb", 1)[0].rsplit("_", 1)[1], fields(name)["total_batch_size"]
    assert images % (int(gpus) * fields(name)["train_dataloader.batch_size"]) == 0
    assert f"{gpus}xb{fields(name)['train_dataloader.batch_size']}-" in name
    model = config(name).model
    assert model.name == f"{name.split(f'_{size_of(name)}')[0]}_{size_of(name)}"
    assert model.get("window_size", 7) == (12 if "_w12" in name else 7)


@pytest.mark.parametrize("name", NANO)
def test_what_nano_has_otherwise_than_300_epochs_of_imagenet(name):
    """Mild augmentation and no mixing, so that a small network learns from few images."""
    full = a_recipe("300e_in1k-224x224").to_dict()
    schedule = [key for key in flat(full) if key.startswith("param_scheduler.")]
    expected = dict.fromkeys(schedule, MISSING) | {
        "total_batch_size": 32,
        "train_cfg.max_epochs": 20,
        "param_scheduler.0.type": "LinearLR",
        "param_scheduler.0.start_factor": 0.05,
        "param_scheduler.0.begin": 0,
        "param_scheduler.0.end": 2,
        "param_scheduler.1.type": "CosineAnnealingLR",
        "param_scheduler.1.eta_min": 1e-5,
        "param_scheduler.1.begin": 2,
        "param_scheduler.1.end": 20,
        "param_scheduler.1.convert_to_iter_based": True,
        "model.name": name,
        "model.num_classes": 10,
        "model.img_size": 64,
        "model.mixup": None,
        "model.mixup.mixup_alpha": MISSING,
        "model.mixup.cutmix_alpha": MISSING,
        "model.drop_path_rate": MISSING,
        "train_dataloader.dataset.transform.scale": [0.4, 1.0],
        "train_dataloader.dataset.transform.color_jitter": 0.2,
        "train_dataloader.dataset.transform.auto_augment": MISSING,
        "train_dataloader.dataset.transform.re_prob": MISSING,
        "train_dataloader.dataset.transform.re_mode": MISSING,
        # The whole photo, a short side of 64.
        "val_dataloader.dataset.transform.crop_pct": 1.0,
        "default_hooks.logger.interval": 10,
    }
    del expected["param_scheduler.0.convert_to_iter_based"]
    for split in ("train", "val"):
        expected |= {
            f"{split}_dataloader.batch_size": 32,
            f"{split}_dataloader.num_workers": 2,
            f"{split}_dataloader.pin_memory": False,
            f"{split}_dataloader.dataset.root": f"data/{split}",
            f"{split}_dataloader.dataset.num_classes": 10,
            f"{split}_dataloader.dataset.transform.input_size": 64,
        }
    found = differences(config(name).to_dict(), full, "small.")
    assert found == expected


# BASE_LR, WARMUP_LR and MIN_LR of Swin's configs, images a step, epochs, epochs of warm-up.
SCHEDULES = {
    "300e_in1k-224x224": (5e-4, 5e-7, 5e-6, 1024, 300, 20),
    "90e_in22k-224x224": (1.25e-4, 1.25e-7, 1.25e-6, 4096, 90, 5),
    "30e_in1k-224x224": (2e-5, 2e-8, 2e-7, 1024, 30, 5),
}


@pytest.mark.parametrize("prefix", [False, True])
@pytest.mark.parametrize("kind", SCHEDULES)
def test_rates_are_timms_for_swins_figures(kind, prefix):
    """Every update of the recipe with five updates an epoch, and ten points by the formula."""
    *rates, images, epochs, warmup = SCHEDULES[kind]
    base, first, last = (rate * images / 512 for rate in rates)
    cfg = a_recipe(kind)
    if prefix:
        anneal_after_warmup(cfg)
    ours, theirs = (torch.optim.AdamW([torch.zeros(1)], lr=base) for _ in range(2))
    ours.param_groups[0]["lr"] = cfg.optim_wrapper.optimizer.lr
    (entry,) = cfg.param_scheduler
    schedule = PARAM_SCHEDULERS.build(
        {**entry, "end": cfg.train_cfg.max_epochs},
        default_args=dict(optimizer=ours, epoch_length=5),
    )
    # As lr_scheduler.py of Swin: by default of 2021, t_initial is the whole training.
    reference = CosineLRScheduler(
        theirs,
        t_initial=5 * (epochs - warmup) if prefix else 5 * epochs,
        lr_min=last,
        warmup_lr_init=first,
        warmup_t=5 * warmup,
        cycle_limit=1,
        t_in_epochs=False,
        warmup_prefix=prefix,
    )
    found = []
    for update in range(5 * epochs):
        found.append(ours.param_groups[0]["lr"])
        assert found[-1] == pytest.approx(theirs.param_groups[0]["lr"], rel=1e-12), update
        ours.step()
        schedule.step()
        reference.step_update(update + 1)

    start = warmup if prefix else 0
    for update in (0, warmup, 5 * warmup, *(5 * epochs * part // 8 for part in range(1, 8))):
        epoch = update / 5
        expected = first + (base - first) * epoch / warmup
        if epoch >= warmup:
            angle = math.pi * (epoch - start) / (epochs - start)
            expected = last + (base - last) * (1 + math.cos(angle)) / 2
        assert found[update] == pytest.approx(expected, rel=1e-12)


def test_a_config_without_that_cosine_has_no_such_option():
    with pytest.raises(ConfigError, match="in1k-384x384.py has no WarmupCosineLR"):
        anneal_after_warmup(a_recipe("30e_in1k-384x384"))


MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@pytest.fixture(scope="module")
def wide_photo(tmp_path_factory) -> Path:
    """A folder of one class with one photo, wider than high."""
    root = tmp_path_factory.mktemp("wide")
    pixels = np.random.default_rng(0).integers(0, 256, (30, 50, 3)).astype(np.uint8)
    (root / "a").mkdir()
    Image.fromarray(pixels).resize((500, 300)).save(root / "a/photo.png")
    return root


def as_swin_evaluates(image: Image.Image, side: int) -> torch.Tensor:
    """224x224 is the centre of a short side of 256, 384x384 (``CROP: False``) the whole photo."""
    bicubic = transforms.InterpolationMode.BICUBIC
    resize = [transforms.Resize((side, side), bicubic)]
    if side == 224:
        resize = [transforms.Resize(256, bicubic), transforms.CenterCrop(224)]
    steps = [*resize, transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
    return transforms.Compose(steps)(image)


@pytest.mark.parametrize("kind", KINDS)
def test_photos_are_evaluated_as_swin_does(kind, wide_photo):
    dataset = a_recipe(kind).val_dataloader.dataset
    ours, _, _ = ImageDataset(str(wide_photo), dataset.transform)[0]
    side = 384 if "384" in kind else 224
    assert ours.shape == (3, side, side)
    assert ours.equal(as_swin_evaluates(Image.open(wide_photo / "a/photo.png"), side))


def test_prediction_sees_photos_as_evaluation_does(wide_photo, tmp_path):
    from dense.pretraining.predictor import Predictor

    recipe = CONFIGS / "_base_/in1k_384_30e.py"
    (tmp_path / "nano.py").write_text(
        f"_base_ = {str(recipe)!r}\nmodel = dict(name='dw_conv_nano', num_classes=3)\n"
    )
    network = timm.create_model("dw_conv_nano", num_classes=3, img_size=384).eval()
    torch.save(network.state_dict(), tmp_path / "nano.pth")
    image = Image.open(wide_photo / "a/photo.png")
    found = Predictor(str(tmp_path / "nano.py"), str(tmp_path / "nano.pth"))(np.asarray(image))
    with torch.no_grad():
        expected = network(as_swin_evaluates(image, 384)[None])[0].softmax(0)
    np.testing.assert_allclose(found, expected, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_training_mixes_and_augments_as_swin_does(kind):
    """What the arguments leave to timm's defaults."""
    cfg = a_recipe(kind)
    steps = {
        type(step).__name__: step
        for step in create_transform(**cfg.train_dataloader.dataset.transform).transforms
    }
    assert (*steps,) == (
        *("RandomResizedCropAndInterpolation", "RandomHorizontalFlip", "RandAugment"),
        *("MaybeToTensor", "Normalize", "RandomErasing"),
    )
    crop, flip, augment, _, norm, erase = steps.values()
    side = 384 if "384" in kind else 224
    assert (crop.size, crop.scale) == ((side, side), (0.08, 1.0))
    assert crop.ratio == pytest.approx((3 / 4, 4 / 3)) and flip.p == 0.5
    assert crop.interpolation == transforms.InterpolationMode.BICUBIC
    assert augment.num_layers == 2
    assert {(op.magnitude, op.magnitude_std) for op in augment.ops} == {(9, 0.5)}
    assert norm.mean.tolist() == pytest.approx(MEAN) and norm.std.tolist() == pytest.approx(STD)
    assert (erase.probability, erase.max_count, erase.per_pixel) == (0.25, 1, True)
    with torch.device("meta"):
        mixup = MODELS.build({**cfg.model, "init": None}).mixup
    assert (mixup.mixup_alpha, mixup.cutmix_alpha, mixup.mix_prob) == (0.8, 1.0, 1.0)
    assert (mixup.switch_prob, mixup.mode, mixup.label_smoothing) == (0.5, "batch", 0.1)
    assert mixup.num_classes == cfg.model.num_classes


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
        # As the authors trained the base convolutional networks: 64 images a batch norm.
        (8, 64, None, 2, 1e-3),
        (16, 64, None, 1, 1e-3),
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
    assert cfg.param_scheduler[0].warmup_lr == pytest.approx(1e-6 * rate / 1e-3)
    assert cfg.param_scheduler[0].eta_min == pytest.approx(1e-5 * rate / 1e-3)
    assert f"x {steps} accumulated" in said
