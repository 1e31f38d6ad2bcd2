"""Weights: Open-Sora 1.1 checkpoints unchanged, PixArt-alpha as the start of training; where a run's checkpoints are.

Nothing here executes pickled code: .pt and .pth files are read with `weights_only`.
"""

import json
import logging
import pickle
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from stdit_fast.errors import ConfigError, one_line
from stdit_fast.model.config import STDiT2Config
from stdit_fast.model.stdit2 import STDiT2

logger = logging.getLogger(__name__)

StateDict = dict[str, Tensor]
STEP_FOLDER = re.compile(r"step-(\d{8,})")  # of a training run
TORCH_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")

# What PixArt-alpha does not have: time, QK-norm, conditioning on length and frame rate.
PIXART_LACKS = ("attn_temp.", "q_norm.", "k_norm.", "scale_shift_table_temporal")
PIXART_LACKS_AT_TOP = ("fl_embedder.", "fps_embedder.", "t_block_temp.", "rope.")
# Only its multi-scale (1024) checkpoints have these.
PIXART_MAY_LACK_AT_TOP = ("csize_embedder.", "ar_embedder.")
PIXART_DROPPED = ("pos_embed",)


@dataclass
class Mismatch:
    """What keeps a state dict from fitting a model. False when it fits.

    Attributes:
        missing: keys that the model has and the checkpoint lacks.
        unexpected: keys that only the checkpoint has.
        shapes: (key, shape in the checkpoint, shape in the model).
    """

    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    shapes: list[tuple[str, tuple[int, ...], tuple[int, ...]]] = field(default_factory=list)

    @classmethod
    def between(cls, state_dict: StateDict, model: torch.nn.Module) -> "Mismatch":
        """Of a state dict and the model that it is to be loaded into."""
        own = model.state_dict()
        shapes = [
            (key, tuple(state_dict[key].shape), tuple(own[key].shape))
            for key in own.keys() & state_dict.keys()
            if state_dict[key].shape != own[key].shape
        ]
        return cls(sorted(own.keys() - state_dict.keys()), sorted(state_dict.keys() - own.keys()), sorted(shapes))

    @classmethod
    def from_loading_info(cls, info: dict) -> "Mismatch":
        """From what transformers' `from_pretrained` reports."""
        shapes = [(key, tuple(found), tuple(wanted)) for key, found, wanted in info.get("mismatched_keys", ())]
        reshaped = {key for key, _, _ in shapes}
        missing = [key for key in info["missing_keys"] if key not in reshaped]
        return cls(sorted(missing), sorted(info["unexpected_keys"]), sorted(shapes))

    def __bool__(self) -> bool:
        return bool(self.missing or self.unexpected or self.shapes)

    def describe(self) -> str:
        """All keys that do not fit, in one line."""
        parts = []
        if self.missing:
            parts.append(f"{len(self.missing)} keys missing: {', '.join(self.missing)}")
        if self.unexpected:
            parts.append(f"{len(self.unexpected)} keys unexpected: {', '.join(self.unexpected)}")
        if self.shapes:
            listed = ", ".join(f"{key} is {list(found)}, the model has {list(own)}" for key, found, own in self.shapes)
            parts.append(f"{len(self.shapes)} keys of another shape: {listed}")
        return f"the checkpoint does not fit the model; {'; '.join(parts)}"


