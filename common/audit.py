"""What is in a corpus, and whom it treats how; and what can be done about it, so that it shows.

    from common.audit import GROUPS, associations, audit, leakage
    print(audit(documents))
    print(associations(documents, GROUPS["men"], GROUPS["women"]))
    print(leakage(train, validation))

To measure: language, length, personal data, group terms; the words that keep company with one group
rather than another; what validation shares with training. To change: `redact`, `swap_gender` and
`with_counterfactuals`, `resample` and `mixture_weights`. Everything streams over documents of
`common.corpus`. Regular expressions and word lists find a part, never all: read the counts as "at
least", and look at examples before acting on them.
"""

import math
import re
from array import array
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass

from py3langid import classify

from common.corpus import Document, shingles

WORD = re.compile(r"[^\W\d_]+")  # letters of any script


def words_of(text: str) -> list[str]:
    """The words of a text, lower-cased; "king's" is two of them."""
    return WORD.findall(text.lower())


# ---------------------------------------------------------------------------------- personal data

PERSONAL_DATA = re.compile(
    r"""(?P<email> \b [\w.+-]{1,64} @ \w [\w-]* (?:\.[\w-]+)+ )
      | (?P<ip>    (?<![\w.]) \d{1,3} (?:\.\d{1,3}){3} (?!\.?\w) )
      | (?P<card>  (?<![\w.]) (?=[2-6]) (?: \d{13,19} | \d{4}(?:[ -]\d{4}){3}
                   | \d{4}[ -]\d{6}[ -]\d{5} ) (?!\.?\w) )
      | (?P<phone> (?<![\w.]) (?:\+\d{1,3}[ -]?)? (?:\(\d{2,5}\)[ ]?|\d{2,5})
                   (?:[ -]?\d{2,5}){1,4} (?!\.?\d) )""",
    re.VERBOSE,
)


def _is_real(match: re.Match) -> bool:
    """Whether what looks like personal data passes its own arithmetic."""
    kind, found = match.lastgroup, match.group()
    digits = [int(c) for c in found if c.isdecimal()]
    if kind == "ip":
        return all(int(part) < 256 for part in found.split("."))
    if kind == "card":  # the check digit of Luhn (1960): double every second digit from the right
        doubled = (sum(divmod(2 * d, 10)) for d in digits[-2::-2])
        return len(set(digits)) > 1 and (sum(digits[-1::-2]) + sum(doubled)) % 10 == 0
    if kind == "phone":
        known_form = re.match(r"\+|\(?00?[1-9]|\(?\d{3}\)?[ -]\d{3}-\d{4}$", found)
        return known_form is not None and 9 <= len(digits) <= 15
    return True


def personal_data(text: str) -> list[tuple[str, str]]:
    """(kind, text found) for every e-mail address, IPv4 address, card number and phone number.

    A version such as 1.2.3.4 counts as an address. Names and postal addresses are not looked for:
    they need a model, not a pattern.
    """
    return [(m.lastgroup, m.group()) for m in PERSONAL_DATA.finditer(text) if _is_real(m)]


def redact(text: str) -> str:
    """The text with "[EMAIL]", "[PHONE]", … in place of personal data."""
    mark = lambda m: f"[{m.lastgroup.upper()}]" if _is_real(m) else m.group()
    return PERSONAL_DATA.sub(mark, text)


# --------------------------------------------------------------------------------------- overview

GROUPS = {
    name: frozenset(terms.split())
    for name, terms in {
        "men": "he him his himself man men boy boys father fathers son sons brother brothers "
        "husband husbands uncle uncles nephew king kings prince princes duke dukes lord lords sir "
        "mr gentleman gentlemen male males",
        "women": "she her hers herself woman women girl girls mother mothers daughter daughters "
        "sister sisters wife wives aunt aunts niece queen queens princess princesses duchess "
        "duchesses lady ladies madam mrs ms miss gentlewoman gentlewomen female females",
        "Christian": "christian christians christianity church bible",
        "Jewish": "jew jews jewish judaism synagogue torah",
        "Muslim": "muslim muslims islam islamic mosque quran",
        "European": "europe european english england french france german germany italian italy",
        "African": "africa african moor moors egypt egyptian nigerian nigeria kenyan kenya",
        "Asian": "asia asian chinese china indian india japanese japan korean korea arab arabia",
    }.items()
}


