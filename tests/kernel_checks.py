"""What every fused op is held to: its definition in float64, and plain PyTorch's own error in the same dtype."""

from collections import defaultdict
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Triton's interpreter, which serves where there is no GPU, multiplies bfloat16 wrongly.
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE == "cuda" else [])
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
SLACK = 1.3
GRADIENTS = 5 if DEVICE == "cuda" else 1  # random gradients to average errors over: of few numbers, one is chance


def randn(*shape: int, seed: int = 0, scale: float = 1.0, dtype=torch.float32) -> Tensor:
    """Normal values on the test device, the same in every dtype up to rounding."""
    generator = torch.Generator().manual_seed(1000 * seed + sum(shape))
    return (scale * torch.randn(*shape, generator=generator)).to(device=DEVICE, dtype=dtype)


def outputs_and_gradients(function: Callable, inputs: dict, grad_dtype: torch.dtype, seed: int) -> dict[str, Tensor]:
    """Outputs ("out0", ...) and gradients ("d_" + name) of every floating input of function(**inputs).

    The gradients of the outputs are random values rounded to `grad_dtype`.
    """

    def leaf(value):
        floating = isinstance(value, Tensor) and value.is_floating_point()
        return value.detach().clone().requires_grad_() if floating else value

    leaves = {name: leaf(value) for name, value in inputs.items()}
    out = function(**leaves)
    outs = out if isinstance(out, tuple) else (out,)
    grads = [randn(*o.shape, seed=90 + 10 * seed + i, dtype=grad_dtype) for i, o in enumerate(outs)]
    torch.autograd.backward(outs, [g.to(o.dtype) for g, o in zip(grads, outs, strict=True)])
    results = {f"out{i}": o.detach() for i, o in enumerate(outs)}
    for name, value in leaves.items():
        if isinstance(value, Tensor) and value.requires_grad:
            results[f"d_{name}"] = torch.zeros_like(value) if value.grad is None else value.grad
    return results


def cast(inputs: dict, dtype: torch.dtype) -> dict:
    return {
        name: value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in inputs.items()
    }


def relative_error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm().clamp_min(1e-30))


def check(fused: Callable, plain: Callable, inputs: dict[str, Tensor | None], dtype: torch.dtype, repeats=True) -> None:
    """Holds fused(**inputs) in `dtype` against plain(**inputs) in float64, outputs and every gradient.

    The error (relative norm) may be SLACK times what `plain` itself has in `dtype`, or one rounding where that is
    smaller (in float32 eight: short sums in another order differ by that, and each processor has its own order). A
    second run must give the same bits, unless a library serves part of the op that does not (`repeats` is False).
    """
    inputs = cast(inputs, dtype)
    rounding = torch.finfo(dtype).eps * (4 if dtype == torch.float32 else 0.5)
    ours_sum, theirs_sum, failures = defaultdict(float), defaultdict(float), []
    for seed in range(GRADIENTS):
        want = outputs_and_gradients(plain, cast(inputs, torch.float64), dtype, seed)
        theirs = outputs_and_gradients(plain, inputs, dtype, seed)
        ours = outputs_and_gradients(fused, inputs, dtype, seed)
        again = outputs_and_gradients(fused, inputs, dtype, seed)
        for name, exact in want.items():
            got = ours[name]
            assert got.shape == exact.shape and got.dtype == theirs[name].dtype, f"{name}: {got.shape} {got.dtype}"
            if repeats and not torch.equal(got, again[name]):
                failures.append(f"{name}: differs on repeat")
            if float(exact.norm()) == 0:
                assert float(got.double().norm()) < 1e-3, f"{name}: should be 0"
                continue
            ours_sum[name] += relative_error(got, exact) ** 2
            theirs_sum[name] += relative_error(theirs[name], exact) ** 2
    for name, square in ours_sum.items():
        error = (square / GRADIENTS) ** 0.5
        allowed = max(SLACK * (theirs_sum[name] / GRADIENTS) ** 0.5, rounding)
        if not error <= allowed:
            failures.append(f"{name}: error {error:.2e}, allowed {allowed:.2e}")
    assert not failures, "; ".join(failures)


@torch.no_grad()
def check_forward(
    fused: Callable, plain: Callable, inputs: dict[str, Tensor | None], dtype: torch.dtype
) -> tuple[Tensor, ...]:
    """`check` for ops without gradients; returns the fused outputs."""
    inputs = cast(inputs, dtype)
    rounding = torch.finfo(dtype).eps * (4 if dtype == torch.float32 else 0.5)

    def run(function: Callable, given: dict) -> tuple[Tensor, ...]:
        out = function(**given)
        return out if isinstance(out, tuple) else (out,)

    exact, theirs = run(plain, cast(inputs, torch.float64)), run(plain, inputs)
    ours, again = run(fused, inputs), run(fused, inputs)
    for i, (want, library, got, repeated) in enumerate(zip(exact, theirs, ours, again, strict=True)):
        assert got.shape == want.shape and got.dtype == library.dtype, f"out{i}: {got.shape} {got.dtype}"
        assert torch.equal(got, repeated), f"out{i}: differs on repeat"
        allowed = max(SLACK * relative_error(library, want), rounding)
        error = relative_error(got, want)
        assert error <= allowed, f"out{i}: error {error:.2e}, allowed {allowed:.2e}"
    return ours
