"""Time and memory of a training step as functions of bucket, batch size and recomputed blocks, fitted from few probes.

Memory is linear in tokens, in tokens times the blocks that keep what their backward pass needs, and in samples (text)
and frames (modulation). Time has a floor, is linear in tokens, and has a term for attention within a frame and one over
frames; recomputing a share of the blocks adds that share of a forward pass. All coefficients are at least 0. What the
formula misses of one bucket is made up by a factor from its own probes: a choice that has been measured is known.
"""

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from stdit_fast.model.graphs import MAX_TOKENS

GIB = 2**30
MOST_PIECES = 16  # of a batch
PIECE = 0.25  # of a step's floor that each further piece costs: launches, gradients that are added; the optimizer not
SMALL_GAIN = 0.005  # is not worth a piece
FINE = 100  # batch sizes of which so many and more lie apart by one in so many
OUT_OF_MEMORY = 1.08  # more is expected of a bucket after each time that it ran out of memory, until a size has fit
# What a step costs beside its own work where many machines share one: gradients one way, weights the other (modelled
# for 64 GPUs, docs/multi_gpu.md). A step time is chosen with it, as if every run were such a one.
EXCHANGE = 0.076


@dataclass(frozen=True)
class Shape:
    """One (resolution, number of frames) at the aspect ratio that has the most tokens; sizes in pixels.

    positions: tokens of a frame.
    """

    resolution: str
    frames: int
    height: int
    width: int
    positions: int

    @property
    def name(self) -> str:
        return f"{self.resolution}-{self.frames}"

    def tokens(self, batch: int) -> int:
        return batch * self.frames * self.positions


