import copy
import json
import time
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file

from stdit_fast.encoders import autoencoder as module
from stdit_fast.encoders import latent_size, load_autoencoder
from stdit_fast.encoders.autoencoder import VideoAutoencoder
from stdit_fast.encoders.fused_autoencoder import FusedEncoder, why_not
from stdit_fast.encoders.patch_codec import (
    EMBEDDED,
    SHAPES,
    PatchCodec,
    fit_patch_codec,
    main,
    psnr,
    read_frames,
    resize,
)
from stdit_fast.errors import ConfigError

CLIPS = sorted((Path(__file__).parent / "data").glob("*.mp4"))
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(autouse=True)
def _few_threads():
    torch.set_num_threads(2)


def tiny_autoencoder_kl(levels: int = 4, latent_channels: int = 4, channels=None, **options) -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * levels,
        up_block_types=["UpDecoderBlock2D"] * levels,
        block_out_channels=channels or (8,) * levels,
        layers_per_block=1,
        latent_channels=latent_channels,
        norm_num_groups=4,
        **options,
    )


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("autoencoder")
    tiny_autoencoder_kl().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def frames() -> list[torch.Tensor]:
    """A few frames of each clip, [N, 3, 144, W]."""
    return [resize(read_frames(clip, 4), 144) for clip in CLIPS]


