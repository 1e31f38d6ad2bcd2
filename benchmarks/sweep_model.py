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

GIB = 2**30
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
    """

    shape: Shape
    batch: int
    checkpointed: int
    seconds: tuple[float, ...] = ()
    peak: int = 0
    keeps: bool = False

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


class StepModel:
    """Predicts seconds and bytes of a step.

    Args:
        depth: blocks of the model.
        base: bytes that every step takes: weights, gradients, the optimizer's state.
        probes: what is known; `add` brings more.
        encoding: seconds that encoding adds to a step of so many samples of a shape; None: nothing is encoded.
        keeps: (shape, batch, recomputed blocks) -> whether the model keeps activations; None: it never does.
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
        return [1.0, *work, of.batch, tokens * again, tokens * shape.positions * again, activations]

    def _memory_terms(self, of: "Probe | Choice") -> list[float]:
        tokens = of.shape.tokens(of.batch)
        # Of checkpointed blocks one at a time is there as a whole.
        kept = max(self.depth - of.checkpointed, 1)
        return [tokens, tokens * kept, tokens * kept * of.keeps, of.batch, of.batch * of.shape.frames]

    @staticmethod
    def _formula(coefficients: Sequence[float], terms: list[float]) -> float:
        return sum(c * t for c, t in zip(coefficients, terms, strict=True))

    def seconds(self, shape: Shape, batch: int, checkpointed: int) -> float:
        """Expected seconds of a step; measured ones where there are."""
        seconds = self._alone(self._at(shape, batch, checkpointed))
        if self._drift and self.hinted(shape) and not self._own(shape):
            seconds *= float(np.median(self._drift))  # other kernels are as much faster or slower as elsewhere
        return seconds + (self.encoding(shape, batch) if self.encoding else 0.0)

    def _alone(self, at: "Probe | Choice") -> float:
        """Expected seconds without encoding, by the bucket's own probes or its hints as they are."""
        seconds, near = self._formula(self.time, self._time_terms(at)), self._nearest(at)
        if near is not None:
            seconds *= near.median / self._formula(self.time, self._time_terms(near))
        return seconds

    def _at(self, shape: Shape, batch: int, checkpointed: int) -> Choice:
        return Choice(shape, batch, checkpointed, 0, 0, keeps=self._keeps(shape, batch, checkpointed))

    def find(self, shape: Shape, batch: int, checkpointed: int) -> Probe | None:
        """The probe of that very step."""
        own = self._by_shape.get(shape, ())
        return next((p for p in own if (p.batch, p.checkpointed) == (batch, checkpointed)), None)

    def measured(self, shape: Shape, budget: float) -> list[Choice]:
        """What was measured of a bucket and fits into `budget` bytes."""
        return [
            Choice(shape, p.batch, p.checkpointed, self.seconds(shape, p.batch, p.checkpointed), p.peak, measured=True)
            for p in self._own(shape)
            if p.peak <= budget
        ]

    def peak(self, shape: Shape, batch: int, checkpointed: int) -> float:
        """Expected bytes allocated at most; measured ones where there are; else on the safe side of errors."""
        at = self._at(shape, batch, checkpointed)
        own = self._own(shape)
        for probe in own:
            if (probe.batch, probe.checkpointed) == (batch, checkpointed):
                return float(probe.peak)
        return self.base + self._memory_factor(shape) * self._formula(self.memory, self._memory_terms(at))

    def _memory_factor(self, shape: Shape) -> float:
        """What the formula for memory is multiplied by for a bucket."""
        if shape not in self._factors:
            known = [self._beyond(p) / self._formula(self.memory, self._memory_terms(p)) for p in self.known(shape)]
            factor = max(known) if known else 1 + max([0.0, *self.memory_errors])
            failed = len(self._by_shape.get(shape, [])) - len(self._own(shape))  # what was expected to fit did not
            failed = min(failed, 1) if self._own(shape) else failed
            self._factors[shape] = factor * OUT_OF_MEMORY**failed
        return self._factors[shape]

    def refuted(self, shape: Shape, batch: int, checkpointed: int) -> bool:
        """Whether a probe with no more samples and no fewer recomputed blocks has run out of memory."""
        return any(
            not p.ran and p.batch <= batch and p.checkpointed >= checkpointed for p in self._by_shape.get(shape, [])
        )

    def _nearest(self, at: Choice) -> Probe | None:
        """The shape's own probe that is most like it."""
        known = self.known(at.shape)
        if not known:
            return None
        return min(
            known,
            key=lambda p: abs(math.log(p.batch / at.batch)) + abs(p.checkpointed - at.checkpointed) / self.depth,
        )

    # ---------------------------------------------------------------- choosing

    def fitting(self, shape: Shape, batch: int, budget: float, least: int = 0) -> Choice | None:
        """With the fewest recomputed blocks, `least` or more, that fit into `budget` bytes; None if none does."""
        for count in range(least, self.depth + 1):
            peak = self.peak(shape, batch, count)
            if peak <= budget and not self.refuted(shape, batch, count):
                known = self.find(shape, batch, count) is not None
                return Choice(shape, batch, count, self.seconds(shape, batch, count), peak, known)
        return None

    def options(self, shape: Shape, budget: float, longest: float) -> list[Choice]:
        """Every batch size that fits, up to the first whose step takes longer than `longest` seconds.

        Raises:
            ValueError: not even one sample fits.
        """
        found: list[Choice] = []
        for batch in range(1, 1 << 14):
            option = self.fitting(shape, batch, budget, found[-1].checkpointed if found else 0)
            if option is None:
                break
            found.append(option)
            if option.seconds > longest:
                break
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


def targets(options: dict[Shape, list[Choice]], count: int = 160) -> np.ndarray:
    """Step times worth trying: from three quarters of the longest that one sample takes, to three times that."""
    lowest = max(found[0].seconds for found in options.values())
    return np.geomspace(0.75 * lowest, 3 * lowest, count)


def best_target(options: dict[Shape, list[Choice]], tolerance: float = 0.04, even: float = 0.03) -> float:
    """Of the step times within `tolerance` of the highest efficiency the shortest whose spread is about the smallest.

    The efficiency is `efficiency`, with EXCHANGE in each step.

    Args:
        even: how far from the smallest spread.
    """
    tried = targets(options)
    chosen = [[closest(found, t) for found in options.values()] for t in tried]
    shares = [exchanging(options, choices) for choices in chosen]
    good = [i for i, share in enumerate(shares) if share >= max(shares) - tolerance]
    spreads = {i: spread(c.seconds for c in chosen[i]) for i in good}
    return float(tried[min(i for i in good if spreads[i] <= min(spreads.values()) + even)])


def most_even(options: dict[Shape, list[Choice]], near: float) -> float:
    """The step time near `near` that has the smallest spread."""
    tried = near * np.geomspace(0.8, 1.25, 200)
    return float(min(tried, key=lambda t: spread(closest(found, t).seconds for found in options.values())))


def best_spread(options: dict[Shape, list[Choice]], near: float) -> float:
    """The smallest spread that whole batch sizes allow with steps of about `near` seconds."""
    return spread(closest(found, most_even(options, near)).seconds for found in options.values())