@dataclass(frozen=True)
class Probe:
    """One measurement.

    Attributes:
        seconds: of each repeat; empty where it ran out of memory.
        peak: bytes allocated at most.
        keeps: whether the MLPs' activations were kept, for which there has to be memory.
        pieces: passes in which the batch ran.
    """

    shape: Shape
    batch: int
    checkpointed: int
    seconds: tuple[float, ...] = ()
    peak: int = 0
    keeps: bool = False
    pieces: int = 1

    @property
    def at_once(self) -> int:
        """Samples that run at once."""
        return -(-self.batch // self.pieces)

    @property
    def ran(self) -> bool:
        return bool(self.seconds)

    @cached_property
    def median(self) -> float:
        return statistics.median(self.seconds)


@dataclass(frozen=True)
class Choice:
    """A way to run a bucket, and what is expected of it; `measured`: whether that very step was measured."""

    shape: Shape
    batch: int
    checkpointed: int
    seconds: float
    peak: float
    measured: bool = False
    keeps: bool = False
    pieces: int = 1

    @property
    def at_once(self) -> int:
        """Samples that run at once."""
        return -(-self.batch // self.pieces)


class StepModel:
    """Predicts seconds and bytes of a step.

    Args:
        depth: blocks of the model.
        base: bytes that every step takes: weights, gradients, the optimizer's state.
        probes: what is known; `add` brings more.
        encoding: seconds that encoding adds to a step of so many samples of a shape; None: nothing is encoded.
        keeps: (shape, samples at once, recomputed blocks) -> whether the model keeps activations; None: it never does.
        hints: probes of other kernels. They stand for a bucket until it has a probe that ran, and are never measured.
    """

    def __init__(
        self,
        depth: int,
        base: float,
        probes: Iterable[Probe] = (),
        encoding: Callable[[Shape, int], float] | None = None,
        keeps: Callable[[Shape, int, int], bool] | None = None,
        hints: Iterable[Probe] = (),
    ):
        self.depth, self.base, self.encoding = depth, base, encoding
        self._keeps = keeps or (lambda shape, batch, checkpointed: False)
        self.probes: list[Probe] = []
        self._hints: dict[Shape, list[Probe]] = {}
        self._drift: list[float] = []  # of buckets' first probes from what their hints say
        for hint in hints:
            if hint.ran:
                self._hints.setdefault(hint.shape, []).append(hint)
        self.time_errors: list[float] = []  # of the formulas, without a bucket's own factor
        self.memory_errors: list[float] = []
        self._fit()
        for probe in probes:
            self._note_drift(probe)
            self.probes.append(probe)
            self._by_shape.setdefault(probe.shape, []).append(probe)
        self._fit()

    def _note_drift(self, probe: Probe) -> None:
        if probe.ran and self.hinted(probe.shape) and not self._own(probe.shape):
            self._drift.append(probe.median / self._alone(probe))

    def add(self, probe: Probe) -> None:
        self._note_drift(probe)
        self.probes.append(probe)
        self._fit()

    def _fit(self) -> None:
        self._factors: dict[Shape, float] = {}
        self._peaks: dict[tuple[Shape, int, int], float] = {}
        self._by_shape: dict[Shape, list[Probe]] = {}
        for probe in self.probes:
            self._by_shape.setdefault(probe.shape, []).append(probe)
        ran = [p for p in self.probes if p.ran]
        hints = [p for shape in self._hints if not self._own(shape) for p in self._hints[shape]]
        self.time = self.memory = None
        if not ran + hints:
            return  # then nothing can be predicted yet
        both = ran + hints
        self.time = non_negative_fit([self._time_terms(p) for p in both], [p.median for p in both]).tolist()
        self.memory = non_negative_fit([self._memory_terms(p) for p in both], [self._beyond(p) for p in both]).tolist()
        self.time_errors = [p.median / self._formula(self.time, self._time_terms(p)) - 1 for p in both]
        self.memory_errors = [self._beyond(p) / self._formula(self.memory, self._memory_terms(p)) - 1 for p in both]

    def _own(self, shape: Shape) -> list[Probe]:
        """A bucket's probes that ran."""
        return [p for p in self._by_shape.get(shape, ()) if p.ran]

    def hinted(self, shape: Shape) -> bool:
        """Whether probes of other kernels tell about a bucket."""
        return shape in self._hints

    def known_itself(self, shape: Shape) -> bool:
        """Whether a bucket has a probe that ran."""
        return bool(self._own(shape))

    def known(self, shape: Shape) -> list[Probe]:
        """A bucket's probes that ran, or else its hints."""
        return self._own(shape) or self._hints.get(shape, [])

    def _beyond(self, probe: Probe) -> float:
        """Bytes at the peak beyond those that every step takes."""
        return max(probe.peak - self.base, 1e-3 * self.base)

    def _time_terms(self, of: "Probe | Choice") -> list[float]:
        shape, tokens = of.shape, of.shape.tokens(of.batch)
        again = of.checkpointed / self.depth
        over_frames = tokens * shape.frames if shape.frames > 1 else 0
        work = [tokens, tokens * shape.positions, over_frames]
        activations = 0 if of.keeps else tokens * (1 - again)  # made again in the backward pass
        floor = 1 + PIECE * (of.pieces - 1)
        return [floor, *work, of.batch, tokens * again, tokens * shape.positions * again, activations]

    def _memory_terms(self, of: "Probe | Choice") -> list[float]:
        tokens = of.shape.tokens(of.at_once)
        # Of checkpointed blocks one at a time is there as a whole.
        kept = max(self.depth - of.checkpointed, 1)
        return [tokens, tokens * kept, tokens * kept * of.keeps, of.at_once, of.at_once * of.shape.frames]

    @staticmethod
    def _formula(coefficients: Sequence[float], terms: list[float]) -> float:
        return sum(c * t for c, t in zip(coefficients, terms, strict=True))

    def seconds(self, shape: Shape, batch: int, checkpointed: int, pieces: int = 1) -> float:
        """Expected seconds of a step; measured ones where there are."""
        seconds = self._alone(self._at(shape, batch, checkpointed, pieces))
        if self._drift and self.hinted(shape) and not self._own(shape):
            seconds *= float(np.median(self._drift))  # other kernels are as much faster or slower as elsewhere
        return seconds + (self.encoding(shape, batch) if self.encoding else 0.0)

    def _alone(self, at: "Probe | Choice") -> float:
        """Expected seconds without encoding, by the bucket's own probes or its hints as they are."""
        seconds, near = self._formula(self.time, self._time_terms(at)), self._nearest(at)
        if near is not None:
            seconds *= near.median / self._formula(self.time, self._time_terms(near))
        return seconds

    def _at(self, shape: Shape, batch: int, checkpointed: int, pieces: int) -> Choice:
        keeps = self._keeps(shape, -(-batch // pieces), checkpointed)
        return Choice(shape, batch, checkpointed, 0, 0, keeps=keeps, pieces=pieces)

    def find(self, shape: Shape, batch: int, checkpointed: int, pieces: int = 1) -> Probe | None:
        """The probe of that very step."""
        own, wanted = self._by_shape.get(shape, ()), (batch, checkpointed, pieces)
        return next((p for p in own if (p.batch, p.checkpointed, p.pieces) == wanted), None)

    def measured(self, shape: Shape, budget: float) -> list[Choice]:
        """What was measured of a bucket and fits into `budget` bytes."""
        found = []
        for p in self._own(shape):
            if p.peak <= budget:
                seconds = self.seconds(shape, p.batch, p.checkpointed, p.pieces)
                found.append(Choice(shape, p.batch, p.checkpointed, seconds, p.peak, measured=True, pieces=p.pieces))
        return found

    def peak(self, shape: Shape, at_once: int, checkpointed: int) -> float:
        """Expected bytes allocated at most, of so many samples at once; measured ones where there are; else on the safe
        side of errors."""
        key = shape, at_once, checkpointed
        if key not in self._peaks:
            known = [p.peak for p in self._own(shape) if (p.at_once, p.checkpointed) == (at_once, checkpointed)]
            if known:
                self._peaks[key] = float(max(known))
            else:
                terms = self._memory_terms(self._at(shape, at_once, checkpointed, 1))
                self._peaks[key] = self.base + self._memory_factor(shape) * self._formula(self.memory, terms)
        return self._peaks[key]

    def _memory_factor(self, shape: Shape) -> float:
        """What the formula for memory is multiplied by for a bucket."""
        if shape not in self._factors:
            known = [self._beyond(p) / self._formula(self.memory, self._memory_terms(p)) for p in self.known(shape)]
            factor = max(known) if known else 1 + max([0.0, *self.memory_errors])
            failed = len(self._by_shape.get(shape, [])) - len(self._own(shape))  # what was expected to fit did not
            failed = min(failed, 1) if self._own(shape) else failed
            self._factors[shape] = factor * OUT_OF_MEMORY**failed
        return self._factors[shape]

    def refuted(self, shape: Shape, at_once: int, checkpointed: int) -> bool:
        """Whether a probe with no more samples at once and no fewer recomputed blocks has run out of memory."""
        return any(
            not p.ran and p.at_once <= at_once and p.checkpointed >= checkpointed for p in self._by_shape.get(shape, [])
        )

    def _nearest(self, at: Choice) -> Probe | None:
        """The shape's own probe that is most like it."""
        known = self.known(at.shape)
        if not known:
            return None
        return min(
            known,
            key=lambda p: (
                abs(math.log(p.at_once / at.at_once)) + abs(p.checkpointed - at.checkpointed) / self.depth,
                abs(math.log(p.batch / at.batch)),
            ),
        )

    # ---------------------------------------------------------------- choosing

    def fewest(self, shape: Shape, at_once: int, budget: float, least: int = 0) -> int | None:
        """The fewest recomputed blocks, `least` or more, with which so many samples at once fit; None if none does."""
        for count in range(least, self.depth + 1):
            if self.peak(shape, at_once, count) <= budget and not self.refuted(shape, at_once, count):
                return count
        return None

    def fitting(self, shape: Shape, batch: int, budget: float, pieces: int = 1, least: int = 0) -> Choice | None:
        """With the fewest recomputed blocks, `least` or more, that fit into `budget` bytes; None if none does."""
        count = self.fewest(shape, -(-batch // pieces), budget, least)
        if count is None:
            return None
        return self._choice(shape, batch, count, pieces, self.seconds(shape, batch, count, pieces))

    def _choice(self, shape: Shape, batch: int, checkpointed: int, pieces: int, seconds: float) -> Choice:
        peak = self.peak(shape, -(-batch // pieces), checkpointed)
        known = self.find(shape, batch, checkpointed, pieces) is not None
        return Choice(shape, batch, checkpointed, seconds, peak, known, pieces=pieces)

    def options(self, shape: Shape, budget: float, longest: float) -> list[Choice]:
        """Batch sizes that fit, up to the first whose step takes longer than `longest` seconds: every one, of large
        ones such as lie a hundredth apart.

        A batch runs in as many pieces as make its step the shortest: of smaller ones fewer blocks are recomputed. They
        are no smaller than what CUDA graphs run.

        Raises:
            ValueError: not even one sample fits.
        """
        found: list[Choice] = []
        fewest: dict[int, int | None] = {}  # recomputed blocks, by samples at once

        def recomputed(at_once: int) -> int | None:
            if at_once not in fewest:
                fewest[at_once] = self.fewest(shape, at_once, budget)
            return fewest[at_once]

        batch, whole = 1, True
        while batch < 1 << 14:
            ways = []
            whole = whole and recomputed(batch) is not None
            for pieces in range(1 if whole else 2, min(batch, MOST_PIECES) + 1):
                at_once = -(-batch // pieces)
                if pieces > 1 and shape.tokens(batch // pieces) <= MAX_TOKENS:  # the smallest one
                    break
                if -(-batch // at_once) < pieces or recomputed(at_once) is None:
                    continue
                count = recomputed(at_once)
                ways.append((self.seconds(shape, batch, count, pieces), pieces, count))
                if count == 0:
                    break
            if not ways:
                break
            seconds, pieces, count = min(ways, key=lambda way: way[0] * (1 + SMALL_GAIN * way[1]))
            found.append(self._choice(shape, batch, count, pieces, seconds))
            if seconds > longest:
                break
            batch += max(1, batch // FINE)
        if not found:
            raise ValueError(f"not even one sample of {shape.name} fits into {budget / GIB:.1f} GiB")
        return found


def non_negative_fit(terms: list[list[float]], values: list[float]) -> np.ndarray:
    """Coefficients of at least 0 that minimise the relative errors' squares (an active-set method)."""
    rows = np.asarray(terms, dtype=np.float64) / np.asarray(values, dtype=np.float64)[:, None]
    scales = np.abs(rows).max(axis=0)
    scales[scales == 0] = 1
    rows = rows / scales
    wanted = np.ones(len(rows))
    active = list(range(rows.shape[1]))
    while True:
        # A trace of the ridge settles what few probes leave open.
        design = np.concatenate([rows[:, active], 1e-4 * np.eye(len(active))])
        found = np.linalg.lstsq(design, np.concatenate([wanted, np.zeros(len(active))]), rcond=None)[0]
        if (found >= 0).all() or len(active) == 1:
            break
        active.pop(int(np.argmin(found)))
    coefficients = np.zeros(rows.shape[1])
    coefficients[active] = np.maximum(found, 0)
    return coefficients / scales


def closest(options: list[Choice], seconds: float) -> Choice:
    """The option whose step is nearest to `seconds`, as a ratio."""
    return min(options, key=lambda o: abs(math.log(o.seconds / seconds)))


def efficiency(options: dict[Shape, list[Choice]], choices: list[Choice]) -> float:
    """Share of the best rate that buckets get where every step takes as long as the slowest of `choices`, on average.

    A bucket's best rate is its fewest seconds a sample. So recomputation and floors count, and so does waiting for the
    slowest, where ranks train different buckets in one step.
    """
    slowest = max(c.seconds for c in choices)
    ideal = [min(o.seconds / o.batch for o in options[c.shape]) for c in choices]
    return float(np.mean([best * c.batch / slowest for best, c in zip(ideal, choices, strict=True)]))


def exchanging(options: dict[Shape, list[Choice]], choices: list[Choice]) -> float:
    """`efficiency`, with EXCHANGE in each step."""
    slowest = max(c.seconds for c in choices)
    return efficiency(options, choices) * slowest / (slowest + EXCHANGE)


def spread(seconds: Iterable[float]) -> float:
    """Slowest over fastest, less 1."""
    values = list(seconds)
    return max(values) / min(values) - 1


def imbalance(seconds: Iterable[float]) -> float:
    """Slowest over mean, less 1: what ranks wait where each trains another bucket."""
    values = list(seconds)
    return max(values) / float(np.mean(values)) - 1


def chosen_for(options: dict[Shape, list[Choice]], tried: np.ndarray) -> list[list[Choice]]:
    """For each step time of `tried` the `closest` option of every bucket."""
    columns = []
    for found in options.values():
        distance = np.abs(np.log([o.seconds for o in found])[None, :] - np.log(tried)[:, None])
        columns.append([found[i] for i in distance.argmin(1)])
    return [list(row) for row in zip(*columns, strict=True)]


def targets(options: dict[Shape, list[Choice]], longest: float = math.inf, count: int = 160) -> np.ndarray:
    """Step times worth trying: from three quarters of the longest that one sample takes, to three times that, or to
    where EXCHANGE is an eighth.

    Args:
        longest: seconds beyond which none is, unless a sample takes that long.
    """
    lowest = max(found[0].seconds for found in options.values())
    highest = max(3 * lowest, 8 * EXCHANGE)
    return np.geomspace(0.75 * lowest, max(min(highest, longest), lowest), count)


def best_target(
    options: dict[Shape, list[Choice]], longest: float = math.inf, tolerance: float = 0.04, even: float = 0.03
) -> float:
    """Of the step times within `tolerance` of the highest efficiency the shortest whose spread is about the smallest.

    The efficiency is `efficiency`, with EXCHANGE in each step.

    Args:
        longest: as for `targets`.
        even: how far from the smallest spread.
    """
    tried = targets(options, longest)
    chosen = chosen_for(options, tried)
    shares = [exchanging(options, choices) for choices in chosen]
    good = [i for i, share in enumerate(shares) if share >= max(shares) - tolerance]
    spreads = {i: spread(c.seconds for c in chosen[i]) for i in good}
    return float(tried[min(i for i in good if spreads[i] <= min(spreads.values()) + even)])


def most_even(options: dict[Shape, list[Choice]], near: float) -> float:
    """The step time near `near` that has the smallest spread."""
    tried = near * np.geomspace(0.8, 1.25, 200)
    spreads = [spread(c.seconds for c in choices) for choices in chosen_for(options, tried)]
    return float(tried[int(np.argmin(spreads))])


def best_spread(options: dict[Shape, list[Choice]], near: float) -> float:
    """The smallest spread that whole batch sizes allow with steps of about `near` seconds."""
    return spread(closest(found, most_even(options, near)).seconds for found in options.values())
