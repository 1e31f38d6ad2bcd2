"""How long a recipe takes on so many GPUs, and how wrong that could be.

    python -m stdit_fast.benchmarks.plan --gpus 64 --recipe train/configs/recipe_v1_1.yaml

Step times come from the sweep's tables for a GPU (train/configs/buckets/<gpu>/<stage>.yaml), the mix of buckets from
the recipe's sizes or a metadata table (--data), communication from given bandwidths. A projection is held against a
run of training with

    python -m stdit_fast.benchmarks.plan --check outputs/stage2/metrics.jsonl --table TABLE.yaml

(or records of the suite "train_step"), which exits with 1 where the run is outside the projection's bounds. Bounds take
all that is uncertain at its worst together; they are no standard deviations.
"""

import argparse
import dataclasses
import functools
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml

import stdit_fast.train
from stdit_fast.benchmarks import plan_model
from stdit_fast.benchmarks.plan_check import WARMUP, check_run
from stdit_fast.benchmarks.plan_model import Encoders, Estimate, Network, Sizes, estimate, samples_of_an_epoch
from stdit_fast.benchmarks.plan_times import BETWEEN_MACHINES, Interval, Times
from stdit_fast.benchmarks.readme import latest
from stdit_fast.errors import ConfigError, nearest
from stdit_fast.media.files import whole_file
from stdit_fast.train import bucket_tables
from stdit_fast.train.buckets import Buckets
from stdit_fast.train.config import read_yaml
from stdit_fast.train.metadata import load_metadata

CONFIGS = Path(stdit_fast.train.__file__).with_name("configs")
RESULTS = Path(__file__).with_name("results")
DEFAULT_GPU = "h100-80gb"
ENCODED_FRAMES, CAPTIONS = "vae-272x240x424", "t5-17-full"  # cases of the encoders' suite; captions of 200 tokens
PHASE_KEYS = {"phase", "steps", "table", "data", "days", "images_only"}
RECIPE_KEYS = {"gpus", "gpu", "days", "phases", "frame_interval", "data", "sizes", "encoders"}
OPTIONAL_KEYS = {"original", "original_parts", "original_seconds"}
COLUMNS = (
    f"{'phase':<10}{'steps':>8}{'s a step':>21}{'days, features':>21}{'days, online':>21}{'original, online':>21}"
    f"{'report':>8}{'measured':>10}"
)


@dataclass(frozen=True)
class Phase:
    """One phase of a recipe.

    Attributes:
        name, steps, table: what the original trained, how long, with which stage's buckets.
        data: which data set of the recipe.
        days: that the original took, if it is known.
        images_only: whether videos take no part.
    """

    name: str
    steps: int
    table: str
    data: str
    days: float | None = None
    images_only: bool = False

    def buckets(self, folder: Path) -> Buckets:
        """Its buckets, with the original's batch sizes."""
        path = folder / f"{self.table}.yaml"
        if not path.is_file():
            known = [p.stem for p in folder.glob("stage*.yaml")]
            raise ConfigError(
                f"phases.{self.name}.table", self.table, f"there is no {path}; {nearest(self.table, known)}"
            )
        table = yaml.safe_load(path.read_text())["buckets"]
        if self.images_only:
            table = {r: {1: lengths[1]} for r, lengths in table.items() if 1 in lengths}
        return Buckets(table)


