"""Released weights: the tags, the download with a connection that breaks, the names without."""

import http.server
import threading
from collections import Counter
from pathlib import Path

import pytest
import timm
import torch
import yacs.config
from timm.data import ImageNetInfo
from timm.models.swin_transformer import default_cfgs
from torch import nn

import backbones
from backbones.layouts import LAYOUTS, from_ours
from backbones.reading import fetch
from backbones.released import RELEASED


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """timm's cache, empty."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache/hub/checkpoints"


@pytest.fixture
def server(tmp_path):
    """A server of a folder on the loopback address, that breaks off the first reply for a file if
    its name is in ``breaks``, after half of it."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        breaks: set[str] = set()
        asked: Counter = Counter()

        def __init__(self, *args):
            super().__init__(*args, directory=str(tmp_path / "served"))

        def copyfile(self, source, outputfile):
            name = Path(self.path).name
            self.asked[name] += 1
            content = source.read()
            if name in self.breaks and self.asked[name] == 1:
                content = content[: len(content) // 2]
            outputfile.write(content)

        def log_message(self, *args):
            pass

    (tmp_path / "served").mkdir()
    Handler.breaks, Handler.asked = set(), Counter()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    server.folder, server.handler = tmp_path / "served", Handler
    server.url = f"http://127.0.0.1:{server.server_port}"
    yield server
    server.shutdown()
    thread.join()


def released_file(path: Path, name: str, **kwargs) -> nn.Module:
    """A network, and its weights in a file as the authors wrote them: original names, the schedule
    and a pickled yacs config beside."""
    torch.manual_seed(1)
    model = timm.create_model(name, **kwargs).eval()
    weights = from_ours(model.state_dict(), LAYOUTS["original"])
    config = yacs.config.CfgNode({"MODEL": {"NAME": name, "DEPTHS": [2, 2]}})
    torch.save({"model": weights, "epoch": 299, "config": config, "max_accuracy": 81.2}, path)
    return model


@pytest.mark.parametrize("breaks", [False, True])
@pytest.mark.parametrize("legacy", [False, True])
def test_pretrained_downloads_also_when_the_connection_breaks(
    server, cache, monkeypatch, breaks, legacy
):
    source = released_file(server.folder / "net.pth", "d_dw_conv_nano", num_classes=3)
    if legacy:  # as torch wrote files before 1.6
        content = torch.load(server.folder / "net.pth", weights_only=False)
        torch.save(content, server.folder / "net.pth", _use_new_zipfile_serialization=False)
    if breaks:
        server.handler.breaks.add("net.pth")
    overlay = dict(url=f"{server.url}/net.pth", num_classes=3)
    loaded = timm.create_model(
        "d_dw_conv_nano", pretrained=True, pretrained_cfg_overlay=overlay, num_classes=3
    ).eval()
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert loaded(x).equal(source(x))
    assert server.handler.asked["net.pth"] == (2 if breaks else 1)
    assert [p.name.split("_", 1)[1] for p in cache.iterdir()] == ["net.pth"]
    fetch(f"{server.url}/net.pth")
    assert server.handler.asked["net.pth"] == (2 if breaks else 1)


def test_two_addresses_with_one_file_name_are_two_files(server, cache):
    for folder in ("a", "b"):
        (server.folder / folder).mkdir()
        released_file(server.folder / folder / "best.pth", "dw_conv_nano", num_classes=ord(folder))
    for folder in ("a", "b"):
        weights = backbones.read_checkpoint(f"{server.url}/{folder}/best.pth")
        assert len(weights["head.bias"]) == ord(folder)


def test_a_page_instead_of_a_file_is_not_kept(server, cache):
    (server.folder / "net.pth").write_text("<html>come back later</html>")
    with pytest.raises(backbones.CheckpointError) as error:
        backbones.read_checkpoint(f"{server.url}/net.pth")
    assert "beginning with b'<html>come" in str(error.value)
    assert "weights_only" not in str(error.value) and "\n" not in str(error.value)
    assert not list(cache.iterdir())
    released_file(server.folder / "net.pth", "dw_conv_nano", num_classes=3)
    assert backbones.read_checkpoint(f"{server.url}/net.pth")


def test_a_file_that_never_comes_is_one_clear_error(server, cache):
    with pytest.raises(backbones.CheckpointError, match="absent.pth cannot be downloaded.*404"):
        backbones.read_checkpoint(f"{server.url}/absent.pth")
    assert not list(cache.glob("*"))


@pytest.mark.parametrize("name", backbones.MODEL_NAMES)
def test_every_name_has_its_released_weights_or_says_that_it_has_none(name):
    tags = [n.partition(".")[2] for n in timm.list_models(f"{name}.*", pretrained=True)]
    assert sorted(tags) == sorted(RELEASED.get(name, {}))
    if tags:
        cfg = timm.get_pretrained_cfg(name)
        released = RELEASED[name][cfg.tag]
        assert cfg.url == released.url and str(released.top1) in cfg.description
    else:
        with pytest.raises(backbones.CheckpointError, match=f"no weights of {name} were released"):
            timm.create_model(name, pretrained=True)


def test_the_readme_lists_them():
    page = Path(backbones.__file__).with_name("README.md").read_text()
    for name, tags in RELEASED.items():
        for tag, released in tags.items():
            data = released.description.split(", top-1")[0]
            assert f"| `{name}` | `{tag}` | {data} | {released.top1 or ''} |" in page


@pytest.mark.parametrize("name", [name for name in RELEASED if name.startswith("swin_")])
def test_addresses_of_swin_are_timms(name):
    """Those that timm names in its own configs, under its tags."""
    for tag, released in RELEASED[name].items():
        theirs = f"{name}_patch4_window{released.window_size}_{released.img_size}"
        cfg = default_cfgs[theirs].cfgs[tag.removesuffix("_384")]
        assert released.url == cfg.url
        assert released.num_classes == cfg.num_classes


@pytest.mark.slow
@pytest.mark.parametrize("tag", ["ms_in1k", "ms_in22k"])
def test_swin_small_takes_its_released_file(tmp_path, tag):
    classes = RELEASED["swin_small"][tag].num_classes
    source = released_file(tmp_path / "net.pth", "swin_small", num_classes=classes)
    model = timm.create_model("swin_small", num_classes=classes)
    report = backbones.load_checkpoint(model, tmp_path / "net.pth")
    assert not (report.missing or report.unexpected)
    for ours, theirs in zip(model.parameters(), source.parameters(), strict=True):
        assert ours.equal(theirs)
    tiny = timm.create_model("swin_tiny", num_classes=classes)
    with pytest.raises(backbones.CheckpointError, match="looks like swin_small .C=96"):
        backbones.load_checkpoint(tiny, tmp_path / "net.pth")


def test_a_tag_of_384_builds_its_window():
    model = timm.create_model("swin_base.ms_in22k_384", num_classes=0)
    assert model.stages[0].blocks[0].mixer.window_size == (12, 12)
    assert model.pretrained_cfg["input_size"] == (3, 384, 384)
    model = timm.create_model("swin_base.ms_in22k_384", num_classes=0, window_size=7)
    assert model.stages[0].blocks[0].mixer.window_size == (7, 7)


def test_a_22k_classifier_gives_1k_its_rows(tmp_path):
    many = released_file(tmp_path / "22k.pth", "swin_nano", num_classes=21841)
    few = timm.create_model("swin_nano", num_classes=1000)
    before = few.head.fc.weight.clone()
    report = backbones.load_checkpoint(few, tmp_path / "22k.pth")
    # The first and last entries of the map that Swin's own fine-tuning uses.
    rows = {"n01440764": 359, "n01443537": 368, "n01484850": 460, "n01491361": 475}
    for wnid, row in rows.items():
        mine = ImageNetInfo("imagenet-1k").label_names().index(wnid)
        assert few.head.fc.weight[mine].equal(many.head.fc.weight[row])
        assert few.head.fc.bias[mine].equal(many.head.fc.bias[row])
    absent = ImageNetInfo("imagenet-1k").label_names().index("n04399382")
    assert few.head.fc.weight[absent].equal(before[absent])
    assert "999 of 1000 classes" in str(report) and "n04399382" in str(report)
    assert not report.missing


def test_classes_are_matched_by_the_names_in_the_file(tmp_path):
    source = timm.create_model("swin_nano", num_classes=3)
    content = {"state_dict": source.state_dict(), "meta": {"classes": ["cat", "dog", "cow"]}}
    torch.save(content, tmp_path / "pets.pth")
    target = timm.create_model("swin_nano", num_classes=2)
    report = backbones.load_checkpoint(target, tmp_path / "pets.pth", classes=["cow", "cat"])
    assert target.head.fc.weight.equal(source.head.fc.weight[[2, 0]])
    assert "2 of 2 classes" in report.classifier

    target = timm.create_model("swin_nano", num_classes=3)
    report = backbones.load_checkpoint(target, tmp_path / "pets.pth", classes=["a", "b", "cow"])
    assert report.missing == ("head.fc.weight", "head.fc.bias")
    assert "left out: 1 of its 3" in str(report)
    with pytest.raises(backbones.CheckpointError, match="2 class names for the 3 outputs"):
        backbones.load_checkpoint(target, tmp_path / "pets.pth", classes=["cow", "cat"])
