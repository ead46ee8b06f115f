"""The rule labeller: for every feature the rule that best explains where it fires, or a refusal. No LLM.

What belongs here: proposing rules from `explain` documents and choosing among them on `select` documents. What does
not: counting hits (`hypotheses/units.py`) or the final test on `report` documents (`scoring/`).
"""

from dataclasses import dataclass

import numpy as np
import polars as pl
from scipy import sparse

from scopeatlas.corpus.documents import SPLITS
from scopeatlas.hypotheses.labels import Label, Status
from scopeatlas.hypotheses.metrics import lift
from scopeatlas.hypotheses.rules import Rule, RuleKind
from scopeatlas.hypotheses.units import COLUMNS, Firings, Units, key_hits, key_totals

SINGLES_PER_COLUMN = 3
SET_COLUMNS = ("token", "word", "previous", "next")
MAX_SET = 8
MIN_HITS = 2
TOPIC_SIZES = (1, 3, 6)
TOPIC_TILE = 2048
PSEUDO_UNITS = 6
"""Added to the denominator of F1 on select documents, so that a rule with a few lucky hits is not chosen for them."""

_MEASURED = {
    "candidate": pl.Int64,
    "feature": pl.UInt32,
    "kind": pl.String,
    "hits": pl.Int64,
    "total": pl.Int64,
    "keys": pl.List(pl.String),
}


@dataclass(frozen=True)
class RuleSettings:
    """When a feature is refused before any rule is tried, and how good a rule must be.

    min_lift: of the best rule on select documents, after its complexity cost. cost_per_key, topic_cost: what each
    further key and a topic cost. max_density: above it a feature is dense. min_contexts, min_documents: explain
    evidence below which a feature is rare or has too few documents. positional_share: of firings at early positions.
    """

    min_lift: float = 0.3
    cost_per_key: float = 0.01
    topic_cost: float = 0.05
    max_density: float = 0.1
    min_contexts: int = 6
    min_documents: int = 3
    positional_share: float = 0.8


def refusals(features: pl.DataFrame, settings: RuleSettings) -> dict[int, Status]:
    """Features that get no label whatever the rules say, from the feature table of the examples stage."""
    firing = pl.col("explain_contexts")
    status = (
        pl.when(pl.col("tokens") == 0).then(pl.lit("dead"))
        .when(pl.col("density") > settings.max_density).then(pl.lit("dense"))
        .when(pl.col("early_share") > settings.positional_share).then(pl.lit("positional"))
        .when(firing < settings.min_contexts).then(pl.lit("rare"))
        .when((pl.col("explain_documents") < settings.min_documents) | (pl.col("select_documents") < 1)).then(pl.lit("too_few_documents"))
    )  # fmt: skip
    refused = features.select("feature", status=status).drop_nulls("status")
    return dict(zip(refused["feature"].to_list(), refused["status"].to_list(), strict=True))


def propose_rules(units: Units, firings: Firings, refused: dict[int, Status], settings: RuleSettings) -> list[Label]:
    """One label per feature: its best rule, or the status it is refused with ("incoherent" if no rule explains it).

    Candidates come from explain documents: the best single keys of every column, the best set of tokens, words or
    neighbours (for disjoint keys the set of highest F1 is a prefix in order of precision), the best topic words.
    The one of highest lift on select documents, less its cost, is the label.
    """
    open_features = np.setdiff1d(np.arange(firings.width), np.array(sorted(refused), dtype=np.int64))
    if not len(open_features):
        return [Label(feature, "rule", refused[feature]) for feature in range(firings.width)]
    explain, select = firings.within(units, "explain"), firings.within(units, "select")
    token_candidates = _token_candidates(units, explain, open_features)
    scored = [_score_token_candidates(units, select, token_candidates, settings)]
    scored.append(_topic_candidates(units, explain, select, open_features, settings))
    best = pl.concat(scored).sort("feature", "value", "cost", "kind", descending=[False, True, False, False])
    best = best.unique("feature", keep="first", maintain_order=True)
    chosen = {row["feature"]: row for row in best.filter(pl.col("value") >= settings.min_lift).iter_rows(named=True)}
    labels = []
    for feature in range(firings.width):
        if feature in refused:
            labels.append(Label(feature, "rule", refused[feature]))
        elif feature not in chosen:
            labels.append(Label(feature, "rule", "incoherent"))
        else:
            row = chosen[feature]
            rule = Rule(row["kind"], tuple(row["keys"]))
            labels.append(
                Label(
                    feature,
                    "rule",
                    "ok",
                    rule.short(),
                    rule.sentence(),
                    rule=rule.to_json(),
                    select_score=row["value"] + row["cost"],
                )
            )
    return labels


