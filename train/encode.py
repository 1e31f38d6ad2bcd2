"""Encodes a data table into features, once: the latents and text states that training then reads.

    python -m stdit_fast.train.encode --config FILE --dataset.data_path TABLE --features.path FOLDER
    torchrun --nproc_per_node 8 -m stdit_fast.train.encode ...

The configuration is the training's own. Each sample is encoded in every size that its buckets may give it, and its
caption once. After a kill the same command goes on, with any number of processes: finished shards stay. What a folder
of features holds is told in `features.py` and `shards.py`.
"""

import itertools
import logging
import os
import shutil
import sys
import time
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from stdit_fast.arguments import bar_options, check_output_folder, start_log
from stdit_fast.encoders.autoencoder import FrameAutoencoder, draw_latents
from stdit_fast.encoders.text import TextEncoder
from stdit_fast.errors import ConfigError
from stdit_fast.media.pixels import from_pixels
from stdit_fast.media.read import BadSample
from stdit_fast.parallel.processes import Processes, launch
from stdit_fast.train.bad_samples import BadSamples, TooManyBadSamples
from stdit_fast.train.build import build_encoders, encoder_dtype
from stdit_fast.train.config import TrainConfig, check_weights, get, make_buckets, parse
from stdit_fast.train.dataset import make_loader
from stdit_fast.train.encode_plan import BYTES_BESIDE, ClipDataset, Plan
from stdit_fast.train.features import (
    COMMAND,
    VERSION,
    index_of,
    read_about,
    read_samples,
    sizes_of,
    table_digest,
    write_about,
    write_parquet,
    write_samples,
)
from stdit_fast.train.metadata import Metadata, load_metadata
from stdit_fast.train.shards import STORED_DTYPES, Codec, Shard, ShardBuilder, size_of

# The settings of which a folder of features holds one, beside the encoders, table and buckets; the others may change
# from one start to the next.
MADE_WITH = (
    *("text_encoder.model_max_length", "dataset.frame_interval", "seed"),
    *("features.crops", "features.latents", "features.text", "features.posterior", "features.shard_mib"),
)
CAPTIONS_AT_ONCE = 64
PROBES, PROBE_SECONDS = 8, 10.0  # batches of the timed start, or one a decoding process; its time, about
SECONDS_BETWEEN_LISTINGS = 2.0
SPEED = ("samples_per_second", "clips_per_second", "seconds", "made_on")
MIB = 2**20

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """What a start works with.

    Attributes:
        folder: of the features.
        table: path, rows and digest of the data table.
    """

    config: TrainConfig
    processes: Processes
    folder: Path
    metadata: Metadata
    table: dict
    vae: FrameAutoencoder
    texts: TextEncoder
    codec: Codec
    plan: Plan

    @property
    def machine(self) -> str:
        """How many of what compute."""
        device = torch.cuda.get_device_name() if self.processes.device.type == "cuda" else "cpu"
        return f"{self.processes.world_size} x {device}"

    @property
    def dataset(self) -> ClipDataset:
        interval = self.config.dataset.frame_interval
        return ClipDataset(self.metadata, seed=self.config.seed, frame_interval=interval, codec=self.codec)

    def shard(self, part: int) -> Path:
        return self.folder / "shards" / shard_name(part)


def shard_name(part: int) -> str:
    return f"part-{part:05d}.safetensors"


def encode(config: TrainConfig, processes: Processes) -> dict | None:
    """Makes what there is not yet of the features that `config` describes. All processes take part.

    Returns:
        The statistics, as features.json has them, on the main process.

    Raises:
        ConfigError: whatever of the configuration, the data, the weights or the disk cannot be.
        TooManyBadSamples: more samples than `dataset.max_bad_share` allows cannot be used.
    """
    job = prepare(config, processes)
    parts = parts_to_do(job)
    encoder = Encoder(job)
    if parts and processes.is_main:
        need = estimate(job, encoder, parts)
        announce(job, len(parts), need)
        check_disk(job, need)
    processes.barrier()
    started, progress = time.perf_counter(), Progress(job, parts)
    work = Work(job, encoder, progress)
    try:
        work.run(parts[processes.rank :: processes.world_size])
        while not progress.all_there():  # not a barrier, which runs out of time: another's part may take longer
            time.sleep(0.2)
    finally:
        progress.bar.close()
    seconds = time.perf_counter() - started
    samples, clips, truncated = processes.sum([work.samples, work.clips, job.texts.truncated])
    if not processes.is_main:
        return None
    if truncated:
        print(f"{truncated:.0f} captions were cut to {job.codec.max_length} tokens")
    speed = dict(zip(SPEED, (samples / seconds, clips / seconds, seconds, job.machine), strict=True))
    return finish(job, speed if parts else None)


