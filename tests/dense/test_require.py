"""What is missing is named with the command that installs it."""

from importlib import import_module, reload
from types import SimpleNamespace

import pytest

from dense import _check_backbones, require


@pytest.mark.parametrize(
    ("package", "way"),
    [
        ("nothing", r"nothing is not installed: run pip install 'dense-backbones\[export\]'$"),
        ("detectron2", r"detectron2 .*'dense-backbones\[export\]'; the README's section"),
        ("mmdet", r"mmdet is not installed: run pip install 'dense-backbones\[export\]'$"),
        ("mmseg", r"mmcv is not installed: run pip install mmcv-lite==2\.1\.0; the README's"),
    ],
)
def test_a_missing_package_is_named_with_its_command(package, way, monkeypatch):
    installed = {"mmseg"}
    monkeypatch.setattr("dense.find_spec", lambda name: name in installed or None)
    with pytest.raises(ImportError, match=way):
        require(package, "export")


@pytest.mark.parametrize("other", ["file", "namespace", None])
def test_another_package_of_the_name_is_named(tmp_path, monkeypatch, other):
    """PyPI has a package ``backbones`` too."""
    origin = str(tmp_path / "__init__.py") if other == "file" else None
    found = other and SimpleNamespace(origin=origin)
    monkeypatch.setattr("dense.find_spec", {"backbones": found}.__getitem__)
    with pytest.raises(ImportError) as refused:
        _check_backbones()
    where = f"the one in {origin} is of another project" if origin else "there is none"
    assert str(refused.value) == (
        f"dense needs the package backbones of dense-backbones; {where}: run pip uninstall "
        "backbones, then install dense-backbones again"
    )
    assert refused.value.name == "backbones"
    if origin:
        (tmp_path / "families.py").touch()
        _check_backbones()


def test_what_is_installed_is_enough(monkeypatch):
    monkeypatch.setattr("dense.find_spec", lambda name: name)
    for package in ("mmseg", "mmdet", "detectron2", "other"):
        require(package, "export")
    asked = []
    monkeypatch.setattr("dense.find_spec", lambda name: asked.append(name) or name)
    for package, names in (("mmdet", ["mmdet", "mmcv"]), ("mmcv", ["mmcv"])):
        require(package, "export")
        assert asked == names
        asked.clear()


@pytest.mark.parametrize(
    ("module", "framework", "extra"),
    [
        ("dense.segmentation", "mmengine", "segmentation"),
        ("dense.pretraining", "mmengine", "pretraining"),
        ("dense.openmmlab.mmdetection", "mmdet", "mmdetection"),
    ],
)
def test_an_import_without_its_framework_names_it(module, framework, extra, monkeypatch):
    pytest.importorskip(framework)
    imported = import_module(module)
    monkeypatch.setattr("dense.find_spec", lambda name: None if name == framework else True)
    with pytest.raises(ImportError, match=rf"^{framework} is not .*dense-backbones\[{extra}\]'"):
        reload(imported)


def test_a_predictor_without_its_framework_names_it(monkeypatch):
    pytest.importorskip("mmengine")
    from dense.segmentation import load_predictor

    monkeypatch.setattr("dense.find_spec", lambda name: None if name == "mmseg" else True)
    with pytest.raises(ImportError, match=r"^mmseg is not .*dense-backbones\[segmentation\]'"):
        load_predictor("config.py", "weights.pth")
