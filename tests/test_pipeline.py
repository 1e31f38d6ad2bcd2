"""The sampling pipeline on a small model: what reaches the model, what comes out, what is refused."""

import gc
import weakref

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from kernel_checks import DEVICE
from PIL import Image

from stdit_fast import STDiT2, STDiT2Config
from stdit_fast.diffusion import make_scheduler
from stdit_fast.encoders import load_autoencoder, load_text_encoder
from stdit_fast.errors import ConfigError
from stdit_fast.sample import Condition, Prompt, STDiT2Pipeline

SIZE = dict(height=32, width=48)
FAST = SIZE | dict(num_frames=4, num_inference_steps=3, guidance_scale=2.0)


@pytest.fixture(scope="module")
def pipeline() -> STDiT2Pipeline:
    torch.manual_seed(0)
    text = load_text_encoder("minilm-embeddings", max_length=12)
    config = STDiT2Config(
        hidden_size=48, depth=2, num_heads=2, caption_channels=text.channels, model_max_length=12, backend="reference"
    )
    model = STDiT2(config)
    with torch.no_grad():
        for p in model.parameters():
            if p.norm() == 0:
                p.add_(torch.randn_like(p) * 0.05)
    made = STDiT2Pipeline(model, load_autoencoder("patch-codec"), text, make_scheduler("iddpm")).to(DEVICE)
    made.set_progress_bar_config(disable=True)
    return made


def seeded(*seeds):
    return [torch.Generator(DEVICE).manual_seed(seed) for seed in seeds]


def image(value=0.3):
    """A picture with an edge: [3, 32, 48] in [-1, 1]."""
    picture = torch.full((3, 32, 48), value)
    picture[:, 8:20, 10:30] = -0.6
    return picture


def latents_of(pipeline, picture):
    return pipeline.vae.encode(picture[None, :, None])[0]


def calls_of(pipeline, monkeypatch):
    """What the model is called with, call by call."""
    seen, forward = [], pipeline.transformer.forward

    def record(x, t, y, x_mask=None, **scalars):
        seen.append(dict(x=x.clone(), t=t.clone(), x_mask=x_mask, text=y, **scalars))
        return forward(x, t, y, x_mask=x_mask, **scalars)

    monkeypatch.setattr(pipeline.transformer, "forward", record)
    return seen


def test_output_types(pipeline):
    prompts = ["a rabbit", "a street"]
    videos = pipeline(prompts, **FAST, generator=seeded(1, 2)).frames
    assert [len(v) for v in videos] == [4, 4] and videos[0][0].size == (48, 32)
    arrays = pipeline(prompts, **FAST, generator=seeded(1, 2), output_type="np").frames
    assert arrays.shape == (2, 4, 32, 48, 3) and arrays.dtype == np.float32
    np.testing.assert_array_equal(np.asarray(videos[1][2]), np.round(arrays[1, 2] * 255).astype(np.uint8))
    latents = pipeline(prompts, **FAST, generator=seeded(1, 2), output_type="latent").frames
    assert latents.shape == (2, 4, 4, 4, 6) and latents.dtype == torch.float32
    decoded = pipeline.decode_latents(latents)
    np.testing.assert_allclose(decoded.movedim(1, -1).cpu().numpy() / 2 + 0.5, arrays, atol=1 / 254)
    (same,) = pipeline(prompts, **FAST, generator=seeded(1, 2), output_type="latent", return_dict=False)
    assert torch.equal(same, latents)


def test_a_seed_gives_the_same_bits_and_its_own_sample_in_any_batch(pipeline):
    options = FAST | dict(output_type="latent")
    both = pipeline(["a rabbit", "a street"], **options, generator=seeded(1, 2)).frames
    again = pipeline(["a rabbit", "a street"], **options, generator=seeded(1, 2)).frames
    assert torch.equal(both, again)
    alone = pipeline("a street", **options, generator=seeded(2)).frames
    torch.testing.assert_close(alone, both[1:], atol=1e-4, rtol=1e-4)
    other = pipeline("a street", **options, generator=seeded(3)).frames
    assert (other - alone).abs().mean() > 0.1


