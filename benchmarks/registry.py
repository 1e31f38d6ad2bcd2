"""What `pytest benchmarks/` runs: suites of cases, each case done by several implementations.

A suite is a function `cases(device, quick)` that answers its cases on "cuda" or "cpu"; it makes no tensors and imports
nothing slow, so that cases can be listed anywhere. A new suite is a line in `SUITES`.
"""

import importlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from stdit_fast.errors import ConfigError, nearest

# Prepares an implementation's inputs and answers the call that is timed; raises peers.Absent where it cannot be had.
Prepare = Callable[[], Callable[[], object]]

SUITES = {
    "ops": "stdit_fast.benchmarks.cases_ops:cases",
    "block": "stdit_fast.benchmarks.cases_model:block_cases",
    "step": "stdit_fast.benchmarks.cases_model:step_cases",
    "sample": "stdit_fast.benchmarks.cases_model:sample_cases",
    "encoders": "stdit_fast.benchmarks.cases_encoders:cases",
    "optimizer": "stdit_fast.benchmarks.cases_optimizer:cases",
    "data": "stdit_fast.benchmarks.cases_data:cases",
}


@dataclass(frozen=True, repr=False)
class Case:
    """One piece of work.

    Attributes:
        suite, name: what it is.
        implementations: by name, ours first, to which the others are held.
        bytes, flops: that it must move and do, at least; None where neither means anything.
        host: whether the time on the wall counts, with the waiting for the device; else the device's own clock, on
            which no launch is waited for.
        expected: prepares what every implementation's results must be; None: they are not compared.
        tolerance: relative error, in the norm, of each result against that.
        rounds: how often it is timed.
        warmup: calls before that.
    """

    suite: str
    name: str
    implementations: Mapping[str, Prepare]
    bytes: int | None = None
    flops: int | None = None
    host: bool = False
    expected: Prepare | None = None
    tolerance: float = 2e-2
    rounds: int = 10
    warmup: int = 2

    def __repr__(self) -> str:  # stands in pytest-benchmark's files
        return f"{self.suite}: {self.name}"

    @property
    def ours(self) -> str:
        """The implementation that the others are held to."""
        return next(iter(self.implementations))


@dataclass(frozen=True)
class Ceiling:
    """What the device can do at most, measured: bytes a second of a copy (read and written), operations a second."""

    copy_bytes_per_s: float
    gemm_flops_per_s: float

    def milliseconds(self, case: Case) -> float | None:
        """The least time that a case can take."""
        times = [
            1e3 * amount / rate
            for amount, rate in ((case.bytes, self.copy_bytes_per_s), (case.flops, self.gemm_flops_per_s))
            if amount
        ]
        return max(times, default=None)


def select(names: str | None) -> list[str]:
    """The suites of "ops,step"; all of them for None. Raises ConfigError for one that is not there."""
    wanted = [name.strip() for name in names.split(",")] if names else list(SUITES)
    for name in wanted:
        if name not in SUITES:
            raise ConfigError("suites", name, f"there is no such suite; {nearest(name, SUITES)}")
    return wanted


def cases_of(suite: str, device: str, quick: bool) -> Iterable[Case]:
    """A suite's cases on a device."""
    module, _, function = SUITES[suite].partition(":")
    return getattr(importlib.import_module(module), function)(device, quick)
