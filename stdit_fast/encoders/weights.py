"""Pretrained weights from a local folder or a hub name, checked to be whole."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

from stdit_fast.errors import ConfigError, one_line

T = TypeVar("T")

REASON_WIDTH = 200  # of what a library says, whose further sentences are about other cases
HUB_TIMEOUT_S = 10  # a hub that cannot be reached is otherwise retried for most of a minute a file


def load_pretrained(key: str, name_or_path: str, load: Callable[[str, bool], T]) -> T:
    """Call `load(source, local_files_only)` on a local folder, the hub's local cache, or the hub, in that order.

    Args:
        key: the setting that holds `name_or_path`, for the message.
        name_or_path: a folder, or a hub name such as ``stabilityai/sd-vae-ft-ema``.
        load: reads the weights; whatever it raises is reported as a ConfigError.

    Raises:
        ConfigError: there is no such folder, the hub has no such name or cannot be reached, or `load` failed.
    """
    folder = Path(name_or_path).expanduser()
    if name_or_path and folder.is_dir():
        return _report(key, name_or_path, lambda: load(str(folder), True))
    check_name(key, name_or_path)
    try:
        return load(name_or_path, True)
    except Exception as error:  # not in the local cache, not all of it, or not usable
        from_cache = error
    try:
        _ask_hub(key, name_or_path)
    except ConfigError:
        if isinstance(from_cache, ConfigError):  # it says more than that the hub is out of reach
            raise from_cache from None
        raise
    return _report(key, name_or_path, lambda: load(name_or_path, False))


def check_name(key: str, name_or_path: str) -> None:
    """Raise ConfigError if this is a path and no folder lies there. No hub is asked whether it has such a name."""
    path = Path(name_or_path).expanduser()
    if path.is_file():
        raise ConfigError(key, name_or_path, "this is a file; give the folder that holds config.json and the weights")
    if not name_or_path or (not path.exists() and _looks_like_path(name_or_path)):
        raise ConfigError(key, name_or_path, "there is no such folder; give a local folder or a hub name (owner/name)")


def check_encoder(key: str, name_or_path: str) -> None:
    """`check_name`, and a folder must hold the config.json of an encoder, its own or that of a pipeline's ``vae``."""
    check_name(key, name_or_path)
    folder = Path(name_or_path).expanduser()
    if folder.is_dir() and not any((folder / part / "config.json").is_file() for part in ("", "vae")):
        raise ConfigError(key, name_or_path, "it holds no config.json; give the folder that has it beside the weights")


def hooked(module) -> bool:
    """Whether something is to happen when a module in `module` is called: a hook, or a library that moves weights."""
    others = ("_hf_hook", "_diffusers_hook")  # of accelerate and diffusers
    return any(
        m._forward_hooks or m._forward_pre_hooks or any(map(m.__dict__.__contains__, others)) for m in module.modules()
    )


def require_all_keys(key: str, name_or_path: str, info: Mapping, ignore_unexpected: tuple[str, ...] = ()) -> None:
    """Raise ConfigError unless the weights are exactly the model's parameters.

    Args:
        info: what ``from_pretrained(..., output_loading_info=True)`` returned; the libraries only warn.
        ignore_unexpected: beginnings of the names that a checkpoint may have beyond the model.
    """
    unexpected = [name for name in info["unexpected_keys"] if not name.startswith(ignore_unexpected)]
    problems = {
        "missing": sorted(map(str, info["missing_keys"])),
        "unexpected": sorted(unexpected),
        "of another shape": sorted(map(str, info["mismatched_keys"])),
    }
    found = "; ".join(f"{len(names)} {what}: {_shorten(names)}" for what, names in problems.items() if names)
    if found:
        raise ConfigError(key, name_or_path, f"the weights do not belong to the config.json beside them ({found})")


def _shorten(names: list[str], limit: int = 5) -> str:
    return ", ".join(names[:limit]) + (", ..." if len(names) > limit else "")


def _looks_like_path(name: str) -> bool:
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return True
    path = Path(name)
    return name.startswith((".", "~")) or (len(path.parts) > 1 and Path(path.parts[0]).is_dir())


def _ask_hub(key: str, name: str) -> None:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import OfflineModeIsEnabled, RepositoryNotFoundError

    try:
        HfApi().model_info(name, timeout=HUB_TIMEOUT_S)
    except RepositoryNotFoundError as error:
        remedy = "neither a local folder nor a model of the hub (or it is private: log in with `hf auth login`)"
        raise ConfigError(key, name, remedy) from error
    except OfflineModeIsEnabled as error:
        remedy = "not a local folder, not in the hub's local cache, and HF_HUB_OFFLINE is set; give a local folder"
        raise ConfigError(key, name, remedy) from error
    except Exception as error:
        remedy = f"not a local folder, not in the hub's local cache, and the hub cannot be reached ({_reason(error)})"
        raise ConfigError(key, name, remedy) from error


def _report(key: str, name_or_path: str, load: Callable[[], T]) -> T:
    try:
        return load()
    except ConfigError:
        raise
    except Exception as error:  # the libraries raise anything from OSError to RuntimeError for an unreadable file
        raise ConfigError(key, name_or_path, f"cannot be read: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {one_line(error, REASON_WIDTH)}"
