"""The gradients of a linear layer's weight and bias, as the ops with a GEMM inside compute them.

A bias's gradient is the sum of the gradient of its layer's output over all rows. Before temporal attention the kernel
that writes that gradient sums it, which saves a pass over it: the layer gets its bias detached, and the attention gets
the bias, as the part of its input that it is.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

from stdit_fast.kernels.residual_norm import column_sum
from stdit_fast.ops import library, registry
from stdit_fast.ops.checks import expect_not_empty, expect_shape

NAME = "projection"
_MANY_ROWS = 20_000
_places: dict[int, Tensor] = {}  # see `weight_gradients_into`

column_sum_op = library.define(
    "column_sum(Tensor x) -> Tensor",
    lambda x: column_sum(x.contiguous(), x.dtype),
    lambda x: x.new_empty(x.shape[-1]),
)


def projection(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, backend: str = "auto") -> Tensor:
    """x W^T + b, a linear layer with `weight_gradient` for its weight.

    Args:
        x: [..., C_in].
        weight: [C_out, C_in].
        bias: [C_out], or None.
        backend: "reference" leaves all to PyTorch.

    Returns:
        [..., C_out].

    Raises:
        ValueError: a shape that does not fit, or an empty x.
    """
    expect_not_empty(NAME, "x", x)
    expect_shape(NAME, "weight", weight, ("C_out", x.shape[-1]))
    if bias is not None:
        expect_shape(NAME, "bias", bias, weight.shape[:1])
    linear = _Projection.apply if registry.use_kernel(NAME, backend, x, *weight.shape) else F.linear
    return linear(x, weight, bias)


class _Projection(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        dx = dy @ weight if ctx.needs_input_grad[0] else None
        dweight = weight_gradient(dy, x, weight) if ctx.needs_input_grad[1] else None
        return dx, dweight, bias_gradient(dy) if ctx.needs_input_grad[2] else None


@contextmanager
def weight_gradients_into(places: dict[int, Tensor]) -> Iterator[None]:
    """Within it, gradients of weights are computed where they are to lie, which saves copying them there.

    Args:
        places: by the address of a weight, a contiguous tensor of its shape. It gets the first gradient of this weight
            that is computed; a second one is a tensor of its own.
    """
    _places.update(places)
    try:
        yield
    finally:
        _places.clear()


def weight_gradient(dy: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """dy [..., C_out] and x [..., C_in] to the gradient of weight [C_out, C_in], which may lie transposed."""
    dy, x = dy.flatten(0, -2), x.flatten(0, -2)
    tail = _rows_at_risk(len(x), dy.shape[1] * x.shape[1])
    if tail:
        return weight_gradient(dy[:-tail], x[:-tail], weight).addmm_(dy[-tail:].t(), x[-tail:])
    if dy.shape[1] > 3 * x.shape[1] and len(x) > _MANY_ROWS:
        # cuBLAS has better tiles for the wide matrix than for the tall one: 4608 x 1152 takes 0.237 ms with 13,824
        # tokens and 2.56 ms with 110,160, its transpose 0.211 and 1.64 (H100). With 3456 rows there is no difference.
        # Whoever keeps the gradient brings it into order, which costs 0.04 ms more than a plain copy.
        return (x.t() @ dy).t()
    place = _places.pop(weight.data_ptr(), None) if _places else None
    if place is None or place.shape != weight.shape or place.dtype != dy.dtype:
        return dy.t() @ x
    return torch.mm(dy.t(), x, out=place)


def holding(x: Tensor, bias: Tensor | None, axes: int) -> Tensor:
    """x, which holds `bias` already, as a function of it too: the same values.

    Args:
        bias: as many values as the last `axes` axes of x; None: x itself.
    """
    return x if bias is None else x + (bias - bias.detach()).view(x.shape[-axes:])


def _rows_at_risk(rows: int, values: int) -> int:
    """The last rows that cuBLAS might leave out of a weight's gradient of so many values (docs/kernels.md).

    Where it divides the rows into parts (up to 14 were seen), those beyond a multiple of its tiles of 64 may be lost if
    they are fewer than the parts: seen from 2,561 rows on, and in gradients of 2304 x 1152 at most.
    """
    tail = rows % 64
    return tail if rows > 2048 and tail < 16 and values < 3_000_000 else 0


def bias_gradient(dy: Tensor) -> Tensor:
    """dy [..., C_out] to its sum over all rows, [C_out]; the same bits every time."""
    return column_sum_op(dy.flatten(0, -2))
