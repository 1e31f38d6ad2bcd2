"""Conditions: frames of references that the output holds to, or starts from.

As text, a condition is up to six numbers, ``loop,reference,start,place,length,edit``, and conditions are separated by
";" (the mask strategy of Open-Sora 1.1). Numbers that are left out are 0, the length 1: "0" makes the first frame of
the first reference the first frame of the output.
"""

import dataclasses
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral, Real

import torch
from PIL import Image
from torch import Tensor

from stdit_fast.errors import ConfigError

KEY = "mask_strategy"
# In the order of a mask strategy: what each number is, and its range.
NUMBERS = {
    "loop": ("the loop", 0, math.inf),
    "reference": ("the reference", 0, math.inf),
    "start": ("the start in the reference", -math.inf, math.inf),
    "at": ("the place in the output", -math.inf, math.inf),
    "length": ("the length", 1, math.inf),
    "edit": ("the edit ratio", 0, 1),
}
ORDINALS = ("1st", "2nd", "3rd", "4th", "5th", "6th")


@dataclass(frozen=True)
class Condition:
    """Frames of a reference in the output.

    Args:
        reference: which of the prompt's references, from 0; or the reference itself: a path, an image, or a tensor
            [3, T, H, W] or [3, H, W] in [-1, 1].
        at: frame of the output where they begin; negative: counted from the output's end.
        length: how many frames.
        start: frame of the reference where they begin; negative: counted from the reference's end.
        edit: 0 keeps the frames; above, they are noised to that share of the schedule, and the model changes them.
        loop: the loop for which this holds, from 0.

    Raises:
        ConfigError: a value that cannot be; the key is the argument's name.
    """

    reference: int | str | os.PathLike | Image.Image | Tensor = 0
    at: int = 0
    length: int = 1
    start: int = 0
    edit: float = 0.0
    loop: int = 0

    def __post_init__(self):
        for name in NUMBERS:
            value = getattr(self, name)
            if name == "reference" and _is_reference(value):
                continue
            if not _is_number(name, value):
                others = ", a path, an image, or a tensor [3, T, H, W]" if name == "reference" else ""
                raise ConfigError(name, value, f"use {_needed(name)}{others}")
            object.__setattr__(self, name, float(value) if name == "edit" else int(value))

    def describe(self) -> str:
        """Its numbers in words, for messages."""
        source = f"reference {self.reference}" if isinstance(self.reference, int) else "its reference"
        return f"{_count(self.length, 'frame')} from frame {self.start} of {source} to frame {self.at} of the output"


def _is_reference(value: object) -> bool:
    if isinstance(value, Tensor):
        return value.ndim in (3, 4) and value.shape[0] == 3
    return isinstance(value, (str, os.PathLike, Image.Image))


def _is_number(name: str, value: object) -> bool:
    """Whether one of a condition's numbers can be `value`."""
    _, low, high = NUMBERS[name]
    is_number = isinstance(value, Real if name == "edit" else Integral) and not isinstance(value, bool)
    return is_number and low <= value <= high


def _needed(name: str) -> str:
    _, low, _ = NUMBERS[name]
    if name == "edit":
        return "a number from 0 to 1"
    return "a whole number" if math.isinf(low) else f"a whole number, {low} or more"


def parse_mask_strategy(text: str | None) -> list[Condition]:
    """The conditions of a mask strategy, such as ``"0;0,1,0,-1"``; none for "" and None.

    Raises:
        ConfigError: says which number of which condition is wrong.
    """
    if not (text or "").strip():
        return []
    return [_parse_condition(text, number, part) for number, part in enumerate(text.split(";"), start=1)]


def _parse_condition(text: str, number: int, part: str) -> Condition:
    if not part.strip():
        raise ConfigError(KEY, text, f"condition {number} is empty: give it a number, or leave out the ';'")
    words = [word.strip() for word in part.split(",")]
    if len(words) > len(NUMBERS):
        meaning = ", ".join(meaning for meaning, *_ in NUMBERS.values())
        raise ConfigError(KEY, text, f"condition {number} has {len(words)} numbers: use at most six, {meaning}")
    numbers = {}
    for ordinal, word, name in zip(ORDINALS, words, NUMBERS, strict=False):
        value = _parse_number(name, word)
        if not _is_number(name, value):
            which = f'the {ordinal} number of condition {number}, "{word}", is {NUMBERS[name][0]}'
            raise ConfigError(KEY, text, f"{which}: use {_needed(name)}")
        numbers[name] = value
    return Condition(**numbers)


def _parse_number(name: str, word: str) -> int | float | None:
    if name != "edit":
        return int(word) if re.fullmatch(r"[+-]?[0-9]{1,18}", word) else None
    try:
        return float(word)
    except ValueError:
        return None


