"""A step whose numbers are still on the device: they are read while the next one runs, and nobody waits."""

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from stdit_fast.train.sampler import BatchRequest


class Readback:
    """A step's numbers on their way to the host, and its time.

    The clock starts here. On a GPU it is the GPU's: where the host is ahead, a step begins when the one before ends.
    """

    def __init__(self, device: torch.device):
        self._on_gpu = device.type == "cuda"
        if self._on_gpu:
            self._started, self._ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self._started.record()
        else:
            self._started = time.perf_counter()

    def send(self, numbers: Tensor) -> None:
        """Stops the clock after all work so far, and copies the numbers behind it."""
        if self._on_gpu:
            self._numbers = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
            self._numbers.copy_(numbers, non_blocking=True)
            self._ended.record()
        else:
            self._numbers, self._ended = numbers.clone(), time.perf_counter()

    def read(self) -> tuple[list[float], float]:
        """The numbers, and the seconds from the start to `send`; waits for them."""
        if self._on_gpu:
            self._ended.synchronize()
            return self._numbers.tolist(), self._started.elapsed_time(self._ended) / 1e3
        return self._numbers.tolist(), self._ended - self._started


class Stopwatch:
    """Adds up the seconds of a process's own work, without its waits: `with stopwatch: ...`, any number of times."""

    def __init__(self, device: torch.device):
        self._on_gpu = device.type == "cuda"
        self._spans: list[tuple] = []

    def __enter__(self) -> None:
        self._started = self._now()

    def __exit__(self, *exception) -> None:
        self._spans.append((self._started, self._now()))

    def _now(self):
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def read(self) -> float:
        """The sum; the device has to be done with it."""
        if self._on_gpu:
            return sum(start.elapsed_time(end) for start, end in self._spans) / 1e3
        return sum(end - start for start, end in self._spans)


@dataclass
class PendingStep:
    """What has to be known of a step when its numbers come.

    Attributes:
        step: its number; lr: with which it was made.
        names: of the numbers, in order.
        batches: (bucket, samples) of each micro-batch of this process; request: of the last.
        busy: the time of this process's passes.
        bad: this process's samples that could not be used.
    """

    step: int
    lr: float
    request: BatchRequest
    batches: list[tuple[int, list[int]]]
    bad: list[dict]
    names: tuple[str, ...]
    readback: Readback
    busy: Stopwatch
