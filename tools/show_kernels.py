"""Draw the weights with which a network mixes the positions of a photo.

    python tools/show_kernels.py photo.jpg --model i_d_dw_conv_tiny --checkpoint weights.pth \\
        --stage 3 --block 4 --out kernels.png

For a few positions of the photo and a few channels, the picture shows the weight of every position
around: the kernels that D-DW-Conv and I-D-DW-Conv predict, the attention of Swin, and the learned
weights of the others. Red is positive, blue negative; each panel has its own scale. The weights are
derivatives of the operator's output by its input, so every mixer of one operator can be drawn; one
with a convolution before attention (conv="pre", "pre_depthwise") is refused.
CHECKPOINT is any file that backbones.load_checkpoint reads, a detector's or segmentor's too. An
ablation's needs --ablation: some rows, such as swin_sliding, have the entries of their family.
"""

import argparse
import sys
from pathlib import Path

from dense.waiting import waiting

SIDE = 224


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("photo", type=Path, help="an image file")
    add("--model", required=True, help="timm name of the network, such as d_dw_conv_tiny")
    add("--ablation", metavar="NAME", help="a row of the paper's ablations, in the model's size")
    add("--checkpoint", required=True, help="weights of the network, a file or URL")
    add("--stage", type=int, default=2, help="1 to 4: strides of 4 to 32 pixels (%(default)s)")
    add("--block", type=int, default=1, help="block of the stage, from 1 (%(default)s)")
    add("--at", type=_point, nargs="+", metavar="X,Y", help="pixels of the photo; default: three")
    add("--channels", type=int, default=4, help="panels for each position (%(default)s)")
    add("--short-side", type=int, default=SIDE, help="pixels that the network sees (%(default)s)")
    add("--out", type=Path, default=Path("kernels.png"), help="the picture (%(default)s)")
    args = parser.parse_args(argv)
    for name in ("channels", "short_side"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} {getattr(args, name)}: 1 or more is needed")
    if not args.out.absolute().parent.is_dir():
        parser.error(f"--out {args.out}: there is no folder {args.out.absolute().parent}")
    return args


def _point(text: str) -> tuple[float, float]:
    x, y = map(float, text.split(","))
    return x, y


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    try:
        with waiting(f"importing PyTorch, loading {args.checkpoint} and drawing"):
            draw(args)
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        print(f"show_kernels: {error}", file=sys.stderr)
        return 1
    print(args.out)
    return 0


