"""Contact sheets: strips of frames below each other, with their captions. All sizes are in pixels."""

import os
import textwrap
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from stdit_fast.media.files import whole_file
from stdit_fast.media.pixels import to_pixels

SHEET_WIDTH = 1920
MARGIN = 24
ROW_WIDTH = SHEET_WIDTH - 2 * MARGIN
GAP = 4  # between the frames of a strip
STRIP_GAP = 16  # between strips
MAX_FRAME_HEIGHT = 136
CAPTION_SIZE = 14
CAPTION_LINES = 2


def sheet(rows: Sequence[tuple[str, Tensor]], frames_per_row: int, path: str | os.PathLike) -> None:
    """Draw videos below each other, each as a strip of frames under its caption.

    Args:
        rows: caption and video, [3, T, H, W] in [-1, 1]; lengths and sizes may differ.
        frames_per_row: how many frames of a video to show at most, evenly spread from its first to its last.
        path: the PNG, which appears whole or not at all.
    """
    write_rows([_draw_strip(caption, video, frames_per_row) for caption, video in rows], path)


def _draw_strip(caption: str, video: Tensor, frames_per_row: int) -> Image.Image:
    _, num_frames, height, width = video.shape
    columns = spread(num_frames, frames_per_row)
    size = frame_size(height, width, len(columns))
    lines = wrap(caption, ROW_WIDTH)
    top = caption_height(len(lines))
    row, draw = blank(top + size[1] + STRIP_GAP)
    write_caption(draw, lines)
    for place, frame in enumerate(columns):
        row.paste(frame_image(video[:, frame], size), (place * (size[0] + GAP), top))
    return row


def write_rows(rows: Sequence[Image.Image], path: str | os.PathLike) -> None:
    """Paste rows, each at most ROW_WIDTH wide, below each other and write them as a PNG, whole or not at all."""
    picture = Image.new("RGB", (SHEET_WIDTH, sum(row.height for row in rows) + 2 * MARGIN), "white")
    top = MARGIN
    for row in rows:
        picture.paste(row, (MARGIN, top))
        top += row.height
    with whole_file(path) as draft:
        picture.save(draft, format="PNG")


def spread(num_frames: int, shown: int) -> np.ndarray:
    """Indices of at most `shown` frames, evenly spread from the first to the last."""
    return np.unique(np.linspace(0, num_frames - 1, min(num_frames, shown)).round().astype(int))


def frame_size(height: int, width: int, columns: int) -> tuple[int, int]:
    """(width, height) at which so many frames of height x width stand beside each other in a row."""
    shown_width = min(MAX_FRAME_HEIGHT * width / height, (ROW_WIDTH + GAP) / columns - GAP)
    return max(1, int(shown_width)), max(1, round(shown_width * height / width))


def frame_image(frame: Tensor, size: tuple[int, int]) -> Image.Image:
    """A frame [3, H, W] in [-1, 1] as an image of `size` (width, height)."""
    return Image.fromarray(to_pixels(frame[:, None])[0]).resize(size, Image.Resampling.LANCZOS)


@lru_cache
def font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    import matplotlib

    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(str(Path(matplotlib.get_data_path(), "fonts", "ttf", name)), size)


def blank(height: int, width: int = ROW_WIDTH) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    """A white image to draw on."""
    image = Image.new("RGB", (width, height), "white")
    return image, ImageDraw.Draw(image)


def wrap(caption: str, width: int) -> list[str]:
    """The lines of a caption of that width, cut after CAPTION_LINES."""
    characters = max(8, int(width / font(CAPTION_SIZE).getlength("n")))
    return textwrap.wrap(caption, characters, max_lines=CAPTION_LINES, placeholder=" …")


def caption_height(lines: int) -> int:
    return lines * (CAPTION_SIZE + 4) + 4


def write_caption(draw: ImageDraw.ImageDraw, lines: Sequence[str]) -> None:
    """Write the lines of a caption at the top left."""
    for row, line in enumerate(lines):
        draw.text((0, row * (CAPTION_SIZE + 4)), line, "black", font(CAPTION_SIZE))
