"""Counts against the paper's tables, equations and MMDetection; the READMEs against the counts."""

import importlib.util
import json

import pytest
import timm
import torch
import torch.nn.functional as F
from fvcore.nn import FlopCountAnalysis
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

pytest.importorskip("fvcore", reason="fvcore, which counts FLOPs, is not installed")

from backbones import MODEL_NAMES, mixers, ops
from dense.analysis import complexity, paper
from dense.analysis import complexity_tables as tables
from dense.recipes import RECIPES
from tests.support import ROOT, load_tool, run_tool

NANO = [name for name in MODEL_NAMES if name.endswith("nano")]


NO_READING = {
    "`dw_conv_positions_own`": -0.1,
    "`dw_conv_channels_shared`": 0.1,
    "`i_d_dw_conv_local`": -1,
}


def relative(count, published):
    return count / 1e9 / published - 1


def needs(section):
    if section not in tables.installed():
        pytest.skip(f"{tables.SECTIONS[section].package} is not installed")


@pytest.mark.parametrize("name", paper.TABLE_2)
def test_flops_are_the_papers(name):
    assert abs(relative(complexity.classifier(name).flops, paper.TABLE_2[name].flops)) < 0.02


@pytest.mark.parametrize("name, window", paper.TABLE_14)
def test_flops_at_384_are_the_papers(name, window):
    flops = complexity.classifier(name, 384, window).flops
    assert abs(relative(flops, paper.TABLE_14[name, window].flops)) < 0.02


C, H, W, HEADS, GROUPS = 64, 14, 21, 4, 32
POSITIONS = H * W
PREDICTED = C // 4
# By the paper's equations, in multiply-adds. fvcore counts two a number for a batch norm.
MIXERS = {
    "attention": (
        lambda: mixers.WindowAttention(C, HEADS),
        POSITIONS * (4 * C * C + 2 * 49 * C),
    ),
    "local MLP": (
        lambda: mixers.LocalMLP(C, HEADS, 7, False, (H, W), True),
        POSITIONS * (2 * C * C + 49 * C),
    ),
    "DW": (
        lambda: mixers.DepthwiseConv(C),
        POSITIONS * (2 * C * C + 49 * C + 6 * C),
    ),
    "D-DW": (
        lambda: mixers.DynamicDepthwiseConv(C),
        POSITIONS * (2 * C * C + 49 * C + 6 * C) + PREDICTED * (C + 2 + 49 * C),
    ),
    "I-D-DW": (
        lambda: mixers.InhomogeneousDynamicDepthwiseConv(C),
        POSITIONS * (2 * C * C + 49 * C + 6 * C + PREDICTED * (C + 2 + 49 * GROUPS)),
    ),
}


class ChannelsFirst(nn.Module):
    def __init__(self, mixer):
        super().__init__()
        self.mixer = mixer

    def forward(self, x):
        return self.mixer(x.permute(0, 2, 3, 1))


@pytest.mark.parametrize("kind", MIXERS)
def test_mixers_cost_what_their_equations_say(kind):
    build, expected = MIXERS[kind]
    assert complexity.flops(ChannelsFirst(build()), (1, C, H, W)) == expected


def test_counting_leaves_the_operators_alone():
    before = [getattr(ops, name) for name in ops.__all__]
    complexity.flops(ChannelsFirst(MIXERS["DW"][0]()), (1, C, 7, 7))
    with pytest.raises(RuntimeError):
        complexity.flops(nn.Conv2d(5, 5, 3), (1, 4, 8, 8))
    assert [getattr(ops, name) for name in ops.__all__] == before


def test_equal_looking_models_are_told_apart():
    """A window is in no printed name; both are counted, and a second time from memory."""
    seven, twelve = (complexity.classifier("swin_nano", 96, window) for window in (7, 12))
    assert seven.flops != twelve.flops
    assert complexity.classifier("swin_nano", 96, 7) == seven


def test_fused_attention_is_counted():
    class Attention(nn.Module):
        def forward(self, q):
            return F.scaled_dot_product_attention(q, q, q)

    assert complexity.flops(Attention(), (2, 3, 10, 8)) == 2 * 3 * 10 * 10 * 8 * 2


def test_what_pytorchs_counter_leaves_out_is_counted_as_by_fvcore():
    class Everything(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 8, 3, padding="same"), nn.BatchNorm2d(8)
            self.gn, self.ln = nn.GroupNorm(2, 8), nn.LayerNorm(8)
            self.linear = nn.Linear(8, 5)

        def forward(self, x):
            x = self.gn(self.bn(self.conv(x)))
            x = F.interpolate(x, scale_factor=2.0, mode="nearest")
            x = F.interpolate(x, size=(9, 11), mode="bilinear", align_corners=False)
            x = F.adaptive_avg_pool2d(x, 3) + F.adaptive_avg_pool2d(x, 1) + x.mean()
            return self.linear(self.ln(x.permute(0, 2, 3, 1))).mean((1, 2))

    model = Everything().eval()
    theirs = FlopCountAnalysis(model, torch.zeros(2, 3, 6, 7)).unsupported_ops_warnings(False)
    theirs.set_op_handle("aten::_convolution_mode", lambda *_: 2 * 6 * 7 * 8 * 3 * 9)
    assert complexity.flops(model, (2, 3, 6, 7)) == theirs.total()


