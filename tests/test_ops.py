"""Each op against its formula, written out naively in float64; shapes that do not fit are refused."""

import math

import pytest
import torch
from conftest import relative_error

from stdit_fast import ops
from stdit_fast.ops.rms_norm import rms_norm
from stdit_fast.ops.temporal_attention import rotate

F64 = torch.float64


def randn(*shape, seed=0, dtype=F64, grad=False):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator, dtype=dtype).requires_grad_(grad)


@pytest.mark.parametrize("frames", [1, 5])
def test_layer_norm_modulate(frames):
    x, shift, scale = randn(2, 5, 3, 24), randn(2, frames, 24, seed=1), randn(2, frames, 24, seed=2)
    out = ops.layer_norm_modulate(x, shift, scale)
    for b in range(2):
        for t in range(5):
            for s in range(3):
                row, f = x[b, t, s], min(t, frames - 1)
                normed = (row - row.mean()) / math.sqrt(float(((row - row.mean()) ** 2).mean()) + 1e-6)
                torch.testing.assert_close(out[b, t, s], normed * (1 + scale[b, f]) + shift[b, f])


@pytest.mark.parametrize("frames", [1, 5])
def test_gate_residual(frames):
    x, o, gate = randn(2, 5, 3, 8), randn(2, 5, 3, 8, seed=1), randn(2, frames, 8, seed=2)
    want = torch.stack([x[:, t] + gate[:, min(t, frames - 1), None] * o[:, t] for t in range(5)], dim=1)
    torch.testing.assert_close(ops.gate_residual(x, o, gate), want)


def test_rms_norm():
    x, weight = randn(3, 7, 10), randn(10, seed=1)
    want = torch.empty_like(x)
    for i in range(3):
        for j in range(7):
            want[i, j] = x[i, j] / math.sqrt(float((x[i, j] ** 2).mean()) + 1e-6) * weight
    torch.testing.assert_close(rms_norm(x, weight), want)
    assert rms_norm(x, None) is x


def naive_attention(q, k, v):
    """q [N, D], k and v [M, D]: one softmax a row, by hand."""
    out = torch.empty(q.shape[0], v.shape[1], dtype=q.dtype)
    for i, row in enumerate(q):
        scores = torch.stack([(row * other).sum() for other in k]) / math.sqrt(q.shape[1])
        weights = (scores - scores.max()).exp()
        out[i] = (weights[:, None] * v).sum(0) / weights.sum()
    return out


@pytest.mark.parametrize("norm", [True, False])
def test_spatial_attention(norm):
    qkv = randn(2, 3, 5, 3, 2, 6)
    wq, wk = (randn(6, seed=1), randn(6, seed=2)) if norm else (None, None)
    out = ops.spatial_attention(qkv, wq, wk)
    assert out.shape == (2, 3, 5, 12)
    for b in range(2):
        for t in range(3):
            for h in range(2):
                q, k, v = qkv[b, t, :, :, h].unbind(1)
                want = naive_attention(rms_norm(q, wq), rms_norm(k, wk), v)
                torch.testing.assert_close(out[b, t, :, 6 * h : 6 * h + 6], want)


@pytest.mark.parametrize("rotate_first", [True, False])
@pytest.mark.parametrize("frames", [1, 4])
def test_temporal_attention(frames, rotate_first):
    qkv, wq, wk = randn(2, frames, 3, 3, 2, 6), randn(6, seed=1), randn(6, seed=2)
    freqs = torch.tensor([1.0, 0.3, 0.05], dtype=F64)
    out = ops.temporal_attention(qkv, wq, wk, ops.rotation_table(freqs, frames), rotate_first=rotate_first)

    def turned(x):  # [T, D]: pairs as complex numbers
        angle = torch.arange(frames, dtype=F64)[:, None] * freqs
        pairs = torch.view_as_complex(x.reshape(frames, 3, 2)) * torch.polar(torch.ones_like(angle), angle)
        return torch.view_as_real(pairs).reshape(frames, 6)

    for b in range(2):
        for s in range(3):
            for h in range(2):
                q, k, v = (part.contiguous() for part in qkv[b, :, s, :, h].unbind(1))
                if rotate_first:
                    q, k = rms_norm(turned(q), wq), rms_norm(turned(k), wk)
                else:
                    q, k = turned(rms_norm(q, wq)), turned(rms_norm(k, wk))
                torch.testing.assert_close(out[b, :, s, 6 * h : 6 * h + 6], naive_attention(q, k, v))


def test_one_frame_attends_to_its_own_value():
    qkv = randn(2, 1, 3, 3, 2, 6)
    out = ops.temporal_attention(qkv, randn(6), randn(6, seed=1), ops.rotation_table(torch.ones(3, dtype=F64), 1))
    torch.testing.assert_close(out, qkv[:, :, :, 2].flatten(3))


