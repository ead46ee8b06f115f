"""Tracing: which features fire in texts of one's own, token by token, and how much of that the labels explain.

What belongs here: the question and its answer. What does not: running the model (`activations/probe.py`), what several texts
have in common (`topics.py`), or looks (`rendering/trace.py`, `plots/heat_strip.py`).
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import polars as pl

from scopeatlas.activations.probe import Seen, Text, TextActivations, shared_activations
from scopeatlas.errors import ConfigError
from scopeatlas.study.opening import OpenSae
from scopeatlas.study.texts import as_texts
from scopeatlas.subject.conversations import ROLES, TEMPLATE

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TOP = 5
NAMING_TOKENS = 3
LEAST_DENSITY = 1e-5
"""What a feature that the corpus hardly shows is taken to fire on: its weight is at most 11.5 times its activation."""
_FACTS = ("key", "label", "status", "f1", "f1_low", "f1_high", "density", "max_activation", "trigger_tokens")
_LISTED = ("key", "label", "status", "f1", "f1_low", "f1_high", "activation", "peak", "peak_position", "tokens", "weight")


@dataclass(frozen=True)
class Trace:
    """What fires in some texts. Every frame names a text by its number (`text`) and an SAE by its key (`sae`).

    tokens, roles: of each text, as `TextActivations` has them. firings: text, sae, position (into the text's tokens), feature,
    activation, in that order. features: every feature that fires anywhere, with its label, its score and, of the atlas's own
    corpus, density and largest activation. totals: a row per text and feature: activation (its sum over tokens), peak and
    peak_position, tokens (on how many it fires), written (the sum times the norm of what it writes), and weight, by which a text's
    features are in order: the sum times ln(1 / density), because what fires everywhere says little about one text. top: how
    many labelled and how many unlabelled features of a text summaries and pictures name.
    """

    saes: tuple[str, ...]
    tokens: tuple[tuple[str, ...], ...]
    roles: tuple[tuple[str, ...], ...]
    firings: pl.DataFrame
    features: pl.DataFrame
    totals: pl.DataFrame
    top: int = TOP

    @cached_property
    def explained(self) -> pl.DataFrame:
        """A row per text and SAE: tokens that count, features that fire, activation (summed over both), and what share of it is of
        features with a label: explained; the same with each activation times the norm of what the feature writes: explained_norm;
        and with each label counted as its F1, 0 if untested: explained_f1. The shares are null where nothing fires."""
        counts = [sum(role != ROLES[TEMPLATE] for role in roles) for roles in self.roles]
        texts = pl.DataFrame({"text": range(len(counts)), "tokens": counts}, schema={"text": pl.Int32, "tokens": pl.Int64})
        every = texts.join(pl.DataFrame({"sae": self.saes}, schema={"sae": pl.String}), how="cross").select(
            "text", "sae", "tokens"
        )
        found = _explained(self.totals, ["text", "sae"])
        return every.join(found, on=["text", "sae"], how="left", maintain_order="left").with_columns(
            pl.col("features", "activation").fill_null(0)
        )

    @cached_property
    def _firings_of(self) -> dict[tuple[object, ...], pl.DataFrame]:
        return self.firings.partition_by("text", "sae", as_dict=True)

    @cached_property
    def _totals_of(self) -> dict[tuple[object, ...], pl.DataFrame]:
        return self.totals.partition_by("text", "sae", as_dict=True)

    @cached_property
    def overall(self) -> pl.DataFrame:
        """`explained` of all texts together: a row per SAE."""
        return _explained(self.totals, ["sae"])

    def strongest(self, text: int, sae: str, *, labelled: bool) -> pl.DataFrame:
        """The rows of `totals` that a summary of a text names, the heaviest first: of its features with a label, or without."""
        mine = self._totals_of.get((text, sae), self.totals.clear())
        return mine.filter((pl.col("label") != "") == labelled).head(self.top)

    def to_polars(self) -> pl.DataFrame:
        """A row per token and feature that fires on it: text, position, token, role, sae, feature, key, label, status, f1, f1_low,
        f1_high, activation."""
        places = pl.DataFrame(
            [(t, p, token, role) for t, both in enumerate(zip(self.tokens, self.roles, strict=True))
             for p, (token, role) in enumerate(zip(*both, strict=True))],
            schema={"text": pl.Int32, "position": pl.Int32, "token": pl.String, "role": pl.String},
            orient="row",
        )  # fmt: skip
        facts = self.features.select("sae", "feature", "key", "label", "status", "f1", "f1_low", "f1_high")
        named = self.firings.join(places, on=["text", "position"], how="left", maintain_order="left")
        named = named.join(facts, on=["sae", "feature"], how="left", maintain_order="left")
        return named.select("text", "position", "token", "role", "sae", *facts.columns[1:], "activation")

    def as_dict(self) -> dict[str, object]:
        """The summary as JSON: of each text its tokens, roles, and per SAE the shares and the features named, with the activation
        of each of those on each token."""
        return {
            "saes": list(self.saes),
            "overall": self.overall.to_dicts(),
            "texts": [self._text_as_dict(text) for text in range(len(self.tokens))],
        }

    def _text_as_dict(self, text: int) -> dict[str, object]:
        shares = self.explained.filter(pl.col("text") == text)
        saes = [
            share
            | {
                "labelled": self._listed(self.strongest(text, share["sae"], labelled=True)),
                "unexplained": self._listed(self.strongest(text, share["sae"], labelled=False)),
            }
            for share in shares.drop("text").to_dicts()
        ]
        return {"text": text, "tokens": list(self.tokens[text]), "roles": list(self.roles[text]), "saes": saes}

    def _listed(self, rows: pl.DataFrame) -> list[dict[str, object]]:
        return [
            {name: row[name] for name in (*_LISTED, "trigger_tokens")}
            | {"activations": self.strip(row["text"], row["key"]).tolist()}
            for row in rows.iter_rows(named=True)
        ]

    def strip(self, text: int, key: str) -> np.ndarray:
        """The activation of one feature on each token of a text: float32 [tokens], 0 where it does not fire.

        key: of the feature, as `totals` has it. Raises ConfigError if it fires in none of the texts.
        """
        named = self.features.filter(pl.col("key") == key)
        if named.is_empty():
            raise ConfigError(f"{key} fires in none of the texts; `totals` lists what does")
        sae, feature = named.select("sae", "feature").row(0)
        values = np.zeros(len(self.tokens[text]), dtype=np.float32)
        mine = self._firings_of.get((text, sae), self.firings.clear()).filter(pl.col("feature") == feature)
        values[mine["position"].to_numpy()] = mine["activation"].to_numpy()
        return values

    def plot(self) -> "Figure":
        """A heat strip per text: its tokens by the features named, each activation as a share of the feature's largest."""
        from scopeatlas.plots.heat_strip import heat_strips

        return heat_strips(self)

    def _repr_html_(self) -> str:
        from scopeatlas.rendering.trace import trace_html

        return trace_html(self)


def name_of(label: str, status: str, trigger_tokens: Sequence[str]) -> str:
    """What to call a feature: its label, or why it has none and the tokens it fires on."""
    tokens = _quoted(trigger_tokens)
    return _visible(label) or f"no label ({status}){'; fires on ' if tokens else ''}{tokens}"


def short_name(label: str, trigger_tokens: Sequence[str]) -> str:
    """The same where there is little room: a feature without a label is called by the tokens it fires on, in quotes."""
    return _visible(label) or _quoted(trigger_tokens)


def trace(
    saes: Sequence[OpenSae],
    texts: Text | Sequence[Text],
    *,
    top: int = TOP,
    min_activation: float = 0.0,
    seen: Seen | None = None,
) -> Trace:
    """What fires in texts or conversations, by SAEs of one subject model, from one forward pass; an SAE named twice counts once.

    top: how many labelled and how many unlabelled features of a text summaries and pictures name; the frames hold all.
    min_activation: what fires less is taken not to fire. BOS and what a chat template adds never fire. seen: looks on, as in
    `Probe.activations`. Time and memory are in proportion to what fires. Raises ConfigError if there is no text or no SAE, or if those are of different subject models; and as
    `activations.probe.cut_texts` does.
    """
    asked = as_texts(texts)
    if not asked:
        raise ConfigError("no text to trace; give one or several")
    if not saes or any(sae.subject != saes[0].subject for sae in saes):
        raise ConfigError("one trace is by SAEs of one subject model; trace those of another one apart")
    saes = list({sae.key: sae for sae in saes}.values())
    found = shared_activations(asked, [sae.probe for sae in saes], seen=seen)
    firings = pl.concat([_firings(sae.key, of_sae, min_activation) for sae, of_sae in zip(saes, found, strict=True)])
    features = pl.concat([_facts(sae, firings) for sae in saes])
    return Trace(
        tuple(sae.key for sae in saes),
        tuple(tuple(one.tokens) for one in found[0]),
        tuple(one.roles for one in found[0]),
        firings.sort("text", "sae", "position", "feature"),
        features.drop("norm"),
        _totals(firings, features),
        top,
    )


def _firings(sae: str, found: list[TextActivations], least: float) -> pl.DataFrame:
    schema = {"text": pl.Int32, "sae": pl.String, "position": pl.Int32, "feature": pl.Int32, "activation": pl.Float32}
    parts = [
        pl.DataFrame({"position": one.position, "feature": one.feature, "activation": one.value}).with_columns(
            text=pl.lit(text), sae=pl.lit(sae)
        )
        for text, one in enumerate(found)
    ]
    table = pl.concat([part.select(pl.col(name).cast(dtype) for name, dtype in schema.items()) for part in parts])
    return table.filter(pl.col("activation") >= least)


def _facts(opened: OpenSae, firings: pl.DataFrame) -> pl.DataFrame:
    """What the atlas says of the features that fire, and `norm`, of what one unit of each writes."""
    fired = firings.filter(pl.col("sae") == opened.key).select("feature").unique()
    norm = pl.col("decoder_norms").list.eval(pl.element().cast(pl.Float64) ** 2).list.sum().sqrt()
    mine = opened.rows.join(fired, on="feature", how="semi", maintain_order="left")
    return mine.select("sae", "feature", *_FACTS, norm=norm)


def _totals(firings: pl.DataFrame, features: pl.DataFrame) -> pl.DataFrame:
    activation = pl.col("activation").cast(pl.Float64)
    summed = firings.group_by("text", "sae", "feature").agg(
        activation=activation.sum(),
        peak=pl.col("activation").max(),
        peak_position=pl.col("position").gather(pl.col("activation").arg_max()).first(),
        tokens=pl.len().cast(pl.Int64),
    )
    rarity = -pl.col("density").cast(pl.Float64).clip(LEAST_DENSITY, 1.0).log()
    return (
        summed.join(features, on=["sae", "feature"], how="left")
        .with_columns(written=pl.col("activation") * pl.col("norm"), weight=pl.col("activation") * rarity)
        .drop("norm", "density", "max_activation")
        .sort(["text", "sae", "weight", "feature"], descending=[False, False, True, False])
    )


def _explained(totals: pl.DataFrame, by: list[str]) -> pl.DataFrame:
    labelled, summed, written = pl.col("label") != "", pl.col("activation"), pl.col("written")
    return totals.group_by(by, maintain_order=True).agg(
        features=pl.len().cast(pl.Int64),
        explained=summed.filter(labelled).sum() / summed.sum(),
        explained_norm=written.filter(labelled).sum() / written.sum(),
        explained_f1=(summed * pl.col("f1").fill_null(0)).filter(labelled).sum() / summed.sum(),
        activation=summed.sum(),
    )


def _visible(label: str) -> str:
    return label if label.strip() or not label else json.dumps(label)


def _quoted(tokens: Sequence[str]) -> str:
    return " ".join(json.dumps(token, ensure_ascii=False) for token in tokens[:NAMING_TOKENS])
