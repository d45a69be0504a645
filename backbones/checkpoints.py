"""Reading weights into the networks: unwrapping, renaming, resizing, and a report of what fitted.

A file may hold a bare state dict or a training checkpoint around it, of a classifier or of a whole
detector or segmentor with the backbone inside. Loading never leaves a network partly random in
silence: beyond the classifier and the norms of the outputs, anything that does not fit is an error
that names it.
"""

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from timm.layers import resize_rel_pos_bias_table
from timm.models import adapt_input_conv
from timm.models._hub import download_cached_file
from torch import Tensor, nn

from backbones.ops.window import resize_window_grid

_logger = logging.getLogger(__name__)

# Where training scripts put the weights inside a checkpoint, EMA first.
_WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model")
# What may be absent from a file, or left over in it, without leaving the pyramid random.
_OPTIONAL = re.compile(r"^(norm|norms\.\d+|head(\.fc)?)\.|num_batches_tracked$")
_BUFFERS = re.compile(r"(relative_position_index|relative_coords_table|attn_mask)$")

# Names in the released Swin, DW-Conv and D-DW-Conv files, and ours. The block's batch norm before
# the MLP is ``bn``; the mixer's three are ``bn0``, ``bn`` and ``bn2``.
_RELEASED_NAMES = tuple(
    (re.compile(pattern), name)
    for pattern, name in (
        (r"^(stages\.\d+\.blocks\.\d+)\.bn\.", r"\1.norm2."),
        (r"\.attn2conv\.conv0\.", ".mixer.in_proj."),
        (r"\.attn2conv\.bn0\.", ".mixer.in_norm."),
        (r"\.attn2conv\.conv\.conv1(\.0)?\.(?=weight|bias)", ".mixer.reduce."),
        (r"\.attn2conv\.conv\.(conv1\.1|bn)\.", ".mixer.reduce_norm."),
        (r"\.attn2conv\.conv\.conv2(\.0)?\.", ".mixer.expand."),
        (r"\.attn2conv\.bn\.", ".mixer.mid_norm."),
        (r"\.attn2conv\.conv2\.", ".mixer.out_proj."),
        (r"\.attn2conv\.bn2\.", ".mixer.out_norm."),
        (r"\.attn\.", ".mixer."),
        (r"^norm(\d)\.", r"norms.\1."),
        (r"^head\.(?=weight|bias)", "head.fc."),
    )
)


# What mmengine's checkpoints hold beside weights: log buffers of numpy numbers.
_NOT_WEIGHTS = (
    "mmengine.logging.history_buffer.HistoryBuffer",
    "builtins.getattr",
    "numpy.core.multiarray._reconstruct",
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray._reconstruct",
    "numpy._core.multiarray.scalar",
    "numpy.ndarray",
    "numpy.dtype",
    "numpy.dtypes.Float64DType",
    "numpy.dtypes.Float32DType",
    "numpy.dtypes.Int64DType",
)


class _Ignored:
    """Stands in for anything in a file that is no weight: takes any arguments, does nothing."""

    def __new__(cls, *args: object) -> "_Ignored":
        return super().__new__(cls)

    def __init__(self, *args: object):
        pass

    def __setstate__(self, state: object) -> None:
        pass


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be read, or that does not fit the network."""


@dataclass(frozen=True)
class LoadReport:
    """What a checkpoint gave to a network, by the names of the network's state dict."""

    source: str
    matched: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    resized: tuple[str, ...]

    def __str__(self) -> str:
        lines = [
            f"{self.source}: {len(self.matched)} matched, {len(self.missing)} missing, "
            f"{len(self.unexpected)} unexpected, {len(self.resized)} resized"
        ]
        for kind in ("missing", "unexpected", "resized"):
            names = getattr(self, kind)
            if names:
                lines.append(f"  {kind}: {_some(names)}")
        return "\n".join(lines)


