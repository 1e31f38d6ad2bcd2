"""Linear, GELU by its tanh approximation, Linear: the block's MLP and the text projection."""

import torch
import torch.nn.functional as F
from torch import Tensor

from stdit_fast.ops import registry
from stdit_fast.ops.checks import expect_not_empty, expect_shape
from stdit_fast.ops.gate_residual import definition as gate_residual_definition
from stdit_fast.ops.layer_norm_modulate import definition as layer_norm_modulate_definition
from stdit_fast.ops.linear import bias_gradient, weight_gradient
from stdit_fast.ops.linear_gelu import keeps, linear_gelu_backward, linear_gelu_op, serving
from stdit_fast.ops.modulated_linear import enter_branch
from stdit_fast.ops.residual_norm import Branch, branch_backward, check_branch, check_norm, one_frame_count

NAME = "mlp"
MODULATED_NAME = "modulated_mlp"
registry.declare(NAME, serving)
registry.declare(MODULATED_NAME, serving)


def mlp(
    x: Tensor, fc1_weight: Tensor, fc1_bias: Tensor, fc2_weight: Tensor, fc2_bias: Tensor, *, backend: str = "auto"
) -> Tensor:
    """fc2(gelu_tanh(fc1(x))).

    Operations: 4 * tokens * C_in * C_hidden with C_out = C_in. Bytes beside the GEMMs': the hidden values, which the
    first writes beside their activation. Kept for the backward pass: x and the hidden values.

    Args:
        x: [..., C_in].
        fc1_weight: [C_hidden, C_in]; fc1_bias: [C_hidden].
        fc2_weight: [C_out, C_hidden]; fc2_bias: [C_out].
        backend: see `registry.use_kernel`.

    Returns:
        [..., C_out] in x's dtype.

    Raises:
        ValueError: a shape that does not fit, or an empty x.
    """
    expect_not_empty(NAME, "x", x)
    _check_weights(NAME, x, fc1_weight, fc1_bias, fc2_weight)
    expect_shape(NAME, "fc2_bias", fc2_bias, (fc2_weight.shape[0],))
    if registry.use_kernel(NAME, backend, x, *fc1_weight.shape, fc2_weight.shape[0]):
        return _Mlp.apply(x, fc1_weight, fc1_bias, fc2_weight, fc2_bias)
    return definition(x, fc1_weight, fc1_bias, fc2_weight, fc2_bias)


def definition(
    x: Tensor, fc1_weight: Tensor, fc1_bias: Tensor, fc2_weight: Tensor, fc2_bias: Tensor | None = None
) -> Tensor:
    return F.linear(F.gelu(F.linear(x, fc1_weight, fc1_bias), approximate="tanh"), fc2_weight, fc2_bias)


