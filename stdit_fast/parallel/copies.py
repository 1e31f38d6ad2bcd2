"""All-to-alls by the copy engines of one machine's GPUs, which leave the multiprocessors to the kernels beside them.

NCCL's kernels take some of a GPU's multiprocessors for as long as they run, from computation that they are to hide
behind. Here each rank puts what it sends into a slot of memory that the others can read, and fetches its parts from
theirs, by plain copies on a stream of its own:

1. the stream waits until the rank's own slot is filled, and meets those of the others: one block that writes a flag to
   each of them and waits for theirs;
2. copies from the others' slots, each rank beginning with its next neighbour, so that no two read from the same one;
3. what is computed next waits for these copies, and not for more.

A slot may be filled anew when all have read it, which is known at the meeting after that: slots take turns.
"""

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from stdit_fast.model.memory import memory_limit

# Of a block, one is filled, one read and two on their way, in either direction.
SLOTS = 4
_ALIGNMENT = 512  # bytes, of slots


class Slots(ABC):
    """SLOTS pieces of memory on each rank of a group, which all of them can read.

    Attributes:
        size: bytes of each.
    """

    size: int

    @abstractmethod
    def of(self, rank: int, slot: int) -> Tensor:
        """A rank's slot, [size] bytes."""

    @abstractmethod
    def meet(self) -> None:
        """What the device does next sees what all ranks' devices had done, in the present stream, when they met."""


class SymmetricSlots(Slots):
    """On GPUs of one machine, by PyTorch's symmetric memory.

    Args:
        group: the ranks, all of which make one now.
        size: bytes of a slot.
    """

    def __init__(self, group: dist.ProcessGroup, device: torch.device, size: int):
        # Multicast is not used, and where a machine has no access to it, trying to would end in an error or worse.
        os.environ["TORCH_SYMM_MEM_DISABLE_MULTICAST"] = "1"
        import torch.distributed._symmetric_memory as symmetric_memory

        self.size = size
        self._memory = symmetric_memory.empty(SLOTS * size, dtype=torch.uint8, device=device)
        self._handle = symmetric_memory.rendezvous(self._memory, group)
        memory_limit.cache_clear()  # it is not PyTorch's allocator that has them
        self._slots = [
            [self._handle.get_buffer(rank, (size,), torch.uint8, slot * size) for slot in range(SLOTS)]
            for rank in range(group.size())
        ]

    def of(self, rank: int, slot: int) -> Tensor:
        return self._slots[rank][slot]

    def meet(self) -> None:
        self._handle.barrier()


class Staged(NamedTuple):
    """A rank's own slot, to be filled and sent from.

    Attributes:
        values: flat, as many as were asked for.
    """

    slot: int
    values: Tensor


class Arrival(NamedTuple):
    """Copies on their way; None: there are no streams, and they are done."""

    event: torch.cuda.Event | None

    def wait(self) -> None:
        """What the device does next in the present stream comes after them; the host does not wait."""
        if self.event is not None:
            torch.cuda.current_stream().wait_event(self.event)


class PeerCopies:
    """A rank's side of all-to-alls by copies. All ranks of a group call the same methods in the same order.

    Args:
        rank, size: this one's place, and how many there are.
        device: of what is sent.
        make_slots: slots of so many bytes, made by all ranks together; it returns when all are there.
    """

    def __init__(self, rank: int, size: int, device: torch.device, make_slots: Callable[[int], Slots]):
        self.rank, self.size, self.device = rank, size, device
        self._make_slots = make_slots
        self._slots: Slots | None = None
        self._turn = 0
        self._stream = torch.cuda.Stream(device, priority=-1) if device.type == "cuda" else None
        self._begun: set[int] = set()  # slots that are read from since the last meeting
        self._free: dict[int, torch.cuda.Event | None] = {}  # when each slot has been read by all

    def stage(self, most: int, count: int, dtype: torch.dtype) -> Staged:
        """Memory for `count` values to be sent; what fills it comes after all have read what was there.

        Args:
            most: the largest count of any rank, the same on all.
        """
        wanted = -(-most * dtype.itemsize // _ALIGNMENT) * _ALIGNMENT
        if self._slots is None or wanted > self._slots.size:
            self._grow(wanted)
        slot, self._turn = self._turn, (self._turn + 1) % SLOTS
        if slot in self._begun:
            with self._beside():
                self._meet()
        Arrival(self._free.pop(slot, None)).wait()
        return Staged(slot, self._slots.of(self.rank, slot).view(dtype)[:count])

    def all_to_all(self, staged: Staged, arriving: Tensor, sizes: list[int], starts: list[int]) -> Arrival:
        """Fetches this rank's parts, when all ranks have called this with what they filled.

        Args:
            arriving: flat; gets the ranks' parts, one after the other.
            sizes: values from each rank.
            starts: where in each rank's staged values its part for this one begins.
        """
        parts = arriving.split(sizes)
        with self._beside():
            self._meet()
            self._begun.add(staged.slot)
            for rank in (*range(self.rank + 1, self.size), *range(self.rank + 1)):  # its own part last
                values = self._slots.of(rank, staged.slot).view(arriving.dtype)
                parts[rank].copy_(values[starts[rank] : starts[rank] + sizes[rank]])
            return Arrival(self._now())

    def _meet(self) -> None:
        self._slots.meet()
        self._free |= dict.fromkeys(self._begun, self._now())
        self._begun.clear()

    def _grow(self, wanted: int) -> None:
        """All ranks get larger slots, of which none is in use."""
        if self._stream is not None:
            torch.cuda.synchronize(self.device)
        self._slots = self._make_slots(wanted)  # the others have read from the present ones when this is done
        self._begun.clear()
        self._free.clear()

    @contextmanager
    def _beside(self) -> Iterator[None]:
        """What is launched in here comes after all that was, and beside what will be."""
        if self._stream is None:
            yield
            return
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            yield

    def _now(self) -> torch.cuda.Event | None:
        return None if self._stream is None else self._stream.record_event()
