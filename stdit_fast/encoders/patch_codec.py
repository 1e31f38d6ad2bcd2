"""A fixed linear 8x8 patch codec with 4 channels: an autoencoder for machines that have no weights.

Encoding projects each patch onto four principal components of natural video patches, whitened, so that every
latent channel has about zero mean and unit variance. The components are found with the chroma weighted, because
unweighted ones spend their fourth channel on luma detail and lose red against green.

Decoding is the components' own reconstruction plus a linear prediction, from the 3x3 neighbouring latents, of what
four components cannot hold. The predicted part lies outside the components' span, so encoding a decoded picture
gives the same latents again.

``python -m stdit_fast.encoders.patch_codec CLIP... --out FILE`` fits the codec to clips and prints its PSNR.
"""

import argparse
import math
import os
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save
from torch import Tensor

from stdit_fast.encoders.autoencoder import DOWNSAMPLE, LATENT_CHANNELS, FrameAutoencoder
from stdit_fast.encoders.modules import ModelMixin as ModelMixin  # diffusers looks for it here
from stdit_fast.encoders.modules import SavableModule, register_to_config

PATCH = DOWNSAMPLE
VALUES = 3 * PATCH * PATCH  # of a patch, ordered [3, PATCH, PATCH]
CHROMA_WEIGHT = 2.0
RIDGE = 1e-3  # of the neighbour prediction, relative to the latents' unit variance
EMBEDDED = Path(__file__).with_name("patch_codec.safetensors")
SHAPES = {
    "encoder_weight": (LATENT_CHANNELS, 3, PATCH, PATCH),
    "encoder_bias": (LATENT_CHANNELS,),
    "decoder_weight": (VALUES, LATENT_CHANNELS, 3, 3),
    "decoder_bias": (VALUES,),
}
# RGB -> Y, Cb, Cr of ITU-R BT.601
YCBCR = ((0.299, 0.587, 0.114), (-0.168736, -0.331264, 0.5), (0.5, -0.418688, -0.081312))


class PatchCodec(FrameAutoencoder, SavableModule):
    """The linear codec as two convolutions, in float32. It has no posterior: posterior noise is ignored.

    Its parameters are those that come with the package, unless `from_parameters` or `from_pretrained` gives others.

    Args:
        micro_batch_size: see FrameAutoencoder.
    """

    _keep_in_fp32_modules = list(SHAPES)  # whatever a pipeline is loaded in

    @register_to_config
    def __init__(self, micro_batch_size: int | str | None = None):
        super().__init__(micro_batch_size)
        for name, value in load_file(EMBEDDED).items():
            self.register_buffer(name, value)

    @classmethod
    def from_parameters(cls, parameters: dict[str, Tensor], micro_batch_size: int | str | None = None) -> "PatchCodec":
        """The codec of what `fit_patch_codec` returned."""
        codec = cls(micro_batch_size)
        for name, shape in SHAPES.items():
            if tuple(parameters[name].shape) != shape:
                raise ValueError(f"{name} must be {list(shape)}, got {list(parameters[name].shape)}")
            setattr(codec, name, parameters[name].float())
        return codec

    def _apply(self, fn, recurse=True):
        """Moves the buffers and leaves them float32: a pipeline is cast as a whole."""
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, value in before.items():
            self._buffers[name] = value.to(self._buffers[name].device)
        return self

    def _encode_frames(self, frames: Tensor, noise: Tensor | None) -> Tensor:
        # a strided convolution without padding leaves out what does not fill a patch on the right and at the bottom
        return F.conv2d(frames.to(self.encoder_weight), self.encoder_weight, self.encoder_bias, stride=PATCH)

    def _decode_frames(self, latents: Tensor) -> Tensor:
        padded = F.pad(latents.to(self.decoder_weight), (1, 1, 1, 1), mode="replicate")
        return F.pixel_shuffle(F.conv2d(padded, self.decoder_weight, self.decoder_bias), PATCH)


