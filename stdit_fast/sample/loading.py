"""What `python -m stdit_fast.sample` samples with: found from small files first, then loaded."""

from dataclasses import dataclass
from pathlib import Path

import torch

from stdit_fast.diffusion.schedulers import SCHEDULERS, make_scheduler
from stdit_fast.encoders import load_autoencoder, load_text_encoder
from stdit_fast.encoders.weights import load_pretrained
from stdit_fast.errors import ConfigError, renamed
from stdit_fast.model.checkpoints import is_ours, newest_checkpoint, read_json, weight_files
from stdit_fast.model.stdit2 import STDiT2
from stdit_fast.sample.pipeline import STDiT2Pipeline
from stdit_fast.sample.settings import Settings

PIPELINE, STDIT2, OPEN_SORA = "pipeline", "stdit2", "open-sora"
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
# What to name where the weights come alone.
EXAMPLES = {
    "vae": "an AutoencoderKL, such as stabilityai/sd-vae-ft-ema, or patch-codec",
    "text_encoder": "a T5 encoder, such as DeepFloyd/t5-v1_1-xxl, or minilm-embeddings",
}


@dataclass(frozen=True)
class Source:
    """What to load, and where it runs.

    Attributes:
        kind: PIPELINE, STDIT2 or OPEN_SORA.
        path: folder, file or hub name; a training run's is that of the weights themselves.
        vae, text_encoder: paths or names; None: the saved pipeline's own.
        scheduler: a name in SCHEDULERS.
        num_train_timesteps: length of the schedule that the model was trained on.
        device: where it runs.
        dtype: a name in DTYPES.
    """

    kind: str
    path: str
    vae: str | None
    text_encoder: str | None
    scheduler: str
    num_train_timesteps: int
    device: torch.device
    dtype: str


@renamed({"checkpoint": "model"})
def find_source(settings: Settings) -> Source:
    """What the settings name; reads nothing that is large.

    Raises:
        ConfigError: what is not there, is of another kind, or must be named.
    """
    device = _find_device(settings.device)
    dtype = settings.dtype if settings.dtype != "auto" else "bf16" if device.type == "cuda" else "fp32"
    kind, path = _find_weights(settings.model, settings.weights)
    own = {"vae": None, "text_encoder": None, "scheduler": "iddpm", "num_train_timesteps": 1000}
    own |= _of_pipeline(Path(path)) if kind == PIPELINE else _of_run(Path(path))
    for key, example in EXAMPLES.items():
        own[key] = getattr(settings, key) or own[key]
        if own[key] is None and kind != PIPELINE:
            raise ConfigError(key, None, f"{settings.model} comes without one; name {example}")
    if settings.scheduler != "auto":
        own["scheduler"] = settings.scheduler
    return Source(kind=kind, path=path, device=device, dtype=dtype, **own)


