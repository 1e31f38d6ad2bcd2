"""Batches on their way to the GPU while it still computes the step before.

The host is most of a step ahead of the GPU. What it copies on the GPU's own stream has to wait for that step's end all
the same, and the step after for the copy: text states of 48 captions are 43 MB. So batches travel on a stream of their
own, into memory that is theirs.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from stdit_fast.model.packing import packed_bytes, packed_views

MOST_BYTES = 1 << 29  # of all batches that are there at once, which steps have to spare; larger ones are not sent ahead
LEAST_BYTES = 1 << 25  # of a place: it grows in few steps, since what it had before leaves a hole
ON_THE_HOST = ("tokens", "samples")  # which nothing on the GPU reads


class SendAhead:
    """Batches of a loader, their tensors on a device; the current stream waits for them, the host does not.

    What was sent is overwritten when `kept` further batches are asked for.

    Args:
        batches: as `VideoTextDataset` makes them, in pinned memory.
        device: where to.
        kept: batches that are still needed when the next is asked for, at least one.
    """

    def __init__(self, batches: Iterator[dict], device: torch.device, kept: int = 1):
        self._batches, self._device, self._kept = batches, device, kept
        # One more: the batch that comes is written while the steps of those that are kept still run.
        self._places: list[Tensor | None] = [None] * (kept + 1)
        self._free_at: list[torch.cuda.Event | None] = [None] * (kept + 1)  # no step reads a place any more
        self._next = 0
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __iter__(self) -> Iterator[dict]:
        return self

    def __next__(self) -> dict:
        batch = next(self._batches)
        self._step_over(self._next - self._kept)
        own = {key: value for key, value in batch.items() if torch.is_tensor(value) and key not in ON_THE_HOST}
        place, self._next = self._next % len(self._places), self._next + 1
        needed = packed_bytes(own.values())
        most = MOST_BYTES // len(self._places)
        if not 0 < needed <= most or not self._has_room(place, needed, most):
            return batch
        return batch | self._sent(own, place)

    def _step_over(self, number: int) -> None:
        """All work on a batch, of that number, has been given to the current stream."""
        if number >= 0 and self._stream is not None:
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(self._device))
            self._free_at[number % len(self._places)] = event

    def _has_room(self, place: int, needed: int, most: int) -> bool:
        held = self._places[place]
        if held is None or len(held) < needed:
            size = min(max(LEAST_BYTES, 1 << (needed - 1).bit_length()), most)
            self._places[place] = None
            try:
                self._places[place] = torch.empty(size, dtype=torch.uint8, device=self._device)
            except torch.OutOfMemoryError:  # the step itself may fit
                return False
            if self._stream is not None:  # behind what had this memory before
                self._stream.wait_stream(torch.cuda.current_stream(self._device))
        return True

    def _sent(self, own: dict[str, Tensor], place: int) -> dict[str, Tensor]:
        there = dict(zip(own, packed_views(self._places[place], own.values()), strict=True))
        if self._stream is None:
            for key, value in own.items():
                there[key].copy_(value)
            return there
        if self._free_at[place] is not None:
            self._stream.wait_event(self._free_at[place])
        with torch.cuda.stream(self._stream):
            for key, value in own.items():
                there[key].copy_(value, non_blocking=True)
        torch.cuda.current_stream(self._device).wait_stream(self._stream)
        return there
