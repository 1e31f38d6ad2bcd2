"""Attention over the positions of one frame, with QK-normalisation inside, on the packed qkv projection."""

from torch import Tensor

from stdit_fast.ops import registry
from stdit_fast.ops.checks import expect_qkv
from stdit_fast.ops.library_attention import library_attention
from stdit_fast.ops.rms_norm import rms_norm

NAME = "spatial_attention"
registry.declare(NAME, registry.no_fused_kernel)


def spatial_attention(qkv: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, eps: float = 1e-6) -> Tensor:
    """softmax(norm(q) norm(k)^T / sqrt(D)) v within each frame.

    Bytes it must move: q, k, v in, o out (4 units of C values a token).

    Args:
        qkv: [B, T, S, 3, H, D], the projection's output as it comes.
        q_weight, k_weight: [D] weights of the RMSNorm of q and k; None for a model without QK-norm.
        eps: of the RMSNorm.

    Returns:
        [B, T, S, H*D] in qkv's dtype.

    Raises:
        ValueError: a shape that does not fit, or an empty qkv.
    """
    expect_qkv(NAME, qkv, q_weight, k_weight)
    return definition(qkv, q_weight, k_weight, eps)


def definition(qkv: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, eps: float) -> Tensor:
    frames = qkv.flatten(0, 1)  # [B*T, S, 3, H, D]
    q, k, v = frames.permute(2, 0, 3, 1, 4).unbind(0)  # each [B*T, H, S, D]
    o = library_attention(rms_norm(q, q_weight, eps), rms_norm(k, k_weight, eps), v)
    return o.transpose(1, 2).reshape(*qkv.shape[:3], -1)
