"""Candidate rules about single tokens and about contexts, proposed from `explain` documents.

What belongs here: single keys, sets of keys of one column, topics, and what a rule costs. What does not: two rules in one
(`rule_compositions.py`) or the choice among candidates (`rule_labeller.py`).
"""

from dataclasses import dataclass

import numpy as np
import polars as pl
from scipy import sparse

from scopeatlas.hypotheses.columns import COLUMNS, kind_of
from scopeatlas.hypotheses.rules import Rule, RuleKind
from scopeatlas.hypotheses.units import Firings, Units, key_hits, key_totals

SINGLES_PER_COLUMN = 2
CANDIDATES_PER_FEATURE = 24
MAX_SET = 12
MAX_AFFIXES = 3
"""A longer list of affixes is a list of words, oddly said."""
MIN_HITS = 2
TOPIC_SIZES = (1, 2, 3, 4, 5, 6)

PREFERENCE: tuple[RuleKind, ...] = (
    "word", "token", "shape", "suffix", "prefix", "previous", "next", "bigram", "format", "position", "previous_shape",
    "next_shape", "skip", "near", "topic", "or", "and", "and_not",
)  # fmt: skip
"""Of rules that do equally well, what a person would say first."""


@dataclass(frozen=True)
class RuleSettings:
    """When a feature is refused before any rule is tried, and how good a rule must be.

    min_lift: of the best rule on select documents, after its complexity cost. cost_per_key, composition_cost, topic_cost:
    what each further key, a second rule, and a topic or nearby word cost. max_density: above it a feature is dense.
    min_contexts, min_documents: explain evidence below which a feature is rare or has too few documents.
    positional_share: of firings at early positions.
    """

    min_lift: float = 0.3
    cost_per_key: float = 0.01
    composition_cost: float = 0.05
    topic_cost: float = 0.05
    max_density: float = 0.1
    min_contexts: int = 6
    min_documents: int = 3
    positional_share: float = 0.8

    def cost(self, rule: Rule) -> float:
        """How much better a rule must be than a single key for what it says more."""
        if rule.parts is not None:
            return self.composition_cost + sum(self.cost(part) for part in rule.parts)
        return self.kind_cost(rule.kind) + self.cost_per_key * (len(rule.keys) - 1)

    def kind_cost(self, kind: RuleKind) -> float:
        """What a rule of one key costs."""
        return self.topic_cost if kind in {"topic", "near"} else 0.0


def token_candidates(units: Units, explain: Firings, features: np.ndarray, settings: RuleSettings) -> pl.DataFrame:
    """The simple token rules worth trying, as rows (candidate, feature, column, key, hits, total, fired, value).

    The keys of one candidate share its number, hits and total (both over all its keys). value: F1 on explain documents
    less the cost. Sorted, best first within a feature.
    """
    fired = fired_counts(explain, features)
    parts = []
    for column in COLUMNS:
        hits = key_hits(units, explain, column, least=MIN_HITS).join(fired, on="feature")
        hits = hits.join(key_totals(units, "explain", column), on="key")
        hits = hits.filter(pl.Series(worth_proposing(units, column)[hits["key"].to_numpy()]))
        hits = hits.with_columns(group=pl.col("feature"), hits_before=0, total_before=0)
        cost = settings.kind_cost(kind_of(column))
        sets = best_sets(hits, kind_of(column), cost_per_key=settings.cost_per_key)
        singles = hits.with_columns(value=_f1("hits", "total"), keys=pl.concat_list("key"))
        singles = singles.sort("feature", "value", "key", descending=[False, True, False])
        singles = singles.filter(pl.int_range(pl.len()).over("feature") < SINGLES_PER_COLUMN)
        several = sets.filter(pl.col("keys").list.len() > 1)
        both = [part.select("feature", "keys", "hits", "total", "fired", "value") for part in (singles, several)]
        parts.append(pl.concat(both).with_columns(pl.col("value") - cost, column=pl.lit(column)))
    found = pl.concat(parts).with_columns(place=pl.col("column").replace_strict({c: i for i, c in enumerate(COLUMNS)}))
    found = found.sort("feature", "value", "place", "keys", descending=[False, True, False, False])
    found = found.filter(pl.int_range(pl.len()).over("feature") < CANDIDATES_PER_FEATURE).drop("place")
    return found.with_row_index("candidate").explode("keys").rename({"keys": "key"})


