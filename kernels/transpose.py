"""A matrix's transpose, brought into order: each value is read and written once, in runs of 128 bytes or more."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from stdit_fast.kernels.launch import launch
from stdit_fast.kernels.tiles import cdiv

# Replaces choices by name, for tuning.
TUNING: dict[str, int] = {}


def transpose(x: Tensor, out: Tensor | None = None) -> Tensor:
    """Contiguous x [M, N] to contiguous [N, M], in `out` if that is given."""
    rows, columns = x.shape
    if out is None:
        out = torch.empty(columns, rows, dtype=x.dtype, device=x.device)
    tile = TUNING.get("tile", 64)
    launch(
        _transpose, cdiv(rows, tile) * cdiv(columns, tile), x, out, rows, columns,
        TILE=tile, num_warps=TUNING.get("warps", 4),
    )  # fmt: skip
    return out


@triton.jit
def _transpose(x, out, rows, columns, TILE: tl.constexpr):
    across = tl.cdiv(columns, TILE)
    row = (tl.program_id(0) // across * TILE + tl.arange(0, TILE)).to(tl.int64)
    column = (tl.program_id(0) % across * TILE + tl.arange(0, TILE)).to(tl.int64)
    at = row[:, None] * columns + column[None, :]
    values = tl.load(x + at, mask=(row < rows)[:, None] & (column < columns)[None, :], other=0.0)
    there = column[:, None] * rows + row[None, :]
    tl.store(out + there, tl.trans(values), mask=(column < columns)[:, None] & (row < rows)[None, :])
