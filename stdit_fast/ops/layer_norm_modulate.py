"""LayerNorm without affine parameters, then u * (1 + scale) + shift: the entry of every branch of a block."""

import torch.nn.functional as F
from torch import Tensor

from stdit_fast.ops import registry
from stdit_fast.ops.residual_norm import check_norm, layer_norm_modulate_op, one_frame_count

NAME = "layer_norm_modulate"
registry.declare(NAME, registry.triton_kernel)


def layer_norm_modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6, *, backend: str = "auto") -> Tensor:
    """LN(x) * (1 + scale) + shift, normalised over the channels.

    Bytes it must move: x once in, the result once out (2 units of C values a token); shift and scale are
    small, one row a frame. Backward: the gradient and x in, x's gradient out (3 units).

    Args:
        x: [B, T, S, C], any floating dtype.
        shift, scale: [B, 1, C] for one value a sample, or [B, T, C] where frames differ (condition frames
            use those of timestep 0).
        eps: added to the variance.
        backend: see `registry.use_kernel`.

    Returns:
        [B, T, S, C] in x's dtype.

    Raises:
        ValueError: a shape that does not fit, or an empty x.
    """
    check_norm(NAME, x, shift, scale)
    if registry.use_kernel(NAME, backend, x, x.shape[-1]):
        shift, scale = one_frame_count(NAME, x, shift, scale)
        return layer_norm_modulate_op(x, shift, scale, eps)[0]
    return definition(x, shift, scale, eps)


def definition(x: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6) -> Tensor:
    u = F.layer_norm(x, x.shape[-1:], eps=eps)
    return u * (1 + scale.unsqueeze(2)) + shift.unsqueeze(2)
