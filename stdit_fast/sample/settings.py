"""The settings of `python -m stdit_fast.sample`: one schema, filled from YAML and the command line, and checked."""

import dataclasses
import json
import math
import sys
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from jsonargparse import ArgumentParser

from stdit_fast.arguments import check_output_folder, check_range, parser_error
from stdit_fast.diffusion.schedulers import SCHEDULERS
from stdit_fast.errors import ConfigError, nearest, one_line, renamed
from stdit_fast.media.write import MAX_FPS, MIN_FPS, read_metadata
from stdit_fast.ops.registry import BACKENDS

WEIGHTS = ("auto", "ema", "model")
FORMATS = ("auto", "mp4", "gif", "png")
DTYPES = ("auto", "bf16", "fp32")
# Keys with several values. They are free text, which is not read as YAML.
LISTS = {"prompt": "texts, each in quotes", "reference": "paths of images and videos"}
GIF_FPS = 50
SEEDS = 2**32  # PyTorch's generator on the CPU takes no more of a seed


@dataclass
class Settings:
    """Everything a call needs.

    Attributes:
        model: a saved pipeline's folder, a training run's folder or one of its checkpoints, an STDiT2 (folder or hub
            name), or an Open-Sora 1.1 checkpoint (folder, .safetensors, .pt).
        weights: of a training run: "ema", "model", or "auto": the averaged ones if there are any.
        vae: path or hub name of an AutoencoderKL, or "patch-codec". Not given: the pipeline's or the run's own.
        text_encoder: path or hub name of a T5 encoder, or "minilm-embeddings". Not given: as for vae.
        prompt: texts. One may end with references as JSON, and may change from loop to loop: "|0| a sea |2| a storm".
        prompt_path: text file with one prompt a line; they come after those of `prompt`.
        reference: paths of images and videos, for prompts that have none of their own.
        mask_strategy: which frames of references go where, for prompts that do not say: loop, reference, start, place,
            length, edit ratio; several with ";" between. "0" starts with the first reference.
        resolution: the size by name ("240p").
        aspect_ratio: of it: width:height ("16:9"), or height / width ("0.56").
        height: in pixels, with width instead of a resolution.
        width: in pixels.
        resolutions: JSON file with further resolutions, as in training.
        num_frames: of a loop; 1 makes images.
        fps: frames a second, of the file and as the model is told.
        loops: clips one after the other, each beginning with the last frames of the one before.
        condition_frame_length: how many frames those are.
        condition_frame_edit: 0 keeps them; above, they are noised to that share of the schedule and changed.
        scheduler: "iddpm" (ancestral, the original's), "ddim", "dpm-solver++", or "auto": the saved pipeline's, else
            iddpm.
        num_sampling_steps: of it; dpm-solver++ and ddim need fewer.
        guidance_scale: classifier-free guidance; 1 is none, and costs half.
        guidance_channels: how many latent channels are guided; Open-Sora 1.1 guides 3. Not given: all.
        seed: of the first sample; `sample_seed` says those of the others.
        samples: of each prompt.
        batch_size: samples made at once; halved when they do not fit into memory.
        outputs: folder of the files. Two calls at once need one each.
        format: "mp4", "gif", "png" (animated, for a video), or "auto": png for images, else mp4.
        resume: make no sample again of which `outputs` has a file with the same settings.
        save_pipeline: folder in which to save the pipeline, in the precision it runs in.
        device: "cuda", "cuda:1", "cpu", or "auto": the GPU if there is one.
        dtype: "bf16", "fp32", or "auto": bf16 on a GPU.
        backend: "auto" (fused kernels where they can serve), "fused", "reference" (plain PyTorch).
        cuda_graphs: run small predictions as CUDA graphs on a GPU.
    """

    model: str | None = None
    weights: str = "auto"
    vae: str | None = None
    text_encoder: str | None = None
    prompt: list[str] = field(default_factory=list)
    prompt_path: str | None = None
    reference: list[str] = field(default_factory=list)
    mask_strategy: str | None = None
    resolution: str | None = None
    aspect_ratio: str | None = None
    height: int | None = None
    width: int | None = None
    resolutions: str | None = None
    num_frames: int = 16
    fps: float = 24.0
    loops: int = 1
    condition_frame_length: int = 4
    condition_frame_edit: float = 0.0
    scheduler: str = "auto"
    num_sampling_steps: int = 100
    guidance_scale: float = 7.0
    guidance_channels: int | None = None
    seed: int = 42
    samples: int = 1
    batch_size: int = 1
    outputs: str = "outputs/samples"
    format: str = "auto"
    resume: bool = True
    save_pipeline: str | None = None
    device: str = "auto"
    dtype: str = "auto"
    backend: str = "auto"
    cuda_graphs: bool = True

    @property
    def suffix(self) -> str:
        """The files', without the dot."""
        return self.format if self.format != "auto" else "png" if self.num_frames == self.loops == 1 else "mp4"


KEYS = tuple(f.name for f in dataclasses.fields(Settings))


# ------------------------------------------------------------------- reading


