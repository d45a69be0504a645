"""Weights into the networks: found in what was saved, renamed, resized, and reported.

A file may hold a bare state dict or a training checkpoint around it, of a classifier or of a whole
detector or segmentor with the backbone inside, by the names of any of :data:`layouts.LAYOUTS`.
Loading never leaves a network partly random in silence: beyond the classifier and the norms of the
outputs, anything that does not fit is an error that names it.
"""

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from timm.data import ImageNetInfo
from timm.models import adapt_input_conv
from torch import Tensor, nn

from backbones.families import SIZES
from backbones.layouts import ANCHORS, family_of, to_ours
from backbones.mixers import Mixer
from backbones.reading import CheckpointError, read_with_classes

_logger = logging.getLogger(__name__)

# What may be absent from a file, or left over in it, without leaving the pyramid random.
_OPTIONAL = re.compile(r"^(norm|norms\.\d+|head(\.fc)?)\.|num_batches_tracked$")
_CLASSIFIER = ("head.fc.weight", "head.fc.bias")


@dataclass(frozen=True)
class LoadReport:
    """What a checkpoint gave to a network, by the names of the network's state dict.

    Attributes:
        source: the file or URL.
        matched: entries that were loaded, the resized ones among them.
        missing: entries of the network that the file does not fill.
        unexpected: entries of the file's backbone that the network has no place for.
        resized: entries that were fitted to another window, kernel, grid or number of channels.
        elsewhere: how many entries of the file belong to something else, a detector's heads say.
        classifier: how the classifier's rows were found, empty where they are the file's.
    """

    source: str
    matched: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    resized: tuple[str, ...]
    elsewhere: int = 0
    classifier: str = ""

    def __str__(self) -> str:
        lines = [
            f"{self.source}: {len(self.matched)} matched, {len(self.missing)} missing, "
            f"{len(self.unexpected)} unexpected, {len(self.resized)} resized"
        ]
        for kind in ("missing", "unexpected", "resized"):
            names = getattr(self, kind)
            if names:
                lines.append(f"  {kind}: {_some(names)}")
        if self.classifier:
            lines.append(f"  classifier: {self.classifier}")
        if self.elsewhere:
            lines.append(f"  {self.elsewhere} entries outside of the backbone were not needed")
        return "\n".join(lines)


def load_checkpoint(
    model: nn.Module,
    source: str | Path,
    *,
    classes: Sequence[str] | None = None,
    prefix: str | None = None,
    weights_only: bool = True,
) -> LoadReport:
    """Load a checkpoint into a pyramid, or into the one pyramid of a module.

    Args:
        model: a :class:`backbones.Pyramid`, a dense-prediction backbone over one, or anything that
            holds one of them: timm's ``features_only`` form, DDP, a whole detector.
        source: a ``.pth`` or ``.safetensors`` file, or the URL of one.
        classes: names of the classifier's outputs, ImageNet's wnids say, by which rows are found in
            a file of other classes; 1000 outputs are ImageNet-1K's unless this says otherwise.
        prefix: what stands before the backbone's names, for a file that holds several.
        weights_only: False reads files that cannot be read safely too; only for those you trust.

    Returns:
        What matched, is missing, was not used and was resized; it is logged too.

    Raises:
        CheckpointError: the file cannot be read, needs more than weights to be unpickled, or does
            not fill the pyramid; the network is left as it was.
    """
    given, their_classes = read_with_classes(source, weights_only=weights_only)
    model = _pyramid_in(model)
    state_dict, report = fit(given, model, str(source), their_classes, classes, prefix)
    model.load_state_dict(state_dict, strict=False)
    _logger.info("%s", report)
    return report


