"""Tables of measured batch sizes: which one fits this GPU and run, and what stands in it.

`python -m stdit_fast.benchmarks.sweep` writes them. A table holds for one GPU, one model and one set of buckets how
many samples of each bucket make a step of about the same time without running out of memory, and how long that takes.

buckets/h100-80gb/stage2.yaml
  device, memory_gib                 the GPU, by name and size
  world_size                         ranks that the optimizer's state was taken to be split over
  encoders                           whether autoencoder and text encoder run in each step
  step_seconds                       what was aimed at
  model, text_tokens                 sizes that must be those of the run
  versions, date, command            what measured it
  evenness                           how far step times lie apart, and did with the config's own batch sizes
  buckets: {resolution: {frames: {batch_size, pieces, checkpointed, seconds, ...}}}
"""

import dataclasses
import logging
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from stdit_fast.errors import ConfigError, one_line
from stdit_fast.media.files import whole_file
from stdit_fast.resolutions import is_int

logger = logging.getLogger(__name__)

FORMAT = 1
SHIPPED = Path(__file__).with_name("configs") / "buckets"
MODEL_KEYS = ("hidden_size", "depth", "num_heads", "mlp_ratio")
# Two cards of one kind differ by what the driver keeps for itself.
_SAME_MEMORY = 0.02
_SWEEP = "measure it with `python -m stdit_fast.benchmarks.sweep --config YOUR.yaml`"

Key = tuple[str, int]  # resolution, number of frames


@dataclass(frozen=True)
class Entry:
    """What was measured of one (resolution, number of frames), at its aspect ratio with the most tokens.

    Attributes:
        batch_size: samples a GPU and step.
        checkpointed: blocks that are recomputed in the backward pass.
        seconds, seconds_low, seconds_high: of the whole step on one GPU: median, lowest, highest.
        peak_gib: device memory allocated at most.
        tokens: video tokens of the batch.
        height, width: the size in pixels that was measured.
        measured: whether that very step was; False: it follows from steps of other sizes of the same bucket.
        pieces: passes in which the batch runs, one after another; their gradients add up.
    """

    batch_size: int
    checkpointed: int
    seconds: float
    seconds_low: float
    seconds_high: float
    peak_gib: float
    tokens: int
    height: int
    width: int
    measured: bool = True
    pieces: int = 1


@dataclass(frozen=True)
class BucketTable:
    """One table; see the top of this file for its fields. `path`: where it was read from."""

    device: str
    memory_gib: float
    world_size: int
    encoders: bool
    step_seconds: float
    model: dict[str, float]
    text_tokens: int
    buckets: dict[Key, Entry]
    versions: dict[str, str] = field(default_factory=dict)
    date: str = ""
    command: str = ""
    evenness: dict[str, float] = field(default_factory=dict)
    path: Path | None = None

    def describe(self) -> str:
        """One line for a log."""
        encoders = "encoders in the step" if self.encoders else "features"
        return (
            f"batch sizes of {self.path}: {self.device} with {self.memory_gib:.0f} GiB, state over {self.world_size} "
            f"rank{'s' * (self.world_size > 1)}, {encoders}, {self.step_seconds:.2f} s a step, {self.date}"
        )

    def missing(self, wanted: Iterable[Key]) -> list[str]:
        """Names of buckets that the table does not know."""
        return [f"{resolution}-{frames}" for resolution, frames in wanted if (resolution, frames) not in self.buckets]


@dataclass(frozen=True)
class Run:
    """What a table has to fit.

    Attributes:
        device, memory_gib: the GPU; None where there is none.
        world_size: data-parallel ranks.
        encoders: whether the run encodes in each step.
        model: its sizes, by MODEL_KEYS.
        text_tokens: tokens of a caption at most.
        wanted: (resolution, number of frames) of every bucket.
    """

    device: str | None
    memory_gib: float | None
    world_size: int
    encoders: bool
    model: dict[str, float]
    text_tokens: int
    wanted: tuple[Key, ...]


def write(path: str | Path, table: BucketTable) -> None:
    """Writes a table, whole or not at all."""
    content = {"format": FORMAT} | {
        f.name: getattr(table, f.name) for f in dataclasses.fields(table) if f.name not in ("buckets", "path")
    }
    text = yaml.safe_dump(content, sort_keys=False, width=120) + "buckets:\n"
    for resolution in dict.fromkeys(r for r, _ in table.buckets):
        text += f'  "{resolution}":\n'
        for (name, frames), entry in sorted(table.buckets.items()):
            if name == resolution:
                values = yaml.safe_dump(dataclasses.asdict(entry), sort_keys=False, default_flow_style=True, width=1000)
                text += f"    {frames}: {values.strip()}\n"
    with whole_file(path) as draft:
        draft.write_text(text)