# ------------------------------------------------------------------ before


def prepare(config: TrainConfig, processes: Processes) -> Job:
    """Reads the table, loads the encoders, plans the parts, and begins the folder, or checks the one that was begun.

    Raises:
        ConfigError: whatever of the configuration cannot be, or is not what the folder was begun with.
    """
    if config.features.path is None:
        raise ConfigError("features.path", None, "name the folder that the features shall lie in")
    check_weights(config, encoders=True)
    check_output_folder("features.path", config.features.path)
    folder = Path(config.features.path)
    begun = read_about(folder)
    if begun is not None:
        _check_settings(begun["made_with"], config, folder)
    metadata = _load_table(config, processes, None if begun is None else read_samples(folder))
    table = {"path": config.dataset.data_path, "rows": len(metadata.text), "digest": table_digest(metadata)}
    if begun is not None and table["digest"] != begun["table"]["digest"]:
        remedy = f"{_begun_with(folder)} another table, {begun['table']['path']}, or its rows have changed since"
        raise ConfigError("dataset.data_path", table["path"], remedy + "; use that, or name another features.path")
    vae, texts = build_encoders(config, processes.device)
    dtype = encoder_dtype(processes.device)
    codec = Codec.of(config, vae, texts, next(name for name, each in STORED_DTYPES.items() if each == dtype))
    if begun is not None:
        codec.check_weights(Codec(**begun["codec"]), folder)
    plan = Plan(
        metadata,
        make_buckets(config),
        frame_interval=config.dataset.frame_interval,
        codec=codec,
        crops=config.features.crops,
        limit=int(config.features.shard_mib * MIB),
    )
    if begun is not None and begun["plan"] != plan.digest:
        remedy = f"{_begun_with(folder)} others; use those, or name another features.path"
        raise ConfigError("buckets", list(config.buckets), remedy)
    job = Job(config, processes, folder, metadata, table, vae, texts, codec, plan)
    processes.barrier()  # every process has seen whether there was a beginning
    if begun is None and processes.is_main:
        _begin(job)
    return job


def _check_settings(begun: dict, config: TrainConfig, folder: Path) -> None:
    for key in MADE_WITH:
        if begun[key] != get(config, key):
            remedy = f"{_begun_with(folder)} {begun[key]!r}; use that, or name another features.path"
            raise ConfigError(key, get(config, key), remedy)


def _begun_with(folder: Path) -> str:
    return f"the features at {folder} were begun with"


def _load_table(config: TrainConfig, processes: Processes, known: dict | None) -> Metadata:
    if not processes.is_main:
        processes.barrier()  # the main process looks up what is missing; the others find its cache
    dataset = config.dataset
    metadata = load_metadata(dataset.data_path, cache_dir=dataset.cache_dir, progress=processes.is_main, known=known)
    if processes.is_main:
        processes.barrier()
    return metadata


def _begin(job: Job) -> None:
    """Writes what later starts compare with; features.json last, since it says that the rest is there."""
    about = {
        "version": VERSION,
        "made_with": {key: get(job.config, key) for key in MADE_WITH},
        "codec": asdict(job.codec),
        "table": job.table,
        "plan": job.plan.digest,
        "shards": None,
        "statistics": {},
    }
    try:
        write_samples(job.folder, job.metadata)
        write_about(job.folder, about)
    except OSError as error:
        raise ConfigError("features.path", str(job.folder), f"it cannot be written to ({error})") from error


