"""Two features side by side, of one SAE or of two: do they write alike, fire alike, and do their labels say the same?

What belongs here: one pair in detail. What does not: finding pairs (`matching.py`).
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import polars as pl

from scopeatlas.hypotheses.metrics import bootstrap_intervals, constant_f1, point_metrics
from scopeatlas.hypotheses.rules import Rule
from scopeatlas.hypotheses.units import Units, document_counts
from scopeatlas.scoring.retrieval import Embed
from scopeatlas.study.cosines import different_spaces, pair_cosines
from scopeatlas.study.matching import MATCHED_ON, correlation_of, shared_counts
from scopeatlas.study.opening import OpenSae
from scopeatlas.study.shared_tokens import TOKENS, share_tokens
from scopeatlas.study.transfer import MIN_DOCUMENTS, TESTED_ON, shown_labels

RULE_SCHEMA = pl.Schema(
    {
        "rule_of": pl.String,  # a or b: whose label is executed
        "on": pl.String,  # a or b: whose firings it is tested on
        "unit": pl.String,
        "documents": pl.Int64,  # report documents that the feature fires in
        "f1": pl.Float64,  # null where those are too few
        "f1_low": pl.Float64,
        "f1_high": pl.Float64,
        "constant_f1": pl.Float64,  # of the claim that it always fires
    }
)


@dataclass(frozen=True)
class Comparison:
    """Feature a beside feature b, each named by its key in the atlas.

    label_a, label_b: "" where there is none. Of explain and select documents: tokens in all, tokens_a and tokens_b on which
    each fires, both on which they do together; correlation of their activations over all tokens, zeros included, None where
    one never fires. cosine: of their decoder directions; None where no_cosine says why. label_cosine: of the embedded
    labels, None unless there are two and an embedder. rules: RULE_SCHEMA, every rule label on both features, on report
    documents.
    """

    a: str
    b: str
    label_a: str
    label_b: str
    tokens: int
    tokens_a: int
    tokens_b: int
    both: int
    correlation: float | None
    cosine: float | None
    no_cosine: str
    label_cosine: float | None
    rules: pl.DataFrame

    @property
    def jaccard(self) -> float:
        """The share of the tokens on which either fires that are tokens of both; 0 if neither fires."""
        return self.both / max(self.tokens_a + self.tokens_b - self.both, 1)

    def to_polars(self) -> pl.DataFrame:
        """One row: every figure but the rules'."""
        return pl.DataFrame([{name: value for name, value in self.as_dict().items() if name != "rules"}])

    def as_dict(self) -> dict[str, object]:
        """Everything as JSON-able values."""
        return {**vars(self), "jaccard": self.jaccard, "rules": self.rules.to_dicts()}

    def _repr_html_(self) -> str:
        from scopeatlas.rendering import html
        from scopeatlas.rendering.compare import comparison_facts

        facts = html.table(["", ""], comparison_facts(self))
        return facts + html.table(self.rules.columns, self.rules.iter_rows(), caption="every rule on both, report documents")


def compare(
    a: OpenSae, feature_a: int, b: OpenSae, feature_b: int, *, embed: Embed | None = None, tokens: int = TOKENS
) -> Comparison:
    """Compare a feature of SAE a with one of SAE b (flat ids), on at most `tokens` tokens to correlate and as many to test on.

    embed: texts to unit vectors, for the labels. Raises what `share_tokens` raises.
    """
    shared = share_tokens(a, b, splits=MATCHED_ON, tokens=tokens, features=(feature_a, feature_b))
    pair = np.array([feature_a]), np.array([feature_b])
    no_cosine = different_spaces(a, b)
    cosine = None if no_cosine else float(pair_cosines(a.probe.dictionary, b.probe.dictionary, *pair)[0])
    keys, labels = zip(*((sae.rows["key"][f], sae.rows["label"][f]) for sae, f in ((a, feature_a), (b, feature_b))), strict=True)
    vectors = embed(labels) if embed is not None and all(labels) else None
    return Comparison(
        *keys,
        *labels,
        tokens=shared.tokens,
        tokens_a=int(shared.a.fired[feature_a]),
        tokens_b=int(shared.b.fired[feature_b]),
        both=int(shared_counts(shared.a, shared.b, *pair)[0]),
        correlation=correlation_of(shared.a, feature_a, shared.b, feature_b),
        cosine=cosine,
        no_cosine=no_cosine,
        label_cosine=None if vectors is None else float(vectors[0] @ vectors[1]),
        rules=_rules(a, feature_a, b, feature_b, tokens),
    )


def _rules(a: OpenSae, feature_a: int, b: OpenSae, feature_b: int, tokens: int) -> pl.DataFrame:
    """RULE_SCHEMA: the rules of both features, each tested on both."""
    shown = {"a": shown_labels(a, [feature_a]), "b": shown_labels(b, [feature_b])}
    rules = {side: Rule.from_json(label.rule) for side, labels in shown.items() for label in labels if label.rule}
    if not rules:
        return pl.DataFrame(schema=RULE_SCHEMA)
    shared = share_tokens(a, b, splits=TESTED_ON, tokens=tokens, features=(feature_a, feature_b))
    units = Units(shared.sample, a.subject)
    firings = {"a": shared.firings(shared.a), "b": shared.firings(shared.b)}
    rows: list[Mapping[str, object]] = []
    for rule_of, rule in rules.items():
        for on, feature in (("a", feature_a), ("b", feature_b)):
            counts = document_counts(units, firings[on], {feature: rule}, [feature], split="report")
            documents = int((counts.fired > 0).sum())
            row: dict[str, object] = {"rule_of": rule_of, "on": on, "unit": rule.unit, "documents": documents}
            if documents >= MIN_DOCUMENTS:
                low, high = bootstrap_intervals(counts)["f1"][0].tolist()
                floor = constant_f1(counts.fired.sum(axis=1), counts.units.sum(axis=1))
                row |= {"f1": float(point_metrics(counts).f1[0]), "f1_low": low, "f1_high": high, "constant_f1": float(floor[0])}
            rows.append(row)
    return pl.DataFrame(rows, schema=RULE_SCHEMA)
