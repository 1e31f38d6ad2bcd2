"""Clips from the disk to pinned memory: how many a second a core decodes, and a loader with its processes delivers:
suite "loading". Needs no GPU; with one, batches are pinned and copied to it.

    python -m stdit_fast.benchmarks.data --out loading.jsonl

`decode` counts the seconds of one core, `loader` those on the wall, at the batch sizes of training. Clips are 16
frames, one in three, from the middle of a file that lies in the page cache. A loader is timed over whole rounds, in
which each of its processes delivers a batch: within one they come in bursts.
"""

import argparse
import csv
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

from stdit_fast.benchmarks.records import Record, append, processor_name, results_file
from stdit_fast.benchmarks.step import parse_case
from stdit_fast.diffusion import MaskGenerator
from stdit_fast.errors import ConfigError, run_command
from stdit_fast.media.pixels import from_pixels
from stdit_fast.media.read import decode_frames_into
from stdit_fast.train.buckets import Buckets
from stdit_fast.train.dataset import VideoTextDataset, make_loader
from stdit_fast.train.metadata import load_metadata
from stdit_fast.train.sampler import BatchRequest

CLIPS = Path(__file__).resolve().parents[1] / "tests" / "data"
FRAMES, INTERVAL, START = 16, 3, 40
# (file, what it is, resolution to decode to)
DECODED = (
    *(("bigbuckbunny.mp4", "720p", resolution) for resolution in ("144p", "240p", "480p", "720p")),
    ("bikes.mp4", "272x640", "240p"),
    ("carphone_pristine.mp4", "144x176", "144p"),
)
LOADED = ("144p-16-6", "240p-16-17", "480p-16-4")
SOURCE, SOURCE_FRAMES = "bigbuckbunny.mp4", 132
COLUMNS = f"{'case':<30}{'ms a clip':>10}{'low':>9}{'high':>9}{'clips/s':>9}"


def decode_cases(seconds: float) -> Iterator[Record]:
    """One core, without a loader."""
    for name, source, resolution in DECODED:
        _, height, width, _ = parse_case(f"{resolution}-{FRAMES}-1")
        pixels = np.empty((FRAMES, height, width, 3), dtype=np.uint8)
        indices = START + np.arange(FRAMES) * INTERVAL
        times = core_milliseconds(lambda i=indices, p=pixels, n=name: decode_frames_into(p, CLIPS / n, i), seconds)
        record = of_clips(f"decode-{source}-{resolution}-{FRAMES}", times, cores=1)
        record.bytes = pixels.nbytes
        yield record


def core_milliseconds(function: Callable[[], object], seconds: float) -> list[float]:
    """What each call takes of a core, which other processes do not lengthen."""
    function()
    times, begun = [], time.perf_counter()
    while len(times) < 3 or time.perf_counter() - begun < seconds:
        started = time.process_time()
        function()
        times.append(1000 * (time.process_time() - started))
    return times


def loader_case(case: str, workers: int, seconds: float, prefetch: int = 2) -> Record:
    """Batches of one bucket through the loader of training, as fast as they come."""
    frames, height, width, batch = parse_case(case)
    resolution = case.rsplit("-", 2)[0]
    buckets = Buckets({resolution: {frames: [1.0, batch]}})
    with tempfile.TemporaryDirectory() as scratch:
        table = Path(scratch) / "table.csv"
        with open(table, "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(("path", "text", "num_frames", "height", "width", "fps"))
            writer.writerows([(CLIPS / SOURCE, f"caption {i}", SOURCE_FRAMES, height, width, 25) for i in range(batch)])
        dataset = VideoTextDataset(
            load_metadata(table, progress=False),
            buckets,
            seed=0,
            frame_interval=INTERVAL,
            mask_sampler=MaskGenerator({"mask_no": 1.0}).mask,
            timestep_sampler=lambda rng: int(rng.integers(1000)),
            caption_dropout=0.1,
            posterior_noise=True,
        )
        return of_loader(case, dataset, workers, seconds, prefetch)


def of_loader(case: str, dataset: VideoTextDataset, workers: int, seconds: float, prefetch: int = 2) -> Record:
    """Times whole rounds after the first, whose batches come from processes that have just started."""
    on_gpu, batch = torch.cuda.is_available(), len(dataset)
    table = dataset.metadata
    sizes = [np.asarray(column) for column in (table.num_frames, table.height, table.width)]
    (number,) = set(dataset.buckets.assign(*sizes, INTERVAL).tolist())
    rows, none = np.arange(batch), np.empty(0, dtype=np.int64)
    endless = (BatchRequest(epoch, 0, number, rows, none, batch) for epoch in range(10**9))
    loader = make_loader(dataset, endless, num_workers=workers, pin_memory=on_gpu, prefetch_factor=prefetch)
    batches, round_of = iter(loader), max(1, workers)
    for _ in range(round_of):
        next(batches)
    times, begun = [], time.perf_counter()
    while time.perf_counter() - begun < seconds or len(times) < 3 or len(times) % round_of:
        started = time.perf_counter()
        pixels = next(batches)["pixels"]
        if on_gpu:
            from_pixels(pixels.cuda(non_blocking=True))
            torch.cuda.synchronize()
        times.append(1000 * (time.perf_counter() - started) / batch)
    total = 1000 * (time.perf_counter() - begun) / batch / len(times)
    record = of_clips(f"loader-{case}-workers-{workers}", times, cores=workers)
    record.ms = total  # batches come in bursts, of which the median says nothing
    record.notes |= {"clips_per_second": round(1000 / total, 2), "pinned": on_gpu, "batch_bytes": pixels.nbytes}
    record.notes |= {"prefetch_factor": prefetch, "batches": len(times)}
    return record


def of_clips(case: str, times: list[float], cores: int) -> Record:
    """A record of milliseconds a clip."""
    record = Record.of_times("loading", case, "stdit_fast", times, device=processor_name())
    record.notes = {"clips_per_second": round(1000 / record.ms, 2), "cores": cores, "machine_cores": os.cpu_count()}
    return record


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="*", default=list(LOADED), help="resolution-frames-batch of the loader's")
    parser.add_argument("--workers", type=int, nargs="+", default=sorted({1, max(1, (os.cpu_count() or 2) - 2)}))
    parser.add_argument("--prefetch", type=int, default=2, help="batches that each process keeps ready")
    parser.add_argument("--seconds", type=float, default=2.0, help="for each case, at least")
    parser.add_argument("--out", type=results_file, help="results file to append to")
    args = parser.parse_args(arguments)
    if not (CLIPS / SOURCE).is_file():
        raise ConfigError("clips", str(CLIPS), "its clips are read; run it in a checkout")
    for case in args.cases:
        parse_case(case)
    if min(args.workers) < 0:
        raise ConfigError("workers", args.workers, "use 0 (decode in this process) or more")
    print(COLUMNS)
    for r in measured(args):
        print(
            f"{r.case:<30}{r.ms:>10.1f}{r.ms_low:>9.1f}{r.ms_high:>9.1f}{r.notes['clips_per_second']:>9.1f}", flush=True
        )
        if args.out:
            append(args.out, [r])
    return 0


def measured(args: argparse.Namespace) -> Iterator[Record]:
    """Each record as it is made."""
    yield from decode_cases(args.seconds)
    for case in args.cases:
        for workers in args.workers:
            yield loader_case(case, workers, args.seconds, args.prefetch)


if __name__ == "__main__":
    sys.exit(run_command(main))
