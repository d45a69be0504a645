"""What is published is what was trained, says what it is, and loads."""

import hashlib
import json
import re
import shutil

import pytest
import safetensors
import timm
import torch

import backbones
from dense.recipes import RECIPES
from tests.support import load_tool, run_without

pytest.importorskip("mmengine")
tool = load_tool("publish_checkpoint")
CLASSES = ["n01443537", "n01629819", "n02124075"]


@pytest.fixture
def trained(tmp_path):
    """The work folder of a pretraining with averaged weights, as MMEngine leaves it."""
    from mmengine.config import Config

    torch.manual_seed(0)
    average = timm.create_model("d_dw_conv_nano", num_classes=3, img_size=64).state_dict()
    other = timm.create_model("d_dw_conv_nano", num_classes=3, img_size=64).state_dict()
    work = tmp_path / "work"
    work.mkdir()
    content = {
        "state_dict": {f"network.{k}": v for k, v in average.items()},
        "ema_state_dict": {f"module.network.{k}": v for k, v in other.items()}
        | {"steps": torch.tensor(7)},
        "optimizer": {"state": {0: {"exp_avg": torch.zeros(1000)}}},
        "meta": {"epoch": 2, "iter": 20, "dataset_meta": {"classes": CLASSES}},
    }
    torch.save(content, work / "epoch_2.pth")
    Config.fromfile(RECIPES / "pretraining/d_dw_conv_nano.py").dump(work / "d_dw_conv_nano.py")
    log = work / "20260101_000000/vis_data"
    log.mkdir(parents=True)
    (log / "scalars.json").write_text(
        '{"loss": 2.0, "lr": 0.1, "epoch": 1, "iter": 10, "step": 10}\n{"top1": 30.0, "step": 1}\n'
        '{"loss": 1.0, "lr": 0.05, "epoch": 2, "iter": 20, "step": 20}\n'
        '{"top1": 41.5, "top5": 100.0, "step": 2}\n'
    )
    return work, average, other


@pytest.mark.parametrize("weights", ["averaged", "model"])
def test_a_classifier(trained, weights, tmp_path, capsys):
    work, average, other = trained
    args = [str(work / "epoch_2.pth"), "--out", str(tmp_path / "out"), "--weights", weights]
    assert tool.main(args) == 0
    files = sorted((tmp_path / "out").iterdir())
    assert [file.suffix for file in files] in ([".pth", ".safetensors"], [".safetensors", ".pth"])
    expected = average if weights == "averaged" else other
    for file in files:
        digest = re.fullmatch(r"d_dw_conv_nano-([0-9a-f]{8})\..*", file.name)[1]
        assert hashlib.sha256(file.read_bytes()).hexdigest().startswith(digest)
        network = timm.create_model("d_dw_conv_nano", num_classes=3)
        report = backbones.load_checkpoint(network, file)
        assert not (report.missing or report.unexpected)
        assert all(v.equal(expected[k]) for k, v in network.state_dict().items())
    meta = torch.load(next(f for f in files if f.suffix == ".pth"), weights_only=True)["meta"]
    assert meta["model"] == "d_dw_conv_nano" and meta["classes"] == CLASSES
    assert meta["image_size"] == 64 and meta["recipe"] == "d_dw_conv_nano"
    assert meta["metrics"] == {"top1": 41.5, "top5": 100.0} and meta["weights"] == weights
    with safetensors.safe_open(next(f for f in files if f.suffix == ".safetensors"), "pt") as file:
        assert '"n01443537"' in file.metadata()["classes"]
    # Another set of classes finds its rows by name.
    few = timm.create_model("d_dw_conv_nano", num_classes=2)
    backbones.load_checkpoint(few, files[0], classes=[CLASSES[2], CLASSES[0]])
    assert few.head.fc.weight.equal(expected["head.fc.weight"][[2, 0]])


