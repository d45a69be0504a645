"""Swin: multi-head self-attention in shifted windows."""

from torch import Tensor, nn

from backbones import ops
from backbones.layers import Size
from backbones.mixers.windowed import WindowedMixer


class WindowAttention(WindowedMixer):
    """Swin: window attention, shifted in every second block (equations 1 to 3).

    Multi-head self-attention with relative position bias inside 7x7 windows. Padded positions are
    not masked: their query, key and value are the bias of ``qkv``, as in Swin.
    """

    marks = ("qkv.weight",)
    names = {
        **dict.fromkeys(("original", "timm", "detectron2"), ((".mixer.", ".attn."),)),
        "torchvision": ((".mixer.", ".attn."), (".mlp.fc1.", ".mlp.0."), (".mlp.fc2.", ".mlp.3.")),
        "openmmlab": (
            (".mixer.", ".attn.w_msa."),
            (".mlp.fc1.", ".ffn.layers.0.0."),
            (".mlp.fc2.", ".ffn.layers.1."),
        ),
    }

    def __init__(
        self, dim: int, num_heads: int, window_size: int | Size = 7, shifted: bool = False
    ):
        super().__init__(dim, num_heads, window_size, shifted)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    @classmethod
    def at(
        cls,
        dim: int,
        stage: int,
        block: int,
        feat_size: Size,
        *,
        num_heads: tuple[int, ...] = (3, 6, 12, 24),
        window_size: int | Size = 7,
    ):
        """Build the mixer of one block; ``num_heads`` are the attention heads of each stage."""
        return cls(dim, num_heads[stage], window_size, shifted=block % 2 == 1)

    def mix(self, x: Tensor, shift: Size) -> Tensor:
        """``(B, H, W, C)`` to ``(B, H, W, C)``, H and W multiples of the window."""
        x = ops.window_attention(self.qkv(x), self.bias(), self.num_heads, self.window_size, shift)
        return self.proj(x)
