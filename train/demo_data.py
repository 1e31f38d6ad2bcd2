"""A small training set from the three real clips: segments and stills in several sizes and aspect ratios."""

import csv
import itertools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image
from tqdm import tqdm

from stdit_fast.arguments import check_output_folder
from stdit_fast.errors import ConfigError

# clip -> caption of each shot of it, by its first frame
CAPTIONS = {
    "bigbuckbunny.mp4": {
        0: "a big grey rabbit crawls out of its burrow in a green meadow, animated film",
        40: "a big grey rabbit stretches in front of its burrow in a green meadow, animated film",
        90: "a big grey rabbit stands in a green meadow and holds its ear, animated film",
    },
    "bikes.mp4": {
        0: "the white roof of a long vehicle in a street, seen from above",
        30: "a taxi and other cars in dense traffic, close up",
        76: "a cyclist waits beside a van in a street at dusk",
        137: "cars drive by in a street behind an iron fence",
        187: "a person walks past a bicycle that leans on an old house",
        242: "a bicycle locked to a fence, close up",
    },
    "carphone_pristine.mp4": {0: "a man in a dark suit and a red bow tie talks in a car"},
}
SEGMENT_FRAMES = (36, 36, 20)  # in turn, so that there are clips for buckets of several lengths
STILLS_EVERY = 12
ASPECTS = {"wide": 9 / 16, "square": 1.0, "tall": 4 / 3}  # height / width
WIDTH, HEIGHT = 256, 144  # pixels that frames are scaled to cover; more would only cost decoding time


@dataclass(frozen=True)
class Row:
    """One row of the metadata table; sizes are left to be probed."""

    path: str
    text: str


def make_demo_data(clips: Path, folder: Path, *, whole_shots: bool = False, repeats: int = 1) -> Path:
    """Writes segments, stills and `metadata.csv` into `folder`, once; answers the table's path.

    Args:
        clips: folder that holds the three clips.
        folder: where the set goes; complete when its metadata.csv is there.
        whole_shots: shots stay whole, so that clips may begin anywhere in them.
        repeats: how often each row stands in the table. So few samples fill no batch: it would be padded with copies,
            of the same noise. Rows differ in theirs.

    Raises:
        ConfigError: a clip is not there.
    """
    table = folder / "metadata.csv"
    if table.is_file():
        return table
    missing = [name for name in CAPTIONS if not (clips / name).is_file()]
    if missing:
        raise ConfigError("clips", str(clips), f"{', '.join(missing)} is not there; give the folder tests/data")
    check_output_folder("outputs", folder)
    folder.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    for name in tqdm(CAPTIONS, desc="cutting clips", unit="clip"):
        frames, rate = _read(clips / name)
        lengths = (len(frames),) if whole_shots else SEGMENT_FRAMES
        rows += _segments(name, frames, rate, folder, lengths) + _stills(name, frames, folder)
    draft = table.with_suffix(".tmp")
    with open(draft, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("path", "text"))
        writer.writerows((row.path, row.text) for row in rows * repeats)
    os.replace(draft, table)
    return table


def _read(path: Path) -> tuple[list[np.ndarray], Fraction]:
    """All frames as RGB [H, W, 3], scaled to cover WIDTH x HEIGHT, and the frame rate."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        scale = max(WIDTH / stream.width, HEIGHT / stream.height)
        size = {"width": round(stream.width * scale), "height": round(stream.height * scale)}
        return [f.to_ndarray(format="rgb24", **size) for f in container.decode(stream)], stream.average_rate


def _caption(name: str, frame: int) -> str:
    return CAPTIONS[name][max(start for start in CAPTIONS[name] if start <= frame)]


def _crop(frame: np.ndarray, aspect: float) -> np.ndarray:
    """The largest centred part with that height / width, even in both sizes (the codec wants that)."""
    height, width = frame.shape[:2]
    h, w = (height, int(height / aspect)) if height < width * aspect else (int(width * aspect), width)
    h, w = h - h % 2, w - w % 2
    top, left = (height - h) // 2, (width - w) // 2
    return frame[top : top + h, left : left + w]


def _segments(name: str, frames: list[np.ndarray], rate: Fraction, folder: Path, lengths: Sequence[int]) -> list[Row]:
    """Cuts each shot into segments of those lengths in turn, and each of those into the three shapes."""
    rows = []
    shots = [*CAPTIONS[name], len(frames)]
    for first, end in zip(shots, shots[1:], strict=False):
        start = first
        for number in itertools.count():
            length = min(lengths[number % len(lengths)], end - start)
            if length < min(SEGMENT_FRAMES):
                break
            for shape, aspect in ASPECTS.items():
                path = folder / f"{Path(name).stem}-{start:03d}-{shape}.mp4"
                _encode(path, [_crop(f, aspect) for f in frames[start : start + length]], rate)
                rows.append(Row(path.name, CAPTIONS[name][first]))
            start += length
    return rows


def _encode(path: Path, frames: list[np.ndarray], rate: Fraction) -> None:
    codec = "libx264" if "libx264" in av.codecs_available else "mpeg4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        container.mux(stream.encode())


def _stills(name: str, frames: list[np.ndarray], folder: Path) -> list[Row]:
    rows = []
    for number, index in enumerate(range(0, len(frames), STILLS_EVERY)):
        shape = list(ASPECTS)[number % len(ASPECTS)]
        path = folder / f"{Path(name).stem}-{index:03d}-{shape}.png"
        Image.fromarray(_crop(frames[index], ASPECTS[shape])).save(path)
        rows.append(Row(path.name, _caption(name, index)))
    return rows
