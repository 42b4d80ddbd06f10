"""What is frozen can be computed once: the same outputs, the same gradients."""

import pytest
import torch
from test_classifier import CONFIGS, TEXTS, each_family, each_pool, tiny
from test_gpt import make
from torch.nn import functional as F
from torch.testing import assert_close

from common.fine_tuning import LengthBatches, train_only, trained_parameters
from common.pooled import PooledGPT, lower_states, real_tokens


@pytest.mark.parametrize(
    ("patterns", "frozen"),
    [([], 2), (["final_norm.*"], 2), (["blocks.1.*"], 1), (["*.mlp.up.weight"], 0), (["*"], 0)],
    ids=str,
)
def test_how_many_blocks_stay_as_they_are(patterns, frozen):
    assert train_only(tiny(), patterns).n_frozen == frozen


def test_training_the_embeddings_leaves_nothing_to_cache():
    for config, name in (("gpt2", "position_embedding.weight"), ("llama", "token_embedding.*")):
        assert train_only(tiny(CONFIGS[config]), [name]).n_frozen == 0


def test_the_head_is_always_trained_and_patterns_must_match():
    classifier = train_only(tiny(), ["blocks.1.attention.*"])
    names = set(trained_parameters(classifier))
    assert {"head.weight", "head.bias"} < names
    assert {name.rsplit(".", 2)[0] for name in names - {"head.weight", "head.bias"}} == {
        "gpt.blocks.1.attention"
    }
    assert set(trained_parameters(train_only(classifier))) == {"head.weight", "head.bias"}
    with pytest.raises(ValueError, match=r"no parameter is called 'block\.1\.\*'"):
        train_only(classifier, ["block.1.*"])


@each_family
@each_pool
@pytest.mark.parametrize("patterns", [[], ["blocks.1.*"], ["blocks.0.mlp.*"], ["*"]], ids=str)
def test_cached_states_give_the_same_answers_and_gradients(config, pool, patterns):
    classifier = train_only(tiny(config, pool=pool), patterns)
    rows, targets = classifier.encode(TEXTS), [0, 1, 1, 0, 1, 0]
    results = []
    for x in (rows, lower_states(classifier, rows, batch_size=4)):
        classifier.zero_grad()
        batch, lengths, wanted = next(iter(LengthBatches(x, targets, 10)))
        logits = classifier(batch, lengths)
        F.cross_entropy(logits, wanted).backward()
        grads = {n: p.grad for n, p in trained_parameters(classifier).items()}
        order = dict(sorted((n, g.clone()) for n, g in grads.items() if g is not None))
        results.append((classifier.probabilities(x), order))
    (plain, gradients), (cached, others) = results
    assert_close(cached, plain, rtol=1e-4, atol=1e-5)
    assert gradients.keys() == others.keys()
    assert "head.weight" in gradients
    for name, gradient in gradients.items():
        assert_close(others[name], gradient, rtol=1e-3, atol=1e-5)


def test_only_one_state_is_kept_where_all_blocks_are_frozen():
    classifier = train_only(tiny(), ["final_norm.*"])
    states = lower_states(classifier, classifier.encode(TEXTS))
    assert {tuple(state.shape) for state in states} == {(1, 48)}
    assert not any(state.requires_grad for state in states)


@each_family
def test_outputs_are_those_of_the_head_on_the_last_token(config):
    model = PooledGPT(make(config), n_outputs=1)
    model.head.weight.data.normal_(generator=torch.Generator().manual_seed(0))
    rows = [torch.randint(256, (n,)) for n in (5, 2, 9)]
    with torch.no_grad():
        expected = [model.head(model.gpt.hidden(row[None])[:, -1]) for row in rows]
    assert_close(model.outputs(rows, batch_size=2), torch.cat(expected))


def test_real_tokens():
    found = real_tokens(torch.zeros(2, 3, 1), torch.tensor([1, 3]))[..., 0]
    assert found.tolist() == [[True, False, False], [True, True, True]]
