"""Writing videos: frames go into the file as they come, so memory does not grow with the length."""

import json
import os
import struct
from collections.abc import Mapping
from contextlib import ExitStack
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.video.reformatter import ColorRange, Colorspace, VideoReformatter
from PIL import GifImagePlugin, Image, PngImagePlugin
from torch import Tensor

from stdit_fast.errors import ConfigError
from stdit_fast.media.files import whole_file
from stdit_fast.media.pixels import to_pixels
from stdit_fast.media.read import RESIZING, BadSample, open_image, open_video

MIN_FPS, MAX_FPS = 0.1, 1000.0
# ITU-T H.273: the code of BT.709's primaries and of its transfer function, which swscale's matrices do not tell.
BT709 = 1


class VideoWriter:
    """Writes a video, an animation or an image; which, the file's name says.

    ``.mp4``: H.264 (MPEG-4 part 2 where PyAV has no libx264), yuv420p; of an odd size the last row or column stands
    twice. ``.gif``: 256 colours a frame, at most 50 frames a second, repeated for ever. ``.png``: lossless; one frame
    is an image, more are an animated PNG.

    The file appears whole when the ``with`` block ends, or not at all if it ends with an exception::

        with VideoWriter("sea.mp4", fps=24, metadata={"prompt": "a sea", "seed": "42"}) as writer:
            writer.write(video)

    Args:
        path: the file; folders that are not there are made.
        fps: frames a second, 0.1 to 1000.
        metadata: kept in the file as JSON (comment), its "prompt" as title too; `read_metadata` reads it back.

    Raises:
        ConfigError: a suffix or frame rate that cannot be (keys ``path`` and ``fps``).
        ValueError: frames of another shape than those before, or none at all.
    """

    def __init__(self, path: str | os.PathLike, fps: float, metadata: Mapping[str, str] | None = None):
        self.path = Path(path)
        suffix = self.path.suffix.lower()
        if suffix not in _FORMATS:
            raise ConfigError("path", str(path), f"the name must end with one of {', '.join(_FORMATS)}")
        if not MIN_FPS <= fps <= MAX_FPS:
            raise ConfigError("fps", fps, f"use a number of frames a second from {MIN_FPS:g} to {MAX_FPS:g}")
        self._format = _FORMATS[suffix]
        self.fps, self.metadata = float(fps), dict(metadata or {})
        self._size: tuple[int, int] | None = None

    def __enter__(self) -> "VideoWriter":
        self._stack = ExitStack()
        self._draft = self._stack.enter_context(whole_file(self.path))
        return self

    def write(self, frames: np.ndarray | Tensor) -> None:
        """Add frames: a uint8 array [T, H, W, 3], or a float tensor [3, T, H, W] in [-1, 1] on any device."""
        is_tensor = isinstance(frames, Tensor)
        is_right_type = frames.is_floating_point() if is_tensor else frames.dtype == np.uint8
        if not is_right_type or frames.ndim != 4 or frames.shape[0 if is_tensor else -1] != 3:
            found = f"{type(frames).__name__} of {frames.dtype} {list(frames.shape)}"
            raise ValueError(f"frames must be a uint8 array [T, H, W, 3] or a float tensor [3, T, H, W], not a {found}")
        pixels = to_pixels(frames) if is_tensor else frames
        if self._size not in (None, pixels.shape[1:3]):
            raise ValueError(f"frames of {list(pixels.shape[1:3])} (height, width) after those of {list(self._size)}")
        for frame in pixels:
            if self._size is None:
                self._size = frame.shape[:2]
                self._encoder = self._stack.enter_context(
                    self._format(self._draft, self.fps, self.metadata, *self._size)
                )
            self._encoder.write(frame)

    def __exit__(self, kind, error, traceback) -> None:
        if error is None and self._size is None:
            error = ValueError(f"{self.path}: no frame was written")
            self._stack.__exit__(ValueError, error, None)
            raise error
        self._stack.__exit__(kind, error, traceback)


def read_metadata(path: str | os.PathLike) -> dict:
    """The metadata that a `VideoWriter` wrote into a file; empty if there are none of its kind.

    Raises:
        ConfigError: a file that is missing or cannot be read (key ``path``).
    """
    try:
        if Path(path).suffix.lower() == ".mp4":
            with open_video(path) as (container, _):
                comment = container.metadata.get("comment", "")
        else:
            with open_image(path) as image:
                comment = image.info.get("Comment") or image.info.get("comment", "")
    except BadSample as bad:
        raise ConfigError("path", str(path), bad.reason) from bad
    try:
        metadata = json.loads(comment)
    except ValueError:
        return {}
    return metadata if isinstance(metadata, dict) else {}


def _tags(metadata: dict[str, str]) -> dict[str, str]:
    tags = {"title": metadata.get("prompt"), "comment": json.dumps(metadata) if metadata else None}
    return {name: text for name, text in tags.items() if text}


