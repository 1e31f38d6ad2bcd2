"""Our own attention for Hopper: what it serves, and its calls, below autograd: of packed qkv, and over packed text."""

import torch
from torch import Tensor

from stdit_fast import _cuda

HEAD_DIMS = (64, 72, 80, 96)  # that kernels are made for: csrc/attention/head_dim.h
MOST_KEYS = 320  # tokens of a text: they stay in shared memory
_ALIGNMENT = 8  # elements: the copy engine takes addresses and strides in steps of 16 bytes


def available(device: int) -> tuple[bool, str]:
    """Whether the kernels run on that GPU, and the reason."""
    there, reason = _cuda.available(device)
    if not there:
        return False, reason
    if torch.cuda.get_device_capability(device)[0] != 9:
        return False, "our attention is for Hopper (compute capability 9.0)"
    return True, reason


def served_head_dims() -> str:
    """The head dimensions in words, such as "64, 72"."""
    return ", ".join(map(str, HEAD_DIMS))


def unserved(x: Tensor, text_length: int = 0) -> str:
    """Why our kernels cannot serve a call on qkv or q [..., D], or an empty string.

    Args:
        text_length: tokens of the longest text, of cross attention.
    """
    if not x.is_cuda:
        return f"a tensor on {x.device.type}"
    if x.dtype != torch.bfloat16:
        return f"{x.dtype}, where torch.bfloat16 is served"
    if x.shape[-1] not in HEAD_DIMS:
        return f"head dimension {x.shape[-1]}, where {served_head_dims()} can be served"
    if text_length > MOST_KEYS:
        return f"a text of {text_length} tokens, where {MOST_KEYS} fit"
    there, reason = available(x.device.index)
    return "" if there else reason


