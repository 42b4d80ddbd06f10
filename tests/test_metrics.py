"""Figures against their definitions, worked out by hand or the slow way."""

import json
import math

import numpy as np
import pytest

from common.metrics import Scores, calibration_error, wilson_interval

LABELS = ("ham", "spam")
TRUTH = ["ham", "ham", "ham", "spam", "spam", "spam", "spam", "ham"]
SPAM = np.array([0.1, 0.2, 0.7, 0.9, 0.8, 0.6, 0.4, 0.3])  # one false alarm, one missed
P = np.stack([1 - SPAM, SPAM], axis=1)
SCORES = Scores.of(TRUTH, P, LABELS)


def test_every_figure_by_hand():
    assert SCORES.confusion == [[3, 1], [1, 3]]
    assert SCORES.n == 8
    assert SCORES.accuracy == SCORES.precision == SCORES.recall == SCORES.f1 == 0.75
    pairs = [(s, h) for s in SPAM[[3, 4, 5, 6]] for h in SPAM[[0, 1, 2, 7]]]
    assert SCORES.roc_auc == pytest.approx(np.mean([s > h for s, h in pairs]))


def test_precision_and_recall_are_of_the_label_that_is_asked_for():
    p = P.copy()
    p[7] = [0.2, 0.8]  # a second false alarm
    spam, ham = Scores.of(TRUTH, p, LABELS), Scores.of(TRUTH, p, LABELS, positive="ham")
    assert (spam.precision, spam.recall) == pytest.approx((3 / 5, 3 / 4))
    assert (ham.precision, ham.recall) == pytest.approx((2 / 3, 2 / 4))


def test_labels_may_come_in_any_order():
    turned = Scores.of(TRUTH, P[:, ::-1], LABELS[::-1], positive="spam")
    for name in ("accuracy", "precision", "recall", "f1", "roc_auc", "calibration_error"):
        assert getattr(turned, name) == pytest.approx(getattr(SCORES, name))
    assert turned.confusion == [[3, 1], [1, 3]]


def test_three_labels():
    labels, truth = ("a", "b", "c"), ["a", "b", "c", "a"]
    p = np.array([[0.8, 0.1, 0.1], [0.2, 0.5, 0.3], [0.1, 0.2, 0.7], [0.3, 0.6, 0.1]])
    scores = Scores.of(truth, p, labels)
    assert scores.accuracy == 0.75
    assert scores.confusion == [[1, 1, 0], [0, 1, 0], [0, 0, 1]]
    assert 0.5 < scores.roc_auc <= 1


def test_wilsons_interval_is_his_formula():
    z = 1.959964
    for right, n in ((291, 300), (300, 300), (0, 10), (5, 10)):
        p = right / n
        middle = (p + z * z / (2 * n)) / (1 + z * z / n)
        half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        low, high = wilson_interval(right, n)
        assert (low, high) == pytest.approx((middle - half, middle + half), abs=1e-6)


def test_calibration_the_slow_way():
    rng = np.random.default_rng(0)
    p = rng.dirichlet([1, 1], 500)
    truth = rng.integers(2, size=500)
    expected = 0.0
    for b in range(10):
        inside = [i for i in range(500) if min(int(p[i].max() * 10), 9) == b]
        if inside:
            right = np.mean([p[i].argmax() == truth[i] for i in inside])
            expected += len(inside) / 500 * abs(right - np.mean([p[i].max() for i in inside]))
    assert calibration_error(truth, p) == pytest.approx(expected)
    assert expected > 0.05


def test_calibration_at_its_ends():
    sure = np.array([[1.0, 0.0]] * 4)
    assert calibration_error([0, 0, 0, 0], sure) == 0
    assert calibration_error([1, 1, 1, 1], sure) == 1
    assert calibration_error([0, 1, 0, 1], np.full((4, 2), 0.5)) == 0


def test_one_label_only_has_no_roc():
    scores = Scores.of(["ham"], [[0.9, 0.1]], LABELS)
    assert math.isnan(scores.roc_auc)
    assert json.loads(json.dumps(scores.to_dict(), allow_nan=False))["roc_auc"] is None
    assert (scores.accuracy, scores.precision, scores.recall) == (1, 0, 0)


def test_as_json_and_as_a_line():
    assert json.loads(json.dumps(SCORES.to_dict()))["confusion"] == [[3, 1], [1, 3]]
    line = str(SCORES)
    assert line.startswith("accuracy 75.0% (40.9% to 92.9%) of 8, spam: precision 75.0%")
    assert "\n" not in line


@pytest.mark.parametrize(
    ("truth", "p", "message"),
    [
        (["eggs"], [[0.5, 0.5]], "label 'eggs' is none of ham, spam"),
        ([], np.empty((0, 2)), "must be one at least"),
        (["ham"], [[0.2, 0.3, 0.5]], r"shape \(1, 2\), not \(1, 3\)"),
        (["ham", "spam"], [[0.5, 0.5]], r"shape \(2, 2\), not \(1, 2\)"),
    ],
    ids=["unknown", "nothing", "labels", "messages"],
)
def test_refusals(truth, p, message):
    with pytest.raises(ValueError, match=message):
        Scores.of(truth, p, LABELS)
