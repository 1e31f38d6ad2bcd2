"""Whether tables of batch sizes hold: the trainer itself runs every bucket at its size, in a mixed order, many times.

    python -m stdit_fast.benchmarks.sweep_check --config train/configs/stage2.yaml --table stage2.yaml --rounds 3

A round is one step of each bucket, in a random order: what one bucket leaves behind in the allocator is what the next
one meets. Batches are random, of the aspect ratio with the most tokens and with full captions; everything else is
training: plugin, optimizer, average, and the encoders where the table has them (of real size, random weights). With
`--original` the config's own batch sizes run too. Printed are the step times, their spread over buckets and how often
memory ran out.
"""

import argparse
import csv
import random
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import torch

from stdit_fast.benchmarks.records import Record, append
from stdit_fast.benchmarks.sweep import T5_CHANNELS, read_config, worst_shapes
from stdit_fast.benchmarks.sweep_model import GIB, Shape, imbalance, spread
from stdit_fast.errors import ConfigError
from stdit_fast.train import bucket_tables
from stdit_fast.train.bucket_tables import BucketTable
from stdit_fast.train.buckets import Buckets
from stdit_fast.train.config import TrainConfig, resolutions_file
from stdit_fast.train.features import StoredTexts
from stdit_fast.train.sampler import BatchRequest
from stdit_fast.train.trainer import Trainer

WARMUP = 2  # steps of each bucket that compile and grow the allocator's pools: `--warm-up`


class CheckTrainer(Trainer):
    """The trainer without data of its own: it is given batches, and encoders of real size or none."""

    encoders = False
    metrics = None

    def _build_encoders(self, data):
        if not self.encoders:
            return None, StoredTexts(T5_CHANNELS, self.config.text_encoder.model_max_length)
        from stdit_fast.benchmarks.sweep_encoders import random_encoders
        from stdit_fast.train.build import encoder_dtype

        length, frames = self.config.text_encoder.model_max_length, self.config.vae.micro_batch_size
        return random_encoders(self.device, encoder_dtype(self.device), length, frames)


def make_batch(shape: Shape, size: int, bucket: int, *, tokens: int, channels: int, pixels: bool, pin: bool) -> dict:
    """A batch as the data set makes it, random, with full captions; every second video has a condition frame."""
    frames, rows, columns = shape.frames, shape.height // 8, shape.width // 8
    x_mask = torch.ones(size, frames, dtype=torch.bool)
    x_mask[::2, 0] = frames == 1
    one, noise = torch.ones(size), torch.randn(size, 4, frames, rows, columns)
    batch = {
        "noise": noise,
        "x_mask": x_mask,
        "timestep": torch.randint(1000, (size,)),
        "drop_caption": torch.zeros(size, dtype=torch.bool),
        "num_frames": one * frames,
        "height": one * shape.height,
        "width": one * shape.width,
        "ar": one * shape.height / shape.width,
        "fps": one * 8,
        "samples": torch.zeros(size, dtype=torch.int64),
    }
    if pixels:
        batch["pixels"] = torch.randint(256, (size, frames, shape.height, shape.width, 3), dtype=torch.uint8)
        batch["posterior_noise"] = torch.randn_like(noise)
    else:
        batch["latents"] = torch.randn_like(noise)
        batch["text_states"] = torch.randn(tokens, channels).bfloat16().repeat(size, 1)
        batch["tokens"] = torch.full((size,), tokens)
    if pin:
        batch = {key: value.pin_memory() for key, value in batch.items()}
    none = torch.empty(0, dtype=torch.int64).numpy()
    request = BatchRequest(0, 0, bucket, batch["samples"].numpy(), none, size, step_batches=1)
    return batch | {"text": [""] * size, "bucket": bucket, "request": request, "bad": []}


def check(
    trainer: Trainer, shapes: list[Shape], buckets: Buckets, rounds: int, warmup: int, seed: int = 0
) -> dict[Shape, tuple[list[float], float]]:
    """Seconds of each step after the first `warmup` of a bucket, and the highest peak in GiB, of each shape."""
    trainer.data.buckets = buckets
    on_gpu = trainer.device.type == "cuda"
    index = {(b.resolution, b.num_frames, b.height, b.width): i for i, b in enumerate(buckets)}
    seconds, peaks, order = defaultdict(list), defaultdict(float), random.Random(seed)
    for number in range(rounds + warmup):
        for shape in order.sample(shapes, len(shapes)):
            place = index[shape.resolution, shape.frames, shape.height, shape.width]
            batch = make_batch(
                shape,
                buckets[place].batch_size,
                place,
                tokens=trainer.config.text_encoder.model_max_length,
                channels=trainer.text_encoder.channels,
                pixels=trainer.vae is not None,
                pin=on_gpu,
            )
            if on_gpu:
                torch.cuda.reset_peak_memory_stats()
                torch.cuda.synchronize()
            started = time.perf_counter()
            trainer.train_step(iter([batch]))
            trainer.settle()
            if on_gpu:
                torch.cuda.synchronize()
                peaks[shape] = max(peaks[shape], torch.cuda.max_memory_allocated() / GIB)
            if number >= warmup:
                seconds[shape].append(time.perf_counter() - started)
    return {shape: (seconds[shape], peaks[shape]) for shape in shapes}


