"""Say what a program waits for: nothing is silent for longer than two seconds.

It imports the standard library alone, so that tools can use it around their own imports.
"""

import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

AFTER = 2.0


@contextmanager
def waiting(what: str, after: float = AFTER) -> Iterator[None]:
    """Print ``what`` to stderr if the block takes longer than ``after`` seconds, and then how long.

    Of several processes of a launcher the first one prints. For work whose length is known, tqdm
    with ``delay=2`` also shows what remains.

    >>> with waiting("reading annotations/train.json"):
    ...     content = json.loads(path.read_text())

    Args:
        what: what the program does, as a participle: ``"reading FILE"``.
        after: seconds.
    """
    said = threading.Event()

    def say() -> None:
        said.set()
        print(f"{what} ...", file=sys.stderr, flush=True)

    timer = threading.Timer(after, say)
    timer.daemon = True
    began = time.monotonic()
    if _is_first():
        timer.start()
    try:
        yield
    finally:
        timer.cancel()
        if said.is_set():
            seconds = time.monotonic() - began
            print(f"{what}: {seconds:.0f} s", file=sys.stderr, flush=True)


def _is_first() -> bool:
    # Of processes that nobody launched, PyTorch knows the rank, if it is imported.
    distributed = getattr(sys.modules.get("torch"), "distributed", None)
    if distributed and distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank() == 0
    return os.environ.get("RANK", "0") == "0"
