"""Plot loss, learning rate and validation metrics of one or more runs.

    python tools/plot_metrics.py work_dirs/detector work_dirs/segmentor --out runs.png

Reads the work folders of pretrain.py, train_segmentor.py and train_detector.py, whether the run is
finished, running or resumed.
"""

import argparse
import sys
from pathlib import Path

from dense import metrics
from dense.waiting import waiting


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("runs", nargs="+", metavar="WORK_DIR", help="work folders of runs")
    add("--out", default="metrics.png", help=".png or .svg to write (%(default)s)")
    args = parser.parse_args(argv)
    if Path(args.out).suffix not in (".png", ".svg"):
        parser.error(f"--out {args.out}: a .png or .svg is needed")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    try:
        with waiting("reading the logs and plotting"):
            runs = [metrics.read_run(run) for run in args.runs]
            path = metrics.plot(runs, args.out)
    except (OSError, ValueError) as error:
        print(f"plot_metrics: {error}", file=sys.stderr)
        return 2
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
