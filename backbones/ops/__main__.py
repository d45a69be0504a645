"""``python -m backbones.ops``: the backend of each operator on this machine, and the reason."""

import sys

import torch

from backbones.ops.dispatch import OPERATORS, explain


def main() -> int:
    """Print a line for each device type and operator, in float32; 2 if ``DENSE_OPS`` is invalid."""
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
