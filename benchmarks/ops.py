"""Each fused op, forward and backward, beside plain PyTorch and its compiler: suite "ops". Needs a GPU.

    python -m stdit_fast.benchmarks.ops --out ops.jsonl

Bytes are those that the op must move (its docstring counts them); the share of the ceiling is of the bandwidth of a
device copy, measured in the same run. Inputs are larger than the cache. Backward runs are timed without the forward,
and nothing is timed with the CPU's launching.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from stdit_fast import ops
from stdit_fast.benchmarks.monitor import watched
from stdit_fast.benchmarks.profile_kernel import parse_size
from stdit_fast.benchmarks.records import Record, append, need_gpu, results_file
from stdit_fast.errors import run_command
from stdit_fast.kernels import gelu
from stdit_fast.ops.cross_attention import definition as cross_attention_definition
from stdit_fast.ops.gate_residual import definition as gate_residual_definition
from stdit_fast.ops.gate_residual_layer_norm_modulate import definition as joined_definition
from stdit_fast.ops.layer_norm_modulate import definition as layer_norm_modulate_definition
from stdit_fast.ops.spatial_attention import definition as spatial_attention_definition
from stdit_fast.ops.temporal_attention import definition as temporal_attention_definition

HEADS, HEAD_DIM = 16, 72
IMPLEMENTATIONS = ("reference", "compile", "fused")
COLUMNS = f"{'case':<52}{'impl':<11}{'ms':>9}{'low':>9}{'high':>9}{'TB/s':>7}{'of copy':>9}"


# Reads and writes forward and backward, in values per token and channel; each op's docstring counts them.
UNITS = {
    "layer_norm_modulate": (2, 3),
    "gate_residual": (3, 3),
    "gate_residual_layer_norm_modulate": (4, 6),
    "gelu": (8, 16),
    "temporal_attention": (4, 7),
    "spatial_attention": (4, 8),
    "cross_attention": (2, 4),
}
WEIGHTS = ("q_weight", "k_weight")


class _Gelu(torch.autograd.Function):
    """The passes behind and before a GEMM that has no GELU in its epilogue."""

    @staticmethod
    def forward(ctx, h):
        ctx.save_for_backward(h)
        return gelu.forward(h)

    @staticmethod
    def backward(ctx, da):
        return gelu.backward(da.contiguous(), *ctx.saved_tensors)[0]


@dataclass
class Case:
    """One op on one input.

    Attributes:
        op: its name; name: with the size.
        tokens, channels: samples x frames x positions, and values of each.
        inputs: what gradients are taken of, by name.
        fused, plain: functions of those.
        layout: of the packed text, for cross attention; rotation: of q and k, for temporal attention.
    """

    op: str
    name: str
    tokens: int
    channels: int
    inputs: dict[str, Tensor]
    fused: Callable
    plain: Callable
    layout: ops.TextLayout | None = None
    rotation: Tensor | None = None

    def bytes(self, backward: bool) -> int:
        return least_bytes(self.op, self.tokens, self.channels, backward)


def least_bytes(op: str, tokens: int, channels: int, backward: bool) -> int:
    """Bytes that an op must move in bfloat16."""
    return int(UNITS[op][backward] * tokens * channels * 2)


def attention_flops(op: str, batch: int, frames: int, positions: int, heads: int, backward: bool) -> int | None:
    """Operations of an attention's products, two forward and five backward; None for other ops."""
    keys = {"spatial_attention": positions, "temporal_attention": frames, "cross_attention": None}
    if op not in keys:
        return None
    pairs = frames * positions * (batch * keys[op] if keys[op] else sum(text_lengths(batch)))
    return (10 if backward else 4) * pairs * heads * HEAD_DIM


def text_lengths(batch: int) -> list[int]:
    """Tokens of each sample's caption in the cases of cross attention."""
    return [1 + (37 * i) % 200 for i in range(batch)]


