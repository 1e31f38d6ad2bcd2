"""Fused attention over packed text against its definition: uneven captions, strided keys and values, split rows."""

import pytest
import torch
from kernel_checks import DEVICE, check, dtypes, randn

from stdit_fast import ops
from stdit_fast.errors import ConfigError
from stdit_fast.kernels import cross_attention as kernels
from stdit_fast.ops.cross_attention import _backward_op, _op


def text(*lengths: int) -> ops.TextLayout:
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return ops.text_layout(mask, len(lengths), max(lengths), torch.device(DEVICE))


def check_attention(inputs: dict, layout: ops.TextLayout, dtype: torch.dtype, arrange=lambda **inputs: inputs) -> None:
    """Fused against plain on arrange(**inputs): q and kv, perhaps as parts of other tensors."""

    def run(backend: str):
        return lambda **leaves: ops.cross_attention(**arrange(**leaves), layout=layout, backend=backend)

    check(run("fused"), run("reference"), inputs, dtype)


@dtypes
@pytest.mark.parametrize(
    "lengths, rows, heads, head_dim",
    [((1, 130, 3), 37, 2, 72), ((70,), 131, 1, 40), ((3, 64), 5, 3, 8), ((1,), 1, 1, 72), ((65, 2), 16, 2, 64)],
)
def test_against_definition(lengths, rows, heads, head_dim, dtype):
    inputs = {
        "q": randn(len(lengths), rows, heads, head_dim),
        "kv": randn(sum(lengths), 2, heads, head_dim, seed=1),
    }
    check_attention(inputs, text(*lengths), dtype)


@dtypes
def test_parts_of_wider_tensors(dtype):
    """kv of one block among those of all; q with its heads apart, and with rows apart."""
    layout = text(3, 40)
    inputs = {"q": randn(2, 2, 9, 3, 24), "kv": randn(43, 5, 2, 2, 24, seed=1)}
    check_attention(inputs, layout, dtype, lambda q, kv: {"q": q[0, :, :, :2], "kv": kv[:, 3]})
    inputs["q"] = randn(2, 2, 9, 24)
    check_attention(inputs, layout, dtype, lambda q, kv: {"q": q.transpose(1, 2), "kv": kv[:, 0]})
    inputs["kv"] = randn(2, 43, 2, 24)
    check_attention(inputs, layout, dtype, lambda q, kv: {"q": q.transpose(1, 2), "kv": kv.transpose(0, 1)})


@dtypes
@pytest.mark.parametrize("block, programs, splits", [(16, 9, (3, 3)), (16, 1000, (7, 1)), (64, 1, (1, 2))])
def test_rows_split_over_programs(monkeypatch, block, programs, splits, dtype):
    """Three splits of 3, 3 and 1 tiles; each tile alone; one split, without partial sums."""
    monkeypatch.setattr(kernels, "SPLIT_TILES", 1)
    for kernel in ("forward", "dq", "dkv"):
        monkeypatch.setitem(kernels.TUNING, kernel, {"BLOCK_M": block, "BLOCK_N": 16})
    kernels.TUNING["dkv"]["programs"] = programs
    taken, row_splits = [], kernels.row_splits
    monkeypatch.setattr(kernels, "row_splits", lambda *sizes: taken.append(row_splits(*sizes)) or taken[-1])
    check_attention({"q": randn(2, 105, 1, 24), "kv": randn(36, 2, 1, 24, seed=1)}, text(31, 5), dtype)
    assert set(taken) == {splits}


def test_splits_cover_all_rows_once():
    for rows in (1, 64, 65, 700, 2304, 57600):
        for others in (1, 32, 224, 5000):
            splits, tiles = kernels.row_splits(rows, others, 64, kernels.SPLIT_PROGRAMS)
            assert (splits - 1) * tiles * 64 < rows <= splits * tiles * 64
            assert splits == 1 or splits * others < 2 * kernels.SPLIT_PROGRAMS + others


def test_large_scores():
    """One key takes all: no overflow, and the other keys get no gradient."""
    layout = text(67)
    q, kv = randn(1, 4, 1, 16), randn(67, 2, 1, 16, seed=1)
    q[..., 0], kv[:, 0, :, 0] = 1e4, -100.0
    kv[66, 0, :, 0] = 100.0
    leaf = kv.clone().requires_grad_()
    out = ops.cross_attention(q, leaf, layout, backend="fused")
    torch.testing.assert_close(out, kv[66, 1].expand(1, 4, 16))
    out.sum().backward()
    assert float(leaf.grad[:66].abs().max()) == 0 and bool(leaf.grad.isfinite().all())


def test_gradient_without_strides():
    layout, q, kv = text(3, 2), randn(2, 5, 1, 16), randn(5, 2, 1, 16, seed=1)
    grads = []
    for backend in ("fused", "reference"):
        leaves = q.clone().requires_grad_(), kv.clone().requires_grad_()
        ops.cross_attention(*leaves, layout, backend=backend).sum().backward()  # the gradient is an expanded 1
        grads.append([leaf.grad for leaf in leaves])
    torch.testing.assert_close(*grads)


def test_registered_ops():
    layout, q, kv = text(3, 20), randn(2, 7, 2, 24), randn(23, 2, 2, 24, seed=1)
    leaves = q.requires_grad_(), kv.requires_grad_()
    torch.library.opcheck(_op, (*leaves, layout.starts, layout.max_length))
    o, lse = (out.detach() for out in _op(*leaves, layout.starts, layout.max_length))
    inputs = (randn(2, 7, 48, seed=2), q.detach(), kv.detach(), o, lse, layout.starts, layout.max_length)
    torch.library.opcheck(_backward_op, inputs)


def test_layout_counts():
    layout = ops.text_layout(torch.tensor([[0, 1, 1], [1, 0, 0]]), 2, 3, torch.device(DEVICE))
    assert (layout.lengths, layout.total, layout.max_length) == ((2, 1), 3, 2)
    assert layout.starts.dtype == torch.int32 and layout.starts.tolist() == [0, 2, 3]
    assert layout.padded_mask.dtype == torch.bool and layout.token_index.dtype == torch.int64


def test_refusals():
    layout, q, kv = text(3, 2), randn(2, 5, 1, 12), randn(5, 2, 1, 12)
    with pytest.raises(ConfigError, match="a size of 12, where a multiple of 8 is needed"):
        ops.cross_attention(q, kv, layout, backend="fused")
    with pytest.raises(ValueError, match="kv is torch.float64, expected q's torch.float32"):
        ops.cross_attention(q, kv.double(), layout)
    with pytest.raises(ValueError, match=r"kv has shape \[4, 2, 1, 12\], expected \[5, 2, 1, 12\]"):
        ops.cross_attention(q, kv[:4], layout)
