"""Neuronpedia's explanations made imported labels of the same features.

What belongs here: which line is about which feature, and what of it is kept. What does not: its files
(`neuronpedia_layout.py`), or how such a label is kept, chosen and scored (`labels/annotations.py`, and the stages).

Explanations were written by others, of evidence that is not known here: their text is data, and their scores elsewhere say
nothing here. Embeddings are left out, which follow from the text.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import polars as pl

from scopeatlas.atlas.search import AtlasReader
from scopeatlas.dictionaries.sparse import MULTI_LAYER
from scopeatlas.errors import ExchangeError
from scopeatlas.exchange.neuronpedia_layout import explanation_files, line_id, read_lines
from scopeatlas.hypotheses.labels import Label
from scopeatlas.labels.annotations import MAX_LENGTH, imported_label, one_line, take_in
from scopeatlas.storage.store import Store
from scopeatlas.subject.names import names_same_model

KEPT = ("id", "modelId", "layer", "index", "authorId", "typeName", "explanationModelName", "notes", "createdAt", "description")
"""What is kept of a line as it was: a label has its text on one line."""
_SOURCE = re.compile(r"(\d{1,9})-(.+)")
_ID = re.compile(r"[A-Za-z0-9_.-]{1,64}")


@dataclass(frozen=True)
class ImportedExplanations:
    """What an import gave. new: labels that were not there before. empty, too_long: lines that are left out because they have no
    text, or one of more than MAX_LENGTH characters."""

    sae: str
    lines: int
    new: int
    features: int
    empty: int
    too_long: int

    def as_dict(self) -> dict[str, object]:
        return asdict(self)


def import_neuronpedia(
    atlas: AtlasReader, sae: str, path: Path, *, model_id: str | None = None, source: str | None = None
) -> ImportedExplanations:
    """Make the explanations at `path` imported labels of a published SAE: they join the labels when these are next made, and
    are scored like any other.

    path: a folder of the bulk layout, or one file as it was downloaded (.jsonl, .jsonl.gz, or .json with one array). Lines have
    to be of the SAE's model and layer by Neuronpedia's names. model_id: take lines of this model instead, whose name is not
    known for the same. source: take lines of this source (such as 6-res-jb) alone, whatever its number says. Importing the same
    again changes nothing.

    Raises UnknownSaeError or AtlasError if `sae` names none or several, ExchangeError with file and line for a line that is
    damaged, of another model or layer, or of a feature that the SAE does not have.
    """
    key, rows = atlas.rows(sae)
    places = _Places(key, rows, model_id, source)
    labels: list[Label] = []
    empty = too_long = 0
    for file in explanation_files(path):
        for where, line in _lines(file, source):
            feature = places.feature(line, where)
            description = line.get("description")
            if not isinstance(description, str):
                raise ExchangeError(f"{where} has no description; correct or delete that line")
            length = len(one_line(description))
            if 0 < length <= MAX_LENGTH:
                labels.append(_label(feature, description, line))
            empty += length == 0
            too_long += length > MAX_LENGTH
    if not labels:
        said = f"of source {source}" if source else f"with text of at most {MAX_LENGTH} characters"
        raise ExchangeError(f"{path} holds no explanation {said}; name a file of explanations or its source")
    new = take_in(Store(atlas.root), rows["corpus"][0], key, labels)
    lines, features = len(labels) + empty + too_long, len({label.feature for label in labels})
    return ImportedExplanations(key, lines, len(new), features, empty, too_long)


def _lines(file: Path, source: str | None) -> Iterator[tuple[str, dict[str, Any]]]:
    """Where each line is, in words, and the line; of one source if it is named."""
    for number, line in read_lines(file):
        if source is None or line.get("layer") == source:
            yield f"line {number} of {file}", line


def _label(feature: int, description: str, line: Mapping[str, Any]) -> Label:
    """The version is made of the line's id, or of a hash where that could not stand in a version, or there is none."""
    kept = {name: str(line[name]) for name in KEPT if line.get(name) is not None}
    identity = kept.get("id") or line_id(feature, description, *(kept.get(name) for name in KEPT[1:7]))
    version = f"imported:neuronpedia:{identity if _ID.fullmatch(identity) else line_id(identity)}"
    return imported_label(feature, description, version=version, provenance={"neuronpedia": kept})


class _Places:
    """From a line's model, source and index to the flat id of one of an SAE's features."""

    def __init__(self, key: str, rows: pl.DataFrame, model_id: str | None, source: str | None):
        self.key, self.model_id, self.source = key, model_id, source
        self.model, self.is_multi = rows["model"][0], rows["kind"][0] in MULTI_LAYER
        self.features = {(row[0], str(row[1])): row[2] for row in rows.select("layer", "index", "feature").iter_rows()}
        self.layers = sorted({layer for layer, _ in self.features})

    def feature(self, line: Mapping[str, Any], where: str) -> int:
        """Raises ExchangeError, saying where, for a line that is of none."""
        missing = [name for name in ("modelId", "layer", "index") if line.get(name) is None]
        if missing:
            raise ExchangeError(f"{where} has no {missing[0]}: it is no explanation of Neuronpedia's; correct or delete it")
        model, source, index = (one_line(str(line[name])) for name in ("modelId", "layer", "index"))
        is_ours = model == self.model_id if self.model_id else not self.model or names_same_model(model, self.model)
        if not is_ours:
            way = f"--model-id {model} takes it for the same" if not self.model_id else f"it was to be {self.model_id}"
            raise ExchangeError(f"{where} is of model {model} and {self.key} of {self.model}; name the SAE that it is of ({way})")
        layer = self._layer(source, where)
        feature = self.features.get((layer, index))
        if feature is None:
            raise ExchangeError(f"{where} is of feature {index}, which layer {layer} of {self.key} does not have; name its SAE")
        return feature

    def _layer(self, source: str, where: str) -> int:
        named = _SOURCE.fullmatch(source)
        if self.source and not self.is_multi:
            return self.layers[0]
        layer = int(named[1]) if named else -1
        if layer not in self.layers:
            ours = ", ".join(map(str, self.layers))
            way = f"name its SAE (--source {source} takes it for this one)"
            raise ExchangeError(f"{where} is of source {source} and {self.key} reads layer {ours}; {way}")
        return layer
