"""Whether tables of batch sizes hold: the trainer itself runs every bucket at its size, in a mixed order, many times.

    python -m stdit_fast.benchmarks.sweep_check --config train/configs/stage2.yaml --table stage2.yaml --rounds 3

A round is one step of each bucket, in a random order: what one bucket leaves behind in the allocator is what the next
one meets. Batches are random, of the aspect ratio with the most tokens and with full captions; everything else is
training: plugin, optimizer, average, and the encoders where the table has them (of real size, random weights). With
`--original` the config's own batch sizes run too. Printed are the step times, their spread over buckets and how often
memory ran out. `--metrics FOLDER` keeps the trainer's own line of every step, TABLE.jsonl, for `plan --check`, with
what the step did with memory. Lines are written as steps end, `--out` after each round, so that a run that is cut keeps
what it has. `--memory-gib` holds it to a smaller GPU's memory.
"""

import argparse
import csv
import json
import math
import random
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from stdit_fast.benchmarks.records import Record, append, device_name
from stdit_fast.benchmarks.sweep import T5_CHANNELS, read_config, worst_shapes
from stdit_fast.benchmarks.sweep_model import GIB, Shape, imbalance, spread
from stdit_fast.errors import ConfigError, run_command
from stdit_fast.media.files import whole_file
from stdit_fast.model import memory
from stdit_fast.train import bucket_tables
from stdit_fast.train.bucket_tables import BucketTable
from stdit_fast.train.buckets import Buckets
from stdit_fast.train.config import TrainConfig, resolutions_file
from stdit_fast.train.features import StoredTexts
from stdit_fast.train.out_of_memory import Pieces
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


class StepLines:
    """In place of a run's record: the trainer's numbers of each step, a line each, as metrics.jsonl has them.

    Args:
        path: a file, which is begun anew.
        trainer: whose memory is told too.
    """

    def __init__(self, path: Path, trainer: Trainer):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")
        self._path, self._trainer = path, trainer

    def step(self, step: int, values: dict, bucket: str) -> None:
        line = {"step": step, "bucket": bucket} | values | memory_of_step(self._trainer)
        with open(self._path, "a") as file:
            file.write(json.dumps(line) + "\n")

    def message(self, text: str) -> None:
        print(text, flush=True)


def memory_of_step(trainer: Trainer) -> dict:
    """What the last step did with memory; in GiB where there is a GPU.

    Returns:
        recomputed: blocks; kept_activations, cuda_graph: whether; peak_gib: allocated at most since the statistics were
        reset, reserved_gib: taken of the device now; flushes: times, in all, that the allocator had to give back what
        it kept before it found a piece that was large enough.
    """
    model = trainer.state.model
    found = {
        "recomputed": model.last_checkpointed,
        "kept_activations": bool(model.last_kept_activations),
        "cuda_graph": bool(model.last_graphed),
    }
    if trainer.device.type != "cuda":
        return found
    graphs = 0 if model.graphs is None else model.graphs.pool_bytes  # which does not count as allocated
    return found | {
        "peak_gib": round((torch.cuda.max_memory_allocated() + graphs) / GIB, 2),
        "reserved_gib": round(torch.cuda.memory_reserved() / GIB, 2),
        "flushes": torch.cuda.memory_stats().get("num_alloc_retries", 0),
    }


def make_batch(shape: Shape, size: int, bucket: int, *, text: torch.Tensor | None, tokens: int, pin: bool) -> dict:
    """A batch as the data set makes it, random, with full captions; every second video has a condition frame.

    Args:
        text: [size or more captions * tokens, channels] states, of which those of the batch are a view; None: pixels.
    """
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
    if text is None:
        batch["pixels"] = torch.randint(256, (size, frames, shape.height, shape.width, 3), dtype=torch.uint8)
        batch["posterior_noise"] = torch.randn_like(noise)
    else:
        batch["latents"] = torch.randn_like(noise)
        batch["tokens"] = torch.full((size,), tokens)
    if pin:
        batch = {key: value.pin_memory() for key, value in batch.items()}
    if text is not None:
        batch["text_states"] = text[: size * tokens]
    none = torch.empty(0, dtype=torch.int64).numpy()
    request = BatchRequest(0, 0, bucket, batch["samples"].numpy(), none, size, step_batches=1)
    return batch | {"text": [""] * size, "bucket": bucket, "request": request, "bad": []}


