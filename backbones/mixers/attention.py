"""Multi-head self-attention with Swin's parameters, whatever positions it sees."""

from torch import Tensor, nn

from backbones.layers import Size
from backbones.mixers.windowed import WindowedMixer


class Attention(WindowedMixer):
    """What window attention and sliding attention share: projections, position bias, names.

    Args:
        dim: C, a multiple of ``num_heads``.
        num_heads: number of heads.
        window_size: side, or rows and columns, of a window.
        shifted: whether the windows are shifted.
        position_bias: whether logits have a relative position bias (section 2.3).
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
        self,
        dim: int,
        num_heads: int,
        window_size: int | Size,
        shifted: bool,
        position_bias: bool,
    ):
        super().__init__(dim, num_heads, window_size, shifted, position_bias)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def bias_of(self, qkv: Tensor) -> Tensor:
        """``(heads, N, N)`` relative position bias, zeros without a table, for ``qkv`` (B, ...)."""
        if self.relative_position_bias_table is not None:
            return self.bias()
        positions = self.window_size[0] * self.window_size[1]
        return qkv.new_zeros(self.num_heads, positions, positions)
