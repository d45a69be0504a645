"""The cascade against MMDetection's, on the same maps, proposals, objects and weights."""

import re
from pathlib import Path

import pytest
import torch
from detectron2.config import instantiate
from detectron2.layers import ShapeSpec, paste_masks_in_image
from detectron2.modeling.roi_heads import CascadeROIHeads, MaskRCNNConvUpsampleHead
from detectron2.structures import BitMasks, Boxes, ImageList, Instances
from detectron2.utils.events import EventStorage
from torch import nn
from torchvision.ops import box_iou

from dense.backbone import revert_sync_batchnorm
from dense.detection.cascade import PaperCascadeROIHeads, mask_heads
from dense.detection.config import load_config
from dense.recipes import RECIPES

mmdet = pytest.importorskip("mmdet", reason="MMDetection is not installed")

from mmdet.registry import MODELS  # noqa: E402
from mmdet.structures import DetDataSample  # noqa: E402
from mmdet.structures.mask import BitmapMasks  # noqa: E402
from mmengine.config import Config  # noqa: E402
from mmengine.registry import init_default_scope  # noqa: E402
from mmengine.structures import InstanceData  # noqa: E402

import dense.segmentation  # noqa: E402, F401

MMDETECTIONS = (
    Path(mmdet.__file__).parent / ".mim/configs/_base_/models/cascade-mask-rcnn_r50_fpn.py"
)
CONFIG = str(RECIPES / "detection/cascade_mask_rcnn_dw_conv_tiny_3x_coco.py")
HEIGHT, WIDTH, CHANNELS, CLASSES, IMAGES, OBJECTS = 256, 320, 16, 5, 2, 40
NAMES = (
    (r"^conv(\d)\.norm\.", r"shared_convs.\1.bn."),
    (r"^conv(\d)\.", r"shared_convs.\1.conv."),
    (r"^fc1\.", "shared_fcs.0."),
    (r"^mask_fcn(\d)\.", r"convs.\1.conv."),
    (r"^deconv\.", "upsample."),
    (r"^predictor\.", "conv_logits."),
    (r"^cls_score\.", "fc_cls."),
    (r"^bbox_pred\.", "fc_reg."),
    (r"^conv\.", "rpn_conv."),
    (r"^objectness_logits\.", "rpn_cls."),
    (r"^anchor_deltas\.", "rpn_reg."),
)


def theirs(name: str) -> str:
    """MMDetection's name of a layer of Detectron2."""
    for ours, other in NAMES:
        if match := re.match(ours, name):
            index = str(int(match[1]) - 1) if match.groups() else ""
            return re.sub(ours, other.replace(r"\1", index), name)
    return name


def recipe(shared: bool = True, masks: bool = True):
    """The recipe's model with few channels and classes; nothing of its training is changed."""
    model = load_config(CONFIG, [f"model.roi_heads.shared_heads={shared}"]).model
    model.backbone.out_channels = CHANNELS
    model.roi_heads.num_classes = CLASSES
    for head, predictor in zip(
        model.roi_heads.box_heads, model.roi_heads.box_predictors, strict=True
    ):
        head.conv_dims, head.fc_dims = [CHANNELS] * 4, [32]
        predictor.input_shape.channels = 32
    model.roi_heads.mask_head.conv_dims = [CHANNELS] * 5
    if not masks:
        model.roi_heads.mask_in_features = None
    return model


def spread(module: nn.Module) -> nn.Module:
    """Weights with which boxes move and scores differ."""
    for name, parameter in module.named_parameters():
        if "cls_score.weight" in name or "bbox_pred.weight" in name:
            nn.init.normal_(parameter, std=0.3)
        elif "anchor_deltas.weight" in name or "objectness_logits.weight" in name:
            nn.init.normal_(parameter, std=0.05)
    return module


def smooth(module: nn.Module) -> nn.Module:
    """No ReLU: its derivative jumps, so that rounding would show in gradients."""
    for parent in module.modules():
        for name, child in parent.named_children():
            if isinstance(child, nn.ReLU):
                setattr(parent, name, nn.Softplus())
    return module


def heads(shared: bool, masks: bool = True) -> PaperCascadeROIHeads:
    torch.manual_seed(0)
    return smooth(spread(revert_sync_batchnorm(instantiate(recipe(shared, masks).roi_heads))))


