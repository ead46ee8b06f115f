"""The units that claims are tested on: every token and context of a corpus with the keys that rules look at.

What belongs here: keys of positions, firings at those positions, and counting hits of rules by joining the two. What
does not: which rule is proposed (`labels/`) or what a score means (`scoring/`).

A rule's hits are found by joining keys, so counting costs one pass over the non-zeros, whatever the number of rules.
`Rule.matches` is the plain reading that these counts must agree with.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import polars as pl
from scipy import sparse

from scopeatlas.activations.cache import activation_keys
from scopeatlas.activations.reading import text_mask
from scopeatlas.activations.shards import read_shard
from scopeatlas.corpus.build import Corpus
from scopeatlas.corpus.documents import SPLITS, Split
from scopeatlas.dictionaries.releases import SaeEntry
from scopeatlas.hypotheses.columns import KeyColumns, column_of
from scopeatlas.hypotheses.metrics import DocumentCounts
from scopeatlas.hypotheses.rules import Rule
from scopeatlas.storage.store import Store
from scopeatlas.subject.loading import SubjectModel
from scopeatlas.subject.vocabulary import token_texts

TOPIC_WORD_LENGTH = 3
TOPIC_MIN_DOCUMENTS = 3
TOPIC_MAX_CONTEXTS = 0.2
CLAIMED_AT_ONCE = 256
"""How many rules' claims are held in memory together."""
COUNTED_AT_ONCE = 2**18
"""Of how many places the keys are held in memory together."""


