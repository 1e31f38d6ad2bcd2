"""The cases of `registry.SUITES`, each implementation a test of its own; see conftest.py for the options."""

import gc

import pytest
import torch

from stdit_fast.benchmarks.monitor import Monitor
from stdit_fast.benchmarks.peers import Absent
from stdit_fast.benchmarks.registry import Case


def test_case(case: Case, implementation: str, benchmark, bench):
    """Prepares one implementation, holds its results against what is expected, and times it."""
    on_gpu = bench.device == "cuda"
    try:
        call = case.implementations[implementation]()
        results = call()
        error = None
        if case.expected is not None:
            error = _error(results, case.expected()())
        del results
        if error is not None and not error <= case.tolerance:
            raise AssertionError(f"{implementation} is wrong: relative error {error:.2g}, at most {case.tolerance:g}")
        if on_gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        with Monitor() as monitor:
            benchmark.pedantic(_waiting(call) if case.host and on_gpu else call, rounds=case.rounds,
                               warmup_rounds=case.warmup)  # fmt: skip
        bench.record(case, implementation, benchmark, error, monitor.summary() if on_gpu else None)
    except Absent as reason:
        bench.absent(case, implementation, str(reason))
        pytest.skip(str(reason))
    except torch.OutOfMemoryError:
        bench.absent(case, implementation, "out of memory")
        pytest.skip("out of memory")
    finally:
        call = None
        gc.collect()
        if on_gpu:
            torch.cuda.empty_cache()


def _waiting(call):
    def function() -> None:
        call()
        torch.cuda.synchronize()

    return function


def _error(results, wanted) -> float:
    """The largest relative error, in the norm, of tensors or tuples of them."""
    results, wanted = ((r if isinstance(r, (tuple, list)) else (r,)) for r in (results, wanted))
    return max(
        float((got.double() - want.double()).norm() / want.double().norm().clamp_min(1e-30))
        for got, want in zip(results, wanted, strict=True)
    )
