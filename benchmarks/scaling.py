"""Training on several GPUs: weak scaling, sequence parallelism, and what ranks wait for. Suite "scaling".

    python -m stdit_fast.benchmarks.scaling mix --ranks 4 --rank 0 --out scaling.jsonl      # one GPU's share, alone
    python -m stdit_fast.benchmarks.scaling long sample --out scaling.jsonl
    torchrun --nproc_per_node 4 -m stdit_fast.benchmarks.scaling mix long sample --out scaling.jsonl --trace trace

A step is that of training but for the encoders: diffusion loss, backward, reduction of the gradients, the optimizer
inside ZeRO, and the average; XL/2 in bfloat16 with random weights and inputs, full text.

- mix: the buckets of a training configuration as its sampler deals them, of an assumed set of videos and images. One
  process trains the batches that would be rank R's of N: its work in the run of N ranks, with nobody to wait for. N
  do it twice: gradients and weights travel after they have computed, or meanwhile (overlap_communication).
- long: 720p with 16 frames on one GPU, 16 * n frames on n, so that a GPU has the same number of tokens; the all-to-alls
  alone.
- With --trace, one step of either is profiled, from which follows how long communication runs alone, and the kernels'
  times are added up by name.
- sample: one guided prediction of a video of 64 frames, as sampling makes them, by one GPU or shared by all.
"""

import argparse
import gc
import json
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from stdit_fast.benchmarks.records import Record, append, results_file
from stdit_fast.diffusion import IDDPM
from stdit_fast.errors import run_command
from stdit_fast.model.memory import training_reserve
from stdit_fast.parallel import sequence
from stdit_fast.parallel.processes import Processes, end_after, launch
from stdit_fast.parallel.sequence import FrameSwitch, bounds, part_of
from stdit_fast.train.buckets import Bucket
from stdit_fast.train.config import TrainConfig, make_buckets, parse
from stdit_fast.train.degrees import sequence_sizes
from stdit_fast.train.out_of_memory import parts_of
from stdit_fast.train.pending import Clock
from stdit_fast.train.sampler import BatchRequest, BucketSampler

TEXT_TOKENS = 200
LONG = {"height": 720, "width": 1280}
FRAMES_A_RANK = 16
SAMPLED_FRAMES = 64
STEPS = {"mix": 12, "long": 5, "sample": 3}
ROUNDS = 2  # over the mix's steps
OVERLAPPING = ", communication overlapping"
COPIED = ", by copies"
COMMUNICATION = ("nccl", "ptop", "barrier_kernel")  # in the names of kernels; the last two of copies
COLLECTIVE_TIMEOUT = 180.0  # s; a rank may compile while the others wait
WARMUP = {"mix": 1, "long": 2, "sample": 1}  # rounds of the mix's steps; steps of the others
# The assumed data: half videos, half images, in common sizes; lengths are spread evenly over their logarithms.
SIZES = ((720, 1280), (480, 854), (1080, 1920), (360, 640))
VIDEO_FRAMES = 40, 2000
SAMPLES = 400_000


