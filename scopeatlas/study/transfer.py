"""Carrying labels over: what SAE a's features are called, given to their matches in SAE b and tested there anew.

What belongs here: which label goes to which feature, and its own held-out score. What does not: finding the matches
(`matching.py`) or the scorer (`scoring/execution.py`). A match is chosen on explain and select documents, a label is tested
on report documents, and no document is used for both.
"""

from collections.abc import Sequence
from dataclasses import replace

import polars as pl

from scopeatlas.corpus.documents import Split
from scopeatlas.errors import LeakError
from scopeatlas.hypotheses.labels import LABEL_SCHEMA, Label, labels_of
from scopeatlas.hypotheses.units import Units
from scopeatlas.scoring.execution import execute_rules
from scopeatlas.scoring.table import arm, own, score_table
from scopeatlas.storage.uris import readable
from scopeatlas.study.matching import Matching
from scopeatlas.study.opening import OpenSae
from scopeatlas.study.shared_tokens import TOKENS, share_tokens

TESTED_ON: tuple[Split, ...] = ("report",)
MIN_DOCUMENTS = 3
"""Report documents that a feature must fire in, as `ScoreSettings.min_report_documents` has it."""
SEED = 0

_MEASURED = ("f1", "f1_low", "f1_high", "balanced_accuracy", "lift", "lift_low", "lift_high")
TRANSFER_SCHEMA = pl.Schema(
    {
        "feature_a": pl.Int64,
        "feature_b": pl.Int64,
        "match": pl.String,  # kept or changed
        "correlation": pl.Float64,
        "label": pl.String,  # of a's feature
        "method": pl.String,
        "outcome": pl.String,  # scored, too_few_documents, or not_tested: a label of text alone, about which no judge was asked
        "documents": pl.Int32,  # report documents that b's feature fires in
        **dict.fromkeys(_MEASURED, pl.Float32),  # of the label on b
        "shuffled_f1": pl.Float32,  # of another label of a's on the same feature of b
        "f1_on_a": pl.Float32,  # as published
        "label_b": pl.String,  # what b's feature is called in its own release, and how that scores, as published
        "f1_b": pl.Float32,
    }
)


def shown_labels(opened: OpenSae, features: Sequence[int] | None = None) -> list[Label]:
    """The labels that an SAE's rows show, whole, with their rules; those whose generation is no longer stored are left out."""
    shown = (
        opened.rows.filter(pl.col("label_id") != "").select("feature", "label_id").with_columns(pl.col("feature").cast(pl.UInt32))
    )
    if features is not None:
        shown = shown.filter(pl.col("feature").is_in(list(features)))
    stage = opened.store.stage(opened.key, opened.corpus, "labels")
    paths = [stage.data_path(record.key, ".parquet") for record in stage.records() if record.key.name == "labels"]
    tables = [pl.DataFrame(schema=LABEL_SCHEMA), *(pl.read_parquet(readable(path)).select(list(LABEL_SCHEMA)) for path in paths)]
    found = pl.concat(tables).unique("label_id", keep="first", maintain_order=True)
    return labels_of(found.join(shown, on=["feature", "label_id"], how="semi").sort("feature"))


def transfer(a: OpenSae, b: OpenSae, matching: Matching, *, tokens: int = TOKENS) -> pl.DataFrame:
    """TRANSFER_SCHEMA: every label of a whose feature is kept or changed in b, tested on b, best first.

    A rule is executed on at most `tokens` tokens of report documents against what b's feature fires on, with the scorer that
    tests b's own labels. Raises LeakError if a document that the matches were chosen on would be among those tested on, and
    what `share_tokens` raises.
    """
    matched = matching.of("a").filter(pl.col("status").is_in(["kept", "changed"]))
    partner: dict[int, int] = dict(zip(matched["feature"].to_list(), matched["nearest"].to_list(), strict=True))
    labels = [replace(label, feature=partner[label.feature]) for label in shown_labels(a, list(partner))]
    if not labels:
        return pl.DataFrame(schema=TRANSFER_SCHEMA)
    tested = _tested(a, b, labels, matching, tokens)
    pairs = matched.select("correlation", feature_a="feature", feature_b="nearest", match="status")
    given = pl.DataFrame(
        {"feature_b": [label.feature for label in labels], "method": [label.method for label in labels]},
        schema={"feature_b": pl.Int64, "method": pl.String},
    )
    of_a = a.rows.select("label", feature_a=pl.col("feature").cast(pl.Int64), f1_on_a="f1")
    of_b = b.rows.select(feature_b=pl.col("feature").cast(pl.Int64), label_b="label", f1_b="f1")
    table = given.join(pairs, on="feature_b").join(of_a, on="feature_a").join(of_b, on="feature_b")
    table = table.join(tested, on="feature_b", how="left").with_columns(pl.col("outcome").fill_null("not_tested"))
    table = table.select(pl.col(name).cast(kind) for name, kind in TRANSFER_SCHEMA.items())
    return table.sort("f1", "correlation", descending=True, nulls_last=True)


def _tested(a: OpenSae, b: OpenSae, labels: Sequence[Label], matching: Matching, tokens: int) -> pl.DataFrame:
    """One row per label that has a rule, tested on the feature of b that it names: feature_b, outcome, documents, _MEASURED,
    shuffled_f1."""
    shared = share_tokens(a, b, splits=TESTED_ON, tokens=tokens)
    leaked = matching.documents & set(shared.documents)
    if leaked:
        raise LeakError(
            f"{len(leaked)} documents that matches were chosen on would test their labels, such as {min(leaked)}; match on explain and select"
        )
    units = Units(shared.sample, b.subject)
    rows = execute_rules(units, shared.firings(shared.b), labels, neighbours=None, min_documents=MIN_DOCUMENTS, seed=SEED)
    table = score_table(rows).with_columns(feature_b=pl.col("feature").cast(pl.Int64))
    shuffled = arm(table, "shuffled").select("feature_b", shuffled_f1="f1")
    mine = own(table).select("feature_b", "documents", *_MEASURED, outcome="status")
    return mine.join(shuffled, on="feature_b", how="left")
