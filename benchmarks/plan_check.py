"""Step times of real training against their projection, by bucket and in all.

Real steps are a run's metrics.jsonl, or records of the suite "train_step", of which those on features count.
"""

import json
import statistics
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

from stdit_fast.benchmarks.plan_times import Interval, Times
from stdit_fast.benchmarks.step import parse_case, positions_of
from stdit_fast.errors import ConfigError
from stdit_fast.resolutions import load_resolutions
from stdit_fast.train.buckets import Bucket

# Of each bucket the first steps compile, capture graphs and fill the allocator, by default so many.
WARMUP = 2
# Share of a step that does not grow with its batch, where no fit knows it: least, likely, most.
FLOORS = (0.0, 0.05, 0.1)
COLUMNS = f"{'bucket':<18}{'batch':>6}{'steps':>7}{'seen ms':>10}{'projected ms':>28}{'off':>8}"


class Seen(NamedTuple):
    """Steps of one bucket and batch size: seconds of each without waiting for data, and what that was in all."""

    bucket: Bucket
    seconds: list[float]
    waited: float


def check_run(steps: Path, times: Times, warmup: int = WARMUP) -> tuple[list[str], bool]:
    """(lines for people, whether the steps took as long in all as the projection's bounds say).

    The steps are of one GPU. Time that they waited for data is taken off and told: the projection has none.

    Args:
        warmup: steps of each bucket in a run's metrics that do not count.

    Raises:
        ConfigError: no steps, or none after the warm-up.
    """
    seen = _read(steps, warmup)
    if not seen:
        remedy = f"no bucket has more than {warmup} steps, which are left out as its warm-up; train longer"
        raise ConfigError("check", str(steps), remedy)
    lines = [f"step times: {times.source}", COLUMNS]
    all_seen, all_projected, extrapolated = 0.0, Interval(0.0, 0.0, 0.0), 0
    for bucket, seconds, _ in seen:
        projected, measured = project(times, bucket)
        count, median = len(seconds), statistics.median(seconds)
        all_seen += sum(seconds)
        all_projected = all_projected.plus(projected.times(count))
        extrapolated += not measured
        lines.append(
            f"{bucket.name:<18}{bucket.batch_size:>6}{count:>7}{1e3 * median:>10.1f}{projected.times(1e3).show(1):>28}"
            f"{median / projected.mid - 1:>+8.1%}{'' if measured else '  extrapolated'}"
        )
    inside = all_projected.low <= all_seen <= all_projected.high
    lines.append(
        f"in all {all_seen:.2f} s, projected {all_projected.show()} s: {all_seen / all_projected.mid - 1:+.1%}, "
        f"{'inside' if inside else 'OUTSIDE'} the bounds; {extrapolated} of {len(seen)} buckets extrapolated; "
        f"{sum(s.waited for s in seen):.2f} s of waiting for data not counted"
    )
    return lines, inside


def project(times: Times, bucket: Bucket) -> tuple[Interval, bool]:
    """(a step's time, whether that very step was measured); another batch size than the table's scales it."""
    step = times.of(bucket)
    if step.batch_size == bucket.batch_size:
        return step.seconds, step.measured
    ratio = bucket.batch_size / step.batch_size
    scaled = [f + (1 - f) * ratio for f in FLOORS]
    if times.fit is not None and times.fit.coefficients[0] > 0:  # it knows the floor, and what is recomputed
        size = bucket.num_frames, bucket.height, bucket.width
        own, table = (times.fit.seconds(*size, batch).mid for batch in (bucket.batch_size, step.batch_size))
        scaled = [own / table * (1 + side * 2 * times.fit.error) for side in (-1, 0, 1)]
    low, mid, high = step.seconds
    return Interval(low * min(scaled), mid * scaled[1], high * max(scaled)), False


def bucket_of(name: str, batch: int) -> Bucket:
    """The bucket of "240p-16-0.56"."""
    resolution, frames, aspect = name.rsplit("-", 2)
    try:
        height, width = load_resolutions(None)[resolution]["sizes"][aspect]
    except KeyError as error:
        raise ConfigError("check", name, "its resolution is not among the shipped ones") from error
    return Bucket(resolution, int(frames), aspect, height, width, 1.0, batch)


def _read(path: Path, warmup: int) -> list[Seen]:
    if not path.is_file():
        raise ConfigError("check", str(path), "there is no such file; a run's folder has a metrics.jsonl")
    lines = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            lines.append(json.loads(line))
            if not isinstance(lines[-1], dict):
                raise ValueError("no keys and values")
        except ValueError as error:
            raise ConfigError("check", str(path), f"line {number} is no line of metrics: {error!r}") from error
    try:
        return _of_records(lines) if lines and "suite" in lines[0] else _of_metrics(lines, warmup)
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError("check", str(path), f"it is neither metrics nor records of steps: {error!r}") from error


def _of_metrics(lines: list[dict], warmup: int) -> list[Seen]:
    """After the warm-up of each bucket."""
    counts: dict[str, int] = defaultdict(int)
    found: dict[tuple[str, int], list[tuple[float, float]]] = defaultdict(list)
    for values in lines:
        if "step_seconds" not in values:
            continue  # validation, sampling
        name, seconds, wait = values["bucket"], values["step_seconds"], values["wait_share"]
        counts[name] += 1
        if counts[name] > warmup:
            one = bucket_of(name, 1)
            tokens = values["tokens_per_second"] * seconds
            batch = max(1, round(tokens / (one.num_frames * positions_of(one.height, one.width))))
            found[name, batch].append((seconds * (1 - wait), seconds * wait))
    return [
        Seen(bucket_of(*key), [s for s, _ in pairs], sum(w for _, w in pairs)) for key, pairs in sorted(found.items())
    ]


def _of_records(lines: list[dict]) -> list[Seen]:
    """Whole steps of the trainer on features; a later record of a case replaces an earlier one."""
    found = {}
    for r in lines:
        case, _, kind = r["case"].rpartition("-")
        if r["suite"] != "train_step" or kind != "features" or r["ms"] is None:
            continue
        frames, height, width, batch = parse_case(case)
        bucket = Bucket(case.split("-")[0], frames, f"{height / width:.2f}", height, width, 1.0, batch)
        seconds, wait, steps = r["ms"] / 1e3, r["notes"]["wait_share"], r["notes"]["steps"]
        found[case] = Seen(bucket, [seconds * (1 - wait)] * steps, seconds * wait * steps)
    return list(found.values())
