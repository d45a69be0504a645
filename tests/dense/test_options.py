"""Values of a command line: class names and their colours in masks, numbers, near names."""

import argparse

import pytest

from dense.options import listed_classes, near, wrong_value
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
    # Numbers may be part of a name, and 255 is a colour's.
    path.write_text("route 66 255 0 255\n  big  road 1 2 3 \n")
    assert listed_classes(str(path)) == (["route 66", "big road"], [(255, 0, 255), (1, 2, 3)])
    path.write_text("1 2 3\n- 0 0 1\n")
    assert listed_classes(str(path)) == (["1 2 3"], None)


@pytest.mark.parametrize(
    "text, message",
    [
        ("road 128 64 128\ntree\n", "1 of 2 classes have a colour; all or none"),
        ("road 1 2 3\ntree 1 2 3\n", "has the colour 1 2 3 twice"),
        ("road 1 2 3\n- 1 2 3\n", "has the colour 1 2 3 twice"),
        ("road 1 2 256\n", "'road 1 2 256' has a number above 255"),
        ("road 1 2 3\ntree 4 5 6\ncar\n", "2 of 3 classes have a colour; all or none"),
        ("- 1 2 3\n- 1 2 3\n", "has the colour 1 2 3 twice"),
    ],
)
def test_what_is_wrong_with_a_file(tmp_path, text, message):
    path = tmp_path / "classes.txt"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        listed_classes(str(path))


NUMBER, WHOLE = "a number is needed, such as", "a whole number is needed, such as"


@pytest.mark.parametrize(
    "old, new, wrong",
    [
        (True, False, None),
        (True, 1, "x.key=1: True or False is needed"),
        (False, "yes", "x.key='yes': True or False is needed"),
        (True, "${other}", None),
        (3, "fast", f"x.key='fast': {NUMBER} 3"),
        (0.5, "0.1", f"x.key='0.1': {NUMBER} 0.5"),
        (0.5, True, f"x.key=True: {NUMBER} 0.5"),
        (3, "${other}", None),
        (3, None, None),
        (0.5, 2, None),
        (3, 2.0, None),
        (3, 2.5, f"x.key=2.5: {WHOLE} 3"),
        (2, 2.5, f"x.key=2.5: {WHOLE} 2"),
        # 1 and 0 stand for fractions in many configs.
        (1, 2.5, None),
        (3.0, 2.5, None),
        ({"a": 1, "b": 2}, 5, "x.key=5: it holds a, b; name one of them after a dot"),
        ({"a": 1, 7: 2}, "no", "x.key='no': it holds a, 7; name one of them after a dot"),
        ({"a": 1}, {"b": 1}, None),
        ({"a": 1}, None, None),
        (None, "anything", None),
        ("text", 3, None),
        ([1], 3, None),
    ],
)
def test_a_value_of_another_kind_is_named(old, new, wrong):
    assert wrong_value("x.key", old, new) == wrong


ABOVE = ("max_iter", "max_iters", "max_epochs", "val_interval", "batch_size", "total_batch_size")
ABOVE += ("log_period", "accumulative_counts")


@pytest.mark.parametrize("key", [*ABOVE, "lr", "num_workers", "eval_period", "weight_decay"])
def test_numbers_below_their_least_are_named(key):
    least = "more than 0" if key in ABOVE else "0 or more"
    for name in (key, f"a.b.{key}"):
        assert wrong_value(name, 4, -1) == f"{name}=-1: {least} is needed"
        assert wrong_value(name, None, -0.5) == f"{name}=-0.5: {least} is needed"
        assert wrong_value(name, 4, 0) == (f"{name}=0: {least} is needed" if key in ABOVE else None)
        assert wrong_value(name, 4, 1) is wrong_value(name, None, None) is None
        assert wrong_value(name, None, "x") is wrong_value(name, None, False) is None
    assert wrong_value(f"{key}.other", 4, -1) is None


def test_near_names_or_all():
    valid = ["min_iter", "max_iters", "max_iter", "lr"]
    assert near("max_itr", valid) == "; did you mean 'max_iter'?"
    assert near("nothing", iter(valid)) == "; lr, max_iter, max_iters, min_iter are valid"
    assert near("nothing", []) == ""
