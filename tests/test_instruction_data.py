"""Data of the course's kind comes in; whatever is wrong with a line is said with its number."""

import json

import pytest

from common.instruction_data import (
    HALVES,
    SPLITS,
    Instruction,
    Preference,
    conversation,
    read_instructions,
    read_preferences,
)

TASK = {"instruction": "Give the opposite.", "input": "wet", "response": "dry"}
PAIR = {"prompt": "What is 2 + 2?", "chosen": "4", "rejected": "5"}


def written(tmp_path, *lines) -> str:
    path = tmp_path / "mine.jsonl"
    path.write_text("\n".join(x if isinstance(x, str) else json.dumps(x) for x in lines))
    return path


def test_own_instructions(tmp_path):
    other = {"instruction": "Say hi.", "response": "Hi!", "split": "test", "id": 7, "by": "me"}
    first, second = read_instructions(written(tmp_path, TASK, "", other))
    assert first == Instruction("Give the opposite.", "dry", "wet", id="1")
    assert first.prompt == "Give the opposite.\n\nwet"
    assert first.messages == conversation("Give the opposite.\n\nwet", "dry")
    assert (second.prompt, second.split, second.id) == ("Say hi.", "test", "7")
    assert read_instructions(written(tmp_path, TASK, other), split="test") == [second]


def test_own_pairs(tmp_path):
    (pair,) = read_preferences(written(tmp_path, PAIR))
    assert pair == Preference("What is 2 + 2?", "4", "5", id="1")
    chosen, rejected = pair.messages
    assert [turn["content"] for turn in chosen] == ["What is 2 + 2?", "4"]
    assert rejected[-1] == {"role": "assistant", "content": "5"}


def test_a_byte_order_mark_and_windows_line_ends(tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(PAIR).encode() + b"\r\n")
    assert len(read_preferences(path)) == 1


def test_a_conversation_may_begin_with_a_system_prompt():
    assert conversation("a", "b", "s")[0] == {"role": "system", "content": "s"}
    assert len(conversation("a", "b")) == 2


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"instruction": "a", }', "it is not JSON"),
        ("[1, 2]", r"it is no JSON object: write \{…\} on every line"),
        ({"instruction": "a"}, "the field 'response' is missing"),
        ({"response": "a"}, "the field 'instruction' is missing"),
        (TASK | {"response": "  "}, "'response' is empty: fill it in, or remove the line"),
        (TASK | {"response": 4}, "'response' is 4, it must be a text"),
        (TASK | {"input": None}, "'input' is None, it must be a text"),
        (TASK | {"checkable": "yes"}, "'checkable' is 'yes', it must be true or false"),
        (TASK | {"input": "x", "split": "dev"}, "split 'dev' is none of train, validation, test"),
        (TASK, "the task is that of line 1"),
        ({"instruction": "b", "response": "c", "id": "1"}, "the id '1' is that of line 1"),
    ],
    ids=str,
)
def test_a_line_that_is_wrong(tmp_path, line, message):
    path = written(tmp_path, TASK, line)
    with pytest.raises(ValueError, match=message) as caught:
        read_instructions(path)
    assert str(caught.value).startswith(f"{path}, line 2: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (PAIR | {"half": "c"}, "half 'c' is none of a, b"),
        (PAIR | {"rejected": "4 "}, "'chosen' and 'rejected' are the same text"),
        ({"prompt": "a", "chosen": "b"}, "the field 'rejected' is missing"),
    ],
    ids=str,
)
def test_a_pair_that_is_wrong(tmp_path, line, message):
    with pytest.raises(ValueError, match=f"line 2: {message}"):
        read_preferences(written(tmp_path, PAIR, line))


def test_nothing_to_read(tmp_path):
    with pytest.raises(ValueError, match="holds no text"):
        read_instructions(written(tmp_path, ""))
    with pytest.raises(ValueError, match="holds nothing with split 'test'"):
        read_instructions(written(tmp_path, TASK), split="test")
    with pytest.raises(ValueError, match="split is 'dev', it must be one of"):
        read_instructions(written(tmp_path, TASK), split="dev")
    with pytest.raises(FileNotFoundError):
        read_preferences(tmp_path / "nowhere.jsonl")


# --- The course's own


def test_the_courses_instructions_are_as_its_card_says():
    entries = read_instructions()
    assert len(entries) >= 1100
    assert len({entry.kind for entry in entries}) >= 12
    assert sum(entry.checkable for entry in entries) >= 300
    parts = {split: read_instructions(split=split) for split in SPLITS}
    assert sum(map(len, parts.values())) == len(entries)
    assert min(len([e for e in part if e.checkable]) for part in parts.values()) >= 40


def test_the_courses_pairs_have_two_halves():
    pairs = read_preferences()
    halves = [read_preferences(half=half) for half in HALVES]
    assert sum(map(len, halves)) == len(pairs)
    assert min(map(len, halves)) >= 100
    assert not {p.prompt for p in halves[0]} & {p.prompt for p in halves[1]}
    assert all(pair.category and pair.why for pair in pairs)
