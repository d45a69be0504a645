"""The snippets of dense/export/README.md run, those of an engine without PyTorch."""

import re
import subprocess
import sys

import pytest

from dense.export import files
from tests.export.conftest import exported
from tests.support import ROOT, run_without

PAGE = (ROOT / "dense/export/README.md").read_text()


def snippet(heading: str, number: int = 0, language: str = "python") -> str:
    section = re.search(rf"^## {heading}.*?\n(.*?)(?:^## |\Z)", PAGE, re.S | re.M)[1]
    return re.findall(rf"^```{language}\n(.*?)^```", section, re.S | re.M)[number]


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
def test_a_detector_without_pytorch(detector_file, photos):
    from dense.export.predictor import load_predictor
    from dense.images import read_image

    code = f"file, photo = {str(detector_file)!r}, {str(photos / '0.png')!r}\n"
    imports = snippet("ONNX Runtime").split("\n\n")[0]
    code += f"{imports}\n{snippet('ONNX Runtime', 1)}"
    done = run_without(("torch", "timm", "backbones", "dense", "detectron2"), code)
    assert done.returncode == 0, done.stderr
    found = load_predictor(detector_file)(read_image(photos / "0.png"))
    names = [found["class_names"][index] for index in found["classes"]]
    lines = done.stdout.splitlines()
    assert len(names) > 5 and [line.split()[0] for line in lines] == names
    boxes = [[int(v) for v in re.search(r"\((.*)\)", line)[1].split(",")] for line in lines]
    assert abs(boxes - found["boxes"]).max() < 1
    areas = [int(line.split()[-2]) for line in lines]
    for ours, mask in zip(areas, found["masks"], strict=True):
        assert ours == pytest.approx(mask.sum(), rel=0.2, abs=100)


@pytest.mark.slow
def test_pythons_api(segmentor_file):
    import numpy as np
    import torch

    names = {"file": segmentor_file, "image": np.zeros((1, 3, 40, 50), np.float32)}
    names["model"] = torch.nn.Conv2d(3, 2, 3).eval()
    exec(snippet("Python's API"), names)
    assert names["outputs"]["logits"].shape == (1, 3, 40, 50)
    assert names["program"].module()(torch.zeros(1, 3, 32, 40)).shape == (1, 2, 30, 38)


@pytest.mark.e2e
def test_in_cpp(classifier, photos, tmp_path):
    """Compiled by the page's command, run without Python on an image of odd sides."""
    import numpy as np
    import torch
    from PIL import Image

    from dense.export.checking import normalised
    from dense.export.sources import read_source

    package = exported(classifier, photos, tmp_path, "aotinductor")
    (tmp_path / "classify.cpp").write_text(snippet("LibTorch", language="cpp"))
    command = snippet("LibTorch", language="sh").replace("$(python ", f"$({sys.executable} ")
    subprocess.run(command, shell=True, check=True, cwd=tmp_path)
    pixels = np.asarray(Image.open(photos / "1.png"))[:97, :131]
    (tmp_path / "pixels").write_bytes(pixels.tobytes())
    words = [tmp_path / "classify", package, tmp_path / "pixels", "97", "131"]
    done = subprocess.run(words, capture_output=True, text=True, env={}, check=True)
    best, *logits = map(float, done.stdout.split())
    source = read_source(classifier)
    with torch.no_grad():
        (expected,) = source.network(torch.from_numpy(normalised(pixels, source.about)))
    assert best == expected.argmax()
    np.testing.assert_allclose(logits, expected[0], atol=1e-4 * float(expected.abs().max()))
    few = subprocess.run([*words[:3], "970", "131"], capture_output=True, text=True, env={})
    assert few.returncode == 1 and "holds fewer pixels" in few.stderr
