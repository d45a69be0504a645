"""Checkpoints: whole or not at all, weights only, and never half a network in silence."""

import os
import pickle
from pathlib import Path

import pytest
import torch
from torch import nn

from backbones import CheckpointError
from dense import files
from dense.detection import PyramidBackbone, checkpoint
from dense.detection.checkpoint import WholeCheckpointer


class Trainer:
    """What the checkpointer needs of one."""

    def __init__(self):
        self.iter = 0

    def state_dict(self):
        return {"iteration": self.iter}

    def load_state_dict(self, state):
        self.iter = state["iteration"]


def detector(classes: int = 3) -> nn.Module:
    model = nn.Module()
    model.backbone = PyramidBackbone("dw_conv_nano")
    model.head = nn.Linear(8, classes)
    return model


def saved(folder, *iterations, classes=None) -> WholeCheckpointer:
    trainer = Trainer()
    checkpointer = WholeCheckpointer(detector(), str(folder), classes=classes, trainer=trainer)
    for iteration in iterations:
        trainer.iter = iteration
        checkpointer.save(f"model_{iteration:07d}", iteration=iteration)
    return checkpointer


def test_newest_is_resumed_with_everything(tmp_path):
    first = saved(tmp_path, 1, 2, classes=["a", "b"])
    trainer = Trainer()
    second = WholeCheckpointer(detector(), str(tmp_path), trainer=trainer)
    path = second.last_whole()
    assert path == str(tmp_path / "model_0000002.pth")
    assert second.resume(path)["classes"] == ["a", "b"]
    assert trainer.iter == 2
    for ours, theirs in zip(
        second.model.state_dict().values(), first.model.state_dict().values(), strict=True
    ):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("keep", [0, 100, 0.5, 0.99])
def test_a_truncated_newest_is_named_and_the_one_before_taken(tmp_path, caplog, keep):
    checkpointer = saved(tmp_path, 1, 2)
    newest = tmp_path / "model_0000002.pth"
    content = newest.read_bytes()
    newest.write_bytes(content[: int(keep * len(content)) if keep < 1 else keep])
    assert checkpointer.last_whole() == str(tmp_path / "model_0000001.pth")
    assert str(newest) in caplog.text