@pytest.fixture(scope="module")
def built():
    """A section's tables, parameters only, built once."""
    done = {}

    def build(section):
        needs(section)
        if section not in done:
            done[section] = tables.SECTIONS[section].build(ROOT, False, iter)
        return done[section]

    return build


@pytest.mark.slow
@pytest.mark.parametrize("section", tables.SECTIONS)
def test_parameters_are_exactly_the_papers(section, built):
    rows = [row for table in built(section) for row in table.rows]
    beside = [row for row in rows if row["paper_parameters"]]
    assert len(beside) == {"backbones": 14, "ablations": 18}.get(section, 12)
    differ = {row["name"]: row["parameters_off"] for row in beside if row["parameters_off"] != 0}
    # Below the table stands that no reading of the paper gives these.
    assert differ == (NO_READING if section == "ablations" else {})


@pytest.mark.slow
def test_detectron2_differs_from_the_paper_by_two_things(built):
    """Its own parameters and those two are, to the last one, what MMDetection's cascade has."""
    (ours,), (papers,) = built("detection"), built("mmdetection")
    exact = {row["name"].partition("]")[0]: row["parameters"] for row in papers.rows}
    full_size = [row for row in ours.rows if row["pretraining"] != "-"]
    assert len(full_size) == 15
    for row in full_size:
        assert row["parameters"] == exact[row["name"].partition("]")[0]] > row["own_parameters"]
    named = "\n".join(ours.notes)
    assert "two more mask heads: 5.29M" in named and "a box for each class: 0.97M" in named


def test_tables_10_and_11_repeat_tables_2_and_3():
    """From 22K nothing but the accuracy changes."""
    for first, again in (
        (paper.TABLE_2, paper.TABLE_10),
        (paper.TABLE_3_DETECTION, paper.TABLE_11_DETECTION),
        (paper.TABLE_3_SEGMENTATION, paper.TABLE_11_SEGMENTATION),
    ):
        assert all(first[name][:2] == figures[:2] for name, figures in again.items())


def detectors(backbone):
    recipe = "fpn_8xb2-amp-ms-crop-3x_coco"
    return (
        RECIPES / f"detection/cascade_mask_rcnn_{backbone}_3x_coco.py",
        RECIPES / f"mmdetection/cascade-mask-rcnn_{backbone}_{recipe}.py",
    )


@pytest.mark.e2e
@pytest.mark.parametrize("backbone", paper.TABLE_3_DETECTION)
def test_flops_of_detectors_and_segmentors_are_the_papers(backbone):
    for section in ("detection", "mmdetection", "segmentation"):
        needs(section)
    ours, papers = detectors(backbone)
    count, more = complexity.detectron2_detector(ours)
    exact = complexity.mmdet_detector(papers)
    assert sum(more.values(), count) == exact
    assert abs(relative(exact.flops, paper.TABLE_3_DETECTION[backbone].flops)) < 0.02
    config = RECIPES / f"segmentation/{backbone}_upernet_8xb2-160k_ade20k-512x512.py"
    flops = complexity.segmentor(config).flops
    assert abs(relative(flops, paper.TABLE_3_SEGMENTATION[backbone].flops)) < 0.02


def cells(markdown):
    lines = [line.strip("|").split("|") for line in markdown.splitlines() if line[:1] == "|"]
    return [[cell.strip() for cell in line] for line in lines]


@pytest.mark.slow
@pytest.mark.parametrize("section", tables.SECTIONS)
def test_the_readmes_tables_are_current(section, built):
    """Everything but the FLOPs, which are only looked at for being there."""
    readme, tool = ROOT / tables.SECTIONS[section].readme, tables.SECTIONS[section].tool
    fresh = cells(tables.block(built(section), tool))
    written = cells(tables.read_block(readme, tool))
    assert len(written) == len(fresh)
    for there, counted in zip(written, fresh, strict=True):
        assert [a for a, b in zip(there, counted, strict=True) if b != "?"] == [
            b for b in counted if b != "?"
        ], f"{readme}: python tools/complexity.py --write"
        assert "?" not in there


@pytest.mark.parametrize("name", NANO)
def test_the_readmes_flops_of_the_smallest_are_current(name):
    written = cells(tables.read_block(ROOT / "backbones/README.md"))
    row = next(row for row in written if row[0] == f"`{name}`")
    assert f"{complexity.classifier(name).flops / 1e9:.2f}G" in row


