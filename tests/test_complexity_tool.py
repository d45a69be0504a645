"""tools/complexity.py over tables of its own: what it prints, writes and leaves out."""

import json
from types import SimpleNamespace

import pytest
import torch
from torch import nn

pytest.importorskip("fvcore", reason="fvcore, which counts FLOPs, is not installed")

from dense.analysis import complexity
from dense.analysis import complexity_tables as tables
from tests.support import load_tool

COLUMNS = (
    tables.Column("config", "name"),
    tables.Column("parameters", "parameters", tables._millions),
    tables.Column("FLOPs", "flops", tables._billions(1)),
)
ROWS = [
    dict(name="[one](one.py)", parameters=28_288_354, flops=4_512_000_000),
    dict(name="`another`", parameters=1_000_000, flops=None),
]


@pytest.fixture
def built():
    """The arguments of every section that was built."""
    return []


@pytest.fixture
def tool(tmp_path, monkeypatch, built):
    """The tool, whose sections are of two tables in a README of a folder of their own."""
    module = load_tool("complexity")

    def section(name, package):
        def build(root, with_flops, track):
            assert root == tmp_path and list(track("ab")) == ["a", "b"]
            built.append((name, with_flops))
            found = [tables.Table(f"Of {name}:", COLUMNS, ROWS, ("- a note", "- another"))]
            return [*found, tables.Table("More:", COLUMNS[:1], ROWS[:1])]

        marker = "complexity" if name == "backbones" else f"complexity {name}"
        return tables.Section("README.md", package, f"extra-{name}", build, marker)

    packages = dict.fromkeys(module.SECTIONS, "timm") | {"mmdetection": "no_mmdet"}
    found = {name: section(name, package) for name, package in packages.items()}
    monkeypatch.setattr(tables, "SECTIONS", found)
    monkeypatch.setattr(module, "ROOT", tmp_path)
    # What the tool silences for its process would be silent in later tests too.
    said = []
    silence = SimpleNamespace(WARNING=30, disable=said.append)
    monkeypatch.setattr(module, "logging", silence)
    monkeypatch.setattr(module, "warnings", SimpleNamespace(simplefilter=said.append))
    module.said = said

    def track(items, description, console, transient):
        assert console.stderr and transient
        said.append(description)
        return items

    monkeypatch.setattr("rich.progress.track", track)
    return module


def run(tool, monkeypatch, *words) -> None:
    monkeypatch.setattr("sys.argv", ["complexity.py", *map(str, words)])
    tool.main()


def test_all_that_is_installed(tool, built, monkeypatch, capsys):
    run(tool, monkeypatch)
    names = ["backbones", "ablations", "detection", "segmentation"]
    assert built == [(name, True) for name in names]
    said = capsys.readouterr()
    assert " ".join(said.err.split()) == "mmdetection is left out: no_mmdet is not installed"
    lines = [line.rstrip() for line in said.out.splitlines()]
    assert lines[:13] == [
        "Of backbones:",
        "",
        "  config    parameters   FLOPs",
        " ──────────────────────────────",
        "  one           28.29M    4.5G",
        "  another        1.00M       ?",
        "",
        *("- a note", "- another", "More:", "", "  config", " ────────"),
    ]
    assert [line for line in lines if line.startswith("Of ")] == [f"Of {name}:" for name in names]
    assert tool.said == ["ignore", 30, *names]


def test_a_wide_table_stays_in_its_lines(tool, monkeypatch, capsys):
    long = [dict(ROWS[0], name="x" * 150)]
    one = tables.SECTIONS["backbones"]._replace(
        build=lambda *_: [tables.Table("Wide:", COLUMNS, long)]
    )
    monkeypatch.setitem(tables.SECTIONS, "backbones", one)
    monkeypatch.setenv("COLUMNS", "80")
    run(tool, monkeypatch, "backbones")
    assert f"  {'x' * 150}       28.29M    4.5G  \n" in capsys.readouterr().out


MARKDOWN = """Of {}:

| config | parameters | FLOPs |
| --- | --- | --- |
| [one](one.py) | 28.29M | 4.5G |
| `another` | 1.00M | ? |

- a note
- another"""
MORE = "More:\n\n| config |\n| --- |\n| [one](one.py) |"


