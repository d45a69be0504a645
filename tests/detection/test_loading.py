"""From a file to a model and back: photos, batches, trainers and predictors, without a training."""

import logging
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from detectron2.config import LazyCall as L
from detectron2.config import LazyConfig
from detectron2.data import DatasetFromList, MetadataCatalog, build_detection_train_loader
from detectron2.data import transforms as T
from detectron2.data.build import trivial_batch_collator
from detectron2.data.common import AspectRatioGroupedDataset, ToIterableDataset
from detectron2.data.samplers import TrainingSampler
from detectron2.engine import AMPTrainer
from detectron2.modeling.proposal_generator import RPN
from detectron2.structures import Boxes, BoxMode, Instances
from detectron2.utils.events import EventStorage
from omegaconf import OmegaConf
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader

from dense.detection import announcing, config, predictor, resuming, trainer
from dense.detection.config import LazyConfigError, load_config
from dense.detection.mapper import PhotoMapper
from dense.images import TooManyUnreadable, UnreadableImage
from dense.recipes import RECIPES
from dense.seeding import Place, SeededDataset, mixed
from tests.support import build

NANO = str(RECIPES / "detection/cascade_mask_rcnn_dw_conv_nano.py")

# Predictors


class Detector(nn.Module):
    """Notes what it is given; finds two objects."""

    def __init__(self, masks: bool):
        super().__init__()
        self.masks, self.seen = masks, []

    def forward(self, batch):
        self.seen.append((batch, torch.is_inference_mode_enabled()))
        found = Instances((30, 50), pred_boxes=Boxes(torch.tensor([[1.0, 2, 3, 4], [5, 6, 7, 8]])))
        found.scores, found.pred_classes = torch.tensor([0.9, 0.5]), torch.tensor([1, 0])
        if self.masks:
            found.pred_masks = torch.arange(2 * 30 * 50).reshape(2, 30, 50) % 7 == 0
        return [{"instances": found}]


@pytest.mark.parametrize("order, masks", [("RGB", True), ("BGR", False)])
def test_a_predictor_is_of_the_config(monkeypatch, order, masks):
    sizes = dict(short_edge_length=60, max_size=1000)
    mapper = OmegaConf.create(dict(image_format=order), flags={"allow_objects": True})
    mapper.augmentations = [L(T.ResizeShortestEdge)(**sizes)]
    loaders = dict(test=dict(mapper=mapper))
    cfg = OmegaConf.create(dict(dataloader=loaders), flags={"allow_objects": True})
    model, asked = Detector(masks), []
    monkeypatch.setattr(
        predictor, "load_model", lambda *a: asked.append(a) or (model, cfg, ["cat", "dog"])
    )
    predict = predictor.load_predictor("a.py", "net.pth", "meta")
    assert asked == [("a.py", "net.pth", "meta")]
    image = np.zeros((30, 50, 3), np.uint8)
    image[:15] = (200, 100, 20)
    found = predict(image)
    [([given], inference)] = model.seen
    pixels = given.pop("image")
    assert given == {"height": 30, "width": 50} and inference
    assert pixels.shape == (3, 60, 100) and pixels.dtype == torch.uint8
    colour = [200, 100, 20]
    assert pixels[:, 5, 70].tolist() == (colour if order == "RGB" else colour[::-1])
    assert pixels[:, 55, 70].tolist() == [0, 0, 0]
    assert found["boxes"].tolist() == [[1, 2, 3, 4], [5, 6, 7, 8]]
    assert found["scores"].tolist() == pytest.approx([0.9, 0.5])
    assert found["classes"].tolist() == [1, 0] and found["class_names"] == ["cat", "dog"]
    if masks:
        assert found["masks"].shape == (2, 30, 50) and found["masks"].dtype == bool
    else:
        assert found["masks"] is None
    with pytest.raises(ValueError, match="uint8 is needed"):
        predict(image[..., :2])
    # A photo that is not resized, and on the CPU.
    cfg.dataloader.test.mapper.augmentations = []
    predictor.load_predictor("a.py", "net.pth")(image)
    assert asked[-1] == ("a.py", "net.pth", "cpu")
    pixels = model.seen[-1][0][0]["image"]
    assert pixels.shape == (3, 30, 50)
    assert pixels[:, 5, 7].tolist() == (colour if order == "RGB" else colour[::-1])


