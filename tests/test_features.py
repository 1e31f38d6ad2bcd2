"""Features: what is stored, how it is made in spite of kills and damage, and that training from it is the same."""

import csv
import dataclasses
import itertools
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from conftest import DATA, as_it_was, relative_error
from PIL import Image

from stdit_fast.encoders.autoencoder import VideoAutoencoder, draw_latents
from stdit_fast.encoders.patch_codec import PatchCodec
from stdit_fast.errors import ConfigError
from stdit_fast.media.read import BadSample
from stdit_fast.train import encode as tool
from stdit_fast.train import shards as shards_module
from stdit_fast.train.buckets import Buckets
from stdit_fast.train.config import parse
from stdit_fast.train.encode_plan import Plan
from stdit_fast.train.features import Features, pad_texts, table_digest
from stdit_fast.train.metadata import Metadata, load_metadata
from stdit_fast.train.randomness import sample_rng
from stdit_fast.train.sampler import BatchRequest
from stdit_fast.train.send_ahead import SendAhead
from stdit_fast.train.shards import Codec, Shard, ShardBuilder, Stored, clips_name, fingerprint, restore, size_of, store

CONFIG = Path(__file__).parents[1] / "train" / "configs" / "tiny.yaml"
SETTINGS = {
    "model.hidden_size": 24,
    "model.depth": 2,
    "text_encoder.model_max_length": 12,
    "dataset.num_workers": 0,
    "validation.every": 0,
    "sampling.every": 0,
    "buckets": "{96p: {4: [0.5, 2]}, 64p: {1: [1.0, 2], 4: [1.0, 2]}}",
    "ckpt_every": 100,
    "features.latents": "fp32",
    "features.text": "fp32",
    "features.shard_mib": 0.2,
}
ON_GPU = torch.cuda.is_available()
EXACT = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "TOKENIZERS_PARALLELISM": "false"}
PLACE = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # of this process, which others have not


@pytest.fixture(autouse=True, scope="module")
def alone():
    """Runs in this process leave it as it was to the tests that follow."""
    with as_it_was():
        yield


def write_table(folder: Path, rows: list[tuple]) -> Path:
    path = folder / "table.csv"
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([("path", "text", "num_frames", "height", "width", "fps"), *rows])
    return path


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """10 rows of a clip, of several stated lengths, and 4 stills."""
    folder = tmp_path_factory.mktemp("data")
    shutil.copy(DATA / "carphone_pristine.mp4", folder / "clip.mp4")
    rows = [("clip.mp4", f"a man in a car {'talks ' * i}", 10 + 11 * i, 144, 176, 29.97) for i in range(10)]
    rng = np.random.default_rng(0)
    for i in range(4):
        Image.fromarray(rng.integers(0, 256, (90, 90, 3), dtype=np.uint8)).save(folder / f"{i}.png")
        rows.append((f"{i}.png", f"noise {i}", 1, 90, 90, ""))
    return write_table(folder, rows)


def arguments(table: Path, **changes) -> list[str]:
    values = SETTINGS | {"dataset.data_path": table} | changes
    return ["--config", str(CONFIG), *(part for key, value in values.items() for part in (f"--{key}", str(value)))]


def make(table: Path, folder: Path, **changes) -> dict:
    """Encodes in this process; the statistics."""
    from stdit_fast.parallel.processes import launch

    config = parse(arguments(table, **({"features.path": folder} | changes)))
    return tool.encode(config, launch(config.seed))


@pytest.fixture(scope="module")
def features(table, tmp_path_factory):
    """Features with two crops, in several shards."""
    folder = tmp_path_factory.mktemp("features")
    make(table, folder, **{"features.crops": 2})
    return folder


@pytest.fixture
def copied(features, tmp_path):
    return Path(shutil.copytree(features, tmp_path / "copied"))


@pytest.fixture
def trainer(table, tmp_path):
    from stdit_fast.train.trainer import Trainer

    def build(outputs="run", data=table, **changes):
        return Trainer(parse(arguments(data, **({"outputs": tmp_path / outputs} | changes))))

    return build


