"""Which implementation serves which op, and why: the source of `stdit_fast.report()`.

An op file declares itself once with a chooser. The chooser looks at this machine and answers with the
implementation that a default call would take and the reason; it may be asked at any time and must be quick.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from stdit_fast.errors import ConfigError, nearest
from stdit_fast.kernels.tiles import interpreted

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
BACKENDS = ("auto", "fused", "reference")
REFERENCE = "reference"

Chooser = Callable[[], tuple[str, str]]
_choosers: dict[str, Chooser] = {}


@dataclass(frozen=True)
class Serving:
    """One op: the implementation that serves it here ("reference" is plain PyTorch) and the reason."""

    op: str
    implementation: str
    reason: str


def declare(op: str, chooser: Chooser) -> None:
    """Registers the op under its public name; called once by the op's own file."""
    _choosers[op] = chooser


def serving() -> list[Serving]:
    """The implementation of every declared op on this machine, in order of name."""
    return [Serving(op, *_choosers[op]()) for op in sorted(_choosers)]


def triton_kernel() -> tuple[str, str]:
    """The chooser of an op that a Triton kernel serves."""
    if not torch.cuda.is_available():
        return REFERENCE, "no GPU is visible"
    reason = _unserved_gpu(torch.cuda.current_device())
    if reason:
        return REFERENCE, reason
    return "triton", "bf16, fp16 and fp32, sizes that are multiples of 8"


def use_kernel(op: str, backend: str, x: Tensor, *sizes: int) -> bool:
    """Whether a call is served by the op's kernel (True) or by its definition.

    Args:
        backend: "auto" takes the kernel on a GPU where it can serve the call, "reference" never does, and
            "fused" must (also on the CPU, under Triton's interpreter).
        x: the input that decides on device and dtype.
        sizes: what has to be a multiple of 8, such as channels or head dimension.

    Raises:
        ConfigError: "fused" where no kernel can serve the call, with the reason; an unknown backend.
    """
    return backend != REFERENCE and serves(op, backend, _unserved(x, sizes), x.device)


def serves(op: str, backend: str, reason: str, device: torch.device) -> bool:
    """The same, where `reason` says why the kernel cannot serve the call on `device` (empty: it can).

    Raises:
        ConfigError: backend "fused" with a reason, or an unknown backend.
    """
    if backend == REFERENCE:
        return False
    if backend == "fused":
        if reason:
            raise ConfigError("backend", backend, f'{op} has no kernel for this call ({reason}); use "auto"')
        return True
    if backend != "auto":
        raise ConfigError("backend", backend, nearest(backend, BACKENDS))
    return not reason and device.type == "cuda"


def described(backend: str, reason: str, device: torch.device, kernels: str, plain: str) -> str:
    """What serves a network for which `serves` is asked, and why, in words: `kernels` or `plain`."""
    if backend == REFERENCE:
        return f"{plain} (backend: reference)"
    if reason or (backend == "auto" and device.type != "cuda"):
        return f"{plain} ({reason or f'on {device.type}'})"
    return kernels


def _unserved(x: Tensor, sizes: tuple[int, ...]) -> str:
    """Why kernels cannot serve a call, or an empty string."""
    if x.dtype not in _DTYPES:
        return f"{x.dtype}, where bf16, fp16 or fp32 is needed"
    for size in sizes:
        if size % 8:
            return f"a size of {size}, where a multiple of 8 is needed"
    if x.is_cuda:
        return _unserved_gpu(x.device.index)
    return "" if interpreted() else f"a tensor on {x.device.type}, without Triton's interpreter"


@functools.cache
def _unserved_gpu(index: int) -> str:
    major, minor = torch.cuda.get_device_capability(index)
    return "" if major >= 8 else f"compute capability {major}.{minor}, where 8.0 is needed"


def check_backend(backend: str, ops: tuple[str, ...]) -> None:
    """Holds a model's `backend` against what this machine can serve.

    Raises:
        ConfigError: an unknown name, or "fused" where one of `ops` would run as plain PyTorch.
    """
    if backend not in BACKENDS:
        raise ConfigError("backend", backend, nearest(backend, BACKENDS))
    if backend != "fused" or interpreted():
        return
    slow = [s for s in serving() if s.op in ops and s.implementation == REFERENCE]
    if slow:
        reasons = "; ".join(f"{s.op}: {s.reason}" for s in slow)
        remedy = f'the fast path cannot be had here ({reasons}); use "auto" or "reference"'
        raise ConfigError("backend", backend, remedy)
