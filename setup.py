"""The package's folders, and the CUDA library, which CMake builds where nvcc is found.

Environment:
    STDIT_FAST_CUDA        unset: built where there is a toolchain for it; 0: skipped; 1: required.
    STDIT_FAST_CUDA_ARCHS  what to compile for, as "90a" (the default) or "90a;100a". Attention is for 90a in any case.
    CUDACXX, CUDA_HOME     where nvcc is, if neither on PATH nor in a usual place.

Without a toolchain the install goes on in Python only; the reason is printed and recorded for
`stdit_fast.report()`. An error in compiling the library itself fails the install.
"""

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
PACKAGE_DIR = {
    "stdit_fast": "stdit_fast",
    "stdit_fast.kernels": "kernels",
    "stdit_fast.train": "train",
    "stdit_fast.benchmarks": "benchmarks",
}
PACKAGES = [
    package
    for parent, folder in PACKAGE_DIR.items()
    for package in (parent, *(f"{parent}.{name}" for name in find_packages(folder)))
]


class NoToolchain(Exception):
    """The CUDA library cannot be built here, through no fault of its code."""


def find_nvcc() -> str:
    """The path of nvcc. Raises NoToolchain."""
    named = os.environ.get("CUDACXX")
    if named:
        found = shutil.which(named)
        if not found:
            raise NoToolchain(f"CUDACXX names {named}, which is not there or cannot be run")
        return found
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    candidates = [
        *(f"{home}/bin/nvcc" for home in homes if home),
        shutil.which("nvcc"),
        "/usr/local/cuda/bin/nvcc",
        "/opt/cuda/bin/nvcc",
    ]
    for candidate in candidates:
        if candidate and os.access(candidate, os.X_OK):
            return candidate
    raise NoToolchain("nvcc was not found (on PATH, in CUDA_HOME, /usr/local/cuda or /opt/cuda)")


def find_tool(name: str, folder_attribute: str) -> str | None:
    """CMake or ninja: the one of this Python's environment, else the one on PATH."""
    try:
        folder = Path(getattr(importlib.import_module(name), folder_attribute))
    except (ImportError, AttributeError):
        return shutil.which(name)
    return str(folder / name) if os.access(folder / name, os.X_OK) else shutil.which(name)


def cmake_archs() -> str:
    archs = os.environ.get("STDIT_FAST_CUDA_ARCHS", "").replace(",", ";") or "90a"
    return ";".join(arch if "-" in arch else f"{arch}-real" for arch in archs.split(";") if arch)


def configure(cmake: str, nvcc: str, build: Path) -> None:
    """Runs CMake's configuration, which tries both compilers. Raises NoToolchain with CMake's reason."""
    ninja = find_tool("ninja", "BIN_DIR")
    command = [
        cmake,
        *("-S", str(ROOT), "-B", str(build)),
        *(("-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}") if ninja else ()),
        "-DCMAKE_BUILD_TYPE=Release",
        f"-DCMAKE_CUDA_COMPILER={nvcc}",
        f"-DCMAKE_CUDA_ARCHITECTURES={cmake_archs()}",
        f"-DPython_EXECUTABLE={sys.executable}",
    ]
    result = subprocess.run(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    print(result.stdout, file=sys.stderr)
    if result.returncode:
        raise NoToolchain(f"CMake cannot use the toolchain here: {first_error(result.stdout)}")


def first_error(log: str) -> str:
    """The reason in a CMake log that failed, in one line: the compiler's own if it gave one, else CMake's."""
    of_compiler = re.search(r"^.*(?:\bfatal\b|\berror:).*$", log, re.MULTILINE)
    of_cmake = re.search(r"^CMake Error[^\n]*\n(.*?)(?=Call Stack|^\S|\Z)", log, re.MULTILINE | re.DOTALL)
    reason = of_compiler.group(0) if of_compiler else of_cmake.group(1) if of_cmake else log
    return " ".join(reason.split())[:240]


def build_cuda(target: Path) -> None:
    """Compiles the library and puts it with its Python binding into `target`.

    Raises:
        NoToolchain: something that it needs is missing here.
        subprocess.CalledProcessError: the library does not compile.
    """
    nvcc = find_nvcc()
    cmake = find_tool("cmake", "CMAKE_BIN_DIR")
    if not cmake:
        raise NoToolchain("cmake was not found")
    # A folder of its own each time: what CMake caches of an isolated build environment is gone at the next one.
    with tempfile.TemporaryDirectory(prefix="stdit_fast_cuda_") as folder:
        configure(cmake, nvcc, Path(folder))
        subprocess.run([cmake, "--build", folder], check=True)
        subprocess.run([cmake, "--install", folder, "--prefix", str(target)], check=True)


class BuildCuda(build_ext):
    """build_ext through CMake."""

    def run(self) -> None:
        package = "stdit_fast"
        target = ROOT / PACKAGE_DIR[package] if self.inplace else Path(self.build_lib).resolve() / package
        target.mkdir(parents=True, exist_ok=True)
        for stale in (*target.glob("_C.*.so"), *target.glob("libstdit_cuda.so")):
            stale.unlink()
        wanted = os.environ.get("STDIT_FAST_CUDA", "")
        if wanted not in ("", "0", "1"):
            raise SystemExit(f"STDIT_FAST_CUDA = {wanted!r}: leave it unset, or set 0 (skip) or 1 (require)")
        record = {"built": False, "reason": "skipped at installation: STDIT_FAST_CUDA=0"}
        if wanted != "0":
            try:
                build_cuda(target)
                record = {"built": True, "reason": ""}
            except NoToolchain as missing:
                if wanted == "1":
                    raise SystemExit(f"stdit_fast: STDIT_FAST_CUDA=1, but {missing}") from None
                record["reason"] = str(missing)
            except subprocess.CalledProcessError as failed:
                raise SystemExit(
                    f"stdit_fast: the CUDA library does not compile (exit status {failed.returncode}; the compiler's "
                    "messages stand above). STDIT_FAST_CUDA=0 installs without it."
                ) from None
        (target / "_build_info.json").write_text(json.dumps(record, indent=2) + "\n")
        state = "the CUDA library is built" if record["built"] else f"WITHOUT the CUDA library: {record['reason']}"
        print(f"stdit_fast: {state}", file=sys.stderr)

    def get_outputs(self) -> list[str]:
        return []

    def get_output_mapping(self) -> dict[str, str]:
        return {}


setup(
    package_dir=PACKAGE_DIR,
    packages=PACKAGES,
    ext_modules=[Extension("stdit_fast._C", sources=[])],
    cmdclass={"build_ext": BuildCuda},
)
