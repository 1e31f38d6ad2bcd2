"""Everything between two GEMMs on the residual stream, in one pass: bias, gate, residual, LayerNorm, modulation.

    x_new = x + gate * (o + bias)            the end of one branch (each of the three parts may be absent)
    u = LN(x_new) * (1 + scale) + shift      the entry of the next (likewise)

Tokens come in groups that share a row of shift, scale and gate: a frame, or a whole sample where frames do not
differ. A program walks over some rows of one group, so that the modulation is read once; in the backward pass it
keeps the sums over its rows that become the gradients of shift, scale, gate and bias, writes them as partial sums,
and `_sum_partials` adds those in a fixed order: no atomics, the same bits every time.

u, or o, may lie in another order than x: as it travels to other GPUs (`places`). Then no pass brings it into order.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from stdit_fast.kernels.launch import launch
from stdit_fast.kernels.results import memory_for
from stdit_fast.kernels.tiles import cdiv, next_power_of_2, split

# Replaces entries of `_plan`'s choices by name, for tuning: {"forward_rows": 2, ...}.
TUNING: dict[str, int] = {}

_MULTIPROCESSORS = 132  # of the largest Hopper GPU
_START_ROWS = 6  # that a program's begin and end cost as much as: modulation, the first copies, partial sums
_STAGE_BYTES = 2**14  # of each of up to four tensors, in shared memory


class Plan(NamedTuple):
    """How the rows of a tensor [groups * group_size, C] are given to programs.

    The programs copy rows ahead into shared memory (`stages`): a row's two reductions and its stores wait for nothing
    but each other, and without rows under way meanwhile, half of the memory's speed is lost.
    """

    group_size: int
    rows: int  # of one tile
    tiles: int  # tiles that a program walks over
    chunks: int  # programs a group
    warps: int
    stages: int


def _plan(groups: int, like: Tensor, direction: str, has_branch: bool) -> Plan:
    channels = like.shape[-1]
    group_size = like.numel() // channels // groups
    # Measured on an H200 at 1152 channels. One warp needs no exchange through shared memory, but has registers for
    # the sums of the norm alone.
    rows = TUNING.get(f"{direction}_rows", 1)
    warps = TUNING.get(f"{direction}_warps", max(1, min(8, channels // (512 if has_branch else 1024))))
    if direction == "forward":
        # Rows are cheap to begin with: short walks fill the GPU evenly.
        walk = max(4, min(16, groups * group_size // (_MULTIPROCESSORS * 16)))
        chunks = cdiv(group_size, max(rows, TUNING.get("forward_walk", walk)))
    else:
        # Registers allow eight warps a multiprocessor.
        walk = TUNING.get("backward_walk")
        at_once = _MULTIPROCESSORS * max(1, 8 // warps)
        chunks = cdiv(group_size, walk) if walk else _backward_chunks(groups, group_size, at_once)
    # Each with an even share.
    tiles = cdiv(cdiv(group_size, chunks), rows)
    stages = max(1, min(3, _STAGE_BYTES // (rows * channels * like.element_size())))
    return Plan(group_size, rows, tiles, chunks, warps, TUNING.get(f"{direction}_stages", stages))


@lru_cache(maxsize=1024)
def _backward_chunks(groups: int, group_size: int, at_once: int) -> int:
    """Programs a group, such that the GPU is done soonest when `at_once` of them run at a time."""

    def rows_in_turn(chunks: int) -> int:
        return cdiv(groups * chunks, at_once) * (cdiv(group_size, chunks) + _START_ROWS)

    return min(range(1, min(cdiv(group_size, 4), 4096) + 1), key=rows_in_turn)


def forward(
    x: Tensor,
    o: Tensor | None,
    bias: Tensor | None,
    gate: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
    groups: int,
    eps: float,
    o_places: Tensor | None = None,
    u_places: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(x_new, u, stats) of contiguous x and o [..., C]; what does not apply is None.

    Args:
        bias: [C]; gate, shift, scale: [groups, C], the rows at any stride.
        o_places, u_places: int32 [S, 2], contiguous: position s of the f-th frame of all samples is row
            places[s, 0] + f * places[s, 1] of o, or of u, which are [rows, C]; None: as in x.

    Returns:
        x_new, u as x; stats [rows, 2] float32: mean and 1/std of each row of x_new.
    """
    channels = x.shape[-1]
    count = x.numel() // channels
    plan = _plan(groups, x, "forward", o is not None)
    first, rest = split(channels)
    has_norm = shift is not None
    x_new = torch.empty_like(x) if o is not None else None
    u = memory_for(x.shape if u_places is None else (count, channels), x) if has_norm else None
    stats = torch.empty(count, 2, dtype=torch.float32, device=x.device) if has_norm else None
    launch(
        _residual_norm_forward, groups * plan.chunks,
        x, o, bias, gate, shift, scale, x_new, u, stats, o_places, u_places, _positions(o_places, u_places),
        plan.group_size, plan.chunks, plan.tiles, _row_stride(gate), _row_stride(shift), _row_stride(scale), eps,
        C=channels, FIRST=first, REST=rest, ROWS=plan.rows, STAGES=plan.stages,
        HAS_BRANCH=o is not None, HAS_BIAS=bias is not None, HAS_GATE=gate is not None, HAS_NORM=has_norm,
        num_warps=plan.warps, maxnreg=TUNING.get("forward_registers"),
    )  # fmt: skip
    return x_new, u, stats