def losses(outputs: Path) -> list[tuple]:
    lines = [json.loads(line) for line in (outputs / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"], line["grad_norm"]) for line in lines if "loss" in line]


def same(mine: list[tuple], other: list[tuple]) -> bool:
    """Equal bit for bit on the CPU; on a GPU a library's attention may add in another order."""
    if not ON_GPU:
        return mine == other
    return all(a == pytest.approx(b, rel=2e-2) for a, b in zip(mine, other, strict=True))


def shards_of(folder: Path) -> list[Path]:
    return sorted((folder / "shards").iterdir())


# ---------------------------------------------------------------- what is stored


def test_stored_values():
    values = torch.randn(5, 300, generator=torch.Generator().manual_seed(0))
    values[:, 7] *= 200  # a channel as T5's have them
    values[3] = 0
    assert torch.equal(restore(store(values, "fp32", 1)), values)
    half = values.to(torch.bfloat16)
    assert torch.equal(restore(store(half, "bf16", 1)), half)
    stored = store(values, "fp8", 1)
    assert stored.values.dtype == torch.float8_e4m3fn and stored.scale.shape == (5,)
    got = restore(stored)
    assert ((got - values).abs() <= 2**-4 * values.abs() + values.abs().amax(1, keepdim=True) * 2**-17).all()
    assert relative_error(got, values) > 1e-3 and not got[3].any()
    clips = store(torch.randn(2, 2, 4, 3, 5, 6), "fp8", 3)
    assert clips.scale.shape == (2, 2, 4) and clips.part(1).scale.shape == (2, 4)


def test_checksums_cover_values_and_scales():
    stored = store(torch.randn(3, 8, generator=torch.Generator().manual_seed(0)), "fp8", 1)
    changed = Stored(stored.values, stored.scale.clone().mul_(1 + 2**-20))
    assert stored.crc32() == Stored(*(t.clone() for t in stored)).crc32() != changed.crc32()


CODEC = Codec("a", "0", "t", "0", 4, 8, 0.0, 1.0, "distribution", "bf16", "fp8", 6, 12, "fp32")


def filled(latents: str, text: str) -> ShardBuilder:
    builder = ShardBuilder(Codec(**(vars(CODEC) | {"latents": latents, "text": text})))
    generator = torch.Generator().manual_seed(0)
    for rows in ([3, 4], [9]):
        builder.add_clips(
            (2, 16, 24),
            torch.randn(len(rows), 2, 4, 2, 2, 3, generator=generator),
            rows,
            [0, 1][: len(rows)],
            [7, 8][: len(rows)],
        )
    builder.add_clips((1, 16, 16), torch.randn(1, 2, 4, 1, 2, 2, generator=generator), [9], [0], [0])
    builder.add_bad((1, 16, 16), 5, 0, "corrupt: no clip")
    for row, tokens in ((9, 3), (3, 2), (4, 5)):
        builder.add_text(row, torch.randn(tokens, 6, generator=generator))
    return builder


@pytest.mark.parametrize("latents, text", [("fp32", "bf16"), ("bf16", "fp8"), ("fp8", "fp32")])
def test_a_shard_holds_what_it_was_given(tmp_path, latents, text):
    builder, path = filled(latents, text), tmp_path / "shards" / "part-00000.safetensors"
    builder.write(path, "plan")
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    shard, tensors = Shard(path, path.stat().st_size), builder.tensors()
    shard.verify()
    assert shard.sizes == [(1, 16, 16), (2, 16, 24)] and shard.about["plan"] == "plan"
    assert shard.about["bad"] == [[1, 16, 16, 5, 0, "corrupt: no clip"]]
    assert shard.column("latents.2x16x24.samples").tolist() == [3, 4, 9]
    assert shard.column("text.samples").tolist() == [3, 4, 9] and shard.column("text.bounds").tolist() == [0, 2, 7, 10]
    clip = shard.clip((2, 16, 24), 1, int(tensors["latents.2x16x24.crc32"][1]))
    assert torch.equal(clip.values.view(torch.uint8), tensors["latents.2x16x24"][1].view(torch.uint8))
    assert (clip.scale is not None) == (latents == "fp8") and clip.values.dtype == shards_module.STORED_DTYPES[latents]
    states = shard.text(2, 5, int(tensors["text.crc32"][1]))
    assert torch.equal(states.values.view(torch.uint8), tensors["text.states"][2:7].view(torch.uint8))
    with pytest.raises(BadSample, match="part-00000.safetensors has a wrong checksum in text.states"):
        shard.text(0, 5, int(tensors["text.crc32"][1]))
    before = path.read_bytes()
    filled(latents, text).write(path, "plan")
    assert path.read_bytes() == before


def test_a_posterior_and_its_noise_make_the_latents_of_encode():
    from test_autoencoder import tiny_autoencoder_kl

    generator = torch.Generator().manual_seed(1)
    video, noise = torch.rand(2, 3, 3, 40, 32, generator=generator) * 2 - 1, torch.randn(2, 4, 3, 5, 4)
    for vae in (VideoAutoencoder(tiny_autoencoder_kl(shift_factor=0.1), 4), PatchCodec(4)):
        posterior = vae.posterior(video)
        assert posterior.shape[1] == (2 if vae.uses_posterior_noise else 1)
        factors = vae.shift_factor, vae.scaling_factor
        assert torch.equal(draw_latents(posterior[:, 0], None, None, *factors), vae.encode(video))
        if vae.uses_posterior_noise:
            mean, std = posterior.unbind(1)
            assert torch.equal(draw_latents(mean, std, noise, *factors), vae.encode(video, noise))
    half = VideoAutoencoder(tiny_autoencoder_kl().to(torch.bfloat16))
    posterior = half.posterior(video)
    assert torch.equal(restore(store(posterior, "bf16", 3)).float(), posterior)  # as a GPU makes it: nothing is lost


def test_fingerprints_tell_weights_and_not_precisions():
    from test_autoencoder import tiny_autoencoder_kl

    one, half, other = tiny_autoencoder_kl(), tiny_autoencoder_kl().to(torch.bfloat16), tiny_autoencoder_kl()
    with torch.no_grad():
        other.encoder.conv_in.weight.mul_(1.01)
    assert fingerprint(one) == fingerprint(half) != fingerprint(other)


def test_padded_captions_are_the_encoders_own():
    from stdit_fast.encoders import load_text_encoder

    encoder = load_text_encoder("minilm-embeddings", max_length=9)
    want = encoder.encode(["a sea", "a long and stormy night at sea with much rain", "x"])
    packed = [states[mask.bool()] for states, mask in zip(want.states[:, 0], want.mask, strict=True)]
    tokens = torch.tensor([len(states) for states in packed])
    got = pad_texts(torch.cat(packed), tokens, 9, torch.float32)
    assert torch.equal(got.states, want.states) and torch.equal(got.mask, want.mask)
    assert pad_texts(torch.cat(packed), tokens, 9, torch.bfloat16).states.dtype == torch.bfloat16


def test_table_digest_is_of_paths_and_captions_in_their_order():
    paths, texts = ["a.mp4", "b.mp4", "c.mp4"], ["a sea", "a storm", None]

    def digest(paths: list[str], texts: list[str | None], cut: int = 3) -> str:
        columns = (pa.chunked_array([column[:cut], column[cut:]], pa.string()) for column in (paths, texts))
        return table_digest(Metadata(*columns, *[np.zeros(3)] * 4))

    assert digest(paths, texts) == digest(paths, texts, 1)
    others = [
        (texts, paths),
        (paths, ["a storm", "a sea", None]),
        (paths, ["a seaa", " storm", None]),  # the same letters
        (paths, ["a sea", "a storm", ""]),
        (["a.mp4", "b.mp4", "d.mp4"], texts),
    ]
    assert len({digest(paths, texts), *(digest(*other) for other in others)}) == 6


# ------------------------------------------------------------- what is to be encoded


RESOLUTIONS = {
    "large": {"pixels": 64 * 64, "sizes": {"0.50": [48, 88], "1.00": [64, 64]}},
    "same": {"pixels": 60 * 60, "sizes": {"1.00": [64, 64]}},
    "small": {"pixels": 32 * 32, "sizes": {"0.50": [24, 48], "1.00": [32, 32]}},
}
TABLE = {
    "large": {1: (0.5, 2), 4: (0.3, 2), 8: (0.0, None)},
    "same": {4: (0.5, 2)},
    "small": {1: (1.0, 2), 4: (0.5, 2), 8: (1.0, 2)},
}


@pytest.fixture(scope="module")
def sizes():
    """num_frames, height and width of 400 samples, some of which fit nothing."""
    rng = np.random.default_rng(0)
    return rng.choice([0, 1, 3, 9, 20, 40], 400), rng.integers(20, 90, 400), rng.integers(20, 90, 400)


def test_possible_buckets_are_those_that_are_drawn(sizes):
    buckets = Buckets(TABLE, RESOLUTIONS)
    rows, places = buckets.possible(*sizes, 2)
    drawn = set()
    for seed in range(300):
        assigned = buckets.assign(*sizes, 2, np.random.default_rng(seed))
        drawn |= {(row, bucket) for row, bucket in enumerate(assigned.tolist()) if bucket >= 0}
    assert list(zip(rows.tolist(), places.tolist(), strict=True)) == sorted(drawn)


def test_parts_hold_every_clip_once_and_are_bounded(sizes):
    buckets = Buckets(TABLE, RESOLUTIONS)
    texts = pa.chunked_array([pa.array([f"{'word ' * (i % 7)}" for i in range(400)])])
    metadata = Metadata(texts, texts, *(s.astype(np.int32) for s in sizes), fps=np.full(400, 24, np.float32))
    options = dict(frame_interval=2, codec=CODEC, crops=3)
    plan = Plan(metadata, buckets, limit=20_000, **options)
    rows, places = buckets.possible(*sizes, 2)
    want = {
        (row, (b.num_frames, b.height, b.width))
        for row, b in zip(rows.tolist(), (buckets[i] for i in places), strict=True)
    }
    assert len(want) < len(rows)  # two resolutions share a size
    clips = [
        (row, (r.bucket.num_frames, r.bucket.height, r.bucket.width), crop)
        for r in plan.requests(list(range(plan.parts)), 2 * 4 * 64 * 64)
        for row, crop in zip(r.samples, r.crops, strict=True)
    ]
    assert sorted(clips) == sorted((row, size, crop) for row, size in want for crop in range(1 if size[0] == 1 else 3))
    assert plan.parts > 10
    bytes_of = [int(plan.clip_bytes[plan.part(part)].sum()) for part in range(plan.parts)]
    samples = [set(plan.rows[plan.part(part)].tolist()) for part in range(plan.parts)]
    assert all(size <= 20_000 or len(rows) == 1 for size, rows in zip(bytes_of, samples, strict=True))
    assert not any(a & b for a, b in itertools.combinations(samples, 2))
    assert plan.digest == Plan(metadata, buckets, limit=20_000, **options).digest
    assert plan.digest != Plan(metadata, buckets, limit=21_000, **options).digest


def test_the_index_says_where_everything_is(features, table):
    metadata, about = load_metadata(table, progress=False), json.loads((features / "features.json").read_text())
    lines = pa.parquet.read_table(features / "index.parquet").to_pylist()
    assert [line["sample"] for line in lines] == sorted(line["sample"] for line in lines)
    clips = {(line["sample"], line["num_frames"], line["height"], line["crop"]) for line in lines}
    buckets = Buckets(
        {"96p": {4: (0.5, 2)}, "64p": {1: (1.0, 2), 4: (1.0, 2)}}, CONFIG.with_name("tiny_resolutions.json")
    )
    rows, places = buckets.possible(metadata.num_frames, metadata.height, metadata.width, 2)
    want = {
        (row, buckets[i].num_frames, buckets[i].height, crop)
        for row, i in zip(rows.tolist(), places, strict=True)
        for crop in range(1 if buckets[i].is_image else 2)
    }
    assert clips == want and len(lines) == len(want) and about["statistics"]["clips"] == len(want)
    for line in lines:
        spare = metadata.num_frames[line["sample"]] - 3 * 2
        drawn = sample_rng(42, line["crop"], line["sample"], "crop").integers(spare) if line["num_frames"] > 1 else 0
        assert line["start"] == drawn  # what training without features draws in that epoch
        assert line["fps"] == pytest.approx(120 if line["num_frames"] == 1 else 29.97 / 2, rel=1e-6)
        shard = Shard(features / "shards" / about["shards"][line["shard"]]["name"])
        assert shard[f"{line['tensor']}.samples"][line["place"]] == line["sample"]
        shard.text(line["text_start"], line["tokens"], line["text_crc32"])
    assert about["codec"]["autoencoder"] == "patch-codec" and about["codec"]["max_length"] == 12
    statistics = about["statistics"]
    assert statistics["samples"] == 14 and statistics["bytes"] == sum(f.stat().st_size for f in shards_of(features))
    assert statistics["bytes_per_sample"] == statistics["bytes"] / 14 and statistics["samples_per_second"] > 0
    stored = statistics["latent_bytes"] + statistics["text_bytes"]
    assert 0.7 * statistics["bytes"] < stored < statistics["bytes"]
    assert len(about["shards"]) > 3 and all(shard["bytes"] < 0.2 * 2**20 + 8192 for shard in about["shards"])


# ------------------------------------------------------------------ the same training


def test_a_run_from_features_is_the_run_without(trainer, features, table, tmp_path):
    """Bit for bit over two epochs, of two crops; no file of a sample is there, and no encoder is loaded."""
    online = trainer("online", steps=14)
    assert online.data.sampler.steps_per_epoch(0) <= 8
    online.train()
    assert online.data.sampler.epoch >= 1
    lonely = tmp_path / "lonely"
    lonely.mkdir()
    stored = trainer("stored", shutil.copy(table, lonely), steps=14, **{"features.path": features})
    assert stored.vae is None and not list(lonely.glob("*.mp4"))
    stored.train()
    assert same(losses(stored.folder), losses(online.folder))


def test_it_resumes_exactly_with_workers(trainer, features):
    changes = {"features.path": features, "dataset.num_workers": 2}
    whole, half = trainer("whole", steps=9, **changes), trainer("half", steps=4, **changes)
    whole.train()
    half.train()
    again = trainer("half", steps=9, **changes)
    assert again.step == 4 and again.data.sampler.state_dict()["position"] == 4
    again.train()
    assert same(losses(again.folder), losses(whole.folder))


@pytest.fixture(scope="module")
def real_encoders(tmp_path_factory):
    """A diffusers autoencoder with a posterior and a transformers T5, as settings."""
    from test_autoencoder import tiny_autoencoder_kl
    from test_text_encoder import save_tokenizer, tiny_t5

    folder = tmp_path_factory.mktemp("encoders")
    tiny_autoencoder_kl(shift_factor=0.05).save_pretrained(folder / "vae")
    tiny_t5().save_pretrained(folder / "t5")
    save_tokenizer(folder / "t5")
    return {"vae.from_pretrained": folder / "vae", "text_encoder.from_pretrained": folder / "t5"}


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_make_what_one_makes(table, tmp_path, real_encoders):
    """Which of them made a shard shows in no byte."""
    changes = {"features.crops": 6, "features.shard_mib": 0.05, "features.latents": "bf16", "features.text": "fp8"}
    for processes in (1, 2):
        args = arguments(table, **changes, **real_encoders, **{"features.path": tmp_path / str(processes)})
        said = run(args, processes, {"TOKENIZERS_PARALLELISM": "false"})
        assert f"on {processes} x {torch.cuda.get_device_name()}" in said
    assert len(shards_of(tmp_path / "1")) > 3 and equal_features(tmp_path / "1", tmp_path / "2")


def first_batches(trainer, count: int) -> list[dict]:
    return list(itertools.islice(trainer.data.loader(trainer.config, pin_memory=False), count))


@pytest.mark.parametrize(
    "stored, tolerance",
    [
        ({}, 1e-6),
        ({"features.posterior": "sample"}, 1e-6),
        ({"features.latents": "bf16", "features.text": "bf16"}, 3e-3),
        ({"features.latents": "fp8", "features.text": "fp8"}, 5e-2),
    ],
)
def test_the_loss_is_that_of_the_encoders(trainer, table, tmp_path, real_encoders, stored, tolerance):
    """Of an autoencoder that samples: its noise, and all else that is drawn, is the same."""
    tolerance = max(tolerance, 3e-2 if ON_GPU else 0)  # bfloat16 encoders round by the batch they are given
    make(table, tmp_path / "features", **real_encoders, **stored)
    online = trainer("online", steps=1, **real_encoders)
    offline = trainer("offline", steps=1, **real_encoders, **{"features.path": tmp_path / "features"})
    torch.nn.init.normal_(online.state.model.final_layer.linear.weight, std=0.05)  # else it answers 0 to everything
    torch.nn.init.normal_(online.state.model.blocks[0].cross_attn.proj.weight, std=0.05)
    shapes = set()
    for ours, theirs in zip(first_batches(offline, 6), first_batches(online, 6), strict=True):
        for key in ("noise", "timestep", "x_mask", "drop_caption", "fps", "ar", "samples"):
            assert torch.equal(ours[key], theirs[key]), key
        assert "pixels" not in ours and "posterior_noise" not in ours
        with torch.no_grad():
            got = offline.losses(online.state.model, ours)["loss"]
            want = online.losses(online.state.model, theirs)["loss"]
            assert relative_error(got, want) <= tolerance
            if tolerance < 1e-3:  # it would show, had other noise been drawn
                other = theirs | {"posterior_noise": theirs["posterior_noise"].flip(0)}
                assert relative_error(online.losses(online.state.model, other)["loss"], want) > 10 * tolerance
        shapes.add(tuple(ours["latents"].shape[2:]))
    assert len(shapes) > 1


def test_batches_that_are_sent_ahead_train_alike(trainer, table, tmp_path, real_encoders, monkeypatch):
    """Two to a step; `Trainer.on_their_way` sends them on GPUs alone."""
    from stdit_fast.train.trainer import Trainer

    settings = {**real_encoders, "features.path": tmp_path / "features", "grad_accumulation": 2, "steps": 6}
    make(table, tmp_path / "features", **real_encoders)
    sent, runs = [], {}

    class Counted(SendAhead):
        def _sent(self, *args):
            sent.append(args)
            return super()._sent(*args)

    for name in ("ahead", "plain"):
        ways = {"ahead": lambda self, batches: Counted(batches, self.device, kept=2), "plain": lambda self, b: b}
        monkeypatch.setattr(Trainer, "on_their_way", ways[name])
        run = trainer(name, **settings)
        run.train()
        runs[name] = losses(run.folder)
    assert len(sent) >= 12 and len(runs["plain"]) == 6
    assert same(runs["ahead"], runs["plain"])


def test_a_mean_alone_is_stored_as_such(table, tmp_path, real_encoders):
    folders = {mode: tmp_path / mode for mode in ("mean", "distribution")}
    bytes_of = {
        m: make(table, f, **real_encoders, **{"features.posterior": m})["latent_bytes"] for m, f in folders.items()
    }
    assert bytes_of["distribution"] == 2 * bytes_of["mean"]
    mean, both = (Features(folder) for folder in folders.values())
    config = parse(arguments(table))
    bucket = next(b for b in Buckets(config.buckets, CONFIG.with_name("tiny_resolutions.json")) if both.holds(2, b))
    shape = 4, bucket.num_frames, bucket.height // 8, bucket.width // 8
    quiet = both.load(2, bucket, 0, lambda: torch.zeros(shape))["latents"]
    assert torch.equal(mean.load(2, bucket, 0, lambda: pytest.fail("noise was drawn"))["latents"], quiet)
    assert not torch.equal(both.load(2, bucket, 0, lambda: torch.ones(shape))["latents"], quiet)


def test_validation_and_samples_beside_features(trainer, features, table):
    """Validation reads the features too; samples need the encoders, whose weights are then compared."""
    one = trainer(steps=1, **{"features.path": features, "validation.every": 1})
    one.train()
    assert one.vae is None and "val_loss" in (one.folder / "metrics.jsonl").read_text()
    other = trainer(
        "other", steps=1, **{"features.path": features, "validation.every": 1, "validation.data_path": table}
    )
    assert other.vae is not None and "pixels" in other.validation.data.dataset[other.validation.requests[0]]
    stored = {"features.path": features, "features.validation_path": features}
    third = trainer("third", steps=1, **stored, **{"validation.every": 1, "validation.data_path": table})
    assert third.vae is None and "latents" in third.validation.data.dataset[third.validation.requests[0]]


# ------------------------------------------------------------- kills, processes, damage


def start(args: list[str], processes: int = 1, settings: dict = EXACT) -> list[subprocess.Popen]:
    """Processes as a launcher starts them."""
    command = [sys.executable, "-m", "stdit_fast.train.encode", *args]
    environment = {key: value for key, value in os.environ.items() if key not in PLACE} | settings
    options = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if processes == 1:
        return [subprocess.Popen(command, env=environment, **options)]
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        group = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(s.getsockname()[1])}
    places = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]
    return [subprocess.Popen(command, env=environment | group | place, **options) for place in places]


