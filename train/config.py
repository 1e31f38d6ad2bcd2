"""The training configuration: one schema, filled from YAML and the command line, checked before anything starts.

Names follow Open-Sora's own configs where it has them (`dataset`, `vae`, `text_encoder`, `scheduler`,
`mask_ratios`, `grad_checkpoint`, `ckpt_every`, `load`).
"""

import dataclasses
import difflib
import importlib.util
import logging
import sys
import typing
from dataclasses import dataclass, field
from pathlib import Path

import torch
import yaml
from jsonargparse import ArgumentParser, Namespace

from stdit_fast.arguments import check_output_folder, check_range, parser_error
from stdit_fast.diffusion import SCHEDULES, MaskGenerator
from stdit_fast.encoders.autoencoder import check_micro_batch_size
from stdit_fast.encoders.weights import check_encoder, check_name
from stdit_fast.errors import ConfigError, nearest, one_line, renamed
from stdit_fast.model.config import STDiT2Config
from stdit_fast.parallel.processes import launched_processes
from stdit_fast.train import bucket_tables
from stdit_fast.train.bucket_tables import BucketTable
from stdit_fast.train.buckets import Buckets
from stdit_fast.train.degrees import check_setting
from stdit_fast.train.shards import POSTERIORS, STORED_DTYPES

logger = logging.getLogger(__name__)

PLUGINS = ("auto", "zero2", "zero2-seq", "ddp")
DTYPES = ("auto", "bf16", "fp32")
# The least that numbers may be.
LEAST: dict[float, tuple[str, ...]] = {
    0: (
        *("lr", "weight_decay", "adam_eps", "grad_clip", "warmup_steps", "sampling.seed"),
        *("dataset.num_workers", "validation.every", "sampling.every"),
    ),
    2**-10: ("features.shard_mib",),
    1: (
        *("steps", "grad_accumulation", "keep_checkpoints", "ckpt_every", "log_every", "max_skipped_in_a_row"),
        *("dead_after", "hang_timeout", "validation.batches_per_bucket", "features.crops"),
        *("dataset.frame_interval", "dataset.prefetch_factor"),
    ),
    2: ("text_encoder.model_max_length",),
    21: ("scheduler.num_timesteps",),  # the last beta is 20 / num_timesteps
}
MODEL_FORMATS = ("auto", "stdit-fast", "open-sora", "pixart")
WEIGHTINGS = ("batch", "sample")
SEEDS = 2**32  # NumPy's generator, which ColossalAI seeds, takes no more
SHOWN_KEYS = 20  # by an error
# What other trainers call it, and what stands here for it.
OTHER_NAMES = {
    **{"learning_rate": "lr", "batch_size": "buckets", "epochs": "steps", "num_epochs": "steps", "max_steps": "steps"},
    **{"output_dir": "outputs", "data": "dataset.data_path", "gradient_checkpointing": "grad_checkpoint"},
}


@dataclass
class DatasetConfig:
    """Where the samples come from.

    Attributes:
        data_path: metadata table, CSV or Parquet, with path and text, and num_frames, height, width, fps where known.
        frame_interval: a clip takes every n-th frame.
        num_workers: decoding processes a rank; 0 decodes in the training process.
        prefetch_factor: batches each worker keeps ready.
        drop_last: drop what fills no batch; false pads by repetition.
        max_bad_share: share of samples that may be unusable before the run stops.
        cache_dir: where probed sizes are kept; beside the table if not given.
    """

    data_path: str | None = None
    frame_interval: int = 3
    num_workers: int = 4
    prefetch_factor: int = 2
    drop_last: bool = True
    max_bad_share: float = 0.05
    cache_dir: str | None = None


