"""The table of samples: where each is, its caption, length, size and frame rate."""

import contextlib
import hashlib
import logging
import os
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet
from tqdm import tqdm

from stdit_fast.arguments import bar_options
from stdit_fast.errors import ConfigError, one_line
from stdit_fast.media.read import DEFAULT_FPS, BadSample, probe

REQUIRED = {"path": pa.string(), "text": pa.string()}
OPTIONAL = {"num_frames": pa.float64(), "height": pa.float64(), "width": pa.float64(), "fps": pa.float64()}
SIZES = ("num_frames", "height", "width")

# Rows handed to the probing threads at a time, and how often what they found is saved.
BLOCK = 1 << 14
TASK = 64
# Rows of a Parquet table decoded at a time.
BATCH = 1 << 16
SECONDS_BETWEEN_SAVES = 300

log = logging.getLogger(__name__)


class Sample(NamedTuple):
    """One row; num_frames 1 is an image, num_frames 0 a file that cannot be read."""

    index: int
    path: str
    text: str
    num_frames: int
    height: int
    width: int
    fps: float


class Unreadable(NamedTuple):
    """A file whose sizes could not be looked up: its row of the table, its path there, and why."""

    row: int
    path: str
    reason: str


@dataclass(frozen=True, eq=False)
class Metadata:
    """The columns of the table; strings stay in Arrow, so that millions of rows stay small.

    Attributes:
        path, text: pyarrow string arrays [N]; paths are relative to `folder` or absolute.
        num_frames, height, width: int32 [N], frames and pixels. A file that cannot be read has num_frames 0.
        fps: float32 [N], frames a second.
        folder: what relative paths are relative to.
        unreadable: the files that could not be read when their sizes were looked up.
    """

    path: pa.ChunkedArray
    text: pa.ChunkedArray
    num_frames: np.ndarray
    height: np.ndarray
    width: np.ndarray
    fps: np.ndarray
    folder: Path = Path(".")
    unreadable: tuple[Unreadable, ...] = ()

    def __len__(self) -> int:
        return len(self.num_frames)

    def row(self, index: int) -> Sample:
        """A row, its path joined to the table's folder; a missing caption is empty."""
        index = int(index)
        return Sample(
            index,
            str(self.folder / (self.path[index].as_py() or "")),
            self.text[index].as_py() or "",
            int(self.num_frames[index]),
            int(self.height[index]),
            int(self.width[index]),
            float(self.fps[index]),
        )


def load_metadata(
    path: str | Path,
    *,
    cache_dir: str | Path | None = None,
    progress: bool = True,
    num_workers: int | None = None,
    known: Mapping[str, np.ndarray] | None = None,
) -> Metadata:
    """Reads a CSV or Parquet table with the columns path and text, and num_frames, height, width and fps where known.

    Lengths and sizes that are missing (no column, null, NaN or 0) are looked up in the files and kept in a table of
    their own, so that this happens once; a file that has changed since is looked up again. A file that cannot be read
    is no error: it gets num_frames 0, so that no bucket takes it, and is listed in `unreadable`. A missing frame rate
    is looked up only along with something else, and is 24 otherwise.

    Several processes that load one table at once each look up what is missing: let one of them load it first.

    Args:
        path: the table, ``.csv``, ``.csv.gz``, ``.parquet`` or ``.pq``; paths in it are absolute or relative to its
            folder.
        cache_dir: folder for what was looked up; the table's own folder if None.
        progress: whether to show a progress bar while looking up.
        num_workers: threads that look up; four for each processor if None, 32 at most.
        known: num_frames, height, width and fps of all rows, which take the place of the table's: nothing is looked up.

    Raises:
        ConfigError: the table is missing, empty or unreadable, lacks path or text, or holds text where numbers belong.
    """
    path = Path(path)
    table = _read_table(path)
    if not len(table):
        raise ConfigError("dataset.data_path", str(path), "the table has no rows; it needs at least one sample.")
    folder = path.absolute().parent
    if known is not None:
        return Metadata(table["path"], table["text"], **known, folder=folder)
    numbers = {name: _numbers(table, name) for name in OPTIONAL}
    missing = np.flatnonzero(np.any([numbers[name] == 0 for name in SIZES], axis=0))
    unreadable: tuple[Unreadable, ...] = ()
    if len(missing):
        lookup = _Lookup(table["path"].take(pa.array(missing)), folder, _cache_path(path, cache_dir))
        found = lookup.run(progress, num_workers or min(32, 4 * (os.cpu_count() or 1)))
        for name in OPTIONAL:
            given = numbers[name][missing]
            numbers[name][missing] = np.where(given == 0, found[name], given)
        numbers["num_frames"][missing[found["num_frames"] == 0]] = 0
        unreadable = tuple(Unreadable(int(missing[i]), *rest) for i, *rest in lookup.unreadable())
        if unreadable and progress:
            first = f"{unreadable[0].path} ({unreadable[0].reason})"
            log.warning("%s: %d of %d files cannot be read; the first: %s", path, len(unreadable), len(table), first)
    numbers["fps"][numbers["fps"] == 0] = DEFAULT_FPS
    return Metadata(table["path"], table["text"], **numbers, folder=folder, unreadable=unreadable)


