"""Files that survive a kill: written atomically, and logs read whose last line was cut off."""

import contextlib
import json
import os
from collections.abc import Callable
from pathlib import Path

# Of files being written. No search for results or checkpoints matches it.
SUFFIX = ".partial"


def write(path: str | os.PathLike, content: str | bytes | Callable[[Path], object]) -> Path:
    """Replace a file atomically: readers see the old content or all of the new.

    The content goes into a temporary file beside the target, ``name.partial``, reaches the disk,
    and is renamed. A write that fails removes the temporary file; one that is killed leaves it, and
    the next write of the same target overwrites it. Two processes must not write one target at the
    same time.

    Args:
        path: the target; its folder must exist.
        content: text (written as UTF-8), bytes, or a function that writes the path it is given.

    Returns:
        The target.

    Raises:
        OSError: the file cannot be written; its ``filename`` is the target. What a writing function
            raises besides is passed on, with a note that names the target.

    Example:
        >>> write("results.json", json.dumps(results))
        >>> write("model.pth", lambda partial: torch.save(weights, partial))
    """
    path = Path(path)
    partial = path.with_name(path.name + SUFFIX)
    try:
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


def json_lines(path: str | os.PathLike) -> list[dict]:
    """The objects in a log with one in each line; a line that a kill cut off is left out."""
    found = []
    for line in Path(path).read_text().splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            found.append(json.loads(line))
    return [entry for entry in found if isinstance(entry, dict)]
