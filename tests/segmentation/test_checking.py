"""What is wrong with a config or an override of one, said before anything is built."""

from copy import deepcopy

import pytest
from mmengine.config import Config

from dense.openmmlab import checking
from dense.recipes import RECIPES
from dense.segmentation.config import ConfigError, load_config

NANO = RECIPES / "segmentation/dw_conv_nano_upernet.py"


@pytest.fixture(scope="module")
def recipe():
    return load_config(NANO)


@pytest.fixture
def cfg(recipe):
    return deepcopy(recipe)


# Keys that no tool's config need have, and arguments of classes that it leaves at their defaults.
ALLOWED = {
    **dict.fromkeys((*("compile", "sync_bn", "find_unused_parameters", "model_wrapper_cfg"),)),
    **dict.fromkeys(("auto_scale_lr", "runner_type", "vis_backends", "data", "total_batch_size")),
    **dict.fromkeys(("tta_model", "tta_pipeline", "backend_args", "data_root", "dataset_type")),
    **dict.fromkeys(("custom_imports", "experiment_name", "launcher", "load_from")),
    "train_cfg.max_iters": 5,
    "optim_wrapper.optimizer.amsgrad": True,
    "train_dataloader.pin_memory": True,
    "train_dataloader._delete_": True,
    "param_scheduler.1.last_step": 4,
    "train_dataloader.dataset.pipeline.0.imdecode_backend": "cv2",
    # Passed on to the function that writes checkpoints.
    "default_hooks.checkpoint.save_optimizer": False,
    "default_hooks.checkpoint.backend_args": None,
    # Classes with open ends, and dicts that others read.
    "model.backbone.window_size": 7,
    "model.decode_head.anything": 1,
    "model.decode_head.norm_cfg.eps": 1e-3,
    "env_cfg.cudnn_deterministic": True,
    "model.decode_head.loss_decode.class_weight": [1.0],
}


@pytest.mark.parametrize("key", ALLOWED)
def test_what_a_config_may_have_passes(cfg, key):
    assert checking.wrong_overrides(cfg, {key: ALLOWED[key]}) is None


def test_another_class_has_its_own_arguments(cfg):
    sgd = {"optim_wrapper.optimizer.type": "SGD", "optim_wrapper.optimizer.momentum": 0.9}
    assert checking.wrong_overrides(cfg, sgd) is None
    del sgd["optim_wrapper.optimizer.type"]
    assert "has no 'momentum'" in checking.wrong_overrides(cfg, sgd)


@pytest.mark.parametrize(
    ("key", "value", "wrong"),
    [
        ("cfg", {}, "cfg: the config has no 'cfg'; "),
        ("self", {}, "self: the config has no 'self'; "),
        ("train_dataloader.self", {}, "train_dataloader.self: train_dataloader has no 'self'; "),
        (
            "optim_wrapper.optimizer.a.b",
            1,
            "optim_wrapper.optimizer.a.b: optim_wrapper.optimizer h",
        ),
        ("modl", 1, "modl: the config has no 'modl'; did you mean 'model'?"),
        ("train_cfg.max_iters.x", 1, "train_cfg.max_iters.x: train_cfg.max_iters is 600, which "),
        (
            "train_cfg.max_iters",
            "many",
            "train_cfg.max_iters='many': a number is needed, such as 6",
        ),
        ("train_cfg.max_iters", 0, "train_cfg.max_iters=0: more than 0 is needed"),
        (
            "optim_wrapper.optimizer.lr",
            -1.0,
            "optim_wrapper.optimizer.lr=-1.0: 0 or more is needed",
        ),
        ("param_scheduler.2.end", 1, "param_scheduler.2.end: param_scheduler has the items 0 to 1"),
        (
            "param_scheduler.-1.end",
            1,
            "param_scheduler.-1.end: param_scheduler has the items 0 to 1",
        ),
        ("param_scheduler.end", 1, "param_scheduler.end: param_scheduler has the items 0 to 1"),
        ("custom_hooks.1.evry", 1, "custom_hooks.1.evry: custom_hooks.1 has no 'evry'"),
        ("train_dataloader.pin", 1, "train_dataloader.pin: train_dataloader has no 'pin'"),
        (
            "default_hooks.checkpoint.save_bst",
            1,
            "default_hooks.checkpoint.save_bst: default_hooks.",
        ),
        (
            "model.decode_head.loss_decode.class_weights",
            [1.0],
            "model.decode_head.loss_decode.class_weights: model.decode_head.loss_decode has no "
            "'class_weights'; did you mean 'class_weight'?",
        ),
    ],
)
def test_a_wrong_override_is_named_with_its_place(cfg, key, value, wrong):
    found = checking.wrong_overrides(cfg, {"train_cfg.val_interval": 9, key: value})
    assert found.startswith(f"--cfg-options {wrong}") and "\n" not in found
    with pytest.raises(ConfigError) as error:
        load_config(NANO, {key: value})
    assert str(error.value).startswith(f"--cfg-options {wrong}")


