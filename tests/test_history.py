"""A history is complete, becomes a table, and comes back from its file as it was."""

import math

import pytest

from common.evaluation import Evaluation
from common.history import History, Step


def example() -> History:
    steps = [Step(n, 5 / n, 1e-3 * n, 0.1 + n, 1000.0 + n) for n in (1, 2, 3)]
    evaluations = {0: Evaluation.of(6.0, 2.5, 2.4), 2: Evaluation.of(3.0, 2.5, 2.4)}
    return History(steps, evaluations, {0: "x\n�", 3: "to be"})


def test_losses_and_table():
    history = example()
    assert history.losses == [5.0, 2.5, 5 / 3]
    table = history.to_frame()
    assert table.index.tolist() == [1, 2, 3]
    assert table["gradient_norm"].tolist() == [1.1, 2.1, 3.1]
    assert table.loc[2, "validation_loss"] == 3.0
    assert table["validation_loss"].isna().tolist() == [True, False, True]


def test_a_table_without_evaluations_or_without_steps():
    assert History(example().steps).to_frame().shape == (3, 8)
    assert len(History().to_frame()) == 0


@pytest.mark.parametrize("history", [example(), History()], ids=["full", "empty"])
def test_round_trip(history, tmp_path):
    history.save(tmp_path / "history.json")
    assert History.load(tmp_path / "history.json") == history
    assert [path.name for path in tmp_path.iterdir()] == ["history.json"]


def test_what_is_no_number_survives(tmp_path):
    history = History([Step(1, math.inf, 1e-3, 0.0, 1.0)], {1: Evaluation.of(800.0)})
    history.save(tmp_path / "h.json")
    assert History.load(tmp_path / "h.json") == history
    assert history.evaluations[1].perplexity == math.inf


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"steps": {"step": [1]}}', '{"steps": 3}'])
def test_anything_else_is_refused_in_one_line(text, tmp_path):
    (tmp_path / "h.json").write_text(text)
    with pytest.raises(ValueError, match=r"h\.json is damaged, or no history"):
        History.load(tmp_path / "h.json")
