"""What a rule gets right and wrong, place by place: hits, misses and false alarms to look at side by side.

What belongs here: choosing a few places of each kind. What does not: how many there are (`units.document_counts`) or how
they are shown.
"""

from collections.abc import Mapping

import numpy as np
import polars as pl

from scopeatlas.corpus.documents import Split
from scopeatlas.hypotheses.rules import Rule
from scopeatlas.hypotheses.units import Firings, Units, claims, claims_at, is_among

OUTCOMES = ("hit", "miss", "false_alarm")
OUTCOME_SCHEMA = {
    "feature": pl.UInt32,
    "outcome": pl.String,
    "context": pl.Int32,
    "position": pl.Int32,
    "value": pl.Float32,
}


def outcomes(units: Units, firings: Firings, rules: Mapping[int, Rule], *, split: Split, per_kind: int = 3) -> pl.DataFrame:
    """A few places of `split` of each kind for each feature in `rules`: OUTCOME_SCHEMA, sorted by feature and outcome.

    hit: the feature fires where its rule says; miss: it fires elsewhere; false_alarm: it is silent where its rule says,
    and value is 0. position is in the context, 0 being what is in front of the text. A topic's places are contexts, by the
    feature's strongest firing in each, or by the first of the rule's words where it is silent.

    Which places is decided by a hash of feature and position, and as many documents as possible come first, so that they
    are a fair sample and the same every time.
    """
    here = firings.within(units, split)
    parts = [
        _of_tokens(units, here, {f: rule for f, rule in rules.items() if rule.unit == "token"}, split),
        _of_contexts(units, here, {f: rule for f, rule in rules.items() if rule.unit == "context"}, split),
    ]
    places = pl.concat(parts)
    at = places["at"].to_numpy()
    mixed = (places["feature"].to_numpy().astype(np.uint64) << np.uint64(40)) + at.astype(np.uint64)
    places = places.with_columns(
        document=pl.Series(units.document[at]),
        order=pl.Series(_mix(mixed)),
        context=pl.Series((at // units.length).astype(np.int32)),
        position=pl.Series((at % units.length).astype(np.int32)),
    )
    group = ["feature", "outcome"]
    places = places.sort(*group, "document", "order").with_columns(again=pl.int_range(pl.len()).over(*group, "document"))
    places = places.sort(*group, "again", "order").filter(pl.int_range(pl.len()).over(*group) < per_kind)
    rank = pl.col("outcome").replace_strict({name: i for i, name in enumerate(OUTCOMES)}, return_dtype=pl.Int8)
    return places.sort("feature", rank, maintain_order=True).select(*OUTCOME_SCHEMA)


def _only(firings: Firings, kept: np.ndarray) -> Firings:
    return Firings(firings.feature[kept], firings.position[kept], firings.width, value=firings.value[kept])


def _of_tokens(units: Units, here: Firings, rules: Mapping[int, Rule], split: Split) -> pl.DataFrame:
    size = len(units.split)
    features = np.array(list(rules), dtype=np.int64)
    row, at = claims(units, list(rules.values()), split)
    claimed = np.sort(features[row] * size + at)
    mine = _only(here, np.isin(here.feature, features))
    hit = is_among(mine.feature * np.int64(size) + mine.position, claimed)
    silent = claimed[~is_among(claimed, mine.packed(units))]
    return pl.concat(
        [
            _table(mine.feature, mine.position, mine.value, np.where(hit, "hit", "miss")),
            _table(silent // size, silent % size, np.zeros(len(silent)), np.full(len(silent), "false_alarm")),
        ]
    )


def _of_contexts(units: Units, here: Firings, rules: Mapping[int, Rule], split: Split) -> pl.DataFrame:
    mine = _only(here, np.isin(here.feature, np.array(list(rules), dtype=np.int64)))
    peaks = _table(mine.feature, mine.position, mine.value, np.full(len(mine.feature), "miss"))
    peaks = peaks.with_columns(context=pl.col("at") // units.length).sort("value", "at", descending=[True, False])
    peaks = peaks.unique(["feature", "context"], keep="first", maintain_order=True)
    claimed = claims_at(units, rules, peaks["feature"].to_numpy(), peaks["at"].to_numpy())
    peaks = peaks.with_columns(outcome=pl.when(pl.Series(claimed)).then(pl.lit("hit")).otherwise(pl.lit("miss")))
    features = np.array(list(rules), dtype=np.int64)
    row, at = claims(units, [Rule("word", rule.keys) for rule in rules.values()], split)
    held = _table(features[row], at, np.zeros(len(at)), np.full(len(at), "false_alarm"))
    held = held.with_columns(context=pl.col("at") // units.length)
    held = held.unique(["feature", "context"], keep="first", maintain_order=True)
    silent = held.join(peaks, on=["feature", "context"], how="anti")
    return pl.concat([peaks, silent]).drop("context")


def _table(feature: np.ndarray, at: np.ndarray, value: np.ndarray, outcome: np.ndarray) -> pl.DataFrame:
    columns = {"feature": feature.astype(np.uint32), "at": at.astype(np.int64), "value": value.astype(np.float32)}
    return pl.DataFrame(columns).with_columns(outcome=pl.Series(outcome.astype(str).tolist(), dtype=pl.String))


def _mix(values: np.ndarray) -> np.ndarray:
    """A fixed pseudo-random order of uint64 values (the finaliser of MurmurHash3)."""
    mixed = values ^ (values >> np.uint64(33))
    mixed = mixed * np.uint64(0xFF51AFD7ED558CCD)
    mixed ^= mixed >> np.uint64(33)
    mixed = mixed * np.uint64(0xC4CEB9FE1A85EC53)
    return mixed ^ (mixed >> np.uint64(33))
