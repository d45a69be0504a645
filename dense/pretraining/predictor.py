"""Predictor for trained classifiers."""

import numpy as np
import timm
import torch
from mmengine.config import Config
from PIL import Image
from timm.data import ImageNetInfo, create_transform

from backbones import CheckpointError, LoadReport, fuse
from backbones.checkpoints import fit
from backbones.reading import read_with_classes
from dense.images import check_rgb
from dense.openmmlab.config import load_config
from dense.pretraining.model import network_options


class Predictor:
    """A trained classifier as a function of one image, with the config's validation transform.

    >>> predict = load_predictor("work_dirs/mine/mine.py", "work_dirs/mine/epoch_20.pth")
    >>> predict(image)  # (H, W, 3) uint8 RGB to (num_classes,) float32 probabilities

    Args:
        config_file: the config it was trained with, such as the copy in its work folder.
        checkpoint: a ``.pth`` of the training, or another checkpoint of the network with a
            classifier.
        device: ``"cpu"``, ``"cuda"``, ``"cuda:1"``.

    Attributes:
        classes: class names, by index; ImageNet's wnids are replaced by their descriptions.
        report: the load report of the checkpoint.
        network: fused, ``(B, 3, H, W)`` to logits ``(B, num_classes)``.
        transform: arguments of timm's ``create_transform``.

    Raises:
        ConfigError: the config cannot be read.
        CheckpointError: the checkpoint cannot be read or does not fit.
    """

    def __init__(self, config_file: str, checkpoint: str, device: str = "cpu"):
        cfg = load_config(config_file)
        weights, classes = read_with_classes(checkpoint)
        model, self.report = _network(cfg, weights, checkpoint, classes)
        self.classes = readable(classes or [str(i) for i in range(model.num_classes)])
        if len(self.classes) != model.num_classes:
            raise CheckpointError(
                f"{checkpoint} names {len(self.classes)} classes, its classifier has "
                f"{model.num_classes}"
            )
        self.network, self._device = fuse(model.to(device), inplace=True), device
        self.transform = cfg.val_dataloader.dataset.transform.to_dict()
        self._transform = create_transform(**self.transform)

    @torch.inference_mode()
    def __call__(self, image: np.ndarray) -> np.ndarray:
        """``(H, W, 3)`` uint8 RGB to ``(num_classes,)`` float32 probabilities."""
        check_rgb(image)
        pixels = self._transform(Image.fromarray(image))[None].to(self._device)
        return self.network(pixels)[0].softmax(0).cpu().numpy()


load_predictor = Predictor


def _network(
    cfg: Config, weights: dict[str, torch.Tensor], checkpoint: str, classes: tuple | None
) -> tuple[torch.nn.Module, LoadReport]:
    """Build the config's network with the file's number of classes and load the weights."""
    count = len(classes) if classes else cfg.model.num_classes
    model = timm.create_model(cfg.model.name, num_classes=count, **network_options(cfg.model))
    state_dict, report = fit(weights, model, checkpoint)
    lacking = [name for name in report.missing if not name.endswith("num_batches_tracked")]
    if lacking:
        raise CheckpointError(f"{checkpoint} has no {', '.join(lacking)}, which prediction needs")
    model.load_state_dict(state_dict, strict=False)
    return model, report


def readable(names: list[str]) -> tuple[str, ...]:
    """Replace ImageNet's wnids by their descriptions.

    >>> readable(["n02123045", "dog"])
    ('tabby, tabby cat', 'dog')
    """
    info = ImageNetInfo("imagenet-22k")
    known = set(info.label_names()) | set(ImageNetInfo("imagenet-1k").label_names())
    return tuple(info.label_name_to_description(name) if name in known else name for name in names)
