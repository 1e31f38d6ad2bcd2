"""Diffusion: schedules, training losses, condition masks, samplers."""

from stdit_fast.diffusion.iddpm import IDDPM
from stdit_fast.diffusion.masks import MaskGenerator
from stdit_fast.diffusion.sampling import denoise, guide
from stdit_fast.diffusion.schedulers import IDDPMScheduler, make_scheduler
from stdit_fast.diffusion.speedit import SpeeDiT

SCHEDULES = {"iddpm": IDDPM, "iddpm-speed": SpeeDiT}

__all__ = ["IDDPM", "SCHEDULES", "IDDPMScheduler", "MaskGenerator", "SpeeDiT", "denoise", "guide", "make_scheduler"]
