"""Run a script, timm's for example, with the names of this package registered.

python -m backbones train.py --model i_d_dw_conv_tiny --data-dir photos
"""

import runpy
import sys
from pathlib import Path

import backbones  # noqa: F401  (registers the names)


def main() -> None:
    """Run the script of the first argument as Python would, with the arguments after it."""
    if len(sys.argv) < 2 or not Path(sys.argv[1]).is_file():
        given = f"{sys.argv[1]} is no file; " if len(sys.argv) > 1 else ""
        sys.exit(f"backbones: {given}python -m backbones SCRIPT ARGUMENTS...")
    sys.argv = sys.argv[1:]
    sys.path[0] = str(Path(sys.argv[0]).resolve().parent)
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
