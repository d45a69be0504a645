"""What test_distributed.py starts in two processes: backbones under DDP over gloo."""

import copy
import sys

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from dense.backbone import DenseBackbone


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


def main() -> None:
    dist.init_process_group("gloo")
    for name in sys.argv[1:]:
        for frozen_stages in (-1, 2):
            before, plain, losses = train(name, frozen_stages=frozen_stages)
            stay = ("patch_embed.", "stages.0.", "stages.1.") if frozen_stages == 2 else ()
            for key, value in plain.items():
                # The gradient of an embedding's bias may be lost in the batch norms after it.
                if key.startswith(stay) != value.equal(before[key]) and "bias" not in key:
                    raise AssertionError(f"{name}, frozen_stages={frozen_stages}: {key}")

            arguments = dict(frozen_stages=frozen_stages, grad_checkpointing=True)
            _, checkpointed, others = train(name, **arguments)
            torch.testing.assert_close(others, losses)
            torch.testing.assert_close(checkpointed, plain)

            gathered = [None, None]
            parameters = [p.sum() for k, p in plain.items() if "running" not in k]
            dist.all_gather_object(gathered, parameters)
            if gathered[0] != gathered[1]:
                raise AssertionError(f"{name}: the processes went apart")
        if dist.get_rank() == 0:
            print(f"{name} holds")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
