"""Attention over the frames at one position: QK-normalisation and rotary embedding inside, on packed qkv."""

import torch
from torch import Tensor

from stdit_fast.kernels import temporal_attention as kernels
from stdit_fast.kernels.residual_norm import column_sum
from stdit_fast.ops import cuda_temporal, library, registry
from stdit_fast.ops.checks import expect_qkv, expect_shape
from stdit_fast.ops.library_attention import library_attention
from stdit_fast.ops.linear import holding
from stdit_fast.ops.rms_norm import rms_norm
from stdit_fast.ops.spatial_attention import over_one_key, over_one_key_backward, weight_gradients
from stdit_fast.ops.temporal_attention_long import temporal_attention_long

NAME = "temporal_attention"


def _serving() -> tuple[str, str]:
    implementation, reason = registry.triton_kernel()
    if implementation == registry.REFERENCE:
        return implementation, reason
    served = f"one pass to {kernels.MAX_FRAMES} frames, beyond with a library's attention; {reason}"
    ours, why_not = cuda_temporal.available(torch.cuda.current_device())
    if ours:
        most = cuda_temporal.MOST_FRAMES
        served += f"; backward to {most} frames in cuda, bf16 at head dimension {cuda_temporal.HEAD_DIM}"
    else:
        served += f"; no pass in cuda: {why_not}"
    return implementation, served


registry.declare(NAME, _serving)


def rotation_table(freqs: Tensor, num_frames: int) -> Tensor:
    """Cosine and sine of frame * freq, the rotation of each pair of neighbouring channels in each frame.

    Args:
        freqs: [D/2] angle a frame, in radians.

    Returns:
        [T, 2, D/2], float32 or better.
    """
    wide = torch.promote_types(freqs.dtype, torch.float32)
    frame = torch.arange(num_frames, device=freqs.device, dtype=wide)
    angle = frame[:, None] * freqs.to(wide)
    return torch.stack((angle.cos(), angle.sin()), dim=1)


