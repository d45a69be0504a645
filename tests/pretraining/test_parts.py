"""The parts of a pretraining at their borders: settings, data sets built once, metric, progress."""

import csv
import json
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from mmengine.config import Config, ConfigDict
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader

import backbones
from dense.openmmlab.config import ConfigError, load_config
from dense.pretraining import config, hooks, metric, model
from dense.pretraining.data import ImageDataset, ImageStream
from dense.pretraining.metric import ClassificationMetric
from dense.pretraining.model import ImageClassifier, network_options
from dense.pretraining.predictor import Predictor, readable
from tests.pretraining.conftest import CONFIGS, write_images

NANO = CONFIGS / "dw_conv_nano.py"


@pytest.fixture
def cfg(photos, tmp_path):
    cfg = load_config(NANO)
    config.set_data(cfg, str(photos), num_classes=3)
    cfg.work_dir = str(tmp_path / "work")
    cfg.train_dataloader.batch_size = 8
    return cfg


# Settings


@pytest.mark.parametrize(
    ("given", "roots", "classes"),
    [
        ({}, ["data/train", "data/val"], 7),
        (dict(data_root="mine"), ["mine/train", "mine/val"], 7),
        (dict(data_root="mine", train="a"), ["a", "mine/val"], 7),
        (dict(data_root="mine", val="b", num_classes=2), ["mine/train", "b"], 2),
        (dict(train="a", num_classes=0), ["a", "data/val"], 0),
    ],
)
def test_folders_and_classes_of_the_data(given, roots, classes):
    data = [ConfigDict(dataset=dict(root=f"data/{n}", num_classes=7)) for n in ("train", "val")]
    cfg = Config(dict(train_dataloader=data[0], val_dataloader=data[1], model=dict(num_classes=7)))
    config.set_data(cfg, **given)
    found = [cfg.train_dataloader.dataset, cfg.val_dataloader.dataset]
    assert [dataset.root for dataset in found] == roots
    assert [*(d.num_classes for d in found), cfg.model.num_classes] == [classes] * 3


def batches(images, rate=0.1, recipe=100):
    schedules = [dict(warmup_lr=0.01, eta_min=0.02, warmup=5), dict(eta_min=0.04), dict(power=2)]
    return Config(
        dict(
            **dict(train_dataloader=dict(batch_size=images), total_batch_size=recipe),
            **dict(optim_wrapper=dict(optimizer=dict(lr=rate)), param_scheduler=schedules),
        )
    )


@pytest.mark.parametrize(
    ("world", "batch", "accumulate", "said", "rate"),
    [
        (1, None, None, "1 x 10 images x 10 accumulated = 100", 0.1),
        (2, 20, None, "2 x 20 images x 2 accumulated = 80", 0.08),
        (1, 30, None, "1 x 30 images x 3 accumulated = 90", 0.09),
        (4, 90, None, "4 x 90 images x 1 accumulated = 360", 0.36),
        (3, None, 1, "3 x 10 images x 1 accumulated = 30", 0.03),
        (1, 0, 0, "1 x 10 images x 0 accumulated = 0", 0.0),
    ],
)
def test_all_rates_are_of_the_total_batch(world, batch, accumulate, said, rate):
    cfg = batches(10)
    found = config.plan_batches(cfg, world, batch, accumulate)
    assert found == f"{said} a step (recipe: 100), learning rate {rate:g}"
    assert cfg.optim_wrapper.optimizer.lr == pytest.approx(rate)
    first, second, third = map(dict, cfg.param_scheduler)
    scale = rate / 0.1
    assert first == pytest.approx(dict(warmup_lr=0.01 * scale, eta_min=0.02 * scale, warmup=5))
    assert second == pytest.approx(dict(eta_min=0.04 * scale)) and third == dict(power=2)


def test_every_such_cosine_begins_after_its_warm_up():
    kinds = ("WarmupCosineLR", "LinearLR", "WarmupCosineLR")
    cfg = Config(dict(param_scheduler=[dict(type=kind) for kind in kinds]))
    config.anneal_after_warmup(cfg)
    found = [schedule.get("warmup_prefix") for schedule in cfg.param_scheduler]
    assert found == [True, None, True]


