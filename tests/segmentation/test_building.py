"""What our runner hands on to MMEngine's, with GPUs and without, in one process and in several."""

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from mmengine.config import Config
from mmengine.hooks import EMAHook
from mmengine.optim import AmpOptimWrapper, ConstantLR, OptimWrapper, PolyLR
from mmengine.runner import Runner
from torch import nn
from torch.utils.data import DataLoader

import dense.segmentation  # noqa: F401
from backbones import MODEL_NAMES, CheckpointError
from dense.openmmlab import runner as module
from dense.openmmlab.resuming import ResumableSampler
from dense.openmmlab.runner import DenseRunner
from dense.seeding import SeededDataset


class Logger(list):
    """Notes what is said, by its level."""

    def info(self, text):
        self.append(("info", text))

    def warning(self, text):
        self.append(("warning", text))


@pytest.fixture
def passed(monkeypatch):
    """What MMEngine's runner is asked for, in order; its methods do nothing."""
    calls = []

    def noting(name, answer):
        def call(*given, **named):
            calls.append((name, *given[name not in ("build_dataloader",) :], *named.items()))
            return answer(*given) if callable(answer) else answer

        return staticmethod(call) if name == "build_dataloader" else call

    def patch(name, answer=None):
        monkeypatch.setattr(Runner, name, noting(name, answer))

    patch.calls = calls
    return patch


@pytest.fixture
def make(monkeypatch, tmp_path):
    """A function: a runner that was not built, of a machine with GPUs or without."""

    def call(cuda=False, distributed=False, **attributes):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
        made = DenseRunner.__new__(DenseRunner)
        made.__dict__ |= dict(logger=Logger(), _distributed=distributed, _resume=False, _hooks=[])
        made.__dict__ |= dict(cfg=Config({}), _work_dir=str(tmp_path), _launcher="pytorch")
        made.__dict__ |= dict(_rank=0, _world_size=2, model=nn.Linear(2, 1), _timestamp="now")
        made.__dict__ |= attributes
        return made

    return call


# Beginning


class Started(nn.Module):
    def __init__(self, init):
        super().__init__()
        self.init = init


