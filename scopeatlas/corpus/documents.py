"""What a document is: content-hashed text with a source, and the split that its hash gives it.

What belongs here: the `Document` type and the splits. What does not: where documents come from (`sources.py`) or
which of them are kept (`sampling.py`).
"""

import unicodedata
from dataclasses import dataclass, field
from typing import Literal

from scopeatlas.storage.files import content_hash, unit_hash

Split = Literal["explain", "select", "report"]
SPLITS: tuple[Split, ...] = ("explain", "select", "report")
"""Order matters: a split is stored in shards as its index here."""


@dataclass(frozen=True)
class Document:
    """One text. `id` is the hash of the text alone, so the same text from two sources is one document."""

    id: str
    text: str
    source: str
    metadata: dict[str, str] = field(default_factory=dict)


def make_document(text: str, *, source: str, metadata: dict[str, str] | None = None) -> Document:
    """A document of `text`, NFC-normalised and stripped."""
    clean = unicodedata.normalize("NFC", text).strip()
    return Document(content_hash("document", clean)[:32], clean, source, metadata or {})


def sampling_position(document_id: str) -> float:
    """Where in [0, 1) a document lies: sampling keeps the low end, shards are ranges of it."""
    return unit_hash("sample", document_id)


def split_of(document_id: str, fractions: tuple[float, float, float]) -> Split:
    """The split of a document, from its hash alone (so it never changes when the corpus grows)."""
    u = unit_hash("split", document_id)
    explain, select, _ = fractions
    if u < explain:
        return "explain"
    return "select" if u < explain + select else "report"
