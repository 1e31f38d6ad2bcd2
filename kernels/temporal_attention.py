"""Attention over frames on packed qkv [B, T, S, 3, H, D], up to 128 frames: one pass forward, one pass backward.

A program takes some heads of one position, and of each head q, k and v of all frames at once: there is no online
softmax, nothing is transposed in memory, and the backward pass makes scores and probabilities again from qkv, which is
all that is kept. delta, the rows' sums of p * dp, comes from the same registers, so o is not read either. Norm, weight
and rotation are applied in float32 and rounded once, before the products.

Where the values lie. A tile comes from memory with 16 bytes a thread, goes to shared memory as it is, and enters the
registers through the tensor cores: `_widen` multiplies it by the identity, which leaves it in float32 in the layout of
products' results. Norm and rotation then need no exchange between threads but the row sums, rotated q is the next
product's operand where it stands, and the products of the backward pass meet q, k, weights and the rotation table in
that same layout. (Left to choose, the compiler changes layouts through shared memory in float32 and holds the table
twice; a program of 16 frames then spills 500 bytes a thread.)

(A NaN in one frame's q therefore reaches up to 15 neighbours; in its k or v it reaches all frames anyhow.)

For one head of 72 channels and 16 frames, one warp runs some 850 instructions forward and 2,000 backward (counted in
what Triton 3.6 makes for sm_90); at 3.6 TB/s a multiprocessor of an H200 has issue slots for 2,300 and 4,000 of them.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from stdit_fast.kernels.launch import launch
from stdit_fast.kernels.residual_norm import column_sum
from stdit_fast.kernels.results import memory_for
from stdit_fast.kernels.tiles import DOT_MINIMUM, next_power_of_2, split

MAX_FRAMES = 128
MAX_FRAMES_FLOAT32 = 32  # without tensor cores a larger tile's products are long unrolled loops
TILE_BYTES = 2**15  # q of one head may take; shared memory holds four such tiles and more
UNIT = 8  # values; of what strides are multiples, so that the compiler sees that rows start at 16 bytes
WARPS = {16: 1, 32: 2, 64: 4, 128: 8}  # 16 rows each, as one tensor-core instruction takes
WARPS_FLOAT32 = {16: 4, 32: 8}

# By rows, measured on an H200 at 16 heads of 72 channels.
HEADS_AND_STAGES = {
    "forward": {16: (4, 3), 32: (4, 2)},
    "backward": {16: (8, 2), 32: (4, 1), 64: (4, 1)},
}
STAGE_BYTES = 2**13  # q of one head may take, for several heads to be in shared memory at once

# Replaces choices of `config`, for tuning: {"forward": {"HEADS": 4, "num_warps": 1, "maxnreg": 168}, ...}.
TUNING: dict[str, dict[str, int]] = {"forward": {}, "backward": {}}


def max_frames(dtype: torch.dtype, head_dim: int = 72) -> int:
    """The longest clip that one pass serves."""
    limit = MAX_FRAMES_FLOAT32 if dtype == torch.float32 else MAX_FRAMES
    rows = TILE_BYTES // (sum(split(head_dim)) * dtype.itemsize)
    return min(limit, 1 << (rows.bit_length() - 1))


def config(direction: str, frames: int, heads: int, head_dim: int, dtype: torch.dtype) -> dict[str, int]:
    """Constants and launch options of one kernel: heads a program, warps, stages, the tile's sizes.

    More heads a program read the table once and, with stages, the next heads' q, k and v while this one's are worked
    on; they also hold more registers: backward, 128 frames do without spills with one head alone.
    """
    rows = _rows(frames)
    first, rest = split(head_dim)
    warps = WARPS_FLOAT32 if dtype == torch.float32 else WARPS
    head_count, stages = HEADS_AND_STAGES[direction].get(rows, (1, 1))
    if rows * (first + rest) * dtype.itemsize > STAGE_BYTES:
        stages = 1
    chosen = {"HEADS": head_count, "num_warps": warps[rows], "num_stages": stages}
    chosen |= TUNING[direction]
    while heads % chosen["HEADS"]:
        chosen["HEADS"] -= 1
    return chosen | {"T": frames, "H": heads, "D": head_dim, "TP": rows, "D1": first, "D2": rest}


def _rows(frames: int) -> int:
    return max(DOT_MINIMUM, next_power_of_2(frames))


def readable(qkv: Tensor) -> bool:
    """Whether the kernels can read qkv where it lies."""
    heads, head_dim = qkv.shape[4:]
    inner = (heads * head_dim, head_dim, 1)
    return qkv.stride()[3:] == inner and qkv.data_ptr() % 16 == 0 and all(s % UNIT == 0 for s in qkv.stride()[:3])


def forward(
    qkv: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, rotation: Tensor, rotate_first: bool, eps: float
) -> Tensor:
    """[B, T, S, H*D] of `readable` qkv of at most `max_frames`; rotation is [T, 2, D/2] float32."""
    batch, frames, positions, _, heads, head_dim = qkv.shape
    options = config("forward", frames, heads, head_dim, qkv.dtype)
    out = memory_for((batch, frames, positions, heads * head_dim), qkv)
    strides = [stride // UNIT for stride in qkv.stride()[:3]]
    programs = batch * positions * (heads // options["HEADS"])
    launch(
        _temporal_attention_forward, programs, qkv, q_weight, k_weight, rotation, out, positions, *strides, eps,
        ROTATE_FIRST=rotate_first, **options,
    )  # fmt: skip
    return out


def backward(
    d_o: Tensor,
    qkv: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    rotation: Tensor,
    rotate_first: bool,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """(dqkv, contiguous as qkv's shape; gradients of the weights [2, D], 0 where there is none)."""
    batch, frames, positions, _, heads, head_dim = qkv.shape
    options = config("backward", frames, heads, head_dim, qkv.dtype)
    dqkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    strides = [stride // UNIT for stride in qkv.stride()[:3]]
    programs = batch * positions * (heads // options["HEADS"])
    both = q_weight is not None and k_weight is not None
    make = torch.empty if both else torch.zeros  # the kernel writes the sums of the weights that there are
    partial = make(programs, 2 * head_dim, dtype=torch.float32, device=qkv.device)
    launch(
        _temporal_attention_backward, programs, d_o.contiguous(), qkv, q_weight, k_weight, rotation, dqkv, partial,
        positions, *strides, eps, ROTATE_FIRST=rotate_first, **options,
    )  # fmt: skip
    return dqkv, column_sum(partial, qkv.dtype).view(2, head_dim)


# ---------------------------------------------------------------- tiles: D channels as blocks of D1 and D2


@triton.jit
def _place(row_offset, START: tl.constexpr, BLOCK: tl.constexpr, T: tl.constexpr, D: tl.constexpr):
    """Offsets of a block [rows, BLOCK] whose rows begin at row_offset, and where they are inside of [T, D]."""
    row = tl.arange(0, row_offset.shape[0])
    column = START + tl.arange(0, BLOCK)
    return row_offset[:, None] + column[None, :], (row < T)[:, None] & (column < D)[None, :]


@triton.jit
def _load_block(ptr, row_offset, START: tl.constexpr, BLOCK: tl.constexpr, T: tl.constexpr, D: tl.constexpr):
    offsets, inside = _place(row_offset, START, BLOCK, T, D)
    if row_offset.shape[0] == T and START + BLOCK <= D:
        block = tl.load(ptr + offsets)
    else:
        block = tl.load(ptr + offsets, mask=inside, other=0.0)
    return block


@triton.jit
def _load_turned_block(ptr, row_offset, START: tl.constexpr, BLOCK: tl.constexpr, T: tl.constexpr, D: tl.constexpr):
    """The transpose [BLOCK, rows] of what `_load_block` returns."""
    row = tl.arange(0, row_offset.shape[0])
    column = START + tl.arange(0, BLOCK)
    ptrs = ptr + row_offset[None, :] + column[:, None]
    if row_offset.shape[0] == T and START + BLOCK <= D:
        block = tl.load(ptrs)
    else:
        block = tl.load(ptrs, mask=(row < T)[None, :] & (column < D)[:, None], other=0.0)
    return block


@triton.jit
def _store_block(ptr, row_offset, block, START: tl.constexpr, T: tl.constexpr, D: tl.constexpr):
    offsets, inside = _place(row_offset, START, block.shape[1], T, D)
    block = block.to(ptr.dtype.element_ty)
    if row_offset.shape[0] == T and START + block.shape[1] <= D:
        tl.store(ptr + offsets, block)
    else:
        tl.store(ptr + offsets, block, mask=inside)


@triton.jit
def _load(ptr, row_offset, D1: tl.constexpr, D2: tl.constexpr, T: tl.constexpr, D: tl.constexpr):
    first = _load_block(ptr, row_offset, 0, D1, T, D)
    rest = first
    if D2 > 0:
        rest = _load_block(ptr, row_offset, D1, D2, T, D)
    return first, rest


@triton.jit
def _load_turned(ptr, row_offset, D1: tl.constexpr, D2: tl.constexpr, T: tl.constexpr, D: tl.constexpr):
    first = _load_turned_block(ptr, row_offset, 0, D1, T, D)
    rest = first
    if D2 > 0:
        rest = _load_turned_block(ptr, row_offset, D1, D2, T, D)
    return first, rest


@triton.jit
def _store(ptr, row_offset, first, rest, D2: tl.constexpr, T: tl.constexpr, D: tl.constexpr):
    _store_block(ptr, row_offset, first, 0, T, D)
    if D2 > 0:
        _store_block(ptr, row_offset, rest, first.shape[1], T, D)


@triton.jit
def _load_table(ptr, TP: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, T: tl.constexpr, D: tl.constexpr):
    """Cosines and sines of both blocks, [TP, D1/2] and [TP, D2/2]."""
    row_offset = tl.arange(0, TP) * D
    cos1, cos2 = _load(ptr, row_offset, D1 // 2, D2 // 2, T, D // 2)
    sin1, sin2 = _load(ptr + D // 2, row_offset, D1 // 2, D2 // 2, T, D // 2)
    return cos1, cos2, sin1, sin2


@triton.jit
def _load_weight(ptr, D1: tl.constexpr, D2: tl.constexpr, D: tl.constexpr):
    column = tl.arange(0, D1)
    first = tl.load(ptr + column, mask=column < D, other=0.0).to(tl.float32)[None, :]
    rest = first
    if D2 > 0:
        column = D1 + tl.arange(0, D2)
        rest = tl.load(ptr + column, mask=column < D, other=0.0).to(tl.float32)[None, :]
    return first, rest


# ---------------------------------------------------------------- norm and rotation


@triton.jit
def _widen_block(x):
    """x [TP, N] in float32, exactly, in the layout of products' results: see the top of this file."""
    TP: tl.constexpr = x.shape[0]
    row = tl.arange(0, 16)
    identity = (row[:, None] == row[None, :]).to(x.dtype)
    if x.dtype == tl.float32:
        wide = x
    elif TP == 16:
        wide = tl.dot(identity, x)
    else:  # 16 rows at a time
        identity = tl.broadcast_to(identity[None, :, :], (TP // 16, 16, 16))
        wide = tl.reshape(tl.dot(identity, tl.reshape(x, (TP // 16, 16, x.shape[1]))), x.shape)
    return wide


@triton.jit
def _widen(first, rest, D2: tl.constexpr):
    wide1 = _widen_block(first)
    wide2 = wide1
    if D2 > 0:
        wide2 = _widen_block(rest)
    return wide1, wide2


@triton.jit
def _rotate_block(x, cos, sin, INVERSE: tl.constexpr):
    # Written on the pairs [TP, N/2, 2], not with tl.join: that has the compiler expect 4 values a thread next to each
    # other in the product that follows, a layout of its own.
    pairs = tl.reshape(x, (x.shape[0], x.shape[1] // 2, 2))
    even, odd = tl.split(pairs)
    is_even = (tl.arange(0, 2) == 0)[None, None, :]
    other = tl.where(is_even, odd[:, :, None], even[:, :, None])
    cos, sin = cos[:, :, None], sin[:, :, None]
    if INVERSE:
        turned = pairs * cos + other * tl.where(is_even, sin, -sin)
    else:
        turned = pairs * cos + other * tl.where(is_even, -sin, sin)
    return tl.reshape(turned, x.shape)


@triton.jit
def _rotate(first, rest, cos1, cos2, sin1, sin2, D2: tl.constexpr, INVERSE: tl.constexpr):
    turned1 = _rotate_block(first, cos1, sin1, INVERSE)
    turned2 = turned1
    if D2 > 0:
        turned2 = _rotate_block(rest, cos2, sin2, INVERSE)
    return turned1, turned2


@triton.jit
def _row_sum(a1, a2, b1, b2, D2: tl.constexpr):
    """Sums of a * b over the channels, [TP, 1]."""
    total = tl.sum(a1 * b1, axis=1)
    if D2 > 0:
        total += tl.sum(a2 * b2, axis=1)
    return total[:, None]


@triton.jit
def _position(
    x1, x2, weight_ptr, cos1, cos2, sin1, sin2, eps, D2: tl.constexpr, D: tl.constexpr, ROTATE_FIRST: tl.constexpr
):
    """q or k as it enters the scores, in its dtype, and 1 / rms of its rows (1 without a norm).

    Rotation is linear and keeps the norm, so rstd comes last in either order.
    """
    dtype = x1.dtype
    D1: tl.constexpr = x1.shape[1]
    x1, x2 = _widen(x1, x2, D2)
    if weight_ptr is None:
        rstd = 1.0
        x1, x2 = _rotate(x1, x2, cos1, cos2, sin1, sin2, D2, False)
    else:
        weight1, weight2 = _load_weight(weight_ptr, D1, D2, D)
        rstd = tl.rsqrt(_row_sum(x1, x2, x1, x2, D2) * (1.0 / D) + eps)
        if not ROTATE_FIRST:
            x1 *= weight1
            if D2 > 0:
                x2 *= weight2
        x1, x2 = _rotate(x1, x2, cos1, cos2, sin1, sin2, D2, False)
        x1 *= rstd
        if D2 > 0:
            x2 *= rstd
        if ROTATE_FIRST:
            x1 *= weight1
            if D2 > 0:
                x2 *= weight2
    return x1.to(dtype), x2.to(dtype), rstd


@triton.jit
def _fold(x):
    """Adds rows of x [TP, N] that lie in one thread: [TP/16, 8, N]."""
    return tl.sum(tl.reshape(x, (x.shape[0] // 16, 2, 8, x.shape[1])), axis=1)


@triton.jit
def _position_backward(
    x1, x2, g1, g2, rstd, weight_ptr, dw1, dw2, cos1, cos2, sin1, sin2,
    D2: tl.constexpr, D: tl.constexpr, ROTATE_FIRST: tl.constexpr,
):  # fmt: skip
    """The gradient of x from that of its `_position`, g; adds the weight's to dw.

    g lacks the factor 1/sqrt(D) of the scores. With n = x * rstd and h the gradient of n, that of x is
    rstd * (h - n * mean(h * n)).
    """
    scale: tl.constexpr = D**-0.5
    if weight_ptr is None:
        g1, g2 = _rotate(g1, g2, cos1, cos2, sin1, sin2, D2, True)
        g1 *= scale
        if D2 > 0:
            g2 *= scale
    else:
        weight1, weight2 = _load_weight(weight_ptr, x1.shape[1], D2, D)
        x1, x2 = _widen(x1, x2, D2)
        if ROTATE_FIRST:
            n1, n2 = _rotate(x1, x2, cos1, cos2, sin1, sin2, D2, False)
        else:
            n1, n2 = x1, x2
            g1, g2 = _rotate(g1, g2, cos1, cos2, sin1, sin2, D2, True)
        g1 *= rstd * scale
        dw1 += _fold(g1 * n1)
        g1 *= weight1
        if D2 > 0:
            g2 *= rstd * scale
            dw2 += _fold(g2 * n2)
            g2 *= weight2
        if ROTATE_FIRST:
            g1, g2 = _rotate(g1, g2, cos1, cos2, sin1, sin2, D2, True)
        mean = _row_sum(g1, g2, x1, x2, D2) * (1.0 / D) * rstd * rstd
        g1 -= x1 * mean
        if D2 > 0:
            g2 -= x2 * mean
    return g1, g2, dw1, dw2


# ---------------------------------------------------------------- attention


@triton.jit
def _dot_channels(a1, a2, b1, b2, D2: tl.constexpr):
    """a b over the channels: a [TP, D], b [D, TP]."""
    out = tl.dot(a1, b1, input_precision="ieee")
    if D2 > 0:
        out = tl.dot(a2, b2, out, input_precision="ieee")
    return out


@triton.jit
def _dot_frames(p, b1, b2, D2: tl.constexpr):
    """p b over the frames: p [TP, TP], b [TP, D]."""
    out1 = tl.dot(p, b1, input_precision="ieee")
    out2 = out1
    if D2 > 0:
        out2 = tl.dot(p, b2, input_precision="ieee")
    return out1, out2


@triton.jit
def _exponentials(q1, q2, k1, k2, T: tl.constexpr, D2: tl.constexpr, D: tl.constexpr):
    """exp(score - the row's largest) [TP, TP], and the rows' sums [TP, 1]."""
    scale: tl.constexpr = 1.4426950408889634 * D**-0.5  # log2(e) / sqrt(D)
    score = _dot_channels(q1, q2, tl.trans(k1), tl.trans(k2), D2) * scale
    if score.shape[0] > T:
        score = tl.where(tl.arange(0, score.shape[1])[None, :] < T, score, float("-inf"))
    p = tl.exp2(score - tl.max(score, axis=1)[:, None])
    return p, tl.sum(p, axis=1)[:, None]


@triton.jit(do_not_specialize=["S"])
def _temporal_attention_forward(
    qkv_ptr, q_weight_ptr, k_weight_ptr, rotation_ptr, out_ptr,
    S, stride_b, stride_t, stride_s, eps,
    T: tl.constexpr, H: tl.constexpr, D: tl.constexpr,
    TP: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, HEADS: tl.constexpr, ROTATE_FIRST: tl.constexpr,
):  # fmt: skip
    """One program for HEADS heads at position s of sample b. Neighbours in memory, heads then s, run side by side."""
    pid = tl.program_id(0)
    head = pid % (H // HEADS) * HEADS
    s = pid // (H // HEADS) % S
    b = (pid // (H // HEADS) // S).to(tl.int64)
    row = tl.arange(0, TP).to(tl.int64)
    q_ptr = qkv_ptr + (b * stride_b + s.to(tl.int64) * stride_s) * 8 + head * D
    in_row = row * stride_t * 8
    out_ptr += (b * T * S + s) * (H * D) + head * D
    out_row = row * S * (H * D)
    cos1, cos2, sin1, sin2 = _load_table(rotation_ptr, TP, D1, D2, T, D)
    for h in range(HEADS):
        q1, q2 = _load(q_ptr + h * D, in_row, D1, D2, T, D)
        k1, k2 = _load(q_ptr + h * D + H * D, in_row, D1, D2, T, D)
        v1, v2 = _load(q_ptr + h * D + 2 * H * D, in_row, D1, D2, T, D)
        q1, q2, _ = _position(q1, q2, q_weight_ptr, cos1, cos2, sin1, sin2, eps, D2, D, ROTATE_FIRST)
        k1, k2, _ = _position(k1, k2, k_weight_ptr, cos1, cos2, sin1, sin2, eps, D2, D, ROTATE_FIRST)
        p, total = _exponentials(q1, q2, k1, k2, T, D2, D)
        o1, o2 = _dot_frames(p.to(v1.dtype), v1, v2, D2)
        inverse = 1.0 / total
        o1 *= inverse
        if D2 > 0:
            o2 *= inverse
        _store(out_ptr + h * D, out_row, o1, o2, D2, T, D)


@triton.jit(do_not_specialize=["S"])
def _temporal_attention_backward(
    do_ptr, qkv_ptr, q_weight_ptr, k_weight_ptr, rotation_ptr, dqkv_ptr, partial_ptr,
    S, stride_b, stride_t, stride_s, eps,
    T: tl.constexpr, H: tl.constexpr, D: tl.constexpr,
    TP: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, HEADS: tl.constexpr, ROTATE_FIRST: tl.constexpr,
):  # fmt: skip
    """As `_temporal_attention_forward`; writes dqkv in full, and its own part [2, D] of the weights' gradients."""
    pid = tl.program_id(0)
    head = pid % (H // HEADS) * HEADS
    s = pid // (H // HEADS) % S
    b = (pid // (H // HEADS) // S).to(tl.int64)
    row = tl.arange(0, TP).to(tl.int64)
    q_ptr = qkv_ptr + (b * stride_b + s.to(tl.int64) * stride_s) * 8 + head * D
    in_row = row * stride_t * 8
    do_ptr += (b * T * S + s) * (H * D) + head * D
    do_row = row * S * (H * D)
    dq_ptr = dqkv_ptr + (b * T * S + s) * (3 * H * D) + head * D
    dq_row = row * S * (3 * H * D)
    cos1, cos2, sin1, sin2 = _load_table(rotation_ptr, TP, D1, D2, T, D)
    dwq1 = tl.zeros((TP // 16, 8, D1), tl.float32)
    dwk1 = tl.zeros((TP // 16, 8, D1), tl.float32)
    dwq2, dwk2 = dwq1, dwk1
    if D2 > 0:
        dwq2 = tl.zeros((TP // 16, 8, D2), tl.float32)
        dwk2 = tl.zeros((TP // 16, 8, D2), tl.float32)
    for h in range(HEADS):
        # 1. Probabilities, as forward
        q1, q2 = _load(q_ptr + h * D, in_row, D1, D2, T, D)
        k1, k2 = _load(q_ptr + h * D + H * D, in_row, D1, D2, T, D)
        v1, v2 = _load_turned(q_ptr + h * D + 2 * H * D, in_row, D1, D2, T, D)  # as its one product needs it
        do1, do2 = _load(do_ptr + h * D, do_row, D1, D2, T, D)
        q1, q2, rstd_q = _position(q1, q2, q_weight_ptr, cos1, cos2, sin1, sin2, eps, D2, D, ROTATE_FIRST)
        k1, k2, rstd_k = _position(k1, k2, k_weight_ptr, cos1, cos2, sin1, sin2, eps, D2, D, ROTATE_FIRST)
        p, total = _exponentials(q1, q2, k1, k2, T, D2, D)
        p *= 1.0 / total
        # 2. Gradients of the scores and of v
        dp = _dot_channels(do1, do2, v1, v2, D2)
        ds = (p * (dp - tl.sum(p * dp, axis=1)[:, None])).to(q1.dtype)
        dv1, dv2 = _dot_frames(tl.trans(p.to(q1.dtype)), do1, do2, D2)
        _store(dq_ptr + h * D + 2 * H * D, dq_row, dv1, dv2, D2, T, D)
        # 3. Gradients of q, then of k. Either is read once more, from a cache, rather than kept in registers.
        g1, g2 = _dot_frames(ds, k1, k2, D2)
        x1, x2 = _load(q_ptr + h * D, in_row, D1, D2, T, D)
        g1, g2, dwq1, dwq2 = _position_backward(
            x1, x2, g1, g2, rstd_q, q_weight_ptr, dwq1, dwq2, cos1, cos2, sin1, sin2, D2, D, ROTATE_FIRST
        )
        _store(dq_ptr + h * D, dq_row, g1, g2, D2, T, D)
        g1, g2 = _dot_frames(tl.trans(ds), q1, q2, D2)
        x1, x2 = _load(q_ptr + h * D + H * D, in_row, D1, D2, T, D)
        g1, g2, dwk1, dwk2 = _position_backward(
            x1, x2, g1, g2, rstd_k, k_weight_ptr, dwk1, dwk2, cos1, cos2, sin1, sin2, D2, D, ROTATE_FIRST
        )
        _store(dq_ptr + h * D + H * D, dq_row, g1, g2, D2, T, D)
    partial_ptr += pid.to(tl.int64) * (2 * D)
    if q_weight_ptr is not None:
        _store_weight_gradient(partial_ptr, dwq1, dwq2, D2, D)
    if k_weight_ptr is not None:
        _store_weight_gradient(partial_ptr + D, dwk1, dwk2, D2, D)


@triton.jit
def _store_weight_gradient(ptr, dw1, dw2, D2: tl.constexpr, D: tl.constexpr):
    column = tl.arange(0, dw1.shape[2])
    tl.store(ptr + column, tl.sum(tl.sum(dw1, axis=0), axis=0), mask=column < D)
    if D2 > 0:
        column = dw1.shape[2] + tl.arange(0, D2)
        tl.store(ptr + column, tl.sum(tl.sum(dw2, axis=0), axis=0), mask=column < D)
