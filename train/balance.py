"""Which batches the ranks of a step train together, such that none waits long for another.

A step, or each micro-batch of it, is over when its slowest rank is. With a table of measured step times batches of
about the same time come together: the epoch's shuffled list is sorted by time, cut into groups of one step, and the
groups are shuffled again. Times within a few per cent of each other count as equal, so that buckets which the table has
evened out still mix.
"""

import numpy as np

# Batches whose times differ by less are mixed at random.
TOLERANCE = 0.03


def balanced_order(seconds: np.ndarray, group: int, rng: np.random.Generator) -> np.ndarray:
    """An order of batches in which every `group` in a row, from the first on, take about as long.

    Args:
        seconds: float64 [batches], in a random order, what each takes.
        group: batches of a step.
        rng: decides on the order of the groups, and within them.

    Returns:
        int64 [batches], a permutation. Batches that fill no group come last; which these are is random.
    """
    whole = len(seconds) // group * group
    if group < 2 or not whole:
        return np.arange(len(seconds))
    blurred = np.log(seconds[:whole]) + rng.uniform(-TOLERANCE / 2, TOLERANCE / 2, whole)
    groups = np.argsort(blurred, kind="stable").reshape(-1, group)
    groups = rng.permuted(groups[rng.permutation(len(groups))], axis=1)
    return np.concatenate([groups.ravel(), np.arange(whole, len(seconds))])


def imbalance(seconds: np.ndarray) -> float:
    """What waiting adds to a step: the slowest ranks' times over the mean ranks', less 1.

    Args:
        seconds: [micro-batches, ranks]; ranks wait for each other after each micro-batch.
    """
    return float(seconds.max(axis=1).sum() / seconds.mean(axis=1).sum() - 1)
