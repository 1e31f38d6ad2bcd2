"""Groups of ranks that share samples: a data axis and a sequence axis, for each size of the latter that a run uses.

Ranks of a group are neighbours: with size n, ranks k*n to k*n + n - 1 are group k. All sizes are built once, when the
run starts, since every rank has to take part; which of them a step uses may change from batch to batch.
"""

import logging
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.distributed as dist

from stdit_fast.errors import ConfigError
from stdit_fast.parallel.copies import PeerCopies, SymmetricSlots
from stdit_fast.parallel.processes import Processes, import_colossalai, machine_id

logger = logging.getLogger(__name__)

SIZES = (1, 2, 4, 8)
KEY = "sequence_parallel"
TRANSFERS = "sequence_transfers"


@dataclass(frozen=True)
class SequenceGroup:
    """The ranks that hold parts of the same samples, seen from one of them.

    Attributes:
        size, rank: how many there are, and which of them this is.
        first: rank of the group's first member among all processes.
        device: the process group that tensors travel in.
        host: one for what the CPUs tell each other, so that no GPU has to be waited for.
        copies: what moves parts of a video instead of `device`, if anything does.
    """

    size: int
    rank: int
    first: int
    device: dist.ProcessGroup
    host: dist.ProcessGroup
    copies: PeerCopies | None = None

    def exchange(self, values: list[int]) -> list[list[int]]:
        """Every member's integers, on every member, without waiting for a GPU."""
        own = torch.tensor(values, dtype=torch.int64)
        parts = [torch.empty_like(own) for _ in range(self.size)]
        dist.all_gather(parts, own, group=self.host)
        return [part.tolist() for part in parts]

    def largest(self, value: int) -> int:
        """The largest of the members' values, on every member."""
        return max(part[0] for part in self.exchange([value]))


class SequenceGroups:
    """This process's group of each size.

    Args:
        sizes: those that the run will use; 1 needs no group.
        transfers: what moves parts of videos: "collectives"; "copies", by the GPUs' copy engines, which all of a
            group have to be of one machine for; or "auto": copies in groups that can.

    Raises:
        ConfigError: a size that there is no such thing as, or that does not divide the number of processes; copies
            between GPUs that cannot.
    """

    def __init__(self, processes: Processes, sizes: Iterable[int], transfers: str = "collectives"):
        self.processes = processes
        self._groups: dict[int, SequenceGroup] = {}
        wanted = sorted({size for size in sizes if size != 1})
        for size in wanted:
            check_size(size, processes.world_size)
        for size in wanted:
            group = self._build(size)
            if transfers == "copies":
                group = replace(group, copies=self.copies_of(group))
            elif transfers == "auto" and self._can_copy(group):
                group = replace(group, copies=self._peer_copies(group))
            self._groups[size] = group

    def __getitem__(self, size: int) -> SequenceGroup:
        return self._groups[size]

    def replace(self, size: int, **changes) -> None:
        """Has tensors of the group of that size travel in another way, by other attributes of `SequenceGroup`."""
        self._groups[size] = replace(self._groups[size], **changes)

    def copies_of(self, group: SequenceGroup) -> PeerCopies:
        """Copies between the members of a group, all of which ask for them.

        Raises:
            ConfigError: not all of them can read each other's memory.
        """
        unreached = self._unreached(group)
        if unreached:
            remedy = f"{unreached} of {group.size} ranks cannot read the others' memory; use collectives"
            raise ConfigError(TRANSFERS, "copies", remedy)
        return self._peer_copies(group)

    def describe(self) -> str:
        """What moves parts of videos, by size of group, in a line."""
        ways = {size: "copies between GPUs" if group.copies else "collectives" for size, group in self._groups.items()}
        return "; ".join(f"videos shared by {size}: their parts travel by {way}" for size, way in ways.items())

    def _peer_copies(self, group: SequenceGroup) -> PeerCopies:
        device = self.processes.device
        return PeerCopies(group.rank, group.size, device, partial(SymmetricSlots, group.device, device))

    def _unreached(self, group: SequenceGroup) -> int:
        """How many members cannot read the memory of all others."""
        device = self.processes.device
        index = device.index if device.type == "cuda" else -1
        seen = group.exchange([zlib.crc32(machine_id().encode()), index])
        one_machine = len({number for number, _ in seen}) == 1
        others = [other for rank, (_, other) in enumerate(seen) if rank != group.rank]
        reached = one_machine and all(
            index != other >= 0 and torch.cuda.can_device_access_peer(index, other) for other in others
        )
        return sum(not all(part) for part in group.exchange([reached]))

    def _can_copy(self, group: SequenceGroup) -> bool:
        """Whether copies work among a group's members; where they should and do not, a warning says why."""
        if self._unreached(group):
            return False
        failure = ""
        try:
            SymmetricSlots(group.device, self.processes.device, 1)
        except RuntimeError as error:  # of a container that may not pass memory on, say
            failure = str(error).splitlines()[0]
        failed = sum(value for (value,) in group.exchange([int(bool(failure))]))
        if failed and group.rank == 0:
            reason = f"{failed} of {group.size} ranks could not share memory{failure and f' ({failure})'}"
            logger.warning("%s: %s; collectives move parts of videos instead", TRANSFERS, reason)
        return not failed

    def _build(self, size: int) -> SequenceGroup:
        import_colossalai()
        from colossalai.cluster import ProcessGroupMesh

        rank, world_size = self.processes.rank, self.processes.world_size
        mesh = ProcessGroupMesh(world_size // size, size)
        device = host = mesh.get_group_along_axis(1)
        if self.processes.device.type == "cuda":
            # ProcessGroupMesh would answer with the group of the same ranks that it has already.
            host = ProcessGroupMesh(world_size // size, size).get_group_along_axis(1, backend="gloo")
        for group in (device, host):
            self.processes.limit(group)
        # Connections are opened now, with their memory, and not in the middle of a step.
        values = torch.zeros(size, device=self.processes.device)
        dist.all_to_all_single(torch.empty_like(values), values, group=device)
        place = int(mesh.coordinate(1))
        return SequenceGroup(size, place, rank - place, device, host)


def check_size(size: int, world_size: int) -> None:
    """Raises ConfigError for a size that cannot be with so many processes."""
    if size not in SIZES:
        raise ConfigError(KEY, size, f"choose one of {', '.join(map(str, SIZES))}")
    if world_size % size:
        fitting = ", ".join(str(n) for n in SIZES if world_size % n == 0)
        raise ConfigError(KEY, size, f"it must divide the number of processes, {world_size}: use {fitting}")


def check_split(size: int, num_frames: int, positions: int) -> None:
    """Raises ConfigError where some of `size` ranks would have no frame, or no position of a frame, to work on."""
    if size > min(num_frames, positions):
        remedy = (
            f"{num_frames} frames of {positions} tokens cannot be split over {size} ranks: use at most "
            f"{max(n for n in SIZES if n <= min(num_frames, positions))} for this bucket"
        )
        raise ConfigError(KEY, size, remedy)
