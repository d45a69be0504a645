"""What the tools' command lines take: the usage, each default, each option set, the whole help."""

import re
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest

from tests.support import ROOT, load_tool

TOOLS = {path.stem: path.read_text() for path in sorted((ROOT / "tools").glob("*.py"))}

# Of each tool: its usage; what the required words alone give; the other options and what they give.
LINES = {
    "compare_families": (
        "--data-root DATA_ROOT [--out OUT] [--results FOLDER] [--ablations NAME [NAME ...]]"
        " [--size {nano,tiny}] [--seeds SEEDS] [--epochs EPOCHS] [--jobs JOBS] [--fresh]",
        "--data-root photos",
        dict(data_root="photos", out="work_dirs/families", results=None, ablations=[])
        | dict(size="nano", seeds=3, epochs=10, jobs=4, fresh=False),
        "--out a --results b --ablations c d --size tiny --seeds 1 --epochs 2 --jobs 1 --fresh",
        dict(out="a", results="b", ablations=["c", "d"], size="tiny")
        | dict(seeds=1, epochs=2, jobs=1, fresh=True),
    ),
    "complexity": (
        "[--parameters-only] [--json FILE] [--markdown FILE] [--write] [SECTION ...]",
        "",
        dict(sections=[], parameters_only=False, json=None, markdown=None, write=False),
        "backbones ablations --json a.json --markdown b.md --write",
        dict(sections=["backbones", "ablations"], json=Path("a.json"), markdown=Path("b.md"))
        | dict(write=True),
    ),
    "convert_checkpoint": (
        "--to {ours,original,timm,torchvision,openmmlab,detectron2} [--prefix PREFIX]"
        " [--from-prefix FROM_PREFIX] [--trust] [--overwrite] source target",
        "a.pth b.pth --to timm",
        dict(source="a.pth", target="b.pth", to="timm", prefix="", from_prefix=None)
        | dict(trust=False, overwrite=False),
        "--prefix c. --from-prefix d. --trust --overwrite",
        dict(prefix="c.", from_prefix="d.", trust=True, overwrite=True),
    ),
    "demo": (
        "[--out OUT] [--fresh]",
        "",
        dict(out="work_dirs/demo", fresh=False),
        "--out a --fresh",
        dict(out="a", fresh=True),
    ),
    "demo_chain": (
        "[--photos PHOTOS] [--ade ADE] [--out OUT] [--jobs JOBS] [--fresh]",
        "",
        dict(photos="data/tiny_imagenet_10", ade="data/ADEChallengeData2016")
        | dict(out="work_dirs/chain", jobs=4, fresh=False),
        "--photos a --ade b --out c --jobs 1 --fresh",
        dict(photos="a", ade="b", out="c", jobs=1, fresh=True),
    ),
    "export": (
        "--to FORMAT [--part {whole,backbone}] [--config CONFIG] [--out OUT] [--photos PHOTOS]"
        " [--int8 | --bf16 | --fp16] checkpoint",
        "a.pth --to onnx",
        dict(checkpoint="a.pth", to="onnx", part="whole", config=None, out=None, photos=None)
        | dict(precision="float32"),
        "--part backbone --config b.py --out c.onnx --photos d --fp16",
        dict(part="backbone", config="b.py", out="c.onnx", photos="d", precision="fp16"),
    ),
    "make_scenes": (
        "[--train TRAIN] [--val VAL] [--size SIZE] [--seed SEED] [--overwrite] out",
        "a",
        dict(out="a", train=400, val=80, size=160, seed=0, overwrite=False),
        "--train 1 --val 2 --size 64 --seed 3 --overwrite",
        dict(train=1, val=2, size=64, seed=3, overwrite=True),
    ),
    "predict": (
        "--checkpoint CHECKPOINT [--config CONFIG] --out OUT [--score-thr SCORE_THR] [--no-legend]"
        " [--coco JSON] [--device DEVICE] [--resume] [--overwrite] INPUT [INPUT ...]",
        "a b --checkpoint c.pth --out d",
        dict(inputs=["a", "b"], checkpoint="c.pth", out="d", config=None, score_thr=0.5)
        | dict(no_legend=False, coco=None, device=None, resume=False, overwrite=False),
        "--config e.py --score-thr 1 --no-legend --coco f.json --device cpu --overwrite",
        dict(config="e.py", score_thr=1.0, no_legend=True, coco="f.json", device="cpu")
        | dict(overwrite=True),
    ),
    "publish_checkpoint": (
        "[--out OUT] [--config CONFIG] [--weights {averaged,model}] [--readme FILE]"
        " [--huggingface FOLDER] checkpoint",
        "a.pth",
        dict(checkpoint="a.pth", out="published", config=None, weights="averaged")
        | dict(readme=None, huggingface=None),
        "--out b --config c.py --weights model --readme d.md --huggingface e",
        dict(out="b", config="c.py", weights="model", readme="d.md", huggingface="e"),
    ),
}


@pytest.fixture
def cores(monkeypatch):
    """A function that gives this process so many cores."""

    def give(count: int) -> None:
        monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(count)))

    give(8)
    monkeypatch.delenv("DENSE_SAMPLE_DATA", raising=False)
    return give


