import re

import pytest

from stdit_fast.errors import ConfigError
from stdit_fast.sample.conditions import Condition
from stdit_fast.sample.prompts import Prompt, parse_prompt, read_prompts


def test_a_text_alone():
    prompt = parse_prompt("  a calm sea, 50% blue | green ")
    assert prompt == Prompt(["a calm sea, 50% blue | green"])
    assert prompt.text(0) == prompt.text(7) == prompt.texts[0]
    assert parse_prompt("", loops=3) == Prompt([""])


def test_references_and_conditions_at_the_end():
    prompt = parse_prompt('a sea {"reference_path": "a.png; b.mp4", "mask_strategy": "0;1,1,0,-1,1"} ')
    assert prompt == Prompt(["a sea"], ["a.png", "b.mp4"], [Condition(0), Condition(1, at=-1, loop=1)])
    assert parse_prompt('{"mask_strategy": "0"}') == Prompt([""], [], [Condition()])
    for nothing in ("{}", '{"reference_path": null, "mask_strategy": ""}'):
        assert parse_prompt(f"a sea {nothing}") == Prompt(["a sea"])


@pytest.mark.parametrize(
    "text",
    ["a {b} c", "a set {1, 2}", "a brace { alone", 'the word {"quoted"} here', "{note: this}", "a } b", "a {} b"],
)
def test_braces_that_are_no_json_stay(text):
    assert parse_prompt(text).texts == [text]
    assert parse_prompt(text + ' {"mask_strategy": "0"}') == Prompt([text], [], [Condition()])


@pytest.mark.parametrize(
    "text, start",
    [
        ('a {b} sea {"mask_strategy": "0"', '{"mask_strategy": "0"'),
        ("a sea {'mask_strategy': '0'}", "{'mask_strategy': '0'}"),
        ('a sea {mask_strategy: "0"}', '{mask_strategy: "0"}'),
        ('a sea {"reference_path": "a.png",}', '{"reference_path": "a.png",}'),
        ('a sea { "reference_path" "a.png"}', '{ "reference_path" "a.png"}'),
        ('a sea {"mask_stratgy": 0,}', '{"mask_stratgy": 0,}'),
        ('{"mask_strategy": "0"} a sea', '{"mask_strategy": "0"} a sea'),
        ('a {"mask_strategy": "0"} {"reference_path": "a"}', '{"mask_strategy": "0"} {"reference_path": "a"}'),
        ('a {"mask_strategy": "0", {"reference_path": "a"}', '{"mask_strategy": "0", {"reference_path": "a"}'),
    ],
)
def test_broken_json_is_refused(text, start):
    with pytest.raises(ConfigError, match=re.escape(f"prompt = {start!r}: not JSON (") + ".*must end the prompt, as"):
        parse_prompt(text)


@pytest.mark.parametrize(
    "settings, message",
    [
        ('{"mask_stratgy": "0"}', "prompt = 'mask_stratgy': there is no such key: did you mean 'mask_strategy'?"),
        ('{"zoom": "0"}', "there is no such key: choose one of 'reference_path', 'mask_strategy'"),
        ('{"reference_path": ["a.png"]}', "reference_path = ['a.png']: it must be a text"),
        ('{"mask_strategy": 0}', "mask_strategy = 0: it must be a text"),
        ('{"reference_path": "a.png;;b.png"}', "reference_path = 'a.png;;b.png': reference 1 is empty"),
        ('{"mask_strategy": "0,x"}', 'the 2nd number of condition 1, "x"'),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        parse_prompt(f"a sea {settings}")


@pytest.mark.parametrize(
    "text, loops, texts",
    [
        ("|0| calm", 3, ["calm"]),
        ("|0| calm", 1, ["calm"]),
        ("|0| calm |2| storm", 3, ["calm", "calm", "storm"]),
        ("|0|calm| 1 |storm|4|calm again", 6, ["calm", "storm", "storm", "storm", "calm again", "calm again"]),
        ("|0| a | b |1| c", 2, ["a | b", "c"]),
    ],
)
def test_texts_of_loops(text, loops, texts):
    prompt = parse_prompt(text, loops)
    assert prompt.texts == texts
    assert [prompt.text(loop) for loop in range(loops)] == (texts if len(texts) > 1 else texts * loops)
    prompt.check(loops)


def test_texts_of_loops_with_references():
    prompt = parse_prompt('|0| calm |1| storm {"reference_path": "a.png", "mask_strategy": "1"}', 2)
    assert prompt == Prompt(["calm", "storm"], ["a.png"], [Condition(loop=1)])


@pytest.mark.parametrize(
    "text, message",
    [
        ("|1| calm |2| storm", "must begin with |0|"),
        ("calm |1| storm", "must begin with |0|"),
        ("|0| calm |2| storm |2| rain", "loop numbers must ascend, but |2| follows |2|"),
        ("|0| calm |2| storm |1| rain", "loop numbers must ascend, but |1| follows |2|"),
        ("|0| calm |3| storm", "|3| must be below the number of loops, 3"),
    ],
)
def test_bad_loop_numbers(text, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        parse_prompt(text, loops=3)


def test_what_a_prompt_needs():
    Prompt(["a"]).check(5)
    Prompt(["a", "b"]).check(2)
    with pytest.raises(ConfigError, match=r"more loops than texts \(3 and 2\): give one, or one a loop"):
        Prompt(["a", "b"]).check(3)
    with pytest.raises(ConfigError, match=r"more texts than loops \(1 and 2\)"):
        Prompt(["a", "b"]).check(1)
    for texts in ([], "a sea"):
        with pytest.raises(ConfigError, match="give a list with one text, or with one a loop"):
            Prompt(texts).check(1)
    with pytest.raises(ConfigError, match="there are references, but nothing says where they go"):
        Prompt(["a"], ["a.png"]).check(1)
    Prompt(["a"], ["a.png"], [Condition()]).check(1)


def test_a_file_of_prompts(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeff# seas\r\n  a calm sea \r\n\r\n \n|0| a\u2028b |1| #2\n#\n  # not this".encode())
    assert read_prompts(path) == read_prompts(str(path)) == ["a calm sea", "|0| a\u2028b |1| #2"]
    empty = tmp_path / "empty.txt"
    empty.write_text("\n# nothing\n")
    latin = tmp_path / "latin.txt"
    latin.write_bytes("Möwe".encode("latin-1"))
    for bad, message in (
        (tmp_path / "nowhere.txt", "there is no such file"),
        (empty, "it has no prompt"),
        (latin, r"it cannot be read \('utf-8' codec"),
        (tmp_path, r"it cannot be read \(.*directory"),
    ):
        with pytest.raises(ConfigError, match=f"prompt_path = .*{bad.name}': {message}"):
            read_prompts(bad)
