"""A published SAE as Neuronpedia's bulk layout, ready for its bucket or for an instance of one's own.

What belongs here: writing an export whole. What does not: its lines (`neuronpedia_lines.py`, `neuronpedia_about.py`), its files
(`neuronpedia_layout.py`), or the way back (`neuronpedia_import.py`).

The layout has no place for scores: they lie beside it, with every label and all provenance, under scope-atlas/, and a summary
is in each explanation's notes.
"""

from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from scopeatlas.atlas.search import AtlasReader
from scopeatlas.dictionaries.releases import open_dictionary
from scopeatlas.errors import ExchangeError
from scopeatlas.exchange import neuronpedia_layout as layout
from scopeatlas.exchange.neuronpedia_about import Names, config_lines, source_lines
from scopeatlas.exchange.neuronpedia_lines import Embed, Lines
from scopeatlas.exchange.tables import MANIFEST, Published, read_published, write_manifest
from scopeatlas.runner.local import Log, Progress, silent
from scopeatlas.storage.files import write_json
from scopeatlas.subject.loading import SubjectModel

BESIDE = "scope-atlas"
"""The folder for what the layout has no place for."""


@dataclass(frozen=True)
class NeuronpediaExport:
    """What was written. sources: Neuronpedia's ids, one for each encoder layer."""

    folder: Path
    sources: tuple[str, ...]
    features: int
    activations: int
    explanations: int

    def as_dict(self) -> dict[str, object]:
        return {**asdict(self), "folder": str(self.folder)}


def export_neuronpedia(
    atlas: AtlasReader,
    sae: str,
    folder: Path,
    *,
    model_id: str,
    source_set: str,
    creator: str,
    subject: SubjectModel | None = None,
    embed: Embed | None = None,
    log: Log = silent,
) -> NeuronpediaExport:
    """Write a published SAE into `folder` as Neuronpedia's bulk layout: v1/config and v1/{model_id}/{layer}-{source_set}, of a
    multi-layer kind one source for each encoder layer.

    Several SAEs may go into one folder. creator: the name that pages show. subject: the model that the SAE is of; effects on
    the logits (histogram, promoted and suppressed tokens with values) need its weights, and are left empty without it. embed:
    OpenAI's text-embedding-3-large cut to 256 dimensions, texts into [n, 256]; without it embeddings are null, and
    Neuronpedia's search by meaning never finds the explanations. Explanations are all labels of status ok.

    The manifest, scope-atlas/{SAE}/manifest.json, is written last: an export without one is not whole. Raises as
    `read_published` does, ExchangeError if the folder holds one of the sources already.
    """
    published = read_published(atlas, sae)
    dictionary = open_dictionary(published.entry)
    names = Names(model_id, source_set, creator, _published_at(atlas, published.key))
    places = [Path("v1") / model_id / layout.source_id(site.layer, source_set) for site in dictionary.sites_in]
    for place in places:
        if (folder / place).exists():
            raise ExchangeError(f"{folder / place} is there already; delete it, or name another source set or folder")
    lines = Lines(published, dictionary, names, subject=subject, embed=embed)
    rows: dict[str, int] = {}
    progress = Progress("neuronpedia", dictionary.width, "features", log)
    for position, place in enumerate(places):
        for name, line in source_lines(published, dictionary, names, position, subject).items():
            _write(folder, place / f"{name}.jsonl", [line], rows)
        for number, features in enumerate(layout.batches(dictionary.features_per_layer)):
            for kind, made in lines.batch(position, features).items():
                if made:  # the importer reads the columns off the first line
                    _write(folder, place / kind / f"batch-{number}.jsonl.gz", made, rows)
            progress.advance(len(features))
    progress.finish()
    for name, config in config_lines(lines.labels, names).items():
        layout.merge_config(folder / "v1" / "config", name, config)
    _write_beside(folder, published, rows)
    counted = {
        kind: sum(n for path, n in rows.items() if f"/{kind}/" in path) for kind in ("features", "activations", "explanations")
    }
    return NeuronpediaExport(folder, tuple(place.name for place in places), **counted)


def _write(folder: Path, path: Path, lines: list[layout.Line], rows: dict[str, int]) -> None:
    rows[path.as_posix()] = layout.write_lines(folder / path, lines)


def _write_beside(folder: Path, published: Published, rows: dict[str, int]) -> None:
    """Labels, scores and provenance, and the manifest of all that was written."""
    beside = Path(BESIDE) / published.key
    for name, table in (("labels", published.labels), ("scores", published.scores)):
        _write(folder, beside / f"{name}.jsonl.gz", list(table.iter_rows(named=True)), rows)
    write_json(folder / beside / "provenance.json", published.provenance())
    written = [folder / name for name in (*rows, (beside / "provenance.json").as_posix())]
    write_manifest(folder, rows, name=(beside / MANIFEST).as_posix(), files=written)


def _published_at(atlas: AtlasReader, key: str) -> str:
    """When the SAE was published: the same of every export of one publication."""
    at = atlas.saes().filter(sae=key)["published_at"][0]
    return (at or datetime.now(UTC)).isoformat(timespec="milliseconds")
