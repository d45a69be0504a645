"""A new family is one file and one line of the table, and then does all that the others do."""

import shutil
from functools import partial

import pytest

pytest.importorskip("mmseg", reason="MMSegmentation is not installed")
pytest.importorskip("detectron2", reason="Detectron2 is not installed")

from tests.support import ROOT, run_bare, run_code

pytestmark = pytest.mark.slow

FILE = '''
"""A depth-wise 3x3 convolution between two linears, normalised by the block."""

from torch import nn

from backbones.mixers.base import Mixer


class Toy(Mixer):
    """Toy: a depth-wise 3x3 convolution."""

    marks = ("taps.weight",)

    def __init__(self, dim):
        super().__init__()
        self.before = nn.Linear(dim, dim)
        self.taps = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)

    def forward(self, x):
        return self.taps(self.before(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
'''
IMPORT = "from backbones.mixers import toy"
LINE = '    "toy": Family(toy.Toy),'

USE = """
import sys
from pathlib import Path

import backbones, timm, torch
from backbones import checkpoints, conversion, layouts

out = Path(sys.argv[1])
assert backbones.FAMILIES[-1] == "toy" and "toy_base" in backbones.MODEL_NAMES

# Trains, as a classifier.
torch.manual_seed(0)
model = timm.create_model("toy_nano", num_classes=5, drop_path_rate=0.1)
x = torch.randn(2, 3, 75, 64)
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
before = [p.detach().clone() for p in model.parameters()]
model(x).square().sum().backward()
optimizer.step()
assert all(not p.equal(old) for p, old in zip(model.parameters(), before))
weight = model.stages[0].blocks[0].mixer.before.weight
assert 0.015 < weight.std() < 0.025  # Swin's initialisation, by default

# Fuses.
model.eval()
with torch.no_grad():
    torch.testing.assert_close(backbones.fuse(model)(x), model(x), rtol=1e-4, atol=1e-5)

# Loads, into a classifier and a dense backbone; what does not fit is named by its family.
torch.save({"model": model.state_dict()}, out / "toy.pth")
other = timm.create_model("toy_nano", num_classes=5).eval()
report = backbones.load_checkpoint(other, out / "toy.pth")
assert not report.missing and other(x).equal(model(x))
try:
    backbones.load_checkpoint(timm.create_model("dw_conv_nano"), out / "toy.pth")
except backbones.CheckpointError as error:
    assert "looks like toy_nano" in str(error), error

# Converts to every layout that has names for it, which is ours.
assert conversion.convert_checkpoint(out / "toy.pth", out / "ours.pth", "ours").family == "toy"
try:
    conversion.convert_checkpoint(out / "toy.pth", out / "timm.pth", "timm")
    raise SystemExit("timm has no names for it")
except (ValueError, backbones.CheckpointError) as error:
    assert "toy" in str(error), error

# Counts.
from torch.utils.flop_counter import FlopCounterMode
from dense.analysis import complexity

counted = complexity.flops(timm.create_model("toy_nano", num_classes=5), (1, 3, 64, 64))
with FlopCounterMode(display=False) as counter, torch.no_grad():
    model(torch.randn(1, 3, 64, 64))
assert 0.9 < counter.get_total_flops() / 2 / counted < 1

# Exports.
exported = torch.export.export(model, (x,)).module()
torch.testing.assert_close(exported(x), model(x), rtol=1e-4, atol=1e-5)

# Plugs into both frameworks.
import dense.segmentation
from mmengine.registry import MODELS

maps = MODELS.build(dict(type="toy_nano", norm="BN", init=str(out / "toy.pth")))
maps.init_weights()
assert [m.shape[1] for m in maps(x)] == [32, 64, 128, 256]
assert maps.stages[0].blocks[0].mixer.before.weight.equal(weight)

from detectron2.config import get_cfg
from detectron2.modeling import build_backbone
from dense.detection import add_dense_config

cfg = get_cfg()
add_dense_config(cfg)
cfg.MODEL.BACKBONE.NAME = "toy_nano_fpn"
cfg.MODEL.FPN.IN_FEATURES = ["res2", "res3", "res4", "res5"]
assert set(build_backbone(cfg)(torch.randn(1, 3, 64, 64))) == {"p2", "p3", "p4", "p5", "p6"}
print("done")
"""


def test_one_file_and_one_line(tmp_path):
    for package in ("backbones", "dense"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("*pyc"))
    (tmp_path / "backbones/mixers/toy.py").write_text(FILE)
    table = tmp_path / "backbones/families.py"
    text = table.read_text().replace(
        "from backbones import mixers\n", f"{IMPORT}\nfrom backbones import mixers\n"
    )
    start = text.index("TABLE = {")
    end = text.index("\n}", start)
    table.write_text(f"{text[:end]}\n{LINE}{text[end:]}")
    done = run_bare(partial(run_code, USE, tmp_path, first=tmp_path), cwd=tmp_path)
    assert done.returncode == 0 and done.stdout.endswith("done\n"), done.stderr[-3000:]
