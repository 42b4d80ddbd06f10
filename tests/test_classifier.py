"""A text's label depends on the text alone: not on neighbours, filling, caching or the disk."""

import json
import warnings
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_gpt import LLAMA, TINY, make
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from common.classifier import (
    CLASSIFIER_KEY,
    Classifier,
    LengthBatches,
    load_classifier,
    lower_states,
    save_classifier,
    train_only,
    trained_parameters,
)
from common.gguf_file import WeightsFileError
from common.lora import add_lora, lora_parameters, merge_lora, save_lora
from common.tokenizer import BPETokenizer

BYTES = BPETokenizer([])  # a token is a byte
LABELS = ("ham", "spam")
CONFIGS = {
    "gpt2": replace(TINY, vocab_size=256),
    "llama": replace(LLAMA, vocab_size=256),
    "untied": replace(LLAMA, vocab_size=256, tie_embeddings=False),
}
TEXTS = ["ok", "Call me when you are home", "WIN £100", "a", "?", "See you at eight tonight"]
each_family = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
each_pool = pytest.mark.parametrize("pool", ["last", "mean", "first"])


def tiny(config=CONFIGS["llama"], labels=LABELS, seed: int = 0, **options) -> Classifier:
    """A classifier whose head is not zero, so that its answers differ."""
    classifier = Classifier(make(config, seed=seed), BYTES, labels, **options).eval()
    classifier.head.weight.data.normal_(0, 0.2, generator=torch.Generator().manual_seed(seed))
    return classifier


def changed(classifier: Classifier, how: str) -> Classifier:
    """Fine-tuned, as it were."""
    gpt = classifier.gpt
    if how == "all":
        train_only(classifier, ["*"])
    elif how == "block":
        train_only(classifier, ["blocks.1.*", "final_norm.*"])
    elif how == "head":
        train_only(classifier)
    else:
        train_only(classifier)
        add_lora(gpt.blocks[1:], rank=2)
    generator = torch.Generator().manual_seed(7)
    for parameter in trained_parameters(classifier).values():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    if how == "merged":
        merge_lora(gpt)
    return classifier


def answers(classifier: Classifier, texts=TEXTS) -> torch.Tensor:
    return torch.tensor([list(p.probabilities.values()) for p in classifier.predict(texts)])


# --- What it computes


@each_family
@each_pool
def test_it_is_the_head_on_what_is_pooled(config, pool):
    classifier = tiny(config, pool=pool)
    for text, found in zip(TEXTS, answers(classifier), strict=True):
        ids = torch.tensor([BYTES.encode(text)])
        with torch.no_grad():
            classifier.gpt.final_norm, norm = nn.Identity(), classifier.gpt.final_norm
            states = classifier.gpt.hidden(ids)[0]  # (T, C)
            classifier.gpt.final_norm = norm
            pooled = {"last": states[-1], "first": states[0], "mean": states.mean(0)}[pool]
            expected = (classifier.head.weight @ norm(pooled) + classifier.head.bias).softmax(-1)
        assert_close(found, expected)


@each_pool
@pytest.mark.parametrize("batch_size", [2, 4])
@pytest.mark.parametrize("config", list(CONFIGS.values())[:2], ids=["gpt2", "llama"])
def test_neighbours_and_filling_change_nothing(config, batch_size, pool):
    classifier = tiny(config, pool=pool)
    rows = classifier.encode(TEXTS)
    together = classifier.probabilities(rows, batch_size)
    assert_close(together, torch.cat([classifier.probabilities([row]) for row in rows]))
    assert together[:, 1].std() > 0.01, "or this would prove nothing"


def test_filling_is_never_read():
    classifier = tiny()
    row, lengths = classifier.encode(TEXTS[1:2])[0], torch.tensor([10])
    ids = torch.stack([row[:20], torch.cat([row[:10], torch.randint(256, (10,))])])
    with torch.no_grad():
        assert_close(*classifier(ids, lengths.repeat(2)))


