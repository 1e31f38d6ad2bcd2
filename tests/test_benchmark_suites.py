"""`pytest benchmarks/`, its NVML monitor, its peers, and the comparison of two runs."""

import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

from stdit_fast.benchmarks import (
    cases_encoders,
    cases_ops,
    compare,
    encoders,
    monitor,
    peers,
    random_encoders,
    registry,
    session,
)
from stdit_fast.benchmarks import test_suites as suites
from stdit_fast.benchmarks.records import Record, append
from stdit_fast.benchmarks.registry import Case, Ceiling
from stdit_fast.errors import ConfigError

ROOT = Path(__file__).parents[1]


class FakeNvml:
    """NVML of one GPU: a line of (MHz, watts, reasons) a look; after the last it raises, if it is told to."""

    NVML_CLOCK_SM, NVML_CLOCK_MEM, NVML_TEMPERATURE_GPU = 1, 2, 0

    class NVMLError(Exception):
        pass

    def __init__(self, lines, dies=False):
        self.lines, self.dies, self.looks, self.open = lines, dies, 0, 0

    def nvmlInit(self):
        if not self.lines:
            raise self.NVMLError("no library")
        self.open += 1

    def nvmlShutdown(self):
        self.open -= 1

    def nvmlDeviceGetHandleByIndex(self, index):
        return index

    def nvmlDeviceGetHandleByUUID(self, uuid):
        return 0

    def _line(self):
        return self.lines[min(self.looks, len(self.lines) - 1)]

    def nvmlDeviceGetClockInfo(self, handle, which):
        if self.dies and self.looks >= len(self.lines):
            raise self.NVMLError("lost")
        return self._line()[0] if which == self.NVML_CLOCK_SM else 2619

    def nvmlDeviceGetPowerUsage(self, handle):
        return self._line()[1] * 1000

    def nvmlDeviceGetTemperature(self, handle, sensor):
        return 50

    def nvmlDeviceGetMemoryInfo(self, handle):
        return types.SimpleNamespace(used=3 * 2**30)

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, handle):
        reasons = self._line()[2]
        self.looks += 1
        return reasons


def watched(nvml, seconds=10.0):
    with monitor.Monitor(seconds=seconds, nvml=nvml) as found:
        pass
    return found.summary()


def test_monitor_flags_what_held_the_clocks_down():
    nvml = FakeNvml([(1980, 300, 0x01), (1410, 698, 0x04 | 0x40)])  # idle, then capped and too hot
    summary = watched(nvml)
    assert nvml.open == 0
    assert summary["looks"] == 2 and summary["sm_mhz"] == [1695, 1410, 1980] and summary["memory_gib"] == [3, 3, 3]
    assert summary["throttled"] == {"power cap": 0.5, "hardware thermal slowdown": 0.5}
    assert monitor.describe(summary) == (
        "1695 MHz 499 W 50 C, THROTTLED: power cap 50%, THROTTLED: hardware thermal slowdown 50%"
    )
    assert watched(FakeNvml([(1980, 100, 0x01 | 0x02)]))["throttled"] == {}  # idle and set clocks slow nothing down


def test_monitor_without_nvml_or_with_one_that_goes_away():
    assert watched(FakeNvml([])) == {"absent": "NVML does not answer: no library"}
    summary = watched(FakeNvml([(1980, 300, 0)], dies=True))
    assert summary["looks"] == 1 and "stopped answering: lost" in summary["absent"]


def test_what_is_watched_stands_in_the_notes(monkeypatch):
    with monitor.watched() as notes:
        pass
    assert set(notes) == ({"gpu"} if torch.cuda.is_available() else set())
    nvml = FakeNvml([(1980, 300, 0x04)])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(monitor.Monitor, "_find", lambda self: 0)
    monkeypatch.setattr(monitor.Monitor.__init__, "__defaults__", (0, 10.0, nvml))
    with monitor.watched() as notes:
        assert notes == {}
    assert notes["gpu"]["throttled"] == {"power cap": 1}


def test_monitor_looks_while_it_waits():
    nvml = FakeNvml([(1980, 300, 0)])
    with monitor.Monitor(seconds=0.001, nvml=nvml) as found:
        while nvml.looks < 5:
            pass
    assert found.summary()["looks"] >= 5