def read_json(path: Path) -> dict:
    """Keys and values of a small file beside weights. Raises ConfigError where it holds none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError("checkpoint", str(path), f"it cannot be read as JSON ({error})") from error
    if not isinstance(content, dict):
        raise ConfigError("checkpoint", str(path), "it should hold keys and values")
    return content


def is_ours(folder: Path) -> bool:
    """Whether `save_pretrained` of an STDiT2 wrote a folder, by its config.json."""
    config = folder / "config.json"
    return config.is_file() and read_json(config).get("model_type") == STDiT2Config.model_type


def weight_files(path: str | Path) -> list[Path]:
    """The files that `read_state_dict` reads, found from names and small files alone, their headers checked.

    Raises:
        ConfigError: nothing there, or nothing that could be read.
    """
    path = Path(path)
    if not path.exists():
        raise ConfigError("checkpoint", str(path), "there is no such file or folder; give the path of a checkpoint")
    if path.is_dir():
        return _files_of_folder(path)
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, "pt"):  # which looks whether the file is as long as its header says
                return [path]
        except (SafetensorError, OSError) as error:
            raise ConfigError("checkpoint", str(path), f"it cannot be read as safetensors ({error})") from error
    if path.suffix not in TORCH_SUFFIXES:
        remedy = f"give a folder or a file that ends in .safetensors, {', '.join(TORCH_SUFFIXES)}"
        raise ConfigError("checkpoint", str(path), remedy)
    return [path]


def _files_of_folder(folder: Path) -> list[Path]:
    """An index's shards, or the one weights file in the folder or in its `model` folder."""
    for index in sorted(folder.glob("*.index.json")):
        shards = read_json(index).get("weight_map")
        if not isinstance(shards, dict) or not all(isinstance(shard, str) for shard in shards.values()):
            raise ConfigError("checkpoint", str(index), "its weight_map should say which file holds which tensor")
        return [file for shard in sorted(set(shards.values())) for file in weight_files(folder / shard)]
    files = sorted(f for f in folder.iterdir() if f.suffix == ".safetensors")
    files = files or sorted(f for f in folder.iterdir() if f.suffix in TORCH_SUFFIXES)
    if len(files) == 1:
        return weight_files(files[0])
    if not files and (folder / "model").is_dir():
        return _files_of_folder(folder / "model")
    found = ", ".join(f.name for f in files) or "none"
    raise ConfigError("checkpoint", str(folder), f"it should hold one model's weights, found {found}; name the file")


def read_state_dict(path: str | Path) -> StateDict:
    """Reads tensors from a .safetensors, .pt, .pth or .bin file, or from a folder that holds one model.

    A folder may be sharded (an index JSON beside the shards). A torch file may hold the tensors directly or
    under "state_dict", "model" or "ema"; a leading "module." is taken off.

    Raises:
        ConfigError: nothing there, nothing readable, or a file that would need pickled code to run.
    """
    return {key: value for file in weight_files(path) for key, value in _read_file(file).items()}


