"""Attention of the video tokens over packed text: each sample sees its own tokens and no padding."""

from dataclasses import dataclass

import torch
from torch import Tensor

from stdit_fast.kernels import cross_attention as kernels
from stdit_fast.ops import cuda_attention, library, registry
from stdit_fast.ops.checks import expect_not_empty, expect_shape
from stdit_fast.ops.library_attention import library_attention

NAME = "cross_attention"


def _serving() -> tuple[str, str]:
    implementation, reason = registry.triton_kernel()
    if implementation == registry.REFERENCE:
        return implementation, reason
    ours, why_not = cuda_attention.available(torch.cuda.current_device())
    if ours:
        served = f"bf16 at head dimension {cuda_attention.served_head_dims()}"
        served += f", texts of at most {cuda_attention.MOST_KEYS} tokens"
        return "cuda", f"{served}; else triton"
    return implementation, f"{reason}; not ours in CUDA: {why_not}"


registry.declare(NAME, _serving)


@dataclass(frozen=True)
class TextLayout:
    """Where each sample's tokens lie in the packed text [M, ...], M = sum(lengths).

    Attributes:
        lengths: tokens of each sample, host integers, all at least 1.
        total: M.
        max_length: the longest of the lengths.
        starts: [B + 1] int32, the packed place of each sample's first token, and M.
        token_index: [M] int64, the place of each packed token in the padded [B*L].
        padded_index: [B, max_length] int64, the packed place of each sample's tokens; 0 where it has none.
        padded_mask: [B, max_length] bool, True where padded_index names a token.
    """

    lengths: tuple[int, ...]
    total: int
    max_length: int
    starts: Tensor
    token_index: Tensor
    padded_index: Tensor
    padded_mask: Tensor


@torch.compiler.disable  # it asks for values: nothing to compile, and lengths belong to no graph
def text_layout(mask: Tensor | None, batch: int, max_tokens: int, device: torch.device) -> TextLayout:
    """Plans the packing of [B, L] text by its mask.

    A mask that lies on the CPU costs no synchronisation with the GPU; one that lies there is read back once. All
    indices travel in one transfer.

    Args:
        mask: [B, L], nonzero where a token is real, in any pattern; None: every token is.
        batch, max_tokens: B and L of the text.
        device: where the index tensors go.

    Raises:
        ValueError: a mask of another shape, or a sample without any token.
    """
    if mask is None:
        mask = torch.ones(batch, max_tokens, dtype=torch.bool)
    expect_shape("text_layout", "mask", mask, (batch, max_tokens))
    real = mask.to("cpu") != 0
    counts = real.sum(1)
    lengths = tuple(counts.tolist())
    if 0 in lengths:
        empty = [sample for sample, length in enumerate(lengths) if length == 0]
        raise ValueError(f"mask: the captions of samples {empty} have no token; give each at least one (an end token)")
    ends = counts.cumsum(0)
    place = torch.arange(max(lengths))
    padded_mask = place < counts[:, None]
    padded_index = ((ends - counts)[:, None] + place) * padded_mask
    starts = torch.cat((ends.new_zeros(1), ends)).to(torch.int32)
    token_index = real.flatten().nonzero().flatten()
    tensors = _to_device((starts, token_index, padded_index, padded_mask), torch.device(device))
    return TextLayout(lengths, sum(lengths), max(lengths), *tensors)


