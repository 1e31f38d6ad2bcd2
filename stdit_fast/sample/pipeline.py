"""`STDiT2Pipeline`: text, images and videos to images and videos, a diffusers pipeline."""

import logging
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from torch import Tensor

from stdit_fast.diffusion.sampling import check_settings, denoise
from stdit_fast.encoders.autoencoder import FrameAutoencoder, VideoAutoencoder, latent_size
from stdit_fast.encoders.modules import quiet_bitsandbytes
from stdit_fast.encoders.text import T5TextEncoder, TextEncoder
from stdit_fast.errors import ConfigError
from stdit_fast.media.pixels import to_pixels
from stdit_fast.model.config import IMAGE_FPS
from stdit_fast.model.prediction import Predictor
from stdit_fast.model.stdit2 import STDiT2, TextContext
from stdit_fast.parallel.groups import SequenceGroup, check_split
from stdit_fast.sample.conditions import Condition, check_conditions, number_references, parse_mask_strategy, place
from stdit_fast.sample.prompts import Prompt, parse_prompt
from stdit_fast.sample.references import load_reference, reference_frames
from stdit_fast.sample.shared import SharedPredictor
from stdit_fast.sample.sizes import output_size

with quiet_bitsandbytes():
    from diffusers import DiffusionPipeline

logger = logging.getLogger(__name__)

OUTPUT_TYPES = ("pil", "np", "latent")
# Pixels that go through the autoencoder at once; halved when that does not fit.
CODED_PIXELS = 16 * 512 * 512


@dataclass
class STDiT2PipelineOutput(BaseOutput):
    """What a call makes.

    Attributes:
        frames: by output type: "pil", a list of frames a prompt; "np", float32 [B, T, H, W, 3] in [0, 1]; "latent",
            float32 [B, C, T, h, w] on the pipeline's device.
    """

    frames: list[list[Image.Image]] | np.ndarray | Tensor


@dataclass
class _Request:
    """A call's arguments, checked."""

    prompts: list[Prompt]
    conditions: list[list[Condition]]
    references: list[list]
    num_frames: int
    height: int
    width: int
    fps: float
    loops: int
    condition_frames: int


