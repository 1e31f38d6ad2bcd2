import math
import re

import numpy as np
import pytest
import torch
from PIL import Image

from stdit_fast.errors import ConfigError
from stdit_fast.sample.conditions import (
    Condition,
    check_conditions,
    format_mask_strategy,
    number_references,
    parse_mask_strategy,
    place,
)


@pytest.mark.parametrize(
    "text, conditions",
    [
        (None, []),
        ("", []),
        ("  ", []),
        ("0", [Condition()]),
        ("2", [Condition(loop=2)]),
        ("0,1", [Condition(1)]),
        ("1,2,3,4,5,0.6", [Condition(reference=2, at=4, length=5, start=3, edit=0.6, loop=1)]),
        ("0;0,1,0,-1,1", [Condition(0), Condition(1, at=-1)]),
        (" 0 , 0, -8 ,-16, +8 , 1e-1 ", [Condition(start=-8, at=-16, length=8, edit=0.1)]),
        ("0,0,0,0,1,1", [Condition(edit=1.0)]),
    ],
)
def test_a_mask_strategy_and_its_defaults(text, conditions):
    assert parse_mask_strategy(text) == conditions


@pytest.mark.parametrize(
    "text, message",
    [
        ("0;0,0,0,x", 'the 4th number of condition 2, "x", is the place in the output: use a whole number'),
        ("a", 'the 1st number of condition 1, "a", is the loop: use a whole number, 0 or more'),
        ("-1", 'the 1st number of condition 1, "-1", is the loop: use a whole number, 0 or more'),
        ("0,-2", 'the 2nd number of condition 1, "-2", is the reference: use a whole number, 0 or more'),
        ("0,,1", 'the 2nd number of condition 1, "", is the reference: use a whole number, 0 or more'),
        ("0,0,1.5", 'the 3rd number of condition 1, "1.5", is the start in the reference: use a whole number'),
        ("0,0,1_0", 'the 3rd number of condition 1, "1_0", is the start in the reference: use a whole number'),
        ("0;0;0,0,0,0,0", 'the 5th number of condition 3, "0", is the length: use a whole number, 1 or more'),
        ("0,0,0,0,1,1.5", 'the 6th number of condition 1, "1.5", is the edit ratio: use a number from 0 to 1'),
        ("0,0,0,0,1,nan", 'the 6th number of condition 1, "nan", is the edit ratio: use a number from 0 to 1'),
        ("0,0,0,0,1,half", 'the 6th number of condition 1, "half", is the edit ratio: use a number from 0 to 1'),
        ("0;;1", "condition 2 is empty: give it a number, or leave out the ';'"),
        ("0;", "condition 2 is empty: give it a number, or leave out the ';'"),
        (
            "0;0,0,0,0,1,0,0",
            "condition 2 has 7 numbers: use at most six, the loop, the reference, the start in the reference, "
            "the place in the output, the length, the edit ratio",
        ),
    ],
)
def test_a_bad_mask_strategy_says_which_number_is_wrong(text, message):
    with pytest.raises(ConfigError, match=re.escape(f"mask_strategy = {text!r}: {message}") + "$"):
        parse_mask_strategy(text)


def test_a_mask_strategy_is_the_inverse_of_its_conditions():
    conditions = [Condition(), Condition(3, at=-4, length=2, start=-7, edit=0.1, loop=5), Condition(edit=1e-7)]
    text = format_mask_strategy(conditions)
    assert text == "0,0,0,0,1,0;5,3,-7,-4,2,0.1;0,0,0,0,1,1e-07"
    assert parse_mask_strategy(text) == conditions
    assert format_mask_strategy([]) == "" and format_mask_strategy([Condition(edit=1)]) == "0,0,0,0,1,1"
    with pytest.raises(ValueError, match="'a.png'"):
        format_mask_strategy([Condition("a.png")])


