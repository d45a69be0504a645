"""``python -m backbones.ops``: which backend each operator takes on this machine, and why."""

import sys

import torch

from backbones.ops.dispatch import OPERATORS, explain


def main() -> int:
    """Print a line for each kind of device and operator; 2 where ``DENSE_OPS`` is wrong."""
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    try:
        lines = [
            (device, operator, *explain(operator, device, torch.float32))
            for device in devices
            for operator in OPERATORS
        ]
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    for device, operator, backend, reason in lines:
        print(f"{device:<5} {operator:<37} {backend:<10} {reason}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
