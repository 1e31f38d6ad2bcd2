"""The benchmarks of whole training steps, of loading, and the timeline, on the CPU with a small model."""

import itertools
import json
import os
import subprocess
import sys
import time

import pytest
import torch
from conftest import as_it_was
from safetensors.torch import save_file

from stdit_fast.benchmarks import data, encode, readme, trace, train_run, train_step
from stdit_fast.errors import ConfigError


def test_steps_that_take_turns_and_encode_ahead(tmp_path):
    """Each case has its own times and parts, though the next one's batch is encoded in its step."""
    command = ["--small", "--workers", "0", "--steps", "3", "--out", str(tmp_path / "steps.jsonl")]
    command += ["--cases", "144p-1-1-online", "144p-16-2-online", "--mixed"]
    with as_it_was():
        assert train_step.main([*command, "--", "--model.hidden_size", "48", "--encode_ahead", "true"]) == 0
    image, video = map(json.loads, (tmp_path / "steps.jsonl").read_text().splitlines())
    assert (image["case"], video["case"]) == ("144p-1-1-online", "144p-16-2-online")
    for record in (image, video):
        notes = record["notes"]
        assert notes["steps"] == 3 and notes["mixed"] and notes["encode_ahead"] and not notes["cuda_graph"]
        assert notes["parts"]["text encoder"] > 0 and notes["parts"]["data"] > 0
    for part in ("autoencoder", "forward", "backward"):
        assert image["notes"]["parts"][part] < video["notes"]["parts"][part], part


def test_encoders_with_random_weights_pass_for_real_ones(tmp_path, monkeypatch, capsys):
    """A T5 of which no more than config.json and tokenizer lies on the disk, and an autoencoder, both smaller here."""
    from test_autoencoder import tiny_autoencoder_kl

    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    monkeypatch.setattr(train_run, "random_autoencoder", tiny_autoencoder_kl)
    monkeypatch.setattr(train_run, "T5_XXL", sizes)
    monkeypatch.setattr(train_step, "T5_XXL", sizes)
    command = ["--cases", "144p-1-2-features", "144p-1-2-online", "--workers", "0", "--steps", "3"]
    command += ["--out", str(tmp_path / "steps.jsonl")]
    model = ["--model.hidden_size", "48", "--model.num_heads", "2", "--model.depth", "2"]
    with as_it_was():
        assert train_step.main([*command, "--", *model, "--plugin", "auto", "--dtype", "auto"]) == 0
    features, online = map(json.loads, (tmp_path / "steps.jsonl").read_text().splitlines())
    assert features["notes"]["parts"]["text encoder"] == 0 < online["notes"]["parts"]["text encoder"]
    told = "no GPU is visible: the whole model runs on the CPU, in float32; --small takes less time"
    assert (told in capsys.readouterr().err) != torch.cuda.is_available()


def test_whole_steps_are_measured_and_drawn(tmp_path):
    command = [sys.executable, "-m", "stdit_fast.benchmarks.train_step", "--small", "--workers", "0", "--steps", "3"]
    command += ["--cases", "144p-1-2-features", "144p-1-2-online", "--out", tmp_path / "steps.jsonl"]
    command += ["--trace", "144p-1-2-online", "--trace-to", tmp_path, "--", "--model.hidden_size", "48"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    features, online = map(json.loads, (tmp_path / "steps.jsonl").read_text().splitlines())
    assert (features["case"], online["case"]) == ("144p-1-2-features", "144p-1-2-online")
    for record in (features, online):
        notes = record["notes"]
        assert notes["steps"] == 3 and record["ms_low"] <= record["ms"] <= record["ms_high"]
        assert 0 < notes["transformer_share"] < 1 and 0 <= notes["wait_share"] < 1
        assert sum(notes["parts"].values()) < 1.3 * record["ms_high"]
    assert features["notes"]["parts"]["autoencoder"] == features["notes"]["parts"]["text encoder"] == 0
    assert online["notes"]["parts"]["autoencoder"] > 0 and online["notes"]["parts"]["text encoder"] > 0

    content = json.loads((tmp_path / "trace-144p-1-2-online.json").read_text())
    names = [part[0] for part in content["parts"]]
    assert names.count("forward") == names.count("backward") == names.count("autoencoder") == 2
    content |= {"names": ["nvjet", "Memcpy"], "kernels": [[7, 0, 0.0, 500.0], [9, 1, 100.0, 300.0]]}
    (tmp_path / "drawn.json").write_text(json.dumps(content))
    assert trace.main([str(tmp_path / "drawn.json"), "--out", str(tmp_path / "drawn.png")]) == 0
    assert (tmp_path / "drawn.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "case, message",
    [
        ("144p-16-6", "end it in one of features, online"),
        ("144p-16-x-online", "write resolution-frames-batch"),
        ("144p-64-1-online", "the clip has 132 frames"),
    ],
)
def test_cases_that_cannot_be_are_refused_first(case, message):
    with pytest.raises(ConfigError, match=message):
        train_step.check_cases([case])


@pytest.mark.parametrize(
    "kernel, kind",
    [
        ("nvjet_tst_128x256_64x4_1x2_h_bz_coopA_TNT", "matrix products"),
        ("void stdit::(anonymous namespace)::attention_forward<80>()", "attention"),
        ("_cross_attention_forward", "attention"),
        ("void stdit::(anonymous namespace)::temporal_backward_kernel<72, false>", "attention"),
        ("_gate_residual_layer_norm_modulate_backward", "norms, gates, activation, sums"),
        ("void stdit::(anonymous namespace)::adamw_update_kernel<__nv_bfloat16>", "optimizer, average"),
        ("Memcpy HtoD (Pinned -> Device)", "copies, clearing"),
        ("sm90_xmma_fprop_implicit_gemm_bf16bf16", "convolutions"),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::exp_kernel>", "others"),
    ],
)
def test_kinds_of_kernels(kernel, kind):
    assert trace.KINDS[trace.kind_of(kernel)][0] == kind


def test_loading_is_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "DECODED", data.DECODED[-1:])
    out = tmp_path / "loading.jsonl"
    assert data.main(["--cases", "144p-16-1", "--workers", "0", "--seconds", "0.1", "--out", str(out)]) == 0
    decode, loader = map(json.loads, out.read_text().splitlines())
    assert (decode["case"], loader["case"]) == ("decode-144x176-144p-16", "loader-144p-16-1-workers-0")
    assert decode["bytes"] == 16 * 144 * 256 * 3 == loader["notes"]["batch_bytes"]
    assert loader["notes"]["clips_per_second"] == pytest.approx(1000 / loader["ms"], rel=0.01)