def read(path: str | Path) -> BucketTable:
    """Reads a table.

    Raises:
        ConfigError: a file that is missing, is not YAML or is no such table.
    """
    path = Path(path)
    try:
        content = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError("bucket_sizes", str(path), f"it cannot be read ({one_line(error)}); {_SWEEP}") from error
    if not isinstance(content, Mapping) or content.get("format") != FORMAT:
        raise ConfigError("bucket_sizes", str(path), f"it is no table of bucket sizes of format {FORMAT}; {_SWEEP}")
    content = dict(content)
    del content["format"]
    try:
        entries = {
            (str(resolution), int(frames)): Entry(**entry)
            for resolution, lengths in content.pop("buckets").items()
            for frames, entry in lengths.items()
        }
        table = BucketTable(**content, buckets=entries, path=path)
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise ConfigError("bucket_sizes", str(path), f"it is no whole table of bucket sizes ({error})") from error
    for (resolution, frames), entry in table.buckets.items():
        least = {"batch_size": 1, "checkpointed": 0, "pieces": 1}
        for key, low in least.items():
            value = getattr(entry, key)
            if not is_int(value) or value < low:
                name = f"{path}: {resolution}.{frames}.{key}"
                raise ConfigError(name, value, f"it must be an integer of at least {low}")
        if not isinstance(entry.seconds, (int, float)) or not entry.seconds > 0:
            raise ConfigError(f"{path}: {resolution}.{frames}.seconds", entry.seconds, "it must be above 0")
    return table


def user_folder() -> Path:
    """Where a user's own tables lie, and the sweep writes them: ~/.config/stdit-fast/buckets."""
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "stdit-fast" / "buckets"


def folder_name(device: str, memory_gib: float) -> str:
    """The folder of a GPU's tables: "NVIDIA H100 80GB HBM3" with 79.2 GiB gives "h100-80gb"."""
    words = [w for w in device.lower().split() if w not in ("nvidia", "geforce", "tesla", "hbm3", "hbm3e", "pcie")]
    words = [w for w in words if not (w.endswith("gb") and w[:-2].isdigit())]
    # A card of 80 GB shows 79.2 GiB, one of 141 GB shows 139.8; what is rounded up to tens is a name, no measure.
    size = next((n for n in (16, 24, 32, 40, 48, 64, 80, 94, 96, 141, 180, 192, 288) if memory_gib <= n), None)
    return "-".join([*words, f"{size or round(memory_gib)}gb"])


def find(run: Run, folders: Iterable[Path] | None = None) -> BucketTable:
    """The table for a run: of its GPU, among the user's own first, then among those shipped.

    Where none is of this GPU, one of a GPU with no more memory serves, with a warning: nothing runs out of memory by
    it, but times differ.

    Raises:
        ConfigError: there is no GPU, or no table that fits; with the reasons.
    """
    if run.device is None:
        remedy = "there is no GPU to match; name a table, or use `config`: the batch sizes that stand in `buckets`"
        raise ConfigError("bucket_sizes", "auto", remedy)
    reasons, others = [], []
    for folder in (user_folder(), SHIPPED) if folders is None else folders:
        fitting = []
        for path in sorted(folder.rglob("*.yaml")):
            table = read(path)
            reason = unfit(table, run)
            if reason:
                reasons.append(f"{path}: {reason}")
            elif table.device == run.device and abs(table.memory_gib / run.memory_gib - 1) <= _SAME_MEMORY:
                fitting.append(table)
            elif table.memory_gib <= run.memory_gib * (1 + _SAME_MEMORY / 4):
                others.append(table)
            else:
                reasons.append(f"{path}: it is for {table.device} with {table.memory_gib:.0f} GiB")
        if fitting:
            return min(fitting, key=_preference)
    if others:
        table = min(others, key=lambda t: (-t.memory_gib, _preference(t)))
        logger.warning(
            "no table of batch sizes is of %s with %.0f GiB; %s is of %s, which has no more memory: it will fit, but "
            "times will differ. To know them, %s",
            run.device, run.memory_gib, table.path, table.device, _SWEEP,
        )  # fmt: skip
        return table
    found = "\n".join(reasons) if reasons else "there is none"
    remedy = f"no table is for this run on {run.device} with {run.memory_gib:.0f} GiB; {_SWEEP}.\n{found}"
    raise ConfigError("bucket_sizes", "auto", remedy)


def unfit(table: BucketTable, run: Run) -> str | None:
    """Why a table cannot serve a run, on whatever GPU; None if it can."""
    for key in MODEL_KEYS:
        if table.model.get(key) != run.model[key]:
            return f"it is for model.{key} {table.model.get(key)}, and the run has {run.model[key]}"
    if table.encoders != run.encoders:
        kinds = {True: "with encoders in the step", False: "with features"}
        return f"it is for runs {kinds[table.encoders]}, and this is one {kinds[run.encoders]}"
    if table.text_tokens < run.text_tokens:
        return f"it is for captions of {table.text_tokens} tokens, and the run has {run.text_tokens}"
    if table.world_size > run.world_size:
        return f"it is for {table.world_size} ranks or more, and there are {run.world_size}"
    missing = table.missing(run.wanted)
    if missing:
        return f"it does not know {', '.join(missing[:6])}{' and more' if len(missing) > 6 else ''}"
    return None


def _preference(table: BucketTable) -> tuple:
    """Of several that fit: the one for most ranks, then that of the fewest other buckets, then the newest."""
    return -table.world_size, len(table.buckets), _reversed(table.date)


def _reversed(date: str) -> tuple[int, ...]:
    return tuple(-ord(c) for c in str(date))
