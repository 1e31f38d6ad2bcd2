"""Sizes of tiles, and what all kernels share.

Triton's blocks are powers of two, this model's sizes (1152 channels, 72 a head) are not. A row is therefore held as
two blocks: the largest power of two in it, and the rest, padded: 1152 = 1024 + 128, 72 = 64 + 8 (of 16).
"""

from functools import lru_cache

import triton
import triton.language as tl

DOT_MINIMUM = 16  # what a matrix product needs in each dimension


def cdiv(a: int, b: int) -> int:
    """a / b rounded up. (Triton's own, called on the host, takes 5 us.)"""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << max(0, n - 1).bit_length()


@lru_cache
def split(size: int, minimum: int = DOT_MINIMUM) -> tuple[int, int]:
    """Blocks (first, rest) of powers of two that hold `size` elements; rest is 0 where one block does."""
    first = max(minimum, 1 << (size.bit_length() - 1))
    if first >= size:
        return first, 0
    return first, max(minimum, next_power_of_2(size - first))


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter (TRITON_INTERPRET=1 when this package was imported)."""
    return not isinstance(_probe, triton.runtime.JITFunction)


@triton.jit
def _probe(x):
    tl.store(x, 0)
