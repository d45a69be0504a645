"""Measure what each mixer connects, shares and predicts, beside the paper's Tables 1 and 7.

    python tools/properties.py             # seconds on a CPU
    python tools/properties.py --write     # updates the tables in backbones/README.md

The properties are derived by autograd from the operators themselves; see
dense/analysis/properties.py for the definition of each.
"""

import argparse
import sys
from pathlib import Path

from dense.waiting import waiting

README = Path(__file__).resolve().parents[1] / "backbones/README.md"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", action="store_true", help="update the tables in the README")
    args = parser.parse_args(argv)

    with waiting("importing PyTorch"):
        from dense.analysis import complexity_tables, properties

    try:
        if args.write:
            complexity_tables.read_block(README, "properties")
        found = properties.tables(properties.measure())
        for table in found:
            print(table.markdown(), end="\n\n")
        if args.write:
            changed = complexity_tables.write_block(README, found, "properties")
            print(f"{README} {'written' if changed else 'was current'}", file=sys.stderr)
    except (OSError, ValueError) as error:
        print(f"properties: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
