"""What a trained model does: clips of its training set beside samples from text, from an image, from a beginning.

    python -m stdit_fast.train.showcase --checkpoint outputs/demo/run/checkpoints/step-00000600 --out samples

It writes a contact sheet, samples.png, and every sample as a video.
"""

import argparse
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from stdit_fast.errors import run_command
from stdit_fast.media.pictures import sheet
from stdit_fast.media.read import probe
from stdit_fast.media.write import VideoWriter
from stdit_fast.sample import Condition, Prompt, STDiT2Pipeline
from stdit_fast.sample.loading import find_source, load_pipeline
from stdit_fast.sample.references import load_reference
from stdit_fast.sample.settings import Settings
from stdit_fast.train.buckets import Bucket, Buckets
from stdit_fast.train.checkpoint import find
from stdit_fast.train.config import resolutions_file
from stdit_fast.train.metadata import load_metadata

logger = logging.getLogger("showcase")

FRAMES_PER_ROW = 8


@dataclass
class Clip:
    """A clip as training cuts it: [3, T, H, W] in [-1, 1], at the rate that the model is told."""

    caption: str
    video: Tensor
    fps: float


@dataclass
class Sample:
    """One row of the sheet."""

    name: str
    title: str
    video: Tensor
    fps: float


def training_clips(config: dict, bucket: Bucket, count: int) -> list[Clip]:
    """The beginnings of clips of the training table with the bucket's shape, each of another source.

    Args:
        config: of the run, as its state.json holds it.
        bucket: the shape.
        count: of clips at most.
    """
    dataset, chosen = config["dataset"], {}
    metadata = load_metadata(dataset["data_path"], cache_dir=dataset["cache_dir"], progress=False)
    interval = dataset["frame_interval"]
    long_enough = metadata.num_frames > bucket.num_frames * interval
    shape = metadata.height / metadata.width
    for i in (long_enough & (abs(shape / (bucket.height / bucket.width) - 1) < 0.05)).nonzero()[0]:
        row = metadata.row(int(i))
        chosen.setdefault(Path(row.path).name.split("-")[0], row)
    clips = []
    for row in list(chosen.values())[:count]:
        video = load_reference(row.path, bucket.height, bucket.width, bucket.num_frames * interval)
        clips.append(Clip(row.text, video[:, ::interval], probe(row.path).fps / interval))
    return clips


def show(pipeline: STDiT2Pipeline, clips: list[Clip], bucket: Bucket, steps: int, guidance: float) -> Iterator[Sample]:
    """Clips and what the pipeline makes of their captions, first frames and beginnings, with the seed 0."""
    frames, quarter = bucket.num_frames, max(1, bucket.num_frames // 4)  # the most that training conditions on
    settings = dict(
        num_frames=frames, height=bucket.height, width=bucket.width, num_inference_steps=steps, guidance_scale=guidance
    )

    def make(clip: Clip, conditions: list[Condition], **more) -> Tensor:
        generator = torch.Generator(pipeline.device).manual_seed(0)
        prompt = Prompt([clip.caption], [clip.video] if conditions else [], conditions)
        parts = pipeline.clips(prompt, generator=generator, fps=clip.fps, **settings, **more)
        return torch.cat([part[0].cpu() for part in parts], dim=1)

    for number, clip in enumerate(clips):
        encoded = pipeline.autoencoder.decode(pipeline.autoencoder.encode(clip.video[None]))[0].cpu()
        yield Sample(f"{number}-clip", f"The clip, through the autoencoder: {clip.caption}", encoded, clip.fps)
        yield Sample(f"{number}-text", "From its text alone", make(clip, []), clip.fps)
        yield Sample(f"{number}-image", "From its text and its first frame", make(clip, [Condition(0)]), clip.fps)
        longer = make(clip, [Condition(0, length=quarter)], loops=2, condition_frame_length=quarter)
        title = f"Its first {quarter} of {frames} frames, extended to {longer.shape[1]}"
        yield Sample(f"{number}-extended", title, longer, clip.fps)


def showcase(checkpoint: Path, out: Path, *, count: int = 3, steps: int = 100, guidance: float = 2.0) -> Path:
    """Samples a run's checkpoint on its own training clips; answers the contact sheet's path.

    Args:
        checkpoint: a folder of a run's checkpoints/, or the run's, for its newest one.
        out: folder for samples.png and the videos.
        count: of clips; steps, guidance: of the sampler.

    Raises:
        ConfigError: no checkpoint there, or one whose encoders or data cannot be read.
    """
    checkpoint = find(checkpoint)
    config = json.loads((checkpoint / "state.json").read_text())["config"]
    pipeline = load_pipeline(find_source(Settings(model=str(checkpoint), scheduler="iddpm")))
    pipeline.set_progress_bar_config(leave=False)
    bucket = _largest(config)
    clips = training_clips(config, bucket, count)
    rows = []
    for sample in show(pipeline, clips, bucket, steps, guidance):
        with VideoWriter(out / f"{sample.name}.mp4", sample.fps, {"prompt": sample.title}) as writer:
            writer.write(sample.video)
        rows.append((sample.title, sample.video))
    sheet(rows, FRAMES_PER_ROW, out / "samples.png")
    return out / "samples.png"


def _largest(config: dict) -> Bucket:
    """The widescreen bucket of the most frames, then the most pixels."""
    table = {name: {int(frames): entry for frames, entry in row.items()} for name, row in config["buckets"].items()}
    buckets = Buckets(table, resolutions_file(config["resolutions"]))
    wide = [b for b in buckets if abs(b.height / b.width - 9 / 16) < 0.05]
    return max(wide or buckets, key=lambda b: (b.num_frames, b.height * b.width))


def main() -> int:
    parser = argparse.ArgumentParser(prog="stdit_fast.train.showcase", description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--count", type=int, default=3, help="clips")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--guidance", type=float, default=2.0)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    path = showcase(args.checkpoint, args.out, count=args.count, steps=args.steps, guidance=args.guidance)
    logger.info("samples: %s", path)
    return 0


if __name__ == "__main__":
    raise SystemExit(run_command(main))
