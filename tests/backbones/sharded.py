"""One of two processes: gradients of a network whose weights are spread over both, by the command

python sharded.py FAMILY fsdp|tensor_parallel MEETING_FILE RANK
"""

import sys
from pathlib import Path

import timm
import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

sys.path.insert(0, str(Path(__file__).parents[2]))
import backbones  # noqa: E402, F401

family, meeting, rank = sys.argv[1:]
torch.set_num_threads(1)
distributed.init_process_group(
    "gloo", rank=int(rank), world_size=2, init_method=f"file://{meeting}"
)
mesh = init_device_mesh("cpu", (2,))
x = torch.randn(2, 3, 40, 52, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def build():
    torch.manual_seed(0)
    return timm.create_model(f"{family}_nano", num_classes=5).double().eval()


def gradients(model):
    model(x).square().sum().backward()
    return {
        name: p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
        for name, p in model.named_parameters()
    }


expected = gradients(build())
for how in ("tensor parallel", "FSDP"):
    model = build()
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
