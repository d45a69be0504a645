"""What the command line asks of the machine, and each process of a training, without a training."""

import json
import logging
import os
import signal
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import cloudpickle
import pytest
import torch
from omegaconf import OmegaConf
from torch import nn
from torch.multiprocessing import ProcessRaisedException

from backbones import CheckpointError
from dense.detection import PyramidBackbone, engine
from dense.detection.config import LazyConfigError
from dense.export.files import ExportError
from dense.images import TooManyUnreadable
from dense.runs import Stopped


def words(**changes) -> Namespace:
    """A command line."""
    plain = dict(num_gpus=0, num_processes=1, num_machines=1, machine_rank=0, dist_url="auto")
    plain |= dict(resume=False, eval_only=False, tta=False, early_stop=None, config_file="a.py")
    return Namespace(**plain | changes)


@pytest.fixture
def cfg(tmp_path):
    train = dict(init_checkpoint="", eval_period=5, device="cuda", max_iter=9, seed=-1)
    train |= dict(output_dir=str(tmp_path / "deep/out"), amp=dict(enabled=True))
    data = dict(train=dict(total_batch_size=4), test="the loader", evaluator="the evaluator")
    return OmegaConf.create(dict(train=train, dataloader=data, data={}, model={}))


@pytest.fixture(autouse=True)
def two_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(num_gpus=-1), "--num-gpus -1: 0 or more is needed"),
        (dict(num_processes=0), "--num-processes 0: 1 or more is needed"),
        (dict(num_machines=0), "--num-machines 0: 1 or more is needed"),
        (dict(machine_rank=1), "--machine-rank 1: with --num-machines 1 it is 0"),
        (
            dict(machine_rank=2, num_machines=2),
            "--machine-rank 2: with --num-machines 2 it is 0 to 1",
        ),
        (dict(machine_rank=-1), "--machine-rank -1: with --num-machines 1 it is 0"),
        (
            dict(num_gpus=3),
            "--num-gpus 3, but there are 2; --num-gpus 0 trains on the CPU, in --num-processes "
            "processes",
        ),
        (
            dict(num_gpus=1, num_processes=2),
            "--num-processes is for the CPU: on GPUs there is one process per GPU",
        ),
        (
            dict(num_processes=3),
            "dataloader.train.total_batch_size=4 cannot be shared by 3 processes: a multiple of "
            "their number is needed",
        ),
        (
            dict(num_gpus=2, num_machines=3, dist_url="tcp://a:1"),
            "dataloader.train.total_batch_size=4 cannot be shared by 6 processes: a multiple of "
            "their number is needed",
        ),
        (dict(eval_only=True), "--eval-only needs a checkpoint: train.init_checkpoint=PATH"),
        (
            dict(num_machines=2),
            "several machines need --dist-url, such as tcp://<first machine>:29500",
        ),
        (dict(tta=True), "--tta is for --eval-only: training augments as the config says"),
    ],
)
def test_what_a_command_line_asks_too_much(cfg, changes, message):
    with pytest.raises(LazyConfigError) as refused:
        engine.check(cfg, words(**changes))
    assert str(refused.value) == message


@pytest.mark.parametrize(
    "changes",
    [
        *({}, dict(num_gpus=2), dict(num_gpus=None), dict(num_processes=2), dict(num_processes=4)),
        dict(num_gpus=2, num_machines=2, machine_rank=1, dist_url="tcp://a:1"),
        *(dict(early_stop=2), dict(num_gpus=1)),
    ],
)
def test_what_a_command_line_may_ask(cfg, changes, monkeypatch):
    args = words(**changes)
    engine.check(cfg, args)
    assert args.num_gpus == (
        1 if changes.get("num_gpus", 0) is None else changes.get("num_gpus", 0)
    )
    # An evaluation shares no batch, and a config without a batch has none to share.
    cfg.train.init_checkpoint = "net.pth"
    engine.check(cfg, words(eval_only=True, num_processes=3))
    del cfg.dataloader.train.total_batch_size
    engine.check(cfg, words(num_processes=3))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    args = words(num_gpus=None, num_processes=3)
    engine.check(cfg, args)
    assert args.num_gpus == 0


