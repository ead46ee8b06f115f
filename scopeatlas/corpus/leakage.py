"""Looking for leaks: whether what labels were proposed from shares a document with what they are tested on.

What belongs here: the check, made anew from what is on disk. What does not: keeping splits apart in the first place
(`sampling.py`), or refusing windows of the wrong split (`hypotheses/samples.py`).
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

import polars as pl

from scopeatlas.corpus.build import Corpus
from scopeatlas.corpus.documents import SPLITS, Split


@dataclass(frozen=True)
class Leaks:
    """documents: per split. shared: ids, or for one text under several ids those, in more than one split. misplaced: ids
    that were read as of one split and are of another, or of none."""

    documents: dict[str, int]
    shared: tuple[str, ...]
    misplaced: tuple[str, ...]

    @property
    def found(self) -> bool:
        return bool(self.shared or self.misplaced)

    def __str__(self) -> str:
        counted = ", ".join(f"{self.documents.get(split, 0):,} {split}" for split in SPLITS)
        if not self.found:
            return f"no document is shared among {counted} documents"
        first = ", ".join((*self.shared, *self.misplaced)[:3])
        return f"{len(self.shared)} documents are in two splits, {len(self.misplaced)} were read as of another: {first}, ..."


def find_leaks(corpus: Corpus, read: Iterable[tuple[str, Split]]) -> Leaks:
    """Leaks of a corpus and of the documents that were `read`, (document id, the split they were taken for).

    A text is the same if it is so without case, space and punctuation. Linear in the corpus' text.
    """
    folded = corpus.documents.select("document_id", "split", text=pl.col("text").map_elements(_folded, return_dtype=pl.UInt64))
    twice = folded.filter((pl.col("split").n_unique() > 1).over("text") | (pl.col("split").n_unique() > 1).over("document_id"))
    split_of = dict(folded.select("document_id", "split").iter_rows())
    misplaced = {document for document, split in read if split_of.get(document) != split}
    counts = dict(folded.group_by("split").agg(pl.col("document_id").n_unique()).iter_rows())
    return Leaks(counts, tuple(sorted(set(twice["document_id"]))), tuple(sorted(misplaced)))


def _folded(text: str) -> int:
    return hash(" ".join(re.findall(r"\w+", text.casefold()))) & (2**64 - 1)