def mmdetections(roi_heads: PaperCascadeROIHeads, masks: bool = True) -> nn.Module:
    """MMDetection's own cascade with its own settings, Swin's box heads, and the same weights."""
    model = Config.fromfile(MMDETECTIONS).model
    cfg = model.roi_head
    cfg.bbox_head = [
        dict(
            type="ConvFCBBoxHead",
            num_shared_convs=4,
            num_shared_fcs=1,
            in_channels=CHANNELS,
            conv_out_channels=CHANNELS,
            fc_out_channels=32,
            roi_feat_size=7,
            num_classes=CLASSES,
            bbox_coder=dict(
                type="DeltaXYWHBBoxCoder", target_means=[0.0] * 4, target_stds=deviations
            ),
            reg_class_agnostic=roi_heads.shared_heads,
            reg_decoded_bbox=True,
            norm_cfg=dict(type="BN"),
            loss_cls=dict(type="CrossEntropyLoss", use_sigmoid=False, loss_weight=1.0),
            loss_bbox=dict(type="GIoULoss", loss_weight=10.0),
        )
        for deviations in (
            [0.1, 0.1, 0.2, 0.2],
            [0.05, 0.05, 0.1, 0.1],
            [0.033, 0.033, 0.067, 0.067],
        )
    ]
    cfg.bbox_roi_extractor.out_channels = cfg.mask_roi_extractor.out_channels = CHANNELS
    cfg.mask_head.update(in_channels=CHANNELS, conv_out_channels=CHANNELS, num_classes=CLASSES)
    if not masks:
        cfg.mask_roi_extractor = cfg.mask_head = None
    cfg.update(train_cfg=model.train_cfg.rcnn, test_cfg=model.test_cfg.rcnn)
    init_default_scope("mmdet")
    other = smooth(MODELS.build(cfg))
    for ours, its in pairs(roi_heads, other):
        its.load_state_dict({theirs(k): v for k, v in ours.state_dict().items()})
    return other


def pairs(roi_heads: PaperCascadeROIHeads, other: nn.Module):
    """Our heads and MMDetection's of the same layers."""
    for stage in range(3):
        parts = {**dict(roi_heads.box_head[stage].named_children())}
        parts |= dict(roi_heads.box_predictor[stage].named_children())
        yield nn.ModuleDict(parts), other.bbox_head[stage]
        if roi_heads.mask_on:
            yield roi_heads.mask_head[stage], other.mask_head[stage]