class Training:
    """What a run has, but for data and encoders."""

    def __init__(self, processes: Processes, sizes: list[int], depth: int):
        from colossalai.booster import Booster

        from stdit_fast import STDiT2, STDiT2Config
        from stdit_fast.parallel.sequence_plugins import SequenceReplicatedPlugin, SequenceShardedPlugin
        from stdit_fast.train.ema import EMA

        self.processes, self.device = processes, processes.device
        if processes.world_size > 1:
            processes.barrier()  # NCCL has its memory before it is asked how much there is
        on_gpu = self.device.type == "cuda"
        torch.manual_seed(0)
        width = {} if on_gpu else {"hidden_size": 48, "num_heads": 4, "caption_channels": 32}
        with self.device:
            model = STDiT2(STDiT2Config(depth=depth, **width)).train()
        for p in model.parameters():  # zero-initialised layers would be timed on zeros
            if p.count_nonzero() == 0:
                torch.nn.init.normal_(p, std=0.02)
        plugin = (SequenceShardedPlugin if on_gpu else SequenceReplicatedPlugin)(1.0, processes, sizes)
        self.booster = Booster(plugin=plugin)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, weight_decay=0.0, fused=on_gpu)
        self.model, self.optimizer, *_ = self.booster.boost(model, optimizer)
        self.bare = self.model.unwrap()
        self.ema = EMA(self.optimizer.masters, 0.9999)
        self.optimizer.follow(self.ema.averages, self.ema.decay)
        self.diffusion = IDDPM()

    def reserve_alone(self) -> int:
        """Bytes that training on one GPU needs beside parameters and activations."""
        count = sum(p.numel() for p in self.bare.parameters())
        elsewhere = 1 - 1 / self.processes.world_size  # of masters, moments and averages
        return training_reserve(self.bare) + int(16 * count * elsewhere)

    def run(self, steps: "Iterable[Step]", overlaps: bool) -> "list[Timed]":
        """Steps one after the other, as training makes them: nothing waits for a device before the last is done.

        Args:
            overlaps: communication and computation.
        """
        if self.processes.world_size > 1:
            self.processes.barrier()
        self._finish()
        self.optimizer.overlaps = overlaps
        clock = Clock(self.device)
        seen, moments = [], [clock.now()]
        for step in steps:
            seen.append((*self._step(step, clock), clock.now()))
            moments.append(seen[-1][-1])
        self._finish()
        return [
            Timed(tokens, clock.seconds(begin, end), clock.seconds(begin, passed))
            for begin, (tokens, passed, end) in zip(moments, seen, strict=False)
        ]

    def _step(self, step: "Step", clock: Clock) -> tuple:
        """One step: its tokens, and when its passes were over."""
        bucket, parts = step.bucket, step.parts
        batch = self.batch(bucket, parts, step.part)
        as_measured = bucket.checkpointed is not None and parts == 1
        self.bare.set_checkpointing(bucket.checkpointed if as_measured else "auto", step.reserve)
        self.forward_backward(bucket, parts, batch)
        passed = clock.now()
        self.update()
        frames, rows, columns = batch["latents"].shape[2:]
        return bucket.batch_size * frames * -(-rows // 2) * -(-columns // 2), passed

    def update(self) -> None:
        self.optimizer.reduce_gradients()
        self.optimizer.guarded_step(torch.zeros(2, dtype=torch.float64, device=self.device))

    def communication_alone(self) -> list[Record]:
        """The gradients' reduction and the sharing of weights, with nothing beside them."""
        functions = {
            "gradients reduced": self.optimizer.reduce_gradients,
            "weights shared": self.optimizer.share_weights,
        }
        times = {what: [] for what in functions}
        for i in range(2 + 5):
            for p in self.bare.parameters():
                p.grad = torch.randn_like(p)
            for what, function in functions.items():
                self.processes.barrier()
                self._finish()
                started = time.perf_counter()
                function()
                self._finish()
                times[what] += [1000 * (time.perf_counter() - started)] if i >= 2 else []
            self.optimizer.zero_grad()
        size = sum(p.numel() * p.element_size() for p in self.bare.parameters())
        impl = f"{self.processes.world_size} GPUs, alone"
        return [Record.of_times("scaling", what, impl, own, bytes=size) for what, own in times.items()]

    def forward_backward(self, bucket: Bucket, parts: int, batch: dict) -> None:
        """Of a batch, in the pieces that a table has for it, as the trainer does."""
        plugin, count = self.booster.plugin, bucket.pieces if parts == 1 else 1
        for part in parts_of(bucket.batch_size, count):
            piece = {key: value[part] for key, value in batch.items() if key != "arguments"}
            arguments = {key: value[part] for key, value in batch["arguments"].items()}
            with plugin.local_gradients(self.model), plugin.shared(self.bare, parts, bucket.num_frames, 0):
                losses = self.diffusion.training_losses(
                    self.model,
                    piece["latents"],
                    piece["timestep"],
                    arguments,
                    noise=piece["noise"],
                    mask=piece["x_mask"],
                    counted=piece["counted"],
                )
                with self.optimizer.reducing() if part.stop == bucket.batch_size else nullcontext():
                    share = (part.stop - part.start) / bucket.batch_size
                    self.optimizer.backward(losses["loss"].mean() * share)

    def batch(self, bucket: Bucket, parts: int, part: int) -> dict:
        """Random inputs; every second video has its first frame as a condition."""
        count, whole = bucket.batch_size, bucket.num_frames
        frames = part_of(whole, parts, part)
        mask = torch.ones(count, whole, dtype=torch.bool, device=self.device)
        mask[::2, 0] = whole == 1
        one = torch.ones(count, device=self.device)
        shape = count, 4, frames.stop - frames.start, bucket.height // 8, bucket.width // 8
        config = self.bare.config
        dtype = next(self.bare.parameters()).dtype
        text = torch.randn(count, 1, TEXT_TOKENS, config.caption_channels, dtype=dtype, device=self.device)
        scalars = {"num_frames": whole, "height": bucket.height, "width": bucket.width, "fps": 8}
        return {
            "latents": torch.randn(shape, device=self.device),
            "noise": torch.randn(shape, device=self.device),
            "timestep": torch.arange(count, device=self.device) * 7 % 1000,
            "x_mask": mask[:, frames],
            "counted": mask.sum(1).float(),
            "arguments": {
                "y": text,
                "mask": torch.ones(count, TEXT_TOKENS, dtype=torch.long),
                "drop_caption": torch.zeros(count, dtype=torch.bool, device=self.device),
                "ar": one * bucket.height / bucket.width,
                **{name: one * value for name, value in scalars.items()},
            },
        }

    def _finish(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


@dataclass(frozen=True)
class Step:
    """What a rank does in a step: its batch of a bucket, or part `part` of one that `parts` share.

    Attributes:
        reserve: as of `STDiT2.set_checkpointing`, where no number of blocks was measured.
    """

    bucket: Bucket
    parts: int = 1
    part: int = 0
    reserve: int | None = None


class Timed(NamedTuple):
    """A rank's tokens of a step, its seconds, and those until its passes were over, with its own work alone in them
    where communication does not overlap."""

    tokens: int
    seconds: float
    passes: float


# ------------------------------------------------------------------------ mix


def assumed_data(seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(frames, height, width) of the assumed videos and images."""
    rng = np.random.default_rng(seed)
    height, width = np.array(SIZES)[rng.integers(len(SIZES), size=SAMPLES)].T
    frames = np.exp(rng.uniform(*np.log(VIDEO_FRAMES), SAMPLES)).astype(np.int64)
    return np.where(rng.random(SAMPLES) < 0.5, frames, 1), height, width


def mix(processes: Processes, config: TrainConfig, args: argparse.Namespace) -> Iterator[Record]:
    """Times `args.steps` steps, each rank's batches as the sampler deals them."""
    ranks = args.ranks or processes.world_size
    rank = processes.rank if args.rank is None else args.rank
    buckets = make_buckets(config)
    degrees = sequence_sizes(config.sequence_parallel, buckets, config.model.hidden_size, ranks)
    sampler = BucketSampler(*assumed_data(), buckets, seed=0, world_size=ranks, rank=rank, degrees=degrees)
    requests = _first(iter(sampler), args.steps or STEPS["mix"])
    training = Training(processes, np.unique(degrees).tolist(), args.depth)
    together = processes.world_size > 1
    steps = [Step(buckets[r.bucket], r.parts, r.part) for r in requests]
    for _ in range(WARMUP["mix"]):  # the same steps: everything is compiled, and memory is where it will be
        training.run(steps, overlaps=args.overlap[0])
    seen: dict[bool, list[Timed]] = {overlaps: [] for overlaps in (args.overlap if together else (False,))}
    for _ in range(ROUNDS):
        for overlaps, own in seen.items():
            own += training.run(steps, overlaps)
    named = zip([step.bucket for step in steps], requests, strict=True)
    shared_notes = {
        "expected_imbalance": round(float(np.mean([r.imbalance for r in requests])), 4),
        "sequence_parallel": config.sequence_parallel,
        "bucket_sizes": config.bucket_sizes,
        "steps": [f"{b.name} x {b.batch_size}" + (f" / {r.parts}" if r.parts > 1 else "") for b, r in named],
        "depth": args.depth,
    }
    for overlaps, own in seen.items():
        everyone = processes.gather_objects(own) if together else [own]
        seconds = [sum(step.seconds for step in rank) for rank in everyone]
        rates = [sum(step.tokens for step in rank) / s for rank, s in zip(everyone, seconds, strict=True)]
        notes = {"tokens_per_second_and_gpu": round(sum(rates) / len(rates)), **shared_notes}
        impl = f"{ranks} GPUs" if together else f"rank {rank} of {ranks} alone"
        if overlaps:
            impl += OVERLAPPING
        elif together:
            slowest = [max(step.passes for step in of_all) for of_all in zip(*everyone, strict=True)]
            waited = [sum(slowest) - sum(step.passes for step in rank) for rank in everyone]
            notes["waiting_share"] = round(sum(waited) / sum(seconds), 4)
            notes["passes_share"] = round(sum(slowest) / max(seconds), 4)
        times = [1000 * step.seconds for step in own]
        yield Record.of_times("scaling", f"mix of {Path(args.config).stem}", impl, times, notes=notes)
    if together:
        yield from training.communication_alone()
        if args.trace:
            request, path = requests[-1], Path(f"{args.trace}-mix.json")
            training.optimizer.overlaps = args.overlap[0]
            yield trace(training, buckets[request.bucket], request.parts, request.part, path)


def _first(requests: Iterator[BatchRequest], count: int) -> list[BatchRequest]:
    return [next(requests) for _ in range(count)]


# ----------------------------------------------------------------------- long


def long(processes: Processes, args: argparse.Namespace) -> Iterator[Record]:
    """720p at 16 frames a rank: the step, and the all-to-alls of a block alone.

    Several GPUs recompute as many blocks as one alone has to, and at last as few as they have to.
    """
    parts = processes.world_size
    bucket = Bucket("720p", FRAMES_A_RANK * parts, "0.56", args.height, args.width, 1.0, 1)
    training = Training(processes, [parts], args.depth)
    case = f"{args.height}x{args.width}, {bucket.num_frames} frames, batch 1"
    default, warmup = sequence.MOST_CHUNKS, WARMUP["long"]
    alone = training.reserve_alone()
    groups = None if parts == 1 else training.booster.plugin.sequence_groups
    ordinary = groups and groups[parts].device
    copies = groups.copies_of(groups[parts]) if parts > 1 and training.device.type == "cuda" else None
    plain = Variant(default, reserve=alone)
    variants = {"": plain}
    if parts > 1:
        variants |= {
            OVERLAPPING: replace(plain, overlaps=True),
            ", in one chunk": replace(plain, chunks=1),
            f", in {2 * default} chunks": replace(plain, chunks=2 * default),
            ", recomputing as little as fits": replace(plain, reserve=None),
        }
        variants |= {f", NCCL in {n} CTAs": replace(plain, ctas=n) for n in args.ctas}
        for chunks in (default, 1, 2 * default) if copies else ():
            name = COPIED if chunks == default else f"{COPIED} in {chunks} chunk{'s' * (chunks > 1)}"
            variants[name] = replace(plain, chunks=chunks, copies=True)
        if copies:
            variants[OVERLAPPING + COPIED] = replace(plain, overlaps=True, copies=True)
    for name, variant in variants.items():
        overlaps = variant.overlaps
        if parts > 1 and overlaps not in args.overlap:
            continue
        if name and args.variants is not None and not any(part in name for part in args.variants):
            continue
        sequence.MOST_CHUNKS = variant.chunks
        if parts > 1:
            device = nccl_group(variant.ctas) if variant.ctas else ordinary
            groups.replace(parts, device=device, copies=copies if variant.copies else None)
        step = Step(bucket, parts, processes.rank, variant.reserve)
        training.run([step] * warmup, overlaps)
        seen = training.run([step] * (args.steps or STEPS["long"]), overlaps)
        times, tokens = [1000 * one.seconds for one in seen], seen[0].tokens
        notes = {
            "tokens_per_second_and_gpu": round(tokens / np.median(times) * 1000),
            "tokens_per_gpu": tokens,
            "sequence_parallel": parts,
            "depth": args.depth,
            "checkpointed_blocks": training.bare.last_checkpointed,
        }
        peak = torch.cuda.max_memory_allocated() / 2**30 if training.device.type == "cuda" else None
        impl = f"{parts} GPU{'s' * (parts > 1)}{name}"
        if parts == 1 and args.ranks:  # one of several cards that are no two alike
            impl = f"rank {args.rank or 0} of {args.ranks} alone"
        yield Record.of_times("scaling", case, impl, times, peak_gib=peak and round(peak, 2), notes=notes)
        if args.trace and name in ("", COPIED):
            path = Path(f"{args.trace}-long-{parts}{'-copies' * variant.copies}.json")
            yield trace(training, bucket, parts, processes.rank, path)
        warmup = 1
    if parts > 1:
        sequence.MOST_CHUNKS = default
        for name, way in ({"": None} | ({COPIED: copies} if copies else {})).items():
            groups.replace(parts, device=ordinary, copies=way)
            yield all_to_all_alone(training, bucket, case, name)


def all_to_all_alone(training: Training, bucket: Bucket, case: str, name: str = "") -> Record:
    """A block's two all-to-alls forward, with nothing to hide behind."""
    group = training.booster.plugin.sequence_groups[training.processes.world_size]
    frames = part_of(bucket.num_frames, group.size, group.rank)
    channels = training.bare.config.hidden_size
    positions = -(-(bucket.height // 8) // 2) * -(-(bucket.width // 8) // 2)
    dtype = next(training.bare.parameters()).dtype
    u = torch.randn((frames.stop - frames.start) * positions, channels, dtype=dtype, device=training.device)
    switch = FrameSwitch(group, bucket.num_frames, chunks=1)
    times = []
    for i in range(3 + 10):
        training.processes.barrier()
        training._finish()
        started = time.perf_counter()
        switch.there_and_back(u, positions)
        training._finish()
        times += [1000 * (time.perf_counter() - started)] if i >= 3 else []
    own = bounds(positions, group.size)[1] / positions
    sent = 2 * u.numel() * u.element_size()
    notes = {"units_a_token": 2, "bytes_to_others": round(sent * (1 - own)), "tokens_per_gpu": len(u)}
    return Record.of_times(
        "scaling", case, f"{group.size} GPUs, all-to-alls of a block{name}", times, bytes=sent, notes=notes
    )


@dataclass(frozen=True)
class Variant:
    """How `long` shares a video.

    Attributes:
        chunks: at most.
        overlaps: gradients and weights travel while something is computed.
        reserve: as of `Step`.
        ctas: thread blocks that NCCL may have for the all-to-alls; None: as many as it likes.
        copies: instead of NCCL.
    """

    chunks: int
    overlaps: bool = False
    reserve: int | None = None
    ctas: int | None = None
    copies: bool = False


def nccl_group(ctas: int) -> "torch.distributed.ProcessGroup":
    """All ranks, of which NCCL's kernels have at most so many thread blocks."""
    options = torch.distributed.ProcessGroupNCCL.Options()
    options.config.max_ctas = ctas
    return torch.distributed.new_group(backend="nccl", pg_options=options)


def trace(training: Training, bucket: Bucket, parts: int, part: int, path: Path) -> Record:
    """Profiles one step on a rank's batch; rank 0 writes the kernels' intervals to `path`: their kind, starts and ends.

    Beside it, as NAME-kernels.json, goes [name, count, ms of all] of each kernel, the longest first.

    Returns:
        On this rank: from the first kernel to the last one's end, and shares of it: communication, and while nothing
        else runs.
    """
    from torch.profiler import ProfilerActivity, profile

    batch = training.batch(bucket, parts, part)
    training.processes.barrier()
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        training.forward_backward(bucket, parts, batch)
        training.update()
        torch.cuda.synchronize()
    # "nccl:..." are ranges around launches, not kernels.
    on_device = [e for e in recorded.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    kernels = [e for e in on_device if not e.name.startswith("nccl:")]
    first = min(e.time_range.start for e in kernels)
    spans = {"communication": [], "computation": []}
    by_name: dict[str, list[float]] = defaultdict(lambda: [0, 0.0])
    for e in kernels:
        by_name[e.name][0] += 1
        by_name[e.name][1] += (e.time_range.end - e.time_range.start) / 1000
        kind = "communication" if any(part in e.name.lower() for part in COMMUNICATION) else "computation"
        spans[kind].append(((e.time_range.start - first) / 1000, (e.time_range.end - first) / 1000))
    joined = {kind: merged(own) for kind, own in spans.items()}
    if training.processes.is_main:
        path.write_text(json.dumps(joined))
        longest = sorted(by_name.items(), key=lambda entry: -entry[1][1])
        table = [(name, count, round(ms, 4)) for name, (count, ms) in longest]
        path.with_name(f"{path.stem}-kernels.json").write_text(json.dumps(table, indent=0))
    whole = max(end for own in joined.values() for _, end in own)
    busy = {kind: sum(end - start for start, end in own) for kind, own in joined.items()}
    either = sum(end - start for start, end in merged([*joined["communication"], *joined["computation"]]))
    notes = {
        "communication_share": round(busy["communication"] / whole, 4),
        "communication_alone_share": round((either - busy["computation"]) / whole, 4),
        "bucket": bucket.name,
        "sequence_parallel": parts,
        "overlaps": training.optimizer.overlaps,
    }
    world_size = training.processes.world_size
    impl = f"{world_size} GPUs, one of them traced" if world_size > 1 else "1 GPU, traced"
    return Record.of_times("scaling", path.stem, impl, [whole], notes=notes)


def merged(spans: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Overlapping intervals as one."""
    out: list[tuple[float, float]] = []
    for start, end in sorted(spans):
        if out and start <= out[-1][1]:
            out[-1] = out[-1][0], max(out[-1][1], end)
        else:
            out.append((start, end))
    return out


# --------------------------------------------------------------------- sample


@torch.no_grad()
def sample(processes: Processes, args: argparse.Namespace) -> Iterator[Record]:
    """One prediction with guidance of SAMPLED_FRAMES frames: the transformer's work in a step of sampling."""
    from stdit_fast import STDiT2, STDiT2Config
    from stdit_fast.model.prediction import Predictor
    from stdit_fast.parallel.groups import SequenceGroups
    from stdit_fast.sample.shared import SharedPredictor

    on_gpu = processes.device.type == "cuda"
    torch.manual_seed(0)
    width = {} if on_gpu else {"hidden_size": 48, "num_heads": 4, "caption_channels": 32}
    with processes.device:
        model = STDiT2(STDiT2Config(depth=args.depth, **width)).to(torch.bfloat16 if on_gpu else torch.float32).eval()
    count = processes.world_size
    shared = count > 1
    if shared:
        groups = SequenceGroups(processes, [count])
        predictors = {"": SharedPredictor(model, groups[count])}
        if on_gpu:
            group = replace(groups[count], copies=groups.copies_of(groups[count]))
            predictors[COPIED] = SharedPredictor(model, group)
    else:
        predictors = {"": Predictor(model)}
    shape = 2, 4, SAMPLED_FRAMES, args.height // 8, args.width // 8
    x = torch.randn(shape, device=processes.device)
    one, parameter = torch.ones(2, device=processes.device), next(model.parameters())
    text = torch.randn(2, 1, TEXT_TOKENS, model.config.caption_channels, dtype=parameter.dtype, device=parameter.device)
    scalars = {"num_frames": SAMPLED_FRAMES, "height": args.height, "width": args.width, "fps": 24}
    scalars = {name: one * value for name, value in scalars.items()} | {"ar": one * args.height / args.width}
    case = f"one prediction with guidance, {args.height}x{args.width}, {SAMPLED_FRAMES} frames"
    for name, predictor in predictors.items():
        predictor.bind(model.encode_text(text), **scalars)
        times = []
        for i in range(WARMUP["sample"] + (args.steps or STEPS["sample"])):
            if on_gpu:
                torch.cuda.synchronize()
            started = time.perf_counter()
            predictor(x, torch.full((2,), 500, device=processes.device))
            if on_gpu:
                torch.cuda.synchronize()
            times += [1000 * (time.perf_counter() - started)] if i >= WARMUP["sample"] else []
        impl = f"{count} GPU{'s' * shared}{name}"
        yield Record.of_times("scaling", case, impl, times, notes={"depth": args.depth, "sequence_parallel": count})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", nargs="+", choices=list(STEPS))
    parser.add_argument("--config", default=str(Path(__file__).parents[1] / "train" / "configs" / "stage2.yaml"))
    parser.add_argument("--bucket_sizes", default="config", help="as in training: config, auto, or a table")
    parser.add_argument("--sequence_parallel", default="1", help="as in training, for the mix")
    parser.add_argument("--ranks", type=int, help="whose work a process alone does: of so many ranks")
    parser.add_argument("--rank", type=int, help="those of this one")
    parser.add_argument("--steps", type=int, help=f"of each; else {', '.join(f'{v} of {k}' for k, v in STEPS.items())}")
    parser.add_argument("--depth", type=int, default=28)
    parser.add_argument("--height", type=int, default=LONG["height"])
    parser.add_argument("--width", type=int, default=LONG["width"])
    parser.add_argument(
        "--overlap", choices=["both", "yes", "no"], default="both", help="communication and computation"
    )
    parser.add_argument("--variants", nargs="*", help="of long: those with one of these in their names; else all")
    parser.add_argument("--ctas", type=int, nargs="*", default=[], help="thread blocks of NCCL to try in long")
    parser.add_argument("--trace", help="intervals of one step's kernels go to TRACE-mix.json, TRACE-long-GPUS.json")
    parser.add_argument("--out", type=results_file, help="results file to append to")
    parser.add_argument("--deadline", type=float, default=1800, help="seconds until a process that hangs ends")
    args = parser.parse_args()
    args.overlap = {"both": (False, True), "yes": (True,), "no": (False,)}[args.overlap]
    end_after(args.deadline)
    processes = launch(seed=0, timeout=COLLECTIVE_TIMEOUT)
    if args.trace and processes.device.type != "cuda":
        raise SystemExit("--trace: there is no GPU whose kernels could be traced")
    for what in dict.fromkeys(args.what):
        if what == "mix":
            options = ["--bucket_sizes", args.bucket_sizes, "--sequence_parallel", args.sequence_parallel]
            config = parse(["--config", args.config, *options], checked=False)
            config.features.path = "given"  # nothing is encoded, which is what a table has to be measured for
            records = mix(processes, config, args)
        elif what == "long":
            records = long(processes, args)
        else:
            records = sample(processes, args)
        for record in records:
            if processes.is_main:
                shown = {k: v for k, v in record.notes.items() if k != "steps"}
                spread = f"{record.ms:.1f} ms ({record.ms_low:.1f} to {record.ms_high:.1f})"
                print(f"{record.case}, {record.impl}: {spread}", shown, flush=True)
                if args.out:
                    append(args.out, [record])
        gc.collect()
        if processes.device.type == "cuda":  # the next one has the memory for itself
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
    processes.close()
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
