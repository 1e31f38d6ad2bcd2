"""Benchmark results: one JSON object a line in `benchmarks/results/<gpu>/<suite>.jsonl`.

A later line for the same suite, case and impl replaces an earlier one; null stands where a key does not apply.
"""

import argparse
import json
import platform
import shlex
import statistics
import sys
from dataclasses import asdict, dataclass, field
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from stdit_fast.arguments import check_output_folder
from stdit_fast.errors import ConfigError


def device_name() -> str:
    """The GPU's name, or the processor's."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else processor_name()


def need_gpu(what: str) -> None:
    """Raises ConfigError where no GPU is visible for `what` a benchmark does."""
    import torch

    if not torch.cuda.is_available():
        raise ConfigError("GPU", None, f"{what}, and none is visible; `pytest benchmarks/` has cases for the CPU")


def tell_cpu(less: str) -> None:
    """Says, where no GPU is visible, that the CPU does what was asked for, which takes long, and `less` would not."""
    import torch

    if not torch.cuda.is_available():
        told = f"no GPU is visible: the whole model runs on the CPU, in float32; {less} takes less time"
        print(told, file=sys.stderr)


def processor_name() -> str:
    """The processor's model."""
    cpu = Path("/proc/cpuinfo")
    names = [line for line in cpu.read_text().splitlines() if line.startswith("model name")] if cpu.exists() else []
    return names[0].split(":", 1)[1].strip() if names else platform.processor()


def installed_versions() -> dict[str, str]:
    """Versions that a figure depends on."""
    found = {"python": platform.python_version()}
    for name in ("torch", "triton", "numpy", "transformers", "diffusers", "colossalai"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


@dataclass
class Record:
    """One measured figure.

    Attributes:
        suite, case, impl: what was measured, on which input, of which implementation.
        ms, ms_low, ms_high: median, and the lowest and highest of the repeats, in milliseconds.
        bytes, flops: that the work must move and do, at least.
        peak_gib: device memory at most (on the CPU, resident memory), in GiB.
        device, versions, date, command: what it was measured on, with, when, and how to repeat it.
        notes: anything else.
    """

    suite: str
    case: str
    impl: str
    ms: float | None
    ms_low: float | None
    ms_high: float | None
    bytes: int | None = None
    flops: int | None = None
    peak_gib: float | None = None
    device: str = field(default_factory=device_name)
    versions: dict = field(default_factory=installed_versions)
    date: str = field(default_factory=lambda: date.today().isoformat())
    command: str = field(default_factory=lambda: command_line())
    notes: dict = field(default_factory=dict)

    @classmethod
    def of_times(cls, suite: str, case: str, impl: str, milliseconds: list[float], **more) -> "Record":
        """From the times of the repeats, in milliseconds; without any where it could not run."""
        if not milliseconds:
            return cls(suite, case, impl, None, None, None, **more)
        times = sorted(milliseconds)
        return cls(suite, case, impl, statistics.median(times), times[0], times[-1], **more)


# Options that name what is written; where that lay is no part of how to repeat it.
WRITTEN = ("--out", "--metrics", "--records", "--benchmark-json", "--trace")


def command_line() -> str:
    """This process's command, as a user would type it."""
    module = getattr(sys.modules["__main__"], "__spec__", None)
    name = module.name.removesuffix(".__main__") if module else Path(sys.argv[0]).name
    arguments = list(sys.argv[1:])
    for i, argument in enumerate(arguments[:-1]):
        if argument in WRITTEN:
            arguments[i + 1] = Path(arguments[i + 1]).name
    return " ".join(["python -m" if module else "python", name, shlex.join(arguments)]).rstrip()


def results_file(path: str) -> str:
    """The value of an option that names a file to `append` to, held against the disk before anything is measured."""
    try:
        if Path(path).is_dir():
            raise ConfigError("--out", path, "it is a folder; name a file in it, like step.jsonl")
        check_output_folder("--out", Path(path).parent)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(f"{error.value!r}: {error.remedy}") from error
    return path


def append(path: str | Path, records: list[Record]) -> None:
    """Adds lines to a results file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(asdict(record)) + "\n" for record in records)
    with open(path, "ab+") as file:
        if file.seek(0, 2) and (file.seek(-1, 2), file.read(1))[1] != b"\n":
            lines = "\n" + lines  # a kill left the line before it half written
        file.write(lines.encode())