def scene():
    """Maps of each level, and the objects of each image: boxes, classes and masks."""
    torch.manual_seed(1)
    maps = [torch.randn(IMAGES, CHANNELS, HEIGHT // s, WIDTH // s) for s in (4, 8, 16, 32, 64)]
    sizes = 12 + 180 * torch.rand(IMAGES, OBJECTS, 2) ** 2
    corners = torch.rand(IMAGES, OBJECTS, 2) * (torch.tensor([WIDTH, HEIGHT]) - sizes)
    boxes = torch.cat([corners, corners + sizes], 2)
    classes = torch.randint(CLASSES, (IMAGES, OBJECTS))
    rows, columns = torch.arange(HEIGHT)[:, None], torch.arange(WIDTH)
    x1, y1, x2, y2 = boxes[..., None, None].unbind(2)
    # An ellipse within each box.
    across = ((columns - (x1 + x2) / 2) / (x2 - x1)) ** 2
    masks = across + ((rows - (y1 + y2) / 2) / (y2 - y1)) ** 2 < 0.25
    return maps, boxes, classes, masks


def near(boxes: torch.Tensor, count: int) -> torch.Tensor:
    """``count`` proposals in each image, half of them around objects."""
    chosen = boxes[:, torch.randint(OBJECTS, (count // 2,))]
    sizes = (chosen[..., 2:] - chosen[..., :2]).repeat(1, 1, 2)
    around = chosen + 0.15 * sizes * torch.randn_like(chosen)
    corners = torch.rand(IMAGES, count - count // 2, 2) * torch.tensor([WIDTH, HEIGHT])
    elsewhere = torch.cat([corners, corners + 60 * torch.rand_like(corners)], 2)
    found = torch.cat([around, elsewhere], 1)
    limits = torch.tensor([WIDTH, HEIGHT, WIDTH, HEIGHT])
    return found.clamp(min=0).minimum(limits)


def instances(boxes, classes, masks) -> list[Instances]:
    return [
        Instances((HEIGHT, WIDTH), gt_boxes=Boxes(b), gt_classes=c, gt_masks=BitMasks(m))
        for b, c, m in zip(boxes, classes, masks, strict=True)
    ]


def data_samples(boxes, classes, masks) -> list[DetDataSample]:
    shape = (HEIGHT, WIDTH)
    meta = dict(img_shape=shape, ori_shape=shape, pad_shape=shape, scale_factor=(1.0, 1.0))
    return [
        DetDataSample(
            metainfo=meta,
            gt_instances=InstanceData(
                bboxes=b, labels=c, masks=BitmapMasks(m.numpy().astype("uint8"), *shape)
            ),
        )
        for b, c, m in zip(boxes, classes, masks, strict=True)
    ]


def assert_close(ours: torch.Tensor, others: torch.Tensor, name: str = "") -> None:
    error = (ours - others).norm() / others.norm().clamp(min=1e-6)
    assert error < 1e-4, f"{name}: {error}"


@pytest.fixture
def first_ones(monkeypatch):
    """Both frameworks sample with ``randperm``: now the first of the candidates, in order."""
    monkeypatch.setattr(torch, "randperm", lambda n, **kwargs: torch.arange(n))


@pytest.mark.slow
@pytest.mark.parametrize("count", [300, 1600], ids=["all are sampled", "some are sampled"])
@pytest.mark.parametrize("shared", [True, False], ids=["shared heads", "the paper's heads"])
def test_training_is_mmdetections(first_ones, shared, count):
    maps, *objects = scene()
    proposals = near(objects[0], count)
    ours = heads(shared, masks=not shared).train()
    other = mmdetections(ours, masks=not shared).train()

    own_maps = [m.clone().requires_grad_() for m in maps[:4]]
    own_proposals = [Instances((HEIGHT, WIDTH), proposal_boxes=Boxes(p)) for p in proposals]
    drawn = []
    sample = ours._sample
    ours._sample = lambda *arguments: drawn.append(sample(*arguments)) or drawn[-1]
    with EventStorage():
        features = dict(zip(("p2", "p3", "p4", "p5"), own_maps, strict=True))
        own_losses = ours(None, features, own_proposals, instances(*objects))[1]
    sum(own_losses.values()).backward()

    other_maps = [m.clone().requires_grad_() for m in maps[:4]]
    their_draws = []
    box_loss = other.bbox_loss
    other.bbox_loss = lambda stage, x, s: their_draws.append(s) or box_loss(stage, x, s)
    results = [InstanceData(bboxes=p) for p in proposals]
    losses = other.loss(other_maps, results, data_samples(*objects))
    losses = {name: loss for name, loss in losses.items() if "loss" in name}
    sum(losses.values()).backward()

    counts = []
    for stage, (mine, its) in enumerate(zip(drawn, their_draws, strict=True)):
        for image in range(IMAGES):
            chosen = mine[image].gt_classes != CLASSES
            boxes = mine[image].proposal_boxes.tensor
            assert_close(boxes[chosen], its[image].pos_priors, f"foreground of stage {stage}")
            assert_close(boxes[~chosen], its[image].neg_priors, f"background of stage {stage}")
            assert mine[image].gt_classes[chosen].equal(its[image].pos_gt_labels)
            counts.append((int(chosen.sum()), int((~chosen).sum())))
    # Each stage has foreground and background of its own; the budget is 512, a quarter foreground.
    assert all(f > OBJECTS and b > 0 for f, b in counts) and len(set(counts)) > 2
    assert (counts[:2] == [(128, 384)] * 2) == (count == 1600)

    names = {"loss_cls": "loss_cls", "loss_box_reg": "loss_bbox", "loss_mask": "loss_mask"}
    renamed = {
        f"s{name[-1]}.{names[name.removesuffix(f'_stage{name[-1]}')]}": loss
        for name, loss in own_losses.items()
    }
    assert renamed.keys() == losses.keys() and len(renamed) == (6 if shared else 9)
    for name, loss in losses.items():
        assert_close(renamed[name], loss, name)
    for mine, its in zip(own_maps, other_maps, strict=True):
        assert_close(mine.grad, its.grad, "maps")
    for mine, its in pairs(ours, other):
        gradients = {name: p.grad for name, p in its.named_parameters()}
        for name, parameter in mine.named_parameters():
            assert_close(parameter.grad, gradients[theirs(name)], name)


@pytest.mark.parametrize("shared", [True, False], ids=["shared heads", "the paper's heads"])
def test_detections_are_mmdetections(shared):
    maps, *objects = scene()
    proposals = near(objects[0], 200)
    ours = heads(shared, masks=not shared).eval()
    other = mmdetections(ours, masks=not shared).eval()
    features = dict(zip(("p2", "p3", "p4", "p5"), maps, strict=False))
    given = [Instances((HEIGHT, WIDTH), proposal_boxes=Boxes(p)) for p in proposals]
    with torch.no_grad():
        found = ours(None, features, given)[0]
        results = [InstanceData(bboxes=p) for p in proposals]
        expected = other.predict(maps[:4], results, data_samples(*objects))
    for mine, its in zip(found, expected, strict=True):
        assert len(mine) == len(its) == 100
        assert mine.pred_classes.equal(its.labels)
        assert_close(mine.scores, its.scores)
        assert_close(mine.pred_boxes.tensor, its.bboxes)
        if not shared:
            pasted = paste_masks_in_image(
                mine.pred_masks[:, 0], mine.pred_boxes, (HEIGHT, WIDTH), 0.5
            )
            assert (pasted != its.masks).float().mean() < 1e-4 < its.masks.float().mean()


def matched_alike(anchors, *objects) -> list[list[torch.Tensor]]:
    """The objects whose best anchor both frameworks take for theirs, whatever its IoU.

    It is the only best one, lies within the image, overlaps by 0.3, and is of no object more.
    """
    inside = (anchors >= 0).all(1) & (anchors[:, 2] < WIDTH) & (anchors[:, 3] < HEIGHT)
    kept = []
    for boxes, *rest in zip(*objects, strict=True):
        overlaps = box_iou(boxes, anchors)
        highest, best = overlaps.max(1)
        alone = (overlaps > highest[:, None] - 1e-4).sum(1) == 1
        own = alone & inside[best] & (highest >= 0.3) & (overlaps[:, best].amax(0) == highest)
        assert own.sum() > 3
        kept.append([part[own] for part in (boxes, *rest)])
    return list(zip(*kept, strict=True))


def test_proposals_and_their_losses_are_mmdetections(first_ones):
    maps, *objects = scene()
    torch.manual_seed(0)
    ours = spread(instantiate(recipe().proposal_generator))
    model = Config.fromfile(MMDETECTIONS).model
    cfg = model.rpn_head
    cfg.update(in_channels=CHANNELS, feat_channels=CHANNELS)
    cfg.update(train_cfg=model.train_cfg.rpn, test_cfg=model.test_cfg.rpn)
    init_default_scope("mmdet")
    other = MODELS.build(cfg)
    other.load_state_dict({theirs(k): v for k, v in ours.rpn_head.state_dict().items()})
    features = dict(zip(ours.in_features, maps, strict=True))
    objects = matched_alike(torch.cat([a.tensor for a in ours.anchor_generator(maps)]), *objects)
    boxes, classes, masks = objects
    # MMDetection's detectors tell the RPN that all objects have class 0.
    samples = data_samples(boxes, [torch.zeros_like(c) for c in classes], masks)
    images = ImageList(torch.zeros(IMAGES, 3, HEIGHT, WIDTH), [(HEIGHT, WIDTH)] * IMAGES)

    for training, most in ((True, 2000), (False, 1000)):
        ours.train(training), other.train(training)
        with EventStorage():
            found, own_losses = ours(images, features, instances(*objects))
        if training:
            losses, expected = other.loss_and_predict(
                maps, samples, proposal_cfg=model.train_cfg.rpn_proposal
            )
            for name, its in (("loss_rpn_cls", "loss_rpn_cls"), ("loss_rpn_loc", "loss_rpn_bbox")):
                assert_close(own_losses[name], sum(losses[its]), name)
        else:
            expected = other.predict(maps, samples)
        for mine, its in zip(found, expected, strict=True):
            assert len(mine) == len(its) == most
            # MMDetection sorts sigmoids, some of which are equal where the logits are not.
            same = box_iou(mine.proposal_boxes.tensor, its.bboxes).amax(1) > 0.999
            assert same.float().mean() > 0.99


def test_a_checkpoint_has_detectron2s_names():
    """The default heads load what Detectron2's own cascade saved."""
    cfg = recipe().roi_heads
    ours = instantiate(cfg).state_dict()
    cfg._target_, cfg.mask_head._target_ = CascadeROIHeads, MaskRCNNConvUpsampleHead
    del cfg.stage_loss_weights, cfg.shared_heads, cfg.mask_head.shared
    for predictor in cfg.box_predictors:
        predictor.cls_agnostic_bbox_reg = True
    shapes = {name: value.shape for name, value in instantiate(cfg).state_dict().items()}
    assert {name: value.shape for name, value in ours.items()} == shapes


@pytest.mark.parametrize("key", ["stage_loss_weights", "mask_head"])
def test_another_number_of_stages_is_refused(key):
    cfg = recipe(shared=False).roi_heads
    if key == "mask_head":
        cfg.mask_head.stages = 2
    else:
        cfg.stage_loss_weights = [1.0, 0.5]
    with pytest.raises(ValueError, match=f"{key} has 2 entries, the cascade 3 stages"):
        instantiate(cfg)


def small_scene(count: int):
    """Maps by name, proposals, instances."""
    maps, boxes, classes, masks = scene()
    features = dict(zip(("p2", "p3", "p4", "p5"), maps, strict=False))
    given = [Instances((HEIGHT, WIDTH), proposal_boxes=Boxes(p)) for p in near(boxes, count)]
    return features, given, instances(boxes, classes, masks)


@pytest.mark.parametrize("masks", [True, False])
def test_one_mask_head_learns_from_the_first_stages_samples(masks):
    ours, (features, given, objects) = heads(True, masks).train(), small_scene(20)
    drawn, sample = [], ours._sample
    ours._sample = lambda *arguments: drawn.append(sample(*arguments)) or drawn[-1]
    with EventStorage() as storage:
        samples, losses = ours(None, features, given, objects)
        assert samples is drawn[0] and len(drawn) == 3
        boxes = {f"loss_{kind}_stage{n}" for kind in ("cls", "box_reg") for n in range(3)}
        assert losses.keys() == boxes | ({"loss_mask"} if masks else set())
        counted = {name.partition("/")[0] for name in storage.latest() if "fg_samples" in name}
        assert counted == {"stage0", "stage1", "stage2"}
        if masks:
            found = [s[s.gt_classes < CLASSES] for s in samples]
            assert all(len(s) for s in found)
            regions = ours.mask_pooler(list(features.values()), [s.proposal_boxes for s in found])
            assert_close(losses["loss_mask"], ours.mask_head(regions, found)["loss_mask"])
    # A later stage starts from boxes of the one before: the objects among them come once.
    for stage in drawn:
        for one, image in zip(stage, objects, strict=True):
            boxes = one.proposal_boxes.tensor[one.is_object]
            assert len(boxes) == len(image) == OBJECTS < len(one)
            order = box_iou(boxes, image.gt_boxes.tensor).argmax(1)
            assert boxes.equal(image.gt_boxes.tensor[order]) and len(set(order.tolist())) == OBJECTS


@pytest.mark.parametrize(
    "shared, masks", [(True, True), (True, False), (False, True), (False, False)]
)
def test_what_an_evaluation_adds_to_its_boxes(shared, masks):
    ours, (features, given, _) = heads(shared, masks).eval(), small_scene(30)
    with torch.no_grad():
        found, losses = ours(None, features, given)
        assert losses == {} and all(len(image) for image in found)
        assert [image.has("pred_masks") for image in found] == [masks] * 2
        if masks:
            regions = ours.mask_pooler(
                list(features.values()), [image.pred_boxes for image in found]
            )
            means = []
            for head in [ours.mask_head] if shared else ours.mask_head:
                logits = head.layers(regions)
                classes = torch.cat([image.pred_classes for image in found])
                means.append(logits[torch.arange(len(logits)), classes, None].sigmoid())
            expected = torch.stack(means).mean(0).split([len(image) for image in found])
            for image, its in zip(found, expected, strict=True):
                assert_close(image.pred_masks, its)


def test_what_is_not_said_is_the_papers():
    cfg = recipe().roi_heads
    del cfg.stage_loss_weights, cfg.shared_heads
    cfg.mask_head.shared = True
    for predictor in cfg.box_predictors:
        predictor.cls_agnostic_bbox_reg = True
    ours = instantiate(cfg)
    assert ours.stage_loss_weights == [1.0, 0.5, 0.25] and ours.shared_heads is True
    options = dict(input_shape=ShapeSpec(channels=4), num_classes=2, conv_dims=[4])
    assert len(mask_heads(shared=False, **options)) == 3
    assert len(mask_heads(shared=False, stages=2, **options)) == 2
    assert isinstance(mask_heads(shared=True, **options), MaskRCNNConvUpsampleHead)
