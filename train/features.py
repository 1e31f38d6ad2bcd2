"""Features: latents and text states that were encoded once, and lie in shards that training streams.

FOLDER/
  features.json      the settings that they were made with, the codec, the shards, how many and how large they are
  samples.parquet    num_frames, height, width and fps of each row of the data table, so that no file is looked up
  index.parquet      a line for each sample, size and crop: where it lies, its checksums; it comes last
  shards/part-00000.safetensors ...        see `shards.py`

They are made by `python -m stdit_fast.train.encode`.
"""

import functools
import hashlib
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet
import torch
from torch import Tensor

from stdit_fast.encoders.autoencoder import FrameAutoencoder, draw_latents
from stdit_fast.encoders.text import TextEncoder, TextStates
from stdit_fast.errors import ConfigError
from stdit_fast.media.files import whole_file
from stdit_fast.media.read import BadSample
from stdit_fast.model.config import IMAGE_FPS
from stdit_fast.train.buckets import Bucket, Buckets
from stdit_fast.train.metadata import Metadata
from stdit_fast.train.shards import Codec, Shard, Size, clips_name, fault_of, restore, size_of

if TYPE_CHECKING:
    from stdit_fast.train.config import TrainConfig

VERSION = 1
COMMAND = "python -m stdit_fast.train.encode"
SIZES = ("num_frames", "height", "width")
OPEN_SHARDS = 512  # that a process keeps mapped: address space, and a few objects each

logger = logging.getLogger(__name__)


# ------------------------------------------------------------------ the folder