class Units(KeyColumns):
    """All positions of a corpus, flattened to N = contexts x length.

    counted: bool [N], unmasked. split: uint8 [N]. document: int32 [N], index into `documents`. context_split,
    context_document: the same per context. offsets: int64 [shards], where each shard's positions begin.
    """

    def __init__(self, corpus: Corpus, subject: SubjectModel):
        loaded = [corpus.contexts(shard) for shard in corpus.shards]
        tokens = np.concatenate([c.tokens for c in loaded])
        contexts, length = tokens.shape
        self.offsets = np.r_[0, np.cumsum([len(c) for c in loaded])[:-1]] * length
        self.counted = np.concatenate([text_mask(c, subject) for c in loaded]).ravel()
        self.context_split = np.concatenate([c.splits for c in loaded])
        self.documents = [d for c in loaded for d in dict.fromkeys(c.document_ids)]
        index = {d: i for i, d in enumerate(self.documents)}
        self.context_document = np.array([index[d] for c in loaded for d in c.document_ids], dtype=np.int32)
        self.split = np.repeat(self.context_split, length)
        self.document = np.repeat(self.context_document, length)
        ids, flat = np.unique(tokens, return_inverse=True)
        spelled = token_texts(subject.tokenizer, ids.tolist())
        texts = list(dict.fromkeys(spelled))  # parts of a character in UTF-8 all read as one text, so they are one key
        number = {text: i for i, text in enumerate(texts)} | {"": -1}  # no text is no key
        by_id = np.array([number[text] for text in spelled], dtype=np.int32)
        super().__init__(np.where(self.counted, by_id[flat.ravel()], -1), texts, contexts=contexts, length=length)

    def text_of(self, context: int, start: int, stop: int) -> list[str]:
        """The texts of the tokens from `start` to `stop` of a context; "" for special tokens and padding."""
        at = self._flat[context * self.length + start : context * self.length + stop]
        return [self.texts[key] if key >= 0 else "" for key in at.tolist()]

    def in_split(self, split: Split) -> np.ndarray:
        """Which positions are counted and belong to `split`: bool [N]."""
        return self.counted & (self.split == SPLITS.index(split))

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

        A content word is alphabetic, at least three letters long, in three explain documents or more and in at most a
        fifth of the explain contexts: which words may be proposed must not depend on what rules are tested on.
        """
        held, words = self.context_words
        explain = np.flatnonzero(self.context_split == SPLITS.index("explain"))
        by_document = sparse.csr_matrix(
            (np.ones(len(explain), dtype=np.float32), (self.context_document[explain], np.arange(len(explain)))),
            shape=(len(self.documents), len(explain)),
        )
        documents = np.asarray(((by_document @ held[explain]) > 0).sum(axis=0)).ravel()
        contexts = np.asarray(held[explain].sum(axis=0)).ravel()
        is_word = np.array([w.isalpha() and len(w) >= TOPIC_WORD_LENGTH for w in words])
        kept = is_word & (documents >= TOPIC_MIN_DOCUMENTS) & (contexts <= TOPIC_MAX_CONTEXTS * len(explain))
        chosen = np.flatnonzero(kept)
        return held[:, chosen].tocsr(), [words[i] for i in chosen]


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

    def packed(self, units: Units) -> np.ndarray:
        """feature * N + position of each firing: int64 [n], sorted."""
        return np.sort(self.feature.astype(np.int64) * (units.contexts * units.length) + self.position, kind="stable")

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


def key_hits(units: Units, firings: Firings, column: str, *, least: int = 1, among: pl.DataFrame | None = None) -> pl.DataFrame:
    """How often each feature fires at each key of a column, where that is `least` times or more: feature, key, hits.

    among: the (feature, key) of interest. A few features at a time, so that what is held besides the result is 8 bytes a
    firing and the keys of COUNTED_AT_ONCE.
    """
    order = np.argsort(firings.feature, kind="stable")
    ends = np.cumsum(np.bincount(firings.feature, minlength=firings.width))
    parts = [pl.DataFrame(schema={"feature": pl.UInt32, "key": pl.Int32, "hits": pl.Int64})]
    start = 0
    while start < len(order):
        within = int(np.searchsorted(ends, start + COUNTED_AT_ONCE, side="right")) - 1
        # One feature at least, however often it fires.
        stop = int(max(ends[max(within, 0)], ends[np.searchsorted(ends, start, side="right")]))
        at = order[start:stop]
        counted = count_keys(firings.feature[at], units.keys_at(column, firings.position[at])).filter(pl.col("count") >= least)
        found = counted.select(pl.col("group").cast(pl.UInt32).alias("feature"), "key", hits="count")
        parts.append(found if among is None else found.join(among, on=["feature", "key"], how="semi"))
        start = stop
    return pl.concat(parts)


def key_totals(units: Units, split: Split, column: str) -> pl.DataFrame:
    """How many counted positions of a split have each key: key, total."""
    inside = np.flatnonzero(units.in_split(split))
    total = np.zeros(len(units.column(column)[1]) + 1, dtype=np.int64)  # the last: no key
    for start in range(0, len(inside), COUNTED_AT_ONCE):
        keys = units.keys_at(column, inside[start : start + COUNTED_AT_ONCE])
        total += np.bincount(np.where(keys < 0, len(total) - 1, keys).ravel(), minlength=len(total))
    found = np.flatnonzero(total[:-1])
    return pl.DataFrame({"key": found.astype(np.int32), "total": total[found]})


def count_keys(group: np.ndarray, keys: np.ndarray, *, hits: np.ndarray | None = None) -> pl.DataFrame:
    """How many places of each group have each key, and how many of those are hits if that is known: group, key, count, hits.

    group: integers [n]; keys: int32 [n, m] as of `keys_at`; hits: bool [n]. Grouped by one packed integer, which is thrice
    as fast as by two columns, and COUNTED_AT_ONCE places at a time.
    """
    size = int(keys.max(initial=0)) + 1
    found = _packed_counts(group[:0], keys[:0], None if hits is None else hits[:0], size)
    new: list[pl.DataFrame] = []
    for start in range(0, len(keys), COUNTED_AT_ONCE):
        part = slice(start, start + COUNTED_AT_ONCE)
        new.append(_packed_counts(group[part], keys[part], None if hits is None else hits[part], size))
        # Merged when as much is new as was known, so that each row is merged a few times at most.
        if sum(map(len, new)) >= len(found):
            found, new = pl.concat([found, *new]).group_by("packed").sum(), []
    if new:
        found = pl.concat([found, *new]).group_by("packed").sum()
    group_and_key = (pl.col("packed") // size).alias("group"), (pl.col("packed") % size).cast(pl.Int32).alias("key")
    return found.select(*group_and_key, *found.columns[1:])


def _packed_counts(group: np.ndarray, keys: np.ndarray, hits: np.ndarray | None, size: int) -> pl.DataFrame:
    """`count_keys` of a part, by group * size + key: packed, count, hits if they are known."""
    table = {"packed": (group.astype(np.int64)[:, None] * size + keys)[keys >= 0]}
    counted = [pl.len().cast(pl.Int64).alias("count")]
    if hits is not None:
        table["hit"] = np.broadcast_to(hits[:, None], keys.shape)[keys >= 0]
        counted.append(pl.col("hit").sum().cast(pl.Int64).alias("hits"))
    return pl.DataFrame(table).group_by("packed").agg(counted)


def claims_at(units: Units, rules: Mapping[int, Rule], feature: np.ndarray, position: np.ndarray) -> np.ndarray:
    """Whether the rule of each feature [n] claims a position [n], a topic its whole context: bool [n].

    `feature` must be among `rules`. Looked up in key columns, in one pass over the n places.
    """
    which = pl.DataFrame({"feature": list(rules), "rule": np.arange(len(rules))}, schema_overrides={"feature": pl.Int64})
    row = pl.DataFrame({"feature": feature.astype(np.int64)}).join(which, on="feature", how="left", maintain_order="left")["rule"]
    listed = list(rules.values())
    first = _held(units, [rule.parts[0] if rule.parts else rule for rule in listed], row.to_numpy(), position)
    if not any(rule.parts for rule in listed):
        return first
    other = _held(units, [rule.parts[1] if rule.parts else _NOTHING for rule in listed], row.to_numpy(), position)
    kind = np.array([rule.kind for rule in listed])[row.to_numpy()]
    return np.select([kind == "and", kind == "or", kind == "and_not"], [first & other, first | other, first & ~other], first)


_NOTHING = Rule("token")


def _held(units: Units, rules: Sequence[Rule], row: np.ndarray, position: np.ndarray) -> np.ndarray:
    """Whether each position has a key of the simple rule `rules[row]`: bool [n]."""
    held = np.zeros(len(position), dtype=bool)
    for column, (of_rule, keys) in _members(units, rules).items():
        concerned = np.zeros(len(rules), dtype=bool)
        concerned[of_rule] = True
        at = np.flatnonzero(concerned[row] & ~held)
        size = len(units.column(column)[1])
        found = units.keys_at(column, position[at])
        packed = row[at].astype(np.int64)[:, None] * size + found
        held[at] = (np.isin(packed, of_rule * size + keys) & (found >= 0)).any(axis=1)
    topics = [i for i, rule in enumerate(rules) if rule.kind == "topic"]
    if topics:
        place = np.full(len(rules), -1)
        place[topics] = np.arange(len(topics))
        at = np.flatnonzero(place[row] >= 0)
        context, claimed = _claimed_contexts(units, [rules[i] for i in topics]).nonzero()
        claimed_here = np.sort(claimed * units.contexts + context)
        held[at] = is_among(place[row[at]] * units.contexts + position[at] // units.length, claimed_here)
    return held


def _members(units: Units, rules: Sequence[Rule]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Per key column, the token rules that look there and the keys that they hold: int64 [n] each."""
    found: dict[str, list[tuple[int, int]]] = {}
    for number, rule in enumerate(rules):
        for text in rule.keys if rule.unit == "token" else ():
            column = column_of(rule, text)
            key = units.key_of(column, text)
            if key >= 0:
                found.setdefault(column, []).append((number, key))
    return {column: tuple(np.array(pairs, dtype=np.int64).T) for column, pairs in found.items()}


