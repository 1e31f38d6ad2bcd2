"""The gradients of a linear layer's weight and bias, as the ops with a GEMM inside compute them."""

from torch import Tensor

from stdit_fast.kernels.residual_norm import column_sum
from stdit_fast.ops import library

column_sum_op = library.define(
    "column_sum(Tensor x) -> Tensor",
    lambda x: column_sum(x.contiguous(), x.dtype),
    lambda x: x.new_empty(x.shape[-1]),
)


def weight_gradient(dy: Tensor, x: Tensor) -> Tensor:
    """dy [..., C_out] and x [..., C_in] to [C_out, C_in]."""
    return dy.flatten(0, -2).t() @ x.flatten(0, -2)


def bias_gradient(dy: Tensor) -> Tensor:
    """dy [..., C_out] to its sum over all rows, [C_out]; the same bits every time."""
    return column_sum_op(dy.flatten(0, -2))