def _read_table(path: Path) -> pa.Table:
    if not path.is_file():
        raise ConfigError(
            "dataset.data_path",
            str(path),
            "there is no such file; give a CSV or Parquet table with path and text.",
        )
    suffix = path.suffixes[-2] if path.suffix == ".gz" and len(path.suffixes) > 1 else path.suffix
    readers = {".csv": _read_csv, ".parquet": _read_parquet, ".pq": _read_parquet}
    if suffix.lower() not in readers:
        raise ConfigError("dataset.data_path", str(path), f"the table must be one of {', '.join(readers)}.")
    try:
        return readers[suffix.lower()](path)
    except (pa.ArrowException, OSError) as error:
        raise ConfigError("dataset.data_path", str(path), f"the table cannot be read: {one_line(error)}") from error


def _wanted(path: Path, columns: list[str]) -> dict[str, pa.DataType]:
    """The columns to read and their types."""
    absent = [name for name in REQUIRED if name not in columns]
    if absent:
        plural = "s" if len(absent) > 1 else ""
        raise ConfigError(
            "dataset.data_path",
            str(path),
            f"the column{plural} {' and '.join(map(repr, absent))} must be there; found: {', '.join(columns)}.",
        )
    return REQUIRED | {name: kind for name, kind in OPTIONAL.items() if name in columns}


def _read_csv(path: Path) -> pa.Table:
    parsing = pa.csv.ParseOptions(newlines_in_values=True)
    with pa.csv.open_csv(path, parse_options=parsing) as reader:
        wanted = _wanted(path, reader.schema.names)
    # Captions such as "NA" or "null" are words; only numbers can be missing.
    conversion = pa.csv.ConvertOptions(column_types=wanted, include_columns=list(wanted), strings_can_be_null=False)
    # Arrow's own allocator keeps what it has freed, which doubles the memory of a long table.
    return pa.csv.read_csv(path, parse_options=parsing, convert_options=conversion, memory_pool=pa.system_memory_pool())


def _read_parquet(path: Path) -> pa.Table:
    with pa.parquet.ParquetFile(path, pre_buffer=False) as file:
        wanted = _wanted(path, file.schema_arrow.names)
        schema = pa.schema(wanted.items())
        # In batches: whole row groups, decoded in parallel, would take twice the table's memory.
        batches = file.iter_batches(BATCH, columns=list(wanted))
        parts = [pa.Table.from_batches([b]).select(list(wanted)).cast(schema, safe=False) for b in batches]
    return pa.concat_tables([schema.empty_table(), *parts])


def _numbers(table: pa.Table, name: str) -> np.ndarray:
    """A column of numbers with 0 where there is none; int32, or float32 for fps."""
    dtype = np.float32 if name == "fps" else np.int32
    if name not in table.column_names:
        return np.zeros(len(table), dtype=dtype)
    numbers, start = np.empty(len(table), dtype=dtype), 0
    for chunk in table[name].chunks:
        values = chunk.fill_null(0.0).to_numpy(zero_copy_only=False)
        possible = (values > 0) & (values < np.iinfo(np.int32).max)
        numbers[start : start + len(values)] = np.where(possible, values, 0)
        start += len(values)
    return numbers


def _cache_path(table: Path, cache_dir: str | Path | None) -> Path:
    if cache_dir is None:
        return table.with_name(f"{table.name}.probed.parquet")
    digest = hashlib.blake2b(str(table.absolute()).encode(), digest_size=6).hexdigest()
    return Path(cache_dir) / f"{table.name}.{digest}.probed.parquet"


class _Found(NamedTuple):
    """What is known of one file. `size` (bytes) and `time` (of its last change, ns) tell whether it is still true."""

    size: int
    time: int
    num_frames: int
    height: int
    width: int
    fps: float
    reason: str | None


_NUMBERS = {"size": np.int64, "time": np.int64, "num_frames": np.int32, "height": np.int32, "width": np.int32}
_NUMBERS |= {"fps": np.float32}