def parts_to_do(job: Job) -> list[int]:
    """The parts that have no shard, on every process. What a killed start left, and damaged shards, are removed.

    Raises:
        ConfigError: a shard of other features lies there.
    """
    shards, processes = job.folder / "shards", job.processes
    if processes.is_main:
        shards.mkdir(exist_ok=True)
        for debris in (*shards.glob(".part-*"), *job.folder.glob(".*.parquet.*"), *job.folder.glob(".features.json.*")):
            debris.unlink(missing_ok=True)
    processes.barrier()
    found = set(os.listdir(shards))
    own = range(processes.rank, job.plan.parts, processes.world_size)
    missing = [part for part in own if shard_name(part) not in found or not _is_whole(job, part)]
    return sorted(itertools.chain.from_iterable(processes.gather_objects(missing)))


def _is_whole(job: Job, part: int) -> bool:
    try:
        shard = Shard(job.shard(part))
        if job.config.features.verify:
            shard.verify()
    except BadSample as error:
        logger.warning("%s: it is made anew", error.reason)
        job.shard(part).unlink()
        return False
    if shard.about["plan"] != job.plan.digest:
        remedy = f"{shard.name} belongs to other features; name another folder, or clear this one"
        raise ConfigError("features.path", str(job.folder), remedy)
    return True


# ------------------------------------------------------------------ the estimate


@dataclass(frozen=True)
class Estimate:
    """Of what is left to do: bytes, the latents' exactly, and seconds for one process."""

    latent_bytes: int
    text_bytes: int
    seconds: float

    @property
    def bytes(self) -> int:
        return self.latent_bytes + self.text_bytes


def estimate(job: Job, encoder: "Encoder", parts: list[int]) -> Estimate:
    """A timed start with some clips and captions, evenly spread."""
    pairs = np.concatenate([np.arange(job.plan.bounds[part], job.plan.bounds[part + 1]) for part in parts])
    rows = job.plan.rows[pairs]
    rows = rows[np.diff(rows, prepend=-1) > 0]
    tokens, seconds_a_caption = _time_captions(job, encoder, rows)
    decoding, encoding = _time_clips(job, encoder, parts)
    pixels, workers = int(job.plan.pixels[pairs].sum()), job.config.dataset.num_workers
    computing = encoding * pixels + seconds_a_caption * len(rows)
    return Estimate(
        latent_bytes=int(job.plan.clip_bytes[pairs].sum()),
        text_bytes=int(len(rows) * (tokens * job.codec.token_bytes + BYTES_BESIDE)),
        seconds=max(computing, decoding * pixels / workers) if workers else computing + decoding * pixels,
    )


def _time_captions(job: Job, encoder: "Encoder", rows: np.ndarray) -> tuple[float, float]:
    """(tokens, seconds) of a caption, on average."""
    chosen = rows[np.linspace(0, len(rows) - 1, min(len(rows), CAPTIONS_AT_ONCE)).astype(int)]
    captions = [job.metadata.row(row).text for row in chosen]
    truncated = job.texts.truncated
    encoder.captions(captions[:1])  # warms up
    started = time.perf_counter()
    tokens = sum(len(states) for states in encoder.captions(captions))
    job.texts.truncated = truncated  # they are encoded again
    return tokens / len(captions), (time.perf_counter() - started) / len(captions)


class _Timed(Dataset):
    """Another data set, whose batches say how long they took to decode."""

    def __init__(self, dataset: ClipDataset):
        self.dataset = dataset

    def __getitem__(self, request) -> dict:
        started = time.perf_counter()
        batch = self.dataset[request]
        return batch | {"seconds": time.perf_counter() - started}


