"""From an SAE's finished stages to the rows that the atlas holds.

What belongs here: assembling rows and the text that is embedded. What does not: the tables (`tables.py`), or writing
them (`publish.py`).
"""

from collections import Counter
from pathlib import Path

import polars as pl

from scopeatlas.atlas.tables import FEATURE_ROW
from scopeatlas.dictionaries.releases import SaeEntry
from scopeatlas.dictionaries.sparse import SparseDictionary
from scopeatlas.mining.examples import FeatureExamples, read_examples
from scopeatlas.mining.windows import mark
from scopeatlas.subject.loading import SubjectModel
from scopeatlas.subject.vocabulary import token_texts

SNIPPETS = 3
TRIGGER_TOKENS = 5
SHOWN_PROMOTED = 5
AROUND_PEAK = 8
"""Tokens on either side of a peak that go into the text that is embedded."""


def feature_rows(
    entry: SaeEntry,
    dictionary: SparseDictionary,
    corpus_id: str,
    subject: SubjectModel,
    examples: FeatureExamples,
    labels: pl.DataFrame,
    scores: pl.DataFrame,
) -> pl.DataFrame:
    """One FEATURE_ROW per feature. labels: the current ones. scores: of rule labels; null where there is none.

    Evidence shown is held out where there is any: snippets come from report documents first.
    """
    shown = _evidence(examples.examples)
    scored = scores.select("feature", "f1", "f1_low", "f1_high", "precision", "recall", "balanced_accuracy", "shuffled_f1")
    labelled = labels.select("feature", "status", "method", "label", "reads", "writes")
    table = examples.features.join(labelled, on="feature", how="left").join(scored, on="feature", how="left")
    table = table.join(shown, on="feature", how="left")
    promoted, suppressed = (_token_lists(table[name], subject) for name in ("promoted", "suppressed"))
    empty = pl.lit([], dtype=pl.List(pl.String))
    is_rule = (pl.col("method") == "rule") & (pl.col("status") == "ok")
    rows = table.with_columns(
        key=pl.concat_str(pl.lit(f"{entry.key}/"), pl.col("feature")),
        release=pl.lit(entry.release),
        sae=pl.lit(entry.key),
        model=pl.lit(dictionary.model_name),
        corpus=pl.lit(corpus_id),
        kind=pl.lit(dictionary.kind),
        site=pl.lit(str(dictionary.site_in)),
        layer=pl.lit(dictionary.site_in.layer),
        method=pl.when(pl.col("status") == "ok").then(pl.col("method")).otherwise(pl.lit("")),
        trigger_tokens=pl.col("trigger_tokens").fill_null(empty),
        snippets=pl.col("snippets").fill_null(empty),
        promoted=promoted,
        suppressed=suppressed,
        report_documents=pl.col("report_documents"),
        # A score belongs to the rule; a feature whose current label is an LLM's has none yet.
        **{name: pl.when(is_rule).then(pl.col(name)) for name in scored.columns if name != "feature"},
    )
    rows = rows.with_columns(search_text=_search_texts(rows))
    return rows.select(pl.col(name).cast(dtype) for name, dtype in FEATURE_ROW.items())


def _evidence(path: Path) -> pl.DataFrame:
    """feature, snippets, trigger_tokens (texts at the strongest peaks, most frequent first), around (for embedding)."""
    windows = read_examples(path).filter(pl.col("kind") == "top")
    held_out_first = pl.col("split").replace_strict({"report": 0, "select": 1, "explain": 2}, return_dtype=pl.Int8)
    ordered = windows.with_columns(order=held_out_first).sort("feature", "order", "rank")
    rows = []
    for (feature,), mine in ordered.group_by(["feature"], maintain_order=True):
        triggers: Counter[str] = Counter()
        snippets, around = [], []
        for window in mine.iter_rows(named=True):
            tokens, at = window["texts"], window["peak_at"]
            triggers[tokens[at].strip() or tokens[at]] += 1
            if len(snippets) < SNIPPETS:
                near = slice(max(0, at - AROUND_PEAK), at + AROUND_PEAK + 1)
                snippets.append(mark(tokens, window["activations"]))
                around.append(" ".join("".join(tokens[near]).split()))
        rows.append((feature, snippets, [token for token, _ in triggers.most_common(TRIGGER_TOKENS)], around))
    schema = {
        "feature": pl.UInt32,
        "snippets": pl.List(pl.String),
        "trigger_tokens": pl.List(pl.String),
        "around": pl.List(pl.String),
    }
    return pl.DataFrame(rows, schema=schema, orient="row")


def _token_lists(ids: pl.Series, subject: SubjectModel) -> pl.Series:
    known = ids.explode().drop_nulls().unique().to_list()
    texts = dict(zip(known, token_texts(subject.tokenizer, known), strict=True))
    return pl.Series([[texts[i] for i in row[:SHOWN_PROMOTED]] for row in ids.to_list()], dtype=pl.List(pl.String))


def _search_texts(rows: pl.DataFrame) -> pl.Series:
    """What is embedded: the label, the tokens it fires on, and what stands around its strongest held-out peaks."""
    texts = []
    for row in rows.select("label", "trigger_tokens", "around").iter_rows(named=True):
        parts = [row["label"], ", ".join(row["trigger_tokens"]), " ... ".join(row["around"] or [])]
        texts.append(". ".join(part for part in parts if part))
    return pl.Series(texts, dtype=pl.String)
