"""What the command lines of training, encoding and sampling share: log, bars, a parser's errors, ranges, folders."""

import logging
import math
import os
import re
import sys
from collections.abc import Iterable
from pathlib import Path

from stdit_fast.errors import ConfigError

# jsonargparse's words for what it expected, and ours.
_KINDS = {"'float'": "a number", "'int'": "a whole number", "'bool'": "true or false", "'dict'": "keys and values"}

# Libraries that log what a user cannot act upon.
_CHATTY = ("httpx", "filelock", "torch.distributed", "colossalai", "bitsandbytes")


def start_log(is_main: bool = True) -> None:
    """A command's log, on stderr; of other processes than the main one, warnings alone."""
    logging.basicConfig(level=logging.INFO if is_main else logging.WARNING, format="%(levelname)s %(message)s")
    for name in _CHATTY:
        logging.getLogger(name).setLevel(logging.ERROR)


def bar_options() -> dict:
    """tqdm's for long work: a bar as wide as the terminal; in a file, which keeps all of them, one each half minute."""
    return {"dynamic_ncols": True} if sys.stderr.isatty() else {"mininterval": 30.0, "maxinterval": 60.0}


def parser_error(error: Exception, keys: Iterable[str]) -> ConfigError:
    """An error of argparse or jsonargparse as ours, with the value that was given and what would be right.

    Args:
        error: of whatever type; they are told apart by their text only.
        keys: all that the parser knows, dotted.
    """
    text = " ".join(str(error).split())
    longest_first = sorted(keys, key=len, reverse=True)
    key = next((k for k in longest_first if f'"{k}"' in text or f"argument --{k}:" in text), None)
    if strangers := re.search(r"unrecognized arguments: (.*)", text):
        remedy = "it belongs to no key; write --key value, and texts with spaces in quotes"
        return ConfigError("command line", strangers[1], remedy)
    if key is None:
        return ConfigError("command line", "as given", text)
    if "expected" in text and "argument" in text and f"argument --{key}:" in text:
        return ConfigError(key, None, "a value must follow it")
    given = re.search(r"(?:Got|Given) value: (.*)$", text)
    if given is None:
        return ConfigError(key, "as given", text)
    expected = text[: given.start()]
    kinds = [ours for theirs, ours in _KINDS.items() if theirs in expected]
    kinds += [word for words in re.findall(r"Literal\[([^]]*)\]", expected) for word in words.split(", ")]
    if "tuple" in expected:
        remedy = "use values in brackets, such as [0.9, 0.999]"
    else:
        remedy = f"use {' or '.join(dict.fromkeys(kinds))}" if kinds else expected.strip(" .")
    return ConfigError(key, given[1], remedy)


def check_range(key: str, value: float, low: float, high: float = math.inf) -> None:
    """Raises ConfigError unless `value` lies between the two, which it may equal."""
    if not low <= value <= high:
        bounds = f"at least {low:g}" if math.isinf(high) else f"from {low:g} to {high:.10g}"
        raise ConfigError(key, value, f"use a value {bounds}")


def check_output_folder(key: str, folder: str | Path) -> None:
    """Raises ConfigError unless files can be written into `folder`, which need not be there yet."""
    path = Path(folder).absolute()
    existing = next(p for p in (path, *path.parents) if p.exists())
    if not existing.is_dir():
        remedy = "it is a file" if existing == path else f"{existing} is a file"
        raise ConfigError(key, str(folder), f"{remedy}; name a folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise ConfigError(key, str(folder), f"{existing} cannot be written to; name another folder")