@pytest.mark.parametrize(
    ("launcher", "count"),
    [("pytorch", 2), ("slurm", 3), ("mpi", 4), ("none", 1), (None, 1), ("", 1)],
)
def test_processes_are_those_of_the_launcher(monkeypatch, launcher, count):
    names = ("WORLD_SIZE", "SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE")
    for name, value in zip(names, "234", strict=True):
        monkeypatch.setenv(name, value)
    assert config.world_size(launcher) == count
    for name in names:
        monkeypatch.delenv(name)
    assert config.world_size(launcher) == 1


@pytest.mark.parametrize("decay", [0, 1, -0.5, 1.5])
def test_averages_need_a_share(decay):
    with pytest.raises(ConfigError) as error:
        config.use_ema(Config(dict(custom_hooks=[])), decay)
    told = f"--ema {decay}: a decay between 0 and 1 is needed, such as 0.9999"
    assert str(error.value) == told


def test_averages_are_one_more_hook():
    cfg = Config(dict(custom_hooks=[dict(type="Mine")]))
    config.use_ema(cfg, 0.75)
    hook = dict(type="AveragedWeights", momentum=0.25, update_buffers=True)
    assert cfg.custom_hooks == [dict(type="Mine"), hook]


# Building


@pytest.fixture
def build(monkeypatch):
    """``build`` with a runner that holds nothing, and no CUDA."""
    monkeypatch.setattr(config, "build_runner", lambda cfg: SimpleNamespace(cfg=cfg))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return config.build


def test_the_data_sets_are_listed_once(cfg, build):
    runner = build(cfg)
    assert cfg.model.classes == ["n01", "n02", "n03"]
    assert cfg.val_evaluator.out_dir == f"{cfg.work_dir}/evaluation"
    assert cfg.default_hooks.checkpoint.type == "CheckpointHook"
    for name, count in (("train", 24), ("val", 12)):
        loader, given = getattr(runner, f"_{name}_dataloader"), cfg[f"{name}_dataloader"]
        assert isinstance(loader["dataset"], ImageDataset) and len(loader["dataset"]) == count
        assert {**loader, "dataset": 0} == {**given, "dataset": 0}
    assert not hasattr(runner, "_val_evaluator") and "real_labels" not in cfg.val_evaluator


def test_an_evaluation_writes_no_checkpoints_and_takes_any_batch(cfg, build):
    cfg.train_dataloader.update(batch_size=25, drop_last=True)
    with pytest.raises(ConfigError) as error:
        build(cfg)
    assert str(error.value) == (
        "24 photos to train on are less than a batch of 25 over all processes: a smaller "
        "--batch-size is needed"
    )
    build(cfg, training=False)
    assert cfg.default_hooks.checkpoint is None
    for changes in (dict(batch_size=24), dict(batch_size=25, drop_last=False)):
        again = cfg.copy()
        again.train_dataloader.update(changes)
        build(again, training=False)


@pytest.mark.parametrize(("batch", "drop", "fits"), [(24, True, 1), (25, False, 1), (25, True, 0)])
def test_a_batch_of_all_photos_is_one(cfg, build, batch, drop, fits):
    cfg.train_dataloader.update(batch_size=batch, drop_last=drop)
    if fits:
        assert build(cfg)
    else:
        with pytest.raises(ConfigError, match="are less than a batch of 25"):
            build(cfg)


def test_processes_share_the_photos(cfg, build, monkeypatch):
    cfg.launcher = "pytorch"
    monkeypatch.setenv("WORLD_SIZE", "3")
    cfg.train_dataloader.update(batch_size=9, drop_last=True)
    with pytest.raises(ConfigError, match="are less than a batch of 27 over"):
        build(cfg)


@pytest.mark.parametrize("count", [1, 5])
def test_classes_of_one_split_alone_are_named(cfg, build, tmp_path, count):
    cfg.val_dataloader.dataset.root = str(
        write_images(tmp_path / "val", {f"m{i:02}": 1 for i in range(count)})
    )
    cfg.val_dataloader.dataset.num_classes = None
    with pytest.raises(ConfigError) as error:
        build(cfg)
    odd = "m00, n01, n02" if count == 1 else "m00, m01, m02"
    assert str(error.value) == (
        f"training has 3 classes, validation {count}; only one of them has {odd}"
    )


