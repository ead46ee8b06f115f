"""Contexts: the token sequences a subject model reads, cut from documents and grouped into shards.

What belongs here: tokenising, the cap per document, the table of one shard's contexts. What does not: batching or
running the model (`subject/`).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from scopeatlas.corpus.documents import SPLITS, Document, Split
from scopeatlas.errors import CorpusError, SubjectModelError
from scopeatlas.storage.files import atomic_path, content_hash, stable_id
from scopeatlas.storage.uris import Location, readable
from scopeatlas.subject.conversations import TEMPLATE, TEXT, tokenize_conversation

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MIN_CONTEXT_TOKENS = 16


@dataclass(frozen=True)
class ContextRules:
    """length: tokens per context, BOS included. per_document: at most so many contexts of one document."""

    length: int = 128
    per_document: int = 8


@dataclass(frozen=True)
class Contexts:
    """The contexts of one shard, as columns of equal length n.

    ids: int64 [n], independent of sharding. document_ids: n strings. splits: uint8 [n], indices into SPLITS.
    tokens: int32 [n, length], BOS in front, padded at the end with -1. roles: uint8 [n, length], indices into
    `conversations.ROLES`, 0 where padded; None where no context is of a conversation.
    """

    ids: np.ndarray
    document_ids: list[str]
    splits: np.ndarray
    tokens: np.ndarray
    roles: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def identity(self) -> str:
        """The hash of the contexts themselves."""
        roles = [] if self.roles is None else [self.roles.tolist()]
        return content_hash(self.ids.tolist(), self.document_ids, self.splits.tolist(), self.tokens.tolist(), *roles)

    def lengths(self) -> np.ndarray:
        """Tokens per context, BOS included: int64 [n]."""
        return (self.tokens >= 0).sum(axis=1)

    def counted(self, special_ids: Sequence[int]) -> np.ndarray:
        """What counts in statistics, bool [n, length]: no padding, no special token, nothing that a chat template adds."""
        counted = (self.tokens >= 0) & ~np.isin(self.tokens, special_ids)
        return counted if self.roles is None else counted & (self.roles != TEMPLATE)

    def take(self, rows: np.ndarray) -> "Contexts":
        """Those at `rows`, integers [m], in that order."""
        documents = [self.document_ids[row] for row in rows]
        roles = None if self.roles is None else self.roles[rows]
        return Contexts(self.ids[rows], documents, self.splits[rows], self.tokens[rows], roles)


def join_contexts(parts: Sequence[Contexts]) -> Contexts:
    """The contexts of several shards as one table."""
    roles = [np.full(c.tokens.shape, TEXT, dtype=np.uint8) if c.roles is None else c.roles for c in parts]
    return Contexts(
        np.concatenate([c.ids for c in parts]),
        [document for c in parts for document in c.document_ids],
        np.concatenate([c.splits for c in parts]),
        np.concatenate([c.tokens for c in parts]),
        np.concatenate(roles) if any(c.roles is not None for c in parts) else None,
    )


@dataclass(frozen=True)
class _Row:
    """One context of a document: where in it the context starts, its tokens, and their roles in a conversation."""

    start: int
    tokens: list[int]
    roles: list[int]


def cut_contexts(
    documents: Iterable[tuple[Document, Split]],
    tokenizer: "PreTrainedTokenizerBase",
    rules: ContextRules,
    *,
    refused: list[str] | None = None,
) -> Contexts:
    """Cut each document into consecutive contexts and keep at most `rules.per_document`, chosen by hash.

    A conversation gives one, from its beginning through the chat template: what follows after `rules.length` is left out.
    The choice is a bottom-k by hash, so raising the cap keeps every context of the lower one. Special tokens that
    the text happens to spell are split into plain ones: only the BOS put in front here is special. A conversation that
    the chat template does not take is left out, and why is added to `refused`; without such a list it raises CorpusError.
    """
    cut = [(document, split, row) for document, split in documents for row in _rows(document, tokenizer, rules, refused)]
    return Contexts(
        np.array([stable_id("context", f"{document.id}:{row.start}") for document, _, row in cut], dtype=np.int64),
        [document.id for document, _, _ in cut],
        np.array([SPLITS.index(split) for _, split, _ in cut], dtype=np.uint8),
        _padded([row.tokens for _, _, row in cut], rules.length, -1, np.int32),
        _padded([row.roles for _, _, row in cut], rules.length, TEMPLATE, np.uint8)
        if any(document.turns for document, _, _ in cut)
        else None,
    )


def _rows(document: Document, tokenizer: "PreTrainedTokenizerBase", rules: ContextRules, refused: list[str] | None) -> list[_Row]:
    try:
        return (_conversation_rows if document.turns else _text_rows)(document, tokenizer, rules)
    except CorpusError as error:
        if refused is None:
            raise
        refused.append(str(error))
        return []


def _text_rows(document: Document, tokenizer: "PreTrainedTokenizerBase", rules: ContextRules) -> list[_Row]:
    front = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    body = rules.length - len(front)
    tokens = tokenizer(document.text, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
    starts = [s for s in range(0, len(tokens), body) if len(tokens) - s >= MIN_CONTEXT_TOKENS]
    chosen = sorted(starts, key=lambda s: stable_id("context", f"{document.id}:{s}"))[: rules.per_document]
    rows = []
    for start in sorted(chosen):
        part = tokens[start : start + body]
        rows.append(_Row(start, front + part, [TEMPLATE] * len(front) + [TEXT] * len(part)))
    return rows


def _conversation_rows(document: Document, tokenizer: "PreTrainedTokenizerBase", rules: ContextRules) -> list[_Row]:
    try:
        conversation = tokenize_conversation(document.turns, tokenizer)
    except SubjectModelError as error:
        raise CorpusError(f"conversation {document.id} of {document.source}: {error}") from error
    tokens, roles = conversation.tokens[: rules.length], conversation.roles[: rules.length]
    enough = (roles != TEMPLATE).sum() >= MIN_CONTEXT_TOKENS
    return [_Row(0, tokens.tolist(), roles.tolist())] if enough else []


def _padded(rows: list[list[int]], length: int, padding: int, dtype: type) -> np.ndarray:
    table = np.full((len(rows), length), padding, dtype=dtype)
    for row, values in zip(table, rows, strict=True):
        row[: len(values)] = values
    return table


def write_contexts(contexts: Contexts, path: Location) -> None:
    """Write one shard's contexts as parquet, atomically."""
    columns = {
        "context_id": pa.array(contexts.ids),
        "document_id": pa.array(contexts.document_ids, pa.string()),
        "split": pa.array(contexts.splits),
        "tokens": _fixed_lists(contexts.tokens),
    }
    if contexts.roles is not None:
        columns["roles"] = _fixed_lists(contexts.roles)
    with atomic_path(path) as temporary:
        pq.write_table(pa.table(columns), temporary, compression="zstd")


def read_contexts(path: Location) -> Contexts:
    """Read one shard's contexts back."""
    table = pq.read_table(readable(path))
    return Contexts(
        table["context_id"].to_numpy(),
        table["document_id"].to_pylist(),
        table["split"].to_numpy(),
        _matrix(table["tokens"]),
        _matrix(table["roles"]) if "roles" in table.column_names else None,
    )


def _fixed_lists(matrix: np.ndarray) -> pa.Array:
    return pa.FixedSizeListArray.from_arrays(pa.array(matrix.ravel()), matrix.shape[1])


def _matrix(column: pa.ChunkedArray) -> np.ndarray:
    lists = column.combine_chunks()
    flat = lists.flatten().to_numpy(zero_copy_only=False)
    return flat.reshape(len(lists), lists.type.list_size).copy()  # Arrow's own memory is read-only
