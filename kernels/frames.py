"""Pictures as the autoencoder's passes hold them, and those passes.

The layout: [N, H+1, W+1, C], zero in each picture's last row and column. A 3x3 convolution that pads by one on all
sides gives the same layout again (its own last row and column then hold numbers without meaning), one that halves the
size finds the zeros that it wants on the right and below, and neither copies its input.

A pass works on tiles of rows (a picture is (H+1) * (W+1) of them, of C values each), the next rows on their way while
some are worked on. Statistics are kept a tile and channel, mean and sum of squared deviations from it, and joined by
`channel_statistics`: no difference of large sums is taken.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from stdit_fast.kernels.launch import launch
from stdit_fast.kernels.tiles import DOT_MINIMUM, cdiv, next_power_of_2

# Replaces choices by name, for tuning.
TUNING: dict[str, int] = {}

STATISTICS_TILES, STATISTICS_CHANNELS = 256, 16
ENTRY_ROWS = 128


def place(
    src: Tensor, bias: Tensor, residual: Tensor | None, height: int, width: int, row_pitch: int
) -> tuple[Tensor, Tensor]:
    """src + bias (+ residual) in the layout, and its statistics [N, 2, C].

    Args:
        src: contiguous [N, P, C]; pixel (h, w) of a picture is its row h * row_pitch + w.
        bias: [C]; residual: in the layout.
    """
    out = src.new_empty(src.shape[0], height + 1, width + 1, src.shape[2])
    return out, _walk(src, bias, residual, out, height, width, row_pitch)


def statistics(x: Tensor, bias: Tensor) -> Tensor:
    """[N, 2, C]: mean and variance of x + bias over each picture's pixels; x is in the layout, whatever its border."""
    height, width = x.shape[1] - 1, x.shape[2] - 1
    return _walk(x.flatten(1, 2), bias, None, None, height, width, width + 1)