def test_what_an_evaluation_and_stopping_early_need(cfg, monkeypatch):
    checked = []
    monkeypatch.setattr(engine, "check_tta", lambda *pair: checked.append(pair))
    cfg.train.init_checkpoint = "net.pth"
    engine.check(cfg, words(eval_only=True, tta=True))
    engine.check(cfg, words(eval_only=True))
    assert checked == [(cfg, True)]
    cfg.train.init_checkpoint = "net.onnx"
    with pytest.raises(LazyConfigError, match="--tta is for checkpoints, net.onnx is exported"):
        engine.check(cfg, words(eval_only=True, tta=True))
    engine.check(cfg, words(eval_only=True))
    evaluations = "^--early-stop needs evaluations: "
    cfg.train.eval_period = 0
    with pytest.raises(LazyConfigError, match=f"{evaluations}train.eval_period=N, N above 0$"):
        engine.check(cfg, words(early_stop=2))
    engine.check(cfg, words(early_stop=2, eval_only=True))
    engine.check(cfg, words())
    cfg.train.eval_period = 1
    cfg.data = dict(train_json="a.json", val_json="b.json")
    engine.check(cfg, words(early_stop=2))
    cfg.data.val_json = None
    with pytest.raises(LazyConfigError, match=f"{evaluations}validation data, --val-json$"):
        engine.check(cfg, words(early_stop=2))
    del cfg.data, cfg.dataloader.evaluator
    with pytest.raises(LazyConfigError, match=f"{evaluations}validation data, --val-json$"):
        engine.check(cfg, words(early_stop=2))
    with pytest.raises(LazyConfigError, match="^--eval-only needs dataloader.evaluator, which the"):
        engine.check(cfg, words(eval_only=True))


# Processes


@pytest.fixture
def handlers(monkeypatch) -> dict:
    found = {}
    monkeypatch.setattr(signal, "signal", found.__setitem__)
    return found


@pytest.mark.parametrize(
    "changes, processes",
    [({}, 1), (dict(num_gpus=2), 2), (dict(num_processes=4), 4), (dict(num_gpus=None), 1)],
)
def test_a_process_for_each_gpu_or_as_many_as_are_asked_for(
    cfg, monkeypatch, handlers, changes, processes
):
    launched = []
    monkeypatch.setattr(engine, "launch", lambda *a, **k: launched.append((a, k)))
    args = words(num_machines=2, machine_rank=1, dist_url="tcp://a:1", **changes)
    cfg.dataloader.train.total_batch_size = 8
    engine.start(cfg, args)
    [(given, options)] = launched
    pickled, count = options.pop("args")
    assert given == (engine._run, processes) and count == processes
    assert options == dict(num_machines=2, machine_rank=1, dist_url="tcp://a:1")
    assert cloudpickle.loads(pickled) == (cfg, args)
    if processes == 1:
        assert not handlers
        return
    # The processes that train are told, this one waits for them.
    killed = []
    monkeypatch.setattr(
        engine.multiprocessing,
        "active_children",
        lambda: [SimpleNamespace(pid=7), SimpleNamespace(pid=8)],
    )
    monkeypatch.setattr(os, "kill", lambda *pair: killed.append(pair))
    assert handlers.keys() == {signal.SIGINT, signal.SIGTERM}
    handlers[signal.SIGINT](2, None)
    assert not killed
    handlers[signal.SIGTERM](15, None)
    assert killed == [(7, 15), (8, 15)]


@pytest.mark.parametrize(
    "kind", [CheckpointError, LazyConfigError, ExportError, FloatingPointError, TooManyUnreadable]
)
def test_the_error_of_a_process_is_the_trainings(cfg, monkeypatch, kind):
    def failed(text):
        def launch(*_, **__):
            raise ProcessRaisedException(f"-- Process 1:\nTraceback\n{text}\n\n", 1, 99)

        monkeypatch.setattr(engine, "launch", launch)

    failed(f"some.module.{kind.__name__}: a.pth: no fit")
    with pytest.raises(kind, match="^a.pth: no fit$"):
        engine.start(cfg, words())
    failed("dense.detection.engine._StoppedProcess: 15 /my out/model.pth")
    with pytest.raises(Stopped) as stopped:
        engine.start(cfg, words())
    assert (stopped.value.number, stopped.value.checkpoint) == (15, "/my out/model.pth")
    failed("ZeroDivisionError: division")
    with pytest.raises(ProcessRaisedException, match="division"):
        engine.start(cfg, words())


@pytest.fixture
def done(monkeypatch) -> list:
    """What a process does, in order."""
    found = []

    def note(name, result=None):
        monkeypatch.setattr(engine, name, lambda *a, **k: found.append((name, a, k)) or result)

    for name in ("_set_up", "train", "_save_config", "evaluate", "_same_classes"):
        note(name)
    note("_built", "the model")
    note("with_tta", "the model, augmented")
    note("_exported", "the file")

    class Checkpointer:
        def __init__(self, model):
            assert model == "the model"

        def load_weights(self, path, *, complete):
            found.append(("load_weights", path, complete))
            return {"classes": "its own"}

    monkeypatch.setattr(engine, "WholeCheckpointer", Checkpointer)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return found


