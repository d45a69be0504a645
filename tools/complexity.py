"""Count parameters and FLOPs of every model and config, beside the paper's tables.

    python tools/complexity.py                       # all sections, a minute on a CPU
    python tools/complexity.py backbones --json counts.json
    python tools/complexity.py --parameters-only     # seconds
    python tools/complexity.py --write               # updates the tables of the READMEs

FLOPs are multiply-adds at the paper's sizes: classifiers 224x224 and 384x384, detectors 1280x800
with 1000 boxes and 100 masks, segmentors 512x2048.
"""

import argparse
import json
import logging
import sys
import warnings
from functools import partial
from pathlib import Path

from dense.waiting import waiting

ROOT = Path(__file__).resolve().parents[1]
SECTIONS = ("backbones", "ablations", "detection", "mmdetection", "segmentation")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    names = ", ".join(SECTIONS)
    add("sections", nargs="*", metavar="SECTION", help=f"{names}; default: all that are installed")
    add("--parameters-only", action="store_true", help="count no FLOPs")
    add("--json", type=Path, metavar="FILE", help="write unrounded numbers")
    add("--markdown", type=Path, metavar="FILE", help="write the tables as Markdown")
    add("--write", action="store_true", help="update the tables in the README of each section")
    args = parser.parse_args(argv)
    if unknown := [name for name in args.sections if name not in SECTIONS]:
        parser.error(f"no section {unknown[0]!r}: {names} are valid")
    if args.write and args.parameters_only:
        parser.error("--write: the READMEs have FLOPs: leave --parameters-only out")
    for file in filter(None, (args.json, args.markdown)):
        if not file.absolute().parent.is_dir():
            parser.error(f"{file}: there is no folder {file.absolute().parent}")
        if file.is_dir():
            parser.error(f"{file} is a folder; a file is needed")
    return args


def main() -> None:
    args = parse_args()

    from dense import files, require

    try:
        require("rich", "complexity")
        with waiting("importing PyTorch"):
            from dense.analysis import complexity_tables as tables

        for name in args.sections:
            require(tables.SECTIONS[name].package, tables.SECTIONS[name].extra)
    except ImportError as error:
        sys.exit(f"complexity: {error}")

    from rich.console import Console
    from rich.progress import track

    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    errors = Console(stderr=True)
    sections = args.sections or tables.installed()
    for name in SECTIONS if not args.sections else ():
        if name not in sections:
            errors.print(f"{name} is left out: {tables.SECTIONS[name].package} is not installed")

    done = {}
    try:
        for name in sections:
            section = tables.SECTIONS[name]
            if args.write:
                tables.read_block(ROOT / section.readme, section.tool)
            progress = partial(track, description=name, console=errors, transient=True)
            built = section.build(ROOT, not args.parameters_only, progress)
            if args.parameters_only:
                built = [table.without_flops() for table in built]
            done[name] = built
            for table in built:
                _show(table)
    except (ImportError, ValueError, OSError) as error:
        sys.exit(f"complexity: {error}")

    if args.json:
        content = {name: list(tables.raw(section)) for name, section in done.items()}
        files.write(args.json, json.dumps(content, indent=1))
    if args.markdown:
        every = (table.markdown() for section in done.values() for table in section)
        files.write(args.markdown, "\n\n".join(every) + "\n")
    for name in sections if args.write else ():
        section = tables.SECTIONS[name]
        changed = tables.write_block(ROOT / section.readme, done[name], section.tool)
        errors.print(f"{section.readme}: {name} {'written' if changed else 'was current'}")


def _show(table) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    shown = Table(box=box.SIMPLE_HEAD, title=table.title, title_justify="left")
    for i, column in enumerate(table.columns):
        shown.add_column(column.title, justify="left" if i == 0 else "right")
    for cells in table.cells():
        # Show the text of a Markdown link or code span.
        name = cells[0].partition("]")[0].strip("[`")
        shown.add_row(name, *cells[1:])
    console = Console()
    if not console.is_terminal:
        console.width = 200
    console.print(shown)
    for note in table.notes:
        console.print(note)


if __name__ == "__main__":
    main()