def load_checkpoint(model: nn.Module, source: str | Path) -> LoadReport:
    """Load a checkpoint into a pyramid, or into a module that has a pyramid's names.

    Args:
        model: a :class:`backbones.Pyramid` or a dense-prediction backbone over one.
        source: a ``.pth`` or ``.safetensors`` file, or the URL of one.

    Returns:
        What matched, is missing, was not used and was resized; it is logged too.

    Raises:
        CheckpointError: the file cannot be read, needs more than weights to be unpickled, or does
            not fill the pyramid; the network is left as it was.
    """
    state_dict, report = fit(read_checkpoint(source), model, str(source))
    model.load_state_dict(state_dict, strict=False)
    _logger.info("%s", report)
    return report


def checkpoint_filter_fn(state_dict: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """What timm calls before it loads weights: ours from anybody's names, or a CheckpointError."""
    state_dict, report = fit(state_dict, model, "pretrained weights")
    _logger.info("%s", report)
    return state_dict


def read_checkpoint(source: str | Path) -> dict[str, Tensor]:
    """Read the weights in a file or behind a URL, on the CPU, without unpickling anything else.

    Raises:
        CheckpointError: no such file, or one that holds no state dict or is not safe to unpickle.
    """
    if re.match(r"https?://", str(source)):
        path = Path(download_cached_file(str(source)))
    else:
        path = Path(source).expanduser()
    if not path.is_file():
        raise CheckpointError(f"no checkpoint at {source}: a file or a URL is needed")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            content = load_file(path)
        else:
            with torch.serialization.safe_globals([(_Ignored, name) for name in _NOT_WEIGHTS]):
                content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(f"{source} cannot be read as weights alone: {reason}") from error
    return _unwrap(content, str(source))


def fit(
    state_dict: Mapping[str, Tensor], model: nn.Module, source: str
) -> tuple[dict[str, Tensor], LoadReport]:
    """Rename and resize a state dict for ``model`` and check that it fills it.

    Returns:
        The entries that fit, by the model's names, and the report of all.

    Raises:
        CheckpointError: a weight of the pyramid is missing, has another shape, or is not in it.
    """
    wanted = model.state_dict()
    given = _rename(_strip_prefix(state_dict), wanted)
    fitting, resized, wrong = {}, [], []
    for name, value in given.items():
        if name not in wanted:
            continue
        target = wanted[name]
        if value.shape != target.shape:
            value = _resize(name, value, target)
            resized.append(name)
        if value.shape == target.shape:
            fitting[name] = value
        elif not _OPTIONAL.search(name):
            wrong.append(f"{name} {tuple(value.shape)} instead of {tuple(target.shape)}")
    report = LoadReport(
        source=source,
        matched=tuple(fitting),
        missing=tuple(name for name in wanted if name not in fitting),
        unexpected=tuple(name for name in given if name not in wanted),
        resized=tuple(name for name in resized if name in fitting),
    )
    _refuse_partial(report, wrong, given, wanted)
    return fitting, report


def _refuse_partial(report: LoadReport, wrong: list[str], given: Mapping, wanted: Mapping) -> None:
    shapes = {entry.split()[0] for entry in wrong}
    missing = [n for n in report.missing if n not in shapes and not _OPTIONAL.search(n)]
    # A backbone whose outputs end early has no use for the later stages.
    kept = max(int(n.split(".")[1]) for n in wanted if n.startswith("stages."))
    unexpected = [
        n
        for n in report.unexpected
        if not _OPTIONAL.search(n) and not (_stage(n) is not None and _stage(n) > kept)
    ]
    if not (wrong or missing or unexpected):
        return
    lines = [
        f"{report.source} does not fit: {len(report.matched)} of {len(wanted)} entries match. "
        f"It looks like {_guess(given)}, the network like {_guess(wanted)}."
    ]
    for kind, names in (("shape", wrong), ("missing", missing), ("unexpected", unexpected)):
        if names:
            lines.append(f"  {kind}: {_some(names)}")
    raise CheckpointError("\n".join(lines))


def _unwrap(content: object, source: str) -> dict[str, Tensor]:
    for key in _WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
            break
    if isinstance(content, Mapping):
        weights = {k: v for k, v in content.items() if isinstance(v, Tensor)}
        if weights:
            return weights
    raise CheckpointError(
        f"{source} holds no state dict: it should be a mapping of names to tensors, bare or under "
        f"one of {', '.join(_WRAPPERS)}"
    )


def _strip_prefix(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The entries of the pyramid, whatever it is called inside the module that was saved."""
    anchor = "patch_embed.proj.weight"
    prefixes = [name.removesuffix(anchor) for name in state_dict if name.endswith(anchor)]
    if not prefixes:
        return dict(state_dict)
    prefix = min(prefixes, key=len)
    return {k.removeprefix(prefix): v for k, v in state_dict.items() if k.startswith(prefix)}


def _rename(state_dict: Mapping[str, Tensor], wanted: Mapping) -> dict[str, Tensor]:
    """Released names to ours; ours pass unchanged."""
    # Released files keep the merging at the end of a stage, timm at the start of the next.
    shift = 1 if any(name.startswith("layers.0.downsample") for name in state_dict) else 0
    renamed = {}
    for name, value in state_dict.items():
        if _BUFFERS.search(name):
            continue
        name = re.sub(
            r"^layers\.(\d+)\.downsample",
            lambda match: f"stages.{int(match[1]) + shift}.downsample",
            name,
        )
        name = re.sub(r"^layers\.", "stages.", name)
        for pattern, ours in _RELEASED_NAMES:
            name = pattern.sub(ours, name)
        # The depth-wise convolution keeps its name; D-DW-Conv's bias belongs to the mixer.
        conv = "conv." if name.replace("attn2conv", "mixer") in wanted else ""
        name = name.replace(".attn2conv.conv.", f".mixer.{conv}")
        if value.ndim == 4 and value.shape[2:] == (1, 1) and ".mixer." in name:
            value = value.flatten(1)
        renamed[name] = value
    return renamed


def _resize(name: str, value: Tensor, target: Tensor) -> Tensor:
    """``value`` for another window, kernel, grid or number of image channels if it can be."""
    same_rank = value.ndim == target.ndim
    if name.endswith("relative_position_bias_table") and value.shape[1:] == target.shape[1:]:
        side = (round(target.shape[0] ** 0.5) + 1) // 2
        return resize_rel_pos_bias_table(value, (side, side), tuple(target.shape))
    if name.endswith("mixer.weight") and same_rank and value.shape[2:] == target.shape[2:]:
        return resize_window_grid(value, tuple(target.shape[:2]))
    if name.endswith("mixer.conv.weight") and value.shape[:2] == target.shape[:2]:
        return F.interpolate(value, target.shape[2:], mode="bicubic", align_corners=False)
    if name == "patch_embed.proj.weight" and value.shape[0] == target.shape[0]:
        return adapt_input_conv(target.shape[1], value)
    return value


def _guess(names: Mapping[str, Tensor]) -> str:
    """Which family and size a set of names looks like."""
    text = "\n".join(names)
    marks = {
        "mixer.qkv.": "swin",
        "mixer.value.": "swin_local_mlp",
        "mixer.conv.": "dw_conv",
        "mixer.bias": "d_dw_conv",
        "mixer.expand.": "i_d_dw_conv",
    }
    family = next((family for mark, family in marks.items() if mark in text), None)
    if family is None:
        return "no family of this package"
    width = len(names.get("patch_embed.proj.weight", ()))
    depths = [len(set(re.findall(rf"^stages\.{i}\.blocks\.(\d+)\.", text, re.M))) for i in range(4)]
    size = {32: "nano", 96: "tiny", 128: "base"}.get(width, "unknown size")
    return f"{family}_{size} (C={width}, depths {' '.join(map(str, depths))})"


def _stage(name: str) -> int | None:
    match = re.match(r"stages\.(\d+)\.", name)
    return int(match[1]) if match else None


def _some(names, count: int = 6) -> str:
    names = list(names)
    rest = f", and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + rest