def build_trainer(config: TrainConfig, folder: Path, encoders: bool) -> CheckTrainer:
    """A trainer of the config's model, on a table of images that nobody opens."""
    with open(folder / "table.csv", "w", newline="") as file:
        rows = [(f"{i}.png", "", 1, 144, 256, 1) for i in range(8)]
        csv.writer(file).writerows([("path", "text", "num_frames", "height", "width", "fps"), *rows])
    config = replace(
        config,
        buckets={"144p": {1: [1.0, 1]}},
        bucket_sizes="config",
        dataset=replace(config.dataset, data_path=str(folder / "table.csv")),
        features=replace(config.features, path=None),
        validation=replace(config.validation, every=0),
        sampling=replace(config.sampling, every=0),
        outputs=str(folder / "run"),
    )
    CheckTrainer.encoders = encoders
    return CheckTrainer(config)


def describe(name: str, found: dict[Shape, tuple[list[float], float]], steps: int, out_of_memory: int) -> str:
    """A line: how many steps, how even, how often memory ran out."""
    medians = [statistics.median(seconds) for seconds, _ in found.values()]
    peak = max(peak for _, peak in found.values())
    return (
        f"{name}: {steps} steps of {len(found)} buckets, {min(medians):.3f} to {max(medians):.3f} s, spread "
        f"{spread(medians):.1%}, slowest over mean {imbalance(medians):.1%}, peak {peak:.1f} GiB, "
        f"out of memory {out_of_memory} times"
    )


def run_table(trainer: Trainer, name: str, config: TrainConfig, table: BucketTable | None, args) -> None:
    """Checks one table, or a config's own sizes; prints a line and appends records."""
    shapes = list(worst_shapes(config))
    measured = None if table is None else table.buckets
    buckets = Buckets(config.buckets, resolutions_file(config.resolutions), measured)
    before, rounds = trainer.pieces.count, args.rounds if table is not None else 1
    found = check(trainer, shapes, buckets, rounds, args.warm_up)
    line = describe(name, found, (rounds + args.warm_up) * len(shapes), trainer.pieces.count - before)
    print(line, flush=True)
    if args.out:
        sizes = {(b.resolution, b.num_frames): b for b in buckets}
        records = []
        for shape, (seconds, peak) in found.items():
            bucket = sizes[shape.resolution, shape.frames]
            record = Record.of_times("sweep_check", f"{name} {shape.name}", "trainer", [1000 * s for s in seconds])
            record.peak_gib = round(peak, 2) if peak else None
            record.notes = {
                "batch": bucket.batch_size,
                "checkpointed": bucket.checkpointed,
                "table_seconds": bucket.seconds,
            }
            record.notes["out_of_memory_of_all"] = trainer.pieces.count - before
            records.append(record)
        append(args.out, records)
    trainer.pieces.limits.clear()
    trainer.pieces.known.clear()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", nargs="+", type=Path, required=True)
    parser.add_argument("--table", nargs="+", type=Path, required=True, help="one for each config, in that order")
    parser.add_argument("--rounds", type=int, default=3, help="steps of each bucket that count")
    parser.add_argument("--warm-up", type=int, default=WARMUP, help="steps of each bucket before them")
    parser.add_argument("--original", action="store_true", help="run the configs' own batch sizes too, one round")
    parser.add_argument("--out", help="results file to append to")
    args = parser.parse_args(arguments)
    if len(args.config) != len(args.table):
        raise ConfigError("--table", [str(t) for t in args.table], f"name {len(args.config)}, one for each config")
    configs = [read_config(path) for path in args.config]
    tables = [bucket_tables.read(path) for path in args.table]
    if len({table.encoders for table in tables}) > 1:
        raise ConfigError("--table", [str(t) for t in args.table], "some have encoders in the step; check these apart")
    for config, table in zip(configs, tables, strict=True):
        missing = table.missing((s.resolution, s.frames) for s in worst_shapes(config))
        if missing:
            raise ConfigError("--table", str(table.path), f"it does not know {', '.join(missing)}")
    with tempfile.TemporaryDirectory() as folder:
        trainer = build_trainer(configs[0], Path(folder), tables[0].encoders)
        for path, config, table in zip(args.table, configs, tables, strict=True):
            run_table(trainer, path.stem, config, table, args)
            if args.original:
                run_table(trainer, f"{path.stem} original sizes", config, None, args)
        trainer.processes.close()
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ConfigError as error:
        sys.exit(f"error: {error}")
