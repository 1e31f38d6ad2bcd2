"""What the processor does for training: an epoch's plan, and a clip from its file to pixels."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import av
import numpy as np
import torch

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
            {impl: partial(prepare_decoding, impl, source, target) for impl in ("stdit_fast", "whole-file")},
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


def prepare_decoding(impl: str, source: tuple, target: tuple) -> Callable[[], object]:
    """A clip from the middle of a file, as a data loader's process reads it.

    "whole-file" is Open-Sora 1.1's way: all of the file is decoded, and the clip's frames made smaller in float32.
    """
    name, frames, height, width = source
    path = CLIPS / name
    if not path.is_file():
        raise Absent(f"{path.name} is not there: run it in a checkout")
    sample = Sample(0, str(path), "", frames, height, width, 25.0)
    resolution, length, *size = target
    bucket = Bucket(resolution, length, "", *size, 1.0, 1)
    pixels = np.empty((length, *size, 3), dtype=np.uint8)
    if impl == "stdit_fast":
        return lambda: read_clip(pixels, sample, bucket, frames // 4, FRAME_INTERVAL)
    indices = frames // 4 + np.arange(length) * FRAME_INTERVAL

    def whole_file() -> torch.Tensor:
        with av.open(str(path)) as container:
            every = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
        some = torch.from_numpy(every[indices]).permute(0, 3, 1, 2).float()
        scale = max(size[0] / height, size[1] / width)
        wide = [round(scale * side) for side in (height, width)]
        top, left = ((a - b) // 2 for a, b in zip(wide, size, strict=True))
        some = torch.nn.functional.interpolate(some, wide, mode="bilinear", antialias=True)
        return some[:, :, top : top + size[0], left : left + size[1]]

    return whole_file