def test_all_that_the_tool_says(trained, tmp_path, capsys):
    work, *_ = trained
    out, readme = tmp_path / "out", tmp_path / "README.md"
    words = [str(work / "epoch_2.pth"), "--out", str(out)]
    words += ["--config", str(work / "d_dw_conv_nano.py")]
    # Another config beside it is not asked.
    (work / "other.py").write_text("broken (")
    assert tool.main(words) == 0
    said = capsys.readouterr().out
    files = [next(out.glob(f"*{suffix}")) for suffix in (".pth", ".safetensors")]
    meta = torch.load(files[0], weights_only=True)["meta"]
    row = "| `d_dw_conv_nano` | `d_dw_conv_nano` | 64x64 | 3 | 41.5 | 100.0 |"
    expected = f"{tool.publish.as_json(meta)}\n{files[0]}\n{files[1]}\n{row}"
    # MMEngine's logger, if another test has started it, says more before.
    assert expected in said and said.splitlines()[-1].startswith(row)
    readme.write_text("# Title\n")
    assert tool.main([*words, "--readme", str(readme)]) == 0
    *_, line, last = capsys.readouterr().out.splitlines()
    assert (line[: len(row)], last) == (row, f"{readme}: the table has the model's row")
    assert row in readme.read_text()


def test_all_that_is_known_of_a_model(trained, tmp_path, capsys):
    work, *_ = trained
    done = tool.publish.publish(work / "epoch_2.pth", tmp_path / "out")
    assert done.meta == {
        "model": "d_dw_conv_nano",
        "classes": CLASSES,
        "image_size": 64,
        "crop_pct": 1.0,
        "mean": [0.485, 0.456, 0.406],
        "std": [0.229, 0.224, 0.225],
        "recipe": "d_dw_conv_nano",
        "weights": "averaged",
        "metrics": {"top1": 41.5, "top5": 100.0},
        "options": {"img_size": 64},
        "versions": {"torch": str(torch.__version__), "timm": timm.__version__},
    }
    first, second = done.files
    assert (first.suffix, second.suffix) == (".pth", ".safetensors")
    assert done.line == (
        f"| `d_dw_conv_nano` | `d_dw_conv_nano` | 64x64 | 3 | 41.5 | 100.0 | `{first.name}` |"
    )
    assert sorted((tmp_path / "out").iterdir()) == sorted(done.files)
    content = torch.load(first, weights_only=True)
    assert content["meta"] == done.meta
    shown = json.loads(tool.publish.as_json(done.meta))
    assert shown == done.meta | {"classes": 3}
    assert tool.publish.as_json({"classes": None}) == '{\n "classes": 0\n}'
    with pytest.raises(ValueError, match="weights 'best': averaged and model are valid"):
        tool.publish.publish(work / "epoch_2.pth", tmp_path / "out", weights="best")
    # Without an average the weights are the model's, whatever is asked for.
    content = torch.load(work / "epoch_2.pth", weights_only=True)
    del content["ema_state_dict"]
    torch.save(content, work / "epoch_2.pth")
    done = tool.publish.publish(work / "epoch_2.pth", tmp_path / "out")
    assert done.meta["weights"] == "model"
    # A config of another name, and figures that no log has.
    shutil.rmtree(work / "20260101_000000")
    (tmp_path / "named.py").write_text((work / "d_dw_conv_nano.py").read_text())
    options = dict(config=tmp_path / "named.py", weights="model")
    done = tool.publish.publish(work / "epoch_2.pth", tmp_path / "out", **options)
    assert (done.meta["recipe"], done.meta["metrics"]) == ("named", {})
    assert done.line.endswith(f"| `named` | 64x64 | 3 |  |  | `{done.files[0].name}` |")


@pytest.mark.parametrize("weights, key", [("averaged", "state_dict"), ("model", "ema_state_dict")])
def test_weights_that_are_not_finite_are_not_published(trained, tmp_path, weights, key):
    work, *_ = trained
    content = torch.load(work / "epoch_2.pth", weights_only=True)
    next(iter(content[key].values())).fill_(float("nan"))
    torch.save(content, work / "epoch_2.pth")
    for chosen in ("averaged", "model"):
        options = dict(weights=chosen)
        if chosen == weights:
            with pytest.raises(backbones.CheckpointError, match="has NaN or infinite values"):
                tool.publish.publish(work / "epoch_2.pth", tmp_path / "out", **options)
        else:
            tool.publish.publish(work / "epoch_2.pth", tmp_path / "out", **options)


