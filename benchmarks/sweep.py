"""Batch sizes for this GPU: for every bucket of a config how many samples, in how many pieces, with what recomputed.

    python -m stdit_fast.benchmarks.sweep --config train/configs/stage2.yaml

so that all buckets take about the same time a step, and each fits into memory. A few probes fit a model of time
and memory (`sweep_model`); a step time is chosen from it, or given; every bucket is then measured at its size, and the
size corrected by what was measured. What of a batch does not fit at once runs in pieces, whose gradients add up, or has
blocks recomputed, whichever is faster. It is sized for the worst case: the aspect ratio with the most tokens, full
captions, autoencoder and text encoder where the config has them (measured by themselves, and added), optimizer,
average, and a margin, as buckets that take turns leave memory in parts.

FOLDER gets <config>.yaml for each config (with `-encoders` at its end where they run in the step), which
`--buckets auto` finds in its usual place; sweep.jsonl, every measurement; report.html, a page to read. The same command
goes on after an interruption: what is in sweep.jsonl is not measured again. After a change of kernels it is, and the
older measurements tell where to begin.
"""

import argparse
import hashlib
import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import date
from functools import lru_cache, partial
from pathlib import Path

import torch

import stdit_fast.kernels
from stdit_fast.benchmarks.records import Record, append, command_line, installed_versions
from stdit_fast.benchmarks.step import positions_of, step_flops
from stdit_fast.benchmarks.sweep_encoders import EncodingCost, measure_encoding
from stdit_fast.benchmarks.sweep_model import (
    GIB,
    Choice,
    Probe,
    Shape,
    StepModel,
    best_spread,
    best_target,
    closest,
    efficiency,
    exchanging,
    imbalance,
    most_even,
    spread,
    targets,
)
from stdit_fast.benchmarks.sweep_step import StepMeasurer
from stdit_fast.errors import ConfigError, run_command
from stdit_fast.media.files import whole_file
from stdit_fast.model import memory
from stdit_fast.model.graphs import MAX_TOKENS
from stdit_fast.parallel.allocator import expand_segments
from stdit_fast.train import bucket_tables
from stdit_fast.train.bucket_tables import BucketTable, Entry
from stdit_fast.train.buckets import Buckets
from stdit_fast.train.config import TrainConfig, model_config, parse, resolutions_file

# Where buckets take turns, their tensors of many sizes divide memory among themselves: with stage 2's 25 buckets at
# peaks of 66 to 72 of 79 GiB half of the steps ran out of it. Pieces make that room nearly free.
MARGIN = 0.15
# What NCCL and the gradients' buckets on their way take where there are several ranks.
COMMUNICATION = 1536 << 20
TRIES = 5  # probes of one bucket until its choice stands
PASSES = 3  # changes of a stage's step time after all of its buckets were measured
DRIFT_PROBES = 5  # that tell how much faster or slower other kernels are
BETTER = 0.03  # a choice is given up for another that is expected to be better by so much,
BETTER_TARGET = 0.04  # and a step time, with all that was measured for it, by so much, and no less even,
NEAR = 0.15  # what was measured serves, where there is no time to measure more, if it is so near to the step time
EVENER = 0.05  # or for one nearby whose spread is smaller by so much
T5_CHANNELS = 4096
ENCODERS = "-encoders"  # at the end of a name: they run in the step


@dataclass(frozen=True)
class Conditions:
    """What measurements depend on; those of other conditions say nothing.

    Attributes:
        device, memory_gib: the GPU.
        budget: bytes that a step may allocate.
        base: bytes of those that every step takes: weights, gradients, the optimizer's state, the average.
        world_size, model, text_tokens: as in a table.
        code: what `code_fingerprint` says of kernels and model.
        depth: blocks of the model.
    """

    device: str
    memory_gib: float
    budget: float
    base: float
    world_size: int
    model: dict
    text_tokens: int
    code: str = ""

    @property
    def depth(self) -> int:
        return self.model["depth"]


