"""The benchmarks' arithmetic and records; a step is run, none is timed."""

import argparse
import json
import sys

import pytest
import torch

from stdit_fast import STDiT2Config
from stdit_fast.benchmarks import attention, peers, profile_kernel, sample, step
from stdit_fast.benchmarks.readme import latest, sample_table
from stdit_fast.benchmarks.records import Record, append, results_file
from stdit_fast.errors import ConfigError


def test_cases():
    assert step.parse_case("144p-16-6") == (16, 144, 256, 6)
    assert step.parse_case("256-1-64") == (1, 256, 256, 64)
    assert step.parse_case("240p-16-17")[1:3] == (240, 426)
    for bad, message in (("144p-16", "write resolution-frames-batch"), ("145p-16-6", "did you mean '144p'")):
        with pytest.raises(ConfigError, match=message):
            step.parse_case(bad)


def test_attention_is_counted_as_published():
    """FlashAttention 2 on an H100, head dimension 72: milliseconds and whole TFLOP/s."""
    for case, forward, backward, rates in (("96x144", 0.136, 0.595, (67, 39)), ("288x96", 0.166, 0.915, (74, 33))):
        sequences, length = attention.parse_case(case)
        for is_backward, (ms, rate) in enumerate(zip((forward, backward), rates, strict=True)):
            assert attention.flops(sequences, length, bool(is_backward)) / ms / 1e9 == pytest.approx(rate, abs=1)
    assert attention.least_bytes(96, 144, False) / 3.0e12 * 1e3 == pytest.approx(0.042, abs=1e-3)
    for bad in ("96", "96x", "0x4", "axb"):
        with pytest.raises(ConfigError, match="write sequences x length"):
            attention.parse_case(bad)


def test_attention_is_held_against_what_is_installed(monkeypatch):
    def absent():
        raise peers.Absent("not installed")

    monkeypatch.setitem(peers.ATTENTION, "flash-attn-3", peers.ATTENTION["sdpa-math"])
    monkeypatch.setitem(peers.ATTENTION, "flash-attn-4", absent)
    assert attention.installed_peers() == (["flash-attn-3"], ["flash-attn-4: not installed"])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_peer_is_checked_and_timed_as_others_are(monkeypatch):
    monkeypatch.setitem(peers.ATTENTION, "flash-attn-3", peers.ATTENTION["sdpa-flash"])
    options = argparse.Namespace(calls=2, repeats=3)
    records = attention.run("4x70", attention.HEAD_DIM, "flash-attn-3", options)
    assert [r.case for r in records] == ["4x70-forward", "4x70-backward"] and all(r.ms > 0 for r in records)
    monkeypatch.setitem(peers.ATTENTION, "flash-attn-3", lambda: lambda q, k, v: v * q.sigmoid() + k)
    with pytest.raises(RuntimeError, match="flash-attn-3 is wrong at 4x70"):
        attention.run("4x70", attention.HEAD_DIM, "flash-attn-3", options)


def test_a_kernel_is_profiled_by_name(tmp_path, monkeypatch):
    assert profile_kernel.parse_size("6x16x144") == (6, 16, 144)
    for bad in ("6x16", "0x1x1", "axbxc"):
        with pytest.raises(ConfigError, match="write samples x frames x positions"):
            profile_kernel.parse_size(bad)
    with pytest.raises(ConfigError, match="did you mean 'cross_attention'"):
        profile_kernel.check_op("cros_attention")
    with pytest.raises(ConfigError, match="adamw has no backward pass"):
        profile_kernel.check_op("adamw", "backward")
    arguments = ["spatial_attention", "forward", "--size", "1x2x3", "--ncu", "--report", "out"]
    monkeypatch.setattr(sys, "argv", ["profile_kernel", *arguments])
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match="leave --ncu out"):
        profile_kernel.main()
    # An ncu that writes down what it is asked to run.
    ncu = tmp_path / "ncu"
    ncu.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/asked\nexit 3\n')
    ncu.chmod(0o755)
    assert profile_kernel.main() == 3
    asked = (tmp_path / "asked").read_text().split()
    assert asked[:4] == ["--profile-from-start", "off", "--clock-control", "none"]
    assert asked[asked.index("--set") + 1] == "full" and asked[asked.index("--export") + 1] == "out"
    assert asked[-7:] == ["spatial_attention", "forward", "--size", "1x2x3", "--calls", "1", "--silent"]


@pytest.mark.parametrize(
    "case, positions, milliseconds, teraflops",
    [
        ("144p-16-6", 144, 530, 108),
        ("256-1-64", 256, 717, 99),
        ("240p-16-17", 405, 5466, 85),
        ("144p-96-1", 144, 565, 102),
    ],
)
def test_flops_are_those_of_the_published_rates(case, positions, milliseconds, teraflops):
    """Times and rates of Open-Sora 1.1 on an H100, in whole TFLOP/s; captions of uneven length, about 100 tokens."""
    frames, _, _, batch = step.parse_case(case)
    flops = step.step_flops(STDiT2Config(), batch, frames, positions, text_tokens=100)
    assert flops / milliseconds / 1e9 == pytest.approx(teraflops, abs=0.6)


