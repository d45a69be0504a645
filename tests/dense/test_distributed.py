"""Backbones under DDP, in two processes over gloo, as their users meet them."""

import copy
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from backbones import FAMILIES
from dense.backbone import DenseBackbone
from tests.support import build, run_forked


def train(name: str, **kwargs) -> tuple[dict, dict, list]:
    """Two steps; the state before and after, and this process's losses."""
    torch.manual_seed(0)
    backbone = DenseBackbone(name, norm="BN", drop_path_rate=0.3, **kwargs)
    before = copy.deepcopy(backbone.state_dict())
    # No find_unused_parameters: a parameter without a gradient raises in the second step.
    parallel = DistributedDataParallel(backbone)
    optimizer = torch.optim.AdamW(parallel.parameters(), lr=1e-2, weight_decay=0.1)
    losses = []
    for step in range(2):
        parallel.train()
        torch.manual_seed(10 * step + dist.get_rank())
        loss = sum(f.square().mean() for f in parallel(torch.randn(2, 3, 64, 64)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return before, backbone.state_dict(), losses


def two_steps(rank: int, meeting: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    for name in ("swin_nano", "d_dw_conv_nano", "i_d_dw_conv_nano"):
        for frozen_stages in (-1, 2):
            before, plain, losses = train(name, frozen_stages=frozen_stages)
            stay = ("patch_embed.", "stages.0.", "stages.1.") if frozen_stages == 2 else ()
            for key, value in plain.items():
                # The gradient of an embedding's bias may be lost in the batch norms after it.
                assert key.startswith(stay) == value.equal(before[key]) or "bias" in key, key

            arguments = dict(frozen_stages=frozen_stages, grad_checkpointing=True)
            _, checkpointed, others = train(name, **arguments)
            torch.testing.assert_close(others, losses)
            torch.testing.assert_close(checkpointed, plain)

            gathered = [None, None]
            parameters = [p.sum() for k, p in plain.items() if "running" not in k]
            dist.all_gather_object(gathered, parameters)
            assert gathered[0] == gathered[1], name
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes(tmp_path):
    """No unused parameters, none marked ready twice; what is frozen keeps its bits, buffers too."""
    for done in run_forked(*(partial(two_steps, rank, tmp_path / "meet") for rank in range(2))):
        assert done.returncode == 0, done.stderr[-3000:]


def compare_with_the_whole_batch(count: int, rank: int, meeting: Path) -> None:
    """One of some processes, each of which has its part of four images."""
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=count)
    torch.manual_seed(0)
    images = torch.randn(4, 3, 52, 64, dtype=torch.float64)
    classes = torch.tensor([0, 3, 1, 4])
    for family in FAMILIES:
        gradients = []
        for part in (slice(None), slice(rank * 4 // count, (rank + 1) * 4 // count)):
            network = build(f"{family}_nano").double().train()
            for module in network.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.eval()
            parallel = network if part == slice(None) else DistributedDataParallel(network)
            nn.functional.cross_entropy(parallel(images[part]), classes[part]).backward()
            gradients.append({name: p.grad for name, p in network.named_parameters()})
        whole, averaged = gradients
        for name, gradient in whole.items():
            off = (averaged[name] - gradient).abs().max()
            assert off <= 1e-9 * gradient.abs().max(), f"{family}: {name}"
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, pytest.param(4, marks=pytest.mark.e2e)])
def test_processes_have_the_gradients_of_the_whole_batch(count, tmp_path):
    ranks = (
        partial(compare_with_the_whole_batch, count, rank, tmp_path / "meet")
        for rank in range(count)
    )
    for done in run_forked(*ranks):
        assert done.returncode == 0, done.stderr[-3000:]
