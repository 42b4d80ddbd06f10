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
from torch.testing import assert_close

from common.classifier import (
    CLASSIFIER_KEY,
    Classifier,
    load_classifier,
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