def _find_device(name: str) -> torch.device:
    available = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        return torch.device("cuda" if available else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError("device", name, "use auto, cpu, cuda or cuda:0") from error
    if device.type not in ("cpu", "cuda"):
        raise ConfigError("device", name, "use auto, cpu, cuda or cuda:0")
    if device.type == "cuda" and (device.index or 0) >= available:
        raise ConfigError("device", name, f"there {'is' if available == 1 else 'are'} {available or 'no'} GPUs here")
    return device


def _find_weights(model: str, weights: str) -> tuple[str, str]:
    """(kind, path) of the weights."""
    path = Path(model).expanduser()
    checkpoint = _find_checkpoint(path)
    if checkpoint is not None:
        return STDIT2, str(_choose_weights(checkpoint, weights))
    if weights != "auto":
        raise ConfigError("weights", weights, f"only a training run's checkpoints have a choice, {model} is none")
    if not path.exists():
        if model.count("/") != 1 or model.startswith((".", "/", "~")):
            remedy = "there is no such file or folder; give a saved pipeline, a training run, an STDiT2 (or its hub "
            raise ConfigError("model", model, remedy + "name, owner/name) or an Open-Sora 1.1 checkpoint")
        return STDIT2, model
    if (path / "model_index.json").is_file():
        return PIPELINE, str(path)
    kind = STDIT2 if is_ours(path) else OPEN_SORA
    weight_files(path)
    return kind, str(path)


def _find_checkpoint(path: Path) -> Path | None:
    """A training checkpoint: the folder itself, or the newest one of a run."""
    if (path / "state.json").is_file():
        return path
    folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    newest = newest_checkpoint(folder)
    if newest is None and folder != path:
        raise ConfigError("model", str(path), "this training run has saved no checkpoint yet")
    return newest


def _choose_weights(checkpoint: Path, weights: str) -> Path:
    choices = ("ema", "model") if weights == "auto" else (weights,)
    for choice in choices:
        if (checkpoint / choice / "config.json").is_file():
            return checkpoint / choice
    raise ConfigError("weights", weights, f"{checkpoint} has no folder {' or '.join(choices)}")


def _of_pipeline(path: Path) -> dict:
    """What a saved pipeline samples with."""
    name = read_json(path / "model_index.json").get("_class_name")
    if name != STDiT2Pipeline.__name__:
        raise ConfigError("model", str(path), f"it holds a {name}; an STDiT2Pipeline is needed")
    saved = read_json(path / "scheduler" / "scheduler_config.json")
    names = {cls.__name__: name for name, cls in SCHEDULERS.items()}
    found = {"num_train_timesteps": saved.get("num_train_timesteps", 1000)}
    return found | ({"scheduler": names[saved["_class_name"]]} if saved.get("_class_name") in names else {})


def _of_run(path: Path) -> dict:
    """What the weights were trained with, if they lie in a training run's checkpoint."""
    state = path.parent / "state.json"
    if not state.is_file():
        return {}
    config = read_json(state).get("config") or {}
    found = {
        "vae": (config.get("vae") or {}).get("from_pretrained"),
        "text_encoder": (config.get("text_encoder") or {}).get("from_pretrained"),
        "num_train_timesteps": (config.get("scheduler") or {}).get("num_timesteps"),
    }
    return {key: value for key, value in found.items() if value is not None}


@renamed({"checkpoint": "model"})
def load_pipeline(source: Source, backend: str = "auto") -> STDiT2Pipeline:
    """The pipeline, on its device.

    Raises:
        ConfigError: weights that cannot be read, or that do not fit each other.
    """
    dtype = DTYPES[source.dtype]
    transformer = _load_transformer(source, dtype, backend)
    # On the CPU first: the pipeline moves as a whole.
    autoencoder = source.vae and load_autoencoder(source.vae, dtype=dtype, key="vae")
    text_encoder = source.text_encoder and load_text_encoder(
        source.text_encoder, max_length=transformer.config.model_max_length, dtype=dtype, key="text_encoder"
    )
    scheduler = make_scheduler(source.scheduler, source.num_train_timesteps)
    pipeline = STDiT2Pipeline.of(transformer, autoencoder, text_encoder, scheduler)
    if source.kind == PIPELINE:
        given = {name: part for name, part in pipeline.components.items() if part is not None}
        if text_encoder:
            given["tokenizer"] = pipeline.tokenizer  # None belongs to an encoder with one of its own
        pipeline = load_pretrained(
            "model",
            source.path,
            lambda path, local: STDiT2Pipeline.from_pretrained(path, dtype=dtype, local_files_only=local, **given),
        )
    config = transformer.config
    if pipeline.texts.channels != config.caption_channels:
        remedy = f"its states have {pipeline.texts.channels} channels, the model was trained with "
        raise ConfigError("text_encoder", source.text_encoder, remedy + f"{config.caption_channels}; name another")
    if pipeline.autoencoder.latent_channels != config.in_channels:
        remedy = f"its latents have {pipeline.autoencoder.latent_channels} channels, the model's {config.in_channels}"
        raise ConfigError("vae", source.vae, remedy)
    return pipeline.to(source.device)


def _load_transformer(source: Source, dtype: torch.dtype, backend: str) -> STDiT2:
    if source.kind == OPEN_SORA:
        return STDiT2.from_open_sora(source.path, backend=backend).to(dtype)
    path = str(Path(source.path) / "transformer") if source.kind == PIPELINE else source.path
    return load_pretrained(
        "model",
        path,
        lambda path, local: STDiT2.from_pretrained(path, backend=backend, dtype=dtype, local_files_only=local).eval(),
    )