@pytest.mark.parametrize("names", [["detection"], ["segmentation", "backbones"]])
def test_files_of_the_sections_that_are_named(names, tool, built, tmp_path, monkeypatch, capsys):
    counts, page = tmp_path / "a.json", tmp_path / "a.md"
    run(tool, monkeypatch, *names, "--json", counts, "--markdown", page)
    assert built == [(name, True) for name in names]
    text = counts.read_text()
    raw = {
        name: [
            dict(title=f"Of {name}:", rows=ROWS, notes=["- a note", "- another"]),
            dict(title="More:", rows=ROWS[:1], notes=[]),
        ]
        for name in names
    }
    assert text == json.dumps(raw, indent=1)
    parts = [part for name in names for part in (MARKDOWN.format(name), MORE)]
    assert page.read_text() == "\n\n".join(parts) + "\n"
    assert capsys.readouterr().err == ""


def test_parameters_alone(tool, built, tmp_path, monkeypatch, capsys):
    run(tool, monkeypatch, "ablations", "--parameters-only", "--markdown", tmp_path / "a.md")
    assert built == [("ablations", False)]
    assert "FLOPs" not in capsys.readouterr().out
    text = (tmp_path / "a.md").read_text()
    assert "| config | parameters |\n| --- | --- |\n| [one](one.py) | 28.29M |" in text


def test_the_readmes_blocks_are_written_once(tool, built, tmp_path, monkeypatch, capsys):
    readme = tmp_path / "README.md"
    marks = {
        name: tables.markers(tables.SECTIONS[name].tool) for name in ("backbones", "detection")
    }
    empty = "\n\n".join(f"{begin}\n{end}" for begin, end in marks.values())
    readme.write_text(f"before\n\n{empty}\n\nafter\n")
    for state in ("written", "was current"):
        run(tool, monkeypatch, *marks, "--write")
        said = " ".join(capsys.readouterr().err.split())
        assert said == f"README.md: backbones {state} README.md: detection {state}"
        blocks = [
            f"{begin}\n\n{MARKDOWN.format(name)}\n\n{MORE}\n\n{end}"
            for name, (begin, end) in marks.items()
        ]
        assert readme.read_text() == "\n\n".join(["before", *blocks, "after\n"])
    # A README without the lines is told before anything is counted.
    built.clear()
    readme.write_text("nothing")
    with pytest.raises(SystemExit, match=r"^complexity: .*README.md has no lines '<!-- Written by"):
        run(tool, monkeypatch, "backbones", "--write")
    assert built == []


def test_a_package_that_is_missing_is_named(tool, monkeypatch):
    with pytest.raises(SystemExit, match=r"no_mmdet is not installed.*\[extra-mmdetection\]"):
        run(tool, monkeypatch, "mmdetection")


@pytest.mark.parametrize("error", [ImportError, ValueError, OSError])
def test_what_a_section_raises_is_one_line(tool, error, monkeypatch):
    def build(*_):
        raise error("the reason")

    broken = tables.SECTIONS["backbones"]._replace(build=build)
    monkeypatch.setitem(tables.SECTIONS, "backbones", broken)
    with pytest.raises(SystemExit, match="^complexity: the reason$"):
        run(tool, monkeypatch, "backbones")


# The cells


@pytest.mark.parametrize(
    ("found", "published", "expected"),
    [
        ((28_288_354, 4_512_000_000), (28, 4.5), (0, 4.512 / 4.5 - 1)),
        ((28_500_001, 4_400_000_000), (28, 4.5), (1, 4.4 / 4.5 - 1)),
        ((28_288_354, None), (27.9, 4.5), (0.4, None)),
        ((28_288_354, 1), (None, None), (None, None)),
        ((28_288_354, 1), None, (None, None)),
    ],
)
def test_beside_the_papers(found, published, expected):
    """Parameters are rounded as the paper prints them."""
    paper = published and SimpleNamespace(parameters=published[0], flops=published[1])
    row = tables._beside(tables.Count(*found), paper)
    off, ratio = row.pop("parameters_off"), row.pop("flops_off")
    assert off == (None if expected[0] is None else pytest.approx(expected[0]))
    assert ratio == (None if expected[1] is None else pytest.approx(expected[1]))
    given = published or (None, None)
    assert row == dict(parameters=found[0], flops=found[1]) | dict(
        paper_parameters=given[0], paper_flops=given[1]
    )


