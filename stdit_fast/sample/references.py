"""References: images and videos that conditions take frames of."""

import os
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from stdit_fast.errors import ConfigError
from stdit_fast.media.read import (
    PILLOW_ERRORS,
    BadSample,
    cover,
    decode_frames,
    decode_image,
    fit_image,
    is_image,
    probe,
    upright_rgb,
)

KEY = "reference_path"
Source = str | os.PathLike | Image.Image | Tensor


def load_reference(
    source: Source, height: int, width: int, max_frames: int | None = None, fps: float | None = None
) -> Tensor:
    """A reference's frames, resized (bicubic, antialiased) until they cover height x width, and centre-cropped.

    Args:
        source: path of an image or a video, an image, or a tensor [3, T, H, W] or [3, H, W] in [-1, 1].
        height, width: size to return, in pixels.
        max_frames: the first so many are returned; None: all.
        fps: of a video file, the nearest frame in time is taken for each frame at this rate; None: its own rate.

    Returns:
        float32 [3, T, height, width] in [-1, 1], on the CPU; T is 1 for an image.

    Raises:
        ConfigError: what is missing, unreadable, or no reference (key ``reference_path``).
    """
    if isinstance(source, Tensor):
        return _fit_frames(_as_video(source)[:, :max_frames], height, width)
    if isinstance(source, Image.Image):
        try:
            image = upright_rgb(source)
        except PILLOW_ERRORS as error:
            raise ConfigError(KEY, source, f"the image cannot be read: {error}") from error
        return fit_image(image, height=height, width=width)
    path = _check_path(source)
    try:
        if is_image(path):
            return decode_image(path, height=height, width=width)
        indices = _frames_at(path, fps)[:max_frames]
        decoded, again = np.unique(indices, return_inverse=True)
        video = decode_frames(path, decoded, height=height, width=width)
        return video if len(decoded) == len(indices) else video[:, again]
    except BadSample as bad:
        raise ConfigError(KEY, str(source), bad.reason) from bad


def reference_frames(source: Source, fps: float | None = None) -> int:
    """How many frames `load_reference` returns, without decoding them all; arguments and errors as there."""
    if isinstance(source, Tensor):
        return _as_video(source).shape[1]
    if isinstance(source, Image.Image):
        return 1
    path = _check_path(source)
    try:
        return probe(path).num_frames if is_image(path) else len(_frames_at(path, fps))
    except BadSample as bad:
        raise ConfigError(KEY, str(source), bad.reason) from bad


def _check_path(source: object) -> Path:
    if not isinstance(source, (str, os.PathLike)):
        raise ConfigError(KEY, source, "use a path, an image, or a tensor [3, T, H, W]")
    return Path(source)


def _frames_at(path: Path, fps: float | None) -> np.ndarray:
    """Indices of a video's frames as it is shown at a rate of `fps`; some stand twice where that is the higher one."""
    found = probe(path)
    if fps is None:
        return np.arange(found.num_frames)
    if not 0 < fps < np.inf:
        raise ConfigError("fps", fps, "use a number of frames a second above 0")
    count = max(1, round(found.num_frames * fps / found.fps))
    nearest = np.floor(np.arange(count) * (found.fps / fps) + 0.5).astype(np.int64)
    return nearest.clip(max=found.num_frames - 1)


def _as_video(tensor: Tensor) -> Tensor:
    """[3, T, H, W] in float32 on the CPU."""
    video = tensor[:, None] if tensor.ndim == 3 else tensor
    if video.ndim != 4 or video.shape[0] != 3 or 0 in video.shape or not video.is_floating_point():
        found = f"{tensor.dtype} {list(tensor.shape)}"
        raise ConfigError(KEY, found, "a tensor must be of floats, [3, T, H, W] or [3, H, W], in [-1, 1]")
    video = video.detach().to("cpu", torch.float32)
    if not video.abs().max() <= 1:
        found = f"values from {video.min():g} to {video.max():g}"
        raise ConfigError(KEY, found, "a tensor's values must lie in [-1, 1]")
    return video


def _fit_frames(video: Tensor, height: int, width: int) -> Tensor:
    """Frames of any size, resized until they cover height x width, and centre-cropped."""
    fit = cover(*video.shape[2:], height, width)
    frames = video.movedim(1, 0)
    if (fit.height, fit.width) != tuple(video.shape[2:]):
        size = (fit.height, fit.width)
        frames = functional.interpolate(frames, size=size, mode="bicubic", antialias=True).clamp(-1, 1)
    return fit.crop(frames.permute(2, 3, 1, 0)).permute(2, 3, 0, 1).contiguous()
