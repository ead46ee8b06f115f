"""From an SAE's finished stages to the rows that the atlas holds.

What belongs here: assembling rows, and which of their texts are embedded. What does not: the tables (`tables.py`), or
writing them (`publish.py`).
"""

import re
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
import polars as pl

from scopeatlas.atlas.embedding import EmbeddingCache
from scopeatlas.atlas.tables import FEATURE_ROW, SCORES, VECTORS, feature_name
from scopeatlas.atlas.terms import stop_words
from scopeatlas.dictionaries.releases import SaeEntry
from scopeatlas.dictionaries.sparse import SparseDictionary
from scopeatlas.mining.examples import FeatureExamples, read_examples
from scopeatlas.mining.windows import mark
from scopeatlas.storage.uris import Location
from scopeatlas.subject.loading import SubjectModel
from scopeatlas.subject.sites import Site
from scopeatlas.subject.vocabulary import token_texts

SNIPPETS = 3
TRIGGER_TOKENS = 5
SHOWN_PROMOTED = 5
STRONGEST = 10
"""Strongest peaks that trigger tokens are counted over."""
CONSISTENT_SHARE = 0.5
TRIGGER_WORDS, SHARED_WORDS, SHARED_BY = 6, 4, 5
"""At most so many words that a feature fires on, so many that windows share, and by how many of them."""
PUNCTUATION = ".,;:!?()[]{}'\"*=-–"
_CONTENT_WORD = re.compile(r"[^\W\d_]{3,}")
UNEVIDENCED = ("dead", "rare", "too_few_documents")


