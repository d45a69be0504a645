"""Load a checkpoint into a network: find the backbone, rename, resize, check and report.

A file holds a bare state dict or a training checkpoint, of a backbone, a classifier, a detector or
a segmentor, in any of :data:`backbones.layouts.LAYOUTS`. Entries that are missing, left over or of
another shape raise an error; only the classifier and the norms after the stages are optional.
"""

import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from timm.data import ImageNetInfo
from timm.models import adapt_input_conv
from timm.models.twins import Twins
from timm.models.volo import VOLO
from torch import Tensor, nn

from backbones.families import SIZES, TABLE
from backbones.layouts import ANCHORS, family_of, to_ours
from backbones.mixers import Mixer
from backbones.mixers.norm import CenteredBatchNorm2d
from backbones.reading import CheckpointError, read_with_classes

_logger = logging.getLogger(__name__)

_22K = 21841
# Entries that a file may lack, or have in excess: no stage depends on them.
_OPTIONAL = re.compile(r"^(norm|norms\.\d+|head(\.fc)?)\.|num_batches_tracked$")
_CLASSIFIER = ("head.fc.weight", "head.fc.bias")
# Entries of the parts that options add to a family.
_ADDED = {
    r"\.se\.": "se_ratio",
    r"\.local\.": "local_kernel",
    r"\.center$": "norm_layer='centered_batchnorm'",
    r"\.mixer\.theta$": "conv='static'",
    r"\.mixer\.post$": "conv='post'",
    r"\.mixer\.pre\.": "conv='pre' or another pre-convolution",
}
# What entries tell of a model's options.
_OPTIONS = _ADDED | {r"\.mixer\.kernels$": "num_heads"}


@dataclass(frozen=True)
class LoadReport:
    """Which entries of a checkpoint were loaded; names are those of the network's state dict.

    Attributes:
        source: the file or URL.
        matched: loaded entries, including the resized ones.
        missing: entries of the network that the file lacks.
        unexpected: entries of the file's backbone that the network lacks.
        resized: entries resized to another window, kernel, window grid or number of image channels.
        elsewhere: number of entries of the file outside its backbone, such as a detector's heads.
        classifier: how the classifier's rows were matched by class name; empty if unchanged.
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
            lines.append(f"  {self.elsewhere} entries outside the backbone were ignored")
        return "\n".join(lines)


def load_checkpoint(
    model: nn.Module,
    source: str | Path,
    *,
    classes: Sequence[str] | None = None,
    prefix: str | None = None,
    partial: bool = False,
    weights_only: bool = True,
) -> LoadReport:
    """Load a checkpoint into the backbone of a model, in place.

    >>> report = backbones.load_checkpoint(model, "pretrained.pth")

    Args:
        model: a :class:`backbones.Pyramid`, or any module that contains one backbone of this
            package: timm's ``features_only`` wrapper, DDP, a detector, a segmentor. Or one of
            :mod:`backbones.hosts`, which takes the file of timm's model too: its replaced mixers,
            reported as missing, then keep their weights.
        source: a ``.pth`` or ``.safetensors`` file, or a URL.
        classes: class names of the model's classifier, to pick its rows from a file with other
            classes; None takes ImageNet's sorted wnids for 1000 or 21841 outputs. The same wnids
            stand for a file without class names, for Swin's 21841 in the order of Swin's list.
        prefix: prefix of the backbone's names in a file with several backbones; None finds it.
        partial: also accept a file that lacks the parts which an option of the model adds to its
            family, such as squeeze-excitation (``se_ratio``): the model keeps its own weights
            there, and the report and a warning name them. All else must be there and fit.
        weights_only: False also unpickles unsafe files, which can run code: only for trusted files.

    Returns:
        The report, which is also logged.

    Raises:
        CheckpointError: the file cannot be read, is unsafe to unpickle, or does not fit. The model
            is unchanged then.
    """
    given, their_classes = read_with_classes(source, weights_only=weights_only)
    if not isinstance(model, VOLO | Twins):
        model = _pyramid_in(model)
    fitting, report = fit(given, model, str(source), their_classes, classes, prefix, partial)
    model.load_state_dict(fitting, strict=False)
    _logger.info("%s", report)
    return report


def checkpoint_filter_fn(state_dict: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """timm's ``checkpoint_filter_fn``: convert a state dict of any layout to ours, or raise."""
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
    partial: bool = False,
) -> tuple[dict[str, Tensor], LoadReport]:
    """Rename and resize a state dict for ``model``, and check that it is complete.

    Args:
        state_dict: weights in any layout.
        model: a :class:`backbones.Pyramid`, a ``DenseBackbone``, or a network of
            :mod:`backbones.hosts`.
        source: the name of the weights in the report and in errors.
        their_classes: class names of the file's classifier, if known.
        classes: class names of the model's classifier, if known.
        prefix: prefix of the backbone's names; None finds it.
        partial: accept that parts are missing which an option adds to a family, with a warning.

    Returns:
        The entries to load, by the model's names, and the report.

    Raises:
        CheckpointError: a weight is missing, unexpected or of a shape that cannot be resized.
    """
    if isinstance(model, VOLO | Twins):
        return _fit_host(state_dict, model, source, their_classes, classes)
    wanted = model.state_dict()
    own = backbone_of(state_dict, prefix, family_of(wanted))
    given = _adapted(to_ours(own), model)
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
    _refuse_partial(report, wrong, given, wanted, partial)
    return fitting, report


