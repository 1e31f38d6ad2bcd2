"""Resolutions and their sizes: for each aspect ratio the height and width in pixels, shipped or the user's own."""

import json
import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from stdit_fast.errors import ConfigError

SHIPPED_RESOLUTIONS = Path(__file__).with_name("resolutions.json")
MIN_SIDE = 8


def load_resolutions(own: Mapping | str | Path | None = None) -> dict[str, dict]:
    """The tables of sizes by resolution, the user's first: name -> {"pixels": int, "sizes": {aspect: (h, w)}}.

    Raises:
        ConfigError: a file that is missing or not JSON, or a table that is not of that form.
    """
    shipped = _check_resolutions(json.loads(SHIPPED_RESOLUTIONS.read_text()))
    if own is None:
        return shipped
    if not isinstance(own, Mapping):
        own = _read_json(Path(own))
    return {**_check_resolutions(own), **{k: v for k, v in shipped.items() if k not in map(str, own)}}


def _read_json(path: Path) -> Mapping:
    # A bare name that is not in the user's folder may be one of the shipped tables.
    found = next((p for p in (path, SHIPPED_RESOLUTIONS.with_name(path.name)) if p.is_file()), None)
    if found is None:
        raise ConfigError(
            "resolutions", str(path), "there is no such file; give a JSON table of sizes, or leave it out."
        )
    try:
        table = json.loads(found.read_text())
    except (ValueError, OSError) as error:
        raise ConfigError("resolutions", str(path), f"it cannot be read as JSON ({error}).") from error
    if not isinstance(table, dict):
        raise ConfigError("resolutions", str(path), 'it must hold {name: {"pixels": ..., "sizes": ...}}.')
    return table


def _check_resolutions(table: Mapping) -> dict[str, dict]:
    checked = {}
    for name, entry in table.items():
        key = f"resolutions.{name}"
        if not isinstance(entry, Mapping) or not {"pixels", "sizes"} <= set(entry):
            raise ConfigError(key, entry, 'it must be {"pixels": int, "sizes": {aspect: [height, width]}}.')
        if not is_int(entry["pixels"]) or entry["pixels"] < 1:
            raise ConfigError(f"{key}.pixels", entry["pixels"], "it must be a number of pixels, height * width.")
        sizes = entry["sizes"]
        if not isinstance(sizes, Mapping) or not sizes:
            raise ConfigError(f"{key}.sizes", sizes, "it must map aspect ratios to [height, width].")
        checked[str(name)] = {
            "pixels": int(entry["pixels"]),
            "sizes": {str(aspect): _check_size(f"{key}.sizes", aspect, size) for aspect, size in sizes.items()},
        }
    return checked


def _check_size(key: str, aspect: object, size: object) -> tuple[int, int]:
    try:
        ratio = float(aspect)
    except (TypeError, ValueError):
        ratio = math.nan
    if not (ratio > 0 and math.isfinite(ratio)):
        raise ConfigError(key, aspect, "the key must be an aspect ratio, height / width, such as '0.56'.")
    if not isinstance(size, (list, tuple)) or len(size) != 2 or not all(is_int(n) and n >= MIN_SIDE for n in size):
        raise ConfigError(f"{key}.{aspect}", size, f"it must be [height, width] in pixels, at least {MIN_SIDE} each.")
    return int(size[0]), int(size[1])


def is_int(value: object) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)
