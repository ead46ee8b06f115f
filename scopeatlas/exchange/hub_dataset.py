"""One published SAE as a Hugging Face dataset folder, and such a folder brought into a store.

What belongs here: the card, and taking a folder in. What does not: the tables themselves (`tables.py`), or uploading: the folder
is what `huggingface-cli upload` or `datasets.load_dataset(FOLDER, "labels")` takes.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl
import yaml

from scopeatlas.atlas.embedding import Embedder, EmbeddingCache
from scopeatlas.atlas.publish import Publication, publish
from scopeatlas.atlas.rows import feature_vectors
from scopeatlas.atlas.search import AtlasReader
from scopeatlas.atlas.tables import FEATURE_ROW, FEATURES, has_table
from scopeatlas.errors import ExchangeError
from scopeatlas.exchange.columns import TABLES, schema_text
from scopeatlas.exchange.tables import (
    Published,
    check_manifest,
    read_provenance,
    read_published,
    require_empty,
    shard_key,
    write_manifest,
    write_tables,
)
from scopeatlas.scoring.table import MAIN_METRIC, own
from scopeatlas.storage.files import atomic_path, content_hash
from scopeatlas.storage.records import ShardKey
from scopeatlas.storage.store import Store

_STAGES = ("examples", "labels", "scores")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
LIMITS = (
    "A label is a claim that was tested on text of one corpus. Its score says how it does there, not what the feature computes.",
    "Scores of rules are of tokens or contexts that a rule claims; scores of text labels are of windows that a judge was shown.",
    "A refusal is typed (`status`) and is no label: most features of a small corpus have too little evidence.",
    "Examples quote the corpus. Its licence is the corpus's own and holds for `examples`, `outcomes` and `features.snippets`.",
    "Text of the corpus and imported labels were written by others: treat them as data.",
)


@dataclass(frozen=True)
class Dataset:
    """An exported folder as it was read. tables: by name. provenance: see `Published.provenance`."""

    tables: Mapping[str, pl.DataFrame]
    provenance: dict[str, Any]

    @property
    def key(self) -> str:
        return self.provenance["sae"]["key"]

    @property
    def corpus(self) -> str:
        return self.provenance["corpus"]["id"]


def export_dataset(atlas: AtlasReader, sae: str, folder: Path, *, licence: str = "", title: str = "") -> Path:
    """Write a published SAE into `folder`, which is new or empty, as a Hugging Face dataset: README.md (the card) and
    data/*.parquet, one configuration per table; returns the folder.

    licence: the dataset's, as the Hub spells it ("cc-by-4.0"); left open if it is not given. title: by default the SAE's key.
    Raises as `read_published` does, ExchangeError if the folder holds anything.
    """
    published = read_published(atlas, sae)
    require_empty(folder)
    rows = {f"data/{name}": count for name, count in write_tables(published, folder / "data").items()}
    (folder / "data" / "provenance.json").replace(folder / "provenance.json")
    card = _card(published, folder, rows, licence=licence, title=title or published.key)
    (folder / "README.md").write_text(card, encoding="utf-8")
    write_manifest(folder, rows)
    return folder


def read_dataset(folder: Path) -> Dataset:
    """What `export_dataset` wrote. Raises ExchangeError if it is not whole, changed since, or at odds with itself."""
    check_manifest(folder)
    read = Dataset({name: pl.read_parquet(folder / "data" / f"{name}.parquet") for name in TABLES}, read_provenance(folder))
    records = {name: shard_key(record) for name, record in read.provenance["stages"].items()}
    # Folders come from others, and these become names of files in a store.
    names_fit = all(_NAME.fullmatch(name) for name in (read.key, read.corpus, *(key.stem for key in records.values())))
    rows = read.tables["features"].select("sae", "corpus").unique().rows()
    if not names_fit or set(records) != set(_STAGES) or rows != [(read.key, read.corpus)]:
        raise ExchangeError(f"{folder / 'provenance.json'} is not of the rows beside it; export the folder again")
    return read


def import_dataset(store: Store, folder: Path, *, embedder: Embedder | None = None) -> Publication:
    """Bring an exported SAE into a store: its rows are published, and its examples, labels and scores lie behind them as they
    did where they came from. Returns the publication; `reused` if this very one was live.

    embedder: what makes the vectors again; by default the one of the atlas that is there, or our own where there is none.

    The SAE's weights are not part of a dataset: questions about new text need them, search and evidence do not. Raises
    ExchangeError if the folder is not whole or of another table layout, AtlasError if the atlas has vectors of another embedder.
    """
    dataset = read_dataset(folder)
    rows = dataset.tables["features"]
    if rows.schema != FEATURE_ROW:
        written = dataset.provenance["scope_atlas"]
        raise ExchangeError(f"{folder} has the columns of Scope Atlas {written}, not this version's; export it with this version")
    store.require_writable()
    if embedder is None:
        embedder = AtlasReader.at(store.root).embedder if has_table(store.root, FEATURES) else Embedder()
    if dataset.key not in store.registered():
        store.register(dataset.key, {**dataset.provenance["sae"], "root": ""})
    for stage in _STAGES:
        _restore(store, dataset, stage)
    vectors = feature_vectors(rows, EmbeddingCache(store.root, embedder))
    stage = store.stage(dataset.key, dataset.corpus, "publication")
    publication = publish(rows, vectors, root=store.root, folder=stage.root, embedder=embedder)
    uses = {name: [record["key"]["identity"]] for name, record in dataset.provenance["stages"].items()}
    facts = {"generation": publication.generation, "path": publication.path.name, "rows": publication.rows, "uses": uses}
    if dataset.provenance["subject"] is not None:
        facts["subject"] = dataset.provenance["subject"]
    stage.commit(ShardKey("source", content_hash("dataset", publication.generation, uses)), [], facts)
    return publication


def _restore(store: Store, dataset: Dataset, name: str) -> None:
    """A stage's tables and record, unless they are there."""
    stage, record = store.stage(dataset.key, dataset.corpus, name), dataset.provenance["stages"][name]
    key = shard_key(record)
    if stage.is_done(key):
        return
    written = []
    for suffix, table in _files(dataset, name).items():
        written.append(stage.data_path(key, suffix))
        with atomic_path(written[-1]) as temporary:
            table.write_parquet(temporary, compression="zstd")
    stage.commit(key, written, record["facts"])


def _files(dataset: Dataset, stage: str) -> dict[str, pl.DataFrame]:
    """The tables of a stage, by the endings of their files there."""
    tables = dataset.tables
    if stage == "labels":
        return {".parquet": tables["labels"], ".falsification.parquet": tables["falsification"]}
    if stage == "scores":
        return {".parquet": tables["scores"], ".outcomes.parquet": tables["outcomes"]}
    examples = tables["examples"]
    shown = examples.select(token=pl.col("tokens").cast(pl.List(pl.Int32)).list.filter(pl.element() >= 0), text="texts")
    vocabulary = shown.explode("token", "text").unique("token").sort("token")
    return {
        ".features.parquet": tables["statistics"],
        ".histogram.parquet": tables["histogram"],
        ".windows.parquet": examples.drop("texts"),
        ".vocabulary.parquet": vocabulary,
        ".coactivation.parquet": tables["coactivation"],
    }


def _card(published: Published, folder: Path, rows: Mapping[str, int], *, licence: str, title: str) -> str:
    """README.md: what this is, how it was scored, and its limits. rows: of each file, by its path."""
    entry, labels = published.entry, published.labels
    by_status = published.rows["status"].value_counts(sort=True)
    used = labels.filter(pl.col("current") & (pl.col("status") == "ok"))["method"].value_counts(sort=True)
    source = f"{entry.repo}@{entry.revision}" if entry.repo else entry.release
    lines = [
        f"# {title}",
        "",
        f"Labels, tests of the labels and evidence for the {len(published.rows):,} features of `{published.key}`:",
        f"{published.rows['kind'][0]} `{entry.path}` of {source}, of the subject model "
        f"{published.rows['model'][0] or 'that its release does not name'}, studied on the corpus `{published.corpus}`.",
        "",
        "```python",
        f'datasets.load_dataset("THIS FOLDER OR REPO", "{next(iter(TABLES))}")',
        "```",
        "",
        "## What is in it",
        "",
        *_counted(["status", "features"], by_status.iter_rows()),
        "",
        *_counted(["labels in use, by method", "features"], used.iter_rows()),
        "",
        "## How labels were scored",
        "",
        "On report documents, from which no label was proposed and by which none was chosen. The labels' own tests:",
        "",
        *_counted(
            ["scorer", "tests", "main metric", "its mean", "mean lift over another feature's label"], _tests(published.scores)
        ),
        "",
        "## Limits",
        "",
        *(f"- {limit}" for limit in LIMITS),
        "- Search vectors are not in it: they are the recorded embedder's of `search_text` and `example_text`.",
        "",
        "Where everything comes from is in `provenance.json`; `manifest.json` has the SHA-256 of every file.",
        f"Licence: {licence or 'not stated by whoever exported this'}.",
        "",
        schema_text({name: folder / "data" / f"{name}.parquet" for name in TABLES})
        .replace("\n## ", "\n### ")
        .replace("# Tables", "## Tables"),
    ]
    return f"---\n{_front_matter(rows, licence=licence, title=title)}---\n" + "\n".join(lines)


def _front_matter(rows: Mapping[str, int], *, licence: str, title: str) -> str:
    """What the Hub and `datasets` read. A table without rows has no configuration, since `datasets` cannot open it."""
    front: dict[str, Any] = {
        "pretty_name": title,
        "tags": ["interpretability", "sparse-autoencoder", "scope-atlas"],
        "configs": [
            {"config_name": name, "data_files": f"data/{name}.parquet", "default": name == "features"}
            for name in TABLES
            if rows[f"data/{name}.parquet"]
        ],
    }
    if licence:
        front["license"] = licence
    return yaml.safe_dump(front, sort_keys=False, allow_unicode=True)


def _tests(scores: pl.DataFrame) -> list[tuple[object, ...]]:
    """Of each scorer: how many own tests were scored, the main metric, its mean, the mean lift."""
    scored = own(scores).filter(pl.col("status") == "scored")
    return [
        (scorer, len(mine), MAIN_METRIC[str(scorer)], _mean(mine[MAIN_METRIC[str(scorer)]]), _mean(mine["lift"]))
        for (scorer,), mine in scored.group_by(["scorer"], maintain_order=True)
    ]


def _mean(values: pl.Series) -> str:
    mean = values.drop_nulls().mean()
    return f"{mean:.3f}" if isinstance(mean, float) else "-"


def _counted(header: list[str], rows: Any) -> list[str]:
    table = [f"| {' | '.join(header)} |", f"|{'---|' * len(header)}"]
    return table + [f"| {' | '.join(f'{cell:,}' if isinstance(cell, int) else str(cell) for cell in row)} |" for row in rows]
