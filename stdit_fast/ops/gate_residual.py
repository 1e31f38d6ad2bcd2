"""x + gate * o: the end of a modulated branch, back onto the residual stream."""

from torch import Tensor

from stdit_fast.ops import registry
from stdit_fast.ops.checks import expect_modulation, expect_not_empty, expect_shape

NAME = "gate_residual"
registry.declare(NAME, registry.no_fused_kernel)


def gate_residual(x: Tensor, o: Tensor, gate: Tensor) -> Tensor:
    """x + gate * o.

    Bytes it must move: x and o in, the result out (3 units of C values a token).

    Args:
        x: [B, T, S, C], the residual stream.
        o: [B, T, S, C], the branch's output.
        gate: [B, 1, C], or [B, T, C] where frames differ.

    Returns:
        [B, T, S, C] in x's dtype.

    Raises:
        ValueError: a shape that does not fit, or an empty x.
    """
    expect_shape(NAME, "x", x, ("B", "T", "S", "C"))
    expect_not_empty(NAME, "x", x)
    expect_shape(NAME, "o", o, tuple(x.shape))
    expect_modulation(NAME, "gate", gate, x)
    return definition(x, o, gate)


def definition(x: Tensor, o: Tensor, gate: Tensor) -> Tensor:
    return x + gate.unsqueeze(2) * o
