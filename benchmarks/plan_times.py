"""How long a training step takes, by bucket: measured by the sweep, or else by a model fitted to what was measured."""

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from stdit_fast.benchmarks.readme import latest
from stdit_fast.benchmarks.step import parse_case, positions_of
from stdit_fast.errors import ConfigError
from stdit_fast.model.config import STDiT2Config
from stdit_fast.train.bucket_tables import BucketTable
from stdit_fast.train.buckets import Bucket

TEXT_TOKENS = 200
# GPUs of one kind differ by some per cent, and so do their clocks.
BETWEEN_MACHINES = 0.03
LEAST_POINTS = 4  # that a fit of three numbers can be judged by
# AdamW and the average of 767 M parameters on an H100, for times that were measured without: PyTorch's, and ours.
OPTIMIZER_SECONDS = 0.0227
OUR_OPTIMIZER_SECONDS = 0.0101
# What 80 GB hold, in tokens times units of a block: a kept block has 20 units of a token, a recomputed one 2. From what
# checkpointing "auto" chose: of 28 blocks 1 at 47,040 tokens, 18 at 101,760, 19 at 110,160.
UNITS_KEPT, UNITS_RECOMPUTED, HELD = 20, 2, 24.3e6


class Interval(NamedTuple):
    """An estimate between bounds; sums and products of such take all lows, and all highs, together."""

    low: float
    mid: float
    high: float

    @classmethod
    def of(cls, mid: float, share: float = 0.0) -> "Interval":
        """mid, give or take a share of it."""
        return cls(mid * (1 - share), mid, mid * (1 + share))

    def plus(self, other: "Interval") -> "Interval":
        return Interval(*(a + b for a, b in zip(self, other, strict=True)))

    def times(self, factor: "float | Interval") -> "Interval":
        factors = factor if isinstance(factor, Interval) else (factor,) * 3
        return Interval(*(a * b for a, b in zip(self, factors, strict=True)))

    def show(self, digits: int = 2) -> str:
        return f"{self.mid:.{digits}f} ({self.low:.{digits}f} to {self.high:.{digits}f})"


def work(frames: int, height: int, width: int, batch: int, checkpointed: int = 0) -> np.ndarray:
    """[1, operations of the GEMMs, operations of attention over positions and frames] of a step: 3 times forward.

    Of so many blocks the forward pass is done twice.
    """
    config = STDiT2Config()
    channels, positions = config.hidden_size, positions_of(height, width)
    tokens = batch * frames * positions
    gemm = tokens * (36 * channels**2 + 4 * TEXT_TOKENS * channels) + batch * TEXT_TOKENS * 4 * channels**2
    attention = tokens * 4 * (positions + frames) * channels
    passes = 3 * config.depth + checkpointed
    return np.array([1.0, passes * gemm, passes * attention])


def recomputed_blocks(tokens: int) -> int:
    """About how many blocks a batch of so many tokens must recompute on a GPU of 80 GB."""
    depth = STDiT2Config().depth
    kept = (HELD / tokens - depth * UNITS_RECOMPUTED) / (UNITS_KEPT - UNITS_RECOMPUTED)
    return depth - int(min(depth, max(0.0, kept)))


@dataclass(frozen=True)
class Fit:
    """seconds = coefficients . work, to equal relative errors.

    Attributes:
        coefficients: float64 [3], none below 0.
        error: root mean square of the relative residuals.
        points: how many were fitted.
        recomputing: whether their work had the recomputed blocks in it.
    """

    coefficients: np.ndarray
    error: float
    points: int
    recomputing: bool = False

    @classmethod
    def to(cls, works: list[np.ndarray], seconds: list[float], floor: bool = True, recomputing: bool = False) -> "Fit":
        """Fits; where a number comes out below 0 the fit is done without it.

        Args:
            floor: whether a step has a time that no work explains. Steps of about one time cannot tell.
            recomputing: see the attribute.

        Raises:
            ValueError: too few points.
        """
        if len(seconds) < LEAST_POINTS:
            raise ValueError(f"{len(seconds)} measured steps, of {LEAST_POINTS} that a fit needs")
        rows = np.array(works) / np.array(seconds)[:, None]
        used = np.array([floor, True, True])
        while True:
            scale = np.abs(rows[:, used]).max(0)
            solution = np.linalg.lstsq(rows[:, used] / scale, np.ones(len(rows)), rcond=None)[0] / scale
            if (solution >= 0).all():
                break
            used[np.flatnonzero(used)[np.argmin(solution * scale)]] = False
        coefficients = np.zeros(3)
        coefficients[used] = solution
        freedom = max(1, len(rows) - int(used.sum()))
        error = float(np.sqrt(((rows @ coefficients - 1) ** 2).sum() / freedom))
        return cls(coefficients, error, len(rows), recomputing)

    def seconds(self, frames: int, height: int, width: int, batch: int) -> Interval:
        """A step's time, give or take twice the residuals."""
        recomputed = recomputed_blocks(batch * frames * positions_of(height, width)) if self.recomputing else 0
        mid = float(self.coefficients @ work(frames, height, width, batch, recomputed))
        return Interval.of(mid, min(0.9, 2 * self.error + BETWEEN_MACHINES))


class StepTime(NamedTuple):
    """One bucket's step: its batch size, its time, and whether that was measured."""

    batch_size: int
    seconds: Interval
    measured: bool


