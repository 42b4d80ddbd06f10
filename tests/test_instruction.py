"""Only answers are learned, and what is learned is said: one by one, in batches, as a stream."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_chat_format import CHAT
from test_gpt import LLAMA, TINY, make
from torch.testing import assert_close

from common.chat_format import CHATML, SMOLLM2, ChatFormat, ConversationTooLong, Example
from common.evaluation import evaluate_loss
from common.gpt import GPT
from common.instruction import (
    InstructionBatches,
    characters,
    fine_tune,
    learnable,
    respond,
    respond_all,
    response_loss,
    stream_response,
)
from common.instruction_data import conversation
from common.lora import add_lora, lora_parameters
from common.losses import IGNORED
from common.objectives import next_token_loss
from common.training import TrainingSettings

SIZES = {"vocab_size": CHAT.vocab_size, "context_length": 160}
CONFIGS = {"gpt2": TINY, "llama": LLAMA}
ANSWERS = {"sky?": "blue", "grass?": "green", "snow?": "white", "coal?": "black"}
TALKS = [conversation(question, answer) for question, answer in ANSWERS.items()]
NO_DECAY = {"weight_decay": 0.0, "stop_on_explosion": False}


def model(family: str = "llama", seed: int = 0, spread: float | None = None) -> GPT:
    config = replace(CONFIGS[family], **SIZES)
    if spread:
        return make(config, spread, seed)
    torch.manual_seed(seed)
    return GPT(config).eval()


@pytest.fixture(scope="module")
def taught() -> GPT:
    """A tiny model that has learned four answers by heart."""
    found = model()
    settings = TrainingSettings(120, 5e-3, warmup_steps=10, **NO_DECAY)
    history = fine_tune(found, CHAT, TALKS, settings, batch_size=4, template=CHATML, progress=False)
    assert history.losses[-1] < 0.05 < 3 < history.losses[0]
    return found


# --- What is learned


def test_six_tokens():
    """Three of a question, three of an answer: the last of the question predicts the first."""
    example = Example([11, 12, 13, 21, 22, 2], [False, False, False, True, True, True])
    inputs, targets = learnable(example)
    assert inputs.tolist() == [11, 12, 13, 21, 22]
    assert targets.tolist() == [IGNORED, IGNORED, 21, 22, 2]


def test_what_comes_after_the_last_learned_token_is_cut_off():
    inputs, targets = learnable(Example([11, 21, 2, 99, 98], [False, True, True, False, False]))
    assert inputs.tolist() == [11, 21]
    assert targets.tolist() == [21, 2]


@pytest.mark.parametrize("family", CONFIGS)
def test_the_loss_is_that_of_the_learned_tokens_alone(family):
    gpt = model(family, spread=10.0)
    batches = InstructionBatches(ChatFormat(CHAT, CHATML), TALKS, 4)
    inputs, targets = next(iter(batches))
    loss = response_loss(gpt, inputs, targets)
    assert_close(loss, next_token_loss(gpt, inputs, targets))
    log_p = gpt(inputs).log_softmax(-1)
    terms = [
        -log_p[b, t, targets[b, t]]
        for b in range(4)
        for t in range(inputs.shape[1])
        if targets[b, t] != IGNORED
    ]
    assert len(terms) == sum(len(answer) + 1 for answer in ANSWERS.values())
    assert_close(loss, torch.stack(terms).mean())


def test_the_question_gets_no_loss_and_filling_no_say():
    gpt, chat = model(spread=10.0), ChatFormat(CHAT, CHATML)
    losses = [evaluate_loss(gpt, InstructionBatches(chat, TALKS, n), response_loss).loss
              for n in (1, 4)]  # fmt: skip
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    inputs, targets = next(iter(InstructionBatches(chat, TALKS, 4)))
    gpt.head.weight.grad = None
    filled = (targets != IGNORED).flip(1).cumsum(1).flip(1) == 0
    changed = torch.where(filled, 7, inputs)
    assert (changed != inputs).any()
    assert_close(response_loss(gpt, changed, targets), response_loss(gpt, inputs, targets))


# --- Batches


def test_an_epoch_has_every_conversation_once():
    talks = [conversation("q" * n, "a" * (11 - n)) for n in range(1, 11)]
    generator = torch.Generator().manual_seed(0)
    batches = InstructionBatches(ChatFormat(CHAT, CHATML), talks, 3, generator)
    assert len(batches) == 4
    for _ in range(2):
        rows = [row for inputs, targets in batches for row in zip(inputs, targets, strict=True)]
        answers = sorted(int((targets != IGNORED).sum()) - 1 for _, targets in rows)
        assert answers == list(range(1, 11))


def test_conversations_that_cannot_be_learned():
    chat = ChatFormat(CHAT, CHATML)
    with pytest.raises(ValueError, match="conversation 2: the conversation ends with the user's"):
        InstructionBatches(chat, [TALKS[0], "Hi"], 2)
    with pytest.raises(ValueError, match=r"conversation 1 has .* tokens, and the context 10: sho"):
        InstructionBatches(chat, TALKS, 2, longest=10)


# --- Fine-tuning


def test_it_learns_to_answer_and_to_stop(taught):
    for question, answer in ANSWERS.items():
        assert respond(taught, CHAT, question, template=CHATML, max_new_tokens=20) == answer


def test_lora_trains_adapters_alone_and_learns_another_answer(taught):
    gpt = add_lora(copy.deepcopy(taught), rank=8)
    before = {name: p.clone() for name, p in gpt.state_dict().items()}
    talks = [*TALKS[1:], conversation("sky?", "grey")]
    settings = TrainingSettings(60, 1e-2, warmup_steps=10, **NO_DECAY)
    fine_tune(gpt, CHAT, talks, settings, batch_size=4, template=CHATML, progress=False)
    moved = {name for name, p in gpt.state_dict().items() if not torch.equal(p, before[name])}
    assert moved == set(lora_parameters(gpt))
    said = respond_all(gpt, CHAT, list(ANSWERS), template=CHATML)
    assert said == ["grey", *list(ANSWERS.values())[1:]]


def test_bfloat16_learns_too():
    gpt = model()
    settings = TrainingSettings(20, 5e-3, dtype="bfloat16", **NO_DECAY)
    history = fine_tune(gpt, CHAT, TALKS, settings, batch_size=4, progress=False)
    assert history.losses[-1] < history.losses[0] - 1
    assert gpt.token_embedding.weight.dtype == torch.float32


def test_with_validation_the_best_weights_are_kept():
    gpt = model()
    settings = TrainingSettings(40, 2e-2, evaluate_every=5, **NO_DECAY)
    history = fine_tune(gpt, CHAT, TALKS[:2], settings, validation=TALKS[2:], progress=False)
    looks = [found.loss for found in history.evaluations.values()]
    assert min(looks) < looks[-1], "it has learned two answers by heart, or nothing was chosen"
    held_out = InstructionBatches(ChatFormat(CHAT), TALKS[2:], 2)
    assert evaluate_loss(gpt, held_out, response_loss).loss == pytest.approx(min(looks), rel=1e-4)


def test_the_seed_decides():
    settings = TrainingSettings(3, 1e-3, **NO_DECAY)

    def weights(seed):
        gpt = model()
        fine_tune(gpt, CHAT, TALKS, settings, batch_size=2, seed=seed, progress=False)
        return gpt.token_embedding.weight

    assert torch.equal(weights(0), weights(0))
    assert not torch.equal(weights(0), weights(1))


# --- Answering


@pytest.mark.parametrize("family", CONFIGS)
def test_in_batches_it_says_the_same(family):
    gpt = model(family, spread=10.0)
    questions = ["a", "What is it?", "Hm" * 20, "b c d"]
    one_by_one = [respond(gpt, CHAT, q, template=CHATML, max_new_tokens=12) for q in questions]
    together = respond_all(gpt, CHAT, questions, template=CHATML, max_new_tokens=12, batch_size=3)
    assert together == one_by_one
    assert len(set(together)) > 1
    assert respond_all(gpt, CHAT, []) == []


def test_a_stream_joined_is_the_answer(taught):
    pieces = list(stream_response(taught, CHAT, "snow?", template=CHATML, max_new_tokens=20))
    assert pieces == list("white")


def test_the_context_is_shared_by_question_and_answer(taught):
    talk = [turn for messages in TALKS * 5 for turn in messages]
    long = [*talk, {"role": "user", "content": "snow?"}]
    assert len(ChatFormat(CHAT, CHATML).prompt(long)) > 160
    assert respond(taught, CHAT, long, template=CHATML, max_new_tokens=90) != ""
    with pytest.raises(ConversationTooLong, match="there is room for 60: shorten it"):
        respond(taught, CHAT, "x" * 60, template=CHATML, max_new_tokens=100)
    with pytest.raises(ValueError, match="max_new_tokens is 160: it must be above 0, and below"):
        respond(taught, CHAT, "snow?", max_new_tokens=160)


def test_sampling_is_passed_on(taught):
    generator = lambda: torch.Generator().manual_seed(3)
    wild = lambda: respond(
        taught, CHAT, "sky?", template=CHATML, max_new_tokens=20, temperature=5.0,
        generator=generator(),
    )  # fmt: skip
    assert wild() == wild() != "blue"


# --- Characters


@given(st.text(), st.integers(1, 3))
def test_characters_come_whole(text, size):
    text = text.encode("utf8", "replace").decode()
    pieces = list(characters(CHAT, CHAT.encode(text)))
    assert "".join(pieces) == text
    assert all(piece.isprintable() or len(piece) == 1 for piece in pieces)


def test_broken_characters_and_control_tokens():
    half = "é".encode()[:1]
    assert list(characters(CHAT, [*half, *b"a"])) == ["\ufffda"]
    assert list(characters(CHAT, [*b"a", *half])) == ["a", "\ufffd"]
    assert list(characters(CHAT, [97, CHAT.special_tokens["<|im_start|>"], 98])) == ["a"]
    assert list(characters(CHAT, [97, 99_999, 98])) == ["a", "b"], "a row that only fills up"


def test_an_untrained_model_is_as_surprised_as_chance():
    found = evaluate_loss(model(), InstructionBatches(ChatFormat(CHAT, SMOLLM2), TALKS, 2),
                          response_loss)  # fmt: skip
    assert found.loss == pytest.approx(math.log(CHAT.vocab_size), rel=0.05)