def worth_proposing(units: Units, column: str) -> np.ndarray:
    """Which keys of a column, bool [K + 1]: all but the words that are near everything. The last is no key."""
    _, texts = units.column(column)
    if column != "near":
        return np.ones(len(texts) + 1, dtype=bool)
    content = set(units.topic_words[1])
    return np.array([*(text in content for text in texts), False])


def fired_counts(firings: Firings, features: np.ndarray) -> pl.DataFrame:
    """How often features fire: feature, fired."""
    fired = np.bincount(firings.feature, minlength=firings.width)
    return pl.DataFrame({"feature": features.astype(np.uint32), "fired": fired[features]})


def best_sets(keys: pl.DataFrame, kind: RuleKind, *, cost_per_key: float, remove: bool = False) -> pl.DataFrame:
    """Per group the set of keys that, added to what is claimed before, gives the highest F1 less the keys' cost.

    keys: of one kind: group, feature, key, hits, total, fired, and hits_before and total_before of the group. remove: the
    keys are taken away from what is claimed. Returns group, feature, keys (lists, those that do most first), hits and
    total (of the result), fired, value.

    Of disjoint keys the best set is a prefix in order of precision. Considered are those that can pay their cost, and of
    them the MAX_SET highest in precision times square root of recall, so that rare ones do not crowd out common ones.
    """
    sign = -1 if remove else 1
    good = pl.col("total") - pl.col("hits") if remove else pl.col("hits")
    pays = pl.max_horizontal(pl.lit(MIN_HITS), cost_per_key * pl.col("fired"))
    ranked = keys.with_columns(good=good, precision=good / pl.col("total")).filter(pl.col("good") >= pays)
    ranked = ranked.with_columns(worth=pl.col("precision") * pl.col("good").sqrt())
    ranked = ranked.sort("group", "worth", "key", descending=[False, True, False])
    most = MAX_AFFIXES if kind in {"prefix", "suffix"} else MAX_SET
    ranked = ranked.filter(pl.int_range(pl.len()).over("group") < most)
    ranked = ranked.sort("group", "precision", "good", "key", descending=[False, True, True, False])
    together = ranked.with_columns(
        at=pl.int_range(pl.len()).over("group"),
        hits=pl.col("hits_before") + sign * pl.col("hits").cum_sum().over("group"),
        total=pl.col("total_before") + sign * pl.col("total").cum_sum().over("group"),
    )
    together = together.with_columns(value=_f1("hits", "total") - cost_per_key * pl.col("at"))
    best = together.with_columns(best=pl.col("value").arg_max().over("group")).filter(pl.col("at") <= pl.col("best"))
    return best.group_by("group", maintain_order=True).agg(
        pl.col("feature").first(),
        keys=pl.col("key").sort_by("good", "key", descending=[True, False]),
        hits=pl.col("hits").last(),
        total=pl.col("total").last(),
        fired=pl.col("fired").first(),
        value=pl.col("value").last(),
    )


def _f1(hits: str, total: str) -> pl.Expr:
    return 2 * pl.col(hits) / (pl.col(total) + pl.col("fired"))


def topic_candidates(fires: sparse.csr_matrix, held: sparse.csr_matrix) -> np.ndarray:
    """Per feature the words that best tell its contexts apart, best first, -1 where fewer: [F, max(TOPIC_SIZES)].

    fires: [F, contexts]; held: [contexts, words]. Each is the word of highest precision times square root of recall over
    the contexts that no earlier one is in.
    """
    contexts_of_word = np.asarray(held.sum(axis=0))
    contexts_of_feature = np.maximum(np.asarray(fires.sum(axis=1)), 1)
    chosen = np.full((fires.shape[0], max(TOPIC_SIZES)), -1)  # pyright: ignore[reportOptionalSubscript]
    left = fires.copy()
    for i in range(chosen.shape[1] if contexts_of_word.size else 0):  # a tiny corpus may have no word to ask for
        together = (left @ held).toarray()  # pyright: ignore[reportAttributeAccessIssue]
        worth = together / np.maximum(contexts_of_word, 1) * np.sqrt(together / contexts_of_feature)
        worth[together < MIN_HITS] = 0
        best = worth.argmax(axis=1)
        rows = np.flatnonzero(worth[np.arange(len(best)), best] > 0)
        chosen[rows, i] = best[rows]
        ones = np.ones(len(rows), dtype=np.float32)
        of_feature = sparse.csr_matrix((ones, (rows, best[rows])), shape=worth.shape)
        covered = of_feature @ held.T
        left = left - left.multiply(covered)
    return chosen
