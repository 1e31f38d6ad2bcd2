"""The gradients of a linear layer's weight and bias, as the ops with a GEMM inside compute them.

A bias's gradient is the sum of the gradient of its layer's output over all rows. For an attention's input the kernel
that writes that gradient can sum it, which saves a pass over it: the layer gets its bias detached, and the attention
gets the bias, as the part of its input that it is.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

from stdit_fast.kernels.residual_norm import column_sum
from stdit_fast.kernels.transpose import transpose
from stdit_fast.ops import library, registry
from stdit_fast.ops.checks import expect_not_empty, expect_shape

NAME = "projection"
_MANY_ROWS = 20_000
_ROWS_FOR_ONES = 10_000
_places: dict[int, Tensor] = {}  # see `weight_gradients_into`

column_sum_op = library.define(
    "column_sum(Tensor x) -> Tensor",
    lambda x: column_sum(x.contiguous(), x.dtype),
    lambda x: x.new_empty(x.shape[-1]),
)


transpose_op = library.define(
    "transpose(Tensor x) -> Tensor", lambda x: transpose(x.contiguous()), lambda x: x.new_empty(x.shape[1], x.shape[0])
)


def projection(x: Tensor, weight: Tensor, *, backend: str = "auto") -> Tensor:
    """x W^T, a linear layer without bias, with `weight_gradient` for its weight.

    Args:
        x: [..., C_in].
        weight: [C_out, C_in].
        backend: "reference" leaves all to PyTorch.

    Returns:
        [..., C_out].

    Raises:
        ValueError: a shape that does not fit, or an empty x.
    """
    expect_not_empty(NAME, "x", x)
    expect_shape(NAME, "weight", weight, ("C_out", x.shape[-1]))
    return _Projection.apply(x, weight) if registry.use_kernel(NAME, backend, x, *weight.shape) else F.linear(x, weight)


class _Projection(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight)

    @staticmethod
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        dx = dy @ weight if ctx.needs_input_grad[0] else None
        return dx, weight_gradient(dy, x, weight) if ctx.needs_input_grad[1] else None


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


def takes_ones(rows: int, weight: Tensor) -> bool:
    """Whether `weight_and_bias_gradient` is the way to the gradients of weight [C_out, C_in] and its bias.

    The GEMM of a wide matrix has idle columns in its last tiles. 4608 x 1152 costs the same with a column of ones on an
    H100 (13,824 tokens: 0.228 and 0.229 ms, 110,160: 2.00 and 1.89) and saves a pass over the gradient of the output
    (0.053 and 0.34 ms); on an H200 it costs what it saves. 3456 x 1152 and 1152 x 1152 cost more than a pass does.
    """
    return _is_tall(*weight.shape) and rows > _ROWS_FOR_ONES


def weight_and_bias_gradient(dy: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Of dy [..., C_out] and x [..., C_in + some], a column of ones behind its own, then zeros: [C_out, C_in], [C_out].

    The bias's gradient is a row of the GEMM; the same bits every time.
    """
    turned = x.flatten(0, -2).t() @ dy.flatten(0, -2)
    columns = weight.shape[1]
    # Not a view: it would keep the whole in memory.
    return _brought_into_order(turned[:columns], _place_of(weight, dy.dtype)), turned[columns].clone()


def weight_gradient(dy: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """dy [..., C_out] and x [..., C_in] to the gradient of weight [C_out, C_in]."""
    dy, x = dy.flatten(0, -2), x.flatten(0, -2)
    tail = _rows_at_risk(len(x), dy.shape[1] * x.shape[1])
    if tail:
        return weight_gradient(dy[:-tail], x[:-tail], weight).addmm_(dy[-tail:].t(), x[-tail:])
    place = _place_of(weight, dy.dtype)
    if _is_tall(dy.shape[1], x.shape[1]) and len(x) > _MANY_ROWS:
        # cuBLAS has better tiles for the wide matrix than for the tall one: 4608 x 1152 takes 0.237 ms with 13,824
        # tokens and 2.56 ms with 110,160, its transpose 0.211 and 1.64 (H100). With 3456 rows there is no difference.
        return _brought_into_order(x.t() @ dy, place)
    return dy.t() @ x if place is None else torch.mm(dy.t(), x, out=place)


def _is_tall(c_out: int, c_in: int) -> bool:
    return c_out > 3 * c_in


def _place_of(weight: Tensor, dtype: torch.dtype) -> Tensor | None:
    """Where the gradient of a weight is to lie, if that is said."""
    place = _places.pop(weight.data_ptr(), None) if _places else None
    return place if place is not None and place.shape == weight.shape and place.dtype == dtype else None


def _brought_into_order(turned: Tensor, place: Tensor | None) -> Tensor:
    return transpose_op(turned) if place is None else transpose(turned, place)


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