def test_a_process_trains_and_keeps_the_config_as_it_was_given(cfg, done):
    args = words(resume=True, early_stop=3)
    engine._run(cloudpickle.dumps((cfg, args)), 1)
    (first, given, _), (second, (changed,), options) = done
    assert (first, given[1], second) == ("_set_up", args, "train")
    on_ready = options.pop("on_ready")
    assert options == dict(resume=True, early_stop=3, config_file="a.py")
    assert changed.train.device == "cpu" and not changed.train.amp.enabled
    on_ready()
    assert done[-1] == ("_save_config", (cfg,), {})


@pytest.mark.parametrize("processes, kind", [(1, Stopped), (2, engine._StoppedProcess)])
def test_a_process_that_was_stopped_says_so_to_the_first(cfg, done, monkeypatch, processes, kind):
    def train(*_, **__):
        raise Stopped(15, "/my out/model.pth")

    monkeypatch.setattr(engine, "train", train)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    with pytest.raises(kind) as stopped:
        engine._run(cloudpickle.dumps((cfg, words())), processes)
    assert processes == 1 or str(stopped.value) == "15 /my out/model.pth"


def test_a_process_evaluates(cfg, done):
    cfg.train.init_checkpoint = "net.pth"
    cfg.dataloader.metadata = {"classes": ["a", "b"]}

    def ran(**changes):
        done.clear()
        engine._run(cloudpickle.dumps((cfg, words(eval_only=True, **changes))), 1)
        return [(name, *rest[:1]) for name, *rest in done[1:] if name != "_built"]

    used = cfg.copy()
    used.train.device, used.train.amp.enabled = "cpu", False
    load = ("load_weights", "net.pth")
    same = ("_same_classes", ({"classes": "its own"}, ["a", "b"], "net.pth"))
    assert ran() == [load, same, ("evaluate", (used, "the model"))]
    assert done[2] == ("load_weights", "net.pth", True)
    augmented = ("with_tta", (used, "the model"))
    assert ran(tta=True) == [
        *(load, same, augmented),
        ("evaluate", (used, "the model, augmented")),
    ]
    cfg.train.init_checkpoint = used.train.init_checkpoint = "net.onnx"
    assert ran() == [("_exported", (used,)), ("evaluate", (used, "the file"))]


@pytest.mark.parametrize("main", [True, False])
def test_results_are_printed_and_kept_by_the_first_process(
    cfg, monkeypatch, tmp_path, main, capsys
):
    results = {"bbox": {"AP": 12.5}}
    monkeypatch.setattr(engine, "instantiate", lambda node: f"built {node}")
    monkeypatch.setattr(engine, "inference_on_dataset", lambda *a: given.append(a) or results)
    monkeypatch.setattr(engine, "print_csv_format", lambda found: given.append(found))
    monkeypatch.setattr(engine.comm, "is_main_process", lambda: main)
    given, path = [], tmp_path / "deep/out/results.json"
    path.parent.mkdir(parents=True)
    assert engine.evaluate(cfg, "the model") is results
    asked = ("the model", "built the loader", "built the evaluator")
    assert given == [asked, *([results] if main else [])]
    assert path.exists() is main
    if main:
        assert path.read_text() == json.dumps(results, indent=1)
    del cfg.dataloader.evaluator
    assert engine.evaluate(cfg, "the model") is None


@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_is_set_up(cfg, monkeypatch, caplog, rank):
    logs, seeds = [], []
    monkeypatch.setattr(engine.comm, "get_rank", lambda: rank)
    monkeypatch.setattr(engine.comm, "get_world_size", lambda: 3)
    monkeypatch.setattr(
        engine,
        "setup_logger",
        lambda *a, **k: logs.append((a, k)) or logging.getLogger("dense.test"),
    )
    monkeypatch.setattr(engine, "collect_env_info", lambda: "this machine")
    monkeypatch.setattr(engine, "seed_all_rng", seeds.append)
    cudnn = SimpleNamespace(benchmark="as it was")
    monkeypatch.setattr(torch.backends, "cudnn", cudnn)
    args = words(eval_only=True)
    with caplog.at_level(logging.INFO, logger="dense.test"):
        engine._set_up(cfg, args)
    folder = cfg.train.output_dir
    assert Path(folder).is_dir() and cudnn.benchmark == "as it was"
    assert logs == [
        ((folder,), dict(distributed_rank=rank, name=name))
        for name in ("fvcore", "detectron2", "dense", "backbones")
    ]
    assert [record.getMessage() for record in caplog.records] == [
        f"Rank of current process: {rank}. World size: 3",
        "environment:\nthis machine",
        f"command line: {args}",
    ]
    cfg.train.seed = 0
    engine._set_up(cfg, words())
    assert cudnn.benchmark is False
    cfg.train.seed, cfg.train.cudnn_benchmark = 7, True
    engine._set_up(cfg, words())
    assert cudnn.benchmark is True
    del cfg.train.seed
    engine._set_up(cfg, words())
    assert seeds == [None, rank, 7 + rank, None]