def _counts(firings: Firings, features: np.ndarray) -> pl.DataFrame:
    fired = np.bincount(firings.feature, minlength=firings.width)
    return pl.DataFrame({"feature": features.astype(np.uint32), "fired": fired[features]})


def _kind(column: str) -> RuleKind:
    return column.rstrip("0123456789")  # type: ignore[return-value]


def _token_candidates(units: Units, explain: Firings, features: np.ndarray) -> pl.DataFrame:
    """Candidates as rows (candidate, feature, column, key): the keys of one candidate share its number."""
    fired = _counts(explain, features)
    parts: list[pl.DataFrame] = []
    for column in COLUMNS:
        hits = key_hits(units, explain, column).filter(pl.col("hits") >= MIN_HITS).join(fired, on="feature")
        hits = hits.join(key_totals(units, "explain", column), on="key")
        hits = hits.with_columns(
            precision=pl.col("hits") / pl.col("total"),
            f1=2 * pl.col("hits") / (pl.col("total") + pl.col("fired")),
        )
        singles = hits.sort("feature", "f1", "key", descending=[False, True, False])
        singles = singles.filter(pl.int_range(pl.len()).over("feature") < SINGLES_PER_COLUMN)
        parts.append(singles.select("feature", "key", number=pl.int_range(pl.len()).over("feature"), column=pl.lit(column)))
        if column in SET_COLUMNS:
            parts.append(_best_sets(hits, column))
    candidates = pl.concat(parts)
    return candidates.with_columns(candidate=pl.struct("feature", "column", "number").rank("dense").cast(pl.Int64))


def _best_sets(hits: pl.DataFrame, column: str) -> pl.DataFrame:
    ordered = hits.sort("feature", "precision", "hits", "key", descending=[False, True, True, False])
    ordered = ordered.filter(pl.int_range(pl.len()).over("feature") < MAX_SET)
    together = ordered.with_columns(
        at=pl.int_range(pl.len()).over("feature"),
        f1=2 * pl.col("hits").cum_sum().over("feature") / (pl.col("total").cum_sum().over("feature") + pl.col("fired")),
    )
    best = together.with_columns(best=pl.col("f1").arg_max().over("feature")).filter(pl.col("at") <= pl.col("best"))
    several = best.filter(pl.col("best") > 0)
    return several.select("feature", "key", number=pl.lit(-1, dtype=pl.Int64), column=pl.lit(column))


def _score_token_candidates(units: Units, select: Firings, candidates: pl.DataFrame, settings: RuleSettings) -> pl.DataFrame:
    """Lift on select documents less cost: feature, kind, keys (texts), value, cost."""
    measured = [pl.DataFrame(schema=_MEASURED)]  # so that no candidates at all are an empty table
    for (column,), members in candidates.group_by(["column"], maintain_order=True):
        name = str(column)
        found = members.join(key_hits(units, select, name), on=["feature", "key"], how="left")
        found = found.join(key_totals(units, "select", name), on="key", how="left").fill_null(0)
        texts = units.column(name)[1]
        found = found.with_columns(
            text=pl.Series([texts[key] for key in found["key"]], dtype=pl.String), kind=pl.lit(_kind(name))
        )
        measured.append(
            found.group_by("candidate", "feature", "kind", maintain_order=True).agg(
                hits=pl.col("hits").sum(), total=pl.col("total").sum(), keys=pl.col("text")
            )
        )
    table = pl.concat(measured).join(_counts(select, np.arange(select.width)), on="feature")
    fired = table["fired"].to_numpy().astype(np.float64)
    f1 = 2 * table["hits"].to_numpy() / (table["total"].to_numpy() + fired + PSEUDO_UNITS)
    gained = lift(f1, fired, np.full(len(table), float(units.in_split("select").sum())))
    cost = settings.cost_per_key * (pl.col("keys").list.len() - 1)
    return table.with_columns(cost=cost).select("feature", "kind", "keys", value=pl.Series(gained) - pl.col("cost"), cost="cost")


