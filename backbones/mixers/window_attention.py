"""Swin: multi-head self-attention in shifted windows."""

from torch import Tensor

from backbones import ops
from backbones.layers import Size
from backbones.mixers.attention import Attention
from backbones.mixers.base import heads_of
from backbones.mixers.sliding_attention import CONVOLUTIONS, FORMS, SlidingAttention


class WindowAttention(Attention):
    """Swin: window attention, shifted in every second block (equations 1 to 3).

    Multi-head self-attention with relative position bias inside 7x7 windows. Padded positions are
    not masked: their query, key and value are the bias of ``qkv``, as in Swin.
    """

    forms = FORMS

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window_size: int | Size = 7,
        shifted: bool = False,
        position_bias: bool = True,
    ):
        super().__init__(dim, num_heads, window_size, shifted, position_bias)

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
        sliding: bool = False,
        position_bias: bool = True,
        conv: str | None = None,
    ) -> Attention:
        """Build the mixer of one block.

        The positional arguments are those of :meth:`.base.Mixer.at`.

        Args:
            num_heads: attention heads of each stage.
            window_size: side, or rows and columns, of a window, in positions.
            sliding: each position attends to the window centred at it (Table 5) instead of windows
                shifted in every second block; needs odd windows.
            position_bias: whether logits have a relative position bias (section 2.3).
            conv: a convolution in attention, sliding whatever ``sliding`` is (appendix C, equations
                24 to 27): ``"static"``, ``"post"``, ``"pre"``, ``"pre_depthwise"`` or
                ``"pre_full"``; None for none.

        Raises:
            ValueError: an unknown ``conv``, an even ``window_size`` of sliding attention, or
                ``num_heads`` without a number for the stage.
        """
        heads = heads_of(num_heads, stage)
        if conv is not None:
            if conv not in CONVOLUTIONS:
                raise ValueError(f"conv={conv!r}: {', '.join(CONVOLUTIONS)} and None are valid")
            return CONVOLUTIONS[conv](dim, heads, window_size, position_bias)
        if sliding:
            return SlidingAttention(dim, heads, window_size, position_bias)
        return cls(dim, heads, window_size, block % 2 == 1, position_bias)

    def mix(self, x: Tensor, shift: Size) -> Tensor:
        """``(B, H, W, C)`` to ``(B, H, W, C)``, H and W multiples of the window."""
        qkv = self.qkv(x)
        x = ops.window_attention(qkv, self.bias_of(qkv), self.num_heads, self.window_size, shift)
        return self.proj(x)