def _fit_host(
    state_dict: Mapping[str, Tensor],
    model: nn.Module,
    source: str,
    their_classes: Sequence[str] | None,
    classes: Sequence[str] | None,
) -> tuple[dict[str, Tensor], LoadReport]:
    """:func:`fit` for timm's VOLO or Twins, whose ``replaced_mixers`` may all be missing.

    A classifier of other classes is left out.
    """
    wanted = model.state_dict()
    found = _prefixes(state_dict, [next(iter(wanted))])
    before = found[0] if len(found) == 1 else ""
    given = {k.removeprefix(before): v for k, v in state_dict.items() if k.startswith(before)}
    ours = tuple(f"{name}." for name in getattr(model, "replaced_mixers", ()))
    classifier = tuple(f"{name}." for name in _classifiers(model))
    whole = all(
        n in given and given[n].shape == wanted[n].shape for n in wanted if n.startswith(ours)
    )
    other_classes = bool(their_classes and classes and tuple(their_classes) != tuple(classes))
    fitting, wrong, unexpected = {}, [], []
    for name, value in given.items():
        if name.startswith(ours) and not whole:
            continue
        if name not in wanted:
            unexpected.append(name)
            continue
        target = wanted[name]
        if name == f"{model.pretrained_cfg['first_conv']}.weight" and value.shape[1] == 3:
            value = adapt_input_conv(target.shape[1], value)
        if name.startswith(classifier) and (other_classes or value.shape != target.shape):
            continue
        if value.shape == target.shape:
            fitting[name] = value
        else:
            wrong.append(f"{name} {tuple(value.shape)} instead of {tuple(target.shape)}")
    missing = [n for n in wanted if n not in fitting]
    report = LoadReport(
        source=source,
        matched=tuple(fitting),
        missing=tuple(missing),
        unexpected=tuple(unexpected),
        resized=(),
        elsewhere=len(state_dict) - len(given),
        classifier="left out: the file has other classes" if other_classes else "",
    )
    excused = (*classifier, *(() if whole else ours))
    lacking = [n for n in missing if not n.startswith(excused) and not _OPTIONAL.search(n)]
    if wrong or lacking or unexpected:
        kind = type(model).__name__
        lines = [f"{source} does not fit {kind}: {len(fitting)} of {len(wanted)} entries match."]
        lines += _lines(shape=wrong, missing=lacking, unexpected=unexpected)
        raise CheckpointError("\n".join(lines))
    if ours and not whole:
        _logger.warning("%s has no weights of the replaced mixers: %s", source, _some(ours))
    return fitting, report


def _classifiers(model: nn.Module) -> tuple[str, ...]:
    names = model.pretrained_cfg["classifier"]
    return (names,) if isinstance(names, str) else tuple(names)


