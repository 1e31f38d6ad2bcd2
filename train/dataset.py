"""From a request of the sampler to a batch of clips, captions and everything random that belongs to them."""

import hashlib
import math
import os
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from stdit_fast.media.read import BadSample, decode_frames_into, decode_image_into, is_image
from stdit_fast.model.config import IMAGE_FPS
from stdit_fast.parallel.sequence import part_of
from stdit_fast.train.buckets import Bucket, Buckets
from stdit_fast.train.features import Features
from stdit_fast.train.metadata import Metadata, Sample
from stdit_fast.train.randomness import sample_rng
from stdit_fast.train.sampler import BatchRequest, BucketSampler


class NoGoodSample(RuntimeError):
    """Neither the samples of a batch nor those that could replace them can be used."""


class VideoTextDataset(Dataset):
    """Loads whole batches: ``dataset[request]``.

    Everything random about a sample is keyed by (seed, epoch, row), so it is the same in any batch, on any number of
    ranks and after any resume.

    A batch is a dict of tensors on the CPU, stacked over the B samples of one bucket:
    pixels uint8 [B, T, H, W, 3] (`from_pixels` makes a video of them); text list[str]; x_mask bool [B, T], False where
    a frame is a condition;
    timestep int64 [B]; noise float32 [B, C, T, H//8, W//8]; posterior_noise, shaped alike, or None; drop_caption bool
    [B]; num_frames, height, width (pixels), ar (height / width), fps (frames a second that are shown; 120 for images),
    float32 [B]; samples int64 [B], the rows that were used; bucket, its index; request, the BatchRequest; bad, a list
    of dict(sample, path, reason) of the samples that had to be replaced.

    Of a batch that several ranks share, each gets its own frames of pixels, x_mask, noise, posterior_noise and latents,
    and the first one `bad`; there are also counted float32 [B], the frames of the whole samples that are no conditions,
    and fingerprint, an integer that is the same on all of them.

    Args:
        metadata: the table of samples.
        buckets: the buckets that the requests refer to.
        seed: of everything random.
        frame_interval: one frame in so many is used.
        mask_sampler: (num_frames, rng) -> bool [T], False where a frame is a condition; images are never masked.
        timestep_sampler: rng -> int, a diffusion timestep.
        caption_dropout: share of the samples that are trained without their caption.
        latent_channels, downsample: channels of the autoencoder's latents, and pixels of a side for one of theirs.
        posterior_noise: whether the autoencoder draws its latents, and batches bring the noise for it.
        features: what was encoded before; no file of a sample is opened then. Batches have, instead of pixels and
            posterior_noise, latents float32 [B, C, T, H//8, W//8], text_states [sum of tokens, channels] (bfloat16 or
            float32, the captions one after another) and tokens int64 [B]; all the rest is drawn as without features.
    """

    def __init__(
        self,
        metadata: Metadata,
        buckets: Buckets,
        *,
        seed: int,
        frame_interval: int,
        mask_sampler: Callable[[int, np.random.Generator], np.ndarray],
        timestep_sampler: Callable[[np.random.Generator], int],
        caption_dropout: float,
        latent_channels: int = 4,
        downsample: int = 8,
        posterior_noise: bool = False,
        features: Features | None = None,
    ):
        self.metadata, self.buckets, self.seed, self.frame_interval = metadata, buckets, seed, frame_interval
        self.mask_sampler, self.timestep_sampler = mask_sampler, timestep_sampler
        self.caption_dropout, self.posterior_noise = caption_dropout, posterior_noise
        self.latent_channels, self.downsample = latent_channels, downsample
        self.features = features

    def __len__(self) -> int:
        return len(self.metadata)

    def __getitem__(self, request: BatchRequest) -> dict[str, Any]:
        """Loads the samples of a request; a bad one is replaced by a spare, or by a good one of the same batch.

        Raises:
            NoGoodSample: all samples and spares are bad.
        """
        bucket = self.buckets[request.bucket]
        spares, bad = self._usable(request.spares.tolist(), bucket), []
        rows = request.samples.tolist()
        pixels = None if self.features is not None else empty_pixels(len(rows), bucket)
        places = [None] * len(rows) if pixels is None else list(pixels.numpy())
        good = [
            self._load_or_replace(row, spares, request.epoch, bucket, bad, place)
            for row, place in zip(rows, places, strict=True)
        ]
        usable = [i for i, item in enumerate(good) if item is not None]
        if not usable:
            raise NoGoodSample(_no_good_sample(bucket, bad))
        used = [i if item is not None else usable[i % len(usable)] for i, item in enumerate(good)]
        batch = {key: _join(key, [good[i][key] for i in used]) for key in good[usable[0]]}
        if pixels is not None:
            for place, i in enumerate(used):
                if place != i:
                    pixels[place] = pixels[i]
            batch["pixels"] = pixels
        batch |= {"bucket": request.bucket, "request": request, "bad": bad}
        return batch if request.parts == 1 else _own_part(batch, request)

    def _usable(self, spares: list[int], bucket: Bucket) -> Iterator[int]:
        """Those that can be had in the bucket's size: features may not have it of samples of other buckets."""
        return (row for row in spares if self.features is None or self.features.holds(row, bucket))

    def _load_or_replace(self, row: int, spares, epoch: int, bucket: Bucket, bad: list[dict], place) -> dict | None:
        while row is not None:
            sample = self.metadata.row(row)
            try:
                return self._load(sample, epoch, bucket, place)
            except BadSample as error:
                bad.append({"sample": row, "path": sample.path, "reason": error.reason})
            row = next(spares, None)
        return None

    def _load(self, sample: Sample, epoch: int, bucket: Bucket, place: np.ndarray | None) -> dict[str, Any]:
        """All of a sample but its pixels, which are written to `place`, [T, H, W, 3], unless there are features."""

        def rng(purpose: str) -> np.random.Generator:
            return sample_rng(self.seed, epoch, sample.index, purpose)

        length = bucket.num_frames
        mask = np.ones(1, dtype=bool) if bucket.is_image else self.mask_sampler(length, rng("mask"))
        latent_shape = self.latent_channels, length, bucket.height // self.downsample, bucket.width // self.downsample

        def normal(purpose: str) -> torch.Tensor:
            return torch.from_numpy(rng(purpose).standard_normal(latent_shape, dtype=np.float32))

        if self.features is None:
            start = clip_start(sample, bucket, self.frame_interval, rng("crop"))
            read_clip(place, sample, bucket, start, self.frame_interval)
            content = {"posterior_noise": normal("posterior_noise") if self.posterior_noise else None}
        else:
            content = self.features.load(sample.index, bucket, epoch, lambda: normal("posterior_noise"))
        return content | {
            "text": sample.text,
            "x_mask": torch.from_numpy(np.asarray(mask, dtype=bool)),
            "timestep": torch.tensor(int(self.timestep_sampler(rng("timestep"))), dtype=torch.int64),
            "noise": normal("noise"),
            "drop_caption": torch.tensor(rng("caption").random() < self.caption_dropout),
            "num_frames": torch.tensor(float(length)),
            "height": torch.tensor(float(bucket.height)),
            "width": torch.tensor(float(bucket.width)),
            "ar": torch.tensor(bucket.height / bucket.width),
            "fps": torch.tensor(IMAGE_FPS if bucket.is_image else sample.fps / self.frame_interval),
            "samples": torch.tensor(sample.index, dtype=torch.int64),
        }


