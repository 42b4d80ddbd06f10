"""A GPT that sorts texts: a linear head on the hidden state of a text's last token, or on the mean.

    gpt, tokenizer = load_pretrained("smollm2-135m")
    classifier = Classifier(gpt, tokenizer, labels=("ham", "spam"))
    train_only(classifier, ["blocks.29.*", "final_norm.*"])
    classifier.predict(["Free entry! Text WIN to 80086"])

The last token is the one that has seen all the others. Texts are filled up at the right, where the
causal mask hides the filling from every real token: no text depends on its neighbours in a batch.
B batch, T tokens, C model width.
"""

import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from common.fine_tuning import LengthBatches, train_only, trained_parameters
from common.gguf_file import refuse
from common.gpt import GPT
from common.lora import (
    add_lora,
    checksums,
    fill,
    fingerprint,
    has_lora,
    lora_parameters,
    lora_settings,
    read_about,
    read_tensors,
    write_tensors,
)
from common.pooled import POOLS, PooledGPT, lower_states
from common.tokenizer import BPETokenizer
from common.weights import load_pretrained

__all__ = [
    "POOLS",
    "Classifier",
    "LengthBatches",
    "Prediction",
    "load_classifier",
    "lower_states",
    "save_classifier",
    "train_only",
    "trained_parameters",
]


class Prediction(NamedTuple):
    """What a text is taken for, and how likely each label is."""

    label: str
    probability: float  # of that label
    probabilities: dict[str, float]


class Classifier(PooledGPT):
    """Token ids (B, T) and lengths (B,) -> logits (B, labels).

    gpt:       pretrained or not; its own head is not used
    tokenizer: of that GPT
    labels:    two or more, in the order of the logits
    pool:      what the head reads: the state of the "last" token, the "mean" of all, or that of the
               "first", to see why not

    The head begins at zero, so every label is equally likely at first. Raises ValueError for
    labels that are fewer than two, or not all different, and for an unknown pool.
    """

    def __init__(
        self, gpt: GPT, tokenizer: BPETokenizer, labels: Sequence[str], *, pool: str = "last"
    ):
        if len(set(labels)) < max(len(labels), 2):
            raise ValueError(
                f"labels are {', '.join(labels)}: two or more different ones are needed"
            )
        super().__init__(gpt, len(labels), pool)
        self.tokenizer, self.labels = tokenizer, tuple(labels)
        self.base = checksums(gpt)  # before training: what differs from it is to be saved

    def encode(self, texts: Sequence[str]) -> list[Tensor]:
        """Token ids of each text, (T,). A text beyond the context is cut, and a warning says so.

        Raises ValueError for a text without a single character but white space.
        """
        longest, rows = self.gpt.config.context_length, []
        for number, text in enumerate(texts, 1):
            if not text.strip():
                raise ValueError(f"text {number} of {len(texts)} is empty: leave it out")
            ids = self.tokenizer.encode(text)
            if len(ids) > longest:
                note = (
                    f"text {number} has {len(ids):,} tokens: what is beyond {longest:,} is not read"
                )
                warnings.warn(note, stacklevel=3)
            rows.append(torch.tensor(ids[:longest]))
        return rows

    def predict(self, texts: Sequence[str], batch_size: int = 16) -> list[Prediction]:
        """The label of each text with its probability, in the order of the texts."""
        if isinstance(texts, str):
            raise ValueError("predict takes a list of texts, not one: predict([text])")
        rows = self.probabilities(self.encode(texts), batch_size).tolist()
        tables = [dict(zip(self.labels, row, strict=True)) for row in rows]
        return [Prediction(max(p, key=p.get), max(p.values()), p) for p in tables]

    def probabilities(self, rows: Sequence[Tensor], batch_size: int = 16) -> Tensor:
        """(N, labels), of `encode`d texts or of what `lower_states` made of them."""
        return self.outputs(rows, batch_size).softmax(-1)


# ---------------------------------------------------------------------------------------- on disk

CLASSIFIER_KEY = "classifier"  # what the settings are called in a file


def save_classifier(classifier: Classifier, path: str | Path, model: str) -> None:
    """Write the head, adapters, and what else differs from the pretrained weights: one file.

    model: what those are called, as `load_pretrained` takes it. Complete or not there: raises
    OSError, in one line, where it can't be written.
    """
    gpt, lora, tensors = classifier.gpt, None, {}
    if has_lora(gpt):
        lora, tensors = lora_settings(gpt), lora_parameters(gpt)
    now, weights = checksums(gpt), gpt.state_dict()
    tensors |= {name: weights[name] for name in now if now[name] != classifier.base[name]}
    tensors = {f"gpt.{name}": tensor for name, tensor in tensors.items()}
    tensors |= {f"head.{name}": tensor for name, tensor in classifier.head.state_dict().items()}
    about = {"labels": classifier.labels, "pool": classifier.pool, "lora": lora}
    about |= {"model": model, "base": fingerprint(classifier.base)}
    write_tensors(path, tensors, {CLASSIFIER_KEY: json.dumps(about)})


def load_classifier(
    path: str | Path, pretrained: tuple[GPT, BPETokenizer] | None = None
) -> Classifier:
    """What `save_classifier` wrote, in evaluation mode, on the pretrained weights that it names.

    pretrained: these, where they are loaded already. Raises what `load_pretrained` raises; and
    WeightsFileError, in one line, for a file of another task, or made on other weights.
    """
    metadata, tensors = read_tensors(path)
    if CLASSIFIER_KEY not in metadata:
        refuse(path, "it holds no classifier", "choose a file that save_classifier wrote")
    needed = ("labels", "pool", "lora", "model", "base")
    about = read_about(path, metadata[CLASSIFIER_KEY], needed)
    gpt, tokenizer = pretrained or load_pretrained(about["model"])
    try:
        classifier = train_only(Classifier(gpt, tokenizer, about["labels"], pool=about["pool"]))
        if fingerprint(classifier.base) != about["base"]:
            raise ValueError(f"it was fine-tuned on other weights than these ({about['model']})")
        if about["lora"]:
            add_lora(gpt, **about["lora"])
        own = classifier.state_dict()
        needed = {name for name in own if name.startswith("head.") or "lora_" in name}
        fill({name: own[name] for name in own if name in tensors or name in needed}, tensors)
    except (ValueError, TypeError) as why:
        refuse(path, str(why), "load it with the model it was made on")
    return classifier.eval()