@dataclass(frozen=True)
class Recipe:
    """What the original did; see train/configs/recipe_v1_1.yaml."""

    gpus: int
    gpu: str
    days: float
    phases: list[Phase]
    frame_interval: int
    data: dict[str, dict[str, int]]
    sizes: dict[str, list]
    encoders: Encoders
    original: dict[str, Times]
    original_seconds: dict[str, float]
    folder: Path

    @classmethod
    def read(cls, path: str | Path) -> "Recipe":
        """Reads it. Raises ConfigError for keys and values that cannot be."""
        path = Path(path)
        content = read_yaml("recipe", path, "train/configs/recipe_v1_1.yaml is one")
        _check_keys(content, RECIPE_KEYS | OPTIONAL_KEYS, RECIPE_KEYS, str(path))
        phases = []
        for entry in content["phases"]:
            _check_keys(entry, PHASE_KEYS, {"phase", "steps", "table", "data"}, f"{path}: phases")
            if not isinstance(entry["steps"], int) or entry["steps"] < 1:
                raise ConfigError("phases.steps", entry["steps"], "optimizer steps of the phase, 1 or more")
            if entry["data"] not in content["data"]:
                raise ConfigError("phases.data", entry["data"], nearest(entry["data"], content["data"]))
            phases.append(Phase(entry["phase"], *(entry[k] for k in ("steps", "table", "data")), entry.get("days"),
                                bool(entry.get("images_only"))))  # fmt: skip
        for kind in ("videos", "images"):
            rows = content["sizes"].get(kind, [])
            if not rows or abs(sum(row[0] for row in rows) - 1) > 1e-6:
                raise ConfigError(f"sizes.{kind}", rows, "rows of [share, frames, height, width], shares summing to 1")
        values = {name: content[name] for name in ("gpus", "gpu", "days", "frame_interval", "data", "sizes")}
        try:
            encoders = Encoders(**{k: float(v) if k != "source" else v for k, v in content["encoders"].items()})
        except (TypeError, ValueError) as error:
            remedy = f"pixels_per_second, captions_per_second, source: {error}"
            raise ConfigError("encoders", content["encoders"], remedy) from error
        original = {stage: Times.of_steps("H100", steps) for stage, steps in content.get("original", {}).items()}
        values |= dict(original=original, original_seconds=content.get("original_seconds", {}))
        return cls(phases=phases, encoders=encoders, folder=path.parent, **values)

    def sizes_of(self, data: str) -> Sizes:
        """The data set as the recipe has it."""
        counts = self.data[data]
        return Sizes.of_rows(
            [[share * counts[k], *size] for k in ("videos", "images") for share, *size in self.sizes[k]]
        )


def _check_keys(content: dict, known: set[str], wanted: set[str], where: str) -> None:
    for key in content:
        if key not in known:
            raise ConfigError(str(key), content[key], f"{where} has an unknown key; {nearest(key, known)}")
    for key in sorted(wanted - content.keys()):
        raise ConfigError(key, None, f"{where} needs it")


# ------------------------------------------------------------------ step times


def table_folder(name: str | None) -> Path:
    """The folder of a GPU's tables: a path, a name among the user's or the shipped, or that of this machine's GPU."""
    folders = (bucket_tables.user_folder(), bucket_tables.SHIPPED)
    if name is not None and Path(name).is_dir():
        return Path(name)
    wanted = name
    if wanted is None and torch.cuda.is_available():
        memory = torch.cuda.get_device_properties(0).total_memory / 2**30
        wanted = bucket_tables.folder_name(torch.cuda.get_device_name(), memory)
        if not any((folder / wanted).is_dir() for folder in folders):
            wanted = None
    wanted = wanted or DEFAULT_GPU
    found = [folder / wanted for folder in folders if (folder / wanted).is_dir()]
    if not found and name is not None:
        known = sorted({p.name for folder in folders if folder.is_dir() for p in folder.iterdir() if p.is_dir()})
        raise ConfigError("tables", name, f"no sweep of it is here; {nearest(name, known)}")
    return found[0] if found else folders[1] / wanted


def times_of(folder: Path, stage: str, encoders: bool) -> Times | None:
    """The sweep's step times of a stage; None where there are none."""
    path = folder / f"{stage}{'-encoders' * encoders}.yaml"
    if not path.is_file():
        return None
    probes = RESULTS / folder.name.partition("-")[0] / "sweep.jsonl"
    return Times.of_table(bucket_tables.read(path), probes if probes.is_file() else None)


@functools.cache
def fitted_times() -> Times:
    """Where there is no table: a fit to the sweep's probes or to whole steps among the results, whichever is closer."""
    problems = []
    for gpu in ("h100", "h200"):
        found = []
        for name, read in (("sweep", Times.of_probes), ("step", Times.of_records)):
            path = RESULTS / gpu / f"{name}.jsonl"
            try:
                found += [read(path)] if path.is_file() else []
            except ConfigError as error:
                problems.append(str(error))
        if any(found):
            return min(filter(None, found), key=lambda times: times.fit.error)
    raise ConfigError("tables", "none", f"no step was measured; run stdit_fast.benchmarks.sweep. {' '.join(problems)}")


