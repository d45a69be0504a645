"""Table 13's hosts as timm models: VOLO-d1 and Twins-SVT-S with our mixers in place of theirs.

Classifiers only. All but the replaced mixers is timm's, the norm before them included, and takes
the weights of timm's own model.

>>> import backbones, timm
>>> model = timm.create_model("volo_d1_dw_conv", num_classes=10)
"""

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial

import timm
from timm.models import (
    build_model_with_cfg,
    generate_default_cfgs,
    get_pretrained_cfg,
    register_model,
)
from timm.models.twins import LocallyGroupedAttn
from torch import Tensor, nn

from backbones.checkpoints import fit
from backbones.layers import Size
from backbones.mixers import DepthwiseConv, Mixer, WindowAttention

_logger = logging.getLogger(__name__)

# The names of the replaced mixers, and what replaces each.
Replacements = Iterator[tuple[str, nn.Module]]


class TokenMixer(nn.Module):
    """A mixer of maps in a network of tokens.

    Args:
        mixer: ``(B, H, W, C)`` to ``(B, H, W, C)``.
    """

    def __init__(self, mixer: nn.Module):
        super().__init__()
        self.mixer = mixer

    def forward(self, x: Tensor, size: Size) -> Tensor:
        """``(B, H*W, C)`` to ``(B, H*W, C)``; ``size`` is H and W."""
        return self.mixer(x.unflatten(1, size)).flatten(1, 2)


def _local_attention_for_outlookers(model: nn.Module) -> Replacements:
    for i, block in enumerate(model.network[0]):
        dim = block.norm1.normalized_shape[0]
        mixer = WindowAttention(dim, block.attn.num_heads, 7, shifted=i % 2 == 1)
        yield f"network.0.{i}.attn", mixer


def _dw_conv_for_outlookers(model: nn.Module) -> Replacements:
    for i, block in enumerate(model.network[0]):
        yield f"network.0.{i}.attn", DepthwiseConv(block.norm1.normalized_shape[0], 7)


def _dw_conv_for_local_groups(model: nn.Module) -> Replacements:
    for name, module in model.named_modules():
        if isinstance(module, LocallyGroupedAttn):
            yield name, TokenMixer(DepthwiseConv(module.dim, module.ws))


@dataclass(frozen=True)
class Host:
    """A host with its mixers replaced.

    Attributes:
        name: timm's name of the host.
        doc: the entry point's docstring.
        replacements: the new mixers, by the names of those that they replace.
        maps: how many maps timm's host gives as ``features_only``.
    """

    name: str
    doc: str
    replacements: Callable[[nn.Module], Replacements]
    maps: int = 3


HOSTS = {
    "volo_d1_local_attention": Host(
        "volo_d1_224",
        "VOLO-d1 with Swin's 7x7 window attention in place of Outlooker's attention (Table 13).",
        _local_attention_for_outlookers,
    ),
    "volo_d1_dw_conv": Host(
        "volo_d1_224",
        "VOLO-d1 with DW-Conv, 7x7, in place of Outlooker's attention (Table 13).",
        _dw_conv_for_outlookers,
    ),
    "twins_svt_small_dw_conv": Host(
        "twins_svt_small",
        "Twins-SVT-S with DW-Conv, 7x7, in place of its local attention (Table 13).",
        _dw_conv_for_local_groups,
        maps=4,
    ),
}
HOST_NAMES = tuple(HOSTS)

# The host's weights; the replaced mixers keep random ones.
default_cfgs = generate_default_cfgs(
    {
        name: replace(get_pretrained_cfg(host.name), architecture=None, tag=None)
        for name, host in HOSTS.items()
    }
)


def build(host: Host, **kwargs) -> nn.Module:
    """Build timm's network and replace its mixers, whose names become ``replaced_mixers``.

    Args:
        host: a value of :data:`HOSTS`.
        **kwargs: arguments of timm's model, such as ``num_classes`` and ``drop_path_rate``.
    """
    model = timm.create_model(host.name, **kwargs)
    # After construction: the hosts initialise all their linears and convolutions alike.
    replacements = dict(host.replacements(model))
    for name, mixer in replacements.items():
        for module in mixer.modules():
            if isinstance(module, Mixer):
                module.init_weights()
        model.set_submodule(name, mixer)
    model.replaced_mixers = tuple(replacements)
    return model


def _filter(state_dict: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """timm's ``checkpoint_filter_fn``; the replaced mixers keep what they have."""
    fitting, report = fit(state_dict, model, "pretrained weights")
    _logger.info("%s", report)
    return model.state_dict() | fitting


def _register(name: str, host: Host) -> None:
    def entry(pretrained: bool = False, **kwargs) -> nn.Module:
        return build_model_with_cfg(
            partial(build, host),
            name,
            pretrained,
            pretrained_filter_fn=_filter,
            feature_cfg=dict(out_indices=host.maps, feature_cls="getter"),
            **kwargs,
        )

    entry.__name__ = entry.__qualname__ = name
    entry.__module__ = __name__
    entry.__doc__ = host.doc
    globals()[name] = register_model(entry)


for _name, _host in HOSTS.items():
    _register(_name, _host)
