"""Patches to tokens in one pass, and the gradients of its weight and bias in another.

A patch holds K = C_in*p*q values (16 in this model), far fewer than the C channels of its token, so both kernels are
bound by the memory that the tokens take.

    forward    per tile of tokens: gathers their patches once, then walks over the channels in blocks: a product
               with that part of the weight, plus bias and position, one store.
    gradient   per (block of channels, split of the tokens): the sums of grad^T patches and of grad over the split;
               the splits are added afterwards in order, so that repeated runs agree bit for bit.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from stdit_fast.kernels.tiles import DOT_MINIMUM

# Overrides for measurements, by kernel: {"forward" or "gradient": {"BLOCK_M", "BLOCK_C", "num_warps", "num_stages":
# int}}; "gradient" also takes "programs", about how many are wanted.
TUNING: dict[str, dict[str, int]] = {}

SPLIT_PROGRAMS = 528  # four a multiprocessor of an H100
WEIGHT_TILE = 16384  # elements of the weight that one program holds at a time


def config(kernel: str, patch: int) -> dict[str, int]:
    """Tile sizes and launch options of "forward" or "gradient"; `patch`: values of a patch, padded."""
    channels = max(DOT_MINIMUM, min(128, WEIGHT_TILE // patch))
    if kernel == "forward":
        chosen = {"BLOCK_M": 32, "BLOCK_C": channels, "num_warps": 4, "num_stages": 2}
    else:
        chosen = {"BLOCK_M": 64, "BLOCK_C": channels, "num_warps": 4, "num_stages": 3, "programs": SPLIT_PROGRAMS}
    return chosen | TUNING.get(kernel, {})


# ---------------------------------------------------------------- launches


def forward(x: Tensor, weight: Tensor, bias: Tensor, position: Tensor) -> Tensor:
    """[B, T, S, C]; arguments as in the op."""
    batch, frames = x.shape[0], x.shape[2]
    channels, _, _, p, q = weight.shape
    image, sizes = _image(x, p, q)
    per_frame = image[-2] * image[-1]
    out = x.new_empty(batch, frames, per_frame, channels)
    position = position if position.stride(2) == 1 else position.contiguous()
    position_strides = (0 if position.shape[0] == 1 else position.stride(0), position.stride(1))
    tokens = batch * frames * per_frame
    options = config("forward", sizes["PATCH"])
    grid = (-(-tokens // options["BLOCK_M"]),)
    pointers = (x, weight.contiguous(), bias.contiguous(), position, out)
    _patch_embed_forward[grid](*pointers, *position_strides, *image, tokens, C=channels, **sizes, **options)
    return out


def gradient(grad: Tensor, x: Tensor, p: int, q: int) -> tuple[Tensor, Tensor]:
    """Gradients of weight, [C, C_in, 1, p, q], and bias, [C], in x's dtype, for grad [B, T, S, C]."""
    grad = grad.contiguous()
    channels, tokens = grad.shape[3], grad.shape[:3].numel()
    image, sizes = _image(x, p, q)
    options = config("gradient", sizes["PATCH"])
    blocks, tiles = -(-channels // options["BLOCK_C"]), -(-tokens // options["BLOCK_M"])
    per_split = -(-tiles // max(1, options.pop("programs") // blocks))
    splits = -(-tiles // per_split)
    weight = x.new_empty((splits, channels, sizes["K"]), dtype=torch.float32)
    bias = x.new_empty((splits, channels), dtype=torch.float32)
    _patch_embed_gradient[(blocks * splits,)](
        grad, x, weight, bias, *image, tokens, per_split, C=channels, **sizes, **options
    )
    d_weight = weight.sum(0).to(x.dtype).view(channels, x.shape[1], 1, p, q)
    return d_weight, bias.sum(0).to(x.dtype)


def _image(x: Tensor, p: int, q: int) -> tuple[tuple[int, ...], dict[str, int]]:
    """(Strides and sizes of x, the last two in patches; what the kernels are compiled for)."""
    values = x.shape[1] * p * q
    patch = max(DOT_MINIMUM, triton.next_power_of_2(values))
    precision = "ieee" if x.dtype == torch.float32 else "tf32"  # tf32 is the name of the default; 16 bits ignore it
    numbers = (*x.stride(), *x.shape[2:], -(-x.shape[3] // p), -(-x.shape[4] // q))
    return numbers, {"K": values, "PATCH": patch, "P": p, "Q": q, "PRECISION": precision}


# ---------------------------------------------------------------- kernels

# Strides and sizes of the latents differ from bucket to bucket, and nothing is gained from a kernel for each.
_PLAIN = (
    "x_sample", "x_channel", "x_frame", "x_row", "x_column", "T", "H", "W", "rows", "columns", "tokens",
    "tiles_per_split",
)  # fmt: skip


@triton.jit
def _patches(
    x_ptr, x_sample, x_channel, x_frame, x_row, x_column, T, H, W, rows, columns, token, inside,
    K: tl.constexpr, PATCH: tl.constexpr, P: tl.constexpr, Q: tl.constexpr,
):  # fmt: skip
    """The patches of some tokens, [tokens, PATCH] in the order of the weight, 0 beyond the picture and beyond K."""
    row = token // columns % rows
    frame = token // columns // rows
    base = (frame // T).to(tl.int64) * x_sample + (frame % T).to(tl.int64) * x_frame
    value = tl.arange(0, PATCH)
    y = (row * P)[:, None] + (value // Q % P)[None, :]
    x = (token % columns * Q)[:, None] + (value % Q)[None, :]
    at = base[:, None] + (value // (P * Q)).to(tl.int64)[None, :] * x_channel
    at += y.to(tl.int64) * x_row + x.to(tl.int64) * x_column
    mask = inside[:, None] & (value < K)[None, :] & (y < H) & (x < W)
    return tl.load(x_ptr + at, mask=mask, other=0.0)


@triton.jit(do_not_specialize=_PLAIN)
def _patch_embed_forward(
    x_ptr, weight_ptr, bias_ptr, position_ptr, out_ptr, position_sample, position_row,
    x_sample, x_channel, x_frame, x_row, x_column, T, H, W, rows, columns, tokens,
    C: tl.constexpr, K: tl.constexpr, PATCH: tl.constexpr, P: tl.constexpr, Q: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0) * BLOCK_M
    token = first + tl.arange(0, BLOCK_M)
    inside = token < tokens
    patches = _patches(
        x_ptr, x_sample, x_channel, x_frame, x_row, x_column, T, H, W, rows, columns, token, inside, K, PATCH, P, Q
    )
    per_frame = rows * columns
    sample = token // per_frame // T
    position_at = sample.to(tl.int64) * position_sample + (token % per_frame).to(tl.int64) * position_row
    out_ptr += first.to(tl.int64) * C
    out_at = tl.arange(0, BLOCK_M) * C
    value = tl.arange(0, PATCH)
    for first_channel in range(0, C, BLOCK_C):
        channel = first_channel + tl.arange(0, BLOCK_C)
        real = channel < C
        mask = inside[:, None] & real[None, :]
        weight_mask = (value < K)[:, None] & real[None, :]
        weight = tl.load(weight_ptr + channel[None, :] * K + value[:, None], mask=weight_mask, other=0.0)
        bias = tl.load(bias_ptr + channel, mask=real, other=0.0).to(tl.float32)
        position = tl.load(position_ptr + position_at[:, None] + channel[None, :], mask=mask, other=0.0)
        sums = tl.dot(patches, weight, input_precision=PRECISION) + bias[None, :] + position.to(tl.float32)
        tl.store(out_ptr + out_at[:, None] + channel[None, :], sums.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=_PLAIN)
def _patch_embed_gradient(
    grad_ptr, x_ptr, weight_ptr, bias_ptr,
    x_sample, x_channel, x_frame, x_row, x_column, T, H, W, rows, columns, tokens, tiles_per_split,
    C: tl.constexpr, K: tl.constexpr, PATCH: tl.constexpr, P: tl.constexpr, Q: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    # Channels fastest: programs that run together read the same rows of grad.
    blocks: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    split = tl.program_id(0) // blocks
    channel = tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    real = channel < C
    weight = tl.zeros([BLOCK_C, PATCH], tl.float32)
    bias = tl.zeros([BLOCK_C], tl.float32)
    token = split * tiles_per_split * BLOCK_M + tl.arange(0, BLOCK_M)
    for _ in range(tiles_per_split):
        inside = token < tokens
        mask = inside[:, None] & real[None, :]
        grad = tl.load(grad_ptr + token.to(tl.int64)[:, None] * C + channel[None, :], mask=mask, other=0.0)
        patches = _patches(
            x_ptr, x_sample, x_channel, x_frame, x_row, x_column, T, H, W, rows, columns, token, inside, K, PATCH, P, Q
        )
        weight = tl.dot(tl.trans(grad), patches, weight, input_precision=PRECISION)
        bias += tl.sum(grad.to(tl.float32), 0)
        token += BLOCK_M

    value = tl.arange(0, PATCH)
    weight_at = (split * C + channel).to(tl.int64)[:, None] * K + value[None, :]
    tl.store(weight_ptr + weight_at, weight, mask=real[:, None] & (value < K)[None, :])
    tl.store(bias_ptr + split * C + channel, bias, mask=real)