def claims(units: Units, rules: Sequence[Rule], split: Split) -> tuple[np.ndarray, np.ndarray]:
    """Every position of a split that token rules claim: the rule's number and the position, int64 [n], sorted, none twice.

    Nothing but what is claimed is held; a composition's first part is found, and its second looked up there.
    """
    size = units.contexts * units.length
    inside = units.in_split(split)
    packed = _claimed(units, [rule.parts[0] if rule.parts else rule for rule in rules], inside)
    either = [rule.parts[1] if rule.parts and rule.kind == "or" else _NOTHING for rule in rules]
    packed = _distinct(np.concatenate([packed, _claimed(units, either, inside)]))
    row, position = np.divmod(packed, size)
    filtered = [rule.parts[1] if rule.parts and rule.kind != "or" else _NOTHING for rule in rules]
    other = _held(units, filtered, row, position)
    kind = np.array([rule.kind for rule in rules])[row]
    kept = np.select([kind == "and", kind == "and_not"], [other, ~other], True)
    return row[kept], position[kept]


def _claimed(units: Units, rules: Sequence[Rule], inside: np.ndarray) -> np.ndarray:
    """What simple token rules claim where `inside`, packed as rule * N + position, some perhaps twice: int64 [n]."""
    parts = [np.empty(0, dtype=np.int64)]
    for column, (of_rule, keys) in _members(units, rules).items():
        which, position = units.positions_with(column, keys)
        kept = inside[position]
        parts.append(of_rule[which[kept]] * len(inside) + position[kept])
    return np.concatenate(parts)


