"""Readers during writes: searches in this process while another upserts SAEs and compacts.

    .venv/bin/python -m bench.readers --seconds 120 --folder /tmp/readers

The writer adds an SAE now and then, so that the table outgrows what is searched without an index, EXACT_ROWS, which is set to
--rows here: vector indexes are built, read and trained anew meanwhile.

Every row that is written says of which round it is, in each of its fields; a row read of which two fields name different
rounds is torn. All rows of one SAE are of one round, since they are published at once.
"""

import argparse
import json
import multiprocessing
import tempfile
import time
from dataclasses import asdict, dataclass, field
from itertools import count
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import polars as pl

from bench.machine import machine
from scopeatlas.api import Atlas
from scopeatlas.atlas import indexes
from scopeatlas.atlas.embedding import Embedder
from scopeatlas.atlas.hits import FeatureHit
from scopeatlas.atlas.publish import maintain, publish
from scopeatlas.atlas.search import AtlasReader, SearchBy
from scopeatlas.atlas.tables import FEATURE_ROW, NULLABLE, VECTORS, open_table
from scopeatlas.atlas.tables import FEATURES as TABLE

SAES, FEATURES, DIM = 3, 400, 384
WAYS: tuple[SearchBy, ...] = ("hybrid", "dense", "text", "token")
COMPACT_EVERY = 5
MOST_SAES = 18
"""Enough to train an index of the first SAEs anew (`indexes.GROWTH`)."""
EXACT_ROWS = SAES * FEATURES
"""The first SAE that is added makes an index."""


@dataclass
class Seen:
    """What became of it. errors, torn rows, SAEs of mixed rounds: one line each. trained: the names of the vector indexes that
    there were, which end in the rows that they were trained on. indexed_reads: searches by vector while there were any."""

    reads: int = 0
    rows: int = 0
    writes: int = 0
    generations: int = 0
    errors: list[str] = field(default_factory=list)
    torn: list[str] = field(default_factory=list)
    mixed: list[str] = field(default_factory=list)
    trained: list[str] = field(default_factory=list)
    indexed_reads: int = 0


def features(sae: str, round_number: int) -> tuple[pl.DataFrame, dict[str, np.ndarray]]:
    """An SAE in which every field of every row follows from the round and the feature."""
    said = f"round{round_number}"
    empty: dict[str, Any] = {name: None for name in NULLABLE}
    rows = []
    for feature in range(FEATURES):
        row: dict[str, Any] = dict.fromkeys(FEATURE_ROW, "") | empty
        row |= dict.fromkeys(("label", "search_text", "example_text", "reads", "writes"), f"{said} war number {feature}")
        row |= {"key": f"{sae}/{feature}", "sae": sae, "release": "readers", "model": "toy", "corpus": said, "kind": "sae"}
        row |= {"site": "model.layers.0.output", "site_out": "model.layers.0.output", "layer": 0, "index": feature}
        row |= {"feature": feature, "status": "ok", "method": "rule", "label_id": said, "trigger_tokens": ["war", said]}
        row |= {"trigger_shares": [0.5, 0.5], "promoted": [said], "suppressed": [said], "decoder_norms": [float(round_number)]}
        row |= {"density": 1 / (1 + round_number), "max_activation": float(round_number), "f1": 1 / (1 + round_number)}
        rows.append(row | {"report_documents": round_number, "snippets": [f"{said} «war»"] * 3})
    rng = np.random.default_rng([round_number, len(sae)])
    return pl.DataFrame(rows, schema=FEATURE_ROW), {name: rng.normal(size=(FEATURES, DIM)).astype(np.float32) for name in VECTORS}


def rounds_in(hit: FeatureHit) -> set[str]:
    """The rounds that the fields of a hit name: one, of a row that is whole."""
    named = {hit.corpus, hit.label_id, hit.trigger_tokens[1], *hit.promoted, *hit.suppressed}
    named |= {text.split()[0] for text in (hit.label, hit.search_text, hit.example_text, hit.reads, hit.writes, *hit.snippets)}
    numbers = {
        hit.max_activation,
        hit.decoder_norms[0],
        hit.report_documents,
        round(1 / hit.density - 1),
        round(1 / (hit.f1 or 1) - 1),
    }
    return named | {f"round{int(number)}" for number in numbers}


