"""Draw predictions over images: boxes and masks, label maps, lines of text.

Images are ``(H, W, 3)`` uint8 RGB. An image whose longer side is at most 320 pixels is enlarged by
an integer factor, so that the text is legible.
"""

import colorsys
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

Colours = Mapping[str, Sequence[int]]
_LEGEND = 40


def class_colours(count: int) -> list[tuple[int, int, int]]:
    """A colour for each of ``count`` classes, RGB from 0 to 255; the first are always the same.

    Hues lie a golden angle apart, so that neighbours differ; lightness alternates.
    """
    colours = []
    for index in range(count):
        lightness = (0.55, 0.42, 0.68)[index % 3]
        colour = colorsys.hls_to_rgb(index * 0.618034 % 1, lightness, 0.85)
        colours.append(tuple(round(255 * value) for value in colour))
    return colours


def draw_instances(
    image: np.ndarray,
    boxes: np.ndarray,
    masks: np.ndarray | None,
    texts: Sequence[str],
    colours: Sequence[Sequence[int]] | None = None,
) -> np.ndarray:
    """Draw boxes, masks and labels with Detectron2's visualizer.

    Args:
        image: ``(H, W, 3)`` uint8, RGB.
        boxes: ``(N, 4)`` as x1, y1, x2, y2 in pixels.
        masks: ``(N, H, W)`` bool, or None.
        texts: N labels, one for each box.
        colours: N colours, RGB from 0 to 255; None gives each instance one of its own.

    Returns:
        ``(sH, sW, 3)`` uint8, where ``s`` is the integer enlargement of a small image.
    """
    from detectron2.utils.colormap import colormap
    from detectron2.utils.visualizer import Visualizer

    own = colormap(rgb=True, maximum=255) if colours is None else np.asarray(colours)
    visualizer = Visualizer(image, scale=_enlargement(image))
    visualizer.overlay_instances(
        boxes=boxes,
        masks=None if masks is None else [mask.astype(np.uint8) for mask in masks],
        labels=list(texts),
        assigned_colors=[own[index % len(own)] / 255 for index in range(len(boxes))],
    )
    return np.ascontiguousarray(visualizer.output.get_image())