def test_peers_that_are_not_there_are_named(monkeypatch):
    for name in ("flash_attn", "apex"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))  # PyPI's apex is another project
    with pytest.raises(peers.Absent, match="flash-attn is there, without flash_attn.flash_attn_func"):
        peers.ATTENTION["flash-attn-2"]()
    found = peers.absent()
    assert found["LayerNorm: apex"] == "NVIDIA apex is not installed"
    assert set(found) <= {f"{family}: {name}" for family, members in peers.FAMILIES.items() for name in members}
    monkeypatch.setitem(sys.modules, "xformers", None)
    with pytest.raises(peers.Absent, match="xformers"):
        peers.ATTENTION["xformers"]()


def test_peers_do_the_same_work(monkeypatch):
    """Stand-ins with the libraries' layouts; PyTorch's own backend for the CPU needs none."""

    def attend(q, k, v, *more, **options):
        scores = torch.einsum("nshd,nthd->nhst", q, k) / q.shape[-1] ** 0.5
        return torch.einsum("nhst,nthd->nshd", scores.softmax(-1), v)

    def packed(q, k, v, q_bounds, k_bounds, longest_q, longest_k):
        parts = zip(q_bounds[:-1], q_bounds[1:], k_bounds[:-1], k_bounds[1:], strict=True)
        return torch.cat([attend(q[None, a:b], k[None, c:d], v[None, c:d])[0] for a, b, c, d in parts])

    def norm(x, shape, eps):
        return torch.nn.functional.layer_norm(x, shape, eps=eps)

    flash, flash_3 = types.ModuleType("flash_attn"), types.ModuleType("flash_attn_interface")
    flash.flash_attn_func, flash.flash_attn_varlen_func = attend, packed
    flash_3.flash_attn_func = lambda q, k, v: (attend(q, k, v), None)
    apex = types.ModuleType("apex.normalization.fused_layer_norm")
    apex.fused_layer_norm = norm
    fakes = {"flash_attn": flash, "flash_attn_interface": flash_3, "apex": types.ModuleType("apex")}
    fakes |= {"apex.normalization": types.ModuleType("apex.normalization"), apex.__name__: apex}
    for name, module in (fakes | {"fused_layer_norm_cuda": types.ModuleType("f")}).items():
        monkeypatch.setitem(sys.modules, name, module)
    for op, names in (
        ("spatial_attention", ("sdpa-math", "flash-attn-2", "flash-attn-3")),
        ("temporal_attention", ("sdpa-math", "flash-attn-2", "flash-attn-3")),
        ("cross_attention", ("sdpa-math", "flash-attn-2")),
        ("layer_norm_modulate", ("apex",)),
        ("gate_residual_layer_norm_modulate", ("apex",)),
    ):
        choices = cases_ops._implementations(op, "cuda")
        for name in names:
            for backward in (False, True):

                def make(op=op):
                    return cases_ops.ops.build(op, 2, 3, 5, "cpu", 2)

                got, want = (cases_ops.prepare(make, c, backward)() for c in (choices[name], cases_ops._plain))
                assert suites._error(got, want) < 1e-5, (op, name, backward)


def test_cases_are_listed_anywhere():
    for suite in registry.SUITES:
        for device in ("cuda", "cpu"):
            quick, full = (list(registry.cases_of(suite, device, quick)) for quick in (True, False))
            assert quick and len(quick) <= len(full)
            names = [case.name for case in full]
            assert len(set(names)) == len(names)
            assert all(case.implementations and case.suite == suite for case in full)
    with pytest.raises(ConfigError, match="did you mean 'ops'"):
        registry.select("op")
    (case,) = (c for c in registry.cases_of("ops", "cuda", True) if c.name == "gelu-32x16x144-forward")
    assert case.ours == "fused" and case.bytes == 8 * 32 * 16 * 144 * 1152 * 2
    (step,) = registry.cases_of("step", "cuda", True)
    assert Ceiling(3e12, 800e12).milliseconds(step) == pytest.approx(72.4, abs=1)  # 58 TFLOP
    for suite in ("ops", "block", "step", "encoders", "optimizer", "sample"):
        for case in registry.cases_of(suite, "cuda", False):
            assert Ceiling(3e12, 800e12).milliseconds(case) > 0 and len(case.implementations) > 1, case


def test_the_autoencoders_operations_are_those_of_its_layers():
    with torch.device("meta"):
        vae = random_encoders.random_autoencoder()
    for height, width in ((144, 256), (240, 424)):
        counted = encoders.autoencoder_flops(vae, height, width)
        assert cases_encoders.autoencoder_flops(f"3x{height}x{width}") == 3 * counted


