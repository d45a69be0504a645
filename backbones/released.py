"""The weights that the papers' authors released, by model name and timm tag.

None were released of Swin-Local-MLP, I-D-DW-Conv and the nano size.
"""

from dataclasses import dataclass
from pathlib import Path

from backbones.reading import CheckpointError, is_url

_DEMYSTIFY = "https://github.com/Atten4Vis/DemystifyLocalViT/releases/download/prerelease/"
_SWIN = "https://github.com/SwinTransformer/storage/releases/download/"


@dataclass(frozen=True)
class Released:
    """One released file.

    Attributes:
        url: its address.
        top1: ImageNet-1K accuracy in percent as stated with the file, which can differ from the
            paper's tables by 0.1; None if not stated.
        num_classes: outputs of its classifier; 21841 for ImageNet-22K.
        window_size: side of a window or kernel, in positions.
        img_size: side of its training images, in pixels.
    """

    url: str
    top1: float | None = None
    num_classes: int = 1000
    window_size: int = 7
    img_size: int = 224

    @property
    def description(self) -> str:
        """Data set, image size, window size and accuracy."""
        data = "ImageNet-22K" if self.num_classes == 21841 else "ImageNet-1K"
        accuracy = f", top-1 {self.top1}" if self.top1 else ""
        return f"{data}, {self.img_size}x{self.img_size}, window {self.window_size}{accuracy}"


# `pretrained=True` without a tag takes a model's first entry.
RELEASED = {
    "swin_tiny": {
        "ms_in1k": Released(_SWIN + "v1.0.0/swin_tiny_patch4_window7_224.pth", 81.2),
        "ms_in22k": Released(
            _SWIN + "v1.0.8/swin_tiny_patch4_window7_224_22k.pth", num_classes=21841
        ),
    },
    "swin_small": {
        "ms_in1k": Released(_SWIN + "v1.0.0/swin_small_patch4_window7_224.pth", 83.2),
        "ms_in22k": Released(
            _SWIN + "v1.0.8/swin_small_patch4_window7_224_22k.pth", num_classes=21841
        ),
        "ms_in22k_ft_in1k": Released(
            _SWIN + "v1.0.8/swin_small_patch4_window7_224_22kto1k_finetune.pth", 83.2
        ),
    },
    "swin_base": {
        "ms_in1k": Released(_SWIN + "v1.0.0/swin_base_patch4_window7_224.pth", 83.5),
        "ms_in1k_384": Released(
            _SWIN + "v1.0.0/swin_base_patch4_window12_384.pth", window_size=12, img_size=384
        ),
        "ms_in22k": Released(
            _SWIN + "v1.0.0/swin_base_patch4_window7_224_22k.pth", num_classes=21841
        ),
        "ms_in22k_384": Released(
            _SWIN + "v1.0.0/swin_base_patch4_window12_384_22k.pth",
            num_classes=21841,
            window_size=12,
            img_size=384,
        ),
        "ms_in22k_ft_in1k": Released(
            _SWIN + "v1.0.0/swin_base_patch4_window7_224_22kto1k.pth", 85.2
        ),
    },
    "swin_large": {
        "ms_in22k_ft_in1k": Released(
            _SWIN + "v1.0.0/swin_large_patch4_window7_224_22kto1k.pth", 86.3
        ),
        "ms_in22k_ft_in1k_384": Released(
            _SWIN + "v1.0.0/swin_large_patch4_window12_384_22kto1k.pth",
            87.3,
            window_size=12,
            img_size=384,
        ),
        "ms_in22k": Released(
            _SWIN + "v1.0.0/swin_large_patch4_window7_224_22k.pth", num_classes=21841
        ),
        "ms_in22k_384": Released(
            _SWIN + "v1.0.0/swin_large_patch4_window12_384_22k.pth",
            num_classes=21841,
            window_size=12,
            img_size=384,
        ),
    },
    "dw_conv_tiny": {"atten4vis_in1k": Released(_DEMYSTIFY + "dwnet_tiny_224.pth", 81.2)},
    "dw_conv_base": {"atten4vis_in1k": Released(_DEMYSTIFY + "dwnet_base_224.pth", 83.2)},
    "d_dw_conv_tiny": {"atten4vis_in1k": Released(_DEMYSTIFY + "dynamic_dwnet_tiny_224.pth", 81.8)},
    "d_dw_conv_base": {"atten4vis_in1k": Released(_DEMYSTIFY + "dynamic_dwnet_base_224.pth", 83.2)},
}


def source_of(name: str, init: str | Path) -> str:
    """Resolve a backbone's ``init``: a file or URL is returned as it is, a tag as its URL.

    >>> source_of("dw_conv_tiny", "atten4vis_in1k")
    'https://github.com/Atten4Vis/DemystifyLocalViT/releases/download/prerelease/dwnet_tiny_224.pth'

    Args:
        name: one of ``backbones.MODEL_NAMES``.
        init: a file, a URL, or a tag of the model's released weights.

    Raises:
        CheckpointError: ``init`` is none of them; the message lists the tags.
    """
    if is_url(init) or Path(init).expanduser().is_file():
        return str(init)
    tags = RELEASED.get(name, {})
    if init in tags:
        return tags[init].url
    raise CheckpointError(
        f"init={str(init)!r} is no file, URL or tag of released weights; "
        f"tags of {name}: {', '.join(tags) or 'none'}"
    )


def names_with_weights() -> str:
    """Every ``model.tag``, for error messages."""
    return ", ".join(f"{name}.{tag}" for name, tags in RELEASED.items() for tag in tags)
