"""Contexts: the token sequences a subject model reads, cut from documents and grouped into shards.

What belongs here: tokenising, the cap per document, the table of one shard's contexts. What does not: batching or
running the model (`subject/`).
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from scopeatlas.corpus.documents import SPLITS, Document, Split
from scopeatlas.storage.files import atomic_path, content_hash, stable_id

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
    tokens: int32 [n, length], BOS in front, padded at the end with -1.
    """

    ids: np.ndarray
    document_ids: list[str]
    splits: np.ndarray
    tokens: np.ndarray

    def __len__(self) -> int:
        return len(self.ids)

    def identity(self) -> str:
        """The hash of the contexts themselves."""
        return content_hash(self.ids.tolist(), self.document_ids, self.splits.tolist(), self.tokens.tolist())

    def lengths(self) -> np.ndarray:
        """Tokens per context, BOS included: int64 [n]."""
        return (self.tokens >= 0).sum(axis=1)


def cut_contexts(
    documents: Iterable[tuple[Document, Split]], tokenizer: "PreTrainedTokenizerBase", rules: ContextRules
) -> Contexts:
    """Cut each document into consecutive contexts and keep at most `rules.per_document`, chosen by hash.

    The choice is a bottom-k by hash, so raising the cap keeps every context of the lower one. Special tokens that
    the text happens to spell are split into plain ones: only the BOS put in front here is special.
    """
    bos = tokenizer.bos_token_id
    body = rules.length - 1 if bos is not None else rules.length
    ids: list[int] = []
    document_ids: list[str] = []
    splits: list[int] = []
    rows: list[list[int]] = []
    for document, split in documents:
        tokens = tokenizer(document.text, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
        starts = [s for s in range(0, len(tokens), body) if len(tokens) - s >= MIN_CONTEXT_TOKENS]
        chosen = sorted(starts, key=lambda s: stable_id("context", f"{document.id}:{s}"))[: rules.per_document]
        for start in sorted(chosen):
            ids.append(stable_id("context", f"{document.id}:{start}"))
            document_ids.append(document.id)
            splits.append(SPLITS.index(split))
            rows.append(([bos] if bos is not None else []) + tokens[start : start + body])
    table = np.full((len(rows), rules.length), -1, dtype=np.int32)
    for row, tokens in zip(table, rows, strict=True):
        row[: len(tokens)] = tokens
    return Contexts(np.array(ids, dtype=np.int64), document_ids, np.array(splits, dtype=np.uint8), table)


def write_contexts(contexts: Contexts, path: Path) -> None:
    """Write one shard's contexts as parquet, atomically."""
    table = pa.table(
        {
            "context_id": pa.array(contexts.ids),
            "document_id": pa.array(contexts.document_ids, pa.string()),
            "split": pa.array(contexts.splits),
            "tokens": pa.FixedSizeListArray.from_arrays(pa.array(contexts.tokens.ravel()), contexts.tokens.shape[1]),
        }
    )
    with atomic_path(path) as temporary:
        pq.write_table(table, temporary, compression="zstd")


def read_contexts(path: Path) -> Contexts:
    """Read one shard's contexts back."""
    table = pq.read_table(path)
    tokens = table["tokens"].combine_chunks()
    flat = tokens.flatten().to_numpy(zero_copy_only=False)
    return Contexts(
        table["context_id"].to_numpy(),
        table["document_id"].to_pylist(),
        table["split"].to_numpy(),
        flat.reshape(len(table), tokens.type.list_size).copy(),  # Arrow's own memory is read-only
    )
