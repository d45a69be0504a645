"""A file of class names, with or without their colours in masks."""

import argparse

import pytest

from dense.options import listed_classes
from tests.support import ROOT, load_tool

TOOLS = sorted(path.stem for path in (ROOT / "tools").glob("*.py"))
# Of these the options are another tool's, or none.
WITHOUT = ("setup_environment", "test_versions")


class Parsing(Exception):
    """Raised with the parser in place of parsing."""


@pytest.mark.parametrize("name", [name for name in TOOLS if name not in WITHOUT])
def test_every_option_says_what_it_is(name, monkeypatch):
    def parse(parser, *_):
        raise Parsing(parser)

    for method in ("parse_args", "parse_known_args", "parse_intermixed_args"):
        monkeypatch.setattr(argparse.ArgumentParser, method, parse)
    tool = load_tool(name)
    with pytest.raises(Parsing) as found:
        getattr(tool, "parse_args", tool.main)([])
    (parser,) = found.value.args
    assert parser.description
    assert not [a.option_strings or a.dest for a in parser._actions if not a.help]


def test_names_on_the_command_line(tmp_path, monkeypatch):
    assert listed_classes("road, traffic light ,tree") == (["road", "traffic light", "tree"], None)
    # A file of the name of the first class is none of theirs.
    monkeypatch.chdir(tmp_path)
    (tmp_path / "road").write_text("other")
    assert listed_classes("road,tree") == (["road", "tree"], None)


def test_a_file_of_names(tmp_path):
    path = tmp_path / "classes.txt"
    path.write_text("road\n\ntraffic light\n  \nstreet 7\n")
    assert listed_classes(str(path)) == (["road", "traffic light", "street 7"], None)


def test_a_file_of_names_and_colours(tmp_path):
    path = tmp_path / "classes.txt"
    path.write_text("road 128 64 128\n- 0 0 0\ntraffic light 250 170 30\n")
    names, colours = listed_classes(str(path))
    assert names == ["road", "traffic light"]
    assert colours == [(128, 64, 128), (250, 170, 30), (0, 0, 0)]


@pytest.mark.parametrize(
    "text, message",
    [
        ("road 128 64 128\ntree\n", "1 of 2 classes have a colour; all or none"),
        ("road 1 2 3\ntree 1 2 3\n", "has the colour 1 2 3 twice"),
        ("road 1 2 3\n- 1 2 3\n", "has the colour 1 2 3 twice"),
        ("road 1 2 256\n", "'road 1 2 256' has a number above 255"),
    ],
)
def test_what_is_wrong_with_a_file(tmp_path, text, message):
    path = tmp_path / "classes.txt"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        listed_classes(str(path))