def test_the_table_is_sorted_and_replaced_by_recipe(tmp_path):
    def published(recipe, file):
        line = f"| `m` | `{recipe}` | `{file}` |"
        return tool.publish.Published((), {"recipe": recipe}, line)

    readme = tmp_path / "README.md"
    for recipe, file in (("b", "1"), ("a", "2"), ("ab", "3"), ("b", "4")):
        tool.publish.write_line(published(recipe, file), readme)
    begin = "<!-- Published models, by tools/publish_checkpoint.py. -->"
    table = (
        f"{begin}\n\n| model | recipe | image | classes | top-1 | top-5 | file |\n"
        "| --- | --- | --- | --- | --- | --- | --- |\n"
        "| `m` | `a` | `2` |\n| `m` | `ab` | `3` |\n| `m` | `b` | `4` |\n\n<!-- End of them. -->"
    )
    assert readme.read_text() == f"## Published models\n\n{table}\n"
    readme.write_text(f"# Title\n{table}\nAfter.\n")
    tool.publish.write_line(published("c", "5"), readme)
    rows = table.replace("`4` |\n", "`4` |\n| `m` | `c` | `5` |\n")
    assert readme.read_text() == f"# Title\n{rows}\nAfter.\n"


def test_figures_are_those_of_the_checkpoints_iteration(tmp_path):
    lines = [{"total_loss": 1.0, "iteration": 9}]
    lines += [{"bbox/AP": 10.0 + n, "iteration": n} for n in (8, 10, 11)]
    lines += [{"segm/AP": float("nan"), "iteration": 10}, {"segm/AP50": 5.12345, "iteration": 9}]
    (tmp_path / "metrics.json").write_text("".join(json.dumps(line) + "\n" for line in lines))
    metrics = tool.publish._metrics
    # Detectron2 counts an evaluation at the end as one iteration later.
    expected = {"bbox/AP": 20.0, "segm/AP50": 5.123}
    assert metrics(tmp_path / "model.pth", {"iteration": 9}) == expected
    assert metrics(tmp_path / "model.pth", {"meta": {"iter": 7}}) == {"bbox/AP": 18.0}
    assert metrics(tmp_path / "model.pth", {"meta": {"iter": 13}}) == {}
    assert metrics(tmp_path / "model.pth", {"meta": 3}) == {**expected, "bbox/AP": 21.0}


def test_the_options_of_a_network_are_published_with_it(trained, tmp_path):
    from mmengine.config import Config

    work, *_ = trained
    options = dict(num_heads=(1, 2, 4, 8), se_ratio=1 / 16)
    network = timm.create_model("dw_conv_nano", num_classes=3, **options)
    state = {f"network.{k}": v for k, v in network.state_dict().items()}
    content = torch.load(work / "epoch_2.pth", weights_only=True)
    torch.save({"state_dict": state, "meta": content["meta"]}, work / "epoch_2.pth")
    cfg = Config.fromfile(work / "d_dw_conv_nano.py")
    cfg.model.update(name="dw_conv_nano", drop_path_rate=0.1, **options)
    cfg.dump(work / "d_dw_conv_nano.py")
    done = tool.publish.publish(work / "epoch_2.pth", tmp_path / "out")
    assert done.meta["options"] == dict(options, img_size=64)
    assert backbones.read_checkpoint(done.files[0]).keys() == network.state_dict().keys()


def test_figures_of_an_epoch_that_ends_between_two_logged_iterations(trained, tmp_path):
    work, *_ = trained
    (log,) = work.glob("*/vis_data/scalars.json")
    log.write_text(
        '{"loss": 2.0, "lr": 0.1, "epoch": 1, "iter": 50, "step": 50}\n{"top1": 30.0, "step": 1}\n'
        '{"loss": 1.0, "lr": 0.1, "epoch": 2, "iter": 112, "step": 112}\n'
        '{"top1": 41.5, "step": 2}\n'
    )
    content = torch.load(work / "epoch_2.pth", weights_only=True)
    for epoch, expected in ((1, 30.0), (2, 41.5)):
        content["meta"] |= {"epoch": epoch, "iter": 62 * epoch}
        torch.save(content, work / f"epoch_{epoch}.pth")
        done = tool.publish.publish(work / f"epoch_{epoch}.pth", tmp_path / "out")
        assert done.meta["metrics"] == {"top1": expected}


