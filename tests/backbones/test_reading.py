"""What a file is taken for, what is read from it, and the whole line where it is refused."""

import hashlib
import logging
import pickle
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from backbones import CheckpointError, reading
from backbones.conversion import convert_checkpoint
from backbones.released import RELEASED, source_of

WEIGHTS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor([7])}
UNSAFE = (
    " cannot be read as weights alone: it holds {}. Unpickling it can run code in the file: if you "
    "trust its origin, pass weights_only=False to backbones.load_checkpoint, or write its weights "
    "to a safe file with tools/convert_checkpoint.py --trust"
)
SHOULD_BE = (
    ": it should be a mapping of names to tensors, bare or under one of state_dict_ema, model_ema, "
    "state_dict, model, module"
)


class Evil:
    """Unpickled by whoever trusts the file, it makes a folder."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.mkdir, (self.path,)


def said(call, *args, **kwargs) -> str:
    with pytest.raises(CheckpointError) as error:
        call(*args, **kwargs)
    return str(error.value)


def saved(path: Path, content: object, legacy: bool = False) -> Path:
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    return path


@pytest.mark.parametrize(
    "begins, kind",
    [
        (struct.pack("<Q", 99_999_999) + b"{", "safetensors"),
        (struct.pack("<Q", 100_000_000) + b"{", None),
        # The lengths of headers that begin as an archive and as a pickle do.
        (b"PK\0\0\0\0\0\0{", "safetensors"),
        (b"\x80\0\0\0\0\0\0\0{", "safetensors"),
        (b"PK\0\0\0\0\0\0 ", "archive"),
        (b"PK", "archive"),
        (b"\x80\x04", "pickle"),
        (b"\x81\x80\x04", None),
        (b"", None),
    ],
)
def test_the_first_bytes_tell_the_format(begins, kind, tmp_path):
    (tmp_path / "file").write_bytes(begins)
    assert reading._kind(tmp_path / "file") == kind


def test_what_cannot_be_read_is_one_whole_line(tmp_path):
    def line(name: str, content: bytes, **kwargs) -> str:
        (tmp_path / name).write_bytes(content)
        return said(reading.read_checkpoint, tmp_path / name, **kwargs).removeprefix(
            f"{tmp_path / name}"
        )

    refused = " cannot be read: "
    begins = f"{refused}it is no checkpoint: it begins with"
    assert line("page.pth", b"<html>0123456789abcdef") == f"{begins} b'<html>0123456789'"
    assert line("empty.pth", b"") == f"{begins} b''"
    # An error without a text, and one of several lines.
    assert line("pickle.pth", b"\x80\x02") == f"{refused}EOFError"
    broken = line("archive.pth", b"PK\x03\x04 truncated")
    assert broken.startswith(f"{refused}PytorchStreamReader failed") and "\n" not in broken
    header = struct.pack("<Q", 9) + b"{"
    assert line("short.safetensors", header).startswith(f"{refused}Error while deserializing")
    objects = pickle.dumps({"model": {"a": np.arange(3)}}, protocol=2)
    assert line("objects.pkl", objects) == UNSAFE.format("a pickle of objects, as every .pkl")
    damaged = line("damaged.pkl", objects[:-20], weights_only=False)
    assert damaged.startswith(refused) and "truncated" in damaged
    absent = tmp_path / "absent.pth"
    expected = f"no checkpoint at {absent}: a file or a URL is needed"
    assert said(reading.read_checkpoint, absent) == expected


@pytest.mark.parametrize("legacy", [False, True])
def test_code_is_named_and_not_run(legacy, tmp_path):
    path = saved(tmp_path / "evil.pth", {"model": WEIGHTS, "x": Evil(tmp_path / "made")}, legacy)
    line = said(reading.read_checkpoint, path)
    assert line.startswith(f"{path} cannot be read as weights alone: it holds pathlib.")
    assert line == said(reading.read_with_classes, path) == said(reading.read_content, path)
    assert line == said(convert_checkpoint, path, tmp_path / "safe.pth", "ours")
    held = line.split("it holds ")[1].split(". Unpickling")[0]
    assert line == f"{path}{UNSAFE.format(held)}"
    assert not (tmp_path / "made").exists()
    weights = reading.read_checkpoint(path, weights_only=False)
    assert weights.keys() == WEIGHTS.keys() and (tmp_path / "made").exists()


@pytest.mark.parametrize(
    "text, line",
    [
        # As torch.load says it.
        ("Weights only load failed. GLOBAL a.B was not allowed", UNSAFE.format("a.B")),
        (
            "failed. Unpickler error: Unsupported operand 149\nmore",
            UNSAFE.format("Unsupported operand 149"),
        ),
        ("\n a pickle of objects\nmore", UNSAFE.format("a pickle of objects")),
        ("\n pickle data was truncated\nmore", " cannot be read: pickle data was truncated"),
        ("invalid load key, 'x'.\nmore", " cannot be read: invalid load key, 'x'."),
    ],
)
def test_why_a_pickle_is_refused(text, line):
    assert reading.why_unsafe(pickle.UnpicklingError(text), "a.pth") == f"a.pth{line}"

    def fail(error: Exception) -> None:
        with reading._refusing("a.pth"):
            raise error

    assert said(fail, pickle.UnpicklingError(text)) == f"a.pth{line}"
    for error in (OSError, EOFError, RuntimeError, ValueError):
        assert said(fail, error(f"\n {text}")) == (
            f"a.pth cannot be read: {text.strip().splitlines()[0]}"
        )
    with pytest.raises(TypeError):
        fail(TypeError(text))


def test_weights_of_a_gpu_are_read_onto_the_cpu(tmp_path):
    """The file of one with the name of its device changed."""
    saved(tmp_path / "cpu.pth", WEIGHTS)
    with (
        zipfile.ZipFile(tmp_path / "cpu.pth") as given,
        zipfile.ZipFile(tmp_path / "cuda.pth", "w") as written,
    ):
        for name in given.namelist():
            content, before = given.read(name), b"X\x03\0\0\0cpu"
            if name.endswith("data.pkl"):
                assert before in content
                content = content.replace(before, b"X\x06\0\0\0cuda:0")
            written.writestr(name, content)
    found = reading.read_checkpoint(tmp_path / "cuda.pth")
    assert all(v.device.type == "cpu" and v.equal(WEIGHTS[k]) for k, v in found.items())


def test_pickles_of_python_2_are_read(tmp_path):
    """Their text is bytes, which are Latin-1 in Detectron2's files."""
    (tmp_path / "old.pkl").write_bytes(b"\x80\x02}U\x04noteU\x01\xe9s.")
    assert reading.read_content(tmp_path / "old.pkl", weights_only=False) == {"note": "é"}