def test_rotation_keeps_the_norm_and_depends_on_distance_alone():
    q, k = randn(9, 6), randn(9, 6, seed=5)
    same_q, same_k = q[:1].expand(9, 6), k[:1].expand(9, 6)
    freqs = torch.tensor([1.0, 0.3, 0.05], dtype=F64)
    table = ops.rotation_table(freqs, 9)
    torch.testing.assert_close(rotate(q, table).norm(dim=1), q.norm(dim=1))
    products = rotate(same_q, table) @ rotate(same_k, table).T
    for distance in range(9):
        diagonal = products.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal))


def test_text_layout_packs_any_pattern():
    mask = torch.tensor([[1, 0, 1, 1], [0, 0, 0, 1], [1, 1, 1, 1]])
    layout = ops.text_layout(mask, 3, 4, torch.device("cpu"))
    assert layout.lengths == (3, 1, 4)
    assert layout.token_index.tolist() == [0, 2, 3, 7, 8, 9, 10, 11]
    assert layout.padded_mask.tolist() == [[True] * 3 + [False], [True] + [False] * 3, [True] * 4]
    assert [row[m].tolist() for row, m in zip(layout.padded_index, layout.padded_mask, strict=True)] == [
        [0, 1, 2], [3], [4, 5, 6, 7]]  # fmt: skip


def test_text_layout_refuses_an_empty_caption():
    with pytest.raises(ValueError, match=r"captions of samples \[1\] have no token"):
        ops.text_layout(torch.tensor([[1, 1], [0, 0]]), 2, 2, torch.device("cpu"))
    with pytest.raises(ValueError, match=r"mask has shape \[1, 2\], expected \[2, 2\]"):
        ops.text_layout(torch.ones(1, 2), 2, 2, torch.device("cpu"))


def test_cross_attention_sees_its_own_text_only():
    mask = torch.tensor([[1, 1, 0, 1, 0], [0, 1, 0, 0, 0], [1, 1, 1, 1, 1]])
    layout = ops.text_layout(mask, 3, 5, torch.device("cpu"))
    q, kv = randn(3, 4, 2, 6, grad=True), randn(9, 2, 2, 6, seed=1, grad=True)
    out = ops.cross_attention(q, kv, layout)
    start = 0
    for b, length in enumerate((3, 1, 5)):
        own = kv[start : start + length]
        start += length
        for h in range(2):
            want = naive_attention(q[b, :, h], own[:, 0, h], own[:, 1, h])
            torch.testing.assert_close(out[b, :, 6 * h : 6 * h + 6], want)
    (gradient,) = torch.autograd.grad(out[1].sum(), kv)
    assert gradient[3].norm() > 0 and gradient[:3].norm() == 0 and gradient[4:].norm() == 0


def test_mlp():
    x, w1, b1, w2, b2 = randn(2, 3, 5), randn(7, 5), randn(7), randn(5, 7), randn(5)
    hidden = x @ w1.T + b1
    gelu = 0.5 * hidden * (1 + torch.tanh(math.sqrt(2 / math.pi) * (hidden + 0.044715 * hidden**3)))
    torch.testing.assert_close(ops.mlp(x, w1, b1, w2, b2), gelu @ w2.T + b2)


