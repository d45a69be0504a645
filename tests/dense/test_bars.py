"""Progress bars of loops whose length depends on the data."""

import ast

from tests.processes import ROOT


def test_bars_show_where_one_waits_and_leave_no_line():
    """Of loops in the library; those of trainings and of the demo's steps stay."""
    bars = {
        f"{path.relative_to(ROOT)}: {ast.unparse(call)}": {
            word.arg: ast.unparse(word.value) for word in call.keywords
        }
        for path in (ROOT / "dense").rglob("*.py")
        for call in ast.walk(ast.parse(path.read_text()))
        if isinstance(call, ast.Call) and ast.unparse(call.func) == "tqdm" and call.args
    }
    assert len(bars) > 5
    for call, options in bars.items():
        assert (options.get("delay"), options.get("leave")) == ("2", "False"), call