def test_how_cells_are_shown():
    columns = (tables.Column("a", "name"), *tables._beside_columns("paper's", 2, "own "))
    titles = ["own parameters", "paper's", "difference", "own FLOPs", "paper's", "difference"]
    assert [column.title for column in columns[1:]] == titles
    row = dict(name="x", parameters=28_288_354, paper_parameters=28, parameters_off=0.5)
    row |= dict(flops=4_512_000_000, paper_flops=4.5, flops_off=0.00267)
    lacking = dict.fromkeys(row) | dict(name="y", parameters=1_999_999)
    table = tables.Table("T:", columns, [row, lacking])
    assert table.cells() == [
        ["x", "28.29M", "28M", "0.5M", "4.51G", "4.5G", "+0.3%"],
        # What was not counted is a question mark, what the paper lacks a dash.
        ["y", "2.00M", "-", "-", "?", "-", "?"],
    ]
    assert [column.key for column in table.without_flops().columns] == [
        *("name", "parameters", "paper_parameters", "parameters_off")
    ]
    assert tables._described(tables.Count(1_500_000, None)) == "1.50M parameters"
    assert tables._described(tables.Count(1_500_000, 2 * 10**9)) == "1.50M parameters, 2.0G FLOPs"


def test_counts_are_added():
    assert tables.Count(1, 2) + tables.Count(3, 4) == (4, 6)
    for one, other in (((1, None), (3, 4)), ((1, 2), (3, None))):
        assert tables.Count(*one) + tables.Count(*other) == (4, None)


# The block in a README


def test_a_block_is_found_wherever_it_is(tmp_path):
    readme = tmp_path / "README.md"
    begin, end = tables.markers("complexity ablations")
    assert (begin, end) == (
        "<!-- Written by: python tools/complexity.py ablations --write -->",
        "<!-- End of what tools/complexity.py ablations writes. -->",
    )
    block = f"{begin}\nrows\n{end}"
    for before, after in (("", ""), ("a\n", "\nb"), ("", "\nb"), ("a\n", "")):
        readme.write_text(before + block + after)
        assert tables.read_block(readme, "complexity ablations") == block
        with pytest.raises(ValueError, match="README.md has no lines"):
            tables.read_block(readme)
    for text in (begin, end, f"{end}\n{begin}"):
        readme.write_text(text)
        with pytest.raises(ValueError) as error:
            tables.read_block(readme, "complexity ablations")
        assert str(error.value) == (
            f"{readme} has no lines {begin!r} and {end!r} for the tables to go between"
        )


# What is counted


@pytest.mark.parametrize(
    ("count", "package", "extra"),
    [
        (complexity.segmentor, "mmseg", "segmentation"),
        (complexity.mmdet_detector, "mmdet", "mmdetection"),
        (complexity.detectron2_detector, "detectron2", "detection"),
    ],
)
def test_a_framework_that_is_missing_is_named(count, package, extra, monkeypatch):
    monkeypatch.setattr("dense.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=rf"^{package} is not installed.*\[{extra}\]"):
        count("absent.py")


def test_a_model_that_is_counted_stays_as_it_was():
    model = nn.Sequential(nn.Conv2d(3, 5, 3, padding=1), nn.BatchNorm2d(5)).train()
    model[0].weight.requires_grad_(False)
    model.register_buffer("other", torch.zeros(99))
    # Two products for each of a norm's numbers, and no bias.
    assert complexity.flops(model, (2, 3, 4, 6)) == 2 * 4 * 6 * (5 * 27 + 2 * 5)
    assert complexity.parameters(model) == 5 * 27 + 5 + 10
    assert model.training and {p.device.type for p in model.parameters()} == {"cpu"}


def test_a_classifier_is_counted_without_its_flops():
    whole = complexity.classifier("swin_nano", 64)
    assert complexity.classifier("swin_nano", 64, with_flops=False) == (whole.parameters, None)
    assert complexity.classifier("swin_nano", 64, window_size=7) == whole
    assert complexity.classifier("swin_nano", 64, None, num_classes=10).parameters == (
        whole.parameters - 990 * (256 + 1)
    )
