"""`python -m stdit_fast.sample --model PATH --prompt TEXT ... [--config FILE] [--any_key value ...]`.

Under `torchrun --nproc_per_node N` the N GPUs share each video.
"""

import dataclasses
import hashlib
import importlib.metadata
import json
import logging
import os
import re
import shutil
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import diffusers
import torch
import transformers
from tqdm import tqdm

from stdit_fast.arguments import start_log
from stdit_fast.diffusion.sampling import check_settings
from stdit_fast.diffusion.schedulers import make_scheduler
from stdit_fast.encoders.autoencoder import LATENT_CHANNELS
from stdit_fast.errors import ConfigError
from stdit_fast.media.write import VideoWriter, read_metadata
from stdit_fast.parallel.groups import SequenceGroups, check_size
from stdit_fast.parallel.processes import Processes, launch, launched_processes
from stdit_fast.sample.loading import Source, find_source, load_pipeline
from stdit_fast.sample.pipeline import STDiT2Pipeline, check_request
from stdit_fast.sample.prompts import Prompt, read_prompts
from stdit_fast.sample.settings import Settings, parse
from stdit_fast.sample.sizes import output_size

logger = logging.getLogger("stdit_fast.sample")

# Keys that do not belong to one sample, and those that say by way of others what it is.
NOT_OF_A_SAMPLE = {"prompt_path", "samples", "batch_size", "outputs", "format", "resume", "save_pipeline"}
NOT_OF_A_SAMPLE |= {"weights", "resolution", "aspect_ratio", "resolutions"}
SLUG_LENGTH = 40
NUMBERED = re.compile(r"(\d+)-")


