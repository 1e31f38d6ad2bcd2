"""Attention by the libraries that PyTorch ships: in parts that they can take, as an op and as a pair below autograd.

`library_attention` is differentiable and is what the plain definitions call. `attention_forward` and
`attention_backward` are the same for use inside fused ops, which have their own gradient: they call the library that
`best_library` names, as PyTorch's autograd would.
"""

import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# Very many short sequences break the libraries' backward passes. Seen with PyTorch 2.11 on an H200: 6,912 sequences of
# 16 heads and one token ran, of 16,384 FlashAttention 2 accessed illegal memory and cuDNN failed. That agrees with a
# float32 sum of dq, padded to 128 tokens and 128 channels, whose elements are counted in 32 bits; half of what they
# can count is taken as the limit, and all shapes tried below it were right.
PADDING = 128
MAX_PADDED_ELEMENTS = 2**30
# Both the sequences and the heads of a call may be a dimension of a CUDA grid; PyTorch refuses cuDNN beyond this.
MAX_GRID = 65535


def library_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(D)) v.

    Args:
        q: [N, H, M, D]; k, v: [N, H, L, D].
        mask: bool [N, 1, 1, L], True where a key is seen; None: all are.

    Returns:
        [N, H, M, D].
    """
    if mask is None and q.shape[2] == k.shape[2] == 1:  # an image's one frame: no library call, which would pad
        return (q * k).sum(-1, keepdim=True).softmax(-1) * v
    at_once = max(1, MAX_PADDED_ELEMENTS // padded_elements(*q.shape[1:]))
    if q.shape[0] <= at_once:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    masks = [None] * -(-q.shape[0] // at_once) if mask is None else mask.split(at_once)
    parts = zip(q.split(at_once), k.split(at_once), v.split(at_once), masks, strict=True)
    return torch.cat([F.scaled_dot_product_attention(*part) for part in parts])


def padded_elements(heads: int, length: int, head_dim: int) -> int:
    """Elements of one sequence's dq as the libraries hold it."""
    return heads * -(-length // PADDING) * PADDING * -(-head_dim // PADDING) * PADDING


def attention_forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """(o, lse) of softmax(q k^T / sqrt(D)) v, without a gradient.

    Args:
        q, k, v: [N, H, M, D] at any strides, the last axis contiguous.

    Returns:
        o [N, H, M, D] with the order of strides of q; lse [N, H, M] float32, contiguous: the logarithm of the sum of
        exponentials of each row of scores. That is the same whatever library computes it.
    """
    if q.shape[2] == 1:  # softmax over one key
        return v.clone(), v.new_zeros(q.shape[:3], dtype=torch.float32)
    library = _library(q)
    parts = list(_parts(q))
    if len(parts) == 1:
        return library.forward(q, k, v)
    o, lse = torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)
    for part in parts:
        o[part], lse[part] = library.forward(q[part], k[part], v[part])
    return o, lse


