"""One fused op alone, in a loop: how long each of its kernels takes; under Nsight Compute, why. Needs a GPU.

    python -m stdit_fast.benchmarks.profile_kernel spatial_attention forward --size 6x16x144
    python -m stdit_fast.benchmarks.profile_kernel cross_attention backward --ncu --report cross

The ops and their inputs are those of `stdit_fast.benchmarks.ops`; beside them linear_gelu, the MLP's first GEMM and the
way back to its hidden values, and adamw, a whole step of the optimizer on the real model's shapes (forward alone, at no
other size). With --ncu one call is profiled, after others have compiled and warmed what there is, by the `ncu` on PATH:
its sections are printed, or written as FILE.ncu-rep.
"""

import argparse
import math
import shutil
import subprocess
import sys
from collections.abc import Callable

import torch

from stdit_fast.benchmarks.records import need_gpu
from stdit_fast.errors import ConfigError, nearest, run_command

OPS = (
    "layer_norm_modulate",
    "gate_residual",
    "gate_residual_layer_norm_modulate",
    "gelu",
    "temporal_attention",
    "spatial_attention",
    "cross_attention",
    "linear_gelu",
    "adamw",
)
WARM_UP = 3


def parse_size(size: str) -> tuple[int, int, int]:
    """(samples, frames, positions) of "32x16x144"."""
    parts = size.split("x")
    if len(parts) != 3 or not all(part.isdecimal() and int(part) for part in parts):
        raise ConfigError("size", size, "write samples x frames x positions, like 32x16x144")
    return tuple(map(int, parts))


def check_op(op: str, direction: str = "forward") -> str:
    if op not in OPS:
        raise ConfigError("op", op, nearest(op, OPS))
    if (op, direction) == ("adamw", "backward"):
        raise ConfigError("direction", direction, "adamw has no backward pass; write forward")
    return op


def ncu_command(args: argparse.Namespace) -> list[str]:
    """This script's own command under Nsight Compute, for one call.

    Raises:
        ConfigError: there is no `ncu`.
    """
    ncu = shutil.which("ncu")
    if ncu is None:
        raise ConfigError("ncu", None, "put Nsight Compute's ncu on PATH, or leave --ncu out for times alone")
    output = ["--force-overwrite", "--export", args.report] if args.report else ["--page", "details"]
    call = [args.op, args.direction, "--size", args.size, "--calls", "1", "--silent"]
    module = "stdit_fast.benchmarks.profile_kernel"
    # At the clocks that it runs with: ncu would set the base clock, for all who use the GPU.
    options = ["--profile-from-start", "off", "--clock-control", "none", "--set", args.set]
    return [ncu, *options, *output, sys.executable, "-m", module, *call]


def call_of(op: str, direction: str, size: tuple[int, int, int]) -> Callable[[], object]:
    """The op's forward or backward pass at a size, on random inputs."""
    if op == "adamw":
        from stdit_fast.benchmarks import cases_optimizer

        return cases_optimizer.prepare(lambda: cases_optimizer.ours, "cuda")
    if op == "linear_gelu":
        return _linear_gelu(direction, math.prod(size))
    from stdit_fast.benchmarks.ops import build

    case = build(op, *size)
    inputs = {name: value.requires_grad_(direction == "backward") for name, value in case.inputs.items()}
    if direction == "forward":
        return lambda: case.fused(**inputs)
    out = case.fused(**inputs)
    outs = out if isinstance(out, tuple) else (out,)
    grads = [torch.randn_like(o) for o in outs]
    return lambda: torch.autograd.grad(outs, list(inputs.values()), grads, retain_graph=True)


def _linear_gelu(direction: str, tokens: int) -> Callable[[], object]:
    """GELU in the epilogue of a GEMM, and its gradient with the activation kept; the weight's gradient is left out."""
    from stdit_fast.benchmarks.linear import CHANNELS, HIDDEN, randn
    from stdit_fast.ops.linear_gelu import linear_gelu_backward, linear_gelu_op

    x, bias = randn(tokens, CHANNELS), randn(HIDDEN)
    weight, back = randn(HIDDEN, CHANNELS, scale=CHANNELS**-0.5), randn(CHANNELS, HIDDEN, scale=HIDDEN**-0.5)
    if direction == "forward":
        return lambda: linear_gelu_op(x, weight, bias)
    activation, hidden = linear_gelu_op(x, weight, bias)
    return lambda: linear_gelu_backward(x, hidden, activation, back, False)


def kernel_times(call: Callable[[], object], calls: int) -> list[tuple[str, int, float]]:
    """(name, launches, microseconds of all) of each kernel that some calls launch, the longest first."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(calls):
            call()
        torch.cuda.synchronize()
    found = [(e.key, e.count, e.device_time_total) for e in profile.key_averages() if e.device_time_total]
    return sorted(found, key=lambda row: -row[2])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("op", help=", ".join(OPS))
    parser.add_argument("direction", choices=["forward", "backward"])
    parser.add_argument("--size", default="32x16x144", help="samples x frames x positions")
    parser.add_argument("--calls", type=int, default=20)
    parser.add_argument("--ncu", action="store_true", help="profile one call with Nsight Compute")
    parser.add_argument("--set", default="full", help="its set of sections")
    parser.add_argument("--report", metavar="FILE", help="write its report there and print no sections")
    parser.add_argument("--silent", action="store_true", help="run and print nothing, for another profiler around it")
    args = parser.parse_args()
    op, size = check_op(args.op, args.direction), parse_size(args.size)
    if args.calls < 1:
        raise ConfigError("calls", args.calls, "at least 1")
    if args.ncu:
        return subprocess.call(ncu_command(args))
    need_gpu("kernels are profiled on a GPU")
    torch.manual_seed(0)
    call = call_of(op, args.direction, size)
    for _ in range(WARM_UP):
        call()
    torch.cuda.synchronize()
    if args.silent:
        torch.cuda.profiler.start()
        for _ in range(args.calls):
            call()
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()
        return 0
    times = kernel_times(call, args.calls)
    for name, launches, total in times:
        print(f"{total / args.calls:>10.1f} us  {launches / args.calls:>5.1f} x  {name[:100]}")
    print(f"{sum(total for *_, total in times) / args.calls:>10.1f} us  all kernels of a call; mean of {args.calls}")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
