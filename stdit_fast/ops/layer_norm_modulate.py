"""LayerNorm without affine parameters, then u * (1 + scale) + shift: the entry of every branch of a block."""

import torch.nn.functional as F
from torch import Tensor

from stdit_fast.ops import registry
from stdit_fast.ops.checks import expect_modulation, expect_not_empty, expect_shape

NAME = "layer_norm_modulate"
registry.declare(NAME, registry.no_fused_kernel)


def layer_norm_modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6) -> Tensor:
    """LN(x) * (1 + scale) + shift, normalised over the channels.

    Bytes it must move: x once in, the result once out (2 units of C values a token); shift and scale are
    small, one row a frame.

    Args:
        x: [B, T, S, C], any floating dtype.
        shift, scale: [B, 1, C] for one value a sample, or [B, T, C] where frames differ (condition frames
            use those of timestep 0).
        eps: added to the variance.

    Returns:
        [B, T, S, C] in x's dtype.

    Raises:
        ValueError: a shape that does not fit, or an empty x.
    """
    expect_shape(NAME, "x", x, ("B", "T", "S", "C"))
    expect_not_empty(NAME, "x", x)
    expect_modulation(NAME, "shift", shift, x)
    expect_modulation(NAME, "scale", scale, x)
    return definition(x, shift, scale, eps)


def definition(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    u = F.layer_norm(x, x.shape[-1:], eps=eps)
    return u * (1 + scale.unsqueeze(2)) + shift.unsqueeze(2)
