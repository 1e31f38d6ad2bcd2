"""`python -m stdit_fast.sample` on a small model: what it loads, writes, repeats, and refuses."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image, ImageSequence

from stdit_fast import STDiT2, STDiT2Config
from stdit_fast.diffusion import make_scheduler
from stdit_fast.diffusion.schedulers import IDDPMScheduler
from stdit_fast.encoders import load_autoencoder, load_text_encoder, text
from stdit_fast.encoders.patch_codec import PatchCodec
from stdit_fast.media.read import probe
from stdit_fast.media.write import VideoWriter, read_metadata
from stdit_fast.sample import STDiT2Pipeline
from stdit_fast.sample.__main__ import main, sample_seed
from stdit_fast.sample.settings import KEYS, Settings

CLIP = Path(__file__).parent / "data" / "bikes.mp4"
ENCODERS = ["--vae", "patch-codec", "--text_encoder", "minilm-embeddings"]
FAST = ["--height=32", "--width=48", "--num_frames=4", "--num_sampling_steps=3", "--guidance_scale=2"]
FAST += ["--device=cpu", "--backend=reference"]


def make_model(seed: int = 0) -> STDiT2:
    torch.manual_seed(seed)
    config = STDiT2Config(
        hidden_size=48, depth=2, num_heads=2, caption_channels=384, model_max_length=12, backend="reference"
    )
    model = STDiT2(config)
    with torch.no_grad():
        for p in model.parameters():
            if p.norm() == 0:
                p.add_(torch.randn_like(p) * 0.05)
    return model.eval()


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> str:
    """A folder of `save_pretrained`."""
    folder = tmp_path_factory.mktemp("weights") / "tiny"
    make_model().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def saved_pipeline(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("pipeline") / "tiny"
    encoder = load_text_encoder("minilm-embeddings", max_length=12)
    made = STDiT2Pipeline(make_model(), load_autoencoder("patch-codec"), encoder, make_scheduler("ddim"))
    made.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def run_folder(tmp_path) -> Path:
    """A training run with two checkpoints, the newer one with averaged weights, which differ."""
    record = {"vae": {"from_pretrained": "patch-codec"}, "text_encoder": {"from_pretrained": "minilm-embeddings"}}
    record["scheduler"] = {"type": "iddpm", "num_timesteps": 500}
    for step, parts in ((50, {"model": 1}), (100, {"model": 2, "ema": 3})):
        folder = tmp_path / "run" / "checkpoints" / f"step-{step:08d}"
        for part, seed in parts.items():
            make_model(seed).save_pretrained(folder / part)
        (folder / "state.json").write_text(json.dumps({"step": step, "config": record}))
    (tmp_path / "run" / "checkpoints" / ".writing-step-00000150").mkdir()
    return tmp_path / "run"


@pytest.fixture(scope="module", autouse=True)
def small_latents_and_a_quick_text_encoder():
    """An untrained model's latents are so large that all pixels would be black or white; unpacking takes a second."""
    decode, read = PatchCodec._decode_frames, functools.cache(text._read_minilm)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PatchCodec, "_decode_frames", lambda self, latents: decode(self, latents / 150))
        patch.setattr(text, "_read_minilm", read)
        yield


@pytest.fixture
def call(tmp_path, weights, capsys):
    """call(*arguments) -> the files whose names are printed; the model and the folder are given, and can be again."""

    def run(*arguments: str) -> list[Path]:
        given = ["--model", weights, *ENCODERS, *FAST, "--outputs", str(tmp_path / "out"), *map(str, arguments)]
        status = main(given)
        out, err = capsys.readouterr()
        assert status == 0, err
        return [Path(line) for line in out.splitlines()]

    return run


