"""Sampling while a small model trains: what is shown, with which weights, and that the training never notices."""

import importlib.machinery
import io
import itertools
import json
import os
import signal
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import test_training
import torch
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from test_training import arguments, losses, run, same

from stdit_fast.errors import ConfigError
from stdit_fast.media.read import decode_image
from stdit_fast.sample import STDiT2Pipeline
from stdit_fast.train import checkpoint, metrics
from stdit_fast.train.config import parse

table, trainer = test_training.table, test_training.trainer  # fixtures

PROMPTS = ["a rabbit in a meadow", "a street", "a bicycle at a fence"]
SAMPLING = {
    "sampling.every": 2,
    "sampling.prompts": json.dumps(PROMPTS),
    "sampling.resolution": "null",
    "sampling.height": 32,
    "sampling.width": 48,
    "sampling.num_frames": 3,
    "sampling.num_sampling_steps": 2,
    "sampling.scheduler": "iddpm",
}


def images(outputs: Path) -> dict[tuple[str, int], bytes]:
    """The image files in a run's TensorBoard, by tag and step."""
    found = {}
    for file in sorted((outputs / "tensorboard").iterdir()):
        for event in EventFileLoader(str(file)).Load():
            for value in event.summary.value:
                if value.metadata.plugin_data.plugin_name == "images":
                    width, height, data = value.tensor.string_val
                    found[value.tag, event.step] = data
                    assert Image.open(io.BytesIO(data)).size == (int(width), int(height))
    return found


