"""Weights spread over two processes have the gradients of whole ones."""

from functools import partial
from pathlib import Path

import pytest
import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

from tests.support import build, run_forked


def gradients(model):
    images = torch.randn(2, 3, 40, 52, generator=torch.Generator().manual_seed(0))
    model(images.double()).square().sum().backward()
    return {
        name: p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
        for name, p in model.named_parameters()
    }


def compare(family: str, meeting: Path, rank: int) -> None:
    """What each of the two processes does."""
    distributed.init_process_group("gloo", rank=rank, world_size=2, init_method=f"file://{meeting}")
    mesh = init_device_mesh("cpu", (2,))
    expected = gradients(build(f"{family}_nano").double().eval())
    for how in ("tensor parallel", "FSDP"):
        model = build(f"{family}_nano").double().eval()
        for block in (block for stage in model.stages for block in stage.blocks):
            if how == "FSDP":
                fully_shard(block, mesh=mesh)
            else:
                plan = {"mlp.fc1": ColwiseParallel(), "mlp.fc2": RowwiseParallel()}
                parallelize_module(block, mesh, plan)
        if how == "FSDP":
            fully_shard(model, mesh=mesh)
        for name, gradient in gradients(model).items():
            torch.testing.assert_close(
                gradient, expected[name], rtol=1e-8, atol=1e-10, msg=f"{how}: {name}"
            )
    distributed.destroy_process_group()


# Windows, and a predictor beside depth-wise kernels: all kinds of linears there are.
@pytest.mark.slow
@pytest.mark.parametrize("family", ["swin", "i_d_dw_conv"])
def test_sharded_weights_have_the_same_gradients(family, tmp_path):
    ranks = (partial(compare, family, tmp_path / "meet", rank) for rank in range(2))
    for done in run_forked(*ranks):
        assert done.returncode == 0, done.stderr[-3000:]
