"""Window attention (Swin): dynamic weights from query and key, inside shifted windows."""

from torch import Tensor

from backbones import ops
from backbones.layers import Linear
from backbones.mixers.windowed import WindowedMixer
from backbones.ops.window import Size


class WindowAttention(WindowedMixer):
    """Multi-head self-attention in 7x7 windows with relative position bias (equations 1 to 3).

    Padded positions take part with the projection's bias as query, key and value, as in Swin.
    """

    def __init__(
        self, dim: int, num_heads: int, window_size: int | Size = 7, shifted: bool = False
    ):
        super().__init__(dim, num_heads, window_size, shifted)
        self.qkv = Linear(dim, 3 * dim)
        self.proj = Linear(dim, dim)

    def mix(self, x: Tensor, shift: Size) -> Tensor:
        """``(B, H, W, C)`` to ``(B, H, W, C)``, H and W multiples of the window."""
        x = ops.window_attention(self.qkv(x), self.bias(), self.num_heads, self.window_size, shift)
        return self.proj(x)