def test_guidance_of_1_is_no_guidance(pipeline, monkeypatch):
    seen = calls_of(pipeline, monkeypatch)
    options = SIZE | dict(num_frames=2, num_inference_steps=2, output_type="latent")
    pipeline("a rabbit", **options, guidance_scale=1.0, generator=seeded(1))
    assert [len(call["x"]) for call in seen] == [1, 1]
    pipeline("a rabbit", **options, guidance_scale=3.0, generator=seeded(1))
    assert [len(call["x"]) for call in seen[2:]] == [2, 2]
    lengths = seen[-1]["text"].layout.lengths
    assert lengths[0] == lengths[1] == 4  # [CLS] a rabbit [SEP]; the unconditional half at the same length
    conditional, unconditional = seen[-1]["text"].kv.split(lengths[0])
    y = pipeline.transformer.y_embedder.y_embedding[None, None, :12]
    empty = pipeline.transformer.encode_text(y, torch.tensor([[1] * 4 + [0] * 8]))
    torch.testing.assert_close(unconditional, empty.kv)
    assert (conditional - unconditional).abs().max() > 1e-3


def test_what_the_model_is_told(pipeline, monkeypatch):
    seen = calls_of(pipeline, monkeypatch)
    pipeline("a rabbit", **FAST, fps=12)
    want = dict(num_frames=4, height=32, width=48, ar=32 / 48, fps=12)
    assert {name: seen[0][name].tolist() for name in want} == {n: pytest.approx([v, v]) for n, v in want.items()}
    assert [int(call["t"][0]) for call in seen] == [999, 500, 0]
    seen.clear()
    pipeline("a rabbit", **FAST | dict(num_frames=1), fps=12)
    assert seen[0]["fps"].tolist() == [120, 120]  # an image's, as in training


def test_an_image_is_animated(pipeline, monkeypatch):
    seen = calls_of(pipeline, monkeypatch)
    out = pipeline("a rabbit", **FAST, references=[image()], conditions="0", output_type="latent").frames
    assert torch.equal(out[0, :, :1], latents_of(pipeline, image()).to(out.device))  # kept to the bit
    for call in seen:
        assert call["x_mask"].tolist() == [[False, True, True, True]] * 2
        assert torch.equal(call["x"][:, :, 0], out[:, :, 0].expand(2, -1, -1, -1))


@pytest.mark.parametrize(
    ("strategy", "kept"),
    [
        ("0,0,0,0,2", {0: 0, 1: 1}),  # extended
        ("0,0,-2,0,2", {0: 4, 1: 5}),  # extended from the reference's end
        ("0,0,0,-2,2", {2: 0, 3: 1}),  # extended backwards
        ("0;0,0,-1,-1,1", {0: 0, 3: 5}),  # connected
    ],
)
def test_places(pipeline, strategy, kept):
    video = torch.stack([image(v) for v in (-0.5, -0.3, -0.1, 0.1, 0.3, 0.5)], dim=1)
    out = pipeline("a rabbit", **FAST, references=[video], conditions=strategy, output_type="latent").frames
    reference = pipeline.vae.encode(video[None])[0].to(out.device)
    for frame, source in kept.items():
        assert torch.equal(out[0, :, frame], reference[:, source])
    for frame in set(range(4)) - set(kept):
        assert (out[0, :, frame] - reference[:, 0]).abs().max() > 0.1


