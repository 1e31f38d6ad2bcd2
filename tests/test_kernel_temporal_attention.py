"""Temporal attention in one pass, against its definition."""

import pytest
import torch
from kernel_checks import DEVICE, check, dtypes, randn, relative_error

from stdit_fast import _cuda, ops
from stdit_fast.kernels import temporal_attention as kernels
from stdit_fast.ops import cuda_temporal
from stdit_fast.ops.temporal_attention import _backward_op, _op, definition

SHAPES = [  # B, T, S, H, D
    (2, 2, 3, 2, 72),
    (1, 5, 3, 1, 8),
    (1, 3, 1, 2, 16),
    (1, 16, 1, 3, 72),
    (1, 17, 1, 2, 40),
    (1, 33, 1, 1, 72),
]
if DEVICE == "cuda":
    SHAPES += [(1, frames, 3, 16, 72) for frames in (16, 32, 64, 128)]


def inputs(shape, norm=True, dtype=torch.float32):
    """The bias is a part of qkv for its gradient's sake alone: its values change nothing."""
    batch, frames, positions, heads, head_dim = shape
    weights = {name: 1 + 0.3 * randn(head_dim, seed=i) if norm else None for i, name in enumerate(("q", "k"))}
    return dict(
        qkv=randn(batch, frames, positions, 3, heads, head_dim),
        q_weight=weights["q"],
        k_weight=weights["k"],
        bias=0.5 * randn(3 * heads * head_dim, seed=2),
    )


def table(shape):
    return ops.rotation_table(100 ** (-torch.arange(0, shape[4], 2, device=DEVICE) / shape[4]), shape[1])


def held_against_the_definition(shape, dtype, norm=True, rotate_first=False):
    rotation = table(shape)

    def fused(**kw):
        return ops.temporal_attention(**kw, rotation=rotation, rotate_first=rotate_first, backend="fused")

    def plain(**kw):
        return definition(**kw, rotation=rotation.double(), rotate_first=rotate_first)

    own = shape[1] <= kernels.max_frames(dtype, shape[4])
    check(fused, plain, inputs(shape, norm), dtype, repeats=own)


@dtypes
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(shape, dtype):
    held_against_the_definition(shape, dtype)


@dtypes
@pytest.mark.parametrize("norm", [True, False], ids=["norm", "no norm"])
@pytest.mark.parametrize("rotate_first", [True, False], ids=["rotate first", "norm first"])
def test_orders(rotate_first, norm, dtype):
    held_against_the_definition((1, 6, 2, 2, 72), dtype, norm, rotate_first)


def test_one_frame_and_many():
    held_against_the_definition((2, 1, 3, 2, 72), torch.float32)
    held_against_the_definition((1, 130, 2, 2, 24), torch.float32)


def test_one_frame_gives_the_weights_a_gradient_of_zero():
    given = {name: x.requires_grad_() for name, x in inputs((1, 1, 3, 2, 16)).items()}
    out = ops.temporal_attention(**given, rotation=table((1, 1, 3, 2, 16)), backend="fused")
    assert torch.equal(out, given["qkv"][:, :, :, 2].flatten(3))
    out.sum().backward()
    assert torch.equal(given["qkv"].grad.sum((0, 1, 2, 4, 5)), torch.tensor([0.0, 0.0, 96.0], device=DEVICE))
    assert not given["q_weight"].grad.any() and not given["k_weight"].grad.any()


def test_a_norm_of_q_alone():
    rotation = table((1, 4, 1, 1, 24))
    given = inputs((1, 4, 1, 1, 24)) | dict(k_weight=None)
    check(
        lambda **kw: ops.temporal_attention(**kw, rotation=rotation, backend="fused"),
        lambda **kw: definition(**kw, rotation=rotation.double()),
        given,
        torch.float32,
    )


def test_the_longest_clip_of_one_pass():
    assert kernels.max_frames(torch.bfloat16) == 128 and kernels.max_frames(torch.bfloat16, 128) == 128
    assert kernels.max_frames(torch.bfloat16, 256) == 64 and kernels.max_frames(torch.float32) == 32


@pytest.mark.parametrize("view", ["slice", "transposed", "unaligned"])
def test_views(view):
    base = randn(2, 4, 3, 3, 2, 72)
    qkv = {
        "slice": randn(2, 4, 5, 3, 2, 72)[:, :, 1:4],
        "transposed": base.transpose(1, 2).contiguous().transpose(1, 2),
        "unaligned": torch.cat((base.new_zeros(1), base.flatten()))[1:].view(base.shape),
    }[view]
    rotation = table((2, 4, 3, 2, 72))
    got = ops.temporal_attention(qkv, None, None, rotation, backend="fused")
    want = ops.temporal_attention(
        qkv.clone(memory_format=torch.contiguous_format), None, None, rotation, backend="fused"
    )
    assert torch.equal(got, want)


