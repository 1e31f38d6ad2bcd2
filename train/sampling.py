"""Samples of fixed prompts while a model trains, of the same noise every time, so that progress can be watched."""

import dataclasses
import shutil
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from stdit_fast.diffusion import make_scheduler
from stdit_fast.diffusion.sampling import check_settings
from stdit_fast.encoders.autoencoder import FrameAutoencoder
from stdit_fast.encoders.text import TextEncoder
from stdit_fast.errors import ConfigError
from stdit_fast.media.files import whole_file
from stdit_fast.media.pictures import sheet
from stdit_fast.media.pixels import from_pixels, to_pixels
from stdit_fast.media.write import VideoWriter
from stdit_fast.parallel.processes import Processes
from stdit_fast.sample.pipeline import STDiT2Pipeline, check_request
from stdit_fast.sample.prompts import parse_prompt
from stdit_fast.sample.sizes import output_size
from stdit_fast.train.checkpoint import TrainState
from stdit_fast.train.config import SamplingConfig, TrainConfig, resolutions_file
from stdit_fast.train.randomness import sample_rng

FRAMES_PER_ROW = 8  # of the contact sheet
TITLE_LENGTH = 60


@dataclass(frozen=True)
class Sample:
    """What became of a prompt.

    Attributes:
        number, text: the prompt's.
        pixels: uint8 [T, H, W, 3]; None where it failed.
        error: why it failed.
    """

    number: int
    text: str
    pixels: np.ndarray | None
    error: str | None = None

    @property
    def title(self) -> str:
        """The number and the beginning of the text."""
        return f"{self.number} {textwrap.shorten(self.text, TITLE_LENGTH, placeholder=' …')}"


class Sampling:
    """The prompts of a run, dealt to its processes.

    Args:
        config: of the run, checked.
        state: whose model is sampled, with the averaged weights where they are kept.
        autoencoder, text_encoder: those of the training.
        processes: they share the prompts.
    """

    def __init__(
        self,
        config: TrainConfig,
        state: TrainState,
        autoencoder: FrameAutoencoder,
        text_encoder: TextEncoder,
        processes: Processes,
    ):
        settings = config.sampling
        self.prompts = [parse_prompt(text) for text in settings.prompts]
        self.seed = settings.seed
        self.state, self.autoencoder, self.text_encoder, self.processes = state, autoencoder, text_encoder, processes
        self._scheduler = settings.scheduler, config.scheduler.num_timesteps
        height, width = _size(config)
        self._settings = dict(
            height=height,
            width=width,
            num_frames=settings.num_frames,
            fps=settings.fps,
            num_inference_steps=settings.num_sampling_steps,
            guidance_scale=settings.guidance_scale,
            guidance_channels=settings.guidance_channels,
            cuda_graphs=False,  # they would serve the few steps of a clip, and hold memory that training wants
        )

    def run(self) -> list[Sample]:
        """A sample of each prompt, in order, on every process; all take part. The training's state is left as it was.

        A prompt that fails, whatever the reason, is answered as such.
        """
        # Made anew each time: both would hold memory of their last call.
        scheduler = make_scheduler(*self._scheduler)
        pipeline = STDiT2Pipeline.of(self.state.model, self.autoencoder, self.text_encoder, scheduler)
        pipeline.set_progress_bar_config(disable=True)
        own = range(self.processes.rank, len(self.prompts), self.processes.world_size)
        with averaged(self.state):
            samples = {number: self._sample(pipeline, number) for number in own}
        del pipeline, scheduler
        if self.processes.device.type == "cuda":
            torch.cuda.empty_cache()  # training's allocations have other sizes
        everyone = {number: s for part in self.processes.gather_objects(samples) for number, s in part.items()}
        return [everyone[number] for number in range(len(self.prompts))]

    def _sample(self, pipeline: STDiT2Pipeline, number: int) -> Sample:
        text = self.prompts[number].text(0)
        key = int(sample_rng(self.seed, 0, number, "sampling").integers(2**63))
        generator = torch.Generator().manual_seed(key)  # the CPU's: GPUs of other models draw other numbers
        try:
            (clip,) = pipeline.clips(self.prompts[number], generator=generator, **self._settings)
            return Sample(number, text, to_pixels(clip[0]))
        except Exception as error:  # of any kind: no picture is worth the run
            return Sample(number, text, None, f"{type(error).__name__}: {error}")


@contextmanager
def averaged(state: TrainState) -> Iterator[None]:
    """The model with its averaged weights, where they are kept; afterwards with its own, bit for bit.

    Values are copied in place, since CUDA graphs know parameters by address. All processes take part.
    """
    if state.ema is None:
        yield
        return
    parameters = [p.detach() for p in state.model.parameters() if p.requires_grad]
    # On the CPU: a GPU without room for them would leave its process out of the gathering, and the others hanging.
    own = [p.to("cpu", copy=True) for p in parameters]
    try:
        for p, average in zip(parameters, state.optimizer.gather(state.ema.averages), strict=True):
            p.copy_(average)
        yield
    finally:
        for p, value in zip(parameters, own, strict=True):
            p.copy_(value)


def write_sheets(samples: Sequence[Sample], paths: Sequence[Path]) -> None:
    """The contact sheet of the samples that did not fail, if there are any, under each of the names."""
    rows = [(sample.text, from_pixels(sample.pixels)) for sample in samples if sample.pixels is not None]
    if not rows:
        return
    sheet(rows, FRAMES_PER_ROW, paths[0])
    for path in paths[1:]:
        with whole_file(path) as draft:
            shutil.copyfile(paths[0], draft)


def check_sampling(config: TrainConfig) -> None:
    """Holds `config.sampling` against what the pipeline takes, and opens the references. No weights are needed.

    Raises:
        ConfigError: the first setting or prompt that cannot be.
    """
    settings, number = config.sampling, None
    if not settings.prompts:
        raise ConfigError("sampling.prompts", settings.prompts, "give at least one, or use sampling.every: 0")
    try:
        size = _size(config)
        scheduler = make_scheduler(settings.scheduler, config.scheduler.num_timesteps)
        check_settings(
            scheduler,
            settings.num_sampling_steps,
            settings.guidance_scale,
            settings.guidance_channels,
            config.model.in_channels,
        )
        VideoWriter("sample.gif", settings.fps)  # which opens no file before the first frame
        for number, prompt in enumerate(settings.prompts):  # noqa: B007 (for the message)
            check_request(prompt, settings.num_frames, size, settings.fps)
    except ConfigError as error:
        of_prompt = number is not None and error.key not in {f.name for f in dataclasses.fields(SamplingConfig)}
        key = f"sampling.prompts[{number}].{error.key}" if of_prompt else f"sampling.{error.key}"
        raise ConfigError(key, error.value, error.remedy) from error


def _size(config: TrainConfig) -> tuple[int, int]:
    """(height, width) of the samples, in pixels."""
    s = config.sampling
    return output_size(s.resolution, s.aspect_ratio, s.height, s.width, resolutions_file(config.resolutions))
