"""A published classifier as the folder of a Hugging Face repository, with its model card."""

from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import ConvNextImageProcessor

import backbones
from dense import files
from dense.huggingface.configuration import DenseBackboneConfig
from dense.huggingface.modeling import DenseBackboneForImageClassification
from dense.publish import Published

_TITLES = {"top1": "Top-1 accuracy", "top5": "Top-5 accuracy"}
_TEXT = """---
{data}
---

# {name}

{model}: {what}.
A classifier of {count} classes for images of {size}x{size} pixels, by the recipe `{recipe}` of
dense-backbones.

```python
import dense.huggingface  # pip install 'dense-backbones[ecosystem]'
from transformers import AutoImageProcessor, AutoModelForImageClassification

processor = AutoImageProcessor.from_pretrained("{name}")
model = AutoModelForImageClassification.from_pretrained("{name}")
logits = model(**processor(image, return_tensors="pt")).logits
```

The same weights in timm, MMSegmentation, MMDetection and Detectron2: `init="{file}"`.

| metric | on the training's validation set |
| --- | --- |
{metrics}

Trained with torch {torch} and timm {timm}; the weights are {weights}.
"""
_WHAT = {
    "swin": "attention in shifted windows",
    "swin_local_mlp": "learned static weights in shifted windows",
    "dw_conv": "depth-wise 7x7 convolution",
    "d_dw_conv": "depth-wise convolution whose kernels are predicted for each image",
    "i_d_dw_conv": "depth-wise convolution whose kernels are predicted for each position",
}
_WEIGHTS = {"averaged": "averaged over the training", "model": "those of the last step"}


def write_folder(published: Published, folder: str | Path) -> Path:
    """Write ``config.json``, ``model.safetensors``, ``preprocessor_config.json`` and ``README.md``.

    Args:
        published: of :func:`dense.publish.publish`, a classifier.
        folder: written into, and made if missing; its name is the model's in the card.

    Raises:
        ValueError: it is no classifier.

    Example:
        >>> write_folder(publish("epoch_300.pth", "published"), "dw_conv_tiny_photos")
    """
    meta, file = published.meta, published.files[1]
    if not meta["image_size"]:
        raise ValueError(f"{file} is no classifier: transformers' folders are of classifiers here")
    folder = Path(folder)
    model = DenseBackboneForImageClassification(_config(published))
    backbones.load_checkpoint(model, file, classes=meta["classes"])
    model.save_pretrained(folder)
    ConvNextImageProcessor(
        size={"shortest_edge": meta["image_size"]},
        crop_pct=meta["crop_pct"],
        image_mean=meta["mean"],
        image_std=meta["std"],
    ).save_pretrained(folder)
    files.write(folder / "README.md", str(_card(published, folder.resolve().name)))
    return folder


def _config(published: Published) -> DenseBackboneConfig:
    meta = published.meta
    options = dict(meta["options"])
    size = options.pop("img_size", meta["image_size"])
    weight = backbones.read_checkpoint(published.files[1])["head.fc.weight"]
    names = meta["classes"] or [f"LABEL_{number}" for number in range(len(weight))]
    return DenseBackboneConfig(
        backbone=meta["model"],
        image_size=size,
        options=options or None,
        id2label=dict(enumerate(names)),
        label2id={name: number for number, name in enumerate(names)},
    )


def _card(published: Published, name: str) -> ModelCard:
    meta = published.meta
    results = [
        EvalResult("image-classification", "validation", "validation", key, value)
        for key, value in meta["metrics"].items()
        if key in _TITLES
    ]
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="image-classification",
        tags=["image-classification", "dense-backbones", meta["model"]],
        model_name=name,
        eval_results=results or None,
    )
    rows = (f"| {_TITLES.get(k, k)} | {value:.1f} |" for k, value in meta["metrics"].items())
    text = _TEXT.format(
        data=data.to_yaml(),
        name=name,
        model=meta["model"],
        what=_WHAT[meta["model"].rpartition("_")[0]],
        count=len(meta["classes"] or []) or "unnamed",
        size=meta["image_size"],
        recipe=meta["recipe"],
        file=published.files[0].name,
        metrics="\n".join(rows) or "| none was logged | |",
        **meta["versions"],
        weights=_WEIGHTS[meta["weights"]],
    )
    return ModelCard(text)
