"""Which documents make up a corpus: a hash threshold, near-duplicates removed, a split for each.

What belongs here: choosing documents. What does not: reading them (`sources.py`) or tokenising them (`contexts.py`).
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from scopeatlas.corpus.documents import SPLITS, Document, Split, sampling_position, split_of
from scopeatlas.errors import CorpusError

SHINGLE_WORDS = 5
MINHASH_PERMUTATIONS = 64
NEAR_DUPLICATE_JACCARD = 0.8
CANDIDATE_JACCARD = 0.55
"""Where the index starts to call two documents candidates: its recall rises around its threshold, so one at 0.8 itself
would miss two thirds of the pairs that lie there."""


@dataclass(frozen=True)
class Sampling:
    """How a corpus is drawn.

    fraction: documents whose hash position lies below this are kept; raising it only adds documents.
    shard_bits: the hash space is cut into 2**shard_bits ranges, each the documents of one shard.
    splits: fractions of documents for explain, select and report; they sum to 1.
    """

    fraction: float = 1.0
    shard_bits: int = 4
    splits: tuple[float, float, float] = (0.5, 0.2, 0.3)


@dataclass(frozen=True)
class Sample:
    """The documents kept, in order of hash position, each with its split, and what was left out and why."""

    documents: list[Document]
    splits: list[Split]
    exact_duplicates: int
    near_duplicates: int

    def documents_per_split(self) -> dict[str, int]:
        return {split: self.splits.count(split) for split in SPLITS}


def draw_sample(documents: Iterable[Document], sampling: Sampling) -> Sample:
    """Keep the documents under the threshold, one of each cluster of near-duplicates (the lowest hash).

    Because clusters are resolved in the order in which a growing threshold admits documents, a larger fraction keeps
    every document of a smaller one. Raises CorpusError if nothing is left.
    """
    if abs(sum(sampling.splits) - 1) > 1e-9 or min(sampling.splits) <= 0:
        raise CorpusError(f"corpus.splits must be three positive fractions that sum to 1, not {sampling.splits}")
    seen: dict[str, Document] = {}
    read = 0
    for document in documents:
        if sampling_position(document.id) < sampling.fraction:
            read += 1
            seen.setdefault(document.id, document)
    ordered = sorted(seen.values(), key=lambda d: (sampling_position(d.id), d.id))
    kept = _without_near_duplicates(ordered)
    if not kept:
        raise CorpusError(
            "the corpus is empty: no document passed corpus.min_characters and corpus.fraction; lower the one or raise the other"
        )
    splits: list[Split] = [split_of(document.id, sampling.splits) for document in kept]
    return Sample(kept, splits, read - len(ordered), len(ordered) - len(kept))


def shard_of(document_id: str, shard_bits: int) -> int:
    """The shard of a document: which range of the hash space it lies in."""
    return int(sampling_position(document_id) * (1 << shard_bits))


def _without_near_duplicates(ordered: list[Document]) -> list[Document]:
    """Drop each document whose word 5-gram Jaccard (MinHash estimate) with an earlier one is at least 0.8."""
    from datasketch import MinHash, MinHashLSH

    index = MinHashLSH(threshold=CANDIDATE_JACCARD, num_perm=MINHASH_PERMUTATIONS)
    signatures: dict[str, MinHash] = {}
    kept: list[Document] = []
    for document in ordered:
        signature = MinHash(num_perm=MINHASH_PERMUTATIONS, seed=1)
        signature.update_batch(_shingles(document.text))
        twins = (signatures[str(key)] for key in index.query(signature))
        is_duplicate = any(signature.jaccard(twin) >= NEAR_DUPLICATE_JACCARD for twin in twins)
        # A dropped document still stands in the index, so that a chain of near-duplicates is one cluster.
        signatures[document.id] = signature
        index.insert(document.id, signature)
        if not is_duplicate:
            kept.append(document)
    return kept


def _shingles(text: str) -> list[bytes]:
    words = re.findall(r"\w+", text.lower())
    grams = {" ".join(words[i : i + SHINGLE_WORDS]) for i in range(max(1, len(words) - SHINGLE_WORDS + 1))}
    return [gram.encode() for gram in sorted(grams)]