def test_arrays_become_tensors(tmp_path):
    content = {"model": {"a": np.arange(3.0), "b": WEIGHTS["b"]}, "__author__": "somebody"}
    (tmp_path / "model.pkl").write_bytes(pickle.dumps(content))
    weights = reading.read_checkpoint(tmp_path / "model.pkl", weights_only=False)
    assert weights["a"].equal(torch.arange(3.0).double()) and weights["b"].equal(WEIGHTS["b"])


def test_safetensors_come_with_their_header(tmp_path):
    header = {"classes": '["cat", "dog"]', "metrics": '{"top1": 41.5}', "format": "pt"}
    path = tmp_path / "a.safetensors"
    safetensors.torch.save_file(WEIGHTS, path, header)
    content = reading.read_content(str(path))
    parsed = {"classes": ["cat", "dog"], "metrics": {"top1": 41.5}, "format": "pt"}
    assert content["meta"] == parsed and content.keys() == {"state_dict", "meta"}
    assert all(value.equal(WEIGHTS[name]) for name, value in content["state_dict"].items())
    assert reading.read_with_classes(path)[1] == ("cat", "dog")
    safetensors.torch.save_file(WEIGHTS, path)
    assert reading.read_content(path)["meta"] == {} and reading.read_with_classes(path)[1] is None