@dataclass
class ModelConfig:
    """The transformer.

    Attributes:
        from_pretrained: weights to start from, a path or a hub name.
        format: of those weights: "stdit-fast" (a `save_pretrained` folder), "open-sora" (1.1), "pixart" (alpha),
            or "auto": pixart for a .pth file, stdit-fast for a folder whose config.json is ours, else open-sora.
        input_sq_size: side in pixels at which positions are unscaled.
        in_channels: channels of the autoencoder's latents.
        hidden_size: width of the blocks, a multiple of 12.
        depth: number of blocks.
        num_heads: of each attention; a head has hidden_size / num_heads channels, an even number.
        mlp_ratio: hidden width of the MLP over hidden_size.
        class_dropout_prob: share of captions that are dropped.
        qk_norm: RMS-normalise q and k of both self-attentions.
        qk_norm_legacy: rotate before normalising, as Open-Sora 1.1 did; not given: as the weights want it, else false.
        final_layer_legacy: condition frames pass the final modulation twice, as in Open-Sora 1.1; likewise.
        backend: "auto" (fused kernels where they serve), "fused" (an error where they do not), "reference" (plain
            PyTorch).
    """

    from_pretrained: str | None = None
    format: str = "auto"
    input_sq_size: int = 512
    in_channels: int = 4
    hidden_size: int = 1152
    depth: int = 28
    num_heads: int = 16
    mlp_ratio: float = 4.0
    class_dropout_prob: float = 0.1
    qk_norm: bool = True
    qk_norm_legacy: bool | None = None
    final_layer_legacy: bool | None = None
    backend: str = "auto"


@dataclass
class VaeConfig:
    """The video autoencoder.

    Attributes:
        from_pretrained: path or hub name of a diffusers AutoencoderKL, or "patch-codec", the embedded default.
        micro_batch_size: frames encoded at once; auto: as many as 2 GiB hold, by their size; null: all.
    """

    from_pretrained: str = "patch-codec"
    micro_batch_size: int | str | None = "auto"


@dataclass
class TextEncoderConfig:
    """The text encoder.

    Attributes:
        from_pretrained: path or hub name of a T5 encoder, or "minilm-embeddings", the embedded default.
        model_max_length: tokens of a caption at most.
    """

    from_pretrained: str = "minilm-embeddings"
    model_max_length: int = 200


@dataclass
class FeaturesConfig:
    """Latents and text states that are encoded once, by `python -m stdit_fast.train.encode`, and read by training.

    All but the paths matters to encoding alone: training takes features as they are.

    Attributes:
        path: folder of the features of dataset.data_path; null: training decodes and encodes its samples itself.
        validation_path: folder of those of validation.data_path, where that is given; null: its files are decoded.
        crops: clips of each video and size, of which the epochs take one after the other. The n-th begins where the
            n-th epoch would begin it without features, with the same seed.
        latents: "bf16", "fp32", or "fp8" with a scale a channel.
        text: "bf16", "fp32", or "fp8" with a scale a token.
        posterior: of an autoencoder that has one: "distribution" (mean and standard deviation: each step draws its
            latents, as without features), or half of that: "mean", or one "sample" for each crop.
        shard_mib: size of a shard at most; a kill costs those that are under way.
        verify: read every shard that is there before encoding goes on, and make damaged ones anew.
    """

    path: str | None = None
    validation_path: str | None = None
    crops: int = 1
    latents: str = "bf16"
    text: str = "bf16"
    posterior: str = "distribution"
    shard_mib: float = 256.0
    verify: bool = False


@dataclass
class SchedulerConfig:
    """Diffusion.

    Attributes:
        type: "iddpm", or "iddpm-speed" (SpeeDiT) for the first phase of training.
        num_timesteps: length of the schedule, 21 or more.
    """

    type: str = "iddpm"
    num_timesteps: int = 1000


@dataclass
class ValidationConfig:
    """A loss on fixed samples, timesteps and noise.

    Attributes:
        every: optimizer steps between two; 0: never.
        data_path: metadata table; null: samples of the training table.
        batches_per_bucket: how many batches of each bucket are kept for it.
    """

    every: int = 0
    data_path: str | None = None
    batches_per_bucket: int = 1


