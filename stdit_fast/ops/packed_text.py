"""What a T5 encoder does between its products, on packed tokens, forward only: attention, RMSNorm, gated GELU."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from stdit_fast.kernels import packed_text as kernels
from stdit_fast.ops import library, registry
from stdit_fast.ops.checks import expect_shape

ATTENTION_NAME, NORM_NAME, GELU_NAME = "text_self_attention", "text_rms_norm", "gated_gelu"
for _name in (ATTENTION_NAME, NORM_NAME, GELU_NAME):
    registry.declare(_name, registry.triton_kernel)


def caption_tiles(lengths: Sequence[int]) -> Tensor:
    """The walk of `text_self_attention` over captions of these lengths: int32 [tiles, 3], on the CPU.

    A tile is the first token of its caption, the caption's length, and the tile's first query in it.
    """
    rows, start = [], 0
    for length in lengths:
        rows += [(start, length, first) for first in range(0, length, kernels.QUERIES)]
        start += length
    return torch.tensor(rows, dtype=torch.int32).reshape(-1, 3)


def text_self_attention(qkv: Tensor, tiles: Tensor, bias: Tensor, fused: bool = True) -> Tensor:
    """softmax(q k^T + bias) v within each caption; T5 does not scale the scores (Raffel et al., 2020).

    Bytes it must move: q, k, v in, o out.

    Args:
        qkv: [M, 3, H, D], tokens of all captions one after the other; D a power of two from 16 on.
        tiles: `caption_tiles` of their lengths, on qkv's device.
        bias: float32 [H, 2 * L - 1], bias[h, L - 1 + key - query], L at least the longest length.

    Returns:
        [M, H * D].

    Raises:
        ValueError: a shape that does not fit.
    """
    expect_shape(ATTENTION_NAME, "qkv", qkv, ("M", 3, "H", "D"))
    expect_shape(ATTENTION_NAME, "tiles", tiles, ("tiles", 3))
    expect_shape(ATTENTION_NAME, "bias", bias, (qkv.shape[2], "distances"))
    return (_attend_op if fused else attention_definition)(qkv, tiles, bias)


def attention_definition(qkv: Tensor, tiles: Tensor, bias: Tensor) -> Tensor:
    out = torch.empty_like(qkv[:, 0])
    for start, length, first in tiles.tolist():
        if first:
            continue
        q, k, v = qkv[start : start + length].permute(1, 2, 0, 3)  # [H, length, D] each
        place = torch.arange(length, device=qkv.device)
        by_distance = bias[:, bias.shape[1] // 2 + place[None, :] - place[:, None]].to(qkv.dtype)
        weights = (q @ k.mT + by_distance).softmax(-1)
        out[start : start + length] = (weights @ v).transpose(0, 1)
    return out.flatten(1)


def text_rms_norm(x: Tensor, weight: Tensor, eps: float, fused: bool = True) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight (T5's layer norm) of [M, C]; weight [C]."""
    expect_shape(NORM_NAME, "x", x, ("M", "C"))
    expect_shape(NORM_NAME, "weight", weight, (x.shape[1],))
    return (_norm_op if fused else norm_definition)(x, weight, eps)


def norm_definition(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype) * weight


def gated_gelu(h: Tensor, fused: bool = True) -> Tensor:
    """gelu_tanh(h[:, 0]) * h[:, 1] (GEGLU, Shazeer, 2020) of [M, 2, F], as [M, F]."""
    expect_shape(GELU_NAME, "h", h, ("M", 2, "F"))
    return (_gelu_op if fused else gelu_definition)(h)


def gelu_definition(h: Tensor) -> Tensor:
    return F.gelu(h[:, 0], approximate="tanh") * h[:, 1]


_attend_op = library.define(
    "text_self_attention(Tensor qkv, Tensor tiles, Tensor bias) -> Tensor",
    lambda qkv, tiles, bias: kernels.attend(qkv.contiguous(), tiles, bias.contiguous()),
    lambda qkv, tiles, bias: qkv.new_empty(qkv.shape[0], qkv.shape[2] * qkv.shape[3]),
)
_norm_op = library.define(
    "text_rms_norm(Tensor x, Tensor weight, float eps) -> Tensor",
    lambda x, weight, eps: kernels.rms_norm(x.contiguous(), weight, eps),
    lambda x, weight, eps: x.new_empty(x.shape),
)
_gelu_op = library.define(
    "gated_gelu(Tensor h) -> Tensor",
    lambda h: kernels.gated_gelu(h.contiguous()),
    lambda h: h.new_empty(h.shape[0], h.shape[2]),
)
