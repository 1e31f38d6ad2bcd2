"""From a configuration to the objects of a run: data, encoders, model, optimizer."""

import logging
from dataclasses import dataclass

import torch
from torch.utils.data import DataLoader

from stdit_fast.diffusion import IDDPM, SCHEDULES, MaskGenerator
from stdit_fast.encoders import load_autoencoder, load_text_encoder
from stdit_fast.encoders.weights import load_pretrained
from stdit_fast.errors import ConfigError, renamed
from stdit_fast.model.config import LEGACY_KEYS
from stdit_fast.model.stdit2 import STDiT2
from stdit_fast.ops.registry import REFERENCE
from stdit_fast.parallel.processes import Processes
from stdit_fast.train.buckets import Buckets
from stdit_fast.train.config import TrainConfig, make_buckets, model_config, weights_format
from stdit_fast.train.dataset import VideoTextDataset, make_loader
from stdit_fast.train.degrees import sequence_sizes
from stdit_fast.train.features import Features, StoredTexts
from stdit_fast.train.metadata import Metadata, load_metadata
from stdit_fast.train.sampler import BucketSampler

logger = logging.getLogger(__name__)


@dataclass
class Data:
    """The samples and the order in which they come."""

    metadata: Metadata
    buckets: Buckets
    sampler: BucketSampler
    dataset: VideoTextDataset

    def loader(self, config: TrainConfig, pin_memory: bool) -> DataLoader:
        """Batches from the sampler's present position on, without end."""
        return make_loader(
            self.dataset,
            self.sampler,
            num_workers=config.dataset.num_workers,
            pin_memory=pin_memory,
            prefetch_factor=config.dataset.prefetch_factor,
        )


def build_data(config: TrainConfig, processes: Processes, diffusion: IDDPM, data_path: str | None = None) -> Data:
    """Reads the metadata and plans the first epoch.

    Batches bring no noise for an autoencoder that samples, unless `dataset.posterior_noise` is set.

    Args:
        data_path: another table than the training one.

    Raises:
        ConfigError: nothing there, or nothing that fits the buckets, the batch sizes or the number of processes, or
            features that do not fit.
    """
    table = data_path or config.dataset.data_path
    key, folder = "features.path", config.features.path
    if data_path is not None:
        key, folder = "features.validation_path", config.features.validation_path
    features = None if folder is None else Features(folder, key)
    buckets = make_buckets(config)
    degrees = sequence_sizes(config.sequence_parallel, buckets, config.model.hidden_size, processes.world_size)
    if not processes.is_main:
        processes.barrier()  # the main process probes what is missing; the others find its cache
    known = None if features is None else features.samples
    metadata = load_metadata(table, cache_dir=config.dataset.cache_dir, progress=processes.is_main, known=known)
    if processes.is_main:
        processes.barrier()
    if features is not None:
        features.check(config, metadata, buckets)
        if processes.is_main:
            features.warn_of_faults()
    sampler = BucketSampler(
        metadata.num_frames,
        metadata.height,
        metadata.width,
        buckets,
        seed=config.seed,
        frame_interval=config.dataset.frame_interval,
        world_size=processes.world_size,
        rank=processes.rank,
        grad_accumulation=config.grad_accumulation,
        drop_last=config.dataset.drop_last,
        degrees=degrees,
    )
    dataset = VideoTextDataset(
        metadata,
        buckets,
        seed=config.seed,
        frame_interval=config.dataset.frame_interval,
        mask_sampler=MaskGenerator(config.mask_ratios).mask,
        timestep_sampler=diffusion.sample_timestep,
        caption_dropout=config.model.class_dropout_prob,
        latent_channels=config.model.in_channels,
        features=features,
    )
    return Data(metadata, buckets, sampler, dataset)


def build_diffusion(config: TrainConfig) -> IDDPM:
    return SCHEDULES[config.scheduler.type](config.scheduler.num_timesteps)


