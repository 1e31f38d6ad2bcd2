"""Reading clips and images: only the frames that are asked for, resized and centre-cropped to the size asked for.

A clip is decoded from the keyframe before its crop to the crop's last frame, and only the frames that are used are
converted; frames that no other frame refers to are not even decoded unless they are used.
"""

import math
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
import torch
from av.video.reformatter import ColorRange, Interpolation, VideoReformatter
from PIL import Image, ImageOps

from stdit_fast.media.pixels import from_pixels

# Without full chroma and accurate rounding swscale darkens by 1.4 of 255; bit-exact: the same on another processor.
RESIZING = Interpolation.BICUBIC | Interpolation.FULL_CHR_H_INT | Interpolation.ACCURATE_RND | Interpolation.BITEXACT
IMAGE_EXTENSIONS = frozenset({".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".avif"})
DEFAULT_FPS = 24.0
# Pillow's readers raise these for damaged files, depending on the format.
# Titles and the like may be in any encoding, and matter to nobody here; from PyAV 19 on it never minds.
LENIENT = {} if int(av.__version__.split(".")[0]) >= 19 else {"metadata_errors": "ignore"}
PILLOW_ERRORS = (
    *(OSError, EOFError, RuntimeError, SyntaxError, ValueError, TypeError, LookupError, ArithmeticError, struct.error),
    Image.DecompressionBombError,
)


class BadSample(Exception):
    """A sample that cannot be used.

    Args:
        reason: what is wrong with it; the part before the first colon is the same for all samples of one kind.
    """

    def __init__(self, reason: str):
        self.reason = reason
        super().__init__(reason)


class Probe(NamedTuple):
    """What a file holds, as it is displayed: rotation is applied. An image has one frame and fps 0."""

    num_frames: int
    height: int
    width: int
    fps: float


class _SeekFailed(Exception):
    """Presentation times lead to no exact answer; the frames have to be counted from the start."""


def is_image(path: str | Path) -> bool:
    """Whether the file's extension is that of an image."""
    return Path(path).suffix.lower() in IMAGE_EXTENSIONS


def probe(path: str | Path) -> Probe:
    """Length, size and frame rate of a clip or an image.

    A clip's first frame is decoded: it alone shows the rotation in every container, and that the file can be decoded.

    Raises:
        BadSample: the file is missing, empty, corrupt or holds no video.
    """
    if is_image(path):
        with open_image(path) as image:
            height, width = image.height, image.width
            if image.getexif().get(0x0112, 1) >= 5:  # orientations 5 to 8 turn the image by 90 degrees
                height, width = width, height
            return Probe(1, height, width, 0.0)
    with open_video(path) as (container, stream):
        fps = float(stream.average_rate or stream.guessed_rate or 0) or DEFAULT_FPS
        num_frames = stream.frames
        frame = next(container.decode(stream), None)
        if frame is None:
            raise BadSample("empty: no frame can be decoded")
        height, width = _displayed_size(frame)
    if not num_frames:  # containers such as Matroska do not state it
        with open_video(path) as (container, stream):
            num_frames = sum(1 for packet in container.demux(stream) if packet.size)
    return Probe(num_frames, height, width, fps)


def decode_clip(
    path: str | Path, *, start: int, num_frames: int, frame_interval: int, height: int, width: int
) -> torch.Tensor:
    """Frames start, start + frame_interval, ... of a clip, as large as they must be to cover height x width, cropped.

    A frame's index is its presentation time in units of the average frame rate, so B-frames, a first time other than 0
    and missing frames do not shift it. Where times are missing or seeking lands too late, frames are counted from the
    start instead.

    Args:
        path: the file.
        start: index of the first frame.
        num_frames: how many frames to return.
        frame_interval: one frame in so many is taken.
        height, width: size to return, in pixels.

    Returns:
        float32 [3, num_frames, height, width] in [-1, 1], RGB.

    Raises:
        BadSample: the file is missing, empty, corrupt, undecodable or has too few frames.
    """
    return decode_frames(path, start + np.arange(num_frames) * frame_interval, height=height, width=width)


def decode_frames(path: str | Path, indices: np.ndarray, *, height: int, width: int) -> torch.Tensor:
    """The frames of a clip with these indices (int, ascending, none twice), otherwise as `decode_clip`."""
    pixels = np.empty((len(indices), height, width, 3), dtype=np.uint8)
    decode_frames_into(pixels, path, indices)
    return from_pixels(pixels)


def decode_frames_into(pixels: np.ndarray, path: str | Path, indices: np.ndarray) -> None:
    """As `decode_frames`, into `pixels`, uint8 [T, H, W, 3]; after a BadSample they hold anything."""
    try:
        with open_video(path) as (container, stream):
            frames = _seek_frames(container, stream, indices)
            filled = _fill(pixels, frames)
    except _SeekFailed:
        with open_video(path) as (container, stream):
            filled = _fill(pixels, _count_frames(container, stream, indices))
    if filled < len(indices):
        raise BadSample(f"too short: frame {indices[filled]} is not there")


def decode_image(path: str | Path, *, height: int, width: int) -> torch.Tensor:
    """An image, resized (bicubic, antialiased) until it covers height x width, and centre-cropped.

    Its orientation tag is followed.

    Returns:
        float32 [3, 1, height, width] in [-1, 1], RGB.

    Raises:
        BadSample: the file is missing, empty or corrupt.
    """
    pixels = np.empty((1, height, width, 3), dtype=np.uint8)
    decode_image_into(pixels, path)
    return from_pixels(pixels)


def decode_image_into(pixels: np.ndarray, path: str | Path) -> None:
    """As `decode_image`, into `pixels`, uint8 [1, H, W, 3]."""
    with open_image(path) as opened:
        image = upright_rgb(opened)
    pixels[0] = _fitted(image, *pixels.shape[1:3])


def fit_image(image: Image.Image, *, height: int, width: int) -> torch.Tensor:
    """What `decode_image` does after decoding, to an RGB image that stands upright."""
    return from_pixels(_fitted(image, height, width)[None])


def _fitted(image: Image.Image, height: int, width: int) -> np.ndarray:
    """uint8 [H, W, 3]."""
    fit = cover(image.height, image.width, height, width)
    return fit.crop(np.asarray(image.resize((fit.width, fit.height), Image.Resampling.BICUBIC)))


@dataclass(frozen=True)
class Cover:
    """The smallest size [height, width] of a source's aspect ratio that covers [rows, columns], to be cut to that."""

    height: int
    width: int
    rows: int
    columns: int

    def crop(self, pixels: np.ndarray) -> np.ndarray:
        """The centre of [height, width, ...], [rows, columns, ...]."""
        top, left = (self.height - self.rows) // 2, (self.width - self.columns) // 2
        return pixels[top : top + self.rows, left : left + self.columns]


def cover(source_height: int, source_width: int, height: int, width: int) -> Cover:
    """How to resize a source until it covers height x width."""
    scale = max(height / source_height, width / source_width)
    return Cover(
        max(height, round(source_height * scale)), max(width, round(source_width * scale)), rows=height, columns=width
    )


@contextmanager
def open_image(path: str | Path):
    """The opened image; whatever Pillow finds wrong with it, also while it is read, becomes a BadSample."""
    try:
        with Image.open(path) as image:
            yield image
    except PILLOW_ERRORS as error:
        raise BadSample(_reason(path, error)) from error


def _reason(path: str | Path, error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "vanished: no such file"
    if isinstance(error, (PermissionError, IsADirectoryError)):
        return f"unreadable: {error.strerror}"
    if Path(path).is_file() and not Path(path).stat().st_size:
        return "empty: the file has no bytes"
    # libav's text without the path, which would make every reason another one
    return f"corrupt: {getattr(error, 'strerror', None) or error}"


def upright_rgb(image: Image.Image) -> Image.Image:
    """An image of any mode as RGB, turned as its orientation tag says."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):  # Pillow would clip 16 bits to 8 instead of scaling them
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    return image.convert("RGB")


@contextmanager
def open_video(path: str | Path) -> Iterator[tuple[av.container.InputContainer, av.VideoStream]]:
    """The opened container and its video stream; whatever libav finds wrong becomes a BadSample."""
    try:
        with av.open(str(path), **LENIENT) as container:
            if not container.streams.video:
                raise BadSample("undecodable: the file has no video stream")
            stream = container.streams.video[0]
            if stream.codec_context is None:
                raise BadSample("undecodable: there is no decoder for its codec")
            # Data workers are the parallelism; threads inside of each would only contend.
            stream.thread_type = "NONE"
            stream.codec_context.thread_count = 1
            yield container, stream
    except (av.FFmpegError, OSError) as error:
        raise BadSample(_reason(path, error)) from error


def _seek_frames(container, stream, indices: np.ndarray) -> Iterator[av.VideoFrame]:
    """The frames with these indices, found by presentation time after a seek.

    Raises:
        _SeekFailed: the times are missing or out of order, or lead to no answer.
    """
    rate = stream.average_rate
    # AVI stores no presentation times, GIF times that are rounded and no rate.
    if stream.start_time is None or not rate or container.format.name in ("avi", "gif"):
        raise _SeekFailed
    step = 1 / float(rate * stream.time_base)
    times = stream.start_time + indices * step
    constant_rate = stream.base_rate == rate
    if indices[0] > 0:
        container.seek(math.floor(times[0]), stream=stream)
    wanted, last, position = iter(times), None, -math.inf
    target = next(wanted)
    for frame in _decode(container, stream, times, step, constant_rate):
        if frame.pts is None or frame.pts <= position or frame.is_corrupt:
            raise _SeekFailed
        position = frame.pts
        while position >= target - step / 2:
            if position <= target + step / 2:
                yield frame
            elif last is None or constant_rate:
                raise _SeekFailed
            else:  # at a variable rate, the frame that is still on display
                yield last
            target = next(wanted, None)
            if target is None:
                return
        last = frame
    raise _SeekFailed


def _decode(container, stream, times: np.ndarray, step: float, constant_rate: bool) -> Iterator[av.VideoFrame]:
    """Frames from the current position on, less those that are neither used nor referred to by others."""
    for packet in container.demux(stream):
        unused = False
        if packet.pts is not None:
            nearest = np.searchsorted(times, packet.pts - step / 2)
            if nearest == 0 and packet.pts < times[0] - 2 * step:
                unused = True
            elif constant_rate:
                unused = nearest == len(times) or times[nearest] > packet.pts + step / 2
        stream.codec_context.skip_frame = "NONREF" if unused else "DEFAULT"
        yield from packet.decode()


def _count_frames(container, stream, indices: np.ndarray) -> Iterator[av.VideoFrame]:
    """The frames with these indices, counted from the start of the file."""
    wanted = set(indices.tolist())
    for count, frame in enumerate(container.decode(stream)):
        if count in wanted:
            if frame.is_corrupt:
                raise BadSample("corrupt: a frame that is used is damaged")
            yield frame
        if count >= indices[-1]:
            return


def _fill(pixels: np.ndarray, frames: Iterator[av.VideoFrame]) -> int:
    """Resizes frames into `pixels`, uint8 [T, H, W, 3], and returns how many there were."""
    reformatter = VideoReformatter()  # keeps its filters from one frame to the next
    filled = 0
    for filled, frame in enumerate(frames, start=1):
        fit = cover(*_displayed_size(frame), *pixels.shape[1:3])
        turns = _quarter_turns(frame)
        stored = (fit.width, fit.height) if turns % 2 else (fit.height, fit.width)
        converted = reformatter.reformat(
            frame,
            height=stored[0],
            width=stored[1],
            format="rgb24",
            interpolation=RESIZING,
            dst_color_range=ColorRange.JPEG,
            threads=1,
        )
        pixels[filled - 1] = fit.crop(np.rot90(_view(converted), turns))
    return filled


def _view(frame: av.VideoFrame) -> np.ndarray:
    """The pixels of an rgb24 frame, [H, W, 3], where they lie."""
    plane = frame.planes[0]
    rows = np.frombuffer(plane, dtype=np.uint8).reshape(plane.height, plane.line_size)
    return rows[: frame.height, : 3 * frame.width].reshape(frame.height, frame.width, 3)


def _quarter_turns(frame: av.VideoFrame) -> int:
    """Counterclockwise quarter turns to apply before display."""
    return round(frame.rotation / 90) % 4


def _displayed_size(frame: av.VideoFrame) -> tuple[int, int]:
    """(height, width) after rotation."""
    return (frame.width, frame.height) if _quarter_turns(frame) % 2 else (frame.height, frame.width)
