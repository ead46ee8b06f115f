"""Matching the features of two SAEs: which is which, and what was kept, changed, split, merged, vanished or appeared.

What belongs here: from activations on the same tokens to the best pairs, their null and a status for every feature. What
does not: getting the activations (`shared_tokens.py`), labels (`diff.py`, `transfer.py`), or one pair in detail (`compare.py`).

Two features are one where they fire alike, so a match is scored by the correlation of activations, zeros included; decoder
cosines stand beside it. Seeds, widths, layers and fine-tunes are all compared in this one way. Documents of the report split
are never looked at: what is matched here may be scored on them.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, get_args

import numpy as np
import polars as pl
from scipy import sparse

from scopeatlas.corpus.documents import Split
from scopeatlas.mining.segments import begins
from scopeatlas.study.cosines import different_spaces, nearest_directions, pair_cosines
from scopeatlas.study.opening import OpenSae
from scopeatlas.study.shared_tokens import TOKENS, SharedTokens, TokenActivations, share_tokens

Side = Literal["a", "b"]
Status = Literal["kept", "changed", "split", "merged", "vanished", "appeared", "silent"]
MATCHED_ON: tuple[Split, ...] = ("explain", "select")

KEPT = 0.8
"""Correlation of a kept feature: two thirds of the variance of one is the other's."""
INSIDE, COVERED, PART = 0.7, 0.7, 0.2
"""Share of a part's firings that are its whole's; of the whole's, what its parts have together and none has alone, and what each
has at least."""
LEAST = 0.05
"""A pair that correlates less is none."""
MIN_TOKENS, MIN_DOCUMENTS = 10, 3
"""A feature that fires less often is silent: whatever it coincides with may be chance."""
PARTNERS = 8
NULL_QUANTILE = 0.99
SHIFTS = (1 / 3, 2 / 3)
TILE_PAIRS = 1 << 22
_SWAPPED = {"a": "b", "b": "a", "rank_a": "rank_b", "rank_b": "rank_a", "tokens_a": "tokens_b", "tokens_b": "tokens_a"}

MATCH_SCHEMA = pl.Schema(
    {
        "side": pl.String,  # a or b
        "feature": pl.Int64,
        "status": pl.String,
        "partners": pl.List(pl.Int64),  # of the other SAE, by the status; none where it vanished, appeared or is silent
        "nearest": pl.Int64,  # the most correlated of the other SAE, whatever the status; null if none reaches LEAST
        "correlation": pl.Float64,  # with `nearest`, as are the next two
        "jaccard": pl.Float64,
        "cosine": pl.Float32,  # null where the two write to different spaces
        "nearest_by_cosine": pl.Int64,
        "best_cosine": pl.Float32,
        "tokens": pl.Int64,  # that it fires on
        "documents": pl.Int64,
    }
)


@dataclass(frozen=True)
class Matching:
    """How the features of SAE a match those of SAE b.

    features: MATCH_SCHEMA, first all of a, then all of b. chance: the correlation that NULL_QUANTILE of the features stay
    below with their best partner when one SAE's tokens are shifted against the other's; null_a, null_b: those best
    correlations, float64 [n], 0 where below LEAST. tokens, documents: what was matched on, none of it of the report split.
    no_cosine: why there are no decoder cosines, or "".
    """

    a: str
    b: str
    features: pl.DataFrame
    chance: float
    null_a: np.ndarray
    null_b: np.ndarray
    tokens: int
    documents: frozenset[str]
    cached: bool
    no_cosine: str

    def of(self, side: Side) -> pl.DataFrame:
        """The features of one SAE, in order."""
        return self.features.filter(side=side)

    @property
    def counts(self) -> pl.DataFrame:
        """How many features of each SAE have each status: status, a, b."""
        order = {status: place for place, status in enumerate(get_args(Status))}
        found = self.features.group_by("status").agg(a=(pl.col("side") == "a").sum(), b=(pl.col("side") == "b").sum())
        return found.sort(pl.col("status").replace_strict(order))