def test_the_first_token_knows_nothing_of_the_rest():
    first, last = (answers(tiny(pool=pool), ["spam is here", "s"]) for pool in ("first", "last"))
    assert_close(first[0], first[1])
    assert (last[0] - last[1]).abs().max() > 1e-3


def test_a_new_head_has_no_opinion():
    classifier = Classifier(make(CONFIGS["gpt2"]), BYTES, ("a", "b", "c"))
    assert_close(answers(classifier), torch.full((len(TEXTS), 3), 1 / 3))


def test_predictions_are_in_order_and_say_how_sure():
    classifier = tiny(labels=("a", "b", "c"))
    found = classifier.predict(TEXTS)
    for one, text in zip(found, TEXTS, strict=True):
        alone = classifier.predict([text])[0]
        assert one.label == alone.label == max(one.probabilities, key=one.probabilities.get)
        assert one.probability == one.probabilities[one.label]
        assert sum(one.probabilities.values()) == pytest.approx(1)
        assert list(one.probabilities) == ["a", "b", "c"]


def test_predicting_needs_no_gradient_and_disturbs_no_training():
    classifier = tiny(replace(CONFIGS["gpt2"], dropout=0.5)).train()
    assert_close(answers(classifier), answers(classifier))
    assert classifier.training
    assert not classifier.probabilities(classifier.encode(["a"])).requires_grad


# --- Texts that are not as they should be


@pytest.mark.parametrize("texts", [["fine", ""], ["fine", " \n\t"]], ids=repr)
def test_empty_texts(texts):
    with pytest.raises(ValueError, match="text 2 of 2 is empty: leave it out"):
        tiny().predict(texts)


def test_a_text_in_place_of_a_list():
    with pytest.raises(ValueError, match=r"predict\(\[text\]\)"):
        tiny().predict("Hello")


