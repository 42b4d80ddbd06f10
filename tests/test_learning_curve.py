"""A table of runs that grows, survives, and holds what the code computes."""

import math

import pytest
import torch
from test_classifier import BYTES, CONFIGS
from test_classifier_training import made_up
from test_structure import ROOT

from common import learning_curve
from common.classifier import Classifier
from common.classifier_training import RECIPES, fine_tune, score
from common.gpt import GPT
from common.learning_curve import (
    N_TEST,
    PLAN,
    SIZES,
    Curve,
    Result,
    Run,
    curves,
    main,
    planned,
    read_results,
    results,
    to_frame,
    write_results,
)
from common.messages import SPAM_LABELS, distinct, divide, read_messages

STORED = ROOT / "ch06_classification_finetune" / "results.csv"
TABLE = {
    Run("head", "pretrained", "mean", seed, 16): Result(300, missed, 5, 0.9, 0.1, 1154, 1.0)
    for seed, missed in enumerate((10, 16, 25))
}


@pytest.fixture(scope="module")
def sms():
    return distinct(read_messages())


# --- What is stored beside chapter 6


def test_the_stored_table_holds_the_plan_and_nothing_else():
    assert set(read_results(STORED)) == set(planned())


def test_stored_baselines_are_what_the_code_computes(sms):
    """Exactly: counting and a convex problem."""
    runs = [Run(name, "none", "none", 1, n) for name in ("tfidf", "tfidf-chars") for n in SIZES]
    stored = read_results(STORED)
    for run, result in results(runs, sms):
        assert result[:3] == stored[run][:3], run
        assert result.roc_auc == pytest.approx(stored[run].roc_auc, abs=1e-3), run


def test_a_stored_row_of_the_model_is_what_the_code_computes(sms):
    """States differ in the 6th digit between processors and numbers of threads; a message changes
    sides only if it lies that close to the border. One of 300 may."""
    (run, result), *_ = results([Run("head", "pretrained", "mean", 0, 16)], sms)
    stored = read_results(STORED)[run]
    assert abs(result.missed - stored.missed) + abs(result.false_alarms - stored.false_alarms) <= 1
    assert result.roc_auc == pytest.approx(stored.roc_auc, abs=2e-4)
    assert result.calibration_error == pytest.approx(stored.calibration_error, abs=4e-3)
    assert result.trained_parameters == stored.trained_parameters == 2 * 576 + 2


# --- The plan


def test_a_plan_is_every_run_once_and_the_largest_first():
    runs = planned()
    assert len(set(runs)) == len(runs) == sum(len(c.sizes) * c.n_seeds for c in PLAN)
    assert planned([Curve("head", "random", "mean", (16, 64), 2)]) == [
        Run("head", "random", "mean", seed, size) for seed in (0, 1) for size in (64, 16)
    ]
    assert {run.method for run in runs} <= {*RECIPES, *learning_curve.BASELINES}


def test_shared_states_change_no_result(monkeypatch):
    """Runs of a group against the same runs, each on its own."""
    messages = distinct(made_up(400))
    torch.manual_seed(0)
    gpt = GPT(CONFIGS["llama"]).eval()
    monkeypatch.setattr(learning_curve, "load_base", lambda *_: (gpt, BYTES))
    monkeypatch.setattr(learning_curve, "N_TEST", 60)
    for method in ("head", "last-block", "lora"):
        runs = [Run(method, "pretrained", "mean", 3, n) for n in (48, 16)]
        for run, result in results(runs, messages):
            split = divide(messages, run.labelled, 3, 60)
            alone = Classifier(GPT(CONFIGS["llama"]), BYTES, SPAM_LABELS, pool="mean")
            alone.gpt.load_state_dict(gpt.state_dict())
            fine_tune(alone, split.train, RECIPES[method], seed=3, progress=False)
            expected = Result.of(score(alone, split.test), result.trained_parameters, 0)
            assert result[:3] == expected[:3]
            assert result.roc_auc == pytest.approx(expected.roc_auc, abs=1e-3)


