"""The CUDA library: whether it is there and why not, its interface, and how its failures arrive."""

import shutil
import subprocess
from pathlib import Path

import pytest

from stdit_fast import _cuda

CSRC = Path(__file__).resolve().parents[1] / "csrc"

BUILT, BUILT_REASON = _cuda.built()
needs_library = pytest.mark.skipif(not BUILT, reason=f"CUDA library {BUILT_REASON}")
needs_nvcc = pytest.mark.skipif(not shutil.which("nvcc"), reason="no nvcc on PATH")


def test_without_the_library_the_reason_is_given(monkeypatch):
    monkeypatch.setattr(_cuda, "_load", lambda: (None, "not built: no nvcc"))
    assert _cuda.available.__wrapped__() == (False, "CUDA library not built: no nvcc")
    with pytest.raises(RuntimeError, match="CUDA library not built: no nvcc"):
        _cuda.library()


@needs_nvcc
def test_the_library_is_built_where_nvcc_is():
    if any(words in BUILT_REASON for words in ("STDIT_FAST_CUDA=0", "cannot use the toolchain")):
        pytest.skip(BUILT_REASON)
    assert BUILT, BUILT_REASON


@pytest.mark.skipif(not shutil.which("cc"), reason="no C compiler")
def test_the_interface_is_plain_c():
    command = ["cc", "-std=c99", "-Wall", "-Werror", "-pedantic", "-fsyntax-only", "-x", "c"]
    header = CSRC / "include" / "stdit" / "c_api.h"
    result = subprocess.run([*command, "-include", str(header), "/dev/null"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@needs_library
def test_failures_of_the_library_are_exceptions():
    library = _cuda.library()
    with pytest.raises(RuntimeError, match="cudaError"):
        library.check_device(4096)
    nowhere = dict(tensors=0, tiles=0, steps=0, scratch=0, tile_count=1, device=4096)
    with pytest.raises(RuntimeError, match="unknown dtype 7"):
        library.AdamW(count=1, **nowhere).square_sum(grads=[0], grad_dtype=7, square_sum=0, stream=0)
    with pytest.raises(ValueError, match="as many gradients as tensors"):
        library.AdamW(count=2, **nowhere).square_sum(grads=[0], grad_dtype=0, square_sum=0, stream=0)
