"""What encoding adds to a step: an autoencoder and a T5-XXL of real size, random weights, measured by themselves."""

import gc
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace

import torch

from stdit_fast.benchmarks.random_encoders import T5_XXL, random_autoencoder, random_t5
from stdit_fast.benchmarks.sweep_model import Shape
from stdit_fast.encoders.autoencoder import VideoAutoencoder
from stdit_fast.encoders.text import T5TextEncoder

TEXT_BATCHES = (2, 32)  # captions, of which time is taken to be linear
FRAMES = 32  # of each size that the autoencoder is timed on, in parts of what it takes at once


@dataclass(frozen=True)
class EncodingCost:
    """Seconds and bytes of encoding.

    Attributes:
        text_seconds: (floor, a caption).
        frame_seconds: (height, width) -> seconds a frame, its copy to the GPU among them.
        held: bytes of weights.
        peak: bytes at most while a batch is encoded, weights not counted, of any size.
    """

    text_seconds: tuple[float, float]
    frame_seconds: dict[tuple[int, int], float]
    held: int
    peak: int

    def seconds(self, shape: Shape, batch: int) -> float:
        """Of a batch."""
        floor, caption = self.text_seconds
        return floor + batch * (caption + shape.frames * self.frame_seconds[shape.height, shape.width])


def measure_encoding(
    shapes: Iterable[Shape],
    device: torch.device,
    *,
    text_tokens: int,
    vae_frames: int | str | None,
    say: Callable[[str], None] = lambda line: None,
    encoders=None,
) -> EncodingCost:
    """Measures both encoders on every size among `shapes`.

    Args:
        text_tokens: of each caption, all real.
        vae_frames: frames that the autoencoder takes at once, or "auto"; None: all of a batch, for which FRAMES stand.
        encoders: (autoencoder, text encoder) in place of those of real size.

    Raises:
        torch.OutOfMemoryError: they do not fit beside what is there.
    """
    on_gpu = device.type == "cuda"
    before = torch.cuda.memory_allocated() if on_gpu else 0
    dtype = torch.bfloat16 if on_gpu else torch.float32
    autoencoder, text = encoders or random_encoders(device, dtype, text_tokens, vae_frames)
    held = torch.cuda.memory_allocated() - before if on_gpu else 0
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    few, many = (_seconds(partial(text.encode, [""] * count), on_gpu) for count in TEXT_BATCHES)
    caption = max(0.0, many - few) / (TEXT_BATCHES[1] - TEXT_BATCHES[0])
    text_seconds = max(0.0, few - TEXT_BATCHES[0] * caption), caption
    say(f"text encoder: {1000 * text_seconds[0]:.1f} ms and {1000 * caption:.2f} ms a caption")
    frame_seconds = {}
    for height, width in dict.fromkeys((s.height, s.width) for s in shapes):
        video = torch.rand(1, 3, FRAMES, height, width) * 2 - 1
        video = video.pin_memory() if on_gpu else video
        noise = torch.randn(1, 4, FRAMES, height // 8, width // 8, device=device)
        whole = _seconds(partial(_encode_video, autoencoder, video, noise), on_gpu)
        frame_seconds[height, width] = whole / FRAMES
        say(f"autoencoder: {height}x{width} {1000 * whole / FRAMES:.2f} ms a frame")
    peak = torch.cuda.max_memory_allocated() - before - held if on_gpu else 0
    say(f"encoders hold {held / 2**30:.2f} GiB, and take {peak / 2**30:.2f} GiB more at most")
    del autoencoder, text, video, noise
    gc.collect()
    if on_gpu:
        torch.cuda.empty_cache()
    return EncodingCost(text_seconds, frame_seconds, held, peak)


def _encode_video(autoencoder, video: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    return autoencoder.encode(video.to(noise.device, non_blocking=True), noise)


def _seconds(work: Callable[[], object], on_gpu: bool) -> float:
    """Of the faster of two runs after one that warms up."""
    times = []
    for _ in range(3):
        if on_gpu:
            torch.cuda.synchronize()
        started = time.perf_counter()
        work()
        if on_gpu:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return min(times[1:])


class _FullCaptions:
    """Stands for a tokenizer: every caption has all its tokens."""

    def __init__(self, tokens: int):
        self.tokens = tokens

    def __call__(self, captions, **options) -> SimpleNamespace:
        if "return_tensors" not in options:
            return SimpleNamespace(input_ids=[5] * self.tokens)
        ids = torch.randint(3, 30000, (len(captions), self.tokens), generator=torch.Generator().manual_seed(0))
        return SimpleNamespace(input_ids=ids, attention_mask=torch.ones_like(ids))


def random_encoders(device: torch.device, dtype: torch.dtype, text_tokens: int, vae_frames: int | str | None):
    """(autoencoder, text encoder) of the sizes of sd-vae-ft and t5-v1_1-xxl with random weights, on `device`."""
    autoencoder = VideoAutoencoder(random_autoencoder(), vae_frames).to(device, dtype)
    text = T5TextEncoder(random_t5(**T5_XXL), _FullCaptions(text_tokens), text_tokens).to(device, dtype)
    return autoencoder, text
