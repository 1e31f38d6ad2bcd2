"""The arithmetic of `stdit_fast.benchmarks.plan`: the mix of buckets, communication, waiting, days."""

from dataclasses import dataclass

import numpy as np

from stdit_fast.benchmarks.plan_times import Interval, Times
from stdit_fast.train.balance import balanced_order, imbalance
from stdit_fast.train.buckets import Buckets

PARAMETERS = 767_000_000
BYTES = 2  # of a bfloat16 value
BACKWARD = 2 / 3  # of a step, as its operations are
OUTSIDE = 0.128  # of the values: complete after all blocks' backward passes, and needed before their forward passes
ENCODING_ERROR = 0.05
# A given bandwidth is what the network is sold with: NCCL reached most of it, or half.
REACHED = Interval(1.0, 0.8, 0.5)  # in the order of the times: the fastest first
SECONDS_A_DAY = 86400.0
DRAWN_STEPS = 1000  # of a simulated epoch


@dataclass(frozen=True)
class Sizes:
    """A data set: int64 [K] num_frames (1: an image), height, width in pixels, and float64 [K] how many samples."""

    num_frames: np.ndarray
    height: np.ndarray
    width: np.ndarray
    count: np.ndarray

    @classmethod
    def of_rows(cls, rows: list) -> "Sizes":
        """From [count, num_frames, height, width] each."""
        columns = np.array(rows, dtype=np.float64).reshape(-1, 4).T
        return cls(*(c.astype(np.int64) for c in columns[1:]), columns[0])

    @classmethod
    def of_samples(cls, num_frames: np.ndarray, height: np.ndarray, width: np.ndarray) -> "Sizes":
        """From a table's rows; equal sizes are counted."""
        found, count = np.unique(np.stack([num_frames, height, width]), axis=1, return_counts=True)
        return cls(*found.astype(np.int64), count.astype(np.float64))

    def longer(self, factor: float) -> "Sizes":
        """With clips of other lengths."""
        videos = self.num_frames > 1
        longer = np.maximum(2, np.round(self.num_frames * factor)).astype(np.int64)
        return Sizes(np.where(videos, longer, self.num_frames), self.height, self.width, self.count)

    def possible(self, buckets: Buckets, frame_interval: int) -> tuple[np.ndarray, np.ndarray]:
        return buckets.possible(self.num_frames, self.height, self.width, frame_interval)


def samples_of_an_epoch(sizes: Sizes, buckets: Buckets, frame_interval: int) -> np.ndarray:
    """Samples that enter each bucket in an epoch, in the mean over what keep_prob draws: float64 [buckets]."""
    rows, places = sizes.possible(buckets, frame_interval)
    keep = np.array([b.keep_prob for b in buckets])[places]
    # A sample meets its buckets from the largest resolution down; it reaches one if all before have refused it.
    reached, last, left = np.empty(len(rows)), -1, 1.0
    for i, row in enumerate(rows):
        left = left if row == last else 1.0
        reached[i], last = left, row
        left *= 1 - keep[i]
    return np.bincount(places, sizes.count[rows] * reached * keep, minlength=len(buckets))


@dataclass(frozen=True)
class Network:
    """What the GPUs are joined by.

    Attributes:
        inside: bytes a second that a GPU sends to those of its node, as NCCL's bus bandwidth.
        across: bytes a second that a GPU sends to other nodes.
        per_node: GPUs of a node.
        overlapped: whether gradients travel during the backward pass, and weights during the next forward pass, as
            training's overlap_communication says.
    """

    inside: float = 335e9
    across: float = 50e9
    per_node: int = 8
    overlapped: bool = False

    def pass_seconds(self, gpus: int) -> Interval:
        """A reduce-scatter of all gradients, or an all-gather of all weights, alone: (N - 1) / N of their bytes."""
        if gpus == 1:
            return Interval(0.0, 0.0, 0.0)
        sent = PARAMETERS * BYTES * (gpus - 1) / gpus
        if gpus <= self.per_node:
            return Interval.of(sent / self.inside, 0.1)
        return Interval(*(sent / (self.across * reached) for reached in REACHED))

    def exposed_seconds(self, gpus: int, step: Interval) -> Interval:
        """What a step waits for: what of gradients and weights the passes do not hide."""
        one = self.pass_seconds(gpus)
        if not self.overlapped:
            return one.plus(one)
        seen = [0.0, 0.0, 2 * one.high]  # at worst nothing is hidden
        for share in (BACKWARD, 1 - BACKWARD):
            for i, (alone, whole) in enumerate(zip(one[:2], step[:2], strict=True)):
                seen[i] += max(OUTSIDE * alone, alone - share * whole)
        return Interval(*seen)


def expected_slowest(seconds: np.ndarray, share: np.ndarray, ranks: int) -> float:
    """Mean of the largest of so many independent draws from a distribution of times."""
    order = np.argsort(seconds)
    below = np.minimum(np.cumsum(share[order]) / share.sum(), 1.0) ** ranks
    return float(seconds[order] @ np.diff(below, prepend=0.0))


