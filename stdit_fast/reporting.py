"""What runs here: versions, the CUDA library, and the implementation that serves each op.

`python -m stdit_fast.reporting` prints it.
"""

import importlib
import importlib.metadata
import pkgutil
import platform
from dataclasses import dataclass

import pynvml
import torch

from stdit_fast import _cuda, ops
from stdit_fast.ops.registry import Serving, serving

_DISTRIBUTIONS = ("stdit-fast", "torch", "triton", "transformers", "diffusers", "colossalai")


@dataclass(frozen=True, repr=False)
class Report:
    """The answer of `report()`; prints as a text for people.

    Attributes:
        versions: what is installed and what hardware is here, by name.
        cuda_library: whether the CUDA library is built, and by what, or why not.
        ops: for each op the implementation that a default call takes, and the reason.
    """

    versions: dict[str, str]
    cuda_library: str
    ops: list[Serving]

    def __str__(self) -> str:
        return "\n".join(
            [
                *_columns([(name, version) for name, version in self.versions.items()]),
                "",
                f"CUDA library: {self.cuda_library}",
                "",
                *_columns([("op", "served by", "reason"), *((s.op, s.implementation, s.reason) for s in self.ops)]),
            ]
        )

    __repr__ = __str__


def report() -> Report:
    """Versions, hardware, the CUDA library, and which implementation serves which op and why."""
    for module in pkgutil.iter_modules(ops.__path__):
        importlib.import_module(f"{ops.__name__}.{module.name}")
    _, cuda_library = _cuda.built()
    return Report(versions=_versions(), cuda_library=cuda_library, ops=serving())


def _versions() -> dict[str, str]:
    installed = {name: _installed(name) for name in _DISTRIBUTIONS}
    cuda = torch.version.cuda or "none (this torch is a CPU build)"
    return {
        "python": platform.python_version(),
        **installed,
        "CUDA of torch": cuda,
        "driver": _driver(),
        "GPU": _gpus(),
    }


def _installed(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _driver() -> str:
    try:
        pynvml.nvmlInit()
        version = pynvml.nvmlSystemGetDriverVersion()
        pynvml.nvmlShutdown()
    except pynvml.NVMLError as error:
        return f"none found ({error})"
    return version


def _gpus() -> str:
    if not torch.cuda.is_available():
        return "no GPU"
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return ", ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names))


def _columns(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


if __name__ == "__main__":
    print(report())
