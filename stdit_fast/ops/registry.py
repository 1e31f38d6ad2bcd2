"""Which implementation serves which op, and why: the source of `stdit_fast.report()`.

An op file declares itself once with a chooser. The chooser looks at this machine and answers with the
implementation that a default call would take and the reason; it may be asked at any time and must be quick.
"""

from collections.abc import Callable
from dataclasses import dataclass

from stdit_fast.errors import ConfigError, nearest

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


def no_fused_kernel() -> tuple[str, str]:
    """The chooser of an op that has its plain definition only."""
    return REFERENCE, "this release has no fused kernel for it"


def check_backend(backend: str, ops: tuple[str, ...]) -> None:
    """Holds a model's `backend` against what this machine can serve.

    Raises:
        ConfigError: an unknown name, or "fused" where one of `ops` would run as plain PyTorch.
    """
    if backend not in BACKENDS:
        raise ConfigError("backend", backend, nearest(backend, BACKENDS))
    if backend != "fused":
        return
    slow = [s for s in serving() if s.op in ops and s.implementation == REFERENCE]
    if slow:
        reasons = "; ".join(f"{s.op}: {s.reason}" for s in slow)
        remedy = f'the fast path cannot be had here ({reasons}); use "auto" or "reference"'
        raise ConfigError("backend", backend, remedy)
