"""x + gate * (o + bias): the end of a branch, back onto the residual stream."""

from torch import Tensor

from stdit_fast.ops import registry
from stdit_fast.ops.residual_norm import Branch, check_branch, gate_residual_op, one_frame_count, taken_from

NAME = "gate_residual"
registry.declare(NAME, registry.triton_kernel)


def gate_residual(
    x: Tensor, o: Tensor, gate: Tensor | None = None, bias: Tensor | None = None, *, backend: str = "auto"
) -> Tensor:
    """x + gate * (o + bias).

    Bytes it must move: x and o in, the result out (3 units of C values a token). Backward: the gradient and o
    in, o's gradient out (3 units); x's gradient is the result's.

    Args:
        x: [B, T, S, C], the residual stream.
        o: [B, T, S, C], the branch's output.
        gate: [B, 1, C], or [B, T, C] where frames differ; None for 1.
        bias: [C] of the linear layer that made o, where that did not add it; None for 0.
        backend: see `registry.use_kernel`.

    Returns:
        [B, T, S, C] in x's dtype.

    Raises:
        ValueError: a shape that does not fit, or an empty x.
    """
    check_branch(NAME, x, Branch(o, gate, bias))
    if registry.use_kernel(NAME, backend, x, x.shape[-1]):
        one_frame_count(NAME, x, gate)
        return gate_residual_op(x, o, bias, gate)
    return definition(x, o, gate, bias)


def definition(
    x: Tensor,
    o: Tensor,
    gate: Tensor | None = None,
    bias: Tensor | None = None,
    places: Tensor | None = None,
) -> Tensor:
    o = taken_from(o, places, x)
    if bias is not None:
        o = o + bias
    return x + (o if gate is None else gate.unsqueeze(2) * o)