def draw_instances_openmmlab(
    image: np.ndarray,
    boxes: np.ndarray,
    masks: np.ndarray | None,
    texts: Sequence[str],
    colours: Sequence[Sequence[int]] | None = None,
) -> np.ndarray:
    """:func:`draw_instances` with mmengine's visualizer, which needs no Detectron2."""
    from matplotlib import colormaps
    from mmengine.visualization import Visualizer

    scale = _enlargement(image)
    visualizer = Visualizer(image=image.repeat(scale, axis=0).repeat(scale, axis=1))
    if len(boxes):
        if colours is None:
            colours = (np.asarray(colormaps["tab10"].colors) * 255).astype(int).tolist()
        colours = [tuple(colours[index % len(colours)]) for index in range(len(boxes))]
        if masks is not None:
            masks = masks.astype(bool).repeat(scale, axis=1).repeat(scale, axis=2)
            visualizer.draw_binary_masks(masks, colors=colours, alphas=0.5)
        visualizer.draw_bboxes(boxes * scale, edge_colors=colours, line_widths=1)
        visualizer.draw_texts(
            list(texts),
            boxes[:, :2] * scale,
            font_sizes=max(8, min(image.shape[:2]) * scale // 40),
            colors="white",
            vertical_alignments="top",
            bboxes=dict(facecolor="black", alpha=0.6, pad=1, edgecolor="none"),
        )
    return visualizer.get_image()


def segmentation_drawer(
    classes: Sequence[str], palette: Sequence[Sequence[int]], named: bool = True
) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """Return ``draw(image, labels)``, which draws labels ``(H, W)`` over an image ``(H, W, 3)``.

    Args:
        classes: class names, by label.
        palette: one RGB colour for each class.
        named: write the class names into the image.
    """
    from mmengine.visualization import Visualizer

    # Not MMSegmentation's SegLocalVisualizer: placing its labels takes seconds for each photo.
    visualizer = Visualizer()

    def draw(image: np.ndarray, labels: np.ndarray) -> np.ndarray:
        scale = _enlargement(image)
        image, labels = (a.repeat(scale, axis=0).repeat(scale, axis=1) for a in (image, labels))
        shown = [int(label) for label in np.unique(labels) if 0 <= label < len(classes)]
        visualizer.set_image(image)
        if shown:
            masks = np.stack([labels == label for label in shown])
            colours = [tuple(palette[label]) for label in shown]
            visualizer.draw_binary_masks(masks, colors=colours, alphas=0.6)
        if shown and named:
            visualizer.draw_texts(
                [classes[label] for label in shown],
                np.array([_deepest_point(mask) for mask in masks]),
                font_sizes=max(8, min(image.shape[:2]) // 40),
                colors="white",
                horizontal_alignments="center",
                vertical_alignments="center",
                bboxes=dict(facecolor="black", alpha=0.6, pad=2, edgecolor="none"),
            )
        return visualizer.get_image()

    return draw


def _deepest_point(mask: np.ndarray) -> tuple[int, int]:
    """The x and y of the mask's pixel farthest from its border: the label covers no edge there."""
    import cv2

    # Padding with zeros makes the image's border count as a border of the mask.
    depth = cv2.distanceTransform(np.pad(mask.astype(np.uint8), 1), cv2.DIST_L2, 3)
    y, x = np.unravel_index(depth[1:-1, 1:-1].argmax(), mask.shape)
    return int(x), int(y)


def _enlargement(image: np.ndarray) -> int:
    return max(1, round(480 / max(image.shape[:2])))


def with_legend(image: np.ndarray, colours: Colours) -> np.ndarray:
    """Add a strip below an image ``(H, W, 3)`` uint8 with class names beside their colours.

    Args:
        image: a picture that was drawn.
        colours: RGB from 0 to 255 by class name, in order; the first 40 are shown. Without any, the
            image stays as it is.
    """
    if not colours:
        return image
    height, width = image.shape[:2]
    size = max(11, min(height, width) // 28)
    font = ImageFont.load_default(size)
    line, gap = round(1.5 * size), size // 2
    entries = list(colours.items())[:_LEGEND]
    if more := len(colours) - len(entries):
        entries.append((f"and {more} more", (255, 255, 255)))
    places, x, y = [], gap, gap
    for name, _ in entries:
        needed = 2 * size + gap + round(font.getlength(name))
        if x > gap and x + needed > width:
            x, y = gap, y + line
        places.append((x, y))
        x += needed + gap
    picture = Image.new("RGB", (width, height + y + line), "white")
    picture.paste(Image.fromarray(image))
    draw = ImageDraw.Draw(picture)
    for (name, colour), (x, y) in zip(entries, places, strict=True):
        top = height + y
        draw.rectangle((x, top, x + size, top + size), fill=tuple(colour), outline="black")
        draw.text((x + size + gap, top - 1), name, font=font, fill="black")
    return np.asarray(picture)


def draw_lines(image: np.ndarray, lines: Sequence[str]) -> np.ndarray:
    """Write lines of text into the upper left corner of an image ``(H, W, 3)`` uint8."""
    scale = _enlargement(image)
    picture = Image.fromarray(image.repeat(scale, axis=0).repeat(scale, axis=1))
    draw = ImageDraw.Draw(picture, "RGBA")
    size = max(10, min(picture.size) // 24)
    font = ImageFont.load_default(size)
    box = draw.multiline_textbbox((size // 2, size // 2), "\n".join(lines), font=font)
    draw.rectangle((0, 0, box[2] + size // 2, box[3] + size // 2), fill=(0, 0, 0, 150))
    draw.multiline_text((size // 2, size // 2), "\n".join(lines), font=font, fill=(255, 255, 255))
    return np.asarray(picture)
