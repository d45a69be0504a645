"""Which whole models the benchmark trains, on what, and which engines run a network."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from dense.analysis.benchmark import engines, models

CPU, GPU = torch.device("cpu"), torch.device("cuda")
SIZE = (96, 160)


@pytest.mark.parametrize("missing", ["mmseg", "detectron2", None])
@pytest.mark.parametrize("device, images", [(CPU, (2, 1)), (GPU, (8, 2))])
def test_contests_of_models(device, images, missing, monkeypatch):
    monkeypatch.setattr(models, "find_spec", lambda name: None if name == missing else name)
    monkeypatch.setattr(models, "_builder", lambda *given: given)
    expected = [
        ("mmseg", "UPerNet", "MMSegmentation", (512, 512), images[0], models._segmentor),
        (
            "detectron2",
            "Cascade Mask R-CNN",
            "Detectron2",
            (800, 1344),
            images[1],
            models._detector,
        ),
    ]
    expected = [row[1:] for row in expected if row[0] != missing]
    found = models.contests(device)
    for contest, (model, framework, size, number, make) in zip(found, expected, strict=True):
        title = f"{model}, training iteration, {size[0]}x{size[1]}, batch {number}"
        assert (contest.suite, contest.title, contest.images) == ("models", title, number)
        assert contest.pixels == number * size[0] * size[1]
        names = ["swin", "swin_local_mlp", "dw_conv", "d_dw_conv", "i_d_dw_conv"]
        names = [None, *(f"{name}_tiny" for name in names)]
        for one, name in zip(contest.contenders, names, strict=True):
            assert one.name == (name or f"{framework}'s Swin-T") and one.ours == bool(name)
            assert one.build == (make, name, size, number, device)


def test_an_iteration():
    """Nothing of an earlier one is left, and the random numbers are the same."""
    given = []

    def make(*arguments):
        model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.SyncBatchNorm(4), nn.Dropout())
        given.append((arguments, model[0].weight.detach().clone()))

        def loss_of(model):
            given.append(model)
            out = model(torch.randn(2, 3, 5, 7)).sum((0, 2, 3))
            given.append(out.dtype)
            return (out * torch.arange(4)).square().sum()

        return model, loss_of

    step = models._builder(make, "name", SIZE, 2, CPU)()
    arguments, weight = given.pop()
    assert arguments == ("name", SIZE, 2, CPU)
    torch.manual_seed(0)
    assert weight.equal(nn.Conv2d(3, 4, 1).weight)
    gradients = []
    for number in range(1, 3):
        assert step() is None
        model, dtype = given[-2:]
        assert type(model[1]) is nn.BatchNorm2d and model[1].training and dtype == torch.float32
        gradients.append(model[0].weight.grad.clone())
        # AdamW moves a weight by its rate at first, in float32.
        moved = (model[0].weight - weight).abs().max().item()
        assert moved == pytest.approx(number * 1e-6, rel=0.1)
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-3)
    assert gradients[0].abs().max() > 0.1


def depths(stages) -> list[int]:
    return [len(stage.blocks) for stage in stages]


@pytest.mark.slow
def test_segmentors():
    pytest.importorskip("mmseg")
    torch.manual_seed(0)
    model, loss_of = models._segmentor("dw_conv_nano", SIZE, 3, CPU)
    assert sum(p.numel() for p in model.backbone.parameters()) < 2e6
    given = []

    class Model:
        def data_preprocessor(self, data, training):
            given.append((data, training))
            return {"batch": data}

        def __call__(self, batch, mode):
            given.append(mode)
            return batch

        def parse_losses(self, losses):
            return ("the sum", losses)

    assert loss_of(Model()) == "the sum"
    (data, training), mode = given
    assert (training, mode) == (True, "loss") and data.keys() == {"inputs", "data_samples"}
    images, samples = data["inputs"], data["data_samples"]
    assert len(images) == len(samples) == 3
    for image, sample in zip(images, samples, strict=True):
        assert image.shape == (3, *SIZE) and image.dtype == torch.uint8
        assert (image.min(), image.max()) == (0, 255)
        classes = sample.gt_sem_seg.data
        assert classes.shape == (1, *SIZE) and (classes.min(), classes.max()) == (0, 149)
        assert (sample.img_shape, sample.ori_shape) == (SIZE, SIZE)
    assert not images[0].equal(images[1])
    assert model.data_preprocessor.size == SIZE and model.decode_head.num_classes == 150

    other, _ = models._segmentor(None, SIZE, 2, CPU)
    swin = other.backbone
    assert type(swin).__module__.startswith("mmseg.")
    assert depths(swin.stages) == [2, 2, 6, 2] and swin.num_features == [96, 192, 384, 768]
    assert [s.blocks[0].attn.w_msa.num_heads for s in swin.stages] == [3, 6, 12, 24]
    dropped = swin.stages[-1].blocks[-1].ffn.dropout_layer.drop_prob
    assert dropped == pytest.approx(0.2)


@pytest.mark.slow
def test_detectors():
    pytest.importorskip("detectron2")
    model, loss_of = models._detector("dw_conv_nano", (320, 480), 2, CPU)
    assert type(model.backbone.bottom_up).__name__ != "SwinTransformer"
    given = []

    def losses(batch):
        given.append(batch)
        return {"one": torch.tensor(1.0), "two": torch.tensor(2.5)}

    assert loss_of(losses) == 3.5
    (batch,) = given
    assert len(batch) == 2
    for one in batch:
        image, truth = one["image"], one["instances"]
        assert image.shape == (3, 320, 480) and image.dtype == torch.uint8
        assert (image.min(), image.max()) == (0, 255)
        assert truth.image_size == (320, 480) and truth.gt_classes.tolist() == list(range(8))
        boxes = truth.gt_boxes.tensor
        x1, y1, x2, y2 = boxes.T
        assert x1.max() < 0.6 * 480 and y1.max() < 0.6 * 320 and boxes.min() >= 0
        for low, high, end in ((x1, x2, 480), (y1, y2, 320)):
            assert high.max() <= end and (high - low).min() >= min(60, end - low.max())
            assert (high - low).max() < 260
        for mask, box in zip(truth.gt_masks.tensor, boxes.long().tolist(), strict=True):
            expected = torch.zeros(320, 480, dtype=torch.bool)
            expected[box[1] : box[3], box[0] : box[2]] = True
            assert mask.equal(expected)
    # All contenders are given these.
    first, last = (one["instances"].gt_boxes.tensor.round().tolist() for one in batch)
    assert first[:2] == [[143, 147, 342, 320], [25, 25, 118, 142]]
    assert last[-2:] == [[47, 98, 303, 320], [223, 16, 455, 145]]
    again = models._detector(None, (320, 480), 2, CPU)
    assert again[1](losses) == 3.5
    for one, other in zip(*given, strict=True):
        assert one["image"].equal(other["image"])
    swin = again[0].backbone.bottom_up
    assert type(swin).__module__.startswith("detectron2.") and depths(swin.layers) == [2, 2, 6, 2]
    assert [layer.blocks[0].attn.num_heads for layer in swin.layers] == [3, 6, 12, 24]
    assert swin.num_features == [96, 192, 384, 768]
    assert swin.layers[-1].blocks[-1].drop_path.drop_prob == pytest.approx(0.2)
    assert again[0].backbone.in_features == ("p0", "p1", "p2", "p3")


# Engines


@pytest.mark.slow
def test_engines_run_another_network(monkeypatch):
    """One that only PyTorch exports, and for one size; on as many threads as PyTorch has."""
    onnxruntime = pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    model, x, made = nn.Conv2d(3, 4, 3).eval(), torch.randn(2, 3, 5, 7), []
    threads, session = [], onnxruntime.InferenceSession
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)

    def started(graph, options, providers):
        threads.append(options.intra_op_num_threads)
        # Threads that wait busily would take the next contender's time.
        assert options.get_session_config_entry("session.force_spinning_stop") == "1"
        assert providers == ["CPUExecutionProvider"]
        return session(graph, options, providers=providers)

    monkeypatch.setattr(onnxruntime, "InferenceSession", started)
    builders = engines.steps(lambda: made.append(1) or (model, x), torch.float32)
    with torch.no_grad():
        for name, make in builders.items():
            torch.testing.assert_close(make()(), model(x), rtol=1e-3, atol=1e-4, msg=name)
    assert made == [1] and threads == [3]


def test_which_engines_there_are(monkeypatch):
    for there in ((), ("onnxruntime",), ("openvino",), ("onnxruntime", "openvino")):
        monkeypatch.setattr(engines, "find_spec", lambda name, there=there: name in there or None)
        names = [{"onnxruntime": "ONNX Runtime", "openvino": "OpenVINO"}[one] for one in there]
        assert list(engines.steps(None, torch.float32)) == names
        assert list(engines.steps(None, torch.bfloat16)) == [n for n in names if n == "OpenVINO"]


def test_openvino_is_told_the_size_the_threads_and_the_precision(monkeypatch):
    calls = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)

    def compiled(model, *options):
        calls.append((model, *options))
        return lambda image: [image + 1]

    core = SimpleNamespace(read_model=lambda graph: graph.upper())
    monkeypatch.setattr(engines, "openvino_core", lambda: core)
    monkeypatch.setattr(engines, "compiled_openvino", compiled)
    x = torch.randn(2, 3, 5, 7)
    for dtype in (torch.float32, torch.bfloat16):
        assert engines._openvino(b"graph", x, dtype)().equal(x + 1)
    assert calls == [(b"GRAPH", 3, None, (2, 3, 5, 7)), (b"GRAPH", 3, "bf16", (2, 3, 5, 7))]