def encoder_dtype(device: torch.device) -> torch.dtype:
    """The precision that encoders run in, and that the model gets text states in."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def build_encoders(config: TrainConfig, device: torch.device):
    """(autoencoder, text encoder), frozen, on `device`; on kernels where they can be served, but for a plain model.

    Raises:
        ConfigError: weights that cannot be read, or latents of another width than the model's.
    """
    dtype = encoder_dtype(device)
    backend = REFERENCE if config.model.backend == REFERENCE else "auto"
    vae = load_autoencoder(
        config.vae.from_pretrained,
        device=device,
        dtype=dtype,
        micro_batch_size=config.vae.micro_batch_size,
        backend=backend,
        key="vae.from_pretrained",
    )
    text = load_text_encoder(
        config.text_encoder.from_pretrained,
        max_length=config.text_encoder.model_max_length,
        device=device,
        dtype=dtype,
        backend=backend,
        key="text_encoder.from_pretrained",
    )
    if vae.latent_channels != config.model.in_channels:
        remedy = f"the autoencoder {config.vae.from_pretrained} gives {vae.latent_channels} channels; use that number"
        raise ConfigError("model.in_channels", config.model.in_channels, remedy)
    return vae, text


def build_encoders_of(config: TrainConfig, device: torch.device, data: list[Data]):
    """What a run on `data` needs of (autoencoder, text encoder): none that features stand for, unless it samples.

    Datasets that decode learn whether the autoencoder wants noise.

    Returns:
        As `build_encoders`, or (None, StoredTexts).

    Raises:
        ConfigError: features that were made with other encoders.
    """
    stored = [part.dataset.features for part in data if part.dataset.features is not None]
    if len(stored) == len(data) and not config.sampling.every:
        codec = stored[0].codec
        vae, texts = None, StoredTexts(codec.text_channels, codec.max_length)
    else:
        vae, texts = build_encoders(config, device)
        for part in data:
            part.dataset.posterior_noise = vae.uses_posterior_noise
    for features in stored:
        features.check_encoders(config, vae, texts)
    return vae, texts


def build_model(config: TrainConfig, caption_channels: int) -> STDiT2:
    """The model in fp32 on the CPU, with its initial or loaded weights.

    Raises:
        ConfigError: unreadable weights, or weights that do not fit, with the list.
    """
    wanted = model_config(config, caption_channels)
    source = config.model.from_pretrained
    if source is None:
        with renamed({"backend": "model.backend"}):
            return STDiT2(wanted)
    kind, backend, key = weights_format(config), config.model.backend, "model.from_pretrained"
    with renamed({"checkpoint": key, "backend": "model.backend"}):
        if kind == "pixart":
            model = STDiT2.from_pixart(source, wanted)
        elif kind == "open-sora":
            model = STDiT2.from_open_sora(source, backend=backend)
        else:
            options = {"backend": backend, "dtype": torch.float32}
            model = load_pretrained(
                key, source, lambda path, local: STDiT2.from_pretrained(path, local_files_only=local, **options)
            )
    for key in ("hidden_size", "depth", "num_heads", "caption_channels", "in_channels", "qk_norm", "model_max_length"):
        found, want = getattr(model.config, key), getattr(wanted, key)
        if found != want:
            raise ConfigError(f"model.{key}", want, f"the weights at {source} have {found}; use that")
    for key in ("input_sq_size", "class_dropout_prob"):
        setattr(model.config, key, getattr(wanted, key))
    for key in LEGACY_KEYS:
        if (choice := getattr(config.model, key)) is not None and choice != getattr(model.config, key):
            raise ConfigError(f"model.{key}", choice, f"the weights at {source} were trained with {not choice}")
    return model


def build_optimizer(config: TrainConfig, model: STDiT2) -> torch.optim.AdamW:
    """Settings and state of the optimizer; its step is the plugins' (`MasterWeights.guarded_step`)."""
    return torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad],
        lr=config.lr,
        betas=tuple(config.adam_betas),
        eps=config.adam_eps,
        weight_decay=config.weight_decay,
    )
