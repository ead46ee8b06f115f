"""What an SAE's features were said to be before, and going back to it.

What belongs here: the ledger read as history, and rolling back. What does not: publishing (`publish.py`), or which label is
current (`labels/choosing.py`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, get_args

import polars as pl

from scopeatlas.atlas.publish import Publication, atlas_lock, generation_path, republish
from scopeatlas.atlas.tables import GENERATION, PUBLICATIONS, has_table, open_table
from scopeatlas.errors import NotReadyError, UnknownSaeError
from scopeatlas.hypotheses.labels import LABEL_SCHEMA
from scopeatlas.scoring.table import SCORE_SCHEMA, Scorer, own
from scopeatlas.storage.files import read_json_if_there, write_json
from scopeatlas.storage.store import Store
from scopeatlas.storage.uris import readable

SAID = ("status", "method", "label_id", "label", "reads", "writes", "f1", "f1_low", "f1_high", "lift", "scorer")
"""What a published row says of a feature and may say otherwise in the next generation."""
_FARED = ("scorer", "f1", "f1_low", "f1_high", "balanced_accuracy", "lift")


@dataclass(frozen=True)
class FeatureHistory:
    """One feature over time.

    published: a row for each time that the SAE was published (or rolled back), oldest first: published_at (UTC), generation,
    corpus, live, then SAID as that generation has it; null where the generation was pruned. labels: every version of every
    label that the feature was ever given, refusals too (LABEL_SCHEMA and corpus), and how each fared where it was tested:
    scorer, f1, f1_low, f1_high, balanced_accuracy, lift; `current` is of the newest labels of its corpus.
    """

    key: str
    published: pl.DataFrame
    labels: pl.DataFrame

    def as_dict(self) -> dict[str, Any]:
        return {"feature": self.key, "published": self.published.to_dicts(), "labels": self.labels.to_dicts()}

    def _repr_html_(self) -> str:
        from scopeatlas.rendering.html import table

        lived = self.published.select(
            "published_at", "generation", "live", "status", "method", "label", "f1", "f1_low", "f1_high"
        )
        given = self.labels.select("method", "version", "status", "current", "label", "scorer", "f1", "lift")
        return table(lived.columns, lived.iter_rows(), caption=self.key) + table(given.columns, given.iter_rows())


def feature_history(store: Store, sae: str, feature: int, *, key: str) -> FeatureHistory:
    """The history of a feature by the SAE's whole key and its flat id. key: its name in the atlas."""
    lines = ledger(store, sae)
    live = lines[-1:][GENERATION].to_list()
    rows = [_as_published(store, line, feature) for line in lines.iter_rows(named=True)]
    schema = {"published_at": pl.Datetime("us", "UTC"), GENERATION: pl.String, "corpus": pl.String}
    texts = {name: pl.String for name in SAID} | dict.fromkeys(("f1", "f1_low", "f1_high", "lift"), pl.Float32)
    published = pl.DataFrame(rows, schema=schema | texts)
    # A generation that was rolled back to stands in two lines; only the last of them is what readers see.
    is_last = pl.int_range(pl.len()) == pl.len() - 1
    published = published.with_columns(live=is_last & pl.col(GENERATION).is_in(live)).select(*schema, "live", *texts)
    tables = [_labels(store, sae, corpus, feature) for corpus in store.corpora_of(sae)]
    return FeatureHistory(key, published, pl.concat(tables) if tables else _labelled([]))


def ledger(store: Store, sae: str) -> pl.DataFrame:
    """Every publication of an SAE, oldest first (PUBLICATION_ROW)."""
    lines = pl.from_arrow(open_table(store.root, PUBLICATIONS).to_arrow())
    assert isinstance(lines, pl.DataFrame)  # a table gives a frame; only an array would give a series
    return lines.filter(sae=sae).sort("table_version", "published_at")


def roll_back(store: Store, sae: str, *, to: str | None = None) -> Publication:
    """Make an SAE's previous generation live again, or the one whose name begins with `to`; no other SAE is touched.

    Previous is what was live before, roll-backs and what was rolled back left out, so that a second call goes further back.
    What was rolled back stays away: `index_features` does not publish that very generation again by itself, but a newer one, made
    of other labels or scores, it does. Killed at any point, the next call finishes the work. Raises UnknownSaeError if
    the SAE was never published, NotReadyError if there is no such generation or it was pruned.
    """
    lines = ledger(store, sae) if has_table(store.root, PUBLICATIONS) else pl.DataFrame()
    if lines.is_empty():
        raise UnknownSaeError(f"{sae} was never published in {store.root}; `scopeatlas ls` lists what is")
    live = lines[GENERATION][-1]
    target = _target(sae, lines[GENERATION].to_list(), refused_generations(store, sae), to)
    corpus = lines.filter(pl.col(GENERATION) == target)["corpus"][-1]
    folder = store.stage(sae, corpus, "publication").root
    if not generation_path(folder, target).exists():
        raise NotReadyError(
            f"generation {target} of {sae} was pruned; publish the SAE again with the settings that it was made by"
        )
    with atlas_lock(store.root, f"rollback {sae}"):
        # Refused first: a run that publishes between the two would otherwise bring it back.
        refused = [g for g in {*refused_generations(store, sae), live} if g != target]
        write_json(_refusals(store, sae), {"refused": sorted(refused), "to": target, "at": datetime.now(UTC).isoformat()})
        return republish(target, root=store.root, folder=folder)