def main(arguments: list[str] | None = None) -> int:
    """Makes samples and prints their files' names.

    Returns:
        0 when done, 1 when that failed on the way, 2 for settings that cannot be, 130 when interrupted.
    """
    start_log()
    if not sys.stderr.isatty():
        diffusers.utils.logging.disable_progress_bar()
        transformers.utils.logging.disable_progress_bar()
    status = 2
    try:
        settings = parse(arguments)
        source = find_source(settings)
        samples = plan(settings, source)
        processes = _processes(settings)
        if settings.resume and (processes is None or processes.is_main):
            samples = skip_existing(samples, settings)
        if processes is not None:
            samples = processes.gather_objects(samples)[0]
        if samples or settings.save_pipeline is not None:
            pipeline = load_pipeline(source, settings.backend)
            if processes is not None:
                size = processes.world_size
                pipeline.share(SequenceGroups(processes, [size], "auto")[size])
            status = 1
            if settings.save_pipeline is not None and pipeline.writes:
                save_whole(pipeline, Path(settings.save_pipeline))
            make(pipeline, samples, settings)
        if processes is not None:
            processes.close()
    except (ConfigError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return status
    except KeyboardInterrupt:
        print("interrupted; the same command goes on", file=sys.stderr)
        return 130
    return 0


def _processes(settings: Settings) -> Processes | None:
    """Those that a launcher has started to share each video; None: this one is alone.

    Raises:
        ConfigError: as many of them as cannot share a video of that length.
    """
    count = launched_processes()
    if count == 1:
        return None
    check_size(count, count)
    if settings.num_frames < count:
        remedy = f"each of the {count} processes needs a frame at least; start one process for images"
        raise ConfigError("num_frames", settings.num_frames, remedy)
    return launch(settings.seed)


# ------------------------------------------------------------------ planning


@dataclass
class Sample:
    """One file to make.

    Attributes:
        prompt: checked.
        settings: those that make it again, given as a `--config`.
        model: what the command line called them.
    """

    prompt: Prompt
    settings: dict
    model: str

    @property
    def slug(self) -> str:
        """The prompt's first words, for the file's name."""
        words = re.sub(r"[\W_]+", "-", self.prompt.texts[0].lower()).strip("-")
        if len(words) > SLUG_LENGTH:
            words = words[: SLUG_LENGTH + 1].rpartition("-")[0] or words[:SLUG_LENGTH]
        return words or "sample"

    def metadata(self, batch_size: int) -> dict[str, str]:
        """What its file says, made in a batch of this size (by which matrix products are rounded)."""
        return {
            "prompt": self.settings["prompt"][0],
            "seed": str(self.settings["seed"]),
            "model": self.model,
            "settings": json.dumps(self.settings | {"batch_size": batch_size}),
            "version": f"stdit-fast {importlib.metadata.version('stdit-fast')}, torch {torch.__version__}",
        }


def sample_seed(seed: int, prompt: int, sample: int) -> int:
    """The seed of a sample of a prompt, both counted from 0.

    The first sample of the first prompt has the seed itself, so that any sample's seed repeats it alone. The others'
    are the first 32 bits of SHA-256 of "seed,prompt,sample": further prompts and samples change no earlier ones.
    """
    if prompt == sample == 0:
        return seed
    return int.from_bytes(hashlib.sha256(f"{seed},{prompt},{sample}".encode()).digest()[:4], "big")


def plan(settings: Settings, source: Source) -> list[Sample]:
    """All samples, those of the first prompt first.

    Raises:
        ConfigError: a prompt, size or number of steps that cannot be.
    """
    lines = settings.prompt + (read_prompts(settings.prompt_path) if settings.prompt_path else [])
    if not lines:
        return []
    s = settings
    size = output_size(s.resolution, s.aspect_ratio, s.height, s.width, s.resolutions)
    scheduler = make_scheduler(source.scheduler, source.num_train_timesteps)
    check_settings(scheduler, s.num_sampling_steps, s.guidance_scale, s.guidance_channels, LATENT_CHANNELS)
    prompts = check_request(
        lines, s.num_frames, size, s.fps, s.reference, s.mask_strategy, s.loops, s.condition_frame_length,
        s.condition_frame_edit,
    ).prompts  # fmt: skip
    common = {key: value for key, value in dataclasses.asdict(s).items() if key not in NOT_OF_A_SAMPLE}
    common |= {"model": source.path, "vae": source.vae, "text_encoder": source.text_encoder}
    common |= {"height": size[0], "width": size[1], "scheduler": source.scheduler}
    common |= {"device": str(source.device), "dtype": source.dtype}
    common = {key: value for key, value in common.items() if value not in (None, [])}
    return [
        Sample(prompt, common | {"prompt": [line], "seed": sample_seed(s.seed, j, i)}, s.model)
        for j, (line, prompt) in enumerate(zip(lines, prompts, strict=True))
        for i in range(s.samples)
    ]


def skip_existing(samples: list[Sample], settings: Settings) -> list[Sample]:
    """The samples of which the folder has no file of these settings; prints the names of the others' files."""
    existing = {}
    for path in sorted(Path(settings.outputs).glob(f"*.{settings.suffix}")):
        try:
            existing[_identity(read_metadata(path))] = path
        except (ConfigError, LookupError, TypeError, ValueError):
            continue  # not of this command
    wanted = []
    for sample in samples:
        path = existing.get(_identity(sample.metadata(batch_size=1)))
        if path is None:
            wanted.append(sample)
        else:
            print(path)
    if len(wanted) < len(samples):
        logger.info("%d of %d files were there already", len(samples) - len(wanted), len(samples))
    return wanted


def _identity(metadata: dict[str, str]) -> str:
    """What is the same for the same sample, in whatever batch it was made."""
    settings = {k: v for k, v in json.loads(metadata["settings"]).items() if k != "batch_size"}
    return json.dumps([settings, metadata["version"]], sort_keys=True)


# -------------------------------------------------------------------- making


def make(pipeline: STDiT2Pipeline, samples: Sequence[Sample], settings: Settings) -> None:
    """Writes the samples' files, batch by batch, and prints their names.

    Raises:
        ConfigError: a single sample that does not fit into memory.
    """
    done, batch_size = 0, settings.batch_size
    # Bars are for terminals alone.
    quiet = None if pipeline.writes else True
    pipeline.set_progress_bar_config(desc="denoising", position=1, leave=False, disable=quiet)
    with tqdm(total=len(samples), unit="file", disable=quiet) as bar:
        while done < len(samples):
            batch = samples[done : done + batch_size]
            paths = _new_paths(batch, settings)
            if not _fits(pipeline, batch, paths, settings):
                if len(batch) == 1:
                    raise _does_not_fit(batch[0], 1)
                batch_size = len(batch) // 2
                logger.warning("%d samples do not fit into memory at once: going on with %d", len(batch), batch_size)
                continue
            for path in paths if pipeline.writes else []:
                tqdm.write(str(path))
            done += len(paths)
            bar.update(len(paths))


def _fits(pipeline: STDiT2Pipeline, batch: Sequence[Sample], paths: Sequence[Path], settings: Settings) -> bool:
    """Writes a batch if it fits into memory, which is free again where it does not."""
    try:
        write_batch(pipeline, batch, paths, settings)
        return True
    except torch.OutOfMemoryError:
        if pipeline.shared:  # the others wait inside the batch, and could not agree on another size
            raise _does_not_fit(batch[0], len(batch), shared=True) from None
        # And after this line the error no longer holds the batch's tensors
    pipeline.release()  # nor its CUDA graphs theirs
    torch.cuda.empty_cache()
    return False


def _does_not_fit(sample: Sample, count: int, shared: bool = False) -> ConfigError:
    s = sample.settings
    size = f"{s['num_frames']} frames of {s['height']} x {s['width']} (height x width)"
    what = f"one sample of {size} does" if count == 1 else f"{count} samples of {size} do"
    remedy = "make it shorter or smaller" if count == 1 else "use fewer at once"
    if shared:
        remedy += ", or share it among more GPUs"
    return ConfigError("batch_size", count, f"{what} not fit into memory; {remedy}")


def write_batch(pipeline: STDiT2Pipeline, batch: Sequence[Sample], paths: Sequence[Path], settings: Settings) -> None:
    """Samples a batch; its frames go into the files as they come, and the files appear whole or not at all."""
    first = batch[0].settings
    clips = pipeline.clips(
        [sample.prompt for sample in batch],
        num_frames=settings.num_frames,
        height=first["height"],
        width=first["width"],
        fps=settings.fps,
        num_inference_steps=settings.num_sampling_steps,
        guidance_scale=settings.guidance_scale,
        guidance_channels=settings.guidance_channels,
        loops=settings.loops,
        condition_frame_length=settings.condition_frame_length,
        condition_frame_edit=settings.condition_frame_edit,
        # On the CPU, so that a seed means the same noise on every machine.
        generator=[torch.Generator().manual_seed(sample.settings["seed"]) for sample in batch],
        cuda_graphs=settings.cuda_graphs,
        decode=pipeline.writes,
    )
    if not pipeline.writes:
        for _ in clips:  # another rank has them, too
            pass
        return
    with ExitStack() as stack:
        writers = [
            stack.enter_context(VideoWriter(path, settings.fps, sample.metadata(len(batch))))
            for path, sample in zip(paths, batch, strict=True)
        ]
        for clip in clips:
            for writer, video in zip(writers, clip, strict=True):
                writer.write(video)


def _new_paths(batch: Sequence[Sample], settings: Settings) -> list[Path]:
    """Names that no file has: numbers go on from the highest in the folder."""
    folder = Path(settings.outputs)
    names = os.listdir(folder) if folder.is_dir() else []
    number = max((int(match[1]) + 1 for name in names if (match := NUMBERED.match(name))), default=0)
    return [folder / f"{number + k:04d}-{sample.slug}.{settings.suffix}" for k, sample in enumerate(batch)]


def save_whole(pipeline: STDiT2Pipeline, folder: Path) -> None:
    """Saves the pipeline; the folder appears whole or not at all."""
    folder = folder.absolute()
    draft = folder.with_name(f".{folder.name}.{os.getpid()}")
    try:
        pipeline.save_pretrained(draft)
        os.replace(draft, folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    logger.info("saved the pipeline: %s", folder)


if __name__ == "__main__":
    sys.exit(main())