def temporal_attention(
    qkv: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    rotation: Tensor,
    *,
    rotate_first: bool = False,
    eps: float = 1e-6,
    bias: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Softmax attention over T with rotary position embedding (Su et al., 2021), position = frame index.

    Bytes it must move: q, k, v in, o out (4 units of C values a token). Backward: q, k, v and o's gradient in, their
    gradients out (7 units). Kept for the backward pass: qkv alone.

    Args:
        qkv: [B, T, S, 3, H, D], the projection's output as it comes.
        q_weight, k_weight: [D] weights of the RMSNorm of q and k; None for a model without QK-norm.
        rotation: [T, 2, D/2], see `rotation_table`; it gets no gradient.
        rotate_first: rotate before normalising, as Open-Sora 1.1 did; new models normalise first.
        eps: of the RMSNorm.
        bias: [3*H*D] of the linear layer that made qkv and holds it already, if its gradient is to be found here, where
            it costs no pass of its own; that layer then gets `bias.detach()`.
        backend: see `registry.use_kernel`.

    Returns:
        [B, T, S, H*D] in qkv's dtype.

    Raises:
        ValueError: a shape that does not fit, or an empty qkv.
        ConfigError: backend="fused" where that cannot be had.
    """
    expect_qkv(NAME, qkv, q_weight, k_weight, bias)
    expect_shape(NAME, "rotation", rotation, (qkv.shape[1], 2, qkv.shape[-1] // 2))
    if not registry.use_kernel(NAME, backend, qkv, qkv.shape[-1]):
        return definition(qkv, q_weight, k_weight, rotation, rotate_first, eps, bias)
    if qkv.shape[1] > kernels.max_frames(qkv.dtype, qkv.shape[-1]):
        return temporal_attention_long(qkv, q_weight, k_weight, rotation, rotate_first, eps, bias)
    return _op(qkv, q_weight, k_weight, rotation, rotate_first, eps, bias)


def definition(
    qkv: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    rotation: Tensor,
    rotate_first: bool = False,
    eps: float = 1e-6,
    bias: Tensor | None = None,
) -> Tensor:
    qkv = holding(qkv, bias, 3)
    q, k, v = qkv.permute(3, 0, 2, 4, 1, 5).unbind(0)  # each [B, S, H, T, D]
    if rotate_first:
        q, k = rms_norm(rotate(q, rotation), q_weight, eps), rms_norm(rotate(k, rotation), k_weight, eps)
    else:
        q, k = rotate(rms_norm(q, q_weight, eps), rotation), rotate(rms_norm(k, k_weight, eps), rotation)
    o = library_attention(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1))  # [B*S, H, T, D]
    o = o.unflatten(0, q.shape[:2]).permute(0, 3, 1, 2, 4)  # [B, T, S, H, D]
    return o.flatten(3)


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Turns each pair of neighbouring channels of x [..., T, D] by its frame's angle, in float32 or better."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    cos, sin = rotation.to(wide.dtype).unbind(1)
    even, odd = wide[..., 0::2], wide[..., 1::2]
    return torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(-2).to(x.dtype)


# ---------------------------------------------------------------- the op


def _readable(qkv: Tensor) -> Tensor:
    return qkv if kernels.readable(qkv) else qkv.contiguous()


def _forward(qkv, q_weight, k_weight, rotation, rotate_first, eps, bias):
    if qkv.shape[1] == 1:
        return over_one_key(qkv)
    return kernels.forward(_readable(qkv), q_weight, k_weight, rotation.float().contiguous(), rotate_first, eps)


def _backward(d_o, qkv, q_weight, k_weight, rotation, rotate_first, eps, wants_bias):
    rotation = rotation.float().contiguous()
    sums = None
    if qkv.shape[1] == 1:
        dqkv, d_weights = over_one_key_backward(d_o, qkv), qkv.new_zeros((2, qkv.shape[-1]))
    elif cuda_temporal.unserved(qkv, q_weight, k_weight):
        # Sums inside, over 16 frames each, were tried: with 16 frames they cost as much as the pass.
        dqkv, d_weights = kernels.backward(d_o, _readable(qkv), q_weight, k_weight, rotation, rotate_first, eps)
    else:
        dqkv, d_weights, sums = cuda_temporal.backward(
            d_o, _readable(qkv), q_weight, k_weight, rotation, rotate_first, eps, wants_bias
        )
    if not wants_bias:
        return dqkv, d_weights, qkv.new_empty(0)
    return dqkv, d_weights, column_sum(dqkv.flatten(3).flatten(0, 2) if sums is None else sums, qkv.dtype)


_op = library.define(
    "temporal_attention(Tensor qkv, Tensor? q_weight, Tensor? k_weight, Tensor rotation, bool rotate_first, float eps, "
    "Tensor? bias) -> Tensor",
    _forward,
    lambda qkv, *_: qkv.new_empty(*qkv.shape[:3], qkv.shape[4] * qkv.shape[5]),
)
_backward_op = library.define(
    "temporal_attention_backward(Tensor d_o, Tensor qkv, Tensor? q_weight, Tensor? k_weight, Tensor rotation, "
    "bool rotate_first, float eps, bool wants_bias) -> (Tensor dqkv, Tensor d_weights, Tensor d_bias)",
    _backward,
    lambda d_o, qkv, q_weight, k_weight, rotation, rotate_first, eps, wants_bias: (
        qkv.new_empty(qkv.shape),
        qkv.new_empty((2, qkv.shape[-1])),
        qkv.new_empty(qkv.shape[3] * qkv.shape[4] * qkv.shape[5] if wants_bias else 0),
    ),
)


class _TemporalAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv, q_weight, k_weight, rotation, rotate_first, eps, bias):
        ctx.save_for_backward(qkv, q_weight, k_weight, rotation)
        ctx.options = rotate_first, eps
        return library.below_autograd(_op, qkv, q_weight, k_weight, rotation, rotate_first, eps, bias)

    @staticmethod
    def backward(ctx, d_o):
        qkv, q_weight, k_weight, rotation = ctx.saved_tensors
        wants_bias = ctx.needs_input_grad[6]
        dqkv, d_weights, d_bias = _backward_op(d_o, qkv, q_weight, k_weight, rotation, *ctx.options, wants_bias)
        d_bias = d_bias if wants_bias else None
        return dqkv, *weight_gradients(d_weights, q_weight, k_weight), None, None, None, d_bias


library.differentiable(_op, _TemporalAttention)
