"""Planning an epoch on the CPU: suite "sampler".

    python -m stdit_fast.benchmarks.bench_sampler --rows 10000000 --tables stage1 stage2 --out sampler.jsonl

The samples are synthetic: one in five is an image, clips have 10 to 600 frames, sides are 100 to 2000 pixels. "assign"
puts every sample into a bucket with its keep_prob drawn, "plan" is all that an epoch needs: assignment, order, batches.
Each case has a process of its own, whose resident memory at most is reported.
"""

import argparse
import multiprocessing
import os
import resource
import time
from pathlib import Path

import numpy as np
import yaml

import stdit_fast.train
from stdit_fast.benchmarks.records import Record, append, processor_name, results_file
from stdit_fast.train.buckets import Buckets
from stdit_fast.train.randomness import hash_uniform
from stdit_fast.train.sampler import BucketSampler

CASES = ("assign", "plan")
FRAME_INTERVAL = 3
COLUMNS = f"{'table':<10}{'case':<10}{'rows':>12}{'s':>8}{'low':>8}{'high':>8}{'GiB':>8}"


def bucket_table(name: str) -> dict:
    """The buckets of a shipped configuration, such as "stage1"."""
    config = Path(stdit_fast.train.__file__).with_name("configs") / f"{name}.yaml"
    return yaml.safe_load(config.read_text())["buckets"]


def synthetic_sizes(rows: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(num_frames, height, width), int32 [rows]."""
    rng = np.random.default_rng(0)
    num_frames = rng.integers(10, 600, rows, dtype=np.int32)
    num_frames[rng.integers(0, 5, rows, dtype=np.int8) == 0] = 1
    return num_frames, *(rng.integers(100, 2000, rows, dtype=np.int32) for _ in range(2))


def measure(table: str, case: str, rows: int, repeats: int) -> tuple[list[float], float]:
    """(milliseconds of each repeat, peak of the process's resident memory in GiB)."""
    sizes, buckets = synthetic_sizes(rows), Buckets(bucket_table(table))
    times = []
    for seed in range(repeats):

        def draw(samples: np.ndarray, level: int, seed: int = seed) -> np.ndarray:
            return hash_uniform(seed, 0, samples, level)

        started = time.perf_counter()
        if case == "assign":
            buckets.assign(*sizes, FRAME_INTERVAL, draw)
        else:
            BucketSampler(*sizes, buckets, seed=seed, frame_interval=FRAME_INTERVAL)
        times.append(1000 * (time.perf_counter() - started))
    return times, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def processor() -> str:
    return f"{processor_name()}, {len(os.sched_getaffinity(0))} cores"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--tables", nargs="+", default=["stage1", "stage2"], help="shipped configurations")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=results_file, help="JSON-lines file to add the records to")
    options = parser.parse_args()
    print(COLUMNS)
    records = []
    for table in options.tables:
        for case in CASES:
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                times, peak = pool.apply(measure, (table, case, options.rows, options.repeats))
            name = f"{case}-{table}-{options.rows}"
            records.append(Record.of_times("sampler", name, "stdit_fast", times, peak_gib=peak, device=processor()))
            seconds = [t / 1000 for t in (records[-1].ms, records[-1].ms_low, records[-1].ms_high)]
            print(f"{table:<10}{case:<10}{options.rows:>12}" + "".join(f"{s:>8.2f}" for s in seconds) + f"{peak:>8.2f}")
    if options.out:
        append(options.out, records)


if __name__ == "__main__":
    main()