def test_the_last_item_of_a_list_is_one(cfg):
    last = len(cfg.train_dataloader.dataset.pipeline) - 1
    place = "train_dataloader.dataset.pipeline"
    assert checking.wrong_overrides(cfg, {f"{place}.{last}.meta_keys": ()}) is None
    wrong = checking.wrong_overrides(cfg, {f"{place}.{last + 1}.meta_keys": ()})
    assert wrong == f"--cfg-options {place}.{last + 1}.meta_keys: {place} has the items 0 to {last}"


def test_the_recipe_is_right(cfg):
    assert checking.wrong_keys(cfg) is None


BUILDERS = ("_scope_", "priority", "constructor", "paramwise_cfg", "convert_to_iter_based")


@pytest.mark.parametrize("key", (*BUILDERS, "collate_fn", "init_cfg"))
def test_keys_that_builders_take_out_are_no_arguments(cfg, key):
    cfg.optim_wrapper.optimizer[key] = None
    assert checking.wrong_keys(cfg) is None


@pytest.mark.parametrize(
    ("changes", "wrong"),
    [
        (dict(my_own=1, val_batches=2, model_name=3), None),
        (
            dict(train_dataloadr=1),
            "train_dataloadr is no key of a config; did you mean 'train_dataloader'?",
        ),
        (dict(lod_from=1), "lod_from is no key of a config; did you mean 'load_from'?"),
        (
            {"optim_wrapper.optimizer.lrr": 1},
            "optim_wrapper.optimizer: AdamW has no argument 'lrr'",
        ),
        ({"optim_wrapper.optimizer.lr": -1}, "optim_wrapper.optimizer.lr=-1: 0 or more is needed"),
        ({"optim_wrapper.optimizer.lr": 0}, None),
        # Takes any, and passes them on.
        ({"param_scheduler.1.powr": 2}, None),
        ({"custom_hooks.0.every": 2}, "custom_hooks.0: SeedEveryIteration has no argument 'every'"),
        (
            {"train_dataloader.dataset.pipeline.3.crop": 2},
            "train_dataloader.dataset.pipeline.3: RandomCrop has no argument 'crop'; did you mean",
        ),
        # Models raise themselves when they are built.
        ({"model.decode_head.loss_decode.anything": 1}, None),
        ({"train_cfg.max_iters": 0}, "train_cfg.max_iters=0: more than 0 is needed"),
        ({"train_cfg.max_iters": "9"}, "train_cfg.max_iters='9': a number is needed"),
        ({"val_dataloader.num_workers": "9"}, "val_dataloader.num_workers='9': a number is needed"),
        ({"val_dataloader.num_workers": -1}, "val_dataloader.num_workers=-1: 0 or more is needed"),
        ({"test_dataloader.batch_size": "9"}, "test_dataloader.batch_size='9': a number is needed"),
        (
            {"train_dataloader.batch_siz": 2},
            "train_dataloader has no 'batch_siz'; did you mean 'batch",
        ),
        ({"train_dataloader.pin_memory": True, "test_dataloader._delete_": True}, None),
        ({"train_dataloader.multiprocessing_context": "fork"}, None),
        ({"default_hooks.checkpoint.out_dir": "a", "default_hooks.checkpoint.meta": {}}, None),
        (
            {"default_hooks.checkpoint.anything": 1},
            "default_hooks.checkpoint: CheckpointHook has no a",
        ),
        ({"train_cfg.anything": 1}, "train_cfg: ResumableIterTrainLoop has no argument 'anything'"),
    ],
)
def test_a_wrong_key_is_named_with_its_place(cfg, changes, wrong):
    cfg.merge_from_dict(changes)
    found = checking.wrong_keys(cfg)
    assert found is None if wrong is None else found.startswith(wrong), found


def test_epochs_are_numbers_too():
    cfg = Config(dict(train_cfg=dict(by_epoch=True, max_epochs="3")))
    assert checking.wrong_keys(cfg) == "train_cfg.max_epochs='3': a number is needed"
    assert checking.wrong_keys(Config(dict(train_cfg=None, val_dataloader=None))) is None


def test_a_config_of_one_class_is_a_place_too():
    cfg = Config(dict(type="AdamW", optimizer=dict(type=["no", "name"], lr=2)))
    wrong = "the config: AdamW has no argument 'optimizer'; "
    assert checking.wrong_keys(cfg).startswith(wrong)


def test_a_class_is_looked_up_in_the_scope_first(cfg):
    """MMSegmentation's reader of annotations has other arguments than MMCV's."""
    place = "train_dataloader.dataset.pipeline.1"
    import mmcv.transforms  # noqa: F401
    import mmseg.datasets  # noqa: F401

    changes = {f"{place}.with_bbox": True}
    assert "with_bbox" in checking.wrong_overrides(cfg, changes)
    assert checking.wrong_overrides(cfg, {f"{place}.reduce_zero_label": True}) is None
    cfg.default_scope = None
    assert checking.wrong_overrides(cfg, changes) is None
    assert "no 'reduce_zero_label'" in checking.wrong_overrides(
        cfg, {f"{place}.reduce_zero_label": True}
    )
    cfg.default_scope = "absent"
    assert checking.wrong_overrides(cfg, changes) is None
