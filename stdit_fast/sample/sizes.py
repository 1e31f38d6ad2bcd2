"""The output's size: by resolution and aspect ratio, as in training, or by height and width."""

import logging
import math
import os
from collections.abc import Mapping

from stdit_fast.errors import ConfigError, nearest
from stdit_fast.resolutions import is_int, load_resolutions

logger = logging.getLogger(__name__)

MIN_SIZE = 16
NEAR = 0.05  # by which the table's nearest aspect ratio may differ without a word
SEXAGESIMAL = 60  # YAML 1.1 takes numbers with colons between for digits of that base


def output_size(
    resolution: str | None = None,
    aspect_ratio: str | float | None = None,
    height: int | None = None,
    width: int | None = None,
    resolutions: Mapping | str | os.PathLike | None = None,
) -> tuple[int, int]:
    """(height, width) of the output, in pixels.

    Args:
        resolution: a name in the table of sizes, such as "240p".
        aspect_ratio: width:height, as "16:9", or a number, height / width as in the table ("0.56"). The nearest one in
            the table is taken. Left out: 1 for resolutions that are named by a side ("512"), else 16:9.
        height, width: instead of the other two, at least 16. Decoded frames have whole latents, so what goes beyond a
            multiple of 8 is told to the model and not seen (the table has such sizes, too).
        resolutions: further resolutions, which win over those of the package: a table or a JSON file, as in training.

    Raises:
        ConfigError: neither or both of the two ways, an unknown resolution, or a value that cannot be.
    """
    if height is None and width is None:
        if resolution is None:
            raise ConfigError("resolution", None, "give a resolution, such as '240p', or height and width")
        return _size_in_table(str(resolution), aspect_ratio, resolutions)
    for name, value in (("resolution", resolution), ("aspect_ratio", aspect_ratio)):
        if value is not None:
            raise ConfigError(name, value, "leave it out, or height and width: both state the size")
    for name, value in (("height", height), ("width", width)):
        if value is None:
            raise ConfigError(name, value, "height and width are needed, both")
        if not is_int(value) or value < MIN_SIZE:
            raise ConfigError(name, value, f"use a whole number of pixels, {MIN_SIZE} or more")
    return int(height), int(width)


def _size_in_table(resolution: str, aspect_ratio: str | float | None, resolutions) -> tuple[int, int]:
    table = load_resolutions(resolutions)
    if resolution not in table:
        raise ConfigError("resolution", resolution, f"there is no such resolution: {nearest(resolution, table)}")
    sizes = table[resolution]["sizes"]
    if aspect_ratio is None:
        aspect_ratio = 1 if resolution.isdigit() else 9 / 16
    wanted = _height_by_width(aspect_ratio)
    found = min(sizes, key=lambda aspect: abs(float(aspect) - wanted))
    height, width = sizes[found]
    if abs(float(found) / wanted - 1) > NEAR:
        logger.warning(
            "aspect_ratio %s (height / width %.2f): the nearest of %s is %s, %d x %d (height x width)",
            *(aspect_ratio, wanted, resolution, found, height, width),
        )
    return height, width


def _height_by_width(aspect_ratio: str | float) -> float:
    """The number height / width that is meant by "16:9" (width:height) or "0.56"."""
    width, colon, height = str(aspect_ratio).partition(":")
    try:
        ratio = float(height) / float(width) if colon else float(width)
    except (ValueError, ZeroDivisionError):
        ratio = math.nan
    if not 0 < ratio < SEXAGESIMAL:
        remedy = "use width:height, as '16:9', or height / width, as '0.56'"
        if ratio < math.inf:
            remedy += "; YAML reads 16:9 as 969 unless it is in quotes"
        raise ConfigError("aspect_ratio", aspect_ratio, remedy)
    return ratio
