"""MMEngine's checkpoints: what is read, what is told of them, what is refused in which words."""

import logging
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from backbones import CheckpointError
from dense.openmmlab import checkpoints

ADVICE = "(weights for the backbone alone go into its init)"


def test_absent_and_damaged_files_are_named(tmp_path, monkeypatch):
    with pytest.raises(CheckpointError, match=f"^no checkpoint at {tmp_path}/a.pth$"):
        checkpoints.read(tmp_path / "a.pth")
    torch.save({"state_dict": {"a": torch.tensor([1.0, float("nan")])}}, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match="a.pth is not used: a has NaN or infinite values"):
        checkpoints.read(tmp_path / "a.pth")
    monkeypatch.setenv("HOME", str(tmp_path))
    torch.save({"state_dict": {}}, tmp_path / "b.pth")
    assert checkpoints.read("~/b.pth") == {"state_dict": {}}


def refused(error):
    with pytest.raises(CheckpointError) as raised, checkpoints.refusing("a.pth"):
        raise error
    return str(raised.value)


def test_an_error_of_reading_is_a_line():
    text = " \n  one \n\ntwo\n three\nfour\nfive"
    told = "a.pth is not a checkpoint of this model: one; two; three; four "
    assert refused(ValueError(text)) == told + ADVICE
    assert refused(KeyError()) == f"a.pth is not a checkpoint of this model: KeyError {ADVICE}"
    for length, shown in ((499, 499 * "x"), (500, f"{500 * 'x'} ..."), (501, f"{500 * 'x'} ...")):
        told = f"a.pth is not a checkpoint of this model: {shown} {ADVICE}"
        assert refused(ValueError(length * "x")) == told
    # What names the file stays; what does not is told of which file it is.
    assert refused(CheckpointError("a.pth is odd")) == "a.pth is odd"
    told = f"a.pth is not a checkpoint of this model: it is odd {ADVICE}"
    assert refused(CheckpointError("it is odd")) == told
    assert refused(ValueError("a.pth")) != "a.pth"


def test_checkpoints_of_gpus_are_read_without_one(tmp_path, monkeypatch):
    from dense.openmmlab import runner

    torch.save({"meta": {"iter": 4}}, path := tmp_path / "a.pth")
    read, places = torch.load, []
    monkeypatch.setattr(
        torch, "load", lambda *a, **k: places.append(k["map_location"]) or read(*a, **k)
    )
    checkpoints.read(path)
    assert checkpoints.iteration(path) == 4
    runner._named(CheckpointError("odd"), str(path), SimpleNamespace(pretty_text=""))
    assert places == ["cpu"] * 3


@pytest.mark.parametrize("kind", ["f8", "f4", "i8", "i4", "b1"])
def test_numpys_numbers_in_logs_are_read(tmp_path, kind):
    content = {"array": np.ones((2, 3), kind), "scalar": np.ones(1, kind)[0]}
    torch.save(content, tmp_path / "a.pth")
    found = checkpoints.read(tmp_path / "a.pth")
    assert found["array"].dtype == kind and (found["array"] == 1).all()
    assert found["scalar"] == 1 and found["scalar"].dtype == kind


@pytest.mark.parametrize("before", [{}, {"TORCH_FORCE_WEIGHTS_ONLY_LOAD": "0"}])
def test_the_environment_is_as_before(monkeypatch, before):
    for name in ("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"):
        monkeypatch.delenv(name, raising=False)
    for name, value in before.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(KeyError), checkpoints.safe_reading():
        assert checkpoints.os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] == "1"
        raise KeyError
    found = {k: v for k, v in checkpoints.os.environ.items() if "WEIGHTS_ONLY_LOAD" in k}
    assert found == before


CONFIGURED = dict(type="Data", metainfo=dict(classes=["of config"]))
DATASETS = {"Data": SimpleNamespace(METAINFO=dict(classes=["of class"]))}


@pytest.mark.parametrize(
    ("content", "dataset", "expected"),
    [
        (
            dict(meta=dict(dataset_meta=dict(CLASSES=["a"], palette=[[1]]))),
            CONFIGURED,
            dict(classes=["a"], palette=[[1]]),
        ),
        (dict(meta=dict(CLASSES=["a"], PALETTE=[1])), CONFIGURED, dict(classes=["a"], palette=[1])),
        (dict(meta=dict(dataset_meta=dict(classes=["a"]))), CONFIGURED, CONFIGURED["metainfo"]),
        (dict(meta=dict(classes=[], palette=[1])), CONFIGURED, CONFIGURED["metainfo"]),
        ({}, CONFIGURED, CONFIGURED["metainfo"]),
        ({}, dict(type="Data", metainfo={}), dict(classes=["of class"])),
        ({}, dict(type="Data"), dict(classes=["of class"])),
    ],
)
def test_classes_and_colours_are_the_checkpoints_if_it_has_both(content, dataset, expected):
    found = checkpoints.metainfo(content, dataset, DATASETS, ("classes", "palette"))
    assert found == expected


class Net(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(2, 3), nn.BatchNorm1d(3))