@pytest.mark.parametrize(("cuda", "kept"), [(False, None), (True, "torch")])
def test_synced_norms_step_back_without_gpus_and_say_so(cfg, build, monkeypatch, cuda, kept):
    said = []
    monkeypatch.setattr(config, "print_log", lambda text, logger: said.append((text, logger)))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    build(cfg.copy())
    assert said == []
    cfg.sync_bn = "torch"
    build(cfg)
    assert cfg.sync_bn == kept
    told = [("no CUDA: SyncBN falls back to BN", "current")]
    assert said == ([] if cuda else told)


def test_real_labels_come_with_the_names_of_the_files(cfg, build, tmp_path):
    with pytest.raises(ConfigError, match="^no label file at absent.json$"):
        build(cfg, real_labels="absent.json")
    (tmp_path / "real.json").write_text("[]")
    for labels in ("timm", str(tmp_path / "real.json")):
        runner = build(cfg, real_labels=labels)
        assert cfg.val_evaluator.real_labels == labels
        filenames = [f"n0{c}_{i}.jpg" for c in (1, 2, 3) for i in range(4)]
        assert runner._val_evaluator == dict(cfg.val_evaluator, filenames=filenames)


def test_streams_have_loaders_of_their_own(monkeypatch):
    stream = ImageStream.__new__(ImageStream)
    monkeypatch.setattr(ImageStream, "__len__", lambda self: 3)
    given = dict(batch_size=3, num_workers=0, sampler=1, collate_fn=2, dataset=3, drop_last=True)
    loader = config._loader(given, stream)
    assert isinstance(loader, DataLoader) and loader.dataset is stream
    assert (loader.batch_size, loader.drop_last) == (3, True)
    assert config._loader(given, "data") == {**given, "dataset": "data"}


@pytest.mark.parametrize("distributed", [False, True])
def test_a_checkpoint_is_evaluated_by_its_own_network(tmp_path, distributed):
    network = timm.create_model("dw_conv_nano", num_classes=3)
    weights = {
        k: v for k, v in network.state_dict().items() if not k.endswith("num_batches_tracked")
    }
    torch.save(dict(state_dict=weights, meta=dict(classes=["c", "a", "b"])), tmp_path / "a.pth")
    other = timm.create_model("dw_conv_nano", num_classes=3)
    held = SimpleNamespace(network=other)
    runner = SimpleNamespace(
        **dict(distributed=distributed, val=lambda: "figures"),
        model=SimpleNamespace(module=held) if distributed else held,
        cfg=SimpleNamespace(model=SimpleNamespace(classes=["a", "b", "c"])),
    )
    assert config.evaluate(runner, str(tmp_path / "a.pth")) == "figures"
    # The rows are matched by the classes' names.
    assert other.head.fc.weight.equal(network.head.fc.weight[[1, 2, 0]])
    bare = {k: v for k, v in weights.items() if not k.startswith("head.fc.")}
    torch.save(bare, tmp_path / "b.pth")
    with pytest.raises(backbones.CheckpointError) as error:
        config.evaluate(runner, str(tmp_path / "b.pth"))
    assert str(error.value) == (
        f"{tmp_path}/b.pth cannot be evaluated: it has no head.fc.weight, head.fc.bias for the "
        "3 classes here"
    )


def test_an_exported_file_is_evaluated_in_the_networks_place(monkeypatch):
    from dense.export import evaluation

    monkeypatch.setattr(config, "is_exported", lambda path: path == "a.onnx")
    monkeypatch.setattr(evaluation, "read_for", lambda *read: read)
    monkeypatch.setattr(evaluation, "logits_of", lambda read: ("logits", *read))
    used = []
    held = SimpleNamespace(use=used.append, network=None)
    settings = SimpleNamespace(model=SimpleNamespace(classes=["n02123045", "dog"]))
    runner = SimpleNamespace(model=held, distributed=False, cfg=settings, val=lambda: used[:])
    names = ("tabby, tabby cat", "dog")
    assert config.evaluate(runner, "a.onnx") == [("logits", "classification", "a.onnx", names)]


# Metric