def test_registered_ops():
    shape = (1, 3, 2, 2, 16)
    given = inputs(shape)
    rotation = table(shape)
    *leaves, bias = [t.requires_grad_() for t in given.values()]
    torch.library.opcheck(_op, (*leaves, rotation, False, 1e-6, bias))
    torch.library.opcheck(_op, (leaves[0], None, None, rotation, True, 1e-6, None))
    detached = [t.detach() for t in leaves]
    torch.library.opcheck(_backward_op, (randn(1, 3, 2, 32), *detached, rotation, False, 1e-6, True))
    torch.library.opcheck(_backward_op, (randn(1, 3, 2, 32), detached[0], None, None, rotation, False, 1e-6, False))


def test_a_table_or_bias_of_another_length_is_refused():
    given = inputs((1, 3, 2, 2, 16))
    with pytest.raises(ValueError, match=r"rotation has shape \[4, 2, 8\], expected \[3, 2, 8\]"):
        ops.temporal_attention(**given, rotation=table((1, 4, 2, 2, 16)))
    with pytest.raises(ValueError, match=r"bias has shape \[16\], expected \[96\]"):
        ops.temporal_attention(**given | dict(bias=given["q_weight"]), rotation=table((1, 3, 2, 2, 16)))


# ------------------------------------------------------------ the backward pass in CUDA

ON_GPU, GPU_REASON = cuda_temporal.available(0) if DEVICE == "cuda" else (False, "no GPU")
needs_gpu = pytest.mark.skipif(not ON_GPU, reason=GPU_REASON)


@pytest.mark.skipif(not _cuda.built()[0], reason="no CUDA library")
def test_what_the_library_refuses():
    good = {
        "qkv": 4096,
        "batch_stride": 8,
        "frame_stride": 8,
        "position_stride": 8,
        "d_o": 4096,
        "d_qkv": 4096,
        "q_weight": 4096,
        "k_weight": 4096,
        "weight_dtype": _cuda.library().FLOAT32,
        "rotation": 4096,
        "batch": 1,
        "positions": 1,
        "frames": 16,
        "heads": 1,
        "head_dim": 72,
        "rotate_first": False,
        "epsilon": 1e-6,
    }
    for change, match in (
        ({"head_dim": 64}, "head dimension 64 and 16 frames, where 72 and at most 64 can be served"),
        ({"frames": 65}, "head dimension 72 and 65 frames"),
        ({"qkv": 4104}, "qkv is null or does not begin at a multiple of 16 bytes"),
        ({"d_o": 0}, "d_o is null"),
        ({"frame_stride": 12}, "a stride of qkv is 12 elements"),
        ({"positions": 0}, "an empty dimension"),
    ):
        call = _cuda.library().Temporal(**good | change)
        with pytest.raises(RuntimeError, match=match):
            call.backward(d_weights=4096, d_sums=0, device=0, stream=0)


@needs_gpu
@pytest.mark.parametrize("rotate_first", [False, True], ids=["norm first", "rotate first"])
@pytest.mark.parametrize(
    "shape",
    [
        (1, 16, 1, 1, 72),
        (1, 2, 40, 16, 72),
        (2, 13, 150, 16, 72),
        (3, 16, 70, 16, 72),
        (1, 17, 1, 1, 72),
        (2, 32, 40, 16, 72),
        (1, 40, 60, 16, 72),
        (1, 49, 3, 16, 72),
        (2, 64, 33, 16, 72),
    ],
    ids=str,
)
def test_backward_in_cuda(shape, rotate_first, monkeypatch):
    """Warps with one position, with several and with none; clips that are shorter than a tile; memory full of NaN."""
    empty = torch.empty

    def poisoned(*args, **kwargs):
        out = empty(*args, **kwargs)
        return out.fill_(float("nan")) if out.is_floating_point() else out

    monkeypatch.setattr(torch, "empty", poisoned)
    given = inputs(shape)
    assert not cuda_temporal.unserved(given["qkv"].bfloat16(), given["q_weight"], given["k_weight"])
    held_against_the_definition(shape, torch.bfloat16, rotate_first=rotate_first)


@needs_gpu
@pytest.mark.parametrize("frames", [16, 30, 64])
def test_backward_in_cuda_of_strided_qkv_and_float32_weights(frames):
    wide = randn(2, frames, 9, 3, 2, 72, dtype=torch.bfloat16)
    weights = [(1 + 0.3 * randn(72, seed=i)) for i in range(2)]
    rotation, grad = table((1, frames, 9, 2, 72)), randn(2, frames, 4, 144, seed=7, dtype=torch.bfloat16)
    here = wide[:, :, 1:5]
    ours = cuda_temporal.backward(grad, here, *weights, rotation, False, 1e-6, True)
    again = cuda_temporal.backward(grad, here.contiguous(), *weights, rotation, False, 1e-6, True)
    for got, want in zip(ours, again, strict=True):
        assert torch.equal(got, want)
    leaves = [x.double().requires_grad_() for x in (here, *weights)]
    want = torch.autograd.grad(definition(*leaves, rotation.double()), leaves, grad.double())
    assert relative_error(ours[0], want[0]) < 5e-3
    assert relative_error(ours[1], torch.stack(want[1:])) < 5e-3
    assert relative_error(ours[2].sum(0), want[0].flatten(3).sum((0, 1, 2))) < 5e-3
