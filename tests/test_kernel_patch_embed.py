"""The fused patch embedding against its definition: pictures that are no whole patches, any strides, each gradient."""

import pytest
import torch
from kernel_checks import check, dtypes, randn

from stdit_fast import ops
from stdit_fast.kernels import patch_embed as kernels
from stdit_fast.ops.patch_embed import _op, _weight_op


def case(batch, frames, height, width, p, q, channels, c_in=4, per_sample=False) -> dict[str, torch.Tensor]:
    tokens = -(-height // p) * -(-width // q)
    return {
        "x": randn(batch, c_in, frames, height, width),
        "weight": randn(channels, c_in, 1, p, q, seed=1),
        "bias": randn(channels, seed=2),
        "position": randn(batch if per_sample else 1, tokens, channels, seed=3),
    }


def check_embedding(inputs: dict, dtype: torch.dtype, arrange=lambda x: x) -> None:
    """Fused against plain on the given inputs, x as arrange(x)."""

    def run(backend: str):
        return lambda x, **others: ops.patch_embed(arrange(x), **others, backend=backend)

    check(run("fused"), run("reference"), inputs, dtype)


@dtypes
@pytest.mark.parametrize(
    "sizes",
    [
        {"batch": 2, "frames": 3, "height": 5, "width": 7, "p": 2, "q": 2, "channels": 72, "per_sample": True},
        {"batch": 2, "frames": 2, "height": 3, "width": 4, "p": 1, "q": 1, "channels": 200},
        {"batch": 1, "frames": 1, "height": 3, "width": 9, "p": 2, "q": 4, "channels": 24, "c_in": 3},
        {"batch": 3, "frames": 1, "height": 1, "width": 1, "p": 2, "q": 2, "channels": 8, "c_in": 5},
    ],
    ids=lambda sizes: f"patch{sizes['p']}x{sizes['q']}",
)
def test_against_definition(sizes, dtype):
    check_embedding(case(**sizes), dtype)


@dtypes
def test_any_strides(dtype):
    """Latents with channels last, and as a part of longer ones; a weight and a position that lie otherwise."""
    inputs = case(2, 3, 4, 5, 2, 2, 16, per_sample=True)
    inputs["x"] = randn(2, 3, 4, 5, 4)
    check_embedding(inputs, dtype, lambda x: x.permute(0, 4, 1, 2, 3))
    inputs["x"] = randn(2, 4, 6, 4, 11)
    check_embedding(inputs, dtype, lambda x: x[:, :, ::2, :, 1:11:2])
    weight, position = inputs["weight"].permute(0, 2, 3, 4, 1), inputs["position"].transpose(1, 2)
    want = ops.patch_embed(**inputs | {"x": inputs["x"][:, :, ::2, :, :5]}, backend="fused")
    inputs |= {"weight": weight.contiguous().permute(0, 4, 1, 2, 3), "position": position.contiguous().transpose(1, 2)}
    assert torch.equal(ops.patch_embed(**inputs | {"x": inputs["x"][:, :, ::2, :, :5]}, backend="fused"), want)


@dtypes
@pytest.mark.parametrize("programs", [1, 5, 1000])
def test_splits_of_the_tokens(monkeypatch, programs, dtype):
    """All tokens in one program a block of channels; uneven splits; each tile in its own."""
    monkeypatch.setitem(kernels.TUNING, "gradient", {"BLOCK_M": 16, "BLOCK_C": 32, "programs": programs})
    monkeypatch.setitem(kernels.TUNING, "forward", {"BLOCK_M": 16, "BLOCK_C": 32})
    check_embedding(case(2, 3, 7, 6, 2, 2, 40), dtype)


@pytest.mark.parametrize("wanted", ["x", "weight", "bias", "position"])
def test_one_gradient_alone(wanted):
    inputs = case(2, 2, 3, 5, 2, 2, 16)
    got = []
    for backend in ("fused", "reference"):
        leaf = inputs[wanted].clone().requires_grad_()
        out = ops.patch_embed(**inputs | {wanted: leaf}, backend=backend)
        got += torch.autograd.grad(out, leaf, randn(*out.shape, seed=7))
    torch.testing.assert_close(*got)


def test_registered_ops():
    inputs = case(2, 2, 3, 5, 2, 2, 16)
    torch.library.opcheck(_op, tuple(value.requires_grad_() for value in inputs.values()))
    torch.library.opcheck(_weight_op, (randn(2, 2, 6, 16), inputs["x"].detach(), 2, 2))


def test_refusals():
    inputs = case(2, 2, 3, 5, 2, 2, 16)
    with pytest.raises(ValueError, match="weight is torch.float64, expected x's torch.float32"):
        ops.patch_embed(**inputs | {"weight": inputs["weight"].double()})
    with pytest.raises(ValueError, match=r"position has shape \[3, 6, 16\], expected \[2, 6, 16\]"):
        ops.patch_embed(**inputs | {"position": randn(3, 6, 16)})
    with pytest.raises(ValueError, match=r"bias has shape \[15\], expected \[16\]"):
        ops.patch_embed(**inputs | {"bias": randn(15)})
