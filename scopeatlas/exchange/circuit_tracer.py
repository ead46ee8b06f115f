"""Labels and evidence for circuit-tracer's graphs: the feature files that its viewer shows, and labels on a graph's nodes.

What belongs here: circuit-tracer's two files as we write them. What does not: its transcoders as dictionaries
(`dictionaries/circuit_tracer.py`).

Formats as of decoderesearch/circuit-tracer at d57d98ac5e49 and safety-research/circuit-tracer at 196e2cecbae6: a graph's nodes
are `Node` of circuit_tracer/frontend/graph_models.py, whose `clerp` is what the viewer writes beside a node, and whose `feature`
is the Cantor pairing of layer and index. The viewer (frontend/assets/feature_examples/init-feature-examples.js) fetches
{scan}/{feature}.json where the graph's scan begins with "./"; `circuit-tracer start-server --features_dir FOLDER` serves
FOLDER/NAME/{feature}.json to a graph whose scan is ./features/NAME. Of the file it reads examples_quantiles, top_logits,
bottom_logits, act_min and act_max; whatever else is there, such as our label, it leaves alone.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from scopeatlas.atlas.search import AtlasReader
from scopeatlas.errors import ExchangeError
from scopeatlas.exchange.neuronpedia_numbers import Intervals, activation_bars, peak_intervals
from scopeatlas.exchange.tables import read_published
from scopeatlas.mining.examples import read_examples
from scopeatlas.storage.files import atomic_path

SCAN_PREFIX = "./features/"
BATCH = 1024
_TOP = "Top activations"
_NODE = re.compile(r"(\d{1,9})_(\d{1,9})_\d+")
_SAID = ("key", "status", "method", "label", "reads", "writes", "scorer", "f1", "f1_low", "f1_high", "corpus")


@dataclass(frozen=True)
class LabelledGraph:
    """A graph with labels on its nodes. nodes: those of features; known: those in the SAEs given; labelled: with a label."""

    path: Path
    nodes: int
    known: int
    labelled: int

    def as_dict(self) -> dict[str, object]:
        return {**asdict(self), "path": str(self.path)}


def cantor(layer: int, index: int) -> int:
    """The one number that a graph's node and a feature's file have for layer and index: Cantor's pairing."""
    return (layer + index) * (layer + index + 1) // 2 + index


def export_circuit_tracer(atlas: AtlasReader, sae: str, folder: Path, *, scan: str) -> int:
    """Write a file {folder}/{scan}/{cantor(layer, index)}.json for each feature of a published SAE; returns how many.

    Several SAEs (a transcoder of each layer) go into one scan; files of the same layer are replaced. Examples are the strongest
    and those of each quartile of the peaks, report documents first. Raises as `read_published` does.
    """
    published = read_published(atlas, sae)
    place = folder / scan
    place.mkdir(parents=True, exist_ok=True)
    for rows in published.rows.iter_slices(BATCH):
        windows = read_examples(published.examples.examples, rows["feature"].to_list())
        by_feature = windows.partition_by("feature", as_dict=True)
        for row in rows.iter_rows(named=True):
            body = _feature_file(row, by_feature.get((row["feature"],)), published.histograms.get(row["feature"]))
            with atomic_path(place / f"{cantor(row['layer'], row['index'])}.json") as temporary:
                temporary.write_text(json.dumps(body, ensure_ascii=False, allow_nan=False), encoding="utf-8", errors="replace")
    return len(published.rows)


def label_graph(atlas: AtlasReader, saes: Sequence[str], graph: Path, target: Path, *, scan: str | None = None) -> LabelledGraph:
    """Write a graph's JSON to `target` with a label on every node of a feature that one of `saes` has, beside how well it was
    tested, or why there is none. Nodes that have a text already keep it.

    scan: also have the viewer read what `export_circuit_tracer` wrote under this name. Raises ExchangeError if `graph` is no
    graph of circuit-tracer's, or two SAEs read the same layer; UnknownSaeError or AtlasError as `atlas.rows`.
    """
    body = _read_graph(graph)
    said = _said_by_place(atlas, saes)
    nodes = [node for node in body["nodes"] if _place(node) is not None]
    known = [node for node in nodes if _place(node) in said]
    for node in known:
        node["clerp"] = node.get("clerp") or said[_place(node)][0]  # type: ignore[index]  # known ones have a place
    if scan is not None:
        body["metadata"] |= {"scan": SCAN_PREFIX + scan, "transcoder_list": []}
    with atomic_path(target) as temporary:
        temporary.write_text(json.dumps(body, ensure_ascii=False, indent=2) + "\n", encoding="utf-8", errors="replace")
    labelled = sum(said[_place(node)][1] for node in known)  # type: ignore[index]
    return LabelledGraph(target, len(nodes), len(known), labelled)


