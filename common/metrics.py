"""How good a classifier is: accuracy with its interval, precision and recall, ROC, calibration.

    scores = Scores.of(["ham", "spam", "spam"], probabilities, labels=("ham", "spam"))
    print(scores)  # accuracy 97.3% (94.8 to 98.6), …
    scores.confusion  # rows: what it is; columns: what was said

scikit-learn and SciPy compute what they know. They are imported where they are used: it takes
seconds.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import ArrayLike


@dataclass(frozen=True)
class Scores:
    """What a classifier did on messages whose labels are known."""

    n: int
    accuracy: float
    interval: tuple[float, float]  # of the accuracy, 95%: Wilson 1927
    precision: float  # of what is said to be the positive label, how much is
    recall: float  # of what is the positive label, how much is found
    f1: float
    roc_auc: float  # chance that a positive message scores above a negative one; nan: none of one
    calibration_error: float  # see `calibration_error`
    confusion: list[list[int]]  # rows: what it is; columns: what was said; in the order of `labels`
    labels: tuple[str, ...]

    @classmethod
    def of(
        cls,
        truth: Sequence[str],
        probabilities: ArrayLike,
        labels: Sequence[str],
        positive: str | None = None,
    ) -> "Scores":
        """From true labels (N,) and probabilities (N, labels), in the order of `labels`.

        Precision, recall and F1 are of `positive`, the last label by default. With more than two
        labels ROC is the mean of each against the rest, and needs all of them among `truth`.
        Raises ValueError for nothing to score, unknown labels, or probabilities of another shape.
        """
        from sklearn import metrics

        p, labels = np.asarray(probabilities, dtype=float), tuple(labels)
        positive = labels[-1] if positive is None else positive
        if unknown := sorted({*truth, positive} - set(labels)):
            raise ValueError(f"label {unknown[0]!r} is none of {', '.join(labels)}")
        if not len(truth) or p.shape != (len(truth), len(labels)):
            raise ValueError(
                f"{len(truth)} true labels need probabilities of the shape "
                f"({len(truth)}, {len(labels)}), not {p.shape}, and there must be one at least"
            )
        said = [labels[i] for i in p.argmax(-1)]
        right = sum(a == b for a, b in zip(truth, said, strict=True))
        precision, recall, f1, _ = metrics.precision_recall_fscore_support(
            truth, said, labels=[positive], zero_division=0
        )
        return cls(
            n=len(truth),
            accuracy=right / len(truth),
            interval=wilson_interval(right, len(truth)),
            precision=float(precision[0]),
            recall=float(recall[0]),
            f1=float(f1[0]),
            roc_auc=_roc_auc(truth, p, labels, positive),
            calibration_error=calibration_error([labels.index(t) for t in truth], p),
            confusion=metrics.confusion_matrix(truth, said, labels=labels).tolist(),
            labels=labels,
        )

    def to_dict(self) -> dict:
        """As JSON takes it, which knows no nan."""
        return {name: None if value != value else value for name, value in asdict(self).items()}

    def __str__(self) -> str:
        low, high = self.interval
        return (
            f"accuracy {self.accuracy:.1%} ({low:.1%} to {high:.1%}) of {self.n}, "
            f"{self.labels[-1]}: precision {self.precision:.1%}, recall {self.recall:.1%}, "
            f"F1 {self.f1:.3f}, ROC {self.roc_auc:.4f}, "
            f"calibration error {self.calibration_error:.3f}"
        )


def wilson_interval(right: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Where the true share lies, given `right` of `n`: Wilson 1927. It never leaves [0, 1]."""
    from scipy.stats import binomtest

    found = binomtest(right, n).proportion_ci(confidence, method="wilson")
    return float(found.low), float(found.high)


def calibration_error(truth: ArrayLike, probabilities: ArrayLike, n_bins: int = 10) -> float:
    """How far confidence and accuracy are apart, from 0 to 1: the expected calibration error.

    truth (N,) are indices, probabilities (N, labels). Messages are sorted into `n_bins` by the
    probability of what is said; the mean over them of |accuracy - mean confidence| in their bin.
    Guo et al. 2017, arXiv:1706.04599, equation 3.
    """
    p = np.asarray(probabilities, dtype=float)
    confidence, right = p.max(-1), p.argmax(-1) == np.asarray(truth)
    bins = np.minimum((confidence * n_bins).astype(int), n_bins - 1)
    gaps = np.bincount(bins, weights=right - confidence)  # Σ (right - confidence), per bin
    return float(np.abs(gaps).sum() / len(p))


def _roc_auc(truth: Sequence[str], p: np.ndarray, labels: Sequence[str], positive: str) -> float:
    from sklearn.metrics import roc_auc_score

    if len(set(truth)) < 2:
        return float("nan")  # nothing to rank it against
    if len(labels) == 2:
        return float(roc_auc_score([t == positive for t in truth], p[:, labels.index(positive)]))
    return float(roc_auc_score(truth, p, labels=sorted(labels), multi_class="ovr"))