def _time_clips(job: Job, encoder: "Encoder", parts: list[int]) -> tuple[float, float]:
    """Seconds that it takes one process to decode a pixel while the others do so too, and this one to encode it."""
    workers = job.config.dataset.num_workers
    probes = max(PROBES, workers)  # processes that decode take from each other: all do
    some = [parts[i] for i in np.unique(np.linspace(0, len(parts) - 1, probes).astype(int))]
    requests = list(job.plan.requests(some))
    chosen = [requests[i] for i in np.unique(np.linspace(0, len(requests) - 1, probes).astype(int))]
    loader = make_loader(
        _Timed(job.dataset),
        chosen,
        num_workers=workers,
        pin_memory=job.processes.device.type == "cuda",
        prefetch_factor=1,
    )
    begun, pixels, decoding, encoding = time.perf_counter(), 0, 0.0, 0.0
    for batch in loader:
        if not pixels:
            encoder.clips(batch)  # warms up
        started = time.perf_counter()
        encoder.clips(batch)
        pixels += batch["request"].pixels
        decoding += batch["seconds"]
        encoding += time.perf_counter() - started
        if time.perf_counter() - begun > PROBE_SECONDS:
            break
    return decoding / pixels, encoding / pixels


def announce(job: Job, parts: int, need: Estimate) -> None:
    """Says what is going to be done, and about how much disk and time it takes."""
    plan, codec, free = job.plan, job.codec, shutil.disk_usage(job.folder).free
    there = f", {plan.parts - parts} of them finished" if parts < plan.parts else ""
    duration = timedelta(seconds=round(need.seconds / job.processes.world_size))
    print(
        f"{len(plan.first)} samples, {plan.clips.sum()} clips of {len(set(plan.size.tolist()))} sizes; "
        f"shards: {plan.parts}{there}; latents in {codec.latents}, posterior: {codec.posterior}, text in {codec.text}\n"
        f"about {readable(need.bytes)} to write (latents {readable(need.latent_bytes)}, text "
        f"{readable(need.text_bytes)}; {readable(free)} free), about {duration} on {job.machine}",
        flush=True,
    )


def check_disk(job: Job, need: Estimate) -> None:
    """Raises ConfigError where the disk has no room for what is to be written."""
    free = shutil.disk_usage(job.folder).free
    if need.bytes > free:
        remedy = (
            f"{readable(need.bytes)} are to be written, and its disk has {readable(free)} free; make room, or store "
            "less: features.latents and features.text fp8, features.posterior mean, fewer features.crops"
        )
        raise ConfigError("features.path", str(job.folder), remedy)


# ------------------------------------------------------------------ the work


class Encoder:
    """Makes what is stored of decoded clips and of captions."""

    def __init__(self, job: Job):
        self.vae, self.texts, self.codec, self.device = job.vae, job.texts, job.codec, job.processes.device

    def clips(self, batch: dict) -> Tensor | None:
        """float32 [k, P, C, T, h, w] on the CPU of a batch of ClipDataset; None where it has no clip."""
        if batch["pixels"] is None:
            return None
        posterior = self.vae.posterior(from_pixels(batch["pixels"].to(self.device, non_blocking=True)))
        if self.codec.posterior == "sample":
            # Neither shifted nor scaled: that comes when it is read, as for a mean.
            posterior = draw_latents(*posterior.unbind(1), batch["noise"].to(self.device), 0.0, 1.0)[:, None]
        return posterior[:, : self.codec.parts].cpu()

    def captions(self, captions: list[str]) -> list[Tensor]:
        """The states of each caption's tokens, [tokens, channels] on the CPU."""
        encoded = self.texts.encode(captions)
        masks = encoded.mask.bool()
        used = int(masks.any(0).nonzero().max()) + 1  # what is beyond it is padding, and much
        states, masks = encoded.states[:, 0, :used].cpu(), masks[:, :used]
        return [of_caption[mask] for of_caption, mask in zip(states, masks, strict=True)]


