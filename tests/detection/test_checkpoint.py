"""Checkpoints: whole or not at all, weights only, and never half a network in silence."""

import pickle
from pathlib import Path

import pytest
import torch
from torch import nn

from backbones import CheckpointError
from dense.detection import PyramidBackbone
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


def test_missing_file():
    with pytest.raises(CheckpointError, match="nowhere.pth does not exist"):
        WholeCheckpointer(detector()).load_weights("nowhere.pth", complete=True)
