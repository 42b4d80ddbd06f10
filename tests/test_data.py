"""The course's own instructions and pairs: what their card promises, recomputed where it can be."""

import ast
import json
import operator
import re
from collections import Counter
from datetime import date

import pytest
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

from common.answers import normalise
from common.assets import DATA, fetch
from common.corpus import Document, drop_near_duplicates, uniform
from common.instruction_data import HALVES, SPLITS, read_instructions, read_preferences

TASK_FIELDS = ["id", "kind", "instruction", "input", "response", "checkable", "split"]
PAIR_FIELDS = ["id", "category", "prompt", "chosen", "rejected", "why", "half"]
SHARES = {"train": 0.8, "validation": 0.1, "test": 0.1}


@pytest.fixture(scope="module")
def tasks():
    return read_instructions()


@pytest.fixture(scope="module")
def pairs():
    return read_preferences()


def of_kind(tasks, kind):
    found = [task for task in tasks if task.kind == kind]
    assert len(found) >= 20, f"the data has no kind {kind!r} any more"
    return found


def near_duplicates(texts: dict[str, str]) -> list:
    """Pairs that share 60% of their runs of three words."""
    removed = []
    documents = (Document(name, text) for name, text in texts.items())
    list(drop_near_duplicates(documents, threshold=0.6, size=3, removed=removed))
    return removed


# --------------------------------------------------------------------------------------- the files


@pytest.mark.parametrize(
    ("name", "fields"), [("instructions", TASK_FIELDS), ("preferences", PAIR_FIELDS)]
)
def test_fields_order_and_form(name, fields):
    lines = fetch(name).read_text(encoding="utf8").splitlines()
    entries = [json.loads(line) for line in lines]
    ids = [entry["id"] for entry in entries]
    assert ids == sorted(set(ids))
    for entry, line in zip(entries, lines, strict=True):
        assert list(entry) == fields
        assert line == json.dumps(entry, ensure_ascii=False)
        assert all(value == value.strip() for value in entry.values() if isinstance(value, str))
        assert re.fullmatch(rf"{entry.get('kind') or entry['category']}-\d{{3}}", entry["id"])


def test_there_is_enough_of_everything(tasks, pairs):
    assert len(tasks) >= 1100
    assert len({task.kind for task in tasks}) >= 12
    assert sum(task.checkable for task in tasks) >= 300
    assert len(pairs) >= 400
    assert all(pair.why for pair in pairs)


def test_splits_are_drawn_within_each_kind_and_stay(tasks):
    for kind in {task.kind for task in tasks}:
        drawn = sorted(of_kind(tasks, kind), key=lambda task: uniform(task.id, seed=7))
        tenth = len(drawn) // 10
        order = ["test"] * tenth + ["validation"] * tenth + ["train"] * (len(drawn) - 2 * tenth)
        assert [task.split for task in drawn] == order, kind
    shares = Counter(task.split for task in tasks)
    assert {split: shares[split] / len(tasks) for split in SPLITS} == pytest.approx(SHARES)


def test_halves_are_equal_within_each_category(pairs):
    halves = Counter((pair.category, pair.half) for pair in pairs)
    for category in {pair.category for pair in pairs}:
        assert len({halves[category, half] for half in HALVES}) == 1, category


def test_no_two_entries_are_nearly_the_same(tasks, pairs):
    assert not near_duplicates({task.id: f"{task.prompt}\n{task.response}" for task in tasks})
    assert not near_duplicates(
        {pair.id: f"{pair.prompt}\n{pair.chosen}\n{pair.rejected}" for pair in pairs}
    )


def test_no_question_is_in_both_files(tasks, pairs):
    asked = [normalise(pair.prompt) for pair in pairs]
    assert len(set(asked)) == len(asked)
    assert not {normalise(task.prompt) for task in tasks}.intersection(asked)
    assert not {normalise(task.input) for task in tasks}.intersection(asked)


def test_the_card_counts_what_is_there(tasks, pairs):
    card = (DATA / "README.md").read_text(encoding="utf8")
    table = re.findall(r"^\| `(\w+)` " + r"\| (\d+) " * 4, card, re.M)
    rows = {kind: counts for kind, *counts in table}
    for kind in {task.kind for task in tasks}:
        some = of_kind(tasks, kind)
        counts = [sum(task.split == split for task in some) for split in SPLITS]
        assert list(map(int, rows[kind])) == [*counts, sum(task.checkable for task in some)], kind
    table = re.findall(r"^\| (\w+) \| (\d+) \| (\d+)% \|", card, re.M)
    assert sorted(category for category, _, _ in table) == sorted({p.category for p in pairs})
    for category, count, share in table:
        longer = [is_longer(pair) for pair in pairs if pair.category == category]
        assert len(longer) == int(count)
        assert 100 * sum(longer) / len(longer) == pytest.approx(int(share), abs=0.51)


