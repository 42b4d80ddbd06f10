"""Ways to change who is in a corpus, and how often; `common.audit` shows what each has done.

    from common.balance import mixture_weights, resample, with_counterfactuals
    balanced = with_counterfactuals(documents)  # every text twice, once with men and women swapped
    weights = mixture_weights({"web": 9e6, "books": 1e6}, alpha=0.5)  # more of the small source
    mixed = resample(documents, lambda document: weights[source_of(document)])

None of them makes a corpus fair. Swapping doubles the text, knows two genders and no names, and
writes sentences that nobody would ("he was pregnant"); resampling only repeats or drops.
"""

import re
from collections.abc import Callable, Iterable, Iterator

from common.corpus import Document, uniform

_PAIRS = """he she, himself herself, man woman, men women, boy girl, boys girls, father mother,
    fathers mothers, son daughter, sons daughters, brother sister, brothers sisters, husband wife,
    husbands wives, uncle aunt, uncles aunts, nephew niece, king queen, kings queens,
    prince princess, princes princesses, duke duchess, dukes duchesses, lord lady, lords ladies,
    sir madam, mr mrs, gentleman gentlewoman, gentlemen gentlewomen, widower widow, actor actress,
    male female, males females"""
_SWAP = {}
for _pair in _PAIRS.split(","):
    _one, _other = _pair.split()
    _SWAP |= {_one: _other, _other: _one}
_SWAP |= {
    "him": "her",
    "hers": "his",
    "ms": "mr",
    "his": "",
    "her": "",
}  # "": depends on what follows

# After these, or at the end of a phrase, "her" stands alone (him) and "his" does too (hers).
_FUNCTION_WORDS = """
    a about after again against all am an and any are as at away back be because been before but by
    can come could did do does down every for from go had has have he hence here hither home how i
    if in into is it know may me might must my no nor not now of off on once or our out over say
    shall she should since so some speak still such than that the their them then there these they
    this those though through thus thy till to too under until up upon was we well were what when
    where which while who whom whose why will with within without would yes yet you your"""
_NO_NOUN = frozenset(_FUNCTION_WORDS.split())
_GENDERED = re.compile(rf"(?<![^\W_])({'|'.join(_SWAP)})(?![^\W_])(?=\s*(\S)(\w*))?", re.IGNORECASE)


def swap_gender(text: str) -> str:
    """The text with men and women exchanged: "She lost her king" becomes "He lost his queen".

    Counterfactual data augmentation (Zhao et al. 2018; Lu et al. 2018). "her" is read as "his"
    before a word that can be or precede a noun, else as "him"; without a parser, that is sometimes
    wrong: in Shakespeare, swapping twice turns one "him" in five into "his" ("let him go").
    """

    def swap(match: re.Match) -> str:
        word, following = match[1], f"{match[2] or ''}{match[3] or ''}".lower()
        owns = following[:1].isalpha() and following not in _NO_NOUN
        alone = {"his": "hers", "her": "him"}
        owned = {"his": "her", "her": "his"}
        new = _SWAP[word.lower()] or (owned if owns else alone)[word.lower()]
        if word.isupper():
            return new.upper()
        return new.capitalize() if word[0].isupper() else new

    return _GENDERED.sub(swap, text)


def with_counterfactuals(documents: Iterable[Document]) -> Iterator[Document]:
    """Every document, and after it the same with genders swapped, where that changes anything."""
    for document in documents:
        yield document
        swapped = swap_gender(document.text)
        if swapped != document.text:
            yield Document(f"{document.name} (swapped)", swapped)


def resample(
    documents: Iterable[Document], weight: Callable[[Document], float], seed: int = 0
) -> Iterator[Document]:
    """Each document `weight(document)` times on average: 0 drops it, 0.5 tosses a coin."""
    for document in documents:
        whole, fraction = divmod(weight(document), 1)
        for _ in range(int(whole) + (uniform(document.name + document.text, seed) < fraction)):
            yield document


def mixture_weights(sizes: dict[str, float], alpha: float = 0.5) -> dict[str, float]:
    """How often to repeat each source so that its share becomes proportional to size**alpha.

    alpha=1 leaves the mixture as it is, 0 makes all sources equal; XLM (Conneau and Lample 2019)
    used 0.5 for languages. The total stays the same. Meant for `resample(documents, weight)`.
    """
    scale = sum(sizes.values()) / sum(size**alpha for size in sizes.values())
    return {source: scale * size ** (alpha - 1) for source, size in sizes.items()}
