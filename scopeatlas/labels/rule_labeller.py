"""The rule labeller: for every feature the rule that best explains where it fires, or a refusal. No LLM.

What belongs here: proposing rules from `explain` documents and choosing among them on `select` documents. What does
not: counting hits (`hypotheses/units.py`) or the final test on `report` documents (`scoring/`).
"""

import numpy as np
import polars as pl
from scipy import sparse

from scopeatlas.corpus.documents import SPLITS
from scopeatlas.hypotheses.labels import Label, Status
from scopeatlas.hypotheses.metrics import lift
from scopeatlas.hypotheses.rules import Rule
from scopeatlas.hypotheses.units import Firings, Units, claims, is_among, key_hits, key_totals
from scopeatlas.labels.rule_candidates import (
    PREFERENCE,
    TOPIC_SIZES,
    RuleSettings,
    token_candidates,
    topic_candidates,
)
from scopeatlas.labels.rule_compositions import base_rules, compositions, rule_of

RULES_VERSION = 6
"""Raised when the same firings get other rules."""
TOPIC_TILE = 2048
CLAIMED_AT_ONCE = 512
PSEUDO_UNITS = 6
"""Added to the denominator of F1 on select documents, so that a rule with a few lucky hits is not chosen for them."""

_SCORED = {"feature": pl.UInt32, "rule": pl.String, "place": pl.Int64, "value": pl.Float64, "cost": pl.Float64}


