"""How many ranks share a batch of each bucket, and how batches of several such sizes fill the ranks of a step."""

from collections import defaultdict
from collections.abc import Mapping

import numpy as np

from stdit_fast.errors import ConfigError
from stdit_fast.parallel.groups import KEY, SIZES, check_size
from stdit_fast.train.buckets import Bucket, Buckets

AUTO = "auto"
# "auto" lets more ranks share a batch while it takes this many times as long as the others.
TOLERATED = 1.5
_PIXELS = 16  # of a side, for one token


def sequence_sizes(setting: int | str | Mapping, buckets: Buckets, channels: int, world_size: int) -> np.ndarray:
    """The number of ranks that share a batch, for each bucket: int64 [buckets].

    Args:
        setting: a size for all buckets of at least as many frames, with 1 for the others; {resolution: {frames: size}},
            with 1 for what is not in it; or "auto": as many as make a batch take about as long as the buckets' median,
            by the times that were measured, if they were.
        channels: of the model.
        world_size: number of processes.

    Raises:
        ConfigError: a size that cannot be, or a table that is none or names what is no bucket.
    """
    if setting == AUTO:
        return _balanced(buckets, channels, world_size)
    if isinstance(setting, Mapping):
        sizes = _from_table(setting, buckets)
    else:
        _check_setting(setting)
        sizes = np.array([setting if bucket.num_frames >= setting else 1 for bucket in buckets])
    for size in np.unique(sizes).tolist():
        check_size(size, world_size)
    return sizes.astype(np.int64)


def check_setting(setting: object) -> None:
    """Raises ConfigError for what has no setting's form; the number of processes is left to `sequence_sizes`."""
    if isinstance(setting, Mapping):
        for resolution, entries in setting.items():
            if not isinstance(entries, Mapping):
                raise ConfigError(f"{KEY}.{resolution}", entries, "write {number of frames: size}, such as {64: 4}")
            for frames, size in entries.items():
                _check_setting(size, f"{KEY}.{resolution}.{frames}")
    elif setting != AUTO:
        _check_setting(setting)


def _check_setting(size: object, key: str = KEY) -> None:
    if isinstance(size, bool) or size not in SIZES:
        raise ConfigError(key, size, f"use {', '.join(map(str, SIZES))}, auto, or a table of such sizes")


def _from_table(table: Mapping, buckets: Buckets) -> np.ndarray:
    check_setting(table)
    wanted = {(str(name), int(frames)): size for name, entries in table.items() for frames, size in entries.items()}
    known = {(bucket.resolution, bucket.num_frames) for bucket in buckets}
    for (name, frames), size in wanted.items():
        if (name, frames) not in known:
            raise ConfigError(f"{KEY}.{name}.{frames}", size, "there is no such bucket; name those in buckets")
        if size > frames:
            remedy = f"each rank needs a frame at least, and there are {frames}: use a smaller size, or 1"
            raise ConfigError(f"{KEY}.{name}.{frames}", size, remedy)
    return np.array([wanted.get((bucket.resolution, bucket.num_frames), 1) for bucket in buckets])


def _balanced(buckets: Buckets, channels: int, world_size: int) -> np.ndarray:
    costs = buckets.seconds
    if costs is None:
        costs = np.array([_cost(bucket, channels) for bucket in buckets])
    limit = TOLERATED * np.median(costs)
    sizes = np.ones(len(costs), dtype=np.int64)
    for i, bucket in enumerate(buckets):
        fitting = [n for n in SIZES if world_size % n == 0 and n <= bucket.num_frames]
        sizes[i] = next((n for n in fitting if costs[i] / n <= limit), fitting[-1])
    return sizes


def _cost(bucket: Bucket, channels: int) -> float:
    """Operations of a batch in one block, forward, up to a constant: its GEMMs and its attention."""
    positions = -(-bucket.height // _PIXELS) * -(-bucket.width // _PIXELS)
    tokens = bucket.batch_size * bucket.num_frames * positions
    return tokens * (36 * channels + 4 * (positions + bucket.num_frames))


def pack(degrees: np.ndarray, slots: int, drop_last: bool) -> tuple[np.ndarray, np.ndarray]:
    """Batches that need 1, 2, 4 or 8 ranks each, put together to units of `slots` ranks.

    In a unit the batches that need more ranks come first, so that each begins at a multiple of its number.

    Args:
        degrees: [N] ranks that each batch needs, powers of two.
        slots: ranks of a unit, a power of two, at least the largest of them.
        drop_last: leave out units that are not full; else they are filled up by repeating their last batch.

    Returns:
        Indices into `degrees`, unit after unit, otherwise in the order given; and where each unit begins, [units + 1].
    """
    if slots == 1:
        return np.arange(len(degrees)), np.arange(len(degrees) + 1)
    units: list[list[int]] = []
    open_units: dict[int, list[list[int]]] = defaultdict(list)  # by free slots, the oldest last
    for batch, degree in enumerate(degrees.tolist()):
        free = next((f for f in sorted(open_units) if f >= degree and open_units[f]), slots)
        unit = open_units[free].pop() if open_units[free] else []
        unit.append(batch)
        if free == degree:
            units.append(unit)
        else:
            open_units[free - degree].insert(0, unit)
    if not drop_last:
        for free, left in open_units.items():
            for unit in left:
                smallest = min(unit, key=lambda batch: degrees[batch])
                units.append(unit + [smallest] * (free // int(degrees[smallest])))
    ordered = [sorted(unit, key=lambda batch: -degrees[batch]) for unit in units]
    starts = np.cumsum([0, *map(len, ordered)])
    return np.array([batch for unit in ordered for batch in unit], dtype=np.int64), starts