class Gradients(NamedTuple):
    """Of `forward`'s inputs; None where an input was absent.

    dx is None where it would equal the one gradient that came, d_o where it would equal dx. `modulation` holds
    those of shift, scale and gate as far as there are any, in this order: [1 to 3, groups, C].
    """

    dx: Tensor | None
    d_o: Tensor | None
    dbias: Tensor | None
    modulation: Tensor | None
    u: Tensor | None


def backward(
    dx_new: Tensor | None,
    du: Tensor | None,
    x_new: Tensor | None,
    stats: Tensor | None,
    o: Tensor | None,
    bias: Tensor | None,
    gate: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
    groups: int,
    remake_u: bool,
    o_places: Tensor | None = None,
    u_places: Tensor | None = None,
) -> Gradients:
    """The gradients from those of x_new and of u; either may be None.

    o is read where there is a gate, for its gradient. Without a norm (scale None), du is a second gradient of x_new.
    `remake_u` also returns u, which the gradient of a weight behind it needs, and which is cheaper to make again in
    this pass than to keep. With places as in `forward`, o and its gradient, or du, lie as they say; u then does too.
    """
    like = next(given for given in (x_new, du, dx_new) if given is not None)  # in the order of tokens
    channels = like.shape[-1]
    plan = _plan(groups, like, "backward", gate is not None or bias is not None)
    first, rest = split(channels)
    has_norm = scale is not None
    # Without a norm and with one gradient, x's gradient is that gradient: nothing to write.
    has_dx = has_norm or (du is not None and dx_new is not None)
    dx = torch.empty_like(like) if has_dx else None
    # Without a gate the branch's gradient is x's.
    d_o = torch.empty_like(o) if gate is not None else None
    u = torch.empty_like(du) if remake_u else None
    programs = groups * plan.chunks
    modulations = 2 * has_norm + (gate is not None)
    kinds = modulations + (bias is not None)
    partials = torch.empty(kinds, programs, channels, dtype=torch.float32, device=like.device)
    if has_dx or kinds:
        launch(
            _residual_norm_backward, programs,
            dx_new, du, x_new, stats, o, bias, gate, shift, scale, dx, d_o, u, partials,
            o_places, u_places, _positions(o_places, u_places),
            plan.group_size, plan.chunks, plan.tiles, _row_stride(gate), _row_stride(shift), _row_stride(scale),
            C=channels, FIRST=first, REST=rest, ROWS=plan.rows, STAGES=plan.stages,
            HAS_DX_NEW=dx_new is not None, HAS_DU=du is not None,
            HAS_BIAS=bias is not None, HAS_GATE=gate is not None, HAS_NORM=has_norm, WRITE_DX=has_dx, REMAKE_U=remake_u,
            num_warps=plan.warps, maxnreg=TUNING.get("backward_registers"),
        )  # fmt: skip
    dmodulation = dbias = None
    if modulations:
        by_group = partials[:modulations].view(modulations * groups, plan.chunks, channels)
        dmodulation = sum_rows(by_group, like.dtype).view(modulations, groups, channels)
    if bias is not None:
        dbias = column_sum(partials[-1], bias.dtype)
    return Gradients(dx, d_o, dbias, dmodulation, u)


