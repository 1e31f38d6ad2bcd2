"""GEMMs of the model's linear layers with their surroundings, as separate passes and in cuBLASLt's epilogues: suite
"linear". Needs a GPU.

    python -m stdit_fast.benchmarks.linear --out linear.jsonl

`gemm` is the bare GEMM by PyTorch, `passes` it and our passes around it, `cublaslt` the GEMM with an epilogue. Cases
are product-C_out-C_in-tokens; what one has to deliver is in `PARTS`. `mlp` is all of an MLP, forward and backward:
`gemms` are its six products alone, `ours` what the ops run for it without the norm before and the gate behind.
"""

import argparse
import sys
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from stdit_fast.benchmarks.ops import quantiles
from stdit_fast.benchmarks.records import Record, append, results_file
from stdit_fast.errors import run_command
from stdit_fast.kernels import gelu
from stdit_fast.ops import cublaslt
from stdit_fast.ops.linear import column_sum_op
from stdit_fast.ops.linear import weight_gradient as weight_gradient_of
from stdit_fast.ops.linear_gelu import linear_gelu_backward, linear_gelu_op
from stdit_fast.ops.mlp import definition as mlp_definition

CHANNELS = 1152
HIDDEN = 4 * CHANNELS
PARTS = {
    "gelu_forward": "h = x W^T + bias kept for the backward pass, gelu(h)",
    "gelu_backward": "dh = (dy W) gelu'(h), its sum over the rows, and gelu(h) again unless it is kept",
    "weight_gradient": "dW = dy^T x, the bias's gradient",
    "mlp": "y = gelu(x W1^T + b1) W2^T; the gradients of x, W1, b1 and W2",
}
Implementations = dict[str, Callable[[], object]]


def randn(*shape: int, scale: float = 1.0) -> Tensor:
    return (scale * torch.randn(*shape, device="cuda")).bfloat16()


def gelu_forward(tokens: int, ranks: int) -> Implementations:
    x, weight, bias = randn(tokens, CHANNELS), randn(HIDDEN, CHANNELS, scale=CHANNELS**-0.5), randn(HIDDEN)
    found = {
        "gemm": lambda: F.linear(x, weight),
        "passes": lambda: gelu.forward(F.linear(x, weight, bias)),
        "cublaslt gemm": lambda: cublaslt.linear(x, weight),
    }
    for rank in range(ranks):
        found[_named("cublaslt", rank)] = lambda rank=rank: cublaslt.linear_gelu(x, weight, bias, rank=rank)
    return found


def gelu_backward(tokens: int, ranks: int) -> Implementations:
    dy, weight = randn(tokens, CHANNELS), randn(CHANNELS, HIDDEN, scale=CHANNELS**-0.5)
    hidden = randn(tokens, HIDDEN)

    def in_epilogue(rank: int) -> Tensor:
        return cublaslt.gelu_input_gradient(dy, weight, hidden, rank=rank)

    def activation_kept(rank: int) -> tuple[Tensor, Tensor]:
        dh = in_epilogue(rank)
        return dh, column_sum_op(dh)

    found = {"gemm": lambda: dy @ weight, "passes": lambda: gelu.backward(dy @ weight, hidden)}
    for rank in range(ranks):
        found[_named("cublaslt gradient alone", rank)] = lambda rank=rank: in_epilogue(rank)
        found[_named("cublaslt, activation kept", rank)] = lambda rank=rank: activation_kept(rank)
    return found


def weight_gradient(tokens: int, out: int, into: int) -> Implementations:
    dy, x = randn(tokens, out), randn(tokens, into)
    return {
        "gemm": lambda: dy.t() @ x,
        "gemm of the transpose": lambda: x.t() @ dy,
        "passes": lambda: (dy.t() @ x, column_sum_op(dy)),
    }