def test_classes_without_images_have_no_accuracy(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(metric, "print_log", lambda text, logger: said.append((text, logger)))
    counted = ClassificationMetric(out_dir=str(tmp_path / "deep/out"))
    counted.dataset_meta = {"classes": ["a, b", "longer name", "none"]}
    # label, index, best, second
    rows = [(0, 0, 0, 1), (0, 1, 1, 0), (0, 2, 2, 1), (1, 3, 1, 0)]
    for _ in range(2):
        found = counted.compute_metrics(rows)
        assert found == {"top1": 50.0, "top5": 75.0}
        assert {type(value) for value in found.values()} == {float}
    assert said.pop() == said[0]
    with open(tmp_path / "deep/out/per_class.csv", newline="") as file:
        found = list(csv.reader(file))
    head = ["class", "images", "top1"]
    per_class = [["a, b", "3", "33.33"], ["longer name", "1", "100.00"], ["none", "0", ""]]
    assert found == [head, *per_class]
    with open(tmp_path / "deep/out/confusion.csv", newline="") as file:
        names, *rows = csv.reader(file)
    assert names == ["", "a, b", "longer name", "none"]
    assert rows == [
        ["a, b", "1", "1", "1"],
        ["longer name", "0", "1", "0"],
        ["none", "0", "0", "0"],
    ]
    lines = ["class        images    top1", "a, b              3   33.33"]
    lines += ["longer name       1  100.00", "none              0        "]
    assert said == [("\n".join(["per class:", *lines]), "current")]


@pytest.mark.parametrize("count", [50, 51])
def test_of_more_than_fifty_classes_few_are_logged(monkeypatch, count):
    said = []
    monkeypatch.setattr(metric, "print_log", lambda text, **_: said.append(text.splitlines()))
    counted = ClassificationMetric()
    counted.dataset_meta = {"classes": [f"c{i:02}" for i in range(count)]}
    # No image of the first two; then the later, the less accurate.
    rows = [(i, 0, i if n < count - i else 0, 0) for i in range(2, count) for n in range(count)]
    counted.compute_metrics([(label, -1, *best) for label, _, *best in rows])
    [(title, _, *lines)] = said
    if count == 50:
        assert title == "per class:" and len(lines) == 50
        return
    assert title == "the 20 least accurate of 51 classes:"
    assert [line[:3] for line in lines] == [f"c{i}" for i in range(50, 30, -1)]


def test_nothing_is_told_of_classes_without_names(monkeypatch):
    monkeypatch.setattr(metric, "print_log", lambda *_, **__: pytest.fail("logged"))
    assert ClassificationMetric().compute_metrics([(0, 0, 0)]) == {"top1": 100.0, "top5": 100.0}


def test_the_first_batch_is_not_timed(monkeypatch):
    times = iter([100.0, 104.0, 200.0, 202.0, 300.0, 300.5, 400.0, 400.0])
    monkeypatch.setattr(metric.time, "perf_counter", lambda: next(times))
    counted = ClassificationMetric()

    def evaluated(*sizes):
        counted.results.clear()
        for size in sizes:
            sample = dict(label=0, index=-1, best=torch.tensor([0, 1]))
            counted.process(None, [sample] * size)
        return counted.evaluate(sum(sizes)).get("images_per_second")

    # 5 + 6 images in 4 s.
    assert evaluated(3, 5, 6) == 2.8
    assert evaluated(3) is None
    assert evaluated(1, 1) == 2.0
    assert evaluated(1, 1) is None
    # Results that no batch brought have no time.
    counted.results = [(0, -1, 0)]
    assert counted.evaluate(1) == {"top1": 100.0, "top5": 100.0}


def test_real_labels_need_names_of_imagenet(tmp_path):
    (tmp_path / "real.json").write_text(json.dumps([[0], [], [1, 2]]))
    with pytest.raises(ValueError, match="^real_labels needs the file names of the images$"):
        ClassificationMetric(str(tmp_path / "real.json"))
    names = ["ILSVRC2012_val_00000003.JPEG", "ILSVRC2012_val_00000001.png", "mine.jpg"]
    counted = ClassificationMetric(str(tmp_path / "real.json"), filenames=names)
    valid = {names[0]: [1, 2], "ILSVRC2012_val_00000001.JPEG": [0]}
    assert counted.real == valid | {"ILSVRC2012_val_00000002.JPEG": []}
    assert counted.compute_metrics([(0, 0, 2), (0, 1, 1)])["real"] == 50.0
    with pytest.raises(ValueError) as error:
        counted.compute_metrics([(0, 2, 2)])
    told = "mine.JPEG has no ReaL label: names must be like ILSVRC2012_val_00000001.JPEG"
    assert str(error.value) == told
    counted.filenames = ["ILSVRC2012_val_00000002.JPEG"]
    assert np.isnan(counted.compute_metrics([(0, 0, 2)])["real"])


# Progress


class Hub(dict):
    update_scalar = dict.__setitem__


@pytest.fixture
def bar(monkeypatch):
    """A function: a bar after an iteration of 2 s, its text, and what was logged."""
    times = iter([100.0, 110.0, 112.0])
    monkeypatch.setattr(hooks.time, "perf_counter", lambda: next(times))
    usage = SimpleNamespace(ru_maxrss=3 * 2**20)
    monkeypatch.setattr(hooks.resource, "getrusage", lambda who: usage)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 5 * 2**20)

    def call(cuda=False, main=True, tty=True, platform="linux", outputs=None):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
        monkeypatch.setattr(hooks, "is_main_process", lambda: main)
        monkeypatch.setattr(hooks.sys.stderr, "isatty", lambda: tty, raising=False)
        monkeypatch.setattr(hooks.sys, "platform", platform)
        runner = SimpleNamespace(
            **dict(world_size=2, max_iters=9, iter=4, experiment_name="mine", message_hub=Hub()),
            train_dataloader=SimpleNamespace(batch_size=8),
        )
        hook = hooks.ProgressBar()
        hook.before_train(runner)
        hook.before_train_epoch(runner)
        hook.after_train_iter(runner, 4, outputs=outputs)
        shown = hook._bar
        found = SimpleNamespace(**{key: getattr(shown, key, 0) for key in ("total", "n", "unit")})
        found.follows = bool(getattr(shown, "dynamic_ncols", None))
        found.disable, found.postfix = shown.disable, getattr(shown, "postfix", None)
        hook.after_train(runner)
        assert shown.disable, "closed"
        return found, runner.message_hub

    return call


