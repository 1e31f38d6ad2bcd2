"""Linear, GELU by its tanh approximation, Linear: the block's MLP and the text projection."""

import torch.nn.functional as F
from torch import Tensor

from stdit_fast.ops import registry
from stdit_fast.ops.checks import expect_not_empty, expect_shape

NAME = "mlp"
registry.declare(NAME, registry.no_fused_kernel)


def mlp(x: Tensor, fc1_weight: Tensor, fc1_bias: Tensor, fc2_weight: Tensor, fc2_bias: Tensor) -> Tensor:
    """fc2(gelu_tanh(fc1(x))).

    Operations: 4 * tokens * C_in * C_hidden with C_out = C_in. The bias and the GELU belong into the first
    GEMM's epilogue, so that no pass over [tokens, C_hidden] is left.

    Args:
        x: [..., C_in].
        fc1_weight: [C_hidden, C_in]; fc1_bias: [C_hidden].
        fc2_weight: [C_out, C_hidden]; fc2_bias: [C_out].

    Returns:
        [..., C_out] in x's dtype.

    Raises:
        ValueError: a shape that does not fit, or an empty x.
    """
    expect_not_empty(NAME, "x", x)
    hidden, out = fc1_weight.shape[0], fc2_weight.shape[0]
    expect_shape(NAME, "fc1_weight", fc1_weight, (hidden, x.shape[-1]))
    expect_shape(NAME, "fc1_bias", fc1_bias, (hidden,))
    expect_shape(NAME, "fc2_weight", fc2_weight, (out, hidden))
    expect_shape(NAME, "fc2_bias", fc2_bias, (out,))
    return definition(x, fc1_weight, fc1_bias, fc2_weight, fc2_bias)


def definition(x: Tensor, fc1_weight: Tensor, fc1_bias: Tensor, fc2_weight: Tensor, fc2_bias: Tensor) -> Tensor:
    return F.linear(F.gelu(F.linear(x, fc1_weight, fc1_bias), approximate="tanh"), fc2_weight, fc2_bias)
