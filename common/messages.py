"""Messages with labels: read, made unlike each other, divided into what is learned and tested.

    messages = distinct(read_messages())  # the SMS Spam Collection: ham and spam
    split = divide(messages, n_labelled=512, seed=0)
    split.train, split.validation, split.test  # lists of Message, balanced

A model that has seen a test message in training knows the answer. Spam is sent many times over with
another number or prize, so equal texts are not enough to look for: `distinct` also counts as the
same what shares two fifths of its runs of three words, whatever the digits in it.
"""

import csv
import io
import random
import re
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple

from common.assets import fetch
from common.corpus import (
    Document,
    drop_exact_duplicates,
    drop_near_duplicates,
    normalise,
    read_sms,
    read_text,
)

SPAM_LABELS = ("ham", "spam")
UCI_MEMBER = "SMSSpamCollection"  # in the archive of "sms-spam-full"


class Message(NamedTuple):
    """One text and what it is."""

    text: str
    label: str


class Split(NamedTuple):
    """Messages to learn from, to choose by, and to judge by; no two of them nearly the same."""

    train: list[Message]
    validation: list[Message]
    test: list[Message]


# ---------------------------------------------------------------------------------------- reading


def read_messages(full: bool = False) -> list[Message]:
    """The SMS Spam Collection (Almeida et al. 2011, CC BY 4.0), labelled "ham" or "spam".

    4,862 messages that a package carries; with `full` the 5,574 of UCI, downloaded once. Raises
    AssetUnavailable, in one line, for what can't be had.
    """
    if not full:
        return [Message(document.text, document.name.partition("/")[0]) for document in read_sms()]
    with zipfile.ZipFile(fetch("sms-spam-full", download=True)) as archive:
        text = archive.read(UCI_MEMBER).decode("utf8")
    rows = (line.split("\t", 1) for line in text.splitlines())
    return [Message(text, label) for label, text in rows]


def read_table(path: str | Path, labels: Sequence[str] = SPAM_LABELS) -> list[Message]:
    """Messages of your own: a CSV file in UTF-8 with the columns "label" and "text".

    Raises ValueError, with the line, for a file that is not so, for a label that is none of
    `labels`, and for a message without text.
    """
    table = csv.DictReader(io.StringIO(read_text(path), newline=""))
    columns = table.fieldnames or []
    missing = [name for name in Message._fields if name not in columns]
    if missing:
        raise ValueError(
            f"{path} has no column '{missing[0]}', its columns are {', '.join(columns)}: "
            "its first line must name a column 'label' and a column 'text'"
        )
    messages = []
    for row in table:
        text, label = row["text"] or "", row["label"]
        if label not in labels:
            known = ", ".join(labels)
            raise ValueError(f"{path}, line {table.line_num}: label {label!r} is none of {known}")
        if not text.strip():
            raise ValueError(
                f"{path}, line {table.line_num}: the message is empty; remove the line"
            )
        messages.append(Message(text, label))
    return messages


# ----------------------------------------------------------------------------------- deduplication


def fold_digits(text: str) -> str:
    """All digits alike: 08712 and 09061 have nothing in common but that they are numbers."""
    return re.sub(r"\d", "0", text)


def runs_of_three(text: str) -> set[tuple[str, ...]]:
    """All runs of three words in lower case, digits folded; all words as one run if fewer."""
    words = fold_digits(text.lower()).split()
    return {tuple(words[i : i + 3]) for i in range(max(len(words) - 2, 1))}


def overlap(a: str, b: str) -> float:
    """How alike two messages are: shared runs of three words over all of both, 0 to 1 (Jaccard)."""
    a, b = runs_of_three(a), runs_of_three(b)
    return len(a & b) / len(a | b)


def distinct(messages: Iterable[Message], threshold: float = 0.4) -> list[Message]:
    """The first of all messages that are nearly the same: none shares half its runs with another.

    Digits count as equal, case and white space as nothing. `threshold` is the share of common runs
    of three words, estimated with a standard deviation of 0.04: hence two fifths, to be sure of
    half. Two messages of one text with two labels count as the first.
    """
    messages = list(messages)
    names = (Document(str(i), normalise(m.text)) for i, m in enumerate(messages))
    folded = (Document(d.name, re.sub(r"\d+", "0", d.text)) for d in drop_exact_duplicates(names))
    kept = drop_near_duplicates((d for d in folded if d.text.strip()), threshold, size=3)
    return [messages[int(document.name)] for document in kept]


# -------------------------------------------------------------------------------------- splitting


def divide(
    messages: Sequence[Message],
    n_labelled: int,
    seed: int = 0,
    n_test: int = 300,
    validation: float = 0.0,
) -> Split:
    """Draw a test set, and `n_labelled` other messages to learn from; `messages` are `distinct`.

    Both hold as many messages of one label as of any other, as far as there are enough; the rest
    are of the labels that are left. `validation` is the share of the labelled messages that are
    kept aside. The test set depends on the seed alone, and the labelled messages of a smaller
    number are among those of a larger: what a learning curve needs.
    Raises ValueError for more messages than there are, and for a label nobody learns from.
    """
    if n_labelled < 1 or n_test < 1 or not 0 <= validation < 1:
        raise ValueError(
            f"n_labelled {n_labelled} and n_test {n_test} must be above 0, "
            f"and validation {validation} a share from 0 to below 1"
        )
    if n_labelled + n_test > len(messages):
        left = max(len(messages) - n_test, 0)
        raise ValueError(
            f"{n_labelled:,} labelled messages are asked for, and {left:,} are left beside the "
            f"{n_test:,} of the test set: label more, or ask for fewer"
        )
    order = list(_in_turn(messages, random.Random(seed)))
    test, labelled = order[:n_test], order[n_test : n_test + n_labelled]
    n_validation = round(validation * n_labelled)
    split = Split(labelled[n_validation:], labelled[:n_validation], test)
    check_labels(split.train, sorted({message.label for message in messages}))
    return split


def check_labels(messages: Iterable[Message], labels: Sequence[str] = SPAM_LABELS) -> None:
    """Raises ValueError unless there are messages of every label, and of no other."""
    counts = Counter(message.label for message in messages)
    if unknown := sorted(counts.keys() - set(labels)):
        raise ValueError(f"label {unknown[0]!r} is none of {', '.join(labels)}")
    if missing := [label for label in labels if not counts[label]]:
        raise ValueError(
            f"no {missing[0]} among the {counts.total():,} labelled messages: "
            f"label at least one of each of {', '.join(labels)}"
        )
    if len(labels) < 2:
        raise ValueError(f"all messages are {', '.join(labels)}: there is nothing to tell apart")


def _in_turn(messages: Sequence[Message], chance: random.Random) -> Iterator[Message]:
    """All messages in random order, but one of each label in turn while there are."""
    shuffled = chance.sample(messages, len(messages))
    labels = sorted({message.label for message in messages})
    queues = ([m for m in shuffled if m.label == label] for label in labels)
    for turn in zip_longest(*queues):
        yield from (message for message in turn if message is not None)