SMALLEST = {
    "backbones": ("`dw_conv_nano`", "`swin_tiny`"),
    "ablations": ("`swin_sliding`",),
    "detection": ("[dw_conv_nano](cascade_mask_rcnn_dw_conv_nano.py)",),
    "mmdetection": ("[i_d_dw_conv_nano](cascade-mask-rcnn_i_d_dw_conv_nano_fpn.py)",),
    "segmentation": ("[dw_conv_nano](dw_conv_nano_upernet.py)",),
}


@pytest.mark.slow
@pytest.mark.parametrize("section", SMALLEST)
def test_the_readmes_rows_of_the_smallest_are_current(section, monkeypatch):
    """With FLOPs: of a network or config of each section, and of one at 384x384."""
    needs(section)
    found, tracked = tables._configs, []
    monkeypatch.setattr(
        tables,
        "_configs",
        lambda folder: [c for c in found(folder) if c[0].name in SMALLEST[section][0]],
    )
    rows = dict.fromkeys(["swin_sliding"], tables.ABLATIONS["swin_sliding"])
    monkeypatch.setattr(tables, "ABLATIONS", rows)
    monkeypatch.setattr(
        tables, "MODEL_NAMES", ("dw_conv_nano",) if section == "backbones" else MODEL_NAMES
    )
    monkeypatch.setattr(paper, "TABLE_14", {("swin_tiny", 12): paper.TABLE_14["swin_tiny", 12]})
    fresh = tables.SECTIONS[section].build(ROOT, True, lambda items: tracked.append(1) or items)
    assert len(tracked) == len(fresh) == len(SMALLEST[section])
    written = cells(
        tables.read_block(ROOT / tables.SECTIONS[section].readme, tables.SECTIONS[section].tool)
    )
    for table, name in zip(fresh, SMALLEST[section], strict=True):
        (row,) = table.cells()
        assert row[0] == name and row in written and "?" not in row


def test_a_block_is_written_once(tmp_path):
    table = tables.Table("Title:", (tables.Column("model", "name"),), [dict(name="a")])
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n\n{tables.BEGIN}\nold\n{tables.END}\n\nafter\n")
    assert tables.write_block(readme, [table]) and not tables.write_block(readme, [table])
    text = readme.read_text()
    assert text.startswith("before\n\n<!--") and text.endswith("-->\n\nafter\n")
    assert "Title:\n\n| model |\n| --- |\n| a |" in text and "old" not in text
    readme.write_text("nothing\n")
    with pytest.raises(ValueError, match=r"README.md has no lines"):
        tables.write_block(readme, [table])


@pytest.mark.slow
def test_the_tool_writes_numbers_and_tables(tmp_path):
    out, page = tmp_path / "counts.json", tmp_path / "counts.md"
    done = run_tool(
        "complexity", "backbones", "--parameters-only", "--json", out, "--markdown", page
    )
    assert done.returncode == 0, done.stderr
    first, second = json.loads(out.read_text())["backbones"]
    row = {row["name"]: row for row in first["rows"]}["`swin_tiny`"]
    assert (row["parameters"], row["paper_parameters"]) == (28288354, 28)
    assert len(second["rows"]) == 4
    assert "| `swin_tiny` | 28.29M | 28M | 0M |" in page.read_text()
    assert "FLOPs" not in page.read_text()
    assert "swin_tiny" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments, said",
    [
        (["models"], "no section 'models': backbones, ablations, detection, mmdet"),
        (["--write", "--parameters-only"], "leave --parameters-only out"),
        (["--json", "nowhere/counts.json"], "there is no folder"),
    ],
)
def test_the_tool_refuses_in_a_line(arguments, said):
    done = run_tool("complexity", *arguments)
    assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr


def test_missing_frameworks_are_named(monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(
        tables, "find_spec", lambda name: None if name in ("mmdet", "mmseg") else real(name)
    )
    assert "segmentation" not in tables.installed() and "backbones" in tables.installed()


def test_a_section_without_its_framework_is_refused(monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr("dense.find_spec", lambda name: None if name == "mmdet" else real(name))
    monkeypatch.setattr("sys.argv", ["complexity.py", "mmdetection"])
    with pytest.raises(SystemExit, match=r"mmdet is not installed.*dense-backbones\[mmdetection\]"):
        load_tool("complexity").main()


@pytest.mark.parametrize("name", NANO)
def test_pytorchs_counter_agrees(name):
    """torch.utils.flop_counter counts two FLOPs a multiply-add, and no norms."""
    model = timm.create_model(name).eval()
    image = torch.zeros(1, 3, 224, 224)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(image)
    without_norms = FlopCountAnalysis(model, image).unsupported_ops_warnings(False)
    norms = sum(n for op, n in without_norms.by_operator().items() if "norm" in op)
    expected = complexity.flops(model, tuple(image.shape)) - norms
    assert abs(counter.get_total_flops() / 2 / expected - 1) < 0.01