def our_encoders(recipe: Recipe, args: argparse.Namespace) -> Encoders:
    """Speeds that are given, else those measured of ours on an H100, else the recipe's, which are the libraries'."""
    found, path = recipe.encoders, RESULTS / "h100" / "encoders.jsonl"
    if path.is_file():
        records = latest(path)
        try:
            frames, captions = (records["encoders", case, "fused"]["ms"] / 1e3 for case in (ENCODED_FRAMES, CAPTIONS))
        except KeyError:
            pass
        else:
            pixels = math.prod(map(int, ENCODED_FRAMES.removeprefix("vae-").split("x")))
            found = Encoders(pixels / frames, int(CAPTIONS.split("-")[1]) / captions, "h100/encoders.jsonl, ours")
    given = {k: getattr(args, k) for k in ("pixels_per_second", "captions_per_second") if getattr(args, k)}
    return dataclasses.replace(found, **given, source="given") if given else found


# ------------------------------------------------------------------ the plan


@dataclass(frozen=True)
class Row:
    """A phase, with features and with online encoders; `original`: its own code, where its steps are known."""

    phase: Phase
    features: Estimate
    online: Estimate
    original: Estimate | None
    times: Times


def plan(recipe: Recipe, args: argparse.Namespace, sizes: Sizes | None = None) -> list[Row]:
    """Every phase's estimates. `sizes`: of a data set that takes the place of the recipe's."""
    folder, network = table_folder(args.tables), network_of(args)
    common = dict(gpus=args.gpus, network=network, original_gpus=recipe.gpus, keep=args.keep)
    rows = []
    for phase in recipe.phases:
        buckets = phase.buckets(recipe.folder)
        mix = samples_of_an_epoch(sizes or recipe.sizes_of(phase.data), buckets, recipe.frame_interval)
        if not mix.any():
            raise ConfigError("data", phase.data, f"no sample fits the buckets of the phase {phase.name}")
        swept = times_of(folder, phase.table, encoders=False)
        times = swept or fitted_times()
        common |= dict(steps=phase.steps, grouped=swept is not None)
        features = estimate(mix, buckets, times, **common)
        with_encoders = times_of(folder, phase.table, encoders=True)
        if with_encoders is not None:
            online = estimate(mix, buckets, with_encoders, **common)
        else:
            online = estimate(mix, buckets, times, **common, encoders=our_encoders(recipe, args))
        original = None
        if phase.table in recipe.original:
            its_own = common | dict(keep="samples", grouped=False, encoders=recipe.encoders)
            original = estimate(mix, buckets, recipe.original[phase.table], **its_own)
        rows.append(Row(phase, features, online, original, times))
    return rows


def network_of(args: argparse.Namespace) -> Network:
    return Network(args.nvlink_gb_s * 1e9, args.network_gb_s * 1e9, args.gpus_per_node, args.overlap)


def total(rows: list[Row], which: str, field: str) -> tuple[float, float, float]:
    """(low, mid, high) of all phases."""
    return tuple(sum(part) for part in zip(*(getattr(getattr(r, which), field) for r in rows), strict=True))


def describe(recipe: Recipe, rows: list[Row], args: argparse.Namespace, sizes: Sizes | None) -> list[str]:
    """The plan for people: the table, then what it rests on."""
    devices = " and ".join(dict.fromkeys(r.times.device for r in rows))
    lines = [f"{args.gpus} GPUs, steps of {devices}; bounds in brackets", COLUMNS]
    for r in rows:
        report = "-" if r.phase.days is None else f"{r.phase.days:.2f}"
        original = "-" if r.original is None else r.original.days.show()
        lines.append(
            f"{r.phase.name:<10}{r.features.steps:>8.0f}{r.features.step_seconds.show():>21}"
            f"{r.features.days.show():>21}{r.online.days.show():>21}{original:>21}{report:>8}{r.features.measured:>10.0%}"
        )
    for which, name in (("features", "with features"), ("online", "with online encoders")):
        days, hours = total(rows, which, "days"), total(rows, which, "gpu_hours")
        ours = recipe.gpus * recipe.days / (args.gpus * days[1])
        lines.append(
            f"{name}: {days[1]:.2f} days ({days[0]:.2f} to {days[2]:.2f}), {hours[1]:,.0f} GPU-hours "
            f"({hours[0]:,.0f} to {hours[2]:,.0f}); the report: {recipe.days:g} days on {recipe.gpus} {recipe.gpu}, "
            f"{recipe.days * 24 * recipe.gpus:,.0f} GPU-hours, {ours:.1f} times as many"
        )
    if all(r.original for r in rows):
        lines += _original(recipe, rows)
    return lines + ["", *_basis(recipe, rows, args, sizes), "", *_communication(rows, args)]


