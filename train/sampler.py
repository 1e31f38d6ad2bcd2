"""Which samples stand in which batch, in which order, on which rank.

An epoch is planned at once: every sample gets its bucket, the members of each bucket are shuffled and cut into batches,
and the batches of all buckets are shuffled into one global list. That list depends on (seed, epoch, batch sizes) alone.
Ranks and gradient accumulation only read from it: a step takes the next world_size * grad_accumulation batches. So the
state is a position in the list, and a run resumes in mid-epoch on any number of ranks.

Where several ranks share the batches of some buckets, the list is made of units: batches that together occupy as many
ranks as the largest of such groups. A step then takes as many units as there are ranks for.

Where the buckets' step times are known, the list is arranged such that the batches of a step take about as long
(`balance`). It then depends on these times and on the number of batches a step; a run that is resumed on another
number of ranks keeps an epoch's arrangement until its end.
"""

import logging
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from stdit_fast.errors import ConfigError
from stdit_fast.train.balance import balanced_order, imbalance
from stdit_fast.train.buckets import Buckets
from stdit_fast.train.degrees import pack
from stdit_fast.train.randomness import hash_uniform, sample_rng

MAX_SPARES = 16

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class BatchRequest:
    """What one rank loads for one micro-batch: a few numbers, sent to a data worker.

    Attributes:
        epoch: the epoch.
        index: the batch's place in the epoch's global list.
        bucket: index of its bucket.
        samples: int64 [B], rows of the metadata.
        spares: int64 [<= 16], to stand in for samples that turn out bad: other members of the bucket first, then those
            of buckets that differ from it in the aspect ratio only.
        step_samples: samples in the whole optimizer step, over all ranks and micro-batches.
        step_batches: batches in the whole optimizer step, likewise; 0: not part of a step.
        parts, part: how many ranks share the batch, and which of them this one is.
        imbalance: what waiting for the slowest rank is expected to add to the step; 0 where no times are known.
    """

    epoch: int
    index: int
    bucket: int
    samples: np.ndarray
    spares: np.ndarray
    step_samples: int
    step_batches: int = 0
    parts: int = 1
    part: int = 0
    imbalance: float = 0.0


class BucketReport(NamedTuple):
    """How one bucket fares in an epoch. `nearly_empty`: fewer than two full batches."""

    name: str
    samples: int
    batches: int
    left_over: int
    nearly_empty: bool


