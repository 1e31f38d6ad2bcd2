"""Attention over the positions of one frame, with QK-normalisation inside, on the packed qkv projection."""

import torch
from torch import Tensor

from stdit_fast.kernels import qk_norm
from stdit_fast.ops import cuda_attention, library, registry
from stdit_fast.ops.checks import expect_qkv
from stdit_fast.ops.library_attention import attention_backward, attention_forward, best_library, library_attention
from stdit_fast.ops.rms_norm import rms_norm

NAME = "spatial_attention"


def _serving() -> tuple[str, str]:
    implementation, reason = registry.triton_kernel()
    if implementation == registry.REFERENCE:
        return implementation, reason
    device = torch.device("cuda", torch.cuda.current_device())
    ours, why_not = cuda_attention.available(device.index)
    if ours:
        return (
            "cuda",
            f"bf16 at head dimension {cuda_attention.served_head_dims()}, QK-norm inside; repeats bit for bit",
        )
    name, remark = best_library(device, torch.bfloat16, 72)
    return (
        f"{implementation} + {name}",
        f"QK-norm by Triton; attention in bf16 by {name}: {remark}; not ours: {why_not}",
    )


registry.declare(NAME, _serving)


def spatial_attention(
    qkv: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float = 1e-6,
    *,
    backend: str = "auto",
) -> Tensor:
    """softmax(norm(q) norm(k)^T / sqrt(D)) v within each frame.

    Bytes it must move: q, k, v in, o out (4 units of C values a token), which our own kernel does. Where a library's
    attention serves, which knows no norm, it is 8 (normalised q and k are written and read). Nothing more is kept for
    the backward pass.

    Args:
        qkv: [B, T, S, 3, H, D], the projection's output as it comes.
        q_weight, k_weight: [D] weights of the RMSNorm of q and k; None for a model without QK-norm.
        eps: of the RMSNorm.
        backend: "auto", "fused" (raise where no kernel can serve the call), "reference" (plain PyTorch).

    Returns:
        [B, T, S, H*D] in qkv's dtype.

    Raises:
        ValueError: a shape that does not fit, or an empty qkv.
        ConfigError: backend="fused" where that cannot be had.
    """
    expect_qkv(NAME, qkv, q_weight, k_weight)
    if registry.use_kernel(NAME, backend, qkv, qkv.shape[-1]):
        return _op(qkv, q_weight, k_weight, eps)[0]
    return definition(qkv, q_weight, k_weight, eps)


def definition(qkv: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, eps: float) -> Tensor:
    frames = qkv.flatten(0, 1)  # [B*T, S, 3, H, D]
    q, k, v = frames.permute(2, 0, 3, 1, 4).unbind(0)  # each [B*T, H, S, D]
    o = library_attention(rms_norm(q, q_weight, eps), rms_norm(k, k_weight, eps), v)
    return o.transpose(1, 2).reshape(*qkv.shape[:3], -1)