def checkpoint_filter_fn(state_dict: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """What timm calls before it loads weights: ours from anybody's names, or a CheckpointError."""
    state_dict, report = fit(state_dict, model, "pretrained weights")
    _logger.info("%s", report)
    return state_dict


def fit(
    state_dict: Mapping[str, Tensor],
    model: nn.Module,
    source: str,
    their_classes: Sequence[str] | None = None,
    classes: Sequence[str] | None = None,
    prefix: str | None = None,
) -> tuple[dict[str, Tensor], LoadReport]:
    """Rename and resize a state dict for ``model`` and check that it fills it.

    Args:
        state_dict: weights by anybody's names.
        model: a :class:`backbones.Pyramid` or a dense-prediction backbone over one.
        source: what the report and the error call them.
        their_classes: names of the outputs of the file's classifier, where they are known.
        classes: names of the outputs of the model's.
        prefix: what stands before the backbone's names; None finds it.

    Returns:
        The entries that fit, by the model's names, and the report of all.

    Raises:
        CheckpointError: a weight of the pyramid is missing, has another shape, or is not in it.
    """
    wanted = model.state_dict()
    own = backbone_of(state_dict, prefix, family_of(wanted))
    given = to_ours(own)
    classifier = _map_classifier(given, wanted, their_classes, classes)
    fitting, resized, wrong = {}, [], []
    for name, value in given.items():
        if name not in wanted:
            continue
        target = wanted[name]
        if value.shape != target.shape:
            value = _resize(model, name, value, target)
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
        elsewhere=len(state_dict) - len(own),
        classifier=classifier,
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


def backbone_of(
    state_dict: Mapping[str, Tensor], prefix: str | None = None, family: str | None = None
) -> dict[str, Tensor]:
    """The entries of the pyramid, whatever it is called inside the module that was saved.

    Args:
        state_dict: weights of a module with a backbone in it, or of a backbone.
        prefix: what stands before the backbone's names; None finds it.
        family: the family that is wanted, where a module holds backbones of several.

    Raises:
        CheckpointError: several backbones fit, or there is none under the prefix.
    """
    found = {}
    for name in state_dict:
        for anchor in ANCHORS:
            if _ends(name, anchor):
                before = name.removesuffix(anchor)
                found[before] = _below(state_dict, before)
    if prefix is not None:
        if prefix not in found:
            raise CheckpointError(
                f"no backbone under the prefix {prefix!r}; found: {_some(map(repr, found))}"
            )
        return found[prefix]
    if len(found) > 1:
        families = {before: family_of(own) for before, own in found.items()}
        ours = [before for before, kind in families.items() if kind is not None]
        same = [before for before in ours if families[before] == family]
        found = {before: found[before] for before in same or ours or found}
    if "" in found:
        return found[""]
    if len(found) > 1:
        raise CheckpointError(
            f"it holds {len(found)} backbones, under {', '.join(map(repr, found))}: name one by "
            "prefix=... of backbones.load_checkpoint, or write it to a file of its own by "
            "tools/convert_checkpoint.py --from-prefix"
        )
    return next(iter(found.values()), dict(state_dict))


def _below(state_dict: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    own = {k.removeprefix(prefix): v for k, v in state_dict.items() if k.startswith(prefix)}
    # MMPretrain's classifier stands beside its backbone, whose last norm is the classifier's.
    beside = prefix.removesuffix("backbone.") + "head.fc."
    if prefix.endswith("backbone.") and f"{beside}weight" in state_dict:
        own |= {f"head.fc.{k}": state_dict[beside + k] for k in ("weight", "bias")}
        own = {re.sub(r"^norm3\.", "norm.", k): v for k, v in own.items()}
    return own


def _pyramid_in(model: nn.Module) -> nn.Module:
    """The module whose names are a pyramid's: the model, or the one inside it."""
    anchor = ANCHORS[0]
    places = [name.removesuffix(anchor) for name in model.state_dict() if _ends(name, anchor)]
    if len(places) != 1:
        raise CheckpointError(
            f"{type(model).__name__} holds {len(places)} backbones of this package: one is needed"
        )
    found = model.get_submodule(places[0].rstrip("."))
    if any(parameter.is_meta for parameter in found.parameters()):
        raise CheckpointError(f"{type(model).__name__} is on the meta device: it holds no values")
    return found


def _ends(name: str, anchor: str) -> bool:
    return name == anchor or name.endswith(f".{anchor}")


def _map_classifier(
    given: dict[str, Tensor],
    wanted: Mapping[str, Tensor],
    theirs: Sequence[str] | None,
    ours: Sequence[str] | None,
) -> str:
    """Pick the rows of another set of classes by name; says what was done.

    Rows without a counterpart stay as the network has them. Where most have none the classifier is
    left out of ``given``.
    """
    if not all(name in given and name in wanted for name in _CLASSIFIER):
        return ""
    weight, target = given[_CLASSIFIER[0]], wanted[_CLASSIFIER[0]]
    if weight.shape[1:] != target.shape[1:]:
        return ""
    rows, outputs = len(weight), len(target)
    if rows != outputs:
        theirs, ours = theirs or _imagenet(rows), ours or _imagenet(outputs)
    if not theirs or not ours or tuple(theirs) == tuple(ours):
        return ""
    for names, count, whose in ((theirs, rows, "file"), (ours, outputs, "network")):
        if len(names) != count:
            raise CheckpointError(
                f"{len(names)} class names for the {count} outputs of the {whose}"
            )
    row_of = {name: row for row, name in enumerate(theirs)}
    found = [row for row, name in enumerate(ours) if name in row_of]
    if len(found) < outputs / 2:
        for name in _CLASSIFIER:
            del given[name]
        return f"left out: {len(found)} of its {outputs} classes are among the file's {rows}"
    rows_found = [row_of[ours[row]] for row in found]
    for name in _CLASSIFIER:
        value = wanted[name].clone()
        value[found] = given[name][rows_found].to(value)
        given[name] = value
    absent = [name for name in ours if name not in row_of]
    rest = f", {_some(absent)} not among them" if absent else ""
    return f"{len(found)} of {outputs} classes found among the file's {rows} by name{rest}"


def _imagenet(count: int) -> Sequence[str] | None:
    """The wnids of as many classes: sorted, as both ImageNets are."""
    subset = {1000: "imagenet-1k", 21841: "imagenet-22k"}.get(count)
    return ImageNetInfo(subset).label_names() if subset else None


def _resize(model: nn.Module, name: str, value: Tensor, target: Tensor) -> Tensor:
    """``value`` for another window, kernel, grid or number of image channels if it can be."""
    if name == "patch_embed.proj.weight" and value.shape[:2] == (target.shape[0], 3):
        return adapt_input_conv(target.shape[1], value)
    for place, module in model.named_modules():
        if isinstance(module, Mixer) and name.startswith(f"{place}."):
            return module.fit(name.removeprefix(f"{place}."), value)
    return value


def _guess(names: Mapping[str, Tensor]) -> str:
    """Which family and size a set of names looks like."""
    family = family_of(names)
    if family is None:
        return "no family of this package"
    width = len(names.get("patch_embed.proj.weight", ()))
    text = "\n".join(names)
    depths = [len(set(re.findall(rf"^stages\.{i}\.blocks\.(\d+)\.", text, re.M))) for i in range(4)]
    sizes = {size["embed_dim"]: name for name, size in SIZES.items()}
    size = sizes.get(width, "unknown size")
    return f"{family}_{size} (C={width}, depths {' '.join(map(str, depths))})"


def _stage(name: str) -> int | None:
    match = re.match(r"stages\.(\d+)\.", name)
    return int(match[1]) if match else None


def _some(names, count: int = 6) -> str:
    names = list(names)
    rest = f", and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + rest
