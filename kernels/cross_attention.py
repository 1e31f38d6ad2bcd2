"""Attention over packed text: three kernels and one small reduction.

A tile of video tokens (rows) of one head meets the sample's text (keys) in blocks; the loop ends with the sample's
own text, so padding costs nothing. Scores are kept to base 2: p = 2^(q k^T * SCALE * log2(e) - lse).

    forward   per (rows, head, sample): online softmax over the key blocks; writes o and lse.
    dq        per (rows, head, sample): p again from lse; delta = rowsum(do * o), which it also writes; dq = ds k.
    dkv       per (keys, head, split of the rows, sample): dv = p^T do and dk = ds^T q, summed over the split's rows.
    sum       adds the splits' partial dk and dv in order, so that repeated runs agree bit for bit.

In every grid the heads run fastest: neighbouring programs then read and write neighbouring parts of the same rows
of q and o, which lie as [N, H, D], while the text of a sample is small enough for the L2 cache to serve.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from stdit_fast.kernels.launch import launch
from stdit_fast.kernels.tiles import split

# Overrides for measurements, by kernel: {"forward" or "dq" or "dkv": {"BLOCK_M", "BLOCK_N", "num_warps",
# "num_stages", "maxnreg": int}}; "dkv" also takes "programs", about how many are wanted.
TUNING: dict[str, dict[str, int]] = {}

FEW_PROGRAMS = 264  # two a multiprocessor of an H100: below that, smaller tiles spread the work better
SPLIT_PROGRAMS = 528  # enough for the last round of programs to be a small part of the whole
SPLIT_TILES = 4  # a split of fewer tiles of rows is not worth its partial sums
SUM_BLOCK = 1024

LOG2E = tl.constexpr(1.4426950408889634)


def config(kernel: str, rows: int, head_dim: int, itemsize: int) -> dict[str, int]:
    """Tile sizes and launch options of one kernel.

    Args:
        kernel: "forward", "dq" or "dkv".
        rows: B*H*N, all rows of all heads.
        itemsize: bytes of an element; 4 means products without tensor cores, which want small tiles.
    """
    narrow = head_dim <= 80  # what registers hold without spills in the tiles below
    if itemsize == 4 or head_dim > 128:
        side = 32 if narrow else 16
        chosen = {"BLOCK_M": side, "BLOCK_N": side, "num_warps": 8, "num_stages": 1}
    elif kernel == "dkv":
        chosen = {"BLOCK_M": 64 if narrow else 32, "BLOCK_N": 64, "num_warps": 4, "num_stages": 2}
    elif rows < 128 * FEW_PROGRAMS:
        chosen = {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 4, "num_stages": 2}
    else:
        chosen = {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8, "num_stages": 2}
        if narrow:  # so that two such programs share a multiprocessor
            chosen["maxnreg"] = 128
    if kernel == "dkv":
        chosen["programs"] = SPLIT_PROGRAMS
    return chosen | TUNING.get(kernel, {})


def row_splits(rows: int, others: int, block: int, programs: int) -> tuple[int, int]:
    """Into how many parts the rows of a sample are split, and the tiles of each.

    Args:
        rows: N; block: rows of a tile.
        others: programs that there are for each split.
        programs: how many are wanted in all.
    """
    tiles = -(-rows // block)
    wanted = min(-(-programs // others), max(1, tiles // SPLIT_TILES))
    per_split = -(-tiles // wanted)
    return -(-tiles // per_split), per_split


# ---------------------------------------------------------------- launches


def forward(q: Tensor, kv: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
    """(o [B, N, H*D], lse [B, H, N] float32, to base 2); arguments as in the op."""
    q, kv = _rows_contiguous(q), _text_contiguous(kv)
    batch, rows, heads, _ = q.shape
    o = q.new_empty(batch, rows, heads * q.shape[3])
    lse = q.new_empty((batch, heads, rows), dtype=torch.float32)
    options = config("forward", lse.numel(), q.shape[3], q.itemsize)
    programs = batch * heads * -(-rows // options["BLOCK_M"])
    launch(
        _cross_attention_forward,
        programs,
        q,
        kv,
        starts,
        o,
        lse,
        q.stride(0),
        q.stride(1),
        kv.stride(0),
        rows,
        **_sizes(q),
        **options,
    )
    return o, lse


def backward(
    grad: Tensor, q: Tensor, kv: Tensor, o: Tensor, lse: Tensor, starts: Tensor, max_length: int
) -> tuple[Tensor, Tensor]:
    """(dq [B, N, H, D], dkv [M, 2, H, D]), both contiguous; grad and o are [B, N, H*D]."""
    q, kv, o = _rows_contiguous(q), _text_contiguous(kv), o.contiguous()
    grad = grad if grad.stride(2) == 1 else grad.contiguous()
    dq, delta = q.new_empty(q.shape), torch.empty_like(lse)
    _launch_dq(grad, q, kv, o, lse, starts, dq, delta)
    return dq, _launch_dkv(grad, q, kv, lse, delta, starts, max_length)


def _launch_dq(grad, q, kv, o, lse, starts, dq, delta) -> None:
    batch, rows, heads, _ = q.shape
    options = config("dq", lse.numel(), q.shape[3], q.itemsize)
    programs = batch * heads * -(-rows // options["BLOCK_M"])
    strides = (grad.stride(0), grad.stride(1), q.stride(0), q.stride(1), kv.stride(0))
    launch(
        _cross_attention_dq, programs, grad, q, kv, o, lse, starts, dq, delta, *strides, rows, **_sizes(q), **options
    )


def _launch_dkv(grad, q, kv, lse, delta, starts, max_length) -> Tensor:
    batch, rows, heads, _ = q.shape
    options = config("dkv", lse.numel(), q.shape[3], q.itemsize)
    key_blocks = -(-max_length // options["BLOCK_N"])
    # Programs beyond a sample's own text end at once; about half a block a sample is padding in the others.
    busy = heads * max(batch, kv.shape[0] // options["BLOCK_N"] + batch // 2)
    splits, tiles = row_splits(rows, busy, options["BLOCK_M"], options.pop("programs"))
    # Zeros, since kv may be padded to a fixed capacity, with rows that belong to no sample.
    dkv = torch.zeros(kv.shape, dtype=kv.dtype, device=kv.device)
    partial = dkv if splits == 1 else torch.zeros((splits, *kv.shape), dtype=torch.float32, device=kv.device)
    strides = (grad.stride(0), grad.stride(1), q.stride(0), q.stride(1), kv.stride(0))
    numbers = (rows, kv.shape[0], key_blocks, splits, tiles)
    programs = batch * heads * key_blocks * splits
    launch(
        _cross_attention_dkv,
        programs,
        grad,
        q,
        kv,
        lse,
        delta,
        starts,
        partial,
        *strides,
        *numbers,
        **_sizes(q),
        **options,
    )
    if splits > 1:
        launch(_cross_attention_sum, -(-dkv.numel() // SUM_BLOCK), partial, dkv, dkv.numel(), splits, BLOCK=SUM_BLOCK)
    return dkv


def _sizes(q: Tensor) -> dict:
    """What the kernels are compiled for: the shape of a head, the scale of its scores, the kind of product."""
    heads, head_dim = q.shape[2:]
    first, rest = split(head_dim)
    precision = "ieee" if q.dtype == torch.float32 else "tf32"  # tf32 is the name of the default; 16 bits ignore it
    return {
        "H": heads,
        "D": head_dim,
        "D1": first,
        "D2": rest,
        "SCALE": head_dim**-0.5,
        "PRECISION": precision,
    }


def _rows_contiguous(q: Tensor) -> Tensor:
    """q with its heads side by side in each row."""
    return q if q.stride(3) == 1 and q.stride(2) == q.shape[3] else q.contiguous()


def _text_contiguous(kv: Tensor) -> Tensor:
    """kv with keys and values of all heads side by side in each token; tokens may lie apart."""
    _, _, heads, head_dim = kv.shape
    return kv if kv.stride()[1:] == (heads * head_dim, head_dim, 1) else kv.contiguous()


# ---------------------------------------------------------------- kernels


@triton.jit
def _load(base, stride, rows, inside, FIRST: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr):
    """Columns FIRST to FIRST + WIDTH of some rows, 0 where a row is not inside or a column beyond D."""
    columns = FIRST + tl.arange(0, WIDTH)
    mask = inside[:, None]
    if FIRST + WIDTH > D:
        mask = mask & (columns < D)[None, :]
    return tl.load(base + rows[:, None] * stride + columns[None, :], mask=mask, other=0.0)


@triton.jit
def _store(base, stride, rows, inside, values, FIRST: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr):
    columns = FIRST + tl.arange(0, WIDTH)
    mask = inside[:, None]
    if FIRST + WIDTH > D:
        mask = mask & (columns < D)[None, :]
    tl.store(base + rows[:, None] * stride + columns[None, :], values.to(base.dtype.element_ty), mask=mask)


@triton.jit
def _over_d(a1, a2, b1, b2, D2: tl.constexpr, PRECISION: tl.constexpr):
    """a b^T over the channels of a head, held in two parts."""
    product = tl.dot(a1, tl.trans(b1), input_precision=PRECISION)
    if D2 > 0:
        product = tl.dot(a2, tl.trans(b2), product, input_precision=PRECISION)
    return product


@triton.jit
def _place(N, H: tl.constexpr, BLOCK_M: tl.constexpr):
    """(sample, head, first row) of a program that owns a tile of rows, int64 but the head."""
    program = tl.program_id(0)
    tiles = tl.cdiv(N, BLOCK_M)
    head = program % H
    tile = program // H % tiles
    sample = program // H // tiles
    return sample.to(tl.int64), head, tile.to(tl.int64) * BLOCK_M


@triton.jit
def _text(starts_ptr, sample):
    """(first token, int64, and number of tokens) of a sample's text."""
    start = tl.load(starts_ptr + sample)
    return start.to(tl.int64), tl.load(starts_ptr + sample + 1) - start