def run(args: list[str], processes: int = 1, settings: dict = EXACT) -> str:
    """What they said, when all have ended well."""
    started = start(args, processes, settings)
    said = [process.communicate(timeout=120)[0] for process in started]
    assert [process.returncode for process in started] == [0] * processes, said
    return said[0]


def equal_features(one: Path, other: Path) -> bool:
    files = [path.name for path in shards_of(one)]
    tables = [pa.parquet.read_table(folder / "index.parquet") for folder in (one, other)]
    same = all((one / "shards" / name).read_bytes() == (other / "shards" / name).read_bytes() for name in files)
    return files == [path.name for path in shards_of(other)] and same and tables[0].equals(tables[1])


def test_killed_it_goes_on_with_two_processes(table, tmp_path):
    """SIGKILL after a few shards; two processes make the rest; the whole is that of one undisturbed process."""
    changes = {"features.crops": 6, "features.shard_mib": 0.05}
    if ON_GPU:
        run(arguments(table, **changes, **{"features.path": tmp_path / "whole"}))
    else:
        make(table, tmp_path / "whole", **changes)
    folder = tmp_path / "killed"
    args = arguments(table, **changes, **{"features.path": folder})
    (process,), deadline = start(args), time.monotonic() + 120
    while not (folder / "shards").is_dir() or len(list((folder / "shards").glob("part-*"))) < 3:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.001)
    process.kill()
    process.communicate()
    (folder / "shards" / ".part-00009.safetensors.1").write_bytes(b"left behind")
    finished = {path.name: path.stat().st_mtime_ns for path in (folder / "shards").glob("part-*")}
    total = len(shards_of(tmp_path / "whole"))
    assert 3 <= len(finished) < total and not (folder / "index.parquet").exists()
    with pytest.raises(ConfigError, match="they are not finished; the command that began them"):
        Features(folder)
    output = run(args, processes=2)
    assert f"shards: {total}, {len(finished)} of them finished" in output and "on 2 x cpu" in output
    assert all((folder / "shards" / name).stat().st_mtime_ns == then for name, then in finished.items())
    assert equal_features(folder, tmp_path / "whole")


