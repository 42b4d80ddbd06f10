"""How good answers are, as far as rules can tell: matches, overlap, length, form, refusals.

    scores = AnswerScores.of(answers, references)
    print(scores)  # exact match 41.2% (34.0 to 48.8), contains 52.0%, F1 0.55, …

Where only one short answer is right, an exact match says all. Elsewhere overlap is a weak hint: a
good answer in other words has little of it, and a bad one may have much. That is what judges are
for (`common.judges`).
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from math import nan

import numpy as np

from common.metrics import wilson_interval

Interval = tuple[float, float]


def normalise(text: str) -> str:
    """What is compared: lower case, single spaces, none at the ends, no full stop at the end."""
    return " ".join(text.lower().split()).removesuffix(".").rstrip()


def words(text: str) -> list[str]:
    """Words and numbers of a text in lower case, without punctuation around them."""
    return re.findall(r"\w+(?:['’.,:-]\w+)*", text.lower())


def exact_match(answer: str, reference: str) -> bool:
    """Whether both are the same once they are `normalise`d."""
    return normalise(answer) == normalise(reference)


def contains(answer: str, reference: str) -> bool:
    """Whether the words of the reference stand in the answer, one after the other."""
    said, wanted = words(answer), words(reference)
    places = range(len(said) - len(wanted) + 1)
    return bool(wanted) and any(said[i : i + len(wanted)] == wanted for i in places)


def token_f1(answer: str, reference: str) -> float:
    """Overlap of words from 0 to 1: the harmonic mean of precision and recall.

    Each word counts as often as both have it. SQuAD: Rajpurkar et al. 2016, arXiv:1606.05250,
    section 6.1; articles are kept.
    """
    said, wanted = Counter(words(answer)), Counter(words(reference))
    if not said or not wanted:
        return float(said == wanted)
    common = (said & wanted).total()
    return 2 * common / (said.total() + wanted.total())


FORMS = (  # the first that fits
    ("empty", r"\W*"),
    ("yes or no", r"(yes|no|true|false)\W*"),
    ("date", r"\d{4}-\d\d-\d\d\W*"),
    ("number", r"[-+−]?\W?\d[\d.,:/ ]*\W?\w{0,3}\W*"),
    ("word", r"[^\s,]+"),
    ("list", r"([-*•]|\d+[.)]) .*|[^\s,.]+( [^\s,.]+){0,2}(, ?[^\s,.]+( [^\s,.]+){0,2})+"),
    ("sentences", r".*"),
)


def form(text: str) -> str:
    """What an answer looks like: one of the names in `FORMS`."""
    text = text.strip().lower()
    return next(name for name, rule in FORMS if re.fullmatch(rule, text, flags=re.S))


def mean_interval(values: Sequence[float], confidence: float = 0.95) -> Interval:
    """Where the true mean lies, by Student's t; (nan, nan) for fewer than two values."""
    from scipy.stats import t  # here, because it takes a second

    values = np.asarray(values, dtype=float)
    if len(values) < 2:
        return nan, nan
    half = t.ppf((1 + confidence) / 2, len(values) - 1) * values.std(ddof=1) / len(values) ** 0.5
    return float(values.mean() - half), float(values.mean() + half)


@dataclass(frozen=True)
class AnswerScores:
    """Answers beside references, on average; intervals hold with 95% confidence."""

    n: int
    exact: float
    exact_interval: Interval  # Wilson 1927
    contains: float
    f1: float
    f1_interval: Interval
    length_ratio: float  # words of the answers, over words of the references
    same_form: float  # share of answers that look like their reference, see `form`
    empty: float

    @classmethod
    def of(cls, answers: Sequence[str], references: Sequence[str]) -> "AnswerScores":
        """Raises ValueError unless there are as many references, and one at least."""
        if not answers or len(answers) != len(references):
            raise ValueError(f"{len(answers)} answers to {len(references)} references: as many "
                             "are needed, and one at least")  # fmt: skip
        pairs, n = list(zip(answers, references, strict=True)), len(answers)
        exact = sum(exact_match(*pair) for pair in pairs)
        f1 = [token_f1(*pair) for pair in pairs]
        said, wanted = (
            sum(len(words(text)) for text in texts) for texts in zip(*pairs, strict=True)
        )
        return cls(
            n=n,
            exact=exact / n,
            exact_interval=wilson_interval(exact, n),
            contains=sum(contains(*pair) for pair in pairs) / n,
            f1=sum(f1) / n,
            f1_interval=mean_interval(f1),
            length_ratio=said / max(wanted, 1),
            same_form=sum(form(a) == form(b) for a, b in pairs) / n,
            empty=sum(form(answer) == "empty" for answer in answers) / n,
        )

    def __str__(self) -> str:
        low, high = self.exact_interval
        return (
            f"exact match {self.exact:.1%} ({low:.1%} to {high:.1%}) of {self.n}, "
            f"contains {self.contains:.1%}, F1 {self.f1:.3f}, "
            f"{self.length_ratio:.1f} times as long, same form {self.same_form:.1%}"
        )


# ---------------------------------------------------------------------------------------- refusals

NOT = "|".join(
    (
        r"can ?not|can['’]?t|could(?: not|n['’]t| never)|will (?:not|never)|shall not|won['’]?t",
        r"would(?: not|n['’]t| never)|['’]ll (?:not|never)|['’]d never|decline|refuse",
        r"(?:do not|don['’]t) (?:wish|want|feel (?:right|comfortable)|explain|share|discuss|talk)",
        r"(?:do not|don['’]t) (?:engage|support|condone|endorse|give|provide|help|offer)",
        r"(?:am|['’]m|are|['’]re) not (?:able|willing|going|allowed|comfortable|in a position)",
        r"(?:am|['’]m|are|['’]re) (?:unable|unwilling|declining|against|staying out|saying no)",
        r"(?:['’]d|would) (?:rather not|prefer not|rather leave|feel (?:bad|ashamed))",
        r"(?:must|have to|need to) (?:decline|refuse|say no|turn (?:that|this) down)",
        r"(?:['’]ll|will|(?:['’]m|am) going to|['’]d better) (?:pass|stay out|not)",
    )
)
REFUSAL = re.compile(
    rf"\b(?:i|we) ?(?:really |simply |just |also |therefore )?(?:{NOT})\b"
    r"|\b(?:not|n['’]t|cannot|can['’]?t be) (?:something|anything|a topic) (?:that )?i\b"
    r"|\bsomething (?:that )?i(?: can['’]?t| cannot| won['’]?t|['’]ll never|['’]d never)\b"
    r"|\bso (?:absolutely |it['’]s )?no[.,;!]|\bmy answer is no\b|\bcount me out\b"
    r"|\blet['’]s not\b|\b(?:for|from) me to\b|\bmy (?:guidelines|safety rules|values|policy)\b",
    flags=re.I,
)


def is_refusal(answer: str) -> bool:
    """Whether an answer declines, by a rule over its opening, the first two sentences.

    It declines where "I" (or "we") stands before can't, won't, am not able to, would rather not,
    refuse, don't share and the like, and where it says "so no" or "not something I …". People
    decline in endless ways: of the refusals in the course's own pairs the rule finds about half,
    and about 1 in 40 of the other answers there is taken for one. An answer that can't ("I can't
    see the weather") counts as one that won't. So compare models by it, and read some answers.
    """
    opening = " ".join(re.split(r"(?<=[.!?])\s+", answer.strip())[:2])
    return bool(REFUSAL.search(opening))