def test_editing_takes_fewer_steps(pipeline, monkeypatch):
    seen = calls_of(pipeline, monkeypatch)
    conditions = [Condition(image(), length=1, at=at, edit=0.5) for at in range(4)]
    options = FAST | dict(num_inference_steps=10, output_type="latent")
    out = pipeline("a rabbit", **options, conditions=conditions).frames
    assert len(seen) == 5 and all(call["x_mask"] is None for call in seen)
    assert (out[0, :, 0] - latents_of(pipeline, image()).to(out.device)[:, 0]).abs().max() > 0.01


def test_references_as_files(pipeline, tmp_path):
    picture = Image.fromarray(((image().movedim(0, -1).numpy() + 1) * 127.5).round().astype(np.uint8))
    picture.save(tmp_path / "a.png")
    prompt = f'a rabbit {{"reference_path": "{tmp_path}/a.png;tests/data/bikes.mp4", "mask_strategy": "0;0,1,3,2,2"}}'
    out = pipeline(prompt, **FAST, output_type="latent").frames
    want = latents_of(pipeline, torch.tensor(np.array(picture)).movedim(-1, 0) / 127.5 - 1)
    torch.testing.assert_close(out[0, :, :1].cpu(), want.cpu())
    assert out[0, :, 2:].std() > 0


def test_a_size_beyond_whole_latents_is_told_and_not_seen(pipeline, monkeypatch):
    seen = calls_of(pipeline, monkeypatch)
    out = pipeline("a rabbit", **FAST | dict(height=38, width=52), output_type="np").frames
    assert out.shape == (1, 4, 32, 48, 3)
    assert seen[0]["height"].tolist() == [38, 38] and seen[0]["ar"].tolist() == pytest.approx([38 / 52] * 2)


def test_loops(pipeline, monkeypatch):
    prompt = "|0| a rabbit |1| a street"
    options = FAST | dict(num_inference_steps=2, loops=3, condition_frame_length=1)
    clips = list(pipeline.clips(prompt, **options, decode=False, generator=seeded(5)))
    assert [clip.shape[2] for clip in clips] == [4, 3, 3]
    whole = pipeline(prompt, **options, output_type="latent", generator=seeded(5)).frames
    assert torch.equal(whole, torch.cat(clips, dim=2))
    seen = calls_of(pipeline, monkeypatch)
    list(pipeline.clips(prompt, **options, generator=seeded(5)))
    assert [call["x_mask"] is None for call in seen] == [True] * 2 + [False] * 4
    assert torch.equal(seen[2]["x"][0, :, 0], clips[0][0, :, -1])
    assert torch.equal(seen[4]["x"][0, :, 0], clips[1][0, :, -1])
    texts = [call["text"] for call in seen[::2]]
    assert texts[0] is not texts[1] and texts[1] is texts[2]  # encoded again only where it changes


def test_loops_hold_no_earlier_clip(pipeline):
    options = FAST | dict(num_inference_steps=1, loops=5, condition_frame_length=1)
    clips = pipeline.clips("a rabbit", **options)
    gone = []
    for clip in clips:
        gone.append(weakref.ref(clip.untyped_storage()))
        del clip
        gc.collect()
        assert sum(ref() is not None for ref in gone) <= 1
    latents = [weakref.ref(clip.untyped_storage()) for clip in pipeline.clips("a rabbit", **options, decode=False)]
    gc.collect()
    assert not any(ref() is not None for ref in latents)


def test_a_text_that_is_cut_is_told(pipeline, caplog):
    pipeline("rabbit " * 30, **FAST | dict(num_inference_steps=1), output_type="latent")
    assert "1 of 1 texts had more than 12 tokens and were cut" in caplog.text


def test_all_samplers_and_the_model_returns_to_training(pipeline):
    pipeline.transformer.train()
    for name in ("iddpm", "ddim", "dpm-solver++"):
        pipeline.scheduler, before = make_scheduler(name), pipeline.scheduler
        out = pipeline("a rabbit", **FAST, output_type="latent", conditions=[Condition(image())]).frames
        assert out.isfinite().all() and torch.equal(out[0, :, :1].cpu(), latents_of(pipeline, image()).cpu())
        pipeline.scheduler = before
    assert pipeline.transformer.training
    pipeline.transformer.eval()


