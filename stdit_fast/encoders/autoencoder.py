"""Video to latents and back, frame by frame, with a frozen image autoencoder."""

from abc import ABC, abstractmethod
from pathlib import Path

import torch
from torch import Tensor, nn

from stdit_fast.encoders.fused_autoencoder import FusedEncoder, why_not
from stdit_fast.encoders.weights import load_pretrained, require_all_keys
from stdit_fast.errors import ConfigError
from stdit_fast.ops.registry import check_backend, described, serves

LATENT_CHANNELS = 4
DOWNSAMPLE = 8
PATCH_CODEC = "patch-codec"
AUTO = "auto"
AUTO_BYTES = 2**31  # of activations: enough pixels to fill a GPU, and little beside a training step's own


def latent_size(height: int, width: int) -> tuple[int, int]:
    """Height and width of the latents of a height x width (pixels) frame."""
    return height // DOWNSAMPLE, width // DOWNSAMPLE


def check_micro_batch_size(key: str, value: int | str | None) -> None:
    """Raises ConfigError unless `value` is a number of frames, "auto" or None."""
    if value is None or value == AUTO or (isinstance(value, int) and value >= 1):
        return
    raise ConfigError(key, value, "frames at once: 1 or more, auto (by their size), or null for all")


def draw_latents(
    mean: Tensor, std: Tensor | None, noise: Tensor | None, shift_factor: float, scaling_factor: float
) -> Tensor:
    """Latents of a posterior, float32: its sample mean + std * noise, or its mean without noise, shifted and scaled."""
    latents = mean.float()
    if noise is not None:
        latents = latents + std.float() * noise.to(latents)
    return (latents - shift_factor) * scaling_factor


