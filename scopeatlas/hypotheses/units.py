"""The units that claims are tested on: every token and context of a corpus with the keys that rules look at.

What belongs here: keys of positions, firings at those positions, and counting hits of rules by joining the two. What
does not: which rule is proposed (`labels/`) or what a score means (`scoring/`).

A rule's hits are found by joining keys, so counting costs one pass over the non-zeros, whatever the number of rules.
`Rule.matches` is the plain reading that these counts must agree with.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import polars as pl
from scipy import sparse

from scopeatlas.activations.cache import activation_keys, text_mask
from scopeatlas.activations.shards import read_shard
from scopeatlas.corpus.build import Corpus
from scopeatlas.corpus.documents import SPLITS, Split
from scopeatlas.dictionaries.releases import SaeEntry
from scopeatlas.hypotheses.metrics import DocumentCounts
from scopeatlas.hypotheses.rules import AFFIX_LENGTHS, PAIR, Rule, word_of
from scopeatlas.storage.store import Store
from scopeatlas.subject.loading import SubjectModel
from scopeatlas.subject.vocabulary import token_texts

COLUMNS = ("token", "word", "previous", "next", "bigram", *(f"{kind}{n}" for kind in ("prefix", "suffix") for n in AFFIX_LENGTHS))
TOPIC_WORD_LENGTH = 4
TOPIC_MIN_DOCUMENTS = 3
TOPIC_MAX_CONTEXTS = 0.2


def column_of(rule: Rule, key: str) -> str:
    """The key column in which a rule's key is looked up."""
    return f"{rule.kind}{len(key)}" if rule.kind in {"prefix", "suffix"} else rule.kind