@dataclass(frozen=True)
class Audit:
    """An overview of a corpus. `print` it, or take `to_frame()`."""

    documents: int
    characters: int
    words: int
    length: dict[str, int]  # characters per document: quantiles
    language: dict[str, int]  # documents per ISO 639-1 code; "?" where too short to tell
    personal_data: dict[str, int]  # occurrences per kind
    group_terms: dict[str, int]  # occurrences per group

    def __str__(self) -> str:
        lines = [
            f"{self.documents:,} documents, {self.characters:,} characters, {self.words:,} words"
        ]
        for title in ("length", "language", "personal_data", "group_terms"):
            items = list(getattr(self, title).items())
            more = f", {len(items) - 8} more" if len(items) > 8 else ""
            shown = ", ".join(f"{name} {count:,}" for name, count in items[:8])
            lines.append(f"{title.replace('_', ' '):13} {shown or 'none'}{more}")
        return "\n".join(lines)

    def to_frame(self):
        """A pandas DataFrame with one row per figure: about, item, count."""
        import pandas as pd

        rows = [
            (about, item, count)
            for about, counts in asdict(self).items()
            for item, count in (counts if isinstance(counts, dict) else {"all": counts}).items()
        ]
        return pd.DataFrame(rows, columns=["about", "item", "count"])


def audit(documents: Iterable[Document], groups: dict[str, frozenset] = GROUPS) -> Audit:
    """Count what `Audit` says, in one pass; remembers 8 bytes per document, for the quantiles.

    The language is judged from the first 1,000 characters, and not at all from fewer than 50.
    """
    lengths = array("Q")
    languages, personal, terms, words = Counter(), Counter(), Counter(), 0
    for document in documents:
        text = document.text
        lengths.append(len(text))
        languages[classify(text[:1000])[0] if len(text) >= 50 else "?"] += 1
        personal.update(kind for kind, _ in personal_data(text))
        counts = Counter(words_of(text))
        words += counts.total()
        for name, group in groups.items():
            terms[name] += sum(counts[term] for term in group)
    lengths = sorted(lengths)
    marks = {"shortest": 0.0, "10%": 0.1, "median": 0.5, "90%": 0.9, "longest": 1.0}
    return Audit(
        documents=len(lengths),
        characters=sum(lengths),
        words=words,
        length={m: lengths[round(q * (len(lengths) - 1))] for m, q in marks.items() if lengths},
        language=dict(sorted(languages.items(), key=lambda item: (-item[1], item[0]))),
        personal_data=dict(sorted(personal.items())),
        group_terms=dict(terms),
    )


# ------------------------------------------------------------------------------------ association


@dataclass(frozen=True)
class Association:
    """How much more a word keeps company with group A (positive) than with group B (negative)."""

    word: str
    count_a: int
    count_b: int
    log_odds: float  # natural logarithm of the ratio of odds; ln 2 = 0.69 means twice the odds
    z: float  # log_odds in standard deviations: |z| < 2 is what chance does, whatever the ratio


@dataclass(frozen=True)
class Associations:
    """Words ordered from most typical of A to most typical of B."""

    rows: tuple[Association, ...]

    def beyond_chance(self, z: float = 3.0) -> int:
        """How many words differ by at least z standard deviations."""
        return sum(abs(row.z) >= z for row in self.rows)

    def __getitem__(self, word: str) -> Association:
        return next(row for row in self.rows if row.word == word)

    def __str__(self) -> str:
        lines = [f"{'word':14}{'A':>7}{'B':>7}{'log-odds':>10}{'z':>7}"]
        ends = self.rows if len(self.rows) <= 16 else self.rows[:8] + self.rows[-8:]
        for r in ends:
            lines.append(f"{r.word:14}{r.count_a:7,}{r.count_b:7,}{r.log_odds:10.2f}{r.z:7.1f}")
        return "\n".join(
            [*lines, f"{self.beyond_chance()} of {len(self.rows):,} words have |z| ≥ 3"]
        )

    def to_frame(self):
        """A pandas DataFrame with one row per word."""
        import pandas as pd

        return pd.DataFrame([asdict(row) for row in self.rows])