def _original(recipe: Recipe, rows: list[Row]) -> list[str]:
    """The original's code by the same arithmetic, beside what it says of itself."""
    days = total(rows, "original", "days")
    lines = [
        f"the original's code by the same arithmetic (online encoders, ranks wait for the slowest): {days[1]:.2f} days "
        f"({days[0]:.2f} to {days[2]:.2f})"
    ]
    said = {r.phase.table: r.original for r in rows if not r.phase.images_only}
    steps = [
        f"{stage} {said[stage].step_seconds.show(1)} s, said {seconds:g}"
        for stage, seconds in recipe.original_seconds.items()
        if stage in said
    ]
    return lines + [f"  a step of it, beside its configurations' own words: {'; '.join(steps)}"] * bool(steps)


def _basis(recipe: Recipe, rows: list[Row], args: argparse.Namespace, sizes: Sizes | None) -> list[str]:
    kept = "as many samples of each bucket" if args.keep == "samples" else "as many steps"
    data = f"the table {args.data}" if sizes else "the recipe's sizes, which are assumed: the report shows none"
    lines = [
        f"trained on: {kept} as the original, whose batch sizes and {recipe.gpus} GPUs give them; data: {data}",
        *dict.fromkeys(f"step times: {r.times.source}" for r in rows),
        f"  measured: the share of computing time in the last column; bounds: the repeats' spread and "
        f"{BETWEEN_MACHINES:.0%} between machines",
    ]
    fits = [r.times.fit for r in rows if r.times.fit is not None and r.features.measured < 1 - 1e-6]  # less rounding
    told = (f"  extrapolated: a fit to {f.points} steps, residuals {f.error:.1%}, counted twice" for f in fits)
    lines += dict.fromkeys(told)
    if any(r.times.extra for r in rows):
        extra = max(r.times.extra for r in rows)
        lines.append(f"  those steps had no optimizer: {1e3 * extra:.0f} ms were added, give or take half")
    encoders = our_encoders(recipe, args)
    waiting = [max(r.features.waiting[i] / r.features.step_seconds.mid for r in rows) for i in (1, 2)]
    kinds = {True: "with a table of the sweep the sampler puts batches of like times into a step",
             False: "without one, ranks draw them independently"}  # fmt: skip
    grouped = "; ".join(
        text for swept, text in kinds.items() if any((r.times.table is not None) == swept for r in rows)
    )
    days = {which: total(rows, which, "days")[1] for which in ("features", "online")}
    lines += [
        f"waiting for the slowest rank: {grouped}; {waiting[0]:.1%} of a step, at worst {waiting[1]:.0%}, in the phase "
        f"that has most of it",
        f"online encoders: {encoders.pixels_per_second / 1e6:.1f} M pixels/s and "
        f"{encoders.captions_per_second:.0f} captions/s a GPU ({encoders.source}); "
        f"{days['online'] - days['features']:.2f} days of {args.gpus} GPUs in all, or once, for features:",
    ]
    made = 0.0
    for name in dict.fromkeys(r.phase.data for r in rows):
        tables = [r.phase.buckets(recipe.folder) for r in rows if r.phase.data == name]
        own = sizes or recipe.sizes_of(name)
        hours = plan_model.encoding_hours(own, tables, recipe.frame_interval, encoders)
        made += hours / 24 / args.gpus
        seen = sum(r.features.samples for r in rows if r.phase.data == name)
        lines.append(
            f"  {name}: {hours:,.0f} GPU-hours, {hours / 24 / args.gpus:.2f} days, one crop of each sample in every "
            f"size it may take; training sees {seen / own.count.sum():.1f} times as many samples as there are"
        )
    lines.append(
        f"  training on features and making them: {days['features'] + made:.2f} days, online: {days['online']:.2f}"
    )
    for factor in (0.5, 2.0):
        changed = {p: (sizes or recipe.sizes_of(p)).longer(factor) for p in recipe.data}
        days = _days_with(recipe, args, changed)
        lines.append(f"clips {factor:g} times as long: {days:.2f} days with features")
    lines.append("not in it: reading data, checkpoints, validation, restarts; captions are taken as full, 200 tokens")
    return lines


