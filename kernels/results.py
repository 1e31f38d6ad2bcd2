"""Where a kernel's result is to lie, if not in memory of its own: in memory that other GPUs read, for instance."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

_offered: list[Tensor] = []


@contextmanager
def result_into(place: Tensor | None) -> Iterator[None]:
    """Within it, the first result that is made by `memory_for` and fits `place` lies there.

    Kernels that do not ask have memory of their own as ever, so whoever offers looks where the result is.

    Args:
        place: contiguous, of any shape; None: nothing is offered.
    """
    if place is not None:
        _offered.append(place)
    try:
        yield
    finally:
        _offered.clear()


def memory_for(shape: Sequence[int], like: Tensor) -> Tensor:
    """Memory for a contiguous result of that shape, of the dtype and on the device of `like`."""
    if _offered:
        (place,) = _offered
        if (place.numel(), place.dtype, place.device) == (torch.Size(shape).numel(), like.dtype, like.device):
            _offered.clear()
            return place.view(shape)
    return like.new_empty(shape)
