"""One published SAE as a handful of parquet files with nothing lost, and these read back.

What belongs here: which tables there are, what their columns mean, the manifest that says a folder is whole. What does not:
a Hugging Face dataset's card and bringing such a folder into a store (`hub_dataset.py`), or other tools' layouts.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from scopeatlas import __version__
from scopeatlas.atlas.search import AtlasReader
from scopeatlas.atlas.stage import live_generation, publication_facts
from scopeatlas.dictionaries.releases import SaeEntry
from scopeatlas.errors import ExchangeError, NotReadyError
from scopeatlas.exchange.columns import TABLES, schema_text
from scopeatlas.mining.examples import FeatureExamples, open_examples, read_examples
from scopeatlas.storage.files import atomic_path, file_sha256, read_json_if_there, write_json
from scopeatlas.storage.records import CommitRecord, ShardKey
from scopeatlas.storage.store import Store
from scopeatlas.storage.uris import readable

MANIFEST = "manifest.json"
FORMAT = 1
"""Of the files; a reader refuses what a newer one wrote."""


@dataclass(frozen=True)
class Published:
    """What a store holds of one published SAE. rows: FEATURE_ROW, by feature. labels: LABEL_SCHEMA, every version. scores:
    SCORE_SCHEMA, controls and all. records: the commit records of the stages that the publication was made from."""

    store: Store
    key: str
    corpus: str
    rows: pl.DataFrame
    labels: pl.DataFrame
    scores: pl.DataFrame
    examples: FeatureExamples
    records: Mapping[str, CommitRecord]

    @property
    def entry(self) -> SaeEntry:
        return SaeEntry.from_json(self.store.entry(self.key))

    @cached_property
    def histograms(self) -> dict[int, tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Of each feature that fires, over all splits: log-spaced bins (ascending), the tokens in each, the contexts whose peak
        is in it; int64 [n] all."""
        table = pl.read_parquet(readable(self.examples.histogram))
        summed = table.group_by("feature", "bin").agg(pl.col("tokens", "contexts").sum()).sort("feature", "bin")
        parts = summed.partition_by("feature", maintain_order=True, as_dict=True)
        return {
            int(feature): (part["bin"].to_numpy().astype(np.int64), part["tokens"].to_numpy(), part["contexts"].to_numpy())
            for (feature,), part in parts.items()
        }

    def side_table(self, stage: str, suffix: str) -> pl.DataFrame:
        """Another table of a stage than its main one."""
        return pl.read_parquet(
            readable(self.store.stage(self.key, self.corpus, stage).data_path(self.records[stage].key, suffix))
        )

    def provenance(self) -> dict[str, Any]:
        """Where all of it comes from: hashes, identities, settings and versions, and no path of this machine."""
        corpus = read_json_if_there(self.store.corpus_folder(self.corpus) / "corpus.json") or {}
        facts = publication_facts(self.store, self.key, self.corpus, live_generation(self.store, self.key))
        source = {name: value for name, value in corpus.get("settings", {}).get("source", {}).items() if name != "paths"}
        entry = {name: value for name, value in asdict(self.entry).items() if name != "root"}
        return {
            "scope_atlas": __version__,
            "sae": entry,
            "corpus": {
                "id": self.corpus,
                "settings": {**corpus.get("settings", {}), "source": source},
                "facts": corpus.get("facts", {}),
            },
            "subject": facts.get("subject"),
            "stages": {name: asdict(record) for name, record in self.records.items()},
            "label_versions": {} if self.labels.is_empty() else _counts(self.labels["version"]),
        }


def read_published(atlas: AtlasReader, sae: str) -> Published:
    """The SAE that `sae` (a key, or enough of one) names in an atlas, with all that its publication was made from.

    Raises UnknownSaeError or AtlasError if `sae` names none or several, NotReadyError if the store no longer holds its
    examples, labels or scores.
    """
    from scopeatlas.upkeep import record_in_use

    key, rows = atlas.rows(sae)
    store, corpus = Store(atlas.root), rows["corpus"][0]
    records = {}
    for stage in ("examples", "labels", "scores"):
        record = record_in_use(store, key, corpus, stage)
        if record is None or not store.stage(key, corpus, stage).is_done(record.key):
            raise NotReadyError(f"{atlas.root} holds no {stage} of {key}, so that it cannot be exported; run the pipeline again")
        records[stage] = record
    labels, scores = (
        pl.read_parquet(readable(store.stage(key, corpus, stage).data_path(records[stage].key, ".parquet")))
        for stage in ("labels", "scores")
    )
    examples = open_examples(store, corpus, key, records["examples"].key)
    return Published(store, key, corpus, rows, labels, scores, examples, records)