class EpochPlan:
    """All batches of one epoch. Arrays only: 10 million samples take about 60 MB.

    Attributes:
        epoch: the epoch.
        order: samples grouped by bucket, shuffled within each.
        bounds: int64 [buckets + 1], where each bucket's samples begin in `order`.
        batch_sizes: int64 [buckets].
        batch_bucket: bucket of each batch, in the order of training.
        batch_number: its number among the batches of its bucket.
        degrees: int64 [buckets], ranks that share a batch.
        unit_start: int64 [units + 1], where each unit begins in the order of training.
        misfits: reason -> number of samples that are in no bucket.

    Args:
        seconds: of a step of each bucket; with them, every `group` units in a row take about as long.
    """

    def __init__(
        self,
        epoch: int,
        assigned: np.ndarray,
        batch_sizes: np.ndarray,
        misfits: dict,
        seed: int,
        drop_last: bool,
        degrees: np.ndarray,
        seconds: np.ndarray | None = None,
        group: int = 1,
    ):
        self.epoch, self.batch_sizes, self.misfits, self.degrees = epoch, batch_sizes, misfits, degrees
        self.order, self.bounds = _group(assigned, len(batch_sizes), sample_rng(seed, epoch, 0, "samples"))
        counts = np.diff(self.bounds)
        self.batches_per_bucket = counts // batch_sizes if drop_last else -(-counts // batch_sizes)
        bucket = np.repeat(np.arange(len(batch_sizes), dtype=np.int32), self.batches_per_bucket)
        first = np.cumsum(self.batches_per_bucket) - self.batches_per_bucket
        number = np.arange(len(bucket), dtype=np.int32) - first.astype(np.int32)[bucket]
        shuffle = sample_rng(seed, epoch, 0, "batches").permutation(len(bucket))
        slots, rng = int(degrees.max()), sample_rng(seed, epoch, 0, "balance")
        if seconds is not None:  # so that units, too, are made of batches that take about as long
            shuffle = shuffle[balanced_order((seconds / degrees)[bucket[shuffle]], slots, rng)]
        packed, self.unit_start = pack(degrees[bucket[shuffle]], slots, drop_last)
        shuffle = shuffle[packed]
        if seconds is not None and len(shuffle):
            shuffle = shuffle[self._arrange((seconds / degrees)[bucket[shuffle]], group, rng)]
        self.batch_bucket, self.batch_number = bucket[shuffle], number[shuffle]

    def __len__(self) -> int:
        return len(self.batch_bucket)

    def _arrange(self, seconds: np.ndarray, group: int, rng: np.random.Generator) -> np.ndarray:
        """The order of batches of these times in which every `group` units take about as long; moves the units."""
        order = balanced_order(np.maximum.reduceat(seconds, self.unit_start[:-1]), group, rng)
        lengths, starts = np.diff(self.unit_start)[order], self.unit_start[:-1][order]
        self.unit_start = np.concatenate([[0], np.cumsum(lengths)])
        return np.repeat(starts - self.unit_start[:-1], lengths) + np.arange(len(seconds))

    @property
    def num_units(self) -> int:
        return len(self.unit_start) - 1

    def unit_at(self, position: int) -> int:
        """The unit that begins at a batch's place in the list, or the next one."""
        return min(int(np.searchsorted(self.unit_start, position)), self.num_units)

    def after(self, position: int, units: int) -> int:
        """The place `units` further on, at most the end."""
        return int(self.unit_start[min(self.unit_at(position) + units, self.num_units)])

    def members(self, bucket: int) -> np.ndarray:
        """The samples of a bucket, in this epoch's order."""
        return self.order[self.bounds[bucket] : self.bounds[bucket + 1]]

    def samples(self, index: int) -> np.ndarray:
        """The samples of a batch, int64; an incomplete batch is filled up with its bucket's first samples."""
        bucket = self.batch_bucket[index]
        members, size = self.members(bucket), self.batch_sizes[bucket]
        places = (np.arange(size) + int(self.batch_number[index]) * size) % len(members)
        return members[places].astype(np.int64)

    def report(self, buckets: Buckets) -> list[BucketReport]:
        """How each bucket that has samples fares, in the order of the buckets."""
        counts, batches = np.diff(self.bounds), self.batches_per_bucket
        left_over = np.maximum(counts - batches * self.batch_sizes, 0)
        return [
            BucketReport(
                buckets[i].name, int(counts[i]), int(batches[i]), int(left_over[i]), counts[i] < 2 * self.batch_sizes[i]
            )
            for i in np.flatnonzero(counts)
        ]

    def describe(self, buckets: Buckets) -> str:
        """`report` and `misfits` as lines for a log; a length that no sample reaches is named, too."""
        rows = self.report(buckets)
        lines = [
            f"{row.name}: {row.samples} samples, {row.batches} batches, {row.left_over} left over"
            + (" (nearly empty)" if row.nearly_empty else "")
            for row in rows
        ]
        filled = {row.name.rsplit("-", 1)[0] for row in rows}
        wanted = dict.fromkeys(bucket.name.rsplit("-", 1)[0] for bucket in buckets)
        lines += [f"{name}: no samples" for name in wanted if name not in filled]
        return "\n".join(lines + [f"in no bucket, {reason}: {count}" for reason, count in self.misfits.items()])


