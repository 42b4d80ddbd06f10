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
from collections.abc import Callable, Iterable, Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from common.evaluation import evaluation_mode
from common.gguf_file import refuse
from common.gpt import GPT
from common.lora import (
    LoRALinear,
    add_lora,
    checksums,
    fill,
    fingerprint,
    lora_parameters,
    lora_settings,
    read_about,
    read_tensors,
    write_tensors,
)
from common.tokenizer import BPETokenizer
from common.weights import load_pretrained

POOLS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {  # (B, T, C), lengths (B,) -> (B, C)
    "last": lambda x, lengths: x[torch.arange(len(x), device=x.device), lengths - 1],
    "mean": lambda x, lengths: (x * real_tokens(x, lengths)).sum(1) / lengths[:, None],
    "first": lambda x, lengths: x[:, 0],
}


class Prediction(NamedTuple):
    """What a text is taken for, and how likely each label is."""

    label: str
    probability: float  # of that label
    probabilities: dict[str, float]


class Classifier(nn.Module):
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
        super().__init__()
        if len(set(labels)) < max(len(labels), 2):
            raise ValueError(
                f"labels are {', '.join(labels)}: two or more different ones are needed"
            )
        if pool not in POOLS:
            raise ValueError(f"pool is {pool!r}, it must be one of {', '.join(POOLS)}")
        self.gpt, self.tokenizer, self.labels, self.pool = gpt, tokenizer, tuple(labels), pool
        self.head = nn.Linear(gpt.config.d_model, len(labels))
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        self.to(gpt.token_embedding.weight.device)
        self.base = checksums(gpt)  # before training: what differs from it is to be saved

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        """Logits (B, labels) from ids (B, T), or from what `lower` made of them, (B, T, C)."""
        start = self.n_frozen if x.is_floating_point() else 0
        x = self._blocks(x, start, None)  # (B, T, C)
        return self.head(self.gpt.final_norm(POOLS[self.pool](x, lengths)))

    def lower(self, token_ids: Tensor) -> Tensor:
        """What the first `n_frozen` blocks make of ids (B, T): (B, T, C), always the same."""
        return self._blocks(token_ids, 0, self.n_frozen)

    def _blocks(self, x: Tensor, start: int, end: int | None) -> Tensor:
        """Blocks from `start` to `end`; before the first come the embeddings."""
        gpt, positions = self.gpt, torch.arange(x.shape[1], device=x.device)
        if not x.is_floating_point():
            x = gpt.dropout(gpt.position_embedding.embed(gpt.token_embedding(x), positions))
        rotate = gpt.position_embedding.rotation(positions, x.dtype)
        for block in gpt.blocks[start:end]:
            x = block(x, rotate)
        return x  # (B, T, C)

    @property
    def n_frozen(self) -> int:
        """How many blocks, from the first on, no training changes; 0 if the embeddings train."""
        trains = lambda module: any(p.requires_grad for p in module.parameters())
        if trains(self.gpt.token_embedding) or trains(self.gpt.position_embedding):
            return 0
        return next(
            (i for i, block in enumerate(self.gpt.blocks) if trains(block)), len(self.gpt.blocks)
        )

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

    @torch.no_grad()
    def probabilities(self, rows: Sequence[Tensor], batch_size: int = 16) -> Tensor:
        """(N, labels), of `encode`d texts or of what `lower_states` made of them."""
        found = torch.empty(len(rows), len(self.labels))
        with evaluation_mode(self):
            for x, lengths, places in LengthBatches(rows, range(len(rows)), batch_size):
                x, lengths = x.to(self.head.weight.device), lengths.to(self.head.weight.device)
                found[places] = self(x, lengths).float().softmax(-1).cpu()
        return found