def test_a_home_folder_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    saved(tmp_path / "a.pth", WEIGHTS)
    assert reading.read_checkpoint("~/a.pth").keys() == WEIGHTS.keys()
    assert source_of("swin_nano", "~/a.pth") == "~/a.pth"


@pytest.mark.parametrize(
    "content",
    [
        WEIGHTS,
        {"model": WEIGHTS, "state_dict": 3},
        {"module": {"model": WEIGHTS}},
        {"epoch": 3, "model": {"lr": 0.1, "state_dict": WEIGHTS | {"note": "text"}}},
        {"state_dict_ema": WEIGHTS, "model_ema": {}, "state_dict": {}, "model": {}, "module": {}},
        {"model_ema": WEIGHTS, "state_dict": {}, "model": {}, "module": {}},
        {"state_dict": WEIGHTS, "model": {}, "module": {}},
        {"model": WEIGHTS, "module": {}},
    ],
)
def test_weights_are_found_below_the_usual_keys(content, tmp_path):
    found = reading.read_checkpoint(saved(tmp_path / "a.pth", content))
    assert found.keys() == WEIGHTS.keys() and all(v.equal(WEIGHTS[k]) for k, v in found.items())


@pytest.mark.parametrize(
    "content, found",
    [
        ([1, 2], "list"),
        ({}, "a mapping with nothing"),
        (dict.fromkeys("abcdefgh", 1), "a mapping with 'a', 'b', 'c', 'd', 'e', 'f'"),
        ({1: torch.zeros(2), "b": torch.zeros(2)}, "a mapping with 1, 'b'"),
        ({"model": {"model": {"model": WEIGHTS}}}, "a mapping with 'model'"),
    ],
)
def test_what_holds_no_weights_is_described(content, found, tmp_path):
    path = saved(tmp_path / "a.pth", content)
    line = f"{path} holds no state dict but {found}{SHOULD_BE}"
    assert said(reading.read_checkpoint, path) == line


@pytest.mark.parametrize(
    "bad, counted",
    [
        (["b"], ""),
        (["b", "d"], ", and so have 1 other entries"),
        (["a", "b", "d"], ", and so have 2 other entries"),
    ],
)
def test_weights_that_are_not_finite_are_counted(bad, counted, tmp_path):
    weights = {name: torch.zeros(3) for name in "abcd"} | {"steps": torch.tensor([2**40])}
    for number, name in enumerate(bad):
        weights[name][1] = (float("nan"), float("inf"), -float("inf"))[number]
    expected = (
        f"x.pth is not used: {bad[0]} has NaN or infinite values{counted}; a checkpoint from "
        "before the training diverged is needed"
    )
    for content in (weights, {"model": weights}, {"state_dict": {"model": weights}}):
        assert said(reading.refuse_not_finite, content, "x.pth") == expected
    assert reading.not_finite(weights | {"text": "nan"}) == bad
    path = saved(tmp_path / "a.pth", {"model": weights})
    assert said(reading.read_checkpoint, path) == expected.replace("x.pth", str(path))
    for passes in ([1], "text", {"a": torch.ones(2), "n": torch.ones(2, dtype=torch.int8)}):
        reading.refuse_not_finite(passes, "x.pth")


@pytest.mark.parametrize(
    "content, names",
    [
        ({"meta": {"classes": ["a", 1]}, "classes": ["b"]}, ("a", "1")),
        ({"meta": {"dataset_meta": {"classes": ("c",)}, "CLASSES": ("d",)}}, ("c",)),
        ({"meta": {"classes": [], "dataset_meta": {"classes": ["e"]}}}, ("e",)),
        ({"meta": {"CLASSES": ("d", "e")}, "classes": "text"}, ("d", "e")),
        ({"meta": 3, "classes": ["f"]}, ("f",)),
        ({"meta": {"dataset_meta": 3, "classes": {"a": 1}}}, None),
        ({}, None),
        ([1], None),
    ],
)
def test_class_names(content, names):
    assert reading.class_names(content) == names