def test_a_model_is_read_whole_and_fused(monkeypatch, tmp_path):
    told = []
    cfg = OmegaConf.create(dict(model=dict(num_classes=5)))
    model = nn.Sequential(nn.SyncBatchNorm(4))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(predictor, "load_config", lambda path: told.append(path) or cfg)
    monkeypatch.setattr(predictor, "_class_names", lambda *a: told.append(a) or ["a"])
    monkeypatch.setattr(predictor, "instantiate", lambda node: model if node == cfg.model else None)
    monkeypatch.setattr(predictor, "fuse", lambda *a, **k: told.append((a, k)))

    class Checkpointer:
        def __init__(self, given):
            assert given is model and not given.training

        def load_weights(self, path, *, complete):
            told.append((path, complete))

    monkeypatch.setattr(predictor, "WholeCheckpointer", Checkpointer)
    checkpoint = str(tmp_path / "net.pth")
    assert predictor.load_model("a.py", checkpoint, "meta") == (model, cfg, ["a"])
    last = [(cfg, checkpoint), (checkpoint, True), ((model,), dict(inplace=True))]
    assert told == ["a.py", *last]
    assert type(model[0]) is nn.BatchNorm2d and model[0].weight.device.type == "meta"
    predictor.load_model(None, checkpoint, "meta")
    assert told[4] == str(tmp_path / "config.yaml")


COCO = MetadataCatalog.get("coco_2017_val").thing_classes


@pytest.mark.parametrize(
    "saved, known, count, names",
    [
        (["a", "b"], ["c"], 5, ["a", "b"]),
        (None, ["c"], 5, ["c"]),
        (None, None, 80, COCO),
        (None, None, 3, ["class 0", "class 1", "class 2"]),
        (None, None, None, []),
        (["a"], None, None, ["a"]),
    ],
)
@pytest.mark.parametrize("key", ["roi_heads.num_classes", "num_classes"])
def test_names_are_the_checkpoints_or_the_configs_or_cocos(
    monkeypatch, saved, known, count, names, key
):
    read = lambda path: saved if path == "net.pth" else 0  # noqa: E731
    monkeypatch.setattr(predictor.WholeCheckpointer, "read_classes", read)
    cfg = OmegaConf.create(dict(model={}, dataloader=dict(metadata=dict(classes=known))))
    if count is not None:
        OmegaConf.update(cfg, f"model.{key}", count, force_add=True)
    found = predictor._class_names(cfg, "net.pth")
    assert found == names and type(found) is list
    assert OmegaConf.select(cfg, f"model.{key}") == (len(names) if count is not None else None)


# Photos


@pytest.fixture
def photo(tmp_path):
    image = np.zeros((30, 50, 3), np.uint8)
    image[:15] = (200, 100, 20)
    Image.fromarray(image).save(tmp_path / "a.png")
    box = dict(bbox=[5, 2, 10, 20], bbox_mode=BoxMode.XYWH_ABS, category_id=3, iscrowd=0)
    return dict(file_name=str(tmp_path / "a.png"), height=30, width=50, annotations=[box])