class Units:
    """All positions of a corpus, flattened to N = contexts x length.

    counted: bool [N], unmasked. split: uint8 [N]. document: int32 [N], index into `documents`. context: int32 [N].
    Key columns: int32 [N], index into that column's texts, -1 where there is no key.
    """

    def __init__(self, corpus: Corpus, subject: SubjectModel):
        loaded = [corpus.contexts(shard) for shard in corpus.shards]
        tokens = np.concatenate([c.tokens for c in loaded])
        self.contexts, self.length = tokens.shape
        self.offsets = np.r_[0, np.cumsum([len(c) for c in loaded])[:-1]] * self.length
        self.counted = np.concatenate([text_mask(c, subject) for c in loaded]).ravel()
        self.context_split = np.concatenate([c.splits for c in loaded])
        self.documents = [d for c in loaded for d in dict.fromkeys(c.document_ids)]
        index = {d: i for i, d in enumerate(self.documents)}
        self.context_document = np.array([index[d] for c in loaded for d in c.document_ids], dtype=np.int32)
        self.split = np.repeat(self.context_split, self.length)
        self.document = np.repeat(self.context_document, self.length)
        self._tokens = tokens
        ids, flat = np.unique(tokens, return_inverse=True)
        spelled = token_texts(subject.tokenizer, ids.tolist())
        self.texts = list(dict.fromkeys(spelled))  # parts of a character in UTF-8 all read as one text, so they are one key
        number = {text: i for i, text in enumerate(self.texts)}
        by_id = np.array([number[text] for text in spelled], dtype=np.int32)
        self._flat = np.where(self.counted, by_id[flat.ravel()], -1)
        self._columns: dict[str, tuple[np.ndarray, list[str]]] = {}

    def column(self, name: str) -> tuple[np.ndarray, list[str]]:
        """A key column and the text of each key in it."""
        if name not in self._columns:
            self._columns[name] = self._make_column(name)
        return self._columns[name]

    def key_of(self, name: str, text: str) -> int:
        """The index of a key's text in a column, or -2 if it never occurs in this corpus."""
        return self._lookup(name).get(text, -2)

    def text_of(self, context: int, start: int, stop: int) -> list[str]:
        """The texts of the tokens from `start` to `stop` of a context; "" for special tokens and padding."""
        at = self._flat[context * self.length + start : context * self.length + stop]
        return [self.texts[key] if key >= 0 else "" for key in at.tolist()]

    def in_split(self, split: Split) -> np.ndarray:
        """Which positions are counted and belong to `split`: bool [N]."""
        return self.counted & (self.split == SPLITS.index(split))

    def _lookup(self, name: str) -> dict[str, int]:
        cache = self.__dict__.setdefault("_lookups", {})
        if name not in cache:
            cache[name] = {text: i for i, text in enumerate(self.column(name)[1])}
        return cache[name]

    def _make_column(self, name: str) -> tuple[np.ndarray, list[str]]:
        if name == "token":
            return self._flat, self.texts
        if name in {"previous", "next"}:
            return self._shifted(1 if name == "previous" else -1), self.texts
        if name == "bigram":
            return self._bigrams()
        kind = name.rstrip("0123456789")
        size = int(name.removeprefix(kind) or 0)
        keys = [_vocabulary_key(kind, size, text) for text in self.texts]
        texts = sorted({key for key in keys if key})
        index = {text: i for i, text in enumerate(texts)}
        by_token = np.array([index.get(key, -1) for key in keys] + [-1], dtype=np.int32)
        return by_token[self._flat], texts

    def _shifted(self, by: int) -> np.ndarray:
        rows = self._flat.reshape(self.contexts, self.length)
        shifted = np.roll(rows, by, axis=1)
        shifted[:, 0 if by > 0 else -1] = -1
        return np.where(self.counted, shifted.ravel(), -1)

    def _bigrams(self) -> tuple[np.ndarray, list[str]]:
        before = self._shifted(1).astype(np.int64)
        packed = np.where((before >= 0) & self.counted, before * len(self.texts) + self._flat, -1)
        pairs, inverse = np.unique(packed, return_inverse=True)
        has_none = int(len(pairs) > 0 and pairs[0] == -1)
        texts = [f"{self.texts[p // len(self.texts)]}{PAIR}{self.texts[p % len(self.texts)]}" for p in pairs[has_none:]]
        return inverse.ravel().astype(np.int32) - has_none, texts

    @cached_property
    def context_words(self) -> tuple[sparse.csr_matrix, list[str]]:
        """Which contexts hold which words: float32 0/1 [contexts, W], and the words."""
        keys, words = self.column("word")
        at = np.flatnonzero(keys >= 0)
        ones = np.ones(len(at), dtype=np.float32)
        held = sparse.csr_matrix((ones, (at // self.length, keys[at])), shape=(self.contexts, len(words)))
        held.data[:] = 1
        return held, words

    @cached_property
    def topic_words(self) -> tuple[sparse.csr_matrix, list[str]]:
        """Which contexts hold which content words: float32 0/1 [contexts, W], and the words.

        A content word is alphabetic, at least four letters long, in three documents or more and in at most a fifth
        of the contexts.
        """
        held, words = self.context_words
        by_document = sparse.csr_matrix(
            (np.ones(self.contexts, dtype=np.float32), (self.context_document, np.arange(self.contexts))),
            shape=(len(self.documents), self.contexts),
        )
        documents = np.asarray(((by_document @ held) > 0).sum(axis=0)).ravel()
        contexts = np.asarray(held.sum(axis=0)).ravel()
        is_word = np.array([w.isalpha() and len(w) >= TOPIC_WORD_LENGTH for w in words])
        kept = is_word & (documents >= TOPIC_MIN_DOCUMENTS) & (contexts <= TOPIC_MAX_CONTEXTS * self.contexts)
        chosen = np.flatnonzero(kept)
        return held[:, chosen].tocsr(), [words[i] for i in chosen]


def _vocabulary_key(kind: str, size: int, token: str) -> str:
    word = word_of(token)
    if kind == "word":
        return word
    if len(word) <= size or not word.isalpha():
        return ""
    return word[:size] if kind == "prefix" else word[-size:]


@dataclass(frozen=True)
class Firings:
    """Where one SAE's features fire and how strongly, by shard then feature.

    feature: uint32 [n]. position: int64 [n] into `Units`. value: float32 [n].
    """

    feature: np.ndarray
    position: np.ndarray
    width: int
    value: np.ndarray = field(kw_only=True)

    def within(self, units: Units, split: Split) -> "Firings":
        """The firings of one split."""
        kept = units.in_split(split)[self.position]
        return Firings(self.feature[kept], self.position[kept], self.width, value=self.value[kept])

    def in_contexts(self, units: Units) -> sparse.csr_matrix:
        """Which features fire in which contexts: float32 0/1 [F, contexts]."""
        ones = np.ones(len(self.feature), dtype=np.float32)
        matrix = sparse.csr_matrix((ones, (self.feature, self.position // units.length)), shape=(self.width, units.contexts))
        matrix.data[:] = 1
        return matrix


def read_firings(store: Store, corpus: Corpus, entry: SaeEntry, subject: SubjectModel, units: Units, *, width: int) -> Firings:
    """All firings of an SAE. Raises NotReadyError if a shard is missing."""
    stage = store.stage(entry.key, corpus.id, "activations")
    features, positions, values = [], [], []
    for key, offset in zip(activation_keys(corpus, entry, subject), units.offsets, strict=True):
        stage.record(key)
        acts = read_shard(stage.data_path(key, ".parquet"))
        features.append(acts.feature)
        positions.append(acts.token.astype(np.int64) + offset)
        values.append(acts.value)
    return Firings(np.concatenate(features), np.concatenate(positions), width, value=np.concatenate(values))


def key_hits(units: Units, firings: Firings, column: str) -> pl.DataFrame:
    """How often each feature fires at each key of a column: feature, key, hits."""
    keys = units.column(column)[0][firings.position]
    table = pl.DataFrame({"feature": firings.feature, "key": keys}).filter(pl.col("key") >= 0)
    return table.group_by("feature", "key").agg(hits=pl.len().cast(pl.Int64))


def key_totals(units: Units, split: Split, column: str) -> pl.DataFrame:
    """How many counted positions of a split have each key: key, total."""
    keys = units.column(column)[0][units.in_split(split)]
    return pl.DataFrame({"key": keys}).filter(pl.col("key") >= 0).group_by("key").agg(total=pl.len().cast(pl.Int64))


def document_counts(
    units: Units, firings: Firings, rules: dict[int, Rule], features: list[int], *, split: Split
) -> DocumentCounts:
    """Counts per document of `split` for each of `features`, each tested against its rule (topic rules on contexts).

    firings must be those of `split`. Rows follow `features`, columns the documents of the split.
    """
    documents = np.unique(units.context_document[units.context_split == SPLITS.index(split)])
    by_unit = {unit: [f for f in features if rules[f].unit == unit] for unit in ("token", "context")}
    row = {f: i for i, f in enumerate(features)}
    shape = (len(features), len(documents))
    true_positive, claimed, fired, unit_counts = (np.zeros(shape) for _ in range(4))
    for unit, members in by_unit.items():
        if not members:
            continue
        count = _token_counts if unit == "token" else _context_counts
        parts = count(units, firings, {f: rules[f] for f in members}, members, documents, split)
        rows = [row[f] for f in members]
        for target, part in zip((true_positive, claimed, fired, unit_counts), parts, strict=True):
            target[rows] = part
    return DocumentCounts(true_positive, claimed, fired, unit_counts)


def _token_counts(
    units: Units, firings: Firings, rules: dict[int, Rule], features: list[int], documents: np.ndarray, split: Split
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    shape = (len(features), len(documents))
    place = pl.DataFrame({"feature": np.array(features, dtype=np.uint32), "row": np.arange(len(features))})
    column_of_document = np.full(len(units.documents), -1)
    column_of_document[documents] = np.arange(len(documents))

    def fill(table: pl.DataFrame, value: str) -> np.ndarray:
        out = np.zeros(shape)
        placed = table.join(place, on="feature")
        np.add.at(out, (placed["row"].to_numpy(), column_of_document[placed["document"].to_numpy()]), placed[value].to_numpy())
        return out

    fires = pl.DataFrame({"feature": firings.feature, "position": firings.position}).join(place.select("feature"), on="feature")
    fires = fires.with_columns(document=pl.Series(units.document[fires["position"].to_numpy()]))
    fired = fill(fires.group_by("feature", "document").agg(n=pl.len()), "n")
    true_positive, claimed = np.zeros(shape), np.zeros(shape)
    everywhere = np.flatnonzero(units.in_split(split))
    for column, members in _members(units, rules.items()).items():
        keys = units.column(column)[0]
        here = fires.with_columns(key=pl.Series(keys[fires["position"].to_numpy()])).join(members, on=["feature", "key"])
        true_positive += fill(here.group_by("feature", "document").agg(n=pl.len()), "n")
        held = (
            pl.DataFrame({"key": keys[everywhere], "document": units.document[everywhere]})
            .group_by("key", "document")
            .agg(n=pl.len())
        )
        claimed += fill(members.join(held, on="key"), "n")
    totals = np.bincount(units.document[everywhere], minlength=len(units.documents))[documents]
    return true_positive, claimed, fired, np.broadcast_to(totals, shape)


def _members(units: Units, rules: Iterable[tuple[int, Rule]]) -> dict[str, pl.DataFrame]:
    """Per key column, which feature's rule holds which key: feature, key."""
    rows: dict[str, list[tuple[int, int]]] = {}
    for feature, rule in rules:
        for text in _disjoint_keys(rule):
            column = column_of(rule, text)
            rows.setdefault(column, []).append((feature, units.key_of(column, text)))
    schema = {"feature": pl.UInt32, "key": pl.Int32}
    return {column: pl.DataFrame(pairs, schema=schema, orient="row") for column, pairs in rows.items()}


def _disjoint_keys(rule: Rule) -> list[str]:
    """The keys of a token rule, less those that match only what another matches too: no token is counted twice."""
    keys = list(dict.fromkeys(rule.keys))
    match rule.kind:
        case "prefix":
            return [key for key in keys if not any(key != other and key.startswith(other) for other in keys)]
        case "suffix":
            return [key for key in keys if not any(key != other and key.endswith(other) for other in keys)]
        case _:
            return keys


def _context_counts(
    units: Units, firings: Firings, rules: dict[int, Rule], features: list[int], documents: np.ndarray, split: Split
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    held, words = units.context_words
    index = {word: i for i, word in enumerate(words)}
    pairs = [(index[w], i) for i, f in enumerate(features) for w in rules[f].keys if w in index]
    chosen = sparse.csr_matrix(
        (np.ones(len(pairs), dtype=np.float32), tuple(zip(*pairs, strict=True)) or ([], [])), shape=(len(words), len(features))
    )
    members = np.flatnonzero(units.context_split == SPLITS.index(split))
    claims = ((held[members] @ chosen) > 0).astype(np.float64)  # [contexts of the split, features]
    fires = firings.in_contexts(units)[features][:, members].T.astype(np.float64)
    order = {d: i for i, d in enumerate(documents)}
    in_document = np.array([order[d] for d in units.context_document[members]])
    by_document = sparse.csr_matrix(
        (np.ones(len(members)), (in_document, np.arange(len(members)))), shape=(len(documents), len(members))
    )
    parts = [(by_document @ part).toarray().T for part in (claims.multiply(fires).tocsr(), claims.tocsr(), fires.tocsr())]
    totals = np.bincount(in_document, minlength=len(documents)).astype(np.float64)
    return parts[0], parts[1], parts[2], np.broadcast_to(totals, parts[0].shape)
