"""The folder's files to the word, for each weight, with and without names of classes."""

import json
from types import SimpleNamespace

import pytest
import timm
import torch
from safetensors.torch import save_file

pytest.importorskip("transformers", reason="transformers is not installed")

from huggingface_hub import ModelCard
from transformers import AutoConfig, AutoModel

import backbones
import dense.huggingface
from dense.huggingface.folder import write_folder
from dense.publish import Published

WHAT = {
    "swin": "attention in shifted windows",
    "swin_local_mlp": "learned static weights in shifted windows",
    "dw_conv": "depth-wise 7x7 convolution",
    "d_dw_conv": "depth-wise convolution whose kernels are predicted for each image",
    "i_d_dw_conv": "depth-wise convolution whose kernels are predicted for each position",
}
BODY = """
# {name}

{family}_nano: {what}.
A classifier of {count} classes for images of 48x48 pixels, by the recipe `mine` of
dense-backbones.

```python
import dense.huggingface  # pip install 'dense-backbones[ecosystem]'
from transformers import AutoImageProcessor, AutoModelForImageClassification

processor = AutoImageProcessor.from_pretrained("{name}")
model = AutoModelForImageClassification.from_pretrained("{name}")
logits = model(**processor(image, return_tensors="pt")).logits
```

The same weights in timm, MMSegmentation, MMDetection and Detectron2: `init="mine-1.pth"`.

| metric | on the training's validation set |
| --- | --- |
{metrics}

Trained with torch 2.1 and timm 1.0; the weights are {weights}.
"""


def published(folder, family: str, **changed) -> Published:
    torch.manual_seed(0)
    network = timm.create_model(f"{family}_nano", num_classes=3, img_size=40, window_size=5)
    files = folder / "mine-1.pth", folder / "mine-2.safetensors"
    save_file(network.state_dict(), files[1])
    meta = {
        "model": f"{family}_nano",
        "options": {"img_size": 40, "window_size": 5},
        "classes": ["ant", "bee", "cat"],
        "image_size": 48,
        "crop_pct": 0.9,
        "mean": [0.1, 0.2, 0.3],
        "std": [0.4, 0.5, 0.6],
        "recipe": "mine",
        "metrics": {"top1": 41.46, "top5": 80.0, "loss": 1.5},
        "versions": {"torch": "2.1", "timm": "1.0"},
        "weights": "averaged",
    }
    return Published(files, meta | changed, "")


@pytest.mark.parametrize("family", WHAT)
def test_all_of_a_folder(family, tmp_path, monkeypatch):
    named = family != "swin"
    found = published(tmp_path, family, **({} if named else {"classes": None}))
    # The name of a folder that is named otherwise.
    (tmp_path / "new/ants").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "new/ants")
    folder = write_folder(found, ".")
    assert str(folder) == "." and sorted(path.name for path in folder.iterdir()) == [
        *("README.md", "config.json", "model.safetensors", "preprocessor_config.json")
    ]
    card = ModelCard.load(folder / "README.md")
    metrics = "| Top-1 accuracy | 41.5 |\n| Top-5 accuracy | 80.0 |\n| loss | 1.5 |"
    assert card.text.strip() == BODY.strip().format(
        **dict(name="ants", family=family, what=WHAT[family], count=3 if named else "unnamed"),
        **dict(metrics=metrics, weights="averaged over the training"),
    )
    assert {k: v for k, v in card.data.to_dict().items() if k != "model-index"} == {
        "library_name": "transformers",
        "pipeline_tag": "image-classification",
        "tags": ["image-classification", "dense-backbones", f"{family}_nano"],
    }
    results = [
        (r.task_type, r.dataset_type, r.dataset_name, r.metric_type, r.metric_value)
        for r in card.data.eval_results
    ]
    place = ("image-classification", "validation", "validation")
    assert results == [(*place, "top1", 41.46), (*place, "top5", 80.0)]
    assert card.data.model_name == "ants"

    config = json.loads((folder / "config.json").read_text())
    names = ["ant", "bee", "cat"] if named else ["LABEL_0", "LABEL_1", "LABEL_2"]
    assert config["id2label"] == {str(number): name for number, name in enumerate(names)}
    assert config["label2id"] == {name: number for number, name in enumerate(names)}
    assert (config["backbone"], config["image_size"]) == (f"{family}_nano", 40)
    assert config["options"] == {"window_size": 5} and config["ablation"] is None
    processor = json.loads((folder / "preprocessor_config.json").read_text())
    assert (processor["image_mean"], processor["image_std"]) == ([0.1, 0.2, 0.3], [0.4, 0.5, 0.6])
    assert (processor["size"], processor["crop_pct"]) == ({"shortest_edge": 48}, 0.9)


