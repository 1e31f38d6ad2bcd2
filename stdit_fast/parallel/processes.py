"""The processes of a run: who they are, and the one place that reads the launcher's environment."""

import faulthandler
import logging
import os
import socket
import uuid
import warnings
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from stdit_fast.errors import NODEPS_INSTALL, ConfigError

logger = logging.getLogger(__name__)

_CONNECTIONS = "CUDA_DEVICE_MAX_CONNECTIONS"


@dataclass(frozen=True)
class Processes:
    """This process among all.

    Attributes:
        rank, world_size: place and number of the data-parallel processes.
        device: where this one computes.
        timeout: seconds that a collective may take before it fails; None: PyTorch's own limits, of minutes.
    """

    rank: int
    world_size: int
    device: torch.device
    timeout: float | None = None

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, values: list[float]) -> list[float]:
        """The sums over all processes, in float64; waits for the device."""
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.tolist()

    def gather_objects(self, value: object) -> list:
        """Every process's value, on every process. For rare events: it pickles."""
        values: list = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def all_gather(self, shard: Tensor) -> Tensor:
        """Shards of equal size, joined in order of rank: [world_size * shard.numel()]."""
        whole = torch.empty(self.world_size * shard.numel(), dtype=shard.dtype, device=shard.device)
        dist.all_gather_into_tensor(whole, shard.flatten().contiguous())
        return whole

    def barrier(self) -> None:
        dist.barrier(device_ids=[self.device.index] if self.device.type == "cuda" else None)

    def limit(self, group: dist.ProcessGroup) -> None:
        """Has collectives of the group fail after `timeout`."""
        if self.timeout is None:
            return
        # PyTorch 2.11 has the older name alone, later ones warn of it.
        limit = getattr(dist, "set_timeout", None) or dist.distributed_c10d._set_pg_timeout
        limit(timedelta(seconds=self.timeout), group)

    def close(self) -> None:
        """Ends the process group, when all processes have come here: gloo aborts one whose peers still write."""
        self.barrier()
        dist.destroy_process_group()


def launch(seed: int, timeout: float | None = None) -> Processes:
    """Starts the process group through ColossalAI, with what torchrun set, or alone without it.

    The group is NCCL on GPUs and gloo on the CPU. All processes are seeded alike, so that a model initialised
    here starts equal everywhere.

    Args:
        timeout: see `Processes`.

    Raises:
        ConfigError: ColossalAI is not installed.
    """
    colossalai = import_colossalai()
    if "RANK" not in os.environ:
        alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
        os.environ.update(alone, MASTER_PORT=str(_free_port()))
    if not dist.is_initialized():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            colossalai.launch_from_torch(seed=seed, verbose=False)
    torch.manual_seed(seed)
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if torch.cuda.is_available() else torch.device("cpu")
    processes = Processes(dist.get_rank(), dist.get_world_size(), device, timeout)
    processes.limit(dist.group.WORLD)
    return processes


def end_after(seconds: float) -> None:
    """Where this process is still there then, it says on stderr where each of its threads is, and ends.

    It needs neither the interpreter nor a device, one of which may be what hangs. Called again, it begins anew.
    """
    faulthandler.dump_traceback_later(seconds, exit=True)


def import_colossalai():
    """ColossalAI, without the warnings of its optional parts, and without what its import does to the environment.

    Raises:
        ConfigError: it, or what it imports, is not installed.
    """
    connections = os.environ.get(_CONNECTIONS)
    torch.cuda.is_available()  # CUDA reads its environment now, if it has not yet
    quiet = [logging.getLogger(name) for name in ("bitsandbytes", "torch.distributed")]
    levels = [log.level for log in quiet]
    try:
        for log in quiet:
            log.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import colossalai
            import colossalai.booster.plugin
    except ImportError as error:
        raise ConfigError("colossalai", None, f"it cannot be imported ({error}); run `{NODEPS_INSTALL}`") from error
    finally:
        for log, level in zip(quiet, levels, strict=True):
            log.setLevel(level)
        # ColossalAI sets it to 1: all streams of a process in one queue, where a collective that waits for another
        # process, or for the collective before it, holds up whatever is launched after it.
        if connections is None:
            os.environ.pop(_CONNECTIONS, None)
        else:
            os.environ[_CONNECTIONS] = connections
    return colossalai


def launched_processes() -> int:
    """How many processes the launcher started; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def machine_id() -> str:
    """Equal for processes that see each other by their numbers."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/pid")
    except OSError:
        return uuid.uuid4().hex


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]
