"""What is to be encoded, divided into parts of which each becomes a shard, and how clips of it are decoded."""

import hashlib
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import pyarrow.compute as pc
import torch
from torch import Tensor
from torch.utils.data import Dataset

from stdit_fast.errors import ConfigError
from stdit_fast.media.read import BadSample
from stdit_fast.train.buckets import Bucket, Buckets
from stdit_fast.train.dataset import clip_start, empty_pixels, read_clip
from stdit_fast.train.metadata import Metadata
from stdit_fast.train.randomness import sample_rng
from stdit_fast.train.shards import Codec, size_of

PIXELS_AT_ONCE = 2**22  # decoded together: what keeps a GPU busy, in 48 MiB; the autoencoder may divide it further
BYTES_BESIDE = 64  # for each clip and caption, in the shard: its row, place and checksum


class ClipRequest(NamedTuple):
    """Clips of one part and size that are decoded and encoded together: rows of the table, and numbers of crops."""

    part: int
    bucket: Bucket
    samples: list[int]
    crops: list[int]

    @property
    def pixels(self) -> int:
        """Of all frames of all clips."""
        return len(self.samples) * int(np.prod(size_of(self.bucket)))


class Plan:
    """All clips of a table, divided into parts.

    It follows from the table (sizes, and lengths of captions), the buckets and what is stored of a clip, and from
    nothing else: any number of processes makes the same parts, in any order.

    Args:
        metadata, buckets, frame_interval: as training has them.
        codec: what is stored of a clip and a token.
        crops: clips of each video and size; an image has one.
        limit: bytes of a part at most, unless a single sample has more.

    Attributes:
        sizes: a bucket of each size.
        rows, size: int64 [pairs], each sample with each size that a bucket may give it (a place in `sizes`), ascending.
        clips: int64 [pairs], how many crops there are of each.
        first: int64 [samples], each sample's first pair.
        bounds: int64 [parts + 1], where in them each part begins, and the end.
        digest: a hash of all of this.

    Raises:
        ConfigError: no sample fits a bucket.
    """

    def __init__(
        self, metadata: Metadata, buckets: Buckets, *, frame_interval: int, codec: Codec, crops: int, limit: int
    ):
        by_size = {size_of(bucket): bucket for bucket in buckets}
        self.sizes = [by_size[size] for size in sorted(by_size)]
        self.codec, self.crops = codec, crops
        rows, places = buckets.possible(metadata.num_frames, metadata.height, metadata.width, frame_interval)
        if not len(rows):
            resolutions = list(dict.fromkeys(bucket.resolution for bucket in buckets))
            remedy = (
                f"none of the {len(metadata)} samples fits. The buckets need, at frame_interval {frame_interval}:\n"
            )
            raise ConfigError("buckets", resolutions, remedy + buckets.requirements(frame_interval))
        numbers = {size: number for number, size in enumerate(sorted(by_size))}
        number_of = np.array([numbers[size_of(bucket)] for bucket in buckets])
        pairs = np.sort(rows * len(numbers) + number_of[places])
        pairs = pairs[np.diff(pairs, prepend=-1) > 0]  # two buckets may have one size
        self.rows, self.size = np.divmod(pairs, len(numbers))
        self.first = np.flatnonzero(np.diff(self.rows, prepend=-1))
        self.clips = np.array([self.crops_of(bucket) for bucket in self.sizes])[self.size]
        self.bounds = self._divide(metadata, limit)
        self.digest = self._digest()

    def crops_of(self, bucket: Bucket) -> int:
        """Clips of a sample in a bucket; an image has nothing to choose from."""
        return 1 if bucket.is_image else self.crops

    @property
    def parts(self) -> int:
        return len(self.bounds) - 1

    def part(self, number: int) -> slice:
        """The pairs of a part."""
        return slice(self.bounds[number], self.bounds[number + 1])

    @property
    def clip_bytes(self) -> np.ndarray:
        """Stored bytes of all clips of each pair, int64 [pairs]."""
        of_size = np.array([self.codec.clip_bytes(size_of(bucket)) for bucket in self.sizes], dtype=np.int64)
        return (of_size[self.size] + BYTES_BESIDE) * self.clips

    @property
    def pixels(self) -> np.ndarray:
        """Pixels of all frames of all clips of each pair, int64 [pairs]."""
        of_size = np.array([np.prod(size_of(bucket)) for bucket in self.sizes], dtype=np.int64)
        return of_size[self.size] * self.clips

    def _divide(self, metadata: Metadata, limit: int) -> np.ndarray:
        lengths = pc.fill_null(pc.binary_length(metadata.text), 0).to_numpy()[self.rows[self.first]].astype(np.int64)
        # At most, without asking the tokenizer: a token stands for a byte or more, but for a few special ones.
        tokens = np.minimum(lengths + 8, self.codec.max_length)
        of_sample = np.add.reduceat(self.clip_bytes, self.first) + tokens * self.codec.token_bytes + BYTES_BESIDE
        ends = np.cumsum(of_sample)
        bounds = [0]
        while bounds[-1] < len(ends):
            begun = ends[bounds[-1] - 1] if bounds[-1] else 0
            bounds.append(max(bounds[-1] + 1, int(np.searchsorted(ends, begun + limit, side="right"))))
        return np.append(self.first, len(self.rows))[bounds]

    def _digest(self) -> str:
        digest = hashlib.blake2b(repr([size_of(bucket) for bucket in self.sizes]).encode(), digest_size=8)
        for array in (self.rows, self.size, self.clips, self.bounds):
            digest.update(np.ascontiguousarray(array, dtype=np.int64))
        return digest.hexdigest()

    def requests(self, parts: list[int], pixels_at_once: int = PIXELS_AT_ONCE) -> Iterator[ClipRequest]:
        """The clips of these parts, part by part; clips of one size stand together."""
        for part in parts:
            rows, sizes = self.rows[self.part(part)], self.size[self.part(part)]
            for size in np.unique(sizes):
                bucket = self.sizes[size]
                clips = [(int(row), crop) for row in rows[sizes == size] for crop in range(self.crops_of(bucket))]
                step = max(1, pixels_at_once // int(np.prod(size_of(bucket))))
                for start in range(0, len(clips), step):
                    samples, crops = zip(*clips[start : start + step], strict=True)
                    yield ClipRequest(part, bucket, list(samples), list(crops))


class ClipDataset(Dataset):
    """Decodes the clips of a request: ``dataset[request]``.

    Crop n begins where training without features begins it in epoch n, and has that epoch's noise.

    A batch is a dict: pixels uint8 [k, T, H, W, 3] of the k clips that can be used, None where there is none; noise
    float32 [k, C, T, h, w], where one sample of a posterior is stored, else None; samples, crops, starts, lists of
    their rows, crops and first frames; bad, dicts of sample, path, reason, crop of the others; request.

    Args:
        metadata, seed, frame_interval: as training has them.
        codec: what is stored.
    """

    def __init__(self, metadata: Metadata, *, seed: int, frame_interval: int, codec: Codec):
        self.metadata, self.seed, self.frame_interval, self.codec = metadata, seed, frame_interval, codec

    def __getitem__(self, request: ClipRequest) -> dict:
        batch = {key: [] for key in ("noise", "samples", "crops", "starts", "bad")}
        pixels = empty_pixels(len(request.samples), request.bucket)
        for row, crop in zip(request.samples, request.crops, strict=True):
            sample = self.metadata.row(row)
            start = clip_start(sample, request.bucket, self.frame_interval, sample_rng(self.seed, crop, row, "crop"))
            try:
                place = pixels[len(batch["samples"])].numpy()
                read_clip(place, sample, request.bucket, start, self.frame_interval)
            except BadSample as error:
                batch["bad"].append({"sample": row, "path": sample.path, "reason": error.reason, "crop": crop})
                continue
            if self.codec.posterior == "sample":
                batch["noise"].append(self._noise(request.bucket, row, crop))
            for key, value in (("samples", row), ("crops", crop), ("starts", start)):
                batch[key].append(value)
        batch["noise"] = torch.stack(batch["noise"]) if batch["noise"] else None
        batch["pixels"] = pixels[: len(batch["samples"])] if batch["samples"] else None
        return batch | {"request": request}

    def _noise(self, bucket: Bucket, row: int, crop: int) -> Tensor:
        rng = sample_rng(self.seed, crop, row, "posterior_noise")
        return torch.from_numpy(rng.standard_normal(self.codec.clip_shape(size_of(bucket))[1:], dtype=np.float32))