def test_a_loader_is_timed_over_whole_rounds(monkeypatch):
    """Each of its processes delivers as many batches: of 2 processes an even number, 3 at least."""
    batch = {"pixels": torch.zeros(2, 1, dtype=torch.uint8)}
    asked = []

    def loader(*args, **options):
        asked.append(options)
        return itertools.repeat(batch)

    monkeypatch.setattr(data, "make_loader", loader)
    monkeypatch.setattr(data.torch.cuda, "is_available", lambda: False)
    record = data.loader_case("144p-16-2", workers=2, seconds=0, prefetch=3)
    assert record.notes["batches"] == 4 and record.notes["prefetch_factor"] == 3
    assert (asked[0]["num_workers"], asked[0]["prefetch_factor"]) == (2, 3)


def test_shards_of_a_killed_run_are_held_against_those_of_one_that_was_not():
    whole = {"a": ("1", 0), "b": ("2", 0), "c": ("3", 0)}
    killed, resumed = {"a": ("1", 5)}, {"a": ("1", 5), "b": ("2", 9), "c": ("3", 9)}
    assert encode.compare(whole, killed, resumed) == {"shards": 3, "shards_at_the_kill": 1, "shards_that_differ": 0}
    for at_the_kill, after, message in (
        ({}, resumed, "not its middle"),
        (whole, resumed, "not its middle"),
        (killed, resumed | {"a": ("1", 9)}, "not left alone: a"),
        (killed, resumed | {"b": ("4", 9)}, "1 of 3 shards differ"),
        (killed, {"a": ("1", 5), "b": ("2", 9)}, r"differ from an uninterrupted run's: \['c'\]"),
    ):
        with pytest.raises(RuntimeError, match=message):
            encode.compare(whole, at_the_kill, after)
    with pytest.raises(ConfigError, match="samples"):
        encode.main(["--samples", "0"])


def test_a_run_on_features_encodes_its_table_first(tmp_path, monkeypatch):
    """With stand-ins for both processes: what they are told, what is kept of the run, and what ends it."""
    called, rows = [], []

    def start(command):
        called.append(command)
        value = dict(itertools.pairwise(command))
        rows.append((tmp_path.parent / value["--dataset.data_path"]).read_text().splitlines()[1:])
        if "--outputs" not in command:
            return subprocess.CompletedProcess(command, failed)
        run = tmp_path.parent / value["--outputs"]
        run.mkdir()
        step = {"loss": 1.0, "step_seconds": 0.5, "tokens_per_second": 9.0, "wait_share": 0.0, "bucket": "144p-1-0.56"}
        (run / "metrics.jsonl").write_text("".join(json.dumps({"step": i} | step) + "\n" for i in range(1, 4)))
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(train_run.subprocess, "run", start)
    arguments = ["--features", "--samples", "200", "--steps", "3", "--out", str(tmp_path), "--", "--buckets", "auto"]
    failed = 0
    assert train_run.main(arguments) == 0
    encoding, training = called
    assert encoding[: len(encode.START)] == list(encode.START) and encoding[-2] == "--features.path"
    where = training.index("--features.path")
    assert training[where + 1] == encoding[-1] and training[-2:] == ["--buckets", "auto"]
    assert "--dataset.drop_last" not in training and rows[0] == rows[1] and len(rows[0]) == 200
    stills = sum(".png," in row for row in rows[0])
    assert 120 < stills < 170, "images have large batches"
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["buckets"]["144p-1-0.56"] == {
        "steps": 3, "median_step_seconds": 0.5, "median_tokens_per_second": 9.0, "mean_wait_share": 0.0,
    }  # fmt: skip
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3
    failed = 1
    with pytest.raises(ConfigError, match="could not be encoded"):
        train_run.main(arguments)
    with pytest.raises(ConfigError, match="--samples = 0"):
        train_run.main([*arguments[:2], "0", *arguments[3:]])


