"""LayerNorm, modulation, gates and residuals fused, alone and with the linear layers behind them."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from kernel_checks import DEVICE, check, dtypes, randn

from stdit_fast import ops
from stdit_fast.kernels import gelu
from stdit_fast.ops.gate_residual import definition as gate_residual_definition
from stdit_fast.ops.gate_residual_layer_norm_modulate import definition as joined_definition
from stdit_fast.ops.layer_norm_modulate import definition as layer_norm_modulate_definition
from stdit_fast.ops.linear import column_sum_op
from stdit_fast.ops.linear_gelu import gelu_backward_op, gelu_input_gradient_op, linear_gelu_op
from stdit_fast.ops.mlp import definition as mlp_definition
from stdit_fast.ops.mlp import modulated_definition
from stdit_fast.ops.modulated_linear import definition as modulated_linear_definition
from stdit_fast.ops.modulated_linear import plain_definition
from stdit_fast.ops.residual_norm import (
    backward_op,
    gate_residual_layer_norm_modulate_op,
    gate_residual_op,
    layer_norm_modulate_op,
    put_into,
    rows_of,
    taken_from,
)

SHAPES = [(2, 3, 5, 72), (1, 2, 33, 8)] + ([(2, 2, 33, 1152)] if DEVICE == "cuda" else [(1, 1, 2, 1152)])
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)
per_frame = pytest.mark.parametrize("per_frame", [False, True], ids=["per sample", "per frame"])


def modulation(shape, per_frame, seed):
    batch, frames, _, channels = shape
    return randn(batch, frames if per_frame else 1, channels, seed=seed)


@dtypes
@shapes
@per_frame
def test_layer_norm_modulate(shape, per_frame, dtype):
    inputs = dict(x=3 + 2 * randn(*shape), shift=modulation(shape, per_frame, 1), scale=modulation(shape, per_frame, 2))
    fused = lambda **kw: ops.layer_norm_modulate(**kw, backend="fused")  # noqa: E731
    check(fused, layer_norm_modulate_definition, inputs, dtype)


@dtypes
@pytest.mark.parametrize("shape", SHAPES[:1])
@pytest.mark.parametrize("gate", [None, False, True], ids=["no gate", "per sample", "per frame"])
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
def test_gate_residual(shape, gate, bias, dtype):
    inputs = dict(x=randn(*shape), o=randn(*shape, seed=1))
    inputs["gate"] = None if gate is None else modulation(shape, gate, 2)
    inputs["bias"] = randn(shape[-1], seed=3) if bias else None
    check(lambda **kw: ops.gate_residual(**kw, backend="fused"), gate_residual_definition, inputs, dtype)


def branch_inputs(shape, per_frame, gated=True):
    return dict(
        x=randn(*shape),
        o=randn(*shape, seed=1),
        gate=modulation(shape, per_frame, 2) if gated else None,
        bias_o=randn(shape[-1], seed=3),
        shift=modulation(shape, per_frame, 4),
        scale=modulation(shape, per_frame, 5),
    )


def joined(function, **fixed):
    """Calls an op with the branch's parts as separate inputs."""

    def call(x, o, gate, bias_o, **others):
        return function(x, None if o is None else ops.Branch(o, gate, bias_o), **others, **fixed)

    return call


@dtypes
@shapes
@per_frame
@pytest.mark.parametrize("gated", [True, False], ids=["gate", "no gate"])
def test_gate_residual_layer_norm_modulate(shape, per_frame, gated, dtype):
    inputs = branch_inputs(shape, per_frame, gated)
    fused = joined(ops.gate_residual_layer_norm_modulate, backend="fused")
    check(fused, joined(joined_definition), inputs, dtype)


@dtypes
@per_frame
@pytest.mark.parametrize("with_branch", [True, False], ids=["branch", "no branch"])
def test_modulated_linear(per_frame, with_branch, dtype):
    shape = (2, 3, 5, 72)
    inputs = branch_inputs(shape, per_frame) | dict(weight=randn(24, 72, seed=6, scale=0.1), bias=randn(24, seed=7))
    if not with_branch:
        inputs |= dict(o=None, gate=None, bias_o=None)
    fused = joined(ops.modulated_linear, backend="fused")
    check(fused, joined(modulated_linear_definition), inputs, dtype)


