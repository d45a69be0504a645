"""The snippets of dense/export/README.md run, those of an engine without PyTorch."""

import re

import pytest

from dense.export import files
from tests.support import ROOT, run_without

PAGE = (ROOT / "dense/export/README.md").read_text()


def snippet(heading: str) -> str:
    return re.search(rf"^## {heading}.*?^```python\n(.*?)^```", PAGE, re.S | re.M)[1]


@pytest.mark.slow
@pytest.mark.parametrize("heading", ["ONNX Runtime", "OpenVINO"])
def test_without_pytorch(heading, segmentor_file, photos, tmp_path):
    pytest.importorskip("openvino")
    file = segmentor_file
    if heading == "OpenVINO":
        file = files.to_openvino(segmentor_file, tmp_path / "file.xml")[0]
    code = f"file, photo = {str(file)!r}, {str(photos / '0.png')!r}\n{snippet(heading)}"
    done = run_without(("torch", "timm", "backbones", "dense"), code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("(150, 200) ['")


@pytest.mark.slow
def test_pythons_api(segmentor_file):
    import numpy as np
    import torch

    names = {"file": segmentor_file, "image": np.zeros((1, 3, 40, 50), np.float32)}
    names["model"] = torch.nn.Conv2d(3, 2, 3).eval()
    exec(snippet("Python's API"), names)
    assert names["outputs"]["logits"].shape == (1, 3, 40, 50)
    assert names["program"].module()(torch.zeros(1, 3, 32, 40)).shape == (1, 2, 30, 38)
