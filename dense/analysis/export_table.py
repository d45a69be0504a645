"""The tables of dense/export/README.md: every family in every format beside eager.

    python -m dense.analysis.export_table --no-latency
    python -m dense.analysis.export_table --detectors --no-latency
    python -m dense.analysis.export_table --smaller --size tiny --photos FOLDER
    python -m dense.analysis.export_table --smaller --checkpoints RUN/epoch_20.pth --photos FOLDER

Networks have random weights, batch norms with statistics, and are compared by
:func:`dense.export.checking.compare`, at three sizes and the smallest. --smaller has the speed of
bfloat16, float16 weights and int8 over float32's in the same engine, for one image, whose size
OpenVINO is told beforehand; with --checkpoints, their cosines with eager, level by level, and what
tools/export.py keeps in float32. --detectors compares nano detectors by
:func:`dense.export.detections.compare_detections`.
"""

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median

import numpy as np
import torch
from torch import nn

import backbones
from backbones.families import FAMILIES
from dense.analysis.random_detectors import write_detector
from dense.backbone import DenseBackbone
from dense.export import checking, files, numbers
from dense.export.detections import compare_detections
from dense.export.graphs import LARGEST, SMALLEST
from dense.export.sources import Source, read_source

_COMPARED = 2  # photos


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--families", nargs="+", default=list(FAMILIES), choices=FAMILIES, metavar="FAMILY")
    add("--size", default="nano", help="of the networks (%(default)s)")
    add("--side", type=int, default=224, help="rows and columns in pixels (%(default)s)")
    add("--no-latency", action="store_true", help="leave out what another load would change")
    add("--smaller", action="store_true", help="the table of bfloat16, float16 and int8")
    add("--checkpoints", nargs="+", help="with --smaller: cosines of trained classifiers")
    add("--detectors", action="store_true", help="the table of whole detectors, nano")
    add("--photos", help="folder of photos; default: drawn scenes")
    add("--calibrated", type=int, default=8, help="photos that int8 is calibrated on (%(default)s)")
    args = parser.parse_args(argv)
    heads = ["backbone", "format", "largest relative error", "MB", "latency over eager's"]
    if args.detectors:
        heads[2:3] = ["detections", "boxes, pixels", "scores", "masks"]
    if args.smaller:
        heads = ["backbone", "numbers", "engine", "MB", "speed over float32's"]
    if args.checkpoints:
        heads = ["backbone", "numbers", "engine", "cosines of strides 4, 8, 16, 32"]
        heads += ["stay in float32"]
    elif args.no_latency:
        heads.pop()
    print(f"| {' | '.join(heads)} |\n|{' --- |' * len(heads)}", flush=True)
    photos = photos_of(args.photos, args.calibrated)
    for name, found in _measured(args, photos):
        for row in found:
            print(f"| {' | '.join([f'`{name}`', *row][: len(heads)])} |", flush=True)


def _measured(
    args: argparse.Namespace, photos: Sequence[np.ndarray]
) -> Iterator[tuple[str, Iterator[list[str]]]]:
    """Networks' names and rows."""
    for checkpoint in args.checkpoints or ():
        source = read_source(checkpoint, None, "backbone")
        yield source.about["model"], trained_rows(source, photos)
    for family in () if args.checkpoints else args.families:
        name = f"{family}_{args.size}"
        if args.detectors:
            yield name, detector_rows(family, photos)
        else:
            measure = smaller_rows if args.smaller else rows
            yield name, measure(random_source(name, args.side), photos)


def photos_of(folder: str | None, count: int) -> list[np.ndarray]:
    """The first photos of a folder, or drawn scenes, RGB."""
    from dense.demo.scenes import draw_scene

    if folder:
        return checking.find_photos(folder, count)
    return [draw_scene(np.random.default_rng(seed), 256).image for seed in range(count)]


def rows(source: Source, photos: Sequence[np.ndarray]) -> Iterator[list[str]]:
    """The table's rows of a network: format, error, megabytes, latency ratio."""
    with tempfile.TemporaryDirectory() as folder:
        graph = Path(folder, "backbone.onnx")
        files.write(source.network, source.about, graph)
        for kind, suffix in files.FORMATS.items():
            file = graph.with_suffix(suffix)
            written = [file]
            if kind == "openvino":
                written = files.to_openvino(graph, file)
            elif kind != "onnx":
                written = files.write(source.network, source.about, file)
            found = _compared(source, file, photos)
            error = max(found.errors.values())
            yield [kind, f"{error:.1e}", _megabytes(written), f"{found.ratio:.2f}"]