def _forward(qkv: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    batch, frames, positions, _, heads, _ = qkv.shape
    if positions == 1:
        return over_one_key(qkv), qkv.new_zeros((batch * frames, heads, 1), dtype=torch.float32)
    if not cuda_attention.unserved(qkv):
        o, lse = cuda_attention.forward(qkv.flatten(0, 1), q_weight, k_weight, eps)
        return o.view(batch, frames, positions, -1), lse
    o, lse = attention_forward(*_normalised(qkv, q_weight, k_weight, eps))
    # The libraries write o in the order of q, so this is a view.
    return o.transpose(1, 2).reshape(batch, frames, positions, -1).contiguous(), lse


def _backward(
    d_o: Tensor, qkv: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, o: Tensor, lse: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    shape = qkv.shape[:3] + qkv.shape[4:]  # [B, T, S, H, D]
    if qkv.shape[2] == 1:
        return over_one_key_backward(d_o, qkv), torch.zeros_like(fake_weight_gradients(qkv, q_weight, k_weight))
    if not cuda_attention.unserved(qkv):
        dqkv = qkv.new_empty(qkv.shape)
        d_o, o = (x.reshape(shape).flatten(0, 1) for x in (d_o, o))
        d_weights = cuda_attention.backward(d_o, qkv.flatten(0, 1), q_weight, k_weight, o, lse, eps, dqkv.flatten(0, 1))
        return dqkv, d_weights if q_weight is not None or k_weight is not None else d_weights[:0]
    qkv = readable(qkv)
    q, k, v = _normalised(qkv, q_weight, k_weight, eps)
    o, d_o = (x.contiguous().view(shape).flatten(0, 1).transpose(1, 2) for x in (o, d_o))
    grads = attention_backward(d_o, q, k, v, o, lse)
    del q, k, v  # their memory serves dqkv
    dqkv = qkv.new_empty(qkv.shape)
    grads = (grad.transpose(1, 2).unflatten(0, shape[:2]) for grad in grads)
    d_weights = qk_norm.backward(*grads, qkv, q_weight, k_weight, None, False, eps, dqkv)
    return dqkv, qkv.new_empty((0, shape[-1]), dtype=torch.float32) if d_weights is None else d_weights


def _normalised(
    qkv: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """q', k' and v [B*T, H, S, D] as the libraries take them: views of a new buffer, and of qkv."""
    qkv = readable(qkv)
    q, k, v = qkv.unbind(3)  # each [B, T, S, H, D]
    if q_weight is not None or k_weight is not None:
        out = qkv.new_empty((2, *q.shape))
        qk_norm.forward(qkv, q_weight, k_weight, None, False, eps, out)
        q, k = out.unbind(0)
    return tuple(x.flatten(0, 1).transpose(1, 2) for x in (q, k, v))


def over_one_key(qkv: Tensor) -> Tensor:
    """Attention with one key, whose softmax is 1: v of qkv [B, T, S, 3, H, D], as [B, T, S, H*D]."""
    return qkv.select(3, 2).clone(memory_format=torch.contiguous_format).flatten(3)


def over_one_key_backward(d_o: Tensor, qkv: Tensor) -> Tensor:
    """The gradient of qkv, of which q and k have none."""
    dqkv = qkv.new_zeros(qkv.shape)
    dqkv.select(3, 2).copy_(d_o.reshape(*qkv.shape[:3], *qkv.shape[4:]))
    return dqkv


def readable(qkv: Tensor) -> Tensor:
    """qkv where it lies if the kernels can read it there, else a copy."""
    return qkv if qk_norm.readable(qkv) else qkv.contiguous()


def weight_gradients(
    d_weights: Tensor, q_weight: Tensor | None, k_weight: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients [2, D] of both weights as autograd takes them: one each, in the weight's dtype."""
    if q_weight is not None:
        d_weights = d_weights.to(q_weight.dtype)
    dq_weight = None if q_weight is None else d_weights[0]
    return dq_weight, None if k_weight is None else d_weights[1].to(k_weight.dtype)


def fake_weight_gradients(qkv: Tensor, q_weight: Tensor | None, k_weight: Tensor | None) -> Tensor:
    """Shape and dtype of both weights' gradients as the backward ops return them: [2, D], or [0, D] without weights."""
    count = 0 if q_weight is None and k_weight is None else 2
    return qkv.new_empty((count, qkv.shape[-1]), dtype=torch.float32)


def _fake_forward(qkv, q_weight, k_weight, eps):
    batch, frames, positions, _, heads, head_dim = qkv.shape
    lse = qkv.new_empty((batch * frames, heads, positions), dtype=torch.float32)
    return qkv.new_empty((batch, frames, positions, heads * head_dim)), lse


def _fake_backward(d_o, qkv, q_weight, k_weight, o, lse, eps):
    return qkv.new_empty(qkv.shape), fake_weight_gradients(qkv, q_weight, k_weight)


_op = library.define(
    f"{NAME}(Tensor qkv, Tensor? q_weight, Tensor? k_weight, float eps) -> (Tensor o, Tensor lse)",
    _forward,
    _fake_forward,
)
_backward_op = library.define(
    f"{NAME}_backward(Tensor d_o, Tensor qkv, Tensor? q_weight, Tensor? k_weight, Tensor o, Tensor lse, float eps) "
    "-> (Tensor dqkv, Tensor d_weights)",
    _backward,
    _fake_backward,
)


class _SpatialAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv, q_weight, k_weight, eps):
        o, lse = library.below_autograd(_op, qkv, q_weight, k_weight, eps)
        # Not q' and k': making them again moves 4 units, keeping them would cost 2 a block in memory.
        ctx.save_for_backward(qkv, q_weight, k_weight, o, lse)
        ctx.eps = eps
        ctx.mark_non_differentiable(lse)
        ctx.set_materialize_grads(False)
        return o, lse

    @staticmethod
    def backward(ctx, d_o, _):
        if d_o is None:
            return None, None, None, None
        qkv, q_weight, k_weight, o, lse = ctx.saved_tensors
        dqkv, d_weights = _backward_op(d_o, qkv, q_weight, k_weight, o, lse, ctx.eps)
        return dqkv, *weight_gradients(d_weights, q_weight, k_weight), None


library.differentiable(_op, _SpatialAttention)
