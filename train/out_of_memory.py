"""Batches that do not fit into the GPU's memory: they run in pieces, now and for the rest of the run.

So do those for which a table of batch sizes, or an estimate (`STDiT2.samples_at_once`), says that it is faster.

Samples of a batch do not depend on each other, so that the gradients of its pieces, each weighed by its share of the
samples, add up to those of the whole, to rounding. The batch stays what the sampler made it: order, weights and what a
resumed run sees do not change.
"""

from collections.abc import Iterable

import torch

from stdit_fast.train.buckets import Bucket


class Pieces:
    """How many samples of which bucket run at once.

    Attributes:
        limits: bucket, as in "240p-16" for all its aspect ratios, -> samples at once; else batches run as a whole.
        known: those that all processes have been told.
        count: how often a process has run out of memory so far, over all processes.
    """

    def __init__(self):
        self.limits: dict[str, int] = {}
        self.known: dict[str, int] = {}
        self.count = 0

    def lowered(self, bucket: Bucket) -> bool:
        """Whether a bucket has run out of memory."""
        return _name(bucket) in self.limits

    def of(self, bucket: Bucket, samples: int, planned: bool = True, at_once: int | None = None) -> list[slice]:
        """The parts of a batch of so many samples, which are of about equal size.

        Args:
            planned: whether the pieces of a table of batch sizes count too.
            at_once: at most so many samples, whatever is known otherwise.
        """
        most = min(self.limits.get(_name(bucket), samples), at_once or samples)
        if planned and bucket.pieces > 1:
            most = min(most, bucket.at_once)
        number = -(-samples // most)
        return parts_of(samples, number)

    def halve(self, bucket: Bucket, samples: int, at_once: int | None = None) -> bool:
        """Lowers the limit to half of what a batch ran at once; False where that was a single sample."""
        largest = max(part.stop - part.start for part in self.of(bucket, samples, at_once=at_once))
        if largest == 1:
            return False
        self.limits[_name(bucket)] = -(-largest // 2)
        return True

    def agree(self, of_all: Iterable[dict[str, int]]) -> dict[str, int]:
        """Takes the lowest limit of all processes for each bucket, and answers those limits.

        Args:
            of_all: `limits` of every process.
        """
        for limits in of_all:
            for name, most in limits.items():
                self.known[name] = min(most, self.known.get(name, most))
        self.limits = dict(self.known)
        return self.known

    def state_dict(self) -> dict:
        return {"limits": dict(self.known), "count": self.count}

    def load_state_dict(self, state: dict) -> None:
        self.limits, self.known, self.count = dict(state["limits"]), dict(state["limits"]), state["count"]


def parts_of(samples: int, number: int) -> list[slice]:
    """So many parts of a batch, one after another, whose sizes differ by one at most."""
    bounds = [samples * i // number for i in range(number + 1)]
    return [slice(a, b) for a, b in zip(bounds, bounds[1:], strict=False)]


def _name(bucket: Bucket) -> str:
    return f"{bucket.resolution}-{bucket.num_frames}"


def take(batch: dict, part: slice) -> dict:
    """Some samples of a batch, as `VideoTextDataset` makes it."""
    size = len(batch["samples"])
    if part == slice(0, size):
        return batch
    taken = {}
    for key, value in batch.items():
        if key == "text_states":  # the captions' tokens, one after another
            ends = batch["tokens"].cumsum(0).tolist()
            first = ends[part.start - 1] if part.start else 0
            taken[key] = value[first : ends[part.stop - 1]]
        elif key == "text" or (torch.is_tensor(value) and value.dim() and len(value) == size):
            taken[key] = value[part]
        else:
            taken[key] = value
    return taken
