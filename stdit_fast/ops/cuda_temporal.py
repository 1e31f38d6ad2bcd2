"""Temporal attention's backward pass in CUDA for Hopper: what it serves, and its call, below autograd."""

import torch
from torch import Tensor

from stdit_fast import _cuda
from stdit_fast.kernels.residual_norm import column_sum
from stdit_fast.ops import cuda_attention

HEAD_DIM = 72
MOST_FRAMES = 64


def available(device: int) -> tuple[bool, str]:
    """Whether the kernel runs on that GPU, and the reason."""
    there, reason = cuda_attention.available(device)
    if there and not hasattr(_cuda.library(), "Temporal"):
        return False, f"{reason}, before it knew temporal attention"
    return there, reason


def unserved(qkv: Tensor, q_weight: Tensor | None, k_weight: Tensor | None) -> str:
    """Why the kernel cannot serve a call on qkv [B, T, S, 3, H, D], or an empty string."""
    if not qkv.is_cuda:
        return f"a tensor on {qkv.device.type}"
    if qkv.dtype != torch.bfloat16:
        return f"{qkv.dtype}, where torch.bfloat16 is served"
    if qkv.shape[-1] != HEAD_DIM or qkv.shape[1] > MOST_FRAMES:
        return (
            f"head dimension {qkv.shape[-1]} and {qkv.shape[1]} frames, where {HEAD_DIM} and {MOST_FRAMES} are served"
        )
    if q_weight is None or k_weight is None:
        return "q or k without a norm"
    there, reason = available(qkv.device.index)
    return "" if there else reason


def backward(
    d_o: Tensor,
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    rotation: Tensor,
    rotate_first: bool,
    eps: float,
    wants_sums: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(dqkv, contiguous; the weights' gradients [2, D]; sums of dqkv's rows [R, 3*H*D] float32, if wanted).

    Bit for bit the same on repeat.

    Args:
        d_o: [B, T, S, H*D].
        qkv: [B, T, S, 3, H, D], the last three axes contiguous, rows at multiples of 8 values and 16 bytes.
        q_weight, k_weight: [D].
        rotation: [T, 2, D/2] float32, contiguous.
    """
    library = _cuda.library()
    batch, frames, positions, _, heads, head_dim = qkv.shape
    d_o, dqkv = d_o.contiguous(), torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    (q_weight, k_weight), weight_dtype = cuda_attention.norm_weights(q_weight, k_weight)
    # The stride of an axis of length 1 may be anything.
    strides = [stride if size > 1 else 8 for size, stride in zip(qkv.shape[:3], qkv.stride()[:3], strict=True)]
    call = library.Temporal(
        qkv=qkv.data_ptr(),
        batch_stride=strides[0],
        frame_stride=strides[1],
        position_stride=strides[2],
        d_o=d_o.data_ptr(),
        d_qkv=dqkv.data_ptr(),
        q_weight=q_weight.data_ptr(),
        k_weight=k_weight.data_ptr(),
        weight_dtype=weight_dtype,
        rotation=rotation.data_ptr(),
        batch=batch,
        positions=positions,
        frames=frames,
        heads=heads,
        head_dim=head_dim,
        rotate_first=rotate_first,
        epsilon=eps,
    )
    device = qkv.device.index
    parts = call.parts(device)
    options = {"dtype": torch.float32, "device": qkv.device}
    d_weights = torch.empty(parts * heads, 2 * head_dim, **options)
    sums = torch.empty(parts, 3 * heads * head_dim, **options) if wants_sums else None
    call.backward(
        d_weights=d_weights.data_ptr(),
        d_sums=0 if sums is None else sums.data_ptr(),
        device=device,
        stream=cuda_attention.stream_of(qkv),
    )
    return dqkv, column_sum(d_weights, qkv.dtype).view(2, head_dim), sums