def random_video(*shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.mark.parametrize(("height", "width"), [(117, 312), (240, 426), (426, 240), (64, 64), (95, 71)])
def test_latents_have_the_floor_of_an_eighth_of_the_size(height, width):
    video = random_video(1, 3, 1, height, width)
    expected = (1, 4, 1, height // 8, width // 8)
    for autoencoder in (VideoAutoencoder(tiny_autoencoder_kl()), PatchCodec()):
        latents = autoencoder.encode(video)
        assert latents.shape == expected
        assert autoencoder.decode(latents).shape == (1, 3, 1, height // 8 * 8, width // 8 * 8)
    assert latent_size(height, width) == expected[-2:]


def test_latents_are_the_scaled_posterior_of_each_frame():
    vae = tiny_autoencoder_kl()
    video, noise = random_video(2, 3, 3, 40, 32), torch.randn(2, 4, 3, 5, 4)
    autoencoder = VideoAutoencoder(vae)
    assert (autoencoder.latent_channels, autoencoder.downsample, autoencoder.uses_posterior_noise) == (4, 8, True)
    mean, sample = autoencoder.encode(video), autoencoder.encode(video, noise)
    decoded = autoencoder.decode(sample)
    for b in range(2):
        for t in range(3):
            with torch.no_grad():
                moments = vae.quant_conv(vae.encoder(video[b : b + 1, :, t]))
            mu, log_variance = moments.chunk(2, dim=1)
            torch.testing.assert_close(mean[b, :, t], 0.18215 * mu[0])
            expected = 0.18215 * (mu + (0.5 * log_variance).exp() * noise[b, :, t])
            torch.testing.assert_close(sample[b, :, t], expected[0])
            with torch.no_grad():
                picture = vae.decoder(vae.post_quant_conv(expected / 0.18215)).clamp(-1, 1)
            torch.testing.assert_close(decoded[b, :, t], picture[0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("micro_batch_size", [1, 4, 100])
def test_micro_batches_change_nothing(micro_batch_size):
    video, noise = random_video(2, 3, 3, 32, 40), torch.randn(2, 4, 3, 4, 5)
    vae = tiny_autoencoder_kl()
    for whole, parts in (
        (VideoAutoencoder(vae), VideoAutoencoder(vae, micro_batch_size)),
        (PatchCodec(), PatchCodec(micro_batch_size=micro_batch_size)),
    ):
        latents = whole.encode(video, noise)
        torch.testing.assert_close(parts.encode(video, noise), latents)
        torch.testing.assert_close(parts.decode(latents), whole.decode(latents), atol=1e-5, rtol=1e-4)


def test_micro_batches_bound_what_the_network_sees(monkeypatch):
    autoencoder, seen = VideoAutoencoder(tiny_autoencoder_kl(), 4), []
    autoencoder.vae.encoder.register_forward_hook(lambda module, inputs, output: seen.append(len(inputs[0])))
    video = random_video(2, 3, 5, 16, 16)
    latents = autoencoder.encode(video)
    assert seen == [4, 4, 2]
    # auto: by the size of the frames and of a value
    monkeypatch.setattr(module, "AUTO_BYTES", 3 * 640 * 16 * 16 * 4)
    autoencoder.micro_batch_size = "auto"
    seen.clear()
    torch.testing.assert_close(autoencoder.encode(video), latents)
    assert seen == [3, 3, 3, 1]
    seen.clear()
    autoencoder.encode(random_video(1, 3, 4, 32, 32))
    assert seen == [1] * 4


def test_frozen_and_without_gradient():
    autoencoder = VideoAutoencoder(tiny_autoencoder_kl())
    assert not any(p.requires_grad for p in autoencoder.parameters())
    assert not autoencoder.vae.training
    video = random_video(1, 3, 1, 16, 16).requires_grad_()
    latents = autoencoder.encode(video)
    assert not latents.requires_grad
    assert not autoencoder.decode(latents).requires_grad


def test_half_precision_networks_give_float32_latents(saved):
    video = random_video(1, 3, 2, 32, 32)
    low = load_autoencoder(str(saved), dtype=torch.bfloat16)
    assert low.vae.dtype == torch.bfloat16
    latents = low.encode(video, torch.zeros(1, 4, 2, 4, 4))
    assert latents.dtype == low.decode(latents).dtype == torch.float32
    torch.testing.assert_close(latents, load_autoencoder(str(saved)).encode(video), atol=0.01, rtol=0.1)


ON_GPU = torch.cuda.is_available()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16] if ON_GPU else [torch.float32], ids=str)
def test_the_kernels_give_what_the_library_gives(dtype):
    """Odd sizes, a widening, attention; the error is no larger than the library's own, times 1.3."""
    vae = tiny_autoencoder_kl(channels=(16, 16, 32, 32))
    for parameter in vae.parameters():
        if parameter.ndim == 1:  # fresh norms and biases do nothing
            torch.nn.init.normal_(parameter, std=0.5)
    video = random_video(2, 3, 1, 17, 26)
    with torch.no_grad():
        exact = VideoAutoencoder(copy.deepcopy(vae).double(), backend="reference").posterior(video)
    vae = vae.to("cuda" if ON_GPU else "cpu", dtype)
    theirs = VideoAutoencoder(vae, backend="reference").posterior(video)
    ours = VideoAutoencoder(vae, backend="fused").posterior(video)
    size = exact.norm()
    errors = [float((got.cpu().double() - exact).norm() / size) for got in (ours, theirs)]
    assert errors[0] <= max(1.3 * errors[1], 1e-6)
    if ON_GPU:  # the default there
        assert torch.equal(VideoAutoencoder(vae).posterior(video), ours)


def test_kernels_follow_the_parameters():
    """What is kept of them in another order is made anew when they change."""
    vae = tiny_autoencoder_kl(channels=(16,) * 4, mid_block_add_attention=False)
    encoder, conv = FusedEncoder(vae, fused=False), vae.encoder.down_blocks[0].resnets[0].conv1
    frames = random_video(1, 3, 8, 8)
    with torch.no_grad():
        before = encoder(frames)
        conv.weight.mul_(3)
        after = encoder(frames)
        torch.testing.assert_close(after, vae.quant_conv(vae.encoder(frames)))
        assert not torch.allclose(before, after)
        conv.weight.data = conv.weight.data / 3
        torch.testing.assert_close(encoder(frames), before)


def test_what_the_kernels_cannot_serve_is_said():
    assert "8 channels" in why_not(tiny_autoencoder_kl())
    vae = tiny_autoencoder_kl(channels=(16,) * 4)
    vae.enable_tiling()
    assert "tiling" in why_not(vae)
    vae = tiny_autoencoder_kl(channels=(16,) * 4, act_fn="relu")
    assert "ReLU is not known" in why_not(vae)
    vae = tiny_autoencoder_kl(channels=(16,) * 4)
    vae.encoder.mid_block.register_forward_hook(lambda *call: None)
    assert "hooks" in why_not(vae)
    told = VideoAutoencoder(tiny_autoencoder_kl()).served_by()
    assert "diffusers' own forward (8 channels" in told
    wide = VideoAutoencoder(tiny_autoencoder_kl(channels=(16,) * 4))
    assert wide.served_by() == "diffusers' own forward (on cpu)" or ON_GPU
    assert VideoAutoencoder(wide.vae, backend="reference").served_by().endswith("(backend: reference)")
    assert PatchCodec().served_by() == "plain PyTorch"
    with pytest.raises(ConfigError, match="autoencoder has no kernel for this call .*8 channels"):
        VideoAutoencoder(tiny_autoencoder_kl(), backend="fused").encode(random_video(1, 3, 1, 16, 16))
    with pytest.raises(ConfigError, match="did you mean 'fused'"):
        VideoAutoencoder(tiny_autoencoder_kl(), backend="fuse")


def test_shift_factor_of_newer_autoencoders():
    vae = tiny_autoencoder_kl(scaling_factor=0.5, shift_factor=0.25)
    video = random_video(1, 3, 1, 16, 16)
    plain = VideoAutoencoder(tiny_autoencoder_kl(scaling_factor=1.0)).encode(video)
    torch.testing.assert_close(VideoAutoencoder(vae).encode(video), (plain - 0.25) * 0.5)


@pytest.mark.parametrize("autoencoder", [VideoAutoencoder(tiny_autoencoder_kl()), PatchCodec()])
def test_wrong_shapes_are_refused(autoencoder):
    with pytest.raises(ValueError, match=r"\[B, 3, T, H, W\]"):
        autoencoder.encode(torch.zeros(3, 2, 16, 16))
    with pytest.raises(ValueError, match=r"posterior_noise must be \[1, 4, 2, 2, 2\]"):
        autoencoder.encode(torch.zeros(1, 3, 2, 16, 16), torch.zeros(1, 4, 2, 2, 3))
    with pytest.raises(ValueError, match=r"\[B, 4, T, h, w\]"):
        autoencoder.decode(torch.zeros(1, 3, 2, 2, 2))


def test_loads_a_folder_and_a_pipelines_subfolder(saved, tmp_path):
    tiny_autoencoder_kl().save_pretrained(tmp_path / "vae")
    video = random_video(1, 3, 1, 16, 24)
    expected = VideoAutoencoder(tiny_autoencoder_kl()).encode(video)
    for folder in (saved, tmp_path):
        torch.testing.assert_close(load_autoencoder(str(folder), micro_batch_size=1).encode(video), expected)


def test_missing_folder_is_said_at_once(tmp_path):
    start = time.monotonic()
    for name in (str(tmp_path / "absent"), "./absent", "../weights/vae", "a/b/c", "~/absent", "tests/absent", ""):
        with pytest.raises(ConfigError, match="no such folder") as error:
            load_autoencoder(name)
        assert (error.value.key, error.value.value) == ("name_or_path", name)
    assert time.monotonic() - start < 5


def test_hub_name_without_network_is_an_error_with_a_remedy(monkeypatch, tmp_path):
    import huggingface_hub.constants as hub

    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ConfigError, match="HF_HUB_OFFLINE is set; give a local folder"):
        load_autoencoder("nobody/no-such-autoencoder")


def test_unreadable_weights(saved, tmp_path):
    (tmp_path / "config.json").write_bytes((saved / "config.json").read_bytes())
    with pytest.raises(ConfigError, match=r"name_or_path = .*cannot be read"):
        load_autoencoder(str(tmp_path))
    (tmp_path / WEIGHTS).write_bytes((saved / WEIGHTS).read_bytes()[:1000])
    with pytest.raises(ConfigError, match="cannot be read"):
        load_autoencoder(str(tmp_path))
    with pytest.raises(ConfigError, match="this is a file"):
        load_autoencoder(str(tmp_path / WEIGHTS))


@pytest.mark.parametrize("change", ["missing", "unexpected", "shape"])
def test_weights_that_are_not_the_models(saved, tmp_path, change):
    (tmp_path / "config.json").write_bytes((saved / "config.json").read_bytes())
    weights = load_file(saved / WEIGHTS)
    name = "decoder.conv_norm_out.weight"
    if change == "missing":
        del weights[name]
    elif change == "unexpected":
        name = "encoder.extra.weight"
        weights[name] = torch.zeros(2)
    else:
        weights[name] = torch.zeros(5)
    save_file(weights, tmp_path / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=name):
        load_autoencoder(str(tmp_path))


def test_autoencoders_of_another_geometry_are_refused(tmp_path):
    tiny_autoencoder_kl(levels=3).save_pretrained(tmp_path / "quarter")
    tiny_autoencoder_kl(latent_channels=16).save_pretrained(tmp_path / "wide")
    with pytest.raises(ConfigError, match="4 latent channels at 1/4 of the size; this model needs 4 at 1/8"):
        load_autoencoder(str(tmp_path / "quarter"))
    with pytest.raises(ConfigError, match="^vae.from_pretrained = .*16 latent channels"):
        load_autoencoder(str(tmp_path / "wide"), key="vae.from_pretrained")


def test_micro_batch_size_must_be_positive():
    for wrong in (0, "many", 2.5):
        with pytest.raises(ConfigError, match="frames at once: 1 or more, auto"):
            load_autoencoder("patch-codec", micro_batch_size=wrong)


def test_patch_codec_latents_are_whitened(frames):
    codec = load_autoencoder("patch-codec")
    assert (codec.latent_channels, codec.downsample, codec.uses_posterior_noise) == (4, 8, False)
    latents = [codec.encode(group.unsqueeze(2)).movedim(1, -1).flatten(0, -2) for group in frames]
    mean = torch.stack([group.mean(0) for group in latents]).mean(0)
    second = torch.stack([(group - mean).T @ (group - mean) / len(group) for group in latents]).mean(0)
    assert mean.abs().max() < 0.2
    assert (second - torch.eye(4)).abs().max() < 0.3


def test_patch_codec_pictures_are_recognisable_in_colour(frames):
    codec = PatchCodec()
    for group in frames:
        assert psnr(codec, group) > 21
        decoded = codec.decode(codec.encode(group.unsqueeze(2))).squeeze(2)
        blurred = torch.nn.functional.avg_pool2d(group[..., : decoded.shape[-2], : decoded.shape[-1]], 16)
        error = torch.nn.functional.avg_pool2d(decoded, 16) - blurred
        # red minus green and blue minus yellow follow the original's, not only the brightness
        for weights in ((1.0, -1.0, 0.0), (-0.5, -0.5, 1.0)):
            colour = torch.tensor(weights).view(3, 1, 1)
            assert (error * colour).sum(1).square().mean() < 0.1 * (blurred * colour).sum(1).var()


def test_patch_codec_encodes_its_pictures_to_the_same_latents():
    codec = PatchCodec()
    latents = 0.2 * torch.randn(2, 4, 3, 5, 6, generator=torch.Generator().manual_seed(0))
    video = codec.decode(latents)
    assert video.abs().max() < 1  # nothing was clamped
    torch.testing.assert_close(codec.encode(video), latents, atol=1e-4, rtol=1e-4)


def test_patch_codec_ignores_posterior_noise_and_clamps():
    codec = PatchCodec()
    video = random_video(1, 3, 2, 16, 24)
    assert torch.equal(codec.encode(video), codec.encode(video, torch.randn(1, 4, 2, 2, 3)))
    assert codec.decode(100 * torch.randn(1, 4, 1, 2, 2)).abs().max() == 1


def test_fit_is_exact_on_frames_of_four_patterns():
    torch.manual_seed(0)
    patterns = torch.nn.functional.interpolate(torch.randn(4, 3, 2, 2), size=8, mode="nearest") * 0.05
    patterns = patterns + patterns.flip(-1)  # the fit mirrors the frames
    weights = torch.randn(6, 5, 7, 4)
    frames = torch.einsum("nhwk,kcij->nchiwj", weights, patterns).reshape(6, 3, 40, 56) + 0.1
    codec = PatchCodec.from_parameters(fit_patch_codec([frames]))
    assert psnr(codec, frames) > 60


def test_command_reproduces_the_embedded_file(tmp_path, capsys):
    out = tmp_path / "codec.safetensors"
    main([*map(str, CLIPS), "--out", str(out)])
    fitted, embedded = load_file(out), load_file(EMBEDDED)
    for name, shape in SHAPES.items():
        assert fitted[name].shape == shape
        torch.testing.assert_close(fitted[name], embedded[name], atol=2e-3, rtol=2e-2)
    assert len(capsys.readouterr().out.splitlines()) == 2 * len(CLIPS)
    assert [path.name for path in tmp_path.iterdir()] == [out.name]


def test_patch_codec_refuses_parameters_of_another_shape():
    parameters = load_file(EMBEDDED)
    parameters["decoder_bias"] = parameters["decoder_bias"][:-1]
    with pytest.raises(ValueError, match="decoder_bias"):
        PatchCodec.from_parameters(parameters)


def test_embedded_file_is_small_and_holds_nothing_else():
    assert EMBEDDED.stat().st_size < 64_000
    assert json.loads(EMBEDDED.read_bytes()[8:].split(b"}}")[0].decode() + "}}").keys() == SHAPES.keys()


def test_the_patch_codec_is_saved_and_loaded_and_stays_float32(tmp_path):
    codec = PatchCodec(micro_batch_size=3)
    codec.decoder_bias += 1
    codec.save_pretrained(tmp_path)
    loaded = PatchCodec.from_pretrained(tmp_path, torch_dtype=torch.bfloat16).to(torch.bfloat16)
    assert loaded.micro_batch_size == 3
    for name, value in codec.named_buffers():
        assert torch.equal(getattr(loaded, name), value), name