class FrameAutoencoder(nn.Module, ABC):
    """What every autoencoder offers; subclasses encode and decode a batch of frames.

    Args:
        micro_batch_size: frames that go through the network at once; "auto": as many as 2 GiB hold, by their size;
            None: all of them. It bounds the memory, and does not change the result.
    """

    values_per_pixel = (128, 128)  # that are held at most at a time while a frame is encoded and decoded
    dtype = torch.float32  # of these values
    latent_channels = LATENT_CHANNELS
    downsample = DOWNSAMPLE
    uses_posterior_noise = False
    shift_factor, scaling_factor = 0.0, 1.0  # between the posterior and the latents

    def __init__(self, micro_batch_size: int | str | None = None):
        super().__init__()
        check_micro_batch_size("encoders.micro_batch_size", micro_batch_size)
        self.micro_batch_size = micro_batch_size

    @torch.no_grad()
    def encode(self, video: Tensor, posterior_noise: Tensor | None = None) -> Tensor:
        """Latents, float32 [B, 4, T, H//8, W//8] on the encoder's device, of about unit variance.

        Args:
            video: [B, 3, T, H, W] in [-1, 1], on any device.
            posterior_noise: standard normal values of the latents' shape. The latents are then a sample of the
                posterior, mean + std * noise, otherwise its mean. Ignored where `uses_posterior_noise` is False.
        """
        if video.ndim != 5 or video.shape[1] != 3:
            raise ValueError(f"video must be [B, 3, T, H, W], got {list(video.shape)}")
        batch, _, num_frames, height, width = video.shape
        shape = (batch, self.latent_channels, num_frames, *latent_size(height, width))
        if posterior_noise is not None and posterior_noise.shape != shape:
            raise ValueError(f"posterior_noise must be {list(shape)}, got {list(posterior_noise.shape)}")
        self._begin_encoding()
        frames = video.movedim(2, 1).flatten(0, 1)
        noise = posterior_noise if self.uses_posterior_noise else None
        if noise is not None:
            noise = noise.movedim(2, 1).flatten(0, 1)
        latents = torch.cat(
            [
                self._encode_frames(frames[part], None if noise is None else noise[part])
                for part in self._parts(frames, self.values_per_pixel[0] * height * width)
            ]
        )
        return latents.unflatten(0, (batch, num_frames)).movedim(2, 1).contiguous()

    @torch.no_grad()
    def posterior(self, video: Tensor) -> Tensor:
        """What `draw_latents` takes, for each latent: float32 [B, P, 4, T, H//8, W//8] on the encoder's device.

        P is 2, mean and standard deviation, or 1, the mean alone, where `uses_posterior_noise` is False.

        Args:
            video: [B, 3, T, H, W] in [-1, 1], on any device.
        """
        self._begin_encoding()
        frames = video.movedim(2, 1).flatten(0, 1)
        room = self.values_per_pixel[0] * frames.shape[2] * frames.shape[3]
        parts = torch.cat([self._posterior_of_frames(frames[part]) for part in self._parts(frames, room)])
        return parts.unflatten(0, (video.shape[0], video.shape[2])).movedim(1, 3)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Video, float32 [B, 3, T, h*8, w*8] in [-1, 1], of latents [B, 4, T, h, w]."""
        if latents.ndim != 5 or latents.shape[1] != self.latent_channels:
            raise ValueError(f"latents must be [B, {self.latent_channels}, T, h, w], got {list(latents.shape)}")
        frames = latents.movedim(2, 1).flatten(0, 1)
        room = self.values_per_pixel[1] * self.downsample**2 * frames.shape[2] * frames.shape[3]
        video = torch.cat([self._decode_frames(frames[part]).clamp(-1, 1) for part in self._parts(frames, room)])
        return video.unflatten(0, (latents.shape[0], latents.shape[2])).movedim(2, 1)

    def _parts(self, frames: Tensor, values: int) -> list[slice]:
        """The micro-batches; `values` are what one frame takes."""
        step = self.micro_batch_size or len(frames)
        if step == AUTO:
            step = max(1, AUTO_BYTES // (values * self.dtype.itemsize))
        return [slice(start, start + step) for start in range(0, len(frames), step)]

    def served_by(self) -> str:
        """What encodes, and why, in words."""
        return "plain PyTorch"

    def _begin_encoding(self) -> None:
        """Called before a video's micro-batches."""

    @abstractmethod
    def _encode_frames(self, frames: Tensor, noise: Tensor | None) -> Tensor:
        """[N, 3, H, W] -> float32 [N, 4, H//8, W//8]."""

    def _posterior_of_frames(self, frames: Tensor) -> Tensor:
        """[N, 3, H, W] -> float32 [N, P, 4, H//8, W//8]."""
        return self._encode_frames(frames, None)[:, None]

    @abstractmethod
    def _decode_frames(self, latents: Tensor) -> Tensor:
        """[N, 4, h, w] -> float32 [N, 3, h*8, w*8]."""


