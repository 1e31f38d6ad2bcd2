"""A step whose numbers are still on the device: they are read while the next one runs, and nobody waits."""

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from stdit_fast.train.sampler import BatchRequest


class Clock:
    """Moments: on a GPU's own clock, where it comes to them, or on the host's."""

    def __init__(self, device: torch.device):
        self._on_gpu = device.type == "cuda"

    def now(self) -> "torch.cuda.Event | float":
        """This moment, behind all work so far."""
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, begin, end) -> float:
        """Between two moments; the device has to be past them."""
        return begin.elapsed_time(end) / 1e3 if self._on_gpu else end - begin


class Readback:
    """A step's numbers on their way to the host, and its time.

    The clock starts here. On a GPU it is the GPU's: where the host is ahead, a step begins when the one before ends.
    """

    def __init__(self, device: torch.device):
        self._on_gpu, self._clock = device.type == "cuda", Clock(device)
        self._started = self._clock.now()

    def send(self, numbers: Tensor) -> None:
        """Stops the clock after all work so far, and copies the numbers behind it."""
        if self._on_gpu:
            self._numbers = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
            self._numbers.copy_(numbers, non_blocking=True)
        else:
            self._numbers = numbers.clone()
        self._ended = self._clock.now()

    def read(self) -> tuple[list[float], float]:
        """The numbers, and the seconds from the start to `send`; waits for them."""
        if self._on_gpu:
            self._ended.synchronize()
        return self._numbers.tolist(), self._clock.seconds(self._started, self._ended)


class Stopwatch:
    """Adds up the seconds of a process's own work, without its waits: `with stopwatch: ...`, any number of times."""

    def __init__(self, device: torch.device):
        self._clock = Clock(device)
        self._spans: list[tuple] = []

    def __enter__(self) -> None:
        self._started = self._clock.now()

    def __exit__(self, *exception) -> None:
        self._spans.append((self._started, self._clock.now()))

    def read(self) -> float:
        """The sum; the device has to be done with it."""
        return sum(self._clock.seconds(*span) for span in self._spans)


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