def _topic_candidates(
    units: Units, explain: Firings, select: Firings, features: np.ndarray, settings: RuleSettings
) -> pl.DataFrame:
    """Topic rules of the TOPIC_SIZES words that best tell a feature's contexts apart, scored on select contexts."""
    held, words = units.topic_words
    parts: list[pl.DataFrame] = []
    fires = {"explain": explain.in_contexts(units), "select": select.in_contexts(units)}
    members = {split: np.flatnonzero(units.context_split == SPLITS.index(split)) for split in fires}
    for start in range(0, len(features), TOPIC_TILE):
        tile = features[start : start + TOPIC_TILE]
        best = _best_words(fires["explain"][tile][:, members["explain"]], held[members["explain"]], max(TOPIC_SIZES))
        for size in TOPIC_SIZES:
            value = _topic_lift(fires["select"][tile][:, members["select"]], held[members["select"]], best[:, :size])
            cost = settings.topic_cost + settings.cost_per_key * (size - 1)
            keys = [[words[w] for w in row if w >= 0] for row in best[:, :size]]
            part = pl.DataFrame(
                {"feature": tile.astype(np.uint32), "kind": ["topic"] * len(tile), "keys": keys, "value": value - cost},
                schema_overrides={"keys": pl.List(pl.String), "value": pl.Float64},
            )
            parts.append(part.with_columns(cost=pl.lit(cost)).filter(pl.col("keys").list.len() == size))
    return pl.concat(parts)


def _best_words(fires: sparse.csr_matrix, held: sparse.csr_matrix, count: int) -> np.ndarray:
    """Per feature the `count` words of highest precision * sqrt(recall) over contexts, -1 where fewer: [F, count]."""
    together = (fires @ held).toarray()  # pyright: ignore[reportAttributeAccessIssue]
    contexts_of_word = np.asarray(held.sum(axis=0))
    contexts_of_feature = np.asarray(fires.sum(axis=1))
    with np.errstate(divide="ignore", invalid="ignore"):
        worth = together / contexts_of_word * np.sqrt(together / contexts_of_feature)
    worth = np.where((together >= MIN_HITS) & np.isfinite(worth), worth, 0)
    best = np.argsort(-worth, axis=1, kind="stable")[:, :count]
    return np.where(np.take_along_axis(worth, best, axis=1) > 0, best, -1)


def _topic_lift(fires: sparse.csr_matrix, held: sparse.csr_matrix, best: np.ndarray) -> np.ndarray:
    rows, columns = np.nonzero(best >= 0)
    ones = np.ones(len(rows), dtype=np.float32)
    chosen = sparse.csr_matrix((ones, (best[rows, columns], rows)), shape=(held.shape[1], len(best)))  # pyright: ignore[reportOptionalSubscript]
    claims = ((held @ chosen) > 0).astype(np.float32).T.tocsr()  # pyright: ignore[reportAttributeAccessIssue]  # [F, contexts]
    hits = np.asarray(claims.multiply(fires).sum(axis=1)).ravel()
    claimed, fired = np.asarray(claims.sum(axis=1)).ravel(), np.asarray(fires.sum(axis=1)).ravel()
    f1 = 2 * hits / (claimed + fired + PSEUDO_UNITS)
    return lift(f1, fired, np.full(len(f1), float(held.shape[0])))  # pyright: ignore[reportOptionalSubscript]