def test_what_does_not_fill_its_network_leaves_no_file(trained, tmp_path, capsys):
    work, *_ = trained
    content = torch.load(work / "epoch_2.pth", weights_only=True)
    del content["state_dict"]["network.stages.0.blocks.0.mixer.in_proj.weight"]
    torch.save(content, work / "epoch_2.pth")
    assert tool.main([str(work / "epoch_2.pth"), "--out", str(tmp_path / "out")]) == 2
    assert "does not fit" in capsys.readouterr().err
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.slow
def test_a_detector_without_mmengine(tmp_path):
    backbone = timm.create_model("dw_conv_nano", num_classes=0).state_dict()
    weights = {f"backbone.bottom_up.{name}": value for name, value in backbone.items()}
    content = {"model": weights, "classes": ["a", "b"], "iteration": 9}
    torch.save(content, tmp_path / "model_final.pth")
    (tmp_path / "config.yaml").write_text(
        "model:\n  backbone: {bottom_up: {name: dw_conv_nano}}\n"
        "  pixel_mean: [127.5, 127.5, 51.0]\n  pixel_std: [255.0, 51.0, 51.0]\n"
    )
    paths = str(tmp_path / "model_final.pth"), "--out", str(tmp_path / "out")
    code = (
        f"import runpy, sys; sys.argv = {['publish', *paths]}; "
        "runpy.run_path('tools/publish_checkpoint.py', run_name='__main__')"
    )
    done = run_without(("mmengine",), code)
    assert done.returncode == 0, done.stderr
    (file,) = (tmp_path / "out").glob("*.pth")
    meta = torch.load(file, weights_only=True)["meta"]
    assert meta["model"] == "dw_conv_nano" and meta["classes"] == ["a", "b"]
    assert meta["mean"] == [0.5, 0.5, 0.2] and meta["std"] == [1.0, 0.2, 0.2]


def test_all_that_is_known_of_a_detector_and_of_a_segmentor(tmp_path, monkeypatch):
    backbone = timm.create_model("dw_conv_nano", num_classes=0).state_dict()
    folder, out = tmp_path / "mine", tmp_path / "out"
    folder.mkdir()
    weights = {f"backbone.bottom_up.{name}": value for name, value in backbone.items()}
    torch.save(
        {"model": weights, "classes": ["a", "b"], "iteration": 9}, folder / "model_final.pth"
    )
    config = "model:\n  backbone: {name: dw_conv_nano}\n  pixel_mean: [123.675, 116.28, 103.53]\n"
    (folder / "config.yaml").write_text(config)
    done = tool.publish.publish(folder / "model_final.pth", out)
    known = {"model": "dw_conv_nano", "classes": ["a", "b"], "image_size": None, "recipe": "mine"}
    known |= {"mean": [0.485, 0.456, 0.406], "std": None, "weights": "model", "metrics": {}}
    versions = {"torch": str(torch.__version__), "timm": timm.__version__}
    assert done.meta == {**known, "versions": versions}
    assert done.line == f"| `dw_conv_nano` | `mine` |  | 2 |  |  | `{done.files[0].name}` |"
    content = torch.load(done.files[0], weights_only=True)
    assert content["state_dict"].keys() == weights.keys()
    # The folder's name is the recipe, from within it too.
    monkeypatch.chdir(folder)
    assert tool.publish.publish("model_final.pth", str(out)).meta == done.meta
    # A segmentor by MMEngine's config, without classes.
    other = tmp_path / "other"
    other.mkdir()
    weights = {f"backbone.{name}": value for name, value in backbone.items()}
    torch.save({"state_dict": weights, "meta": {"iter": 9}}, other / "iter_9.pth")
    config = "model = dict(backbone=dict(type='dw_conv_nano'), data_preprocessor=dict({}))"
    (other / "mine.py").write_text(config.format("mean=[127.5, 0, 255], std=[51, 51, 100]"))
    done = tool.publish.publish(other / "iter_9.pth", out)
    known |= {"classes": None, "mean": [0.5, 0, 1], "std": [0.2, 0.2, 0.392157]}
    assert done.meta == {**known, "versions": versions}
    assert done.line == f"| `dw_conv_nano` | `mine` |  |  |  |  | `{done.files[0].name}` |"
    # A config that names none of our networks: nothing is known of it, and nothing checked.
    (other / "mine.py").write_text("model = dict(backbone=dict(type='my_dw_conv_nano_2'))")
    del weights["backbone.stages.0.blocks.0.mixer.in_proj.weight"]
    torch.save({"state_dict": weights}, other / "iter_9.pth")
    meta = tool.publish.publish(other / "iter_9.pth", out).meta
    assert (meta["model"], meta["mean"], meta["std"]) == (None, None, None)