def _days_with(recipe: Recipe, args: argparse.Namespace, sizes: dict[str, Sizes]) -> float:
    """Days with features on other data."""
    by_data = {name: plan(dataclasses.replace(recipe, phases=[p for p in recipe.phases if p.data == name]), args, own)
               for name, own in sizes.items() if any(p.data == name for p in recipe.phases)}  # fmt: skip
    return sum(total(rows, "features", "days")[1] for rows in by_data.values())


def _communication(rows: list[Row], args: argparse.Namespace) -> list[str]:
    network = network_of(args)
    one = network.pass_seconds(args.gpus).times(1e3)
    step = rows[0].features.compute
    exposed = {o: dataclasses.replace(network, overlapped=o).exposed_seconds(args.gpus, step) for o in (True, False)}
    where = f"{args.nvlink_gb_s:g} GB/s inside a node" if args.gpus <= args.gpus_per_node else \
        f"{args.network_gb_s:g} GB/s a GPU across nodes, of which 80% is reached (50 to 100%)"  # fmt: skip
    size = plan_model.PARAMETERS * plan_model.BYTES / 1e9
    return [
        f"communication, modelled: {size:.2f} GB of bfloat16 gradients and as much of weights, {where}",
        f"  reduce-scatter {one.show(1)} ms, all-gather the same, an all-reduce both; measured on two H100s by NVLink: "
        "all-reduce 4.6 ms",
        f"  a step waits {exposed[False].times(1e3).show(1)} ms, as gradients travel after the backward pass, "
        f"weights before the next; with overlap_communication {exposed[True].times(1e3).show(1)} ms, if nothing slows",
    ]


def shipped(gpus: int) -> tuple[Recipe, list[Row], argparse.Namespace]:
    """The shipped recipe's plan, from the shipped tables, and the arguments that it is of."""
    args = arguments_of(["--gpus", str(gpus)])
    args.tables = str(bucket_tables.SHIPPED / DEFAULT_GPU) if (bucket_tables.SHIPPED / DEFAULT_GPU).is_dir() else None
    recipe = Recipe.read(args.recipe)
    return recipe, plan(recipe, args), args


