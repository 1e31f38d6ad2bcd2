"""The registered ops behind `layer_norm_modulate`, `gate_residual` and the two joined, with their gradients.

One pair of kernels (`stdit_fast.kernels.residual_norm`) serves them all. The public functions, with the
definitions and checks, are in the ops' own files.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from stdit_fast.kernels import residual_norm as kernels
from stdit_fast.ops import library
from stdit_fast.ops.checks import expect_dtype, expect_modulation, expect_not_empty, expect_shape


class Branch(NamedTuple):
    """The output of a branch of a block on its way back to the residual stream: x + gate * (o + bias).

    Attributes:
        o: [B, T, S, C], or [B*T*S, C] with its rows where `places` says.
        gate: [B, 1, C] or [B, T, C]; None for 1.
        bias: [C] of the linear layer that made o; None for 0. It is added here, where its gradient costs no pass.
        places: int32 [S, 2], contiguous; None: o is in the order of x. The token at position s of frame t of sample b
            is row places[s, 0] + (b*T + t) * places[s, 1] of o. Every row has one token. Needs a gate.
    """

    o: Tensor
    gate: Tensor | None = None
    bias: Tensor | None = None
    places: Tensor | None = None


def check_branch(op: str, x: Tensor, branch: Branch, in_order: bool = False) -> None:
    """Raises ValueError unless x is [B, T, S, C] with elements and the branch fits it, `in_order`: without places."""
    expect_shape(op, "x", x, ("B", "T", "S", "C"))
    expect_not_empty(op, "x", x)
    if in_order and branch.places is not None:
        raise ValueError(f"{op}: the branch has places, and is expected in the order of x")
    if branch.places is None:
        expect_shape(op, "o", branch.o, tuple(x.shape))
    else:
        expect_places(op, x, branch.places)
        expect_shape(op, "o", branch.o, (x.numel() // x.shape[-1], x.shape[-1]))
        if branch.gate is None:
            raise ValueError(f"{op}: places of a branch without a gate")
    if branch.gate is not None:
        expect_modulation(op, "gate", branch.gate, x)
    if branch.bias is not None:
        expect_shape(op, "bias", branch.bias, (x.shape[-1],))


def expect_places(op: str, x: Tensor, places: Tensor | None) -> None:
    """Raises ValueError unless places are None, or int32 [S, 2] beside x [B, T, S, C]."""
    if places is None:
        return
    expect_shape(op, "places", places, (x.shape[2], 2))
    if places.dtype != torch.int32 or not places.is_contiguous():
        raise ValueError(f"{op}: places are {places.dtype} of strides {places.stride()}, expected contiguous int32")


def rows_of(places: Tensor, frames: int) -> Tensor:
    """[frames * S] int64: the row of each token, for the frames of all samples together; see `Branch`."""
    first, step = places.long().unbind(1)
    return (first + torch.arange(frames, device=places.device)[:, None] * step).flatten()


def taken_from(o: Tensor, places: Tensor | None, like: Tensor) -> Tensor:
    """o in the order of `like` [B, T, S, C]."""
    if places is None:
        return o
    return o[rows_of(places, like.shape[0] * like.shape[1])].view_as(like)


def put_into(u: Tensor, places: Tensor | None) -> Tensor:
    """u [B, T, S, C] as [B*T*S, C], with its rows where `places` says."""
    if places is None:
        return u
    rows = rows_of(places, u.shape[0] * u.shape[1])
    return u.new_empty(len(rows), u.shape[-1]).index_copy(0, rows, u.flatten(0, 2))


def check_norm(op: str, x: Tensor, shift: Tensor, scale: Tensor) -> None:
    """Raises ValueError unless x is [B, T, S, C] with elements and shift and scale fit it."""
    expect_shape(op, "x", x, ("B", "T", "S", "C"))
    expect_not_empty(op, "x", x)
    expect_modulation(op, "shift", shift, x)
    expect_modulation(op, "scale", scale, x)


def one_frame_count(op: str, x: Tensor, *modulations: Tensor | None) -> list[Tensor | None]:
    """The modulations with one row a sample, or all with one a frame: what a kernel can take. Checks dtypes."""
    for modulation in modulations:
        if modulation is not None:
            expect_dtype(op, "modulation", modulation, x)
    given = [m for m in modulations if m is not None]
    frames = max((m.shape[1] for m in given), default=1)
    return [m if m is None or m.shape[1] == frames else m.expand(-1, frames, -1) for m in modulations]


# ------------------------------------------------------------------ kernels


def _rows(modulation: Tensor | None) -> Tensor | None:
    """[B, F, C] as [B*F, C], each row contiguous."""
    if modulation is None:
        return None
    rows = modulation.flatten(0, 1)
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _groups(x: Tensor, *modulations: Tensor | None) -> int:
    """How many groups of tokens share modulation; without any, the samples."""
    for modulation in modulations:
        if modulation is not None:
            return modulation.shape[0] * modulation.shape[1]
    return x.shape[0]


def _dense(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _layer_norm_modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    _, u, stats = kernels.forward(
        x.contiguous(), None, None, None, _rows(shift), _rows(scale), _groups(x, shift), eps
    )  # fmt: skip
    return u, stats


def _gate_residual(
    x: Tensor, o: Tensor, bias: Tensor | None, gate: Tensor | None, places: Tensor | None = None
) -> Tensor:
    groups = _groups(x, gate)
    return kernels.forward(x.contiguous(), o.contiguous(), bias, _rows(gate), None, None, groups, 0.0, places)[0]


def _gate_residual_layer_norm_modulate(
    x: Tensor,
    o: Tensor,
    bias: Tensor | None,
    gate: Tensor | None,
    shift: Tensor,
    scale: Tensor,
    eps: float,
    places: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    groups = _groups(x, shift)
    return kernels.forward(
        x.contiguous(), o.contiguous(), bias, _rows(gate), _rows(shift), _rows(scale), groups, eps, None, places
    )  # fmt: skip


def _backward(
    dx_new: Tensor | None,
    du: Tensor | None,
    x_new: Tensor | None,
    stats: Tensor | None,
    o: Tensor | None,
    bias: Tensor | None,
    gate: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
    remake_u: bool,
    o_places: Tensor | None = None,
    u_places: Tensor | None = None,
) -> tuple[Tensor, ...]:
    like = du if du is not None else dx_new
    gradients = kernels.backward(
        _dense(dx_new), _dense(du), _dense(x_new), stats, _dense(o), bias, _rows(gate), _rows(shift), _rows(scale),
        _groups(like, gate, scale), remake_u, o_places, u_places,
    )  # fmt: skip
    return tuple(like.new_empty(0) if gradient is None else gradient for gradient in gradients)


# -------------------------------------------------------------- fake tensors


def _fake_stats(x: Tensor) -> Tensor:
    return x.new_empty((x.shape[0] * x.shape[1] * x.shape[2], 2), dtype=torch.float32)


def _fake_like(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _fake_backward(
    dx_new, du, x_new, stats, o, bias, gate, shift, scale, remake_u, o_places=None, u_places=None
):  # fmt: skip
    like = next(given for given in (x_new, du, dx_new) if given is not None)
    modulations = 2 * (scale is not None) + (gate is not None)
    groups = _groups(like, gate, scale)

    def out(present, *shape):
        return like.new_empty(shape if present else 0)

    return (
        out(scale is not None or (du is not None and dx_new is not None), *like.shape),
        like.new_empty(0) if gate is None else like.new_empty(o.shape),
        out(bias is not None, like.shape[-1]),
        out(modulations > 0, modulations, groups, like.shape[-1]),
        like.new_empty(du.shape) if remake_u else like.new_empty(0),
    )


layer_norm_modulate_op = library.define(
    "layer_norm_modulate(Tensor x, Tensor shift, Tensor scale, float eps) -> (Tensor, Tensor)",
    _layer_norm_modulate,
    lambda x, shift, scale, eps: (_fake_like(x), _fake_stats(x)),
)
gate_residual_op = library.define(
    "gate_residual(Tensor x, Tensor o, Tensor? bias, Tensor? gate, Tensor? places=None) -> Tensor",
    _gate_residual,
    lambda x, o, bias, gate, places=None: _fake_like(x),
)
gate_residual_layer_norm_modulate_op = library.define(
    "gate_residual_layer_norm_modulate(Tensor x, Tensor o, Tensor? bias, Tensor? gate, Tensor shift, Tensor scale, "
    "float eps, Tensor? places=None) -> (Tensor, Tensor, Tensor)",
    _gate_residual_layer_norm_modulate,
    lambda x, o, bias, gate, shift, scale, eps, places=None: (
        _fake_like(x),
        _fake_like(x if places is None else x.flatten(0, 2)),
        _fake_stats(x),
    ),
)
backward_op = library.define(
    "residual_norm_backward(Tensor? dx_new, Tensor? du, Tensor? x_new, Tensor? stats, Tensor? o, Tensor? bias, "
    "Tensor? gate, Tensor? shift, Tensor? scale, bool remake_u, Tensor? o_places=None, Tensor? u_places=None) "
    "-> (Tensor dx, Tensor d_o, Tensor dbias, Tensor modulation, Tensor u)",
    _backward,
    _fake_backward,
)


# ------------------------------------------------------------------ gradients


class BranchGradients(NamedTuple):
    """What `branch_backward` returns: the gradients of x, of the branch and of the modulation, and u made again."""

    dx: Tensor
    d_o: Tensor
    dbias: Tensor | None
    dgate: Tensor | None
    dshift: Tensor | None
    dscale: Tensor | None
    u: Tensor | None

    def of_inputs(self, wants_o: bool) -> tuple[Tensor | None, ...]:
        """Those of (x, o, gate, bias, shift, scale), as autograd takes them; o's only where it is wanted."""
        return self.dx, self.d_o if wants_o else None, self.dgate, self.dbias, self.dshift, self.dscale