class STDiT2Pipeline(DiffusionPipeline):
    """Samples of an STDiT-2, from text, and from images and videos by way of conditions.

    Args:
        transformer: the model.
        vae: an AutoencoderKL with 4 latent channels at 1/8, or a `FrameAutoencoder` that can be saved.
        text_encoder: a T5EncoderModel with its tokenizer, or an encoder of its own (`MiniLMEmbeddings`) without one.
        scheduler: of `stdit_fast.diffusion.make_scheduler`.
    """

    model_cpu_offload_seq = "text_encoder->transformer->vae"
    _optional_components = ["tokenizer"]

    def __init__(self, transformer: STDiT2, vae, text_encoder, scheduler, tokenizer=None):
        super().__init__()
        self.register_modules(
            transformer=transformer, vae=vae, text_encoder=text_encoder, scheduler=scheduler, tokenizer=tokenizer
        )
        self._predictor: Predictor | None = None
        self._group: SequenceGroup | None = None
        self._t5: T5TextEncoder | None = None

    @classmethod
    def of(
        cls, transformer: STDiT2, autoencoder: FrameAutoencoder, text_encoder: TextEncoder, scheduler
    ) -> "STDiT2Pipeline":
        """A pipeline of what training works with (`load_autoencoder`, `load_text_encoder`)."""
        vae = autoencoder.vae if isinstance(autoencoder, VideoAutoencoder) else autoencoder
        tokenizer = None
        if isinstance(text_encoder, T5TextEncoder):
            text_encoder, tokenizer = text_encoder.model, text_encoder.tokenizer
        return cls(transformer, vae, text_encoder, scheduler, tokenizer)

    # ----------------------------------------------------------------- calls

    @torch.no_grad()
    def __call__(
        self, prompt: str | Prompt | Sequence[str | Prompt], *, output_type: str = "pil", return_dict=True, **settings
    ) -> STDiT2PipelineOutput | tuple:
        """Videos, or images where `num_frames` is 1, a sample for each prompt.

        Args:
            prompt: text, with the JSON suffix and the texts of several loops that `parse_prompt` reads, or `Prompt`s.
            output_type: "pil", "np" or "latent"; see `STDiT2PipelineOutput`.
            return_dict: False answers a tuple of the frames.
            settings: as in `clips`.

        Raises:
            ConfigError: a setting that cannot be, before anything slow.
        """
        if output_type not in OUTPUT_TYPES:
            raise ConfigError("output_type", output_type, f"choose one of {', '.join(OUTPUT_TYPES)}")
        if output_type == "latent":
            frames = torch.cat(list(self.clips(prompt, decode=False, **settings)), dim=2)
        else:
            frames = np.concatenate([_pixels(clip) for clip in self.clips(prompt, **settings)], axis=1)
            if output_type == "np":
                frames = frames.astype(np.float32) / 255
            else:
                frames = [[Image.fromarray(frame) for frame in video] for video in frames]
        return STDiT2PipelineOutput(frames) if return_dict else (frames,)

    @torch.no_grad()
    def clips(
        self,
        prompt: str | Prompt | Sequence[str | Prompt],
        *,
        num_frames: int = 16,
        resolution: str | None = None,
        aspect_ratio: str | float | None = None,
        height: int | None = None,
        width: int | None = None,
        fps: float = 24.0,
        num_inference_steps: int = 100,
        guidance_scale: float = 7.0,
        guidance_channels: int | None = None,
        references: Sequence | None = None,
        conditions: str | Sequence[Condition] | None = None,
        loops: int = 1,
        condition_frame_length: int = 4,
        condition_frame_edit: float = 0.0,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        latents: Tensor | None = None,
        decode: bool = True,
        cuda_graphs: bool = True,
    ) -> Iterator[Tensor]:
        """The new frames of each loop as they are made; memory does not grow with the number of loops.

        Args:
            prompt: as in `__call__`.
            num_frames: of a loop. In all there will be loops * (num_frames - k) + k, k = condition_frame_length.
            resolution, aspect_ratio, height, width: the size, as in `output_size`: the first two, or the others.
            fps: frames a second that the model is told; of an image it is told the training's constant.
            num_inference_steps: of the sampler.
            guidance_scale: classifier-free guidance; 1 is none, and costs half.
            guidance_channels: how many of epsilon's channels are guided, the first ones; Open-Sora 1.1 guides 3.
            references, conditions: of every prompt that has none of its own; conditions as a mask strategy or as
                objects.
            loops: clips one after the other, each after the first beginning with the last frames of the one before.
            condition_frame_length, condition_frame_edit: how many frames those are, and their edit ratio.
            generator: one, or one a prompt, which makes a sample independent of the batch it is in; None: PyTorch's.
            latents: [B, C, T, h, w] float32, the first loop's initial noise in place of the generator's.
            decode: False gives latents [B, C, T', h, w].
            cuda_graphs: see `Predictor`.

        Yields:
            [B, 3, T', H, W] float32 in [-1, 1]; T' is num_frames, and less k from the second loop on.

        Raises:
            ConfigError: a setting that cannot be, at the first frame asked for, before anything slow.
        """
        size = output_size(resolution, aspect_ratio, height, width)
        request = check_request(
            prompt, num_frames, size, fps, references, conditions, loops, condition_frame_length, condition_frame_edit
        )
        batch, channels = len(request.prompts), self.transformer.config.in_channels
        shape = (batch, channels, num_frames, *latent_size(request.height, request.width))
        check_settings(self.scheduler, num_inference_steps, guidance_scale, guidance_channels, channels)
        if self._group is not None:
            check_split(self._group.size, num_frames, -(-shape[-2] // 2) * -(-shape[-1] // 2))
        generators = _check_generators(generator, batch)
        if latents is not None and latents.shape != shape:
            raise ConfigError("latents", list(latents.shape), f"the noise for this size is {list(shape)}")
        device = self._execution_device
        guided = guidance_scale != 1
        predictor = self._prepare(cuda_graphs)
        with evaluated(self.transformer):
            references = self._encode_references(request)
            texts, previous = None, None
            for loop in range(loops):
                wanted = [p.text(loop) for p in request.prompts]
                if wanted != texts:
                    texts = wanted
                    predictor.bind(self._text_context(texts, guided), **self._scalars(request, 2 if guided else 1))
                if latents is None or loop:
                    noise = _noise(shape, generators, device)
                else:
                    noise = latents.to(device, torch.float32).clone()
                edit = []
                for i in range(batch):
                    refs, placed = list(references[i]), list(request.conditions[i])
                    if loop:
                        placed.append(
                            Condition(len(refs), length=request.condition_frames, edit=condition_frame_edit, loop=loop)
                        )
                        refs.append(previous[i])
                    edit.append(place(noise[i], refs, placed, loop))
                clip = denoise(
                    predictor, self.scheduler, noise, num_steps=num_inference_steps, edit=torch.stack(edit),
                    guidance=guidance_scale, guidance_channels=guidance_channels, generators=generators,
                    progress=self.progress_bar,
                )  # fmt: skip
                previous = clip[:, :, num_frames - request.condition_frames :]
                new = clip if loop == 0 else clip[:, :, request.condition_frames :]
                yield self.decode_latents(new) if decode else new

    def share(self, group: SequenceGroup | None) -> None:
        """From now on all ranks of a group make the same calls, and each computes on some frames; None: alone.

        All of them answer with the whole video. Videos need at least as many frames as there are ranks. Nothing of it
        depends on the ranks but the generators, which are to be seeded alike.
        """
        self._group, self._predictor = group, None

    @property
    def shared(self) -> bool:
        """Whether several ranks make each video."""
        return self._group is not None

    @property
    def writes(self) -> bool:
        """Whether what is made is this rank's to write: of those that share it, the first one's."""
        return self._group is None or self._group.rank == 0

    def release(self) -> None:
        """Gives back what calls keep for the next ones: the CUDA graphs and their memory."""
        self._predictor = None

    # ----------------------------------------------------------------- parts

    @property
    def autoencoder(self) -> FrameAutoencoder:
        return self.vae if isinstance(self.vae, FrameAutoencoder) else VideoAutoencoder(self.vae)

    @property
    def texts(self) -> TextEncoder:
        """The text encoder with its tokenizer."""
        if self.tokenizer is None:
            return self.text_encoder
        if self._t5 is None or self._t5.model is not self.text_encoder:
            self._t5 = T5TextEncoder(self.text_encoder, self.tokenizer, self.transformer.config.model_max_length)
        return self._t5

    def decode_latents(self, latents: Tensor) -> Tensor:
        """[B, 3, T, H, W] float32 in [-1, 1] of latents [B, 4, T, h, w], in slices of frames that fit."""
        autoencoder = self.autoencoder
        return in_slices(autoencoder, autoencoder.decode, latents, 64 * latents.shape[-2] * latents.shape[-1])

    def _prepare(self, cuda_graphs: bool) -> Predictor:
        """The predictor, whose graphs outlive a call."""
        if self._group is not None:
            return SharedPredictor(self.transformer, self._group)
        if self._predictor is None or self._predictor.model is not self.transformer or not cuda_graphs:
            self._predictor = Predictor(self.transformer, cuda_graphs)
        return self._predictor

    def _text_context(self, texts: list[str], guided: bool) -> TextContext:
        encoder = self.texts
        already_cut = encoder.truncated
        states = encoder.encode(texts)
        if cut := encoder.truncated - already_cut:
            logger.warning("%d of %d texts had more than %d tokens and were cut", cut, len(texts), encoder.max_length)
        y, mask = states.states.to(self._execution_device), states.mask
        drop = torch.zeros(len(texts), dtype=torch.bool, device=y.device)
        if guided:  # the unconditional half has the empty caption at the length of its own, as in training
            y, mask, drop = torch.cat((y, y)), torch.cat((mask, mask)), torch.cat((drop, ~drop))
        return self.transformer.encode_text(y, mask, drop)

    def _scalars(self, request: _Request, copies: int) -> dict[str, Tensor]:
        values = {
            "num_frames": request.num_frames,
            "height": request.height,
            "width": request.width,
            "ar": request.height / request.width,
            "fps": IMAGE_FPS if request.num_frames == 1 else request.fps,
        }
        count, device = copies * len(request.prompts), self._execution_device
        return {name: torch.full((count,), float(value), device=device) for name, value in values.items()}

    def _encode_references(self, request: _Request) -> list[list[Tensor]]:
        """Latents [C, T, h, w] of each prompt's references; what several prompts share is read and encoded once."""
        encoded: dict[tuple, Tensor] = {}

        def encode(source, conditions: list[Condition]) -> Tensor:
            """Of the frames that conditions use, from the first one on."""
            counts_from_end = any(c.start < 0 for c in conditions)
            max_frames = None if counts_from_end else max((c.start + c.length for c in conditions), default=1)
            key = (source if isinstance(source, str | os.PathLike) else id(source), max_frames)
            if key not in encoded:
                video = load_reference(source, request.height, request.width, max_frames)[None]
                autoencoder = self.autoencoder
                encoded[key] = in_slices(autoencoder, autoencoder.encode, video, request.height * request.width)[0]
            return encoded[key]

        return [
            [encode(source, [c for c in conditions if c.reference == i]) for i, source in enumerate(sources)]
            for sources, conditions in zip(request.references, request.conditions, strict=True)
        ]


def check_request(
    prompt: str | Prompt | Sequence[str | Prompt],
    num_frames: int,
    size: tuple[int, int],
    fps: float,
    references: Sequence | None = None,
    conditions: str | Sequence[Condition] | None = None,
    loops: int = 1,
    condition_frames: int = 4,
    condition_edit: float = 0.0,
) -> _Request:
    """The arguments of `STDiT2Pipeline.clips` that no model is needed to check; `size` is (height, width).

    Raises:
        ConfigError: one that cannot be.
    """
    for name, value, least in (("num_frames", num_frames, 1), ("loops", loops, 1)):
        if not isinstance(value, int) or value < least:
            raise ConfigError(name, value, f"use a whole number, {least} or more")
    if not (isinstance(fps, int | float) and 0 < fps < math.inf):
        raise ConfigError("fps", fps, "use a number of frames a second above 0")
    if loops > 1 and not (isinstance(condition_frames, int) and 0 < condition_frames < num_frames):
        remedy = f"of a loop's {num_frames} frames, 1 to {num_frames - 1} can come from the loop before"
        raise ConfigError("condition_frame_length", condition_frames, remedy)
    if not 0 <= condition_edit <= 1:
        raise ConfigError("condition_frame_edit", condition_edit, "use a number from 0 to 1")
    prompts = [prompt] if isinstance(prompt, str | Prompt) else list(prompt)
    if not prompts:
        raise ConfigError("prompt", prompt, "give at least one")
    parsed, all_conditions, all_references = [], [], []
    shared = parse_mask_strategy(conditions) if isinstance(conditions, str) else list(conditions or [])
    for one in prompts:
        one = parse_prompt(one, loops) if isinstance(one, str) else one
        one = Prompt(one.texts, one.references or list(references or []), one.conditions or shared)
        one.check(loops)
        placed, sources = number_references(one.conditions, one.references)
        check_conditions(placed, [reference_frames(source) for source in sources], num_frames, loops)
        parsed.append(one)
        all_conditions.append(placed)
        all_references.append(sources)
    return _Request(
        parsed, all_conditions, all_references, num_frames, *size, float(fps), loops,
        condition_frames if loops > 1 else 0,
    )  # fmt: skip


def in_slices(autoencoder: FrameAutoencoder, code, frames: Tensor, pixels: int) -> Tensor:
    """code(frames) [B, C, T, ., .], as many frames at a time as hold CODED_PIXELS, fewer where those do not fit.

    Args:
        pixels: of a frame.
    """
    before = autoencoder.micro_batch_size
    count = before if isinstance(before, int) else max(1, CODED_PIXELS // pixels)
    try:
        while True:
            autoencoder.micro_batch_size = count
            try:
                return code(frames)
            except torch.OutOfMemoryError:
                if count == 1:
                    raise
            torch.cuda.empty_cache()
            count //= 2
    finally:
        autoencoder.micro_batch_size = before


def _pixels(video: Tensor) -> np.ndarray:
    """uint8 [B, T, H, W, 3] of videos [B, 3, T, H, W] in [-1, 1]."""
    return np.stack([to_pixels(one) for one in video])


@contextmanager
def evaluated(model: torch.nn.Module):
    """The model in evaluation mode, and afterwards as it was."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def _check_generators(generator, batch: int):
    if generator is None or isinstance(generator, torch.Generator):
        return generator
    generators = list(generator)
    if len(generators) != batch:
        raise ConfigError("generator", len(generators), f"give one, or one for each of the {batch} prompts")
    return generators


def _noise(shape: tuple[int, ...], generators, device: torch.device) -> Tensor:
    """Standard normal [B, C, T, h, w] float32, each sample from its own generator where there are several."""
    if isinstance(generators, list):
        return torch.cat([randn_tensor((1, *shape[1:]), generator=g, device=device) for g in generators])
    return randn_tensor(shape, generator=generators, device=device)
