"""A timeline of one training step: what each stream of the GPU runs, by kind, and what the CPU is in.

    python -m stdit_fast.benchmarks.train_step --cases 240p-16-17-online --trace 240p-16-17-online
    python -m stdit_fast.benchmarks.trace trace-240p-16-17-online.json --out docs/train_step.png

The first needs a GPU, the second does not.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from stdit_fast.errors import ConfigError, run_command
from stdit_fast.media.files import whole_file

# The first that a kernel's name matches.
KINDS = (
    ("copies, clearing", "memcpy|memset|CatArray|FillFunctor|copy_kernel|nocast"),
    ("attention", "attention|temporal|flash|fmha|sdpa|softmax"),
    ("optimizer, average", "adamw|ema_update|multi_tensor|foreach"),
    ("convolutions", "fprop|conv|cudnn|implicit"),
    ("matrix products", "gemm|nvjet|cutlass|cublas|splitK|gemv|matmul"),
    ("norms, gates, activation, sums", "norm|gate|residual|modulate|gelu|silu|_sum_rows|rms"),
    ("others", ""),
)
COLOURS = ("#9a9a9a", "#d1495b", "#6a4c93", "#2a9d8f", "#1d6fb8", "#edae49", "#444444")
PARTS = ("data", "autoencoder", "text encoder", "forward", "backward")
PART_COLOURS = ("#c9c9c9", "#a8ddd5", "#cfe8b5", "#a9cbe8", "#f3c6cb")
WIDTH, DPI = 14, 110
NAME_LENGTH = 160
BINS = 1400  # of the share of time that each kind takes, across the picture


def kind_of(name: str) -> int:
    """The place in KINDS of a kernel's name."""
    return next(i for i, (_, pattern) in enumerate(KINDS) if re.search(pattern, name, re.IGNORECASE))


def profile_step(function: Callable[[], object], path: str | Path) -> None:
    """Runs a function under the profiler and writes what `draw` needs of it: names, and [stream, name, start, end]."""
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])
    with profile(activities=activities) as profiler:
        function()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    events = profiler.events()
    begin = min(event.time_range.start for event in events)
    kernels, parts, names = [], [], {}
    for event in events:
        times = [round(event.time_range.start - begin, 1), round(event.time_range.end - begin, 1)]
        if event.device_type == torch.autograd.DeviceType.CUDA:
            if event.name not in PARTS:  # the profiler shows ranges on the device too
                number = names.setdefault(event.name[:NAME_LENGTH], len(names))
                kernels.append([event.device_resource_id, number, *times])
        elif event.name in PARTS:
            parts.append([event.name, *times])
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    content = {"device": device, "torch": torch.__version__, "names": list(names), "kernels": kernels}
    content["parts"] = parts
    with whole_file(Path(path)) as draft:
        draft.write_text(json.dumps(content, separators=(",", ":")))


def draw(content: dict, title: str, path: Path) -> None:
    """The picture: the CPU's parts, each stream's kernels, and how the GPU's time divides among the kinds."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import numpy as np
    from matplotlib.patches import Patch

    kinds = [kind_of(name) for name in content["names"]]
    kernels = sorted(([s, kinds[name], *times] for s, name, *times in content["kernels"]), key=lambda kernel: kernel[2])
    streams = sorted({kernel[0] for kernel in kernels}, key=lambda s: -sum(k[3] - k[2] for k in kernels if k[0] == s))
    end = max([k[3] for k in kernels] + [p[2] for p in content["parts"]])
    rows = ["CPU", *(f"stream {number}" for number in streams)]
    figure, (timeline, shares) = plt.subplots(
        2, 1, figsize=(WIDTH, 2.2 + 0.42 * len(rows)), sharex=True, height_ratios=[0.5 * len(rows), 1.6], dpi=DPI
    )
    for name, start, stop in content["parts"]:
        colour = PART_COLOURS[PARTS.index(name)]
        timeline.broken_barh([(start / 1000, (stop - start) / 1000)], (-0.4, 0.8), facecolors=colour, edgecolor="none")
        if stop - start > 0.06 * end:
            timeline.text((start + stop) / 2000, 0, name, ha="center", va="center", fontsize=8)
    for row, stream in enumerate(streams, start=1):
        for kind, colour in enumerate(COLOURS):
            bars = [(k[2] / 1000, (k[3] - k[2]) / 1000) for k in kernels if k[0] == stream and k[1] == kind]
            timeline.broken_barh(bars, (row - 0.4, 0.8), facecolors=colour, edgecolor="none", rasterized=True)
    timeline.set_yticks(range(len(rows)), rows)
    timeline.invert_yaxis()
    timeline.set_xlim(0, end / 1000)
    timeline.set_title(title, fontsize=10)

    edges, busy = np.linspace(0, end / 1000, BINS + 1), np.zeros((len(KINDS), BINS))
    for _, kind, start, stop in kernels:
        first, last = np.searchsorted(edges, [start / 1000, stop / 1000], side="right") - 1
        for b in range(first, min(last, BINS - 1) + 1):
            busy[kind, b] += max(0.0, min(stop / 1000, edges[b + 1]) - max(start / 1000, edges[b]))
    shares.stackplot((edges[:-1] + edges[1:]) / 2, 100 * busy / (edges[1] - edges[0]), colors=COLOURS, linewidth=0)
    shares.set_ylim(0, 100)
    shares.set_ylabel("% of the time")
    shares.set_xlabel("ms")
    total = [sum(k[3] - k[2] for k in kernels if k[1] == kind) / 1000 for kind in range(len(KINDS))]
    legend = [
        Patch(color=c, label=f"{name} {ms:.0f} ms")
        for (name, _), c, ms in zip(KINDS, COLOURS, total, strict=True)
        if ms
    ]
    figure.legend(handles=legend, loc="lower center", ncols=len(legend), fontsize=7.5, frameon=False)
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    with whole_file(path) as draft:
        figure.savefig(draft, format=path.suffix.removeprefix("."))
    plt.close(figure)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("trace", type=Path, help="written by train_step --trace")
    parser.add_argument("--out", type=Path, required=True, help="the picture, PNG or SVG")
    parser.add_argument("--title", help="of the picture")
    args = parser.parse_args(arguments)
    try:
        content = json.loads(args.trace.read_text())
    except (OSError, ValueError) as error:
        remedy = f"it cannot be read ({error}); `stdit_fast.benchmarks.train_step --trace CASE` writes one"
        raise ConfigError("trace", str(args.trace), remedy) from error
    title = args.title or args.trace.stem
    draw(content, f"{title}: {content['device']}, PyTorch {content['torch']}", args.out)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