def branch_backward(
    dx_new: Tensor | None,
    du: Tensor | None,
    x_new: Tensor | None,
    stats: Tensor | None,
    branch: tuple[Tensor | None, Tensor | None, Tensor | None],
    shift: Tensor | None,
    scale: Tensor | None,
    remake_u: bool = False,
    o_places: Tensor | None = None,
    u_places: Tensor | None = None,
) -> BranchGradients:
    """The backward op with its absent outputs resolved.

    Args:
        branch: (o, gate, bias); o is not read without a gate. Where there is no branch, d_o means nothing.
        o_places, u_places: where rows of o and of its gradient, or of du and u, lie; see `Branch`.
    """
    o, gate, bias = branch
    args = (dx_new, du, x_new, stats, o, bias, gate, shift, scale, remake_u, o_places, u_places)
    dx, d_o, dbias, modulation, u = backward_op(*args)
    if scale is None and (dx_new is None or du is None):
        dx = dx_new if du is None else du
    if gate is None:
        d_o = dx
    dshift = dscale = dgate = None
    if scale is not None:
        dshift, dscale = (modulation[i].view(scale.shape) for i in (0, 1))
    if gate is not None:
        dgate = modulation[-1].view(gate.shape)
    return BranchGradients(
        dx, d_o, None if bias is None else dbias, dgate, dshift, dscale, u if remake_u else None
    )  # fmt: skip


