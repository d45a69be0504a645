"""One training step and one evaluation step of a Detectron2 model on a made-up image."""

import torch
from detectron2.structures import Boxes, Instances, PolygonMasks
from detectron2.utils.events import EventStorage
from torch import nn


def sample(size: tuple[int, int] = (96, 128), count: int = 1) -> list[dict]:
    """Images of ``size`` with two objects of classes 0 and 1 each."""
    height, width = size
    samples = []
    for _ in range(count):
        boxes = torch.tensor([[8.0, 8.0, 60.0, 50.0], [30.0, 20.0, width - 6.0, height - 4.0]])
        objects = Instances(size)
        objects.gt_boxes = Boxes(boxes)
        objects.gt_classes = torch.tensor([0, 1])
        objects.gt_masks = PolygonMasks(
            [[b[[0, 1, 2, 1, 2, 3, 0, 3]].double().numpy()] for b in boxes]
        )
        image = torch.randint(0, 256, (3, height, width), dtype=torch.uint8)
        samples.append({"image": image, "instances": objects, "height": height, "width": width})
    return samples


def train_step(model: nn.Module, batch: list[dict]) -> float:
    """Forward, backward, one SGD update; the sum of the losses."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    model.train()
    with EventStorage():
        loss = sum(model(batch).values())
    loss.backward()
    optimizer.step()
    return loss.item()


@torch.no_grad()
def eval_step(model: nn.Module, batch: list[dict]) -> Instances:
    """The detections in the first image."""
    model.eval()
    return model([{k: v for k, v in item.items() if k != "instances"} for item in batch])[0][
        "instances"
    ]
