"""Which frames of a training clip are conditions: the nine mask strategies of Open-Sora 1.1."""

import math

import numpy as np
import torch
from torch import Tensor

from stdit_fast.errors import ConfigError, nearest

# name -> (longest run, place); a longest run of None means a quarter of the clip.
STRATEGIES = {
    "mask_no": (0, None),
    "mask_quarter_random": (None, "random"),
    "mask_quarter_head": (None, "head"),
    "mask_quarter_tail": (None, "tail"),
    "mask_quarter_head_tail": (None, "head_tail"),
    "mask_image_random": (1, "random"),
    "mask_image_head": (1, "head"),
    "mask_image_tail": (1, "tail"),
    "mask_image_head_tail": (1, "head_tail"),
}


class MaskGenerator:
    """Draws a mask a sample.

    Args:
        ratios: strategy -> share of the samples, summing to 1; a strategy left out has share 0. Without
            "mask_no" in it, that takes what is left. None or empty: no conditions at all.

    Raises:
        ConfigError: an unknown strategy, a share outside 0..1, or shares that do not sum to 1.
    """

    def __init__(self, ratios: dict[str, float] | None = None):
        ratios = dict(ratios or {})
        for name, share in ratios.items():
            if name not in STRATEGIES:
                raise ConfigError("mask_ratios", name, nearest(name, STRATEGIES))
            if not 0 <= share <= 1:
                raise ConfigError(f"mask_ratios.{name}", share, "use a share between 0 and 1")
        total = sum(ratios.values())
        if "mask_no" not in ratios and total <= 1:
            ratios["mask_no"] = total = 1 - total
            total = 1.0
        if not math.isclose(total, sum(ratios.values()), abs_tol=1e-6) or not math.isclose(total, 1, abs_tol=1e-6):
            raise ConfigError("mask_ratios", ratios, f"the shares sum to {total:g}; make them sum to 1")
        self.names = list(ratios)
        self.cumulative = np.cumsum(list(ratios.values()))

    def mask(self, num_frames: int, rng: np.random.Generator) -> np.ndarray:
        """[T] bool, False where a frame is a condition. An image is never masked."""
        draw = rng.random() * self.cumulative[-1]
        name = self.names[min(int(np.searchsorted(self.cumulative, draw, side="right")), len(self.names) - 1)]
        return strategy_mask(name, num_frames, rng)

    def get_masks(self, x: Tensor, rng: np.random.Generator | None = None) -> Tensor:
        """[B, T] bool for latents x [B, C, T, H, W]."""
        rng = np.random.default_rng() if rng is None else rng
        masks = np.stack([self.mask(x.shape[2], rng) for _ in range(x.shape[0])])
        return torch.from_numpy(masks).to(x.device)


def strategy_mask(name: str, num_frames: int, rng: np.random.Generator) -> np.ndarray:
    """The mask of one strategy: [T] bool, False where a frame is a condition.

    A quarter strategy masks a run of 1..max(1, T//4) frames; "head_tail" masks the same run at both ends.
    """
    longest, place = STRATEGIES[name]
    mask = np.ones(num_frames, dtype=bool)
    if place is None or num_frames == 1:
        return mask
    run = int(rng.integers(1, (longest or max(1, num_frames // 4)) + 1))
    if place == "random":
        start = int(rng.integers(num_frames - run + 1))
        mask[start : start + run] = False
    if place in ("head", "head_tail"):
        mask[:run] = False
    if place in ("tail", "head_tail"):
        mask[-run:] = False
    return mask
