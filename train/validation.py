"""A loss on the same samples, crops, masks, timesteps and noise every time."""

from collections import defaultdict

import numpy as np
import torch

# The epoch that keys all randomness of validation; training counts up from 0 and never gets there.
EPOCH = 2**31 - 1


class Validation:
    """Batches of every bucket, dealt to the processes.

    Args:
        data: the samples to take them from.
        batches_per_bucket: of each bucket that fills one.
        processes: they share the batches.
    """

    def __init__(self, data, batches_per_bucket: int, processes):
        self.data, self.processes = data, processes
        plan = data.sampler.make_plan(EPOCH)
        self.requests = [
            data.sampler.request(plan, int(index), int(plan.batch_sizes[bucket]))
            for bucket in np.unique(plan.batch_bucket)
            for index in np.flatnonzero(plan.batch_bucket == bucket)[:batches_per_bucket]
        ]

    @torch.no_grad()
    def run(self, batch_losses) -> tuple[float, dict[str, float]]:
        """The mean loss over samples, in all and by bucket name.

        Args:
            batch_losses: called with a batch of the dataset, answers the loss of each sample [B].
        """
        mine = self.requests[self.processes.rank :: self.processes.world_size]
        sums = defaultdict(lambda: [0.0, 0])
        for request in mine:
            batch = self.data.dataset[request]
            batch["drop_caption"].zero_()
            entry = sums[self.data.buckets[request.bucket].name]
            losses = batch_losses(batch)
            entry[0] += float(losses.double().sum())
            entry[1] += len(losses)
        total = defaultdict(lambda: [0.0, 0])
        for part in self.processes.gather_objects(dict(sums)):
            for name, (loss, count) in part.items():
                total[name][0] += loss
                total[name][1] += count
        count = sum(n for _, n in total.values())
        mean = sum(loss for loss, _ in total.values()) / count if count else float("nan")
        return mean, {name: loss / n for name, (loss, n) in sorted(total.items())}
