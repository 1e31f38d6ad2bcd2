"""The training plugins with a sequence axis: batches may be shared by groups of ranks, of a size that a batch chooses.

Weights, moments and averages stay split over all ranks, whatever groups a step uses: gradients are averaged over the
whole world, and the loss of a shared batch is the sum of its ranks' parts, so weights make the sum right (see
`Trainer._weight`).

Import only after `processes.import_colossalai`, which keeps ColossalAI's import quiet.
"""

from collections.abc import Iterable
from contextlib import contextmanager

from stdit_fast.errors import ConfigError
from stdit_fast.parallel.groups import KEY, SequenceGroups
from stdit_fast.parallel.plugins import ReplicatedPlugin, ShardedPlugin
from stdit_fast.parallel.processes import Processes
from stdit_fast.parallel.sequence import FrameSwitch, split_frames


class SequencePlugin:
    """The sequence axis of a plugin.

    Args:
        sizes, transfers: of the groups that the run will use; see `SequenceGroups`.
    """

    def __init__(self, max_norm: float, processes: Processes, sizes: Iterable[int], transfers: str = "collectives"):
        super().__init__(max_norm, processes)
        self.sequence_groups = SequenceGroups(processes, sizes, transfers)

    @contextmanager
    def shared(self, model, parts: int, num_frames: int, fingerprint: int):
        """Forward passes of `model` (the bare one) in here compute on this rank's frames of a shared batch.

        Args:
            parts: the ranks that share it; 1: it is this rank's own.
            num_frames: of the whole videos.
            fingerprint: 63 bits that follow from the batch.

        Raises:
            ConfigError: another rank of the group has another batch.
        """
        if parts == 1:
            yield
            return
        group = self.sequence_groups[parts]
        seen = [values[0] for values in group.exchange([fingerprint])]
        if len(set(seen)) > 1:
            of_ranks = ", ".join(f"rank {group.first + i}: {value:016x}" for i, value in enumerate(seen))
            raise ConfigError(
                KEY,
                parts,
                f"the ranks that share a batch see different data (checksums of {of_ranks}). Give all of them the same "
                "metadata table, files and configuration; a file that only one of them could not read does it too",
            )
        with split_frames(model, FrameSwitch(group, num_frames)):
            yield


class SequenceReplicatedPlugin(SequencePlugin, ReplicatedPlugin):
    """`ReplicatedPlugin` with a sequence axis, for the CPU (gloo)."""


class SequenceShardedPlugin(SequencePlugin, ShardedPlugin):
    """`ShardedPlugin` with a sequence axis, for GPUs ("zero2-seq")."""