def column_sum(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The sum over the rows of x [N, C], in float32, rounded to `dtype`: [C]. The same bits every time."""
    count, channels = x.shape
    # The second pass has one program a column block, so its rows should be few; so should the programs of the first.
    most = TUNING.get("sum_parts", 128)
    parts = 1 if count <= most else min(cdiv(count, 32), most)
    if parts > 1:
        x = sum_rows(x, torch.float32, parts)
    return sum_rows(x.view(1, -1, channels), dtype)[0]


def sum_rows(x: Tensor, dtype: torch.dtype, parts: int | None = None) -> Tensor:
    """Sums over rows in float32: x [M, R, C] to [M, C], or x [N, C] to [parts, C], in `dtype`."""
    channels = x.shape[-1]
    if parts is None:
        parts, size = x.shape[0], x.shape[1]
        count = parts * size
    else:
        count = x.shape[0]
        size = cdiv(count, parts)
    out = torch.empty(parts, channels, dtype=dtype, device=x.device)
    width = min(TUNING.get("sum_width", 128), max(16, next_power_of_2(channels)))
    launch(
        _sum_rows, parts * cdiv(channels, width), x, out, count, size, channels,
        WIDTH=width, ROWS=min(TUNING.get("sum_rows", 32), max(2, next_power_of_2(size))),
        STAGES=TUNING.get("sum_stages", 4), num_warps=TUNING.get("sum_warps", 2),
    )  # fmt: skip
    return out


def _positions(*places: Tensor | None) -> int:
    return next((len(own) for own in places if own is not None), 0)


def _row_stride(modulation: Tensor | None) -> int:
    return 0 if modulation is None else modulation.stride(0)


@triton.jit
def _row(pointer, columns, mask):
    """A row of modulation in float32, 0 beyond its end."""
    return tl.load(pointer + columns, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _tile(pointer, offsets, mask):
    """A tile of rows in float32, 0 beyond its end."""
    return tl.load(pointer + offsets, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _placed(places, token, positions):
    """The rows of tokens where `places` says so."""
    if places is None:
        row = token
    else:
        flat = token.to(tl.int32)  # a division of 32 bits is much cheaper
        at = places + (flat % positions) * 2
        row = tl.load(at).to(tl.int64) + (flat // positions).to(tl.int64) * tl.load(at + 1)
    return row


@triton.jit(do_not_specialize=["positions", "group_size", "chunks", "tiles"])
def _residual_norm_forward(
    x, o, bias, gate, shift, scale, x_new, u, stats, o_places, u_places, positions,
    group_size, chunks, tiles, gate_stride, shift_stride, scale_stride, eps,
    C: tl.constexpr, FIRST: tl.constexpr, REST: tl.constexpr,
    ROWS: tl.constexpr, STAGES: tl.constexpr,
    HAS_BRANCH: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_GATE: tl.constexpr, HAS_NORM: tl.constexpr,
):  # fmt: skip
    group = (tl.program_id(0) // chunks).to(tl.int64)
    first_row = (tl.program_id(0) % chunks) * (tiles * ROWS)
    dtype = x.dtype.element_ty
    # The row's two blocks: columns a, and columns b where a power of two does not hold all.
    a = tl.arange(0, FIRST)
    a_in = a < C
    if REST > 0:
        b = FIRST + tl.arange(0, REST)
        b_in = b < C
    if HAS_GATE:
        gate_a = _row(gate + group * gate_stride, a, a_in)[None, :]
        if REST > 0:
            gate_b = _row(gate + group * gate_stride, b, b_in)[None, :]
    if HAS_BIAS:
        bias_a = _row(bias, a, a_in)[None, :]
        if REST > 0:
            bias_b = _row(bias, b, b_in)[None, :]
    if HAS_NORM:
        shift_a = _row(shift + group * shift_stride, a, a_in)[None, :]
        scale_a = 1.0 + _row(scale + group * scale_stride, a, a_in)[None, :]
        if REST > 0:
            shift_b = _row(shift + group * shift_stride, b, b_in)[None, :]
            scale_b = 1.0 + _row(scale + group * scale_stride, b, b_in)[None, :]

    for i in tl.range(tiles, num_stages=STAGES):
        row = first_row + i * ROWS + tl.arange(0, ROWS)
        row_in = row < group_size
        token = group * group_size + row
        at_a = token[:, None] * C + a[None, :]
        mask_a = row_in[:, None] & a_in[None, :]
        x_a = _tile(x, at_a, mask_a)
        if HAS_BRANCH:
            o_row = _placed(o_places, token, positions)
            o_a = _tile(o, o_row[:, None] * C + a[None, :], mask_a)
        if REST > 0:
            at_b = token[:, None] * C + b[None, :]
            mask_b = row_in[:, None] & b_in[None, :]
            x_b = _tile(x, at_b, mask_b)
            if HAS_BRANCH:
                o_b = _tile(o, o_row[:, None] * C + b[None, :], mask_b)
        if HAS_BRANCH:
            # Multiplied and added in one rounding whatever else is in this kernel: a block that is checkpointed takes
            # another of its forms, and must give the same bits.
            if HAS_BIAS:
                o_a += bias_a
            if HAS_GATE:
                x_a = tl.fma(o_a, tl.broadcast_to(gate_a, [ROWS, FIRST]), x_a)
            else:
                x_a += o_a
            rounded_a = x_a.to(dtype)
            tl.store(x_new + at_a, rounded_a, mask=mask_a)
            x_a = rounded_a.to(tl.float32)
            if REST > 0:
                if HAS_BIAS:
                    o_b += bias_b
                if HAS_GATE:
                    x_b = tl.fma(o_b, tl.broadcast_to(gate_b, [ROWS, REST]), x_b)
                else:
                    x_b += o_b
                rounded_b = x_b.to(dtype)
                tl.store(x_new + at_b, rounded_b, mask=mask_b)
                x_b = rounded_b.to(tl.float32)
        if HAS_NORM:
            total = tl.sum(x_a, 1)
            if REST > 0:
                total += tl.sum(x_b, 1)
            mean = total / C
            x_a -= mean[:, None]
            if FIRST > C:
                x_a = tl.where(mask_a, x_a, 0.0)
            square = tl.sum(x_a * x_a, 1)
            if REST > 0:
                x_b -= mean[:, None]
                if FIRST + REST > C:
                    x_b = tl.where(mask_b, x_b, 0.0)
                square += tl.sum(x_b * x_b, 1)
            rstd = tl.rsqrt(square / C + eps)
            tl.store(stats + token * 2, mean, mask=row_in)
            tl.store(stats + token * 2 + 1, rstd, mask=row_in)
            u_row = _placed(u_places, token, positions)
            at_a = u_row[:, None] * C + a[None, :]
            tl.store(u + at_a, (x_a * rstd[:, None] * scale_a + shift_a).to(dtype), mask=mask_a)
            if REST > 0:
                at_b = u_row[:, None] * C + b[None, :]
                tl.store(u + at_b, (x_b * rstd[:, None] * scale_b + shift_b).to(dtype), mask=mask_b)


@triton.jit
def _incoming(dx_new, du, at, mask, HAS_DX_NEW: tl.constexpr, HAS_DU: tl.constexpr):
    """The gradient of x_new where there is no norm: the sum of those that came."""
    if HAS_DX_NEW:
        total = _tile(dx_new, at, mask)
        if HAS_DU:
            total += _tile(du, at, mask)
    else:
        total = _tile(du, at, mask)
    return total


@triton.jit(do_not_specialize=["positions", "group_size", "chunks", "tiles"])
def _residual_norm_backward(
    dx_new, du, x_new, stats, o, bias, gate, shift, scale, dx, d_o, u, partials, o_places, u_places, positions,
    group_size, chunks, tiles, gate_stride, shift_stride, scale_stride,
    C: tl.constexpr, FIRST: tl.constexpr, REST: tl.constexpr,
    ROWS: tl.constexpr, STAGES: tl.constexpr,
    HAS_DX_NEW: tl.constexpr, HAS_DU: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_GATE: tl.constexpr, HAS_NORM: tl.constexpr, WRITE_DX: tl.constexpr, REMAKE_U: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    group = (program // chunks).to(tl.int64)
    first_row = (program % chunks) * (tiles * ROWS)
    dtype = du.dtype.element_ty if HAS_DU else dx_new.dtype.element_ty
    a = tl.arange(0, FIRST)
    a_in = a < C
    if REST > 0:
        b = FIRST + tl.arange(0, REST)
        b_in = b < C
    if HAS_GATE:
        gate_a = _row(gate + group * gate_stride, a, a_in)[None, :]
        dgate_a = tl.zeros([ROWS, FIRST], tl.float32)
        if REST > 0:
            gate_b = _row(gate + group * gate_stride, b, b_in)[None, :]
            dgate_b = tl.zeros([ROWS, REST], tl.float32)
    if HAS_BIAS:
        dsum_a = tl.zeros([ROWS, FIRST], tl.float32)
        if REST > 0:
            dsum_b = tl.zeros([ROWS, REST], tl.float32)
    if HAS_NORM:
        scale_a = 1.0 + _row(scale + group * scale_stride, a, a_in)[None, :]
        dshift_a = tl.zeros([ROWS, FIRST], tl.float32)
        dscale_a = tl.zeros([ROWS, FIRST], tl.float32)
        if REST > 0:
            scale_b = 1.0 + _row(scale + group * scale_stride, b, b_in)[None, :]
            dshift_b = tl.zeros([ROWS, REST], tl.float32)
            dscale_b = tl.zeros([ROWS, REST], tl.float32)

    for i in tl.range(tiles, num_stages=STAGES):
        row = first_row + i * ROWS + tl.arange(0, ROWS)
        row_in = row < group_size
        token = group * group_size + row
        at_a = token[:, None] * C + a[None, :]
        mask_a = row_in[:, None] & a_in[None, :]
        if REST > 0:
            at_b = token[:, None] * C + b[None, :]
            mask_b = row_in[:, None] & b_in[None, :]
        if HAS_NORM:
            mean = tl.load(stats + token * 2, mask=row_in, other=0.0)[:, None]
            rstd = tl.load(stats + token * 2 + 1, mask=row_in, other=0.0)[:, None]
            u_row = _placed(u_places, token, positions)
            u_at_a = u_row[:, None] * C + a[None, :]
            du_a = _tile(du, u_at_a, mask_a)
            # Beyond the rows mean, rstd and du are 0, beyond the columns du is: nothing there enters a sum.
            hat_a = (_tile(x_new, at_a, mask_a) - mean) * rstd
            if HAS_DX_NEW:
                dx_a = _tile(dx_new, at_a, mask_a)
            if REST > 0:
                u_at_b = u_row[:, None] * C + b[None, :]
                du_b = _tile(du, u_at_b, mask_b)
                hat_b = (_tile(x_new, at_b, mask_b) - mean) * rstd
                if HAS_DX_NEW:
                    dx_b = _tile(dx_new, at_b, mask_b)
            if REMAKE_U:
                # Read here, not held in registers through the walk: it lies in the L1 cache.
                shift_a = _row(shift + group * shift_stride, a, a_in)[None, :]
                tl.store(u + u_at_a, (hat_a * scale_a + shift_a).to(dtype), mask=mask_a)
                if REST > 0:
                    shift_b = _row(shift + group * shift_stride, b, b_in)[None, :]
                    tl.store(u + u_at_b, (hat_b * scale_b + shift_b).to(dtype), mask=mask_b)
            dshift_a += du_a
            dscale_a += du_a * hat_a
            du_a *= scale_a
            mean_du = tl.sum(du_a, 1)
            mean_du_hat = tl.sum(du_a * hat_a, 1)
            if REST > 0:
                dshift_b += du_b
                dscale_b += du_b * hat_b
                du_b *= scale_b
                mean_du += tl.sum(du_b, 1)
                mean_du_hat += tl.sum(du_b * hat_b, 1)
            mean_du = (mean_du / C)[:, None]
            mean_du_hat = (mean_du_hat / C)[:, None]
            norm_a = rstd * (du_a - mean_du - hat_a * mean_du_hat)
            if HAS_DX_NEW:
                dx_a += norm_a
            else:
                dx_a = norm_a
            if REST > 0:
                norm_b = rstd * (du_b - mean_du - hat_b * mean_du_hat)
                if HAS_DX_NEW:
                    dx_b += norm_b
                else:
                    dx_b = norm_b
        else:
            dx_a = _incoming(dx_new, du, at_a, mask_a, HAS_DX_NEW, HAS_DU)
            if REST > 0:
                dx_b = _incoming(dx_new, du, at_b, mask_b, HAS_DX_NEW, HAS_DU)
        if WRITE_DX:
            tl.store(dx + at_a, dx_a.to(dtype), mask=mask_a)
            if REST > 0:
                tl.store(dx + at_b, dx_b.to(dtype), mask=mask_b)
        if HAS_BIAS:
            dsum_a += dx_a
            if REST > 0:
                dsum_b += dx_b
        if HAS_GATE:
            o_row = _placed(o_places, token, positions)
            o_at_a = o_row[:, None] * C + a[None, :]
            o_a = _tile(o, o_at_a, mask_a)
            dgate_a += dx_a * o_a
            tl.store(d_o + o_at_a, (dx_a * gate_a).to(dtype), mask=mask_a)
            if REST > 0:
                o_at_b = o_row[:, None] * C + b[None, :]
                o_b = _tile(o, o_at_b, mask_b)
                dgate_b += dx_b * o_b
                tl.store(d_o + o_at_b, (dx_b * gate_b).to(dtype), mask=mask_b)

    # partials [kind, program, C]: shift, scale, gate, bias, those that are there.
    programs = tl.num_programs(0).to(tl.int64)
    at = partials + program.to(tl.int64) * C
    if HAS_NORM:
        tl.store(at + a, tl.sum(dshift_a, 0), mask=a_in)
        tl.store(at + programs * C + a, tl.sum(dscale_a, 0), mask=a_in)
        if REST > 0:
            tl.store(at + b, tl.sum(dshift_b, 0), mask=b_in)
            tl.store(at + programs * C + b, tl.sum(dscale_b, 0), mask=b_in)
        at += 2 * programs * C
    # With D the sum of x's gradient over the rows: dgate = sum of it times o, + bias * D, and dbias = gate * D.
    if HAS_BIAS:
        sum_a = tl.sum(dsum_a, 0)
        if REST > 0:
            sum_b = tl.sum(dsum_b, 0)
    if HAS_GATE:
        total_a = tl.sum(dgate_a, 0)
        if HAS_BIAS:
            total_a += _row(bias, a, a_in) * sum_a
            sum_a *= _row(gate + group * gate_stride, a, a_in)
        tl.store(at + a, total_a, mask=a_in)
        if REST > 0:
            total_b = tl.sum(dgate_b, 0)
            if HAS_BIAS:
                total_b += _row(bias, b, b_in) * sum_b
                sum_b *= _row(gate + group * gate_stride, b, b_in)
            tl.store(at + b, total_b, mask=b_in)
        at += programs * C
    if HAS_BIAS:
        tl.store(at + a, sum_a, mask=a_in)
        if REST > 0:
            tl.store(at + b, sum_b, mask=b_in)


@triton.jit(do_not_specialize=["count", "size"])
def _sum_rows(x, out, count, size, C, WIDTH: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr):
    blocks = tl.cdiv(C, WIDTH)
    # The last rows first: those are in the L2 cache still where x was just written.
    part = (tl.num_programs(0) // blocks - 1 - tl.program_id(0) // blocks).to(tl.int64)
    column = (tl.program_id(0) % blocks) * WIDTH + tl.arange(0, WIDTH)
    total = tl.zeros([ROWS, WIDTH], tl.float32)
    end = tl.minimum((part + 1) * size, count)
    for start in tl.range(part * size, end, ROWS, num_stages=STAGES):
        row = start + tl.arange(0, ROWS)
        mask = (row < end)[:, None] & (column < C)[None, :]
        total += tl.load(x + row[:, None] * C + column[None, :], mask=mask, other=0.0).to(tl.float32)
    tl.store(out + part * C + column, tl.sum(total, 0).to(out.dtype.element_ty), mask=column < C)