class Work:
    """Encodes parts, one after the other, and counts.

    Attributes:
        samples, clips: encoded by this process in this start.
    """

    def __init__(self, job: Job, encoder: Encoder, progress: "Progress"):
        self.job, self.encoder, self.progress = job, encoder, progress
        self.samples = self.clips = 0
        self.bad_samples = BadSamples(job.folder / "bad_samples.jsonl", job.config.dataset.max_bad_share)

    def run(self, parts: list[int]) -> None:
        """Encodes parts into their shards.

        Raises:
            ConfigError: the disk refuses, or the text encoder gives what is not finite.
            TooManyBadSamples: more samples than `dataset.max_bad_share` allows cannot be used.
        """
        if not parts:
            return
        job, settings = self.job, self.job.config.dataset
        loader = make_loader(
            job.dataset,
            job.plan.requests(parts),
            num_workers=settings.num_workers,
            pin_memory=job.processes.device.type == "cuda",
            prefetch_factor=settings.prefetch_factor,
        )
        for part, batches in itertools.groupby(loader, lambda batch: batch["request"].part):
            builder = ShardBuilder(job.codec)
            for batch in batches:
                self._add_clips(builder, batch)
            self._add_captions(builder)
            builder.write(job.shard(part), job.plan.digest)
            self.samples += len(builder.samples)
            self.progress.wrote(part)

    def _add_clips(self, builder: ShardBuilder, batch: dict) -> None:
        request, values, bad = batch["request"], self.encoder.clips(batch), list(batch["bad"])
        size, good = size_of(request.bucket), []
        for place, row in enumerate(batch["samples"]):
            if values[place].isfinite().all():
                good.append(place)
                continue
            path, reason = self.job.metadata.row(row).path, "not finite: what the autoencoder makes of it"
            bad.append({"sample": row, "path": path, "reason": reason, "crop": batch["crops"][place]})
        if good:
            columns = ([batch[key][place] for place in good] for key in ("samples", "crops", "starts"))
            builder.add_clips(size, values[good], *columns)
        for entry in bad:
            builder.add_bad(size, entry["sample"], entry["crop"], entry["reason"])
        self.clips += len(good)
        self.progress.encoded(len(request.samples))
        self.bad_samples.record(bad, seen=len(good))

    def _add_captions(self, builder: ShardBuilder) -> None:
        """Those of all samples that have a clip; captions of one length together, to spare padding."""
        captions = {row: self.job.metadata.row(row).text for row in builder.samples}
        rows = sorted(captions, key=lambda row: (len(captions[row]), row))
        for start in range(0, len(rows), CAPTIONS_AT_ONCE):
            some = rows[start : start + CAPTIONS_AT_ONCE]
            for row, states in zip(some, self.encoder.captions([captions[row] for row in some]), strict=True):
                if not states.isfinite().all():
                    name = self.job.config.text_encoder.from_pretrained
                    remedy = f"its states of the caption of row {row} are not finite; are its weights whole?"
                    raise ConfigError("text_encoder.from_pretrained", name, remedy)
                builder.add_text(row, states)


class Progress:
    """The progress bar over the clips of all processes; shards of the others are seen in the folder.

    Args:
        parts: those that had no shard at the start.
    """

    def __init__(self, job: Job, parts: list[int]):
        self.shards, self.left = job.folder / "shards", set(parts)
        self.clips_of = np.add.reduceat(job.plan.clips, job.plan.bounds[:-1])
        self.finished = int(self.clips_of.sum() - self.clips_of[parts].sum())  # clips in shards
        self.under_way = 0  # clips of this process's part
        self.listed = time.monotonic()
        self.bar = tqdm(
            desc="encoding",
            total=int(self.clips_of.sum()),
            initial=self.finished,
            unit="clip",
            disable=not job.processes.is_main,
            **bar_options(),
        )

    def encoded(self, clips: int) -> None:
        """This process encoded clips."""
        self.under_way += clips
        if time.monotonic() - self.listed > SECONDS_BETWEEN_LISTINGS:
            self.all_there()
        self._show()

    def wrote(self, part: int) -> None:
        """This process wrote a shard."""
        self.under_way = 0
        self._finish({part})
        self._show()

    def all_there(self) -> bool:
        """Looks for shards of other processes."""
        self.listed, found = time.monotonic(), set(os.listdir(self.shards))
        self._finish({part for part in self.left if shard_name(part) in found})
        self._show()
        return not self.left

    def _finish(self, parts: set[int]) -> None:
        self.left -= parts
        self.finished += sum(int(self.clips_of[part]) for part in parts)

    def _show(self) -> None:
        self.bar.update(max(0, self.finished + self.under_way - self.bar.n))


# ------------------------------------------------------------------ after