def test_a_finished_folder_is_left_alone(copied, table):
    before = json.loads((copied / "features.json").read_text())["statistics"]
    times = [path.stat().st_mtime_ns for path in shards_of(copied)]
    assert make(table, copied, **{"features.crops": 2}) == before
    assert times == [path.stat().st_mtime_ns for path in shards_of(copied)]


def request_of(one, sample: int, spares=()) -> BatchRequest:
    """For a sample alone, of the first bucket that the features have it in."""
    bucket = next(i for i, b in enumerate(one.data.buckets) if one.data.dataset.features.holds(sample, b))
    return BatchRequest(0, 0, bucket, np.array([sample]), np.array(spares, dtype=np.int64), 1)


def test_a_damaged_clip_is_replaced_and_its_shard_named(trainer, copied, caplog):
    one = trainer(steps=1, **{"features.path": copied})
    content, sample = one.data.dataset.features, 2
    request = request_of(one, sample)
    size = size_of(one.data.buckets[request.bucket])
    entry = content.entries[content._find(sample, size, 0)]
    path = copied / "shards" / content.shards[entry["shard"]][0]
    name, data = clips_name(size), bytearray(path.read_bytes())
    clips = Shard(path)[name]
    data[data.index(clips.numpy().tobytes()) + int(entry["place"]) * clips[0].nbytes + 5] ^= 1
    path.write_bytes(data)
    of_shard = set(content.entries[content.entries["shard"] == entry["shard"]]["sample"].tolist()) - {sample}
    other = min(of_shard)  # its own bytes are good
    batch = one.data.dataset[request_of(one, sample, [13, other])]  # 13 is a still: there is no such clip of it
    reason = f"damaged features: {path.name} has a wrong checksum in {name}"
    assert batch["bad"] == [{"sample": sample, "path": one.data.metadata.row(sample).path, "reason": reason}]
    assert reason in caplog.text and caplog.text.count(path.name) == 1
    expected = one.data.dataset[request_of(one, other)]
    assert batch["samples"].tolist() == [other] and caplog.text.count(path.name) == 1
    assert torch.equal(batch["latents"], expected["latents"]) and torch.equal(batch["noise"], expected["noise"])
    again = dataclasses.replace(request, epoch=1)  # its other crop
    assert one.data.dataset[again]["samples"].tolist() == [sample]