@pytest.fixture
def begin(monkeypatch, tmp_path):
    """A function: the runner of arguments, and what MMEngine's was given."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    def init(self, model, work_dir, **named):
        self.given = (work_dir, named)
        self.logger, self.model, self._world_size = Logger(), model, 3
        self._distributed = named.get("launcher") is not None

    monkeypatch.setattr(Runner, "__init__", init)

    def call(**named):
        model = nn.Sequential(Started("a.pth"), Started(nn.init.zeros_))
        return DenseRunner(model, str(tmp_path), **named)

    return call


def weights(runner):
    return runner.model[0].init


def test_a_training_that_is_not_resumed_looks_for_nothing(begin, tmp_path):
    (tmp_path / "iter_1.pth").touch()
    for load_from in (None, "other.pth"):
        runner = begin(load_from=load_from, seed=1)
        assert runner.given == (str(tmp_path), dict(load_from=load_from, resume=False, seed=1))
        assert runner.logger == [] and weights(runner) == "a.pth"


def test_a_named_checkpoint_is_resumed(begin, tmp_path):
    (tmp_path / "iter_1.pth").touch()
    runner = begin(load_from="other.pth", resume=True)
    assert runner.given[1] == dict(load_from="other.pth", resume=True)
    assert runner.logger == [("info", "resuming from other.pth")]
    # The weights that it began with may be gone; other attributes of the name are functions.
    assert weights(runner) is None and runner.model[1].init is nn.init.zeros_


def test_the_newest_whole_checkpoint_is_resumed(begin, tmp_path):
    runner = begin(resume=True)
    assert runner.given[1] == dict(load_from=None, resume=False) and weights(runner) == "a.pth"
    said = f"no checkpoint to resume in {tmp_path}: training from scratch"
    assert runner.logger == [("warning", said)]
    (tmp_path / "iter_2.pth").touch()
    with pytest.raises(CheckpointError) as error:
        begin(resume=True)
    assert str(error.value) == (
        f"{tmp_path}/iter_2.pth is truncated or damaged, and {tmp_path} has no other checkpoint to "
        "resume: without it the training starts from the beginning"
    )
    torch.save({"meta": {"iter": 1}}, tmp_path / "iter_1.pth")
    runner = begin(resume=True)
    assert runner.given[1] == dict(load_from=f"{tmp_path}/iter_1.pth", resume=True)
    damaged = f"{tmp_path}/iter_2.pth is truncated or damaged and is not used"
    assert runner.logger == [
        ("warning", damaged),
        ("info", f"resuming from {tmp_path}/iter_1.pth"),
    ]
    assert weights(runner) is None


@pytest.mark.parametrize("cuda", [False, True])
def test_processes_without_gpus_are_said(begin, monkeypatch, cuda):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    said = [] if cuda else [("info", "no CUDA: 3 processes on the CPU over gloo")]
    assert begin(launcher="pytorch").logger == said


def test_a_config_is_not_changed(monkeypatch):
    given = []
    from_cfg = classmethod(lambda cls, cfg: given.append(cfg) or "runner")
    monkeypatch.setattr(Runner, "from_cfg", from_cfg)
    cfg = Config(dict(model=dict(backbone=dict(type="swin_nano"), neck=dict(in_channels=[1]))))
    assert DenseRunner.from_cfg(cfg) == "runner"
    assert cfg.model.neck.in_channels == [1]
    assert given[0].model.neck.in_channels == [32, 64, 128, 256]
    for model in (None, nn.Identity()):
        assert DenseRunner.from_cfg(dict(model=model)) == "runner"


# Processes


@pytest.mark.parametrize(
    ("cuda", "distributed", "launcher", "started", "gloo"),
    [
        *((False, True, "pytorch", False, True), (False, True, "pytorch", True, False)),
        *((True, True, "pytorch", False, False), (False, False, "none", False, False)),
        (True, True, "slurm", False, False),
    ],
)
def test_gloo_is_for_processes_without_gpus(
    make, passed, monkeypatch, cuda, distributed, launcher, started, gloo
):
    passed("setup_env")
    begun = []
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: started)
    monkeypatch.setattr(torch.distributed, "init_process_group", begun.append)
    make(cuda, distributed, _launcher=launcher).setup_env({"a": 1})
    assert begun == ["gloo"] * gloo and passed.calls == [("setup_env", {"a": 1})]


def test_launchers_of_gpus_are_refused_without_any(make, passed):
    passed("setup_env")
    with pytest.raises(ValueError) as error:
        make(False, True, _launcher="slurm").setup_env({})
    assert str(error.value) == (
        "launcher 'slurm' needs a GPU per process and there is none: start CPU processes with "
        "torchrun and --launcher pytorch"
    )
    assert passed.calls == []


@pytest.mark.parametrize("given", [None, dict(find_unused_parameters="given", more=1)])
def test_models_are_wrapped_without_gpus_too(make, passed, given):
    passed("wrap_model", "wrapped")
    cfg = Config(dict(find_unused_parameters="config's"))
    for both in (True, False):
        runner = make(both, both, cfg=cfg)
        assert runner.wrap_model(given, runner.model) == "wrapped"
        assert passed.calls.pop() == ("wrap_model", given, runner.model)
    plain = dict(type="MMDistributedDataParallel", broadcast_buffers=False, device_ids=None)
    for settings, unused in ((cfg, "config's"), (Config({}), False)):
        runner = make(False, True, cfg=settings)
        assert runner.wrap_model(given, runner.model) == "wrapped"
        expected = plain | dict(find_unused_parameters=unused) | (given or {})
        assert passed.calls.pop() == ("wrap_model", expected, runner.model)
    runner.wrap_model(dict(device_ids=[3], type="Mine"), runner.model)
    found = passed.calls.pop()[1]
    assert (found["device_ids"], found["type"]) == (None, "Mine")


# Models


@pytest.mark.parametrize("cuda", [False, True])
def test_synced_norms_step_back_without_gpus(make, passed, cuda):
    passed("build_model", lambda *_: nn.Sequential(nn.SyncBatchNorm(3)))
    runner = make(cuda)
    for model in (nn.Identity(), dict(type="A"), dict(backbone=None), dict(backbone=dict(depth=3))):
        built = runner.build_model(model)
        assert isinstance(built[0], nn.SyncBatchNorm) == cuda
    assert len(passed.calls) == 4


@pytest.mark.parametrize("augmented", [False, True])
def test_backbones_have_to_be_registered(make, passed, augmented):
    passed("build_model", lambda *_: nn.Identity())

    def build(kind):
        model = dict(type="Net", backbone=dict(type=kind))
        make().build_model(dict(type="TTA", module=model) if augmented else model)

    build("swin_nano")
    build(nn.Identity)
    with pytest.raises(ValueError) as error:
        build("swin_mano")
    assert str(error.value) == (
        f"model.backbone.type='swin_mano': {', '.join(MODEL_NAMES)} and the framework's own are "
        "valid"
    )


AMP = dict(
    type="AmpOptimWrapper", loss_scale="dynamic", dtype="float16", use_fsdp=True, clip_grad=1
)


@pytest.mark.parametrize("cuda", [False, True])
def test_mixed_precision_steps_back_without_gpus(make, passed, cuda):
    passed("build_optim_wrapper", "wrapper")
    plain = dict(type="OptimWrapper", dtype="stays")
    for given, expected in (
        (dict(AMP), AMP if cuda else dict(type="OptimWrapper", clip_grad=1)),
        (plain, plain),
        ("built", "built"),
    ):
        runner = make(cuda)
        assert runner.build_optim_wrapper(given) == "wrapper"
        assert passed.calls.pop() == ("build_optim_wrapper", expected)
        stepped = given == AMP and not cuda
        assert runner.logger == [("warning", "no CUDA: AMP falls back to float32")] * stepped


@pytest.mark.parametrize(
    ("cast", "dtype"), [(None, torch.float16), (torch.bfloat16, torch.bfloat16)]
)
def test_risky_precision_is_looked_for(make, passed, monkeypatch, cast, dtype):
    amp = AmpOptimWrapper.__new__(AmpOptimWrapper)
    amp.cast_dtype = cast
    seen = []
    monkeypatch.setattr(module, "warn_of_float16", lambda *given: seen.append(given))
    passed("build_optim_wrapper", amp)
    runner = make(True)
    assert runner.build_optim_wrapper("any") is amp
    assert seen == [(runner.model, dtype, "optim_wrapper.dtype")]
    passed("build_optim_wrapper", OptimWrapper.__new__(OptimWrapper))
    runner.build_optim_wrapper("any")
    assert len(seen) == 1


# Data


class Listed:
    """A data set that lists its files late."""

    full = False

    def full_init(self):
        self.full = True


def test_data_under_our_sampler_are_seeded(passed, monkeypatch):
    passed("build_dataloader", "loader")
    built = []

    def build(cfg):
        built.append(Listed() if cfg["type"] == "Listed" else [1, 2])
        return built[-1]

    monkeypatch.setattr(module.DATASETS, "build", build)

    def handed_on(loader, *given):
        assert DenseRunner.build_dataloader(loader, *given) == "loader"
        return passed.calls.pop()[1:]

    ours = dict(type="ResumableSampler", infinite=True)
    for kind in ("Listed", "Plain"):
        given = dict(dataset=dict(type=kind), sampler=ours, batch_size=2)
        found, *rest = handed_on(given, 5, True)
        assert rest == [5, True] and given["dataset"] == dict(type=kind)
        assert isinstance(found["dataset"], SeededDataset) and found["dataset"].dataset is built[-1]
        assert found | dict(dataset=0) == given | dict(dataset=0)
        assert built[-1].full if kind == "Listed" else built[-1] == [1, 2]
    found, *rest = handed_on(dict(dataset=[3], sampler=ours))
    assert found["dataset"].dataset == [3] and rest == [None, False] and len(built) == 2
    for sampler in (dict(type="DefaultSampler"), ResumableSampler([1]), None):
        other = dict(dataset=dict(type="Listed"), sampler=sampler)
        assert handed_on(other)[0] is other
    loader = DataLoader([1])
    assert handed_on(loader)[0] is loader and len(built) == 2


# Checkpoints


@pytest.fixture
def load(make, passed, monkeypatch):
    """A function: what loading a checkpoint of some content returns."""

    def call(content, resume=False, averaging=False, classes=("a", "b")):
        def answer(*_):
            if isinstance(content, Exception):
                raise content
            return content

        passed("load_checkpoint", answer)
        hooks = [EMAHook.__new__(EMAHook)] if averaging else [object()]
        dataset = SimpleNamespace(metainfo=classes and dict(classes=classes))
        data = SimpleNamespace(dataset=dataset)
        monkeypatch.setattr(DenseRunner, "train_dataloader", data)
        return make(_resume=resume, _hooks=hooks).load_checkpoint("a.pth", "cpu", False, [])

    return call


def test_a_checkpoint_is_loaded_whole_onto_the_cpu(make, passed):
    passed("load_checkpoint", {})
    assert make().load_checkpoint("a.pth") == {}
    assert passed.calls == [("load_checkpoint", "a.pth", "cpu", True, [("^module.", "")])]


def test_a_checkpoint_is_loaded_as_mmengine_does(load, passed):
    content = {"state_dict": {}, "ema_state_dict": {}, "meta": {"classes": ["b", "a"]}}
    assert load(content) is content
    assert passed.calls == [("load_checkpoint", "a.pth", "cpu", False, [])]
    assert os.environ.get("TORCH_FORCE_WEIGHTS_ONLY_LOAD") is None


def test_what_is_resumed_has_the_same_classes_and_averages(load):
    content = {"state_dict": {}, "meta": {"classes": ["a", "b"]}}
    assert load(content, resume=True) is content
    assert load(content, resume=True, classes=None) is content
    with pytest.raises(
        CheckpointError, match="^a.pth was trained on the classes a,b; the data has"
    ):
        load(content, resume=True, classes=("b", "a"))
    averaged = content | {"ema_state_dict": {}}
    assert load(averaged, resume=True, averaging=True) is averaged
    assert load(content, resume=True, averaging=True) is content
    with pytest.raises(CheckpointError) as error:
        load(averaged, resume=True)
    told = "a.pth is from a run with averaged weights: --resume needs the same --ema"
    assert str(error.value) == told


def test_weights_that_are_not_finite_are_refused(load):
    with pytest.raises(CheckpointError, match="^a.pth is not used: w has NaN or infinite values"):
        load({"state_dict": {"w": torch.tensor([float("inf")])}})


def test_another_networks_checkpoint_is_named_by_its_network(tmp_path):
    def named(trained, here="model = dict(backbone=dict(type='swin_nano'))"):
        error, cfg = CheckpointError("it is odd"), SimpleNamespace(pretty_text=here)
        if trained is not None:
            content = {"meta": {"cfg": trained}} if trained else {}
            torch.save(content, tmp_path / "a.pth")
        found = module._named(error, str(tmp_path / "a.pth"), cfg)
        assert isinstance(found, CheckpointError)
        return "itself" if found is error else str(found)

    assert named(None) == named("") == named("model = dict(backbone=dict(type='swin_nano'))")
    assert named("") == "itself"
    other = "model = dict(backbone=dict(type='dw_conv_nano'))"
    told = f"{tmp_path}/a.pth is of dw_conv_nano, the config of swin_nano"
    assert named(other) == told


def test_an_error_of_loading_names_the_network(load, monkeypatch):
    monkeypatch.setattr(module, "_named", lambda error, *given: CheckpointError(f"{given[0]}!"))
    with pytest.raises(CheckpointError, match="^a.pth!$"):
        load(ValueError("odd"))


def test_checkpoints_are_written_whole_or_not_at_all(make, passed, monkeypatch, tmp_path):
    passed("save_checkpoint")
    written = []
    monkeypatch.setattr(
        module.files, "write", lambda *given, **named: written.append((given, named))
    )
    model = nn.Linear(3, 2)
    runner = make(model=model)
    monkeypatch.setattr(DenseRunner, "iter", 4)
    runner.save_checkpoint("s3://bucket", "a.pth", 1, by_epoch=False)
    assert passed.calls.pop() == ("save_checkpoint", "s3://bucket", "a.pth", 1, ("by_epoch", False))
    assert written == []
    for folder in (tmp_path, str(tmp_path)):
        runner.save_checkpoint(folder, "a.pth", 1, by_epoch=False)
        [((path, write), options)] = written
        # 8 numbers of 4 bytes.
        assert path == tmp_path / "a.pth" and options == dict(size=32) and passed.calls == []
        write(tmp_path / "a.partial")
        expected = ("save_checkpoint", folder, "a.partial", 1, ("by_epoch", False))
        assert passed.calls.pop() == expected
        written.clear()
    with torch.no_grad():
        model.bias[0], model.weight[0, 0] = float("nan"), float("inf")
    with pytest.raises(FloatingPointError) as error:
        runner.save_checkpoint(tmp_path, "a.pth")
    assert str(error.value) == (
        "iteration 5: weight and 1 other weights have NaN or infinite values: a.pth is not "
        "written; a lower learning rate may help"
    )
    assert written == [] and passed.calls == []


# Schedules and the config


def schedules():
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    return ConstantLR(optimizer, begin=0, end=9), PolyLR(optimizer, begin=2, end=8)


@pytest.mark.parametrize("several", [False, True])
def test_a_checkpoints_schedule_of_another_length_is_said(make, passed, monkeypatch, several):
    constant, poly = schedules()
    built = dict(one=[constant], two=[poly]) if several else [constant, poly]
    passed("build_param_scheduler", built)
    passed("resume")
    loader = range(10)
    monkeypatch.setattr(
        DenseRunner, "train_dataloader", property(lambda self: loader), raising=False
    )
    runner = make()
    runner.resume("none was built", resume_optimizer=False)
    empty = dict(type="LinearLR", end=0.01, convert_to_iter_based=True)
    kept = dict(type="PolyLR")
    given = dict(one=[empty], two=[kept]) if several else [empty, kept]
    assert runner.build_param_scheduler(given) is built
    expected = ("build_param_scheduler", given if several else [kept])
    assert passed.calls == [
        ("resume", "none was built", ("resume_optimizer", False)),
        expected,
    ]
    runner.resume("a.pth")
    assert runner.logger == []
    constant.end, poly.end, poly.begin, poly.power = 5, 6, 1, 3.0
    runner.resume("a.pth")
    assert runner.logger == [
        (
            "warning",
            "the checkpoint's schedule stays (ConstantLR.end is 5, the config's is 9; PolyLR.begin "
            "is 1, the config's is 2; PolyLR.end is 6, the config's is 8): for another length "
            "begin a training from its weights, load_from=CHECKPOINT without --resume",
        )
    ]


@pytest.mark.parametrize(("filename", "name"), [("/folder/net.py", "net.py"), (None, "now.py")])
def test_the_config_is_written_when_the_checkpoint_fits(make, passed, tmp_path, filename, name):
    cfg = SimpleNamespace(filename=filename, pretty_text="a = 1")
    runner = make(cfg=cfg)
    path = Path(tmp_path, name)
    runner.dump_config()
    assert path.read_text() == "a = 1"
    # An earlier training's stays until its checkpoint has been found to fit.
    (tmp_path / "iter_1.pth").touch()
    cfg.pretty_text = "a = 2"
    runner.dump_config()
    assert path.read_text() == "a = 1"
    passed("load_or_resume", lambda *_: path.read_text() == "a = 1" or pytest.fail("too early"))
    runner.load_or_resume()
    assert path.read_text() == "a = 2" and passed.calls == [("load_or_resume",)]