def _lines(**kinds: Sequence[str]) -> list[str]:
    """A line of an error message for each kind of entries that is not empty."""
    return [f"  {kind}: {_some(names)}" for kind, names in kinds.items() if names]


def _refuse_partial(
    report: LoadReport, wrong: list[str], given: Mapping, wanted: Mapping, partial: bool
) -> None:
    shapes = {entry.split()[0] for entry in wrong}
    missing = [n for n in report.missing if n not in shapes and not _OPTIONAL.search(n)]
    added = [n for n in missing if any(re.search(sign, n) for sign in _ADDED)] if partial else []
    missing = [n for n in missing if n not in added]
    # A backbone with few out_indices is built without the later stages.
    last = max(map(_stage, wanted))
    unexpected = [n for n in report.unexpected if not _OPTIONAL.search(n) and _stage(n) <= last]
    if not (wrong or missing or unexpected):
        if added:
            _logger.warning("%s lacks %s: the model keeps its own", report.source, _some(added))
        return
    lines = [
        f"{report.source} does not fit: {len(report.matched)} of {len(wanted)} entries match. "
        f"It looks like {_guess(given)}, the network like {_guess(wanted)}."
    ]
    lines += _lines(shape=wrong, missing=missing, unexpected=unexpected)
    raise CheckpointError("\n".join(lines))


def backbone_of(
    state_dict: Mapping[str, Tensor], prefix: str | None = None, family: str | None = None
) -> dict[str, Tensor]:
    """Select the backbone's entries of a state dict and strip their prefix.

    Args:
        state_dict: weights of a backbone, or of a module that contains one.
        prefix: prefix of the backbone's names; None finds it.
        family: the preferred family if there are several backbones.

    Raises:
        CheckpointError: several backbones match, or none has the prefix.
    """
    found = {before: _below(state_dict, before) for before in _prefixes(state_dict, ANCHORS)}
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
            f"the checkpoint holds {len(found)} backbones, under {', '.join(map(repr, found))}: "
            "choose one with prefix=... of backbones.load_checkpoint, or extract it with "
            "tools/convert_checkpoint.py --from-prefix"
        )
    return next(iter(found.values()), dict(state_dict))


