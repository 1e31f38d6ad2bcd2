"""A branch's end, the next branch's LayerNorm and modulation, and the linear layer behind it, under one gradient.

The linear layer's input is neither kept for the backward pass nor read again to make it: the pass that computes the
norm's gradient writes it once more, for the gradient of the weight.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from stdit_fast.ops import registry
from stdit_fast.ops.checks import expect_shape
from stdit_fast.ops.gate_residual import definition as gate_residual_definition
from stdit_fast.ops.layer_norm_modulate import definition as layer_norm_modulate_definition
from stdit_fast.ops.linear import bias_gradient, weight_gradient
from stdit_fast.ops.residual_norm import (
    Branch,
    branch_backward,
    check_branch,
    check_norm,
    gate_residual_layer_norm_modulate_op,
    gate_residual_op,
    layer_norm_modulate_op,
    one_frame_count,
)

NAME = "modulated_linear"
PLAIN_NAME = "gate_residual_linear"
registry.declare(NAME, registry.triton_kernel)
registry.declare(PLAIN_NAME, registry.triton_kernel)


def modulated_linear(
    x: Tensor,
    branch: Branch | None,
    shift: Tensor,
    scale: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-6,
    *,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """x + gate * (o + bias_o), and linear(LN of that * (1 + scale) + shift).

    Bytes it must move beside the GEMM's: see `gate_residual_layer_norm_modulate`; backward one unit more.
    Kept for the backward pass: the new x, o, and mean and 1/std of each row.

    Args:
        x: [B, T, S, C], the residual stream.
        branch: what is to be added to it first; None: nothing.
        shift, scale: [B, 1, C] or [B, T, C].
        weight: [C_out, C]; bias: [C_out].
        eps: added to the variance.
        backend: see `registry.use_kernel`.

    Returns:
        The new residual stream [B, T, S, C] and the linear layer's output [B, T, S, C_out].

    Raises:
        ValueError: a shape that does not fit, or an empty x.
    """
    check_norm(NAME, x, shift, scale)
    if branch is not None:
        check_branch(NAME, x, branch, in_order=True)
    _check_linear(NAME, x, weight, bias)
    if registry.use_kernel(NAME, backend, x, x.shape[-1], weight.shape[0]):
        o, gate, bias_o = (None, None, None) if branch is None else branch[:3]
        gate, shift, scale = one_frame_count(NAME, x, gate, shift, scale)
        return _ModulatedLinear.apply(x, o, gate, bias_o, shift, scale, weight, bias, eps)
    return definition(x, branch, shift, scale, weight, bias, eps)


def definition(
    x: Tensor, branch: Branch | None, shift: Tensor, scale: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    if branch is not None:
        x = gate_residual_definition(x, *branch)
    return x, F.linear(layer_norm_modulate_definition(x, shift, scale, eps), weight, bias)


def gate_residual_linear(
    x: Tensor, branch: Branch, weight: Tensor, bias: Tensor, *, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """x + gate * (o + bias_o), and linear of that: the entry of cross attention, which has no norm.

    Bytes it must move beside the GEMM's: x and o in, the new x out (3 units of C values a token). Backward: two
    gradients and o in, the gradients of x and o out (5 units).

    Args:
        x: [B, T, S, C], the residual stream.
        branch: what is to be added to it first.
        weight: [C_out, C]; bias: [C_out].
        backend: see `registry.use_kernel`.

    Returns:
        The new residual stream [B, T, S, C] and the linear layer's output [B, T, S, C_out].

    Raises:
        ValueError: a shape that does not fit, or an empty x.
    """
    check_branch(PLAIN_NAME, x, branch)
    _check_linear(PLAIN_NAME, x, weight, bias)
    if registry.use_kernel(PLAIN_NAME, backend, x, x.shape[-1], weight.shape[0]):
        one_frame_count(PLAIN_NAME, x, branch.gate)
        return _GateResidualLinear.apply(x, *branch, weight, bias)
    return plain_definition(x, branch, weight, bias)


def plain_definition(x: Tensor, branch: Branch, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    x = gate_residual_definition(x, *branch)
    return x, F.linear(x, weight, bias)


def _check_linear(op: str, x: Tensor, weight: Tensor, bias: Tensor) -> None:
    expect_shape(op, "weight", weight, ("C_out", x.shape[-1]))
    expect_shape(op, "bias", bias, (weight.shape[0],))


def enter_branch(
    x: Tensor, o: Tensor | None, gate: Tensor | None, bias_o: Tensor | None, shift: Tensor, scale: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(new x, modulated norm, stats), with or without a branch to add; x itself, as a view, without."""
    if o is None:
        return x.view_as(x), *layer_norm_modulate_op(x, shift, scale, eps)
    return gate_residual_layer_norm_modulate_op(x, o, bias_o, gate, shift, scale, eps)


class _ModulatedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, o, gate, bias_o, shift, scale, weight, bias, eps):
        ctx.set_materialize_grads(False)
        x_new, u, stats = enter_branch(x, o, gate, bias_o, shift, scale, eps)
        o = o if gate is not None else None  # only the gate's gradient needs it
        ctx.save_for_backward(x_new, stats, o, gate, bias_o, shift, scale, weight)
        return x_new, F.linear(u, weight, bias)

    @staticmethod
    def backward(ctx, dx_new, dy):
        x_new, stats, o, gate, bias_o, shift, scale, weight = ctx.saved_tensors
        if dy is None:
            grads = branch_backward(dx_new, None, None, None, (o, gate, bias_o), None, None)
            return *grads.of_inputs(ctx.needs_input_grad[1]), None, None, None
        du = dy @ weight
        branch = (o, gate, bias_o)
        wants_weight = ctx.needs_input_grad[6]
        grads = branch_backward(dx_new, du, x_new, stats, branch, shift, scale, remake_u=wants_weight)
        return (
            *grads.of_inputs(ctx.needs_input_grad[1]),
            weight_gradient(dy, grads.u, weight) if wants_weight else None,
            bias_gradient(dy) if ctx.needs_input_grad[7] else None,
            None,
        )


class _GateResidualLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, o, gate, bias_o, places, weight, bias):
        ctx.set_materialize_grads(False)
        x_new = gate_residual_op(x, o, bias_o, gate, places)
        ctx.save_for_backward(x_new, o if gate is not None else None, gate, bias_o, places, weight)
        return x_new, F.linear(x_new, weight, bias)

    @staticmethod
    def backward(ctx, dx_new, dy):
        x_new, o, gate, bias_o, places, weight = ctx.saved_tensors
        du = None if dy is None else dy @ weight
        grads = branch_backward(dx_new, du, None, None, (o, gate, bias_o), None, None, o_places=places)
        dweight = weight_gradient(dy, x_new, weight) if dy is not None and ctx.needs_input_grad[5] else None
        dbias = bias_gradient(dy) if dy is not None and ctx.needs_input_grad[6] else None
        return grads.dx, grads.d_o, grads.dgate, grads.dbias, None, dweight, dbias