def records(outputs: Path, key: str) -> list[dict]:
    lines = [json.loads(line) for line in (outputs / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if key in line]


def weights(one) -> list[torch.Tensor]:
    return [p.detach().clone() for p in one.state.model.parameters()]


def equal(mine, other) -> bool:
    return all(torch.equal(a, b) for a, b in zip(mine, other, strict=True))


@pytest.fixture
def seen(monkeypatch):
    """Of each sample that is made: the weights, the first noise that the model is given, and the module's mode."""
    from stdit_fast.sample import pipeline

    found, real = [], pipeline.denoise

    def denoise(predictor, scheduler, noise, **settings):
        model = predictor.model
        parameters = [p.detach().clone() for p in model.parameters()]
        found.append({"weights": parameters, "noise": noise.clone(), "training": model.training})
        return real(predictor, scheduler, noise, **settings)

    monkeypatch.setattr(pipeline, "denoise", denoise)
    return found


# ------------------------------------------------------------------ the training


def test_the_training_does_not_notice(trainer):
    dropout = {"model.class_dropout_prob": 0.5, "lr": 1e-3}
    one, other = trainer("sampled", steps=5, **SAMPLING, **dropout), trainer("plain", steps=5, **dropout)
    # Both are seeded when they are made; what one draws, the other would miss.
    torch.manual_seed(7)
    last = one.train()
    state = torch.get_rng_state()
    torch.manual_seed(7)
    other.train()
    assert torch.equal(state, torch.get_rng_state())
    assert [r["step"] for r in records(one.folder, "samples")] == [2, 4]
    assert same(losses(one.folder), losses(other.folder)) and len(losses(one.folder)) == 5
    if not torch.cuda.is_available():
        for part in ("model/model", "ema/model", "optimizer/exp_avg", "rng"):
            mine, theirs = (load_file(t.folder / "checkpoints" / last.name / f"{part}.safetensors")
                            for t in (one, other))  # fmt: skip
            assert mine.keys() == theirs.keys() and equal(mine.values(), theirs.values()), part

    first = trainer("resumed", steps=3, **SAMPLING, **dropout)
    first.train()
    again = trainer("resumed", steps=5, **SAMPLING, **dropout)
    assert again.step == 3
    again.train()
    assert same(losses(again.folder), losses(other.folder))
    assert [r["step"] for r in records(again.folder, "samples")] == [2, 4]


def test_a_sampling_leaves_everything_as_it_was(trainer):
    one = trainer(steps=2, **SAMPLING | {"sampling.every": 50})
    one.train()
    one.metrics = None
    modes = [m.training for m in one.state.model.modules()]
    addresses = [p.data_ptr() for p in one.state.model.parameters()]
    before, averages = weights(one), [a.clone() for a in one.state.ema.averages]
    position, rng, numpy_rng = one.data.sampler.state_dict(), torch.get_rng_state(), np.random.get_state()[1].copy()
    one.sample()
    assert [m.training for m in one.state.model.modules()] == modes and all(modes)
    assert [p.data_ptr() for p in one.state.model.parameters()] == addresses
    assert equal(weights(one), before) and equal(one.state.ema.averages, averages)
    assert one.data.sampler.state_dict() == position
    assert torch.equal(torch.get_rng_state(), rng) and np.array_equal(np.random.get_state()[1], numpy_rng)


def test_the_averaged_weights_are_sampled(trainer, seen):
    one = trainer(steps=2, lr=1e-2, ema_decay=0.9, **SAMPLING)
    one.train()
    dtype = one.state.model.x_embedder.proj.weight.dtype
    trained = [p for p in one.state.model.parameters() if p.requires_grad]
    assert len(seen) == len(PROMPTS)
    for sample in seen:
        sampled = [w for w, p in zip(sample["weights"], one.state.model.parameters(), strict=True) if p.requires_grad]
        whole = one.optimizer.gather(one.state.ema.averages)
        assert equal(sampled, [average.to(dtype) for average in whole]) and not equal(sampled, trained)
        assert not sample["training"]


def test_without_averages_the_models_own(trainer, seen):
    one = trainer(steps=2, lr=1e-2, ema_decay=0, **SAMPLING)
    one.train()
    assert len(seen) == len(PROMPTS) and all(equal(sample["weights"], weights(one)) for sample in seen)


def test_the_noise_is_the_prompts_own_at_every_step(trainer, seen):
    trainer(steps=4, **SAMPLING).train()
    first, second = ([s["noise"] for s in seen[i : i + 3]] for i in (0, 3))
    assert len(seen) == 6 and equal(first, second)
    assert not torch.equal(first[0], first[1]) and not torch.equal(first[1], first[2])
    seen.clear()
    trainer("seed", steps=2, **SAMPLING | {"sampling.seed": 1}).train()
    assert not torch.equal(first[0], seen[0]["noise"])


def test_its_time_is_no_step_time_and_no_waiting(trainer, monkeypatch, capfd):
    """On a clock that jumps by an hour with each sampling."""
    from stdit_fast.train import trainer as module

    one = trainer(steps=4, **SAMPLING)
    clock, late, sampled = module.time.perf_counter, [0.0], one.sampling.run

    def slowly():
        late[0] += 3600
        return sampled()

    monkeypatch.setattr(one.sampling, "run", slowly)
    monkeypatch.setattr(module, "time", types.SimpleNamespace(perf_counter=lambda: clock() + late[0]))
    one.train()
    assert all(r["step_seconds"] < 3600 for r in records(one.folder, "loss"))
    assert [r["sampling_seconds"] // 3600 for r in records(one.folder, "samples")] == [1, 1]
    assert "step 4: sampled 3 of 3 prompts, 36" in capfd.readouterr().out


# ------------------------------------------------------------------ what is shown


def test_videos_in_tensorboard_and_contact_sheets(trainer):
    one = trainer(steps=6, ckpt_every=3, keep_checkpoints=2, **SAMPLING | {"sampling.fps": 10})
    path = one.train()
    found = images(one.folder)
    assert set(found) == {(f"samples/{i} {text}", step) for i, text in enumerate(PROMPTS) for step in (2, 4, 6)}
    for data in found.values():
        gif = Image.open(io.BytesIO(data))
        assert gif.format == "GIF" and gif.n_frames == 3 and gif.size == (48, 32) and gif.info["duration"] == 100
    sheets = one.folder / "samples"
    assert {p.name for p in sheets.iterdir()} == {f"step-0000000{step}.png" for step in (2, 4, 6)}
    # Step 6 alone has a checkpoint as well, whose copy is the same; nothing half written is left.
    assert sorted(p.relative_to(one.folder) for p in one.folder.rglob("*samples.png*")) == [
        path.relative_to(one.folder) / "samples.png"
    ]
    assert (path / "samples.png").read_bytes() == (sheets / "step-00000006.png").read_bytes()
    # The last row's first frame is the last prompt's.
    rows = Image.open(sheets / "step-00000006.png").convert("RGB")
    strip_height = (rows.height - 2 * 24) // 3
    size = (204, 136)  # of 32 x 48 at the greatest height
    top = 24 + 2 * strip_height + strip_height - 16 - size[1]
    drawn = rows.crop((24, top, 24 + size[0], top + size[1])).resize((48, 32), Image.Resampling.BOX)
    gif = Image.open(io.BytesIO(found[f"samples/2 {PROMPTS[2]}", 6]))
    error = [np.abs(np.asarray(frame, np.float64) - np.asarray(drawn)).mean() for frame in _frames(gif)]
    assert error[0] < 16 < min(error[1:])


def _frames(gif: Image.Image) -> list[Image.Image]:
    frames = []
    for number in range(gif.n_frames):
        gif.seek(number)
        frames.append(gif.convert("RGB"))
    return frames


def test_a_checkpoint_with_a_sheet_is_whole_and_goes_as_a_whole(trainer):
    options = SAMPLING | {"sampling.every": 1, "ckpt_every": 1, "keep_checkpoints": 2}
    one = trainer(steps=3, **options)
    one.train()
    folder = one.folder / "checkpoints"
    assert sorted(p.name for p in folder.iterdir()) == ["step-00000002", "step-00000003"]
    assert all((p / "samples.png").is_file() for p in checkpoint.complete_checkpoints(folder))
    again = trainer(steps=4, **options)
    assert again.step == 3
    again.train()
    assert sorted(p.name for p in folder.iterdir()) == ["step-00000003", "step-00000004"]
    # The sheets of the run stay.
    assert len(list((one.folder / "samples").iterdir())) == 4


def test_images_are_pngs_and_a_reference_is_kept(trainer, tmp_path):
    colour = (200, 40, 90)
    Image.new("RGB", (48, 32), colour).save(tmp_path / "red.png")
    prompt = f'red {{"reference_path": "{tmp_path}/red.png", "mask_strategy": "0"}}'
    one = trainer(
        steps=2, **SAMPLING | {"sampling.num_frames": 1, "sampling.prompts": json.dumps([prompt, PROMPTS[1]])}
    )
    one.train()
    found = images(one.folder)
    assert {tag for tag, _ in found} == {"samples/0 red", f"samples/1 {PROMPTS[1]}"}
    kept, free = (Image.open(io.BytesIO(data)) for _, data in sorted(found.items()))
    assert kept.format == free.format == "PNG" and kept.size == (48, 32)
    through = one.vae.decode(one.vae.encode(decode_image(tmp_path / "red.png", height=32, width=48)[None]))
    want = ((through[0, :, 0].cpu().permute(1, 2, 0) + 1) * 127.5).round()
    assert np.abs(np.asarray(kept, np.float64) - want.numpy()).max() <= 1
    assert np.abs(np.asarray(free, np.float64) - want.numpy()).mean() > 16


def test_the_runs_own_resolutions(trainer):
    size = {"sampling.resolution": "64p", "sampling.height": "null", "sampling.width": "null"}
    one = trainer(steps=2, **SAMPLING | size | {"sampling.aspect_ratio": "4:3"})
    one.train()
    assert {Image.open(io.BytesIO(data)).size for data in images(one.folder).values()} == {(96, 72)}


def test_wandb_gets_the_files(trainer, monkeypatch):
    logged, media = [], lambda kind: lambda path: (kind, Path(path).read_bytes()[:6])
    board = types.SimpleNamespace(log=lambda values, step: logged.append((step, values)), finish=lambda: None)
    spec = importlib.machinery.ModuleSpec("wandb", None)  # what tells that it is installed
    fake = types.SimpleNamespace(__spec__=spec, init=lambda **_: board, Image=media("image"), Video=media("video"))
    monkeypatch.setitem(sys.modules, "wandb", fake)
    trainer(steps=2, wandb="true", **SAMPLING).train()
    shown = {name: value for step, values in logged for name, value in values.items() if isinstance(value, tuple)}
    assert shown == {f"samples/{i} {text}": ("video", b"GIF89a") for i, text in enumerate(PROMPTS)}
    logged.clear()
    trainer("images", steps=2, wandb="true", **SAMPLING | {"sampling.num_frames": 1}).train()
    shown = [value for _, values in logged for value in values.values() if isinstance(value, tuple)]
    assert shown == [("image", b"\x89PNG\r\n")] * 3


def test_a_stop_is_not_kept_waiting(trainer, monkeypatch, seen):
    one = trainer(steps=5, **SAMPLING)
    real = one.train_step

    def step(batches):
        if one.step == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        real(batches)

    monkeypatch.setattr(one, "train_step", step)
    path = one.train()
    assert path.name == "step-00000002" and not seen


# ------------------------------------------------------------------ failures


def test_a_reference_that_vanished_costs_its_own_sample(trainer, tmp_path, capfd):
    Image.new("RGB", (48, 32)).save(tmp_path / "gone.png")
    prompt = f'gone {{"reference_path": "{tmp_path}/gone.png", "mask_strategy": "0"}}'
    one = trainer(steps=4, **SAMPLING | {"sampling.prompts": json.dumps([PROMPTS[0], prompt])})
    (tmp_path / "gone.png").unlink()
    one.train()
    assert {tag for tag, _ in images(one.folder)} == {f"samples/0 {PROMPTS[0]}"}
    out = capfd.readouterr().out
    assert "step 2: the sample of 'gone' failed (ConfigError: reference_path" in out and "gone.png" in out
    assert "step 4: sampled 1 of 2 prompts" in out and one.step == 4
    assert [r["failed_samples"] for r in records(one.folder, "samples")] == [1, 2]
    # Step 4 was saved before it was sampled.
    assert trainer(steps=5, **SAMPLING).failed_samples == 1


def test_no_memory_leaves_the_models_own_weights(trainer, monkeypatch, capfd):
    """In the middle of a sample, with the averaged weights in place."""
    monkeypatch.setattr(STDiT2Pipeline, "decode_latents", _out_of_memory)
    one = trainer("sampled", steps=4, lr=1e-2, **SAMPLING)
    seen, real = [], one.sampling.run

    def and_look():
        before = weights(one)
        samples = real()
        seen.append(equal(before, weights(one)) and one.state.model.training)
        return samples

    monkeypatch.setattr(one.sampling, "run", and_look)
    one.train()
    assert seen == [True, True]
    assert "failed (OutOfMemoryError: no room); the training goes on" in capfd.readouterr().out
    assert [r["failed_samples"] for r in records(one.folder, "samples")] == [3, 6]
    assert not images(one.folder) and not (one.folder / "samples").exists()
    other = trainer("plain", steps=4, lr=1e-2)
    other.train()
    assert same(losses(one.folder), losses(other.folder))


def _out_of_memory(*_):
    raise torch.OutOfMemoryError("no room")


def test_an_error_outside_of_the_samples_leaves_the_models_own_weights(trainer, monkeypatch):
    from stdit_fast.train.sampling import Sampling, averaged

    one = trainer(steps=2, lr=1e-2, **SAMPLING | {"sampling.every": 50})
    one.train()
    before = weights(one)

    def broken(*_):
        assert not equal(before, weights(one))
        raise SystemExit

    monkeypatch.setattr(Sampling, "_sample", broken)
    with pytest.raises(SystemExit):
        one.sampling.run()
    assert equal(before, weights(one))
    with pytest.raises(RuntimeError, match="lost"):  # and half way through the gathering
        monkeypatch.setattr(one.optimizer, "gather", _half_of(one.optimizer.gather))
        with averaged(one.state):
            raise AssertionError("never gets here")
    assert equal(before, weights(one))


def _half_of(gather):
    def half(parts):
        yield from itertools.islice(gather(parts), len(parts) // 2)
        raise RuntimeError("lost")

    return half


def test_a_disk_that_refuses(trainer, monkeypatch, capfd):
    """No checkpoint: no folder that looks like one is made for the sheet. No picture: the training goes on."""
    one = trainer(steps=3, ckpt_every=2, **SAMPLING)

    def refuse(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        real = checkpoint.save_file
        patch.setattr(checkpoint, "save_file", lambda *a, **k: refuse() if one.step == 2 else real(*a, **k))
        one.train()
    assert [p.name for p in (one.folder / "checkpoints").iterdir()] == ["step-00000003"]
    assert (one.folder / "samples" / "step-00000002.png").is_file()

    other = trainer("other", steps=4, **SAMPLING)
    monkeypatch.setattr(metrics, "VideoWriter", refuse)
    other.train()
    assert other.step == 4 and "the samples were not written ([Errno 28] No space" in capfd.readouterr().out
    assert [r["failed_samples"] for r in records(other.folder, "samples")] == [1, 2]


# ------------------------------------------------------------------ several processes


def test_two_processes_share_the_prompts(table, tmp_path):
    """With a model that does not learn, they show what one process does, in the same order."""
    options = SAMPLING | {"lr": 0, "steps": 2}
    run(arguments(table, tmp_path / "one", **options))
    done = run(arguments(table, tmp_path / "two", **options), processes=2)
    one, two = images(tmp_path / "one"), images(tmp_path / "two")
    assert len(one) == 3 and one == two and len(set(one.values())) == 3
    assert "step 2: sampled 3 of 3 prompts" in done.stdout
    sheets = [tmp_path / name / "samples" / "step-00000002.png" for name in ("one", "two")]
    assert sheets[0].read_bytes() == sheets[1].read_bytes()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_sample_with_sharded_averages(table, tmp_path):
    """zero2: a run with samples has the losses of one without, and its samples those of one GPU, up to rounding."""
    import subprocess

    from test_text_encoder import save_tokenizer, tiny_t5

    tiny_t5().save_pretrained(tmp_path / "t5")
    save_tokenizer(tmp_path / "t5")

    def go(outputs, processes, **changes):
        text = {"text_encoder.from_pretrained": tmp_path / "t5"}
        args = arguments(table, tmp_path / outputs, **text, steps=6, **changes)
        done = subprocess.run(test_training.command(processes, args), capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr

    go("one", 1, grad_accumulation=2, **SAMPLING)
    go("two", 2, **SAMPLING)
    go("plain", 2)
    for mine, other in zip(losses(tmp_path / "two"), losses(tmp_path / "plain"), strict=True):
        assert mine == pytest.approx(other, rel=2e-2)
    one, two = images(tmp_path / "one"), images(tmp_path / "two")
    assert one.keys() == two.keys() and len(one) == 9
    for key, data in one.items():
        mine, other = (np.asarray(Image.open(io.BytesIO(d)).convert("RGB"), np.float64) for d in (two[key], data))
        assert np.abs(mine - other).mean() < 16, key


# ------------------------------------------------------------------ the configuration


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompts": "[]"}, r"sampling.prompts = \[\]: give at least one, or use sampling.every: 0"),
        ({"every": -1}, "sampling.every = -1: use a value at least 0"),
        ({"scheduler": "dpm-solver"}, r"sampling.scheduler = 'dpm-solver': did you mean 'dpm-solver\+\+'"),
        ({"num_sampling_steps": 1001}, "sampling.num_sampling_steps = 1001: choose a whole number from 1 to 1000"),
        ({"num_frames": 0}, "sampling.num_frames = 0: use a whole number"),
        ({"fps": 0}, "sampling.fps = 0.*: use a number of frames a second from 0.1 to 1000"),
        ({"guidance_channels": 5}, "sampling.guidance_channels = 5: choose 1 to 4"),
        ({"guidance_scale": ".inf"}, "sampling.guidance_scale = inf: choose a finite scale"),
        ({"height": "null"}, "sampling.height = None: height and width are needed"),
        ({"resolution": "64p"}, "sampling.resolution = '64p': leave it out"),
        (
            {"resolution": "65p", "height": "null", "width": "null"},
            "sampling.resolution = '65p': there is no such resolution: did you mean",
        ),
        ({"promts": "[]"}, "sampling.promts = .*did you mean 'sampling.prompts'"),
    ],
)
def test_refused(table, tmp_path, changes, message):
    options = SAMPLING | {f"sampling.{key}": value for key, value in changes.items()}
    with pytest.raises(ConfigError, match=message):
        parse(arguments(table, tmp_path, **options))


def test_an_aspect_ratio_in_yaml(table, tmp_path):
    file = tmp_path / "own.yaml"
    size = {"sampling.resolution": "64p", "sampling.height": "null", "sampling.width": "null"}
    given = arguments(table, tmp_path, **SAMPLING | size)
    file.write_text("sampling: {aspect_ratio: '16:9'}")
    assert parse([*given, "--config", str(file)]).sampling.aspect_ratio == "16:9"
    file.write_text("sampling: {aspect_ratio: 16:9}")
    with pytest.raises(ConfigError, match="sampling.aspect_ratio = 969.*: use width:height.* in quotes"):
        parse([*given, "--config", str(file)])


@pytest.mark.parametrize(
    ("suffix", "message"),
    [
        ({"reference_path": "{folder}/a.png", "mask_strategy": "0,0,0,5"}, "mask_strategy = .*output has no frame 5"),
        ({"reference_path": "{folder}/a.png", "mask_strategy": "0,x"}, "mask_strategy = .*2nd number of condition 1"),
        ({"reference_path": "{folder}/a.png"}, "mask_strategy = .*nothing says where they go"),
        ({"reference_path": "{folder}/b.png", "mask_strategy": "0"}, "reference_path = .*b.png"),
        ({"reference_path": "{folder}/broken.png", "mask_strategy": "0"}, "reference_path = .*broken.png"),
        ({"reference": "{folder}/a.png"}, "prompt = 'reference': there is no such key: did you mean"),
    ],
)
def test_refused_prompts_are_named(table, tmp_path, suffix, message):
    Image.new("RGB", (48, 32)).save(tmp_path / "a.png")
    (tmp_path / "broken.png").write_bytes(b"\x89PNG no more")
    suffix = {key: value.format(folder=tmp_path) for key, value in suffix.items()}
    prompts = json.dumps([PROMPTS[0], f"a rabbit {json.dumps(suffix)}"])
    with pytest.raises(ConfigError, match=rf"sampling.prompts\[1\].{message}"):
        parse(arguments(table, tmp_path, **SAMPLING | {"sampling.prompts": prompts}))


def test_what_is_not_used_is_not_refused(trainer, seen):
    one = trainer(steps=2, **SAMPLING | {"sampling.every": 0, "sampling.prompts": "[]", "sampling.scheduler": "none"})
    one.train()
    assert not seen and not (one.folder / "samples").exists() and not records(one.folder, "samples")
