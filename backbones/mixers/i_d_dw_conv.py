"""I-D-DW-Conv: depth-wise convolution with kernels predicted per position."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backbones import ops
from backbones.layers import Size, is_plain
from backbones.mixers.conv import AROUND, ConvMixer
from backbones.mixers.norm import normalise
from backbones.ops.common import widened, without_float16
from backbones.ops.dispatch import keeps_operators


class InhomogeneousDynamicDepthwiseConv(ConvMixer):
    """I-D-DW-Conv: inhomogeneous dynamic depth-wise convolution (equation 8).

    Linear C to C/4, BN, ReLU and a linear predict one KxK kernel per position and group of
    channels; no output bias. The paper's "3 and 4 channels in each group" hold for the first stage
    only: its parameter counts need 32 groups in every stage.

    Args:
        dim: C.
        kernel_size: side of the square kernel.
        num_groups: kernels per position; C/num_groups channels share one.
    """

    marks = ("reduce.weight", "expand.weight")
    read_by_operator = ("expand",)
    names = {
        "original": (
            (".mixer.reduce.", ".attn2conv.conv.conv1.0."),
            (".mixer.reduce_norm.", ".attn2conv.conv.conv1.1."),
            (".mixer.expand.", ".attn2conv.conv.conv2.0."),
            *AROUND,
        )
    }

    def __init__(self, dim: int, kernel_size: int | Size = 7, num_groups: int = 32):
        super().__init__(dim, kernel_size)
        if dim % num_groups:
            raise ValueError(f"num_groups={num_groups} does not divide the {dim} channels")
        self.reduce = nn.Linear(dim, dim // 4)
        self.reduce_norm = nn.BatchNorm2d(dim // 4)
        self.expand = nn.Linear(dim // 4, num_groups * self.kernel_size**2)

    @classmethod
    def at(
        cls,
        dim: int,
        stage: int,
        block: int,
        feat_size: Size,
        *,
        window_size: int | Size = 7,
        num_groups: int = 32,
    ):
        """Build the mixer of one block; ``window_size`` is the kernel size."""
        return cls(dim, window_size, num_groups)

    def mix(self, x: Tensor) -> Tensor:
        """``(B, H, W, C)`` to ``(B, H, W, C)``; in float32 under float16 autocast."""
        # The features that predict the kernels may exceed 65504, float16's largest number.
        weight = getattr(self.reduce, "weight", None)
        if not isinstance(weight, (Tensor, torch.fx.Proxy)):
            # Of a layer that somebody replaced; a quantised one has a method of the name.
            weight = x
        x = widened(x, weight)
        with without_float16(weight):
            hidden = F.relu(normalise(self.reduce_norm, self.reduce(x)))
            # While torch.export captures a graph, no parameters are plain ones.
            kept = keeps_operators() and type(self.expand) is nn.Linear
            if kept or is_plain(self.expand, nn.Linear):
                # Fused, so that the kernels, num_groups*K*K numbers per position, are never stored.
                return ops.inhomogeneous_dynamic_depthwise_conv(
                    x, hidden, self.expand.weight, self.expand.bias, self.kernel_size
                )
            kernels = self.expand(hidden).unflatten(-1, (-1, self.kernel_size, self.kernel_size))
            return ops.inhomogeneous_aggregation(x, kernels)

    def fold(self) -> None:
        """Fold all norms but ``mid_norm``: channels that share a kernel have different scales."""
        super().fold()
        self.fold_linear("reduce", "reduce_norm")


torch.fx.wrap("widened")
