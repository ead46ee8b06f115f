"""Probing: where the features of an SAE fire in texts that are given, whatever their source.

What belongs here: texts through the subject model and one SAE. What does not: the corpus (`cache.py`), or what a firing
says about a label (`labels/falsification.py`).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from scopeatlas.activations.reading import SiteBatch, read_batches
from scopeatlas.activations.shards import round_values
from scopeatlas.corpus.contexts import Contexts
from scopeatlas.dictionaries.sparse import SparseDictionary
from scopeatlas.subject.loading import SubjectModel
from scopeatlas.subject.vocabulary import token_texts

CONTEXT_TOKENS = 512
"""A longer text is read in consecutive contexts of so many tokens, BOS in front of each, as the corpus is."""


@dataclass(frozen=True)
class TextActivations:
    """Where features fire in one text, sorted by position, then feature.

    tokens: texts, BOS left out. feature: uint32 [n]. position: int32 [n], index into tokens. value: float32 [n], positive
    and rounded to 16 bits as in activation shards.
    """

    tokens: list[str]
    feature: np.ndarray
    position: np.ndarray
    value: np.ndarray


@dataclass(frozen=True)
class _Piece:
    """The part of text number `text` that one context holds: token ids, BOS left out, the first at `start` of the text."""

    text: int
    start: int
    ids: list[int]


class Probe:
    """Texts through the subject model and one SAE; a feature fires here exactly where the activation cache says so."""

    def __init__(self, dictionary: SparseDictionary, subject: SubjectModel):
        self.dictionary, self.subject = dictionary.to(subject.resolved_device), subject
        bos = subject.tokenizer.bos_token_id
        self._front: list[int] = [] if bos is None else [bos]  # pyright: ignore[reportAttributeAccessIssue]

    def activations(self, texts: Sequence[str], *, features: Sequence[int] | None = None) -> list[TextActivations]:
        """What fires in each text, of all features or of `features`. Special tokens that a text spells are split into
        plain ones; an empty text has no tokens and nothing fires.

        Cost: one forward pass to the last input site over all tokens, texts of like length together.
        """
        ids = [self._ids(text) for text in texts]
        pieces = _pieces(ids, CONTEXT_TOKENS - len(self._front))
        contexts = _as_contexts(pieces, self._front)
        batches = read_batches(contexts, self.subject, set(self.dictionary.sites_in))
        found = [self._read(batch, pieces, contexts.tokens.shape[1]) for batch in batches]
        text, position, feature, value = (
            np.concatenate([part[i] for part in found]) if found else np.zeros(0, dtype=np.int64) for i in range(4)
        )
        if features is not None:
            kept = np.isin(feature, np.asarray(features, dtype=np.int64))
            text, position, feature, value = text[kept], position[kept], feature[kept], value[kept]
        order = np.lexsort((feature, position, text))
        ends = np.searchsorted(text[order], np.arange(len(texts) + 1))
        mine = [order[start:stop] for start, stop in zip(ends[:-1], ends[1:], strict=True)]
        return [
            TextActivations(
                token_texts(self.subject.tokenizer, ids[i]),
                feature[rows].astype(np.uint32),
                position[rows].astype(np.int32),
                value[rows].astype(np.float32),
            )
            for i, rows in enumerate(mine)
        ]

    def _ids(self, text: str) -> list[int]:
        return self.subject.tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]

    def _read(self, batch: SiteBatch, pieces: list[_Piece], width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Text, position in the text, feature and value of everything that fires in a batch."""
        acts = self.dictionary.encode([batch.acts[site] for site in self.dictionary.sites_in])
        scale = self.dictionary.value_scale
        rounded = round_values(acts.value.cpu().numpy(), scale)
        fires = rounded > 0
        row, column = np.divmod(batch.positions[acts.token.cpu().numpy()[fires]], width)
        text, start = (np.array([getattr(piece, name) for piece in pieces]) for name in ("text", "start"))
        value = rounded[fires].astype(np.float32) * np.float32(scale)
        return text[row], start[row] + column - len(self._front), acts.feature.cpu().numpy()[fires], value


def _pieces(ids: Sequence[list[int]], size: int) -> list[_Piece]:
    return [_Piece(i, s, text[s : s + size]) for i, text in enumerate(ids) for s in range(0, len(text), size)]


def _as_contexts(pieces: list[_Piece], front: list[int]) -> Contexts:
    """Pieces as a table of contexts, which are of no document and no split."""
    n, longest = len(pieces), max((len(piece.ids) for piece in pieces), default=0)
    tokens = np.full((n, len(front) + longest), -1, dtype=np.int32)
    for row, piece in zip(tokens, pieces, strict=True):
        row[: len(front) + len(piece.ids)] = front + piece.ids
    return Contexts(np.zeros(n, dtype=np.int64), [""] * n, np.zeros(n, dtype=np.uint8), tokens)
