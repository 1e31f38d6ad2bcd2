"""Shards of features: safetensors files that hold the latents and text states of neighbouring rows of a data table.

A shard knows by itself what is in it; n counts its captions, k its clips of a size, say 16 frames of 144 x 256 pixels:

  text.states                 [tokens, channels], the captions one after another, without padding
  text.bounds                 int64 [n + 1], where each caption begins, and the end
  text.samples, .crc32        int64 [n], the captions' rows of the table
  latents.16x144x256          [k, P, C, T, h, w]
  latents.16x144x256.samples, .crops, .starts, .crc32
                              int64 [k]: row, number of the crop, and the clip's first frame in its file

P is 2 where an autoencoder's posterior is kept: its mean and standard deviation, as the network gives them, so that
each training step draws its own latents, with the noise that it draws without features. Otherwise P is 1.

Values are float32, bfloat16, or float8_e4m3fn beside a float32 tensor `.scale` by which they are to be multiplied:
[tokens] of text, [k, P, C] of latents. What a bfloat16 network gives loses nothing in bfloat16.

Checksums are CRC-32 of a clip's or caption's values and scales. Whether a sample can be used depends on its own bytes
alone: training is the same whichever data worker met a damaged shard before.
"""

import hashlib
import json
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from stdit_fast.encoders.autoencoder import FrameAutoencoder
from stdit_fast.encoders.text import TextEncoder
from stdit_fast.errors import ConfigError
from stdit_fast.media.files import whole_file
from stdit_fast.media.read import BadSample
from stdit_fast.train.buckets import Bucket

if TYPE_CHECKING:
    from stdit_fast.train.config import TrainConfig

STORED_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn}
POSTERIORS = ("distribution", "mean", "sample")
FP8_MAX = torch.finfo(torch.float8_e4m3fn).max
FP8_NUMBERS = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()  # torch converts six times slower
VALUES_OF_FINGERPRINT = 1024  # of each tensor of an encoder

Size = tuple[int, int, int]  # frames, height, width in pixels


def size_of(bucket: Bucket) -> Size:
    """(frames, height, width) of a bucket; two buckets of one size share their clips."""
    return bucket.num_frames, bucket.height, bucket.width


# ------------------------------------------------------------- stored values


class Stored(NamedTuple):
    """Values as they lie in a shard; `scale`, float32 of their first dimensions, is there for fp8 alone."""

    values: Tensor
    scale: Tensor | None

    def crc32(self) -> int:
        checksum = 0
        for tensor in self:
            if tensor is not None:
                checksum = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy(), checksum)
        return checksum

    def part(self, place: int | slice) -> "Stored":
        """A part of the first dimension."""
        return Stored(self.values[place], None if self.scale is None else self.scale[place])


def store(tensor: Tensor, dtype: str, scaled_dimensions: int) -> Stored:
    """Float values on the CPU as "fp32", "bf16" or "fp8"; the latter with scales for each index of some dimensions.

    A scale is the largest magnitude over 448, e4m3's largest number. Three bits of precision then hold down to 1/28,672
    of the largest, which is why one scale a token serves channels of very different size.

    Args:
        scaled_dimensions: how many of the first dimensions have scales of their own.
    """
    if dtype != "fp8":
        return Stored(tensor.to(STORED_DTYPES[dtype]).contiguous(), None)
    tensor = tensor.float()
    largest = tensor.abs().flatten(scaled_dimensions).amax(-1)
    scale = (largest / FP8_MAX).clamp_min(torch.finfo(torch.float32).tiny)
    scaled = (tensor / _spread(scale, tensor)).clamp(-FP8_MAX, FP8_MAX)
    return Stored(scaled.to(STORED_DTYPES["fp8"]).contiguous(), scale)


def restore(stored: Stored) -> Tensor:
    """The values, float32 or bfloat16; those of fp8 in bfloat16, which is more precise than they are."""
    if stored.scale is None:
        return stored.values
    places = stored.values.view(torch.uint8).flatten().int()
    values = FP8_NUMBERS.index_select(0, places).reshape(stored.values.shape)
    return values.mul_(_spread(stored.scale, values)).to(torch.bfloat16)


def _spread(scale: Tensor, values: Tensor) -> Tensor:
    return scale.reshape(*scale.shape, *[1] * (values.ndim - scale.ndim))


# ------------------------------------------------------------- what made them


