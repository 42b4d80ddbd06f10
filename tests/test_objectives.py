"""Each objective asks for what it promises, shows nothing that it asks for, and trains a model."""

from functools import partial

import pytest
import torch
from test_gpt import LLAMA, TINY, make, tokens
from torch.nn import functional as F
from torch.testing import assert_close

from common.gpt import GPT
from common.losses import IGNORED, cross_entropy, weighted_sum, z_loss
from common.objectives import (
    Example,
    causal,
    masked,
    next_token_loss,
    objective_loss,
    prefix,
    span_corruption,
)

V, MASK, SENTINELS = 80, 80, range(81, 97)  # ordinary ids, and the special ones of TINY's 97
OBJECTIVES = {
    "causal": causal,
    "masked": partial(masked, mask_id=MASK, vocab_size=V),
    "prefix": prefix,
    "spans": partial(span_corruption, sentinel_ids=SENTINELS),
}
each_objective = pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES.keys())


def chance(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def texts(B: int = 4, T: int = 24) -> torch.Tensor:
    return tokens(B, T, vocab_size=V)


# --- What each one asks for


def test_causal_is_the_text_and_the_text_one_later():
    ids = torch.tensor([[5, 6, 7, 8]])
    inputs, targets, mask = causal(ids)
    assert (inputs.tolist(), targets.tolist(), mask) == ([[5, 6, 7]], [[6, 7, 8]], None)


def test_masked_hides_15_percent_in_bert_s_proportions():
    ids = texts(B=400, T=100)
    inputs, targets, mask = masked(ids, mask_id=MASK, vocab_size=V, generator=chance())
    chosen = targets != IGNORED
    assert chosen.sum(1).tolist() == [15] * 400
    assert torch.equal(targets[chosen], ids[chosen])
    assert torch.equal(inputs[~chosen], ids[~chosen])
    assert mask.all()
    assert mask.shape == (100, 100)
    hidden = inputs[chosen] == MASK
    kept = inputs[chosen] == ids[chosen]
    assert hidden.float().mean().item() == pytest.approx(0.8, abs=0.02)
    assert kept.float().mean().item() == pytest.approx(0.1 + 0.1 / V, abs=0.02)
    replaced = inputs[chosen][~hidden & ~kept]
    assert replaced.max() < V
    assert len(replaced.unique()) > 0.9 * V
    assert chosen.float().mean(0).std() < 0.04, "some places are chosen more often than others"


def test_masked_asks_for_one_token_at_least():
    targets = masked(texts(T=3), mask_id=MASK, vocab_size=V, generator=chance()).targets
    assert (targets != IGNORED).sum(1).tolist() == [1] * 4


def test_prefix_by_hand():
    inputs, targets, mask = prefix(torch.tensor([[5, 6, 7, 8, 9]]), length=2)
    assert inputs.tolist() == [[5, 6, 7, 8]]
    assert targets.tolist() == [[IGNORED, 7, 8, 9]]
    assert mask[0, 0].int().tolist() == [[1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]


def test_prefix_lengths_are_drawn_for_each_row():
    targets = prefix(texts(B=2000, T=6), generator=chance()).targets
    counts = (targets != IGNORED).sum(1).bincount(minlength=6)
    assert counts[0] == 0
    assert (counts[1:] > 300).all(), f"of 2000, five lengths: {counts.tolist()}"


def rebuilt(example: Example, row: int) -> list[int]:
    """The text that a span-corrupted example was made from."""
    wanted = example.targets[row]
    start = int((wanted != IGNORED).nonzero()[0])
    whole = [*example.inputs[row].tolist(), int(wanted[-1])]
    text, answer, spans = whole[: start + 1], whole[start + 1 :], {}
    assert answer == wanted[start:].tolist()
    for token in answer:
        if token in SENTINELS:
            spans[token] = []
        else:
            spans[list(spans)[-1]].append(token)
    assert list(spans) == list(SENTINELS[: len(spans)])
    assert spans[list(spans)[-1]] == []
    return [x for token in text for x in spans.get(token, [token])]


@pytest.mark.parametrize(("T", "n_cut", "n_spans"), [(24, 4, 1), (64, 10, 3), (7, 1, 1)])
def test_spans_and_what_is_left_are_the_text(T, n_cut, n_spans):
    ids = texts(T=T)
    example = OBJECTIVES["spans"](ids, generator=chance())
    assert example.inputs.shape == (4, T + 2 * n_spans)
    assert (example.targets != IGNORED).sum(1).tolist() == [n_cut + n_spans + 1] * 4
    assert [rebuilt(example, row) for row in range(4)] == ids.tolist()


def test_spans_are_cut_everywhere_and_in_all_lengths():
    ids = torch.arange(20).expand(3000, 20)
    example = span_corruption(
        ids, sentinel_ids=SENTINELS, rate=0.3, mean_length=3.0, generator=chance()
    )
    cut = torch.bincount(example.targets[example.targets.ge(0) & example.targets.lt(80)])
    assert (cut > 300).all(), cut.tolist()
    assert (cut < 1200).all(), cut.tolist()
    first = (example.targets == SENTINELS[1]).int().argmax(1)
    first = first - (example.targets == SENTINELS[0]).int().argmax(1) - 1
    assert first.unique().tolist() == [1, 2, 3, 4, 5]


# --- Nobody sees what is asked for


@pytest.mark.parametrize("name", ["causal", "prefix", "spans"])
def test_what_is_to_be_predicted_is_not_seen(name):
    inputs, targets, mask = OBJECTIVES[name](texts(B=1), generator=chance())
    model, places = make(TINY), (targets[0] != IGNORED).nonzero().flatten().tolist()
    with torch.no_grad():
        logits = model.head(model.hidden(inputs, mask=mask))
        for t in places[:-1]:
            changed = inputs.clone()
            changed[0, t + 1 :] = (changed[0, t + 1 :] + 1) % V  # the target of t, and all after it
            found = model.head(model.hidden(changed, mask=mask))
            assert_close(found[:, places[0] : t + 1], logits[:, places[0] : t + 1])


def test_what_is_masked_leaves_no_trace_in_the_inputs():
    ids, objective = texts(B=40), OBJECTIVES["masked"]
    inputs, targets, _ = objective(ids, generator=chance())
    other = torch.where(inputs == MASK, (ids + 1) % V, ids)
    again = objective(other, generator=chance())
    assert torch.equal(again.inputs, inputs)
    assert ((again.targets != targets) == (inputs == MASK)).all()


@each_objective
def test_what_may_be_seen_is_seen(objective):
    """The first token that is predicted depends on each token that its mask shows."""
    inputs, targets, mask = objective(texts(B=1), generator=chance())
    model, t = make(TINY), int((targets[0] != IGNORED).nonzero()[-1])
    with torch.no_grad():
        logits = model.head(model.hidden(inputs, mask=mask))[0, t]
        for s in range(inputs.shape[1] if mask is not None else t + 1):
            visible = s <= t if mask is None else bool(mask.reshape(-1, *mask.shape[-2:])[0, t, s])
            changed = inputs.clone()
            changed[0, s] = (changed[0, s] + 1) % V
            found = model.head(model.hidden(changed, mask=mask))[0, t]
            assert torch.equal(found, logits) != visible


# --- One interface


@each_objective
def test_chance_comes_from_the_generator(objective):
    ids = texts()
    a, b, c = (objective(ids, generator=chance(seed)) for seed in (0, 0, 1))
    assert torch.equal(a.inputs, b.inputs)
    assert torch.equal(a.targets, b.targets)
    differs = a.inputs.shape != c.inputs.shape or not torch.equal(a.targets, c.targets)
    assert differs == (objective is not causal)
    assert torch.equal(ids, texts()), "the ids that were given have changed"


@each_objective
@pytest.mark.parametrize("config", [TINY, LLAMA], ids=["gpt2", "llama"])
def test_any_loss_of_any_objective_has_a_gradient(objective, config):
    example = objective(texts(), generator=chance())
    model = make(config)
    logits = model.head(model.hidden(example.inputs, mask=example.mask))
    plain = F.cross_entropy(logits.flatten(0, 1), example.targets.flatten())
    assert_close(objective_loss(model, *example), plain)
    assert_close(next_token_loss(model, *example), plain)
    extended = weighted_sum({cross_entropy: 1.0, z_loss: 0.1})
    assert objective_loss(model, *example, loss=extended) > plain
    objective_loss(model, *example, loss=extended).backward()
    assert all(p.grad.abs().max() > 0 for p in model.parameters() if p.dim() == 2)


@each_objective
def test_a_model_learns_it(objective):
    torch.manual_seed(0)
    model, generator = GPT(TINY), chance()
    text = texts(B=1, T=20).expand(8, 20)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    losses = []
    for _ in range(100):
        loss = objective_loss(model, *objective(text, generator=generator))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.4 * sum(losses[:5])


@pytest.mark.parametrize("config", [TINY, LLAMA])
def test_next_token_loss_trains_like_the_ordinary_one(config):
    ids, gradients = tokens(3, 17), []
    for loss_of in (
        lambda model: next_token_loss(model, ids[:, :-1], ids[:, 1:]),
        lambda model: F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten()),
    ):
        model = make(config)
        loss_of(model).backward()
        gradients.append([p.grad for p in model.parameters()])
    for a, b in zip(*gradients, strict=True):
        assert_close(a, b, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("make_example", "message"),
    [
        (lambda: prefix(texts(T=8), length=8), "a prefix of 8 in 8 tokens"),
        (lambda: prefix(texts(T=8), length=0), "a prefix of 0 in 8 tokens"),
        (lambda: prefix(texts(T=1)), "in 1 tokens"),
        (lambda: masked(texts(), mask_id=MASK, vocab_size=V, rate=1.5), "rate is 1.5"),
        (lambda: masked(texts(), mask_id=MASK, vocab_size=V, rate=0.0), "rate is 0.0"),
        (lambda: span_corruption(texts(T=100), sentinel_ids=[81]), "5 spans need 6 sentinels"),
        (lambda: span_corruption(texts(T=1), sentinel_ids=SENTINELS), "1 tokens are too few"),
    ],
)
def test_what_makes_no_sense_is_refused_in_one_line(make_example, message):
    with pytest.raises(ValueError, match=message) as raised:
        make_example()
    assert "\n" not in str(raised.value)