class _Mp4:
    """H.264 in MP4, colours as BT.709 of studio range and tagged so."""

    def __init__(self, path: Path, fps: float, metadata: dict[str, str], height: int, width: int):
        rate = Fraction(fps).limit_denominator(1001)
        codec, options = _video_codec()
        # The index goes to the front at the end, so that players can start before they have the whole file.
        self.container = av.open(str(path.absolute()), "w", format="mp4", options={"movflags": "faststart"})
        self.container.metadata.update(_tags(metadata))
        self.stream = self.container.add_stream(codec, rate=rate, options=options)
        self.padding = (0, height % 2), (0, width % 2), (0, 0)  # yuv420p has a colour for two by two pixels
        self.stream.height, self.stream.width = height + height % 2, width + width % 2
        self.stream.pix_fmt = "yuv420p"
        context = self.stream.codec_context
        context.color_range, context.colorspace = ColorRange.MPEG, Colorspace.ITU709
        context.color_primaries = context.color_trc = BT709
        self.reformatter = VideoReformatter()
        self.time_base, self.count = 1 / rate, 0

    def __enter__(self) -> "_Mp4":
        return self

    def write(self, frame: np.ndarray) -> None:
        rgb = av.VideoFrame.from_ndarray(np.pad(frame, self.padding, mode="edge"), format="rgb24")
        converted = self.reformatter.reformat(
            rgb,
            format="yuv420p",
            interpolation=RESIZING,
            dst_colorspace=Colorspace.ITU709,
            src_color_range=ColorRange.JPEG,
            dst_color_range=ColorRange.MPEG,
        )
        converted.pts, converted.time_base = self.count, self.time_base
        self.container.mux(self.stream.encode(converted))
        self.count += 1

    def __exit__(self, kind, error, traceback) -> None:
        with self.container:
            if error is None:
                self.container.mux(self.stream.encode())


def _video_codec() -> tuple[str, dict[str, str]]:
    """The encoder for MP4 and its options, with hardly a visible loss."""
    if "libx264" in av.codecs_available:
        return "libx264", {"crf": "18"}
    quantizer = 2 * 118  # 2 is about the finest; 118 is libav's FF_QP2LAMBDA
    return "mpeg4", {"flags": "+qscale", "global_quality": str(quantizer)}


class _Gif:
    """GIF, written block by block: Pillow's own writer keeps all frames until the end."""

    def __init__(self, path: Path, fps: float, metadata: dict[str, str], height: int, width: int):
        self.fps, self.count = fps, 0
        self.file = path.open("wb")
        self.file.write(b"GIF89a" + struct.pack("<HHBBB", width, height, 0x70, 0, 0))  # no palette for all frames
        self.file.write(b"\x21\xff\x0bNETSCAPE2.0\x03\x01\0\0\0")  # for ever
        comment = _tags(metadata).get("comment", "").encode()
        parts = (comment[i : i + 255] for i in range(0, len(comment), 255))
        if comment:  # libav takes an empty one for a part of the first frame
            self.file.write(b"\x21\xfe" + b"".join(bytes([len(part)]) + part for part in parts) + b"\0")

    def __enter__(self) -> "_Gif":
        return self

    def write(self, frame: np.ndarray) -> None:
        # Times are hundredths of a second: rounded so that errors do not add up. Viewers take 1 for 10.
        shown, end = (round(count * 100 / self.fps) for count in (self.count, self.count + 1))
        milliseconds = 10 * max(2, end - shown)
        image = Image.fromarray(frame).quantize(256)
        self.file.writelines(GifImagePlugin.getdata(image, include_color_table=True, duration=milliseconds))
        self.count += 1

    def __exit__(self, kind, error, traceback) -> None:
        with self.file:
            if error is None:
                self.file.write(b"\x3b")


class _Png:
    """PNG, and with a second frame an animated one, written chunk by chunk: Pillow's own writer keeps all frames."""

    TICKS = 6000  # a second; most frame rates divide it

    def __init__(self, path: Path, fps: float, metadata: dict[str, str], height: int, width: int):
        self.size, self.delay = (width, height), round(self.TICKS / fps)
        self.count = self.sequence = 0
        self.file = path.open("wb")
        self.file.write(b"\x89PNG\r\n\x1a\n")
        self._chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
        for keyword, text in _tags(metadata).items():
            self._chunk(b"iTXt", keyword.capitalize().encode() + bytes(5), text.encode())

    def __enter__(self) -> "_Png":
        return self

    def write(self, frame: np.ndarray) -> None:
        chunks = PngImagePlugin.getchunks(Image.fromarray(frame))
        data = b"".join(content for kind, content, _ in chunks if kind == b"IDAT")
        if self.count == 0:
            self.first = data  # whether it is animated shows with the second frame
        else:
            if self.count == 1:
                self.control = self.file.tell()
                self._chunk(b"acTL", struct.pack(">II", 0, 0))  # the number of frames follows at the end
                self._frame_control()
                self._chunk(b"IDAT", self.first)
            self._frame_control()
            self._chunk(b"fdAT", self._next(), data)
        self.count += 1

    def _frame_control(self) -> None:
        width, height = self.size
        self._chunk(b"fcTL", self._next(), struct.pack(">IIIIHHBB", width, height, 0, 0, self.delay, self.TICKS, 0, 0))

    def _next(self) -> bytes:
        """The number of the next chunk of the animation."""
        self.sequence += 1
        return struct.pack(">I", self.sequence - 1)

    def _chunk(self, kind: bytes, *data: bytes) -> None:
        PngImagePlugin.putchunk(self.file, kind, *data)

    def __exit__(self, kind, error, traceback) -> None:
        with self.file:
            if error is not None:
                return
            if self.count == 1:
                self._chunk(b"IDAT", self.first)
            self._chunk(b"IEND")
            if self.count > 1:
                self.file.seek(self.control)
                self._chunk(b"acTL", struct.pack(">II", self.count, 0))


_FORMATS = {".mp4": _Mp4, ".gif": _Gif, ".png": _Png}