def test_missing_and_truncated_shards_are_named_at_the_start_and_made_anew(trainer, features, copied, table, caplog):
    first, second, third, *_ = shards_of(copied)
    first.unlink()
    os.truncate(second, second.stat().st_size - 8)
    data = bytearray(third.read_bytes())
    data[-1] ^= 1
    third.write_bytes(data)
    one = trainer(steps=3, **{"features.path": copied, "dataset.max_bad_share": 1})
    assert f"{first.name} is missing" in caplog.text and f"{second.name} has" in caplog.text
    assert third.name not in caplog.text  # it shows when it is read
    one.train()
    bad = [json.loads(line) for line in (one.folder / "bad_samples.jsonl").read_text().splitlines()]
    assert {entry["reason"].split(":")[0] for entry in bad} == {"damaged features"} and len(losses(one.folder)) == 3
    caplog.clear()
    make(table, copied, **{"features.crops": 2})
    assert shards_of(copied)[0] == first and second.name in caplog.text and not equal_features(copied, features)
    make(table, copied, **{"features.crops": 2, "features.verify": "true"})
    assert f"{third.name} has a wrong checksum" in caplog.text and equal_features(copied, features)


def test_samples_that_cannot_be_encoded(trainer, table, tmp_path):
    """They are listed, and training meets them as it meets bad clips."""
    folder = tmp_path / "data"
    folder.mkdir()
    shutil.copy(DATA / "carphone_pristine.mp4", folder / "clip.mp4")
    (folder / "corrupt.mp4").write_bytes(b"no clip" * 99)
    rows = [("clip.mp4", f"caption {i}", 40, 144, 176, 24) for i in range(6)]
    rows += [("corrupt.mp4", "none", 40, 144, 176, 24), ("clip.mp4", "short", 9000, 144, 176, 24)]
    bad_table = write_table(folder, rows)
    with pytest.raises(Exception, match="dataset.max_bad_share allows 5.0%"):
        make(bad_table, tmp_path / "strict", **{"features.crops": 8})
    lenient = {"dataset.max_bad_share": 0.9}
    statistics = make(bad_table, tmp_path / "features", **lenient)
    assert statistics["samples"] == 6 and statistics["bad_clips"] == 4
    listed = [json.loads(line) for line in (tmp_path / "features" / "bad_samples.jsonl").read_text().splitlines()]
    assert [entry["sample"] for entry in listed] == [6, 7]
    one = trainer(data=bad_table, steps=1, **lenient, **{"features.path": tmp_path / "features"})
    batch = one.data.dataset[request_of(one, 6, [7, 1])]
    assert batch["samples"].tolist() == [1]
    assert [entry["reason"].split(":")[0] for entry in batch["bad"]] == ["corrupt", "too short"]
    tall = next(i for i, b in enumerate(one.data.buckets) if not one.data.dataset.features.holds(1, b))
    with pytest.raises(RuntimeError, match="not encoded: the features have no clip for bucket"):
        one.data.dataset[BatchRequest(0, 0, tall, np.array([6]), np.array([1, 2]), 1)]


