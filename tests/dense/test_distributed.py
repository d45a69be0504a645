"""Frozen stages and gradient checkpointing in two processes, as users of DDP meet them."""

from tests.support import run_python

NAMES = ["swin_nano", "d_dw_conv_nano", "i_d_dw_conv_nano"]


def test_two_processes():
    """No unused parameters, none marked ready twice; what is frozen keeps its bits, buffers too."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    run = run_python(*torchrun, "tests/dense/ddp.py", *NAMES)
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.splitlines() == [f"{name} holds" for name in NAMES]