@dataclass(frozen=True)
class Codec:
    """What made stored values, and what makes latents and text states of them.

    Attributes:
        autoencoder, text_encoder: names or paths, as configured.
        autoencoder_weights, text_encoder_weights: their fingerprints.
        latent_channels, downsample: channels of a latent, and pixels of a side for one of them.
        shift_factor, scaling_factor: from the posterior to latents, see `draw_latents`.
        posterior: "distribution", "mean" or "sample"; "none" where the autoencoder has none.
        latents, text: "fp32", "bf16" or "fp8".
        text_channels, max_length: channels of a token's state, and tokens of a caption at most.
        computed_in: the encoders' own precision.
    """

    autoencoder: str
    autoencoder_weights: str
    text_encoder: str
    text_encoder_weights: str
    latent_channels: int
    downsample: int
    shift_factor: float
    scaling_factor: float
    posterior: str
    latents: str
    text: str
    text_channels: int
    max_length: int
    computed_in: str

    @classmethod
    def of(cls, config: "TrainConfig", vae: FrameAutoencoder, texts: TextEncoder, computed_in: str) -> "Codec":
        """That of a configuration and its encoders."""
        return cls(
            autoencoder=config.vae.from_pretrained,
            autoencoder_weights=fingerprint(vae),
            text_encoder=config.text_encoder.from_pretrained,
            text_encoder_weights=fingerprint(texts),
            latent_channels=vae.latent_channels,
            downsample=vae.downsample,
            shift_factor=vae.shift_factor,
            scaling_factor=vae.scaling_factor,
            posterior=config.features.posterior if vae.uses_posterior_noise else "none",
            latents=config.features.latents,
            text=config.features.text,
            text_channels=texts.channels,
            max_length=texts.max_length,
            computed_in=computed_in,
        )

    @property
    def parts(self) -> int:
        """P: mean and standard deviation, or one tensor alone."""
        return 2 if self.posterior == "distribution" else 1

    def clip_shape(self, size: Size) -> tuple[int, ...]:
        """[P, C, T, h, w] of a clip."""
        frames, height, width = size
        return self.parts, self.latent_channels, frames, height // self.downsample, width // self.downsample

    def clip_bytes(self, size: Size) -> int:
        """Stored bytes of a clip."""
        scales = 4 * self.parts * self.latent_channels if self.latents == "fp8" else 0
        return int(np.prod(self.clip_shape(size))) * STORED_DTYPES[self.latents].itemsize + scales

    @property
    def token_bytes(self) -> int:
        """Stored bytes of a token."""
        return self.text_channels * STORED_DTYPES[self.text].itemsize + (4 if self.text == "fp8" else 0)

    def check_weights(self, made: "Codec", folder: Path) -> None:
        """Raises ConfigError unless the encoders' weights are those of `made`, the codec of a folder of features."""
        for key, setting in (("autoencoder", "vae"), ("text_encoder", "text_encoder")):
            if getattr(self, f"{key}_weights") != getattr(made, f"{key}_weights"):
                remedy = (
                    f"its weights are not those that the features at {folder} were made with "
                    f"({getattr(made, key)!r}); use these, or encode into another folder"
                )
                raise ConfigError(f"{setting}.from_pretrained", getattr(self, key), remedy)