def refusals(features: pl.DataFrame, settings: RuleSettings) -> dict[int, Status]:
    """Features that get no label whatever the rules say, by `hypotheses.counts.firing_counts`."""
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

    Candidates come from explain documents: keys and sets of keys of every column, topics, and compositions of two. The one
    of highest lift on select documents, less its cost, is the label.
    """
    version = f"rule:{RULES_VERSION}"
    labels = {feature: Label(feature, "rule", status, version=version) for feature, status in refused.items()}
    open_features = np.setdiff1d(np.arange(firings.width), np.array(sorted(refused), dtype=np.int64))
    chosen = _best_rules(units, firings, open_features, settings) if len(open_features) else {}
    for feature in open_features.tolist():
        if feature not in chosen:
            labels[feature] = Label(feature, "rule", "incoherent", version=version)
            continue
        text, found = chosen[feature]
        rule = Rule.from_json(text)
        scope = "document" if rule.unit == "context" else "token"
        labels[feature] = Label(
            feature, "rule", "ok", rule.short(), rule.sentence(), rule=text, version=version, scope=scope, select_score=found
        )
    return [labels[feature] for feature in range(firings.width)]


def _best_rules(units: Units, firings: Firings, features: np.ndarray, settings: RuleSettings) -> dict[int, tuple[str, float]]:
    """The rule (as JSON) of those features that have one, and its lift on select documents."""
    explain, select = firings.within(units, "explain"), firings.within(units, "select")
    candidates = token_candidates(units, explain, features, settings)
    composed = compositions(units, explain, base_rules(units, candidates), settings)
    # One token may be near several words, so that hits of single words do not add up.
    several_near = (pl.col("column") == "near") & (pl.len().over("candidate") > 1)
    near = candidates.filter(several_near).group_by("feature", "candidate", maintain_order=True).agg("key")
    composed += [(row["feature"], rule_of(units, "near", row["key"])) for row in near.iter_rows(named=True)]
    disjoint = candidates.filter(~several_near).select("candidate", "feature", "column", "key")
    scored = [
        _score_token_candidates(units, select, disjoint, settings),
        _score_compositions(units, select, composed, settings),
        _topic_candidates(units, explain, select, features, settings),
    ]
    best = pl.concat(scored).sort("feature", "value", "place", "rule", descending=[False, True, False, False])
    best = best.unique("feature", keep="first", maintain_order=True).filter(pl.col("value") >= settings.min_lift)
    return {row["feature"]: (row["rule"], row["value"] + row["cost"]) for row in best.iter_rows(named=True)}


def _score_token_candidates(units: Units, select: Firings, candidates: pl.DataFrame, settings: RuleSettings) -> pl.DataFrame:
    """Simple rules by their lift on select documents less their cost: _SCORED."""
    measured = [pl.DataFrame(schema={"candidate": pl.UInt32, "hits": pl.Int64, "total": pl.Int64})]
    for (column,), members in candidates.group_by(["column"], maintain_order=True):
        name = str(column)
        hits = key_hits(units, select, name, among=members)
        found = members.join(hits, on=["feature", "key"], how="left")
        found = found.join(key_totals(units, "select", name), on="key", how="left").fill_null(0)
        measured.append(found.group_by("candidate").agg(pl.col("hits").sum(), pl.col("total").sum()))
    grouped = candidates.group_by("candidate", "feature", "column", maintain_order=True).agg(keys=pl.col("key"))
    table = grouped.join(pl.concat(measured), on="candidate", maintain_order="left")
    rules = [(row["feature"], rule_of(units, row["column"], row["keys"])) for row in table.iter_rows(named=True)]
    return _scored(units, select, rules, table["hits"].to_numpy(), table["total"].to_numpy(), settings)


def _score_compositions(units: Units, select: Firings, composed: list[tuple[int, Rule]], settings: RuleSettings) -> pl.DataFrame:
    """Rules whose parts may overlap by their lift on select documents less their cost: _SCORED."""
    size, packed = len(units.split), select.packed(units)
    feature = np.array([feature for feature, _ in composed], dtype=np.int64)
    hits, total = np.zeros(len(composed), dtype=np.int64), np.zeros(len(composed), dtype=np.int64)
    for start in range(0, len(composed), CLAIMED_AT_ONCE):
        row, position = claims(units, [rule for _, rule in composed[start : start + CLAIMED_AT_ONCE]], "select")
        hit = is_among(feature[start + row] * size + position, packed)
        np.add.at(total, start + row, 1)
        np.add.at(hits, start + row, hit)
    return _scored(units, select, composed, hits, total, settings)


def _scored(
    units: Units, select: Firings, rules: list[tuple[int, Rule]], hits: np.ndarray, total: np.ndarray, settings: RuleSettings
) -> pl.DataFrame:
    """_SCORED of token rules with their hits and claims on select documents, int64 [n]."""
    feature = np.array([feature for feature, _ in rules], dtype=np.int64)
    fired = np.bincount(select.feature, minlength=select.width).astype(np.float64)[feature]
    gained = lift(2 * hits / (total + fired + PSEUDO_UNITS), fired, np.full(len(rules), float(units.in_split("select").sum())))
    cost = np.array([settings.cost(rule) for _, rule in rules])
    columns = {
        "feature": feature,
        "rule": [rule.to_json() for _, rule in rules],
        "place": [PREFERENCE.index(rule.kind) for _, rule in rules],
        "value": gained - cost,
        "cost": cost,
    }
    return pl.DataFrame(columns, schema=_SCORED)


def _topic_candidates(
    units: Units, explain: Firings, select: Firings, features: np.ndarray, settings: RuleSettings
) -> pl.DataFrame:
    """Topic rules of the TOPIC_SIZES words that best tell a feature's contexts apart, scored on select contexts: _SCORED."""
    held, words = units.topic_words
    parts: list[pl.DataFrame] = [pl.DataFrame(schema=_SCORED)]
    fires = {"explain": explain.in_contexts(units), "select": select.in_contexts(units)}
    members = {split: np.flatnonzero(units.context_split == SPLITS.index(split)) for split in fires}
    for start in range(0, len(features), TOPIC_TILE):
        tile = features[start : start + TOPIC_TILE]
        best = topic_candidates(fires["explain"][tile][:, members["explain"]], held[members["explain"]])
        for size in TOPIC_SIZES:
            value = _topic_lift(fires["select"][tile][:, members["select"]], held[members["select"]], best[:, :size])
            full = np.flatnonzero(best[:, size - 1] >= 0)
            rules = [Rule("topic", tuple(words[word] for word in row)) for row in best[full, :size]]
            cost = np.array([settings.cost(rule) for rule in rules])
            columns = {
                "feature": tile[full],
                "rule": [rule.to_json() for rule in rules],
                "place": [PREFERENCE.index("topic")] * len(rules),
                "value": value[full] - cost,
                "cost": cost,
            }
            parts.append(pl.DataFrame(columns, schema=_SCORED))
    return pl.concat(parts)


def _topic_lift(fires: sparse.csr_matrix, held: sparse.csr_matrix, best: np.ndarray) -> np.ndarray:
    rows, columns = np.nonzero(best >= 0)
    ones = np.ones(len(rows), dtype=np.float32)
    chosen = sparse.csr_matrix((ones, (best[rows, columns], rows)), shape=(held.shape[1], len(best)))  # pyright: ignore[reportOptionalSubscript]
    claims = ((held @ chosen) > 0).astype(np.float32).T.tocsr()  # pyright: ignore[reportAttributeAccessIssue]  # [F, contexts]
    hits = np.asarray(claims.multiply(fires).sum(axis=1)).ravel()
    claimed, fired = np.asarray(claims.sum(axis=1)).ravel(), np.asarray(fires.sum(axis=1)).ravel()
    f1 = 2 * hits / (claimed + fired + PSEUDO_UNITS)
    return lift(f1, fired, np.full(len(f1), float(held.shape[0])))  # pyright: ignore[reportOptionalSubscript]