def finish(job: Job, speed: dict | None) -> dict:
    """Writes the index, the list of unusable samples and features.json; answers the statistics in the latter.

    Args:
        speed: the SPEED of this start; None where it had nothing to do, and that of an earlier one stays.
    """
    parts, interval = range(job.plan.parts), job.config.dataset.frame_interval
    tables = [index_of(Shard(job.shard(part)), part, job.metadata.fps, interval) for part in parts]
    index, about = pa.concat_tables(tables), read_about(job.folder)
    shards = [{"name": shard_name(part), "bytes": job.shard(part).stat().st_size} for part in parts]
    earlier = {key: value for key, value in about["statistics"].items() if key in SPEED}
    statistics = count(index, sum(shard["bytes"] for shard in shards), job.codec) | (speed or earlier)
    _list_bad_samples(job, index)
    write_parquet(job.folder, "index.parquet", index)
    write_about(job.folder, about | {"shards": shards, "statistics": statistics})
    return statistics


def count(index: pa.Table, total: int, codec: Codec) -> dict:
    """Samples, clips, tokens and bytes of an index whose shards have `total` bytes, in all and a sample."""
    good = index.filter(pc.greater_equal(index["place"], 0))
    first = np.flatnonzero(np.diff(good["sample"].to_numpy(), prepend=-1))
    sizes, numbers = sizes_of(good)
    clips = zip(sizes, np.bincount(numbers).tolist(), strict=True)
    tokens = int(good["tokens"].to_numpy()[first].sum())
    amounts = {
        "bytes": total,
        "latent_bytes": sum(codec.clip_bytes(size) * number for size, number in clips),
        "text_bytes": tokens * codec.token_bytes,
    }
    counts = {"samples": len(first), "clips": len(good), "bad_clips": len(index) - len(good), "tokens": tokens}
    return counts | amounts | {f"{key}_per_sample": value / max(len(first), 1) for key, value in amounts.items()}


def _list_bad_samples(job: Job, index: pa.Table) -> None:
    """bad_samples.jsonl as the shards have it: damaged ones were made anew, and samples may have been mended."""
    file = job.folder / "bad_samples.jsonl"
    file.unlink(missing_ok=True)
    bad = index.filter(pc.less(index["place"], 0)).select(["sample", "reason"]).to_pylist()
    named = [entry | {"path": job.metadata.row(entry["sample"]).path} for entry in bad]
    BadSamples(file, max_share=1.0).record(named, seen=len(index) - len(bad))


def describe(statistics: dict) -> str:
    """The statistics for people."""
    sizes = {key: readable(statistics[key]) for key in statistics if "bytes" in key}
    lines = [
        f"{statistics['samples']} samples, {statistics['clips']} clips, {sizes['bytes']}: "
        f"{sizes['bytes_per_sample']} a sample (latents {sizes['latent_bytes_per_sample']}, text "
        f"{sizes['text_bytes_per_sample']})"
    ]
    if "made_on" in statistics:
        speed = f"{statistics['samples_per_second']:.1f} samples/s, {statistics['clips_per_second']:.1f} clips/s"
        lines.append(f"{speed} on {statistics['made_on']}")
    if statistics["bad_clips"]:
        lines.append(f"{statistics['bad_clips']} clips could not be made: bad_samples.jsonl names their samples")
    return "\n".join(lines)


def readable(size: float) -> str:
    """Bytes with a unit."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1024
    return f"{size:.3g} TiB" if size < 1000 else f"{size:.0f} TiB"


def main(arguments: list[str] | None = None) -> int:
    """Encodes; 0 when done, 2 for a configuration that cannot be, 1 for too many bad samples, 130 after Ctrl-C."""
    is_main = os.environ.get("RANK", "0") == "0"
    speaks = os.environ.get("LOCAL_RANK", "0") == "0"  # one process a node: what is wrong may be wrong there alone
    start_log(is_main)
    try:
        config = parse(arguments, program=COMMAND, what=__doc__.splitlines()[0])
        processes = launch(config.seed)
        statistics = encode(config, processes)
    except (ConfigError, TooManyBadSamples) as error:
        if speaks:
            print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    except KeyboardInterrupt:
        if speaks:
            print("stopped; the same command goes on", file=sys.stderr)
        return 130
    processes.close()
    if is_main:
        print(f"{describe(statistics)}\nfeatures: {config.features.path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