def grouped_waiting(seconds: np.ndarray, share: np.ndarray, ranks: int) -> float:
    """What waiting adds to a step whose batches the sampler has put together by their times, as a share of the mean."""
    if ranks == 1:
        return 0.0
    rng = np.random.default_rng(0)
    drawn = seconds[rng.choice(len(seconds), DRAWN_STEPS * ranks, p=share / share.sum())]
    return imbalance(drawn[balanced_order(drawn, ranks, rng)].reshape(-1, ranks))


@dataclass(frozen=True)
class Encoders:
    """Speeds of the encoders on one GPU, for runs without features."""

    pixels_per_second: float
    captions_per_second: float
    source: str = ""

    def seconds(self, samples: float, pixels: float) -> float:
        """Of so many samples with so many pixels in all."""
        return pixels / self.pixels_per_second + samples / self.captions_per_second


@dataclass(frozen=True)
class Estimate:
    """A phase on so many GPUs.

    Attributes:
        steps: optimizer steps; samples: clips and images that are trained on.
        step_seconds: a step with its waiting; days, gpu_hours: of the phase.
        compute, exposed, waiting, encoding: parts of step_seconds.
        measured: share of the computing time whose buckets were measured.
    """

    steps: float
    samples: float
    step_seconds: Interval
    days: Interval
    gpu_hours: Interval
    compute: Interval
    exposed: Interval
    waiting: Interval
    encoding: Interval
    measured: float


def estimate(
    mix: np.ndarray,
    buckets: Buckets,
    times: Times,
    *,
    gpus: int,
    network: Network,
    steps: float,
    original_gpus: int,
    keep: str,
    encoders: Encoders | None = None,
    grouped: bool = True,
) -> Estimate:
    """A phase's time.

    Args:
        mix: samples of each bucket in an epoch, as `samples_of_an_epoch` gives them.
        steps, original_gpus: what the original did, at the batch sizes of `buckets`.
        keep: "samples": train on as many samples of each bucket as the original; "steps": as many steps.
        encoders: in each step; None: features.
        grouped: whether the sampler puts batches of like times into one step; else a step waits for the slowest of
            independent draws.
    """
    filled = np.flatnonzero(mix)
    step = [times.of(buckets[int(i)]) for i in filled]
    batch_sizes = np.array([s.batch_size for s in step], dtype=np.float64)
    originals = mix[filled] / buckets.batch_sizes[filled]  # batches of an epoch, at the original's sizes
    epochs = steps * original_gpus / originals.sum()
    batches = mix[filled] / batch_sizes
    batches *= epochs if keep == "samples" else steps * gpus / batches.sum()
    share = batches / batches.sum()
    steps = float(batches.sum() / gpus)

    pixels = np.array([(lambda b: b.num_frames * b.height * b.width)(buckets[int(i)]) for i in filled])
    encoding = np.zeros(len(filled))
    if encoders is not None:
        encoding = np.array([encoders.seconds(n, n * p) for n, p in zip(batch_sizes, pixels, strict=True)])
    bounds = np.array([s.seconds for s in step]).T  # low, mid, high
    compute = Interval(*(float(share @ b) for b in bounds))
    encode = Interval.of(float(share @ encoding), ENCODING_ERROR)
    mean = bounds[1] + encoding
    slowest = expected_slowest(mean, share, gpus) / float(share @ mean) - 1
    wait = Interval(0.0, grouped_waiting(mean, share, gpus), slowest) if grouped else Interval.of(slowest)
    waiting = wait.times(compute.plus(encode))
    exposed = network.exposed_seconds(gpus, compute)
    whole = compute.plus(encode).plus(waiting).plus(exposed)
    days = whole.times(steps / SECONDS_A_DAY)
    known = np.array([s.measured for s in step])
    return Estimate(
        steps=steps,
        samples=float(batches @ batch_sizes),
        step_seconds=whole,
        days=days,
        gpu_hours=days.times(24.0 * gpus),
        compute=compute,
        exposed=exposed,
        waiting=waiting,
        encoding=encode,
        measured=float((share * bounds[1])[known].sum() / (share @ bounds[1])),
    )


def encoding_hours(sizes: Sizes, tables: list[Buckets], frame_interval: int, encoders: Encoders) -> float:
    """GPU-hours to encode a data set once, each sample in every size that a bucket of these tables may give it."""
    seconds, done = 0.0, set()
    for buckets in tables:
        for row, place in zip(*sizes.possible(buckets, frame_interval), strict=True):
            b = buckets[int(place)]
            key = int(row), b.num_frames, b.height, b.width
            if key not in done:
                done.add(key)
                seconds += sizes.count[row] * b.num_frames * b.height * b.width / encoders.pixels_per_second
    rows = {row for row, *_ in done}
    seconds += sum(sizes.count[row] for row in rows) / encoders.captions_per_second
    return seconds / 3600
