"""Two SAEs on the same tokens: what each fires on in one sample of one corpus.

What belongs here: choosing the tokens, and reading or encoding both SAEs there. What does not: what is made of it
(`matching.py`, `compare.py`, `transfer.py`).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property

import numpy as np
import polars as pl
from scipy import sparse

from scopeatlas.activations.cache import activation_keys
from scopeatlas.activations.reading import read_batches, text_mask
from scopeatlas.activations.shards import ActivationShard, read_shard, read_tiles, round_values
from scopeatlas.corpus.build import Corpus, open_corpus
from scopeatlas.corpus.contexts import Contexts, join_contexts
from scopeatlas.corpus.documents import SPLITS, Split
from scopeatlas.errors import CorpusError, SubjectModelError
from scopeatlas.hypotheses.units import Firings
from scopeatlas.mining.sketches import draws
from scopeatlas.storage.records import ShardKey
from scopeatlas.storage.uris import Location
from scopeatlas.study.opening import OpenSae

_Found = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Features, tokens and values of some non-zeros."""
TOKENS = 1 << 18
"""Tokens of a sample. What correlating costs is their pairs of firings: on each token the l0 of one SAE times the other's."""


@dataclass(frozen=True)
class CorpusSample(Corpus):
    """A corpus of which some contexts are read. rows: by the name of a shard, int64 [n] into the contexts of all of it."""

    rows: Mapping[str, np.ndarray]

    def contexts(self, shard: ShardKey) -> Contexts:
        return super().contexts(shard).take(self.rows[shard.name])


@dataclass(frozen=True)
class TokenActivations:
    """One SAE's activations on N tokens. matrix: float64 CSR [width, tokens], indices sorted, rounded as shards are."""

    matrix: sparse.csr_matrix
    width: int
    tokens: int

    @cached_property
    def fired(self) -> np.ndarray:
        """On how many tokens each feature fires: int64 [width]."""
        return np.diff(self.matrix.indptr).astype(np.int64)

    @cached_property
    def fires(self) -> sparse.csr_matrix:
        """Which features fire on which tokens: float64 0/1 [width, tokens]."""
        return self._like(np.ones_like(self.matrix.data), self.matrix.indices)

    def only(self, features: np.ndarray) -> "TokenActivations":
        """The same where no other feature than those in a mask, bool [width], ever fires."""
        kept = sparse.csr_matrix(self.matrix.multiply(features.astype(np.float64)[:, None]))
        kept.eliminate_zeros()
        return replace(self, matrix=kept)

    def shifted(self, by: int) -> "TokenActivations":
        """The same with every activation so many tokens further on, in a circle."""
        moved = self._like(self.matrix.data, (self.matrix.indices + by) % self.tokens)
        moved.sort_indices()
        return replace(self, matrix=moved)

    def _like(self, data: np.ndarray, indices: np.ndarray) -> sparse.csr_matrix:
        return sparse.csr_matrix((data, indices, self.matrix.indptr), shape=(self.width, self.tokens), copy=True)


@dataclass(frozen=True)
class SharedTokens:
    """The activations of SAEs a and b on the same tokens that count, N of them.

    sample: the contexts that the tokens are of. position: int64 [N], ascending, where in their flattened table each token
    lies, as in `hypotheses.units.Units` of the sample. document: int32 [N], index into `documents`. cached: whether the
    activations were read from shards, not encoded anew.
    """

    sample: CorpusSample
    a: TokenActivations
    b: TokenActivations
    position: np.ndarray
    document: np.ndarray
    documents: tuple[str, ...]
    cached: bool

    @property
    def tokens(self) -> int:
        return len(self.position)

    def firings(self, acts: TokenActivations) -> Firings:
        """The firings of one of the two, at their positions in the sample."""
        feature = np.repeat(np.arange(acts.width, dtype=np.uint32), acts.fired)
        return Firings(feature, self.position[acts.matrix.indices], acts.width, value=acts.matrix.data.astype(np.float32))


