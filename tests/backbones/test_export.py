"""torch.compile, torch.export and ONNX with changing image sizes; copies and pickles.

The fast tests take two stages of some families, with all there is between patches and outputs:
merging, shifted windows, the norms of the outputs. The long ones take all families, whole pyramids,
training, and a whole segmentor.
"""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import backbones
from dense.backbone import DenseBackbone
from dense.recipes import RECIPES
from tests.support import at_length

pytestmark = pytest.mark.slow

SIZES = ((64, 100), (101, 68), (112, 224))
WHOLE_SIZES = ((256, 288), (301, 450), (448, 448))


def two_stages(family: str) -> DenseBackbone:
    torch.manual_seed(0)
    arguments = dict(norm="BN", out_indices=(0, 1), depths=(2, 1, 1, 1))
    return scattered(DenseBackbone(f"{family}_nano", **arguments))


def whole(family: str) -> DenseBackbone:
    torch.manual_seed(0)
    return scattered(DenseBackbone(f"{family}_nano", norm="BN"))


def scattered(backbone: DenseBackbone) -> DenseBackbone:
    """In evaluation, with statistics and affine parameters that a mistake would show in."""
    with torch.no_grad():
        backbone.train()(torch.randn(2, 3, 64, 64))
        for module in backbone.modules():
            if isinstance(module, nn.LayerNorm | nn.BatchNorm2d):
                nn.init.uniform_(module.weight, 0.5, 2)
                nn.init.normal_(module.bias)
    return backbone.eval()


def agree(run, backbone: nn.Module, sizes) -> None:
    for size in sizes:
        x = torch.randn(1, 3, *size)
        with torch.no_grad():
            for got, expected in zip(run(x), backbone(x), strict=True):
                torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def exported(backbone: nn.Module, smallest: int) -> torch.export.ExportedProgram:
    return torch.export.export(
        backbone,
        (torch.randn(1, 3, smallest + 3, smallest + 32),),
        dynamic_shapes={"x": dynamic(smallest)},
        # Guards that hold for all sizes, but that no arithmetic on symbols proves.
        prefer_deferred_runtime_asserts_over_guards=True,
    )


def dynamic(smallest: int) -> dict:
    return {2 + i: torch.export.Dim(f"side{i}", min=smallest, max=4096) for i in range(2)}


def in_onnxruntime(model: nn.Module, smallest: int, fixed: bool = False):
    ort = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    x = torch.randn(1, 3, smallest + 3, smallest + 32)
    shapes = None if fixed else (dynamic(smallest),)
    program = torch.onnx.export(model, (x,), dynamo=True, dynamic_shapes=shapes, verbose=False)
    file = io.BytesIO()
    program.save(file)
    session = ort.InferenceSession(file.getvalue())
    (name,) = (i.name for i in session.get_inputs())
    return lambda x: [torch.from_numpy(out) for out in session.run(None, {name: x.numpy()})]


@pytest.mark.parametrize("family", ["swin_local_mlp", "d_dw_conv"])
def test_one_compiled_graph_for_changing_sizes(family):
    """Also for maps that are whole windows and for those that are not."""
    backbone = two_stages(family)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(backbone, fullgraph=True, dynamic=True, backend=counter)
    agree(compiled, backbone, SIZES[:1])
    graphs = counter.frame_count
    agree(compiled, backbone, SIZES[1:])
    assert counter.frame_count == graphs


@pytest.mark.parametrize("family", ["swin", "i_d_dw_conv"])
def test_torch_export(family):
    backbone = two_stages(family)
    program = exported(backbone, 60)
    agree(program.module(), backbone, SIZES)
    # PyTorch's own operators alone, so that a saved program loads without this package.
    assert not [n for n in program.graph.nodes if "dense" in str(n.target)]


def test_onnx():
    backbone = two_stages("swin")
    agree(in_onnxruntime(backbone, 60), backbone, SIZES)


@pytest.mark.parametrize("family", backbones.FAMILIES)
def test_copies_and_pickles(family):
    backbone = DenseBackbone(f"{family}_nano", frozen_stages=1, grad_checkpointing=True, fuse=True)
    backbone.eval()
    x = torch.randn(1, 3, 50, 70)
    with torch.no_grad():
        expected = backbone(x)
        for other in (copy.deepcopy(backbone), pickle.loads(pickle.dumps(backbone))):
            assert all(a.equal(b) for a, b in zip(other(x), expected, strict=True))
            nn.init.zeros_(other.patch_embed.proj.weight)
            assert backbone.patch_embed.proj.weight.any()
            assert [p.requires_grad for p in other.parameters()] == [
                p.requires_grad for p in backbone.parameters()
            ]


@pytest.mark.e2e
@pytest.mark.parametrize(
    "family", ["swin", "d_dw_conv", *at_length("swin_local_mlp", "dw_conv", "i_d_dw_conv")]
)
def test_whole_pyramids(family):
    backbone = whole(family)
    agree(exported(backbone, 232).module(), backbone, WHOLE_SIZES)
    if family in ("swin_local_mlp", "i_d_dw_conv"):
        agree(in_onnxruntime(backbone, 232), backbone, WHOLE_SIZES)


@pytest.mark.e2e
@pytest.mark.parametrize(
    "family", ["swin", "i_d_dw_conv", *at_length("swin_local_mlp", "dw_conv", "d_dw_conv")]
)
def test_compiled_training(family):
    """Gradients too, through AOTAutograd, two sizes by one graph."""
    backbone = two_stages(family).train()
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(backbone, fullgraph=True, dynamic=True, backend=counter)
    graphs = []
    for size in SIZES[:2]:
        x, gradients = torch.randn(2, 3, *size), []
        for model in (backbone, compiled):
            backbone.zero_grad()
            sum(f.square().mean() for f in model(x)).backward()
            gradients.append([p.grad for p in backbone.parameters()])
        torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-3, atol=1e-4)
        graphs.append(counter.frame_count)
    assert graphs[0] == graphs[1]


@pytest.mark.e2e
@pytest.mark.parametrize("family", ["swin"])
def test_inductor(family):
    backbone = two_stages(family)
    torch._dynamo.reset()
    agree(torch.compile(backbone, fullgraph=True, dynamic=True), backbone, SIZES)


@pytest.mark.e2e
@pytest.mark.parametrize("family", ["swin", "dw_conv"])
def test_a_whole_segmentor(family):
    """MMSegmentation's UPerNet around a backbone, at one size: its adaptive pooling fixes it."""
    pytest.importorskip("mmseg")
    from mmengine.config import Config
    from mmengine.registry import init_default_scope
    from mmseg.registry import MODELS

    class Scores(nn.Module):
        def __init__(self):
            super().__init__()
            self.segmentor = MODELS.build(cfg.model)

        def forward(self, x):
            return (self.segmentor.encode_decode(x, [dict(img_shape=tuple(x.shape[2:]))]),)

    configs = RECIPES / "segmentation"
    cfg = Config.fromfile(configs / f"{family}_nano_upernet.py")
    init_default_scope("mmseg")
    torch.manual_seed(0)
    model = Scores()
    scattered(model.segmentor.backbone)
    model.eval()
    agree(in_onnxruntime(model, 232, fixed=True), model, [(235, 264)])
