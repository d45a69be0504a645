"""Plausible mistakes in a source file, one at a time: of Python by its syntax tree, of C by tokens.

mutmut and cosmic-ray have such operators too, but mutate no configs and no C.
"""

import ast
import random
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from difflib import unified_diff
from pathlib import Path

COMPARISONS = {"<": "<=", ">": ">=", "==": "!=", "in": "not in", "is": "is not"}
COMPARISONS |= {value: key for key, value in COMPARISONS.items()}
ARITHMETIC = {"+": "-", "-": "+", "*": "/", "/": "*", "//": "*", "%": "*", "**": "*"}
# Calls without which nothing is wrong but what a person reads.
SAID = (
    "print",
    "warn",
    "warning",
    "info",
    "debug",
    "write_line",
    "set_description",
    "add_argument",
)
# A call that is dropped leaves its first argument, which must be of its kind.
KEPT = ("isinstance", "len", "range", "super", "getattr", "hasattr", "type", "partial", "TypeVar")


@dataclass(frozen=True)
class Mistake:
    """Bytes ``start:end`` of a file, and what stands there instead."""

    path: str
    kind: str
    start: int
    end: int
    new: str

    def made(self, text: bytes) -> bytes:
        """The file with the mistake."""
        return text[: self.start] + self.new.encode() + text[self.end :]

    def diff(self, text: bytes) -> str:
        """Its lines before and after."""
        one, other = (t.decode().splitlines() for t in (text, self.made(text)))
        return "\n".join(unified_diff(one, other, self.path, self.path, n=1, lineterm=""))

    def lines(self, text: bytes) -> tuple[str, str]:
        """What it takes away and puts there, without indentation: how it is known by."""
        diff = self.diff(text).splitlines()[3:]
        return tuple(
            " ".join(line[1:].strip() for line in diff if line.startswith(sign)) for sign in "-+"
        )


def draw(root: Path, paths: list[str], count: int, seed: int) -> list[Mistake]:
    """Mistakes spread evenly over the files, and in a file over the kinds, the same for a seed.

    The configs of a folder that name a network and what they are based on are as one file.
    """
    rng = random.Random(seed)
    stacks, places = {}, defaultdict(list)
    for path in sorted(paths):
        leaf = path.startswith("configs/") and path.count("/") == 2
        places[path.rsplit("/", 1)[0] if leaf else path].append(path)
    for place, together in places.items():
        by_kind = defaultdict(list)
        for path in together:
            for mistake in possible(path, (root / path).read_bytes()):
                by_kind[mistake.kind].append(mistake)
        for mistakes in by_kind.values():
            rng.shuffle(mistakes)
        stack = []
        while by_kind:
            for kind in rng.sample(sorted(by_kind), len(by_kind)):
                stack.append(by_kind[kind].pop())
                if not by_kind[kind]:
                    del by_kind[kind]
        if stack:
            stacks[place] = stack[::-1]
    drawn = []
    while stacks and len(drawn) < count:
        for place in rng.sample(sorted(stacks), len(stacks)):
            mistake = stacks[place].pop()
            if not stacks[place]:
                del stacks[place]
            if len(drawn) < count and _parses(mistake, (root / mistake.path).read_bytes()):
                drawn.append(mistake)
    return drawn


def possible(path: str, text: bytes) -> list[Mistake]:
    """All mistakes that this module can make in a file; some may not parse."""
    found = _of_tree(text) if path.endswith(".py") else _of_tokens(text)
    return [Mistake(path, *mistake) for mistake in found]


def _parses(mistake: Mistake, text: bytes) -> bool:
    try:
        return not mistake.path.endswith(".py") or bool(ast.parse(mistake.made(text)))
    except SyntaxError:
        return False


# Python

Found = Iterator[tuple[str, int, int, str]]