def check(
    trainer: Trainer,
    shapes: list[Shape],
    buckets: Buckets,
    rounds: int,
    warmup: int,
    seed: int = 0,
    metrics: Path | None = None,
    limit: float = math.inf,
    after_round: Callable[[dict[Shape, tuple[list[float], float]]], object] = lambda found: None,
) -> dict[Shape, tuple[list[float], float]]:
    """Seconds of each step after the first `warmup` of a bucket, and the highest peak in GiB, of each shape.

    Args:
        metrics: file that gets the trainer's own numbers of every step, as steps are made.
        limit: seconds after which no step begins. Buckets that had none but warming steps then have the last of these,
            and those that had none at all are left out.
        after_round: is given what there is so far after each round.
    """
    trainer.data.buckets = buckets
    on_gpu, tokens = trainer.device.type == "cuda", trainer.config.text_encoder.model_max_length
    index = {(b.resolution, b.num_frames, b.height, b.width): i for i, b in enumerate(buckets)}
    places = {s: index[s.resolution, s.frames, s.height, s.width] for s in shapes}
    text = None
    if trainer.vae is None:  # one memory for all batches: it takes longer to fill than to train on
        captions = max(buckets[place].batch_size for place in places.values())
        text = torch.randn(tokens, trainer.text_encoder.channels).bfloat16().repeat(captions, 1)
        text = text.pin_memory() if on_gpu else text
    seconds, peaks, order, batches = defaultdict(list), defaultdict(float), random.Random(seed), {}
    began = time.perf_counter()
    trainer.metrics = None if metrics is None else StepLines(metrics, trainer)

    def found() -> dict[Shape, tuple[list[float], float]]:
        return {s: (seconds[s][warmup:] or seconds[s][-1:], peaks[s]) for s in shapes if seconds[s]}

    for _ in range(rounds + warmup):
        for shape in order.sample(shapes, len(shapes)):
            if time.perf_counter() - began > limit:
                break
            if shape not in batches:
                size = buckets[places[shape]].batch_size
                batches[shape] = make_batch(shape, size, places[shape], text=text, tokens=tokens, pin=on_gpu)
            if on_gpu:
                torch.cuda.reset_peak_memory_stats()
                torch.cuda.synchronize()
            started = time.perf_counter()
            trainer.train_step(iter([batches[shape]]))
            trainer.settle()
            if on_gpu:
                torch.cuda.synchronize()
                peaks[shape] = max(peaks[shape], memory_of_step(trainer)["peak_gib"])
            seconds[shape].append(time.perf_counter() - started)
        if seconds:
            after_round(found())
    trainer.metrics = None
    return found()


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


def describe(name: str, found: dict[Shape, tuple[list[float], float]], steps: int, pieces: Pieces, before: int) -> str:
    """A line: how many steps, how even, how often memory ran out, and where.

    Args:
        pieces: what the trainer says of that; `before`: its count at the table's beginning.
    """
    if not found:
        return f"{name}: no step was made"
    medians = [statistics.median(seconds) for seconds, _ in found.values()]
    peak = max(peak for _, peak in found.values())
    at_once = ", ".join(f"{bucket} {most}" for bucket, most in pieces.limits.items())
    return (
        f"{name}: {steps} steps of {len(found)} buckets, {min(medians):.3f} to {max(medians):.3f} s, spread "
        f"{spread(medians):.1%}, slowest over mean {imbalance(medians):.1%}, peak {peak:.1f} GiB, "
        f"out of memory {pieces.count - before} times" + (f"; samples at once since: {at_once}" if at_once else "")
    )