def _to_device(tensors: tuple[Tensor, ...], device: torch.device) -> list[Tensor]:
    """Copies of CPU tensors on a device, through one buffer and one transfer that nothing waits for."""
    word = torch.int64.itemsize
    words = [-(-tensor.nbytes // word) for tensor in tensors]
    # Pinned: the driver would wait for the GPU before it copied a larger pageable buffer.
    host = torch.empty(sum(words), dtype=torch.int64, pin_memory=device.type == "cuda")
    for part, tensor in zip(host.split(words), tensors, strict=True):
        _as(part, tensor).copy_(tensor)
    there = host.to(device, non_blocking=True)
    return [_as(part, tensor) for part, tensor in zip(there.split(words), tensors, strict=True)]


def _as(words: Tensor, like: Tensor) -> Tensor:
    """The bytes of an int64 vector as a tensor of the shape and dtype of another."""
    return words.view(like.dtype)[: like.numel()].view(like.shape)


def cross_attention(q: Tensor, kv: Tensor, layout: TextLayout, backend: str = "auto") -> Tensor:
    """softmax(q k^T / sqrt(D)) v over each sample's own text.

    Bytes it must move: q in, o out (2 units of C values a video token), and the text's k and v once; in backward q
    and do in twice, o in and dq out once (6 units).

    Args:
        q: [B, N, H, D], N = T*S video tokens a sample.
        kv: [M, 2, H, D], keys and values of the packed text; tokens may lie apart, as in a slice of a wider tensor.
        layout: of that text.
        backend: "auto", "fused" or "reference".

    Returns:
        [B, N, H*D] in q's dtype.

    Raises:
        ValueError: a shape that does not fit, an empty q, or a kv of another dtype.
        ConfigError: a backend that cannot serve the call.
    """
    expect_shape(NAME, "q", q, (len(layout.lengths), "N", "H", "D"))
    expect_not_empty(NAME, "q", q)
    expect_shape(NAME, "kv", kv, (layout.total, 2, q.shape[2], q.shape[3]))
    if kv.dtype != q.dtype:
        raise ValueError(f"{NAME}: kv is {kv.dtype}, expected q's {q.dtype}")
    if registry.use_kernel(NAME, backend, q, q.shape[3]):
        return _op(q, kv, layout.starts, layout.max_length)[0]
    return definition(q, kv, layout)


def definition(q: Tensor, kv: Tensor, layout: TextLayout) -> Tensor:
    padded = kv.index_select(0, layout.padded_index.flatten()).unflatten(0, layout.padded_index.shape)
    k, v = padded.permute(2, 0, 3, 1, 4).unbind(0)  # each [B, H, L, D]
    o = library_attention(q.transpose(1, 2), k, v, layout.padded_mask[:, None, None, :])
    return o.transpose(1, 2).flatten(2)


# ---------------------------------------------------------------- the op


def _kernel(q: Tensor, kv: Tensor, starts: Tensor, max_length: int) -> tuple[Tensor, Tensor]:
    if cuda_attention.unserved(q, max_length):
        return kernels.forward(q, kv, starts)
    o, lse = cuda_attention.cross_forward(q, kv, starts, max_length)
    return o.flatten(2), lse


def _backward_kernel(grad, q, kv, o, lse, starts, max_length) -> tuple[Tensor, Tensor]:
    if cuda_attention.unserved(q, max_length):
        return kernels.backward(grad, q, kv, o, lse, starts, max_length)
    grad, o = (x.unflatten(2, q.shape[2:]) for x in (grad, o))
    return cuda_attention.cross_backward(grad, q, kv, starts, max_length, o, lse)


def _fake(q: Tensor, kv: Tensor, starts: Tensor, max_length: int) -> tuple[Tensor, Tensor]:
    batch, rows, heads, head_dim = q.shape
    lse = q.new_empty((batch, heads, rows), dtype=torch.float32)
    return q.new_empty(batch, rows, heads * head_dim), lse


def _backward_fake(grad, q, kv, o, lse, starts, max_length) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), kv.new_empty(kv.shape)


# starts and max_length are those of TextLayout. The second output is the logarithm of each row's sum, float32
# [B, H, N], which backward needs; to base 2 where Triton serves, natural where CUDA does.
_op = library.define(
    "cross_attention(Tensor q, Tensor kv, Tensor starts, SymInt max_length) -> (Tensor, Tensor)", _kernel, _fake
)
_backward_op = library.define(
    "cross_attention_backward(Tensor grad, Tensor q, Tensor kv, Tensor o, Tensor lse, Tensor starts, "
    "SymInt max_length) -> (Tensor, Tensor)",
    _backward_kernel,
    _backward_fake,
)


class _CrossAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, kv, starts, max_length):
        o, lse = library.below_autograd(_op, q, kv, starts, max_length)
        ctx.save_for_backward(q, kv, o, lse, starts)
        ctx.mark_non_differentiable(lse)
        ctx.set_materialize_grads(False)
        ctx.max_length = max_length
        return o, lse

    @staticmethod
    def backward(ctx, grad, _):
        if grad is None:
            return None, None, None, None
        q, kv, o, lse, starts = ctx.saved_tensors
        return *_backward_op(grad, q, kv, o, lse, starts, ctx.max_length), None, None


library.differentiable(_op, _CrossAttention)