def _below(state_dict: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    own = {k.removeprefix(prefix): v for k, v in state_dict.items() if k.startswith(prefix)}
    # MMPretrain's classifier is outside its backbone, and norm3 of the backbone is our final norm.
    beside = prefix.removesuffix("backbone.") + "head.fc."
    if prefix.endswith("backbone.") and f"{beside}weight" in state_dict:
        own |= {f"head.fc.{k}": state_dict[beside + k] for k in ("weight", "bias")}
        own = {re.sub(r"^norm3\.", "norm.", k): v for k, v in own.items()}
    return own


def _pyramid_in(model: nn.Module) -> nn.Module:
    """The only backbone of this package in ``model``, which may be ``model`` itself."""
    places = _prefixes(model.state_dict(), ANCHORS[:1])
    if len(places) != 1:
        raise CheckpointError(
            f"{type(model).__name__} holds {len(places)} backbones of this package, not one"
        )
    found = model.get_submodule(places[0].rstrip("."))
    if any(parameter.is_meta for parameter in found.parameters()):
        raise CheckpointError(f"{type(model).__name__} is on the meta device: it holds no values")
    return found


def _prefixes(names: Iterable[str], anchors: Sequence[str]) -> list[str]:
    """What stands before an anchor in each name that ends with one."""
    return [n.removesuffix(a) for n in names for a in anchors if f".{n}".endswith(f".{a}")]


def _map_classifier(
    given: dict[str, Tensor],
    wanted: Mapping[str, Tensor],
    theirs: Sequence[str] | None,
    ours: Sequence[str] | None,
) -> str:
    """Pick the classifier's rows in ``given`` by class name; returns a description for the report.

    Classes that the file lacks keep the network's rows. If the file lacks more than half of them,
    the classifier is removed from ``given``.
    """
    if not all(name in given and name in wanted for name in _CLASSIFIER):
        return ""
    weight, target = given[_CLASSIFIER[0]], wanted[_CLASSIFIER[0]]
    if weight.shape[1:] != target.shape[1:]:
        return ""
    rows, outputs = len(weight), len(target)
    if rows != outputs:
        ours = ours or imagenet_classes(outputs)
    if ours and not theirs:
        theirs = imagenet_classes(rows, family_of(given))
        if rows == outputs and theirs and set(theirs).isdisjoint(ours):
            return ""
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


def imagenet_classes(count: int, family: str | None = None) -> Sequence[str] | None:
    """The wnids of ImageNet-1K or ImageNet-22K, chosen by the number of classes.

    They are sorted, except for Swin's ImageNet-22K. Its list is Google's sorted list of 21843
    classes, two of which have no images: the last two classes take their places.
    """
    if count == _22K and family == "swin":
        names = list(ImageNetInfo("imagenet-21k-goog").label_names())
        names[9205], names[15027] = names[_22K:]
        return names[:_22K]
    subset = {1000: "imagenet-1k", _22K: "imagenet-22k"}.get(count)
    return ImageNetInfo(subset).label_names() if subset else None


def _adapted(given: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Entries of another form of a mixer or norm, by the names of the form that the model has."""
    for place, module in model.named_modules():
        if isinstance(module, Mixer | CenteredBatchNorm2d):
            own = {k: v for k, v in given.items() if k.startswith(f"{place}.")}
            entries = module.adapt({k.removeprefix(f"{place}."): v for k, v in own.items()})
            given = {k: v for k, v in given.items() if k not in own}
            given |= {f"{place}.{k}": v for k, v in entries.items()}
    return given


def _resize(model: nn.Module, name: str, value: Tensor, target: Tensor) -> Tensor:
    """``value`` in the shape of ``target``, or unchanged if it cannot be resized."""
    if name == "patch_embed.proj.weight" and value.shape[:2] == (target.shape[0], 3):
        return adapt_input_conv(target.shape[1], value)
    for place, module in model.named_modules():
        if isinstance(module, Mixer) and name.startswith(f"{place}."):
            return module.fit(name.removeprefix(f"{place}."), value)
    return value


def _guess(names: Mapping[str, Tensor]) -> str:
    """The family and size that a state dict looks like, for the error message."""
    family = family_of(names)
    if family is None:
        return "no family of this package"
    width = len(names.get("patch_embed.proj.weight", ()))
    text = "\n".join(names)
    depths = [len(set(re.findall(rf"^stages\.{i}\.blocks\.(\d+)\.", text, re.M))) for i in range(4)]
    # Tiny and small are as wide: where the depths are nobody's, the first of them.
    alike = [name for name, size in SIZES.items() if size["embed_dim"] == width]
    same = [name for name in alike if list(SIZES[name]["depths"]) == depths]
    size = next(iter(same or alike), "unknown size")
    said = [f"C={width}", f"depths {' '.join(map(str, depths))}", *_guess_options(names, family)]
    return f"{family}_{size} ({', '.join(said)})"


def _guess_options(names: Mapping[str, Tensor], family: str) -> list[str]:
    """Where a state dict differs from its family's, and the heads that its bias tables tell."""
    text, mixer = "\n".join(names), TABLE[family].mixer
    found = [option for sign, option in _OPTIONS.items() if re.search(sign, text, re.M)]
    has_batch_norm = ".norm2.running_var" in text
    if ".center" not in text and has_batch_norm != (mixer.norm_layer is nn.BatchNorm2d):
        found.append(f"norm_layer='{'batchnorm' if has_batch_norm else 'layernorm'}'")
    first = r"stages\.\d\.blocks\.0\.mixer\.relative_position_bias_table"
    if heads := [str(t.shape[-1]) for n, t in names.items() if re.fullmatch(first, n)]:
        found.append(f"heads {' '.join(heads)}")
    elif "qkv.weight" in mixer.marks:
        found.append("position_bias=False")
    return found


def _stage(name: str) -> int:
    """The stage index in an entry's name, -1 outside the stages."""
    match = re.match(r"stages\.(\d+)\.", name)
    return int(match[1]) if match else -1


def _some(names: Iterable[str]) -> str:
    names = list(names)
    rest = f", and {len(names) - 6} more" if len(names) > 6 else ""
    return ", ".join(names[:6]) + rest
