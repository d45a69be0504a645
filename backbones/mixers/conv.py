"""The base class of the convolutional mixers."""

import torch.nn.functional as F
from timm.layers import to_2tuple
from torch import Tensor, nn

from backbones.folding import foldable, linear_before
from backbones.layers import Size, is_plain
from backbones.mixers.base import Mixer
from backbones.mixers.norm import normalise
from backbones.ops.linear_layer import fast_linears

# The authors' names of the layers around the operator, and of the block's norm before the MLP.
AROUND = (
    (".norm2.", ".bn."),
    (".mixer.in_proj.", ".attn2conv.conv0."),
    (".mixer.in_norm.", ".attn2conv.bn0."),
    (".mixer.mid_norm.", ".attn2conv.bn."),
    (".mixer.out_proj.", ".attn2conv.conv2."),
    (".mixer.out_norm.", ".attn2conv.bn2."),
)


class ConvMixer(Mixer):
    """Linear, BN, ReLU, depth-wise operator, BN, ReLU, linear, BN (appendix D).

    The linears have no bias and keep PyTorch's initialisation, that of a 1x1 convolution. A model's
    ``norm_layer`` replaces these three norms, not that of a kernel predictor.

    Args:
        dim: C.
        kernel_size: side of the square kernel.
    """

    norm_layer = nn.BatchNorm2d
    pre_norm = False

    def __init__(self, dim: int, kernel_size: int | Size = 7):
        super().__init__()
        self.kernel_size = square(kernel_size)
        self.in_proj = nn.Linear(dim, dim, bias=False)
        self.in_norm = nn.BatchNorm2d(dim)
        self.in_act = nn.ReLU()
        self.mid_norm = nn.BatchNorm2d(dim)
        self.mid_act = nn.ReLU()
        self.out_proj = nn.Linear(dim, dim, bias=False)
        self.out_norm = nn.BatchNorm2d(dim)

    @classmethod
    def at(cls, dim: int, stage: int, block: int, feat_size: Size, *, window_size: int | Size = 7):
        """Build the mixer of one block; ``window_size`` is the kernel size."""
        return cls(dim, window_size)

    def init_weights(self) -> None:
        """Keep PyTorch's initialisation."""

    def set_norm_layer(self, norm_layer: type[nn.Module]) -> None:
        """Replace ``in_norm``, ``mid_norm`` and ``out_norm`` where they stand (Table 12)."""
        super().set_norm_layer(norm_layer)
        for name in ("in_norm", "mid_norm", "out_norm"):
            setattr(self, name, norm_layer(self.in_proj.out_features))

    @fast_linears
    def forward(self, x: Tensor) -> Tensor:
        """``(B, H, W, C)`` to ``(B, H, W, C)``, any H and W."""
        return normalise(self.out_norm, self.out_proj(self.mid_act(self.hidden(x))))

    def hidden(self, x: Tensor) -> Tensor:
        """All before the second ReLU, ``(B, H, W, C)`` to ``(B, H, W, C)``."""
        x = self.in_act(normalise(self.in_norm, self.in_proj(x)))
        return normalise(self.mid_norm, self.mix(x))

    def mix(self, x: Tensor) -> Tensor:
        """Apply the depth-wise operator, ``(B, H, W, C)`` to ``(B, H, W, C)``."""
        raise NotImplementedError(f"{type(self).__name__} does not implement mix()")

    def fold(self) -> None:
        """Fold ``in_norm`` and ``out_norm``; subclasses fold ``mid_norm`` if they can."""
        self.fold_linear("in_proj", "in_norm")
        self.fold_linear("out_proj", "out_norm")

    def fold_linear(self, linear: str, norm: str) -> None:
        """Fold the batch norm named ``norm`` into the linear before it if that is plain."""
        layer, after = getattr(self, linear), getattr(self, norm)
        if foldable(after) and is_plain(layer, nn.Linear):
            setattr(self, linear, linear_before(layer, after))
            setattr(self, norm, nn.Identity().eval())

    def set_kernel_size(self, kernel_size: int) -> None:
        """Resize the kernels; raises ValueError here because predicted kernels cannot be."""
        raise ValueError(
            f"{type(self).__name__} predicts its kernels and cannot be resized from "
            f"{self.kernel_size} to {kernel_size}: build it with window_size={kernel_size}"
        )

    def set_input_size(self, feat_size: Size | None, window_size: int | Size | None = None) -> None:
        """Set the kernel size to ``window_size``; ``feat_size`` has no effect."""
        if window_size is not None and square(window_size) != self.kernel_size:
            self.set_kernel_size(square(window_size))


def resized(kernels: Tensor, size: int) -> Tensor:
    """Bicubic resizing of ``(N, M, K, K)`` kernels to ``(N, M, size, size)`` (Table 14)."""
    return F.interpolate(kernels, (size, size), mode="bicubic", align_corners=False)


def square(kernel_size: int | Size) -> int:
    """The side of a square kernel; raises ValueError for another shape."""
    rows, columns = to_2tuple(kernel_size)
    if rows != columns:
        raise ValueError(f"kernels must be square, not {rows}x{columns}")
    return rows