def clip_start(sample: Sample, bucket: Bucket, frame_interval: int, rng: np.random.Generator) -> int:
    """The first frame of a sample's clip, anywhere that leaves enough frames; 0 where there is no choice."""
    spare_frames = sample.num_frames - (bucket.num_frames - 1) * frame_interval
    return 0 if bucket.is_image or spare_frames < 1 else int(rng.integers(spare_frames))


def empty_pixels(count: int, bucket: Bucket) -> torch.Tensor:
    """uint8 [count, T, H, W, 3] for clips of a bucket, where a data worker's parent finds them without a copy."""
    shape = count, bucket.num_frames, bucket.height, bucket.width, 3
    if get_worker_info() is None:
        return torch.empty(shape, dtype=torch.uint8)
    shared = torch.UntypedStorage._new_shared(math.prod(shape))
    return torch.empty(0, dtype=torch.uint8).set_(shared).view(shape)


def read_clip(pixels: np.ndarray, sample: Sample, bucket: Bucket, start: int, frame_interval: int) -> None:
    """Writes a sample's frames from `start` on, as its bucket wants them, into `pixels`, uint8 [T, H, W, 3].

    Raises:
        BadSample: the file cannot be used, or has too few frames; `pixels` hold anything then.
    """
    if is_image(sample.path):
        if not bucket.is_image:
            raise BadSample(f"too short: an image, where {bucket.num_frames} frames are needed")
        decode_image_into(pixels, sample.path)
        return
    if bucket.is_image:
        try:  # an image may have any name; else it is a clip of one frame
            decode_image_into(pixels, sample.path)
        except BadSample:
            decode_frames_into(pixels, sample.path, np.zeros(1, dtype=np.int64))
        return
    if sample.num_frames <= (bucket.num_frames - 1) * frame_interval:
        raise BadSample(f"too short: {sample.num_frames} frames")
    decode_frames_into(pixels, sample.path, start + np.arange(bucket.num_frames) * frame_interval)