def fit_patch_codec(frames: Sequence[Tensor]) -> dict[str, Tensor]:
    """Fit the codec's parameters, float32, to frames.

    Args:
        frames: groups of frames, each [N, 3, H, W] in [-1, 1]; groups may differ in size and weigh the same.
            Each frame is also used mirrored left to right, so that no direction is preferred.

    Returns:
        encoder_weight [4, 3, 8, 8], encoder_bias [4], decoder_weight [192, 4, 3, 3], decoder_bias [192].
    """
    groups = [torch.cat([group, group.flip(-1)]).double() for group in frames]
    patches = [_patches(group) for group in groups]
    mean = torch.stack([p.mean(0) for p in patches]).mean(0)
    covariance = torch.stack([(p - mean).T @ (p - mean) / len(p) for p in patches]).mean(0)
    project, rebuild = _components(covariance)

    # what the components leave over, predicted from the neighbours; project @ leftover is zero, hence so is
    # project @ prediction
    normal = RIDGE * torch.eye(LATENT_CHANNELS * 9, dtype=torch.float64)
    moment = torch.zeros(LATENT_CHANNELS * 9, VALUES, dtype=torch.float64)
    for group, patch in zip(groups, patches, strict=True):
        latents = (patch - mean) @ project.T  # [P, 4]
        size = (group.shape[0], group.shape[2] // PATCH, group.shape[3] // PATCH)
        neighbours = _neighbours(latents.unflatten(0, size).movedim(-1, 1))
        leftover = patch - mean - latents @ rebuild.T
        normal += neighbours.T @ neighbours / len(patch) / len(groups)
        moment += neighbours.T @ leftover / len(patch) / len(groups)
    decoder = torch.linalg.solve(normal, moment).T.reshape(VALUES, LATENT_CHANNELS, 3, 3)
    decoder[:, :, 1, 1] += rebuild
    parameters = {
        "encoder_weight": project.reshape(LATENT_CHANNELS, 3, PATCH, PATCH),
        "encoder_bias": -(project @ mean),
        "decoder_weight": decoder,
        "decoder_bias": mean,
    }
    return {name: value.float().contiguous() for name, value in parameters.items()}


def _components(covariance: Tensor) -> tuple[Tensor, Tensor]:
    """Whitened principal components: project [4, 192] and rebuild [192, 4], with project @ rebuild = identity."""
    colour = torch.tensor(YCBCR, dtype=torch.float64) * torch.tensor([[1.0], [CHROMA_WEIGHT], [CHROMA_WEIGHT]])
    weigh = torch.kron(colour, torch.eye(PATCH * PATCH, dtype=torch.float64))
    variance, vectors = torch.linalg.eigh(weigh @ covariance @ weigh.T)
    variance = variance.flip(0)[:LATENT_CHANNELS]
    vectors = vectors.flip(1)[:, :LATENT_CHANNELS]
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    vectors = vectors * largest.sign()  # an eigenvector's sign is arbitrary
    std = variance.sqrt()
    return vectors.T @ weigh / std[:, None], torch.linalg.solve(weigh, vectors) * std


def _patches(frames: Tensor) -> Tensor:
    """[N, 3, H, W] -> [N * (H//8) * (W//8), 192]"""
    return F.unfold(frames, PATCH, stride=PATCH).transpose(1, 2).flatten(0, 1)


def _neighbours(latents: Tensor) -> Tensor:
    """[N, 4, h, w] -> [N * h * w, 36], the order of a [4, 3, 3] kernel"""
    return F.unfold(F.pad(latents, (1, 1, 1, 1), mode="replicate"), 3).transpose(1, 2).flatten(0, 1)


def read_frames(clip: str | os.PathLike, num_frames: int = 12) -> Tensor:
    """About `num_frames` frames spread over a clip, float32 [N, 3, H, W] in [-1, 1]."""
    import av

    with av.open(os.fspath(clip)) as container:
        stream = container.streams.video[0]
        step = max(1, stream.frames // num_frames)
        frames = [f.to_ndarray(format="rgb24") for i, f in enumerate(container.decode(stream)) if i % step == 0]
    return torch.stack([torch.from_numpy(frame) for frame in frames]).movedim(-1, 1) / 127.5 - 1


def resize(frames: Tensor, height: int) -> Tensor:
    """Frames [N, 3, H, W] resized to a height in pixels, the aspect ratio kept."""
    size = (height, round(frames.shape[3] * height / frames.shape[2]))
    return F.interpolate(frames, size, mode="bilinear", antialias=True, align_corners=False).clamp(-1, 1)


def psnr(codec: FrameAutoencoder, frames: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of decoded frames; frames [N, 3, H, W] in [-1, 1]."""
    decoded = codec.decode(codec.encode(frames.unsqueeze(2))).squeeze(2)
    error = decoded - frames[..., : decoded.shape[-2], : decoded.shape[-1]]
    return 10 * math.log10(4 / error.square().mean().item())


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m stdit_fast.encoders.patch_codec", description="Fit the patch codec to clips; print its PSNR."
    )
    parser.add_argument("clips", nargs="+", type=Path, metavar="CLIP")
    parser.add_argument("--out", required=True, type=Path, metavar="FILE", help="the .safetensors file to write")
    parser.add_argument("--heights", nargs="+", type=int, default=[144, 240], help="frame heights to fit to, in pixels")
    options = parser.parse_args(arguments)

    frames = {(clip.name, h): resize(read_frames(clip), h) for clip in options.clips for h in options.heights}
    parameters = fit_patch_codec(list(frames.values()))
    codec = PatchCodec.from_parameters(parameters)
    for (name, height), group in frames.items():
        print(f"{name} at height {height}: {psnr(codec, group):.2f} dB")
    temporary = options.out.with_name(f".{options.out.name}.{os.getpid()}")
    temporary.write_bytes(save(parameters))
    os.replace(temporary, options.out)


if __name__ == "__main__":
    main()