def modulated_mlp(
    x: Tensor,
    branch: Branch | None,
    shift: Tensor,
    scale: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    fc2_weight: Tensor,
    eps: float = 1e-6,
    *,
    keep_activation: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """x + gate * (o + bias_o), and the MLP of LN of that * (1 + scale) + shift, without its last bias.

    The last bias goes into the `Branch` that the result becomes. Kept for the backward pass: the new x, o, mean
    and 1/std of each row, and the hidden values before the activation; u and the activation are made again.

    Args:
        x: [B, T, S, C], the residual stream.
        branch: what is to be added to it first; None: nothing.
        shift, scale: [B, 1, C] or [B, T, C].
        fc1_weight: [C_hidden, C]; fc1_bias: [C_hidden]; fc2_weight: [C, C_hidden].
        eps: added to the variance.
        keep_activation: whether the activation, as large as the hidden values, is kept too where that saves a pass;
            made again it may have other last bits.
        backend: see `registry.use_kernel`.

    Returns:
        The new residual stream and the MLP's output, each [B, T, S, C].

    Raises:
        ValueError: a shape that does not fit, or an empty x.
    """
    check_norm(MODULATED_NAME, x, shift, scale)
    if branch is not None:
        check_branch(MODULATED_NAME, x, branch, in_order=True)
    _check_weights(MODULATED_NAME, x, fc1_weight, fc1_bias, fc2_weight)
    if registry.use_kernel(MODULATED_NAME, backend, x, *fc1_weight.shape, fc2_weight.shape[0]):
        o, gate, bias_o = (None, None, None) if branch is None else branch[:3]
        gate, shift, scale = one_frame_count(MODULATED_NAME, x, gate, shift, scale)
        weights = (fc1_weight, fc1_bias, fc2_weight)
        return _ModulatedMlp.apply(x, o, gate, bias_o, shift, scale, *weights, eps, keep_activation)
    return modulated_definition(x, branch, shift, scale, fc1_weight, fc1_bias, fc2_weight, eps)


def modulated_definition(
    x: Tensor,
    branch: Branch | None,
    shift: Tensor,
    scale: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    fc2_weight: Tensor,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    if branch is not None:
        x = gate_residual_definition(x, *branch)
    u = layer_norm_modulate_definition(x, shift, scale, eps)
    return x, definition(u, fc1_weight, fc1_bias, fc2_weight)


def _check_weights(op: str, x: Tensor, fc1_weight: Tensor, fc1_bias: Tensor, fc2_weight: Tensor) -> None:
    hidden, out = fc1_weight.shape[0], fc2_weight.shape[0]
    expect_shape(op, "fc1_weight", fc1_weight, (hidden, x.shape[-1]))
    expect_shape(op, "fc1_bias", fc1_bias, (hidden,))
    expect_shape(op, "fc2_weight", fc2_weight, (out, hidden))


class _Mlp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, fc1_weight, fc1_bias, fc2_weight, fc2_bias):
        activation, h = linear_gelu_op(x.flatten(0, -2), fc1_weight, fc1_bias)
        ctx.save_for_backward(x, h, fc1_weight, fc2_weight)
        return F.linear(activation, fc2_weight, fc2_bias).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx, dy):
        x, h, fc1_weight, fc2_weight = ctx.saved_tensors
        dy = dy.flatten(0, -2)
        wanted = ctx.needs_input_grad
        dh, dfc1_bias, dfc2_weight = linear_gelu_backward(dy, h, None, fc2_weight, wanted[3])
        dx = (dh @ fc1_weight).view(x.shape) if wanted[0] else None
        dfc1_weight = weight_gradient(dh, x, fc1_weight) if wanted[1] else None
        return dx, dfc1_weight, dfc1_bias, dfc2_weight, bias_gradient(dy) if wanted[4] else None


class _ModulatedMlp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, o, gate, bias_o, shift, scale, fc1_weight, fc1_bias, fc2_weight, eps, keep_activation):
        ctx.set_materialize_grads(False)
        x_new, u, stats = enter_branch(x, o, gate, bias_o, shift, scale, eps)
        activation, h = linear_gelu_op(u.flatten(0, -2), fc1_weight, fc1_bias)
        o = o if gate is not None else None  # only the gate's gradient needs it
        kept = keeps(activation, keep_activation)
        ctx.save_for_backward(x_new, stats, o, gate, bias_o, shift, scale, h, kept, fc1_weight, fc2_weight)
        return x_new, F.linear(activation, fc2_weight).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx, dx_new, dy):
        x_new, stats, o, gate, bias_o, shift, scale, h, activation, fc1_weight, fc2_weight = ctx.saved_tensors
        branch = (o, gate, bias_o)
        if dy is None:
            grads = branch_backward(dx_new, None, None, None, branch, None, None)
            return *grads.of_inputs(ctx.needs_input_grad[1]), None, None, None, None, None
        dh, dfc1_bias, dfc2_weight = linear_gelu_backward(
            dy.flatten(0, -2), h, activation, fc2_weight, ctx.needs_input_grad[8]
        )
        du = (dh @ fc1_weight).view(x_new.shape)
        wants_weight = ctx.needs_input_grad[6]
        grads = branch_backward(dx_new, du, x_new, stats, branch, shift, scale, remake_u=wants_weight)
        return (
            *grads.of_inputs(ctx.needs_input_grad[1]),
            weight_gradient(dh, grads.u, fc1_weight) if wants_weight else None,
            dfc1_bias,
            dfc2_weight,
            None,
            None,
        )
