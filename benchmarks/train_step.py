"""Whole training steps and their parts: data, encoders or features, transformer, optimizer and average: suite
"train_step".

    python -m stdit_fast.benchmarks.train_step --cases 240p-16-17-features 240p-16-17-online --out train_step.jsonl

A case is resolution-frames-batch-kind: `features` reads latents and text states that were encoded before, `online`
decodes clips and encodes them. With `--mixed` the cases of a kind take turns, as buckets do in training; else a case
has all its steps in a row. The trainer is the real one with stage 1's configuration; autoencoder and T5-XXL have their
real size and random weights. Clips are crops of tests/data's 720p clip, captions 20 to 200 words.

A step lasts from one step's end to the next on the GPU's clock, waiting included; so do its parts.
"""

import argparse
import csv
import itertools
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import yaml
from torch.profiler import record_function

from stdit_fast.benchmarks.random_encoders import T5_XXL, random_t5
from stdit_fast.benchmarks.records import Record, append, results_file, tell_cpu
from stdit_fast.benchmarks.step import parse_case, positions_of, step_flops
from stdit_fast.benchmarks.trace import profile_step
from stdit_fast.benchmarks.train_run import make_real_size_encoders
from stdit_fast.errors import ConfigError, run_command
from stdit_fast.parallel.allocator import expand_segments
from stdit_fast.train.config import TrainConfig, parse
from stdit_fast.train.dataset import make_loader
from stdit_fast.train.demo_data import CAPTIONS
from stdit_fast.train.encode import encode
from stdit_fast.train.pending import Clock
from stdit_fast.train.sampler import BatchRequest
from stdit_fast.train.trainer import Trainer, free_memory

ROOT = Path(__file__).resolve().parents[1]
CLIP, CLIP_FRAMES = ROOT / "tests" / "data" / "bigbuckbunny.mp4", 132
KINDS = ("features", "online")
DEFAULT_CASES = [
    *("144p-16-6-features", "144p-16-6-online", "256-1-64-features", "256-1-64-online"),
    *("240p-16-17-features", "240p-16-17-online", "480p-16-4-features", "720p-16-2-features"),
]
FRAME_INTERVAL = 3
BATCHES = 3  # of a case; the epochs go over them again
WARMUP, LEAST_STEPS = 4, 3  # a bucket's CUDA graph is captured in its third step
SPARE = 4  # batches of a case beyond its steps: for the two traced ones, and for a trainer that looks ahead
SMALL = ["--model.hidden_size", "144", "--model.num_heads", "2", "--model.depth", "2"]
SMALL += ["--plugin", "auto", "--dtype", "auto"]
COLUMNS = (
    f"{'case':<24}{'step':>8}{'low':>8}{'high':>8}{'data':>7}{'vae':>8}{'text':>7}{'model':>8}{'optim':>7}{'GiB':>6}"
)


class Parts:
    """When the parts of a step begin and end on the current stream of the device."""

    BEFORE = ("data", "autoencoder", "text encoder")
    NAMES = (*BEFORE, "forward", "backward")

    def __init__(self, device: torch.device):
        self._on_gpu = device.type == "cuda"
        self._clock = Clock(device)
        self.steps: list[dict[str, list]] = []
        self.ends: list = [self._clock.now()]

    def timed(self, name: str, function: Callable) -> Callable:
        """The function, as a part of that name."""

        def call(*args, **options):
            with record_function(name):
                step = self._now()
                if "backward" in step and name in self.BEFORE:  # of the next step, encoded ahead
                    step = self._now(1)
                begin = self._clock.now()
                result = function(*args, **options)
                step.setdefault(name, []).append((begin, self._clock.now()))
            return result

        return call

    def step_ends(self) -> None:
        """Called after each step."""
        self._now()
        self.ends.append(self._clock.now())

    def _now(self, later: int = 0) -> dict[str, list]:
        while len(self.steps) < len(self.ends) + later:
            self.steps.append({})
        return self.steps[len(self.ends) - 1 + later]

    def milliseconds(self, first: int, stride: int = 1) -> tuple[list[float], dict[str, float]]:
        """(the steps' times, the parts' medians) of every `stride`-th step from the first on; "optimizer" is all
        behind the backward pass."""
        if self._on_gpu:
            torch.cuda.synchronize()
        steps = [self._between(*pair) for pair in itertools.pairwise(self.ends)][first::stride]
        parts = {name: [] for name in (*self.NAMES, "optimizer")}
        for step, end in list(zip(self.steps, self.ends[1:], strict=False))[first::stride]:
            for name in self.NAMES:
                parts[name].append(sum(self._between(*pair) for pair in step.get(name, [])))
            parts["optimizer"].append(self._between(step["backward"][-1][1], end))
        return steps, {name: statistics.median(times) for name, times in parts.items()}

    def _between(self, begin, end) -> float:
        return 1000 * self._clock.seconds(begin, end)