def format_mask_strategy(conditions: Sequence[Condition]) -> str:
    """The mask strategy of conditions whose references are numbers: `parse_mask_strategy` gives the same ones."""
    for condition in conditions:
        if not isinstance(condition.reference, int):
            raise ValueError(f"a mask strategy holds references as numbers, not {condition.reference!r}")
    return ";".join(",".join(f"{getattr(c, name)!r}".removesuffix(".0") for name in NUMBERS) for c in conditions)


def number_references(conditions: Sequence[Condition], references: Sequence) -> tuple[list[Condition], list]:
    """Conditions whose references are all numbers, and the references, with those that conditions held themselves."""
    numbered, references = [], list(references)
    for condition in conditions:
        if not isinstance(condition.reference, int):
            own = condition.reference
            known = (i for i, other in enumerate(references) if _same(own, other))
            number = next(known, len(references))
            if number == len(references):
                references.append(own)
            condition = dataclasses.replace(condition, reference=number)
        numbered.append(condition)
    return numbered, references


def _same(one: object, other: object) -> bool:
    paths = (str, os.PathLike)
    if isinstance(one, paths) and isinstance(other, paths):
        return os.fspath(one) == os.fspath(other)
    return one is other


def place(latents: Tensor, references: Sequence[Tensor], conditions: Sequence[Condition], loop: int) -> Tensor:
    """Write the conditions of one loop into the latents, in place; of those that overlap the last one stays.

    Args:
        latents: [C, T, h, w].
        references: latents of the references, [C, Tr, h, w] each, of any length, device and dtype.
        conditions: those of all loops, with numbers as references.
        loop: whose conditions to write.

    Returns:
        float32 [T] on the CPU: each frame's edit ratio, 1 where it is generated.

    Raises:
        ConfigError: a condition that does not fit, as `check_conditions`.
        ValueError: a reference of another size.
    """
    num_frames = latents.shape[1]
    edit = torch.ones(num_frames)
    for number, condition in enumerate(conditions, start=1):
        if condition.loop != loop:
            continue
        start, at = _resolve(number, condition, [reference.shape[1] for reference in references], num_frames)
        reference = references[condition.reference]
        if reference[:, 0].shape != latents[:, 0].shape:
            raise ValueError(f"latents are {list(latents.shape)}, but a reference's {list(reference.shape)}")
        latents[:, at : at + condition.length] = reference[:, start : start + condition.length]
        edit[at : at + condition.length] = condition.edit
    return edit


def check_conditions(
    conditions: Sequence[Condition], reference_frames: Sequence[int], num_frames: int, loops: int = 1
) -> None:
    """Check what `place` needs, before anything slow.

    Args:
        conditions: with numbers as references.
        reference_frames: length of each reference.
        num_frames: length of a loop's output.
        loops: how many there are.

    Raises:
        ConfigError: there is no such reference or loop, or frames lie outside of the reference or the output.
    """
    for number, condition in enumerate(conditions, start=1):
        if condition.loop >= loops:
            there = _are(loops, "loop")
            raise _misfit(number, condition, f"there is no loop {condition.loop}: there {there}, counted from 0")
        _resolve(number, condition, reference_frames, num_frames)


def _resolve(number: int, condition: Condition, reference_frames: Sequence[int], num_frames: int) -> tuple[int, int]:
    """(start, at), both counted from the first frame. Raises ConfigError where the condition does not fit."""
    if not isinstance(condition.reference, int):
        raise ValueError("conditions need numbers as references here: see number_references")
    if condition.reference >= len(reference_frames):
        there = _are(len(reference_frames), "reference")
        raise _misfit(number, condition, f"there is no reference {condition.reference}: there {there}, counted from 0")
    length = reference_frames[condition.reference]
    start = _first(number, condition, condition.start, length, f"reference {condition.reference}")
    return start, _first(number, condition, condition.at, num_frames, "the output")


def _first(number: int, condition: Condition, first: int, length: int, where: str) -> int:
    """The first frame, from 0 on, of those that a condition takes from or puts to something of `length` frames."""
    if not -length <= first < length:
        raise _misfit(number, condition, f"{where} has no frame {first}: use {-length} to {length - 1}")
    resolved = first + length if first < 0 else first
    if resolved + condition.length > length:
        there = _are(length - resolved, "frame")
        raise _misfit(number, condition, f"from frame {first} on there {there} in {where}, which has {length}")
    return resolved


def _count(count: int, what: str) -> str:
    return f"{count or 'no'} {what}{'s' * (count != 1)}"


def _are(count: int, what: str) -> str:
    return f"{'is' if count == 1 else 'are'} {_count(count, what)}"


def _misfit(number: int, condition: Condition, reason: str) -> ConfigError:
    value = format_mask_strategy([condition]) if isinstance(condition.reference, int) else condition
    return ConfigError(KEY, value, f"condition {number} ({condition.describe()}): {reason}")
