"""The paper's ablations: a table of its rows, each with the model and arguments that build it.

>>> import timm
>>> from backbones.ablations import ablated
>>> name, options = ablated("dw_conv_se", "dw_conv_nano")  # in the size of that model
>>> model = timm.create_model(name, num_classes=10, **options)
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

from backbones.families import MODEL_NAMES, SIZES, TABLE


class AblationError(ValueError):
    """No ablation has the name, or it cannot be used there; the message is one line."""


@dataclass(frozen=True)
class Ablation:
    """A row of the paper's tables.

    Attributes:
        table: where the paper has it, such as ``"Table 4"``.
        row: what distinguishes it.
        model: a family of :data:`backbones.families.TABLE`, or the whole name of a timm model with
            another pyramid (:mod:`backbones.hosts`).
        options: arguments of the model in every size.
        head_channels: channels C of a head, from which ``num_heads`` of a size follows.
        parameters: the paper's, in millions: an int, or a float with one digit after the point,
            as printed. None where the paper has no figure, as below.
        flops: the paper's, in billions of multiply-adds.
        top1: the paper's ImageNet-1K accuracy in percent.
        note: why our count differs from the paper's figure, if it does.
    """

    table: str
    row: str
    model: str
    options: Mapping[str, Any] = field(default_factory=dict)
    head_channels: int | None = None
    parameters: int | float | None = None
    flops: float | None = None
    top1: float | None = None
    note: str = ""

    @property
    def is_pyramid(self) -> bool:
        """Whether it is one of our families, which are backbones for dense prediction too."""
        return self.model in TABLE

    def name(self, size: str = "tiny") -> str:
        """The timm model; ``size`` is a key of :data:`backbones.families.SIZES`."""
        return f"{self.model}_{size}" if self.is_pyramid else self.model

    def arguments(self, size: str = "tiny") -> dict[str, Any]:
        """The arguments of the model in a size.

        Heads have ``head_channels`` channels in tiny. In other sizes, whose C it may not divide,
        they have the most that divide C up to that.
        """
        arguments = dict(self.options)
        if self.head_channels:
            width, stages = SIZES[size]["embed_dim"], len(SIZES[size]["depths"])
            dims = [width * 2**stage for stage in range(stages)]
            arguments["num_heads"] = tuple(_heads(dim, self.head_channels) for dim in dims)
        return arguments


def _heads(dim: int, most: int) -> int:
    return next(heads for heads in range(1, dim + 1) if dim % heads == 0 and dim // heads <= most)


_GROUPS = (1, 2, 4, 8, 16, 32, 96)
_APPENDIX = "appendix C"
_NO_READING = "No plain reading of the text gives the paper's figure:"

ABLATIONS = {
    # The five families, which several tables start from.
    "swin": Ablation("Tables 5, 12, 15", "shifted windows; LN", "swin", {}, None, 28, 4.5, 81.3),
    "swin_local_mlp": Ablation(
        "Tables 4, 5",
        "Local-MLP; channels shared, positions own",
        "swin_local_mlp",
        parameters=26.2,
        flops=3.8,
        top1=80.3,
    ),
    "dw_conv": Ablation(
        "Tables 4, 5, 12, 15",
        "channels own, positions shared; BN",
        "dw_conv",
        parameters=24.2,
        flops=3.8,
        top1=81.3,
    ),
    "d_dw_conv": Ablation(
        "Table 5", "homogeneous dynamic", "d_dw_conv", parameters=51, flops=3.8, top1=81.9
    ),
    "i_d_dw_conv": Ablation(
        "Tables 5, 6", "inhomogeneous dynamic", "i_d_dw_conv", parameters=26, flops=4.4, top1=81.8
    ),
    # Weight sharing.
    "swin_local_mlp_channels_own": Ablation(
        "Table 4",
        "Local-MLP; channels own, positions shared",
        "swin_local_mlp",
        {"shared": True},
        head_channels=1,
        parameters=35.3,
        top1=80.2,
    ),
    "swin_local_mlp_shared": Ablation(
        "Table 4",
        "Local-MLP; both shared",
        "swin_local_mlp",
        {"shared": True},
        None,
        24.3,
        None,
        80.3,
    ),
    "dw_conv_positions_own": Ablation(
        "Table 4",
        "channels shared, positions own",
        "dw_conv",
        {"shared": False},
        head_channels=32,
        parameters=26.2,
        top1=80.3,
        note=f"{_NO_READING} DW-Conv's block with the kernels alone changed has 26.146M, 0.004M "
        "below what rounds to 26.2M.",
    ),
    "dw_conv_channels_shared": Ablation(
        "Table 4",
        "both shared",
        "dw_conv",
        head_channels=32,
        parameters=23.9,
        top1=81.1,
        note=f"{_NO_READING} DW-Conv's block has 23.952M without any kernel, 23.963M with them.",
    ),
    **{
        f"{model}_heads_of_{channels}": Ablation(
            "Figure 2",
            f"{what}, {channels} channels a head" if channels > 1 else f"{what}, a channel a head",
            model,
            head_channels=channels,
        )
        for model, what in (("swin", "attention"), ("swin_local_mlp", "Local-MLP"))
        for channels in _GROUPS
    },
    # Dynamic weights.
    "swin_sliding": Ablation(
        "Table 5", "sliding windows", "swin", {"sliding": True}, None, 28, 4.5, 81.4
    ),
    "i_d_dw_conv_local": Ablation(
        "Table 6",
        "I-D-DW + DW",
        "i_d_dw_conv",
        {"local_kernel": 7},
        parameters=27,
        flops=4.4,
        top1=82.3,
        note=f"{_NO_READING} no depth-wise kernel on C channels has both 27M and 4.4G. This is "
        "Shuffle Transformer's, which the paper follows: 7x7 without bias, behind a batch norm.",
    ),
    "swin_set": Ablation(
        "section 2.3",
        "no relative position bias: the window as a set",
        "swin",
        {"position_bias": False},
    ),
    # Norms.
    "swin_batchnorm": Ablation("Table 12", "BN", "swin", {"norm_layer": "batchnorm"}, top1=80.9),
    "swin_centered_batchnorm": Ablation(
        "Table 12", "CC. BN", "swin", {"norm_layer": "centered_batchnorm"}, top1=81.2
    ),
    "dw_conv_layernorm": Ablation(
        "Table 12", "LN", "dw_conv", {"norm_layer": "layernorm"}, top1=81.2
    ),
    "dw_conv_centered_batchnorm": Ablation(
        "Table 12", "CC. BN", "dw_conv", {"norm_layer": "centered_batchnorm"}, top1=81.7
    ),
    # Other hosts.
    "volo_d1": Ablation("Table 13", "VOLO-d1 (timm's)", "volo_d1_224", {}, None, 27, 7.0, 84.1),
    "volo_d1_local_attention": Ablation(
        "Table 13", "VOLO-d1, local attention", "volo_d1_local_attention", {}, None, 27, 7.2, 84.2
    ),
    "volo_d1_dw_conv": Ablation(
        "Table 13", "VOLO-d1, DW", "volo_d1_dw_conv", {}, None, 26, 6.9, 84.2
    ),
    "twins_svt_small": Ablation(
        "Table 13", "Twins-SVT-S (timm's)", "twins_svt_small", {}, None, 24, 2.8, 81.7
    ),
    "twins_svt_small_dw_conv": Ablation(
        "Table 13", "Twins-SVT-S, DW", "twins_svt_small_dw_conv", {}, None, 22, 2.7, 81.9
    ),
    # Squeeze-and-excitation.
    "swin_se": Ablation("Table 15", "SE", "swin", {"se_ratio": 1 / 16}, None, 29, 4.5, 81.2),
    "dw_conv_se": Ablation("Table 15", "SE", "dw_conv", {"se_ratio": 1 / 16}, None, 24, 3.8, 81.7),
    # Convolution and attention, all on sliding windows.
    **{
        f"swin_sliding_{kind}": Ablation(_APPENDIX, row, "swin", {"sliding": True, "conv": kind})
        for kind, row in (
            ("static", "(24) static and dynamic weights"),
            ("post", "(25) post-convolutional attention"),
            ("pre", "(26) pre-convolutional, a kernel for all channels"),
            ("pre_depthwise", "(26) pre-convolutional, a kernel a channel"),
            ("pre_full", "(27) pre-convolutional, normal convolution"),
        )
    },
    "swin_sliding_set": Ablation(
        _APPENDIX, "(22) dot products alone", "swin", {"sliding": True, "position_bias": False}
    ),
}


def find(name: str) -> Ablation:
    """The row of a name.

    Raises:
        AblationError: :data:`ABLATIONS` has no such name; the message has those near it.
    """
    if name in ABLATIONS:
        return ABLATIONS[name]
    near = get_close_matches(name, ABLATIONS, n=4, cutoff=0.5) or ABLATIONS
    raise AblationError(f"no ablation {name!r}; near it are {', '.join(near)}")


def ablated(name: str, like: str, dense: bool = False) -> tuple[str, dict[str, Any]]:
    """The model and arguments of a row, in the size of another model.

    >>> ablated("dw_conv_channels_shared", "swin_nano")
    ('dw_conv_nano', {'num_heads': (1, 2, 4, 8)})

    Args:
        name: a key of :data:`ABLATIONS`.
        like: a name of ``backbones.MODEL_NAMES``.
        dense: whether it is for dense prediction, which takes our pyramids alone.

    Raises:
        AblationError: an unknown name, a ``like`` of another package or of a size that the row's
            family lacks, or ``dense`` with a network that is no pyramid of ours.
    """
    ablation = find(name)
    if like not in MODEL_NAMES:
        raise AblationError(
            f"ablation {name} needs a network of this package to replace, not {like!r}"
        )
    size = like.rsplit("_", 1)[1]
    if dense and not ablation.is_pyramid:
        raise AblationError(
            f"{name} is a classifier alone: its network, timm's with another mixer, is no backbone "
            "for dense prediction here; tools/pretrain.py trains it"
        )
    if ablation.is_pyramid and size not in TABLE[ablation.model].sizes:
        sizes = ", ".join(TABLE[ablation.model].sizes)
        raise AblationError(f"{name} is a {ablation.model}, which is not {size} but {sizes}")
    return ablation.name(size), ablation.arguments(size)