@pytest.mark.parametrize("name", LINES)
def test_what_a_command_line_gives(name, cores, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _, least, expected, more, changed = LINES[name]
    parse = load_tool(name).parse_args
    assert vars(parse(least.split())) == expected
    assert vars(parse([*least.split(), *more.split()])) == expected | changed


@pytest.mark.parametrize("name", ["compare_families", "demo_chain"])
@pytest.mark.parametrize("count", [1, 3, 4, 5])
def test_as_many_jobs_as_cores_and_four_at_most(name, count, cores):
    cores(count)
    assert load_tool(name).parse_args(LINES[name][1].split()).jobs == min(count, 4)


def test_the_chain_looks_for_the_sample_data(cores, monkeypatch):
    monkeypatch.setenv("DENSE_SAMPLE_DATA", "/sample")
    args = load_tool("demo_chain").parse_args([])
    assert args.photos == "/sample/tiny_imagenet_10"
    assert args.ade == "/sample/ADEChallengeData2016"


@pytest.mark.parametrize("precision", ["int8", "bf16", "fp16"])
def test_one_precision_at_most(precision, capsys):
    parse = load_tool("export").parse_args
    assert parse(["a.pth", "--to", "onnx", f"--{precision}"]).precision == precision
    others = [f"--{name}" for name in ("int8", "bf16", "fp16") if name != precision]
    with pytest.raises(SystemExit):
        parse(["a.pth", "--to", "onnx", f"--{precision}", others[0]])
    assert "not allowed with argument" in capsys.readouterr().err


@pytest.mark.parametrize("name", [name for name, text in TOOLS.items() if "ArgumentParser" in text])
def test_the_help_is_the_tools_own_text(name, monkeypatch, capsys):
    """With the lines as they are written, its commands one below the other."""
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--help"])
    tool = load_tool(name)
    with pytest.raises(SystemExit):
        getattr(tool, "parse_args", tool.main)()
    shown = capsys.readouterr().out
    usage, text = shown.split("\n\n", 1)
    assert text.startswith(tool.__doc__.strip() + "\n")
    if name in LINES:
        assert " ".join(usage.split()) == f"usage: {name}.py [-h] {LINES[name][0]}".strip()


def test_the_layouts_are_listed_below_the_options(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit):
        load_tool("convert_checkpoint").parse_args(["--help"])
    assert capsys.readouterr().out.endswith(
        "\n\nlayouts:\n"
        "  ours         this package\n"
        "  original     the authors' DW-Conv files and Swin's own\n"
        "  timm         timm's swin_*_patch4_window7_224\n"
        "  torchvision  torchvision's swin_t and swin_b\n"
        "  openmmlab    MMSegmentation's, MMDetection's and MMPretrain's SwinTransformer\n"
        "  detectron2   Detectron2's SwinTransformer\n"
    )


@pytest.mark.parametrize(
    ("name", "words", "said"),
    [
        ("compare_families", "--data-root a --seeds 0", "--seeds 0: 1 or more is needed"),
        ("compare_families", "--data-root a --epochs 1", "--epochs 1: 2 or more is needed"),
        ("compare_families", "--data-root a --jobs 0", "--jobs 0: 1 or more is needed"),
        ("demo_chain", "--jobs 0", "--jobs 0: 1 or more is needed"),
        ("complexity", "backbones models", "no section 'models': backbones, ablations, detection,"),
        ("complexity", "--write --parameters-only", "--write: the READMEs have FLOPs: leave"),
        ("complexity", "--json a/b", "a/b: there is no folder {}/a"),
        ("complexity", "--markdown a/b", "a/b: there is no folder {}/a"),
        ("complexity", "--json .", ". is a folder; a file is needed"),
        ("complexity", "--markdown .", ". is a folder; a file is needed"),
        ("predict", "a --checkpoint b --out c --score-thr 1.01", "--score-thr 1.01: a score betw"),
        ("predict", "a --checkpoint b --out c --score-thr -0.1", "--score-thr -0.1: a score betw"),
        ("predict", "a --checkpoint b --out c --resume --overwrite", "--resume keeps results and"),
        ("predict", "a --checkpoint b", "required: --out"),
        ("predict", "a --out b", "required: --checkpoint"),
        ("export", "a", "required: --to"),
        ("convert_checkpoint", "a b", "required: --to"),
        ("convert_checkpoint", "a b --to c", "--to: invalid choice: 'c'"),
    ],
)
def test_refused_in_one_line(name, words, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        load_tool(name).parse_args(words.split())
    assert stop.value.code == 2
    assert said.format(tmp_path) in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("threshold", ["0", "1"])
def test_scores_from_0_to_1_are_thresholds(threshold):
    words = ["a", "--checkpoint", "b", "--out", "c", "--score-thr", threshold]
    assert load_tool("predict").parse_args(words).score_thr == float(threshold)


IN_A_CHECKOUT = [name for name, text in TOOLS.items() if re.search("^(ROOT|README) =", text, re.M)]


@pytest.mark.parametrize("name", IN_A_CHECKOUT)
def test_a_tool_knows_its_checkout_through_a_link(name, tmp_path):
    link = tmp_path / f"{name}.py"
    link.symlink_to(ROOT / "tools" / link.name)
    spec = spec_from_file_location(f"{name}_linked", link)
    module = sys.modules[spec.name] = module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    finally:
        del sys.modules[spec.name]
    root = module.README.parents[1] if name == "properties" else module.ROOT
    assert root == ROOT.resolve()
