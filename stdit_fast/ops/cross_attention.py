"""Attention of the video tokens over packed text: each sample sees its own tokens and no padding."""

from dataclasses import dataclass

import torch
from torch import Tensor

from stdit_fast.ops import registry
from stdit_fast.ops.checks import expect_not_empty, expect_shape
from stdit_fast.ops.library_attention import library_attention

NAME = "cross_attention"
registry.declare(NAME, registry.no_fused_kernel)


@dataclass(frozen=True)
class TextLayout:
    """Where each sample's tokens lie in the packed text [M, ...], M = sum(lengths).

    Attributes:
        lengths: tokens of each sample, host integers, all at least 1.
        token_index: [M] int64, the place of each packed token in the padded [B*L].
        padded_index: [B, max(lengths)] int64, the packed place of each sample's tokens; 0 where it has none.
        padded_mask: [B, max(lengths)] bool, True where padded_index names a token.
    """

    lengths: tuple[int, ...]
    token_index: Tensor
    padded_index: Tensor
    padded_mask: Tensor


def text_layout(mask: Tensor | None, batch: int, max_tokens: int, device: torch.device) -> TextLayout:
    """Plans the packing of [B, L] text by its mask.

    A mask that lies on the CPU costs no synchronisation with the GPU; one that lies there is read back once.

    Args:
        mask: [B, L], nonzero where a token is real, in any pattern; None: every token is.
        batch, max_tokens: B and L of the text.
        device: where the index tensors go.

    Raises:
        ValueError: a mask of another shape, or a sample without any token.
    """
    if mask is None:
        mask = torch.ones(batch, max_tokens, dtype=torch.bool)
    expect_shape("text_layout", "mask", mask, (batch, max_tokens))
    real = mask.to("cpu") != 0
    lengths = real.sum(1)
    if (lengths == 0).any():
        empty = (lengths == 0).nonzero().flatten().tolist()
        raise ValueError(f"mask: the captions of samples {empty} have no token; give each at least one (an end token)")
    token_index = real.flatten().nonzero().flatten()
    padded_mask = torch.arange(int(lengths.max())) < lengths[:, None]
    first = lengths.cumsum(0) - lengths
    padded_index = (first[:, None] + torch.arange(padded_mask.shape[1])) * padded_mask
    to_device = {"device": device, "non_blocking": True}
    return TextLayout(
        tuple(lengths.tolist()), token_index.to(**to_device), padded_index.to(**to_device), padded_mask.to(**to_device)
    )


def cross_attention(q: Tensor, kv: Tensor, layout: TextLayout) -> Tensor:
    """softmax(q k^T / sqrt(D)) v over each sample's own text.

    Bytes it must move: q in, o out (2 units of C values a video token), and the text's k and v once.

    Args:
        q: [B, N, H, D], N = T*S video tokens a sample.
        kv: [M, 2, H, D], keys and values of the packed text.
        layout: of that text.

    Returns:
        [B, N, H*D] in q's dtype.

    Raises:
        ValueError: a shape that does not fit, or an empty q.
    """
    expect_shape(NAME, "q", q, (len(layout.lengths), "N", "H", "D"))
    expect_not_empty(NAME, "q", q)
    expect_shape(NAME, "kv", kv, (sum(layout.lengths), 2, q.shape[2], q.shape[3]))
    return definition(q, kv, layout)


def definition(q: Tensor, kv: Tensor, layout: TextLayout) -> Tensor:
    padded = kv.index_select(0, layout.padded_index.flatten()).unflatten(0, layout.padded_index.shape)
    k, v = padded.permute(2, 0, 3, 1, 4).unbind(0)  # each [B, H, L, D]
    o = library_attention(q.transpose(1, 2), k, v, layout.padded_mask[:, None, None, :])
    return o.transpose(1, 2).flatten(2)
