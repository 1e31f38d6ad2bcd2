"""Memory that CUDA graphs and ordinary steps use in turn.

A graph writes to the addresses that its capture was given, so that their memory is nobody else's for as long as the
graph lives: some 25 GB for 16,000 tokens, which stand idle while a large bucket recomputes blocks for want of memory.
Here graphs and ordinary steps draw from one piece, by one pool of PyTorch's allocator. A step leaves nothing in it: the
activations of a forward pass are gone when its backward pass is over. Whoever replays a graph makes sure of that first
(`live_bytes`), and whoever keeps tensors here makes sure that no graph is between its two passes.

The allocator knows free memory by the stream that it was asked for on, so that only work of one stream can share it.
No graph can be captured on a device's default stream: training runs on another (`leave_default_stream`).
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from stdit_fast.model import disposal

_SMALL = 1 << 19  # what the allocator takes from small pieces of memory, 2 MiB each, which it keeps apart
_PROBE = 64 << 20


class Arena:
    """One piece of memory and what belongs to it.

    Args:
        device: a GPU.
        size: bytes; 0: none yet, so that it grows as captures need it, and only captures use it.

    Attributes:
        stream: whose work it serves, the current one.
        usable: bytes that a step may count on, which is lowered where that turns out to be too much.

    Raises:
        torch.OutOfMemoryError: the device does not have so much left.
        RuntimeError: the allocator has been told not to divide large pieces (max_split_size_mb).
    """

    USABLE = 0.96  # of its bytes: pieces of many sizes come and go
    BESIDE = 384 << 20  # bytes of small pieces, beside `size`: statistics of rows, some 100 MB for 110,000 tokens

    def __init__(self, device: torch.device, size: int = 0):
        self.device, self.size, self.usable = device, size, self.USABLE * size
        self.stream = torch.cuda.current_stream(device)
        disposal.destroy_retired()
        self._pool = torch.cuda.MemPool()
        self._retire = disposal.retire_with(self, pool=self._pool)
        if size:
            self._fill()

    def close(self) -> None:
        """Gives the memory up, whoever still refers to this object: nothing comes from it any more.

        The device has it back when no tensor is left there and caches are emptied.
        """
        self._pool, self.usable = None, 0.0
        self._retire()

    @property
    def id(self) -> tuple[int, int]:
        """Of the pool, as captures want it."""
        return self._pool.id

    def use(self) -> AbstractContextManager:
        """What this thread allocates in here comes from this memory, unless it was given up. It can be entered again
        and again."""
        return _Use(self)

    @contextmanager
    def use_alone(self) -> Iterator[None]:
        """As `use`, but it must suffice: else it would take more of the device, and keep it from everything else.

        Raises (inside):
            torch.OutOfMemoryError: it does not.
        """
        before = torch.cuda.get_per_process_memory_fraction(self.device)
        total = torch.cuda.get_device_properties(self.device).total_memory
        torch.cuda.set_per_process_memory_fraction(torch.cuda.memory_reserved(self.device) / total, self.device)
        try:
            with self.use():
                yield
        finally:
            torch.cuda.set_per_process_memory_fraction(before, self.device)

    def live_bytes(self) -> int:
        """Bytes of tensors that are in it now. Without any, this takes some hundred microseconds."""
        return self._sum("allocated_size")

    def reserved_bytes(self) -> int:
        """Bytes that it takes of the device: more than `size` where something did not fit."""
        return self._sum("total_size")

    def _sum(self, what: str) -> int:
        if self._pool is None:
            return 0
        return sum(segment[what] for segment in torch.cuda.memory_snapshot(self._pool.id))

    def _fill(self) -> None:
        """Takes the memory from the device: tensors that are gone at once leave it to the pool."""
        options = {"dtype": torch.uint8, "device": self.device}
        with self.use():
            whole = torch.empty(self.size, **options)
            small = [torch.empty(_SMALL, **options) for _ in range(self.BESIDE // _SMALL)]
        del whole, small
        before = torch.cuda.memory_reserved(self.device)
        with self.use():
            parts = [torch.empty(min(_PROBE, self.size // 4), **options) for _ in range(2)]
        del parts
        if torch.cuda.memory_reserved(self.device) > before:
            raise RuntimeError("PyTorch's allocator does not divide large pieces: unset max_split_size_mb")


class _Use(AbstractContextManager):
    def __init__(self, arena: Arena):
        self._arena = arena  # not its pool, which must be nobody else's

    def __enter__(self) -> None:
        self._inner = nullcontext()
        if self._arena._pool is not None:
            self._inner = torch.cuda.use_mem_pool(self._arena._pool, self._arena.device)
        disposal.begin()
        self._inner.__enter__()

    def __exit__(self, *exception) -> None:
        inner, self._inner = self._inner, None
        inner.__exit__(*exception)
        disposal.end()


def take_workspaces(like: torch.Tensor) -> None:
    """Has cuBLAS take what it keeps for each thread and stream now, from the memory that is current.

    Else the first block that a backward pass recomputes in an arena has it taken there, where it stays and no graph may
    write any more.

    Args:
        like: of the GPU and dtype that blocks compute in.
    """
    a, bias = (torch.zeros(shape, dtype=like.dtype, device=like.device, requires_grad=True) for shape in ((64, 64), 64))
    with torch.enable_grad():
        out = checkpoint(_products, a, bias, use_reentrant=False, preserve_rng_state=False)
    torch.autograd.grad(out, (a, bias), torch.zeros_like(out))


def _products(a: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """By cuBLAS, which computes the second, and cuBLASLt."""
    return F.linear(a, a, bias) @ a


_own_streams: dict[int, torch.cuda.Stream] = {}


def leave_default_stream(device: torch.device) -> None:
    """Makes a stream other than a GPU's default one this thread's current: always the same one.

    What was begun on the default stream is done before what follows.
    """
    if device.type != "cuda":
        return
    default = torch.cuda.default_stream(device)
    if torch.cuda.current_stream(device) != default:
        return
    index = torch.cuda.current_device() if device.index is None else device.index
    if index not in _own_streams:
        _own_streams[index] = torch.cuda.Stream(index)
    _own_streams[index].wait_stream(default)
    torch.cuda.set_stream(_own_streams[index])