def _walk(
    src: Tensor, bias: Tensor, residual: Tensor | None, out: Tensor | None, height: int, width: int, row_pitch: int
) -> Tensor:
    count, picture_pitch, channels = src.shape
    rows, steps = max(8, TUNING.get("walk_elements", 4096) // channels), TUNING.get("walk_steps", 8)
    tiles = cdiv((height + 1) * (width + 1), rows * steps)
    partials = torch.empty(count, tiles, 2, channels, dtype=torch.float32, device=src.device)
    launch(
        _place, count * tiles, src, bias, src if residual is None else residual, src if out is None else out, partials,
        tiles, height, width, row_pitch, picture_pitch,
        C=channels, ROWS=rows, STEPS=steps, STAGES=TUNING.get("walk_stages", 3),
        HAS_RESIDUAL=residual is not None, WRITE=out is not None, num_warps=TUNING.get("walk_warps", 4),
    )  # fmt: skip
    return channel_statistics(partials, height, width, rows * steps)


def channel_statistics(partials: Tensor, height: int, width: int, rows: int) -> Tensor:
    """Mean and variance of each picture and channel, [N, 2, C], of statistics a tile of `rows` rows."""
    count, tiles, _, channels = partials.shape
    out = torch.empty(count, 2, channels, dtype=torch.float32, device=partials.device)
    block = min(STATISTICS_CHANNELS, channels)
    lanes = min(STATISTICS_TILES, next_power_of_2(tiles))
    launch(
        _channel_statistics, count * (channels // block), partials, out, tiles, height, width, rows,
        C=channels, BLOCK=block, LANES=lanes, num_warps=8 if lanes > 128 else 4,
    )  # fmt: skip
    return out


def normalize(
    x: Tensor, statistics: Tensor, shift: Tensor | None, weight: Tensor, bias: Tensor, groups: int, eps: float,
    silu: bool, tokens: int,
) -> Tensor:  # fmt: skip
    """GroupNorm, and SiLU where asked for, of x + shift, x in the layout, whatever its border.

    Args:
        tokens: 0: the result is in the layout. Otherwise the pixels' rows without borders, [N, tokens, C]; rows
            beyond a picture's pixels are zero.
    """
    count, rows, columns, channels = x.shape
    height, width = rows - 1, columns - 1
    out = x.new_zeros(count, tokens, channels) if tokens else torch.empty_like(x)
    size = max(8, TUNING.get("normalize_elements", 4096) // channels)
    tiles = cdiv(rows * columns, size)
    launch(
        _normalize, count * tiles, x, statistics, weight if shift is None else shift, weight, bias, out,
        tiles, height, width, tokens, eps,
        C=channels, GROUPS=groups, ROWS=size, HAS_SHIFT=shift is not None, SILU=silu, COMPACT=tokens > 0,
        num_warps=TUNING.get("normalize_warps", 4),
    )  # fmt: skip
    return out


def enter(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """conv3x3(x) + bias in the layout, and its statistics [N, 2, C]: the network's first convolution.

    Its 9 * C_in inputs a pixel are gathered and are one product.

    Args:
        x: [N, C_in, H, W], of any strides and dtype; few channels.
        weight: [C_out, C_in, 3, 3], contiguous; its dtype is the result's. bias: [C_out].
    """
    count, c_in, height, width = x.shape
    c_out = weight.shape[0]
    columns = min(c_out, 128)
    out = weight.new_empty(count, height + 1, width + 1, c_out)
    tiles = cdiv((height + 1) * (width + 1), ENTRY_ROWS)
    partials = torch.empty(count, tiles, 2, c_out, dtype=torch.float32, device=x.device)
    launch(
        _enter, count * tiles * (c_out // columns), x, weight, bias, out, partials, tiles, height, width, *x.stride(),
        C_IN=c_in, C_OUT=c_out, ROWS=ENTRY_ROWS, COLUMNS=columns, DEPTH=max(DOT_MINIMUM, next_power_of_2(9 * c_in)),
        PRECISION="ieee" if weight.dtype == torch.float32 else "tf32", num_warps=4,
    )  # fmt: skip
    return out, channel_statistics(partials, height, width, ENTRY_ROWS)


def softmax_rows(scores: Tensor, used: int, scale: float, dtype: torch.dtype) -> Tensor:
    """softmax(scale * scores) over the first `used` columns of contiguous float32 [..., S], 0 in the others."""
    out = torch.empty(scores.shape, dtype=dtype, device=scores.device)
    width = next_power_of_2(scores.shape[-1])
    launch(
        _softmax_rows, scores.numel() // scores.shape[-1], scores, out, scores.shape[-1], used, scale,
        WIDTH=width, num_warps=min(16, max(1, width // 512)),
    )  # fmt: skip
    return out


# ------------------------------------------------------------------- kernels


@triton.jit
def _pixels_before(row, height, width):
    """How many of a picture's first `row` rows are pixels, not border."""
    pitch = width + 1
    line = row // pitch
    return tl.where(line < height, line * width + tl.minimum(row % pitch, width), height * width)


@triton.jit(do_not_specialize=["tiles", "height", "width", "row_pitch", "picture_pitch"])
def _place(
    src, bias, residual, out, partials, tiles, height, width, row_pitch, picture_pitch,
    C: tl.constexpr, ROWS: tl.constexpr, STEPS: tl.constexpr, STAGES: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr, WRITE: tl.constexpr,
):  # fmt: skip
    picture = (tl.program_id(0) // tiles).to(tl.int64)
    first = (tl.program_id(0) % tiles) * (ROWS * STEPS)
    pitch = width + 1
    size = (height + 1) * pitch
    channel = tl.arange(0, C)
    add = tl.load(bias + channel).to(tl.float32)
    # Sums are taken of differences from one pixel of the tile, which is near enough to the mean to lose no digits.
    line = tl.minimum(first // pitch, height - 1)
    place = tl.minimum(first % pitch, width - 1)
    origin = tl.load(src + (picture * picture_pitch + line * row_pitch + place) * C + channel).to(tl.float32) + add
    if HAS_RESIDUAL:
        origin += tl.load(residual + (picture * size + line * pitch + place) * C + channel).to(tl.float32)
    total = tl.zeros([ROWS, C], tl.float32)
    square = tl.zeros([ROWS, C], tl.float32)
    for i in tl.range(STEPS, num_stages=STAGES):
        row = first + i * ROWS + tl.arange(0, ROWS)
        h, w = row // pitch, row % pitch
        inside = ((h < height) & (w < width))[:, None]
        from_row = picture * picture_pitch + h * row_pitch + w
        x = tl.load(src + from_row[:, None] * C + channel[None, :], mask=inside, other=0.0).to(tl.float32)
        x += add[None, :]
        at = (picture * size + row)[:, None] * C + channel[None, :]
        if HAS_RESIDUAL:
            x += tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
        if WRITE:
            rounded = tl.where(inside, x, 0.0).to(out.dtype.element_ty)
            tl.store(out + at, rounded, mask=(row < size)[:, None])
            x = rounded.to(tl.float32)
        x = tl.where(inside, x - origin[None, :], 0.0)
        total += x
        square += x * x
    count = _pixels_before(first + ROWS * STEPS, height, width) - _pixels_before(first, height, width)
    mean = tl.sum(total, 0) / tl.maximum(count, 1)
    to = partials + tl.program_id(0).to(tl.int64) * (2 * C) + channel
    tl.store(to, mean + origin)
    tl.store(to + C, tl.maximum(tl.sum(square, 0) - mean * mean * count, 0.0))


@triton.jit(do_not_specialize=["tiles", "height", "width", "rows"])
def _channel_statistics(
    partials, out, tiles, height, width, rows, C: tl.constexpr, BLOCK: tl.constexpr, LANES: tl.constexpr
):
    blocks: tl.constexpr = C // BLOCK
    picture = (tl.program_id(0) // blocks).to(tl.int64)
    channel = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    # Each lane joins every LANES-th tile, one after the other (Chan et al., 1983); then the lanes are joined.
    count = tl.zeros([LANES], tl.float32)
    mean = tl.zeros([LANES, BLOCK], tl.float32)
    square = tl.zeros([LANES, BLOCK], tl.float32)
    for start in range(0, tiles, LANES):
        tile = start + tl.arange(0, LANES)
        first = tile * rows
        own = _pixels_before(first + rows, height, width) - _pixels_before(first, height, width)
        own = tl.where(tile < tiles, own, 0).to(tl.float32)
        at = partials + (picture * tiles + tile)[:, None] * (2 * C) + channel[None, :]
        mask = (tile < tiles)[:, None]
        own_mean = tl.load(at, mask=mask, other=0.0)
        own_square = tl.load(at + C, mask=mask, other=0.0)
        total = count + own
        share = own / tl.maximum(total, 1.0)
        difference = own_mean - mean
        mean += difference * share[:, None]
        square += own_square + difference * difference * (count * share)[:, None]
        count = total
    pixels = (height * width).to(tl.float32)
    whole = tl.sum(mean * count[:, None], 0) / pixels
    difference = mean - whole[None, :]
    variance = (tl.sum(square, 0) + tl.sum(difference * difference * count[:, None], 0)) / pixels
    to = out + picture * (2 * C) + channel
    tl.store(to, whole)
    tl.store(to + C, variance)


@triton.jit(do_not_specialize=["tiles", "height", "width", "tokens"])
def _normalize(
    x, statistics, shift, weight, bias, out, tiles, height, width, tokens, eps,
    C: tl.constexpr, GROUPS: tl.constexpr, ROWS: tl.constexpr,
    HAS_SHIFT: tl.constexpr, SILU: tl.constexpr, COMPACT: tl.constexpr,
):  # fmt: skip
    picture = (tl.program_id(0) // tiles).to(tl.int64)
    row = (tl.program_id(0) % tiles) * ROWS + tl.arange(0, ROWS)
    pitch = width + 1
    size = (height + 1) * pitch
    h, w = row // pitch, row % pitch
    inside = (h < height) & (w < width)
    channel = tl.arange(0, C)
    # A group's mean is that of its channels, its variance theirs and that of their means.
    members: tl.constexpr = C // GROUPS
    mean = tl.reshape(tl.load(statistics + picture * (2 * C) + channel), [GROUPS, members])
    variance = tl.reshape(tl.load(statistics + picture * (2 * C) + C + channel), [GROUPS, members])
    group_mean = tl.sum(mean, 1) / members
    difference = mean - group_mean[:, None]
    rstd = tl.rsqrt(tl.sum(variance + difference * difference, 1) / members + eps)
    center = tl.reshape(tl.broadcast_to(group_mean[:, None], [GROUPS, members]), [C])
    slope = tl.reshape(tl.broadcast_to(rstd[:, None], [GROUPS, members]), [C])
    slope *= tl.load(weight + channel).to(tl.float32)
    offset = tl.load(bias + channel).to(tl.float32)
    if HAS_SHIFT:
        center -= tl.load(shift + channel).to(tl.float32)

    at = (picture * size + row)[:, None] * C + channel[None, :]
    value = tl.load(x + at, mask=inside[:, None], other=0.0).to(tl.float32)
    value = (value - center[None, :]) * slope[None, :] + offset[None, :]
    if SILU:
        value = value / (1.0 + tl.exp(-value))
    value = tl.where(inside[:, None], value, 0.0).to(out.dtype.element_ty)
    if COMPACT:
        to = (picture * tokens + h * width + w)[:, None] * C + channel[None, :]
        tl.store(out + to, value, mask=inside[:, None])
    else:
        tl.store(out + at, value, mask=(row < size)[:, None])


@triton.jit(do_not_specialize=["tiles", "height", "width"])
def _enter(
    x, weight, bias, out, partials, tiles, height, width,
    picture_stride, channel_stride, line_stride, pixel_stride,
    C_IN: tl.constexpr, C_OUT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    blocks: tl.constexpr = C_OUT // COLUMNS
    column = (tl.program_id(0) % blocks) * COLUMNS + tl.arange(0, COLUMNS)
    tile = tl.program_id(0) // blocks % tiles
    picture = (tl.program_id(0) // blocks // tiles).to(tl.int64)
    dtype = out.dtype.element_ty
    row = tile * ROWS + tl.arange(0, ROWS)
    line, place = row // (width + 1), row % (width + 1)
    k = tl.arange(0, DEPTH)  # channel, r, s
    h = line[:, None] + (k % 9 // 3)[None, :] - 1
    w = place[:, None] + (k % 3)[None, :] - 1
    there = (h >= 0) & (h < height) & (w >= 0) & (w < width) & (k < 9 * C_IN)[None, :]
    from_pixel = picture * picture_stride + (k // 9)[None, :] * channel_stride + h * line_stride + w * pixel_stride
    a = tl.load(x + from_pixel, mask=there, other=0.0).to(dtype)
    b = tl.load(weight + column[None, :] * (9 * C_IN) + k[:, None], mask=(k < 9 * C_IN)[:, None], other=0.0)
    sums = tl.dot(a, b, input_precision=PRECISION) + tl.load(bias + column).to(tl.float32)[None, :]

    inside = (line < height) & (place < width)
    size = (height + 1) * (width + 1)
    rounded = tl.where(inside[:, None], sums, 0.0).to(dtype)
    at = (picture * size + row)[:, None] * C_OUT + column[None, :]
    tl.store(out + at, rounded, mask=(row < size)[:, None])
    x = rounded.to(tl.float32)
    count = _pixels_before(tile * ROWS + ROWS, height, width) - _pixels_before(tile * ROWS, height, width)
    mean = tl.sum(x, 0) / tl.maximum(count, 1)  # the border is zero
    deviation = tl.where(inside[:, None], x - mean[None, :], 0.0)
    to = partials + (picture * tiles + tile) * (2 * C_OUT) + column
    tl.store(to, mean)
    tl.store(to + C_OUT, tl.sum(deviation * deviation, 0))


@triton.jit(do_not_specialize=["columns", "used"])
def _softmax_rows(scores, out, columns, used, scale, WIDTH: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * columns
    column = tl.arange(0, WIDTH)
    value = tl.load(scores + at + column, mask=column < used, other=float("-inf")) * scale
    value = tl.exp(value - tl.max(value, 0))
    tl.store(out + at + column, (value / tl.sum(value, 0)).to(out.dtype.element_ty), mask=column < columns)
