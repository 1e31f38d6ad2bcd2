"""Shared by all tests: one thread, Triton's interpreter where there is no GPU, the original's golden tensors."""

import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Threads would wait for each other longer than tensors this small take. Processes that tests start inherit the number,
# since how a sum is split over threads decides its last bits.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
import triton

if not torch.cuda.is_available():  # before anything imports the kernels
    os.environ.setdefault("TRITON_INTERPRET", "1")

from safetensors import safe_open

if os.environ.get("TRITON_INTERPRET") == "1" and triton.__version__.startswith("3.6."):
    from triton.runtime import interpreter

    patch_tensor = interpreter._patch_lang_tensor

    def patch_with_index(tensor, scope) -> None:
        """Makes an integer of an array of one value, which Triton 3.7 does itself and NumPy 2.4 no longer."""
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))

    interpreter._patch_lang_tensor = patch_with_index

DATA = Path(__file__).parent / "data"


def pytest_xdist_auto_num_workers(config) -> int:
    """Processes of `-n auto`: one on a GPU, whose memory and time tests want for themselves; else a core each, some GB
    of memory each, and not so many that those which start processes of their own get in each other's way."""
    if torch.cuda.is_available():
        return 0
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return max(1, min(len(os.sched_getaffinity(0)), memory // (6 << 30), 4))


@pytest.fixture(autouse=True, scope="session")
def exact_float32():
    torch.backends.cudnn.allow_tf32 = False  # what tests compare with in float32 should be float32


@contextmanager
def as_it_was() -> Iterator[None]:
    """Training inside leaves this process its signal handlers, and no place among processes to later runs."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    environment = set(os.environ)
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for name in set(os.environ) - environment:
            del os.environ[name]


@pytest.fixture(scope="session")
def golden():
    """golden(name) -> (tensors by name, metadata) of tests/data/NAME.safetensors."""

    def read(name: str):
        with safe_open(DATA / f"{name}.safetensors", "pt") as content:
            return {key: content.get_tensor(key) for key in content.keys()}, content.metadata()  # noqa: SIM118

    return read


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    """|got - want| / |want|, in the norm; |got| where want is 0. NaN never passes a comparison with this."""
    size = want.double().norm()
    error = (got.detach().double() - want.double()).norm()
    return float(error / size if size > 0 else error)


def run_in_time(command: list, seconds: float, environment: dict | None = None) -> str:
    """Runs a launcher to its end and returns what it wrote; fails with that where it fails or takes longer.

    What it started is ended with it: torchrun passes SIGTERM on to its workers.
    """
    process = subprocess.Popen(
        list(map(str, command)),
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.terminate()
        try:
            output, _ = process.communicate(timeout=15)
        except subprocess.TimeoutExpired:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.stdout.close()
            output = "(nothing could be read of what it wrote)"
        raise AssertionError(f"not done after {seconds} s\n{output}") from None
    assert process.returncode == 0, output
    return output