def export_parquet(atlas: AtlasReader, sae: str, folder: Path) -> Path:
    """Write every table of a published SAE into `folder`, which is new or empty, as parquet; returns the folder.

    SCHEMA.md says what the tables and columns are, provenance.json where they come from, and manifest.json, which is written
    last, how many rows and which SHA-256 each file has: a folder without it is not whole. Vectors are left out: they are the
    recorded embedder's of `search_text` and `example_text`. Raises as `read_published` does, ExchangeError if the folder holds
    anything.
    """
    published = read_published(atlas, sae)
    require_empty(folder)
    rows = write_tables(published, folder)
    (folder / "SCHEMA.md").write_text(schema_text({name: folder / f"{name}.parquet" for name in TABLES}), encoding="utf-8")
    write_manifest(folder, rows)
    return folder


def write_tables(published: Published, folder: Path) -> dict[str, int]:
    """Every table as {name}.parquet, and provenance.json; returns the rows of each file."""
    folder.mkdir(parents=True, exist_ok=True)
    tables = {
        "features": published.rows,
        "labels": published.labels,
        "falsification": published.side_table("labels", ".falsification.parquet"),
        "scores": published.scores,
        "outcomes": published.side_table("scores", ".outcomes.parquet"),
        "examples": read_examples(published.examples.examples),
        "statistics": published.examples.features,
        "histogram": pl.read_parquet(readable(published.examples.histogram)),
        "coactivation": pl.read_parquet(readable(published.examples.partners)),
    }
    counted = {}
    for name, table in tables.items():
        with atomic_path(folder / f"{name}.parquet") as temporary:
            table.write_parquet(temporary, compression="zstd")
        counted[f"{name}.parquet"] = len(table)
    write_json(folder / "provenance.json", published.provenance())
    return counted


def require_empty(folder: Path) -> None:
    """Raises ExchangeError if there is anything at `folder` but an empty folder."""
    if folder.exists() and not folder.is_dir():
        raise ExchangeError(f"{folder} is a file; name a folder")
    if folder.exists() and any(folder.iterdir()):
        raise ExchangeError(f"{folder} holds files already; delete it or name another folder")


def write_manifest(folder: Path, rows: Mapping[str, int], *, name: str = MANIFEST, files: Sequence[Path] | None = None) -> None:
    """Say that an export is whole: bytes, SHA-256 and (of those in `rows`) rows of every file. Written last.

    files: those that the manifest is of, by default all in `folder`; they are named by their paths from there.
    """
    body = {}
    for path in sorted(files or (path for path in folder.rglob("*") if path.is_file())):
        relative = path.relative_to(folder).as_posix()
        counted = {"rows": rows[relative]} if relative in rows else {}
        body[relative] = {"bytes": path.stat().st_size, "sha256": file_sha256(path)} | counted
    write_json(folder / name, {"format": FORMAT, "scope_atlas": __version__, "files": body})


def check_manifest(folder: Path, *, name: str = MANIFEST) -> dict[str, dict[str, Any]]:
    """What a manifest says of each file, all of which are as it says.

    Raises ExchangeError if there is none, a file is missing or changed, or a newer version wrote it.
    """
    manifest = read_json_if_there(folder / name)
    if manifest is None:
        raise ExchangeError(f"{folder} has no {name}: it is no export of Scope Atlas, or one that did not finish; export again")
    if manifest["format"] > FORMAT:
        raise ExchangeError(f"{folder} was written by Scope Atlas {manifest['scope_atlas']}; install that version or a later one")
    for file, facts in manifest["files"].items():
        path = folder / file
        if not path.is_file():
            raise ExchangeError(f"{path} is missing; copy or export the whole folder again")
        if path.stat().st_size != facts["bytes"] or file_sha256(path) != facts["sha256"]:
            raise ExchangeError(f"{path} is not what {name} says; copy or export the whole folder again")
    return manifest["files"]


def _counts(versions: pl.Series) -> dict[str, int]:
    """Labels of each version; the imported ones, which have one version each, together."""
    named = versions.str.replace(r"^(imported:[^:]+):.*$", "${1}")
    return {name: count for name, count in sorted(named.value_counts().iter_rows())}


def shard_key(record: Mapping[str, Any]) -> ShardKey:
    """The key of a record as `provenance` holds it."""
    return ShardKey(record["key"]["name"], record["key"]["identity"])


def read_provenance(folder: Path) -> dict[str, Any]:
    """provenance.json of an exported folder. Raises ExchangeError if it cannot be read."""
    try:
        return json.loads((folder / "provenance.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ExchangeError(f"cannot read {folder / 'provenance.json'}: {error}; export the folder again") from error