def match(a: OpenSae, b: OpenSae, *, tokens: int = TOKENS) -> Matching:
    """Match two SAEs, whatever they differ in, on at most `tokens` tokens of explain and select documents.

    Linear in the pairs of firings on a token, in tiles of features. Raises what `share_tokens` raises.
    """
    shared = share_tokens(a, b, splits=MATCHED_ON, tokens=tokens)
    features, chance, (null_a, null_b) = match_activations(shared)
    no_cosine = different_spaces(a, b)
    if not no_cosine:
        features = _with_cosines(features, a, b)
    facts = (shared.tokens, frozenset(shared.documents), shared.cached, no_cosine)
    return Matching(a.key, b.key, features, chance, null_a, null_b, *facts)


def match_activations(shared: SharedTokens) -> tuple[pl.DataFrame, float, tuple[np.ndarray, np.ndarray]]:
    """MATCH_SCHEMA without cosines, the correlation that chance reaches, and the null of either side."""
    counts = [_counts(acts, shared) for acts in (shared.a, shared.b)]
    a, b = (acts.only(n["judged"].to_numpy()) for acts, n in zip((shared.a, shared.b), counts, strict=True))
    nulls = _null(a, b)
    chance = max(LEAST, float(np.quantile(np.concatenate([[0.0], *nulls]), NULL_QUANTILE)))
    pairs = correlated_pairs(a, b, count=PARTNERS)
    at_a, at_b = pairs["a"].to_numpy(), pairs["b"].to_numpy()
    pairs = pairs.with_columns(both=shared_counts(a, b, at_a, at_b), tokens_a=a.fired[at_a], tokens_b=b.fired[at_b])
    seen_from_b = pairs.rename(_SWAPPED)
    split, merged = _wholes(pairs, a, b, chance), _wholes(seen_from_b, b, a, chance)
    of_a = _statuses(pairs, counts[0], chance, {"split": split, "merged": _from_parts(merged)}, other="vanished")
    of_b = _statuses(seen_from_b, counts[1], chance, {"merged": merged, "split": _from_parts(split)}, other="appeared")
    features = pl.concat([of_a.with_columns(side=pl.lit("a")), of_b.with_columns(side=pl.lit("b"))])
    features = features.with_columns(cosine=None, nearest_by_cosine=None, best_cosine=None)
    return features.select(pl.col(name).cast(kind) for name, kind in MATCH_SCHEMA.items()), chance, nulls


def correlated_pairs(a: TokenActivations, b: TokenActivations, *, count: int) -> pl.DataFrame:
    """Pairs among the `count` most correlated of either feature, at LEAST or more: a, b, correlation, and rank_a, rank_b, the
    place of the pair among those of a and of b, `count` where it is not among the best of that one.

    Pearson over all N tokens, from sums over those on which both fire: (sum xy - sum x sum y / N) over the root of
    (sum x² - (sum x)² / N) (sum y² - (sum y)² / N). Ties go to the lower index; the same sums are made from either side.
    """
    by_token = b.matrix.T.tocsr()
    work = np.cumsum(np.diff(by_token.indptr)[a.matrix.indices])  # pairs of firings up to each of a's
    (sum_a, spread_a), (sum_b, spread_b) = _moments(a.matrix, a.tokens), _moments(b.matrix, b.tokens)
    found, new = pl.DataFrame(schema={"a": pl.Int64, "b": pl.Int64, "correlation": pl.Float64}), []
    for start, stop in _tiles(np.r_[0, work][a.matrix.indptr[:-1]]):
        together = a.matrix[start:stop] @ by_token
        row = start + np.repeat(np.arange(stop - start), np.diff(together.indptr))
        spread = spread_a[row] * spread_b[together.indices]
        common = together.data - sum_a[row] * sum_b[together.indices] / a.tokens
        correlation = np.divide(common, spread, out=np.zeros(len(row)), where=spread > 0)
        kept = correlation >= LEAST
        columns = {"a": row[kept], "b": together.indices[kept].astype(np.int64), "correlation": correlation[kept]}
        new.append(pl.DataFrame(columns))
        # Ranked when as much is new as was known, so that each pair is ranked a few times at most.
        if sum(map(len, new)) >= max(len(found), TILE_PAIRS):
            found, new = _strongest(pl.concat([found, *new]), count).select(found.columns), []
    return _strongest(pl.concat([found, *new]), count).sort("a", "b")


