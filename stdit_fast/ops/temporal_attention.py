"""Attention over the frames at one position: QK-normalisation and rotary embedding inside, on packed qkv."""

import torch
from torch import Tensor

from stdit_fast.ops import registry
from stdit_fast.ops.checks import expect_qkv, expect_shape
from stdit_fast.ops.library_attention import library_attention
from stdit_fast.ops.rms_norm import rms_norm

NAME = "temporal_attention"
registry.declare(NAME, registry.no_fused_kernel)


def temporal_attention(
    qkv: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    freqs: Tensor,
    *,
    rotate_first: bool = False,
    eps: float = 1e-6,
) -> Tensor:
    """Softmax attention over T with rotary position embedding (Su et al., 2021), position = frame index.

    Bytes it must move: q, k, v in, o out (4 units of C values a token).

    Args:
        qkv: [B, T, S, 3, H, D], the projection's output as it comes.
        q_weight, k_weight: [D] weights of the RMSNorm of q and k; None for a model without QK-norm.
        freqs: [D/2] angle a frame of each pair of neighbouring channels, in radians.
        rotate_first: rotate before normalising, as Open-Sora 1.1 did; new models normalise first.
        eps: of the RMSNorm.

    Returns:
        [B, T, S, H*D] in qkv's dtype.

    Raises:
        ValueError: a shape that does not fit, or an empty qkv.
    """
    expect_qkv(NAME, qkv, q_weight, k_weight)
    expect_shape(NAME, "freqs", freqs, (qkv.shape[-1] // 2,))
    return definition(qkv, q_weight, k_weight, freqs, rotate_first, eps)


def definition(
    qkv: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, freqs: Tensor, rotate_first: bool, eps: float
) -> Tensor:
    q, k, v = qkv.permute(3, 0, 2, 4, 1, 5).unbind(0)  # each [B, S, H, T, D]
    if rotate_first:
        q, k = rms_norm(rotate(q, freqs), q_weight, eps), rms_norm(rotate(k, freqs), k_weight, eps)
    else:
        q, k = rotate(rms_norm(q, q_weight, eps), freqs), rotate(rms_norm(k, k_weight, eps), freqs)
    o = library_attention(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1))  # [B*S, H, T, D]
    o = o.unflatten(0, q.shape[:2]).permute(0, 3, 1, 2, 4)  # [B, T, S, H, D]
    return o.flatten(3)


def rotate(x: Tensor, freqs: Tensor) -> Tensor:
    """Turns each pair of neighbouring channels of x [..., T, D] by frame * freqs, in float32 or better."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    frame = torch.arange(x.shape[-2], device=x.device, dtype=wide.dtype)
    angle = frame[:, None] * freqs.to(wide.dtype)  # [T, D/2]
    even, odd = wide[..., 0::2], wide[..., 1::2]
    cos, sin = angle.cos(), angle.sin()
    return torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(-2).to(x.dtype)
