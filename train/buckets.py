"""Buckets: samples of one resolution, length and aspect ratio, which can stand in one batch.

A bucket is (resolution, number of frames, aspect ratio). The configuration states for each resolution and length how
likely a sample that fits is kept there, and how many of them make a batch; the aspect ratios of a resolution and their
sizes in pixels come from a table of sizes (`stdit_fast.resolutions`).
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from stdit_fast.errors import ConfigError, nearest
from stdit_fast.resolutions import is_int, load_resolutions
from stdit_fast.train.bucket_tables import Entry

# A sample may be enlarged a little: it enters a resolution from this share of its pixels on.
MIN_PIXEL_SHARE = 0.8
# Rows worked on at a time: temporary arrays of that length stay in cache, whatever the table's length.
CHUNK = 1 << 16

# Why a sample is in no bucket, from the farthest from a fit to the nearest.
UNREADABLE, TOO_SMALL, NO_IMAGES, NO_VIDEOS, TOO_SHORT, LEFT_OUT = range(6)
REASONS = (
    "unreadable: no frames or no size known",
    "too small for the smallest resolution",
    "image, but no resolution of its size takes images",
    "video, but no resolution of its size takes videos",
    "too short for the shortest length at its size",
    "left out in this epoch by keep_prob",
)

Draw = Callable[[np.ndarray, int], np.ndarray]


@dataclass(frozen=True)
class Bucket:
    """What the samples of one bucket are made into; sizes in pixels.

    A table of measured sizes (`bucket_tables`) adds `checkpointed`, the blocks to recompute, `seconds` of a step, and
    `pieces`, in which a batch runs.
    """

    resolution: str
    num_frames: int
    aspect: str
    height: int
    width: int
    keep_prob: float
    batch_size: int
    checkpointed: int | None = None
    seconds: float | None = None
    pieces: int = 1

    @property
    def at_once(self) -> int:
        """Samples that run at once."""
        return -(-self.batch_size // self.pieces)

    @property
    def name(self) -> str:
        return f"{self.resolution}-{self.num_frames}-{self.aspect}"

    @property
    def is_image(self) -> bool:
        return self.num_frames == 1


@dataclass(frozen=True)
class _Entry:
    """One (resolution, number of frames) of the configuration; `first` is the index of its first bucket."""

    num_frames: int
    keep_prob: float
    batch_size: int | None
    first: int


class _Level:
    """One resolution: its lengths, ascending, and its aspect ratios in the order of the table."""

    def __init__(self, name: str, pixels: int, sizes: Mapping[str, tuple[int, int]], entries: list[_Entry]):
        self.name, self.pixels, self.sizes = name, pixels, sizes
        self.image = next((e for e in entries if e.num_frames == 1), None)
        self.videos = sorted((e for e in entries if e.num_frames != 1), key=lambda e: e.num_frames)
        self.lengths = np.array([e.num_frames for e in self.videos], dtype=np.int64)
        # np.unique keeps the first of equal numbers, and sorted neighbours are enough to find the closest.
        self.ratios, self.positions = np.unique(np.array([float(a) for a in sizes]), return_index=True)

    def closest_aspect(self, ratio: np.ndarray) -> np.ndarray:
        """Positions in the table of the aspect ratios closest to `ratio`, the first on a tie."""
        right = np.searchsorted(self.ratios, ratio).clip(0, len(self.ratios) - 1)
        left = (right - 1).clip(0)
        to_left, to_right = np.abs(ratio - self.ratios[left]), np.abs(ratio - self.ratios[right])
        left, right = self.positions[left], self.positions[right]
        take_left = (to_left < to_right) | ((to_left == to_right) & (left < right))
        return np.where(take_left, left, right)

    def takes(self, pixels: np.ndarray) -> np.ndarray:
        return pixels >= self.pixels * MIN_PIXEL_SHARE

    def entry_index(self, num_frames: np.ndarray, frame_interval: int) -> np.ndarray:
        """Index into [image, *videos] of the entry that each sample of this resolution would take, -1 for none."""
        video = np.searchsorted(self.lengths * frame_interval, num_frames, side="left")
        video[video == 0] = -1
        return np.where(num_frames == 1, 0 if self.image else -1, video)


class Buckets:
    """The table of buckets, and which bucket a sample belongs to.

    Args:
        table: resolution -> {number of frames: (keep_prob, batch_size)}, such as ``{"240p": {16: (1.0, 2)}}``. Where
            keep_prob is 0 the batch size may be None: a sample that meets such an entry goes on to smaller resolutions.
        resolutions: the user's own sizes, name -> {"pixels": int, "sizes": {aspect: [height, width]}} with an aspect
            ratio (height / width) as key, or the path of a JSON file of that form. They come before those shipped.
        measured: (resolution, number of frames) -> measured sizes, which win over the batch sizes of `table`.

    ``buckets[i]`` is a `Bucket`; ``len(buckets)`` counts them. Entries that keep nothing make no bucket.

    Raises:
        ConfigError: an unknown resolution, keep_prob outside 0..1, a batch size that is missing or below 1, a number of
            frames below 1, an empty table, or sizes that are not of the form above.
    """

    def __init__(
        self,
        table: Mapping,
        resolutions: Mapping | str | Path | None = None,
        measured: Mapping[tuple[str, int], Entry] | None = None,
    ):
        if not isinstance(table, Mapping) or not table:
            raise ConfigError("buckets", table, "state at least one, such as {'240p': {16: [1.0, 2]}}.")
        known = load_resolutions(resolutions)
        self._measured = measured or {}
        names = {str(name): name for name in table}
        for name in names:
            if len(names) < len(table):
                raise ConfigError("buckets", list(table), "a resolution stands there twice.")
            if name not in known:
                raise ConfigError("buckets", name, f"there is no such resolution: {nearest(name, known)}")
        self._buckets: list[Bucket] = []
        self._siblings: list[range] = []
        self._levels: list[_Level] = []
        for name in sorted(names, key=lambda name: -known[name]["pixels"]):
            sizes = known[name]["sizes"]
            entries = [
                self._add(name, num_frames, keep_prob, batch_size, sizes)
                for num_frames, keep_prob, batch_size in _check_entries(name, table[names[name]], self._measured)
            ]
            self._levels.append(_Level(name, known[name]["pixels"], sizes, entries))
        if not self._buckets:
            raise ConfigError("buckets", dict(table), "no entry keeps anything: give one a keep_prob above 0.")

    def _add(self, name: str, num_frames: int, keep_prob: float, batch_size: int | None, sizes: Mapping) -> _Entry:
        entry = _Entry(num_frames, keep_prob, batch_size, len(self._buckets))
        if keep_prob > 0:
            found = self._measured.get((name, num_frames))
            more = (found.checkpointed, found.seconds, found.pieces) if found else ()
            self._buckets += [
                Bucket(name, num_frames, aspect, height, width, keep_prob, batch_size, *more)
                for aspect, (height, width) in sizes.items()
            ]
            self._siblings += [range(entry.first, len(self._buckets))] * len(sizes)
        return entry

    def __len__(self) -> int:
        return len(self._buckets)

    def __getitem__(self, index: int) -> Bucket:
        return self._buckets[index]

    def __iter__(self) -> Iterator[Bucket]:
        return iter(self._buckets)

    def siblings(self, index: int) -> range:
        """The buckets of the same resolution and length with any aspect ratio, this one among them."""
        return self._siblings[index]

    @property
    def batch_sizes(self) -> np.ndarray:
        """Batch size of each bucket, int64."""
        return np.array([b.batch_size for b in self._buckets], dtype=np.int64)

    @property
    def seconds(self) -> np.ndarray | None:
        """Seconds of a step of each bucket, float64; None unless all were measured."""
        known = [b.seconds for b in self._buckets]
        return None if None in known else np.array(known, dtype=np.float64)

    def assign(
        self,
        num_frames: np.ndarray,
        height: np.ndarray,
        width: np.ndarray,
        frame_interval: int = 1,
        rng: np.random.Generator | Draw | None = None,
    ) -> np.ndarray:
        """The bucket of each sample.

        Resolutions are tried from the largest down. A sample enters the first with
        ``height * width >= 0.8 * pixels`` and, for a video, the largest number of frames other than 1 with
        ``length > num_frames * frame_interval``; an image enters num_frames 1 and nothing else. It is kept there with
        keep_prob; otherwise the search goes on to smaller resolutions. The aspect ratio closest to height / width is
        taken.

        Args:
            num_frames, height, width: integers [N]; the length of a sample in frames (1: an image) and its size in
                pixels. Samples with a number below 1 belong nowhere.
            frame_interval: one frame in so many is used.
            rng: what decides on keep_prob: a generator; a function ``(rows, level) -> uniform numbers``, with which the
                result does not depend on the order of the rows; or None: whatever has a keep_prob above 0 is kept.

        Returns:
            int32 [N], indices of buckets, -1 for none.
        """
        num_frames, height, width = _check_sizes(num_frames, height, width, frame_interval)
        out = np.empty(len(num_frames), dtype=np.int32)
        for start in range(0, len(out), CHUNK):
            part = slice(start, start + CHUNK)
            rows = np.arange(start, min(start + CHUNK, len(out)), dtype=np.int64)
            out[part] = self._assign_chunk(rows, num_frames[part], height[part], width[part], frame_interval, rng)
        return out

    def possible(
        self, num_frames: np.ndarray, height: np.ndarray, width: np.ndarray, frame_interval: int = 1
    ) -> tuple[np.ndarray, np.ndarray]:
        """Every bucket that each sample takes with a probability above 0, whatever is drawn.

        Args:
            num_frames, height, width, frame_interval: as for `assign`.

        Returns:
            Rows and buckets, int64 [pairs], ascending by row, then by bucket.
        """
        found = np.full((len(num_frames), len(self._levels) + 1), -1, dtype=np.int32)
        for depth in range(len(self._levels)):

            def refuse_before(rows: np.ndarray, level: int, depth: int = depth) -> np.ndarray:
                return np.full(len(rows), 0.0 if level >= depth else 1.0)

            found[:, depth + 1] = self.assign(num_frames, height, width, frame_interval, refuse_before)
        # The deeper the start, the smaller the resolution: what comes again stands beside itself.
        rows, depths = np.nonzero((found[:, 1:] >= 0) & (found[:, 1:] != found[:, :-1]))
        return rows, found[rows, depths + 1].astype(np.int64)

    def _assign_chunk(self, rows, num_frames, height, width, frame_interval, rng) -> np.ndarray:
        out = np.full(len(rows), -1, dtype=np.int32)
        num_frames, pixels, left = _searchable(num_frames, height, width)
        for depth, level in enumerate(self._levels):
            inside = left[level.takes(pixels[left])]
            index = level.entry_index(num_frames[inside], frame_interval)
            for i, entry in enumerate([level.image, *level.videos]):
                if entry is None or entry.keep_prob == 0:
                    continue
                fit = inside[index == i]
                if rng is not None and entry.keep_prob < 1 and len(fit):
                    draws = rng.random(len(fit)) if isinstance(rng, np.random.Generator) else rng(rows[fit], depth)
                    fit = fit[draws < entry.keep_prob]
                out[fit] = entry.first + level.closest_aspect(height[fit] / width[fit])
            left = left[out[left] < 0]
        return out

    def count_misfits(
        self, num_frames: np.ndarray, height: np.ndarray, width: np.ndarray, frame_interval: int, buckets: np.ndarray
    ) -> dict[str, int]:
        """Why samples are in no bucket: reason -> number of samples.

        Args:
            num_frames, height, width, frame_interval: as for `assign`.
            buckets: what `assign` returned for them.
        """
        num_frames, height, width = _check_sizes(num_frames, height, width, frame_interval)
        counts = np.zeros(len(REASONS), dtype=np.int64)
        for start in range(0, len(buckets), CHUNK):
            part = slice(start, start + CHUNK)
            out = buckets[part] < 0
            if out.any():
                sizes = num_frames[part][out], height[part][out], width[part][out]
                counts += np.bincount(self._misfit(*sizes, frame_interval), minlength=len(REASONS))
        return {reason: int(n) for reason, n in zip(REASONS, counts, strict=True) if n}

    def _misfit(self, num_frames, height, width, frame_interval) -> np.ndarray:
        num_frames, pixels, known = _searchable(num_frames, height, width)
        image = num_frames == 1
        reason = np.full(len(num_frames), UNREADABLE)
        reason[known] = TOO_SMALL
        for level in self._levels:
            inside = np.zeros(len(reason), dtype=bool)
            inside[known] = level.takes(pixels[known])
            keeps = np.array([e is not None and e.keep_prob > 0 for e in (level.image, *level.videos)])
            index = level.entry_index(num_frames, frame_interval)
            here = np.where(image, NO_IMAGES, TOO_SHORT if keeps[1:].any() else NO_VIDEOS)
            here[(index >= 0) & keeps[index]] = LEFT_OUT
            # Of several resolutions the one nearest to a fit counts.
            reason[inside] = np.maximum(reason[inside], here[inside])
        return reason

    def requirements(self, frame_interval: int = 1) -> str:
        """What a sample must be to enter, a line for each resolution."""
        lines = []
        for level in self._levels:
            kept = [e.num_frames for e in ([level.image] if level.image else []) + level.videos if e.keep_prob > 0]
            if not kept:
                continue
            kinds = [f"videos of more than {n * frame_interval} frames" for n in kept if n != 1][:1]
            kinds = ["images"] * (1 in kept) + kinds
            need = math.ceil(level.pixels * MIN_PIXEL_SHARE)
            lines.append(f"{level.name}: height*width >= {need}, {' or '.join(kinds)}")
        return "\n".join(lines)


def _searchable(num_frames: np.ndarray, height: np.ndarray, width: np.ndarray):
    """(number of frames, pixels, indices of the samples of which both are known), int64."""
    num_frames, height = num_frames.astype(np.int64), height.astype(np.int64)
    known = (num_frames > 0) & (height > 0) & (width > 0)
    return num_frames, height * width, np.flatnonzero(known)


def _check_sizes(num_frames, height, width, frame_interval) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    if not is_int(frame_interval) or frame_interval < 1:
        raise ConfigError("dataset.frame_interval", frame_interval, "it must be an integer of at least 1.")
    arrays = tuple(np.atleast_1d(np.asarray(a)) for a in (num_frames, height, width))
    if len({a.shape for a in arrays}) != 1 or arrays[0].ndim != 1:
        raise ValueError(f"num_frames, height and width must be of one length, not {[a.shape for a in arrays]}")
    return arrays


def _check_entries(resolution: str, entries: object, measured: Mapping) -> list[tuple[int, float, int | None]]:
    key = f"buckets.{resolution}"
    if not isinstance(entries, Mapping) or not entries:
        raise ConfigError(key, entries, "it must map numbers of frames to [keep_prob, batch_size].")
    checked: dict[int, tuple[int, float, int | None]] = {}
    for num_frames, entry in entries.items():
        count = int(num_frames) if isinstance(num_frames, str) and num_frames.strip().isdigit() else num_frames
        if not is_int(count) or count < 1:
            raise ConfigError(key, num_frames, "the number of frames must be an integer of at least 1 (1: images).")
        if count in checked:
            raise ConfigError(key, num_frames, "this number of frames stands there twice.")
        found = measured.get((resolution, int(count)))
        if found and isinstance(entry, (list, tuple)) and len(entry) == 2:
            entry = entry[0], found.batch_size
        checked[int(count)] = (int(count), *_check_entry(f"{key}.{count}", entry))
    return list(checked.values())


def _check_entry(key: str, entry: object) -> tuple[float, int | None]:
    if not isinstance(entry, (list, tuple)) or len(entry) != 2:
        raise ConfigError(key, entry, "it must be [keep_prob, batch_size], such as [1.0, 2].")
    keep_prob, batch_size = entry
    is_number = isinstance(keep_prob, (int, float, np.number)) and not isinstance(keep_prob, bool)
    if not is_number or not 0 <= keep_prob <= 1:
        raise ConfigError(key, keep_prob, "keep_prob, the first of the two, must be between 0 and 1.")
    if keep_prob == 0:
        return 0.0, None
    if batch_size is None:
        raise ConfigError(key, entry, "the batch size is missing, and is needed where keep_prob is above 0.")
    if not is_int(batch_size) or batch_size < 1:
        raise ConfigError(key, batch_size, "the batch size, the second of the two, must be an integer of at least 1.")
    return float(keep_prob), int(batch_size)