def test_a_whole_checkpoint_is_loaded_and_reported(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(checkpoints, "print_log", lambda text, logger: said.append((text, logger)))
    weights = Net().state_dict()
    for value in weights.values():
        value.fill_(1)
    # A count of batches that is missing is no fault.
    del weights["1.num_batches_tracked"]
    torch.save({"state_dict": weights, "meta": 3}, path := tmp_path / "a.pth")
    model = Net()
    content, report = checkpoints.load_whole(model, path)
    assert content["meta"] == 3 and model[0].weight.eq(1).all()
    assert report.source == str(path) and report.matched == tuple(weights)
    assert report.missing == report.unexpected == report.resized == ()
    assert said == [(str(report), "current")]

    def told(weights):
        torch.save({"state_dict": weights}, path)
        with pytest.raises(CheckpointError) as error:
            checkpoints.load_whole(model, path)
        return str(error.value)

    text = told({**weights, "2.weight": torch.ones(1)})
    assert text.startswith(
        f"not a checkpoint of this whole model: {path}: 7 matched, 0 missing, 1 u"
    )
    del weights["0.bias"]
    assert "5 matched, 1 missing, 0 unexpected, 0 resized" in told(weights)
    assert told({"0.bias": torch.ones(4)}).startswith(f"{path} is not a checkpoint of this model: ")
    torch.save({"weights": {}}, path)
    with pytest.raises(CheckpointError, match="is not a checkpoint of this model: 'state_dict'"):
        checkpoints.load_whole(model, path)
    assert len(said) == 1


def test_the_newest_is_by_what_the_files_say(tmp_path):
    assert checkpoints.iteration(tmp_path / "iter_1.pth") == -1

    def write(name, content=None):
        torch.save(content or {}, tmp_path / name)
        return tmp_path / name

    def cut(path):
        path.write_bytes(path.read_bytes()[:-30])
        return path

    silent = [write("iter_1.pth"), write("epoch_2.pth"), write("iter_3.pth", {"meta": {}})]
    assert checkpoints.newest_whole(tmp_path) == (silent[2], [])
    tensor = torch.zeros(999)
    zero = write("iter_7.pth", {"meta": {"iter": 0}, "x": tensor})
    assert checkpoints.iteration(zero) == 0
    assert checkpoints.newest_whole(str(tmp_path)) == (zero, [])
    # Other names are no checkpoints of a training.
    for name in ("best_iter_9.pth", "iter_9.pth.part", "xiter_9.pth", "iter_.pth", "iter_9_.pth"):
        write(name, {"meta": {"iter": 9}})
    assert checkpoints.newest_whole(tmp_path) == (zero, [])
    # Older ones that say what they are need not be whole: they are not read.
    new = write("iter_8.pth", {"meta": {"iter": 8}, "x": tensor})
    old = write("iter_5.pth", {"meta": {"iter": 5}, "x": tensor})
    for path in (old, zero):
        text = bytearray(path.read_bytes())
        text[len(text) // 2] ^= 255
        path.write_bytes(text)
        assert checkpoints.iteration(path) >= 0 and not checkpoints._is_whole(path)
    assert checkpoints.newest_whole(tmp_path) == (new, [])
    # One that says nothing, and is cut off, may have been the newest.
    damaged = cut(write("iter_10.pth", {"meta": {"iter": 10}}))
    assert checkpoints.iteration(damaged) == -1
    assert checkpoints.newest_whole(tmp_path) == (new, [damaged])
    for path in (new, old, zero, *silent):
        path.unlink()
    assert checkpoints.newest_whole(tmp_path) == (None, [damaged])


@pytest.mark.parametrize(
    ("trained", "classes", "told"),
    [
        (("a", "b"), ["a", "b"], None),
        (("a", "b"), None, None),
        ((), ["a"], None),
        (("1", "2"), [1, 2], None),
        (("a", "b"), ["a"], "the classes a,b; the data has a: --resume needs the same"),
        (("a", "b"), ["b", "a"], "a,b; the data has b,a in another order: --resume needs the same"),
    ],
)
def test_a_run_of_other_classes_is_not_resumed(trained, classes, told):
    content = {"meta": {"dataset_meta": {"classes": trained}}}
    if told is None:
        checkpoints.refuse_other(content, classes, "a.pth")
        return
    with pytest.raises(CheckpointError) as error:
        checkpoints.refuse_other(content, classes, "a.pth")
    assert str(error.value).startswith("a.pth was trained on the classes a,b;")
    assert str(error.value).endswith(told)


def test_ten_classes_are_shown():
    names = [f"c{i}" for i in range(12)]
    ten = "c0,c1,c2,c3,c4,c5,c6,c7,c8,c9"
    assert checkpoints.shown(names[:2]) == "c0,c1" and checkpoints.shown(names[:10]) == ten
    assert checkpoints.shown(names[:11]) == f"{ten}, ... (11)"
    assert checkpoints.shown(names) == f"{ten}, ... (12)" and checkpoints.shown([1, 2]) == "1,2"


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("model = dict(name='swin_nano', backbone=dict(type='other'))", "swin_nano"),
        ("model = dict(backbone=dict(type='dw_conv_nano'))", "dw_conv_nano"),
        ("model = dict(type='other')", None),
        ("model = dict(", None),
    ],
)
def test_the_network_of_a_checkpoint_is_in_its_config(text, name):
    assert checkpoints.network_of({"meta": {"cfg": text}}) == name
    assert checkpoints.network_of({"meta": {}}) is checkpoints.network_of(3) is None


def test_a_file_that_is_no_archive_is_not_whole(tmp_path):
    for name, content in (("a", b""), ("b", b"text"), ("c", b"PK\x03\x04")):
        Path(tmp_path, name).write_bytes(content)
        assert not checkpoints._is_whole(tmp_path / name)
    assert not checkpoints._is_whole(tmp_path)
    torch.save({}, tmp_path / "d")
    assert checkpoints._is_whole(tmp_path / "d")


def test_a_log_buffer_gives_its_statistics_alone():
    for name in ("min", "max", "mean", "current"):
        found = checkpoints._statistic(checkpoints.HistoryBuffer, name)
        assert found is getattr(checkpoints.HistoryBuffer, name)
    for owner, name in ((checkpoints.HistoryBuffer, "update"), (logging, "min"), (list, "max")):
        with pytest.raises(CheckpointError, match=f"^it refers to '{name}' of .*, which is not al"):
            checkpoints._statistic(owner, name)