def _group(assigned: np.ndarray, num_buckets: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """(samples grouped by bucket and shuffled within, bounds of the buckets); samples of no bucket are left out."""
    order = np.arange(len(assigned), dtype=np.int32 if len(assigned) < 2**31 else np.int64)
    rng.shuffle(order)
    # Stable sorting of 16-bit integers is a radix sort, several times faster than that of wider ones.
    shuffled = assigned[order].astype(np.int16 if num_buckets < 2**15 else np.int32)
    order = order[np.argsort(shuffled, kind="stable")]
    counts = np.bincount(shuffled + 1, minlength=num_buckets + 1)
    return order[counts[0] :].copy(), np.cumsum(counts) - counts[0]


class BucketSampler:
    """Batches of one bucket each for one rank, without end.

    Iterating yields one `BatchRequest` a micro-batch, from the current position on, epoch after epoch. It does not move
    the state (a data loader runs ahead of the training): `advance` does, once for each optimizer step.

    Micro-batch a of rank r takes global batch position + a * world_size + r, where each has a rank of its own. With
    `drop_last`, incomplete batches and an incomplete last step are left out; without, a batch is filled up by repeating
    samples of its bucket, and the last step by repeating batches from the epoch's start.

    Args:
        num_frames, height, width: integers [N], the samples' lengths in frames (1: an image) and sizes in pixels.
        buckets: the table of buckets.
        seed: of the order and of the keep_prob draws.
        frame_interval: one frame in so many is used.
        world_size, rank: data-parallel processes, and which of them this is.
        grad_accumulation: micro-batches a step on each rank.
        drop_last: see above.
        degrees: [buckets], ranks that share a batch: powers of two that divide world_size; None: 1 everywhere.

    Raises:
        ConfigError: no sample fits a bucket, no bucket fills a batch, or an epoch has too few batches for one step.
            The first epoch is checked here, later ones (keep_prob is drawn anew in each) when they are planned.
    """

    def __init__(
        self,
        num_frames: np.ndarray,
        height: np.ndarray,
        width: np.ndarray,
        buckets: Buckets,
        *,
        seed: int,
        frame_interval: int = 1,
        world_size: int = 1,
        rank: int = 0,
        grad_accumulation: int = 1,
        drop_last: bool = True,
        degrees: np.ndarray | None = None,
    ):
        if not 0 <= rank < world_size:
            raise ConfigError("rank", rank, f"it must be in 0..{world_size - 1} for a world size of {world_size}.")
        if grad_accumulation < 1:
            raise ConfigError("grad_accumulation", grad_accumulation, "it must be at least 1.")
        self._sizes = np.asarray(num_frames), np.asarray(height), np.asarray(width)
        self.buckets, self.seed, self.frame_interval = buckets, seed, frame_interval
        self.world_size, self.rank, self.grad_accumulation = world_size, rank, grad_accumulation
        self.drop_last = drop_last
        self.degrees = np.ones(len(buckets), dtype=np.int64) if degrees is None else degrees
        self.slots = int(self.degrees.max())  # ranks of a unit
        self.epoch, self.position = 0, 0
        self._seconds = buckets.seconds
        self._groups: dict[int, int] = {}  # of epochs that were begun with another number of batches a step
        self._plans: dict[int, EpochPlan] = {}
        self.plan(0)

    @property
    def units_per_step(self) -> int:
        """Units that one optimizer step takes, over all ranks; a unit is one batch where ranks share none."""
        return self.world_size // self.slots * self.grad_accumulation

    def plan(self, epoch: int) -> EpochPlan:
        """The batches of an epoch, from (seed, epoch) alone; the last two are kept.

        Raises:
            ConfigError: the epoch cannot fill a single step.
        """
        if epoch not in self._plans:
            plan = self.make_plan(epoch)
            self._check(plan)
            # The iterator may be an epoch ahead of the state: two are in use at a time.
            self._plans = dict([*self._plans.items(), (epoch, plan)][-2:])
        return self._plans[epoch]

    def make_plan(self, epoch: int) -> EpochPlan:
        """As `plan`, but neither checked nor kept."""

        def draw(rows: np.ndarray, level: int) -> np.ndarray:
            return hash_uniform(self.seed, epoch, rows, level)

        assigned = self.buckets.assign(*self._sizes, self.frame_interval, draw)
        misfits = self.buckets.count_misfits(*self._sizes, self.frame_interval, assigned)
        options = {"degrees": self.degrees, "seconds": self._seconds, "group": self._group(epoch)}
        return EpochPlan(epoch, assigned, self.buckets.batch_sizes, misfits, self.seed, self.drop_last, **options)

    def _group(self, epoch: int) -> int:
        """How many units in a row are arranged to take about as long."""
        return self._groups.get(epoch, self.units_per_step)

    def steps_per_epoch(self, epoch: int) -> int:
        """Optimizer steps in an epoch when it is trained from its start on this number of ranks."""
        return self._steps_left(self.plan(epoch), 0)

    def _steps_left(self, plan: EpochPlan, position: int) -> int:
        units = plan.num_units - plan.unit_at(position)
        return units // self.units_per_step if self.drop_last else -(-units // self.units_per_step)

    def __iter__(self) -> Iterator[BatchRequest]:
        epoch, position = self.epoch, self.position
        while True:
            plan = self.plan(epoch)
            for _ in range(self._steps_left(plan, position)):
                yield from self._step(plan, position)
                position = plan.after(position, self.units_per_step)
            epoch, position = epoch + 1, 0

    def _step(self, plan: EpochPlan, position: int) -> Iterator[BatchRequest]:
        units = (plan.unit_at(position) + np.arange(self.units_per_step)) % plan.num_units
        batches = [np.arange(*plan.unit_start[unit : unit + 2]) for unit in units]
        all_batches = np.concatenate(batches)
        step_samples = int(plan.batch_sizes[plan.batch_bucket[all_batches]].sum())
        waiting = self._waiting(plan, batches)
        for own in batches[self.rank // self.slots :: self.world_size // self.slots]:
            # The batches of a unit stand side by side on its ranks.
            degrees = plan.degrees[plan.batch_bucket[own]]
            last = np.cumsum(degrees)
            place = int(np.searchsorted(last, self.rank % self.slots, side="right"))
            request = self.request(plan, int(own[place]), step_samples)
            parts = int(degrees[place])
            part = self.rank % self.slots - int(last[place] - parts)
            yield replace(request, step_batches=len(all_batches), parts=parts, part=part, imbalance=waiting)

    def _waiting(self, plan: EpochPlan, units: list[np.ndarray]) -> float:
        """What waiting for the slowest rank is expected to add to a step of these units; 0 where no times are known."""
        if self._seconds is None:
            return 0.0
        buckets = plan.batch_bucket[np.concatenate(units)]
        degrees = plan.degrees[buckets]
        return imbalance(np.repeat(self._seconds[buckets] / degrees, degrees).reshape(-1, self.world_size))

    def request(self, plan: EpochPlan, index: int, step_samples: int) -> BatchRequest:
        """What to load for one batch of a plan."""
        samples = plan.samples(index)
        spares = self._spares(plan, index, samples)
        return BatchRequest(plan.epoch, index, int(plan.batch_bucket[index]), samples, spares, step_samples)

    def _spares(self, plan: EpochPlan, index: int, samples: np.ndarray) -> np.ndarray:
        """Members of the bucket; where it has too few, then members of its siblings, which are cropped more."""
        bucket = plan.batch_bucket[index]
        siblings = self.buckets.siblings(bucket)
        rng = sample_rng(self.seed, plan.epoch, index, "spares")
        spares = np.empty(0, dtype=np.int64)
        for first, last in ((bucket, bucket + 1), (siblings.start, siblings.stop)):
            if len(spares) < MAX_SPARES:
                members = plan.order[plan.bounds[first] : plan.bounds[last]]
                taken = np.concatenate([samples, spares])
                drawn = members[rng.choice(len(members), min(len(members), len(taken) + MAX_SPARES), replace=False)]
                spares = np.concatenate([spares, drawn[~np.isin(drawn, taken)]])
        return spares[:MAX_SPARES]

    def advance(self) -> None:
        """Moves the state on by one optimizer step, into the next epoch where less than a step is left."""
        self.position = self.plan(self.epoch).after(self.position, self.units_per_step)
        self._roll()

    def _roll(self) -> None:
        if not self._steps_left(self.plan(self.epoch), self.position):
            self.epoch, self.position = self.epoch + 1, 0

    def state_dict(self) -> dict[str, int]:
        """Where the training stands: the seed, the epoch, the position in its global list, and what that depends on."""
        state = {
            "seed": self.seed,
            "epoch": self.epoch,
            "position": self.position,
            "batches": len(self.plan(self.epoch)),
            "slots": self.slots,
        }
        if self._seconds is not None:
            state |= {"measured": self._fingerprint(), "group": self._group(self.epoch)}
        return state

    def _fingerprint(self) -> int | None:
        """Of measured batch sizes and times, on which the list depends; None without."""
        if self._seconds is None:
            return None
        return zlib.crc32(self.buckets.batch_sizes.tobytes() + self._seconds.tobytes())

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Goes on where `state` was taken, on any number of ranks and with any gradient accumulation.

        Where the epoch has another number of batches now (another table, other data), the position means nothing: the
        epoch begins anew, with a warning.

        Raises:
            ConfigError: the state is of another seed, so of another order.
        """
        if state["seed"] != self.seed:
            raise ConfigError(
                "seed", self.seed, f"the checkpoint was trained with {state['seed']}: use that to resume."
            )
        self.epoch, self.position = int(state["epoch"]), int(state["position"])
        measured = self._fingerprint()
        same = state.get("measured") == measured
        if measured is not None and same:
            self._groups = {self.epoch: int(state["group"])}
            self._plans.pop(self.epoch, None)
        batches = len(self.plan(self.epoch))
        before, now = (state.get("batches", batches), state.get("slots", self.slots)), (batches, self.slots)
        if self.position and not (same and before == now):
            log.warning(
                "epoch %d has %d batches for groups of %d ranks now and had %d for %d: the data, the buckets, their "
                "sizes or the groups have changed, so it begins anew",
                self.epoch,
                *now,
                *before,
            )
            self.position = 0
        self._roll()

    def _check(self, plan: EpochPlan) -> None:
        if not len(plan.order):
            raise ConfigError("buckets", self._resolutions(), self._why_none_fits(plan))
        if not plan.batches_per_bucket.any():
            raise ConfigError("buckets", self._resolutions(), self._why_no_batch(plan))
        if not self._steps_left(plan, 0):
            raise ConfigError(
                "world_size",
                self.world_size,
                f"{self._step_in_words()}, and epoch {plan.epoch} has {plan.num_units}. Use fewer processes, less "
                "accumulation, smaller batches or more data, or set drop_last to false.",
            )

    def _step_in_words(self) -> str:
        ranks, times = self.world_size, self.grad_accumulation
        if self.slots == 1:
            return f"a step takes world_size * grad_accumulation = {ranks} * {times} = {ranks * times} batches"
        return (
            f"a step takes world_size / {self.slots} * grad_accumulation = {ranks} / {self.slots} * {times} = "
            f"{self.units_per_step} full sets of batches for {self.slots} ranks"
        )

    def _resolutions(self) -> list[str]:
        return list(dict.fromkeys(bucket.resolution for bucket in self.buckets))

    def _why_none_fits(self, plan: EpochPlan) -> str:
        num_frames, height, width = self._sizes
        by_size = np.argsort(height.astype(np.int64) * width, kind="stable")
        places = (0, len(by_size) // 2, -1) if len(by_size) else ()
        sizes = ", ".join(f"{height[by_size[i]]}x{width[by_size[i]]}" for i in places)
        lengths = ", ".join(str(n) for n in np.sort(num_frames)[list(places)])
        reasons = "; ".join(f"{reason}: {count}" for reason, count in plan.misfits.items())
        return (
            f"none of the {len(num_frames)} samples fits a bucket in epoch {plan.epoch} ({reasons}).\n"
            f"There are, as smallest, median and largest: {sizes} pixels (height x width) and {lengths} frames.\n"
            f"The buckets need, at frame_interval {self.frame_interval}:\n"
            + self.buckets.requirements(self.frame_interval)
        )

    def _why_no_batch(self, plan: EpochPlan) -> str:
        rows = [(bucket, len(plan.members(i))) for i, bucket in enumerate(self.buckets) if len(plan.members(i))]
        rows.sort(key=lambda row: row[0].batch_size - row[1])
        lines = [f"{bucket.name} needs {bucket.batch_size} samples and has {count}" for bucket, count in rows[:8]]
        more = [f"and {len(rows) - 8} more buckets"] if len(rows) > 8 else []
        return (
            f"no bucket has a full batch in epoch {plan.epoch}. Use smaller batch sizes or more data, or set drop_last "
            "to false:\n" + "\n".join(lines + more)
        )
