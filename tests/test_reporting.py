"""What `stdit_fast.report()` says, and the lazy public names."""

import subprocess
import sys

import pytest
import torch

import stdit_fast
from stdit_fast import _cuda, reporting
from stdit_fast.ops import registry


def run(code: str, *flags: str) -> str:
    result = subprocess.run([sys.executable, *flags, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_report_names_versions_hardware_and_every_op():
    report = stdit_fast.report()
    lines = str(report).splitlines()
    assert report.versions["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert report.versions["GPU"] == "no GPU" or torch.cuda.is_available()
    assert f"CUDA library: {_cuda.built()[1]}" in lines
    table = lines[lines.index("", lines.index("") + 1) + 1 :]
    assert table[0].split() == ["op", "served", "by", "reason"]
    assert [line.split()[0] for line in table[1:]] == [s.op for s in registry.serving()]
    (row,) = [line for line in table if line.startswith("adamw")]
    assert row.endswith(_cuda.available()[1])


def test_report_includes_an_op_declared_later(monkeypatch):
    monkeypatch.setattr(registry, "_choosers", {**registry._choosers, "zz_op": lambda: ("triton", "a good reason")})
    assert str(stdit_fast.report()).splitlines()[-1].split(maxsplit=2) == ["zz_op", "triton", "a good reason"]


def test_report_says_why_the_library_is_missing(monkeypatch):
    monkeypatch.setattr(_cuda, "_load", lambda: (None, "not built: nvcc was not found"))
    assert "CUDA library: not built: nvcc was not found" in str(stdit_fast.report())


def test_a_missing_distribution_is_named():
    assert reporting._installed("no-such-distribution") == "not installed"


def test_report_is_the_function_whatever_was_imported_before():
    code = "import stdit_fast.reporting, stdit_fast.ops; from stdit_fast import report; print(type(report()).__name__)"
    assert run(code).strip() == "Report"


def test_the_module_prints_the_report():
    result = subprocess.run([sys.executable, "-m", "stdit_fast.reporting"], capture_output=True, text=True, check=True)
    assert "served by" in result.stdout and "CUDA library: " in result.stdout


def test_importing_the_package_imports_no_torch():
    assert run("import sys, stdit_fast; print('torch' in sys.modules, 'numpy' in sys.modules)").split() == ["False"] * 2


def test_public_names_are_listed_and_others_refused():
    assert set(stdit_fast.__all__) <= set(dir(stdit_fast))
    with pytest.raises(AttributeError, match="no attribute 'STDiT3'"):
        _ = stdit_fast.STDiT3


def test_readme_tables_are_those_of_the_results():
    from stdit_fast.benchmarks import readme

    for path, text in readme.filled().items():
        assert path.read_text() == text
