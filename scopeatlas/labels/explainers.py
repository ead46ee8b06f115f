"""LLM explainers: what each method shows of a feature, the question that is made of it, and the label in the answer.

What belongs here: evidence from explain documents, the schema of the answer, and its validation. What does not: sending
(`llm/`), which features are asked about (`stage.py`), testing what they say (`falsification.py`, `choosing.py`).
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import polars as pl
from pydantic import BaseModel, ConfigDict, Field, JsonValue

from scopeatlas.hypotheses.labels import Label, Scope, Status
from scopeatlas.hypotheses.neighbours import Neighbours
from scopeatlas.hypotheses.samples import Windows, draw_windows, require
from scopeatlas.hypotheses.units import Firings, Units
from scopeatlas.labels.facts import computed_facts
from scopeatlas.labels.outputs import Outputs
from scopeatlas.llm.config import ServerConfig
from scopeatlas.llm.prompts import Prompt, fenced, load_prompt
from scopeatlas.llm.replies import InvalidReply, read_json
from scopeatlas.llm.requests import Answer, ChatRequest
from scopeatlas.mining.windows import mark

ExplainMethod = Literal["max_activating", "quantile_mixed", "contrastive", "output_centric", "combined"]

PROMPT = "explain_v2"
MAX_OUTPUT_TOKENS = 600
MAX_LABEL_WORDS = 8
EXAMPLES = 20
TOP_SHARE = 0.3
"""Of the examples, so many are the strongest; the rest are of all deciles alike (Paulo et al. 2024: the strongest alone
give labels that are too narrow)."""
NEAR_MISSES: dict[str, int] = {"trigger": 5, "neighbour": 5, "random": 3}
_SAID = {"trigger": "same token", "neighbour": "similar feature", "random": "random"}

# fields in the order in which they are written: what was seen first, the verdict after it
SCHEMA = {
    "name": "feature_explanation",
    "strict": True,
    "schema": {
        "type": "object",
        "properties": {
            "reads": {"type": "string"},
            "writes": {"type": "string"},
            "status": {"type": "string", "enum": ["ok", "unclear", "polysemantic", "dense", "positional"]},
            "label": {"type": "string"},
            "scope": {"type": "string", "enum": ["", "token", "phrase", "document"]},
            "confidence": {"type": "number"},
            "predicted_positive": {"type": "array", "items": {"type": "string"}},
            "predicted_negative": {"type": "array", "items": {"type": "string"}},
        },
        "required": [
            "reads", "writes", "status", "label", "scope", "confidence", "predicted_positive", "predicted_negative"
        ],
        "additionalProperties": False,
    },
}  # fmt: skip

_CLOSING = "Answer with the one JSON object that the instructions ask for."
_NO_LABELS = frozenset({"unclear", "unknown", "unsure", "none", "n/a", "na", "null", "error", "no pattern"})
_CONTROL_CHARACTERS = re.compile("[\x00-\x1f\x7f-\x9f]")

Sections = dict[str, list[JsonValue]]


@dataclass(frozen=True)
class Material:
    """What is known of some features from explain documents; every method shows a part of it.

    strongest: windows around the highest peaks. spread: windows around peaks of all deciles, and near misses. facts: see
    `computed_facts`. outputs: of the weights, and of steering explain documents.
    """

    strongest: Windows[Literal["explain"]]
    spread: Windows[Literal["explain"]]
    facts: Mapping[int, list[JsonValue]]
    outputs: Mapping[int, Outputs]


def gather(
    units: Units,
    firings: Firings,
    features: Sequence[int],
    *,
    neighbours: Neighbours | None,
    outputs: Mapping[int, Outputs],
    seed: int = 0,
) -> Material:
    """The material on `features`. firings: of every split; those outside explain documents leave no trace in it."""
    kinds = {"positives": EXAMPLES, **NEAR_MISSES}
    spread = draw_windows(units, firings, features, split="explain", neighbours=neighbours, seed=seed, **kinds)
    return Material(strongest(units, firings, features), spread, computed_facts(units, firings, features), outputs)


def strongest(units: Units, firings: Firings, features: Sequence[int]) -> Windows[Literal["explain"]]:
    """Windows around the EXAMPLES highest peaks of each feature in explain documents, one a document as far as there are
    any; a second of a document only where there are too few."""
    inside = firings.within(units, "explain")
    wanted = np.isin(inside.feature, np.asarray(features, dtype=np.int64))
    mine = pl.DataFrame({name: getattr(inside, name)[wanted] for name in ("feature", "position", "value")})
    mine = mine.with_columns(context=pl.col("position") // units.length)
    peaks = mine.group_by("feature", "context").agg(peak=pl.col("value").max())
    peaks = peaks.with_columns(document=pl.Series(units.context_document[peaks["context"].to_numpy()]))
    peaks = peaks.sort("feature", "peak", "context", descending=[False, True, False])
    peaks = peaks.with_columns(turn=pl.int_range(pl.len()).over("feature", "document"))
    best = peaks.sort("feature", "turn", "peak", "context", descending=[False, False, True, False])
    best = best.group_by("feature", maintain_order=True).head(EXAMPLES)
    kept = mine.join(best, on=["feature", "context"], how="semi", maintain_order="left")
    few = Firings(kept["feature"].to_numpy(), kept["position"].to_numpy(), firings.width, value=kept["value"].to_numpy())
    return draw_windows(
        units, few, features, split="explain", neighbours=None, positives=EXAMPLES, random=0, trigger=0, neighbour=0
    )


def _examples(windows: pl.DataFrame) -> Sections:
    """Windows that fire, the strongest first."""
    peaks = [max(values) for values in windows["activations"]]
    rows = sorted(zip(peaks, windows.select("texts", "activations").iter_rows(), strict=True), key=lambda row: -row[0])
    highest = max(peaks, default=1)
    shown = [{"strength": round(10 * peak / highest), "text": mark(*row, marks=("<<", ">>"))} for peak, row in rows]
    return {"ACTIVATING EXAMPLES": [*shown]}


def _strongest(material: Material, feature: int) -> pl.DataFrame:
    return material.strongest.of(feature)


def _mixed(material: Material, feature: int) -> pl.DataFrame:
    """The strongest windows, and windows of all deciles from other contexts."""
    top = material.strongest.of(feature)
    peak = pl.col("activations").list.max()
    top = top.sort(peak, "context", descending=[True, False]).head(round(TOP_SHARE * EXAMPLES))
    rest = material.spread.of(feature).filter(pl.col("kind") == "positive", ~pl.col("context").is_in(top["context"].implode()))
    return pl.concat([top, rest.head(EXAMPLES - len(top))])


def _near_misses(material: Material, feature: int) -> pl.DataFrame:
    return material.spread.of(feature).filter(pl.col("kind") != "positive")


def _contrast(windows: pl.DataFrame) -> Sections:
    """Windows that stay silent; what makes each a near miss is marked in it."""
    shown: list[JsonValue] = []
    for kind, texts, focus in windows.select("kind", "texts", "focus").iter_rows():
        at = [float(kind != "random" and i == focus) for i in range(len(texts))]
        shown.append({"kind": _SAID[kind], "text": mark(texts, at, marks=("[[", "]]"))})
    return {"TEXT WITHOUT ACTIVATION": shown}


def _outputs(material: Material, feature: int) -> Sections:
    outputs = material.outputs.get(feature, Outputs())
    lists = {
        "PROMOTED NEXT TOKENS": outputs.promoted,
        "SUPPRESSED NEXT TOKENS": outputs.suppressed,
        "TOKENS RAISED BY STEERING": outputs.raised,
    }
    return {title: [[*tokens]] for title, tokens in lists.items() if tokens}


@dataclass(frozen=True)
class _Method:
    """Which windows a method shows, and whether what the feature does to the output and the computed facts with them."""

    examples: Callable[[Material, int], pl.DataFrame] | None
    near_misses: bool = False
    outputs: bool = False
    facts: bool = False


METHODS: Mapping[ExplainMethod, _Method] = {
    "max_activating": _Method(_strongest),
    "quantile_mixed": _Method(_mixed),
    "contrastive": _Method(_mixed, near_misses=True),
    "output_centric": _Method(None, outputs=True),
    "combined": _Method(_mixed, near_misses=True, outputs=True, facts=True),
}


@dataclass(frozen=True)
class Shown:
    """One request about one feature, and which windows it shows: (document id, context's row, first position) each."""

    request: ChatRequest
    windows: tuple[tuple[str, int, int], ...]


def show(sae: str, feature: int, material: Material, *, method: ExplainMethod) -> Shown:
    """The request that asks for a label of one feature, by its method. Raises LeakError for material of another split."""
    require(material.strongest, "explain")
    require(material.spread, "explain")
    shows = METHODS[method]
    sections: Sections = {}
    windows = [material.spread.table.head(0)]
    if shows.examples is not None:
        windows.append(shows.examples(material, feature))
        sections |= _examples(windows[-1])
    if shows.near_misses:
        windows.append(_near_misses(material, feature))
        sections |= _contrast(windows[-1])
    if shows.facts:
        sections["COMPUTED FACTS"] = [*material.facts.get(feature, [])]
    if shows.outputs:
        sections |= _outputs(material, feature)
    shown = pl.concat(windows).select("document_id", "context", "start")
    messages = (
        {"role": "system", "content": prompt().text},
        {"role": "user", "content": fenced({t: v for t, v in sections.items() if v}, closing=_CLOSING)},
    )
    request = ChatRequest("explain", sae, feature, messages, SCHEMA, MAX_OUTPUT_TOKENS, prompt().stamp)
    return Shown(request, tuple(shown.iter_rows()))


@cache
def prompt() -> Prompt:
    """The system prompt: long and constant, so that providers cache it."""
    return load_prompt(Path(__file__).parent / "prompts", PROMPT)


def version_of(config: ServerConfig, method: ExplainMethod) -> str:
    """What stands in every label of an explainer: which model was asked how, and by which prompt."""
    return f"llm:{method}:{config.model}:{prompt().stamp}"


_Text = Annotated[str, Field(max_length=2000)]


class Explanation(BaseModel):
    """The answer as the schema describes it."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    reads: _Text
    writes: _Text
    status: Literal["ok", "unclear", "polysemantic", "dense", "positional"]
    label: Annotated[str, Field(max_length=200)]
    scope: Scope
    confidence: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
    predicted_positive: Annotated[list[_Text], Field(max_length=10)]
    predicted_negative: Annotated[list[_Text], Field(max_length=10)]


_STATUSES: Mapping[str, Status] = {"ok": "ok", "dense": "dense", "positional": "positional"}


def read_label(answer: Answer, *, version: str, provenance: Mapping[str, object]) -> Label:
    """The label, or the typed refusal, that an answer holds, in single-line texts.

    A refusal has no short text, whatever was written there. Raises InvalidReply, in one line, for what is no answer.
    """
    found = read_json(answer, Explanation)
    is_ok = found.status == "ok"
    reads, writes, label = (_one_line(text) for text in (found.reads, found.writes, found.label))
    if is_ok and (not (reads or writes) or label.lower().strip(".") in {"", *_NO_LABELS}):
        raise InvalidReply('the answer breaks the schema: status "ok" without a reading or a label')
    if is_ok and len(label.split()) > MAX_LABEL_WORDS:
        raise InvalidReply(f"the answer breaks the schema: label: more than {MAX_LABEL_WORDS} words")
    return Label(
        answer.request.feature,
        "llm",
        _STATUSES.get(found.status, "unclear"),
        label if is_ok else "",
        reads,
        writes,
        version=version,
        scope=found.scope if is_ok else "",
        confidence=found.confidence,
        predicted_positive=tuple(filter(None, map(_one_line, found.predicted_positive))) if is_ok else (),
        predicted_negative=tuple(filter(None, map(_one_line, found.predicted_negative))) if is_ok else (),
        provenance=json.dumps(dict(provenance), ensure_ascii=False, sort_keys=True),
    )


def _one_line(text: str) -> str:
    return " ".join(_CONTROL_CHARACTERS.sub(" ", text).split())