def test_what_is_not_finite_is_left_out(table, tmp_path, monkeypatch):
    real = tool.Encoder.clips

    def clips(self, batch):
        values = real(self, batch)
        values[[row == 5 for row in batch["samples"]], :, :, -1] = float("nan")
        return values

    monkeypatch.setattr(tool.Encoder, "clips", clips)
    statistics = make(table, tmp_path, **{"dataset.max_bad_share": 0.5, "features.latents": "bf16"})
    assert statistics["bad_clips"] == 2 and statistics["samples"] == 13
    (entry,) = [json.loads(line) for line in (tmp_path / "bad_samples.jsonl").read_text().splitlines()]
    assert entry["sample"] == 5 and entry["reason"].startswith("not finite")
    monkeypatch.undo()
    encode_captions = tool.Encoder.captions
    monkeypatch.setattr(tool.Encoder, "captions", lambda *args: [s * float("inf") for s in encode_captions(*args)])
    with pytest.raises(ConfigError, match="its states of the caption of row .* are not finite"):
        make(table, tmp_path / "other")


# ------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"vae.from_pretrained": "stabilityai/sd"},
            "vae.from_pretrained = 'stabilityai/sd': .* made with 'patch-codec'",
        ),
        ({"text_encoder.from_pretrained": "t5"}, "text_encoder.from_pretrained = 't5': .*'minilm-embeddings'"),
        ({"text_encoder.model_max_length": 13}, "text_encoder.model_max_length = 13: .* made with 12"),
        ({"dataset.frame_interval": 3}, "dataset.frame_interval = 3: .* made with 2"),
        ({"model.in_channels": 8}, "model.in_channels = 8: .* have 4"),
        (
            {"buckets": "{64p: {1: [1.0, 2], 8: [1.0, 2]}}"},
            r"buckets = \['64p'\]: .* lack clips .* 64p-8-\d.\d\d \(\d+\)",
        ),
        ({"features.path": "/no/such/folder"}, "features.path = '/no/such/folder': there are no features; make them"),
    ],
)
def test_training_refuses_features_that_do_not_fit(trainer, features, changes, message):
    with pytest.raises(ConfigError, match=message):
        trainer(steps=1, **({"features.path": features} | changes))