def test_speed_is_that_after_the_first_shard(tmp_path):
    """Three shards, written a second apart: the first has two captions, not counted, the others three."""
    (tmp_path / "shards").mkdir()
    for part, captions in enumerate((2, 3, 3)):
        path = tmp_path / "shards" / f"part-{part:05d}.safetensors"
        samples, size = torch.arange(captions), f"{part + 1}x8x8"
        tensors = {
            "text.samples": samples,
            f"latents.{size}.samples": torch.zeros(1).long(),
            f"latents.{size}": torch.zeros(1),
        }
        save_file(tensors, path, {"features": "{}"})
        os.utime(path, (100 + part, 100 + part))
    speed = encode.steady_speed(tmp_path)
    assert speed == {
        "samples_per_second": 3, "clips_per_second": 1, "timed_samples": 6, "timed_seconds": 2, "sizes": 2
    }  # fmt: skip
    for part in (1, 2):
        (tmp_path / "shards" / f"part-{part:05d}.safetensors").unlink()
    with pytest.raises(ConfigError, match="take more of them"):
        encode.steady_speed(tmp_path)


def test_a_run_is_killed_with_what_it_started(tmp_path):
    """A shell that starts another, which makes one shard after the other."""
    (tmp_path / "shards").mkdir()
    loop = f"i=0; while true; do touch {tmp_path}/shards/part-$i.safetensors; i=$((i + 1)); sleep 0.1; done"
    killed = encode.kill_in_the_middle(["sh", "-c", f"sh -c '{loop}' & wait"], tmp_path, 3)
    assert len(killed) >= 3
    time.sleep(0.5)
    assert encode.shards_of(tmp_path) == killed
    with pytest.raises(RuntimeError, match="ended with 7 before it could be"):
        encode.kill_in_the_middle(["sh", "-c", "exit 7"], tmp_path / "none", 1)


def test_the_tables_of_steps_and_loading(tmp_path):
    common = {
        "versions": {"torch": "2.11.0"},
        "date": "2026-01-01",
        "device": "a GPU",
        "ms_low": 90.0,
        "ms_high": 120.0,
    }
    parts = {"data": 1.0, "autoencoder": 20.0, "text encoder": 5.0, "forward": 25.0, "backward": 40.0, "optimizer": 9.0}
    notes = {"parts": parts, "transformer_share": 0.65, "checkpointed_blocks": 3, "pieces": 2}
    step = {"suite": "train_step", "case": "a-1-2-online", "impl": "x", "ms": 100.0, "peak_gib": 50.0, "notes": notes}
    notes = {"clips_per_second": 20.0, "cores": 4, "machine_cores": 16}
    loading = {"suite": "loading", "case": "loader-a", "impl": "x", "ms": 50.0, "peak_gib": None, "notes": notes}
    notes = {"samples": 10, "clips": 25, "tokens": 1100, "workers": 3}
    notes |= {"samples_per_second": 6.04, "clips_per_second": 15.1, "bytes_per_sample": 1536 * 1024}
    notes |= {"latent_bytes_per_sample": 512 * 1024, "text_bytes_per_sample": 1024 * 1024}
    encoding = {"suite": "encode", "case": "stage2-10", "impl": "x", "ms": 165.0, "peak_gib": None, "notes": notes}
    for name, record in (("step", step), ("loading", loading), ("encode", encoding)):
        (tmp_path / name).write_text(json.dumps(common | record) + "\n")
    expected = (
        "| a-1-2-online, in 2 passes, 3 of the blocks recomputed | 100 (90 to 120) | 1.0 | 20.0 | 5.0 | 65.0 | 9.0 "
    )
    assert expected + "| 65.0% | 50.0 |" in readme.train_step_table(tmp_path / "step")
    assert "| loader-a | 50.0 | 20.0 | 4 | 5.0 |" in readme.loading_table(tmp_path / "loading")
    expected = "| stage2, 10 | 6.0 | 15.1 | 3 | 1,536 | 512 | 2.50 | 1,024 | 110 |"
    assert expected in readme.encode_table(tmp_path / "encode")