class Times:
    """Step times of one GPU and one set of buckets.

    Args:
        device: the GPU's name; source: where the times come from, for people.
        table: the sweep's, if there is one; its batch sizes are then those of the plan.
        fit: for what the table does not have.
        extra: seconds that the fitted steps lack.
    """

    def __init__(self, device: str, source: str, table: BucketTable | None, fit: Fit | None, extra: float = 0.0):
        self.device, self.source, self.table, self.fit, self.extra = device, source, table, fit, extra

    @classmethod
    def of_table(cls, table: BucketTable, probes: Path | None = None) -> "Times":
        """From the sweep's table; a fit to all of its probes, or to the table's entries, serves what it lacks."""
        source = (
            f"{_short(table.path)} ({sum(e.measured for e in table.buckets.values())} of {len(table.buckets)} measured)"
        )
        if probes is not None and (fit := fit_of_probes(probes, table.device)) is not None:
            return cls(table.device, source, table, fit)
        measured = [((r, f), e) for (r, f), e in table.buckets.items() if e.measured]
        works = [work(f, e.height, e.width, e.batch_size, e.checkpointed) for (_, f), e in measured]
        seconds = [e.seconds for _, e in measured]
        enough = len(seconds) >= LEAST_POINTS
        fit = Fit.to(works, seconds, floor=False, recomputing=True) if enough else None
        return cls(table.device, source, table, fit)

    @classmethod
    def of_probes(cls, path: Path) -> "Times | None":
        """From the sweep's probes: a fit for all buckets, with the optimizer in it. None where they are too few."""
        devices = dict.fromkeys(r["device"] for r in latest(path).values())
        for device in devices:
            if (fit := fit_of_probes(path, device)) is not None:
                return cls(device, f"{_short(path)}: no bucket itself, a fit to {fit.points} steps", None, fit)
        return None

    @classmethod
    def of_steps(cls, device: str, milliseconds: dict[str, float]) -> "Times":
        """From steps without optimizer by case, such as "144p-16-6": a fit for all buckets.

        Raises:
            ConfigError: too few, or something else than cases and times.
        """
        try:
            fit = Fit.to([work(*parse_case(case)) for case in milliseconds], [ms / 1e3 for ms in milliseconds.values()])
        except (ValueError, TypeError) as error:
            raise ConfigError("original", list(milliseconds), str(error)) from error
        return cls(device, f"a fit to {len(milliseconds)} steps", None, fit, OPTIMIZER_SECONDS)

    @classmethod
    def of_records(cls, path: Path) -> "Times":
        """From whole steps without optimizer (suite "step"): a fit for all buckets.

        Raises:
            ConfigError: too few of them.
        """
        records = [r for r in latest(path).values() if r["impl"] == "fused"]
        devices = " and ".join(sorted({r["device"] for r in records}))
        works = [work(*parse_case(r["case"]), _recomputed(r["notes"])) for r in records]
        try:
            fit = Fit.to(works, [r["ms"] / 1e3 for r in records], recomputing=True)
        except ValueError as error:
            raise ConfigError("times", str(path), f"{error}; measure with stdit_fast.benchmarks.sweep") from error
        source = f"{_short(path)}: no bucket itself, a fit to {len(records)} steps"
        return cls(devices, source, None, fit, OUR_OPTIMIZER_SECONDS)

    def of(self, bucket: Bucket) -> StepTime:
        """The step of a bucket, of one aspect ratio.

        Raises:
            ConfigError: it was not measured, and nothing was fitted.
        """
        entry = self.table.buckets.get((bucket.resolution, bucket.num_frames)) if self.table else None
        size = bucket.num_frames, bucket.height, bucket.width
        if entry is None:
            if self.fit is None:
                raise ConfigError("tables", self.source, f"it has no {bucket.name}; sweep a configuration that does")
            batch = self._batch_size(bucket)
            return StepTime(batch, self.fit.seconds(*size, batch).plus(Interval.of(self.extra, 0.5)), False)
        # The table's time is that of the aspect ratio with the most tokens; others have up to a tenth fewer.
        share = float(work(*size, 1)[1] / work(bucket.num_frames, entry.height, entry.width, 1)[1])
        low, high = entry.seconds_low * (1 - BETWEEN_MACHINES), entry.seconds_high * (1 + BETWEEN_MACHINES)
        return StepTime(entry.batch_size, Interval(low * share, entry.seconds * share, high), entry.measured)

    def _batch_size(self, bucket: Bucket) -> int:
        """Of a bucket without an entry: what takes a table's step, else the configuration's."""
        if self.table is None:
            return bucket.batch_size
        size = bucket.num_frames, bucket.height, bucket.width
        batch = 1
        while self.fit.seconds(*size, batch + 1).mid <= self.table.step_seconds:
            batch += 1
        return batch


def fit_of_probes(path: Path, device: str) -> Fit | None:
    """A fit to what the sweep measured on a GPU, each size of each bucket; None where that is too little."""
    records = [r for r in latest(path).values() if r["device"] == device and r["impl"] == "step" and r["ms"]]
    if len(records) < LEAST_POINTS:
        return None
    works = []
    for r in records:
        _, frames, height, width, _ = r["notes"]["shape"]
        works.append(work(frames, height, width, r["notes"]["batch"], r["notes"]["checkpointed"]))
    return Fit.to(works, [r["ms"] / 1e3 for r in records], recomputing=True)


def _recomputed(notes: dict) -> int:
    """Blocks that a step of the suite "step" recomputed."""
    chosen = notes.get("checkpointing", "off")
    if chosen == "auto":
        return notes["checkpointed_blocks"]
    return int(chosen) if chosen.isdigit() else {"off": 0, "all": STDiT2Config().depth}[chosen]


def _short(path: Path) -> str:
    """The end of a path, as much as tells which file it is."""
    return "/".join(path.parts[-2:])