def caption(row: Mapping[str, Any]) -> str:
    """What a node says: the label and its score, or the refusal in brackets. row: of FEATURE_ROW."""
    if not row["label"]:
        return f"[{row['status']}]"
    metric = "f1" if row["f1"] is not None else "balanced_accuracy"
    if row[metric] is None:
        return f"{row['label']} (untested)"
    low, high = row[f"{metric}_low"], row[f"{metric}_high"]
    interval = "" if low is None or high is None else f" [{low:.2f}, {high:.2f}]"
    return f"{row['label']} ({metric.replace('_', ' ')} {row[metric]:.2f}{interval})"


def _said_by_place(atlas: AtlasReader, saes: Sequence[str]) -> dict[tuple[int, int], tuple[str, bool]]:
    """Caption of each feature by layer and index, and whether it has a label."""
    said: dict[tuple[int, int], tuple[str, bool]] = {}
    read: dict[int, str] = {}
    for sae in saes:
        key, rows = atlas.rows(sae)
        for layer in rows["layer"].unique().to_list():
            if read.setdefault(layer, key) != key:
                raise ExchangeError(f"{key} and {read[layer]} both read layer {layer}; name the one that the graph was made with")
        said |= {(row["layer"], row["index"]): (caption(row), bool(row["label"])) for row in rows.iter_rows(named=True)}
    return said


def _place(node: Mapping[str, Any]) -> tuple[int, int] | None:
    """Layer and index of a feature's node, which is named {layer}_{index}_{position}; None for any other node.

    Nodes of logits are named alike, and so are those of reconstruction errors in older graphs: 0_{layer}_{position}.
    """
    named, kind = _NODE.fullmatch(str(node["node_id"])), str(node.get("feature_type"))
    if named is None or kind == "logit" or "error" in kind or node.get("feature") == -1:
        return None
    return int(named[1]), int(named[2])


def _read_graph(path: Path) -> dict[str, Any]:
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ExchangeError(f"cannot read {path}: {error}; name a graph's JSON file") from error
    is_graph = isinstance(body, dict) and isinstance(body.get("metadata"), dict) and isinstance(body.get("nodes"), list)
    if not is_graph or not all(isinstance(node, dict) and "node_id" in node for node in body["nodes"]):
        raise ExchangeError(f"{path} is no graph of circuit-tracer's: it has no metadata, or nodes without node_id")
    return body


def _feature_file(
    row: Mapping[str, Any], windows: pl.DataFrame | None, histogram: tuple[np.ndarray, np.ndarray, np.ndarray] | None
) -> dict[str, object]:
    """One feature's file. row: of FEATURE_ROW. histogram: see `Published.histograms`; None, as `windows`, if it never fires.

    quantile_values: where the quartiles of the peaks begin, weakest first. histogram: 50 equal bars up to act_max.
    """
    largest = row["max_activation"]
    intervals = peak_intervals(*histogram, largest) if histogram else None
    return {
        "transcoder_id": row["sae"],
        "index": row["index"],
        "examples_quantiles": _quantiles(windows, intervals) if windows is not None and intervals else [],
        "top_logits": row["promoted"],
        "bottom_logits": row["suppressed"],
        "act_min": 0.0,
        "act_max": largest,
        "quantile_values": intervals.bounds[:, 0].tolist() if intervals else [],
        "histogram": activation_bars(*histogram[:2], largest).heights if histogram else [],
        "activation_frequency": row["density"],
        "layer": row["layer"],
        "label": caption(row),
        "scope_atlas": {name: row[name] for name in _SAID},
    }


def _quantiles(windows: pl.DataFrame, intervals: Intervals) -> list[dict[str, object]]:
    """The strongest examples, then the others by the interval of their peaks, strongest first; report documents first in each."""
    held_out_first = pl.col("split").replace_strict({"report": 0, "select": 1, "explain": 2}, return_dtype=pl.Int8)
    shown: dict[tuple[float, float], list[dict[str, object]]] = {(np.inf, np.inf): []}
    for row in windows.sort(held_out_first, "kind", "stratum", "rank").iter_rows(named=True):
        low, high, _ = intervals.of(row["peak"])
        shown.setdefault((np.inf, np.inf) if row["kind"] == "top" else (low, high), []).append(_example(row))
    return [
        {"quantile_name": _TOP if low == np.inf else f"Interval {low:.4g} to {high:.4g}", "examples": examples}
        for (low, high), examples in sorted(shown.items(), key=lambda item: item[0], reverse=True)
        if examples
    ]


def _example(row: Mapping[str, Any]) -> dict[str, object]:
    return {
        "tokens": row["texts"],
        "tokens_acts_list": row["activations"][: len(row["texts"])],
        "train_token_ind": row["peak_at"],
        "is_repeated_datapoint": False,
    }
