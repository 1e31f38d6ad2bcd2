"""Prompts: one text or one a loop, references, and the conditions made of them."""

import json
import os
import re
from dataclasses import dataclass, field
from pathlib import Path

from stdit_fast.errors import ConfigError, nearest
from stdit_fast.sample.conditions import KEY as STRATEGY_KEY
from stdit_fast.sample.conditions import Condition, parse_mask_strategy

REFERENCES_KEY = "reference_path"
KEYS = (REFERENCES_KEY, STRATEGY_KEY)
LOOP_NUMBER = re.compile(r"\|\s*([0-9]+)\s*\|")
# An opening brace with what only JSON, right or wrong, has after it.
MEANT_AS_JSON = re.compile(rf"""\{{\s*(?:["'“”]?(?:{"|".join(KEYS)})\b|["'“”][^"'“”]*["'“”]\s*:)""")


@dataclass
class Prompt:
    """What to make.

    Args:
        texts: one for all loops, or one a loop.
        references: paths, images, or tensors [3, T, H, W] in [-1, 1]; conditions say which frames go where.
        conditions: see `Condition`.
    """

    texts: list[str]
    references: list = field(default_factory=list)
    conditions: list[Condition] = field(default_factory=list)

    def text(self, loop: int) -> str:
        """The text that holds in a loop."""
        return self.texts[0 if len(self.texts) == 1 else loop]

    def check(self, loops: int) -> None:
        """Raises ConfigError unless there is a text for each of `loops` loops and a use for the references."""
        if isinstance(self.texts, str) or not self.texts:
            raise ConfigError("texts", self.texts, "give a list with one text, or with one a loop")
        if len(self.texts) > 1 and len(self.texts) != loops:
            more = "more loops than texts" if loops > len(self.texts) else "more texts than loops"
            raise ConfigError("texts", self.texts, f"{more} ({loops} and {len(self.texts)}): give one, or one a loop")
        if self.references and not self.conditions:
            raise ConfigError(
                STRATEGY_KEY, "", "there are references, but nothing says where they go; '0' starts with the first one"
            )


def parse_prompt(text: str, loops: int = 1) -> Prompt:
    """A prompt as one line of text.

    ``|0| a calm sea |2| a storm`` changes the text at loop 2. At the end, references and conditions may stand as JSON:
    ``a sea {"reference_path": "a.png;b.mp4", "mask_strategy": "0;1,0,0,-1,1"}``. References are separated by ";".
    Braces that neither are nor look like JSON belong to the text.

    Args:
        text: the line.
        loops: how many there will be; texts are spread over them.

    Raises:
        ConfigError: broken JSON, unknown keys, a bad mask strategy, or loop numbers that do not begin with 0, do not
            ascend, or reach beyond the loops.
    """
    text, settings = _split_json(text)
    for key, value in settings.items():
        if key not in KEYS:
            raise ConfigError("prompt", key, f"there is no such key: {nearest(key, KEYS)}")
        if not isinstance(value, (str, type(None))):
            raise ConfigError(key, value, "it must be a text, with ';' between several")
    return Prompt(
        _spread_texts(text, loops),
        _split_references(settings.get(REFERENCES_KEY)),
        parse_mask_strategy(settings.get(STRATEGY_KEY)),
    )


def _split_json(text: str) -> tuple[str, dict]:
    """The text before the JSON object that it ends with, and that object."""
    line, settings = text, {}
    for brace in re.finditer("{", line):
        try:
            settings = json.loads(line[brace.start() :])
        except ValueError:
            continue
        text = line[: brace.start()]
        break
    broken = MEANT_AS_JSON.search(text)
    if broken:
        suffix = line[broken.start() :]
        try:
            json.loads(suffix)
        except ValueError as error:
            example = json.dumps({REFERENCES_KEY: "a.png", STRATEGY_KEY: "0"})
            raise ConfigError("prompt", suffix, f"not JSON ({error}); it must end the prompt, as {example}") from error
    return text, settings


def _spread_texts(text: str, loops: int) -> list[str]:
    """One text, or one for each loop."""
    before, *parts = LOOP_NUMBER.split(text)
    if not parts:
        return [text.strip()]
    numbers, texts = [int(number) for number in parts[::2]], [part.strip() for part in parts[1::2]]
    if before.strip() or numbers[0] != 0:
        raise ConfigError("prompt", text, "texts of several loops must begin with |0|, the first loop's")
    for number, following in zip(numbers, numbers[1:], strict=False):
        if following <= number:
            raise ConfigError("prompt", text, f"loop numbers must ascend, but |{following}| follows |{number}|")
    if numbers[-1] >= loops:
        raise ConfigError("prompt", text, f"|{numbers[-1]}| must be below the number of loops, {loops}")
    if len(texts) == 1:
        return texts
    ends = [*numbers[1:], loops]
    return [part for part, start, end in zip(texts, numbers, ends, strict=True) for _ in range(start, end)]


def _split_references(paths: str | None) -> list[str]:
    if not (paths or "").strip():
        return []
    references = [path.strip() for path in paths.split(";")]
    if not all(references):
        raise ConfigError(REFERENCES_KEY, paths, f"reference {references.index('')} is empty: leave out the ';'")
    return references


def read_prompts(path: str | os.PathLike) -> list[str]:
    """The prompts of a text file, one a line; blank lines and lines that begin with # are left out.

    Raises:
        ConfigError: the file is missing, is not text in UTF-8, or has no prompt (key ``prompt_path``).
    """
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = "there is no such file" if isinstance(error, FileNotFoundError) else f"it cannot be read ({error})"
        raise ConfigError("prompt_path", str(path), f"{reason}; give a text file with one prompt a line") from error
    prompts = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    if not prompts:
        raise ConfigError("prompt_path", str(path), "it has no prompt; write one a line")
    return prompts
