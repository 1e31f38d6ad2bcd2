"""The CUDA library: whether it is there, whether it can serve a GPU, and its functions.

The library is optional and knows no torch. It takes the addresses of tensors and the handle of a stream.
"""

import functools
import importlib
import json
from pathlib import Path
from types import ModuleType

import torch

_BUILD_INFO = Path(__file__).with_name("_build_info.json")


@functools.cache
def _load() -> tuple[ModuleType | None, str]:
    try:
        library = importlib.import_module("stdit_fast._C")
    except ModuleNotFoundError:
        return None, f"not built: {_why_not_built()}"
    except ImportError as error:
        return None, f"built, but it cannot be loaded: {error}"
    return library, f"built by nvcc {library.cuda_compiler} for {library.architectures}"


def _why_not_built() -> str:
    if not _BUILD_INFO.exists():
        return "this copy of stdit_fast was not installed (pip install)"
    reason = json.loads(_BUILD_INFO.read_text())["reason"]
    return reason or "the installation built it, but for another Python, or it was removed since"


def built() -> tuple[bool, str]:
    """Whether the library is installed and loads, and "built by ...", or why it is not there."""
    library, reason = _load()
    return library is not None, reason


@functools.cache
def available(device: int | None = None) -> tuple[bool, str]:
    """Whether the library's kernels run on a GPU, and the reason.

    Args:
        device: index of the GPU; None for the one that was current at the first call.
    """
    library, reason = _load()
    if library is None:
        return False, f"CUDA library {reason}"
    if not torch.cuda.is_available():
        return False, "no GPU: torch.cuda.is_available() is False"
    try:
        library.check_device(torch.cuda.current_device() if device is None else device)
    except RuntimeError as error:
        return False, f"CUDA library {reason}, which cannot run on this GPU: {error}"
    return True, f"CUDA library {reason}"


def library() -> ModuleType:
    """The library's Python module.

    Raises:
        RuntimeError: it is not installed or does not load; the message says why.
    """
    module, reason = _load()
    if module is None:
        raise RuntimeError(f"CUDA library {reason}")
    return module