def share_tokens(
    a: OpenSae,
    b: OpenSae,
    *,
    splits: Sequence[Split],
    tokens: int = TOKENS,
    features: tuple[int, int] | None = None,
) -> SharedTokens:
    """Both SAEs on at most so many tokens of documents of `splits`, of all features or of one of a and one of b.

    The corpus is the one that both are published over. Where they differ, as for a base and an instruction-tuned model,
    it is that of plain text. Activations come from shards where both SAEs are cached over it; else the sample is run
    through the subject model, once if both SAEs have the same, at some 1,000 tokens a second on a CPU.
    Raises SubjectModelError if the two models read text as different tokens, CorpusError if no document is of `splits`.
    """
    if a.subject.tokenizer_identity != b.subject.tokenizer_identity:
        raise SubjectModelError(f"{a.subject.name} and {b.subject.name} split text into different tokens: nothing to compare on")
    corpus = _common_corpus(a, b)
    sample = sample_contexts(corpus, splits, tokens)
    contexts = join_contexts([sample.contexts(shard) for shard in sample.shards])
    position = np.flatnonzero(text_mask(contexts, a.subject))
    if not len(position):
        raise CorpusError(f"corpus {corpus.id} has no document of the split {' or '.join(splits)}; let it grow")
    column = np.full(contexts.tokens.size, -1, dtype=np.int64)
    column[position] = np.arange(len(position))
    sides = tuple(zip((a, b), features or (None, None), strict=True))
    cached = _is_cached(a, corpus) and _is_cached(b, corpus)
    read = [_read(*side, corpus, sample, column) for side in sides] if cached else _encode(sides, contexts, column)
    one, other = (_activations(parts, side[0].rows.height, len(position)) for parts, side in zip(read, sides, strict=True))
    names, document = np.unique(np.array(contexts.document_ids), return_inverse=True)
    in_document = document.astype(np.int32)[position // contexts.tokens.shape[1]]
    return SharedTokens(sample, one, other, position, in_document, tuple(names.tolist()), cached)


def sample_contexts(corpus: Corpus, splits: Sequence[Split], tokens: int) -> CorpusSample:
    """The contexts of `splits` that come first by a hash of their ids, as many as have `tokens` tokens at most, and one at
    least: a smaller sample is part of a larger one."""
    wanted = [SPLITS.index(split) for split in splits]
    tables = []
    for number, shard in enumerate(corpus.shards):
        contexts = corpus.contexts(shard)
        row = np.flatnonzero(np.isin(contexts.splits, wanted))
        columns = {"context_id": contexts.ids[row], "row": row, "tokens": contexts.lengths()[row]}
        tables.append(pl.DataFrame(columns).with_columns(shard=pl.lit(number)))
    drawn = pl.concat(tables)
    drawn = drawn.with_columns(draw=draws(drawn.select("context_id", feature=pl.lit(0, dtype=pl.UInt32)))).sort("draw")
    kept = drawn.filter((pl.col("tokens").cum_sum() <= tokens) | (pl.int_range(pl.len()) == 0)).sort("shard", "row")
    rows = {shard.name: kept.filter(shard=number)["row"].to_numpy() for number, shard in enumerate(corpus.shards)}
    return CorpusSample(rows=rows, **{field.name: getattr(corpus, field.name) for field in fields(Corpus)})


def _common_corpus(a: OpenSae, b: OpenSae) -> Corpus:
    """The corpus of both; of two that of plain text, or the first by its id."""
    corpora = [open_corpus(opened.store, opened.corpus) for opened in (a, b)]
    if corpora[0].id == corpora[1].id:
        return corpora[0]
    return min(corpora, key=lambda corpus: (corpus.contexts(corpus.shards[0]).roles is not None, corpus.id))


def _is_cached(opened: OpenSae, corpus: Corpus) -> bool:
    keys = activation_keys(corpus, opened.entry, opened.subject)
    return not opened.store.stage(opened.key, corpus.id, "activations").pending(keys)


def _read(opened: OpenSae, feature: int | None, corpus: Corpus, sample: CorpusSample, column: np.ndarray) -> list[_Found]:
    """What one SAE fires on in the sample, from its shards. column: of each position of the sample, -1 where none counts."""
    stage, length = opened.store.stage(opened.key, corpus.id, "activations"), corpus.facts["context_length"]
    parts: list[_Found] = []
    offset = 0
    for key, shard in zip(activation_keys(corpus, opened.entry, opened.subject), corpus.shards, strict=True):
        rows = sample.rows[shard.name]
        if not len(rows):
            continue
        place = np.full(int(rows.max()) + 1, -1, dtype=np.int64)
        place[rows] = np.arange(offset, offset + len(rows))
        offset += len(rows)
        for acts in _tiles(stage.data_path(key, ".parquet"), feature):
            row, within = np.divmod(acts.token, np.uint32(length))
            at = np.flatnonzero(row < len(place))
            at = at[place[row[at]] >= 0]
            parts.append((acts.feature[at], column[place[row[at]] * length + within[at]], acts.value[at]))
    return parts


def _tiles(path: Location, feature: int | None) -> Iterator[ActivationShard]:
    return read_tiles(path) if feature is None else iter([read_shard(path, features=range(feature, feature + 1))])


def _encode(sides: Sequence[tuple[OpenSae, int | None]], contexts: Contexts, column: np.ndarray) -> list[list[_Found]]:
    """What each SAE fires on in `contexts`, from one pass of each subject model that there is."""
    parts: list[list[_Found]] = [[] for _ in sides]
    passes: dict[tuple[str, str], list[int]] = {}
    for i, (opened, _) in enumerate(sides):
        passes.setdefault((opened.subject.identity, str(opened.subject.resolved_dtype)), []).append(i)
    for members in passes.values():
        dictionaries = {i: sides[i][0].probe.dictionary for i in members}
        sites = {site for dictionary in dictionaries.values() for site in dictionary.sites_in}
        for batch in read_batches(contexts, sides[members[0]][0].subject, sites):
            for i, dictionary in dictionaries.items():
                acts = dictionary.encode([batch.acts[site] for site in dictionary.sites_in], max_l0=dictionary.plausible_l0)
                rounded = round_values(acts.value.cpu().numpy(), dictionary.value_scale)
                feature, token = acts.feature.cpu().numpy(), column[batch.positions[acts.token.cpu().numpy()]]
                kept = (rounded > 0) & (token >= 0) & (feature == (feature if sides[i][1] is None else sides[i][1]))
                value = rounded[kept].astype(np.float32) * np.float32(dictionary.value_scale)
                parts[i].append((feature[kept], token[kept], value))
    return parts


def _activations(parts: Sequence[_Found], width: int, tokens: int) -> TokenActivations:
    nothing = (np.zeros(0, dtype=np.int64),) * 3
    feature, token, value = (np.concatenate(column) for column in zip(nothing, *parts, strict=True))
    matrix = sparse.csr_matrix((value.astype(np.float64), (feature, token)), shape=(width, tokens))
    return TokenActivations(matrix, width, tokens)
