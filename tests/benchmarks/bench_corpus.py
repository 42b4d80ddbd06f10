"""Raw text: how long reading, cleaning, deduplicating and auditing take, and what they find.

    uv run python tests/benchmarks/bench_corpus.py        # about 3 minutes

Near-duplicates are found twice in the same run: by ours, and by datasketch as its documentation
shows it (SHA-1, one update per run of words, MinHashLSH), with the memory each keeps per document.
"""

import time
import tracemalloc
from collections.abc import Iterable

from common.audit import GROUPS, associations, audit, leakage
from common.balance import with_counterfactuals
from common.corpus import (
    Document,
    drop_exact_duplicates,
    drop_near_duplicates,
    harvest_docstrings,
    normalised,
    read_shakespeare,
    read_sms,
    shingles,
    split_documents,
)

PACKAGES = ["matplotlib", "networkx", "numpy", "pandas", "scipy", "sympy", "torch"]


def timed(what: str, stream: Iterable[Document]) -> list[Document]:
    start = time.perf_counter()
    documents = list(stream)
    seconds = time.perf_counter() - start
    size = sum(len(document.text) for document in documents) / 1e6
    print(f"{what:22}{len(documents):7,} documents, {size:5.1f} M characters, {seconds:6.2f} s")
    return documents


def by_the_book(documents: Iterable[Document]) -> Iterable[Document]:
    from datasketch import MinHash, MinHashLSH

    index = MinHashLSH(threshold=0.8, num_perm=128)
    for number, document in enumerate(documents):
        minhash = MinHash(num_perm=128)
        for run in shingles(document.text, 5):
            minhash.update(run.encode("utf8"))
        if not index.query(minhash):
            index.insert(number, minhash)
            yield document


def memory_kept(stream: Iterable[Document], n: int) -> float:
    """Bytes per document that a stage holds after n of them, while it runs."""
    tracemalloc.start()
    for _ in range(n):
        next(stream)
    kept = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    return kept / n


def main() -> None:
    found = timed("docstrings", harvest_docstrings(PACKAGES))
    clean = timed("normalised", normalised(found))
    exact = timed("exact duplicates", drop_exact_duplicates(clean))
    next(drop_near_duplicates(clean))  # import datasketch before the clock runs
    next(iter(by_the_book(clean)))
    rounds: dict[str, list[float]] = {"ours": [], "datasketch's way": []}
    for _ in range(2):
        for name, stage in (("ours", drop_near_duplicates), ("datasketch's way", by_the_book)):
            start = time.perf_counter()
            timed(f"near, {name}", stage(exact))
            rounds[name].append(time.perf_counter() - start)
    ratio = min(rounds["datasketch's way"]) / min(rounds["ours"])
    print(f"ours is {ratio:.0f} times as fast")
    short = [Document(d.name, d.text[:500]) for d in exact[:3000]]
    for name, stage in (("ours", drop_near_duplicates), ("datasketch's way", by_the_book)):
        print(f"kept per document, {name:16} {memory_kept(stage(iter(short)), 2500):7,.0f} bytes")

    plays, messages = list(normalised(read_shakespeare())), list(normalised(read_sms()))
    for name, documents in (("Shakespeare", plays), ("SMS", messages), ("docstrings", exact)):
        start = time.perf_counter()
        report = audit(documents)
        print(f"\naudit of {name}, {time.perf_counter() - start:.1f} s\n{report}")
    men, women = GROUPS["men"], GROUPS["women"]
    print(f"\nShakespeare, men (A) and women (B)\n{associations(plays, men, women)}")
    swapped = list(with_counterfactuals(plays))
    after = associations(swapped, men, women).beyond_chance()
    terms = audit(swapped).group_terms
    print(f"swapped: {after} words with |z| ≥ 3; {terms['men']:,} men, {terms['women']:,} women")
    print(f"SMS as they are: {leakage(*split_documents(messages))}")
    different = drop_near_duplicates(messages)
    print(f"SMS without near-duplicates: {leakage(*split_documents(different))}")


if __name__ == "__main__":
    main()
