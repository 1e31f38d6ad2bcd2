"""The end of one branch and the entry of the next in one pass: x + gate * (o + bias), then LN and modulation."""

from torch import Tensor

from stdit_fast.ops import registry
from stdit_fast.ops.gate_residual import definition as gate_residual_definition
from stdit_fast.ops.layer_norm_modulate import definition as layer_norm_modulate_definition
from stdit_fast.ops.residual_norm import (
    Branch,
    check_branch,
    check_norm,
    expect_places,
    gate_residual_layer_norm_modulate_op,
    one_frame_count,
    put_into,
)

NAME = "gate_residual_layer_norm_modulate"
registry.declare(NAME, registry.triton_kernel)


def gate_residual_layer_norm_modulate(
    x: Tensor,
    branch: Branch,
    shift: Tensor,
    scale: Tensor,
    eps: float = 1e-6,
    places: Tensor | None = None,
    *,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """x + gate * (o + bias), and LN of that * (1 + scale) + shift.

    Bytes it must move: x and o in, both results out (4 units of C values a token). Backward: both gradients, the
    new x and o in, the gradients of x and o out (6 units).

    Args:
        x: [B, T, S, C], the residual stream.
        branch: what is to be added to it, in x's order.
        shift, scale: [B, 1, C] or [B, T, C], of the branch that follows.
        eps: added to the variance.
        places: as of `Branch`: where rows of the modulated norm, then [B*T*S, C], are to lie; None: as x's.
        backend: see `registry.use_kernel`.

    Returns:
        The new residual stream and the modulated norm, each [B, T, S, C] in x's dtype.

    Raises:
        ValueError: a shape that does not fit, or an empty x.
    """
    check_branch(NAME, x, branch, in_order=True)
    check_norm(NAME, x, shift, scale)
    expect_places(NAME, x, places)
    if registry.use_kernel(NAME, backend, x, x.shape[-1]):
        gate, shift, scale = one_frame_count(NAME, x, branch.gate, shift, scale)
        return gate_residual_layer_norm_modulate_op(x, branch.o, branch.bias, gate, shift, scale, eps, places)[:2]
    return definition(x, branch, shift, scale, eps, places)


def definition(
    x: Tensor, branch: Branch, shift: Tensor, scale: Tensor, eps: float = 1e-6, places: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    x = gate_residual_definition(x, *branch)
    return x, put_into(layer_norm_modulate_definition(x, shift, scale, eps), places)
