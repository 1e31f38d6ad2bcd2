"""Many tensors in one piece of memory, which the allocator then holds as one block."""

from collections.abc import Iterable

from torch import Tensor

ALIGNMENT = 512  # bytes, as the allocator's


def packed_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes that hold all of them, each at a multiple of the alignment."""
    return sum(_padded(t.nbytes) for t in tensors)


def packed_views(memory: Tensor, tensors: Iterable[Tensor]) -> list[Tensor]:
    """A place of each one's dtype and shape, contiguous, one behind the other.

    Args:
        memory: uint8 [at least packed_bytes(tensors)].
    """
    places, at = [], 0
    for t in tensors:
        places.append(memory[at : at + t.nbytes].view(t.dtype).view(t.shape))
        at += _padded(t.nbytes)
    return places


def _padded(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