def correlation_of(a: TokenActivations, feature_a: int, b: TokenActivations, feature_b: int) -> float | None:
    """Pearson's correlation of one feature of each over all tokens; None where one is constant."""
    x, y = a.matrix[[feature_a]], b.matrix[[feature_b]]
    (sum_x,), (spread_x,) = _moments(x, a.tokens)
    (sum_y,), (spread_y,) = _moments(y, b.tokens)
    spread = spread_x * spread_y
    return float((x.multiply(y).sum() - sum_x * sum_y / a.tokens) / spread) if spread > 0 else None


def shared_counts(a: TokenActivations, b: TokenActivations, of_a: np.ndarray, of_b: np.ndarray) -> np.ndarray:
    """On how many tokens of_a[i] and of_b[i] both fire: int64 [n]."""
    counted = [np.zeros(0, dtype=np.int64)]
    for start, stop in _tiles(np.cumsum(a.fired[of_a] + b.fired[of_b])):
        both = a.fires[of_a[start:stop]].multiply(b.fires[of_b[start:stop]])
        counted.append(np.asarray(both.sum(axis=1), dtype=np.int64).ravel())
    return np.concatenate(counted)


def _tiles(work: np.ndarray) -> Iterator[tuple[int, int]]:
    """Ranges of rows of about TILE_PAIRS of work each. work: int [n], what there is up to each row."""
    return pairwise(np.flatnonzero(np.r_[begins(work // TILE_PAIRS), True]).tolist()) if len(work) else iter(())


def _moments(acts: sparse.csr_matrix, tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Each row's sum over all tokens, and the root of its summed squared deviations from the mean: float64 [F] each."""
    total = np.asarray(acts.sum(axis=1)).ravel()
    squares = np.asarray(acts.multiply(acts).sum(axis=1)).ravel()
    return total, np.sqrt(np.maximum(squares - total**2 / tokens, 0))


def _strongest(pairs: pl.DataFrame, count: int) -> pl.DataFrame:
    """Pairs among the `count` best of either feature, with their places there: `count` where a pair is not among a feature's."""
    for side, other in (("a", "b"), ("b", "a")):
        pairs = pairs.sort(side, "correlation", other, descending=[False, True, False])
        pairs = pairs.with_columns(pl.int_range(pl.len()).clip(0, count).over(side).alias(f"rank_{side}"))
    return pairs.filter((pl.col("rank_a") < count) | (pl.col("rank_b") < count))


def _counts(acts: TokenActivations, shared: SharedTokens) -> pl.DataFrame:
    """One row per feature: feature, tokens and documents that it fires on, and judged, whether those are enough."""
    places = (np.ones(acts.tokens), (np.arange(acts.tokens), shared.document))
    by_document = sparse.csr_matrix(acts.fires @ sparse.csr_matrix(places, shape=(acts.tokens, len(shared.documents))))
    columns = {"feature": np.arange(acts.width), "tokens": acts.fired, "documents": np.diff(by_document.indptr)}
    enough = (pl.col("tokens") >= MIN_TOKENS) & (pl.col("documents") >= MIN_DOCUMENTS)
    return pl.DataFrame(columns).cast(pl.Int64).with_columns(judged=enough)


def _null(a: TokenActivations, b: TokenActivations) -> tuple[np.ndarray, np.ndarray]:
    """The best correlation of every judged feature of a, and of b, with b's tokens shifted against a's in a circle: each keeps
    its bursts and its company, and meets the other SAE's features by chance alone."""
    best: dict[str, list[np.ndarray]] = {"a": [], "b": []}
    for shift in SHIFTS:
        pairs = correlated_pairs(a, b.shifted(round(shift * b.tokens)), count=1)
        for side, acts in (("a", a), ("b", b)):
            first = pairs.filter(pl.col(f"rank_{side}") == 0)
            highest = np.zeros(acts.width)
            highest[first[side].to_numpy()] = first["correlation"].to_numpy()
            best[side].append(highest[acts.fired > 0])
    return np.concatenate(best["a"]), np.concatenate(best["b"])


def _wholes(pairs: pl.DataFrame, a: TokenActivations, b: TokenActivations, chance: float) -> pl.DataFrame:
    """Features of a that several of b make up: feature and partner (a part), most correlated first.

    A part fires inside its whole, on no small share of it, correlates with it by more than chance, and is nobody else's kept
    counterpart; of several such wholes it is part of the one that it fires in most. Together the parts cover the whole, and
    none of them does alone. Firings decide, not correlations: where all strong firings went to one part, that one still
    correlates highly, and the other hardly.
    """
    is_kept = (pl.col("rank_a") == 0) & (pl.col("rank_b") == 0) & (pl.col("correlation") >= KEPT)
    elsewhere = is_kept.any().over("b") & ~is_kept
    is_inside = (pl.col("both") >= INSIDE * pl.col("tokens_b")) & (pl.col("both") >= PART * pl.col("tokens_a"))
    parts = pairs.filter(is_inside & (pl.col("correlation") >= chance) & ~elsewhere)
    parts = parts.sort("b", "both", "correlation", "a", descending=[False, True, True, False]).unique("b", keep="first")
    none_alone = (pl.col("both") < COVERED * pl.col("tokens_a")).all()
    parts = parts.filter(((pl.len() > 1) & none_alone).over("a")).sort("a", "correlation", "b", descending=[False, True, False])
    places = (np.ones(len(parts)), (parts["a"].to_numpy(), parts["b"].to_numpy()))
    together = sparse.csr_matrix(sparse.csr_matrix(places, shape=(a.width, b.width)) @ b.fires)
    covered = np.diff(sparse.csr_matrix(together.multiply(a.fires)).indptr)
    kept = covered[parts["a"].to_numpy()] >= COVERED * parts["tokens_a"].to_numpy()
    return parts.filter(pl.Series(kept, dtype=pl.Boolean)).select(feature="a", partner="b")


def _from_parts(wholes: pl.DataFrame) -> pl.DataFrame:
    return wholes.select(feature="partner", partner="feature")


def _statuses(
    pairs: pl.DataFrame, counts: pl.DataFrame, chance: float, roles: dict[Status, pl.DataFrame], *, other: Status
) -> pl.DataFrame:
    """The status of every feature of a. roles: of which features is which true, with whom; first as a whole, then as a part: of
    a feature that is both the first counts. other: that of features with no counterpart."""
    together = pl.col("tokens_a") + pl.col("tokens_b") - pl.col("both")
    nearest = pairs.filter(pl.col("rank_a") == 0).select(
        "correlation", feature="a", nearest="b", is_mutual=pl.col("rank_b") == 0, jaccard=pl.col("both") / together
    )
    role = pl.concat([found.with_columns(role=pl.lit(status)) for status, found in roles.items()])
    taken = role["partner"]
    role = (
        role.group_by("feature", "role", maintain_order=True).agg("partner").unique("feature", keep="first", maintain_order=True)
    )
    found = counts.join(nearest, on="feature", how="left").join(role, on="feature", how="left")
    alike = pl.when(pl.col("correlation") >= KEPT).then(pl.lit("kept")).otherwise(pl.lit("changed"))
    is_pair = pl.col("is_mutual").fill_null(False) & (pl.col("correlation") >= chance) & ~pl.col("nearest").is_in(taken.implode())
    paired = pl.when(is_pair).then(alike).otherwise(pl.when("judged").then(pl.lit(other)).otherwise(pl.lit("silent")))
    partners = pl.when(is_pair).then(pl.concat_list("nearest")).otherwise(pl.lit([], dtype=pl.List(pl.Int64)))
    found = found.with_columns(status=pl.coalesce("role", paired), partners=pl.coalesce("partner", partners))
    return found.drop("role", "partner", "judged", "is_mutual").sort("feature")


def _with_cosines(features: pl.DataFrame, a: OpenSae, b: OpenSae) -> pl.DataFrame:
    """The decoder cosine of each feature with its most correlated one, and its nearest by cosine, whatever fires."""
    one, other = a.probe.dictionary, b.probe.dictionary
    nearest = nearest_directions(one, other)
    parts: list[pl.DataFrame] = []
    for side, pair, found in (("a", (one, other), nearest[0]), ("b", (other, one), nearest[1])):
        mine = features.filter(side=side)
        known = mine.select("feature", "nearest").drop_nulls()
        known = known.with_columns(cosine=pair_cosines(*pair, *known.to_numpy().T)).drop("nearest")
        mine = mine.drop("cosine").join(known, on="feature", how="left", maintain_order="left")
        parts.append(mine.with_columns(nearest_by_cosine=found.feature, best_cosine=found.cosine).select(list(MATCH_SCHEMA)))
    return pl.concat(parts)
