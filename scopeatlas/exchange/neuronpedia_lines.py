"""The lines of a Neuronpedia export: features, activations and explanations of one published SAE.

What belongs here: what of ours becomes which of their columns. What does not: the lines about the source as a whole
(`neuronpedia_about.py`), files (`neuronpedia_layout.py`), or numbers that have to be worked out first (`neuronpedia_numbers.py`).

Left empty: `correlated_neurons_*` and `neuron_alignment_*`, which are about an MLP's neurons and not about what an SAE reads;
`dfa*`, which are attention's; vectors, which a page shows only of features made by hand.
"""

import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import groupby
from operator import itemgetter
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from scopeatlas import __version__
from scopeatlas.dictionaries.sparse import SparseDictionary
from scopeatlas.errors import ExchangeError
from scopeatlas.exchange import neuronpedia_layout as layout
from scopeatlas.exchange.neuronpedia_about import Names, model_of, type_of
from scopeatlas.exchange.neuronpedia_numbers import Bars, LogitEffects, activation_bars, logit_bars, nearest_rows, peak_intervals
from scopeatlas.exchange.tables import Published
from scopeatlas.mining.examples import read_examples
from scopeatlas.mining.promoted import logit_effects, readable_tokens
from scopeatlas.scoring.table import own
from scopeatlas.subject.loading import SubjectModel
from scopeatlas.subject.vocabulary import token_texts

if TYPE_CHECKING:
    import torch

    from scopeatlas.mining.promoted import Effects

EMBEDDING = 256
"""Dimensions of the embeddings that Neuronpedia searches: OpenAI's text-embedding-3-large, cut."""

Embed = Callable[[Sequence[str]], np.ndarray]
_SAID = ("f1", "balanced_accuracy", "auroc", "correlation", "lift")


