"""The mistakes of mutation runs: of every kind, the same for a seed, none in texts."""

import pytest

from tests.mutants.mistakes import Mistake, draw, possible
from tests.mutants.parts import TESTS
from tests.mutants.touched import Touched, measure, statement_of
from tests.support import ROOT

PYTHON = b'''"""A text, 1 < 2."""


def area(width: int = 3, *, height: float) -> float:
    """Not 5."""
    if width < 0 and not height:
        raise ValueError(f"{width + 1} is wrong")
    log.info(7)
    check(width, height)
    return scaled(width * height, by=2, twice=True)
'''
PYTHONS = {
    "    if width <= 0 and not height:",
    "    if width < 0 or not height:",
    "    if width < 0 and height:",
    "    if not (width < 0 and not height):",
    "    if width < 1 and not height:",
    "def area(width: int = 4, *, height: float) -> float:",
    "    pass",
    "    check(height, width)",
    "    return (width * height)",
    "    return scaled(width / height, by=2, twice=True)",
    "    return scaled(width * height, by=3, twice=True)",
    "    return scaled(width * height, by=2, twice=False)",
    "    return scaled(width * height, twice=True)",
    "    return scaled(width * height, by=2)",
}
C = b"#define K 7\n/* a < b */\nfor (I i = 0; i < n; i++) sum += x[i] * y; // 5 + 5\n"
CS = {
    "for (I i = 1; i < n; i++) sum += x[i] * y; // 5 + 5",
    "for (I i = 0; i <= n; i++) sum += x[i] * y; // 5 + 5",
    "for (I i = 0; i < n; i++) sum = x[i] * y; // 5 + 5",
    "for (I i = 0; i < n; i++) sum += x[i] + y; // 5 + 5",
}


def lines_of(mistake: Mistake, text: bytes) -> str:
    (changed,) = set(mistake.made(text).decode().split("\n")) - set(text.decode().split("\n"))
    return changed


@pytest.mark.parametrize("name, text, expected", [("a.py", PYTHON, PYTHONS), ("a.c", C, CS)])
def test_every_kind_and_nothing_else(name, text, expected):
    found = [lines_of(mistake, text) for mistake in possible(name, text)]
    assert set(found) == expected and len(found) == len(expected)


def test_no_swap_of_a_name_with_itself():
    kinds = [m.kind for m in possible("a.py", b"x = call(a.b, a.b, c)")]
    assert kinds.count("swapped names") == 1


def test_a_seed_draws_the_same_over_all_files(tmp_path):
    for number in range(4):
        (tmp_path / f"{number}.py").write_bytes(PYTHON)
    names = [f"{number}.py" for number in range(4)]
    one, same, other = (draw(tmp_path, names, 8, seed) for seed in (1, 1, 2))
    assert one == same != other
    assert sorted(mistake.path for mistake in one) == sorted(2 * names)


def test_the_tests_of_each_part_are_there():
    assert not [test for tests in TESTS.values() for test in tests if not (ROOT / test).exists()]


# Which tests run a line

SOURCE = b"""def sign(
    x,
):
    if x < 0:
        return (
            -1
        )
    return 1
"""


@pytest.mark.parametrize(("line", "first"), [(2, 1), (4, 4), (6, 5), (7, 5), (8, 8)])
def test_a_statement_begins(line, first):
    assert statement_of(SOURCE, line) == first


@pytest.mark.slow
def test_the_tests_of_a_line(tmp_path):
    tree, out = tmp_path / "tree", tmp_path / "out"
    (tree / "tests").mkdir(parents=True)
    (tree / "signed").mkdir()
    (tree / "signed/signs.py").write_bytes(SOURCE)
    (tree / "tests/test_signs.py").write_text(
        "from signed.signs import sign\n\n"
        "def test_less():\n    assert sign(-2) == -1\n\n"
        "def test_more():\n    assert sign(2) == 1\n"
    )
    (tree / "signed/__init__.py").touch()
    (tree / "signed/fast.c").write_text("/* no Python */")
    measure(tree, out, ["signed/signs.py", "signed/fast.c"], "not slow", 1)
    tree = tree.rename(tmp_path / "clone")
    touched, files = Touched(tree, out), ("tests/test_signs.py",)
    less, more = (f"tests/test_signs.py::test_{name}" for name in ("less", "more"))
    at = {name: SOURCE.index(name.encode()) for name in ("x <", "-1", "return 1", "def")}
    found = {name: touched.tests("signed/signs.py", place, files) for name, place in at.items()}
    of_each = {"x <": [less, more], "-1": [less], "return 1": [more], "def": []}
    assert found == {name: (tests, []) for name, tests in of_each.items()}
    assert touched.tests("signed/fast.c", 3, files) == ([], [])
    elsewhere = touched.tests("signed/signs.py", at["x <"], ("tests/other",))
    assert elsewhere == ([], [less, more])
    (tree / "signed/signs.py").write_bytes(SOURCE + b"\n")
    assert touched.tests("signed/signs.py", at["x <"], files) == ([], [])
