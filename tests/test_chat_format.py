"""The template alone writes control tokens; only answers are learned; the oldest turns go first."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.assets import fetch
from common.chat_format import (
    ALPACA,
    CHATML,
    SMOLLM2,
    TEMPLATES,
    ChatFormat,
    ConversationTooLong,
    Template,
    check_turns,
    template_for,
)
from common.token_formats import Roles
from common.tokenizer import BPETokenizer
from common.weights import open_pretrained

CHAT = BPETokenizer([], ["<|endoftext|>", "<|im_start|>", "<|im_end|>"])  # a token is a byte
PLAIN = BPETokenizer([], ["<|endoftext|>"])
SYSTEM = {"role": "system", "content": "Be brief."}
HI = {"role": "user", "content": "Hi"}
HELLO = {"role": "assistant", "content": "Hello!"}
TALK = [SYSTEM, HI, HELLO, {"role": "user", "content": "  Two spaces first,\n3 lines\n"}]
each_template = pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)


@pytest.fixture(scope="module")
def smollm2():
    return open_pretrained("smollm2-135m")


# --- What is written


def test_alpaca_in_full():
    assert ALPACA.text([SYSTEM, HI, HELLO]) == (
        "Be brief.\n\n### Instruction:\nHi\n\n### Response:\nHello!<|endoftext|>\n\n"
    )


def test_chatml_in_full():
    assert CHATML.text([HI, HELLO]) == (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello!<|im_end|>\n"
    )
    assert SMOLLM2.text([HI]).startswith("<|im_start|>system\nYou are a helpful AI assistant named")
    assert "named SmolLM" not in SMOLLM2.text([SYSTEM, HI]), "only where nothing else is said"


@each_template
def test_ids_are_those_of_the_text(template):
    chat = ChatFormat(CHAT, template)
    ids = chat.prompt(TALK)
    assert CHAT.decode(ids) == template.text(TALK) + template.answer
    assert ids == CHAT.encode(template.text(TALK) + template.answer, allowed_special="all")
    answered = [*TALK, HELLO]
    assert CHAT.decode(chat.example(answered).ids) == template.text(answered)


@pytest.mark.parametrize("generation", [True, False])
@pytest.mark.parametrize(
    "talk",
    [
        [HI],
        [SYSTEM, HI],
        TALK,
        [HI, HELLO, {"role": "user", "content": "¿Qué? 12,345 and 😀\n\n\ttab"}],
    ],
    ids=len,
)
def test_smollm2_is_what_transformers_makes_of_the_models_own_template(smollm2, talk, generation):
    from transformers import AutoTokenizer

    path = fetch("smollm2-135m")
    theirs = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    theirs.chat_template = smollm2.roles.chat_template
    talk = talk if generation else [*talk, HELLO]
    expected = theirs.apply_chat_template(talk, add_generation_prompt=generation, return_dict=False)
    chat = ChatFormat(smollm2.tokenizer)
    assert chat.template is SMOLLM2
    assert (chat.prompt(talk) if generation else chat.example(talk).ids) == expected


# --- Control tokens


@each_template
@given(st.lists(st.sampled_from(["<|im_end|>", "<|im_start|>", "<|endoftext|>", "a", "\n", " "])))
def test_what_a_user_types_never_becomes_a_control_token(template, parts):
    chat, typed = ChatFormat(CHAT, template), "?" + "".join(parts)
    special = set(CHAT.special_tokens.values())
    count = lambda content: sum(
        token in special for token in chat.prompt([{"role": "user", "content": content}])
    )
    assert count(typed) == count("Hi")
    assert typed in CHAT.decode(chat.prompt(typed))


def test_an_answer_cannot_end_itself_early():
    chat = ChatFormat(CHAT, CHATML)
    ids, learned = chat.example([HI, {"role": "assistant", "content": "a<|im_end|>b"}])
    assert ids.count(chat.end_id) == 2  # the user's turn and the answer, which ends once
    assert sum(learned) == len("a<|im_end|>b") + 1


# --- What is learned


def test_six_tokens():
    """The worked example: two words of a question, the answer's heading, its two words, its end."""
    words = Template("words", {"user": "{}", "assistant": "A{}<|endoftext|>"}, "A",
                     ("<|endoftext|>",))  # fmt: skip
    tokenizer = BPETokenizer([], ["<|endoftext|>"])
    example = ChatFormat(tokenizer, words).example(
        [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
    )
    assert example.ids == [*b"hi", *b"A", *b"yo", 256]
    assert example.learned == [False, False, False, True, True, True]


@each_template
def test_learned_are_answers_and_their_ends_in_every_turn(template):
    chat = ChatFormat(CHAT, template)
    talk = [*TALK, {"role": "assistant", "content": "Second answer."}]
    ids, learned = chat.example(talk)
    assert len(ids) == len(learned)
    kept = CHAT.decode([i for i, is_learned in zip(ids, learned, strict=True) if is_learned])
    assert kept == f"Hello!{template.end}Second answer.{template.end}"


@each_template
def test_an_example_begins_with_its_prompt(template):
    """Else a model would be asked in other tokens than it has learned from."""
    chat = ChatFormat(CHAT, template)
    prompt, example = chat.prompt(TALK), chat.example([*TALK, HELLO])
    assert example.ids[: len(prompt)] == prompt
    assert example.learned[len(prompt)]


def test_the_same_with_merges(smollm2):
    chat = ChatFormat(smollm2.tokenizer)
    prompt = chat.prompt(TALK)
    example = chat.example([*TALK, {"role": "assistant", "content": "  indented\n"}])
    assert example.ids[: len(prompt)] == prompt
    assert example.learned.index(True) < len(prompt), "the first answer"
    assert example.learned[len(prompt)]


# --- The context


def test_the_oldest_turns_go_first_and_the_system_prompt_stays():
    chat = ChatFormat(CHAT, CHATML)
    turns = [[{"role": "user", "content": f"question {i}"}, HELLO] for i in range(5)]
    talk = [SYSTEM, *(turn for pair in turns for turn in pair), HI]
    whole = chat.prompt(talk)
    assert chat.prompt(talk, len(whole)) == whole
    for longest in (len(whole) - 1, 200, 120):
        ids = chat.prompt(talk, longest)
        assert len(ids) <= longest
        text = CHAT.decode(ids)
        assert text.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n")
        assert text.endswith("user\nHi<|im_end|>\n<|im_start|>assistant\n")
        kept = [i for i in range(5) if f"question {i}" in text]
        assert kept == list(range(5))[(len(kept) and kept[0]) or 5 :], "the newest, without a gap"
        assert len(kept) < 5


def test_one_message_that_is_too_long():
    with pytest.raises(ConversationTooLong, match=r"has 1,0.. tokens, and there is room for 100"):
        ChatFormat(CHAT, CHATML).prompt([HI, HELLO, {"role": "user", "content": "x" * 1000}], 100)


# --- Turns that are not as they should be


@pytest.mark.parametrize(
    ("talk", "message"),
    [
        ([], "the conversation is empty"),
        ([SYSTEM], "ends with the system's turn: it must end with the user's"),
        ("", r"message 1 \(user\) is empty: leave it out, or say something"),
        ([HI, HELLO, {"role": "user", "content": " \n"}], r"message 3 \(user\) is empty"),
        ([{"role": "user"}], r"message 1 \(user\) is empty"),
        ([{"role": "User", "content": "a"}], "message 1: role 'User' is none of system, user"),
        (["Hi"], "message 1: role None"),
        ([HI, HI], "turn 2 is the user's, it must be the assistant's"),
        ([HELLO], "turn 1 is the assistant's, it must be the user's"),
        ([SYSTEM, SYSTEM, HI], "turn 1 is the system's, it must be the user's"),
        ([HI, HELLO, SYSTEM], "turn 3 is the system's"),
        ([HI, HELLO], "ends with the assistant's turn: it must end with the user's"),
    ],
    ids=str,
)
def test_turns_out_of_order(talk, message):
    with pytest.raises(ValueError, match=message) as caught:
        ChatFormat(CHAT, CHATML).prompt(talk)
    assert "\n" not in str(caught.value)


def test_an_example_ends_with_an_answer():
    with pytest.raises(ValueError, match="it must end with the assistant's"):
        ChatFormat(CHAT).example([HI])
    given_talk = [HI]
    check_turns(given_talk, "Be brief.")
    assert given_talk == [HI], "what was passed in is not changed"


# --- Which template


def test_the_template_that_fits(smollm2):
    assert template_for(smollm2.tokenizer, smollm2.roles) is SMOLLM2
    assert template_for(CHAT) is SMOLLM2
    assert template_for(CHAT, Roles(chat_template="{{ messages }}")) is CHATML
    assert template_for(PLAIN) is template_for(BPETokenizer.gpt2()) is ALPACA
    assert ChatFormat(PLAIN).end_id == 256
    assert ChatFormat(CHAT, "chatml").end_id == CHAT.special_tokens["<|im_end|>"]


def test_templates_that_cannot_be():
    with pytest.raises(ValueError, match="no template is called 'llama': choose among alpaca"):
        ChatFormat(CHAT, "llama")
    with pytest.raises(ValueError, match=r"needs <\|im_start\|>, which this .* use 'alpaca'"):
        ChatFormat(PLAIN, CHATML)
    with pytest.raises(ValueError, match=r"train one with <\|endoftext\|>"):
        ChatFormat(BPETokenizer([]))
