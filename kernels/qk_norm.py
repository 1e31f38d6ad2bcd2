"""RMSNorm and rotary embedding of q and k, between the packed qkv projection and a library's attention.

    q', k' = norm(q) * w                    spatial attention
    q', k' = turn(norm(q) * w)              temporal attention (`rotate_first`: norm(turn(q)) * w)

Both passes read and write each value once: q and k in, q' and k' out; backwards q, k and the gradients of q', k', v
in, that of qkv out. What is normalised is made again in the backward pass, not kept.

A program takes all heads of a few tokens: in qkv those are runs of H*D values, read once from end to end. A head's D
values are one block of the next power of two: the lanes beyond D idle, which costs little where memory is the limit,
and all values of a row stay in one group of lanes. Pairs of neighbouring channels turn by the angle of their frame.

Strides travel in units of 8 values, so that the compiler sees that rows start at 16 bytes.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from stdit_fast.kernels.launch import launch
from stdit_fast.kernels.tiles import cdiv, next_power_of_2

# Replaces entries of `_plan`'s choices by name, for tuning: {"forward_values": 4096, ...}.
TUNING: dict[str, int] = {}

UNIT = 8  # values; of what strides are multiples
_ALIGNMENT = 16  # bytes
# Of a backward pass whose programs each leave a partial sum: as many as run at once on the largest Hopper GPU.
_MOST_PROGRAMS = 132 * 3

# Arguments of the kernels that are not worth a compilation of their own for special values.
_SIZES = ["count", "frames", "positions"]
_IN_STRIDES = ["in_b", "in_t", "in_s", "in_part", "in_head"]


class Plan(NamedTuple):
    """How tokens are given to programs."""

    block: int  # lanes a row, D and up
    heads: int  # rows a token, H and up
    tokens: int  # of one tile
    warps: int


def _plan(direction: str, heads: int, head_dim: int) -> Plan:
    block, head_rows = next_power_of_2(head_dim), next_power_of_2(heads)
    # A few 16-byte loads a thread are in flight before the first is used; backwards a tile has up to five tensors.
    values = TUNING.get(f"{direction}_values", 4096 if direction == "forward" else 2048)
    tokens = max(1, values // (block * head_rows))
    warps = min(16, max(4, tokens * head_rows * block // 512))
    return Plan(block, head_rows, tokens, TUNING.get(f"{direction}_warps", warps))


def readable(x: Tensor) -> bool:
    """Whether the kernels can read x where it lies: rows contiguous, starting at multiples of 8 values and 16 bytes."""
    if x.stride(-1) != 1 or x.data_ptr() % _ALIGNMENT:
        return False
    return all(n == 1 or s % UNIT == 0 for n, s in zip(x.shape[:-1], x.stride()[:-1], strict=True))


def forward(
    qkv: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    rotation: Tensor | None,
    rotate_first: bool,
    eps: float,
    out: Tensor,
) -> None:
    """Writes q', k' (and v as it is, where `out` has three parts) of qkv to `out`.

    Bytes moved: q and k in and out (4 units of H*D values a token), 6 with v.

    Args:
        qkv: [B, T, S, 3, H, D], `readable`; fewer than 2^31 tokens.
        q_weight, k_weight: [D]; without one, that part is not normalised.
        rotation: [T, 2, D/2] float32, contiguous: cosine and sine of each pair's angle; None: nothing turns.
        rotate_first: turn before normalising.
        out: [2 or 3, B, T, S, H, D], `readable`, in qkv's dtype.
    """
    batch, frames, positions, _, heads, head_dim = qkv.shape
    plan = _plan("forward", heads, head_dim)
    count = batch * frames * positions
    q_weight, k_weight, rotation = _dense(q_weight), _dense(k_weight), _dense(rotation)
    launch(
        _qk_norm_forward, cdiv(count, plan.tokens), qkv, q_weight, k_weight, rotation, out, count, frames, positions,
        *_packed_strides(qkv), *_strides(out[0]),
        out.stride(0) // UNIT, eps,
        H=heads, D=head_dim, BLOCK=plan.block, HEADS=plan.heads, TOKENS=plan.tokens,
        HAS_Q=q_weight is not None, HAS_K=k_weight is not None, HAS_V=out.shape[0] == 3,
        ROTATE=rotation is not None, ROTATE_FIRST=rotate_first, num_warps=plan.warps,
    )  # fmt: skip


def backward(
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    qkv: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    rotation: Tensor | None,
    rotate_first: bool,
    eps: float,
    dqkv: Tensor,
) -> Tensor | None:
    """Writes the gradient of qkv, all three parts, to `dqkv`; returns those of the weights.

    Bytes moved: q, k, dq, dk, dv in, dqkv out (8 units of H*D values a token), 6 where nothing is normalised.

    Args:
        dq, dk, dv: [B, T, S, H, D], gradients of q', k', v; at best of the same strides, which saves a copy.
        dqkv: [B, T, S, 3, H, D], `readable`, in qkv's dtype.
        others: as in `forward`.

    Returns:
        [2, D] float32: gradients of q_weight and k_weight (0 for one that is absent); None without weights.
    """
    batch, frames, positions, _, heads, head_dim = qkv.shape
    plan = _plan("backward", heads, head_dim)
    count = batch * frames * positions
    dq, dk, dv = _alike(dq, dk, dv)
    has_weights = q_weight is not None or k_weight is not None
    programs = cdiv(count, plan.tokens)
    if has_weights:
        programs = min(programs, TUNING.get("backward_programs", _MOST_PROGRAMS))
    partials = qkv.new_empty((programs, 2, head_dim), dtype=torch.float32) if has_weights else None
    q_weight, k_weight, rotation = _dense(q_weight), _dense(k_weight), _dense(rotation)
    launch(
        _qk_norm_backward, programs,
        dq, dk, dv, qkv, q_weight, k_weight, rotation, dqkv, partials, count, frames, positions,
        *_packed_strides(qkv), *_strides(dq), *_packed_strides(dqkv), eps,
        H=heads, D=head_dim, BLOCK=plan.block, HEADS=plan.heads, TOKENS=plan.tokens,
        HAS_Q=q_weight is not None, HAS_K=k_weight is not None,
        ROTATE=rotation is not None, ROTATE_FIRST=rotate_first, STAGES=TUNING.get("backward_stages", 3),
        num_warps=plan.warps,
    )  # fmt: skip
    return partials.sum(0) if has_weights else None


def _dense(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _packed_strides(qkv: Tensor) -> tuple[int, ...]:
    """Of B, T, S, the three parts, and heads, in units."""
    return tuple(stride // UNIT for stride in qkv.stride()[:5])


def _strides(x: Tensor) -> tuple[int, ...]:
    """Of B, T, S and heads, in units."""
    return tuple(stride // UNIT for stride in x.stride()[:4])


def _alike(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors, which share a shape, with the same readable strides."""
    first = tensors[0]
    # The stride of an axis of length 1 means nothing.
    real = [i for i, n in enumerate(first.shape) if n > 1]
    same = all(x.stride(i) == first.stride(i) for x in tensors for i in real)
    return tensors if same and readable(first) else tuple(x.contiguous() for x in tensors)


