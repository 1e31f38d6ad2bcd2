"""A step whose numbers are still on the device: they are read while the next one runs, and nobody waits."""

import time
from dataclasses import dataclass

import torch
from torch import Tensor


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


@dataclass
class PendingStep:
    """What has to be known of a step when its numbers come.

    Attributes:
        step: its number; lr: with which it was made.
        names: of the numbers, in order.
        batches: (bucket, samples) of each micro-batch of this process; epoch: of the last.
        bad: this process's samples that could not be used.
    """

    step: int
    lr: float
    epoch: int
    batches: list[tuple[int, list[int]]]
    bad: list[dict]
    names: tuple[str, ...]
    readback: Readback
