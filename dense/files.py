"""Atomic writes, and reading of JSON-lines logs whose last line was cut off by a kill."""

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

# Suffix of files being written; no glob for results or checkpoints matches it.
SUFFIX = ".partial"


def write(
    path: str | os.PathLike, content: str | bytes | Callable[[Path], object], size: int = 0
) -> Path:
    """Replace a file atomically: readers see the old content or all of the new.

    The content is written to ``name.partial`` beside the target, synced to disk and renamed. Two
    processes must not write the same target at the same time.

    Args:
        path: the target; its folder must exist.
        content: text (written as UTF-8), bytes, or a function that writes to the path it is given.
        size: bytes that the file will have, at least; less free space on the disk is an error
            before anything is written.

    Raises:
        OSError: the file cannot be written; its ``filename`` is the target. Other exceptions of a
            writing function are passed on, with a note that names the target.

    Example:
        >>> write("results.json", json.dumps(results))
        >>> write("model.pth", lambda partial: torch.save(weights, partial))
    """
    path = Path(path)
    partial = path.with_name(path.name + SUFFIX)
    try:
        if size and (free := shutil.disk_usage(path.parent).free) < size:
            needed = f"it needs {size / 1e6:.0f} MB, {free / 1e6:.0f} MB are free on its disk"
            raise OSError(errno.ENOSPC, needed, str(partial))
        if callable(content):
            content(partial)
        else:
            partial.write_bytes(content.encode() if isinstance(content, str) else content)
        with open(partial, "r+b") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        named = getattr(error, "filename", None)
        if isinstance(error, OSError) and error.errno and str(named or partial) == str(partial):
            raise OSError(error.errno, f"not written: {error.strerror}", str(path)) from error
        error.add_note(f"while writing {path}")
        raise
    return path


def json_line(entry: dict) -> str:
    """A line of a JSON-lines log, with its line break; keys are sorted."""
    return json.dumps(entry, sort_keys=True) + "\n"


def json_lines(path: str | os.PathLike) -> list[dict]:
    """Read a JSON-lines log; lines that are incomplete or no JSON object are skipped."""
    found = []
    for line in Path(path).read_text().splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            found.append(json.loads(line))
    return [entry for entry in found if isinstance(entry, dict)]