def detector_rows(family: str, photos: Sequence[np.ndarray]) -> Iterator[list[str]]:
    """Rows of a detector: format, detections, their largest errors, megabytes, latency ratio."""
    with tempfile.TemporaryDirectory() as folder:
        source = read_source(write_detector(Path(folder), family))
        graph = Path(folder, "detector.onnx")
        files.write(source.network, source.about, graph)
        converted = files.to_openvino(graph, graph.with_suffix(".xml"))
        for kind, written in (("onnx", [graph]), ("openvino", converted)):
            run = files.Runner(written[0], torch.get_num_threads())
            found = compare_detections(source, run, photos[:_COMPARED])
            errors = [f"{error:.1e}" for error in found.errors.values()]
            count = str(found.pairs) if not found.alone else f"{found.alone} alone"
            yield [kind, count, *errors, _megabytes(written), f"{found.ratio:.2f}"]


def smaller_rows(source: Source, photos: Sequence[np.ndarray]) -> Iterator[list[str]]:
    """Rows of a network: numbers, engine, megabytes, speed over float32's in that engine.

    All its layers are in int8. The cosines of random weights say nothing of trained ones: rounding
    grows from layer to layer, that of bfloat16 too.
    """
    with tempfile.TemporaryDirectory() as folder:
        graph, int8 = Path(folder, "float32.onnx"), Path(folder, "int8.onnx")
        files.write(source.network, source.about, graph)
        plain = {"OpenVINO": files.to_openvino(graph, graph.with_suffix(".xml"))[0]}
        plain["ONNX Runtime"] = graph
        batches = [checking.normalised(photo, source.about, source.size) for photo in photos]
        numbers.quantise(graph, int8, batches, ())
        made = _smaller(graph, int8)
        seconds = _seconds([*plain.values(), *(written[0] for *_, written in made)], batches[0])
        for precision, engine, written in made:
            ratio = seconds[plain[engine]] / seconds[written[0]]
            yield [precision, engine, _megabytes(written), f"{ratio:.2f}"]


def trained_rows(source: Source, photos: Sequence[np.ndarray]) -> Iterator[list[str]]:
    """Rows of a network: numbers, engine, the cosines of its maps, the layers left in float32."""
    with tempfile.TemporaryDirectory() as folder:
        graph, int8 = Path(folder, "float32.onnx"), Path(folder, "int8.onnx")
        files.write(source.network, source.about, graph)
        batches = [checking.normalised(photo, source.about, source.size) for photo in photos]
        cosine_of = checking.cosines_with(source, photos[:_COMPARED])
        done = numbers.quantise_within(graph, int8, batches, cosine_of, checking.COSINE)
        kept = ", ".join(f"{kind} ({count})" for kind, count in done.kept.items()) or "none"
        for precision, engine, written in _smaller(graph, int8):
            found = _compared(source, written[0], photos, smallest=False)
            cosines = ", ".join(f"{value:.4f}" for value in found.cosines.values())
            yield [precision, engine, cosines, kept if precision == "int8" else "-"]


def _smaller(graph: Path, int8: Path) -> list[tuple[str, str, list[Path]]]:
    """Numbers, engine and files of all precisions."""
    made = [
        (
            precision,
            "OpenVINO",
            files.to_openvino(graph, graph.with_name(f"{precision}.xml"), precision),
        )
        for precision in ("bf16", "fp16")
    ]
    made.append(("int8", "OpenVINO", files.to_openvino(int8, int8.with_suffix(".xml"))))
    return [*made, ("int8", "ONNX Runtime", [int8])]


def _seconds(paths: Sequence[Path], image: np.ndarray, rounds: int = 20) -> dict[Path, float]:
    """The median times of files, OpenVINO's made for the image's size, in turns."""
    threads = torch.get_num_threads()
    shapes = {path: image.shape if path.suffix == ".xml" else None for path in paths}
    runs = {path: files.Runner(path, threads, shape) for path, shape in shapes.items()}
    times = [{p: checking.seconds(run, image, 1) for p, run in runs.items()} for _ in range(rounds)]
    return {path: median(round_[path] for round_ in times) for path in paths}


def _compared(
    source: Source, file: Path, photos: Sequence[np.ndarray], smallest: bool = True
) -> checking.Comparison:
    run = files.Runner(file, torch.get_num_threads())
    return checking.compare(source, run, photos[:_COMPARED], smallest=smallest)


def _megabytes(written: Sequence[Path]) -> str:
    return f"{sum(path.stat().st_size for path in written) / 1e6:.1f}"


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