def test_numbers_of_numpy_are_numbers():
    condition = Condition(np.int64(2), at=np.int32(-1), edit=np.float32(0.5))
    assert condition == Condition(2, at=-1, edit=0.5)
    assert format_mask_strategy([condition]) == "0,2,0,-1,1,0.5"


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"reference": -1}, "reference = -1: use a whole number, 0 or more, a path, an image, or a tensor"),
        ({"reference": 1.0}, "reference = 1.0: use a whole number"),
        ({"reference": None}, "reference = None: use a whole number"),
        ({"reference": torch.zeros(4, 8, 8)}, "reference = tensor.*: use a whole number"),
        ({"at": 0.5}, "at = 0.5: use a whole number"),
        ({"at": True}, "at = True: use a whole number"),
        ({"start": "1"}, "start = '1': use a whole number"),
        ({"length": 0}, "length = 0: use a whole number, 1 or more"),
        ({"edit": 1.01}, "edit = 1.01: use a number from 0 to 1"),
        ({"edit": -0.1}, "edit = -0.1: use a number from 0 to 1"),
        ({"edit": math.nan}, "edit = nan: use a number from 0 to 1"),
        ({"edit": "0.5"}, "edit = '0.5': use a number from 0 to 1"),
        ({"loop": -1}, "loop = -1: use a whole number, 0 or more"),
    ],
)
def test_conditions_that_cannot_be(arguments, message):
    with pytest.raises(ConfigError, match=f"(?s)^{message}"):
        Condition(**arguments)


def frames(first: int, count: int) -> torch.Tensor:
    """Latents [2, T, 3, 4]; those of frame t hold first + t."""
    return (first + torch.arange(count, dtype=torch.float32)).view(1, -1, 1, 1).expand(2, -1, 3, 4).clone()


def placed(text: str, loop: int = 0, num_frames: int = 6) -> tuple[list, list]:
    """What stands in the latents (0: as before) and the edit ratios, with references 10, 11, 12, 13 and 20."""
    latents = torch.zeros(2, num_frames, 3, 4)
    edit = place(latents, [frames(10, 4), frames(20, 1)], parse_mask_strategy(text), loop)
    assert edit.dtype == torch.float32 and edit.shape == (num_frames,)
    assert torch.equal(latents, latents[:1, :, :1, :1].expand_as(latents))
    return latents[0, :, 0, 0].tolist(), edit.tolist()


@pytest.mark.parametrize(
    "text, expected, edit",
    [
        ("", [0, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1]),
        ("0", [10, 0, 0, 0, 0, 0], [0, 1, 1, 1, 1, 1]),
        ("0,1,0,-1", [0, 0, 0, 0, 0, 20], [1, 1, 1, 1, 1, 0]),
        ("0,0,1,2,3", [0, 0, 11, 12, 13, 0], [1, 1, 0, 0, 0, 1]),
        ("0,0,-1", [13, 0, 0, 0, 0, 0], [0, 1, 1, 1, 1, 1]),
        ("0,0,-3,-2,2,0.25", [0, 0, 0, 0, 11, 12], [1, 1, 1, 1, 0.25, 0.25]),
        ("0,0,0,-6,4", [10, 11, 12, 13, 0, 0], [0, 0, 0, 0, 1, 1]),
        ("0,0,-2,0,2;0,1,0,-1,1", [12, 13, 0, 0, 0, 20], [0, 0, 1, 1, 1, 0]),
        ("0,0,0,0,4,0.5;0,1,0,1", [10, 20, 12, 13, 0, 0], [0.5, 0, 0.5, 0.5, 1, 1]),
        ("0,1,0,1;0,0,0,0,4,0.5", [10, 11, 12, 13, 0, 0], [0.5, 0.5, 0.5, 0.5, 1, 1]),
    ],
)
def test_conditions_are_placed(text, expected, edit):
    assert placed(text) == (expected, edit)


