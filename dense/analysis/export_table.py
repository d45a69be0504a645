"""The table of dense/export/README.md: every family in every format beside eager.

    python -m dense.analysis.export_table --no-latency

Networks have random weights, batch norms with statistics, and are compared on drawn scenes by
:func:`dense.export.checking.compare`, at three sizes and the smallest.
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import nn

import backbones
from backbones.families import FAMILIES
from dense.backbone import DenseBackbone
from dense.export import checking, files
from dense.export.graphs import LARGEST, SMALLEST, captured
from dense.export.sources import Source


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--families", nargs="+", default=list(FAMILIES), choices=FAMILIES, metavar="FAMILY")
    add("--size", default="nano", help="of the networks (%(default)s)")
    add("--side", type=int, default=224, help="rows and columns in pixels (%(default)s)")
    add("--no-latency", action="store_true", help="leave out what another load would change")
    args = parser.parse_args(argv)
    heads = ["backbone", "format", "largest relative error", "MB"]
    heads += [] if args.no_latency else ["latency over eager's"]
    print(f"| {' | '.join(heads)} |\n|{' --- |' * len(heads)}", flush=True)
    for family in args.families:
        for row in rows(f"{family}_{args.size}", args.side):
            print(f"| {' | '.join(row[: len(heads)])} |", flush=True)


def rows(name: str, side: int) -> list[list[str]]:
    """The table's rows of a network: name, format, error, megabytes, latency ratio."""
    from dense.demo.scenes import draw_scene

    source = random_source(name, side)
    photos = [draw_scene(np.random.default_rng(seed), 256).image for seed in range(2)]
    made = []
    with tempfile.TemporaryDirectory() as folder:
        graph = Path(folder, "backbone.onnx")
        program = captured(source.network)
        files.write(program, source.about, graph)
        for kind, suffix in files.FORMATS.items():
            file = graph.with_suffix(suffix)
            written = [file]
            if kind == "openvino":
                written = files.to_openvino(graph, file)
            elif kind == "torch-export":
                written = files.write(program, source.about, file)
            found = checking.compare(source, files.Runner(file, torch.get_num_threads()), photos)
            size = sum(path.stat().st_size for path in written) / 1e6
            error = max(found.errors.values())
            made.append([f"`{name}`", kind, f"{error:.1e}", f"{size:.1f}", f"{found.ratio:.2f}"])
    return made


def random_source(name: str, side: int) -> Source:
    """A backbone with random weights and the statistics of random images."""
    torch.manual_seed(0)
    backbone = DenseBackbone(name, norm="BN")
    with torch.no_grad():
        backbone.train()
        for module in backbone.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = None
        backbone(torch.randn(4, 3, 64, 64))
    about = {
        "outputs": [f"stage{i}_stride{stride}" for i, stride in enumerate(backbone.strides)],
        "task": "features",
        "channels": "RGB",
        "mean": [123.675, 116.28, 103.53],
        "std": [58.395, 57.12, 57.375],
        "sides": [SMALLEST, LARGEST],
    }
    return Source(backbones.fuse(backbone.eval()), about, (side, side))


if __name__ == "__main__":
    main()