@pytest.fixture
def refused(tmp_path, weights, capsys, monkeypatch):
    """refused(*arguments) -> the error of settings that cannot be; nothing slow has begun, nothing is written."""

    def run(*arguments: str, model: bool = True) -> str:
        monkeypatch.setattr("stdit_fast.sample.__main__.load_pipeline", None)
        given = ["--model", weights, *ENCODERS] if model else []
        status = main([*given, *FAST, "--outputs", str(tmp_path / "out"), *map(str, arguments)])
        out, err = capsys.readouterr()
        assert (status, out) == (2, "") and not (tmp_path / "out").exists()
        (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
        return line.removeprefix("error: ")

    return run


def pixels(path: Path) -> np.ndarray:
    """uint8 [T, H, W, 3] of a PNG or GIF."""
    with Image.open(path) as image:
        return np.stack([np.asarray(frame.convert("RGB")) for frame in ImageSequence.Iterator(image)])


def settings_of(path: Path) -> dict:
    return json.loads(read_metadata(path)["settings"])


# -------------------------------------------------------------------- files


def test_files_and_their_metadata(call, weights, tmp_path):
    (path,) = call("--prompt", 'A "calm" sea, at dusk', "--fps=12")
    assert path == tmp_path / "out" / "0000-a-calm-sea-at-dusk.mp4"
    assert probe(path) == (4, 32, 48, 12.0)
    metadata = read_metadata(path)
    assert metadata["prompt"] == 'A "calm" sea, at dusk' and metadata["seed"] == "42" and metadata["model"] == weights
    assert metadata["version"].startswith("stdit-fast 0") and f"torch {torch.__version__}" in metadata["version"]
    assert json.loads(metadata["settings"]) == {
        "model": weights, "vae": "patch-codec", "text_encoder": "minilm-embeddings",
        "prompt": ['A "calm" sea, at dusk'], "height": 32, "width": 48, "num_frames": 4, "fps": 12.0, "loops": 1,
        "condition_frame_length": 4, "condition_frame_edit": 0.0, "scheduler": "iddpm", "num_sampling_steps": 3,
        "guidance_scale": 2.0, "seed": 42, "batch_size": 1, "device": "cpu", "dtype": "fp32", "backend": "reference",
        "cuda_graphs": True,
    }  # fmt: skip


def test_formats(call):
    frames = {}
    for name in ("gif", "png"):
        (path,) = call("--prompt", "a sea", "--format", name)
        assert path.suffix == f".{name}"
        frames[name] = pixels(path)
        assert frames[name].shape == (4, 32, 48, 3)
    assert np.abs(frames["gif"].astype(int) - frames["png"]).mean() < 8
    (image,) = call("--prompt", "a sea", "--num_frames=1")
    assert image.suffix == ".png" and pixels(image).shape == (1, 32, 48, 3)


def test_the_pixels_are_the_pipelines(call, saved_pipeline):
    prompt = f'a sea {{"reference_path": "{CLIP}", "mask_strategy": "0,0,3,2"}}'
    options = ["--scheduler=dpm-solver++", "--guidance_channels=3", "--seed=5", "--format=png", "--fps=8"]
    (path,) = call("--prompt", prompt, *options)
    pipeline = STDiT2Pipeline.from_pretrained(saved_pipeline)
    pipeline.transformer.config.backend = "reference"
    pipeline.scheduler = make_scheduler("dpm-solver++")
    pipeline.set_progress_bar_config(disable=True)
    (frames,) = pipeline(
        prompt, height=32, width=48, num_frames=4, num_inference_steps=3, guidance_scale=2.0, guidance_channels=3,
        fps=8, generator=torch.Generator().manual_seed(5),
    ).frames  # fmt: skip
    np.testing.assert_array_equal(pixels(path), np.stack([np.asarray(frame) for frame in frames]))


def test_sizes_by_resolution(call, tmp_path):
    no_size = ["--height=null", "--width=null", "--num_frames=1"]
    (path,) = call("--prompt", "a sea", *no_size, "--resolution=144p", "--aspect_ratio=9:16")
    assert (settings_of(path)["height"], settings_of(path)["width"]) == (256, 144)
    table = tmp_path / "own.json"
    table.write_text(json.dumps({"32p": {"pixels": 1536, "sizes": {"0.56": [32, 56]}}}))
    (path,) = call("--prompt", "a sea", *no_size, "--resolution=32p", "--resolutions", table)
    assert pixels(path).shape == (1, 32, 56, 3)


def test_prompts_of_command_line_and_file_in_batches(call, tmp_path):
    lines = tmp_path / "prompts.txt"
    lines.write_text(f'# three\n\na street {{"reference_path": "{CLIP}", "mask_strategy": "0"}}\n水 und Fähre\n')
    options = ["--prompt", "a rabbit", "--prompt", "a sea", "--prompt_path", lines, "--samples=2", "--format=png"]
    batched = call(*options, "--batch_size=3")
    slugs = ["a-rabbit"] * 2 + ["a-sea"] * 2 + ["a-street"] * 2 + ["水-und-fähre"] * 2
    assert [path.name for path in batched] == [f"{i:04d}-{slug}.png" for i, slug in enumerate(slugs)]
    assert [settings_of(path)["batch_size"] for path in batched] == [3] * 6 + [2] * 2
    seeds = [settings_of(path)["seed"] for path in batched]
    assert seeds == [sample_seed(42, j, i) for j in range(4) for i in range(2)] and len(set(seeds)) == 8
    alone = call(*options, "--outputs", tmp_path / "alone")
    for one, other in zip(batched, alone, strict=True):
        assert np.abs(pixels(one).astype(int) - pixels(other)).max() <= 1  # rounded otherwise, the same sample
    assert np.abs(pixels(alone[0]).astype(int) - pixels(alone[1])).mean() > 3


def test_references_for_prompts_that_have_none(call, tmp_path):
    picture = tmp_path / "a;b.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8)).save(picture)
    own = f'a street {{"reference_path": "{CLIP}", "mask_strategy": "0"}}'
    options = ["--prompt", own, "a rabbit", "--reference", picture, CLIP, "--mask_strategy", "0;0,1,0,-1"]
    street, rabbit = map(pixels, call(*options, "--format=png", "--batch_size=2"))
    codec = load_autoencoder("patch-codec")
    latents = codec.encode(torch.tensor(np.array(Image.open(picture))).movedim(-1, 0)[None, :, None] / 127.5 - 1)
    want = ((codec.decode(latents)[0, :, 0].movedim(0, -1) + 1) * 127.5).round().byte().numpy()
    assert np.abs(rabbit[0].astype(int) - want).max() <= 1
    assert np.abs(rabbit[3].astype(int) - street[0]).max() <= 1  # both the clip's first frame
    assert np.abs(street[3].astype(int) - street[0]).mean() > 3


# -------------------------------------------------------------------- seeds


def test_seeds():
    assert sample_seed(42, 0, 0) == 42
    others = {sample_seed(s, j, i) for s in (1, 2) for j in range(20) for i in range(20)}
    assert len(others) == 800 and all(0 <= seed < 2**32 for seed in others)
    assert sample_seed(42, 0, 1) == 1483323485  # printf 42,0,1 | sha256sum | cut -c 1-8


def test_a_files_seed_repeats_it_alone(call, tmp_path):
    made = call("--prompt", "a rabbit", "a sea", "--samples=2", "--format=png")
    for path in (made[0], made[3]):
        metadata = read_metadata(path)
        options = ["--prompt", metadata["prompt"], "--seed", metadata["seed"], "--format=png"]
        (again,) = call(*options, "--outputs", tmp_path / "again")
        np.testing.assert_array_equal(pixels(again), pixels(path))
    other = pixels(call("--prompt", "a rabbit", "--seed=43", "--format=png")[0])
    assert np.abs(other.astype(int) - pixels(made[0])).mean() > 3


def test_a_file_is_a_config_that_repeats_it(call, run_folder, tmp_path, capsys):
    options = ["--loops=2", "--condition_frame_length=1", "--format=png", "--scheduler=ddim"]
    prompt = "|0| yes: a sea |1| - a storm, 16:9"
    *_, path = call("--model", run_folder, "--prompt", "a rabbit", prompt, "--samples=2", *options)
    assert settings_of(path)["model"] == str(run_folder / "checkpoints" / "step-00000100" / "ema")
    assert read_metadata(path)["model"] == str(run_folder)
    status = main(["--config", str(path), "--outputs", str(tmp_path / "again"), "--format=png"])
    again = Path(capsys.readouterr().out.strip())
    assert status == 0 and again.parent == tmp_path / "again"
    np.testing.assert_array_equal(pixels(again), pixels(path))
    assert read_metadata(again)["settings"] == read_metadata(path)["settings"]


# --------------------------------------------------------------- long videos


def test_a_long_video_is_written_as_it_comes(call, monkeypatch, tmp_path):
    events, clips, write = [], STDiT2Pipeline.clips, VideoWriter.write

    def watched(self, *args, **kwargs):
        for clip in clips(self, *args, **kwargs):
            events.append(("clip", clip.shape[2]))
            yield clip

    def written(self, frames):
        events.append(("write", frames.shape[1]))
        assert not self.path.exists()
        write(self, frames)

    monkeypatch.setattr(STDiT2Pipeline, "clips", watched)
    monkeypatch.setattr(VideoWriter, "write", written)
    options = ["--loops=3", "--condition_frame_length=1", "--condition_frame_edit=0.5"]
    paths = call("--prompt", "a sea", "a street", "--batch_size=2", *options)
    assert [path.suffix for path in paths] == [".mp4"] * 2
    assert events == [("clip", 4), *[("write", 4)] * 2, *[("clip", 3), ("write", 3), ("write", 3)] * 2]
    assert [probe(path).num_frames for path in paths] == [10, 10]


def test_what_is_interrupted_leaves_nothing_and_goes_on(call, monkeypatch, tmp_path, weights, capsys):
    options = ["--prompt", "a sea", "a street", "--loops=2", "--condition_frame_length=1", "--format=png"]
    folder, write = tmp_path / "out", VideoWriter.write

    def interrupted(self, frames):
        if "street" in self.path.name and frames.shape[1] == 3:
            assert len(list(folder.iterdir())) == 2  # the first file and the second one's draft
            raise KeyboardInterrupt
        write(self, frames)

    monkeypatch.setattr(VideoWriter, "write", interrupted)
    assert main(["--model", weights, *ENCODERS, *FAST, "--outputs", str(folder), *options]) == 130
    out, err = capsys.readouterr()
    assert out.split() == [str(folder / "0000-a-sea.png")] and "the same command goes on" in err
    assert os.listdir(folder) == ["0000-a-sea.png"]
    before = (folder / "0000-a-sea.png").stat().st_mtime_ns
    monkeypatch.setattr(VideoWriter, "write", write)
    assert call(*options) == [folder / "0000-a-sea.png", folder / "0001-a-street.png"]
    assert (folder / "0000-a-sea.png").stat().st_mtime_ns == before


def test_no_file_is_overwritten(call, tmp_path):
    out = tmp_path / "out"
    (first,) = call("--prompt", "a sea")
    before = first.read_bytes()
    assert call("--prompt", "a sea", "--batch_size=8") == [first]  # the same sample
    assert call("--prompt", "a sea", "--seed=1") == [out / "0001-a-sea.mp4"]
    (out / "0007-mine.txt").touch()
    (out / "by-hand.mp4").write_bytes(b"no video")
    assert call("--prompt", "a sea", "--resume=false") == [out / "0008-a-sea.mp4"]
    assert first.read_bytes() == before


def test_a_batch_that_does_not_fit_is_halved(call, monkeypatch, caplog, tmp_path, weights, capsys):
    sizes, clips, most = [], STDiT2Pipeline.clips, 2

    def short_of_memory(self, prompt, **settings):
        sizes.append(len(prompt))
        for number, clip in enumerate(clips(self, prompt, **settings)):
            if number == 1 and len(prompt) > most:
                assert len(list(tmp_path.glob("*/.*.png.*"))) == len(prompt)  # drafts
                raise torch.OutOfMemoryError
            yield clip

    monkeypatch.setattr(STDiT2Pipeline, "clips", short_of_memory)
    options = ["--prompt", "a sea", "--samples=6", "--loops=2", "--condition_frame_length=1", "--format=png"]
    paths = call(*options, "--batch_size=5")
    assert sizes == [5, 2, 2, 2]
    assert "5 samples do not fit into memory at once: going on with 2" in caplog.text
    assert sorted(path.name for path in paths) == sorted(os.listdir(tmp_path / "out")) and len(paths) == 6
    most, folder = 0, tmp_path / "none"
    assert main(["--model", weights, *ENCODERS, *FAST, "--outputs", str(folder), *options, "--batch_size=2"]) == 1
    out, err = capsys.readouterr()
    want = "error: batch_size = 1: one sample of 4 frames of 32 x 48 (height x width) does not fit into memory"
    assert out == "" and want in err and not list(folder.iterdir())


def test_a_shared_batch_that_does_not_fit_says_what_would(monkeypatch, tmp_path, weights, capsys):
    def short_of_memory(self, prompt, **settings):
        raise torch.OutOfMemoryError
        yield

    monkeypatch.setattr(STDiT2Pipeline, "clips", short_of_memory)
    monkeypatch.setattr(STDiT2Pipeline, "shared", True)
    options = ["--prompt", "a sea", "--samples=2", "--batch_size=2", "--outputs", str(tmp_path / "out")]
    assert main(["--model", weights, *ENCODERS, *FAST, *options]) == 1
    want = "batch_size = 2: 2 samples of 4 frames of 32 x 48 (height x width) do not fit into memory; use fewer at once"
    assert f"error: {want}, or share it among more GPUs" in capsys.readouterr().err


# ------------------------------------------------------------------- weights


def loaded(monkeypatch) -> list[STDiT2Pipeline]:
    """The pipelines that sample from now on."""
    pipelines, clips = [], STDiT2Pipeline.clips
    monkeypatch.setattr(STDiT2Pipeline, "clips", lambda self, *a, **k: pipelines.append(self) or clips(self, *a, **k))
    return pipelines


def is_of_seed(pipeline: STDiT2Pipeline, seed: int) -> bool:
    want, own = make_model(seed).state_dict(), pipeline.transformer.state_dict()
    return own.keys() == want.keys() and all(torch.equal(own[key], want[key]) for key in own)


def test_weights_of_a_run(call, run_folder, monkeypatch):
    pipelines = loaded(monkeypatch)
    newest = run_folder / "checkpoints" / "step-00000100"
    cases = [
        ([run_folder], 3),
        ([run_folder / "checkpoints"], 3),
        ([newest], 3),
        ([newest / "model"], 2),
        ([run_folder, "--weights=model"], 2),
        ([newest, "--weights=ema"], 3),
        ([run_folder / "checkpoints" / "step-00000050"], 1),
    ]
    for arguments, seed in cases:
        call("--model", *arguments, "--vae=null", "--text_encoder=null", "--prompt", "a sea", "--resume=false")
        assert is_of_seed(pipelines[-1], seed), arguments
        assert pipelines[-1].scheduler.config.num_train_timesteps == 500
    assert len(pipelines) == len(cases)


def test_an_open_sora_checkpoint(call, weights, monkeypatch, tmp_path):
    pipelines = loaded(monkeypatch)
    torch.save(make_model(4).state_dict(), tmp_path / "model.pt")
    call("--model", tmp_path / "model.pt", "--prompt", "a sea")
    assert pipelines[-1].transformer.config.qk_norm_legacy and pipelines[-1].transformer.config.final_layer_legacy
    state = make_model(4).state_dict()
    assert all(torch.equal(value, state[key]) for key, value in pipelines[-1].transformer.state_dict().items())


def test_a_saved_pipeline(call, saved_pipeline, monkeypatch):
    pipelines = loaded(monkeypatch)
    bare = ["--model", saved_pipeline, "--vae=null", "--text_encoder=null", "--prompt", "a sea"]
    (path,) = call(*bare, "--format=png")
    assert is_of_seed(pipelines[-1], 0) and settings_of(path)["scheduler"] == "ddim"
    assert "vae" not in settings_of(path)
    (other,) = call(*bare, "--format=png", "--scheduler=iddpm")
    assert np.abs(pixels(other).astype(int) - pixels(path)).mean() > 1
    assert isinstance(pipelines[-1].scheduler, IDDPMScheduler) and settings_of(other)["scheduler"] == "iddpm"
    (same,) = call("--model", saved_pipeline, "--prompt", "a sea", "--format=png")  # with encoders of the command line
    np.testing.assert_array_equal(pixels(same), pixels(path))


def test_the_pipeline_is_saved_whole_or_not_at_all(call, monkeypatch, tmp_path, weights, capsys):
    folder = tmp_path / "new" / "saved"
    (path,) = call("--save_pipeline", folder, "--prompt", "a sea", "--format=png")
    bare = ["--model", folder, "--vae=null", "--text_encoder=null"]
    (again,) = call(*bare, "--prompt", "a sea", "--format=png")
    np.testing.assert_array_equal(pixels(again), pixels(path))
    assert "saved" not in (folder / "model_index.json").read_text()
    assert call(*bare, "--save_pipeline", tmp_path / "copy") == []  # nothing to sample
    assert STDiT2Pipeline.from_pretrained(tmp_path / "copy").transformer.config.hidden_size == 48

    def full(*args, **kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr("stdit_fast.encoders.minilm.MiniLMEmbeddings.save_pretrained", full)
    arguments = ["--model", weights, *ENCODERS, *FAST, "--save_pipeline", str(tmp_path / "half")]
    before = sorted(tmp_path.iterdir())
    assert main(arguments) == 1
    assert "error: No space left on device" in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == before


def test_bf16(call, monkeypatch):
    pipelines = loaded(monkeypatch)
    (half,) = call("--prompt", "a sea", "--dtype=bf16", "--format=png")
    assert {p.dtype for p in pipelines[-1].transformer.parameters()} == {torch.bfloat16}
    assert pipelines[-1].transformer.rope.freqs.dtype == torch.float32
    (single,) = call("--prompt", "a sea", "--format=png")
    difference = np.abs(pixels(half).astype(int) - pixels(single)).mean()
    assert 0 < difference < 8


# -------------------------------------------------------------------- config


def test_yaml_is_read_as_texts_and_the_command_line_wins(call, tmp_path, monkeypatch):
    content = """
        prompt: a sea 16:9
        mask_strategy: 0
        reference: [%s]
        fps: 8
        num_frames: 2
        guidance_channels:
        format: png
        resume: no
        seed: 7
    """
    config = tmp_path / "config.yaml"
    config.write_text(content % CLIP)
    (path,) = call("--config", config, "--num_frames", "3")
    found = settings_of(path)
    assert found["prompt"] == ["a sea 16:9"] and found["reference"] == [str(CLIP)] and found["mask_strategy"] == "0"
    assert (found["fps"], found["num_frames"], found["seed"]) == (8.0, 3, 7) and "guidance_channels" not in found
    (path,) = call(f"--config={config}", "--prompt", "other")
    assert settings_of(path)["prompt"] == ["other"]
    config.write_text(yaml.safe_dump({"prompt": ["- a: b", "yes"], "aspect_ratio": "16:9", "resolution": 144}))
    later = tmp_path / "later.yaml"
    later.write_text("resolution: 144p\naspect_ratio: 1:1\nnum_frames: 1\n")
    paths = call("--config", config, "--config", later, "--height=null", "--width=null")
    assert [settings_of(path)["prompt"] for path in paths] == [["- a: b"], ["yes"]]
    assert settings_of(paths[0])["height"] == settings_of(paths[0])["width"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("fps: [1", "it is not YAML"),
        ("- fps", "it should hold keys and values"),
        ("num_frame: 4", "num_frame = '4': {path} has an unknown key; did you mean 'num_frames'"),
        ("fps: [1, 2]", "fps = ['1', '2']: {path} should have one value"),
        ("prompt: [a: b]", "prompt = [{{'a': 'b'}}]: {path} should have texts"),
        ("fps: fast", "fps = 'fast': use a number"),
    ],
)
def test_refuses_config_files(refused, tmp_path, content, message):
    path = tmp_path / "config.yaml"
    path.write_text(content)
    assert message.format(path=path) in refused("--config", path)


def test_refuses_files_that_are_no_config(refused, tmp_path):
    assert "there is no such file" in refused("--config", tmp_path / "no.yaml")
    assert "--config = None: a file must follow it" in refused("--config")
    assert "it holds no settings of this command" in refused("--config", CLIP)
    (tmp_path / "bad.yaml").write_bytes(b"\xff\xfe\xfd")
    assert "it is not YAML" in refused("--config", tmp_path / "bad.yaml")
    (tmp_path / "bad.yaml").write_text("prompt: [a")
    assert "but got '<stream end>'" in refused("--config", tmp_path / "bad.yaml")  # the end, in the same line
    (tmp_path / "bad.png").write_text("prompt: a")
    assert f"--config = '{tmp_path / 'bad.png'}': corrupt" in refused("--config", tmp_path / "bad.png")


# ------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "prompt = []: give at least one, or a file of them (prompt_path)"),
        ("--prompt_path nowhere.txt", "prompt_path = 'nowhere.txt': there is no such file"),
        ("--prompts a", "prompts = 'command line': there is no such key; did you mean 'prompt'?"),
        ("--prompt a --frames 3", "frames = 'command line': there is no such key; did you mean 'num_frames'?"),
        ("--prompt a --num_frames 3.5", "num_frames = '3.5': use a whole number"),
        ("--prompt a --fps", "fps = None: a value must follow it"),
        ("stray --prompt a", "command line = 'stray': it belongs to no key"),
        ("--prompt a --scheduler ddpm", "scheduler = 'ddpm': did you mean 'iddpm'?"),
        ("--prompt a --weights best", "weights = 'best': choose one of 'auto', 'ema', 'model'"),
        ("--prompt a --weights ema", "weights = 'ema': only a training run's checkpoints have a choice"),
        ("--prompt a --format avi", "format = 'avi': choose one of 'auto', 'mp4', 'gif', 'png'"),
        ("--prompt a --format mp4 --num_frames 1", "format = 'mp4': one frame is an image: use png or gif"),
        ("--prompt a --format gif --fps 60", "fps = 60.0: a GIF shows 50 frames a second at most; use mp4 or png"),
        ("--prompt a --fps 0", "fps = 0.0: use a value from 0.1 to 1000"),
        ("--prompt a --num_frames 0", "num_frames = 0: use a whole number, 1 or more"),
        ("--prompt a --loops 0", "loops = 0: use a whole number, 1 or more"),
        ("--prompt a --samples 0", "samples = 0: use a value at least 1"),
        ("--prompt a --batch_size 0", "batch_size = 0: use a value at least 1"),
        ("--prompt a --seed -1", "seed = -1: use a value from 0 to 4294967295"),
        ("--prompt a --seed 4294967296", "seed = 4294967296: use a value from 0 to 4294967295"),
        ("--prompt a --guidance_scale .inf", "guidance_scale = inf: choose a finite scale"),
        ("--prompt a --guidance_channels 5", "guidance_channels = 5: choose 1 to 4"),
        ("--prompt a --num_sampling_steps 1001", "num_sampling_steps = 1001: choose a whole number from 1 to 1000"),
        ("--prompt a --resolution 240p", "resolution = '240p': leave it out, or height and width"),
        ("--prompt a --height 8", "height = 8: use a whole number of pixels, 16 or more"),
        ("--prompt a --height null", "height = None: height and width are needed, both"),
        ("--prompt a --loops 2", "condition_frame_length = 4: of a loop's 4 frames, 1 to 3"),
        ("--prompt a --condition_frame_edit 2", "condition_frame_edit = 2.0: use a number from 0 to 1"),
        ("--prompt a --mask_strategy 0", "there is no reference 0"),
        ("--prompt a --reference nowhere.png --mask_strategy 0", "reference_path = 'nowhere.png': vanished"),
        (f"--prompt a --reference {CLIP}", "mask_strategy = '': there are references, but nothing says where"),
        (f"--prompt a --reference {CLIP} --mask_strategy 0,0,0,4", "the output has no frame 4"),
        ('--prompt a{"reference":"x"}', "prompt = 'reference': there is no such key: did you mean 'reference_path'"),
        ("--prompt |1|a", "texts of several loops must begin with |0|"),
        ("--prompt a --device tpu9", "device = 'tpu9': use auto, cpu, cuda or cuda:0"),
        ("--prompt a --device cuda:99", "device = 'cuda:99': there "),
        ("--prompt a --dtype fp8", "dtype = 'fp8': "),
        ("--prompt a --backend fast", "backend = 'fast': "),
        ("--prompt a --model null", "model = None: name the weights"),
        ("--prompt a --model nowhere", "model = 'nowhere': there is no such file or folder"),
        ("--prompt a --model ./no/where", "model = './no/where': there is no such file or folder"),
        ("--prompt a --vae null", "vae = None: "),
        ("--prompt a --text_encoder null", "comes without one; name a T5 encoder, such as"),
        (f"--prompt a --save_pipeline {CLIP.parent}", "it is there already; leave this out, or name a new folder"),
    ],
)
def test_refuses(refused, arguments, message):
    assert message in refused(*arguments.split())


