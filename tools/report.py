"""Write the report of a training: one HTML page.

    python tools/report.py work_dirs/mine

RUN is the work folder of train_detector.py, train_segmentor.py or pretrain.py, finished, running or
stopped. The page has the results and curves, a table of the classes, the best and the worst
validation images beside the truth, time and memory, the config and what differs from the recipe
that it is based on, and the environment. A training writes it at its end.
"""

import argparse
import sys

from dense.waiting import waiting


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("run", metavar="RUN", help="work folder of a training")
    add("--out", help="the page to write (RUN/report.html)")
    add(
        *("--images",),
        **dict(type=int, default=64, metavar="N"),
        help="validation images to judge, drawn at random; 0 is none (%(default)s)",
    )
    args = parser.parse_args(argv)
    if args.images < 0:
        parser.error(f"--images {args.images}: 0 or more is needed")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    with waiting("importing PyTorch"):
        from dense import run_report
    try:
        print(run_report.write(args.run, args.images, args.out))
    except (run_report.ReportError, OSError, ImportError) as error:
        print(f"report: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
