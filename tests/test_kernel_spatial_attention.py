"""QK-norm around a library's attention: spatial attention, and temporal attention of long clips."""

import importlib

import pytest
import torch
from kernel_checks import DEVICE, check, dtypes, randn, relative_error
from torch import Tensor

from stdit_fast import ops
from stdit_fast.kernels import qk_norm
from stdit_fast.kernels.tiles import interpreted
from stdit_fast.ops import cuda_attention, library_attention, registry, temporal_attention_long
from stdit_fast.ops.rms_norm import rms_norm

spatial_attention = importlib.import_module("stdit_fast.ops.spatial_attention")  # the module, not the function

EPS = 1e-6
pytestmark = pytest.mark.skipif(DEVICE == "cpu" and not interpreted(), reason="needs a GPU or Triton's interpreter")
on_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="the libraries need a GPU")


def spatial(qkv, q_weight, k_weight):
    return ops.spatial_attention(qkv, q_weight, k_weight, EPS, backend="fused")


def spatial_plain(qkv, q_weight, k_weight):
    return ops.spatial_attention(qkv, q_weight, k_weight, EPS, backend="reference")


def angles(frames: int, head_dim: int) -> Tensor:
    """[T, 2, D/2] float32: no input, but a table that is the same in all dtypes."""
    angle = torch.arange(frames)[:, None] * 10000 ** -(torch.arange(head_dim // 2) / (head_dim // 2))
    return torch.stack((angle.cos(), angle.sin()), 1).to(DEVICE)


def temporal(qkv, q_weight, k_weight, rotate_first):
    table = angles(qkv.shape[1], qkv.shape[-1])
    return temporal_attention_long.temporal_attention_long(qkv, q_weight, k_weight, table, rotate_first, EPS)


def temporal_plain(qkv, q_weight, k_weight, rotate_first):
    wide = torch.promote_types(qkv.dtype, torch.float32)
    cos, sin = angles(qkv.shape[1], qkv.shape[-1]).to(wide).unbind(1)  # each [T, D/2]

    def turned(x: Tensor) -> Tensor:
        even, odd = x.to(wide)[..., 0::2], x.to(wide)[..., 1::2]
        return torch.stack((even * cos - odd * sin, odd * cos + even * sin), -1).flatten(-2).to(x.dtype)

    def made(x: Tensor, weight: Tensor | None) -> Tensor:
        return rms_norm(turned(x), weight, EPS) if rotate_first else turned(rms_norm(x, weight, EPS))

    q, k, v = qkv.permute(3, 0, 2, 4, 1, 5).unbind(0)  # each [B, S, H, T, D]
    q, k = made(q, q_weight), made(k, k_weight)
    o = library_attention.library_attention(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1))
    return o.unflatten(0, q.shape[:2]).permute(0, 3, 1, 2, 4).flatten(3)


def weights(head_dim: int) -> dict[str, Tensor]:
    return {"q_weight": 1 + 0.3 * randn(head_dim, seed=1), "k_weight": 1 + 0.3 * randn(head_dim, seed=2)}


@dtypes
@pytest.mark.parametrize(
    "shape", [(2, 2, 1, 2, 72), (1, 2, 5, 1, 72), (2, 1, 17, 3, 72), (1, 1, 5, 3, 24), (1, 2, 17, 1, 8)]
)
def test_spatial(dtype, shape):
    batch, frames, positions, heads, head_dim = shape
    qkv = randn(batch, frames, positions, 3, heads, head_dim)
    check(spatial, spatial_plain, {"qkv": qkv, **weights(head_dim)}, dtype)


@dtypes
@pytest.mark.parametrize("given", [set(), {"q_weight"}, {"k_weight"}], ids=["none", "q", "k"])
def test_spatial_without_norm(dtype, given):
    chosen = {name: weight if name in given else None for name, weight in weights(40).items()}
    check(spatial, spatial_plain, {"qkv": randn(1, 2, 5, 3, 2, 40), **chosen}, dtype)


@dtypes
@pytest.mark.parametrize("shape", [(2, 5, 3, 2, 72), (1, 9, 2, 3, 24), (1, 1, 2, 1, 40)])
@pytest.mark.parametrize("rotate_first", [False, True])
def test_temporal(dtype, shape, rotate_first):
    batch, frames, positions, heads, head_dim = shape
    inputs = {
        "qkv": randn(batch, frames, positions, 3, heads, head_dim),
        **weights(head_dim),
        "rotate_first": rotate_first,
    }
    check(temporal, temporal_plain, inputs, dtype)


@dtypes
@pytest.mark.parametrize("given", [set(), {"q_weight"}], ids=["none", "q"])
def test_temporal_without_norm(dtype, given):
    chosen = {name: weight if name in given else None for name, weight in weights(40).items()}
    inputs = {"qkv": randn(1, 5, 2, 3, 2, 40), **chosen, "rotate_first": bool(given)}
    check(temporal, temporal_plain, inputs, dtype)


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.transpose(0, 1),
        lambda x: x.transpose(1, 2),
        lambda x: x[:, :, 1:],
        lambda x: x[..., :8],
        lambda x: x[..., 1:9],
        lambda x: x.transpose(4, 5),
    ],
    ids=["samples", "positions", "cut", "channels", "unaligned", "across"],
)
def test_views(view):
    """What is read where it lies, and what has to be copied first: the same bits as from a dense copy."""
    here = view(randn(2, 3, 4, 3, 16, 16))
    w = weights(here.shape[-1])
    for fused, more in ((spatial, {}), (temporal, {"rotate_first": False})):
        out, *grads = outcome(fused, here, w, more)
        assert out.is_contiguous()
        for got, want in zip((out, *grads), outcome(fused, here.contiguous(), w, more), strict=True):
            assert torch.equal(got, want)


