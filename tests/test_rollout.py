"""What was drawn is known token by token; ends and filling are never taken for each other."""

import pytest
import torch
from test_gpt import LLAMA, TINY, make
from torch.testing import assert_close

from common.generation import generate
from common.gpt import GPT
from common.lora import add_lora, lora_parameters
from common.losses import IGNORED
from common.rollout import Reference, lay_out, policy_logprobs, rollout, text_reward
from common.tokenizer import BPETokenizer

EOS = 7
PROMPTS = [[1, 2, 3], [4], [5, 6, 8, 9, 10], [11, 7, 12]]  # one holds the end token itself
FAMILIES = {"gpt2": TINY, "llama": LLAMA}
each_family = pytest.mark.parametrize("config", FAMILIES.values(), ids=FAMILIES)


def eager(config=LLAMA, bonus: float = 0.0, seed: int = 0) -> GPT:
    """A model whose answers end after a while: the end token is a little likelier than others."""
    model = make(config, seed=seed)
    model.token_embedding.weight.data[EOS] *= 1 + bonus
    return model


def play(model=None, n: int = 12, repeat: int = 8, seed: int = 0, **options):
    generator = torch.Generator().manual_seed(seed)
    return rollout(model or eager(), PROMPTS * repeat, n, EOS, generator=generator, **options)


# --- What was written


@each_family
@pytest.mark.parametrize("temperature", [1.0, 0.6, 2.0])
def test_log_probabilities_as_drawn_are_those_computed_anew(config, temperature):
    """Prompts of four lengths, filled up at the left, then at the right."""
    model = eager(config)
    played = play(model, repeat=40, temperature=temperature)
    assert len(set(played.lengths.tolist())) > 3
    again = policy_logprobs(model, played, temperature)
    assert_close(again.detach(), played.logprobs, rtol=1e-4, atol=1e-4)
    assert again.requires_grad


@each_family
def test_log_probabilities_one_row_one_token_at_a_time(config):
    model, rows = eager(config), 0
    played = play(model, repeat=1)
    for prompt, response, found in zip(PROMPTS, played.responses, played.logprobs, strict=True):
        ids = list(prompt)
        for token, value in zip(response, found, strict=False):
            with torch.no_grad():
                expected = model(torch.tensor([ids]))[0, -1].log_softmax(-1)[token]
            assert_close(value, expected, rtol=1e-4, atol=1e-4)
            ids.append(token)
            rows += 1
        assert not found[len(response) :].any()
    assert rows == played.mask.sum() > 10


def test_it_draws_what_generate_would():
    model, generator = eager(), lambda: torch.Generator().manual_seed(3)
    ids = generate(model, PROMPTS, 10, temperature=1.0, eos_id=EOS, generator=generator())
    played = rollout(model, PROMPTS, 10, EOS, generator=generator())
    for response, row in zip(played.responses, ids[:, 5:].tolist(), strict=True):
        assert row[: len(response)] == response


def test_without_a_cache_it_draws_the_same():
    cached, plain = play(), play(use_cache=False)
    assert cached.responses == plain.responses
    assert_close(cached.logprobs, plain.logprobs, rtol=1e-4, atol=1e-4)


# --- Ends and filling


def test_the_end_counts_and_the_filling_does_not():
    """The filling behind an end is the end token, too; only the first one was written."""
    played = play(repeat=30)
    assert played.ended.any()
    assert not played.ended.all()
    for response, ended, mask, logprobs in zip(
        played.responses, played.ended, played.mask, played.logprobs, strict=True
    ):
        assert mask.sum() == len(response)
        assert mask[: len(response)].all(), "the mask has no gaps"
        assert (response[-1] == EOS) == bool(ended)
        assert EOS not in response[:-1]
        assert (logprobs[mask] < 0).all(), "the end was drawn, and has its probability"
        assert not logprobs[~mask].any()
        assert ended or len(response) == 12