def mlp(tokens: int) -> Implementations:
    x, dy, hidden = randn(tokens, CHANNELS), randn(tokens, CHANNELS), randn(tokens, HIDDEN)
    fc1, fc2 = randn(HIDDEN, CHANNELS, scale=CHANNELS**-0.5), randn(CHANNELS, HIDDEN, scale=HIDDEN**-0.5)
    bias = randn(HIDDEN)

    def gemms() -> tuple[Tensor, ...]:
        """Of any values: each is as long whatever the others give."""
        forward = F.linear(x, fc1), F.linear(hidden, fc2)
        return *forward, dy @ fc2, weight_gradient_of(dy, hidden, fc2), hidden @ fc1, weight_gradient_of(hidden, x, fc1)

    def ours(keep: bool) -> tuple[Tensor, ...]:
        activation, h = linear_gelu_op(x, fc1, bias)
        y = F.linear(activation, fc2)
        dh, dbias, dfc2 = linear_gelu_backward(dy, h, activation if keep else None, fc2, True)
        return y, dh @ fc1, weight_gradient_of(dh, x, fc1), dbias, dfc2

    leaves = [t.requires_grad_() for t in (x.clone(), fc1.clone(), bias.clone(), fc2.clone())]

    def plain() -> tuple[Tensor, ...]:
        y = mlp_definition(*leaves)
        return y.detach(), *torch.autograd.grad(y, leaves, dy)

    for keep in (False, True):
        for got, want in zip(ours(keep), plain(), strict=True):
            error = float((got.double() - want.double()).norm() / want.double().norm())
            if not error < 2e-2:
                raise SystemExit(f"the MLP of {tokens} tokens is wrong: error {error:.1e} of {list(got.shape)}")
    return {
        "gemms": gemms,
        "ours, activation kept": lambda: ours(True),
        "ours, activation made again": lambda: ours(False),
        "plain": plain,
    }


def _named(name: str, rank: int) -> str:
    return f"{name}, proposal {rank + 1}" if rank else name


def cases(tokens: int, ranks: int) -> Iterator[tuple[str, int, Callable[[], Implementations]]]:
    """(name, operations, what makes the inputs and answers the implementations)."""
    products = {
        f"gelu_forward-{HIDDEN}-{CHANNELS}": (HIDDEN * CHANNELS, lambda: gelu_forward(tokens, ranks)),
        f"gelu_backward-{CHANNELS}-{HIDDEN}": (HIDDEN * CHANNELS, lambda: gelu_backward(tokens, ranks)),
    }
    for out, into in ((HIDDEN, CHANNELS), (3 * CHANNELS, CHANNELS), (CHANNELS, CHANNELS), (CHANNELS, HIDDEN)):
        products[f"weight_gradient-{out}-{into}"] = (
            out * into, lambda out=out, into=into: weight_gradient(tokens, out, into)
        )  # fmt: skip
    products[f"mlp-{HIDDEN}-{CHANNELS}"] = (6 * HIDDEN * CHANNELS, lambda: mlp(tokens))
    for name, (size, make) in products.items():
        yield f"{name}-{tokens}", 2 * tokens * size, make


def repeats_exactly(function: Callable[[], object], times: int = 5) -> bool:
    """Whether calls give the same bits."""

    def outputs() -> list[Tensor]:
        out = function()
        return [t for t in (out if isinstance(out, tuple) else (out,)) if t is not None]

    first = outputs()
    return all(torch.equal(a, b) for _ in range(times) for a, b in zip(first, outputs(), strict=True))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[13_824, 110_160])
    parser.add_argument("--proposals", type=int, default=1, help="algorithms to try, cuBLASLt's best first")
    parser.add_argument("--only", default="", help="cases whose name holds this")
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--out", type=results_file, help="results file to append to")
    args = parser.parse_args()
    usable, reason = cublaslt.available()
    print(reason)
    if not usable:
        return 1
    for tokens in args.tokens:
        for name, flops, make in cases(tokens, args.proposals):
            if args.only not in name:
                continue
            for impl, function in make().items():
                try:
                    same = repeats_exactly(function)
                except RuntimeError as error:
                    print(f"{name:<34}{impl:<40}{error}", flush=True)
                    continue
                times = quantiles(function, args.repeats)
                record = Record("linear", name, impl, *times, flops=flops, notes={"repeats_exactly": same})
                if args.out:
                    append(args.out, [record])
                rate = flops / times[0] / 1e9
                print(f"{name:<34}{impl:<40}{times[0]:>8.3f}{times[1]:>8.3f}{times[2]:>8.3f}{rate:>7.0f}"
                      f"{'' if same else '  DIFFERS ON REPEAT'}", flush=True)  # fmt: skip
            torch.cuda.empty_cache()
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