def test_a_text_of_10_000_characters_is_cut_with_a_note():
    classifier = tiny()
    longest = classifier.gpt.config.context_length
    with pytest.warns(UserWarning, match=f"text 2 has 10,000 tokens: what is beyond {longest} is"):
        found = answers(classifier, ["a", "xy" * 5000])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_close(found[1], answers(classifier, ["xy" * (longest // 2)])[0])


def test_no_texts_have_no_predictions():
    assert tiny().predict([]) == []


def test_any_characters_are_read():
    assert len(tiny().predict(["\x00", "😀", "\ud800", "नमस्ते", "<|endoftext|>"])) == 5


@pytest.mark.parametrize("labels", [(), ("spam",), ("spam", "spam")], ids=str)
def test_labels_that_are_none(labels):
    with pytest.raises(ValueError, match="two or more different ones"):
        Classifier(make(CONFIGS["gpt2"]), BYTES, labels)


def test_an_unknown_pool():
    with pytest.raises(ValueError, match="pool is 'middle', it must be one of last, mean, first"):
        tiny(pool="middle")


# --- Freezing and caching


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


# --- Batches


def test_an_epoch_is_every_row_once_with_its_target_and_length():
    rows = [torch.full((n,), n) for n in (3, 9, 1, 4, 4, 7, 2, 8, 5, 6)]
    batches = LengthBatches(rows, range(10), 3, torch.Generator().manual_seed(0))
    assert len(batches) == 4
    epochs = [list(batches) for _ in range(4)]
    for epoch in epochs:
        assert sorted(int(t) for *_, targets in epoch for t in targets) == list(range(10))
        for x, lengths, targets in epoch:
            for row, length, target in zip(x, lengths, targets, strict=True):
                assert torch.equal(row[:length], rows[target])
                assert not row[length:].any()
    groups = {frozenset(frozenset(t.tolist()) for *_, t in epoch) for epoch in epochs}
    assert len(groups) > 1, "not always the same ones meet"


def test_rows_of_similar_length_come_together():
    generator = torch.Generator().manual_seed(0)
    rows = [torch.ones(int(n)) for n in torch.randint(1, 60, (160,), generator=generator)]
    used = sum(len(row) for row in rows)
    size = lambda batches: sum(x.numel() for x, *_ in batches)
    assert size(LengthBatches(rows, range(160), 16, generator)) < 1.3 * used
    assert size(LengthBatches(rows, range(160), 16)) < 1.1 * used
    assert nn.utils.rnn.pad_sequence(rows[:16]).numel() > 1.5 * sum(map(len, rows[:16]))


def test_a_batch_size_of_0():
    with pytest.raises(ValueError, match="batch_size is 0"):
        LengthBatches([], [], 0)


# --- On disk


@pytest.mark.parametrize("how", ["head", "block", "all", "lora", "merged"])
@pytest.mark.parametrize("family", CONFIGS)
def test_saved_and_loaded_it_says_the_same(tmp_path, how, family):
    classifier = changed(tiny(CONFIGS[family]), how)
    path = tmp_path / "c.safetensors"
    save_classifier(classifier, path, "base")
    again = load_classifier(path, (make(CONFIGS[family]), BYTES))
    assert torch.equal(answers(again), answers(classifier))
    assert not again.training
    assert (again.labels, again.pool) == (classifier.labels, classifier.pool)
    assert list(tmp_path.iterdir()) == [path]


def test_only_what_differs_from_the_pretrained_weights_is_saved(tmp_path):
    head, saved = {"head.weight", "head.bias"}, {}
    for how in ("head", "lora", "block"):
        classifier = changed(tiny(), how)
        save_classifier(classifier, tmp_path / how, "base")
        saved[how] = set(load_file(tmp_path / how))
        assert head <= saved[how]
    assert saved["head"] == head
    assert saved["lora"] - head == {
        f"gpt.{name}" for name in lora_parameters(changed(tiny(), "lora").gpt)
    }
    assert {".".join(name.split(".")[1:3]) for name in saved["block"] - head} == {
        "blocks.1",
        "final_norm.weight",
    }


def test_a_file_saved_again_is_the_same_classifier(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    save_classifier(changed(tiny(), "block"), one, "base")
    again = load_classifier(one, (make(CONFIGS["llama"]), BYTES))
    save_classifier(again, two, "base")
    assert load_file(one).keys() == load_file(two).keys()
    third = load_classifier(two, (make(CONFIGS["llama"]), BYTES))
    assert torch.equal(answers(third), answers(again))


def test_files_that_cannot_be_meant(tmp_path):
    path, other = tmp_path / "c.safetensors", tmp_path / "other.safetensors"
    save_classifier(changed(tiny(), "lora"), path, "base")
    base = lambda **options: (make(CONFIGS["llama"], **options), BYTES)
    with pytest.raises(WeightsFileError, match="fine-tuned on other weights than these"):
        load_classifier(path, base(seed=1))
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_classifier(other, base())
    save_lora(changed(tiny(), "lora").gpt, other)
    with pytest.raises(WeightsFileError, match="it holds no classifier"):
        load_classifier(other, base())
    other.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(WeightsFileError, match="choose a safetensors file"):
        load_classifier(other, base())
    with safe_open(path, "pt") as file:
        about = json.loads(file.metadata()[CLASSIFIER_KEY])
    tensors = load_file(path)
    without = {name: t for name, t in tensors.items() if name != "head.bias"}
    wide = {**tensors, "head.bias": torch.zeros(3)}
    for changes, content, message in (
        ({"pool": "middle"}, tensors, "pool is 'middle'"),
        ({"labels": ["spam"]}, tensors, "two or more different ones"),
        ({"labels": ["a", "b", "c"]}, tensors, "its tensor 'head.weight' is"),
        ({"lora": None}, tensors, "only one of file and model has"),
        ({"lora": {"rank": 0}}, tensors, "rank is 0"),
        ({}, without, "only one of file and model has 'head.bias'"),
        ({}, wide, "its tensor 'head.bias' is"),
        ({}, {**tensors, "gpt.extra": torch.zeros(1)}, "has 'gpt.extra'"),
    ):
        save_file(content, other, {CLASSIFIER_KEY: json.dumps(about | changes)})
        with pytest.raises(WeightsFileError, match=message) as caught:
            load_classifier(other, base())
        assert "\n" not in str(caught.value)