def test_only_the_conditions_of_the_loop_are_placed():
    text = "0;2,1,0,1"
    assert placed(text, loop=0)[0] == [10, 0, 0, 0, 0, 0]
    assert placed(text, loop=1) == ([0] * 6, [1] * 6)
    assert placed(text, loop=2)[0] == [0, 20, 0, 0, 0, 0]


def test_latents_of_another_precision_and_frames_beside_conditions_stay():
    latents = torch.full((2, 3, 3, 4), 7.0, dtype=torch.bfloat16)
    place(latents, [frames(1, 1)], [Condition(at=1)], loop=0)
    assert latents.dtype == torch.bfloat16 and latents[0, :, 0, 0].tolist() == [7, 1, 7]


def test_references_of_another_size_are_refused():
    with pytest.raises(ValueError, match=r"\[2, 6, 3, 4\].*\[2, 1, 1, 1\]"):
        place(torch.zeros(2, 6, 3, 4), [torch.ones(2, 1, 1, 1)], [Condition()], loop=0)


MISFITS = [
    (
        "0;0,2",
        "mask_strategy = '0,2,0,0,1,0': condition 2 (1 frame from frame 0 of reference 2 to frame 0 of the output): "
        "there is no reference 2: there are 2 references, counted from 0",
    ),
    ("0,0,4", "reference 0 has no frame 4: use -4 to 3"),
    ("0,0,-5", "reference 0 has no frame -5: use -4 to 3"),
    ("0,0,3,0,2", "from frame 3 on there is 1 frame in reference 0, which has 4"),
    ("0,0,-2,0,3", "from frame -2 on there are 2 frames in reference 0, which has 4"),
    ("0,1,0,6", "the output has no frame 6: use -6 to 5"),
    ("0,1,0,-7", "the output has no frame -7: use -6 to 5"),
    ("0,0,0,-3,4", "from frame -3 on there are 3 frames in the output, which has 6"),
    (
        "0,0,0,3,4",
        "condition 1 (4 frames from frame 0 of reference 0 to frame 3 of the output): "
        "from frame 3 on there are 3 frames in the output, which has 6",
    ),
]


@pytest.mark.parametrize("text, message", MISFITS)
def test_conditions_that_do_not_fit(text, message):
    conditions = parse_mask_strategy(text)
    with pytest.raises(ConfigError, match=re.escape(message) + "$"):
        check_conditions(conditions, [4, 1], num_frames=6)
    latents = torch.zeros(2, 6, 3, 4)
    with pytest.raises(ConfigError, match=re.escape(message) + "$"):
        place(latents, [frames(10, 4), frames(20, 1)], conditions, loop=0)


def test_conditions_of_loops_that_there_are_not():
    conditions = parse_mask_strategy("0;2,1")
    check_conditions(conditions, [4, 1], num_frames=6, loops=3)
    with pytest.raises(ConfigError, match=r"condition 2 .*there is no loop 2: there are 2 loops, counted from 0$"):
        check_conditions(conditions, [4, 1], num_frames=6, loops=2)
    with pytest.raises(ConfigError, match=r"condition 1 .*there is no reference 0: there are no references"):
        check_conditions(conditions, [], num_frames=6, loops=3)


def test_conditions_that_hold_their_references_get_numbers():
    image, clip = Image.new("RGB", (8, 8)), torch.zeros(3, 5, 8, 8)
    conditions = [Condition(1), Condition("b.mp4", at=-1), Condition(image), Condition(clip, loop=1), Condition(image)]
    numbered, references = number_references(conditions, ["a.png", "b.mp4"])
    assert [condition.reference for condition in numbered] == [1, 1, 2, 3, 2]
    assert numbered[1].at == -1 and numbered[3].loop == 1
    assert references[:2] == ["a.png", "b.mp4"] and references[2] is image and references[3] is clip
    with pytest.raises(ValueError, match="numbers as references"):
        check_conditions(conditions, [1, 1], num_frames=6, loops=2)