# --- The table


def test_what_is_written_is_read(tmp_path):
    write_results(tmp_path / "t.csv", TABLE)
    assert read_results(tmp_path / "t.csv") == TABLE


def test_means_and_intervals_by_hand():
    row = curves(to_frame(TABLE)).loc["head", "pretrained", "mean", 16]
    right = [285, 279, 270]
    mean = sum(right) / 3
    deviation = math.sqrt(sum((x - mean) ** 2 for x in right) / 2)
    assert row["mean"] == pytest.approx(mean / 300)
    assert (row["min"], row["max"]) == (pytest.approx(0.9), pytest.approx(0.95))
    assert row["half"] == pytest.approx(4.3027 * deviation / math.sqrt(3) / 300, rel=1e-4)


def test_one_seed_has_no_interval():
    first = dict(list(TABLE.items())[:1])
    assert math.isnan(curves(to_frame(first))["half"].item())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no text"),
        ("a,b\n1,2\n", "is no table of results: choose another file, or remove it"),
        ("HEAD\nhead,pretrained\n", "line 2: not a result; remove the line"),
        ("HEAD\nhead,random,mean,x,16,300,1,1,0.9,0.1,5,1.0\n", "line 2: not a result"),
    ],
    ids=["empty", "other", "short", "no number"],
)
def test_files_that_are_no_table(tmp_path, text, message, capsys):
    path = tmp_path / "t.csv"
    path.write_text(text.replace("HEAD", ",".join(Run._fields + Result._fields)), encoding="utf8")
    with pytest.raises(ValueError, match=message):
        read_results(path)
    assert main(["--out", str(path), "--methods", "tfidf"]) == 1
    assert capsys.readouterr().err.count("\n") == 1


# --- The command


def test_it_goes_on_where_it_was_and_repeats_nothing(tmp_path, capsys, monkeypatch):
    path = tmp_path / "t.csv"
    options = ["--out", str(path), "--methods", "tfidf", "--labelled", "16"]
    assert main([*options, "--seeds", "1"]) == 0
    first = read_results(path)
    seen = []
    tfidf = learning_curve.tfidf_scores
    monkeypatch.setattr(learning_curve, "tfidf_scores", lambda *a: seen.append(1) or tfidf(*a))
    assert main([*options, "--seeds", "3"]) == 0
    assert len(seen) == 2
    assert list(read_results(path).items())[:1] == list(first.items())
    assert "0.7" in capsys.readouterr().out
    assert main([*options, "--seeds", "3", "--list"]) == 0
    assert capsys.readouterr().out.strip() == ""


def test_what_was_done_before_a_stop_is_kept(tmp_path, monkeypatch):
    path, calls = tmp_path / "t.csv", []

    def stopped(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return tfidf(*arguments)

    tfidf = learning_curve.tfidf_scores
    monkeypatch.setattr(learning_curve, "tfidf_scores", stopped)
    with pytest.raises(KeyboardInterrupt):
        main(["--out", str(path), "--methods", "tfidf"])
    assert [run.labelled for run in read_results(path)] == [512, 256]


def test_nothing_planned_and_nowhere_to_write(tmp_path, capsys):
    assert main(["--out", str(tmp_path / "t.csv"), "--labelled", "17"]) == 1
    assert "nothing is planned for that" in capsys.readouterr().err
    assert main(["--out", str(tmp_path / "no" / "t.csv"), "--methods", "tfidf"]) == 1
    assert "can't write" in capsys.readouterr().err


def test_an_unknown_method():
    with pytest.raises(ValueError, match="no method is called 'magic': head, last-block"):
        list(results([Run("magic", "random", "mean", 0, 16)], []))


def test_the_test_set_is_large_enough():
    assert N_TEST >= 300