class Lines:
    """The lines of one SAE, a file's worth at a time. labels: those of status ok, of each feature the one in use first."""

    def __init__(
        self,
        published: Published,
        dictionary: SparseDictionary,
        names: Names,
        *,
        subject: SubjectModel | None,
        embed: Embed | None,
    ):
        self.published, self.dictionary, self.names = published, dictionary, names
        self.subject, self.embed = subject, embed

    def batch(self, position: int, features: range) -> dict[str, list[layout.Line]]:
        """The lines of one file of each kind. position: of the encoder's layer. features: indices within it."""
        source = layout.source_id(self.dictionary.sites_in[position].layer, self.names.source_set)
        first = position * self.dictionary.features_per_layer
        flat = range(first + features.start, first + features.stop)
        windows = read_examples(self.published.examples.examples, list(flat))
        return {
            "features": list(self._features(position, source, features, flat)),
            "activations": list(self._activations(source, first, windows)),
            "explanations": list(self._explanations(source, first, flat)),
        }

    def _features(self, position: int, source: str, features: range, flat: range) -> Iterator[layout.Line]:
        layer = self.dictionary.layers[position]
        statistics = self.published.examples.features[flat.start : flat.stop]
        near, cosine = nearest_rows(layer, features)
        logits = self._logits(layer.rows(slice(features.start, features.stop)), statistics) if self._effects else None
        for at, row in enumerate(statistics.iter_rows(named=True)):
            histogram = self.published.histograms.get(row["feature"])
            bars = activation_bars(*histogram[:2], row["max_activation"]) if histogram else Bars([], [])
            effect = logits[at] if logits else None
            empty: list[float] = []
            yield layout.line_of(
                layout.FEATURE_COLUMNS,
                self._identity(source, row["index"])
                | {name: [] for name in layout.FEATURE_COLUMNS if name.startswith(("neuron_alignment", "correlated"))}
                | {
                    "sourceSetName": self.names.source_set,
                    "maxActApprox": row["max_activation"],
                    "frac_nonzero": row["density"],
                    "freq_hist_data_bar_heights": bars.heights,
                    "freq_hist_data_bar_values": bars.values,
                    "logits_hist_data_bar_heights": effect.bars.heights if effect else empty,
                    "logits_hist_data_bar_values": effect.bars.values if effect else empty,
                    "pos_str": self._texts(row["promoted"]) if effect else empty,
                    "pos_values": effect.promoted if effect else empty,
                    "neg_str": self._texts(row["suppressed"]) if effect else empty,
                    "neg_values": effect.suppressed if effect else empty,
                    "topkCosSimIndices": near[at].tolist(),
                    "topkCosSimValues": np.round(cosine[at].astype(np.float64), 6).tolist(),
                    "decoder_weights_dist": [],
                    "vector": [],
                    "vectorLabel": None,
                    "hookName": None,
                    "vectorDefaultSteerStrength": 10,
                    "hasVector": False,
                },
            )

    def _activations(self, source: str, first: int, windows: pl.DataFrame) -> Iterator[layout.Line]:
        """The examples of some features. The strongest are in bin -1, as Neuronpedia marks them; others in their interval."""
        largest = self.published.examples.features["max_activation"]
        for feature, mine in groupby(windows.iter_rows(named=True), key=itemgetter("feature")):
            intervals = peak_intervals(*self.published.histograms[feature], largest[feature])
            for row in mine:
                tokens, values = row["texts"], list(row["activations"][: len(row["texts"])])
                low, high, share = (-1, row["peak"], -1) if row["kind"] == "top" else intervals.of(row["peak"])
                peak = int(np.argmax(values))
                identity = self._identity(source, feature - first)
                yield layout.line_of(
                    layout.ACTIVATION_COLUMNS,
                    identity
                    | {
                        "id": layout.line_id(*identity.values(), row["split"], row["kind"], row["stratum"], row["context_id"]),
                        "dataSource": f"{self.published.corpus}/{row['split']}",
                        "tokens": tokens,
                        "values": values,
                        "maxValue": max(values),
                        "minValue": min(values),
                        "maxValueTokenIndex": peak,
                        "qualifyingTokenIndex": peak,
                        "dfaValues": [],
                        "dfaMaxValue": None,
                        "dfaTargetIndex": None,
                        "binContains": share,
                        "binMin": low,
                        "binMax": high,
                    },
                )

    def _explanations(self, source: str, first: int, flat: range) -> Iterator[layout.Line]:
        """The labels of some features. One that came from Neuronpedia keeps its id and its text to the letter, and goes out
        once if it began here."""
        mine = self.labels.filter(pl.col("feature").is_between(flat.start, flat.stop - 1))
        # A label without a claim on what is read is about what is written.
        described = pl.when(pl.col("reads") != "").then(pl.col("reads")).otherwise(pl.col("writes"))
        rows = {self._id_of(row, source, first): row for row in reversed(mine.with_columns(claim=described).to_dicts())}
        rows = dict(reversed(rows.items()))
        origins = [json.loads(row["provenance"]).get("neuronpedia", {}) for row in rows.values()]
        texts = [origin.get("description") or row["claim"] for origin, row in zip(origins, rows.values(), strict=True)]
        vectors = self._embedded(texts)
        for (identity, row), origin, text, vector in zip(rows.items(), origins, texts, vectors, strict=True):
            yield layout.line_of(
                layout.EXPLANATION_COLUMNS,
                self._identity(source, row["feature"] - first)
                | dict.fromkeys(("umap_x", "umap_y", "umap_cluster", "umap_log_feature_sparsity"))
                | {
                    "id": identity,
                    "authorId": origin.get("authorId") or layout.CREATOR,
                    "description": text,
                    "embedding": vector,
                    "typeName": type_of(row),
                    "explanationModelName": model_of(row),
                    "notes": self._said_of(row),
                },
            )

    def _id_of(self, row: Mapping[str, Any], source: str, first: int) -> str:
        origin = json.loads(row["provenance"]).get("neuronpedia", {})
        return origin.get("id") or layout.line_id(*self._identity(source, row["feature"] - first).values(), row["label_id"])

    def _identity(self, source: str, index: int) -> dict[str, object]:
        return {"modelId": self.names.model, "layer": source, "index": str(index), "creatorId": layout.CREATOR}

    def _said_of(self, row: Mapping[str, object]) -> str:
        tests = self._tests.get(str(row["label_id"]), [])
        use = "in use" if row["current"] else "not in use"
        return f"Scope Atlas {__version__}: {row['method']} label, {use}; {'; '.join(tests) or 'not tested'}"

    @cached_property
    def labels(self) -> pl.DataFrame:
        """The labels of status ok, the one in use first."""
        ok = self.published.labels.filter(pl.col("status") == "ok")
        return ok.sort("feature", "current", "version", "label_id", descending=[False, True, False, False])

    @cached_property
    def _tests(self) -> dict[str, list[str]]:
        """By label id, its tests in words."""
        said: dict[str, list[str]] = defaultdict(list)
        scored = own(self.published.scores).filter(pl.col("status") == "scored")
        for row in scored.iter_rows(named=True):
            measured = [
                f"{name.replace('_', ' ')} {row[name]:.3f}{_interval(row, name)}" for name in _SAID if row[name] is not None
            ]
            said[row["label_id"]].append(
                f"{row['scorer']} of what it {row['claim']} on {row['documents']} held-out documents: {', '.join(measured)}"
            )
        return said

    def _embedded(self, texts: Sequence[str]) -> list[list[float] | None]:
        if self.embed is None or not texts:
            return [None] * len(texts)
        vectors = np.asarray(self.embed(texts), dtype=np.float64)
        if vectors.shape != (len(texts), EMBEDDING) or not np.isfinite(vectors).all():
            raise ExchangeError(
                f"Neuronpedia's embeddings are [n, {EMBEDDING}] numbers, not {vectors.shape}; give none or fit ones"
            )
        return [np.round(vector, 9).tolist() for vector in vectors]

    @cached_property
    def _effects(self) -> "Effects | None":
        return logit_effects(self.dictionary, self.subject) if self.subject else None

    def _logits(self, rows_nod: "torch.Tensor", statistics: pl.DataFrame) -> list[LogitEffects]:
        assert self.subject is not None and self._effects is not None
        unembedding = self.subject.model.get_output_embeddings().weight  # pyright: ignore[reportOptionalMemberAccess]
        ids = (np.array(statistics[name].to_list(), dtype=np.int64) for name in ("promoted", "suppressed"))
        return logit_bars(self._effects, rows_nod, readable_tokens(self.subject, len(unembedding)), *ids)

    def _texts(self, ids: Sequence[int]) -> list[str]:
        assert self.subject is not None
        return token_texts(self.subject.tokenizer, ids)


def _interval(row: Mapping[str, float | None], name: str) -> str:
    low, high = row[f"{name}_low"], row[f"{name}_high"]
    return "" if low is None or high is None else f" [{low:.3f}, {high:.3f}]"