def attention_backward(
    d_o: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv), with the order of strides of q, k, v, from what `attention_forward` took and gave.

    Args:
        d_o: the gradient of o, with the strides of o. With one token it is dv, and is returned as such.
    """
    if q.shape[2] == 1:
        return torch.zeros_like(q), torch.zeros_like(k), d_o
    library = _library(q)
    parts = list(_parts(q))
    if len(parts) == 1:
        return library.backward(d_o, q, k, v, o, lse)
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    for part in parts:
        # Not every library asks for the strides of lse.
        of_part = *(x[part] for x in (d_o, q, k, v, o)), lse[part].contiguous()
        dq[part], dk[part], dv[part] = library.backward(*of_part)
    return dq, dk, dv


def _parts(q: Tensor) -> Iterator[tuple[slice, slice]]:
    """Slices over N and H, as many sequences and heads at once as a library takes."""
    count, heads, length, head_dim = q.shape
    at_once = max(1, MAX_PADDED_ELEMENTS // padded_elements(1, length, head_dim))
    heads_at_once = min(heads, at_once, MAX_GRID)
    count_at_once = min(count, at_once // heads_at_once, MAX_GRID)
    for n in range(0, count, count_at_once):
        for h in range(0, heads, heads_at_once):
            yield slice(n, n + count_at_once), slice(h, h + heads_at_once)


class _Library(NamedTuple):
    """One library's pair, and what is known of it.

    forward(q, k, v) gives (o, lse), backward(d_o, q, k, v, o, lse) gives (dq, dk, dv), as above. No dropout, so the
    random state that the calls of PyTorch hand on is never read: any tensor of its type will do.
    """

    forward: Callable
    backward: Callable
    usable: Callable[..., bool]  # of torch.backends.cuda.SDPAParams
    remark: str


def _cudnn_forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    o, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, True)
    return o, lse.view(q.shape[:3])  # from [N, H, M, 1]


def _cudnn_backward(d_o, q, k, v, o, lse):
    # PyTorch keeps the plan it made for these strides of q, k and v, and uses it again whatever the strides of o and
    # d_o: those must follow from those of q, always.
    state = q.new_empty((), dtype=torch.int64)
    return torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
        d_o, q, k, v, o, lse.unsqueeze(-1), state, state, None, None, None, q.shape[2], k.shape[2], 0.0, False
    )


def _flash_forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    o, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)
    return o, lse


def _flash_backward(d_o, q, k, v, o, lse):
    state, unused = q.new_empty(2, dtype=torch.uint64), q.new_empty((), dtype=torch.uint64)
    return torch.ops.aten._scaled_dot_product_flash_attention_backward(
        d_o, q, k, v, o, lse, None, None, q.shape[2], k.shape[2], 0.0, False, state, unused
    )


_EFFICIENT_ROWS = 32  # it pads the rows of lse to a multiple


def _efficient_forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    o, lse, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, None, True)
    return o, lse[..., : q.shape[2]].contiguous()


def _efficient_backward(d_o, q, k, v, o, lse):
    lse = F.pad(lse, (0, -q.shape[2] % _EFFICIENT_ROWS), value=float("inf"))
    state = q.new_empty((), dtype=torch.int64)
    needed = [True, True, True, False]
    return torch.ops.aten._scaled_dot_product_efficient_attention_backward(
        d_o, q, k, v, None, o, lse, state, state, 0.0, needed, False
    )[:3]


def _math_forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    scores = _scores(q, k)
    lse = scores.logsumexp(-1)
    o = torch.empty_like(q)
    o.copy_(scores.softmax(-1) @ v.to(scores.dtype))
    return o, lse.float()


def _math_backward(d_o, q, k, v, o, lse):
    # Where all scores are at hand, softmax and sum(p * dp) are more exact than by lse and d_o . o.
    scores = _scores(q, k)
    p, wide = scores.softmax(-1), scores.dtype
    dp = d_o.to(wide) @ v.to(wide).mT
    ds = p * (dp - (p * dp).sum(-1, keepdim=True)) / q.shape[-1] ** 0.5
    grads = ds @ k.to(wide), ds.mT @ q.to(wide), p.mT @ d_o.to(wide)
    return tuple(torch.empty_like(x).copy_(grad) for x, grad in zip((q, k, v), grads, strict=True))


def _scores(q: Tensor, k: Tensor) -> Tensor:
    """q k^T / sqrt(D) in float32 or better."""
    wide = torch.promote_types(q.dtype, torch.float32)
    return q.to(wide) @ k.to(wide).mT / q.shape[-1] ** 0.5


_DETERMINISTIC = "its backward repeats bit for bit, as torch.use_deterministic_algorithms asks"
_NOT_PROMISED = "its backward is not promised to repeat bit for bit"

# In order of speed. Seen on an H100, 96 sequences of 144 tokens, 16 heads of 72, bf16, forward and backward: cuDNN
# 0.118 and 0.347 ms, FlashAttention 2 0.136 and 0.595. Both take head dimension 72 as it lies in memory.
_LIBRARIES = {
    "cudnn": _Library(
        _cudnn_forward,
        _cudnn_backward,
        torch.backends.cuda.can_use_cudnn_attention,
        "the fastest of PyTorch's at head dimension 72",
    ),
    "flash_attention_2": _Library(
        _flash_forward, _flash_backward, torch.backends.cuda.can_use_flash_attention, "cuDNN's cannot be used"
    ),
    "efficient_attention": _Library(
        _efficient_forward,
        _efficient_backward,
        torch.backends.cuda.can_use_efficient_attention,
        "neither cuDNN's nor FlashAttention 2 can be used",
    ),
    "math": _Library(_math_forward, _math_backward, lambda params: True, "no library can be used: explicit softmax"),
}


def best_library(device: torch.device, dtype: torch.dtype, head_dim: int) -> tuple[str, str]:
    """(name, reason) of the library that serves the pair above; the reason says whether its backward repeats.

    Follows PyTorch's own switches: `torch.backends.cuda.enable_cudnn_sdp(False)` and its like, and
    `torch.use_deterministic_algorithms`, which excludes cuDNN's.
    """
    if device.type != "cuda":
        return "math", "explicit softmax, where there is no GPU; repeats bit for bit"
    switches = (
        torch.backends.cuda.cudnn_sdp_enabled(),
        torch.backends.cuda.flash_sdp_enabled(),
        torch.backends.cuda.mem_efficient_sdp_enabled(),
        torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    return _best_on_gpu(device, dtype, head_dim, switches)


@functools.cache
def _best_on_gpu(
    device: torch.device, dtype: torch.dtype, head_dim: int, switches: tuple[bool, ...]
) -> tuple[str, str]:
    with torch.cuda.device(device):
        q = torch.empty(2, 2, 64, head_dim, device=device, dtype=dtype, requires_grad=True)
        params = torch.backends.cuda.SDPAParams(q, q, q, None, 0.0, False, False)
        name = next(name for name, library in _LIBRARIES.items() if library.usable(params))
    repeats = "repeats bit for bit" if name == "math" else _DETERMINISTIC if switches[-1] else _NOT_PROMISED
    return name, f"{_LIBRARIES[name].remark}; {repeats}"


def _library(q: Tensor) -> _Library:
    return _LIBRARIES[best_library(q.device, q.dtype, q.shape[-1])[0]]