def test_records(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["bench", "--cases", "a", "--out", "/some/where/x.jsonl"])
    path = tmp_path / "new" / "x.jsonl"
    append(path, [Record.of_times("s", "c", "i", [3.0, 1.0, 2.0]), Record.of_times("s", "c", "j", [1.0])])
    append(path, [Record.of_times("s", "c", "i", [5.0, 4.0], flops=7)])
    keys = [
        "suite",
        "case",
        "impl",
        "ms",
        "ms_low",
        "ms_high",
        "bytes",
        "flops",
        "peak_gib",
        "device",
        "versions",
        "date",
        "command",
    ]
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(lines) == 3 and all(set(keys) <= set(line) for line in lines)
    assert (lines[0]["ms"], lines[0]["ms_low"], lines[0]["ms_high"]) == (2.0, 1.0, 3.0)
    assert lines[0]["command"].endswith("--cases a --out x.jsonl")
    found = latest(path)
    assert found["s", "c", "i"]["ms"] == 4.5 and found["s", "c", "j"]["ms"] == 1.0


def test_results_go_where_they_can(tmp_path, monkeypatch, capsys):
    """What cannot be written to is refused before anything is measured."""
    assert results_file(str(tmp_path / "new" / "x.jsonl")) == str(tmp_path / "new" / "x.jsonl")
    (tmp_path / "file").touch()
    for out, message in ((tmp_path, "it is a folder; name a file in it"), (tmp_path / "file" / "x", "it is a file")):
        monkeypatch.setattr(sys, "argv", ["step", "--out", str(out)])
        with pytest.raises(SystemExit):
            step.main()
        assert message in capsys.readouterr().err


def test_a_step_runs(tmp_path, monkeypatch, capsys):
    out = tmp_path / "step.jsonl"
    arguments = [
        "step",
        "--cases",
        "144p-2-1",
        "--impl",
        "reference",
        "--depth",
        "1",
        "--repeats",
        "1",
        "--out",
        str(out),
    ]
    monkeypatch.setattr(sys, "argv", arguments)
    assert step.main() == 0
    (record,) = [json.loads(line) for line in out.read_text().splitlines()]
    assert record["impl"] == "reference" and record["ms"] > 0 and record["notes"]["depth"] == 1
    assert record["flops"] == step.step_flops(STDiT2Config(depth=1), 1, 2, 144)
    said = capsys.readouterr()
    assert "144p-2-1" in said.out and "no GPU is visible" not in said.err


def test_the_whole_model_on_the_cpu_is_told(monkeypatch, capsys):
    def begins(*args):
        raise InterruptedError

    monkeypatch.setattr(sys, "argv", ["step", "--impl", "reference"])
    monkeypatch.setattr(step, "build", begins)
    with pytest.raises(InterruptedError):
        step.main()
    assert ("--depth 1 with a case like 144p-1-1" in capsys.readouterr().err) != torch.cuda.is_available()


@pytest.mark.parametrize("forward", [False, True], ids=["samples", "forward"])
def test_sampling_is_recorded(tmp_path, monkeypatch, forward):
    out = tmp_path / "sample.jsonl"
    arguments = ["--cases", "144p-2-1", "--depth", "1", "--steps", "2", "--repeats", "1", "--impl", "reference"]
    monkeypatch.setattr(sys, "argv", ["sample", *arguments, "--out", str(out), *["--forward"] * forward])
    assert sample.main() == 0
    records = [json.loads(line) for line in out.read_text().splitlines()]
    tokens, c = 2 * 9 * 16, 1152  # of one clip: 144 x 256 pixels, 16 a side of a token
    one = tokens * (36 * c**2 + 4 * (144 + 2 + 200) * c)
    # With guidance a prediction is of two clips; training's forward pass has the text's keys and values in it.
    wanted = {"reference": 4 * one}
    if forward:
        wanted = {"reference forward": 2 * one, "reference training forward": one + 200 * 4 * c**2}
    assert {r["impl"]: r["flops"] for r in records} == wanted
    assert all(r["suite"] == "sample" and r["ms"] > 0 for r in records)


def test_the_table_of_sampling(tmp_path):
    machine = {"device": "a GPU", "versions": {"torch": "2.11.0"}}
    whole = {"what": "samples", "steps": 30, "guidance": 7.0, "depth": 28}
    common = {
        "suite": "sample",
        "case": "a-16-1",
        "ms": 2000.0,
        "ms_low": 1990.0,
        "ms_high": 2010.4,
        "flops": 4 * 10**14,
    }
    records = [
        common | machine | {"impl": "fused", "peak_gib": None, "notes": whole, "date": "2026-01-02"},
        common
        | machine
        | {"impl": "fused forward", "peak_gib": 1.25, "notes": {"what": "forward"}, "date": "2026-01-01"},
        common
        | machine
        | {
            "impl": "compile training forward",
            "peak_gib": 9,
            "notes": {"what": "training forward"},
            "date": "2026-01-01",
        },
    ]
    path = tmp_path / "sample.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    lines = sample_table(path).splitlines()
    assert lines[2:5] == [
        "| a-16-1 | a sample, 30 steps | fused | 2000 (1990 to 2010) | 200 | - |",
        "| a-16-1 | one prediction | fused | 2000 (1990 to 2010) | 200 | 1.2 |",
        "| a-16-1 | training forward | compile | 2000 (1990 to 2010) | 200 | 9.0 |",
    ]
    assert "a GPU, PyTorch 2.11.0, 2026-01-01 to 2026-01-02." in lines