def test_the_only_checkpoint_is_half_whole(tmp_path):
    """The training does not begin anew, in silence."""
    checkpointer = saved(tmp_path, 1)
    only = tmp_path / "model_0000001.pth"
    only.write_bytes(only.read_bytes()[: only.stat().st_size // 2])
    with pytest.raises(CheckpointError, match="model_0000001.pth is damaged .* has no other"):
        checkpointer.last_whole()


def test_other_files_are_no_checkpoints_to_resume_from(tmp_path):
    checkpointer = saved(tmp_path, 1)
    torch.save({"model": {}}, tmp_path / "pretrained.pth")
    assert checkpointer.last_whole() == str(tmp_path / "model_0000001.pth")
    assert WholeCheckpointer(detector(), str(tmp_path / "empty")).last_whole() is None


def test_a_kill_while_saving_leaves_what_was_there(tmp_path, monkeypatch):
    checkpointer = saved(tmp_path, 1)
    checkpointer.save("model_final", iteration=1)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def killed(data, file):
        Path(file).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        checkpointer.save("model_final", iteration=2)
    after = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    assert after == before
    assert checkpointer.last_whole() == str(tmp_path / "model_final.pth")


class Exploit:
    def __reduce__(self):
        return Path.touch, (Path("exploited"),)


@pytest.mark.parametrize("save", [torch.save, lambda d, p: Path(p).write_bytes(pickle.dumps(d))])
def test_nothing_but_weights_is_unpickled(tmp_path, monkeypatch, save):
    monkeypatch.chdir(tmp_path)
    save({"model": Exploit()}, "bad.pth")
    with pytest.raises(CheckpointError, match="bad.pth cannot be read as weights alone") as refused:
        WholeCheckpointer(detector()).load_weights("bad.pth", complete=False)
    # PyTorch's own words propose to run the file's code.
    assert "will likely succeed" not in str(refused.value) and "\n" not in str(refused.value)
    assert not Path("exploited").exists()


def test_fine_tuning_keeps_the_backbone_and_reports_the_head(tmp_path, caplog):
    saved(tmp_path, 1)
    path = str(tmp_path / "model_0000001.pth")
    other = WholeCheckpointer(detector(classes=5))
    with caplog.at_level("INFO"):
        other.load_weights(path, complete=False)
    total = len(other.model.state_dict())
    assert f"{total - 2} of {total} tensors matched, 2 missing or of another shape" in caplog.text
    with pytest.raises(CheckpointError, match="2 tensors of this model.*head.bias"):
        other.load_weights(path, complete=True)


def test_a_file_without_the_backbone_is_refused(tmp_path):
    path = str(tmp_path / "head.pth")
    torch.save({"model": {f"head.{k}": v for k, v in nn.Linear(8, 3).state_dict().items()}}, path)
    with pytest.raises(CheckpointError, match="does not fit.*bottom_up.init"):
        WholeCheckpointer(detector()).load_weights(path, complete=False)


def test_what_a_checkpoint_holds(tmp_path, monkeypatch, caplog):
    trainer, sizes, write = Trainer(), [], files.write
    monkeypatch.setattr(
        files, "write", lambda *a, **k: sizes.append(k.get("size")) or write(*a, **k)
    )
    checkpointer = WholeCheckpointer(
        detector(), str(tmp_path), classes=["a"], seed=5, trainer=trainer
    )
    trainer.iter = 3
    with caplog.at_level("INFO"):
        checkpointer.save("model_0000003", iteration=3)
    assert f"Saving checkpoint to {tmp_path}/model_0000003.pth" in caplog.text
    content = torch.load(tmp_path / "model_0000003.pth", weights_only=True)
    weights = content.pop("model")
    assert weights.keys() == checkpointer.model.state_dict().keys()
    assert content == dict(classes=["a"], seed=5, iteration=3, trainer={"iteration": 3})
    # Too little space is noticed before anything is written.
    assert sizes == [sum(value.nbytes for value in weights.values()), None]
    last = tmp_path / "last_checkpoint"
    assert last.read_text() == "model_0000003.pth"
    checkpointer.save("model_best", iteration=3)
    assert (tmp_path / "model_best.pth").is_file() and last.read_text() == "model_0000003.pth"
    sizes.clear()
    checkpointer.copy(str(tmp_path / "model_0000003.pth"), "model_final")
    assert last.read_text() == "model_final.pth"
    copied = (tmp_path / "model_final.pth").read_bytes()
    assert copied == (tmp_path / "model_0000003.pth").read_bytes() and sizes == [len(copied), None]
    before = set(tmp_path.iterdir())
    WholeCheckpointer(detector()).save("a")
    WholeCheckpointer(detector(), str(tmp_path), save_to_disk=False).save("a")
    assert set(tmp_path.iterdir()) == before and not Path("a.pth").exists()


def test_weights_that_are_not_finite_are_not_kept(tmp_path):
    checkpointer = saved(tmp_path, 1)
    with torch.no_grad():
        checkpointer.model.head.weight[0, 0] = float("nan")
        checkpointer.model.head.bias[1] = float("inf")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(FloatingPointError) as refused:
        checkpointer.save("model_0000002")
    assert str(refused.value) == (
        "head.weight and 1 other weights have NaN or infinite values: model_0000002.pth is not "
        "written; a lower optimizer.lr may help"
    )
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_the_newest_is_by_its_time_and_is_a_training(tmp_path, caplog):
    caplog.set_level("WARNING", "dense")
    checkpointer = saved(tmp_path, 1, 2, 3)
    checkpointer.save("model_best", iteration=9)
    paths = [tmp_path / f"model_000000{n}.pth" for n in (1, 2, 3)]
    whole = torch.load(paths[0], weights_only=True)
    for key in ("trainer", "iteration"):
        torch.save({k: v for k, v in whole.items() if k != key}, tmp_path / f"{key}.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    # The last but one of three that are whole.
    order = [
        paths[2],
        paths[0],
        paths[1],
        *(tmp_path / f"{n}.pth" for n in ("trainer", "iteration")),
    ]
    for number, path in enumerate([*order, tmp_path / "list.pth", tmp_path / "model_best.pth"]):
        os.utime(path, ns=(number, number))
    assert checkpointer.last_whole() == str(paths[1])
    said = f"checkpoint {tmp_path}/list.pth holds a list, not a dict; trying the one before it"
    assert [record.getMessage() for record in caplog.records] == [said]
    paths[1].write_bytes(b"cut")
    assert checkpointer.last_whole() == str(paths[0])
    for path in paths:
        path.unlink()
    with pytest.raises(CheckpointError) as refused:
        checkpointer.last_whole()
    assert str(refused.value) == (
        f"checkpoint {tmp_path}/list.pth holds a list, not a dict, and {tmp_path} has no other to "
        "resume: without it the training starts from the beginning"
    )
    (tmp_path / "list.pth").unlink()
    assert checkpointer.last_whole() is None


def test_the_main_process_chooses_what_is_resumed(tmp_path, monkeypatch):
    checkpointer = saved(tmp_path, 1)
    monkeypatch.setattr(checkpoint.comm, "is_main_process", lambda: False)
    monkeypatch.setattr(checkpoint.comm, "all_gather", lambda own: [("chosen.pth", []), own])
    assert checkpointer.last_whole() == "chosen.pth"
    monkeypatch.setattr(checkpoint.comm, "all_gather", lambda own: [(None, ["a is damaged"]), own])
    with pytest.raises(CheckpointError, match="^a is damaged, and"):
        checkpointer.last_whole()


def test_classes_are_those_of_a_file(tmp_path):
    saved(tmp_path, 1, classes=["a", "b"])
    read = WholeCheckpointer.read_classes
    assert read(str(tmp_path / "model_0000001.pth")) == ["a", "b"]
    assert read(str(tmp_path / "absent.pth")) is read("https://host/a.pth") is None
    torch.save({"model": {}}, tmp_path / "other.pth")
    assert read(str(tmp_path / "other.pth")) is None


def test_weights_alone_are_a_checkpoint_too(tmp_path, caplog):
    model, path = detector(), str(tmp_path / "weights.pth")
    state = model.state_dict()
    torch.save({**state, "extra": torch.zeros(1)}, path)
    other = WholeCheckpointer(detector())
    with caplog.at_level("INFO", logger="dense"):
        extra = other.load_weights(path, complete=True)
    total = len(state)
    said = (
        f"{path}: {total} of {total} tensors matched, 0 missing or of another shape, 1 unexpected"
    )
    assert said in [record.getMessage() for record in caplog.records] and "model" not in extra
    assert all(value.equal(state[name]) for name, value in other.model.state_dict().items())
    # Batch norms of long ago have no count.
    kept = {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}
    assert len(kept) < len(state)
    torch.save({"model": kept, "classes": ["a"]}, path)
    assert other.load_weights(path, complete=True)["classes"] == ["a"]
    del kept["backbone.norms.3.weight"]
    torch.save({"model": kept}, path)
    for complete in (True, False):
        with pytest.raises(CheckpointError) as refused:
            other.load_weights(path, complete=complete)
        assert str(refused.value) == (
            f"{path} does not fit: 1 tensors of this model are missing or have another shape, such "
            "as backbone.norms.3.weight (weights of a backbone alone belong in "
            "model.backbone.bottom_up.init)"
        )
    state["head.bias"][0] = float("nan")
    torch.save({"model": state}, path)
    with pytest.raises(CheckpointError, match="head.bias has NaN or infinite values"):
        other.load_weights(path, complete=False)
    # Without one of our backbones everything is needed.
    torch.save({"model": {"weight": torch.zeros(3, 8)}}, path)
    with pytest.raises(CheckpointError, match="1 tensors of this model .* such as bias"):
        WholeCheckpointer(nn.Linear(8, 3)).load_weights(path, complete=False)


def test_a_file_of_a_gpu_is_read_on_any_machine(tmp_path, monkeypatch):
    saved(tmp_path, 1)
    asked, load = [], torch.load
    monkeypatch.setattr(torch, "load", lambda *a, **k: asked.append(k) or load(*a, **k))
    path = str(tmp_path / "model_0000001.pth")
    WholeCheckpointer(detector()).load_weights(path, complete=True)
    WholeCheckpointer.read_classes(path)
    assert [(k["map_location"], k["weights_only"]) for k in asked] == [("cpu", True)] * 2


@pytest.mark.parametrize("text, reason", [("  cut\nmore", "cut"), ("", "RuntimeError")])
def test_why_a_file_cannot_be_read_is_a_line(tmp_path, monkeypatch, text, reason):
    def load(*_, **__):
        raise RuntimeError(text)

    (tmp_path / "a.pth").touch()
    monkeypatch.setattr(torch, "load", load)
    with pytest.raises(CheckpointError) as refused:
        WholeCheckpointer.read_classes(str(tmp_path / "a.pth"))
    assert str(refused.value) == (
        f"checkpoint {tmp_path}/a.pth is damaged or holds more than weights ({reason})"
    )


def test_weights_may_be_at_an_address(monkeypatch):
    asked = []
    checkpointer = WholeCheckpointer(detector())
    monkeypatch.setattr(checkpointer, "load", lambda *a, **k: asked.append((a, k)) or {"x": 1})
    monkeypatch.setattr(checkpointer, "_report", lambda path, prefixes: asked.append(prefixes))
    for complete, prefixes in ((True, ("",)), (False, ("backbone.",))):
        assert checkpointer.load_weights("https://host/a.pth", complete=complete) == {"x": 1}
        assert asked.pop() == prefixes
        assert asked.pop() == (("https://host/a.pth",), dict(checkpointables=[]))


def test_an_optimizer_that_does_not_fit_is_told_by_the_model(tmp_path):
    class Other(Trainer):
        def load_state_dict(self, state):
            raise ValueError("of another size")

    saved(tmp_path, 1)
    path = str(tmp_path / "model_0000001.pth")
    with pytest.raises(CheckpointError, match="2 tensors of this model .* such as head.bias"):
        WholeCheckpointer(detector(classes=5), trainer=Other()).resume(path)
    with pytest.raises(ValueError, match="of another size"):
        WholeCheckpointer(detector(), trainer=Other()).resume(path)
    with pytest.raises(CheckpointError, match="does not fit"):
        WholeCheckpointer(detector(classes=5), trainer=Trainer()).resume(path)


def test_missing_file():
    with pytest.raises(CheckpointError, match="nowhere.pth does not exist"):
        WholeCheckpointer(detector()).load_weights("nowhere.pth", complete=True)