def _read_file(path: Path) -> StateDict:
    if path.suffix == ".safetensors":
        return load_file(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        remedy = "it holds more than tensors and is not read, as that would run code from it; convert it to safetensors"
        raise ConfigError("checkpoint", str(path), remedy) from error
    except Exception as error:  # what is no pickle at all fails anywhere in the reader
        remedy = f"it cannot be read ({type(error).__name__}: {one_line(error)}); is it complete?"
        raise ConfigError("checkpoint", str(path), remedy) from error
    for wrapper in ("state_dict", "model", "ema"):
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
    tensors = {k: v for k, v in content.items() if isinstance(v, Tensor)} if isinstance(content, dict) else {}
    if not tensors:
        raise ConfigError("checkpoint", str(path), "it holds no tensors by name; give a state dict")
    return {key.removeprefix("module."): value for key, value in tensors.items()}


def load_state_dict(model: torch.nn.Module, state_dict: StateDict, source: str, *, strict: bool = True) -> Mismatch:
    """Loads tensors by name.

    Args:
        source: what the message calls the checkpoint.
        strict: False loads what fits, keeps the model's own values elsewhere, and warns.

    Returns:
        What did not fit; empty with `strict`.

    Raises:
        ConfigError: with `strict`, the list of what does not fit.
    """
    mismatch = Mismatch.between(state_dict, model)
    if mismatch and strict:
        raise ConfigError("checkpoint", source, mismatch.describe())
    if mismatch:
        logger.warning("%s: %s", source, mismatch.describe())
    reshaped = {key for key, _, _ in mismatch.shapes}
    model.load_state_dict({k: v for k, v in state_dict.items() if k not in reshaped}, strict=False)
    return mismatch


def load_open_sora(path: str | Path, *, strict: bool = True, **config_changes) -> STDiT2:
    """An Open-Sora 1.1 checkpoint, with both legacy flags set.

    Args:
        path: a folder (config.json beside the weights), or a .safetensors or .pt file. Without a config.json
            the shape is read off the tensors, and the rest is XL/2's.
        strict: as in `load_state_dict`.
        **config_changes: over what the config says, for example `backend="reference"`.

    Returns:
        The model in float32, in evaluation mode.

    Raises:
        ConfigError: an unreadable path, or keys that do not fit.
    """
    state_dict = read_state_dict(path)
    folder = Path(path) if Path(path).is_dir() else Path(path).parent
    config_file = folder / "config.json"
    found = read_json(config_file) if config_file.is_file() else _shape_of(state_dict, path)
    found |= {"qk_norm_legacy": True, "final_layer_legacy": True}
    model = STDiT2(STDiT2Config.from_dict(found | config_changes))
    load_state_dict(model, state_dict, str(path), strict=strict)
    return model.eval()


def _shape_of(state_dict: StateDict, path: str | Path) -> dict:
    """The config keys that can be read off the tensors themselves."""
    try:
        hidden, in_channels, *patch = state_dict["x_embedder.proj.weight"].shape
        tokens, caption_channels = state_dict["y_embedder.y_embedding"].shape
        head_dim = 2 * state_dict["rope.freqs"].numel()
        out = state_dict["final_layer.linear.bias"].numel() // (patch[1] * patch[2])
        mlp = state_dict["blocks.0.mlp.fc1.bias"].numel()
    except (KeyError, ValueError, IndexError) as error:
        remedy = f"it is no Open-Sora 1.1 STDiT-2 ({error} is missing or of another rank)"
        raise ConfigError("checkpoint", str(path), remedy) from error
    return {
        "hidden_size": hidden,
        "in_channels": in_channels,
        "patch_size": patch,
        "depth": 1 + max(int(key.split(".")[1]) for key in state_dict if key.startswith("blocks.")),
        "num_heads": hidden // head_dim,
        "mlp_ratio": mlp / hidden,
        "pred_sigma": out == 2 * in_channels,
        "caption_channels": caption_channels,
        "model_max_length": tokens,
        "qk_norm": "blocks.0.attn.q_norm.weight" in state_dict,
    }


def load_pixart(path: str | Path, config: STDiT2Config | None = None, *, strict: bool = True) -> STDiT2:
    """A model whose spatial part starts from a PixArt-alpha 512 or 1024 checkpoint.

    The patch weight gains a time axis, positions are dropped (ours are computed), the empty caption grows to
    `model_max_length` tokens by repeating its last row, and what PixArt lacks keeps its initial values.

    Args:
        path: a .pth or .safetensors file in PixArt's own names.
        config: of the model; default XL/2.
        strict: as in `load_state_dict`, for what PixArt should have.

    Raises:
        ConfigError: an unreadable path, or keys that do not fit.
    """
    model = STDiT2(config or STDiT2Config())
    state_dict = {k: v for k, v in read_state_dict(path).items() if k not in PIXART_DROPPED}
    patch = state_dict.get("x_embedder.proj.weight")
    if patch is not None and patch.dim() == 4:
        state_dict["x_embedder.proj.weight"] = patch.unsqueeze(2)
    null = state_dict.get("y_embedder.y_embedding")
    if null is not None and null.shape[0] < model.config.model_max_length:
        grown = [null, null[-1:].expand(model.config.model_max_length - null.shape[0], -1)]
        state_dict["y_embedder.y_embedding"] = torch.cat(grown)
    own = model.state_dict()
    lacking = {key: own[key] for key in own.keys() - state_dict.keys() if _pixart_may_lack(key, state_dict)}
    load_state_dict(model, state_dict | lacking, str(path), strict=strict)
    logger.info("started from %s; %d tensors keep their initial values", path, len(lacking))
    return model


def _pixart_may_lack(key: str, found: Iterable[str]) -> bool:
    if key.startswith(PIXART_LACKS_AT_TOP) or any(part in key for part in PIXART_LACKS):
        return True
    # All of an embedder may be absent (512), a part of it may not.
    return any(key.startswith(top) and not any(k.startswith(top) for k in found) for top in PIXART_MAY_LACK_AT_TOP)


def complete_checkpoints(folder: Path) -> list[Path]:
    """All checkpoints of a folder, oldest first. One that is being written has another name."""
    found = [(int(m[1]), p) for p in folder.glob("step-*") if (m := STEP_FOLDER.fullmatch(p.name))]
    return [path for _, path in sorted(found)]


def newest_checkpoint(folder: str | Path) -> Path | None:
    """The newest complete checkpoint in a folder, None if there is none."""
    complete = complete_checkpoints(Path(folder))
    return complete[-1] if complete else None
