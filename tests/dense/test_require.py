"""What is missing is named with the command that installs it."""

import pytest

from dense import require


@pytest.mark.parametrize(
    ("package", "way"),
    [
        ("nothing", r"nothing is not installed: run pip install 'dense-backbones\[export\]'$"),
        ("detectron2", r"detectron2 .*'dense-backbones\[export\]'; the README's section"),
        ("mmseg", r"mmcv is not installed: run pip install mmcv-lite==2\.1\.0; the README's"),
    ],
)
def test_a_missing_package_is_named_with_its_command(package, way, monkeypatch):
    installed = {"mmseg"}
    monkeypatch.setattr("dense.find_spec", lambda name: name in installed or None)
    with pytest.raises(ImportError, match=way):
        require(package, "export")