def read_about(folder: Path, key: str = "features.path") -> dict | None:
    """The content of features.json; None where no features were begun.

    Raises:
        ConfigError: it cannot be read, or is of another version.
    """
    path = folder / "features.json"
    if not path.is_file():
        return None
    try:
        about = json.loads(path.read_text())
        version = about["version"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(key, str(folder), f"its features.json cannot be read ({error}); encode anew") from error
    if version != VERSION:
        remedy = f"it has version {version} of the format, and this program reads {VERSION}; encode anew"
        raise ConfigError(key, str(folder), remedy)
    return about


def write_about(folder: Path, about: dict) -> None:
    """Writes features.json, whole or not at all."""
    with whole_file(folder / "features.json", durable=True) as draft:
        draft.write_text(json.dumps(about, indent=1) + "\n")


def read_samples(folder: Path) -> dict[str, np.ndarray]:
    """num_frames, height, width (int32) and fps (float32) of the data table's rows, as `load_metadata` takes them."""
    table = read_parquet(folder, "samples.parquet")
    return {name: table[name].to_numpy() for name in (*SIZES, "fps")}


def write_samples(folder: Path, metadata: Metadata) -> None:
    """Keeps what `read_samples` answers."""
    write_parquet(folder, "samples.parquet", pa.table({name: getattr(metadata, name) for name in (*SIZES, "fps")}))


def read_parquet(folder: Path, name: str, columns: list[str] | None = None) -> pa.Table:
    """A table of the folder; ConfigError if it cannot be read."""
    try:
        return pa.parquet.read_table(folder / name, columns=columns)
    except (OSError, pa.ArrowException) as error:
        remedy = f"its {name} cannot be read ({error}); delete that file and encode again: shards stay"
        raise ConfigError("features.path", str(folder), remedy) from error


def write_parquet(folder: Path, name: str, table: pa.Table) -> None:
    """Writes a table of the folder, whole or not at all."""
    with whole_file(folder / name, durable=True) as draft:
        pa.parquet.write_table(table, draft)


def table_digest(metadata: Metadata) -> str:
    """A hash of the data table's paths and captions, in their order."""
    digest = hashlib.blake2b(digest_size=8)
    for column in (metadata.path, metadata.text):
        lengths = hashlib.blake2b(digest_size=8)  # apart: where a column's chunks end means nothing
        for chunk in column.chunks:
            lengths.update(pc.fill_null(pc.binary_length(chunk), -1).to_numpy(zero_copy_only=False))
            _, bounds, values = chunk.buffers()
            if len(chunk) and values is not None:
                first, last = np.frombuffer(bounds, dtype=np.int32)[[chunk.offset, chunk.offset + len(chunk)]]
                digest.update(memoryview(values)[first:last])
        digest.update(lengths.digest())
    return digest.hexdigest()


# ------------------------------------------------------------------ the index

INDEX = pa.schema(
    [
        ("sample", pa.int64()),  # row of the data table
        *((name, pa.int32()) for name in SIZES),  # of the clip, in frames and pixels
        ("crop", pa.int32()),
        ("start", pa.int32()),  # first frame in its file
        ("fps", pa.float32()),  # frames a second that are shown; 120 for images
        ("shard", pa.int32()),  # its place in features.json's list
        ("tensor", pa.string()),
        ("place", pa.int32()),  # in the tensor; -1: there is no such clip
        ("crc32", pa.int64()),
        ("text_start", pa.int64()),  # in text.states
        ("tokens", pa.int32()),
        ("text_crc32", pa.int64()),
        ("reason", pa.string()),  # why there is none
    ]
)
# What training keeps of it: 38 bytes a clip, which all data workers of a process share.
ENTRY = np.dtype(
    [("sample", "i4"), ("size", "i2"), ("crop", "i4"), ("shard", "i4"), ("place", "i4"), ("crc32", "u4")]
    + [("text_start", "i8"), ("tokens", "i4"), ("text_crc32", "u4")]
)


def index_of(shard: Shard, number: int, fps: np.ndarray, frame_interval: int) -> pa.Table:
    """A shard's lines of the index, ascending by sample, size and crop.

    Args:
        number: of the shard.
        fps: frames a second of each row of the data table.
    """
    parts = [_lines(shard, size) for size in shard.sizes] + [_bad_lines(shard)]
    columns = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    shown = np.where(columns["num_frames"] == 1, IMAGE_FPS, fps[columns["sample"]] / frame_interval)
    columns |= {"fps": shown, "shard": np.full(len(shown), number)}
    order = np.lexsort([columns[name] for name in ("crop", *reversed(SIZES), "sample")])
    return pa.table([pa.array(columns[field.name][order]).cast(field.type) for field in INDEX], schema=INDEX)


def _lines(shard: Shard, size: Size) -> dict[str, np.ndarray]:
    """Of the clips of a size, without `fps` and `shard`."""
    name = clips_name(size)
    samples, bounds = shard.column(f"{name}.samples"), shard.column("text.bounds")
    text = np.searchsorted(shard.column("text.samples"), samples)
    constants = dict(zip(SIZES, size, strict=True)) | {"tensor": name, "reason": None}
    columns = {
        "sample": samples,
        "crop": shard.column(f"{name}.crops"),
        "start": shard.column(f"{name}.starts"),
        "place": np.arange(len(samples)),
        "crc32": shard.column(f"{name}.crc32"),
        "text_start": bounds[text],
        "tokens": bounds[text + 1] - bounds[text],
        "text_crc32": shard.column("text.crc32")[text],
    }
    return columns | {key: np.full(len(samples), value) for key, value in constants.items()}


def _bad_lines(shard: Shard) -> dict[str, np.ndarray]:
    """Of the clips that there cannot be."""
    bad = shard.about["bad"]
    numbers = np.array([line[:-1] for line in bad], dtype=np.int64).reshape(-1, 5)
    columns = {name: numbers[:, i] for i, name in enumerate((*SIZES, "sample", "crop"))}
    constants = dict.fromkeys(("start", "crc32", "text_start", "tokens", "text_crc32"), 0) | {"place": -1}
    columns |= {key: np.full(len(bad), value) for key, value in constants.items()}
    return columns | {"tensor": np.full(len(bad), None), "reason": np.array([line[-1] for line in bad], dtype=object)}


def sizes_of(index: pa.Table) -> tuple[list[Size], np.ndarray]:
    """The sizes of an index's clips, ascending, and for each line the place of its own among them."""
    frames, height, width = (index[name].to_numpy().astype(np.int64) for name in SIZES)
    encoded = pa.array(frames << 40 | height << 20 | width).dictionary_encode()  # by hash: there may be many lines
    found = [(key >> 40, key >> 20 & 0xFFFFF, key & 0xFFFFF) for key in encoded.dictionary.to_pylist()]
    sizes = sorted(found)
    places = np.array([sizes.index(size) for size in found], dtype=np.int64)
    return sizes, places[encoded.indices.to_numpy()]


# ------------------------------------------------------------------- reading


class Features:
    """A folder of finished features, for training.

    Args:
        folder: made by `python -m stdit_fast.train.encode`.
        key: the setting that names it, for messages.

    Attributes:
        codec: what the values are.
        made_with: the settings that they were made with, by key.
        samples: num_frames, height, width and fps of the data table's rows, as `load_metadata` takes them.
        sizes: (frames, height, width) of clips -> number of that size.
        shards: name and bytes of each.
        entries: an ENTRY for each sample, size and crop, ascending.

    Raises:
        ConfigError: nothing there, not finished, or of another version.
    """

    def __init__(self, folder: str | Path, key: str = "features.path"):
        self.folder, self.key = Path(folder), key
        about = read_about(self.folder, key)
        if about is None:
            remedy = f"there are no features; make them with `{COMMAND}` and this configuration"
            raise ConfigError(key, str(folder), remedy)
        if about["shards"] is None or not (self.folder / "index.parquet").is_file():
            remedy = f"they are not finished; the command that began them (`{COMMAND}`) goes on where it stopped"
            raise ConfigError(key, str(folder), remedy)
        self.codec, self.made_with, self.table = Codec(**about["codec"]), about["made_with"], about["table"]
        self.samples = read_samples(self.folder)
        self.shards: list[tuple[str, int]] = [(shard["name"], shard["bytes"]) for shard in about["shards"]]
        self._read_index()
        self._open = functools.lru_cache(OPEN_SHARDS)(self._open_shard)
        self._named: set[str] = set()

    def _read_index(self) -> None:
        columns = [name for name in INDEX.names if name in (*ENTRY.names, *SIZES, "reason")]
        table = read_parquet(self.folder, "index.parquet", columns)
        sizes, numbers = sizes_of(table)
        self.sizes: dict[Size, int] = {size: number for number, size in enumerate(sizes)}
        self.entries = np.empty(len(table), dtype=ENTRY)
        for name in ENTRY.names:
            self.entries[name] = numbers if name == "size" else table[name].to_numpy()
        self._rows = np.ascontiguousarray(self.entries["sample"])
        bad = np.flatnonzero(self.entries["place"] < 0)
        self._reasons = dict(zip(bad.tolist(), table["reason"].take(pa.array(bad)).to_pylist(), strict=True))

    def _find(self, sample: int, size: Size, crop: int) -> int | None:
        """The place in `entries`."""
        first, last = np.searchsorted(self._rows, [sample, sample + 1])
        entries = self.entries[first:last]
        found = np.flatnonzero((entries["size"] == self.sizes.get(size, -1)) & (entries["crop"] == crop))
        return int(first + found[0]) if len(found) else None

    def holds(self, sample: int, bucket: Bucket) -> bool:
        """Whether a sample was encoded for a bucket, be it that nothing could be made of it."""
        return self._find(sample, size_of(bucket), 0) is not None

    def load(self, sample: int, bucket: Bucket, epoch: int, noise: Callable[[], Tensor]) -> dict[str, Tensor]:
        """A sample's latents and caption in an epoch; of several crops the epochs take one after the other.

        Args:
            sample: the row.
            bucket: the size.
            noise: makes a posterior's noise, float32 [C, T, h, w].

        Returns:
            latents float32 [C, T, h, w]; text_states [tokens, channels], bfloat16 or float32; tokens int64 [].

        Raises:
            BadSample: nothing could be made of the sample when it was encoded, or its shard is damaged.
        """
        found = self._find(sample, size_of(bucket), 0 if bucket.is_image else epoch % self.made_with["features.crops"])
        if found is None:
            raise BadSample(f"not encoded: the features have no clip for bucket {bucket.name}")
        if found in self._reasons:
            raise BadSample(self._reasons[found])
        entry = self.entries[found]
        try:
            shard = self._open(int(entry["shard"]))
            clip = restore(shard.clip(size_of(bucket), int(entry["place"]), int(entry["crc32"])))
            text = restore(shard.text(int(entry["text_start"]), int(entry["tokens"]), int(entry["text_crc32"])))
        except BadSample as error:
            self._warn(self.shards[entry["shard"]][0], error)
            raise
        mean, std, drawn = (*clip, noise()) if self.codec.parts == 2 else (clip[0], None, None)
        latents = draw_latents(mean, std, drawn, self.codec.shift_factor, self.codec.scaling_factor)
        return {"latents": latents, "text_states": text, "tokens": torch.tensor(len(text))}

    def _open_shard(self, number: int) -> Shard:
        name, size = self.shards[number]
        return Shard(self.folder / "shards" / name, size)

    def warn_of_faults(self) -> None:
        """Names the shards that are missing or truncated; nothing is read."""
        for name, size in self.shards:
            if fault := fault_of(self.folder / "shards" / name, size):
                self._warn(name, BadSample(f"damaged features: {name} {fault}"))

    def _warn(self, shard: str, error: BadSample) -> None:
        """Names a damaged shard, once a process."""
        if shard not in self._named:
            self._named.add(shard)
            logger.warning(
                "%s, in %s: other samples take the place of those that cannot be read. `%s` with "
                "--features.verify true makes damaged shards anew.",
                *(error.reason, self.folder, COMMAND),
            )

    # ----------------------------------------------- what a run must have in common with them

    def check(self, config: "TrainConfig", metadata: Metadata, buckets: Buckets) -> None:
        """Holds the features against a run's settings, data table and buckets; for encoders there is `check_encoders`.

        Raises:
            ConfigError: the first that does not fit.
        """
        for key, value in (
            ("text_encoder.model_max_length", config.text_encoder.model_max_length),
            ("dataset.frame_interval", config.dataset.frame_interval),
        ):
            if value != self.made_with[key]:
                raise ConfigError(key, value, self._remedy(f"were made with {self.made_with[key]}"))
        if config.model.in_channels != self.codec.latent_channels:
            remedy = self._remedy(f"have {self.codec.latent_channels}")
            raise ConfigError("model.in_channels", config.model.in_channels, remedy)
        if table_digest(metadata) != self.table["digest"]:
            of_training = self.key == "features.path"
            key = "dataset.data_path" if of_training else "validation.data_path"
            value = config.dataset.data_path if of_training else config.validation.data_path
            made_of = (
                f"were made of {self.table['path']}, {self.table['rows']} rows; this table's {len(metadata.text)} "
            )
            raise ConfigError(key, value, self._remedy(f"{made_of}have other paths, captions or another order"))
        self._check_buckets(metadata, buckets)

    def _check_buckets(self, metadata: Metadata, buckets: Buckets) -> None:
        interval = self.made_with["dataset.frame_interval"]
        rows, places = buckets.possible(metadata.num_frames, metadata.height, metadata.width, interval)
        absent = places[~self._covers(rows, places, buckets)]
        if not len(absent):
            return
        numbers, counts = np.unique(absent, return_counts=True)
        named = [f"{buckets[i].name} ({count})" for i, count in zip(numbers[:5], counts[:5], strict=True)]
        more = ", ..." if len(numbers) > 5 else ""
        remedy = self._remedy(f"lack clips of samples that may go to {', '.join(named)}{more}")
        raise ConfigError("buckets", list(dict.fromkeys(bucket.resolution for bucket in buckets)), remedy)

    def _covers(self, rows: np.ndarray, places: np.ndarray, buckets: Buckets) -> np.ndarray:
        """`holds` for many rows and places in the table of buckets: bool [pairs]."""
        numbers = np.array([self.sizes.get(size_of(bucket), -1) for bucket in buckets])[places]
        first_crops = self.entries[self.entries["crop"] == 0]
        held = first_crops["sample"].astype(np.int64) * len(self.sizes) + first_crops["size"]
        wanted = rows * len(self.sizes) + numbers
        return (numbers >= 0) & (held[np.searchsorted(held, wanted).clip(max=len(held) - 1)] == wanted)

    def check_encoders(self, config: "TrainConfig", vae: FrameAutoencoder | None, texts: TextEncoder | None) -> None:
        """Holds the run's encoders against those of the features: by weights where they are loaded, else by name.

        Raises:
            ConfigError: they are others.
        """
        if vae is not None:
            Codec.of(config, vae, texts, self.codec.computed_in).check_weights(self.codec, self.folder)
            return
        for key, made in (("vae", self.codec.autoencoder), ("text_encoder", self.codec.text_encoder)):
            if (name := getattr(config, key).from_pretrained) != made:
                raise ConfigError(f"{key}.from_pretrained", name, self._remedy(f"were made with {made!r}"))

    def _remedy(self, what: str) -> str:
        return f"the features at {self.folder} {what}. Use what they have, or make others with `{COMMAND}`"


# --------------------------------------------------------------- for the model


@dataclass
class StoredTexts:
    """Stands where a text encoder would, when all text states are stored.

    Attributes:
        channels, max_length: as the encoder's.
        truncated: 0; captions that were cut were counted when they were encoded.
    """

    channels: int
    max_length: int
    truncated: int = 0


def pad_texts(states: Tensor, tokens: Tensor, max_length: int, dtype: torch.dtype) -> TextStates:
    """Captions that stand one after another, as an encoder gives them: padded, with a mask.

    Args:
        states: [sum of tokens, channels].
        tokens: int64 [B] on the CPU, the captions' lengths.
        max_length: L, tokens of a caption at most.
        dtype: of the states to return.

    Returns:
        States [B, 1, L, channels] on the device of `states`, and the mask [B, L] on the CPU.
    """
    device, captions = states.device, torch.arange(len(tokens), device=states.device)
    lengths = tokens.to(device, non_blocking=True)
    shifts = captions * max_length - (lengths.cumsum(0) - lengths)  # of a caption's tokens, from packed to padded
    caption = torch.repeat_interleave(captions, lengths, output_size=len(states))  # so that nothing waits for a GPU
    padded = states.new_zeros(len(tokens) * max_length, states.shape[1], dtype=dtype)
    padded.index_copy_(0, torch.arange(len(states), device=device) + shifts[caption], states.to(dtype))
    mask = torch.arange(max_length) < tokens[:, None]
    return TextStates(padded.unflatten(0, mask.shape).unsqueeze(1), mask.long())
