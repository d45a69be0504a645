"""A published classifier, as transformers reads it."""

import json

import numpy as np
import pytest
import timm
import torch
from PIL import Image

pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("mmengine")

from huggingface_hub import ModelCard
from mmengine.config import Config
from timm.data import create_transform
from transformers import AutoImageProcessor, AutoModelForImageClassification

from dense.recipes import RECIPES
from tests.support import load_tool

CLASSES = ["ant", "bee", "cat"]
OPTIONS = dict(num_heads=(1, 2, 4, 8), se_ratio=1 / 16)


@pytest.fixture
def trained(tmp_path):
    network = timm.create_model("dw_conv_nano", num_classes=3, **OPTIONS)
    weights = {f"network.{key}": value for key, value in network.state_dict().items()}
    work = tmp_path / "work"
    (work / "20260101_000000/vis_data").mkdir(parents=True)
    meta = {"epoch": 2, "iter": 20, "dataset_meta": {"classes": CLASSES}}
    torch.save({"state_dict": weights, "meta": meta}, work / "epoch_2.pth")
    cfg = Config.fromfile(RECIPES / "pretraining/dw_conv_nano.py")
    cfg.model.update(OPTIONS)
    cfg.dump(work / "dw_conv_nano.py")
    (work / "20260101_000000/vis_data/scalars.json").write_text(
        '{"loss": 1.0, "lr": 0.1, "epoch": 2, "iter": 20, "step": 20}\n{"top1": 41.5, "step": 2}\n'
    )
    return work, network.eval()


def publish(work, folder):
    words = [work / "epoch_2.pth", "--out", work / "out", "--huggingface", folder]
    return load_tool("publish_checkpoint").main([str(word) for word in words])


def test_the_folder_has_the_network_its_preprocessing_and_a_card(trained, tmp_path, capsys):
    work, network = trained
    folder = tmp_path / "ants_and_bees"
    assert publish(work, folder) == 0
    assert f"{folder}/README.md: the model card\n" in capsys.readouterr().out
    model = AutoModelForImageClassification.from_pretrained(folder).eval()
    assert model.config.id2label == dict(enumerate(CLASSES))
    for key, value in network.state_dict().items():
        assert model.network.state_dict()[key].equal(value), key

    rng = np.random.default_rng(0)
    photo = Image.fromarray(rng.integers(0, 255, (90, 130, 3), np.uint8)).resize((260, 180))
    pixels = AutoImageProcessor.from_pretrained(folder)(photo, return_tensors="pt").pixel_values
    expected = create_transform(64, is_training=False, crop_pct=1.0, interpolation="bicubic")(photo)
    # Two bicubic resizers, of PIL and of torchvision, round differently.
    assert pixels.shape == (1, 3, 64, 64) and (pixels[0] - expected).abs().max() < 0.05
    with torch.no_grad():
        torch.testing.assert_close(model(pixels).logits, network(pixels))

    card = ModelCard.load(folder / "README.md")
    assert card.data.library_name == "transformers" and "dw_conv_nano" in card.data.tags
    assert card.data.eval_results[0].metric_value == 41.5
    text = card.text
    assert "3 classes for images of 64x64" in text and "| Top-1 accuracy | 41.5 |" in text
    assert 'from_pretrained("ants_and_bees")' in text and "{" not in text


def test_the_config_that_is_named_decides(trained, tmp_path, capsys):
    work, _ = trained
    own = (work / "dw_conv_nano.py").rename(tmp_path / "own.py")
    (work / "config.yaml").write_text("model: {backbone: {bottom_up: {name: dw_conv_nano}}}")
    words = [work / "epoch_2.pth", "--out", work / "out", "--huggingface", tmp_path / "folder"]
    tool = load_tool("publish_checkpoint")
    assert tool.main([str(word) for word in words]) == 2
    assert "config.yaml trains no classifier" in capsys.readouterr().err
    assert tool.main([str(word) for word in (*words, "--config", own)]) == 0
    assert (tmp_path / "folder/model.safetensors").is_file()


def test_a_detector_is_refused(tmp_path, capsys):
    backbone = timm.create_model("dw_conv_nano", num_classes=0).state_dict()
    weights = {f"backbone.bottom_up.{name}": value for name, value in backbone.items()}
    torch.save({"model": weights, "classes": ["a"], "iteration": 9}, tmp_path / "epoch_2.pth")
    model = {"backbone": {"bottom_up": {"name": "dw_conv_nano"}}}
    (tmp_path / "config.yaml").write_text(json.dumps({"model": model}))
    assert publish(tmp_path, tmp_path / "folder") == 2
    error = capsys.readouterr().err
    assert "config.yaml trains no classifier" in error and error.count("\n") == 1
    assert not (tmp_path / "folder").exists() and not (tmp_path / "out").exists()
