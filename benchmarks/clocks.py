"""Clocks that pytest-benchmark times with, and the ceilings that its figures are held against."""

import functools
import statistics
import time

import torch
from torch import Tensor

from stdit_fast.benchmarks.registry import Ceiling

FLUSH_BYTES = 2**28  # more than the cache holds
FLUSHES = 25  # as many as keep the GPU busy until the CPU has launched what is timed
GEMM_SIZE = {"cuda": 8192, "cpu": 1024}
COPY_BYTES = {"cuda": 2**30, "cpu": 2**27}


def host_clock() -> float:
    """Seconds on the wall."""
    return time.perf_counter()


class DeviceClock:
    """Seconds on the GPU's own clock; called in turns, before and after what is timed.

    Before, the cache is overwritten, often enough that the launches of what follows are over when the GPU comes to it.
    """

    __name__ = "DeviceClock"

    def __init__(self):
        self.seconds = 0.0
        self._started: torch.cuda.Event | None = None
        self._flush: Tensor | None = None

    def reset(self) -> None:
        """The next call is one before."""
        self._started = None

    def release(self) -> None:
        """Gives the memory back that overwrites the cache."""
        self._flush = None

    def __call__(self) -> float:
        event = torch.cuda.Event(enable_timing=True)
        if self._started is None:
            if self._flush is None:
                self._flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")
            for _ in range(FLUSHES):
                self._flush.zero_()
            event.record()
            self._started = event
        else:
            event.record()
            event.synchronize()
            self.seconds += self._started.elapsed_time(event) / 1e3
            self._started = None
        return self.seconds


@functools.cache
def ceiling(device: str) -> Ceiling:
    """Measured once a process: a copy within memory, and a square product in the precision of the cases."""
    clock = DeviceClock() if device == "cuda" else host_clock
    return Ceiling(_copy_bandwidth(clock, device), _gemm_rate(clock, device))


def _copy_bandwidth(clock, device: str) -> float:
    """Bytes a second, read and written."""
    source = torch.randn(COPY_BYTES[device] // 4, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _median(clock, lambda: target.copy_(source))


def _gemm_rate(clock, device: str) -> float:
    """Operations a second; bfloat16 on a GPU, float32 elsewhere."""
    size, dtype = GEMM_SIZE[device], torch.bfloat16 if device == "cuda" else torch.float32
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * size**3 / _median(clock, lambda: torch.mm(a, b, out=out))


def _median(clock, function, repeats: int = 7) -> float:
    function()
    times = []
    for _ in range(repeats):
        started = clock()
        function()
        times.append(clock() - started)
    return statistics.median(times)
