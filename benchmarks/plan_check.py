"""A training run's step times against their projection, by bucket and in all."""

import json
import statistics
from collections import defaultdict
from pathlib import Path

from stdit_fast.benchmarks.plan_times import Interval, Times
from stdit_fast.benchmarks.step import positions_of
from stdit_fast.errors import ConfigError
from stdit_fast.resolutions import load_resolutions
from stdit_fast.train.buckets import Bucket

# Of each bucket the first steps compile, capture graphs and fill the allocator.
WARMUP = 2
# Share of a step that does not grow with its batch: least, likely, most.
FLOORS = (0.0, 0.05, 0.1)
COLUMNS = f"{'bucket':<18}{'batch':>6}{'steps':>7}{'seen ms':>10}{'projected ms':>28}{'off':>8}"


def check_run(metrics: Path, times: Times) -> tuple[list[str], bool]:
    """(lines for people, whether the run's steps took as long in all as the projection's bounds say).

    The run is of one GPU. Time that a step waited for data is taken off and told: the projection has none.

    Raises:
        ConfigError: no metrics, or no step after the warm-up.
    """
    seen, waited = _read(metrics)
    if not seen:
        remedy = f"no bucket has more than {WARMUP} steps, which are left out as its warm-up; train longer"
        raise ConfigError("check", str(metrics), remedy)
    lines = [f"step times: {times.source}", COLUMNS]
    all_seen, all_projected, extrapolated = 0.0, Interval(0.0, 0.0, 0.0), 0
    for (name, batch), seconds in sorted(seen.items()):
        projected, measured = project(times, bucket_of(name, batch))
        count, median = len(seconds), statistics.median(seconds)
        all_seen += sum(seconds)
        all_projected = all_projected.plus(projected.times(count))
        extrapolated += not measured
        lines.append(f"{name:<18}{batch:>6}{count:>7}{1e3 * median:>10.1f}{projected.times(1e3).show(1):>28}"
                     f"{median / projected.mid - 1:>+8.1%}{'' if measured else '  extrapolated'}")  # fmt: skip
    inside = all_projected.low <= all_seen <= all_projected.high
    lines.append(
        f"in all {all_seen:.2f} s, projected {all_projected.show()} s: {all_seen / all_projected.mid - 1:+.1%}, "
        f"{'inside' if inside else 'OUTSIDE'} the bounds; {extrapolated} of {len(seen)} buckets extrapolated; "
        f"{waited:.2f} s of waiting for data not counted"
    )
    return lines, inside


def project(times: Times, bucket: Bucket) -> tuple[Interval, bool]:
    """(a step's time, whether that very step was measured); another batch size than the table's scales it."""
    step = times.of(bucket)
    if step.batch_size == bucket.batch_size:
        return step.seconds, step.measured
    ratio = bucket.batch_size / step.batch_size
    scaled = [f + (1 - f) * ratio for f in FLOORS]
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


def _read(metrics: Path) -> tuple[dict[tuple[str, int], list[float]], float]:
    """(seconds of the steps after the warm-up by (bucket, batch size), seconds that they waited for data)."""
    if not metrics.is_file():
        raise ConfigError("check", str(metrics), "there is no such file; a run's folder has a metrics.jsonl")
    counts: dict[str, int] = defaultdict(int)
    seen: dict[tuple[str, int], list[float]] = defaultdict(list)
    waited = 0.0
    for number, line in enumerate(metrics.read_text().splitlines(), 1):
        try:
            values = json.loads(line)
            if "step_seconds" not in values:
                continue  # validation, sampling
            name, seconds, wait = values["bucket"], values["step_seconds"], values["wait_share"]
            tokens = values["tokens_per_second"] * seconds
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError("check", str(metrics), f"line {number} is no line of metrics: {error!r}") from error
        counts[name] += 1
        if counts[name] > WARMUP:
            one = bucket_of(name, 1)
            batch = max(1, round(tokens / (one.num_frames * positions_of(one.height, one.width))))
            seen[name, batch].append(seconds * (1 - wait))
            waited += seconds * wait
    return dict(seen), waited