def forward(qkv: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """Attention of each of N sequences over itself, q and k normalised where they have a weight.

    Args:
        qkv: [N, S, 3, H, D] bfloat16.
        q_weight, k_weight: [D] or None.
        eps: of the RMSNorm.

    Returns:
        o [N, S, H, D], contiguous; lse [N, H, S] float32: the logarithm of the sum of exponentials of a row of scores.
    """
    qkv = _readable(qkv)
    sequences, positions, _, heads, head_dim = qkv.shape
    o = qkv.new_empty((sequences, positions, heads, head_dim))
    lse = qkv.new_empty((sequences, heads, positions), dtype=torch.float32)
    call, _kept = _call(qkv, q_weight, k_weight, eps, o, lse)
    _forward(call, qkv)
    return o, lse


def backward(
    d_o: Tensor,
    qkv: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    o: Tensor,
    lse: Tensor,
    eps: float,
    d_qkv: Tensor,
) -> Tensor:
    """Writes the gradient of qkv into `d_qkv` [N, S, 3, H, D]; answers that of both weights, [2, D] float32.

    Bit for bit the same on repeat.
    """
    qkv, o, d_o = _readable(qkv), o.contiguous(), d_o.contiguous()
    call, _kept = _call(qkv, q_weight, k_weight, eps, o, lse.contiguous())
    device = qkv.device.index
    d_weights = qkv.new_empty((2, qkv.shape[-1]), dtype=torch.float32)
    scratch = qkv.new_empty(call.backward_scratch(device), dtype=torch.uint8)
    wanted = q_weight is not None or k_weight is not None
    call.backward(
        d_o=_heads(d_o),
        **{f"d_{name}": _heads(part) for name, part in zip("qkv", d_qkv.unbind(2), strict=True)},
        d_weights=d_weights.data_ptr() if wanted else 0,
        scratch=scratch.data_ptr(),
        device=device,
        stream=stream_of(qkv),
    )
    return d_weights


def cross_forward(q: Tensor, kv: Tensor, starts: Tensor, max_length: int) -> tuple[Tensor, Tensor]:
    """Attention of each of B samples' queries over its own text.

    Args:
        q: [B, N, H, D] bfloat16.
        kv: [M, 2, H, D], keys and values of the packed text.
        starts: [B + 1] int32, contiguous, on q's device: each text's first token, and M; each text has a token.
        max_length: at least the longest text's length, at most MOST_KEYS.

    Returns:
        o [B, N, H, D], contiguous; lse [B, H, N] float32.
    """
    q, kv = _readable(q), _readable(kv)
    batch, positions, heads, head_dim = q.shape
    o = q.new_empty((batch, positions, heads, head_dim))
    lse = q.new_empty((batch, heads, positions), dtype=torch.float32)
    _forward(_cross_call(q, kv, starts, max_length, o, lse), q)
    return o, lse


def cross_backward(
    d_o: Tensor, q: Tensor, kv: Tensor, starts: Tensor, max_length: int, o: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradients of q [B, N, H, D] and kv [M, 2, H, D], contiguous. Bit for bit the same on repeat."""
    q, kv, o, d_o = _readable(q), _readable(kv), o.contiguous(), d_o.contiguous()
    call = _cross_call(q, kv, starts, max_length, o, lse.contiguous())
    device = q.device.index
    # Zeros, since kv may be padded to a fixed capacity, with rows that belong to no sample.
    d_q, d_kv = q.new_empty(q.shape), kv.new_zeros(kv.shape)
    scratch = q.new_empty(call.backward_scratch(device), dtype=torch.uint8)
    d_k, d_v = (_heads(part) for part in _as_one_sequence(d_kv))
    call.backward(
        d_o=_heads(d_o),
        d_q=_heads(d_q),
        d_k=d_k,
        d_v=d_v,
        d_weights=0,
        scratch=scratch.data_ptr(),
        device=device,
        stream=stream_of(q),
    )
    return d_q, d_kv


def _forward(call, like: Tensor) -> None:
    scratch = like.new_empty(call.forward_scratch(), dtype=torch.uint8)
    call.forward(scratch.data_ptr(), like.device.index, stream_of(like))


def _cross_call(q: Tensor, kv: Tensor, starts: Tensor, max_length: int, o: Tensor, lse: Tensor):
    library = _cuda.library()
    batch, positions, heads, head_dim = q.shape
    k, v = (_heads(part) for part in _as_one_sequence(kv))
    return library.Attention(
        q=_heads(q),
        k=k,
        v=v,
        o=_heads(o),
        lse=lse.data_ptr(),
        q_weight=0,
        k_weight=0,
        weight_dtype=library.BFLOAT16,
        normalise_q=False,
        normalise_k=False,
        sequences=batch,
        queries=positions,
        keys=max_length,
        heads=heads,
        head_dim=head_dim,
        scale=head_dim**-0.5,
        epsilon=0.0,
        key_starts=starts.data_ptr(),
        packed_keys=kv.shape[0],
    )


def _as_one_sequence(kv: Tensor) -> list[Tensor]:
    """k and v [1, M, H, D] of kv [M, 2, H, D]."""
    return [part.unsqueeze(0) for part in kv.unbind(1)]


def _call(qkv: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, eps: float, o: Tensor, lse: Tensor):
    """The library's description of a call, and the tensors that must live until it is launched."""
    library = _cuda.library()
    sequences, positions, _, heads, head_dim = qkv.shape
    weights, weight_dtype = norm_weights(q_weight, k_weight)
    q_address, k_address = (0 if w is None else w.data_ptr() for w in weights)
    call = library.Attention(
        **{name: _heads(part) for name, part in zip("qkv", qkv.unbind(2), strict=True)},
        o=_heads(o),
        lse=lse.data_ptr(),
        q_weight=q_address,
        k_weight=k_address,
        weight_dtype=weight_dtype,
        normalise_q=q_weight is not None,
        normalise_k=k_weight is not None,
        sequences=sequences,
        queries=positions,
        keys=positions,
        heads=heads,
        head_dim=head_dim,
        scale=head_dim**-0.5,
        epsilon=eps,
    )
    return call, weights


def norm_weights(*weights: Tensor | None) -> tuple[list[Tensor | None], int]:
    """Weights of norms as the library reads them, all bfloat16 or all float32, and its name for that dtype."""
    library = _cuda.library()
    weights = [None if w is None else w.detach().contiguous() for w in weights]
    if all(w is None or w.dtype == torch.bfloat16 for w in weights):
        return weights, library.BFLOAT16
    return [None if w is None else w.float() for w in weights], library.FLOAT32


def _heads(x: Tensor) -> tuple[int, int, int, int]:
    """Address and strides of [N, S, H, D]; those of an axis of length 1 may be anything and are made to fit."""
    strides = (max(_ALIGNMENT, x.stride(i)) if x.shape[i] > 1 else _ALIGNMENT for i in range(3))
    return x.data_ptr(), *strides


def _readable(x: Tensor) -> Tensor:
    """A tensor where it lies if the copy engine can read it there, else a copy."""
    strides = [x.stride(i) for i in range(x.dim() - 1) if x.shape[i] > 1]
    aligned = x.data_ptr() % 16 == 0 and all(s > 0 and s % _ALIGNMENT == 0 for s in strides)
    return x if aligned and x.stride(-1) == 1 else x.contiguous()


def stream_of(x: Tensor) -> int:
    """The current stream of a tensor's GPU, as the library takes it."""
    return torch.cuda.current_stream(x.device).cuda_stream
