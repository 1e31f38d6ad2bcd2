"""Random numbers keyed by what they are for, instead of by the order in which they are drawn.

A sample's crop, mask, timestep, noise and caption dropout follow from (seed, epoch, sample) alone, so they are the same
in any batch, on any number of ranks and after any resume.
"""

import hashlib

import numpy as np

_U64 = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB


def sample_rng(seed: int, epoch: int, sample: int, purpose: str) -> np.random.Generator:
    """A generator of its own for one purpose of one sample in one epoch.

    Philox (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) under a 128-bit key, the BLAKE2b hash
    of the arguments: neighbouring keys share nothing, and no argument's range is cut.

    Args:
        seed: the run's seed, any integer.
        epoch: the epoch.
        sample: the sample's row, or whatever else is drawn for.
        purpose: what the numbers are for, such as ``"crop"``; another purpose is another stream.
    """
    digest = hashlib.blake2b(f"{int(seed)}/{int(epoch)}/{int(sample)}/{purpose}".encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=np.frombuffer(digest, dtype="<u8").astype(np.uint64)))


def hash_uniform(seed: int, epoch: int, samples: np.ndarray, stream: int) -> np.ndarray:
    """One uniform number for each sample, for millions of samples at once.

    Each number depends on (seed, epoch, sample, stream) only: hashing a part of the samples, or the samples in another
    order, gives the same numbers. The hash is the finaliser of SplitMix64 (Steele, Lea and Flood, "Fast splittable
    pseudorandom number generators", OOPSLA 2014), once over the key and twice over the sample.

    Args:
        seed, epoch, stream: integers; another stream is another independent draw.
        samples: integers >= 0, any shape.

    Returns:
        float64 in [0, 1), 53 random bits each, shaped like `samples`.
    """
    base = 0
    for word in (seed, epoch, stream):
        base = _mix_scalar(base + _GOLDEN + (int(word) & _U64))
    z = np.asarray(samples).astype(np.uint64)
    shape, z = z.shape, np.atleast_1d(z)
    z *= np.uint64(_GOLDEN)
    z += np.uint64(base)
    _mix(z)
    z ^= np.uint64(base)
    _mix(z)
    z >>= np.uint64(11)
    return (z.astype(np.float64) * 2.0**-53).reshape(shape)


def _mix_scalar(z: int) -> int:
    z &= _U64
    z = (z ^ (z >> 30)) * _MIX_1 & _U64
    z = (z ^ (z >> 27)) * _MIX_2 & _U64
    return z ^ (z >> 31)


def _mix(z: np.ndarray) -> None:
    z ^= z >> np.uint64(30)
    z *= np.uint64(_MIX_1)
    z ^= z >> np.uint64(27)
    z *= np.uint64(_MIX_2)
    z ^= z >> np.uint64(31)