@dataclass
class Stage:
    """One config: its name, its buckets at their worst, its own batch sizes; and what came out."""

    name: str
    shapes: list[Shape]
    original: dict[Shape, int]
    seconds: float | None = None  # the target, once chosen
    first_seconds: float | None = None  # as it was before all of its buckets were measured
    choices: dict[Shape, Choice] = field(default_factory=dict)


def worst_shapes(config: TrainConfig) -> dict[Shape, int]:
    """Each (resolution, frames) that a config keeps, at the aspect ratio with the most tokens, with its batch size."""
    buckets = Buckets(config.buckets, resolutions_file(config.resolutions))
    worst: dict[tuple[str, int], Shape] = {}
    sizes = {}
    for b in buckets:
        shape = Shape(b.resolution, b.num_frames, b.height, b.width, positions_of(b.height, b.width))
        key = (b.resolution, b.num_frames)
        if key not in worst or _size(shape) > _size(worst[key]):
            worst[key], sizes[key] = shape, b.batch_size
    return {shape: sizes[key] for key, shape in worst.items()}


def _size(shape: Shape) -> tuple[int, int]:
    return shape.positions, shape.height * shape.width


def _batch_near(shape: Shape, tokens: float, depth: int) -> tuple[int, int]:
    """(batch of about so many tokens, blocks to recompute): none, or all where one sample has more than that.

    No batch is as small as those that CUDA graphs run, which take memory of their own.
    """
    batch = max(round(tokens / shape.tokens(1)), MAX_TOKENS // shape.tokens(1) + 1)
    return (min(batch, 256), 0) if shape.tokens(batch) <= 1.5 * tokens else (1, depth)


class Sweep:
    """The search.

    Args:
        stages: configs whose tables are wanted; what they have in common is measured once.
        conditions: of the measurements.
        measure: (shape, batch, checkpointed blocks, pieces) -> Probe.
        record: is given each new probe.
        known: probes of an earlier, interrupted sweep.
        hints: probes of other kernels, which tell where to begin.
        keeps: (bytes held by encoders, shape, samples at once, recomputed blocks) -> whether activations are kept.
        step_seconds: the target for all stages; None: chosen for each.
        encoding: what autoencoder and text encoder add; None: they do not run.
        verify: whether every choice is measured; False: it may follow from what is known of its bucket.
        longest_step: seconds beyond which no step time is aimed at, unless a single sample takes that long.
        out_of_time: asked before each probe. Once it says so nothing more is measured, and choices that were not follow
            from what is known, of other kernels too, as with `verify` False.
        say: prints progress.

    Raises:
        ConfigError: encoders that do not fit.
    """

    def __init__(
        self,
        stages: list[Stage],
        conditions: Conditions,
        measure: Callable[[Shape, int, int, int], Probe],
        record: Callable[[Probe], None] = lambda probe: None,
        known: list[Probe] | None = None,
        keeps: Callable[[float, Shape, int, int], bool] | None = None,
        step_seconds: float | None = None,
        encoding: EncodingCost | None = None,
        verify: bool = True,
        longest_step: float = math.inf,
        out_of_time: Callable[[], bool] = lambda: False,
        hints: list[Probe] | None = None,
        say: Callable[[str], None] = lambda line: None,
    ):
        self.stages, self.conditions, self.measure, self.record = stages, conditions, measure, record
        self.step_seconds, self.encoding, self.verify, self.say = step_seconds, encoding, verify, say
        self.longest_step, self.out_of_time = longest_step, out_of_time
        held = encoding.held if encoding else 0
        self.budget = conditions.budget - held
        self.model = StepModel(
            conditions.depth,
            conditions.base,
            known or [],
            encoding.seconds if encoding else None,
            partial(keeps, held) if keeps else None,
            hints or [],
        )
        if encoding and conditions.base + encoding.peak > self.budget:
            remedy = f"encoding takes {encoding.peak / GIB:.1f} GiB beside weights and states; use a smaller number"
            raise ConfigError("vae.micro_batch_size", None, remedy)
        self.count = 0

    @property
    def shapes(self) -> list[Shape]:
        return list(dict.fromkeys(shape for stage in self.stages for shape in stage.shapes))

    def run(self, settled: Callable[[Stage], None] = lambda stage: None) -> None:
        """Fits, chooses, verifies; every stage then has its target and choices, all of them measured.

        Args:
            settled: is given each stage as soon as it has.
        """
        for shape, batch, checkpointed in self._anchors() if self.verify else ():
            if not self.model.hinted(shape):
                self._probe(shape, batch, checkpointed)
        if self.model.time is None:
            remedy = "no step ran, not even small ones; what else holds this GPU's memory?"
            raise ConfigError("buckets", [stage.name for stage in self.stages], remedy)
        for stage in self.stages:
            self._choose_target(stage)
            if self.verify and not self.out_of_time() and self._measure_drift(stage):
                stage.seconds = None
                self._choose_target(stage)
            self._settle(stage)
            for _ in range(PASSES if self.verify else 0):  # what was measured may speak for another step time
                if self.out_of_time() or not self._choose_target(stage):
                    break
                self._settle(stage)
            settled(stage)

    # ------------------------------------------------------------------ probes

    def _anchors(self) -> list[tuple[Shape, int, int]]:
        """What is measured first: a small step of each bucket, and large ones, with blocks recomputed, of the extremes.

        Nothing is known of memory then, so tokens are such that what is expected to be kept leaves plenty of room: 22
        values a token, channel and block, of recomputed blocks 2, and 45 for the block that is under way.
        """
        depth, shapes = self.conditions.depth, self.shapes
        value = 2 * self.conditions.model["hidden_size"]
        room = 0.6 * (self.conditions.budget - self.conditions.base)
        kept, again = room / (value * 22 * depth), room / (value * (2 * depth + 45))
        images = sorted((s for s in shapes if s.frames == 1), key=lambda s: s.positions)
        videos = sorted((s for s in shapes if s.frames > 1), key=lambda s: s.positions)
        longest = sorted(videos, key=lambda s: s.frames)
        extremes = dict.fromkeys([*images[:1], *images[-1:], *videos[:1], *videos[-1:], *longest[-1:]])
        anchors = [(s, *_batch_near(s, kept, depth)) for s in shapes]
        for i, shape in enumerate(extremes):
            anchors.append((shape, _batch_near(shape, again / 2, depth)[0], depth if i % 2 else depth // 2))
        return list(dict.fromkeys(anchors))

    def _measure_drift(self, stage: Stage) -> bool:
        """How other kernels' times differ from these, by a few choices of buckets that have no probes yet.

        The step time is chosen anew then, before each bucket is measured for it. Answers whether anything was measured.
        """
        unknown = [s for s in stage.shapes if self.model.hinted(s) and not self.model.known_itself(s)]
        if len(unknown) < len(stage.shapes) / 2:
            return False
        unknown.sort(key=lambda s: (s.frames, s.positions))
        for shape in unknown[:: max(1, len(unknown) // DRIFT_PROBES)]:
            choice = closest(self._options_of(shape, stage), stage.seconds)
            self._probe(shape, choice.batch, choice.checkpointed, choice.pieces)
        return True

    def _probe(self, shape: Shape, batch: int, checkpointed: int, pieces: int = 1) -> None:
        """Measures, unless that is known."""
        if self.out_of_time() or self.model.find(shape, batch, checkpointed, pieces) is not None:
            return
        started = time.perf_counter()
        probe = self.measure(shape, batch, checkpointed, pieces)
        self.count += 1
        self.model.add(probe)
        self.record(probe)
        told = f"{probe.median:8.3f} s {probe.peak / GIB:7.1f} GiB" if probe.ran else "      out of memory  "
        took = time.perf_counter() - started
        how = f"batch {batch:<4} in {pieces:<2} recomputed {checkpointed:<3}"
        self.say(f"{shape.name:<10} {how}{told}   ({took:.1f} s)")

    # ----------------------------------------------------------------- choosing

    def _options(self, stage: Stage, longest: float) -> dict[Shape, list[Choice]]:
        try:
            return {s: self.model.options(s, self.budget, longest) for s in stage.shapes}
        except ValueError as error:
            remedy = f"{error}; give it keep_prob 0, split its frames over GPUs, or take a GPU with more memory"
            raise ConfigError("buckets", stage.name, remedy) from error

    def _longest(self, stage: Stage) -> float:
        """Seconds beyond which no step time is considered."""
        if self.step_seconds is not None:
            return 1.5 * self.step_seconds
        first = self._options(stage, 0.0)
        return 5 * max(found[0].seconds for found in first.values())

    def _choose_target(self, stage: Stage) -> bool:
        """Sets the step time; says whether it is another than before."""
        if self.step_seconds is not None:
            changed, stage.seconds = stage.seconds is None, self.step_seconds
            return changed
        options = self._options(stage, self._longest(stage))
        best = best_target(options, self.longest_step)
        if stage.seconds is not None:
            near = min(stage.first_seconds, self.longest_step / 1.25)  # about which a more even one is looked for
            best = self._better_target(options, stage.seconds, near, best)
            if best is None:
                return False
        else:  # what another stage aims at is measured already, where they share buckets
            tried = targets(options, self.longest_step)
            others = [s.seconds for s in self.stages if s.seconds is not None and tried[0] <= s.seconds <= tried[-1]]
            serve = [t for t in others if self._better_target(options, t, t, best) is None]
            best = stage.first_seconds = serve[0] if serve else best
        stage.seconds = best
        self.say(f"{stage.name}: {best:.3f} s a step")
        return True

    @staticmethod
    def _better_target(options: dict[Shape, list[Choice]], seconds: float, near: float, best: float) -> float | None:
        """`best`, if it is worth leaving `seconds` for it; else a step time near `near` with much evener steps."""

        def choices(target: float) -> list[Choice]:
            return [closest(found, target) for found in options.values()]

        now, then, nearby = choices(best), choices(seconds), most_even(options, near)
        uneven = spread(c.seconds for c in then)
        better = exchanging(options, now) - exchanging(options, then) >= BETTER_TARGET
        if better and spread(c.seconds for c in now) <= uneven:
            return best
        return nearby if uneven - spread(c.seconds for c in choices(nearby)) >= EVENER else None

    def _settle(self, stage: Stage) -> None:
        """Chooses for each bucket; measures it, and chooses anew by what was measured, until the choice stands."""
        for shape in stage.shapes:
            choice = closest(self._options_of(shape, stage), stage.seconds)
            for _ in range(TRIES if self.verify else 0):
                measured = self.model.measured(shape, self.budget)
                if self.out_of_time() or self._stands(choice, measured, stage.seconds):
                    break
                self._probe(shape, choice.batch, choice.checkpointed, choice.pieces)
                choice = closest(self._options_of(shape, stage), stage.seconds)
            measured = self.model.measured(shape, self.budget)
            if not self.verify or (self.out_of_time() and not self._serves(measured, stage.seconds)):
                stage.choices[shape] = choice
                continue
            if not measured:
                raise ConfigError(
                    "buckets", shape.name, "no size of it was found that fits this GPU; give it keep_prob 0"
                )
            stage.choices[shape] = self._leanest(measured, stage.seconds)

    def _leanest(self, measured: list[Choice], seconds: float) -> Choice:
        """The best of what was measured, with fewer recomputed blocks where these fit and save time."""
        best = self._best(measured, seconds)
        leaner = self.model.fitting(best.shape, best.batch, self.budget, best.pieces)
        if leaner is not None and leaner.seconds < (1 - BETTER) * best.seconds:
            self._probe(leaner.shape, leaner.batch, leaner.checkpointed, leaner.pieces)
        same = [c for c in self.model.measured(best.shape, self.budget) if c.batch == best.batch]
        return min(same, key=lambda c: c.seconds)

    def _serves(self, measured: list[Choice], seconds: float) -> bool:
        """Whether something measured is about as long as a step should be, where there is no time to measure better."""
        return bool(measured) and abs(math.log(self._best(measured, seconds).seconds / seconds)) <= NEAR

    def _stands(self, choice: Choice, measured: list[Choice], seconds: float) -> bool:
        """Whether the best of what was measured is about as good as the choice: as near to the target, and as fast."""
        if not measured:
            return False
        best = self._best(measured, seconds)
        nearer = abs(math.log(best.seconds / seconds)) - abs(math.log(choice.seconds / seconds))
        faster = best.seconds / best.batch / (choice.seconds / choice.batch) - 1
        return nearer < BETTER and faster < BETTER

    @staticmethod
    def _best(measured: list[Choice], seconds: float) -> Choice:
        """The one nearest to the target; of those about as near the one that takes the fewest seconds a sample."""
        nearest = closest(measured, seconds)
        distance = abs(math.log(nearest.seconds / seconds)) + BETTER
        near = [c for c in measured if abs(math.log(c.seconds / seconds)) <= distance]
        return min(near, key=lambda c: c.seconds / c.batch)

    def _options_of(self, shape: Shape, stage: Stage) -> list[Choice]:
        only = Stage(stage.name, [shape], {})
        return self._options(only, 1.5 * stage.seconds)[shape]

    # ------------------------------------------------------------------- tables

    def table(self, stage: Stage) -> BucketTable:
        """What came out, as training reads it."""
        entries = {}
        for shape, choice in stage.choices.items():
            probe = (
                self.model.find(shape, choice.batch, choice.checkpointed, choice.pieces) if choice.measured else None
            )
            around = (min(probe.seconds) - probe.median, max(probe.seconds) - probe.median) if probe else (0.0, 0.0)
            entries[shape.resolution, shape.frames] = Entry(
                batch_size=choice.batch,
                checkpointed=choice.checkpointed,
                seconds=round(choice.seconds, 4),
                seconds_low=round(choice.seconds + around[0], 4),
                seconds_high=round(choice.seconds + around[1], 4),
                peak_gib=round((choice.peak + (self.encoding.held if self.encoding else 0)) / GIB, 2),
                tokens=shape.tokens(choice.batch),
                height=shape.height,
                width=shape.width,
                measured=choice.measured,
                pieces=choice.pieces,
            )
        of = self.conditions
        return BucketTable(
            device=of.device,
            memory_gib=round(of.memory_gib, 2),
            world_size=of.world_size,
            encoders=self.encoding is not None,
            step_seconds=round(stage.seconds, 3),
            model=of.model,
            text_tokens=of.text_tokens,
            buckets=entries,
            evenness=self.evenness(stage),
            versions=installed_versions(),
            date=date.today().isoformat(),
            command=command_line(),
        )

    def originals(self, stage: Stage) -> list[tuple[Choice, bool]]:
        """What is expected of the config's own batch sizes, in the order of the choices, and whether they fit."""
        found = []
        for shape in stage.choices:
            batch, depth = stage.original[shape], self.conditions.depth
            fitting = self.model.fitting(shape, batch, self.budget)
            seconds, peak = self.model.seconds(shape, batch, depth), self.model.peak(shape, batch, depth)
            found.append((fitting or Choice(shape, batch, depth, seconds, peak), fitting is not None))
        return found

    def evenness(self, stage: Stage) -> dict[str, float]:
        """How far step times lie apart.

        Returns:
            spread: slowest bucket over fastest, less 1; best_spread: what whole batch sizes allow near that step time;
            waiting: slowest over mean, less 1; of_best_rates: `efficiency`; original_spread, original_waiting: with the
            config's batch sizes; original_too_large: how many of these do not fit.
        """
        options = self._options(stage, 1.5 * stage.seconds)
        seconds = [c.seconds for c in stage.choices.values()]
        before = self.originals(stage)
        values = {
            "spread": spread(seconds),
            "best_spread": min(spread(seconds), best_spread(options, stage.seconds)),
            "waiting": imbalance(seconds),
            "of_best_rates": efficiency(options, list(stage.choices.values())),
            "original_spread": spread(c.seconds for c, _ in before),
            "original_waiting": imbalance(c.seconds for c, _ in before),
            "original_too_large": sum(not fits for _, fits in before),
        }
        return {key: round(value, 4) for key, value in values.items()}


def summary(stage: Stage) -> str:
    """A line: how even the steps are."""
    seconds = [c.seconds for c in stage.choices.values()]
    return (
        f"{stage.name}: {len(seconds)} buckets, {min(seconds):.3f} to {max(seconds):.3f} s a step, spread "
        f"{spread(seconds):.1%}, slowest over mean {imbalance(seconds):.1%}"
    )


# ------------------------------------------------------------------- the files


def as_record(probe: Probe, conditions: Conditions, config) -> Record:
    """A probe as a line of results."""
    shape, tokens = probe.shape, conditions.text_tokens
    return Record.of_times(
        "sweep",
        f"{shape.name}-{probe.batch}{f'-in-{probe.pieces}' * (probe.pieces > 1)}-recomputed-{probe.checkpointed}",
        "step",
        [1000 * s for s in probe.seconds],
        flops=step_flops(config, probe.batch, shape.frames, shape.positions, tokens),
        peak_gib=round(probe.peak / GIB, 3) if probe.ran else None,
        device=conditions.device,
        notes={
            "shape": [shape.resolution, shape.frames, shape.height, shape.width, shape.positions],
            "batch": probe.batch,
            "checkpointed": probe.checkpointed,
            "pieces": probe.pieces,
            "seconds": [round(s, 5) for s in probe.seconds],
            "out_of_memory": not probe.ran,
            "keeps_activations": probe.keeps,
            "conditions": _fingerprint(conditions),
        },
    )


def _fingerprint(conditions: Conditions) -> dict:
    return {
        "memory_gib": round(conditions.memory_gib, 2),
        "world_size": conditions.world_size,
        "model": conditions.model,
        "text_tokens": conditions.text_tokens,
        "code": conditions.code,
    }


def code_fingerprint(*more: str) -> str:
    """What tells these kernels and this model from others: a digest of their files, the CUDA library's among them.

    Args:
        more: folders of the package that count too.
    """
    package = Path(stdit_fast.__file__).parent
    folders = [Path(stdit_fast.kernels.__file__).parent, *(package / n for n in ("diffusion", "model", "ops", *more))]
    files = [path for folder in folders for path in sorted(folder.glob("*.py"))]
    digest = hashlib.sha256()
    for path in [*files, *sorted(package.glob("libstdit_cuda*"))]:
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def read_probes(path: Path, conditions: Conditions) -> tuple[list[Probe], list[Probe]]:
    """(probes of an earlier sweep under the same conditions, hints: those of other kernels).

    What was measured again counts as it was the last time. A line that a kill left half written is passed over. Small
    steps are no hints: CUDA graphs took memory in these.
    """
    probes: dict[tuple, Probe] = {}
    hints: dict[tuple, Probe] = {}
    wanted = json.loads(json.dumps(_fingerprint(conditions)))
    for line in path.read_text().splitlines() if path.is_file() else ():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        notes = record["notes"]
        if record["device"] != conditions.device or notes["conditions"] | {"code": wanted["code"]} != wanted:
            continue
        resolution, *sizes = notes["shape"]
        probe = Probe(
            Shape(resolution, *sizes),
            notes["batch"],
            notes["checkpointed"],
            tuple(notes["seconds"]),
            round((record["peak_gib"] or 0) * GIB),
            notes.get("keeps_activations", False),
            notes.get("pieces", 1),
        )
        step = probe.shape, probe.batch, probe.checkpointed, probe.pieces
        if notes["conditions"].get("code") == wanted["code"]:
            probes[step] = probe
        elif probe.shape.tokens(probe.at_once) > MAX_TOKENS:
            hints[step] = probe
    return list(probes.values()), list(hints.values())


def known_encoding(path: Path, of: dict, shapes: list[Shape]) -> EncodingCost | None:
    """What encoding costs, if it stands in `path` for these conditions and all of these sizes."""
    try:
        content = json.loads(path.read_text())
        if content["of"] != json.loads(json.dumps(of)):
            return None
        frames = {(height, width): seconds for height, width, seconds in content["frame_seconds"]}
        cost = EncodingCost(tuple(content["text_seconds"]), frames, content["held"], content["peak"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return cost if all((s.height, s.width) in frames for s in shapes) else None


def keep_encoding(path: Path, of: dict, cost: EncodingCost) -> None:
    """Writes it for `known_encoding`."""
    frames = [[*size, seconds] for size, seconds in cost.frame_seconds.items()]
    content = {"of": of, "text_seconds": cost.text_seconds, "frame_seconds": frames, "held": cost.held,
               "peak": cost.peak, "versions": installed_versions(), "date": date.today().isoformat()}  # fmt: skip
    with whole_file(path) as draft:
        draft.write_text(json.dumps(content, indent=1) + "\n")


# ----------------------------------------------------------------- command line


def main(arguments: list[str] | None = None) -> int:
    args = parse_arguments(arguments)
    configs = [read_config(path) for path in args.config]
    first = configs[0]
    sizes = [{key: getattr(c.model, key) for key in bucket_tables.MODEL_KEYS} for c in configs]
    if any(size != sizes[0] for size in sizes):
        raise ConfigError("--config", [str(p) for p in args.config], "their models differ; sweep them one by one")
    if not torch.cuda.is_available():
        raise ConfigError("--config", str(args.config[0]), "a sweep measures, and there is no GPU; run it on one")
    with_features = first.features.path is not None
    modes = {"auto": [not with_features], "on": [True], "off": [False], "both": [False, True]}[args.encoders]
    from stdit_fast.benchmarks.sweep_report import write_report  # which knows this module

    _say(expand_segments())  # as training does; else gaps between pieces of many sizes cost time
    device = torch.device("cuda", torch.cuda.current_device())
    total = torch.cuda.get_device_properties(device).total_memory
    if args.memory_gib:
        memory.hold_to(args.memory_gib)
    limit, ballast = memory.memory_limit(device.index), COMMUNICATION if args.world_size > 1 else 0
    model = model_config(first, T5_CHANNELS)
    measurer = StepMeasurer(
        model,
        device,
        world_size=args.world_size,
        text_tokens=max(c.text_encoder.model_max_length for c in configs),
        ballast=ballast,
    )
    conditions = Conditions(
        device=torch.cuda.get_device_name(),
        memory_gib=args.memory_gib or total / GIB,
        budget=(1 - args.margin) * limit,
        base=measurer.base,
        world_size=args.world_size,
        model=sizes[0],
        text_tokens=measurer.text_tokens,
        code=code_fingerprint(),
    )
    out = args.out or bucket_tables.user_folder() / bucket_tables.folder_name(conditions.device, conditions.memory_gib)
    file, started = out / "sweep.jsonl", time.perf_counter()
    originals = {path.stem: worst_shapes(config) for path, config in zip(args.config, configs, strict=True)}
    encoding = None
    if True in modes:
        shapes = list(dict.fromkeys(shape for original in originals.values() for shape in original))
        encoding = _encoding(out / "encoders.json", conditions, first.vae.micro_batch_size, shapes, device)
        _say(f"{encoding}")
    probes, hints = read_probes(file, conditions)
    keeps = lru_cache(maxsize=None)(partial(keeps_activations, model, limit, conditions.base))

    def sweep_of(stages: list[Stage], known: list[Probe], encoders: bool) -> Sweep:
        return Sweep(
            stages,
            conditions,
            measurer,
            record=lambda probe: append(file, [as_record(probe, conditions, model)]),
            known=known,
            keeps=keeps,
            longest_step=args.longest_step,
            out_of_time=lambda: time.perf_counter() - started > args.seconds,
            step_seconds=args.step_seconds,
            encoding=encoding if encoders else None,
            verify=args.encoders != "both" or not encoders,
            hints=hints,
            say=_say,
        )

    sweep = sweep_of([Stage(name, list(o), o) for name, o in originals.items()], probes, modes == [True])
    if sweep.encoding:
        for stage in sweep.stages:
            stage.name += ENCODERS
    with_encoders: list[Stage] = []

    def settled(stage: Stage) -> None:
        _write(out, sweep, stage)
        if args.encoders == "both":  # at once, so that an interruption leaves both
            with_encoders.append(Stage(f"{stage.name}{ENCODERS}", stage.shapes, stage.original))
            other = sweep_of(with_encoders[-1:], sweep.model.probes, True)
            other.run(partial(_write, out, other))

    _say(
        f"{conditions.device}, {sweep.budget / GIB:.1f} of {limit / GIB:.1f} GiB for a step, {len(probes)} probes "
        f"known, {len(hints)} of other kernels"
    )
    sweep.run(settled)
    write_report(out / f"report{ENCODERS * (modes == [True])}.html", sweep, model)
    if with_encoders:
        write_report(out / f"report{ENCODERS}.html", sweep_of(with_encoders, sweep.model.probes, True), model)
    _say(f"{sweep.count} probes, {time.perf_counter() - started:.0f} s; tables, measurements and report in {out}")
    return 0


def _encoding(path: Path, conditions: Conditions, vae_frames, shapes: list[Shape], device) -> EncodingCost:
    """Measures what encoding costs, unless that is known."""
    of = {
        "device": conditions.device,
        "text_tokens": conditions.text_tokens,
        "vae_frames": vae_frames,
        "code": code_fingerprint("encoders"),
    }
    cost = known_encoding(path, of, shapes)
    if cost is None:
        cost = measure_encoding(shapes, device, text_tokens=conditions.text_tokens, vae_frames=vae_frames, say=_say)
        keep_encoding(path, of, cost)
    return cost


def _write(folder: Path, sweep: Sweep, stage: Stage) -> None:
    bucket_tables.write(folder / f"{stage.name}.yaml", sweep.table(stage))
    _say(summary(stage))


def keeps_activations(
    model, limit: float, base: float, held: float, shape: Shape, batch: int, checkpointed: int
) -> bool:
    """Whether the model keeps the MLPs' activations of so many samples at once on a GPU, as it decides itself."""
    tokens, kept = shape.tokens(batch), memory.KEPT_UNITS + 2 * model.mlp_ratio
    needed = memory.needed_bytes(2 * model.hidden_size * tokens, model.depth, kept, checkpointed)
    return needed <= memory.activation_budget(limit, base + held, memory.text_bytes(model, batch))


def _say(line: str) -> None:
    print(line, flush=True)


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="stdit_fast.benchmarks.sweep",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", nargs="+", type=Path, required=True, help="training configs, one table each")
    parser.add_argument("--out", type=Path, help="folder of the tables; by default where `--buckets auto` looks first")
    parser.add_argument("--step-seconds", type=float, help="step time to aim at; by default chosen for throughput")
    parser.add_argument("--longest-step", type=float, default=math.inf, help="seconds that a chosen step takes at most")
    parser.add_argument(
        "--seconds", type=float, default=math.inf,
        help="after so many nothing more is measured: what is not follows from what is known, and tables say so",
    )  # fmt: skip
    parser.add_argument("--world-size", type=int, default=1, help="GPUs that share the optimizer's state (ZeRO)")
    parser.add_argument(
        "--encoders", choices=("auto", "on", "off", "both"), default="auto",
        help="whether autoencoder and T5-XXL run in the step; auto: where the config reads no features; both: tables "
        "for either, those with encoders from the same probes",
    )  # fmt: skip
    parser.add_argument("--margin", type=float, default=MARGIN, help="share of the memory that is left alone")
    parser.add_argument("--memory-gib", type=float, help="use at most this much of the GPU's memory")
    args = parser.parse_args(arguments)
    for name, low, high in (
        ("step_seconds", 1e-3, 3600),
        ("longest_step", 1e-3, math.inf),
        ("seconds", 0, math.inf),
        ("world_size", 1, 1 << 20),
        ("margin", 0, 0.5),
    ):
        value = getattr(args, name)
        if value is not None and not low <= value <= high:
            raise ConfigError(f"--{name.replace('_', '-')}", value, f"use a value between {low} and {high}")
    return args


def read_config(path: Path) -> TrainConfig:
    """A training config, without what a run needs beside (data, weights)."""
    return parse(["--config", str(path)], program="stdit_fast.benchmarks.sweep", checked=False)


if __name__ == "__main__":
    sys.exit(run_command(main))
