"""Every recipe trains what it says, from few messages, the same way every time."""

import copy
import random
from dataclasses import replace

import pytest
import torch
from test_classifier import BYTES, CONFIGS, LABELS
from torch.testing import assert_close

from common.classifier import Classifier, trained_parameters
from common.classifier_training import RECIPES, KeepBest, Recipe, fine_tune, loss_of, prepare, score
from common.evaluation import Evaluation
from common.gpt import GPT, count_parameters
from common.messages import Message

METHODS = {
    "head": Recipe(n_blocks=0, learning_rate=0.05, n_messages=600),
    "last-block": Recipe(n_blocks=1, learning_rate=3e-3, n_messages=600),
    "lora": Recipe(n_blocks=2, rank=4, learning_rate=1e-2, n_messages=600),
    "all": Recipe(n_blocks=None, learning_rate=3e-3, n_messages=600),
}
each_method = pytest.mark.parametrize("name", METHODS)


WORDS = ("see", "you", "at", "home", "soon", "call", "me", "when", "it", "is", "late", "ok")


def made_up(n: int, seed: int = 0) -> list[Message]:
    """Half of them end in a number: with so plain a rule, to learn nothing is to be broken."""
    chance, words = random.Random(seed), WORDS
    messages = []
    for i in range(n):
        text = " ".join(chance.choices(words, k=chance.randint(1, 3)))
        spam = f"{text} {chance.randint(10, 99)}"
        messages.append(Message(spam[-24:], "spam") if i % 2 else Message(text, "ham"))
    return messages


TRAIN, TEST = made_up(48), made_up(100, seed=1)


def fresh(seed: int = 0, family: str = "llama") -> Classifier:
    torch.manual_seed(seed)
    return Classifier(GPT(CONFIGS[family]).eval(), BYTES, LABELS)


def tuned(recipe: Recipe, classifier: Classifier | None = None, **options) -> Classifier:
    classifier = classifier or fresh()
    fine_tune(classifier, TRAIN, recipe, progress=False, **options)
    return classifier


# --- The recipes


@each_method
def test_each_method_learns_a_plain_rule(name):
    before = score(fresh(), TEST)
    assert before.accuracy == 0.5, "a new head has no opinion"
    classifier = tuned(METHODS[name])
    scores = score(classifier, TEST)
    assert scores.accuracy >= 0.9, scores
    assert scores.n == 100
    assert not classifier.training


@each_method
def test_each_method_trains_its_part_and_nothing_else(name):
    classifier = fresh()
    before = {n: p.clone() for n, p in classifier.state_dict().items()}
    tuned(replace(METHODS[name], n_messages=96), classifier)
    after = classifier.state_dict()
    moved = {n for n in after if n not in before or not torch.equal(after[n], before[n])}
    assert moved == set(trained_parameters(classifier))
    parts = {".".join(n.split(".")[:3]) if n.startswith("gpt.blocks") else n for n in moved}
    heads, blocks = {"head.weight", "head.bias"}, {"gpt.blocks.0", "gpt.blocks.1"}
    assert heads <= moved
    expected = {
        "head": set(),
        "last-block": {"gpt.blocks.1", "gpt.final_norm.weight"},
        "lora": blocks,
        "all": {*blocks, "gpt.final_norm.weight", "gpt.token_embedding.weight"},
    }
    assert parts - heads == expected[name]
    if name == "all":
        n_trained = sum(p.numel() for p in trained_parameters(classifier).values())
        assert n_trained == sum(count_parameters(CONFIGS["llama"]).values()) + 2 * 48 + 2


@each_method
def test_the_seed_decides_everything(name):
    recipe = replace(METHODS[name], n_messages=96)
    of = lambda seed: tuned(recipe, seed=seed).head.weight
    assert torch.equal(of(1), of(1))
    assert not torch.equal(of(1), of(2))


def test_the_shipped_recipes_fit_a_real_model():
    """SmolLM2's 30 blocks, each made tiny."""
    config = replace(CONFIGS["llama"], n_layers=30)
    for name, recipe in RECIPES.items():
        classifier = prepare(Classifier(GPT(config), BYTES, LABELS), recipe)
        frozen = 0 if recipe.n_blocks is None else 30 - recipe.n_blocks
        assert classifier.n_frozen == frozen, name
        assert recipe.settings(512).n_steps * recipe.batch_size >= 2 * 512
        assert recipe.settings(1).n_steps >= 1