def _join(key: str, values: list) -> Any:
    if isinstance(values[0], torch.Tensor):
        return torch.cat(values) if key == "text_states" else torch.stack(values)
    return None if values[0] is None else values


def _own_part(batch: dict[str, Any], request: BatchRequest) -> dict[str, Any]:
    """A rank's frames of a batch that it shares.

    All of them were loaded: a file that breaks off has to be replaced by the same spare on all ranks.
    """
    part = part_of(batch["x_mask"].shape[1], request.parts, request.part)
    more = {"counted": batch["x_mask"].sum(1).float(), "fingerprint": fingerprint(batch)}
    for key in ("noise", "posterior_noise", "latents"):
        if batch.get(key) is not None:
            more[key] = batch[key][:, :, part].contiguous()
    for key in ("pixels", "x_mask"):
        if key in batch:
            more[key] = batch[key][:, part]
    if request.part:
        more["bad"] = []
    return batch | more


def fingerprint(batch: dict[str, Any]) -> int:
    """63 bits of what a batch holds; not of pixels, which follow from the rows, nor of noise, likewise."""
    request: BatchRequest = batch["request"]
    hashed = hashlib.blake2b(
        f"{request.epoch}/{request.index}/{request.bucket}/{request.parts}".encode(), digest_size=8
    )
    for key in ("samples", "timestep", "x_mask", "drop_caption", "num_frames", "height", "width", "fps"):
        hashed.update(batch[key].numpy().tobytes())
    hashed.update("\0".join(batch["text"]).encode())
    return int.from_bytes(hashed.digest(), "little") >> 1


def _no_good_sample(bucket: Bucket, bad: list[dict]) -> str:
    reasons = Counter(entry["reason"].partition(":")[0] for entry in bad)
    return (
        f"bucket {bucket.name}: none of the {len(bad)} samples that were tried can be used "
        f"({', '.join(f'{reason}: {count}' for reason, count in reasons.most_common())}); "
        f"the first is {bad[0]['path']} ({bad[0]['reason']})"
    )


def make_loader(
    dataset: VideoTextDataset,
    sampler: BucketSampler,
    *,
    num_workers: int,
    pin_memory: bool,
    prefetch_factor: int = 2,
) -> DataLoader:
    """Batches in the sampler's order, from its present position on, without end.

    Args:
        dataset, sampler: what to load, in which order.
        num_workers: processes that decode; 0 decodes in this one.
        pin_memory: whether batches lie in page-locked memory, for copies to a GPU.
        prefetch_factor: batches that each process keeps ready.
    """
    processes = {}
    if num_workers:
        # Forked workers share the table of samples, which may be gigabytes, with this process.
        processes = {"prefetch_factor": prefetch_factor, "multiprocessing_context": "fork"}
    return _Loader(
        dataset,
        batch_size=None,
        sampler=sampler,
        num_workers=num_workers,
        pin_memory=pin_memory,
        collate_fn=_unchanged,
        worker_init_fn=_start_worker,
        # Of its own, because the loader draws from it: the global generator's state belongs to the training.
        generator=torch.Generator(),
        **processes,
    )


class _Loader(DataLoader):
    """A loader whose workers run no signal handlers of the training process.

    torchrun and Slurm send SIGTERM to all processes of a job, and the training process then saves a checkpoint: a
    worker that died of it would raise in the middle of that. So a worker leaves when its own parent says so, and
    otherwise goes on until the parent closes it or is gone.
    """

    def __iter__(self):
        # Blocked from before the fork, so that every thread of a worker has it blocked; torch starts some early.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        try:
            return super().__iter__()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _unchanged(batch: dict) -> dict:
    return batch


def _start_worker(worker_id: int) -> None:
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_leave_when_told, daemon=True).start()


def _leave_when_told() -> None:
    parent = os.getppid()
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)