def test_without_an_end_token_nothing_ends():
    played = rollout(eager(), PROMPTS * 40, 6, None, generator=torch.Generator().manual_seed(0))
    assert played.mask.all()
    assert not played.ended.any()
    assert any(EOS in response for response in played.responses)


def test_an_end_token_in_a_prompt_is_no_end():
    played = play(repeat=20)
    with_end = [len(r) for p, r in zip(played.prompts, played.responses, strict=True) if EOS in p]
    assert max(with_end) > 1


def test_rows_to_read_are_prompt_and_response_and_targets_what_was_written():
    mask = torch.tensor([[True, True, True], [True, False, False]])
    played = lay_out([[1, 2], [3]], [[4, 5, EOS], [EOS]], EOS, mask, torch.zeros(2, 3))
    assert played.inputs.tolist() == [[1, 2, 4, 5], [3, 0, 0, 0]]
    assert played.targets.tolist() == [[IGNORED, 4, 5, EOS], [EOS] + [IGNORED] * 3]
    assert played.ended.tolist() == [True, True]
    values = torch.tensor([1.0, 2.0, 3.0, 4.0], requires_grad=True)
    assert played.spread(values).tolist() == [[1, 2, 3], [4, 0, 0]]
    played.spread(values)[:, 0].sum().backward()
    assert values.grad.tolist() == [1, 0, 0, 1]


def test_some_rows_are_as_wide_as_all():
    played = play(repeat=2)
    some = played.rows([5, 1])
    assert some.prompts == [played.prompts[5], played.prompts[1]]
    assert some.responses == [played.responses[5], played.responses[1]]
    assert some.inputs.shape[1] == played.inputs.shape[1]
    model = eager()
    with torch.no_grad():
        assert_close(policy_logprobs(model, some), policy_logprobs(model, played)[[5, 1]])


def test_sampling_leaves_the_model_as_it_was_and_its_tensors_can_be_trained_on():
    model = eager().train()
    played = play(model)
    assert model.training
    policy_logprobs(model, played).sum().backward()
    assert model.blocks[0].mlp.up.weight.grad.abs().max() > 0


def test_what_cannot_be_played():
    with pytest.raises(ValueError, match=r"max_new_tokens is 28: with a prompt of 5 .* 1 to 27"):
        play(n=28)
    with pytest.raises(ValueError, match="max_new_tokens is 0"):
        play(n=0)
    with pytest.raises(ValueError, match="temperature is 0: it must be above 0, to explore"):
        play(temperature=0)


# --- The reference


def test_a_reference_stays_while_the_policy_moves():
    model = eager()
    reference, played = Reference(model), play(model)
    before = policy_logprobs(model, played).detach()
    assert_close(reference(played), before)
    model.blocks[0].mlp.up.weight.data += 0.5
    assert_close(reference(played), before)
    assert (policy_logprobs(model, played) - before).abs().max() > 0.01
    assert not reference(played).requires_grad


def test_with_adapters_it_is_the_same_model_without_them():
    model = eager()
    played = play(model)
    before = policy_logprobs(model, played).detach()
    add_lora(model, rank=2)
    reference = Reference(model)
    assert reference.copy is None, "no second copy"
    for parameter in lora_parameters(model).values():
        parameter.data.normal_(0, 0.3)
    assert_close(reference(played), before)
    assert (policy_logprobs(model, played) - before).abs().max() > 0.1
    with reference.model() as plain:
        assert_close(policy_logprobs(plain, played), before)


def test_another_reference_may_be_given():
    other = eager(seed=1)
    reference, played = Reference(eager(), other), play()
    assert_close(reference(played, 0.7), policy_logprobs(other, played, 0.7).detach())


def test_a_reward_of_texts():
    tokenizer = BPETokenizer([], ["<|endoftext|>"])
    seen = []
    reward = text_reward(lambda prompt, text: seen.append((prompt, text)) or len(text), tokenizer)
    assert reward([[*b"Hi", 256], [*b"?"]], [[*b"Hello", 256], [256]]) == [5.0, 0.0]
    assert seen == [("Hi", "Hello"), ("?", "")]