def test_training_refuses_another_table_and_other_weights(trainer, features, table, tmp_path, real_encoders):
    text = table.read_text().replace("noise 2", "noise two")
    changed = table.with_name("changed.csv")
    changed.write_text(text)
    with pytest.raises(ConfigError, match=r"dataset.data_path = '.*changed.csv': .* were made of .*table.csv, 14 rows"):
        trainer(data=changed, steps=1, **{"features.path": features})
    sampled = {"sampling.every": 1, "validation.every": 1, "validation.data_path": table}
    with pytest.raises(ConfigError, match="vae.from_pretrained = .*its weights are not those"):
        trainer(
            steps=1,
            **{"features.path": features, **sampled, "vae.from_pretrained": real_encoders["vae.from_pretrained"]},
        )


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"features.crops": 3}, "features.crops = 3: the features at .* were begun with 2; use that"),
        ({"features.latents": "fp8"}, "features.latents = 'fp8': .* 'fp32'"),
        ({"seed": 7}, "seed = 7: .* begun with 42"),
        ({"buckets": "{64p: {1: [1.0, 2], 4: [1.0, 2]}}"}, r"buckets = \['64p'\]: .* begun with others"),
    ],
)
def test_encoding_refuses_a_folder_of_other_features(features, table, changes, message):
    with pytest.raises(ConfigError, match=message):
        make(table, features, **({"features.crops": 2} | changes))


