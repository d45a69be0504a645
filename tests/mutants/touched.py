"""Which tests run a line: measured once by pytest-cov, so that few tests notice most mistakes."""

import ast
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path


class Touched:
    """The tests that ran each line.

    Args:
        root: of the tree that was measured, or of another clone of its commit.
        folder: that :func:`measure` wrote.
    """

    def __init__(self, root: Path, folder: Path):
        from coverage import CoverageData

        self.root = root
        self.data = CoverageData(str(folder / "coverage"))
        self.data.read()
        measured = json.loads((folder / "measured.json").read_text())
        self.measured, self.digests = measured["root"], measured["digests"]

    def tests(self, path: str, start: int, files: Iterable[str]) -> tuple[list[str], list[str]]:
        """The tests that ran the statement around a byte of ``path``: those in ``files``, others.

        None are found of a line that runs on import alone, of what a started process runs, and in
        a file that is no Python or has changed since.
        """
        text = (self.root / path).read_bytes()
        if not path.endswith(".py") or self.digests.get(path) != _digest(text):
            return [], []
        seen = self.data.contexts_by_lineno(f"{self.measured}/{path}")
        line = 1 + text[:start].count(b"\n")
        lines = range(statement_of(text, line), line + 1)
        names = {test.rpartition("|")[0] for n in lines for test in seen.get(n, ())}
        within = tuple(f"{file}{mark}" for file in files for mark in ("::", "/"))
        ours = {name for name in names if name.startswith(within)}
        return sorted(ours), sorted(names - ours - {""})


def statement_of(text: bytes, line: int) -> int:
    """The first line of the statement that a line is in; of a compound one, of its header."""
    first = line
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.stmt):
            last = node.body[0].lineno - 1 if hasattr(node, "body") else node.end_lineno
            if node.lineno <= line <= max(last, node.lineno):
                first = min(first, node.lineno)
    return first


def measure(root: Path, folder: Path, paths: Iterable[str], marker: str, jobs: int) -> None:
    """Run the tests of ``root`` once, and write which of them ran each line of ``paths``."""
    folder.mkdir(parents=True, exist_ok=True)
    sources = sorted({path.split("/")[0] for path in paths if path.endswith(".py")} - {"configs"})
    command = [sys.executable, "-m", "pytest", "-q", "-m", marker, "-n", str(jobs)]
    command += ["--cov-context=test", "--cov-report=", *(f"--cov={name}" for name in sources)]
    file = folder.resolve() / "coverage"
    file.unlink(missing_ok=True)
    subprocess.run(command, cwd=root, env={**os.environ, "COVERAGE_FILE": str(file)})
    digests = {path: _digest((root / path).read_bytes()) for path in paths}
    measured = {"root": str(root.resolve()), "digests": digests}
    (folder / "measured.json").write_text(json.dumps(measured))


def _digest(text: bytes) -> str:
    return hashlib.sha256(text).hexdigest()
