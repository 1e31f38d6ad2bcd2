"""Latents to tokens: a strided convolution over whole patches, with the position embedding added."""

import torch.nn.functional as F
from torch import Tensor

from stdit_fast.ops import registry
from stdit_fast.ops.checks import expect_not_empty, expect_shape

NAME = "patch_embed"
registry.declare(NAME, registry.no_fused_kernel)


def patch_embed(x: Tensor, weight: Tensor, bias: Tensor, position: Tensor) -> Tensor:
    """Conv3d with kernel = stride = (1, p, q), then + position.

    Args:
        x: [B, C_in, T, H, W] latents; H and W are padded with zeros on the right to whole patches.
        weight: [C, C_in, 1, p, q]; bias: [C].
        position: [B, S, C] or [1, S, C], S = ceil(H/p) * ceil(W/q), row by row; the same for all frames.

    Returns:
        [B, T, S, C] in x's dtype.

    Raises:
        ValueError: a shape that does not fit, or an empty x.
    """
    expect_shape(NAME, "x", x, ("B", weight.shape[1], "T", "H", "W"))
    expect_not_empty(NAME, "x", x)
    expect_shape(NAME, "weight", weight, ("C", "C_in", 1, "p", "q"))
    tokens = -(-x.shape[3] // weight.shape[3]) * -(-x.shape[4] // weight.shape[4])
    expect_shape(NAME, "position", position, ("B or 1", tokens, weight.shape[0]))
    return definition(x, weight, bias, position)


def definition(x: Tensor, weight: Tensor, bias: Tensor, position: Tensor) -> Tensor:
    p, q = weight.shape[-2:]
    x = F.pad(x, (0, -x.shape[4] % q, 0, -x.shape[3] % p))
    tokens = F.conv3d(x, weight, bias, stride=(1, p, q))  # [B, C, T, H/p, W/q]
    return tokens.flatten(3).permute(0, 2, 3, 1) + position.unsqueeze(1)
