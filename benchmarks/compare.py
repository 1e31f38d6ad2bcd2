"""What got slower between two runs: `python -m stdit_fast.benchmarks.compare BEFORE AFTER`.

    pytest benchmarks/ --benchmark-json after.json
    python -m stdit_fast.benchmarks.compare before.json after.json --threshold 0.05

Each file is pytest-benchmark's JSON, or our records (.jsonl). A figure got slower if its median did by more than the
threshold and the two spreads do not meet: quartiles of pytest-benchmark's rounds, lowest and highest of a record.
Exits with 0 if none did, 1 if one did, 2 if the files cannot be compared.
"""

import argparse
import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from stdit_fast.benchmarks.readme import latest
from stdit_fast.errors import ConfigError

SLOWER, FASTER, SAME = "SLOWER", "faster", ""
COLUMNS = f"{'case':<62}{'before ms':>11}{'spread':>23}{'after ms':>11}{'spread':>23}{'change':>9}"


@dataclass(frozen=True)
class Figure:
    """One figure of a run, in milliseconds; `low` and `high` are its spread. `throttled`: what held the GPU down."""

    ms: float
    low: float
    high: float
    device: str
    throttled: tuple[str, ...] = ()


def read(path: str | Path) -> dict[str, Figure]:
    """The figures of a file by their names.

    Raises:
        ConfigError: it is not there, or neither of the two kinds, or holds no figures.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(
            "file", str(path), "there is no such file; make one with `pytest benchmarks/ --benchmark-json`"
        )
    try:
        found = _records(path) if path.suffix == ".jsonl" else _pytest_benchmark(path)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        remedy = f"it is neither pytest-benchmark's JSON nor records of ours (.jsonl): {error!r}"
        raise ConfigError("file", str(path), remedy) from error
    if not found:
        raise ConfigError("file", str(path), "it holds no figures; did every case fail or skip?")
    return found


def _records(path: Path) -> dict[str, Figure]:
    found = {}
    for r in latest(path).values():
        if r["ms"] is not None:
            ms, low, high = (float(r[key]) for key in ("ms", "ms_low", "ms_high"))
            found[f"{r['suite']} {r['case']} {r['impl']}"] = Figure(ms, low, high, r["device"], _throttled(r["notes"]))
    return found


def _pytest_benchmark(path: Path) -> dict[str, Figure]:
    content = json.loads(path.read_text())
    machine = content["machine_info"]
    found = {}
    for b in content["benchmarks"]:
        extra, stats = b["extra_info"], b["stats"]
        named = all(key in extra for key in ("suite", "case", "impl"))
        name = f"{extra['suite']} {extra['case']} {extra['impl']}" if named else b["fullname"]
        ms, low, high = (1e3 * stats[key] for key in ("median", "q1", "q3"))
        device = extra.get("device") or machine.get("cpu", {}).get("brand_raw") or machine.get("node", "unknown")
        found[name] = Figure(ms, low, high, device, _throttled(extra.get("notes", {})))
    return found


def _throttled(notes: dict) -> tuple[str, ...]:
    return tuple(notes.get("gpu", {}).get("throttled", {}))


def verdict(before: Figure, after: Figure, threshold: float) -> str:
    """SLOWER or FASTER where the change is beyond the threshold and beyond both spreads, else SAME."""
    if after.ms > before.ms * (1 + threshold) and after.low > before.high:
        return SLOWER
    if after.ms * (1 + threshold) < before.ms and after.high < before.low:
        return FASTER
    return SAME


def compare(before: dict[str, Figure], after: dict[str, Figure], threshold: float) -> tuple[list[str], int]:
    """(lines for people, how many got slower); what got slower comes first."""
    shared = [name for name in before if name in after]
    verdicts = {name: verdict(before[name], after[name], threshold) for name in shared}
    order = sorted(shared, key=lambda n: ((SLOWER, FASTER, SAME).index(verdicts[n]), -after[n].ms / before[n].ms))
    lines = [COLUMNS, *(_line(name, before[name], after[name], verdicts[name]) for name in order)]
    for text, names in (
        ("in the first file only", [n for n in before if n not in after]),
        ("in the second file only", [n for n in after if n not in before]),
    ):
        lines += [f"{text}: {', '.join(names)}"] if names else []
    devices = [sorted({f.device for f in figures.values()}) for figures in (before, after)]
    if devices[0] != devices[1]:
        lines.append(f"DIFFERENT MACHINES: {', '.join(devices[0])} before, {', '.join(devices[1])} after")
    counted = [sum(v == wanted for v in verdicts.values()) for wanted in (SLOWER, FASTER)]
    lines.append(
        f"{len(shared)} compared: {counted[0]} slower, {counted[1]} faster by more than {threshold:.1%} and beyond the "
        f"spreads"
    )
    return lines, counted[0]


def _line(name: str, before: Figure, after: Figure, said: str) -> str:
    held = sorted({*before.throttled, *after.throttled})
    flag = f"  throttled: {', '.join(held)}" if held else ""
    cells = "".join(f"{f.ms:>11.3f}{f'{f.low:.3f} to {f.high:.3f}':>23}" for f in (before, after))
    return f"{name:<62}{cells}{after.ms / before.ms - 1:>+9.1%}  {said}{flag}".rstrip()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("before", help="pytest-benchmark's .json, or records (.jsonl)")
    parser.add_argument("after")
    parser.add_argument("--threshold", type=float, default=0.05, help="share that counts as slower")
    parser.add_argument("--only", default="", help="figures whose name (suite, case, implementation) this regex finds")
    args = parser.parse_args(arguments)
    try:
        if not args.threshold >= 0:
            raise ConfigError("threshold", args.threshold, "it is a share, 0 or more, like 0.05")
        try:
            pattern = re.compile(args.only)
        except re.error as error:
            raise ConfigError("only", args.only, f"it is no regular expression: {error}") from error
        before, after = ({n: f for n, f in read(p).items() if pattern.search(n)} for p in (args.before, args.after))
        if not before.keys() & after.keys():
            remedy = "no figure stands in both; they are named by suite, case and implementation"
            raise ConfigError("files", f"{args.before} {args.after}", remedy)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    lines, slower = compare(before, after, args.threshold)
    print("\n".join(lines))
    return 1 if slower else 0


if __name__ == "__main__":
    sys.exit(main())
