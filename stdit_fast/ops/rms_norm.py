"""RMSNorm over the head dimension, as both attentions apply it to q and k (QK-normalisation).

Not an op of its own: the attentions take the weights and do it inside.
"""

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor | None, eps: float = 1e-6) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis (Zhang and Sennrich, 2019, eq. 4).

    Args:
        x: [..., D].
        weight: [D], or None to return x unchanged (a model without QK-norm).
        eps: added to the mean square.

    Returns:
        [..., D] in x's dtype; computed in float32 or better.
    """
    if weight is None:
        return x
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return normed.to(x.dtype) * weight