def build(op: str, batch: int, frames: int, positions: int, device: str = "cuda", heads: int = HEADS) -> Case:
    """One op at one size, in bfloat16 on a GPU and in float32 elsewhere; random inputs, the same each time."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    backend = "fused" if device == "cuda" else "auto"
    generator = torch.Generator(device).manual_seed(0)
    channels, tokens = heads * HEAD_DIM, batch * frames * positions
    shape = (batch, frames, positions, channels)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, generator=generator).to(dtype)

    def modulation() -> Tensor:
        return randn(batch, frames, channels)

    def joined(function, **options):
        return lambda x, o, gate, bias, shift, scale: function(x, ops.Branch(o, gate, bias), shift, scale, **options)

    def case(inputs: dict[str, Tensor], fused: Callable, plain: Callable, **more) -> Case:
        return Case(op, f"{op}-{batch}x{frames}x{positions}", tokens, channels, inputs, fused, plain, **more)

    if op == "layer_norm_modulate":
        return case(
            dict(x=randn(*shape), shift=modulation(), scale=modulation()),
            lambda **kw: ops.layer_norm_modulate(**kw, backend=backend),
            layer_norm_modulate_definition,
        )
    if op == "gate_residual":
        return case(
            dict(x=randn(*shape), o=randn(*shape), gate=modulation(), bias=randn(channels)),
            lambda **kw: ops.gate_residual(**kw, backend=backend),
            gate_residual_definition,
        )
    if op == "gate_residual_layer_norm_modulate":
        return case(
            dict(x=randn(*shape), o=randn(*shape), gate=modulation(), bias=randn(channels))
            | dict(shift=modulation(), scale=modulation()),
            joined(ops.gate_residual_layer_norm_modulate, backend=backend),
            joined(joined_definition),
        )
    if op == "gelu":

        def plain_gelu(h: Tensor) -> Tensor:
            return torch.nn.functional.gelu(h, approximate="tanh")

        return case(
            dict(h=randn(tokens, 4 * channels)),
            (lambda h: _Gelu.apply(h)) if device == "cuda" else plain_gelu,
            plain_gelu,
        )
    if op == "cross_attention":
        lengths = text_lengths(batch)
        mask = torch.arange(200) < torch.tensor(lengths)[:, None]
        layout = ops.text_layout(mask, batch, 200, torch.device(device))
        return case(
            dict(q=randn(batch, frames * positions, heads, HEAD_DIM), kv=randn(sum(lengths), 2, heads, HEAD_DIM)),
            lambda **kw: ops.cross_attention(**kw, layout=layout, backend=backend),
            lambda **kw: cross_attention_definition(**kw, layout=layout),
            layout=layout,
        )
    weights = {name: 1 + 0.1 * randn(HEAD_DIM) for name in WEIGHTS}
    qkv = dict(qkv=randn(*shape[:3], 3, heads, HEAD_DIM), **weights)
    if op == "spatial_attention":
        return case(
            qkv,
            lambda **kw: ops.spatial_attention(**kw, backend=backend),
            lambda **kw: spatial_attention_definition(**kw, eps=1e-6),
        )
    if op == "temporal_attention":
        rotation = ops.rotation_table(10000 ** (-torch.arange(0, HEAD_DIM, 2, device=device) / HEAD_DIM), frames)
        return case(
            qkv,
            lambda **kw: ops.temporal_attention(**kw, rotation=rotation, backend=backend),
            lambda **kw: temporal_attention_definition(**kw, rotation=rotation, rotate_first=False, eps=1e-6),
            rotation=rotation,
        )
    raise ValueError(f"there is no case of {op}; there are {', '.join(UNITS)}")


def cases(batch: int, frames: int, positions: int) -> Iterator[Case]:
    """The ops at one size, on the GPU."""
    return (build(op, batch, frames, positions) for op in UNITS)


def quantiles(function: Callable, repeats: int = 30) -> list[float]:
    """Median, fastest and slowest tenth of a function's time on the GPU, in milliseconds.

    Before each run the cache is overwritten, often enough that the CPU has launched the whole run before the GPU
    begins with it: how long launching takes is no part of the figure.
    """
    for _ in range(3):
        function()
    flush = torch.empty(2**28, dtype=torch.int8, device="cuda")
    times = []
    for _ in range(repeats):
        started, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        for _ in range(25):
            flush.zero_()
        started.record()
        function()
        ended.record()
        times.append((started, ended))
    torch.cuda.synchronize()
    times = sorted(started.elapsed_time(ended) for started, ended in times)
    return [times[repeats // 2], times[repeats // 10], times[-repeats // 10 - 1]]


def copy_bandwidth() -> float:
    """Bytes a second that a copy within the device's memory reads and writes."""
    source = torch.randn(2**28, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() * 4 / (quantiles(lambda: target.copy_(source))[0] / 1e3)


def measure(case: Case, function: Callable) -> Iterator[tuple[str, list[float]]]:
    """("forward" or "backward", times) of one implementation."""
    inputs = {name: value.detach().requires_grad_() for name, value in case.inputs.items()}
    with torch.no_grad():
        yield "forward", quantiles(lambda: function(**inputs))
    out = function(**inputs)
    outs = out if isinstance(out, tuple) else (out,)
    grads = [torch.randn_like(o) for o in outs]
    yield "backward", quantiles(lambda: torch.autograd.grad(outs, list(inputs.values()), grads, retain_graph=True))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", default=["32x16x144", "5x64x256"], help="samples x frames x positions")
    parser.add_argument("--impl", nargs="+", default=list(IMPLEMENTATIONS), choices=IMPLEMENTATIONS)
    parser.add_argument("--only", help="cases whose name holds this")
    parser.add_argument("--out", type=results_file, help="results file to append to")
    args = parser.parse_args()
    sizes = [parse_size(size) for size in args.sizes]
    need_gpu("kernels are timed on a GPU")
    ceiling = copy_bandwidth()
    print(f"device copy {ceiling / 1e12:.2f} TB/s\n{COLUMNS}")
    for size in sizes:
        for case in cases(*size):
            if args.only and args.only not in case.name:
                continue
            for impl in args.impl:
                torch.compiler.reset()
                plain = torch.compile(case.plain) if impl == "compile" else case.plain
                with watched() as gpu:
                    found = list(measure(case, case.fused if impl == "fused" else plain))
                for direction, times in found:
                    moved = case.bytes(direction == "backward")
                    rate = moved / times[0] * 1e3
                    name = f"{case.name}-{direction}"
                    notes = {"share_of_copy": round(rate / ceiling, 3), "copy_bytes_per_s": ceiling} | gpu
                    if args.out:
                        append(args.out, [Record("ops", name, impl, *times, bytes=moved, notes=notes)])
                    print(f"{name:<52}{impl:<11}{times[0]:>9.3f}{times[1]:>9.3f}{times[2]:>9.3f}"
                          f"{rate / 1e12:>7.2f}{rate / ceiling:>9.0%}", flush=True)  # fmt: skip
            torch.cuda.empty_cache()
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