def test_a_photo_and_its_objects_are_turned_together(photo):
    def mapped(training, entry=photo):
        flip = [T.RandomFlip(prob=1.0), T.Resize((60, 100))]
        mapper = PhotoMapper(is_train=training, augmentations=flip, image_format="RGB")
        return mapper(entry)

    entry = mapped(True)
    assert entry["image"].shape == (3, 60, 100) and entry["image"].dtype == torch.uint8
    assert entry["image"][:, 5, 5].tolist() == [200, 100, 20]
    assert entry["instances"].gt_boxes.tensor.tolist() == [[70, 4, 90, 44]]
    assert entry["instances"].gt_classes.tolist() == [3] and "annotations" not in entry
    assert entry["instances"].image_size == (60, 100)
    assert photo["annotations"][0]["bbox"] == [5, 2, 10, 20] and "image" not in photo
    entry = mapped(False)
    assert "annotations" not in entry and "instances" not in entry
    bare = {key: value for key, value in photo.items() if key != "annotations"}
    assert "instances" not in mapped(True, bare) and "image" in mapped(False, bare)
    with pytest.raises(Exception, match="Mismatched image shape"):
        mapped(True, {**photo, "height": 31})
    with pytest.raises(ValueError, match="^image_format='L': RGB or BGR is needed$"):
        PhotoMapper(is_train=True, augmentations=[], image_format="L")


def test_unreadable_photos_are_skipped_in_training_alone(photo, tmp_path, caplog):
    for name in "bcd":
        (tmp_path / f"{name}.png").write_text("no photo")
    entries = [{**photo, "file_name": str(tmp_path / f"{name}.png")} for name in "bcd"]
    mapper = PhotoMapper(is_train=True, augmentations=[], image_format="RGB", total=2000)
    assert [mapper(entry) for entry in entries[:2]] == [None, None]
    assert f"{tmp_path}/c.png cannot be read" in caplog.text and "2 allowed" in caplog.text
    with pytest.raises(TooManyUnreadable, match="3 of 2000 images cannot be read"):
        mapper(entries[2])
    mapper = PhotoMapper(is_train=True, augmentations=[], image_format="RGB")
    assert mapper(entries[0]) is None
    with pytest.raises(TooManyUnreadable, match="2 of 0 images"):
        mapper(entries[1])
    with pytest.raises(UnreadableImage, match="b.png"):
        PhotoMapper(is_train=False, augmentations=[], image_format="RGB")(entries[0])


# Batches

SQUARE = [{"id": i, "width": 40 + i, "height": 44} for i in range(9)]


def itself(item):
    return item


@pytest.mark.parametrize("grouped", [True, False])
def test_a_resumable_loader_works_as_the_one_it_replaces(grouped):
    collate = None if grouped else lambda batch: batch[::-1]
    options = dict(num_workers=2, prefetch_factor=3, persistent_workers=True, pin_memory=True)
    built = build_detection_train_loader(
        SQUARE, mapper=itself, sampler=TrainingSampler(9), total_batch_size=2, collate_fn=collate,
        aspect_ratio_grouping=grouped, **options,
    )  # fmt: skip
    inner = built.dataset if grouped else built
    inner.timeout, inner.multiprocessing_context = 7, "fork"
    found = resuming.resumable(built, 5, 3)
    for name, value in {**options, "timeout": 7}.items():
        assert getattr(found, name) == value, name
    assert found.multiprocessing_context.get_start_method() == "fork"
    assert found.collate_fn is (trivial_batch_collator if grouped else inner.collate_fn)
    assert isinstance(found.dataset, SeededDataset) and found.batch_sampler.batch_size == 2
    assert (found.batch_sampler.seed, found.batch_sampler.first) == (5, 3)
    assert found.batch_sampler.sampler._seed == 5
    assert (found.batch_sampler.sizes is not None) is grouped
    # Neither the loader nor its iterator draws from the process's generator.
    before = torch.get_rng_state()
    found.generator.initial_seed()
    assert found.generator is not torch.default_generator
    assert torch.get_rng_state().equal(before)


def test_a_resumed_run_has_the_numbers_of_the_version_before(monkeypatch):
    """Seeds of a sample, by seed, place and process, and of an iteration."""
    seeds = []
    monkeypatch.setattr(resuming, "seed_all", seeds.append)
    monkeypatch.setattr(resuming.comm, "get_rank", lambda: 1)
    monkeypatch.setattr(resuming.comm, "get_world_size", lambda: 4)
    hook = resuming.SeedSteps(7)
    hook.trainer = SimpleNamespace(iter=3)
    hook.before_step()
    assert seeds == [mixed(7, 1, 13)]
    [batch] = resuming._Batches([5, 6, 8], 3, None, 7, 0)
    assert [place.seed for place in batch] == [mixed(7, 0, n) for n in (1, 5, 9)]