@pytest.mark.parametrize("size", [(4, 6), (5, 3), (1, 1)])
def test_patch_embed(size):
    height, width = size
    rows, columns = -(-height // 2), -(-width // 2)
    x, weight, bias = randn(2, 4, 3, height, width), randn(6, 4, 1, 2, 2), randn(6)
    position = randn(1, rows * columns, 6)
    out = ops.patch_embed(x, weight, bias, position)
    assert out.shape == (2, 3, rows * columns, 6)
    padded = torch.zeros(2, 4, 3, 2 * rows, 2 * columns, dtype=F64)
    padded[..., :height, :width] = x
    for row in range(rows):
        for column in range(columns):
            patch = padded[:, :, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]  # [B, C, T, 2, 2]
            s = row * columns + column
            want = torch.einsum("bctij,kcij->btk", patch, weight[:, :, 0]) + bias + position[:, None, s]
            torch.testing.assert_close(out[:, :, s], want)


def test_gradients_of_the_definitions():
    """By finite differences, odd sizes."""
    check = torch.autograd.gradcheck
    x, o, mod = randn(1, 3, 2, 5, grad=True), randn(1, 3, 2, 5, seed=1, grad=True), randn(1, 3, 5, seed=2, grad=True)
    assert check(lambda x, m: ops.layer_norm_modulate(x, m, m), (x, mod))
    assert check(ops.gate_residual, (x, o, mod))
    qkv, w = randn(1, 3, 2, 3, 1, 4, grad=True), randn(4, seed=3, grad=True)
    assert check(ops.spatial_attention, (qkv, w, w))
    table = ops.rotation_table(torch.tensor([1.0, 0.1], dtype=F64), 3)
    for first in (True, False):
        assert check(lambda a, b, first=first: ops.temporal_attention(a, b, b, table, rotate_first=first), (qkv, w))
    layout = ops.text_layout(torch.tensor([[1, 0, 1], [0, 1, 0]]), 2, 3, torch.device("cpu"))
    q, kv = randn(2, 3, 1, 4, grad=True), randn(3, 2, 1, 4, grad=True)
    assert check(lambda q, kv: ops.cross_attention(q, kv, layout), (q, kv))


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: ops.layer_norm_modulate(randn(1, 2, 3, 4), randn(1, 3, 4), randn(1, 2, 4)), "shift has shape"),
        (lambda: ops.layer_norm_modulate(randn(0, 2, 3, 4), randn(0, 1, 4), randn(0, 1, 4)), "holds no element"),
        (lambda: ops.gate_residual(randn(1, 2, 3, 4), randn(1, 2, 4, 4), randn(1, 1, 4)), "o has shape"),
        (lambda: ops.spatial_attention(randn(1, 2, 3, 2, 1, 4), None, None), "qkv has shape"),
        (lambda: ops.temporal_attention(randn(1, 2, 3, 3, 1, 4), None, None, torch.ones(3)), "rotation has shape"),
        (lambda: ops.mlp(randn(2, 5), randn(7, 4), randn(7), randn(5, 7), randn(5)), "fc1_weight has shape"),
        (lambda: ops.patch_embed(randn(1, 4, 2, 4, 4), randn(6, 4, 1, 2, 2), randn(6), randn(1, 5, 6)), "position has"),
    ],
)
def test_bad_shapes_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_bfloat16_stays_bfloat16_and_close():
    qkv = randn(2, 5, 7, 3, 2, 8)
    w, table = randn(8, seed=1), ops.rotation_table(torch.tensor([1.0, 0.3, 0.1, 0.01]), 5)
    half = qkv.bfloat16()
    for op in (
        lambda a, b: ops.spatial_attention(a, b, b),
        lambda a, b: ops.temporal_attention(a, b, b, table),
    ):
        got = op(half, w.bfloat16())
        assert got.dtype == torch.bfloat16
        assert relative_error(got, op(half.double(), w.bfloat16().double())) < 2e-2


def test_backend_names(monkeypatch):
    from stdit_fast.errors import ConfigError
    from stdit_fast.ops import registry

    ops.check_backend("auto", ops.MODEL_OPS)
    ops.check_backend("reference", ops.MODEL_OPS)
    with pytest.raises(ConfigError, match="did you mean 'fused'"):
        ops.check_backend("fuse", ops.MODEL_OPS)
    served = {s.op: s for s in registry.serving()}
    assert set(ops.MODEL_OPS) <= set(served)
    if any(served[op].implementation == registry.REFERENCE for op in ops.MODEL_OPS):
        monkeypatch.setattr(registry, "interpreted", lambda: False)
        with pytest.raises(ConfigError, match="the fast path cannot be had here"):
            ops.check_backend("fused", ops.MODEL_OPS)


@pytest.mark.parametrize("masked", [False, True])
def test_more_sequences_than_a_library_takes(monkeypatch, masked):
    from stdit_fast.ops import library_attention as module

    q, k, v = (randn(7, 2, 3, 4, seed=i) for i in range(3))
    mask = torch.rand(7, 1, 1, 3, generator=torch.Generator().manual_seed(0)) < 0.6 if masked else None
    if masked:
        mask[..., 0] = True
    whole = module.library_attention(q, k, v, mask)
    monkeypatch.setattr(module, "MAX_PADDED_ELEMENTS", 3 * module.padded_elements(2, 3, 4))
    calls, real = [], torch.nn.functional.scaled_dot_product_attention
    count = lambda *part: calls.append(part[0].shape[0]) or real(*part)  # noqa: E731
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", count)
    torch.testing.assert_close(module.library_attention(q, k, v, mask), whole)
    assert calls == [3, 3, 1]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the limits are those of the GPU's libraries")
@pytest.mark.parametrize("shape", [(16384, 16, 1, 72), (40960, 16, 1, 72), (12288, 16, 16, 72), (64, 16, 256, 72)])
def test_many_short_sequences_on_a_gpu(shape):
    from stdit_fast.ops.library_attention import library_attention

    generator = torch.Generator("cuda").manual_seed(0)
    q, k, v, grad = (torch.randn(shape, device="cuda", dtype=torch.bfloat16, generator=generator) for _ in range(4))
    leaves = [x.requires_grad_(True) for x in (q, k, v)]
    got = [library_attention(q, k, v), *torch.autograd.grad(library_attention(q, k, v), leaves, grad)]
    rows = torch.tensor([0, shape[0] // 2, shape[0] - 1], device="cuda")
    few = [x.detach()[rows].double().requires_grad_(True) for x in leaves]
    scores = few[0] @ few[1].transpose(-1, -2) / 72**0.5
    out = scores.softmax(-1) @ few[2]
    want = [out, *torch.autograd.grad(out, few, grad[rows].double())]
    for mine, exact in zip(got, want, strict=True):
        assert relative_error(mine[rows], exact) < 1e-2 or exact.norm() < 1e-6