def test_without_cuda_it_is_the_cpu_in_float32(cfg, monkeypatch, caplog):
    caplog.set_level("WARNING", "dense")
    threads, cores = [], range(8)
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(cores))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    given = cfg.copy()
    engine._fall_back(cfg, 3)
    assert cfg == given and not threads and not caplog.text
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    engine._fall_back(cfg, 3)
    assert cfg.train.device == "cpu" and cfg.train.amp.enabled is False and threads == [2]
    said = "no CUDA: train.device cuda becomes cpu, AMP falls back to float32"
    assert [record.getMessage() for record in caplog.records] == [said]
    # Nothing to change is nothing to say; another process says nothing.
    caplog.clear()
    engine._fall_back(cfg, 1)
    monkeypatch.setattr(engine.comm, "is_main_process", lambda: False)
    engine._fall_back(given, 1)
    assert not caplog.text and threads == [2] and given.train.device == "cpu"
    cores = range(2)
    engine._fall_back(cfg, 3)
    engine._fall_back(cfg, 2)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    engine._fall_back(cfg, 3)
    assert threads == [2, 1, 1]


def test_the_saved_config_is_the_first_process_to_write(cfg, monkeypatch, tmp_path):
    path = tmp_path / "deep/out/config.yaml"
    path.parent.mkdir(parents=True)
    monkeypatch.setattr(engine.comm, "is_main_process", lambda: False)
    engine._save_config(cfg)
    assert not path.exists()
    monkeypatch.setattr(engine.comm, "is_main_process", lambda: True)
    engine._save_config(cfg)
    assert OmegaConf.load(path) == cfg and list(path.parent.iterdir()) == [path]


def test_initial_weights_are_of_a_detector_or_of_its_backbone(cfg):
    loaded = []
    backbone = PyramidBackbone("dw_conv_nano", out_features=["res2"])
    backbone.init_weights = lambda: loaded.append("backbone")
    model = nn.Sequential(nn.Identity(), nn.Sequential(backbone))
    checkpointer = SimpleNamespace(load_weights=lambda *a, **k: loaded.append((a, k)))
    engine._start_fresh(cfg, model, checkpointer)
    cfg.train.init_checkpoint = "net.pth"
    engine._start_fresh(cfg, model, checkpointer)
    assert loaded == ["backbone", (("net.pth",), dict(complete=False))]


def test_other_classes_are_refused_with_what_to_say(cfg):
    assert engine._classes(cfg) is None
    for empty in (None, []):
        cfg.dataloader.metadata = {"classes": empty}
        assert engine._classes(cfg) is None
    cfg.dataloader.metadata = {"classes": ["a", "b"]}
    assert engine._classes(cfg) == ["a", "b"]
    for trained, classes in ((None, ["a"]), (["a"], None), (["a", "b"], ["a", "b"])):
        engine._same_classes({"classes": trained}, classes, "net.pth")
    engine._same_classes({}, ["a"], "net.pth")
    with pytest.raises(LazyConfigError) as refused:
        engine._same_classes({"classes": ["a", "b"]}, ["b", "a"], "net.pth")
    assert str(refused.value) == (
        "net.pth has the classes a,b, the data b,a: --classes a,b puts the data's in that order"
    )


def test_a_model_that_cannot_be_built_is_one_line(cfg, monkeypatch):
    cfg.model = dict(_target_="torch.nn.Linear", in_features=2)
    with pytest.raises(LazyConfigError, match="^model: .*out_features") as refused:
        engine._built(cfg)
    assert "\n" not in str(refused.value)
    cfg.model.out_features = 3
    cfg.train.device = "meta"
    assert engine._built(cfg).weight.device.type == "meta"
    synced = dict(_target_="torch.nn.SyncBatchNorm", num_features=3)
    cfg.model, cfg.train.device = synced, "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert type(engine._built(cfg)) is nn.BatchNorm2d