@pytest.mark.parametrize(
    ("given", "text", "memory"),
    [
        (dict(outputs={"loss": torch.tensor(1.23456)}), "loss 1.235, 8 images/s, 3072 MB", 3072),
        ({}, "loss nan, 8 images/s, 3072 MB", 3072),
        (dict(platform="darwin"), "loss nan, 8 images/s, 3 MB", 3),
        (dict(cuda=True), "loss nan, 8 images/s, 5 MB", None),
    ],
)
def test_an_iteration_is_shown_with_speed_and_memory(bar, given, text, memory):
    shown, logged = bar(**given)
    assert shown.postfix == text and not shown.disable
    assert (shown.total, shown.n, shown.unit, shown.follows) == (9, 5, "it", True)
    expected = {"train/images_per_second": 8.0, "train/memory_mb": memory}
    assert logged == {name: value for name, value in expected.items() if value is not None}


@pytest.mark.parametrize("given", [dict(main=False), dict(tty=False)])
def test_others_log_and_show_nothing(bar, given):
    shown, logged = bar(**given)
    assert shown.disable and logged == {"train/images_per_second": 8.0, "train/memory_mb": 3072}


# Network


def test_networks_are_built_with_their_options(monkeypatch):
    with pytest.raises(ValueError) as error:
        ImageClassifier("resnet50", 3)
    hosts = [a.model for a in model.ABLATIONS.values() if not a.is_pyramid]
    valid = ", ".join((*backbones.MODEL_NAMES, *hosts))
    assert str(error.value) == f"no network 'resnet50': {valid} are valid"
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda *given, **named: compiled.append((given, named)))
    plain = ImageClassifier("dw_conv_nano", 3, drop_rate=0.5)
    assert plain.network.num_classes == 3 and plain.network.head.drop.p == 0.5
    assert plain._run == [plain.network] and compiled == [] and plain.mixup is None
    assert plain.criterion.smoothing == 0.0
    assert not any(stage.grad_checkpointing for stage in plain.network.stages)
    fast = ImageClassifier("dw_conv_nano", 3, compile=True, grad_checkpointing=True)
    assert compiled == [((fast.network,), {"dynamic": True})]
    assert all(stage.grad_checkpointing for stage in fast.network.stages)


