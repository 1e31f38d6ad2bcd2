"""Temporal attention in one pass, against its definition."""

import pytest
import torch
from kernel_checks import DEVICE, check, dtypes, randn

from stdit_fast import ops
from stdit_fast.kernels import temporal_attention as kernels
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
    batch, frames, positions, heads, head_dim = shape
    weights = {name: 1 + 0.3 * randn(head_dim, seed=i) if norm else None for i, name in enumerate(("q", "k"))}
    return dict(
        qkv=randn(batch, frames, positions, 3, heads, head_dim),
        q_weight=weights["q"],
        k_weight=weights["k"],
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
    leaves = [t.requires_grad_() for t in given.values()]
    torch.library.opcheck(_op, (*leaves, rotation, False, 1e-6))
    torch.library.opcheck(_op, (leaves[0], None, None, rotation, True, 1e-6))
    detached = [t.detach() for t in leaves]
    torch.library.opcheck(_backward_op, (randn(1, 3, 2, 32), *detached, rotation, False, 1e-6))
    torch.library.opcheck(_backward_op, (randn(1, 3, 2, 32), detached[0], None, None, rotation, False, 1e-6))


def test_a_table_of_another_length_is_refused():
    given = inputs((1, 3, 2, 2, 16))
    with pytest.raises(ValueError, match=r"rotation has shape \[4, 2, 8\], expected \[3, 2, 8\]"):
        ops.temporal_attention(**given, rotation=table((1, 4, 2, 2, 16)))