def test_encoding_refuses_a_folder_of_another_table_or_other_weights(features, table, real_encoders):
    changed = table.with_name("longer.csv")
    changed.write_text(table.read_text() + "3.png,noise again,1,90,90,\n")
    with pytest.raises(
        ConfigError, match=r"dataset.data_path = '.*longer.csv': .* begun with another table, .*table.csv"
    ):
        make(changed, features, **{"features.crops": 2})
    for key in ("vae.from_pretrained", "text_encoder.from_pretrained"):
        with pytest.raises(ConfigError, match=f"{key} = .*its weights are not those that the features at"):
            make(table, features, **{"features.crops": 2, key: real_encoders[key]})


def test_a_full_disk_before_and_on_the_way(table, features, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(tool.shutil, "disk_usage", lambda folder: usage._replace(free=100_000))
    with pytest.raises(ConfigError, match=r"KiB are to be written, and its disk has 97.7 KiB free; make room"):
        make(table, tmp_path / "full", **{"features.crops": 2})
    assert not shards_of(tmp_path / "full")
    monkeypatch.undo()
    real, written = shards_module.save_file, []

    def save(tensors, path, **rest):
        if len(written) == 2:
            raise OSError(28, "No space left on device")
        written.append(path)
        real(tensors, path, **rest)

    monkeypatch.setattr(shards_module, "save_file", save)
    with pytest.raises(
        ConfigError, match=r"part-00002.safetensors was not written \(.*No space left.*finished shards stay"
    ):
        make(table, tmp_path / "full", **{"features.crops": 2})
    assert [path.name for path in shards_of(tmp_path / "full")] == ["part-00000.safetensors", "part-00001.safetensors"]
    monkeypatch.undo()
    make(table, tmp_path / "full", **{"features.crops": 2})
    assert equal_features(tmp_path / "full", features)


@pytest.mark.parametrize("workers", [0, 2])
def test_the_estimate_of_time_is_of_all_processes_at_once(table, tmp_path, monkeypatch, workers):
    """Decoding that takes ten times as long, but beside another process: nothing else knows of it."""
    from stdit_fast.train.encode_plan import ClipDataset

    both = tmp_path / "decoding"
    both.mkdir()

    def slow(self, request):
        mark = both / str(os.getpid())
        mark.touch()
        time.sleep(request.pixels * 2e-7)
        beside = len(list(both.iterdir())) > 1
        time.sleep(request.pixels * 18e-7 * beside)
        mark.unlink()
        return {"request": request}

    changes = {"features.path": tmp_path / "features", "features.crops": 6, "dataset.num_workers": workers}
    from stdit_fast.parallel.processes import launch

    job = tool.prepare(parse(arguments(table, **changes)), launch(0))
    parts = tool.parts_to_do(job)
    monkeypatch.setattr(ClipDataset, "__getitem__", slow)
    monkeypatch.setattr(tool.Encoder, "clips", lambda self, batch: None)
    monkeypatch.setattr(tool, "_time_captions", lambda *_: (5.0, 0.0))
    found, pixels = tool.estimate(job, tool.Encoder(job), parts).seconds, int(job.plan.pixels.sum())
    expected = pixels * (2e-6 / workers if workers else 2e-7)
    assert expected * 0.6 < found < expected * 2, (found, expected)


def test_the_command_line(table, tmp_path, capsys):
    args = arguments(table, **{"features.path": tmp_path / "features", "text_encoder.model_max_length": 8})
    assert tool.main(args) == 0
    said = capsys.readouterr()
    assert "14 samples, 24 clips of 3 sizes; shards: " in said.out and "to write (latents" in said.out
    assert "free), about 0:00:0" in said.out and "8 captions were cut to 8 tokens" in said.out
    assert "samples/s" in said.out and "a sample (latents" in said.out and "on 1 x " in said.out
    assert "24/24" in said.err and "clip/s" in said.err
    assert tool.main(arguments(table)) == 2
    assert "error: features.path = None: name the folder" in capsys.readouterr().err
    assert tool.main(arguments(table, **{"features.text": "fp7"})) == 2
    assert "features.text = 'fp7': did you mean 'fp8'" in capsys.readouterr().err
    (tmp_path / "features" / "features.json").write_text('{"version": 99}')
    assert tool.main(args) == 2
    assert "version 99 of the format" in capsys.readouterr().err