@contextmanager
def random_t5_where_it_runs() -> Iterator[None]:
    """T5EncoderModel.from_pretrained makes random weights on the GPU: 9.5 GB that no disk need hold."""
    from transformers import T5EncoderModel

    def made(source, **options):
        return random_t5(**T5_XXL), {"missing_keys": [], "unexpected_keys": [], "mismatched_keys": []}

    with mock.patch.object(T5EncoderModel, "from_pretrained", made):
        yield


def bucket_of(case: str) -> tuple[str, int, int]:
    """(resolution, frames, batch) of a case without its kind."""
    resolution, frames, batch = case.rsplit("-", 2)
    return resolution, int(frames), int(batch)


def check_cases(cases: list[str]) -> None:
    for case in cases:
        bucket, _, kind = case.rpartition("-")
        if kind not in KINDS:
            raise ConfigError("cases", case, f"end it in one of {', '.join(KINDS)}, like 240p-16-17-features")
        parse_case(bucket)
        if bucket_of(bucket)[1] * FRAME_INTERVAL >= CLIP_FRAMES:
            raise ConfigError(
                "cases", case, f"the clip has {CLIP_FRAMES} frames, of which one in {FRAME_INTERVAL} is used"
            )


def write_table(folder: Path, buckets: list[str]) -> dict[str, range]:
    """table.csv: rows that fall into one bucket each; bucket -> its rows."""
    import av

    still = folder / "still.png"
    with av.open(str(CLIP)) as container:
        next(container.decode(video=0)).to_image().save(still)
    words = sorted({word for texts in CAPTIONS.values() for text in texts.values() for word in text.split()})
    draw, rows, at = random.Random(0), {}, 0
    with open(folder / "table.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("path", "text", "num_frames", "height", "width", "fps"))
        for bucket in buckets:
            frames, height, width, batch = parse_case(bucket)
            rows[bucket] = range(at, at + BATCHES * batch)
            at = rows[bucket].stop
            for _ in rows[bucket]:
                text = " ".join(draw.choices(words, k=draw.randint(19, 199)))
                source, length = (still, 1) if frames == 1 else (CLIP, CLIP_FRAMES)
                writer.writerow((source, text, length, height, width, 25))
    return rows


def write_config(folder: Path, buckets: list[str], base: str) -> Path:
    """The base configuration with these buckets alone."""
    content = yaml.safe_load(Path(base).read_text())
    content["buckets"] = {}
    for bucket in buckets:
        resolution, frames, batch = bucket_of(bucket)
        content["buckets"].setdefault(resolution, {})[frames] = [1.0, batch]
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def requests_of(data, rows: range, steps: int) -> list[BatchRequest]:
    """A bucket's batches, in turn."""
    table = data.metadata
    own = [np.asarray(column)[rows.start : rows.stop] for column in (table.num_frames, table.height, table.width)]
    numbers = set(data.buckets.assign(*own, FRAME_INTERVAL).tolist())
    if len(numbers) != 1 or -1 in numbers:
        raise ConfigError(
            "cases", data.buckets[max(numbers)].name, "its clips fit other buckets as well; leave some out"
        )
    number = numbers.pop()
    batch = len(rows) // BATCHES
    order = [np.arange(rows.start + i * batch, rows.start + (i + 1) * batch) for i in range(BATCHES)]
    none = np.empty(0, dtype=np.int64)
    return [BatchRequest(i // BATCHES, i, number, order[i % BATCHES], none, batch, 1) for i in range(steps)]


def run_kind(kind: str, cases: list[str], rows: dict[str, range], config: TrainConfig, args) -> None:
    """Measures the cases of one kind with one trainer."""
    trainer = Trainer(config)
    trainer.metrics = None  # as on ranks that write none
    on_gpu = trainer.device.type == "cuda"
    count = WARMUP + args.steps + SPARE
    requests = {case: requests_of(trainer.data, rows[case], count) for case in cases}
    groups = [cases] if args.mixed else [[case] for case in cases]  # whose steps take turns
    loader = make_loader(
        trainer.data.dataset,
        [requests[case][i] for group in groups for i in range(count) for case in group],
        num_workers=config.dataset.num_workers,
        pin_memory=on_gpu,
        prefetch_factor=config.dataset.prefetch_factor,
    )
    batches = iter(loader)
    originals = [(trainer.vae, "encode"), (trainer.text_encoder, "encode"), (trainer.diffusion, "training_losses")]
    originals += [(trainer.booster, "backward")]
    originals = [(owner, name, getattr(owner, name)) for owner, name in originals if hasattr(owner, name)]
    for group in groups:
        parts, begun = Parts(trainer.device), time.perf_counter()
        names = {"training_losses": "forward", "backward": "backward"}
        for owner, name, function in originals:
            called = names.get(name) or ("autoencoder" if owner is trainer.vae else "text encoder")
            setattr(owner, name, parts.timed(called, function))
        own = itertools.islice(batches, len(group) * count)
        fetch = parts.timed("data", lambda own=own: next(own))
        timed_batches = trainer.on_their_way(iter(fetch, None))
        seen = {case: Seen() for case in group}
        for i in range(WARMUP + args.steps):
            for case in group:
                if on_gpu:
                    torch.cuda.reset_peak_memory_stats()
                trainer.train_step(timed_batches)
                parts.step_ends()
                if i >= WARMUP:
                    seen[case].add(trainer)
            if i + 1 >= WARMUP + LEAST_STEPS and time.perf_counter() - begun > args.seconds * len(group):
                break
        for number, case in enumerate(group):
            record(case, kind, trainer, parts.milliseconds(WARMUP * len(group) + number, len(group)), seen[case], args)
        for case in group:
            if f"{case}-{kind}" in args.trace:
                path = Path(args.trace_to) / f"trace-{case}-{kind}.json"
                profile_step(partial(two_steps, trainer, timed_batches), path)
        for _ in own:  # what is left of these cases' batches
            pass


@dataclass
class Seen:
    """What is to be seen of a case's steps besides times."""

    peak: int = 0  # bytes
    recomputed: int = 0  # blocks, at most
    graphs: int = 0  # steps that ran as CUDA graphs
    parts: int = 1  # in which a batch ran, at most

    def add(self, trainer: Trainer) -> None:
        model = trainer.state.model
        self.parts = max(self.parts, trainer.last_parts)
        if torch.cuda.is_available():
            beside = 0 if model.graphs is None else model.graphs.pool_bytes
            self.peak = max(self.peak, torch.cuda.max_memory_allocated() + beside)
        self.recomputed = max(self.recomputed, model.last_checkpointed)
        self.graphs += model.last_graphed


def has_expandable_segments() -> bool:
    return torch.cuda.is_available() and any(segment["is_expandable"] for segment in torch.cuda.memory_snapshot())


def two_steps(trainer: Trainer, batches: Iterator[dict]) -> None:
    """Two, since the second's launches begin while the first one runs."""
    for _ in range(2):
        trainer.train_step(batches)
    trainer.settle()


def record(case: str, kind: str, trainer: Trainer, found: tuple, seen: Seen, args) -> None:
    """Prints a case's line and appends its record."""
    frames, height, width, batch = parse_case(case)
    times, of_parts = found
    step = statistics.median(times)
    model = trainer.state.model
    peak = seen.peak / 2**30 if torch.cuda.is_available() else None
    transformer = of_parts["forward"] + of_parts["backward"]
    notes = {
        "parts": {name: round(ms, 2) for name, ms in of_parts.items()},
        "transformer_share": round(transformer / step, 4),
        "wait_share": round(of_parts["data"] / step, 4),
        "checkpointed_blocks": seen.recomputed,
        "cuda_graph": seen.graphs == len(times),
        "graph_steps": seen.graphs,
        "pieces": seen.parts,
        "share_memory": trainer.config.share_memory,
        "expandable_segments": has_expandable_segments(),
        "mixed": args.mixed,
        "encode_ahead": trainer.config.encode_ahead and trainer.vae is not None,
        "workers": trainer.config.dataset.num_workers,
        "steps": len(times),
    }
    flops = step_flops(model.config, batch, frames, positions_of(height, width))
    found = Record.of_times("train_step", f"{case}-{kind}", "stdit_fast", times, flops=flops, notes=notes)
    found.peak_gib = None if peak is None else round(peak, 2)
    if args.out:
        append(args.out, [found])
    cells = {"data": 7, "autoencoder": 8, "text encoder": 7, "transformer": 8, "optimizer": 7}
    shown = of_parts | {"transformer": transformer}
    line = f"{case + '-' + kind:<24}{step:>8.1f}{min(times):>8.1f}{max(times):>8.1f}"
    line += "".join(f"{shown[name]:>{width}.1f}" for name, width in cells.items())
    print(f"{line}{peak or 0:>6.1f}", flush=True)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="+", default=DEFAULT_CASES)
    parser.add_argument("--config", default=str(ROOT / "train" / "configs" / "stage1.yaml"))
    parser.add_argument("--steps", type=int, default=8, help="measured steps of each case, after the first four")
    parser.add_argument("--seconds", type=float, default=30, help="start no further step of a case after so long")
    parser.add_argument("--workers", type=int, default=12, help="decoding processes")
    parser.add_argument("--mixed", action="store_true", help="the cases of a kind take turns, step by step")
    parser.add_argument("--small", action="store_true", help="a small model and the embedded encoders")
    parser.add_argument("--trace", nargs="*", default=[], metavar="CASE", help="write timelines of two steps of these")
    parser.add_argument("--trace-to", default=".", help="folder for trace-CASE.json")
    parser.add_argument("--out", type=results_file, help="results file to append to")
    parser.add_argument("overrides", nargs="*", help="further `--key value` of the training, after `--`")
    args = parser.parse_args(arguments)
    check_cases([*args.cases, *args.trace])
    if not args.small:
        tell_cpu("--small")
    buckets = list(dict.fromkeys(case.rpartition("-")[0] for case in args.cases))
    with tempfile.TemporaryDirectory() as scratch, random_t5_where_it_runs():
        scratch = Path(scratch)
        rows = write_table(scratch, buckets)
        vae, text = "patch-codec", "minilm-embeddings"
        if not args.small:
            vae, text = make_real_size_encoders(scratch, text=False)
        command = ["--config", str(write_config(scratch, buckets, args.config)), *(SMALL if args.small else [])]
        command += ["--dataset.data_path", str(scratch / "table.csv"), "--dataset.num_workers", str(args.workers)]
        command += ["--dataset.frame_interval", str(FRAME_INTERVAL), "--outputs", str(scratch / "run")]
        command += ["--vae.from_pretrained", str(vae), "--text_encoder.from_pretrained", str(text), *args.overrides]
        print(COLUMNS)
        for kind in KINDS:
            own = [case.rpartition("-")[0] for case in args.cases if case.endswith(f"-{kind}")]
            if not own:
                continue
            extra = ["--features.path", str(scratch / "features")] if kind == "features" else []
            config = parse([*command, *extra])
            if config.expandable_segments:
                expand_segments()  # as the trainer does, but before encoders are there
            if kind == "features":
                make_features(config)
            run_kind(kind, own, rows, config, args)
            between_runs()
    return 0


def make_features(config: TrainConfig) -> None:
    """Encodes the table; the encoders' memory is free afterwards."""
    from stdit_fast.parallel.processes import launch

    encode(config, launch(config.seed))
    between_runs()


def between_runs() -> None:
    """Gives back what nothing uses any more: the next trainer chooses by what is free how much it recomputes."""
    free_memory()
    if torch.cuda.is_available():
        print(f"held beside the next: {torch.cuda.memory_allocated() / 2**30:.2f} GiB", flush=True)


if __name__ == "__main__":
    sys.exit(run_command(main))