class LengthBatches:
    """Batches of (x, lengths, targets), rows of similar length together: little filling.

    x is (B, T) of ids or (B, T, C) of states. Each pass over them is one epoch. With a generator
    every epoch has other batches in another order: rows are sorted by their length times a random
    factor, so that not always the same ones meet. Without, the longest come first.
    """

    BLUR = 0.5  # the factor is between 1 and 1.5

    def __init__(
        self,
        rows: Sequence[Tensor],
        targets: Iterable[int],
        batch_size: int,
        generator: torch.Generator | None = None,
    ):
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}: it must be above 0")
        self.rows, self.targets = rows, torch.tensor(list(targets), dtype=torch.long)
        self.batch_size, self.generator = batch_size, generator

    def __len__(self) -> int:
        return -(-len(self.rows) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        for places in self._places():
            rows = [self.rows[i] for i in places]
            lengths = torch.tensor([len(row) for row in rows])
            yield pad_sequence(rows, batch_first=True), lengths, self.targets[places]

    def _places(self) -> list[list[int]]:
        lengths = torch.tensor([len(row) for row in self.rows], dtype=torch.float)
        if self.generator:
            lengths *= 1 + self.BLUR * torch.rand(len(lengths), generator=self.generator)
        order = lengths.argsort(descending=True).tolist()
        batches = [order[i : i + self.batch_size] for i in range(0, len(order), self.batch_size)]
        if self.generator is None:
            return batches
        shuffled = torch.randperm(len(batches), generator=self.generator)
        return [batches[i] for i in shuffled.tolist()]


def real_tokens(x: Tensor, lengths: Tensor) -> Tensor:
    """True where x (B, T, C) holds a text, False where it is filled up: (B, T, 1)."""
    return (torch.arange(x.shape[1], device=x.device) < lengths[:, None])[..., None]


@torch.no_grad()
def lower_states(
    classifier: Classifier, rows: Sequence[Tensor], batch_size: int = 16
) -> list[Tensor]:
    """What the frozen blocks make of each row (T,): (T, C). Compute it once, use it every epoch.

    Where all blocks are frozen, only what is pooled is kept, (1, C). Where none is, the
    rows come back as they are.
    """
    if not classifier.n_frozen:
        return list(rows)
    found: list[Tensor] = [torch.empty(0)] * len(rows)
    device = classifier.head.weight.device
    all_frozen = classifier.n_frozen == len(classifier.gpt.blocks)
    with evaluation_mode(classifier):
        for ids, lengths, places in LengthBatches(rows, range(len(rows)), batch_size):
            states = classifier.lower(ids.to(device)).cpu()  # (B, T, C)
            if all_frozen:
                states = POOLS[classifier.pool](states, lengths)[:, None]  # (B, 1, C)
            for place, length, state in zip(places.tolist(), lengths.tolist(), states, strict=True):
                found[place] = state[:length].clone()
    return found


def train_only(classifier: Classifier, patterns: Iterable[str] = ()) -> Classifier:
    """Freeze the GPT, but for parameters whose names match a pattern; the head is always trained.

    Patterns are those of file names: "blocks.29.*", "final_norm.*", "*.lora_?", "*".
    Raises ValueError for a pattern that no parameter matches.
    """
    names = dict(classifier.gpt.named_parameters())
    classifier.gpt.requires_grad_(False)
    for pattern in patterns:
        matching = [name for name in names if fnmatchcase(name, pattern)]
        if not matching:
            raise ValueError(
                f"no parameter is called '{pattern}': they are like {', '.join(list(names)[:3])}"
            )
        for name in matching:
            names[name].requires_grad_(True)
    return classifier


def trained_parameters(classifier: Classifier) -> dict[str, Tensor]:
    """What training changes, by name."""
    return {name: p for name, p in classifier.named_parameters() if p.requires_grad}


# ---------------------------------------------------------------------------------------- on disk

CLASSIFIER_KEY = "classifier"  # what the settings are called in a file


def save_classifier(classifier: Classifier, path: str | Path, model: str) -> None:
    """Write the head, adapters, and what else differs from the pretrained weights: one file.

    model: what those are called, as `load_pretrained` takes it. Complete or not there: raises
    OSError, in one line, where it can't be written.
    """
    gpt, lora, tensors = classifier.gpt, None, {}
    if any(isinstance(module, LoRALinear) for module in gpt.modules()):
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
