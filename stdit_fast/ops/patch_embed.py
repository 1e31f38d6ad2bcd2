"""Latents to tokens: a strided convolution over whole patches, with the position embedding added."""

import torch
import torch.nn.functional as F
from torch import Tensor

from stdit_fast.kernels import patch_embed as kernels
from stdit_fast.ops import library, registry
from stdit_fast.ops.checks import expect_not_empty, expect_shape

NAME = "patch_embed"
registry.declare(NAME, registry.triton_kernel)


def patch_embed(x: Tensor, weight: Tensor, bias: Tensor, position: Tensor, backend: str = "auto") -> Tensor:
    """Conv3d with kernel = stride = (1, p, q), then + position.

    Bytes it must move: the tokens out (1 unit of C values a token), x and position in; backward the tokens' gradient
    in.

    Args:
        x: [B, C_in, T, H, W] latents; H and W are padded with zeros on the right to whole patches.
        weight: [C, C_in, 1, p, q]; bias: [C].
        position: [B, S, C] or [1, S, C], S = ceil(H/p) * ceil(W/q), row by row; the same for all frames.
        backend: "auto", "fused" or "reference".

    Returns:
        [B, T, S, C] in x's dtype.

    Raises:
        ValueError: a shape that does not fit, an empty x, or dtypes that differ.
        ConfigError: a backend that cannot serve the call.
    """
    expect_shape(NAME, "x", x, ("B", weight.shape[1], "T", "H", "W"))
    expect_not_empty(NAME, "x", x)
    expect_shape(NAME, "weight", weight, ("C", "C_in", 1, "p", "q"))
    expect_shape(NAME, "bias", bias, (weight.shape[0],))
    tokens = -(-x.shape[3] // weight.shape[3]) * -(-x.shape[4] // weight.shape[4])
    samples = position.shape[0] if position.shape[0] == 1 else x.shape[0]
    expect_shape(NAME, "position", position, (samples, tokens, weight.shape[0]))
    for name, tensor in (("weight", weight), ("bias", bias), ("position", position)):
        if tensor.dtype != x.dtype:
            raise ValueError(f"{NAME}: {name} is {tensor.dtype}, expected x's {x.dtype}")
    if registry.use_kernel(NAME, backend, x, weight.shape[0]):
        return _op(x, weight, bias, position)
    return definition(x, weight, bias, position)


def definition(x: Tensor, weight: Tensor, bias: Tensor, position: Tensor) -> Tensor:
    p, q = weight.shape[-2:]
    x = F.pad(x, (0, -x.shape[4] % q, 0, -x.shape[3] % p))
    tokens = F.conv3d(x, weight, bias, stride=(1, p, q))  # [B, C, T, H/p, W/q]
    return tokens.flatten(3).permute(0, 2, 3, 1) + position.unsqueeze(1)


# ---------------------------------------------------------------- the op


def _fake(x: Tensor, weight: Tensor, bias: Tensor, position: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], x.shape[2], position.shape[1], weight.shape[0])


def _weight_fake(grad: Tensor, x: Tensor, p: int, q: int) -> tuple[Tensor, Tensor]:
    channels = grad.shape[3]
    return x.new_empty(channels, x.shape[1], 1, p, q), x.new_empty(channels)


_op = library.define(
    "patch_embed(Tensor x, Tensor weight, Tensor bias, Tensor position) -> Tensor", kernels.forward, _fake
)
_weight_op = library.define(
    "patch_embed_weight_gradient(Tensor grad, Tensor x, int p, int q) -> (Tensor, Tensor)",
    kernels.gradient,
    _weight_fake,
)


class _PatchEmbed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, position):
        ctx.save_for_backward(x, weight)
        ctx.position_samples = position.shape[0]
        return library.below_autograd(_op, x, weight, bias, position)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, needs_position = ctx.needs_input_grad
        d_x = d_weight = d_bias = d_position = None
        if needs_x:
            d_x = _x_gradient(grad, weight, x.shape)
        if needs_weight or needs_bias:
            d_weight, d_bias = _weight_op(grad, x, *weight.shape[3:])
        if needs_position:
            d_position = grad.sum(1) if ctx.position_samples > 1 else grad.sum((0, 1)).unsqueeze(0)
        return d_x, d_weight, d_bias, d_position


def _x_gradient(grad: Tensor, weight: Tensor, shape: torch.Size) -> Tensor:
    """Each patch's gradient, put where the patch was: the padding's is cut off."""
    batch, channels, frames, height, width = shape
    p, q = weight.shape[3:]
    patches = torch.mm(grad.flatten(0, 2), weight.flatten(1))  # [B*T*S, C_in*p*q]
    grid = patches.view(batch, frames, -(-height // p), -(-width // q), channels, p, q)
    whole = grid.permute(0, 4, 1, 2, 5, 3, 6).flatten(5).flatten(3, 4)
    return whole[..., :height, :width]


library.differentiable(_op, _PatchEmbed)