def outcome(fused, qkv: Tensor, w: dict[str, Tensor], more: dict) -> list[Tensor]:
    """Output and gradients of qkv and both weights, for a fixed gradient of the output."""
    leaves = [x.detach().requires_grad_() for x in (qkv, *w.values())]
    out = fused(*leaves, **more)
    return [out.detach(), *torch.autograd.grad(out, leaves, randn(*out.shape, seed=9))]


@pytest.mark.parametrize("fused", [spatial, temporal])
def test_gradients_of_any_strides(fused):
    """Of the output: expanded, as of a sum, and transposed."""
    more = {} if fused is spatial else {"rotate_first": False}
    qkv = randn(2, 3, 3, 3, 2, 8).requires_grad_()
    for grad in (torch.ones((), device=DEVICE).expand(2, 3, 3, 16), randn(2, 3, 16, 3).transpose(2, 3)):
        got = torch.autograd.grad(fused(qkv, **weights(8), **more), qkv, grad)[0]
        want = torch.autograd.grad(fused(qkv, **weights(8), **more), qkv, grad.contiguous())[0]
        assert torch.equal(got, want)


def test_weights_of_another_dtype():
    inputs = {"qkv": randn(1, 2, 3, 3, 2, 8, dtype=torch.float16).requires_grad_(), **weights(8)}
    for name in ("q_weight", "k_weight"):
        inputs[name].requires_grad_()
    out = spatial(**inputs)
    out.sum().backward()
    assert out.dtype == inputs["qkv"].grad.dtype == torch.float16
    assert inputs["q_weight"].grad.dtype == inputs["k_weight"].grad.dtype == torch.float32


def test_many_tiles(monkeypatch):
    """Programs that walk over several tiles, and a last tile that is not full."""
    arguments = spatial, randn(1, 3, 3, 3, 3, 8), weights(8), {}
    whole = outcome(*arguments)
    monkeypatch.setattr(qk_norm, "TUNING", {"backward_programs": 2, "backward_values": 64, "forward_values": 64})
    assert qk_norm._plan("backward", 3, 8).tokens == 2
    for got, want in zip(outcome(*arguments), whole, strict=True):
        torch.testing.assert_close(got, want)


def test_what_is_kept_for_the_backward_pass():
    kept = []
    qkv = randn(1, 2, 3, 3, 2, 8).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        spatial(qkv, **weights(8))
    assert sum(x.numel() for x in kept) == qkv.numel() + 2 * 8 + qkv.numel() // 3 + 2 * 2 * 3


