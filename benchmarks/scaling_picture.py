"""A step's communication beside its computation, as a picture.

    python -m stdit_fast.benchmarks.scaling_picture trace.json trace.png

The first is what `benchmarks.scaling long --trace` writes: intervals of the kernels on one GPU, in ms.
"""

import argparse
import json
import sys
from pathlib import Path

from stdit_fast.errors import ConfigError, run_command

COLOURS = {"communication": "#c62828", "computation": "#1f5fa8"}
CLOSE_UP_MS = 40.0


def alone(communication: list, computation: list) -> list[tuple[float, float]]:
    """The parts of communication's intervals in which nothing is computed; both are sorted and do not overlap."""
    left = []
    for start, end in communication:
        for busy_start, busy_end in computation:
            if busy_end <= start:
                continue
            if busy_start >= end:
                break
            if busy_start > start:
                left.append((start, busy_start))
            start = max(start, busy_end)
        if start < end:
            left.append((start, end))
    return left


def plot(spans: dict[str, list], path: Path) -> None:
    """The whole step, and a close-up of its backward pass."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = {**spans, "communication alone": alone(spans["communication"], spans["computation"])}
    whole = max(end for own in spans.values() for _, end in own)
    middle = 0.7 * whole
    figure, axes = plt.subplots(2, 1, figsize=(12, 5))
    for axis, (low, high) in zip(axes, ((0, whole), (middle, middle + CLOSE_UP_MS)), strict=True):
        for height, (name, own) in enumerate(rows.items()):
            bars = [(start, end - start) for start, end in own if end > low and start < high]
            axis.broken_barh(bars, (height - 0.4, 0.8), color=COLOURS.get(name, "#212121"))
        axis.set_yticks(range(len(rows)), rows)
        axis.set_xlim(low, high)
        axis.set_xlabel("ms")
    axes[0].set_title("one step on one of the GPUs; below, a part of its backward pass")
    figure.tight_layout()
    figure.savefig(path, dpi=90)
    plt.close(figure)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("trace", type=Path)
    parser.add_argument("picture", type=Path)
    args = parser.parse_args()
    if not args.trace.is_file():
        raise ConfigError("trace", str(args.trace), "there is no such file; `scaling long --trace PATH` writes one")
    plot(json.loads(args.trace.read_text()), args.picture)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