def draw(args: argparse.Namespace) -> None:
    """Load the network, take the weights and write the picture."""
    import timm
    import torch

    import backbones
    from backbones.ablations import ablated
    from dense.images import read_image

    image = read_image(args.photo)
    height, width = image.shape[:2]
    points = args.at or [(width * f, height * (1 - f)) for f in (0.3, 0.5, 0.7)]
    for x, y in points:
        if not (0 <= x < width and 0 <= y < height):
            raise ValueError(f"--at {x:g},{y:g} is outside of the {width}x{height} pixels")
    name, options = ablated(args.ablation, args.model) if args.ablation else (args.model, {})
    model = timm.create_model(name, **options).eval().requires_grad_(False)
    backbones.load_checkpoint(model, args.checkpoint)
    pixels = network_input(image, args.short_side, model.pretrained_cfg)
    with torch.no_grad():
        mixer, x = mixer_and_input(model, pixels, args.stage, args.block)
    scale = height / x.shape[0]  # of the photo's pixels for each position
    cells = [
        (min(int(y / scale), x.shape[0] - 1), min(int(x_ / scale), x.shape[1] - 1))
        for x_, y in points
    ]
    channels = [(2 * i + 1) * x.shape[-1] // (2 * args.channels) for i in range(args.channels)]
    weights = mixing_weights(mixer, x, cells, channels)
    picture(image, scale, cells, channels, weights, args)


def network_input(image, short_side: int, cfg: dict):
    """``(H, W, 3)`` uint8 RGB to ``(1, 3, h, w)``, resized and normalised as in pretraining."""
    import torch
    from PIL import Image
    from torchvision.transforms import functional as F

    pixels = F.to_tensor(F.resize(Image.fromarray(image), short_side, antialias=True))
    return torch.as_tensor(F.normalize(pixels, cfg["mean"], cfg["std"]))[None]


def mixer_and_input(model, pixels, stage: int, block: int):
    """The mixer of a block, counted from 1, and its input ``(H, W, C)`` for an image.

    Raises:
        ValueError: the network has no such stage or block.
    """
    if not hasattr(model, "stages"):
        raise ValueError(f"{type(model).__name__} is no pyramid: its blocks have no mixers to draw")
    if not 1 <= stage <= len(model.stages):
        raise ValueError(f"--stage {stage}: 1 to {len(model.stages)} exist")
    blocks = model.stages[stage - 1].blocks
    if not 1 <= block <= len(blocks):
        raise ValueError(f"--block {block}: stage {stage} has blocks 1 to {len(blocks)}")
    mixer, inputs = blocks[block - 1].mixer, []
    handle = mixer.register_forward_pre_hook(lambda _, args: inputs.append(args[0][0]))
    model.forward_features(pixels)
    handle.remove()
    return mixer, inputs[0]


def mixing_weights(mixer, x, cells, channels):
    """``(len(cells), len(channels), H, W)`` weights of the operator, in numpy.

    Args:
        mixer: a mixer.
        x: its input, ``(H, W, C)``.
        cells: output positions as (row, column).
        channels: output channels; weights of other input channels are not taken.
    """
    import torch

    from dense.analysis.properties import operator

    found = operator(mixer, x)
    height, width = x.shape[:2]
    rows = [
        [found.weights(row, column, c)[:height, :width, c] for c in channels]
        for row, column in cells
    ]
    return torch.stack([torch.stack(row) for row in rows]).numpy()


def picture(image, scale: float, cells, channels, weights, args) -> None:
    """Write the photo with the positions marked, and a row of panels for each position."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import numpy as np

    rows, columns = weights.shape[:2]
    figure, axes = plt.subplots(
        rows, columns + 1, figsize=(2.6 * (columns + 1), 2.6 * rows), squeeze=False, dpi=110
    )
    for (row, column), line, maps in zip(cells, axes, weights, strict=True):
        used = np.abs(maps).max(0) > 0
        ys, xs = np.nonzero(used)
        # One position around the window, in the photo's pixels.
        left, right = (xs.min() - 1) * scale, (xs.max() + 2) * scale
        top, bottom = (ys.min() - 1) * scale, (ys.max() + 2) * scale
        centre = ((column + 0.5) * scale, (row + 0.5) * scale)
        line[0].imshow(image)
        line[0].add_patch(
            plt.Rectangle(
                (left, top),
                right - left,
                bottom - top,
                fill=False,
                edgecolor="yellow",
                linewidth=1.5,
            )
        )
        for panel, channel, values in zip(line[1:], channels, maps, strict=True):
            panel.imshow(image)
            most = np.abs(values).max() or 1.0
            shown = np.ma.masked_where(~used, values)
            extent = (0, values.shape[1] * scale, values.shape[0] * scale, 0)
            panel.imshow(shown, cmap="RdBu_r", vmin=-most, vmax=most, alpha=0.65, extent=extent)
            panel.set_xlim(left, right)
            panel.set_ylim(bottom, top)
            panel.set_title(f"channel {channel}, to {most:.2g}", fontsize=8)
        for panel in line:
            panel.plot(*centre, "+", color="yellow", markersize=9, markeredgewidth=1.5)
            panel.set_xticks([])
            panel.set_yticks([])
        line[0].set_title(f"x {centre[0]:.0f}, y {centre[1]:.0f}", fontsize=8)
    name = f"{args.model}, {args.ablation}" if args.ablation else args.model
    figure.suptitle(f"{name}, stage {args.stage}, block {args.block}", fontsize=10)
    figure.tight_layout()

    from dense import files

    suffix = args.out.suffix.lstrip(".") or "png"
    files.write(args.out, lambda partial: figure.savefig(partial, format=suffix))
    plt.close(figure)


if __name__ == "__main__":
    sys.exit(main())