class _Lookup:
    """Looks up lengths and sizes in files, in threads, and keeps what it finds in a Parquet table."""

    def __init__(self, paths: pa.ChunkedArray, folder: Path, cache: Path):
        self.paths, self.folder, self.cache = paths, folder, cache
        self.found = {name: np.zeros(len(paths), dtype=dtype) for name, dtype in _NUMBERS.items()}
        self.reasons: dict[int, str] = {}
        self.known = self._load()
        self.done, self.fresh = 0, 0

    def run(self, progress: bool, num_workers: int) -> dict[str, np.ndarray]:
        saved = time.monotonic()
        bar = tqdm(total=len(self.paths), desc="looking up sizes", unit="file", disable=not progress, **bar_options())
        with bar, ThreadPoolExecutor(num_workers) as pool:
            try:
                while self.done < len(self.paths):
                    self._run_block(pool, bar)
                    if self.fresh and time.monotonic() - saved > SECONDS_BETWEEN_SAVES:
                        self._save()
                        saved = time.monotonic()
            finally:
                if self.fresh:
                    self._save()
        return self.found

    def unreadable(self) -> list[tuple[int, str, str]]:
        """(place, path, reason) of each file that cannot be read."""
        return [(i, self.paths[i].as_py() or "", reason) for i, reason in sorted(self.reasons.items())]

    def _run_block(self, pool: ThreadPoolExecutor, bar: tqdm) -> None:
        block = self.paths.slice(self.done, BLOCK)
        paths, known = block.to_pylist(), self._known_of(block)
        tasks = [(paths[i : i + TASK], known[i : i + TASK]) for i in range(0, len(paths), TASK)]
        place = self.done
        for results in pool.map(lambda task: [self._examine(*each) for each in zip(*task, strict=True)], tasks):
            for is_fresh, result in results:
                for name in _NUMBERS:
                    self.found[name][place] = getattr(result, name)
                if result.reason is not None:
                    self.reasons[place] = result.reason
                self.fresh += is_fresh
                place += 1
            bar.update(len(results))
        self.done = place

    def _examine(self, path: str | None, known: _Found | None) -> tuple[bool, _Found]:
        """(whether the file was opened, what is known of it)."""
        try:
            if not path:
                raise BadSample("vanished: the row has no path")
            status = os.stat(self.folder / path)
        except (OSError, ValueError, BadSample) as error:
            return False, _Found(-1, -1, 0, 0, 0, 0.0, getattr(error, "reason", "vanished: no such file"))
        if known and (known.size, known.time) == (status.st_size, status.st_mtime_ns):
            return False, known
        try:
            return True, _Found(status.st_size, status.st_mtime_ns, *probe(self.folder / path), None)
        except BadSample as error:
            return True, _Found(status.st_size, status.st_mtime_ns, 0, 0, 0, 0.0, error.reason)

    def _load(self) -> pa.Table | None:
        try:
            return pa.parquet.read_table(self.cache, columns=["path", *_Found._fields])
        except FileNotFoundError:
            return None
        except (pa.ArrowException, OSError) as error:
            log.warning("%s cannot be read and is made anew: %s", self.cache, error)
            return None

    def _known_of(self, paths: pa.ChunkedArray) -> list[_Found | None]:
        if self.known is None:
            return [None] * len(paths)
        places = pc.index_in(paths, value_set=self.known["path"])
        rows = self.known.select(_Found._fields).take(places.combine_chunks()).to_pylist()
        return [_Found(**row) if row["size"] is not None else None for row in rows]

    def _save(self) -> None:
        """Writes the cache whole or not at all; a folder that cannot be written to costs the cache, not the run."""
        count = self.done
        place = np.full(count, -1, dtype=np.int32)
        kept = {i: reason for i, reason in self.reasons.items() if i < count}
        place[list(kept)] = np.arange(len(kept))
        texts = pa.array(list(kept.values()), pa.string())
        reason = texts.take(pa.array(place, mask=place < 0)) if kept else pa.nulls(count, pa.string())
        columns = {name: pa.array(values[:count]) for name, values in self.found.items()}
        paths = pa.chunked_array(self.paths.slice(0, count).chunks, pa.string())
        table = pa.table({"path": paths, **columns, "reason": reason})
        table = table.filter(pc.greater_equal(table["size"], 0))
        if self.known is not None:
            other = pc.invert(pc.is_in(self.known["path"], value_set=table["path"]))
            table = pa.concat_tables([table, self.known.filter(other).select(table.column_names)])
        temporary = self.cache.with_name(f"{self.cache.name}.{os.getpid()}.tmp")
        try:
            self.cache.parent.mkdir(parents=True, exist_ok=True)
            pa.parquet.write_table(table, temporary)
            os.replace(temporary, self.cache)
        except OSError as error:
            log.warning("the sizes that were looked up cannot be kept in %s: %s", self.cache, error)
            with contextlib.suppress(OSError):
                temporary.unlink()