# ------------------------------------------------------------------------------------- the answers


def test_checkable_answers_are_short(tasks):
    for task in tasks:
        words = len(task.response.split())
        assert words <= 10 if task.checkable else words <= 90, task.id


def test_a_copy_of_the_task_is_no_answer(tasks):
    """What is compared ignores case: where case is the task, a match would say nothing."""
    for task in of_kind(tasks, "format"):
        same = normalise(task.response) in (normalise(task.input), normalise(task.instruction))
        assert not (task.checkable and same), task.id


def test_sorted_lists_are_sorted(tasks):
    for task in of_kind(tasks, "sort"):
        items = task.response.split(", ")
        numbers = all(re.fullmatch(r"-?[\d.]+", item) for item in items)
        ascending = sorted(items, key=float if numbers else str.lower)
        assert items in (ascending, ascending[::-1]), task.id
        assert all(re.search(rf"(?<![\w.]){re.escape(i)}(?!\w)", task.prompt) for i in items)
        if task.input:
            assert sorted(items) == sorted(task.input.split(", ")), task.id


def test_sums_add_up(tasks):
    signs = {"+": operator.add, "-": operator.sub, "x": operator.mul, "÷": operator.truediv}
    checked = 0
    for task in of_kind(tasks, "arithmetic"):
        sum_ = re.search(r"(\d+) ([-+x÷]) (\d+)(?! [-+])", task.prompt)
        if sum_ and not re.search(r"[?_] [-+x=]|[-+] \d+ [-+]", task.prompt):
            found = signs[sum_[2]](int(sum_[1]), int(sum_[3]))
            assert found == int(task.response), task.id
            checked += 1
    assert checked >= 8


def test_labels_are_balanced(tasks):
    for kind, labels in (("true_false", 2), ("sentiment", 3), ("part_of_speech", 4)):
        counts = Counter(task.response for task in of_kind(tasks, kind))
        assert len(counts) == labels
        assert max(counts.values()) <= 1.1 * min(counts.values()), kind


def test_dates_json_and_code_parse(tasks):
    found = Counter()
    for task in tasks:
        if re.fullmatch(r"\d{4}-\d\d-\d\d", task.response):
            found["date"] += bool(date.fromisoformat(task.response))
        if task.response.startswith("{") and task.kind == "format":
            found["json"] += bool(json.loads(task.response))
        if task.kind == "code":
            found["code"] += bool(ast.parse(task.response).body)
    assert found["date"] >= 20
    assert found["json"] >= 10
    assert found["code"] >= 20


# --------------------------------------------------------------------------------------- the pairs


def is_longer(pair) -> bool:
    return len(pair.chosen.split()) > len(pair.rejected.split())


def test_length_does_not_give_the_better_answer_away(pairs):
    for category in {pair.category for pair in pairs}:
        longer = [is_longer(pair) for pair in pairs if pair.category == category]
        assert 0.4 <= sum(longer) / len(longer) <= 0.6, category


def test_the_first_word_does_not_either(pairs):
    first = lambda text: normalise(text).split()[0].strip(",.!:")
    chosen = Counter(first(pair.chosen) for pair in pairs)
    rejected = Counter(first(pair.rejected) for pair in pairs)
    for word in chosen | rejected:
        if chosen[word] + rejected[word] >= 20:
            assert 0.25 <= chosen[word] / (chosen[word] + rejected[word]) <= 0.75, word


def test_words_in_any_order_say_something_but_not_much(pairs):
    """What a judge that never reads the prompt gets right: the baseline on the card."""
    right = []
    for taught in HALVES:
        known = [pair for pair in pairs if pair.half == taught]
        unseen = [pair for pair in pairs if pair.half != taught]
        judge = make_pipeline(CountVectorizer(), LogisticRegression(max_iter=2000))
        texts = [pair.chosen for pair in known] + [pair.rejected for pair in known]
        judge.fit(texts, [1] * len(known) + [0] * len(known))
        margins = judge.decision_function([pair.chosen for pair in unseen])
        margins -= judge.decision_function([pair.rejected for pair in unseen])
        right.append((margins > 0).mean())
    assert right == pytest.approx([0.66, 0.67], abs=0.02)
