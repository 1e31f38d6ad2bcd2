"""Temporal attention of long clips: norm and rotation in one pass of a kernel, then a library's attention.

Serves `temporal_attention` where a position's frames are too many for a kernel that holds them all at once.
"""

import torch
from torch import Tensor

from stdit_fast.kernels import qk_norm
from stdit_fast.ops import library
from stdit_fast.ops.library_attention import attention_backward, attention_forward
from stdit_fast.ops.linear import bias_gradient
from stdit_fast.ops.spatial_attention import (
    fake_weight_gradients,
    over_one_key,
    over_one_key_backward,
    readable,
    weight_gradients,
)

NAME = "temporal_attention_long"


def temporal_attention_long(
    qkv: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    rotation: Tensor,
    rotate_first: bool,
    eps: float,
    bias: Tensor | None = None,
) -> Tensor:
    """Softmax attention over T of q and k that are normalised and turned, at each position.

    Nothing is transposed: the heads of all positions together are the heads of B sequences of T tokens, and lie at
    even distances in [B, T, S, H, D]. In packed qkv they do not, so v is copied beside q' and k'.

    Bytes moved: 10 units of C values a token, 4 if the attention did all itself.

    Args:
        qkv: [B, T, S, 3, H, D], bf16, fp16 or fp32, D a multiple of 8; the caller has checked it.
        q_weight, k_weight: [D] weights of the RMSNorm of q and k, or None.
        rotation: [T, 2, D/2] float32, cosine and sine of the angle of each pair of neighbouring channels.
        rotate_first: rotate before normalising.
        eps: of the RMSNorm.
        bias: [3*H*D], held by qkv, if its gradient is to be found here (a pass).

    Returns:
        [B, T, S, H*D] in qkv's dtype.
    """
    return _op(qkv, q_weight, k_weight, rotation, rotate_first, eps, bias)[0]


def _forward(qkv, q_weight, k_weight, rotation, rotate_first, eps, bias):
    batch, frames, positions, _, heads, head_dim = qkv.shape
    if frames == 1:
        return over_one_key(qkv), qkv.new_zeros((batch, positions * heads, 1), dtype=torch.float32)
    made = _made(readable(qkv), q_weight, k_weight, rotation, rotate_first, eps)
    o, lse = attention_forward(*(_as_heads(x) for x in made))
    # The libraries write o in the order of q, so this is a view.
    return o.transpose(1, 2).reshape(batch, frames, positions, heads * head_dim).contiguous(), lse


def _backward(d_o, qkv, q_weight, k_weight, rotation, o, lse, rotate_first, eps):
    shape = qkv.shape[:3] + qkv.shape[4:]  # [B, T, S, H, D]
    if qkv.shape[1] == 1:
        return over_one_key_backward(d_o, qkv), torch.zeros_like(fake_weight_gradients(qkv, q_weight, k_weight))
    qkv = readable(qkv)
    made = _made(qkv, q_weight, k_weight, rotation, rotate_first, eps)
    o, d_o = (_as_heads(x.contiguous().view(shape)) for x in (o, d_o))
    grads = attention_backward(d_o, *(_as_heads(x) for x in made), o, lse)
    del made  # its memory serves dqkv
    dqkv = qkv.new_empty(qkv.shape)
    grads = (grad.transpose(1, 2).unflatten(2, shape[2:4]) for grad in grads)
    d_weights = qk_norm.backward(*grads, qkv, q_weight, k_weight, rotation, rotate_first, eps, dqkv)
    return dqkv, qkv.new_empty((0, shape[-1]), dtype=torch.float32) if d_weights is None else d_weights


def _made(qkv, q_weight, k_weight, rotation, rotate_first, eps) -> Tensor:
    """q', k' and v [3, B, T, S, H, D]."""
    batch, frames, positions, _, heads, head_dim = qkv.shape
    out = qkv.new_empty((3, batch, frames, positions, heads, head_dim))
    qk_norm.forward(qkv, q_weight, k_weight, rotation, rotate_first, eps, out)
    return out


def _as_heads(x: Tensor) -> Tensor:
    """[B, T, S, H, D] as [B, S*H, T, D]."""
    return x.flatten(2, 3).transpose(1, 2)


def _fake_forward(qkv, q_weight, k_weight, rotation, rotate_first, eps, bias):
    batch, frames, positions, _, heads, head_dim = qkv.shape
    lse = qkv.new_empty((batch, positions * heads, frames), dtype=torch.float32)
    return qkv.new_empty((batch, frames, positions, heads * head_dim)), lse


def _fake_backward(d_o, qkv, q_weight, k_weight, rotation, o, lse, rotate_first, eps):
    return qkv.new_empty(qkv.shape), fake_weight_gradients(qkv, q_weight, k_weight)


_op = library.define(
    f"{NAME}(Tensor qkv, Tensor? q_weight, Tensor? k_weight, Tensor rotation, bool rotate_first, float eps, "
    "Tensor? bias) -> (Tensor o, Tensor lse)",
    _forward,
    _fake_forward,
)
_backward_op = library.define(
    f"{NAME}_backward(Tensor d_o, Tensor qkv, Tensor? q_weight, Tensor? k_weight, Tensor rotation, Tensor o, "
    "Tensor lse, bool rotate_first, float eps) -> (Tensor dqkv, Tensor d_weights)",
    _backward,
    _fake_backward,
)


class _TemporalAttentionLong(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv, q_weight, k_weight, rotation, rotate_first, eps, bias):
        o, lse = library.below_autograd(_op, qkv, q_weight, k_weight, rotation, rotate_first, eps, bias)
        ctx.save_for_backward(qkv, q_weight, k_weight, rotation, o, lse)
        ctx.settings = rotate_first, eps
        ctx.mark_non_differentiable(lse)
        ctx.set_materialize_grads(False)
        return o, lse

    @staticmethod
    def backward(ctx, d_o, _):
        if d_o is None:
            return (None,) * 7
        qkv, q_weight, k_weight, rotation, o, lse = ctx.saved_tensors
        dqkv, d_weights = _backward_op(d_o, qkv, q_weight, k_weight, rotation, o, lse, *ctx.settings)
        d_bias = bias_gradient(dqkv.flatten(3)) if ctx.needs_input_grad[6] else None
        return dqkv, *weight_gradients(d_weights, q_weight, k_weight), None, None, None, d_bias


library.differentiable(_op, _TemporalAttentionLong)
