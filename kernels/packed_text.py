"""A T5 encoder's passes over packed tokens, forward only: attention within each caption, norms, gated GELU.

Tokens of all captions stand one after the other, [M, C], without padding. Attention is walked in tiles of a caption's
queries (a table on the device says which) and one head, with an online softmax over the caption's own keys; the
position's bias is read from a table by distance, [H, 2 * L - 1], a few hundred bytes a head.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from stdit_fast.kernels.launch import launch
from stdit_fast.kernels.tiles import cdiv, next_power_of_2

QUERIES, KEYS = 64, 64  # of a tile
GELU_ELEMENTS = 2048


def attend(qkv: Tensor, tiles: Tensor, bias: Tensor) -> Tensor:
    """softmax(q k^T + bias) v of contiguous qkv [M, 3, H, D], as [M, H * D].

    Args:
        tiles: int32 [tiles, 3] on the device: first token and length of a caption, first query in it.
        bias: [H, 2 * L - 1], float32: bias[h, L - 1 + key - query].
    """
    count, _, heads, head_dim = qkv.shape
    out = qkv.new_empty(count, heads * head_dim)
    launch(
        _attend, tiles.shape[0] * heads, qkv, tiles, bias, out, bias.shape[1],
        HEADS=heads, HEAD_DIM=head_dim, QUERIES=QUERIES, KEYS=KEYS,
        PRECISION="ieee" if qkv.dtype == torch.float32 else "tf32", num_warps=4, num_stages=2,
    )  # fmt: skip
    return out


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight of contiguous rows [M, C]."""
    out = torch.empty_like(x)
    width = next_power_of_2(x.shape[1])
    launch(_rms_norm, x.shape[0], x, weight, out, x.shape[1], eps, WIDTH=width, num_warps=min(8, max(1, width // 512)))
    return out


def gated_gelu(h: Tensor) -> Tensor:
    """gelu_tanh(h[:, 0]) * h[:, 1] of contiguous h [M, 2, F]."""
    count, _, features = h.shape
    out = h.new_empty(count, features)
    width = min(GELU_ELEMENTS, next_power_of_2(features))
    launch(_gated_gelu, count * cdiv(features, width), h, out, features, WIDTH=width, num_warps=4)
    return out


# ------------------------------------------------------------------- kernels


@triton.jit(do_not_specialize=["distances"])
def _attend(
    qkv, tiles, bias, out, distances,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0) % HEADS
    tile = tiles + (tl.program_id(0) // HEADS) * 3
    start, length, first = tl.load(tile).to(tl.int64), tl.load(tile + 1), tl.load(tile + 2)
    d = tl.arange(0, HEAD_DIM)
    query = first + tl.arange(0, QUERIES)
    q_at = ((start + query) * (3 * HEADS) + head)[:, None] * HEAD_DIM + d[None, :]
    q = tl.load(qkv + q_at, mask=(query < length)[:, None], other=0.0)
    middle = bias + head * distances + distances // 2
    top = tl.full([QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    sums = tl.zeros([QUERIES, HEAD_DIM], tl.float32)
    for first_key in range(0, length, KEYS):
        key = first_key + tl.arange(0, KEYS)
        is_key = key < length
        at = ((start + key) * (3 * HEADS) + HEADS + head)[:, None] * HEAD_DIM + d[None, :]
        k = tl.load(qkv + at, mask=is_key[:, None], other=0.0)
        v = tl.load(qkv + at + HEADS * HEAD_DIM, mask=is_key[:, None], other=0.0)
        scores = tl.dot(q, k.T, input_precision=PRECISION)
        both = is_key[None, :] & (query < length)[:, None]
        scores += tl.load(middle + (key[None, :] - query[:, None]), mask=both, other=0.0)
        scores = tl.where(is_key[None, :], scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        weights = tl.exp(scores - new_top[:, None])
        kept = tl.exp(top - new_top)
        total = total * kept + tl.sum(weights, 1)
        sums = tl.dot(weights.to(v.dtype), v, sums * kept[:, None], input_precision=PRECISION)
        top = new_top
    at = ((start + query) * HEADS + head)[:, None] * HEAD_DIM + d[None, :]
    tl.store(out + at, (sums / total[:, None]).to(out.dtype.element_ty), mask=(query < length)[:, None])


@triton.jit
def _rms_norm(x, weight, out, columns, eps, WIDTH: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * columns
    column = tl.arange(0, WIDTH)
    mask = column < columns
    value = tl.load(x + at + column, mask=mask, other=0.0).to(tl.float32)
    value = value * tl.rsqrt(tl.sum(value * value, 0) / columns + eps)
    value *= tl.load(weight + column, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + at + column, value.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _gated_gelu(h, out, features, WIDTH: tl.constexpr):
    blocks = tl.cdiv(features, WIDTH)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    column = (tl.program_id(0) % blocks) * WIDTH + tl.arange(0, WIDTH)
    mask = column < features
    x = tl.load(h + row * (2 * features) + column, mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(h + row * (2 * features) + features + column, mask=mask, other=0.0).to(tl.float32)
    # 0.5 * (1 + tanh(z)) = 1 / (1 + exp(-2 z))
    z = 0.7978845608028654 * (x + 0.044715 * x * x * x)
    tl.store(out + row * features + column, (x / (1.0 + tl.exp(-2.0 * z)) * gate).to(out.dtype.element_ty), mask=mask)
