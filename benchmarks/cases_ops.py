"""The fused ops, forward and backward, beside plain PyTorch, its compiler, and the libraries that have the like."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from stdit_fast.benchmarks import ops, peers
from stdit_fast.benchmarks.registry import Case
from stdit_fast.ops.gate_residual import definition as gate_residual
from stdit_fast.ops.rms_norm import rms_norm
from stdit_fast.ops.temporal_attention import rotate

SIZES = ("32x16x144", "5x64x256")  # samples x frames x positions; larger than the cache
CPU_SIZE, CPU_HEADS = "2x4x36", 2
# bfloat16: some roundings of the result; of a gradient, those of all that it is made of.
TOLERANCES = {False: 2e-2, True: 1e-1}


def cases(device: str, quick: bool) -> Iterator[Case]:
    """Every op at every size, on the CPU small and plain."""
    for size in [CPU_SIZE] if device == "cpu" else SIZES[:1] if quick else SIZES:
        for op in ops.UNITS:
            for backward in (False, True):
                yield _case(op, size, backward, device)


def _case(op: str, size: str, backward: bool, device: str) -> Case:
    batch, frames, positions = map(int, size.split("x"))
    heads = ops.HEADS if device == "cuda" else CPU_HEADS
    make = partial(ops.build, op, batch, frames, positions, device, heads)
    bytes = ops.least_bytes(op, batch * frames * positions, heads * ops.HEAD_DIM, backward)
    return Case(
        "ops",
        f"{op}-{size}-{'backward' if backward else 'forward'}",
        {name: partial(prepare, make, choose, backward) for name, choose in _implementations(op, device).items()},
        bytes=bytes if device == "cuda" else 2 * bytes,  # float32
        flops=ops.attention_flops(op, batch, frames, positions, heads, backward),
        expected=partial(prepare, make, _plain, backward),
        tolerance=TOLERANCES[backward],
        rounds=20,
    )


def prepare(make: Callable[[], ops.Case], choose: Callable[[ops.Case], Callable], backward: bool):
    """A call of one implementation forward, or of its gradient alone."""
    case = make()
    function = choose(case)
    inputs = {name: value.detach().requires_grad_(backward) for name, value in case.inputs.items()}
    if not backward:
        return lambda: function(**inputs)
    out = function(**inputs)
    outs = out if isinstance(out, tuple) else (out,)
    generator = torch.Generator(outs[0].device).manual_seed(1)
    grads = [torch.randn(o.shape, device=o.device, generator=generator).to(o.dtype) for o in outs]
    return lambda: torch.autograd.grad(outs, list(inputs.values()), grads, retain_graph=True)


def _implementations(op: str, device: str) -> dict[str, Callable[[ops.Case], Callable]]:
    """Ours first."""
    if device == "cpu":
        return {"reference": _plain}
    found = {"fused": lambda case: case.fused, "reference": _plain, "compile": _compiled}
    if op == "layer_norm_modulate":
        found |= {name: partial(_with_layer_norm, find) for name, find in peers.LAYER_NORM.items()}
    if op == "gate_residual_layer_norm_modulate":
        found |= {name: partial(_joined_with_layer_norm, find) for name, find in peers.LAYER_NORM.items()}
    if op == "spatial_attention":
        found |= {name: partial(_with_attention, find) for name, find in peers.ATTENTION.items()}
    if op == "temporal_attention":
        found |= {name: partial(_over_frames, find) for name, find in peers.ATTENTION.items()}
    if op == "cross_attention":
        found |= {name: partial(_with_packed_attention, find) for name, find in peers.PACKED_ATTENTION.items()}
    return found


def _plain(case: ops.Case) -> Callable:
    return case.plain


def _compiled(case: ops.Case) -> Callable:
    torch.compiler.reset()
    return torch.compile(case.plain)


def _with_layer_norm(find: Callable[[], peers.LayerNorm], case: ops.Case) -> Callable:
    """A library's LayerNorm, then the modulation, as the original does it with apex."""
    layer_norm = find()

    def function(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        return layer_norm(x, 1e-6) * (1 + scale.unsqueeze(2)) + shift.unsqueeze(2)

    return function


def _joined_with_layer_norm(find: Callable[[], peers.LayerNorm], case: ops.Case) -> Callable:
    """Bias, gate and residual in plain PyTorch before that."""
    modulated = _with_layer_norm(find, case)

    def function(x: Tensor, o: Tensor, gate: Tensor, bias: Tensor, shift: Tensor, scale: Tensor):
        x = gate_residual(x, o, gate, bias)
        return x, modulated(x, shift, scale)

    return function


def _with_attention(find: Callable[[], peers.Attention], case: ops.Case) -> Callable:
    """RMSNorm of q and k in plain PyTorch, then a library's attention, as the original does it."""
    attention = find()

    def function(qkv: Tensor, q_weight: Tensor, k_weight: Tensor) -> Tensor:
        q, k, v = qkv.flatten(0, 1).unbind(2)  # [B*T, S, H, D]
        o = attention(rms_norm(q, q_weight, 1e-6), rms_norm(k, k_weight, 1e-6), v)
        return o.reshape(*qkv.shape[:3], -1)

    return function


def _over_frames(find: Callable[[], peers.Attention], case: ops.Case) -> Callable:
    """RMSNorm and rotation in plain PyTorch, then a library's attention over the frames of each position."""
    attention = find()

    def prepared(x: Tensor, weight: Tensor) -> Tensor:  # [B*S, T, H, D]
        return rotate(rms_norm(x, weight, 1e-6).transpose(1, 2), case.rotation).transpose(1, 2)

    def function(qkv: Tensor, q_weight: Tensor, k_weight: Tensor) -> Tensor:
        batch, frames, positions = qkv.shape[:3]
        q, k, v = qkv.transpose(1, 2).flatten(0, 1).unbind(2)  # [B*S, T, H, D]
        o = attention(prepared(q, q_weight), prepared(k, k_weight), v)
        return o.reshape(batch, positions, frames, -1).transpose(1, 2)

    return function


def _with_packed_attention(find: Callable[[], peers.PackedAttention], case: ops.Case) -> Callable:
    """A library's attention of each sample to its own text."""
    attention, lengths = find(), list(case.layout.lengths)

    def function(q: Tensor, kv: Tensor) -> Tensor:
        k, v = kv.unbind(1)
        return attention(q, k, v, lengths).flatten(2)

    return function