def test_annotations_of_sizes_alone():
    """Which are read without the photos."""
    sizes = [{"width": 4, "height": 3}]
    built = build_detection_train_loader(
        sizes, mapper=pytest.fail, sampler=TrainingSampler(1), total_batch_size=1
    )
    found = resuming.resumable(built, 5, 0)
    assert isinstance(found.dataset, SeededDataset)
    assert list(map(int, next(iter(found.batch_sampler)))) == [0]


def test_as_wide_as_high_is_not_wide():
    batches = resuming._Batches(range(9), 2, SQUARE, 5, 0)
    assert [list(map(int, batch)) for batch in batches] == [[0, 1], [2, 3], [5, 6], [7, 8]]
    later = resuming._Batches(range(9), 2, SQUARE, 5, 3)
    [last] = later
    assert last == [7, 8] and all(type(place) is Place for place in last)
    whole = [
        place.seed for batch in resuming._Batches(range(9), 2, SQUARE, 5, 0) for place in batch
    ]
    assert [place.seed for place in last] == whole[-2:]
    plain = resuming._Batches(range(5), 2, None, 5, 0)
    assert [list(map(int, batch)) for batch in plain] == [[0, 1], [2, 3]]


@pytest.mark.parametrize("key", ["width", "height"])
def test_annotations_without_sizes_are_not_grouped_anew(caplog, key):
    caplog.set_level("WARNING", "detectron2")
    lacking = [{k: v for k, v in item.items() if k != key} for item in SQUARE]

    def loader(items, grouping):
        return build_detection_train_loader(
            items, mapper=itself, sampler=TrainingSampler(9), total_batch_size=2,
            aspect_ratio_grouping=grouping,
        )  # fmt: skip

    built = loader(lacking, True)
    assert resuming.resumable(built, 5, 0) is built and not caplog.text
    assert resuming.resumable(built, 5, 1) is built
    assert [record.getMessage() for record in caplog.records] == [
        "the order of the data is not resumed: AspectRatioGroupedDataset is not a loader of "
        "build_detection_train_loader over annotations with image sizes"
    ]
    # Without groups no size is needed.
    assert isinstance(resuming.resumable(loader(lacking, False), 5, 1).dataset, SeededDataset)
    texts = loader(["a"] * 9, True)
    assert resuming.resumable(texts, 5, 0) is texts


def test_the_images_behind_a_loader():
    items = DatasetFromList(SQUARE)
    plain = DataLoader(items, batch_size=2)
    wrapped = DataLoader(ToIterableDataset(items, TrainingSampler(9)), batch_size=2)
    for loader in (plain, wrapped, AspectRatioGroupedDataset(wrapped, 2), SeededDataset(items)):
        assert announcing._images(loader) == 9
    assert announcing._images(iter([])) is None


@pytest.mark.parametrize(
    "amp, precision",
    [
        (dict(enabled=False, precision="bfloat16"), "float32"),
        (dict(enabled=True, precision="bfloat16"), "bfloat16"),
        (dict(enabled=True), "float16"),
    ],
)
def test_the_first_line_of_a_training_says_its_precision(
    amp, precision, tmp_path, caplog, monkeypatch
):
    train = dict(amp=amp, device="cpu", max_iter=30, init_checkpoint="", output_dir=str(tmp_path))
    cfg = OmegaConf.create(dict(train=train, dataloader=dict(train=dict(total_batch_size=4))))
    begun = []
    monkeypatch.setattr(announcing.journal, "begin", lambda *a: begun.append(a))
    hook = announcing.Announce(cfg, None, "a.py")
    hook.trainer = SimpleNamespace(
        data_loader=DataLoader(SQUARE), start_iter=0, model=nn.Linear(1, 1)
    )
    with caplog.at_level(logging.INFO):
        hook.before_train()
    [(folder, start, file)] = begun
    assert (folder, file, start.precision) == (str(tmp_path), "a.py", precision)
    assert [record.getMessage() for record in caplog.records] == [str(start)]
    assert f"in {precision}: 30 steps of 4 of 9 images" in str(start)