def refused_generations(store: Store, sae: str) -> list[str]:
    """The generations of an SAE that somebody rolled back and did not call for since."""
    return (read_json_if_there(_refusals(store, sae)) or {}).get("refused", [])


def _target(sae: str, order: list[str], refused: list[str], to: str | None) -> str:
    """The generation to go back to, of those in `order` of publication, the live one last."""
    every = list(dict.fromkeys(order))
    if to is None:
        before = [generation for generation in order if generation != order[-1] and generation not in refused]
        if not before:
            others = [generation for generation in every if generation != order[-1]]
            listed = f"; others: {', '.join(others)} (--to)" if others else ""
            raise NotReadyError(f"{sae} has no generation before {order[-1]}{listed}")
        return before[-1]
    found = [generation for generation in every if to and generation.startswith(to)]
    if len(found) != 1:
        raise NotReadyError(f"{sae} has {len(found) or 'no'} generations that begin with {to!r}; it has {', '.join(every)}")
    return found[0]


def _refusals(store: Store, sae: str):
    return store.root / "saes" / sae / "rollback.json"


def _as_published(store: Store, line: dict[str, Any], feature: int) -> dict[str, Any]:
    told = {name: line[name] for name in ("published_at", GENERATION, "corpus")}
    path = generation_path(store.stage(line["sae"], line["corpus"], "publication").root, line[GENERATION])
    if not path.exists():
        return told | dict.fromkeys(SAID)
    rows = pl.scan_parquet(readable(path))
    present = [name for name in SAID if name in rows.collect_schema()]
    row = rows.filter(pl.col("feature") == feature).select(present).collect()
    return told | dict.fromkeys(SAID) | (row.row(0, named=True) if row.height else {})


def _labels(store: Store, sae: str, corpus: str, feature: int) -> pl.DataFrame:
    """Every label of one corpus, each once, as the labels written last tell it, with its test."""
    tables = _tables(store, sae, corpus, "labels", feature)
    if not tables:
        return _labelled([])
    newest = tables[-1]["label_id"].to_list()
    every = pl.concat(tables).unique("label_id", keep="last", maintain_order=True)
    current = pl.col("current") & pl.col("label_id").is_in(newest)
    scores = _tables(store, sae, corpus, "scores", feature)
    return _labelled([every.with_columns(current=current, corpus=pl.lit(corpus))], [_of_reads(table) for table in scores])


def _of_reads(scores: pl.DataFrame) -> pl.DataFrame:
    """One test of what each label says the feature reads: the rule executed, else a judge's, else retrieval."""
    order = pl.col("scorer").replace_strict(
        {scorer: place for place, scorer in enumerate(get_args(Scorer))}, return_dtype=pl.Int8
    )
    tests = own(scores).filter(pl.col("claim") == "reads").sort(order)
    return tests.unique("label_id", keep="first", maintain_order=True).select("label_id", *_FARED)


def _labelled(tables: list[pl.DataFrame], tests: Sequence[pl.DataFrame] = ()) -> pl.DataFrame:
    labels = pl.concat(tables) if tables else pl.DataFrame(schema=LABEL_SCHEMA | {"corpus": pl.String})
    schema = {name: SCORE_SCHEMA[name] for name in ("label_id", *_FARED)}
    fared = pl.concat([pl.DataFrame(schema=schema), *tests]).unique("label_id", keep="last")
    return labels.join(fared, on="label_id", how="left", maintain_order="left")


def _tables(store: Store, sae: str, corpus: str, stage: str, feature: int) -> list[pl.DataFrame]:
    """The feature's rows in every table that a stage ever wrote and that is still there, the oldest first."""
    folder = store.stage(sae, corpus, stage)
    paths = [folder.data_path(r.key, ".parquet") for r in folder.records() if r.key.name == stage]
    paths = sorted((path for path in paths if path.exists()), key=lambda path: path.stat().st_mtime_ns)
    tables = [pl.scan_parquet(readable(path)).filter(pl.col("feature") == feature).collect() for path in paths]
    return [table for table in tables if table.height]
