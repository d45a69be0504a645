"""Frozen stages and gradient checkpointing in two processes, as users of DDP meet them."""

import os
import subprocess
import sys
from pathlib import Path

NAMES = ["swin_nano", "d_dw_conv_nano", "i_d_dw_conv_nano"]


def test_two_processes():
    """No unused parameters, none marked ready twice; what is frozen keeps its bits, buffers too."""
    root = Path(__file__).parents[2]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    run = subprocess.run(
        [*torchrun, "tests/dense/ddp.py", *NAMES],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.splitlines() == [f"{name} holds" for name in NAMES]