@triton.jit
def _starts(token, head, frames, positions, b_stride, t_stride, s_stride, head_stride):
    """Where each row of a tile starts, in values; a multiple of UNIT."""
    b = (token // (positions * frames)).to(tl.int64)
    t = ((token // positions) % frames).to(tl.int64)
    s = (token % positions).to(tl.int64)
    return (b * b_stride + t * t_stride + s * s_stride + head.to(tl.int64) * head_stride) * 8


@triton.jit
def _turn(x, cos, sin, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Each pair of neighbouring channels of x [ROWS, BLOCK], turned; cos, sin [ROWS, BLOCK / 2]."""
    even, odd = tl.split(tl.reshape(x, [ROWS, BLOCK // 2, 2]))
    return tl.reshape(tl.join(even * cos - odd * sin, odd * cos + even * sin), [ROWS, BLOCK])


@triton.jit
def _angles(rotation, frame, row_in, D: tl.constexpr, BLOCK: tl.constexpr):
    """Cosine and sine [ROWS, BLOCK / 2] of frames [ROWS]."""
    pair = tl.arange(0, BLOCK // 2)
    mask = row_in[:, None] & (pair < D // 2)[None, :]
    at = rotation + frame[:, None] * D + pair[None, :]
    return tl.load(at, mask=mask, other=0.0), tl.load(at + D // 2, mask=mask, other=0.0)


@triton.jit
def _unit_rows(x, mask, eps, D: tl.constexpr):
    """x / rms(x) of each row, 0 outside the mask, and 1 / rms(x)."""
    rstd = tl.rsqrt(tl.sum(x * x, 1) / D + eps)[:, None]
    return tl.where(mask, x * rstd, 0.0), rstd


@triton.jit
def _made(
    x, weight, cos, sin, mask, c, eps,
    D: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    HAS_WEIGHT: tl.constexpr, ROTATE: tl.constexpr, ROTATE_FIRST: tl.constexpr,
):  # fmt: skip
    """q' or k' of x [ROWS, BLOCK]."""
    if HAS_WEIGHT:
        # Turning keeps the norm: before or after, a row is divided by the same value.
        x, rstd = _unit_rows(x, mask, eps, D)
        w = tl.load(weight + c, mask=c < D, other=0.0).to(tl.float32)[None, :]
        if not ROTATE_FIRST:
            x *= w
    if ROTATE:
        x = _turn(x, cos, sin, ROWS, BLOCK)
    if HAS_WEIGHT and ROTATE_FIRST:
        x *= w
    return x


@triton.jit
def _gradients(
    d, x, weight, cos, sin, mask, c, eps,
    D: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    HAS_WEIGHT: tl.constexpr, ROTATE: tl.constexpr, ROTATE_FIRST: tl.constexpr,
):  # fmt: skip
    """Gradients of x and, row by row, of the weight, from that of `_made`'s result."""
    dw = d
    if HAS_WEIGHT:
        n, rstd = _unit_rows(x, mask, eps, D)
        w = tl.load(weight + c, mask=c < D, other=0.0).to(tl.float32)[None, :]
        if ROTATE_FIRST:
            if ROTATE:
                dw = d * _turn(n, cos, sin, ROWS, BLOCK)
                d = _turn(d * w, cos, -sin, ROWS, BLOCK)
            else:
                dw = d * n
                d *= w
        else:
            if ROTATE:
                d = _turn(d, cos, -sin, ROWS, BLOCK)
            dw = d * n
            d *= w
        d = rstd * (d - n * (tl.sum(d * n, 1) / D)[:, None])
    else:
        if ROTATE:
            d = _turn(d, cos, -sin, ROWS, BLOCK)
    return d, dw


@triton.jit(do_not_specialize=_SIZES + _IN_STRIDES + ["out_b", "out_t", "out_s", "out_head", "out_part"])
def _qk_norm_forward(
    qkv, q_weight, k_weight, rotation, out, count, frames, positions,
    in_b, in_t, in_s, in_part, in_head, out_b, out_t, out_s, out_head, out_part, eps,
    H: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, HEADS: tl.constexpr, TOKENS: tl.constexpr,
    HAS_Q: tl.constexpr, HAS_K: tl.constexpr, HAS_V: tl.constexpr, ROTATE: tl.constexpr, ROTATE_FIRST: tl.constexpr,
):  # fmt: skip
    ROWS: tl.constexpr = TOKENS * HEADS
    dtype = out.dtype.element_ty
    row = tl.arange(0, ROWS)
    token = tl.program_id(0) * TOKENS + row // HEADS
    head = row % HEADS
    row_in = (token < count) & (head < H)
    c = tl.arange(0, BLOCK)
    mask = row_in[:, None] & (c < D)[None, :]
    at = qkv + _starts(token, head, frames, positions, in_b, in_t, in_s, in_head)[:, None] + c[None, :]
    q = tl.load(at, mask=mask, other=0.0)
    k = tl.load(at + in_part * 8, mask=mask, other=0.0)
    if HAS_V:
        v = tl.load(at + in_part * 16, mask=mask, other=0.0)
    cos, sin = c, c  # not used without rotation
    if ROTATE:
        cos, sin = _angles(rotation, (token // positions) % frames, row_in, D, BLOCK)
    q = _made(q.to(tl.float32), q_weight, cos, sin, mask, c, eps, D, ROWS, BLOCK, HAS_Q, ROTATE, ROTATE_FIRST)
    k = _made(k.to(tl.float32), k_weight, cos, sin, mask, c, eps, D, ROWS, BLOCK, HAS_K, ROTATE, ROTATE_FIRST)
    at = out + _starts(token, head, frames, positions, out_b, out_t, out_s, out_head)[:, None] + c[None, :]
    part = out_part.to(tl.int64) * 8
    tl.store(at, q.to(dtype), mask=mask)
    tl.store(at + part, k.to(dtype), mask=mask)
    if HAS_V:
        tl.store(at + 2 * part, v, mask=mask)


@triton.jit(
    do_not_specialize=_SIZES
    + _IN_STRIDES
    + ["d_b", "d_t", "d_s", "d_head", "out_b", "out_t", "out_s", "out_part", "out_head"]
)
def _qk_norm_backward(
    dq, dk, dv, qkv, q_weight, k_weight, rotation, dqkv, partials, count, frames, positions,
    in_b, in_t, in_s, in_part, in_head, d_b, d_t, d_s, d_head, out_b, out_t, out_s, out_part, out_head, eps,
    H: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, HEADS: tl.constexpr, TOKENS: tl.constexpr,
    HAS_Q: tl.constexpr, HAS_K: tl.constexpr, ROTATE: tl.constexpr, ROTATE_FIRST: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    ROWS: tl.constexpr = TOKENS * HEADS
    dtype = dqkv.dtype.element_ty
    row = tl.arange(0, ROWS)
    head = row % HEADS
    c = tl.arange(0, BLOCK)
    dw_q = tl.zeros([ROWS, BLOCK], tl.float32)
    dw_k = tl.zeros([ROWS, BLOCK], tl.float32)
    for tile in tl.range(tl.program_id(0), tl.cdiv(count, TOKENS), tl.num_programs(0), num_stages=STAGES):
        token = tile * TOKENS + row // HEADS
        row_in = (token < count) & (head < H)
        mask = row_in[:, None] & (c < D)[None, :]
        at = _starts(token, head, frames, positions, d_b, d_t, d_s, d_head)[:, None] + c[None, :]
        q_bar = tl.load(dq + at, mask=mask, other=0.0).to(tl.float32)
        k_bar = tl.load(dk + at, mask=mask, other=0.0).to(tl.float32)
        v_bar = tl.load(dv + at, mask=mask, other=0.0)
        q, k = q_bar, k_bar  # not used without weights
        at = qkv + _starts(token, head, frames, positions, in_b, in_t, in_s, in_head)[:, None] + c[None, :]
        if HAS_Q:
            q = tl.load(at, mask=mask, other=0.0).to(tl.float32)
        if HAS_K:
            k = tl.load(at + in_part * 8, mask=mask, other=0.0).to(tl.float32)
        cos, sin = c, c
        if ROTATE:
            cos, sin = _angles(rotation, (token // positions) % frames, row_in, D, BLOCK)
        q, dw = _gradients(q_bar, q, q_weight, cos, sin, mask, c, eps, D, ROWS, BLOCK, HAS_Q, ROTATE, ROTATE_FIRST)
        if HAS_Q:
            dw_q += dw
        k, dw = _gradients(k_bar, k, k_weight, cos, sin, mask, c, eps, D, ROWS, BLOCK, HAS_K, ROTATE, ROTATE_FIRST)
        if HAS_K:
            dw_k += dw
        at = dqkv + _starts(token, head, frames, positions, out_b, out_t, out_s, out_head)[:, None] + c[None, :]
        tl.store(at, q.to(dtype), mask=mask)
        tl.store(at + out_part * 8, k.to(dtype), mask=mask)
        tl.store(at + out_part * 16, v_bar, mask=mask)
    if HAS_Q or HAS_K:
        at = partials + tl.program_id(0) * (2 * D) + c
        tl.store(at, tl.sum(dw_q, 0), mask=c < D)
        tl.store(at + D, tl.sum(dw_k, 0), mask=c < D)
