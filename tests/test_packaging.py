"""What is installed, and an import that finds only half of it."""

import email
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = {"stdit_fast": "stdit_fast", "kernels": "stdit_fast/kernels", "train": "stdit_fast/train"}
FOLDERS["benchmarks"] = "stdit_fast/benchmarks"


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> Path:
    """A copy of what an installation reads, so that nothing is written into the checkout."""
    copy = tmp_path_factory.mktemp("sources")
    ignore = shutil.ignore_patterns("__pycache__", "*.so", "_build_info.json", "results")
    for folder in (*FOLDERS, "csrc"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=ignore)
    for name in ("setup.py", "pyproject.toml", "CMakeLists.txt", "LICENSE", "README.md"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, copy)
    return copy


@pytest.fixture(scope="module")
def wheel(sources, tmp_path_factory) -> zipfile.ZipFile:
    """The wheel of a machine whose compiler is not there."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "-w", str(folder), str(sources)]
    environment = {**os.environ, "CUDACXX": "/no/such/nvcc", "STDIT_FAST_CUDA": ""}
    result = subprocess.run(pip, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stdout + result.stderr
    return zipfile.ZipFile(next(folder.glob("stdit_fast-*.whl")))


def build_ext(sources: Path, target: Path, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", str(target)]
    return subprocess.run(command, cwd=sources, capture_output=True, text=True, env={**os.environ, **environment})


def test_only_one_top_level_package_is_installed(wheel):
    top = {name.split("/")[0] for name in wheel.namelist()}
    assert {name for name in top if not name.endswith(".dist-info")} == {"stdit_fast"}


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_module_and_data_file_is_in_the_wheel(sources, wheel, folder):
    suffixes = {".py", ".yaml", ".json", ".safetensors", ".csv"}
    wanted = {
        f"{FOLDERS[folder]}/{path.relative_to(sources / folder).as_posix()}"
        for path in (sources / folder).rglob("*")
        if path.suffix in suffixes
    }
    assert wanted
    assert wanted <= set(wheel.namelist())


def test_metadata(wheel):
    (name,) = [name for name in wheel.namelist() if name.endswith(".dist-info/METADATA")]
    metadata = email.message_from_bytes(wheel.read(name))
    requirements = metadata.get_all("Requires-Dist")
    assert metadata["Name"] == "stdit-fast" and metadata["License-Expression"] == "Apache-2.0"
    assert "torch>=2.11" in requirements and "transformers>=5" in requirements
    assert not [r for r in requirements if r.startswith(("colossalai", "galore"))], "their pins are out of date"
    assert name.replace("METADATA", "licenses/LICENSE") in wheel.namelist()


def test_a_missing_compiler_is_recorded_and_does_not_stop_the_installation(wheel):
    record = json.loads(wheel.read("stdit_fast/_build_info.json"))
    reason = "CUDACXX names /no/such/nvcc, which is not there or cannot be run"
    assert record == {"built": False, "reason": reason}
    assert not [name for name in wheel.namelist() if name.endswith(".so")]


def test_skipping_on_purpose_says_so(sources, tmp_path):
    result = build_ext(sources, tmp_path, STDIT_FAST_CUDA="0")
    assert result.returncode == 0
    assert "stdit_fast: WITHOUT the CUDA library: skipped at installation: STDIT_FAST_CUDA=0" in result.stderr
    assert not json.loads((tmp_path / "stdit_fast" / "_build_info.json").read_text())["built"]


@pytest.mark.parametrize(
    ("value", "message"),
    [("1", "STDIT_FAST_CUDA=1, but CUDACXX names /no/such/nvcc"), ("yes", "leave it unset, or set 0 (skip) or 1")],
)
def test_a_required_library_that_cannot_be_built_stops_the_installation(sources, tmp_path, value, message):
    result = build_ext(sources, tmp_path, STDIT_FAST_CUDA=value, CUDACXX="/no/such/nvcc")
    assert result.returncode != 0
    assert message in result.stderr


@pytest.mark.skipif(not shutil.which("nvcc"), reason="no nvcc on PATH")
def test_an_error_in_the_code_stops_the_installation(sources, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(sources, broken)
    header = broken / "csrc" / "include" / "stdit" / "launch_check.h"
    header.write_text(header.read_text() + "\n#error broken on purpose\n")
    result = build_ext(broken, tmp_path / "out", STDIT_FAST_CUDA="")
    if "cannot use the toolchain" in result.stderr:
        pytest.skip("the toolchain on PATH does not work")
    assert result.returncode != 0
    assert "the CUDA library does not compile" in result.stderr


def import_in(folder: Path) -> subprocess.CompletedProcess:
    # -S: no site-packages, where this very checkout is installed as editable.
    return subprocess.run([sys.executable, "-S", "-c", "import stdit_fast"], cwd=folder, capture_output=True, text=True)


def test_a_checkout_that_hides_the_installed_package_says_what_to_do(tmp_path):
    (tmp_path / "stdit_fast").mkdir()
    shutil.copy(ROOT / "stdit_fast" / "__init__.py", tmp_path / "stdit_fast")
    result = import_in(tmp_path)
    assert result.returncode != 0
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: stdit_fast was imported from")
    assert "stdit_fast.kernels, stdit_fast.train, stdit_fast.benchmarks cannot be found" in last
    assert f"pip install -e {tmp_path}" in last and "start Python in another folder" in last


def test_a_whole_package_is_imported(tmp_path):
    for folder in FOLDERS.values():
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "__init__.py").touch()
    shutil.copy(ROOT / "stdit_fast" / "__init__.py", tmp_path / "stdit_fast")
    assert import_in(tmp_path).returncode == 0


@pytest.mark.skipif(not (shutil.which("nvcc") and shutil.which("ninja")), reason="no nvcc or no ninja on PATH")
def test_other_architectures_are_compiled_for_what_is_not_hoppers_alone(sources, tmp_path):
    command = ["cmake", "-S", str(sources), "-B", str(tmp_path), "-G", "Ninja", f"-DPython_EXECUTABLE={sys.executable}"]
    result = subprocess.run([*command, "-DCMAKE_CUDA_ARCHITECTURES=90a-real;100a-real"], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    listed = subprocess.run(["ninja", "-t", "commands"], cwd=tmp_path, capture_output=True, text=True, check=True)
    of_file = {}
    for line in listed.stdout.splitlines():
        if found := re.search(r"-c \S+/csrc/(\S+\.cu)", line):
            of_file[found[1]] = set(re.findall(r"sm_\w+", line))
    assert of_file["optim/adamw.cu"] == of_file["device.cu"] == {"sm_90a", "sm_100a"}
    hoppers = {name for name in of_file if name.startswith(("attention/", "temporal/"))}
    assert len(hoppers) == 8 and all(of_file[name] == {"sm_90a"} for name in hoppers)