def sizes_markdown(counts: Sequence[int]) -> str:
    """The shipped recipe with features on so many GPUs, a row for each number of them, as a table for the docs."""
    lines = [
        "| GPUs | days | GPU-hours | batch of a step against the recipe's | gradients and weights travel | waiting |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for gpus in counts:
        recipe, rows, args = shipped(gpus)
        days, hours = (Interval(*total(rows, "features", field)) for field in ("days", "gpu_hours"))
        of_all = sum(r.features.steps * r.features.step_seconds.mid for r in rows)
        travel, waiting = (
            sum(r.features.steps * getattr(r.features, part).mid for r in rows) / of_all
            for part in ("exposed", "waiting")
        )
        lines.append(
            f"| {gpus} | {days.show()} | {hours.show(0)} | {gpus / recipe.gpus:g} | {travel:.1%} | {waiting:.1%} |"
        )
    note = (
        "With one batch a GPU and step, nothing shared. The last two are shares of the time; transfers are modelled "
        f"at {args.nvlink_gb_s:g} GB/s a GPU within a machine of {args.gpus_per_node}, and at {args.network_gb_s:g} "
        "between machines. Bounds in brackets."
    )
    return "\n".join([*lines, "", note, "", "`python -m stdit_fast.benchmarks.plan --gpus N`"])


def markdown(gpus: int) -> str:
    """The shipped recipe's plan as a table for the README, from the shipped tables."""
    recipe, rows, args = shipped(gpus)
    lines = [
        "| phase | days, features | days, online encoders | original's code, computed alike | report | measured |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for r in rows:
        report = "-" if r.phase.days is None else f"{r.phase.days:.1f}"
        days = " | ".join(estimate.days.show() for estimate in (r.features, r.online, r.original))
        lines.append(f"| {r.phase.name} | {days} | {report} | {r.features.measured:.0%} |")
    sums = [Interval(*total(rows, which, "days")).show() for which in ("features", "online", "original")]
    lines.append(f"| in all | {' | '.join(sums)} | {recipe.days:g} | |")
    devices = " and ".join(dict.fromkeys(r.times.device for r in rows))
    note = (
        f"{gpus} GPUs; steps of {devices}; the data set's sizes are assumed, communication is modelled at "
        f"{args.network_gb_s:g} GB/s a GPU. Measured: the share of computing time with features whose buckets "
        "were; the rest follows from a fit. Bounds in brackets."
    )
    return "\n".join([*lines, "", note, "", f"`python -m stdit_fast.benchmarks.plan --gpus {gpus}`"])


def as_dict(rows: list[Row], args: argparse.Namespace) -> dict:
    """For --json."""
    return {
        "gpus": args.gpus,
        "device": rows[0].times.device,
        "phases": [
            {
                "phase": r.phase.name,
                "report_days": r.phase.days,
                "source": r.times.source,
                "features": dataclasses.asdict(r.features),
                "online": dataclasses.asdict(r.online),
            }
            for r in rows
        ],
        "days": {which: total(rows, which, "days") for which in ("features", "online")},
        "gpu_hours": {which: total(rows, which, "gpu_hours") for which in ("features", "online")},
    }


def arguments_of(given: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--recipe", default=str(CONFIGS / "recipe_v1_1.yaml"))
    parser.add_argument("--gpus", type=int, default=64)
    parser.add_argument(
        "--tables", help="a GPU's tables: h100-80gb, or a folder; default: this machine's, or h100-80gb"
    )
    parser.add_argument("--data", help="metadata table (CSV, Parquet) instead of the recipe's sizes")
    parser.add_argument("--keep", choices=("samples", "steps"), default="samples", help="what is as in the original")
    parser.add_argument("--network-gb-s", type=float, default=50.0, help="that a GPU sends to other nodes: 400 Gb/s")
    parser.add_argument("--nvlink-gb-s", type=float, default=335.0, help="inside a node, NCCL's bus bandwidth")
    parser.add_argument("--gpus-per-node", type=int, default=8)
    parser.add_argument("--overlap", action="store_true", help="as if gradients travelled during the backward pass")
    parser.add_argument("--pixels-per-second", type=float, help="of the autoencoder's encoding, on one GPU")
    parser.add_argument("--captions-per-second", type=float, help="of the text encoder, on one GPU")
    parser.add_argument("--json", help="write everything to this file, too")
    parser.add_argument("--check", metavar="METRICS", help="hold a training run's metrics.jsonl against its projection")
    parser.add_argument(
        "--warm-up", type=int, default=WARMUP, help="with --check: first steps of a bucket to leave out"
    )
    parser.add_argument("--table", help="with --check: the bucket table whose times the run should have")
    return parser.parse_args(given)


def main(arguments: list[str] | None = None) -> int:
    args = arguments_of(arguments)
    try:
        for key in ("gpus", "gpus_per_node", "network_gb_s", "nvlink_gb_s"):
            if not getattr(args, key) > 0:
                raise ConfigError(key, getattr(args, key), "it must be above 0")
        for key in ("pixels_per_second", "captions_per_second"):
            if getattr(args, key) is not None and not getattr(args, key) > 0:
                raise ConfigError(key, getattr(args, key), "it must be above 0; leave it out for what was measured")
        if args.check:
            return _check(args)
        if args.table:
            remedy = "it is for --check METRICS; a plan takes its steps from a folder of tables, --tables"
            raise ConfigError("table", args.table, remedy)
        recipe = Recipe.read(args.recipe)
        sizes = None
        if args.data:
            table = load_metadata(args.data)
            sizes = Sizes.of_samples(table.num_frames, table.height, table.width)
        rows = plan(recipe, args, sizes)
        print("\n".join(describe(recipe, rows, args, sizes)))
        if args.json:
            with whole_file(Path(args.json)) as draft:
                draft.write_text(json.dumps(as_dict(rows, args), indent=1) + "\n")
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _check(args: argparse.Namespace) -> int:
    times = fitted_times()
    if args.table:
        probes = RESULTS / "h100" / "sweep.jsonl"
        times = Times.of_table(bucket_tables.read(args.table), probes if probes.is_file() else None)
    lines, inside = check_run(Path(args.check), times, args.warm_up)
    print("\n".join(lines))
    return 0 if inside else 1


if __name__ == "__main__":
    sys.exit(main())