def test_a_backbone_is_no_classifier(trained, tmp_path):
    work, *_ = trained
    backbone = timm.create_model("d_dw_conv_nano", num_classes=0).state_dict()
    torch.save({"state_dict": {f"network.{k}": v for k, v in backbone.items()}}, work / "a.pth")
    config = work / "d_dw_conv_nano.py"
    message = f"{work / 'a.pth'} is of no classifier, but {config} trains one"
    with pytest.raises(backbones.CheckpointError, match=message):
        tool.publish.publish(work / "a.pth", tmp_path / "out")
    torch.save({"optimizer": {}}, work / "a.pth")
    message = f"{work / 'a.pth'} is no training checkpoint: it has no state_dict or model"
    with pytest.raises(backbones.CheckpointError, match=message):
        tool.publish.publish(work / "a.pth", tmp_path / "out")


def test_the_line_in_the_table(trained, tmp_path):
    work, *_ = trained
    readme = tmp_path / "README.md"
    readme.write_text("# Title\n\nText.\n")
    args = [str(work / "epoch_2.pth"), "--out", str(tmp_path / "out"), "--readme", str(readme)]
    assert tool.main(args) == 0 and tool.main([*args, "--weights", "model"]) == 0
    text = readme.read_text()
    assert text.startswith("# Title\n\nText.\n")
    assert text.count("| `d_dw_conv_nano` | `d_dw_conv_nano` | 64x64 | 3 | 41.5 | 100.0 |") == 1


def test_a_whole_segmentor_keeps_its_frameworks_names(tmp_path, capsys):
    backbone = timm.create_model("swin_nano", num_classes=0).state_dict()
    weights = {f"backbone.{name}": value for name, value in backbone.items()}
    weights["decode_head.conv_seg.weight"] = torch.ones(3)
    meta = {"iter": 9, "dataset_meta": {"classes": ["a", "b"]}}
    torch.save({"state_dict": weights, "meta": meta}, tmp_path / "iter_9.pth")
    (tmp_path / "swin_nano_upernet.py").write_text("model = dict(backbone=dict(type='swin_nano'))")
    assert tool.main([str(tmp_path / "iter_9.pth"), "--out", str(tmp_path / "out")]) == 0
    (file,) = (tmp_path / "out").glob("*.pth")
    content = torch.load(file, weights_only=True)
    assert content["state_dict"].keys() == weights.keys()
    assert content["meta"]["model"] == "swin_nano" and content["meta"]["classes"] == ["a", "b"]

    # A backbone that its config does not name, or that lacks a weight, is not published.
    del weights["backbone.stages.0.blocks.0.mixer.qkv.weight"]
    torch.save({"state_dict": weights, "meta": meta}, tmp_path / "iter_9.pth")
    shutil.rmtree(tmp_path / "out")
    assert tool.main([str(tmp_path / "iter_9.pth"), "--out", str(tmp_path / "out")]) == 2
    assert f"{tmp_path / 'iter_9.pth'} does not fit" in capsys.readouterr().err
    assert not (tmp_path / "out").exists() or not any((tmp_path / "out").iterdir())


def test_what_cannot_be_published_is_one_line(trained, tmp_path, capsys):
    work, *_ = trained
    torch.save({"state_dict": {"x": torch.zeros(1)}}, tmp_path / "lonely.pth")
    for args, reason in (
        ([tmp_path / "absent.pth"], "no checkpoint at"),
        ([tmp_path / "lonely.pth"], "holds no config"),
        ([work / "d_dw_conv_nano.py"], "it is no checkpoint"),
    ):
        assert tool.main([*map(str, args), "--out", str(tmp_path / "out")]) == 2
        error = capsys.readouterr().err
        assert reason in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()