# Trainers


@pytest.fixture
def filters():
    logger = logging.getLogger("detectron2.engine.train_loop")
    before = logger.filters[:]
    yield logger
    logger.filters[:] = before


class Head(nn.Module):
    def forward(self, value):
        return [torch.tensor([1.0, -value]), torch.tensor([2.0])], [torch.tensor([[-7.0]])]


@pytest.mark.parametrize("precision", [None, "bfloat16", "float16", "default"])
def test_trainers_stop_at_what_is_not_finite(precision, filters, caplog):
    proposals = RPN.__new__(RPN)
    nn.Module.__init__(proposals)
    proposals.rpn_head = Head()
    model = nn.ModuleList([build("i_d_dw_conv_nano"), proposals])
    amp = dict(enabled=precision is not None)
    amp |= {} if precision in (None, "default") else dict(precision=precision)
    cfg = OmegaConf.create(dict(train=dict(amp=amp)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    built = trainer.build_trainer(cfg, model, [], optimizer)
    assert isinstance(built, AMPTrainer) is (precision is not None)
    if precision:
        half = torch.float16 if precision == "default" else getattr(torch, precision)
        assert built.precision is half
    warned = "train.amp.precision=bfloat16, or no AMP, is safer"
    assert (warned in caplog.text) is (precision in ("float16", "default"))
    assert (built.model, built.optimizer) == (model, optimizer)
    built.iter = 4
    proposals.train()
    proposals.rpn_head(torch.tensor(3.0))
    advice = "a lower optimizer.lr, or train.amp.precision=bfloat16, may help"
    with pytest.raises(FloatingPointError) as stopped:
        proposals.rpn_head(torch.tensor(float("inf")))
    assert str(stopped.value) == (
        "iteration 5: largest objectness logit=inf is not finite (largest objectness logit=inf, "
        f"largest proposal delta=7; learning rate 0.5); {advice}"
    )
    proposals.eval()
    proposals.rpn_head(torch.tensor(float("inf")))
    with pytest.raises(FloatingPointError, match="^iteration 5: loss=nan is not finite"):
        built._write_metrics({"loss": torch.tensor(float("nan"))}, 0.1)
    with EventStorage() as storage:
        built._write_metrics({"loss": torch.tensor(2.0)}, 0.1, prefix="its_")
        assert storage.latest()["its_total_loss"][0] == 2
    # Detectron2's traceback is left out for this error alone.
    for error, shown in ((FloatingPointError, False), (KeyError, True), (None, True)):
        try:
            raise (error or ValueError)("x")
        except Exception as raised:
            info = (type(raised), raised, None) if error else None
        record = logging.LogRecord("a", 40, "a", 1, "Exception", (), info)
        assert bool(filters.filter(record)) is shown


# Configs


HEADS = "model.roi_heads.box_heads"


@pytest.mark.parametrize(
    "override, message",
    [
        ("trian.max_iter=3", "{}: the config has no 'trian'; did you mean 'train'? It has "),
        ("train.maxiter=3", "{}: train has no 'maxiter'; did you mean 'max_iter'? It has "),
        ("train.zzz=3", "{}: train has no 'zzz'. It has "),
        ("~train.max_iter", "{}: no key can be removed, only set, as to null"),
        ("~train.zzz", "{}: train has no 'zzz'. It has "),
        ("train.max_iter.a=3", "{}: train.max_iter has no 'a'"),
        (f"{HEADS}.3.x=1", f"{{}}: {HEADS} has no '3'. It has 0, 1, 2"),
        ("train.max_iter=fast", "override train.max_iter='fast': a number is needed, such as "),
        ("+train.new.lr=-1", "override train.new.lr=-1: 0 or more is needed"),
        ("train.max_iter=0", "override train.max_iter=0: more than 0 is needed"),
        ("train.amp=3", "override train.amp=3: it holds enabled"),
        ("a b", "override 'a b' is not key=value in Hydra's grammar"),
    ],
)
def test_every_wrong_override_says_what_is_right(override, message):
    with pytest.raises(LazyConfigError) as refused:
        load_config(NANO, ["train.seed=3", override])
    assert str(refused.value).startswith(message.format(f"override {override!r}"))


def test_overrides_change_and_add(tmp_path):
    words = ["train.max_iter=7", "+train.mine=[1,2]", "model.input_format=BGR"]
    words += ["model.roi_heads.box_heads.2.conv_dims=[9]", "+data={train_json: a.json}"]
    cfg, plain = load_config(NANO, words), load_config(NANO)
    assert (cfg.train.max_iter, cfg.train.mine, cfg.data.train_json) == (7, [1, 2], "a.json")
    heads = [list(head.conv_dims) for head in cfg.model.roi_heads.box_heads]
    assert heads[2] == [9] and heads[0] == list(plain.model.roi_heads.box_heads[0].conv_dims)
    for suffix in ("yaml", "yml"):
        LazyConfig.save(cfg, str(tmp_path / f"config.{suffix}"))
        again = load_config(str(tmp_path / f"config.{suffix}"), ["train.max_iter=9"])
        assert again.train.max_iter == 9 and again.model.input_format == "BGR"
        # A training puts its model there.
        again.optimizer.params.model = model = nn.Identity()
        assert again.optimizer.params.model is model
    (tmp_path / "empty.yaml").touch()
    with pytest.raises(LazyConfigError) as refused:
        load_config(str(tmp_path / "empty.yaml"))
    assert str(refused.value) == (
        f"config file {tmp_path}/empty.yaml has no model, dataloader, optimizer, lr_multiplier, "
        "train: this trainer reads LazyConfig files (for a yacs YAML use Detectron2's own "
        "train_net.py)"
    )


def test_what_a_config_leaves_open_is_set_by_an_override(tmp_path):
    sections = ("model", "dataloader", "optimizer", "lr_multiplier")
    text = "".join(f"{name}: {{}}\n" for name in sections)
    (tmp_path / "a.yaml").write_text(f"{text}train: {{init: '???', other: '${{absent.key}}'}}\n")
    cfg = load_config(str(tmp_path / "a.yaml"), ["train.init=a.pth", "train.other=b.pth"])
    assert cfg.train == dict(init="a.pth", other="b.pth")


def test_a_length_moves_what_is_in_proportion():
    train = dict(max_iter=100, eval_period=33, checkpointer=dict(period=10))
    cfg = OmegaConf.create(dict(train=train))
    config.set_length(cfg, 50)
    assert cfg.train == dict(max_iter=50, eval_period=16, checkpointer=dict(period=5))


@pytest.mark.parametrize("nested", [True, False])
def test_a_row_of_the_ablations_takes_the_backbones_place(nested):
    backbone = dict(name="dw_conv_nano", drop_path_rate=0.1)
    model = dict(backbone=dict(bottom_up=backbone) if nested else backbone)
    cfg = OmegaConf.create(dict(model=model))
    config.use_ablation(cfg, "dw_conv_positions_own")
    found = cfg.model.backbone.bottom_up if nested else cfg.model.backbone
    assert found.name == "dw_conv_nano" and found.drop_path_rate == 0.1 and len(found) > 2
    with pytest.raises(LazyConfigError, match="^--ablation: volo_d1_dw_conv is a classifier"):
        config.use_ablation(cfg, "volo_d1_dw_conv")
    for empty in ({}, dict(backbone=None)):
        with pytest.raises(LazyConfigError, match="^--ablation: "):
            config.use_ablation(OmegaConf.create(dict(model=empty)), "dw_conv_se")