def write(root: Path, stop: Event, written: Any, exact_rows: int) -> None:
    """Publish one SAE more in each round and the first ones again, and compact now and then, until told to stop."""
    embedder = Embedder()
    with patch.object(indexes, "EXACT_ROWS", exact_rows):
        for number in count(1):
            added = [min(SAES + number, MOST_SAES) - 1]
            for sae in (f"sae-{n}" for n in [*added, *range(SAES)]):
                if stop.is_set():
                    return
                rows, vectors = features(sae, number)
                publish(rows, vectors, root=root, folder=root / "saes" / sae, embedder=embedder)
                written.value += 1
            if number % COMPACT_EVERY == 0:
                maintain(root)


def read_while_writing(root: Path, *, seconds: float, exact_rows: int = EXACT_ROWS) -> Seen:
    """Search, list and look up for so long while another process writes. root: an empty folder. exact_rows: up to so many
    there is no vector index."""
    with patch.object(indexes, "EXACT_ROWS", exact_rows):
        return _read_while_writing(root, seconds, exact_rows)


def _read_while_writing(root: Path, seconds: float, exact_rows: int) -> Seen:
    for sae in (f"sae-{n}" for n in range(SAES)):
        rows, vectors = features(sae, 0)
        publish(rows, vectors, root=root, folder=root / "saes" / sae, embedder=Embedder())
    context = multiprocessing.get_context("spawn")  # a fork after LanceDB has connected is not safe
    stop, written = context.Event(), context.Value("q", 0)
    writer = context.Process(target=write, args=(root, stop, written, exact_rows), daemon=True)
    writer.start()
    seen, known, atlas = Seen(), set(), Atlas.at(root)
    while not written.value and writer.is_alive():
        time.sleep(0.05)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            _read(atlas, seen, known)
        except Exception as error:  # whatever it is, a reader should not have met it
            seen.errors.append(f"{type(error).__name__}: {error}")
    if not writer.is_alive():
        seen.errors.append(f"the writer ended by itself with {writer.exitcode}")
    stop.set()
    writer.join(60)
    seen.writes, seen.generations = written.value, len(known)
    return seen


def _read(atlas: AtlasReader, seen: Seen, known: set[str]) -> None:
    """One search of each kind, one lookup and one whole SAE."""
    held = {index.name for index in open_table(atlas.root, TABLE).list_indices() if index.columns[0] in VECTORS}
    seen.trained = sorted({*seen.trained, *held})
    seen.indexed_reads += 4 * bool(held)  # two pages each of hybrid and dense
    sae = f"sae-{seen.reads % SAES}"
    hits: list[FeatureHit] = []
    for way in WAYS:
        results = atlas.search("war", by=way, k=20)
        further = atlas.search("war", by=way, k=20, offset=20, version=results.version)
        if {hit.key for hit in results.nearest} & {hit.key for hit in further.nearest}:
            seen.mixed.append(f"pages of {way} overlap at version {results.version}")
        hits += [*results.nearest, *further.nearest]
    hits.append(atlas.feature(sae, seen.reads % FEATURES))
    _, rows = atlas.rows(sae)
    hits += [FeatureHit.of(row) for row in rows.iter_rows(named=True)]
    if rows.height != FEATURES or rows["corpus"].n_unique() != 1:
        seen.mixed.append(f"{sae}: {rows.height} rows of {sorted(rows['corpus'].unique())}")
    torn = [hit for hit in hits if len(rounds_in(hit)) != 1]
    seen.torn += [f"{hit.key}: {sorted(rounds_in(hit))}" for hit in torn]
    known |= rounds_in(hits[-1])
    seen.reads += 2 * len(WAYS) + 2
    seen.rows += len(hits)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--rows", type=int, default=EXACT_ROWS, help="Up to so many there is no vector index.")
    parser.add_argument("--folder", type=Path, help="An empty folder; by default a temporary one.")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        seen = read_while_writing(arguments.folder or Path(temporary), seconds=arguments.seconds, exact_rows=arguments.rows)
    result = {"machine": machine(), "seconds": arguments.seconds, **asdict(seen)}
    print(json.dumps(result, indent=1))
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