def test_what_was_not_logged_is_said(tmp_path):
    changed = {"metrics": {}, "weights": "model", "options": {}}
    torch.manual_seed(0)
    found = published(tmp_path, "dw_conv", **changed)
    save_file(timm.create_model("dw_conv_nano", num_classes=3).state_dict(), found.files[1])
    folder = write_folder(found, tmp_path / "folder")
    card = ModelCard.load(folder / "README.md")
    assert card.text.strip() == BODY.strip().format(
        **dict(name="folder", family="dw_conv", what=WHAT["dw_conv"], count=3),
        **dict(metrics="| none was logged | |", weights="those of the last step"),
    )
    assert card.data.eval_results is None
    config = json.loads((folder / "config.json").read_text())
    assert config["options"] is None and config["image_size"] == 48


def test_what_is_no_classifier_is_refused(tmp_path):
    found = published(tmp_path, "dw_conv", image_size=None)
    with pytest.raises(ValueError, match="mine-2.safetensors is no classifier: transformers'"):
        write_folder(found, tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


# The config and the classes


def test_a_config_says_all_and_repeats_it(tmp_path):
    config = AutoConfig.for_model("dense_backbone")
    given = ("backbone", "ablation", "options", "num_channels", "image_size", "drop_path_rate")
    given += ("frozen_stages", "norm", "out_features", "out_indices", "stage_names")
    stages = ["stage1", "stage2", "stage3", "stage4"]
    expected = ["i_d_dw_conv_tiny", None, None, 3, 224, 0.0, -1, "BN", stages, [0, 1, 2, 3], stages]
    assert [_plain(getattr(config, name)) for name in given] == expected
    assert config.network() == ("i_d_dw_conv_tiny", {"img_size": 224, "in_chans": 3})
    for wanted in (dict(out_features=["stage2", "stage4"]), dict(out_indices=[1, 3])):
        config = AutoConfig.for_model("dense_backbone", backbone="swin_nano", **wanted)
        assert config.out_features == ["stage2", "stage4"] and [*config.out_indices] == [1, 3]
        config.save_pretrained(tmp_path)
        assert AutoConfig.from_pretrained(tmp_path).out_features == ["stage2", "stage4"]


def _plain(value):
    return list(value) if isinstance(value, tuple) else value


def test_options_are_the_networks_and_win():
    config = AutoConfig.for_model(
        "dense_backbone",
        backbone="dw_conv_nano",
        ablation="swin_sliding",
        options={"window_size": 5, "img_size": 64},
        num_channels=4,
    )
    name, arguments = config.network()
    assert name == "swin_nano"
    assert (arguments["img_size"], arguments["in_chans"], arguments["window_size"]) == (64, 4, 5)
    assert len(arguments) > 3 and config.options == {"window_size": 5, "img_size": 64}


def test_all_of_the_config_reaches_the_networks(monkeypatch):
    from dense.huggingface import modeling

    asked = []

    def build(name, **given):
        asked.append((name, given))
        return built(name, **given)

    config = AutoConfig.for_model(
        "dense_backbone",
        backbone="dw_conv_nano",
        out_indices=[1, 2],
        drop_path_rate=0.2,
        frozen_stages=1,
        norm="FrozenBN",
        image_size=64,
        num_labels=7,
    )
    built = modeling.DenseBackbone
    monkeypatch.setattr(modeling, "DenseBackbone", build)
    model = dense.huggingface.DenseBackboneModel(config)
    given = dict(out_indices=[1, 2], drop_path_rate=0.2, frozen_stages=1, norm="FrozenBN")
    (name, found) = asked.pop()
    found["out_indices"] = list(found["out_indices"])
    assert (name, found) == ("dw_conv_nano", given | dict(img_size=64, in_chans=3))
    channels = timm.create_model("dw_conv_nano").feature_info
    assert model.num_features == [info["num_chs"] for info in channels]
    assert model.channels == model.num_features[1:3]
    for wanted in (None, False, True):
        out = model(torch.zeros(1, 3, 64, 64), output_hidden_states=wanted)
        assert (out.hidden_states is out.feature_maps) == bool(wanted)
        assert wanted or out.hidden_states is None
    maps = model(torch.zeros(1, 3, 64, 64), return_dict=False)[0]
    assert [x.shape[1] for x in maps] == model.channels

    built = timm.create_model
    monkeypatch.setattr(modeling, "timm", SimpleNamespace(create_model=build))
    dense.huggingface.DenseBackboneForImageClassification(config)
    assert asked == [
        ("dw_conv_nano", dict(num_classes=7, drop_path_rate=0.2, img_size=64, in_chans=3))
    ]


def test_checkpointing_is_turned_off_again():
    config = AutoConfig.for_model("dense_backbone", backbone="dw_conv_nano")
    backbone = AutoModel.from_config(config)
    for enable in (True, False):
        getattr(backbone, f"gradient_checkpointing_{'en' if enable else 'dis'}able")()
        assert {stage.grad_checkpointing for stage in backbone.network.stages} == {enable}
    classifier = dense.huggingface.DenseBackboneForImageClassification(config)
    classifier.gradient_checkpointing_enable()
    assert all(stage.grad_checkpointing for stage in classifier.network.stages)
    assert isinstance(classifier.network, backbones.Pyramid)
