"""What a document is: content-hashed text or a conversation, with a source, and the split that its hash gives it.

What belongs here: the `Document` type and the splits. What does not: where documents come from (`sources.py`) or
which of them are kept (`sampling.py`).
"""

import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

from scopeatlas.storage.files import content_hash, unit_hash

Split = Literal["explain", "select", "report"]
SPLITS: tuple[Split, ...] = ("explain", "select", "report")
"""Order matters: a split is stored in shards as its index here."""


@dataclass(frozen=True)
class Document:
    """One text, or one conversation. `id` hashes that alone, so the same text from two sources is one document.

    turns: the (role, text) pairs of a conversation, whose `text` is then a transcript for people; () for plain text.
    """

    id: str
    text: str
    source: str
    metadata: dict[str, str] = field(default_factory=dict)
    turns: tuple[tuple[str, str], ...] = ()


def make_document(text: str, *, source: str, metadata: dict[str, str] | None = None) -> Document:
    """A document of `text`, NFC-normalised and stripped."""
    clean = _clean(text)
    return Document(content_hash("document", clean)[:32], clean, source, metadata or {})


def make_conversation(turns: Iterable[tuple[str, str]], *, source: str, metadata: dict[str, str] | None = None) -> Document:
    """A conversation of (role, text) turns, each text NFC-normalised and stripped, turns that say nothing left out."""
    clean = tuple((role, _clean(text)) for role, text in turns if _clean(text))
    transcript = "\n\n".join(f"{role}: {text}" for role, text in clean)
    return Document(content_hash("conversation", clean)[:32], transcript, source, metadata or {}, clean)


def _clean(text: str) -> str:
    return unicodedata.normalize("NFC", text).strip()


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
