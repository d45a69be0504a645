"""A pytest plugin for timm's own ``tests/test_models.py``: its lists of names become ours."""

import timm

import backbones

_list_models = timm.list_models


def _ours(*_, include_tags: bool = False, **__) -> list[str]:
    """Our models, each with its tags of released weights if a test asks for tags."""
    names = _list_models(include_tags=include_tags)
    return [name for name in names if name.split(".")[0] in backbones.MODEL_NAMES]


# The file imports both names when pytest collects it, which is later.
timm.list_models = _ours
timm.list_pretrained = lambda *_, **__: []
