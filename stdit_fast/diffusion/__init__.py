"""Diffusion: schedules, training losses, condition masks."""

from stdit_fast.diffusion.iddpm import IDDPM
from stdit_fast.diffusion.masks import MaskGenerator
from stdit_fast.diffusion.speedit import SpeeDiT

SCHEDULES = {"iddpm": IDDPM, "iddpm-speed": SpeeDiT}

__all__ = ["IDDPM", "SCHEDULES", "MaskGenerator", "SpeeDiT"]