def test_a_wrong_implementation_fails():
    right = torch.ones(3)
    case = Case("ops", "x", {"a": lambda: lambda: right * 1.1}, expected=lambda: lambda: right, tolerance=1e-2)
    with pytest.raises(AssertionError, match="a is wrong: relative error 0.1"):
        suites.test_case(case, "a", None, types.SimpleNamespace(device="cpu"))

    def missing():
        raise peers.Absent("a thing is not installed")

    noted = session.Session("cpu")
    case = Case("ops", "x", {"a": missing})
    with pytest.raises(pytest.skip.Exception, match="a thing is not installed"):
        suites.test_case(case, "a", None, noted)
    assert "not measured, a: a thing is not installed, in 1 cases" in noted.lines()


def test_the_suites_run_and_say_what_was_left_out(tmp_path):
    out, records = tmp_path / "b.json", tmp_path / "b.jsonl"
    some = ["--suites", "data,ops", "-k", "assign or gelu or bikes", "--quick"]
    command = [sys.executable, "-m", "pytest", "benchmarks/", *some]
    command += ["--benchmark-json", str(out), "--records", str(records), "-p", "no:cacheprovider"]
    # pytest-benchmark writes nothing in a process of pytest-xdist, for which it would take this one.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    content = json.loads(out.read_text())
    names = [b["extra_info"]["case"] for b in content["benchmarks"]]
    assert {"assign-stage1-100000", "assign-stage2-100000"} <= set(names)
    (extra,) = (b["extra_info"] for b in content["benchmarks"] if b["extra_info"]["case"] == "gelu-2x4x36-forward")
    assert 0 < extra["notes"]["share_of_ceiling"] < 20 and content["machine_info"]["copy_bytes_per_s"] > 0
    assert "NVIDIA apex" in done.stdout
    if not torch.cuda.is_available():
        assert "no GPU is visible: 14 cases were left out" in done.stdout
    assert compare.main([str(out), str(records), "--threshold", "10"]) == 0


# ------------------------------------------------------------------ comparison


def figures(path, **by_case):
    """Records of suite "s" and implementation "i", each (ms, low, high)."""
    machine = {"device": "A", "versions": {}, "command": "", "date": ""}
    append(path, [Record("s", case, "i", *times, **machine) for case, times in by_case.items()])
    return str(path)


def benchmark_json(path, **by_case):
    rows = [
        {"fullname": f"x::{case}", "stats": {"median": ms / 1e3, "q1": low / 1e3, "q3": high / 1e3},
         "extra_info": {"suite": "s", "case": case, "impl": "i", "device": "B",
                        "notes": {"gpu": {"throttled": {"power cap": 1.0}}}}}
        for case, (ms, low, high) in by_case.items()
    ]  # fmt: skip
    path.write_text(json.dumps({"machine_info": {}, "benchmarks": rows}))
    return str(path)


def test_slower_is_beyond_threshold_and_spread(tmp_path, capsys):
    before = figures(tmp_path / "a.jsonl", same=(10, 9, 11), noisy=(10, 9, 13), slow=(10, 9.9, 10.1), gone=(1, 1, 1))
    after = benchmark_json(tmp_path / "b.json", same=(10, 9, 11), noisy=(12, 11, 13), slow=(12, 11.9, 12.1))
    assert compare.main([before, after]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith("s slow i") and lines[1].endswith("SLOWER  throttled: power cap")
    assert "9.900 to 10.100" in lines[1] and "+20.0%" in lines[1]
    assert "in the first file only: s gone i" in lines
    assert "DIFFERENT MACHINES: A before, B after" in lines
    assert lines[-1] == "3 compared: 1 slower, 0 faster by more than 5.0% and beyond the spreads"
    assert compare.main([before, after, "--threshold", "0.25"]) == 0
    assert compare.main([before, after, "--only", "same|noisy"]) == 0
    capsys.readouterr()
    assert compare.main([after, before]) == 0
    assert "-16.7%  faster" in capsys.readouterr().out


@pytest.mark.parametrize(
    "content, message",
    [(None, "there is no such file"), ("{}", "neither pytest-benchmark's JSON nor records"), ("x", "neither")],
)
def test_files_that_cannot_be_compared(tmp_path, capsys, content, message):
    good, bad = figures(tmp_path / "a.jsonl", c=(1, 1, 1)), tmp_path / "b.json"
    if content is not None:
        bad.write_text(content)
    assert compare.main([good, str(bad)]) == 2
    assert message in capsys.readouterr().err
    other = figures(tmp_path / "c.jsonl", d=(1, 1, 1))
    assert compare.main([good, other]) == 2
    assert "no figure stands in both" in capsys.readouterr().err
    assert compare.main([good, good, "--threshold", "-1"]) == 2