@triton.jit(do_not_specialize=["N"])
def _cross_attention_forward(
    q_ptr, kv_ptr, starts_ptr, o_ptr, lse_ptr, q_sample, q_row, kv_token, N,
    H: tl.constexpr, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, SCALE: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    sample, head, first_row = _place(N, H, BLOCK_M)
    rows = tl.arange(0, BLOCK_M)
    rows_inside = first_row + rows < N
    q_base = q_ptr + sample * q_sample + first_row * q_row + head * D
    q1 = _load(q_base, q_row, rows, rows_inside, 0, D1, D)
    q2 = q1
    if D2 > 0:
        q2 = _load(q_base, q_row, rows, rows_inside, D1, D2, D)

    start, length = _text(starts_ptr, sample)
    k_base = kv_ptr + head * D
    keys = tl.arange(0, BLOCK_N)
    highest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc1 = tl.zeros([BLOCK_M, D1], tl.float32)
    if D2 > 0:
        acc2 = tl.zeros([BLOCK_M, D2], tl.float32)
    for first_key in range(0, length, BLOCK_N):
        inside = keys < length - first_key
        k_block = k_base + (start + first_key) * kv_token
        k1 = _load(k_block, kv_token, keys, inside, 0, D1, D)
        k2 = k1
        if D2 > 0:
            k2 = _load(k_block, kv_token, keys, inside, D1, D2, D)
        scores = _over_d(q1, q2, k1, k2, D2, PRECISION)
        scores = tl.where(inside[None, :], scores, float("-inf"))
        higher = tl.maximum(highest, tl.max(scores, 1) * (SCALE * LOG2E))
        p = tl.exp2(scores * (SCALE * LOG2E) - higher[:, None])
        shrink = tl.exp2(highest - higher)
        highest = higher
        total = total * shrink + tl.sum(p, 1)
        v_block = k_block + H * D
        v1 = _load(v_block, kv_token, keys, inside, 0, D1, D)
        p = p.to(v1.dtype)
        acc1 = tl.dot(p, v1, acc1 * shrink[:, None], input_precision=PRECISION)
        if D2 > 0:
            v2 = _load(v_block, kv_token, keys, inside, D1, D2, D)
            acc2 = tl.dot(p, v2, acc2 * shrink[:, None], input_precision=PRECISION)

    o_base = o_ptr + (sample * N + first_row) * (H * D) + head * D
    _store(o_base, H * D, rows, rows_inside, acc1 / total[:, None], 0, D1, D)
    if D2 > 0:
        _store(o_base, H * D, rows, rows_inside, acc2 / total[:, None], D1, D2, D)
    lse_base = lse_ptr + (sample * H + head) * N + first_row
    tl.store(lse_base + rows, highest + tl.log2(total), mask=rows_inside)


@triton.jit(do_not_specialize=["N"])
def _cross_attention_dq(
    do_ptr, q_ptr, kv_ptr, o_ptr, lse_ptr, starts_ptr, dq_ptr, delta_ptr,
    do_sample, do_row, q_sample, q_row, kv_token, N,
    H: tl.constexpr, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, SCALE: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    sample, head, first_row = _place(N, H, BLOCK_M)
    rows = tl.arange(0, BLOCK_M)
    rows_inside = first_row + rows < N
    q_base = q_ptr + sample * q_sample + first_row * q_row + head * D
    do_base = do_ptr + sample * do_sample + first_row * do_row + head * D
    o_offset = (sample * N + first_row) * (H * D) + head * D  # dq lies like o
    q1 = _load(q_base, q_row, rows, rows_inside, 0, D1, D)
    do1 = _load(do_base, do_row, rows, rows_inside, 0, D1, D)
    o1 = _load(o_ptr + o_offset, H * D, rows, rows_inside, 0, D1, D)
    delta = tl.sum(do1.to(tl.float32) * o1.to(tl.float32), 1)
    q2, do2 = q1, do1
    if D2 > 0:
        q2 = _load(q_base, q_row, rows, rows_inside, D1, D2, D)
        do2 = _load(do_base, do_row, rows, rows_inside, D1, D2, D)
        o2 = _load(o_ptr + o_offset, H * D, rows, rows_inside, D1, D2, D)
        delta += tl.sum(do2.to(tl.float32) * o2.to(tl.float32), 1)
    row_offset = (sample * H + head) * N + first_row
    lse = tl.load(lse_ptr + row_offset + rows, mask=rows_inside, other=0.0)
    tl.store(delta_ptr + row_offset + rows, delta, mask=rows_inside)

    start, length = _text(starts_ptr, sample)
    k_base = kv_ptr + head * D
    keys = tl.arange(0, BLOCK_N)
    dq1 = tl.zeros([BLOCK_M, D1], tl.float32)
    if D2 > 0:
        dq2 = tl.zeros([BLOCK_M, D2], tl.float32)
    for first_key in range(0, length, BLOCK_N):
        inside = keys < length - first_key
        k_block = k_base + (start + first_key) * kv_token
        v_block = k_block + H * D
        k1 = _load(k_block, kv_token, keys, inside, 0, D1, D)
        v1 = _load(v_block, kv_token, keys, inside, 0, D1, D)
        k2, v2 = k1, v1
        if D2 > 0:
            k2 = _load(k_block, kv_token, keys, inside, D1, D2, D)
            v2 = _load(v_block, kv_token, keys, inside, D1, D2, D)
        scores = _over_d(q1, q2, k1, k2, D2, PRECISION)
        # Keys beyond the sample are zeros, so whatever p they get adds nothing; it must be finite all the same.
        p = tl.where(inside[None, :], tl.exp2(scores * (SCALE * LOG2E) - lse[:, None]), 0.0)
        dp = _over_d(do1, do2, v1, v2, D2, PRECISION)
        ds = (p * (dp - delta[:, None])).to(k1.dtype)
        dq1 = tl.dot(ds, k1, dq1, input_precision=PRECISION)
        if D2 > 0:
            dq2 = tl.dot(ds, k2, dq2, input_precision=PRECISION)

    _store(dq_ptr + o_offset, H * D, rows, rows_inside, dq1 * SCALE, 0, D1, D)
    if D2 > 0:
        _store(dq_ptr + o_offset, H * D, rows, rows_inside, dq2 * SCALE, D1, D2, D)


@triton.jit(do_not_specialize=["N", "M", "key_blocks", "splits", "tiles_per_split"])
def _cross_attention_dkv(
    do_ptr, q_ptr, kv_ptr, lse_ptr, delta_ptr, starts_ptr, partial_ptr,
    do_sample, do_row, q_sample, q_row, kv_token, N, M, key_blocks, splits, tiles_per_split,
    H: tl.constexpr, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, SCALE: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    # Heads, then key blocks: programs that run together read the same rows.
    program = tl.program_id(0)
    head = program % H
    first_key = program // H % key_blocks * BLOCK_N
    part = program // H // key_blocks % splits
    sample = (program // H // key_blocks // splits).to(tl.int64)
    start, length = _text(starts_ptr, sample)
    if first_key >= length:
        return

    keys = tl.arange(0, BLOCK_N)
    keys_inside = keys < length - first_key
    token = start + first_key
    k_base = kv_ptr + token * kv_token + head * D
    v_base = k_base + H * D
    k1 = _load(k_base, kv_token, keys, keys_inside, 0, D1, D)
    v1 = _load(v_base, kv_token, keys, keys_inside, 0, D1, D)
    k2, v2 = k1, v1
    dk1 = tl.zeros([BLOCK_N, D1], tl.float32)
    dv1 = tl.zeros([BLOCK_N, D1], tl.float32)
    if D2 > 0:
        k2 = _load(k_base, kv_token, keys, keys_inside, D1, D2, D)
        v2 = _load(v_base, kv_token, keys, keys_inside, D1, D2, D)
        dk2 = tl.zeros([BLOCK_N, D2], tl.float32)
        dv2 = tl.zeros([BLOCK_N, D2], tl.float32)

    rows = tl.arange(0, BLOCK_M)
    q_base = q_ptr + sample * q_sample + head * D
    do_base = do_ptr + sample * do_sample + head * D
    row_offset = (sample * H + head) * N
    first_tile = part * tiles_per_split
    first_row = first_tile.to(tl.int64) * BLOCK_M
    for _ in range(first_tile, tl.minimum(first_tile + tiles_per_split, tl.cdiv(N, BLOCK_M))):
        # Rows beyond N are zeros with lse = delta = 0: p = 1 meets do = 0, and ds is 0.
        inside = first_row + rows < N
        q_tile, do_tile = q_base + first_row * q_row, do_base + first_row * do_row
        q1 = _load(q_tile, q_row, rows, inside, 0, D1, D)
        do1 = _load(do_tile, do_row, rows, inside, 0, D1, D)
        q2, do2 = q1, do1
        if D2 > 0:
            q2 = _load(q_tile, q_row, rows, inside, D1, D2, D)
            do2 = _load(do_tile, do_row, rows, inside, D1, D2, D)
        lse = tl.load(lse_ptr + row_offset + first_row + rows, mask=inside, other=0.0)
        delta = tl.load(delta_ptr + row_offset + first_row + rows, mask=inside, other=0.0)
        scores = _over_d(k1, k2, q1, q2, D2, PRECISION)  # [keys, rows]
        p = tl.exp2(scores * (SCALE * LOG2E) - lse[None, :])
        dp = _over_d(v1, v2, do1, do2, D2, PRECISION)
        ds = (p * (dp - delta[None, :])).to(q1.dtype)
        p = p.to(q1.dtype)
        dv1 = tl.dot(p, do1, dv1, input_precision=PRECISION)
        dk1 = tl.dot(ds, q1, dk1, input_precision=PRECISION)
        if D2 > 0:
            dv2 = tl.dot(p, do2, dv2, input_precision=PRECISION)
            dk2 = tl.dot(ds, q2, dk2, input_precision=PRECISION)
        first_row += BLOCK_M

    dk_base = partial_ptr + (part.to(tl.int64) * M + token) * (2 * H * D) + head * D
    _store(dk_base, 2 * H * D, keys, keys_inside, dk1 * SCALE, 0, D1, D)
    _store(dk_base + H * D, 2 * H * D, keys, keys_inside, dv1, 0, D1, D)
    if D2 > 0:
        _store(dk_base, 2 * H * D, keys, keys_inside, dk2 * SCALE, D1, D2, D)
        _store(dk_base + H * D, 2 * H * D, keys, keys_inside, dv2, D1, D2, D)


@triton.jit(do_not_specialize=["splits"])
def _cross_attention_sum(partial_ptr, out_ptr, size, splits, BLOCK: tl.constexpr):
    """out[i] = sum over the splits of partial[split, i], in order, rounded once."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    total = tl.zeros([BLOCK], tl.float32)
    for _ in range(splits):
        total += tl.load(partial_ptr + at, mask=inside, other=0.0)
        partial_ptr += size
    tl.store(out_ptr + at, total.to(out_ptr.dtype.element_ty), mask=inside)