def _of_tree(text: bytes) -> Found:
    tree = ast.parse(text)
    starts = [0]
    for line in text.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))

    def span(node: ast.AST) -> tuple[int, int]:
        return (
            starts[node.lineno - 1] + node.col_offset,
            starts[node.end_lineno - 1] + node.end_col_offset,
        )

    def source(node: ast.AST) -> str:
        start, end = span(node)
        return text[start:end].decode()

    def between(left: ast.AST, right: ast.AST, swaps: dict[str, str], kind: str) -> Found:
        start, end = span(left)[1], span(right)[0]
        operator = text[start:end].decode()
        if operator.strip() in swaps:
            yield kind, start, end, f" {swaps[operator.strip()]} "

    statements = set()
    for node in _walk(tree):
        if isinstance(node, ast.Compare) and len(node.ops) == 1:
            yield from between(node.left, node.comparators[0], COMPARISONS, "comparison")
        elif isinstance(node, ast.BoolOp):
            for left, right in zip(node.values, node.values[1:], strict=False):
                yield from between(left, right, {"and": "or", "or": "and"}, "comparison")
        elif isinstance(node, ast.BinOp) and not (_is_text(node.left) or _is_text(node.right)):
            yield from between(node.left, node.right, ARITHMETIC, "arithmetic")
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            yield "comparison", *span(node), source(node.operand)
        elif isinstance(node, ast.Constant) and type(node.value) in (bool, int, float):
            yield "constant", *span(node), repr(_other(node.value))
        elif isinstance(node, ast.If | ast.IfExp | ast.While):
            yield "condition", *span(node.test), f"not ({source(node.test)})"
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
            statements.add(node.value)
            yield "dropped call", *span(node), "pass"
        elif isinstance(node, ast.Call):
            if node not in statements:
                yield from _without_call(node, span, source)
            yield from _of_arguments(node, text, span, source)


def _without_call(node: ast.Call, span: Callable, source: Callable) -> Found:
    """Its first argument, or what its method is of."""
    if _name(node) not in KEPT and node.args and not isinstance(node.args[0], ast.Starred):
        if isinstance(node.args[0], ast.Call | ast.BinOp | ast.Name | ast.Attribute):
            yield "dropped call", *span(node), f"({source(node.args[0])})"
    if isinstance(node.func, ast.Attribute) and isinstance(node.func.value, ast.Call):
        yield "dropped call", *span(node), source(node.func.value)


def _of_arguments(node: ast.Call, text: bytes, span: Callable, source: Callable) -> Found:
    arguments = [*node.args, *node.keywords]
    for before, argument in zip([None, *arguments], arguments, strict=False):
        if isinstance(argument, ast.keyword) and before is not None:
            yield "dropped argument", span(before)[1], span(argument)[1], ""
        elif isinstance(argument, ast.keyword) and len(arguments) > 1:
            yield "dropped argument", span(argument)[0], span(arguments[1])[0], ""
    for left, right in zip(node.args, node.args[1:], strict=False):
        names = all(isinstance(argument, ast.Name | ast.Attribute) for argument in (left, right))
        if names and source(left) != source(right):
            middle = text[span(left)[1] : span(right)[0]].decode()
            new = f"{source(right)}{middle}{source(left)}"
            yield "swapped names", span(left)[0], span(right)[1], new


def _walk(node: ast.AST) -> Iterator[ast.AST]:
    """Nodes that run: no annotation, text, message, decorator or program's entry."""
    yield node
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns", "decorator_list"):
            continue
        for child in value if isinstance(value, list) else [value]:
            if not isinstance(child, ast.AST) or isinstance(child, ast.Raise | ast.JoinedStr):
                continue
            if isinstance(child, ast.Assert) or _is_entry(child):
                continue
            if isinstance(child, ast.Expr) and (
                _is_text(child.value) or _name(child.value) in SAID
            ):
                continue
            yield from _walk(child)


def _is_text(node: ast.AST) -> bool:
    text = isinstance(node, ast.Constant) and isinstance(node.value, str)
    return text or isinstance(node, ast.JoinedStr)


def _is_entry(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "__name__" in ast.dump(node.test)


def _name(node: ast.AST) -> str:
    """The last name of what a call calls."""
    function = getattr(node, "func", None)
    return getattr(function, "attr", getattr(function, "id", ""))


def _other(value: bool | int | float) -> bool | int | float:
    if isinstance(value, bool):
        return not value
    return value + 1 if isinstance(value, int) or not value else value * 2


# C

_TOKENS = {" < ": " <= ", " <= ": " < ", " > ": " >= ", " + ": " - ", " - ": " + ", " * ": " + "}
_TOKENS |= {" && ": " || ", " || ": " && ", " == ": " != ", " += ": " = "}
_TOKEN = re.compile("|".join(map(re.escape, sorted(_TOKENS, key=len, reverse=True))) + r"|\b\d+\b")


def _of_tokens(text: bytes) -> Found:
    # Comments and the preprocessor's lines are blanked out, so that places stay.
    code = re.sub(
        r"/\*.*?\*/|//[^\n]*|^\s*#[^\n]*|\"[^\"\n]*\"",
        lambda found: re.sub(r"[^\n]", "\0", found[0]),
        text.decode("latin-1"),
        flags=re.DOTALL | re.MULTILINE,
    )
    for found in _TOKEN.finditer(code):
        token = found[0]
        new = _TOKENS.get(token) or str(int(token) + 1)
        kind = "constant" if token.isdigit() else "operator"
        yield kind, found.start(), found.end(), new
