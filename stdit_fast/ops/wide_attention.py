"""Self-attention of one wide head, forward only: the autoencoder's, 512 channels over all pixels of a frame.

The libraries' attention kernels end at 256 channels or are slow beyond; two batched products with the softmax between
them are not. The scores are float32, as in those kernels.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from stdit_fast.kernels import frames as kernels
from stdit_fast.ops import library, registry
from stdit_fast.ops.checks import expect_shape

NAME = "wide_attention"
MAX_SCORES = 2**28  # elements at once: 1 GiB

registry.declare(NAME, registry.triton_kernel)


def wide_attention(qkv: Tensor, used: int, fused: bool = True) -> Tensor:
    """softmax(q k^T / sqrt(C)) v.

    Operations: 4 * N * S^2 * C.

    Args:
        qkv: [N, S, 3 * C].
        used: the keys that count, the first of S; the others must hold finite values.

    Returns:
        [N, S, C]; what queries beyond `used` give has no meaning.

    Raises:
        ValueError: a shape that does not fit.
    """
    expect_shape(NAME, "qkv", qkv, ("N", "S", "3C"))
    if qkv.shape[2] % 3 or not 0 < used <= qkv.shape[1]:
        raise ValueError(f"{NAME}: qkv {list(qkv.shape)} with {used} keys, expected [N, S, 3 * C] and 1 to S")
    return (_op if fused else definition)(qkv, used)


def definition(qkv: Tensor, used: int) -> Tensor:
    q, k, v = qkv.chunk(3, -1)
    return F.scaled_dot_product_attention(q, k[:, :used], v[:, :used])


def _attend(qkv: Tensor, used: int) -> Tensor:
    q, k, v = qkv.chunk(3, -1)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    count, length, channels = q.shape
    # As many frames at once as there is room for, or a part of one frame's queries.
    pictures = max(1, MAX_SCORES // length**2)
    rows = length if length**2 <= MAX_SCORES else max(1, MAX_SCORES // length)
    for n in range(0, count, pictures):
        one = slice(n, n + pictures)
        for start in range(0, length, rows):
            part = slice(start, start + rows)
            weights = kernels.softmax_rows(_scores(q[one, part], k[one]), used, channels**-0.5, v.dtype)
            torch.bmm(weights, v[one], out=out[one, part])
    return out


def _scores(q: Tensor, k: Tensor) -> Tensor:
    """q k^T in float32."""
    if q.is_cuda and q.dtype != torch.float32:
        return torch.bmm(q, k.mT, out_dtype=torch.float32)
    return q.float() @ k.float().mT


_op = library.define(
    "wide_attention(Tensor qkv, int used) -> Tensor",
    _attend,
    lambda qkv, used: qkv.new_empty(*qkv.shape[:2], qkv.shape[2] // 3),
)