def fingerprint(encoder: nn.Module) -> str:
    """A hash of the names and shapes of an encoder's tensors and of about a thousand values of each.

    Values count as bfloat16, so it is the same on any device and in any precision that encoders run in.
    """
    digest = hashlib.blake2b(digest_size=8)
    for name, tensor in sorted(encoder.state_dict().items()):
        flat = tensor.detach().flatten()
        picked = flat[:: max(1, len(flat) // VALUES_OF_FINGERPRINT)].to("cpu", torch.bfloat16)
        digest.update(f"{name}{list(tensor.shape)}".encode())
        digest.update(picked.contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


# ------------------------------------------------------------------- writing


class _Clips(NamedTuple):
    """Some clips of one size, [k, P, C, T, h, w], and what is known of each."""

    stored: Stored
    samples: list[int]
    crops: list[int]
    starts: list[int]


class ShardBuilder:
    """The samples of one part of the table while they are encoded, and the shard that they become.

    Args:
        codec: how values are stored.
    """

    def __init__(self, codec: Codec):
        self.codec = codec
        self._clips: dict[Size, list[_Clips]] = {}
        self._texts: dict[int, Stored] = {}
        self._bad: list[tuple] = []

    @property
    def samples(self) -> list[int]:
        """Rows that have a clip, ascending."""
        return sorted({row for batches in self._clips.values() for batch in batches for row in batch.samples})

    def add_clips(self, size: Size, values: Tensor, samples: list[int], crops: list[int], starts: list[int]) -> None:
        """What is to be stored of k clips of a size, float [k, P, C, T, h, w] on the CPU."""
        if samples:
            stored = store(values, self.codec.latents, scaled_dimensions=3)
            self._clips.setdefault(size, []).append(_Clips(stored, samples, crops, starts))

    def add_bad(self, size: Size, sample: int, crop: int, reason: str) -> None:
        """A clip that there cannot be, and why."""
        self._bad.append((*size, sample, crop, reason))

    def add_text(self, sample: int, states: Tensor) -> None:
        """A caption's states, float [tokens, channels] on the CPU."""
        self._texts[sample] = store(states, self.codec.text, scaled_dimensions=1)

    def tensors(self) -> dict[str, Tensor]:
        """The shard's tensors by name."""
        tensors = self._text_tensors() if self._texts else {}
        for size, batches in self._clips.items():
            name = clips_name(size)
            tensors |= _joined(name, name, [batch.stored for batch in batches])
            for column in ("samples", "crops", "starts"):
                numbers = [number for batch in batches for number in getattr(batch, column)]
                tensors[f"{name}.{column}"] = torch.tensor(numbers)
            checksums = [batch.stored.part(i).crc32() for batch in batches for i in range(len(batch.samples))]
            tensors[f"{name}.crc32"] = torch.tensor(checksums)
        return tensors

    def _text_tensors(self) -> dict[str, Tensor]:
        samples = sorted(self._texts)
        texts = [self._texts[sample] for sample in samples]
        return _joined("text.states", "text", texts) | {
            "text.bounds": torch.tensor([0, *(len(text.values) for text in texts)]).cumsum(0),
            "text.samples": torch.tensor(samples),
            "text.crc32": torch.tensor([text.crc32() for text in texts]),
        }

    def write(self, path: Path, plan: str) -> None:
        """Writes the shard, whole or not at all.

        Args:
            plan: the digest of the division of work that it belongs to.

        Raises:
            ConfigError: the disk refuses.
        """
        # One entry: safetensors writes several in any order, and equal samples should make equal files.
        about = {"features": json.dumps({"plan": plan, "bad": self._bad})}
        try:
            with whole_file(path, durable=True) as draft:
                save_file(self.tensors(), draft, metadata=about)
        except (OSError, SafetensorError) as error:
            remedy = f"{path.name} was not written ({error}); mend that and start again: all finished shards stay"
            raise ConfigError("features.path", str(path.parent.parent), remedy) from error


def clips_name(size: Size) -> str:
    """The name of the tensor with the clips of a size."""
    return "latents." + "x".join(map(str, size))


def _joined(name: str, base: str, parts: list[Stored]) -> dict[str, Tensor]:
    tensors = {name: torch.cat([part.values for part in parts])}
    if parts[0].scale is not None:
        tensors[f"{base}.scale"] = torch.cat([part.scale for part in parts])
    return tensors


# ------------------------------------------------------------------- reading


class Shard:
    """A shard, memory-mapped: nothing is read before it is asked for.

    Args:
        path: the file.
        size: bytes that it should have, where that is known.

    Attributes:
        about: its plan, and bad: [frames, height, width, sample, crop, reason] of each clip that there cannot be.
        names: of its tensors.

    Raises:
        BadSample: it is missing, truncated, or its header cannot be read.
    """

    def __init__(self, path: Path, size: int | None = None):
        self.name = path.name
        if (fault := fault_of(path, size)) is not None:
            raise self.damaged(fault)
        try:
            self._content = safe_open(path, "pt")
            self.about = json.loads(self._content.metadata()["features"])
            self.names = set(self._content.keys())
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
            raise self.damaged(f"cannot be read ({error})") from error
        self._tensors: dict[str, Tensor] = {}

    def damaged(self, what: str) -> BadSample:
        """The exception for a sample that `what` makes unusable."""
        return BadSample(f"damaged features: {self.name} {what}")

    def __getitem__(self, name: str) -> Tensor:
        """A tensor by name, a view of the file."""
        if name not in self._tensors:
            if name not in self.names:
                raise self.damaged(f"has no {name}")
            self._tensors[name] = self._content.get_tensor(name)
        return self._tensors[name]

    def column(self, name: str) -> np.ndarray:
        """As `shard[name]`, of one dimension, in numpy; without entries where the shard has no such tensor."""
        return self[name].numpy() if name in self.names else np.empty(0, dtype=np.int64)

    def clip(self, size: Size, place: int, crc32: int) -> Stored:
        """The clip of a size at a place, [P, C, T, h, w]; BadSample if its checksum is another."""
        name = clips_name(size)
        return self._checked(name, name, slice(place, place + 1), crc32).part(0)

    def text(self, start: int, tokens: int, crc32: int) -> Stored:
        """A caption's states, [tokens, channels]; BadSample if their checksum is another."""
        return self._checked("text.states", "text", slice(start, start + tokens), crc32)

    def _checked(self, name: str, base: str, places: slice, crc32: int) -> Stored:
        scale = f"{base}.scale"
        stored = Stored(self[name], self[scale] if scale in self.names else None).part(places)
        if len(stored.values) != places.stop - places.start or stored.crc32() != crc32:
            raise self.damaged(f"has a wrong checksum in {name}")
        return stored

    @property
    def sizes(self) -> list[Size]:
        """Of the clips in it."""
        names = [name.split(".") for name in self.names if name.startswith("latents.")]
        return sorted(tuple(map(int, name[1].split("x"))) for name in names if len(name) == 2)

    def verify(self) -> None:
        """Reads everything; BadSample for the first wrong checksum."""
        bounds = self.column("text.bounds")
        for start, tokens, crc32 in zip(bounds, np.diff(bounds), self.column("text.crc32"), strict=False):
            self.text(int(start), int(tokens), int(crc32))
        for size in self.sizes:
            for place, crc32 in enumerate(self.column(f"{clips_name(size)}.crc32")):
                self.clip(size, place, int(crc32))


def fault_of(path: Path, size: int | None) -> str | None:
    """What is wrong with a shard as far as its folder tells: it is missing, or of another size than it should be."""
    try:
        found = path.stat().st_size
    except OSError:
        return "is missing"
    return f"has {found} of {size} bytes" if size is not None and found != size else None
