"""The `scores` stage of one SAE: every rule label executed on report documents, beside its shuffled control.

What belongs here: testing rules. What does not: counting hits (`hypotheses/units.py`) or the arithmetic of scores
(`hypotheses/metrics.py`). No label is ever changed here.
"""

from dataclasses import asdict, dataclass

import numpy as np
import polars as pl

from scopeatlas.corpus.build import Corpus
from scopeatlas.dictionaries.releases import SaeEntry
from scopeatlas.errors import NotReadyError
from scopeatlas.hypotheses.metrics import bootstrap_intervals, constant_f1, lift, point_metrics
from scopeatlas.hypotheses.rules import Rule
from scopeatlas.hypotheses.units import Firings, Units, document_counts, read_firings
from scopeatlas.labels.stage import LabelSettings, labels_key
from scopeatlas.runner.local import Log, silent
from scopeatlas.storage.files import atomic_path, content_hash
from scopeatlas.storage.records import ShardKey
from scopeatlas.storage.store import Store
from scopeatlas.subject.loading import SubjectModel

STAGE_VERSION = 3
TILE_FEATURES = 2048
METRICS = ("precision", "recall", "f1", "balanced_accuracy")


@dataclass(frozen=True)
class ScoreSettings:
    """min_report_documents: a feature that fires in fewer report documents is refused, not scored. seed: of the
    bootstrap and of the shuffle."""

    min_report_documents: int = 3
    seed: int = 0


@dataclass(frozen=True)
class LabelScores:
    """A finished stage: one row per rule label, scored or refused."""

    table: pl.DataFrame
    key: ShardKey

    @property
    def scored(self) -> pl.DataFrame:
        return self.table.filter(pl.col("status") == "scored")


def scores_key(
    corpus: Corpus, entry: SaeEntry, subject: SubjectModel, labels: LabelSettings, settings: ScoreSettings
) -> ShardKey:
    """What determines the scores: the labels, and how they are tested."""
    return ShardKey("scores", content_hash(STAGE_VERSION, labels_key(corpus, entry, subject, labels).identity, asdict(settings)))


def score_labels(
    store: Store,
    corpus: Corpus,
    entry: SaeEntry,
    subject: SubjectModel,
    *,
    labels: LabelSettings,
    settings: ScoreSettings,
    log: Log = silent,
) -> tuple[LabelScores, bool]:
    """Score every rule label on report documents; returns the stage and whether it was there already.

    Raises NotReadyError if labels are missing.
    """
    stage, key = store.stage(entry.key, corpus.id, "scores"), scores_key(corpus, entry, subject, labels, settings)
    path = stage.data_path(key, ".parquet")
    if stage.is_done(key):
        return LabelScores(pl.read_parquet(path), key), True
    store.require_writable()
    label_stage, label_key = store.stage(entry.key, corpus.id, "labels"), labels_key(corpus, entry, subject, labels)
    if not label_stage.is_done(label_key):
        raise NotReadyError(f"{entry.key} has no labels to score with these settings: materialise feature_labels first")
    label_rows = pl.read_parquet(label_stage.data_path(label_key, ".parquet"))
    rules = {row["feature"]: Rule.from_json(row["rule"]) for row in label_rows.filter(pl.col("rule") != "").iter_rows(named=True)}
    units = Units(corpus, subject)
    firings = read_firings(store, corpus, entry, subject, units, width=int(label_rows["feature"].max()) + 1)  # type: ignore[arg-type]
    table = score_rules(units, firings.within(units, "report"), rules, settings)
    with atomic_path(path) as temporary:
        table.write_parquet(temporary)
    scores = LabelScores(table, key)
    log(f"label scores: {len(scores.scored):,} of {len(table):,} rule labels scored on report documents")
    stage.commit(key, [path], {"labels": len(table), "scored": len(scores.scored)})
    return scores, False


def score_rules(units: Units, report: Firings, rules: dict[int, Rule], settings: ScoreSettings) -> pl.DataFrame:
    """Each rule against its own feature and, as the control, another feature's rule against it.

    Columns: feature, method, status (scored, too_few_documents), label, unit, documents (report documents it fires in),
    fired, claimed, true_positive (units), each metric with _low and _high (95 %, bootstrap over documents),
    constant_f1, lift, and shuffled_f1 with its interval. Metrics are null where refused.
    """
    features = sorted(rules)
    partners = shuffled_partners(features, rules, seed=settings.seed)
    tiles = [features[i : i + TILE_FEATURES] for i in range(0, len(features), TILE_FEATURES)]
    parts = [_score_tile(units, report, tile, rules, partners, settings) for tile in tiles]
    return pl.concat(parts) if parts else _score_tile(units, report, [], rules, partners, settings)


def shuffled_partners(features: list[int], rules: dict[int, Rule], *, seed: int) -> dict[int, Rule]:
    """Another feature's rule for each feature, at random: of the same unit if there is one, so that both scores count
    the same things, and never the same rule unless all are the same."""
    order = np.random.default_rng(seed).permutation(len(features))
    partners: dict[int, Rule] = {}
    for place, index in enumerate(order):
        own = rules[features[index]]
        turn = (rules[features[order[(place + step) % len(order)]]] for step in range(1, len(order)))
        other = None
        for rule in (rule for rule in turn if rule != own):
            other = rule if other is None or rule.unit == own.unit else other
            if other.unit == own.unit:
                break
        partners[features[index]] = other or own
    return partners


def _score_tile(
    units: Units, report: Firings, features: list[int], rules: dict[int, Rule], partners: dict[int, Rule], settings: ScoreSettings
) -> pl.DataFrame:
    own = document_counts(units, report, rules, features, split="report")
    control = document_counts(units, report, partners, features, split="report")
    point, control_point = point_metrics(own), point_metrics(control)
    interval = bootstrap_intervals(own, seed=settings.seed)
    control_interval = bootstrap_intervals(control, seed=settings.seed)
    documents = (own.fired > 0).sum(axis=1)
    fired, total = own.fired.sum(axis=1), own.units.sum(axis=1)
    columns: dict[str, object] = {}
    for name in METRICS:
        columns |= {name: getattr(point, name), f"{name}_low": interval[name][:, 0], f"{name}_high": interval[name][:, 1]}
    columns |= {"constant_f1": constant_f1(fired, total), "lift": lift(point.f1, fired, total)}
    columns |= {
        "shuffled_f1": control_point.f1,
        "shuffled_f1_low": control_interval["f1"][:, 0],
        "shuffled_f1_high": control_interval["f1"][:, 1],
    }
    measured = pl.DataFrame(columns).cast(pl.Float32)
    is_scored = pl.Series(documents >= settings.min_report_documents)
    described = pl.DataFrame(
        {
            "feature": pl.Series(features, dtype=pl.UInt32),
            "method": pl.Series(["rule"] * len(features), dtype=pl.String),
            "status": pl.Series(np.where(is_scored, "scored", "too_few_documents").tolist(), dtype=pl.String),
            "label": pl.Series([rules[f].short() for f in features], dtype=pl.String),
            "unit": pl.Series([rules[f].unit for f in features], dtype=pl.String),
            "documents": pl.Series(documents, dtype=pl.Int32),
            "fired": pl.Series(fired, dtype=pl.Int64),
            "claimed": pl.Series(own.claimed.sum(axis=1), dtype=pl.Int64),
            "true_positive": pl.Series(own.true_positive.sum(axis=1), dtype=pl.Int64),
        }
    )
    nulled = measured.with_columns(pl.when(is_scored).then(pl.col(name)).alias(name) for name in measured.columns)
    return pl.concat([described, nulled], how="horizontal")