@pytest.mark.parametrize("source", ["http://a/b.pth", "HTTPS://a/b.pth", Path("http/b"), "a://b"])
def test_addresses(source):
    assert reading.is_url(source) == ("://a" in str(source))


# Downloads, with what torch.hub gets written here instead


@pytest.fixture
def downloads(tmp_path, monkeypatch):
    """A function: what each attempt writes, or the error that it ends with."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    attempts = []

    def download(url, path, hash_prefix):
        attempts.append(hash_prefix)
        given = contents[min(len(attempts), len(contents)) - 1]
        if isinstance(given, Exception):
            raise given
        Path(path).write_bytes(given)

    contents = []
    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    return contents, attempts


def bytes_of(content: object, tmp_path: Path, **kwargs) -> bytes:
    return saved(tmp_path / "made.pth", content, **kwargs).read_bytes()


def test_three_attempts_are_made_and_told(downloads, tmp_path, caplog):
    contents, attempts = downloads
    contents += [OSError("no route"), b"<html>0123456789abcdef", RuntimeError("invalid hash")]
    url = "https://a.b/c/net.pth?download=1"
    with caplog.at_level(logging.WARNING), pytest.raises(CheckpointError) as error:
        reading.fetch(url)
    digest = hashlib.sha256(url.encode()).hexdigest()[:8]
    cached = tmp_path / "cache/hub/checkpoints" / f"{digest}_net.pth"
    assert str(error.value) == (
        f"{url} cannot be downloaded: invalid hash; save a copy as {cached}, or pass a file's path "
        "instead of the URL"
    )
    page = "the download (22 bytes, beginning with b'<html>0123456789') is no complete checkpoint"
    assert [record.message for record in caplog.records] == [
        f"{url}: {reason} (attempt {number} of 3)"
        for number, reason in enumerate(("no route", page, "invalid hash"), 1)
    ]
    assert attempts == [None] * 3 and not cached.exists()


@pytest.mark.parametrize("legacy", [False, True])
def test_a_part_of_a_file_is_fetched_again_and_kept(legacy, downloads, tmp_path):
    contents, attempts = downloads
    whole = bytes_of(WEIGHTS, tmp_path, legacy=legacy)
    contents += [whole[: len(whole) // 2], whole]
    path = reading.fetch("https://a.b/net-0123abcd.pth")
    # The beginning of the file's hash is in its name.
    assert attempts == ["0123abcd"] * 2 and path.read_bytes() == whole
    assert reading.fetch("https://a.b/net-0123abcd.pth") == path and len(attempts) == 2


def test_a_download_is_checked_without_running_it(downloads, tmp_path):
    contents, attempts = downloads
    evil = {"model": WEIGHTS, "x": Evil(tmp_path / "made")}
    contents.append(bytes_of(evil, tmp_path, legacy=True))
    assert reading.fetch("https://a.b/net.pth").exists() and len(attempts) == 1
    assert "weights_only=False" in said(reading.read_checkpoint, "https://a.b/net.pth")
    assert not (tmp_path / "made").exists()


# Where a backbone's init comes from


def test_an_init_is_a_file_an_address_or_a_tag(tmp_path):
    saved(tmp_path / "a.pth", WEIGHTS)
    for given in (tmp_path / "a.pth", str(tmp_path / "a.pth"), "https://a.b/c.pth"):
        assert source_of("swin_nano", given) == str(given)
    for tag, released in RELEASED["swin_tiny"].items():
        assert source_of("swin_tiny", tag) == released.url
    for name, tags in (("swin_tiny", "ms_in1k, ms_in22k"), ("dw_conv_nano", "none")):
        for given in ("ms_in3k", str(tmp_path), "atten4vis"):
            expected = f"init={given!r} is no file, URL or tag of released weights; tags of {name}"
            assert said(source_of, name, given) == f"{expected}: {tags}"