@dtypes
@per_frame
def test_gate_residual_linear(per_frame, dtype):
    inputs = branch_inputs((2, 3, 5, 72), per_frame) | dict(
        weight=randn(24, 72, seed=6, scale=0.1), bias=randn(24, seed=7)
    )
    del inputs["shift"], inputs["scale"]
    check(joined(ops.gate_residual_linear, backend="fused"), joined(plain_definition), inputs, dtype)


def mlp_weights(channels, hidden):
    return dict(
        fc1_weight=randn(hidden, channels, seed=6, scale=channels**-0.5),
        fc1_bias=randn(hidden, seed=7),
        fc2_weight=randn(channels, hidden, seed=8, scale=hidden**-0.5),
    )


@dtypes
@pytest.mark.parametrize("keep_activation", [False, True], ids=["", "kept"])
@pytest.mark.parametrize("with_branch", [True, False], ids=["branch", "no branch"])
def test_modulated_mlp(with_branch, keep_activation, dtype):
    if keep_activation and DEVICE == "cpu":
        pytest.skip("no GPU: nothing is kept")
    inputs = branch_inputs((2, 3, 5, 72), True, gated=False) | mlp_weights(72, 200)
    if not with_branch:
        inputs |= dict(o=None, gate=None, bias_o=None)
    fused = joined(ops.modulated_mlp, backend="fused", keep_activation=keep_activation)
    check(fused, joined(modulated_definition), inputs, dtype)


@dtypes
@pytest.mark.parametrize("hidden", [8, 200, 1024])
def test_mlp(hidden, dtype):
    inputs = dict(x=randn(3, 11, 40)) | mlp_weights(40, hidden) | dict(fc2_bias=randn(40, seed=9))
    check(lambda **kw: ops.mlp(**kw, backend="fused"), mlp_definition, inputs, dtype)


def test_gelu_at_both_ends():
    h = torch.tensor([[-1e4, -200.0, -20.0, 0.0, 20.0, 200.0, 1e4, 1.0]], device=DEVICE)
    want = torch.nn.functional.gelu(h, approximate="tanh")
    torch.testing.assert_close(gelu.forward(h), want)
    dh, activation, _ = gelu.backward(torch.ones_like(h), h)
    torch.testing.assert_close(dh, torch.tensor([[0, 0, 0, 0.5, 1, 1, 1, 1.0829640]], device=DEVICE))
    torch.testing.assert_close(activation, want)


def test_one_gradient_is_enough():
    """What comes after may use the residual stream alone, or the branch alone."""
    shape = (2, 3, 5, 72)
    for used in (0, 1):
        fused, plain = (
            {
                k: v.clone().requires_grad_() if k not in ("weight", "bias") else v
                for k, v in (
                    branch_inputs(shape, True) | dict(weight=randn(8, 72, seed=6), bias=randn(8, seed=7))
                ).items()
            }
            for _ in range(2)
        )
        joined(ops.modulated_linear, backend="fused")(**fused)[used].square().sum().backward()
        joined(modulated_linear_definition)(**plain)[used].square().sum().backward()
        for name in ("x", "o", "gate", "bias_o"):
            torch.testing.assert_close(fused[name].grad, plain[name].grad, rtol=1e-3, atol=1e-3)


def test_frozen_weights_get_no_gradient_and_the_rest_the_same():
    given = branch_inputs((1, 2, 3, 16), True) | mlp_weights(16, 32)
    leaves = {k: v.clone().requires_grad_(not k.startswith("fc")) for k, v in given.items()}
    joined(ops.modulated_mlp, backend="fused")(**leaves)[1].square().sum().backward()
    trained = {k: v.clone().requires_grad_() for k, v in given.items()}
    joined(ops.modulated_mlp, backend="fused")(**trained)[1].square().sum().backward()
    for name, leaf in leaves.items():
        if name.startswith("fc"):
            assert leaf.grad is None and trained[name].grad is not None
        else:
            assert torch.equal(leaf.grad, trained[name].grad), name