def test_images_reach_the_network_channels_last():
    classifier, seen = ImageClassifier("dw_conv_nano", 3), []

    def network(x):
        seen.append(x)
        return torch.tensor([[0.1, 0.3, 0.2]]).expand(len(x), 3)

    classifier.use(network)
    x, labels, indices = torch.randn(2, 3, 8, 8), torch.tensor([2, 0]), torch.tensor([7, 9])
    assert classifier(x, labels, indices).equal(network(x))
    assert seen[0].equal(x) and seen[0].is_contiguous(memory_format=torch.channels_last)
    found = classifier(x, labels, indices, mode="predict")
    assert {type(row[key]) for row in found for key in ("label", "index")} == {int}
    rows = [(row["label"], row["index"], row["best"].tolist()) for row in found]
    assert rows == [(2, 7, [1, 2, 0]), (0, 9, [1, 2, 0])]


def test_initial_weights_are_matched_by_the_classes(tmp_path):
    network = timm.create_model("dw_conv_nano", num_classes=2)
    content = dict(state_dict=network.state_dict(), meta=dict(classes=["b", "a"]))
    torch.save(content, tmp_path / "a.pth")
    made = ImageClassifier("dw_conv_nano", 2, classes=["a", "b"], init=str(tmp_path / "a.pth"))
    assert not hasattr(made, "load_report")
    made.init_weights()
    assert made.network.head.fc.weight.equal(network.head.fc.weight[[1, 0]])
    assert not made.load_report.missing
    plain = ImageClassifier("dw_conv_nano", 2)
    plain.init_weights()
    assert not hasattr(plain, "load_report")


def test_what_a_config_has_for_its_network_alone():
    own = dict(type="ImageClassifier", name="a", num_classes=3, classes=[], mixup={}, init=None)
    own |= dict(label_smoothing=0.1, grad_checkpointing=True, compile=True)
    assert network_options({**own, "img_size": 64, "drop_rate": 0.1}) == dict(
        img_size=64, drop_rate=0.1
    )


# Prediction


@pytest.fixture
def trained(tmp_path):
    """A config of four classes, and a function: the predictor of a checkpoint of some classes."""
    cfg = load_config(NANO)
    cfg.model.update(num_classes=4, depths=(1, 2, 1, 1))
    cfg.dump(tmp_path / "net.py")

    def call(count, content, drop="none", **options):
        network = timm.create_model("dw_conv_nano", num_classes=count, depths=(1, 2, 1, 1))
        weights = {k: v for k, v in network.state_dict().items() if drop not in k}
        torch.save(dict(content, state_dict=weights), tmp_path / "a.pth")
        return Predictor(str(tmp_path / "net.py"), str(tmp_path / "a.pth"), **options)

    return call


def test_classes_of_a_predictor_are_the_files(trained):
    classes = ["n02123045", "dog"]
    assert trained(2, dict(meta=dict(classes=classes))).classes == ("tabby, tabby cat", "dog")
    bare = trained(4, {})
    assert bare.classes == ("0", "1", "2", "3") and bare.report.matched
    assert not any(isinstance(module, nn.BatchNorm2d) for module in bare.network.modules())
    assert bare.transform == load_config(NANO).val_dataloader.dataset.transform.to_dict()
    image = np.random.default_rng(0).integers(0, 255, (70, 90, 3), dtype=np.uint8)
    scores = bare(image)
    assert scores.shape == (4,) and scores.dtype == np.float32
    pixels = bare._transform(Image.fromarray(image))[None]
    with torch.no_grad():
        np.testing.assert_allclose(scores, bare.network(pixels).softmax(1)[0], rtol=1e-5)
    with pytest.raises(ValueError, match=r"\(H, W, 3\), uint8"):
        bare(image[..., 0])


def test_a_predictor_runs_where_it_is_asked_to(trained):
    predict = trained(4, {}, drop="num_batches_tracked", device="meta")
    assert {value.device.type for value in predict.network.parameters()} == {"meta"}


def test_a_checkpoint_without_its_classifier_predicts_nothing(trained):
    with pytest.raises(backbones.CheckpointError) as error:
        trained(4, {}, drop="head.fc.")
    told = "a.pth has no head.fc.weight, head.fc.bias, which prediction needs"
    assert str(error.value).endswith(told)


def test_only_names_of_imagenet_are_replaced():
    found = readable(["n02123045", "dog", "n00004475", "n99999999"])
    assert found == ("tabby, tabby cat", "dog", "organism, being", "n99999999")