def feature_rows(
    entry: SaeEntry,
    dictionary: SparseDictionary,
    corpus_id: str,
    subject: SubjectModel,
    examples: FeatureExamples,
    labels: pl.DataFrame,
    scores: pl.DataFrame,
) -> pl.DataFrame:
    """One FEATURE_ROW per feature. labels: the current ones. scores: their tests, as `scoring.table.published` gives them.

    Evidence shown is held out where there is any: snippets come from report documents first.
    """
    shown = _evidence(examples.examples)
    scored = scores.select("feature", "scorer", "unit", *SCORES)
    labelled = labels.select("feature", "status", "method", "label_id", "label", "reads", "writes")
    table = examples.features.join(labelled, on="feature", how="left").join(scored, on="feature", how="left")
    table = table.join(shown, on="feature", how="left")
    promoted, suppressed = (_token_lists(table[name], subject) for name in ("promoted", "suppressed"))
    empty, none = pl.lit([], dtype=pl.List(pl.String)), pl.lit([], dtype=pl.List(pl.Float32))
    is_ok = pl.col("status") == "ok"
    reads = pl.Series([str(site) for site in dictionary.sites_in], dtype=pl.String)
    rows = table.with_columns(
        release=pl.lit(entry.release),
        sae=pl.lit(entry.key),
        model=pl.lit(dictionary.model_name),
        corpus=pl.lit(corpus_id),
        kind=pl.lit(dictionary.kind),
        site=reads.gather(table["feature"] // dictionary.features_per_layer),
        site_out=pl.lit(sites_text(dictionary.sites_out)),
        method=pl.when(is_ok).then(pl.col("method")).otherwise(pl.lit("")),
        label_id=pl.when(is_ok).then(pl.col("label_id")).otherwise(pl.lit("")),
        label=pl.when(is_ok).then(pl.col("label")).otherwise(pl.lit("")),
        scorer=pl.col("scorer").fill_null(""),
        unit=pl.col("unit").fill_null(""),
        trigger_tokens=pl.col("trigger_tokens").fill_null(empty),
        trigger_shares=pl.col("trigger_shares").fill_null(none),
        snippets=pl.col("snippets").fill_null(empty),
        promoted=promoted,
        suppressed=suppressed,
    )
    has_evidence = ~pl.col("status").is_in(UNEVIDENCED)
    rows = rows.with_columns(
        key=pl.format("{}/{}", "sae", feature_name()),
        search_text=_search_texts(rows),
        example_text=pl.when(has_evidence).then(pl.col("example_text").fill_null("")).otherwise(pl.lit("")),
    )
    return rows.select(pl.col(name).cast(dtype) for name, dtype in FEATURE_ROW.items())


def feature_vectors(
    rows: pl.DataFrame, cache: EmbeddingCache, *, progress: Callable[[int, int], None] | None = None
) -> dict[str, np.ndarray]:
    """The VECTORS of rows, float32 [rows, dim] each; `progress(done, total)` counts distinct texts."""
    vectors = cache.embed([text for name in VECTORS.values() for text in rows[name]], progress=progress)
    return dict(zip(VECTORS, np.split(vectors, len(VECTORS)), strict=True))


def sites_text(sites: Sequence[Site]) -> str:
    """Sites as one hook string, which `parse_hook_points` reads back: several of one module as model.layers.{5,9}.output."""
    if len(sites) == 1:
        return str(sites[0])
    layers = ",".join(str(site.layer) for site in sites)
    return str(sites[0]).replace(f".{sites[0].layer}.", f".{{{layers}}}.", 1)


def _evidence(path: Location) -> pl.DataFrame:
    """Per feature: snippets (held out first) and the same unmarked as one text, trigger_tokens (at the strongest peaks of
    any split, most frequent first) with the share of those peaks that each has, and the words that describe it."""
    windows = read_examples(path).filter(pl.col("kind") == "top")
    held_out_first = pl.col("split").replace_strict({"report": 0, "select": 1, "explain": 2}, return_dtype=pl.Int8)
    shown = windows.sort("feature", held_out_first, "rank").group_by("feature", maintain_order=True).head(SNIPPETS)
    strongest = windows.sort("feature", "peak", "context_id", descending=[False, True, False])
    strongest = strongest.group_by("feature", maintain_order=True).head(STRONGEST)
    snippets: dict[int, list[str]] = {}
    unmarked: dict[int, list[str]] = {}
    for feature, texts, activations in shown.select("feature", "texts", "activations").iter_rows():
        snippets.setdefault(feature, []).append(mark(texts, activations))
        unmarked.setdefault(feature, []).append(mark(texts, activations, marks=("", "")))
    rows = []
    for (feature,), mine in strongest.group_by(["feature"], maintain_order=True):
        peaks = list(zip(mine["texts"].to_list(), mine["peak_at"].to_list(), strict=True))
        triggers = Counter(tokens[at].strip() or tokens[at] for tokens, at in peaks)
        most, counts = zip(*triggers.most_common(TRIGGER_TOKENS), strict=True)
        shares = [count / len(peaks) for count in counts]
        text = "\n".join(unmarked.get(feature, []))
        rows.append((feature, snippets.get(feature, []), text, list(most), shares, described_by(peaks)))
    schema = {"feature": pl.UInt32, "snippets": pl.List(pl.String), "example_text": pl.String}
    schema |= {"trigger_tokens": pl.List(pl.String), "trigger_shares": pl.List(pl.Float32), "words": pl.List(pl.String)}
    return pl.DataFrame(rows, schema=schema, orient="row")


def described_by(peaks: list[tuple[list[str], int]]) -> list[str]:
    """Words that describe a feature, from the windows (token texts, place of the peak) of its strongest peaks.

    First the words it fires on: those it fires on repeatedly, if they make up half of the peaks; then content words that several windows
    share. What merely stands near a single peak says more about that document than about the feature.
    """
    fired = Counter(word for tokens, at in peaks if (word := word_around(tokens, at).casefold()))
    enough = CONSISTENT_SHARE * len(peaks)
    repeated = {word: count for word, count in fired.items() if count > 1 and word not in stop_words()}
    is_consistent = sum(repeated.values()) >= enough
    token, most = Counter(tokens[at].strip().casefold() for tokens, at in peaks).most_common(1)[0] if peaks else ("", 0)
    if is_consistent or most < enough or not token:
        on = [word for word, _ in Counter(repeated if is_consistent else fired).most_common(TRIGGER_WORDS)]
    else:
        on = [token]  # one piece of many words, as "al" in alga and albedo: the words themselves would mislead
    held = Counter(word for tokens, _ in peaks for word in sorted(set(_CONTENT_WORD.findall("".join(tokens).casefold()))))
    shared = [
        w for w, count in held.most_common(3 * SHARED_WORDS) if count >= SHARED_BY and w not in on and w not in stop_words()
    ]
    # Where nothing repeats, stop words stay in: they are how a feature that fires here and there comes to match nothing.
    return [*on, *shared[:SHARED_WORDS]]


def word_around(tokens: Sequence[str], at: int) -> str:
    """The whole word that the token at `at` is part of, without surrounding space or punctuation; "" if it is none."""
    first, last = at, at
    while first > 0 and not tokens[first].startswith(" ") and tokens[first][:1].isalnum() and tokens[first - 1][-1:].isalnum():
        first -= 1
    while last + 1 < len(tokens) and tokens[last + 1][:1].isalnum() and tokens[last][-1:].isalnum():
        last += 1
    return "".join(tokens[first : last + 1]).strip().strip(PUNCTUATION)


def _token_lists(ids: pl.Series, subject: SubjectModel) -> pl.Series:
    known = ids.explode().drop_nulls().unique().to_list()
    texts = dict(zip(known, token_texts(subject.tokenizer, known), strict=True))
    return pl.Series([[texts[i] for i in row[:SHOWN_PROMOTED]] for row in ids.to_list()], dtype=pl.List(pl.String))


def _search_texts(rows: pl.DataFrame) -> pl.Series:
    """The label, and the words that describe the feature.

    Empty for a feature that was refused for want of evidence: a handful of contexts describes nothing.
    """
    texts = []
    for row in rows.select("status", "label", "words").iter_rows(named=True):
        parts = [row["label"], ", ".join(row["words"] or [])]
        texts.append("" if row["status"] in UNEVIDENCED else ": ".join(part for part in parts if part))
    return pl.Series(texts, dtype=pl.String)
