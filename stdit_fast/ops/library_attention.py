"""PyTorch's attention, as the plain definitions of the ops call it: in parts that the libraries can take."""

import torch
import torch.nn.functional as F
from torch import Tensor

# Very many short sequences break the libraries' backward passes. Seen with PyTorch 2.11 on an H200: 6,912 sequences of
# 16 heads and one token ran, of 16,384 FlashAttention 2 accessed illegal memory and cuDNN failed. That agrees with a
# float32 sum of dq, padded to 128 tokens and 128 channels, whose elements are counted in 32 bits; half of what they
# can count is taken as the limit, and all shapes tried below it were right.
PADDING = 128
MAX_PADDED_ELEMENTS = 2**30


def library_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(D)) v.

    Args:
        q: [N, H, M, D]; k, v: [N, H, L, D].
        mask: bool [N, 1, 1, L], True where a key is seen; None: all are.

    Returns:
        [N, H, M, D].
    """
    if mask is None and q.shape[2] == k.shape[2] == 1:  # an image's one frame: no library call, which would pad
        return (q * k).sum(-1, keepdim=True).softmax(-1) * v
    at_once = max(1, MAX_PADDED_ELEMENTS // padded_elements(*q.shape[1:]))
    if q.shape[0] <= at_once:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    masks = [None] * -(-q.shape[0] // at_once) if mask is None else mask.split(at_once)
    parts = zip(q.split(at_once), k.split(at_once), v.split(at_once), masks, strict=True)
    return torch.cat([F.scaled_dot_product_attention(*part) for part in parts])


def padded_elements(heads: int, length: int, head_dim: int) -> int:
    """Elements of one sequence's dq as the libraries hold it."""
    return heads * -(-length // PADDING) * PADDING * -(-head_dim // PADDING) * PADDING