def _distinct(values: np.ndarray) -> np.ndarray:
    """What `np.unique` returns, which is several times slower on long arrays of mostly distinct integers."""
    ordered = np.sort(values)
    return ordered[np.r_[True, ordered[1:] != ordered[:-1]]] if len(ordered) else ordered


def document_counts(
    units: Units, firings: Firings, rules: Mapping[int, Rule], features: Sequence[int], *, split: Split
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
        parts = count(units, firings, [rules[f] for f in members], members, documents, split)
        rows = [row[f] for f in members]
        for target, part in zip((true_positive, claimed, fired, unit_counts), parts, strict=True):
            target[rows] = part
    return DocumentCounts(true_positive, claimed, fired, unit_counts)


def _token_counts(
    units: Units, firings: Firings, rules: Sequence[Rule], features: Sequence[int], documents: np.ndarray, split: Split
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    shape = (len(features), len(documents))
    column = np.searchsorted(documents, units.document)  # right for every position of the split

    def per_document(row: np.ndarray, position: np.ndarray) -> np.ndarray:
        counted = np.bincount(row * shape[1] + column[position], minlength=shape[0] * shape[1])
        return counted.reshape(shape).astype(np.float64)

    row_of = np.full(firings.width, -1)
    row_of[list(features)] = np.arange(len(features))
    mine = row_of[firings.feature]
    fires = Firings(mine[mine >= 0], firings.position[mine >= 0], shape[0], value=firings.value[mine >= 0])
    packed = fires.packed(units)
    true_positive, claimed = np.zeros(shape), np.zeros(shape)
    for start in range(0, len(rules), CLAIMED_AT_ONCE):
        row, position = claims(units, rules[start : start + CLAIMED_AT_ONCE], split)
        row += start
        hit = is_among(row * len(units.split) + position, packed)
        claimed += per_document(row, position)
        true_positive += per_document(row[hit], position[hit])
    totals = np.bincount(column[units.in_split(split)], minlength=len(documents))
    return true_positive, claimed, per_document(fires.feature, fires.position), np.broadcast_to(totals, shape)


def is_among(values: np.ndarray, ordered: np.ndarray) -> np.ndarray:
    """Which values [n] are in a sorted array [m]: bool [n]."""
    if not len(ordered):
        return np.zeros(len(values), dtype=bool)
    return ordered[np.minimum(np.searchsorted(ordered, values), len(ordered) - 1)] == values


def _claimed_contexts(units: Units, rules: Sequence[Rule]) -> sparse.csr_matrix:
    """How many of each topic rule's words each context holds: float32 [contexts, rules]."""
    held, words = units.context_words
    index = {word: i for i, word in enumerate(words)}
    pairs = [(index[word], i) for i, rule in enumerate(rules) for word in rule.keys if word in index]
    row, column = np.array(pairs, dtype=np.int64).reshape(-1, 2).T
    chosen = sparse.csr_matrix((np.ones(len(pairs), dtype=np.float32), (row, column)), shape=(len(words), len(rules)))
    return sparse.csr_matrix(held @ chosen)


def _context_counts(
    units: Units, firings: Firings, rules: Sequence[Rule], features: Sequence[int], documents: np.ndarray, split: Split
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    members = np.flatnonzero(units.context_split == SPLITS.index(split))
    claimed = (_claimed_contexts(units, rules)[members] > 0).astype(np.float64)  # [contexts of the split, features]
    fires = firings.in_contexts(units)[features][:, members].T.astype(np.float64)
    in_document = np.searchsorted(documents, units.context_document[members])
    by_document = sparse.csr_matrix(
        (np.ones(len(members)), (in_document, np.arange(len(members)))), shape=(len(documents), len(members))
    )
    parts = [(by_document @ part).toarray().T for part in (claimed.multiply(fires).tocsr(), claimed.tocsr(), fires.tocsr())]
    totals = np.bincount(in_document, minlength=len(documents)).astype(np.float64)
    return parts[0], parts[1], parts[2], np.broadcast_to(totals, parts[0].shape)