def test_gpt2_takes_the_same_recipes():
    for recipe in METHODS.values():
        tuned(replace(recipe, n_messages=96), fresh(family="gpt2"))


def test_caching_the_frozen_blocks_changes_no_step(monkeypatch):
    recipe = replace(METHODS["last-block"], n_messages=96)
    cached = tuned(recipe)
    monkeypatch.setattr("common.classifier_training.lower_states", lambda classifier, rows: rows)
    plain = tuned(recipe)
    for (name, a), b in zip(
        trained_parameters(cached).items(), trained_parameters(plain).values(), strict=True
    ):
        assert_close(a, b, rtol=1e-3, atol=1e-5, msg=name)


def test_what_is_remembered_is_not_computed_again(monkeypatch):
    recipe, memory = replace(METHODS["last-block"], n_messages=96), {}
    plain = tuned(recipe)
    expected = score(plain, TEST)
    first = tuned(recipe, memory=memory)
    assert score(first, TEST, memory).accuracy == expected.accuracy
    assert set(memory) == {m.text for m in TRAIN + TEST}
    asked = []
    real = Classifier.lower
    monkeypatch.setattr(Classifier, "lower", lambda self, ids: asked.append(1) or real(self, ids))
    again = tuned(recipe, memory=memory)
    assert score(again, TEST, memory).accuracy == expected.accuracy
    assert not asked
    assert torch.equal(again.head.weight, first.head.weight)


def test_a_model_with_fewer_blocks_trains_all_of_them():
    for recipe in (Recipe(n_blocks=3), Recipe(n_blocks=3, rank=1)):
        assert prepare(fresh(), recipe).n_frozen == 0


# --- Messages


def test_labels_are_checked():
    with pytest.raises(ValueError, match="no spam among the 24 labelled messages"):
        fine_tune(fresh(), TRAIN[::2], METHODS["head"])
    with pytest.raises(ValueError, match="label 'eggs' is none of ham, spam"):
        fine_tune(fresh(), [*TRAIN, Message("hi", "eggs")], METHODS["head"])
    with pytest.raises(ValueError, match="text 49 of 49 is empty"):
        fine_tune(fresh(), [*TRAIN, Message("", "ham")], METHODS["head"])


def test_scores_are_of_the_predictions():
    classifier = tuned(METHODS["head"])
    found = classifier.predict([m.text for m in TEST])
    right = sum(p.label == m.label for p, m in zip(found, TEST, strict=True))
    assert score(classifier, TEST).accuracy == right / 100


# --- Validation


def test_the_best_look_is_kept():
    keep, classifier = KeepBest([]), fresh()
    losses, heads = [0.9, 0.3, 0.5], []
    for loss in losses:
        classifier.head.weight.data += 1
        heads.append(classifier.head.weight.detach().clone())
        keep.look = lambda _, loss=loss: Evaluation.of(loss, None, None)
        assert keep(classifier).loss == loss
    keep.restore(classifier)
    assert torch.equal(classifier.head.weight, heads[1])


def test_with_validation_the_weights_are_those_of_the_lowest_loss():
    wild = replace(METHODS["head"], learning_rate=3.0)  # so high that it gets worse again
    classifier, validation = fresh(), made_up(30, seed=2)
    history = fine_tune(classifier, TRAIN, wild, validation=validation, progress=False)
    losses = [found.loss for found in history.evaluations.values()]
    assert min(losses) < losses[-1], "or there was nothing to choose"
    rows = classifier.encode([m.text for m in validation])
    p = classifier.probabilities(rows)[range(30), [LABELS.index(m.label) for m in validation]]
    assert -p.log().mean().item() == pytest.approx(min(losses), rel=1e-3)


def test_a_loss_is_the_cross_entropy_of_the_logits():
    classifier = copy.deepcopy(fresh())
    ids, lengths = torch.randint(256, (3, 5)), torch.tensor([5, 2, 1])
    loss = loss_of(classifier, ids, lengths, torch.tensor([0, 1, 1]))
    assert loss.item() == pytest.approx(0.693147, abs=1e-5)
