"""Generation does as it is told, and neither cache, padding nor neighbours change a token."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_gpt import LLAMA, TINY, make
from torch.testing import assert_close

from common.generation import (
    generate,
    keep_top_k,
    keep_top_p,
    left_pad,
    sampler,
    stream,
)

CONTEXT = 16
MODELS = {
    (heads, groups, position): make(
        replace(
            LLAMA if position == "rotary" else TINY,
            n_heads=heads,
            n_kv_heads=groups,
            context_length=CONTEXT,
        )
    )
    for heads, groups in ((1, 1), (4, 4), (4, 2), (6, 1))
    for position in ("learned", "rotary")
}
GPT2, LLAMA_LIKE = MODELS[4, 4, "learned"], MODELS[4, 2, "rotary"]


def prompts(*lengths: int, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(97, (n,), generator=generator).tolist() for n in lengths]


def written_out(model, prompt: list[int], n: int) -> list[int]:
    """Greedy generation in its plainest form: the whole window, all logits, for one token."""
    ids = torch.tensor([prompt])
    for _ in range(n):
        with torch.no_grad():
            logits = model(ids[:, -CONTEXT:])
        ids = torch.cat((ids, logits[:, -1:].argmax(-1)), dim=1)
    return ids[0].tolist()


@pytest.mark.parametrize("model", MODELS.values(), ids=str)
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("length", [1, 5, CONTEXT, CONTEXT + 3])
def test_cached_equals_uncached_equals_written_out(model, batch, length):
    rows = prompts(*[length] * batch)
    cached = generate(model, rows, 8)
    assert torch.equal(cached, generate(model, rows, 8, use_cache=False))
    assert cached.tolist() == [written_out(model, row, 8) for row in rows]


@given(
    st.sampled_from([GPT2, LLAMA_LIKE]),
    st.lists(st.integers(1, CONTEXT + 4), min_size=1, max_size=4),
    st.integers(0, 12),
)
@settings(max_examples=25, deadline=None)
def test_ragged_prompts_come_out_as_if_alone(model, lengths, n):
    rows = prompts(*lengths)
    together = generate(model, rows, n)
    assert together.shape == (len(rows), max(lengths) + n)
    for row, out in zip(rows, together.tolist(), strict=True):
        assert out[-(len(row) + n) :] == written_out(model, row, n)


def test_it_writes_more_than_one_token_over_and_over():
    """The tests above would prove little on a model that only repeats itself."""
    for model in MODELS.values():
        assert len(set(generate(model, prompts(5), 8)[0, 5:].tolist())) > 2


def test_a_tensor_of_prompts_is_returned_with_what_follows():
    ids = torch.tensor(prompts(5, 5))
    out = generate(GPT2, ids, 3)
    assert out.shape == (2, 8)
    assert torch.equal(out[:, :5], ids)
    assert torch.equal(generate(GPT2, ids, 0), ids)


def test_a_stream_yields_the_same_tokens_one_by_one():
    rows, whole = prompts(4, 6), generate(GPT2, prompts(4, 6), 5)
    tokens = list(stream(GPT2, rows, 5))
    assert [token.shape for token in tokens] == 5 * [(2,)]
    assert torch.equal(torch.stack(tokens, 1), whole[:, 6:])


def test_no_pass_is_wasted_and_only_the_last_position_meets_the_head(monkeypatch):
    reads, heads = [], []
    hidden, head = GPT2.hidden, GPT2.head.forward
    monkeypatch.setattr(
        GPT2, "hidden", lambda ids, c: (reads.append(ids.shape[1]), hidden(ids, c))[1]
    )
    monkeypatch.setattr(GPT2.head, "forward", lambda x: (heads.append(x.shape), head(x))[1])
    generate(GPT2, prompts(6), 4)
    assert reads == [6, 1, 1, 1]
    assert heads == 4 * [(1, 48)]


def test_a_row_that_ends_stays_ended_while_others_go_on():
    rows = prompts(5, 5, 5)
    written = generate(LLAMA_LIKE, rows, 8)[:, 5:].tolist()
    eos = next(t for t in written[0][:6] if t not in written[1] + written[2])
    end = written[0].index(eos) + 1
    assert set(written[0][end:]) - {eos}  # left alone, row 0 would write something else
    ended = generate(LLAMA_LIKE, rows, 8, eos_id=eos)[:, 5:].tolist()
    assert ended == [written[0][:end] + (8 - end) * [eos], written[1], written[2]]
    assert generate(LLAMA_LIKE, rows[:1], 8, eos_id=eos)[0, 5:].tolist() == written[0][:end]


def test_token_0_can_end_a_text():
    model = make(replace(TINY, vocab_size=1))
    assert generate(model, [[0]], 5, eos_id=0).tolist() == [[0, 0]]


def test_generated_tokens_can_be_trained_on():
    out = generate(GPT2, prompts(4), 4)
    GPT2(out).sum().backward()  # an inference tensor would be refused here
    GPT2.zero_grad()


def test_dropout_rests_while_generating_and_comes_back():
    model = make(replace(TINY, dropout=0.5)).train()
    assert torch.equal(generate(model, prompts(4), 6), generate(model, prompts(4), 6))
    assert model.training
    abandoned = stream(model, prompts(4), 6)
    next(abandoned)
    abandoned.close()
    assert model.training


# --- Sampling


LOGITS = torch.tensor([[0.1, 0.5, 0.15, 0.25], [0.4, 0.3, 0.2, 0.1]]).log()


def kept(logits: torch.Tensor) -> list[list[bool]]:
    return logits.isfinite().tolist()


def test_top_k_keeps_the_k_likeliest():
    assert kept(keep_top_k(LOGITS, 2)) == [[False, True, False, True], [True, True, False, False]]
    assert torch.equal(keep_top_k(LOGITS, 9), LOGITS)


def test_top_p_keeps_the_fewest_that_reach_p():
    assert kept(keep_top_p(LOGITS, 0.7)) == [[False, True, False, True], [True, True, False, False]]
    assert kept(keep_top_p(LOGITS, 0.8)) == [[False, True, True, True], [True, True, True, False]]
    assert kept(keep_top_p(LOGITS, 0.01)) == [
        [False, True, False, False],
        [True, False, False, False],
    ]
    assert torch.equal(keep_top_p(LOGITS, 1.0), LOGITS)


def test_samples_follow_the_model_at_its_temperature():
    choose = sampler(temperature=0.5, generator=torch.Generator().manual_seed(0))
    drawn = choose(LOGITS[:1].expand(20_000, -1)).bincount(minlength=4) / 20_000
    assert_close(drawn, (LOGITS[0] / 0.5).softmax(0), atol=0.01, rtol=0)


def test_top_k_and_top_p_bound_the_samples():
    generator = torch.Generator().manual_seed(0)
    many = LOGITS[:1].expand(500, -1)
    assert set(sampler(5.0, top_k=2, generator=generator)(many).tolist()) == {1, 3}
    assert set(sampler(1.0, top_p=0.7, generator=generator)(many).tolist()) == {1, 3}


def test_the_same_seed_writes_the_same_text():
    def write(seed: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return generate(GPT2, prompts(4), 12, temperature=1.5, generator=generator)

    assert torch.equal(write(0), write(0))
    assert not torch.equal(write(0), write(1))


def test_one_candidate_is_the_greedy_choice():
    greedy = generate(GPT2, prompts(4, 7), 6)
    assert torch.equal(generate(GPT2, prompts(4, 7), 6, temperature=1.0, top_k=1), greedy)
    assert torch.equal(generate(GPT2, prompts(4, 7), 6, temperature=1.0, top_p=1e-9), greedy)


# --- Bad input


@pytest.mark.parametrize(
    "setting", [{"temperature": -1.0}, {"top_k": 0}, {"top_p": 0.0}, {"top_p": 1.5}]
)
def test_settings_out_of_range_are_refused(setting):
    with pytest.raises(ValueError, match=next(iter(setting))):
        generate(GPT2, [[1]], 1, **setting)


@pytest.mark.parametrize("bad", [[], [[]], [[1], []], [1, 2, 3], torch.ones(1, 0), torch.ones(3)])
def test_prompts_that_are_none_are_refused(bad):
    with pytest.raises(ValueError, match="at least one token"):
        generate(GPT2, bad, 1)


def test_a_negative_length_is_refused():
    with pytest.raises(ValueError, match="max_new_tokens"):
        generate(GPT2, [[1]], -1)


def test_left_pad_fills_at_the_left():
    ids, padding = left_pad([[1, 2, 3], [4]], fill_id=9)
    assert ids.tolist() == [[1, 2, 3], [9, 9, 4]]
    assert padding.tolist() == [0, 2]
