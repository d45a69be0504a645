"""A training iteration of whole detectors and segmentors, beside the frameworks' own Swin-T."""

from importlib.util import find_spec

import torch
from torch import nn

import backbones
from dense.analysis.benchmark.measure import Contender, Contest, Step
from dense.backbone import revert_sync_batchnorm
from dense.recipes import RECIPES

_SWIN_TINY = dict(depths=(2, 2, 6, 2), num_heads=(3, 6, 12, 24), drop_path_rate=0.2)
_SIZES = ((512, 512), (800, 1344))


def contests(
    device: torch.device, sizes: tuple[tuple[int, int], tuple[int, int]] = _SIZES
) -> list[Contest]:
    """UPerNet and Cascade Mask R-CNN, if their frameworks are installed, each at its (H, W)."""
    on_gpu = device.type == "cuda"
    found = []
    for package, framework, model, size, images, make in (
        # At least 2: UPerNet pools to 1x1, where batch norm needs a second image.
        ("mmseg", "MMSegmentation", "UPerNet", sizes[0], 8 if on_gpu else 2, _segmentor),
        ("detectron2", "Detectron2", "Cascade Mask R-CNN", sizes[1], 1 + on_gpu, _detector),
    ):
        if not find_spec(package):
            continue
        contenders = tuple(
            Contender(
                name or f"{framework}'s Swin-T",
                _builder(make, name, size, images, device),
                ours=name is not None,
            )
            for name in (None, *(f"{family}_tiny" for family in backbones.FAMILIES))
        )
        title = f"{model}, training iteration, {size[0]}x{size[1]}, batch {images}"
        found.append(Contest("models", title, contenders, images, images * size[0] * size[1]))
    return found


def _builder(make, name: str | None, size: tuple[int, int], images: int, device: torch.device):
    def build() -> Step:
        torch.manual_seed(0)
        model, loss_of = make(name, size, images, device)
        model = revert_sync_batchnorm(model).to(device).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
        half = torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")

        def step() -> None:
            # The same sampled proposals and drop paths for all contenders.
            torch.manual_seed(1)
            optimizer.zero_grad(set_to_none=True)
            with half:
                loss = loss_of(model)
            loss.backward()
            optimizer.step()

        return step

    return build


def _segmentor(name: str | None, size: tuple[int, int], images: int, device: torch.device):
    from mmengine.structures import PixelData
    from mmseg.registry import MODELS
    from mmseg.structures import SegDataSample
    from mmseg.utils import register_all_modules

    from dense.segmentation.config import load_config

    config = "swin_tiny_upernet_8xb2-160k_ade20k-512x512.py"
    cfg = load_config(RECIPES / "segmentation" / config)
    cfg.model.data_preprocessor.size = size
    if name is None:
        cfg.model.backbone = dict(type="mmseg.SwinTransformer", embed_dims=96, **_SWIN_TINY)
    else:
        cfg.model.backbone.update(type=name, init=None)
    register_all_modules()
    model = MODELS.build(cfg.model)
    data = {"inputs": [], "data_samples": []}
    for _ in range(images):
        sample = SegDataSample(metainfo=dict(img_shape=size, ori_shape=size))
        sample.set_data({"gt_sem_seg": PixelData(data=torch.randint(0, 150, (1, *size)))})
        data["inputs"].append(torch.randint(0, 256, (3, *size), dtype=torch.uint8))
        data["data_samples"].append(sample)

    def loss_of(model: nn.Module) -> torch.Tensor:
        batch = model.data_preprocessor(data, training=True)
        losses = model(**batch, mode="loss")
        return model.parse_losses(losses)[0]

    return model, loss_of


def _detector(name: str | None, size: tuple[int, int], images: int, device: torch.device):
    from detectron2.config import LazyCall, instantiate
    from detectron2.modeling.backbone import SwinTransformer
    from detectron2.structures import BitMasks, Boxes, Instances

    from dense.detection.config import load_config

    cfg = load_config(str(RECIPES / "detection/cascade_mask_rcnn_swin_tiny_3x_coco.py"))
    if name is None:
        cfg.model.backbone.bottom_up = LazyCall(SwinTransformer)(embed_dim=96, **_SWIN_TINY)
        cfg.model.backbone.in_features = ["p0", "p1", "p2", "p3"]
    else:
        cfg.model.backbone.bottom_up.update(name=name, init=None)
    model = instantiate(cfg.model)
    generator = torch.Generator().manual_seed(0)
    batch = []
    for _ in range(images):
        corner = torch.rand(8, 2, generator=generator) * torch.tensor([size[1], size[0]]) * 0.6
        boxes = torch.cat([corner, corner + 60 + 200 * torch.rand(8, 2, generator=generator)], 1)
        boxes[:, 0::2].clamp_(max=size[1])
        boxes[:, 1::2].clamp_(max=size[0])
        masks = torch.zeros(8, *size, dtype=torch.bool)
        for mask, (x1, y1, x2, y2) in zip(masks, boxes.long().tolist(), strict=True):
            mask[y1:y2, x1:x2] = True
        truth = Instances(size)
        truth.gt_boxes, truth.gt_masks = Boxes(boxes), BitMasks(masks)
        truth.gt_classes = torch.arange(8)
        image = torch.randint(0, 256, (3, *size), generator=generator, dtype=torch.uint8)
        batch.append({"image": image, "instances": truth.to(device)})

    def loss_of(model: nn.Module) -> torch.Tensor:
        from detectron2.utils.events import EventStorage

        with EventStorage():
            return sum(model(batch).values())

    return model, loss_of