def parse(arguments: list[str] | None = None) -> Settings:
    """The settings of a command line: `[--config FILE] [--key value ...]`, the latter winning.

    FILE is YAML, or a file that this command wrote, whose settings are taken.

    Raises:
        ConfigError: an unknown key (with the nearest known one) or a value that cannot be.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    given = _check_keys(arguments)
    parser = ArgumentParser(prog="stdit_fast.sample", exit_on_error=False, description="Samples of an STDiT-2.")
    parser.add_argument("--config", metavar="FILE", help="YAML, or a file that was made by this command")
    parser.add_class_arguments(Settings, skip=set(LISTS))
    for key, what in LISTS.items():
        parser.add_argument(f"--{key}", nargs="+", action="extend", type=str, default=[], help=what)
    try:
        parsed = parser.parse_args(_expand(arguments, given)).as_dict()
    except ConfigError:
        raise
    except Exception as error:  # argparse's and jsonargparse's own error types
        raise parser_error(error, KEYS) from error
    settings = Settings(**{key: parsed[key] for key in KEYS})
    check(settings)
    return settings


def _check_keys(arguments: list[str]) -> set[str]:
    """The keys of a command line, all known; argparse would take an abbreviation for a key."""
    given = {a.partition("=")[0].removeprefix("--") for a in arguments if a.startswith("--")} - {"config", "help"}
    for key in sorted(given.difference(KEYS)):
        raise ConfigError(key, "command line", f"there is no such key; {nearest(key, KEYS)}")
    return given


def _expand(arguments: list[str], given: set[str]) -> list[str]:
    """The command line with each `--config FILE` replaced by what the file holds, but for lists given otherwise."""
    expanded, rest = [], iter(arguments)
    for argument in rest:
        name, _, path = argument.partition("=")
        if name != "--config":
            expanded.append(argument)
            continue
        path = path or next(rest, "")
        if not path:
            raise ConfigError("--config", None, "a file must follow it: YAML, or one that this command wrote")
        for key, value in _read_config(Path(path)).items():
            if not isinstance(value, list):
                expanded.append(f"--{key}={value}")
            elif key not in given:
                expanded += [f"--{key}={item}" for item in value]
    return expanded


def _read_config(path: Path) -> dict[str, str | list[str]]:
    """A file's keys and values, as texts: "16:9" is YAML's 969, and a prompt may look like anything."""
    if not path.is_file():
        raise ConfigError("--config", str(path), "there is no such file; give a YAML file")
    if path.suffix.lower().removeprefix(".") in FORMATS[1:]:
        with renamed({"path": "--config"}):
            content = _as_texts(path, read_metadata(path).get("settings", ""))
    else:
        try:
            content = yaml.load(path.read_text(encoding="utf-8"), yaml.BaseLoader)
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ConfigError("--config", str(path), f"it is not YAML: {one_line(error)}") from error
    if not isinstance(content, dict):
        raise ConfigError("--config", str(path), "it should hold keys and values")
    for key, value in content.items():
        if key not in KEYS:
            raise ConfigError(key, value, f"{path} has an unknown key; {nearest(key, KEYS)}")
        if key in LISTS and isinstance(value, str):
            content[key] = value = [value]
        if isinstance(value, list) != (key in LISTS) or not all(isinstance(item, str) for item in value):
            wanted = f"{LISTS[key]}, as a list" if key in LISTS else "one value"
            raise ConfigError(key, value, f"{path} should have {wanted}; quote what YAML takes for something else")
        content[key] = value or ([] if key in LISTS else "null")
    return content


def _as_texts(path: Path, settings: str) -> dict:
    try:
        content = json.loads(settings)
    except ValueError as error:
        raise ConfigError("--config", str(path), "it holds no settings of this command") from error
    return {k: v if isinstance(v, str | list) else json.dumps(v) for k, v in content.items()}


# ------------------------------------------------------------------ checking


def check(settings: Settings) -> None:
    """Holds the values against each other and against what exists; `check_request` holds the prompts.

    Raises:
        ConfigError: the first that cannot be.
    """
    for key, choices in (
        ("weights", WEIGHTS),
        ("format", FORMATS),
        ("scheduler", ("auto", *SCHEDULERS)),
        ("dtype", DTYPES),
        ("backend", BACKENDS),
    ):
        value = getattr(settings, key)
        if value not in choices:
            raise ConfigError(key, value, nearest(value, choices))
    for key in ("samples", "batch_size"):
        check_range(key, getattr(settings, key), 1)
    check_range("fps", settings.fps, MIN_FPS, MAX_FPS)
    check_range("seed", settings.seed, 0, SEEDS - 1)
    if not math.isfinite(settings.guidance_scale):
        raise ConfigError("guidance_scale", settings.guidance_scale, "choose a finite scale; 1 is none")
    if settings.model is None:
        raise ConfigError("model", None, "name the weights: a pipeline, a training run, an STDiT2 or Open-Sora's")
    if not (settings.prompt or settings.prompt_path or settings.save_pipeline):
        raise ConfigError("prompt", settings.prompt, "give at least one, or a file of them (prompt_path)")
    if settings.suffix == "mp4" and settings.num_frames == settings.loops == 1:
        raise ConfigError("format", "mp4", "one frame is an image: use png or gif, or more frames (num_frames)")
    if settings.suffix == "gif" and settings.fps > GIF_FPS:
        raise ConfigError("fps", settings.fps, f"a GIF shows {GIF_FPS} frames a second at most; use mp4 or png")
    check_output_folder("outputs", settings.outputs)
    if settings.save_pipeline is not None and Path(settings.save_pipeline).exists():
        raise ConfigError(
            "save_pipeline", settings.save_pipeline, "it is there already; leave this out, or name a new folder"
        )