class VideoAutoencoder(FrameAutoencoder):
    """diffusers' AutoencoderKL on each frame; latents are multiplied by its scaling factor (0.18215 for SD's).

    The network runs in its own dtype; the posterior is sampled and scaled in float32. Where they can, kernels of ours
    run the encoder on the network's own parameters (`fused_autoencoder.py`); the decoder is the library's.

    Args:
        vae: an AutoencoderKL with 4 latent channels and three halvings.
        micro_batch_size: see FrameAutoencoder.
        backend: of the encoder, "auto", "fused" or "reference"; see `stdit_fast.ops.registry.use_kernel`.

    Raises:
        ConfigError: from encoding, with "fused" where the kernels cannot serve, with the reason.
    """

    values_per_pixel = (640, 1280)  # SD's: some four tensors of 128 channels; the decoder's are twice as wide
    uses_posterior_noise = True

    def __init__(self, vae: nn.Module, micro_batch_size: int | str | None = None, backend: str = "auto"):
        super().__init__(micro_batch_size)
        check_backend(backend, ())
        self.backend = backend
        self.vae = vae.eval().requires_grad_(False)
        self._fused = FusedEncoder(self.vae)
        self._on_kernels = False
        self.scaling_factor = float(vae.config.scaling_factor)
        self.shift_factor = float(vae.config.shift_factor or 0.0)

    @property
    def dtype(self) -> torch.dtype:
        return self.vae.encoder.conv_in.weight.dtype  # the library's own answer takes milliseconds

    @property
    def device(self) -> torch.device:
        return self.vae.encoder.conv_in.weight.device

    def served_by(self) -> str:
        kernels = "cuDNN's convolutions with channels last, Triton's passes between them"
        return described(self.backend, why_not(self.vae), self.device, kernels, "diffusers' own forward")

    def _begin_encoding(self) -> None:
        self._on_kernels = serves("autoencoder", self.backend, why_not(self.vae), self.device)

    def _encode_frames(self, frames: Tensor, noise: Tensor | None) -> Tensor:
        mean, std = self._posterior_of_frames(frames).unbind(1)
        return draw_latents(mean, std, noise, self.shift_factor, self.scaling_factor)

    def _posterior_of_frames(self, frames: Tensor) -> Tensor:
        frames = frames.to(self.device, non_blocking=True)
        if self._on_kernels:
            mean, log_variance = self._fused(frames).chunk(2, 1)
            return torch.stack([mean.float(), (0.5 * log_variance.float().clamp(-30, 20)).exp()], dim=1)
        posterior = self.vae.encode(frames.to(self.dtype)).latent_dist
        return torch.stack([posterior.mean.float(), posterior.std.float()], dim=1)

    def _decode_frames(self, latents: Tensor) -> Tensor:
        latents = latents.to(self.vae.device, torch.float32) / self.scaling_factor + self.shift_factor
        return self.vae.decode(latents.to(self.vae.dtype)).sample.float()


def load_autoencoder(
    name_or_path: str,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    micro_batch_size: int | str | None = None,
    backend: str = "auto",
    key: str = "name_or_path",
) -> FrameAutoencoder:
    """The frozen video autoencoder.

    Args:
        name_or_path: "patch-codec" (comes with the package), or a local folder or hub name of an AutoencoderKL:
            its own, or a pipeline's with the autoencoder in the subfolder ``vae``.
        device: where it runs.
        dtype: the network's parameters and activations; the patch codec always runs in float32.
        micro_batch_size: frames at once, "auto" (what 2 GiB hold), or None: all.
        backend: of an AutoencoderKL's encoder, see VideoAutoencoder.
        key: the setting that `name_or_path` comes from, as errors shall name it.

    Raises:
        ConfigError: the weights cannot be found, read, or do not fit.
    """
    if name_or_path == PATCH_CODEC:
        from stdit_fast.encoders.patch_codec import PatchCodec

        return PatchCodec(micro_batch_size=micro_batch_size).to(device)
    vae, info = load_pretrained(key, name_or_path, _load_autoencoder_kl)
    require_all_keys(key, name_or_path, info)
    downsample = 2 ** (len(vae.config.block_out_channels) - 1)
    if (vae.config.latent_channels, downsample) != (LATENT_CHANNELS, DOWNSAMPLE):
        found = f"{vae.config.latent_channels} latent channels at 1/{downsample} of the size"
        raise ConfigError(key, name_or_path, f"it has {found}; this model needs {LATENT_CHANNELS} at 1/{DOWNSAMPLE}")
    return VideoAutoencoder(vae, micro_batch_size, backend).to(device, dtype)


def _load_autoencoder_kl(source: str, local_files_only: bool):
    from diffusers import AutoencoderKL

    options = dict(output_loading_info=True, local_files_only=local_files_only)
    folder = Path(source)
    if folder.is_dir():
        subfolder = "" if (folder / "config.json").exists() else "vae"
        return AutoencoderKL.from_pretrained(source, subfolder=subfolder, **options)
    try:
        return AutoencoderKL.from_pretrained(source, **options)
    except OSError as error:
        try:
            return AutoencoderKL.from_pretrained(source, subfolder="vae", **options)
        except OSError:
            raise error from None
