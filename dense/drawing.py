"""Draw predictions over images: boxes and masks, label maps, lines of text.

Images are ``(H, W, 3)`` uint8 RGB. An image whose longer side is at most 320 pixels is enlarged by
an integer factor, so that the text is legible.
"""

from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont


def draw_instances(
    image: np.ndarray, boxes: np.ndarray, masks: np.ndarray | None, texts: Sequence[str]
) -> np.ndarray:
    """Draw boxes, masks and labels with Detectron2's visualizer.

    Args:
        image: ``(H, W, 3)`` uint8, RGB.
        boxes: ``(N, 4)`` as x1, y1, x2, y2 in pixels.
        masks: ``(N, H, W)`` bool, or None.
        texts: N labels, one for each box.

    Returns:
        ``(sH, sW, 3)`` uint8, where ``s`` is the integer enlargement of a small image.
    """
    from detectron2.utils.colormap import colormap
    from detectron2.utils.visualizer import Visualizer

    colours = colormap(rgb=True, maximum=1)
    visualizer = Visualizer(image, scale=_enlargement(image))
    visualizer.overlay_instances(
        boxes=boxes,
        masks=None if masks is None else [mask.astype(np.uint8) for mask in masks],
        labels=list(texts),
        assigned_colors=[colours[index % len(colours)] for index in range(len(boxes))],
    )
    return np.ascontiguousarray(visualizer.output.get_image())


def draw_instances_openmmlab(
    image: np.ndarray, boxes: np.ndarray, masks: np.ndarray | None, texts: Sequence[str]
) -> np.ndarray:
    """:func:`draw_instances` with mmengine's visualizer, which needs no Detectron2."""
    from matplotlib import colormaps
    from mmengine.visualization import Visualizer

    scale = _enlargement(image)
    visualizer = Visualizer(image=image.repeat(scale, axis=0).repeat(scale, axis=1))
    if len(boxes):
        table = (np.asarray(colormaps["tab10"].colors) * 255).astype(int).tolist()
        colours = [tuple(table[index % len(table)]) for index in range(len(boxes))]
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
    classes: Sequence[str], palette: Sequence[Sequence[int]]
) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """Return ``draw(image, labels)``, which draws labels ``(H, W)`` over an image ``(H, W, 3)``.

    Args:
        classes: class names, by label.
        palette: one RGB colour for each class.
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