def test_a_gate_for_each_sample_and_a_norm_for_each_frame():
    shape = (2, 3, 5, 72)
    inputs = branch_inputs(shape, True) | dict(gate=modulation(shape, False, 2))
    check(
        joined(ops.gate_residual_layer_norm_modulate, backend="fused"), joined(joined_definition), inputs, torch.float32
    )


def test_tensors_that_are_not_contiguous():
    x = randn(3, 2, 72, 5).permute(1, 0, 3, 2)  # [2, 3, 5, 72]
    rows = randn(2, 3, 9, 72, seed=1)
    for got, want in zip(
        ops.gate_residual_layer_norm_modulate(
            x, ops.Branch(x + 1, rows[:, :, 2], None), rows[:, :, 0], rows[:, :, 1], backend="fused"
        ),
        joined_definition(x, ops.Branch(x + 1, rows[:, :, 2], None), rows[:, :, 0], rows[:, :, 1]),
        strict=True,
    ):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rows", [1, 31, 32, 33, 700])
def test_column_sum(rows):
    x = randn(rows, 40)
    torch.testing.assert_close(column_sum_op(x), x.double().sum(0).float(), rtol=1e-5, atol=1e-5)


@dtypes
@pytest.mark.parametrize("rows", [1, 127, 144, 700, *([4_099, 13_824, 110_160] if DEVICE == "cuda" else [])])
def test_a_final_layers_bias(rows, dtype):
    """32 columns, 4 patch positions of 8 values: far fewer than the other layers that the sum serves."""
    x = randn(rows, 32, dtype=dtype)
    want, got = x.double().sum(0), column_sum_op(x)
    assert got.dtype == dtype and torch.equal(got, column_sum_op(x))
    allowed = 0.6 * torch.finfo(dtype).eps if dtype != torch.float32 else 4e-6
    assert float((got.double() - want).norm() / want.norm()) < allowed
    inputs = {"x": randn(1, rows, 72), "weight": randn(32, 72, seed=1, scale=0.1), "bias": randn(32, seed=2)}
    check(partial(ops.projection, backend="fused"), F.linear, inputs, dtype)


def test_another_dtype_for_the_modulation_is_refused():
    x = randn(1, 1, 2, 8)
    with pytest.raises(ValueError, match="layer_norm_modulate: modulation is torch.float16 and x torch.float32"):
        ops.layer_norm_modulate(x, x[:, :, 0].half(), x[:, :, 0].half(), backend="fused")


def test_registered_ops():
    def leaf(*shape, seed=0):
        return randn(*shape, seed=seed).requires_grad_()

    x, o, bias, row = leaf(1, 2, 3, 16), leaf(1, 2, 3, 16, seed=1), leaf(16), leaf(1, 2, 16)
    stats = torch.rand(6, 2, device=DEVICE)
    torch.library.opcheck(layer_norm_modulate_op, (x, row, row, 1e-6))
    torch.library.opcheck(gate_residual_op, (x, o, bias, row))
    torch.library.opcheck(gate_residual_op, (x, o, None, None))
    torch.library.opcheck(gate_residual_layer_norm_modulate_op, (x, o, bias, row, row, row, 1e-6))
    places = travelling(*x.shape[:3], 2)
    torch.library.opcheck(gate_residual_op, (x, o.flatten(0, 2), bias, row, places))
    torch.library.opcheck(gate_residual_layer_norm_modulate_op, (x, o, bias, row, row, row, 1e-6, places))
    plain = [t.detach() for t in (x, o, bias, row)]
    x, o, bias, row = plain
    torch.library.opcheck(backward_op, (x, o, x, stats, o, bias, row, row, row, True))
    torch.library.opcheck(backward_op, (x, None, None, None, o, bias, None, None, None, False))
    torch.library.opcheck(linear_gelu_op, (randn(5, 16), randn(24, 16), randn(24)))
    torch.library.opcheck(gelu_backward_op, (randn(5, 24), randn(5, 24)))
    torch.library.opcheck(gelu_input_gradient_op, (randn(5, 16), randn(16, 24), randn(5, 24)))
    torch.library.opcheck(column_sum_op, (randn(5, 16),))


