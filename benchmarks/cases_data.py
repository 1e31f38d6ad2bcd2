"""What the processor does for training: an epoch's plan, and a clip from its file to pixels."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np

from stdit_fast.benchmarks.bench_sampler import FRAME_INTERVAL, bucket_table, synthetic_sizes
from stdit_fast.benchmarks.peers import Absent
from stdit_fast.benchmarks.registry import Case
from stdit_fast.train.buckets import Bucket, Buckets
from stdit_fast.train.dataset import read_clip
from stdit_fast.train.metadata import Sample
from stdit_fast.train.randomness import hash_uniform
from stdit_fast.train.sampler import BucketSampler

CLIPS = Path(__file__).resolve().parents[1] / "tests" / "data"
ROWS, QUICK_ROWS = 1_000_000, 100_000
# (file, its frames, height, width), and what a bucket makes of it: resolution, frames, height, width
DECODED = (
    (("bigbuckbunny.mp4", 132, 720, 1280), ("240p", 16, 240, 426)),
    (("bikes.mp4", 250, 272, 640), ("144p", 16, 144, 256)),
)


def cases(device: str, quick: bool) -> Iterator[Case]:
    """The same everywhere: the device does none of it."""
    rows = QUICK_ROWS if quick or device == "cpu" else ROWS
    for table in ("stage1", "stage2"):
        for what in ("assign", "plan"):
            yield Case(
                "data",
                f"{what}-{table}-{rows}",
                {"stdit_fast": partial(prepare_plan, what, table, rows)},
                host=True,
                rounds=3,
                warmup=1,
            )
    for source, target in DECODED:
        yield Case(
            "data",
            f"decode-{Path(source[0]).stem}-{target[0]}-{target[1]}",
            {"stdit_fast": partial(prepare_decoding, source, target)},
            host=True,
            rounds=5,
            warmup=1,
        )


def prepare_plan(what: str, table: str, rows: int) -> Callable[[], object]:
    """Putting all rows into buckets, or all that an epoch needs."""
    sizes, buckets = synthetic_sizes(rows), Buckets(bucket_table(table))
    if what == "assign":
        return lambda: buckets.assign(*sizes, FRAME_INTERVAL, partial(hash_uniform, 0, 0))
    return lambda: BucketSampler(*sizes, buckets, seed=0, frame_interval=FRAME_INTERVAL)


def prepare_decoding(source: tuple, target: tuple) -> Callable[[], object]:
    """A clip from the middle of a file, as a data loader's process reads it."""
    name, frames, height, width = source
    path = CLIPS / name
    if not path.is_file():
        raise Absent(f"{path.name} is not there: run it in a checkout")
    sample = Sample(0, str(path), "", frames, height, width, 25.0)
    resolution, length, *size = target
    bucket = Bucket(resolution, length, "", *size, 1.0, 1)
    pixels = np.empty((length, *size, 3), dtype=np.uint8)
    return lambda: read_clip(pixels, sample, bucket, frames // 4, FRAME_INTERVAL)