def run_table(
    trainer: Trainer, name: str, config: TrainConfig, table: BucketTable | None, args, rounds: int = 1
) -> None:
    """Checks one table, or a config's own sizes; prints a line and adds records to those in a file."""
    shapes = list(worst_shapes(config))
    measured = None if table is None else table.buckets
    buckets = Buckets(config.buckets, resolutions_file(config.resolutions), measured)
    trainer.state.model.set_checkpointing("auto")  # a table before this one said how many blocks
    metrics = args.metrics / f"{name}.jsonl" if args.metrics is not None and table is not None else None
    before, first = trainer.pieces.count, trainer.step
    sizes = {(b.resolution, b.num_frames): b for b in buckets}
    earlier = args.out.read_bytes() if args.out and args.out.is_file() else b""

    def keep(found: dict[Shape, tuple[list[float], float]]) -> None:
        if not args.out:
            return
        records = []
        for shape, (seconds, peak) in found.items():
            bucket = sizes[shape.resolution, shape.frames]
            record = Record.of_times("sweep_check", f"{name} {shape.name}", "trainer", [1000 * s for s in seconds])
            record.peak_gib = round(peak, 2) if peak else None
            record.notes = {
                "batch": bucket.batch_size,
                "pieces": bucket.pieces,
                "checkpointed": bucket.checkpointed,
                "table_seconds": None if table is None else bucket.seconds,
                "steps": len(seconds),
                "steps_of_all": trainer.step - first,
                "memory_gib": args.memory_gib,
                "at_once": trainer.pieces.limits.get(shape.name),  # where memory ran out: samples since then
                "out_of_memory_of_all": trainer.pieces.count - before,
            }
            records.append(record)
        with whole_file(args.out) as draft:  # after each round in place of the one before
            draft.write_bytes(earlier)
            append(draft, records)

    found = check(trainer, shapes, buckets, rounds, args.warm_up, metrics=metrics, limit=args.seconds, after_round=keep)
    print(describe(name, found, trainer.step - first, trainer.pieces, before), flush=True)
    trainer.pieces.limits.clear()
    trainer.pieces.known.clear()


def main(arguments: list[str] | None = None, ready: Callable[[], object] = lambda: None) -> int:
    """Checks. `ready` is called when the trainer is there, before its first step."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--config", nargs="+", type=Path, required=True)
    parser.add_argument("--table", nargs="+", type=Path, required=True, help="one for each config, in that order")
    parser.add_argument(
        "--rounds", type=int, nargs="+", default=[3], help="steps of each bucket that count; of all tables or of each"
    )
    parser.add_argument("--warm-up", type=int, default=WARMUP, help="steps of each bucket before them")
    parser.add_argument("--seconds", type=float, default=math.inf, help="of each table at most")
    parser.add_argument("--memory-gib", type=float, help="use at most this much of the GPU's memory")
    parser.add_argument("--original", action="store_true", help="run the configs' own batch sizes too, one round")
    parser.add_argument("--metrics", type=Path, help="folder for the trainer's lines of each table's steps")
    parser.add_argument("--out", type=Path, help="results file to append to")
    args = parser.parse_args(arguments)
    if len(args.rounds) not in (1, len(args.table)) or min(args.rounds) < 1:
        raise ConfigError("--rounds", args.rounds, f"1 or more: one number, or {len(args.table)}, one for each table")
    if args.warm_up < 0:
        raise ConfigError("--warm-up", args.warm_up, "use 0 or more")
    if len(args.config) != len(args.table):
        raise ConfigError("--table", [str(t) for t in args.table], f"name {len(args.config)}, one for each config")
    configs = [read_config(path) for path in args.config]
    try:
        tables = [bucket_tables.read(path) for path in args.table]
    except ConfigError as error:
        raise ConfigError("--table", error.value, error.remedy) from error
    if len({table.encoders for table in tables}) > 1:
        raise ConfigError("--table", [str(t) for t in args.table], "some have encoders in the step; check these apart")
    for config, table in zip(configs, tables, strict=True):
        missing = table.missing((s.resolution, s.frames) for s in worst_shapes(config))
        if missing:
            raise ConfigError("--table", str(table.path), f"it does not know {', '.join(missing)}")
    if not torch.cuda.is_available() and tables[0].device != device_name():
        remedy = f"its steps are of {tables[0].device}, and there is no GPU here"
        raise ConfigError("--table", str(tables[0].path), remedy)
    with tempfile.TemporaryDirectory() as folder:
        trainer = build_trainer(configs[0], Path(folder), tables[0].encoders)  # which decides how memory is held
        for table in tables:
            if table.device != device_name():
                print(f"{table.path}: its times are of {table.device}, and this is {device_name()}", flush=True)
        if args.memory_gib and torch.cuda.is_available():
            memory.hold_to(args.memory_gib)
        ready()
        rounds = args.rounds if len(args.rounds) > 1 else args.rounds * len(tables)
        for path, config, table, count in zip(args.table, configs, tables, rounds, strict=True):
            run_table(trainer, path.stem, config, table, args, count)
            if args.original:
                run_table(trainer, f"{path.stem} original sizes", config, None, args)
        trainer.processes.close()
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