def test_saved_and_loaded(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path)
    loaded = STDiT2Pipeline.from_pretrained(tmp_path).to(DEVICE)
    loaded.set_progress_bar_config(disable=True)
    loaded.transformer.config.backend = "reference"
    options = FAST | dict(output_type="latent")
    mine, theirs = (p("a rabbit", **options, generator=seeded(4)).frames for p in (pipeline, loaded))
    torch.testing.assert_close(mine, theirs)


def test_with_a_kl_autoencoder(pipeline):
    torch.manual_seed(1)
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 8, 8), latent_channels=4, norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
    )  # fmt: skip
    components = pipeline.components | {"vae": vae.to(DEVICE)}
    other = STDiT2Pipeline(**components)
    other.set_progress_bar_config(disable=True)
    out = other("a rabbit", **FAST, conditions=[Condition(image())], output_type="np").frames
    assert out.shape == (1, 4, 32, 48, 3) and np.isfinite(out).all()


def test_slices_that_do_not_fit_are_halved(pipeline, monkeypatch):
    sizes, decode = [], pipeline.vae._decode_frames

    def short_of_memory(latents):
        sizes.append(len(latents))
        if len(latents) > 2:
            raise torch.OutOfMemoryError
        return decode(latents)

    monkeypatch.setattr(pipeline.vae, "_decode_frames", short_of_memory)
    monkeypatch.setattr("stdit_fast.sample.pipeline.CODED_PIXELS", 5 * 32 * 48)
    assert pipeline.decode_latents(torch.zeros(1, 4, 6, 4, 6, device=DEVICE)).shape == (1, 3, 6, 32, 48)
    assert sizes == [5, 2, 2, 2]
    assert pipeline.vae.micro_batch_size is None


@pytest.mark.parametrize(
    ("changes", "key", "message"),
    [
        (dict(conditions="0"), "mask_strategy", "no reference"),
        (dict(conditions="0,1", references=[image()]), "mask_strategy", "reference"),
        (dict(conditions="0,0,0,4", references=[image()]), "mask_strategy", "output"),
        (dict(conditions="1", references=[image()]), "mask_strategy", "no loop 1"),
        (dict(conditions="0", references=["nowhere.png"]), "reference_path", "nowhere.png"),
        (dict(prompt=Prompt(["a", "b"]), loops=3, condition_frame_length=1), "texts", "more loops than texts"),
        (dict(prompt=[]), "prompt", "at least one"),
        (dict(num_frames=0), "num_frames", "1 or more"),
        (dict(loops=2, condition_frame_length=4), "condition_frame_length", "1 to 3"),
        (dict(condition_frame_edit=2), "condition_frame_edit", "0 to 1"),
        (dict(fps=0), "fps", "above 0"),
        (dict(height=8), "height", "16 or more"),
        (dict(num_inference_steps=1001), "num_sampling_steps", "1 to 1000"),
        (dict(guidance_channels=9), "guidance_channels", "1 to 4"),
        (dict(generator=seeded(1, 2)), "generator", "one for each of the 1"),
        (dict(latents=torch.zeros(1, 4, 4, 4, 4)), "latents", "[1, 4, 4, 4, 6]"),
        (dict(output_type="gif"), "output_type", "pil, np, latent"),
    ],
)
def test_what_is_refused(pipeline, monkeypatch, changes, key, message):
    monkeypatch.setattr(pipeline.transformer, "forward", None)  # nothing slow has begun
    monkeypatch.setattr(type(pipeline.text_encoder), "encode", None)
    options = FAST | dict(prompt="a rabbit") | changes
    with pytest.raises(ConfigError) as error:
        pipeline(options.pop("prompt"), **options)
    assert error.value.key == key and message in str(error.value), str(error.value)