def test_refuses_folders_of_another_kind(refused, tmp_path, run_folder):
    file = tmp_path / "a.txt"
    file.touch()
    assert f"outputs = '{file}': it is a file" in refused("--prompt", "a", "--outputs", file)
    other = tmp_path / "other"
    other.mkdir()
    (other / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    assert "it holds a FluxPipeline; an STDiT2Pipeline is needed" in refused("--prompt", "a", "--model", other)
    (other / "model_index.json").write_text("{")
    assert "it cannot be read as JSON" in refused("--prompt", "a", "--model", other)
    started = tmp_path / "started"
    (started / "checkpoints").mkdir(parents=True)
    assert "has saved no checkpoint yet" in refused("--prompt", "a", "--model", started)
    old = run_folder / "checkpoints" / "step-00000050"
    assert "step-00000050 has no folder ema" in refused("--prompt", "a", "--model", old, "--weights=ema")


def failed(capsys, *arguments) -> str:
    """The error of weights that are refused when they are loaded."""
    status = main([*map(str, arguments), *FAST, "--prompt", "a"])
    out, err = capsys.readouterr()
    assert (status, out) == (2, "")
    return err


def test_weights_that_do_not_fit(capsys, tmp_path, weights):
    wide = tmp_path / "wide"
    STDiT2(STDiT2Config(hidden_size=48, depth=1, num_heads=2, caption_channels=64)).save_pretrained(wide)
    want = "text_encoder = 'minilm-embeddings': its states have 384 channels, the model was trained with 64"
    assert want in failed(capsys, "--model", wide, *ENCODERS)
    empty = tmp_path / "empty"
    empty.mkdir()
    want = f"model = '{empty}': it should hold one model's weights, found none"
    assert want in failed(capsys, "--model", empty, *ENCODERS)
    absent = ["--vae", tmp_path / "absent", "--text_encoder", "minilm-embeddings"]
    assert f"vae = '{tmp_path}/absent': there is no such folder" in failed(capsys, "--model", weights, *absent)


# ------------------------------------------------------------- as a command


def test_as_a_command(tmp_path, weights):
    arguments = ["--model", weights, *ENCODERS, *FAST, "--prompt", "a calm sea", "--num_frames=1", "--outputs"]
    command = [sys.executable, "-m", "stdit_fast.sample", *arguments, "out"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "out/0000-a-calm-sea.png\n"
    assert "it/s" not in done.stderr and "%" not in done.stderr  # bars are for terminals
    assert probe(tmp_path / done.stdout.strip()) == (1, 32, 48, 0.0)


def test_a_refusal_as_a_command_and_nothing_of_training_is_imported(tmp_path):
    command = [sys.executable, "-X", "importtime", "-m", "stdit_fast.sample", "--scheduler", "ddpm"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert "error: scheduler = 'ddpm': did you mean 'iddpm'?" in done.stderr.splitlines()
    assert "stdit_fast.sample.pipeline" in done.stderr and "stdit_fast.train" not in done.stderr


def test_every_key_is_documented():
    described = Settings.__doc__.partition("Attributes:")[2]
    named = {name.strip() for line in described.splitlines() for name in line.partition(":")[0].split(",")}
    assert set(KEYS) <= named
