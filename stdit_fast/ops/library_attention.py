"""PyTorch's attention, as the plain definitions of the ops call it: any shape, at the price of some speed."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

# cuDNN is left out: its backward failed on an H200 (PyTorch 2.11) at shapes that training has.
BACKENDS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
MAX_SEQUENCES = 32768  # in one call; FlashAttention's grid holds 65,535


def library_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(D)) v.

    Args:
        q: [N, H, M, D]; k, v: [N, H, L, D].
        mask: bool, broadcastable to [N, H, M, L], True where a key is seen; None: all are.

    Returns:
        [N, H, M, D].
    """
    with sdpa_kernel(BACKENDS):
        if mask is not None or q.shape[0] <= MAX_SEQUENCES:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        parts = zip(*(x.split(MAX_SEQUENCES) for x in (q, k, v)), strict=True)
        return torch.cat([F.scaled_dot_product_attention(*part) for part in parts])