def test_registered_ops():
    check_op = lambda op, *args: torch.library.opcheck(op, args)  # noqa: E731
    for positions, normed in ((3, True), (3, False), (1, True)):
        qkv = randn(2, 2, positions, 3, 2, 8).requires_grad_()
        w = [x.requires_grad_() for x in weights(8).values()] if normed else [None, None]
        check_op(spatial_attention._op, qkv, *w, EPS)
        with torch.no_grad():
            o, lse = spatial_attention._op(qkv, *w, EPS)
            check_op(spatial_attention._backward_op, randn(*o.shape, seed=3), qkv.detach(), *w, o, lse, EPS)
        qkv = randn(2, positions, 2, 3, 2, 8).requires_grad_()
        table = angles(positions, 8)
        op, backward_op = temporal_attention_long._op, temporal_attention_long._backward_op
        bias = randn(3 * 2 * 8, seed=4).requires_grad_() if normed else None
        check_op(op, qkv, *w, table, False, EPS, bias)
        with torch.no_grad():
            o, lse = op(qkv, *w, table, True, EPS, bias)
            check_op(backward_op, randn(*o.shape, seed=3), qkv.detach(), *w, table, o, lse, True, EPS)


# ------------------------------------------------------------ the libraries


def order(x: Tensor) -> Tensor:
    """[N, H, M, D] that lie as [N, M, H, D]."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


@dtypes
def test_explicit_softmax_against_autograd(dtype):
    q, k, v, d_o = (order(randn(3, 2, 7, 16, seed=i, dtype=dtype)) for i in range(4))
    o, lse = library_attention._math_forward(q, k, v)
    grads = library_attention._math_backward(d_o, q, k, v, o, lse)
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    scores = leaves[0] @ leaves[1].mT / 4
    exact = scores.softmax(-1) @ leaves[2]
    tolerance = 4 * torch.finfo(dtype).eps
    for got, want in zip((o, *grads), (exact, *torch.autograd.grad(exact, leaves, d_o.double())), strict=True):
        assert relative_error(got, want.detach()) < tolerance
        assert got.dtype == dtype and got.stride() == q.stride()
    assert lse.dtype == torch.float32 and lse.is_contiguous()
    torch.testing.assert_close(lse.double(), scores.detach().logsumexp(-1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("at_once", "calls"), [(14, 1), (13, 2), (4, 4), (2, 7), (1, 14), (0, 14)])
def test_splitting(monkeypatch, at_once, calls):
    q, k, v, d_o = (order(randn(7, 2, 3, 8, seed=i)) for i in range(4))
    whole = library_attention.attention_forward(q, k, v)
    grads = library_attention.attention_backward(d_o, q, k, v, *whole)
    limit = at_once * library_attention.padded_elements(1, 3, 8)
    monkeypatch.setattr(library_attention, "MAX_PADDED_ELEMENTS", limit)
    assert len(list(library_attention._parts(q))) == calls
    library, lse_strides = library_attention._library(q), []

    def backward(*args):
        lse_strides.append(args[-1].is_contiguous())
        return library.backward(*args)

    monkeypatch.setattr(library_attention, "_library", lambda x: library._replace(backward=backward))
    parts = library_attention.attention_forward(q, k, v)
    for got, want in zip(
        (*parts, *library_attention.attention_backward(d_o, q, k, v, *parts)), (*whole, *grads), strict=True
    ):
        torch.testing.assert_close(got, want)
        assert got.stride() == want.stride()
    assert lse_strides == [True] * calls


def test_splitting_leaves_out_nothing():
    """Also where neither sequences nor heads fit at once."""
    few = torch.empty(1).expand(70000, 2, 130, 72)
    many_heads = torch.empty(1).expand(1, 70000, 130, 72)
    for x in (few, many_heads):
        parts = list(library_attention._parts(x))
        sizes = [x[part].shape for part in parts]
        assert sum(n * h for n, h, _, _ in sizes) == x.shape[0] * x.shape[1]
        assert all(
            n * library_attention.padded_elements(h, 130, 72) <= library_attention.MAX_PADDED_ELEMENTS
            and max(n, h) <= library_attention.MAX_GRID
            for n, h, _, _ in sizes
        )


def test_calls_of_pytorch_take_what_is_passed():
    """On the device "meta": the arguments' types and the outputs' shapes, which needs no GPU."""
    q, k, v = (torch.empty(3, 5, 2, 72, device="meta", dtype=torch.bfloat16).transpose(1, 2) for _ in range(3))
    for name in ("cudnn", "flash_attention_2", "efficient_attention"):
        library = library_attention._LIBRARIES[name]
        o, lse = library.forward(q, k, v)
        assert o.shape == q.shape and o.transpose(1, 2).is_contiguous()
        assert lse.shape == (3, 2, 5) and lse.dtype == torch.float32 and lse.is_contiguous()
        for grad in library.backward(torch.empty_like(o), q, k, v, o, lse):
            assert grad.shape == q.shape


def test_library_without_a_gpu():
    name, reason = library_attention.best_library(torch.device("cpu"), torch.float32, 72)
    assert name == "math" and "repeats bit for bit" in reason


def test_report(monkeypatch):
    def served() -> registry.Serving:
        return {s.op: s for s in registry.serving()}["spatial_attention"]

    if DEVICE == "cpu":
        assert served().implementation == registry.REFERENCE
        monkeypatch.setattr(registry, "triton_kernel", lambda: ("triton", ""))
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(spatial_attention, "best_library", lambda *_: ("cudnn", "fast; not promised to repeat"))
    elif cuda_attention.available(torch.cuda.current_device())[0]:
        assert served().implementation == "cuda" and "repeats bit for bit" in served().reason
    monkeypatch.setattr(cuda_attention, "available", lambda device: (False, "not built, says the test"))
    assert served().implementation.startswith("triton + cudnn" if DEVICE == "cpu" else "triton + ")
    assert "repeat" in served().reason and "not ours: not built" in served().reason


def test_switches_of_pytorch_are_followed(monkeypatch):
    asked = []
    monkeypatch.setattr(library_attention, "_best_on_gpu", lambda *args: asked.append(args[-1]) or ("math", ""))
    gpu = torch.device("cuda", 0)
    library_attention.best_library(gpu, torch.bfloat16, 72)
    before = torch.backends.cuda.cudnn_sdp_enabled()
    try:
        torch.backends.cuda.enable_cudnn_sdp(False)
        torch.use_deterministic_algorithms(True)
        library_attention.best_library(gpu, torch.bfloat16, 72)
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)
        torch.use_deterministic_algorithms(False)
    assert [x[0] for x in asked] == [before, False] and [x[-1] for x in asked] == [False, True]


@on_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("name", ["cudnn", "flash_attention_2", "efficient_attention"])
@pytest.mark.parametrize("length", [2, 17, 144, 300])
def test_libraries_on_a_gpu(name, dtype, length):
    """Each against explicit softmax, on the strides that the ops hand to it."""
    library = library_attention._LIBRARIES[name]
    if dtype == torch.float32 and name != "efficient_attention":
        pytest.skip("bf16 and fp16 only")
    qkv = randn(3, length, 3, 2, 72, dtype=dtype)
    q, k = order(qkv[:, :, 0].transpose(1, 2)), order(qkv[:, :, 1].transpose(1, 2))
    v = qkv[:, :, 2].transpose(1, 2)
    d_o = order(randn(3, 2, length, 72, seed=5, dtype=dtype))
    o, lse = library.forward(q, k, v)
    assert o.transpose(1, 2).is_contiguous()
    exact = library_attention._math_forward(*(x.double() for x in (q, k, v)))
    assert lse.shape == (3, 2, length) and relative_error(lse, exact[1]) < 1e-3
    grads = library.backward(d_o, q, k, v, o, lse)
    wants = library_attention._math_backward(d_o.double(), *(x.double() for x in (q, k, v)), *exact)
    tolerance = 2e-2 if dtype == torch.bfloat16 else 3e-3  # some three times what any of them was ever seen to have
    errors = [relative_error(got, want) for got, want in zip((o, *grads), (exact[0], *wants), strict=True)]
    assert max(errors) < tolerance, errors  # of o, dq, dk, dv; a NaN is no smaller
