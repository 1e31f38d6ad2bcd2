"""Exponential moving average of the weights, over the optimizer's fp32 masters, split as they are."""

import torch
from torch import Tensor


class EMA:
    """Averaged weights: ema <- decay * ema + (1 - decay) * weights after every step, in the optimizer's own pass.

    Args:
        masters: the weights to follow, on each process its own part.
        decay: 0..1; the closer to 1 the slower.
    """

    def __init__(self, masters: list[Tensor], decay: float):
        self.decay = decay
        self.averages = [master.detach().clone() for master in masters]

    @torch.no_grad()
    def load(self, averages: list[Tensor]) -> None:
        for own, value in zip(self.averages, averages, strict=True):
            own.copy_(value)