# ------------------------------------------------------------ rows in another order


def travelling(batch: int, frames: int, positions: int, parts: int) -> torch.Tensor:
    """Places [S, 2] of rows that lie as they leave for `parts` others."""
    table, begun = torch.empty(positions, 2, dtype=torch.int32), 0
    for part in torch.arange(positions).tensor_split(parts):
        table[part, 0] = begun + torch.arange(len(part), dtype=torch.int32)
        table[part, 1] = len(part)
        begun += batch * frames * len(part)
    return table.to(DEVICE)


def test_places_are_an_order():
    places = travelling(2, 3, 7, 3)
    rows = rows_of(places, 6)
    assert rows.sort().values.tolist() == list(range(42))
    assert rows[:7].tolist() == [0, 1, 2, 18, 19, 30, 31] and rows[7:10].tolist() == [3, 4, 5]
    x = randn(2, 3, 7, 8)
    assert torch.equal(taken_from(put_into(x, places), places, x), x)


@dtypes
@per_frame
@pytest.mark.parametrize("shape", [(2, 3, 7, 72), (1, 2, 33, 8)], ids=str)
def test_a_norm_whose_rows_leave(shape, per_frame, dtype):
    inputs = branch_inputs(shape, per_frame)
    places = travelling(*shape[:3], 3)
    fused = joined(ops.gate_residual_layer_norm_modulate, backend="fused", places=places)
    check(fused, joined(joined_definition, places=places), inputs, dtype)


@dtypes
@per_frame
@pytest.mark.parametrize("shape", [(2, 3, 7, 72), (1, 2, 33, 8)], ids=str)
def test_a_branch_whose_rows_come_back(shape, per_frame, dtype):
    weights = dict(weight=randn(24, shape[-1], seed=6, scale=0.1), bias=randn(24, seed=7))
    inputs = branch_inputs(shape, per_frame) | weights
    inputs["o"] = inputs["o"].flatten(0, 2)
    del inputs["shift"], inputs["scale"]
    places = travelling(*shape[:3], 2)

    def placed(function, **fixed):
        def call(x, o, gate, bias_o, **others):
            return function(x, ops.Branch(o, gate, bias_o, places), **others, **fixed)

        return call

    check(placed(ops.gate_residual_linear, backend="fused"), placed(plain_definition), inputs, dtype)


def test_the_same_bits_wherever_rows_lie():
    given = branch_inputs((2, 3, 7, 72), True)
    places, call = travelling(2, 3, 7, 3), joined(ops.gate_residual_layer_norm_modulate, backend="fused")
    want, got = call(**given), call(**given, places=places)
    assert torch.equal(got[0], want[0]) and torch.equal(taken_from(got[1], places, want[1]), want[1])


def test_places_that_do_not_fit():
    x, places = randn(1, 2, 4, 8), travelling(1, 2, 4, 2)
    row = randn(1, 1, 8)
    rows = x.flatten(0, 2)
    with pytest.raises(ValueError, match="gate_residual_linear: places of a branch without a gate"):
        ops.gate_residual_linear(x, ops.Branch(rows, None, None, places), randn(4, 8), randn(4))
    with pytest.raises(ValueError, match="gate_residual_linear: places are torch.int64"):
        ops.gate_residual_linear(x, ops.Branch(rows, row, None, places.long()), randn(4, 8), randn(4))
    with pytest.raises(ValueError, match="modulated_linear: the branch has places"):
        ops.modulated_linear(x, ops.Branch(rows, row, None, places), row, row, randn(4, 8), randn(4))
    with pytest.raises(ValueError, match="gate_residual_layer_norm_modulate: places has shape"):
        ops.gate_residual_layer_norm_modulate(x, ops.Branch(x, row), row, row, places=places[:3])
