"""Diffusion: schedules, training losses, condition masks, samplers."""

import importlib

from stdit_fast.diffusion.iddpm import IDDPM
from stdit_fast.diffusion.masks import MaskGenerator
from stdit_fast.diffusion.speedit import SpeeDiT

SCHEDULES = {"iddpm": IDDPM, "iddpm-speed": SpeeDiT}

__all__ = ["IDDPM", "SCHEDULES", "IDDPMScheduler", "MaskGenerator", "SpeeDiT", "denoise", "guide", "make_scheduler"]

# Loaded when first asked for: they bring in diffusers, which training has no use for.
_HOMES = {"denoise": "sampling", "guide": "sampling", "IDDPMScheduler": "schedulers", "make_scheduler": "schedulers"}


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