@dataclass
class SamplingConfig:
    """Samples of fixed prompts and noise, so that progress can be watched: TensorBoard, and a contact sheet.

    Attributes:
        every: optimizer steps between two; 0: never.
        prompts: texts, each with references and conditions as JSON at its end where it has some:
            'a sea {"reference_path": "sea.png", "mask_strategy": "0"}'.
        resolution: the size by name, as in `buckets`.
        aspect_ratio: "width:height", quoted in YAML, or a number, height / width.
        height: in pixels, with width instead of a resolution.
        width: in pixels.
        num_frames: 1 makes images.
        fps: frames a second.
        num_sampling_steps: of the scheduler.
        scheduler: "iddpm" (the original's), "ddim" or "dpm-solver++".
        guidance_scale: classifier-free guidance; 1: none, at half the time.
        guidance_channels: of epsilon's channels that are guided, the first ones; null: all.
        seed: of the noise, together with the prompt's number.
    """

    every: int = 0
    prompts: list[str] = field(default_factory=list)
    resolution: str | int | None = None
    aspect_ratio: str | float | None = None
    height: int | None = None
    width: int | None = None
    num_frames: int = 16
    fps: float = 24.0
    num_sampling_steps: int = 20
    scheduler: str = "dpm-solver++"
    guidance_scale: float = 7.0
    guidance_channels: int | None = None
    seed: int = 42


