"""GELU by its tanh approximation, forward and backward, over [N, C]."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from stdit_fast.kernels.launch import launch
from stdit_fast.kernels.residual_norm import column_sum
from stdit_fast.kernels.tiles import cdiv, next_power_of_2

# Replaces choices of block sizes by name, for tuning.
TUNING: dict[str, int] = {}


def forward(h: Tensor) -> Tensor:
    """gelu(h) of contiguous h [N, C]."""
    count, channels = h.shape
    out = torch.empty_like(h)
    rows, width = TUNING.get("forward_rows", 8), _width(channels)
    programs = cdiv(count, rows) * cdiv(channels, width)
    warps = TUNING.get("forward_warps", 4)
    launch(_gelu_forward, programs, h, out, count, C=channels, ROWS=rows, WIDTH=width, num_warps=warps)
    return out


def backward(da: Tensor, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(dh, gelu(h), the sum of dh over the rows) from the gradient of gelu(h); the activation is made again here."""
    count, channels = h.shape
    dh, a = torch.empty_like(h), torch.empty_like(h)
    rows, width = TUNING.get("backward_rows", 2), _width(channels)
    walk = min(TUNING.get("backward_walk", 32), next_power_of_2(count))
    programs = cdiv(count, walk)
    partials = torch.empty(programs, channels, dtype=torch.float32, device=h.device)
    launch(
        _gelu_backward, programs * cdiv(channels, width), da, h, dh, a, partials, count,
        C=channels, ROWS=rows, TILES=cdiv(walk, rows), WIDTH=width,
        num_warps=TUNING.get("backward_warps", 8),
    )  # fmt: skip
    return dh, a, column_sum(partials, h.dtype)


def _width(channels: int) -> int:
    return TUNING.get("width", 512 if channels % 512 == 0 else min(512, max(16, next_power_of_2(channels))))


@triton.jit
def _tanh_of_inner(x):
    # 1 - 2 / (exp(2x) + 1): exact at both ends, where exp overflows to infinity or underflows to 0.
    inner = 0.7978845608028654 * (x + 0.044715 * x * x * x)
    return 1.0 - 2.0 / (tl.exp(2.0 * inner) + 1.0)


@triton.jit(do_not_specialize=["count"])
def _gelu_forward(h, out, count, C: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    blocks: tl.constexpr = (C + WIDTH - 1) // WIDTH
    row = (tl.program_id(0) // blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = (tl.program_id(0) % blocks) * WIDTH + tl.arange(0, WIDTH)
    mask = (row < count)[:, None] & (column < C)[None, :]
    at = row[:, None] * C + column[None, :]
    x = tl.load(h + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + at, (0.5 * x * (1.0 + _tanh_of_inner(x))).to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["count"])
def _gelu_backward(
    da, h, dh, a, partials, count,
    C: tl.constexpr, ROWS: tl.constexpr, TILES: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    blocks: tl.constexpr = (C + WIDTH - 1) // WIDTH
    program = (tl.program_id(0) // blocks).to(tl.int64)
    column = (tl.program_id(0) % blocks) * WIDTH + tl.arange(0, WIDTH)
    in_row = column < C
    total = tl.zeros([ROWS, WIDTH], tl.float32)
    for i in range(TILES):
        row = program * (TILES * ROWS) + i * ROWS + tl.arange(0, ROWS)
        mask = (row < count)[:, None] & in_row[None, :]
        at = row[:, None] * C + column[None, :]
        grad = tl.load(da + at, mask=mask, other=0.0).to(tl.float32)
        x = tl.load(h + at, mask=mask, other=0.0).to(tl.float32)
        t = _tanh_of_inner(x)
        # d/dx of x (1 + t) / 2, with the derivative of tanh, 1 - t^2, times that of its argument.
        slope = 0.5 * (1.0 + t) + 0.5 * x * (1.0 - t * t) * (0.7978845608028654 + 0.10703222440890037 * x * x)
        grad *= slope
        total += grad
        tl.store(a + at, (0.5 * x * (1.0 + t)).to(a.dtype.element_ty), mask=mask)
        tl.store(dh + at, grad.to(dh.dtype.element_ty), mask=mask)
    tl.store(partials + program * C + column, tl.sum(total, 0), mask=in_row)