def associations(
    documents: Iterable[Document],
    group_a: Iterable[str],
    group_b: Iterable[str],
    words: Iterable[str] | None = None,
    window: int = 8,
    prior: float = 500.0,
) -> Associations:
    """Which words (default: all) stand within `window` words of group A rather than of group B.

    Log-odds with an informative Dirichlet prior, "Fightin' Words" (Monroe, Colaresi and Quinn
    2008, eq. 22): every word starts with `prior` × its share of both contexts, so a word seen
    twice gets a small z. A place near two terms counts once. Remembers a count per distinct word.
    """
    group_a, group_b = frozenset(group_a), frozenset(group_b)
    wanted = None if words is None else frozenset(words)
    a, b = Counter(), Counter()
    for document in documents:
        text = words_of(document.text)
        for counts, terms in ((a, group_a), (b, group_b)):
            near = {
                place
                for i, word in enumerate(text)
                if word in terms
                for place in range(max(i - window, 0), min(i + window + 1, len(text)))
            }
            counts.update(text[place] for place in near)
    for term in group_a | group_b:
        a.pop(term, None), b.pop(term, None)
    rows = []
    total_a, total_b = a.total(), b.total()
    for word in (a | b).keys() if wanted is None else wanted & (a | b).keys():
        # The share of one word more, which was not seen: so no word is ever all there is.
        expected = prior * (a[word] + b[word]) / (total_a + total_b + 1)
        in_a, in_b = a[word] + expected, b[word] + expected
        log_odds = math.log(in_a / (total_a + prior - in_a)) - math.log(
            in_b / (total_b + prior - in_b)
        )
        z = log_odds / math.sqrt(1 / in_a + 1 / in_b)
        rows.append(Association(word, a[word], b[word], log_odds, z))
    return Associations(tuple(sorted(rows, key=lambda row: (-row.z, row.word))))


# ---------------------------------------------------------------------------------------- leakage


@dataclass(frozen=True)
class Leakage:
    """What of the validation side is in the training side too."""

    documents: int
    leaking: tuple[str, ...]  # names of the validation documents that share at least one run
    runs: int  # distinct runs of words in validation
    shared: int  # of which in training
    size: int  # words per run

    def __str__(self) -> str:
        percent = lambda part, whole: f"{part:,} of {whole:,} ({part / max(whole, 1):.1%})"
        return (
            f"{percent(len(self.leaking), self.documents)} validation documents share a run of "
            f"{self.size} words with training; {percent(self.shared, self.runs)} runs do"
        )


def leakage(train: Iterable[Document], validation: Iterable[Document], size: int = 13) -> Leakage:
    """Look for every run of `size` words of validation in training.

    13 words is what GPT-3 used (Brown et al. 2020, appendix C); shorter runs find quotations and
    idioms. Remembers the runs of the validation side, about 200 bytes each; training streams.
    """
    names: list[str] = []
    owners: dict[int, list[int]] = {}  # 64-bit hash of a run -> places in `names`
    for place, document in enumerate(validation):
        names.append(document.name)
        for run in {hash(run) for run in shingles(document.text, size)}:
            owners.setdefault(run, []).append(place)
    shared: set[int] = set()
    for document in train:
        shared |= owners.keys() & {hash(run) for run in shingles(document.text, size)}
    leaking = sorted({place for run in shared for place in owners[run]})
    return Leakage(
        len(names), tuple(names[place] for place in leaking), len(owners), len(shared), size
    )