@dataclass
class TrainConfig:
    """Everything a run needs.

    Attributes:
        buckets: resolution -> {num_frames: [keep_prob, batch size a GPU]}.
        bucket_sizes: "config": the batch sizes that stand in `buckets`; "auto": those of the table that was measured
            for this GPU (`train.bucket_tables`); or the path of such a table. On the command line `--buckets auto` says
            the same as `--bucket_sizes auto`.
        resolutions: JSON file with further resolutions, which win over those of the package. The file is looked
            for under the name given, then beside the shipped configs.
        mask_ratios: share of each mask strategy, summing to 1.
        outputs: folder of the run: checkpoints/, samples/, metrics.jsonl, tensorboard/, bad_samples.jsonl.
        seed: of all randomness, together with epoch and sample.
        plugin: "zero2" (GPU), "zero2-seq" (GPU, batches may be shared by ranks), "ddp" (CPU, gloo), "auto".
        sequence_parallel: how many ranks share a batch, each with some of its frames: 1, 2, 4 or 8, for buckets of so
            many frames at least; or by bucket, {resolution: {num_frames: size}}, 1 where none is named; or "auto":
            such that a batch of any bucket takes about as long.
        sequence_transfers: what moves the parts of shared batches: "collectives" of NCCL or gloo; "copies" by the copy
            engines of GPUs of one machine, which keep no kernel from its multiprocessors; "auto": copies where a
            group can. The bits are the same.
        dtype: "bf16" with fp32 masters (zero2), "fp32" (ddp), "auto".
        steps: optimizer steps in all.
        grad_accumulation: batches a rank and step.
        loss_weighting: "batch" (mean over batches, as the original) or "sample" (batches weigh by their samples).
        lr: AdamW's learning rate, which rises linearly over warmup_steps and then stays.
        weight_decay: AdamW's.
        adam_betas: AdamW's, of the first and the second moment.
        adam_eps: AdamW's.
        warmup_steps: steps over which lr rises.
        grad_clip: global gradient norm at most; 0: no clipping.
        ema_decay: of the averaged weights; 0: none are kept.
        grad_checkpoint: recompute in the backward pass: "auto" (as many blocks as each bucket needs to fit into the
            GPU's memory), false, true (all blocks), or a number of blocks.
        split_batches: where grad_checkpoint is "auto", a batch runs in several passes over fewer samples if these are
            estimated to be faster than to recompute blocks, unless a table of batch sizes says how: "auto" (on one GPU,
            on features), true (always: the estimate was not tried with encoders in memory or on several GPUs), false.
        encode_ahead: online encoders work on the next batch while the GPU still has this step's work, on a stream of
            their own. The same numbers; costs memory, and gains nothing where it was measured (docs/kernels.md).
        overlap_communication: with "zero2" on several ranks, gradients travel while the backward pass goes on, and
            updated weights while the next forward pass does. Within a machine of four H200s that made steps 2% longer;
            it is there for slower networks, where it has not been measured.
        cuda_graphs: run the blocks of small buckets as CUDA graphs on a GPU, once a bucket has come back twice.
        share_memory: CUDA graphs and ordinary steps take turns in the same memory: "auto" (on one GPU), true (on any
            number, and from the second step on, whether there are graphs or not: not tried on several GPUs), false.
        expandable_segments: GPU memory is held in segments that grow and shrink, which buckets of many sizes do not
            divide into gaps; false: as PyTorch does. PYTORCH_ALLOC_CONF decides where it is set.
        load: a checkpoint of ours to start another stage from; counting begins anew.
        load_optimizer: with `load`, take the optimizer's state along.
        resume: go on from the newest checkpoint in `outputs`, if there is one.
        ckpt_every: steps between checkpoints.
        keep_checkpoints: how many of the newest stay.
        log_every: steps between lines in TensorBoard (metrics.jsonl has every step).
        dead_after: seconds of silence in a step after which another process counts as lost, and this one ends with its
            name; 300 beside steps.
        hang_timeout: seconds without any process getting on after which they end, with the name of the latest one.
        max_skipped_in_a_row: non-finite steps in a row that stop the run.
        wandb: log to Weights & Biases too.
    """

    buckets: dict = field(default_factory=dict)
    bucket_sizes: str = "config"
    resolutions: str | None = None
    mask_ratios: dict[str, float] = field(default_factory=dict)
    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    vae: VaeConfig = field(default_factory=VaeConfig)
    text_encoder: TextEncoderConfig = field(default_factory=TextEncoderConfig)
    features: FeaturesConfig = field(default_factory=FeaturesConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    outputs: str = "outputs"
    seed: int = 42
    plugin: str = "auto"
    sequence_parallel: int | dict | typing.Literal["auto"] = 1
    sequence_transfers: typing.Literal["auto", "collectives", "copies"] = "auto"
    dtype: str = "auto"
    steps: int = 100000
    grad_accumulation: int = 1
    loss_weighting: str = "batch"
    lr: float = 2e-5
    weight_decay: float = 0.0
    adam_betas: tuple[float, float] = (0.9, 0.999)
    adam_eps: float = 1e-8
    warmup_steps: int = 0
    grad_clip: float = 1.0
    ema_decay: float = 0.9999
    grad_checkpoint: bool | int | typing.Literal["auto"] = "auto"
    split_batches: bool | typing.Literal["auto"] = "auto"
    encode_ahead: bool = False
    overlap_communication: bool = False
    cuda_graphs: bool = True
    share_memory: bool | typing.Literal["auto"] = "auto"
    expandable_segments: bool = True
    load: str | None = None
    load_optimizer: bool = True
    resume: bool = True
    ckpt_every: int = 500
    keep_checkpoints: int = 3
    log_every: int = 10
    dead_after: float = 20.0
    hang_timeout: float = 540.0
    max_skipped_in_a_row: int = 10
    wandb: bool = False


# ------------------------------------------------------------------- reading


def parse(
    arguments: list[str] | None = None,
    *,
    program: str = "stdit_fast.train",
    what: str = "Trains an STDiT-2.",
    checked: bool = True,
) -> TrainConfig:
    """The configuration of a command line: `--config FILE [--any.key value ...]`, the latter winning.

    Args:
        arguments: those of the process if None.
        program, what: its name, and what it does, for `--help`.
        checked: whether values are held against each other and against what exists, as a run needs it (`check`).

    Raises:
        ConfigError: an unknown key (with the nearest known one) or a value that cannot be.
    """
    arguments = _short_forms(sys.argv[1:] if arguments is None else arguments)
    _check_command_line(arguments)
    _check_config_files(arguments)
    parser = ArgumentParser(prog=program, exit_on_error=False, description=what)
    parser.add_argument("--config", action="config", help="YAML file; may be given several times, later ones win")
    parser.add_class_arguments(TrainConfig)
    try:
        parsed = parser.parse_args(arguments)
    except Exception as error:  # argparse's, jsonargparse's and yaml's own error types
        raise parser_error(error, known_keys()) from error
    parsed.pop("config", None)
    config = _to_dataclass(TrainConfig, parser.instantiate(parsed))
    if checked:
        check(config)
    return config


def _short_forms(arguments: list[str]) -> list[str]:
    """`--buckets auto` in full: what is kept of which length stays as it is, and sizes come from the measured table."""
    out, rest = [], iter(arguments)
    for argument in rest:
        if argument == "--buckets":
            value = next(rest, None)
            out += ["--bucket_sizes", "auto"] if value == "auto" else [argument, *([] if value is None else [value])]
        else:
            out.append("--bucket_sizes=auto" if argument == "--buckets=auto" else argument)
    return out


def _to_dataclass(cls: type, values: Namespace | dict):
    """Builds nested dataclasses from the parser's namespace."""
    values = values.as_dict() if isinstance(values, Namespace) else dict(values)
    for f in dataclasses.fields(cls):
        if dataclasses.is_dataclass(f.type) and not dataclasses.is_dataclass(values.get(f.name)):
            values[f.name] = _to_dataclass(f.type, values[f.name])
    return cls(**values)


def known_keys(cls: type = TrainConfig, prefix: str = "") -> list[str]:
    """All dotted keys of a config class."""
    keys = []
    for f in dataclasses.fields(cls):
        keys.append(prefix + f.name)
        if dataclasses.is_dataclass(f.type):
            keys += known_keys(f.type, f"{prefix}{f.name}.")
    return keys


def _check_config_files(arguments: list[str]) -> None:
    """Reads the YAML files named on the command line and refuses keys that the schema does not have."""
    for i, argument in enumerate(arguments):
        name, _, value = argument.partition("=")
        if name != "--config":
            continue
        value = value or "".join(arguments[i + 1 : i + 2])
        if not value:
            raise ConfigError("--config", None, "a YAML file must follow it, see train/configs/")
        path = Path(value)
        content = read_yaml("--config", path, "give a YAML file, see train/configs/")
        _check_keys(content, TrainConfig, "", str(path))


def read_yaml(key: str, path: Path, remedy: str) -> dict:
    """Keys and values of the YAML file that `key` names. Raises ConfigError, with `remedy` where there is no file."""
    if not path.is_file():
        raise ConfigError(key, str(path), f"there is no such file; {remedy}")
    try:
        content = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ConfigError(key, str(path), f"it is not YAML: {one_line(error)}") from error
    if not isinstance(content, dict):
        raise ConfigError(key, str(path), "it should hold keys and values")
    return content


def _check_keys(content: dict, cls: type, prefix: str, source: str) -> None:
    fields = {f.name: f.type for f in dataclasses.fields(cls)}
    for key, value in content.items():
        if key not in fields:
            raise ConfigError(f"{prefix}{key}", value, f"{source} has an unknown key; {_meant(key, fields)}")
        if dataclasses.is_dataclass(fields[key]):
            if not isinstance(value, dict):
                names = ", ".join(f.name for f in dataclasses.fields(fields[key]))
                raise ConfigError(f"{prefix}{key}", value, f"{source} should have keys and values there: {names}")
            _check_keys(value, fields[key], f"{prefix}{key}.", source)


def _check_command_line(arguments: list[str]) -> None:
    """Refuses `--keys` that the schema does not have; argparse would take an abbreviation for a key."""
    known = known_keys()
    for argument in arguments:
        key = argument.partition("=")[0].removeprefix("--")
        if not argument.startswith("--") or key in ("config", "help") or key.startswith("print_"):
            continue
        if key not in known and not key.startswith(("buckets.", "mask_ratios.", "sequence_parallel.")):
            raise ConfigError(key, "command line", f"there is no such key; {_meant(key, known)}")


def _meant(key: str, known: typing.Iterable[str]) -> str:
    """A phrase that offers the key that was meant, also where it was called and spelled otherwise."""
    known = list(known)
    close = difflib.get_close_matches(key, [*known, *OTHER_NAMES], n=1)
    if close:
        return f"did you mean {OTHER_NAMES.get(close[0], close[0])!r}?"
    return nearest(key, known) if len(known) <= SHOWN_KEYS else "--help lists them"


# ------------------------------------------------------------------ checking


def check(config: TrainConfig) -> None:
    """Holds the values against each other and against what exists, before anything slow starts.

    Raises:
        ConfigError: the first that cannot be.
    """
    _check_values(config)
    _check_together(config)
    _check_files(config)
    MaskGenerator(config.mask_ratios)
    make_buckets(config)
    model_config(config, caption_channels=1)
    if config.sampling.every > 0:
        from stdit_fast.train.sampling import check_sampling  # brings in diffusers' pipelines, which take seconds

        check_sampling(config)


def _check_values(config: TrainConfig) -> None:
    """Each value by itself."""
    for key, choices in (
        ("plugin", PLUGINS),
        ("dtype", DTYPES),
        ("loss_weighting", WEIGHTINGS),
        ("scheduler.type", tuple(SCHEDULES)),
        ("model.format", MODEL_FORMATS),
        ("features.latents", tuple(STORED_DTYPES)),
        ("features.text", tuple(STORED_DTYPES)),
        ("features.posterior", POSTERIORS),
    ):
        value = get(config, key)
        if value not in choices:
            raise ConfigError(key, value, nearest(value, choices))
    for least, keys in LEAST.items():
        for key in keys:
            check_range(key, get(config, key), least)
    check_range("seed", config.seed, 0, SEEDS - 1)
    for key in ("ema_decay", "dataset.max_bad_share"):
        check_range(key, get(config, key), 0, 1)
    if not all(0 <= beta < 1 for beta in config.adam_betas):
        raise ConfigError("adam_betas", config.adam_betas, "use two values from 0 to below 1, such as [0.9, 0.999]")
    check_micro_batch_size("vae.micro_batch_size", config.vae.micro_batch_size)
    check_setting(config.sequence_parallel)


def _check_together(config: TrainConfig) -> None:
    """Values that forbid each other."""
    if config.plugin in ("zero2", "zero2-seq") and config.dtype == "fp32":
        remedy = f"{config.plugin} trains in bf16 with fp32 masters; use dtype bf16, or plugin ddp"
        raise ConfigError("dtype", "fp32", remedy)
    if config.plugin == "zero2" and config.sequence_parallel != 1:
        raise ConfigError("sequence_parallel", config.sequence_parallel, "use it with plugin zero2-seq, ddp or auto")
    if config.plugin == "ddp" and config.dtype == "bf16":
        raise ConfigError("dtype", "bf16", "ddp trains in fp32; use dtype fp32, or plugin zero2")
    depth = config.model.depth
    blocks = config.grad_checkpoint
    if blocks != "auto" and not isinstance(blocks, bool) and not 0 <= blocks <= depth:
        raise ConfigError("grad_checkpoint", blocks, f"use auto, false, true or 0 to model.depth = {depth}")
    if config.features.validation_path is not None and config.validation.data_path is None:
        remedy = "it would not be read; name the table that it was made of, validation.data_path, or leave it out"
        raise ConfigError("features.validation_path", config.features.validation_path, remedy)


def _check_files(config: TrainConfig) -> None:
    """What has to be there; of weights on a hub only their names are known."""
    if config.dataset.data_path is None:
        raise ConfigError("dataset.data_path", None, "name the metadata table (CSV or Parquet) of the training samples")
    for key, what in (
        ("dataset.data_path", "file; name a metadata table, CSV or Parquet"),
        ("validation.data_path", "file; name a metadata table, CSV or Parquet"),
        ("load", "folder; name a run, or one of its checkpoints"),
    ):
        path = get(config, key)
        if path is not None and not Path(path).exists():
            raise ConfigError(key, path, f"there is no such {what}")
    if config.load is not None:
        from stdit_fast.train import checkpoint  # brings in the model

        with renamed({"checkpoint": "load"}):
            checkpoint.find(config.load)
    check_weights(config, encoders=config.features.path is None or config.sampling.every > 0)
    check_output_folder("outputs", config.outputs)
    if config.wandb and importlib.util.find_spec("wandb") is None:
        raise ConfigError("wandb", True, "it is not installed; run `pip install wandb`, or use wandb: false")


def check_weights(config: TrainConfig, *, encoders: bool) -> None:
    """Refuses weights that are not there, before the data is read, which may take long; a hub is not asked.

    Args:
        encoders: whether they are loaded; training on features knows them by name only.
    """
    for key in ("vae.from_pretrained", "text_encoder.from_pretrained") if encoders else ():
        check_encoder(key, get(config, key))
    name, key = config.model.from_pretrained, "model.from_pretrained"
    if name is None:
        return
    from stdit_fast.model import checkpoints  # brings in the model

    with renamed({"checkpoint": key}):
        if weights_format(config) == "stdit-fast" and not Path(name).exists():
            check_name(key, name)
        else:
            checkpoints.weight_files(name)


def weights_format(config: TrainConfig) -> str:
    """Of `model.from_pretrained`: as `model.format` says, or as its name and its config.json do."""
    from stdit_fast.model.checkpoints import is_ours

    if config.model.format != "auto":
        return config.model.format
    path = Path(config.model.from_pretrained)
    if path.suffix == ".pth":
        return "pixart"
    return "stdit-fast" if is_ours(path) or not path.exists() else "open-sora"


def get(config: TrainConfig, key: str):
    """The value of a dotted key."""
    value = config
    for part in key.split("."):
        value = getattr(value, part)
    return value


def make_buckets(config: TrainConfig) -> Buckets:
    """The buckets of a configuration; raises ConfigError for a table that cannot be."""
    table = size_table(config)
    return Buckets(config.buckets, resolutions_file(config.resolutions), table.buckets if table else None)


def size_table(config: TrainConfig) -> BucketTable | None:
    """The measured table of batch sizes that `bucket_sizes` asks for; None where `buckets` has them.

    Raises:
        ConfigError: there is none for this GPU and run, or the one that is named does not fit the run.
    """
    if config.bucket_sizes == "config":
        return None
    run = bucket_tables.Run(
        *_gpu(),
        world_size=launched_processes(),
        encoders=config.features.path is None,
        model={key: getattr(config.model, key) for key in bucket_tables.MODEL_KEYS},
        text_tokens=config.text_encoder.model_max_length,
        wanted=_kept(config.buckets),
    )
    if config.bucket_sizes == "auto":
        return bucket_tables.find(run)
    table = bucket_tables.read(config.bucket_sizes)
    reason = bucket_tables.unfit(table, run)
    if reason:
        raise ConfigError("bucket_sizes", config.bucket_sizes, f"{reason}; use auto, or another table")
    return table


def _gpu() -> tuple[str | None, float | None]:
    """(name, GiB of memory) of the GPU here."""
    if not torch.cuda.is_available():
        return None, None
    return torch.cuda.get_device_name(), torch.cuda.get_device_properties().total_memory / 2**30


def _kept(table: dict) -> tuple[tuple[str, int], ...]:
    """(resolution, number of frames) of what a table of buckets keeps; what is no table is refused elsewhere."""
    kept = []
    for resolution, lengths in table.items() if isinstance(table, dict) else ():
        for frames, entry in lengths.items() if isinstance(lengths, dict) else ():
            if str(frames).strip().isdigit() and isinstance(entry, (list, tuple)) and entry and entry[0]:
                kept.append((str(resolution), int(frames)))
    return tuple(kept)


def resolutions_file(name: str | None) -> Path | None:
    """A table of sizes: the user's file of that name, else one beside the shipped configs, else a ConfigError."""
    if name is None or Path(name).is_file():
        return None if name is None else Path(name)
    shipped = Path(__file__).with_name("configs") / name
    if not shipped.is_file():
        raise ConfigError("resolutions", name, f"there is no such file, here or in {shipped.parent}")
    return shipped


def model_config(config: TrainConfig, caption_channels: int) -> STDiT2Config:
    """The model's own configuration; `caption_channels` is the text encoder's width."""
    keys = {f.name for f in dataclasses.fields(ModelConfig)} - {"from_pretrained", "format"}
    chosen = {key: getattr(config.model, key) for key in keys}
    legacy = {key: bool(chosen.pop(key)) for key in ("qk_norm_legacy", "final_layer_legacy")}
    with renamed({key: f"model.{key}" for key in keys}):
        return STDiT2Config(
            **chosen,
            **legacy,
            caption_channels=caption_channels,
            model_max_length=config.text_encoder.model_max_length,
        )


def to_dict(config: TrainConfig) -> dict:
    """Plain values, for the record that lies beside a checkpoint."""
    return typing.cast(dict, dataclasses.asdict(config))