class _LayerNormModulate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, shift, scale, eps):
        u, stats = library.below_autograd(layer_norm_modulate_op, x, shift, scale, eps)
        ctx.save_for_backward(x, stats, scale)
        ctx.mark_non_differentiable(stats)
        return u, stats

    @staticmethod
    def backward(ctx, du, _):
        x, stats, scale = ctx.saved_tensors
        grads = branch_backward(None, du, x, stats, (None, None, None), None, scale)
        return grads.dx, grads.dshift, grads.dscale, None


class _GateResidual(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, o, bias, gate, places=None):
        ctx.save_for_backward(o if gate is not None else None, bias, gate, places)
        return library.below_autograd(gate_residual_op, x, o, bias, gate, places)

    @staticmethod
    def backward(ctx, dx_new):
        o, bias, gate, places = ctx.saved_tensors
        grads = branch_backward(dx_new, None, None, None, (o, gate, bias), None, None, o_places=places)
        return grads.dx, grads.d_o, grads.dbias, grads.dgate, None


class _GateResidualLayerNormModulate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, o, bias, gate, shift, scale, eps, places=None):
        ctx.set_materialize_grads(False)
        args = (x, o, bias, gate, shift, scale, eps, places)
        x_new, u, stats = library.below_autograd(gate_residual_layer_norm_modulate_op, *args)
        ctx.save_for_backward(x_new, stats, o if gate is not None else None, bias, gate, scale, places)
        ctx.mark_non_differentiable(stats)
        return x_new, u, stats

    @staticmethod
    def backward(ctx, dx_new, du, _):
        x_new, stats, o, bias, gate, scale, places = ctx.saved_tensors
        if du is None:  # only the residual stream is used further
            grads = branch_backward(dx_new, None, None, None, (o, gate, bias), None, None)
            return grads.dx, grads.d_o, grads.dbias, grads.dgate, None, None, None, None
        grads = branch_backward(dx_new, du, x_new, stats, (o, gate, bias), None, scale, u_places=places)
        return grads.dx, grads.d_o, grads.dbias, grads.dgate, grads.dshift, grads.dscale, None, None


library.differentiable(layer_norm_modulate_op, _LayerNormModulate)
library.differentiable(gate_residual_op, _GateResidual)
library.differentiable(gate_residual_layer_norm_modulate_op, _GateResidualLayerNormModulate)


class _WithoutGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, *parameters):
        ctx.save_for_backward(*parameters)
        return x.view_as(x)

    @staticmethod
    def backward(ctx, dx):
        return dx, *(torch.zeros_like(p) for p in ctx.saved_tensors)


def without_gradient(x: Tensor, *parameters: Tensor | None) -> Tensor:
    """x, as if it came from `parameters` by a function that does not depend on them: their gradients are zeros.

    Distributed training waits for a gradient of every parameter, also in a step that can do without some.
    """
    given = [p for p in parameters if p is not None]
    return _WithoutGradient.apply(x, *given) if given else x
