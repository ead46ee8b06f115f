"""The `labels` stage of one SAE: rule labels always, an LLM's where one is configured, one of them current.

What belongs here: putting the labellers together and writing their labels. What does not: how a rule is found
(`rule_labeller.py`) or an LLM asked (`llm.py`).
"""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace

import polars as pl

from scopeatlas.corpus.build import Corpus
from scopeatlas.dictionaries.releases import SaeEntry
from scopeatlas.hypotheses.labels import Label, Status, label_table
from scopeatlas.hypotheses.units import Firings, Units, read_firings
from scopeatlas.labels.chat import ExplainerConfig
from scopeatlas.labels.journal import Journal
from scopeatlas.labels.llm import Evidence, Explanation, MarkedExample, explain, load_prompt
from scopeatlas.labels.rule_labeller import RuleSettings, propose_rules, refusals
from scopeatlas.mining.examples import FeatureExamples, examples_key, open_examples, read_examples
from scopeatlas.mining.windows import mark
from scopeatlas.runner.local import Log, silent
from scopeatlas.storage.files import atomic_path, content_hash
from scopeatlas.storage.records import ShardKey
from scopeatlas.storage.store import Store
from scopeatlas.subject.loading import SubjectModel
from scopeatlas.subject.vocabulary import token_texts

STAGE_VERSION = 2
WRITES_MIN_STRENGTH = 6.0
"""Promoted tokens are a claim only if the strongest stands this many standard deviations out of the vocabulary: over
262,144 tokens chance alone reaches about 4.6."""
WRITES_TOKENS = 5
EVIDENCE_EXAMPLES = 20


@dataclass(frozen=True)
class LabelSettings:
    """rules: the rule labeller's thresholds. explainer: the LLM, off unless it names a model. llm_features: how many
    features at most are shown to it, those seen in most explain documents first."""

    rules: RuleSettings = RuleSettings()
    explainer: ExplainerConfig = ExplainerConfig()
    llm_features: int = 100

    def identity(self) -> list[object]:
        """What of the settings determines labels; neither prices nor timeouts do."""
        if not self.explainer.enabled:
            return [asdict(self.rules)]
        asked = (
            self.explainer.model,
            self.explainer.temperature,
            self.explainer.max_output_tokens,
            load_prompt().hash,
            self.llm_features,
        )
        return [asdict(self.rules), *asked]


@dataclass(frozen=True)
class FeatureLabels:
    """A finished stage: the table of labels (`hypotheses.labels.LABEL_SCHEMA`), and counts by status."""

    table: pl.DataFrame
    key: ShardKey

    @property
    def current(self) -> pl.DataFrame:
        return self.table.filter(pl.col("current"))

    def by_status(self) -> dict[str, int]:
        return dict(Counter(self.current["status"]).most_common())


def labels_key(corpus: Corpus, entry: SaeEntry, subject: SubjectModel, settings: LabelSettings) -> ShardKey:
    """What determines the labels: the examples (and through them the activations) and the settings."""
    return ShardKey("labels", content_hash(STAGE_VERSION, examples_key(corpus, entry, subject).identity, settings.identity()))


def label_features(
    store: Store,
    corpus: Corpus,
    entry: SaeEntry,
    subject: SubjectModel,
    *,
    settings: LabelSettings,
    log: Log = silent,
) -> tuple[FeatureLabels, bool]:
    """Label every feature or refuse to; returns the stage and whether it was there already.

    A new generation is written beside the older ones, which stay. Raises NotReadyError if examples are missing,
    ExplainerError if an LLM is configured and cannot be reached.
    """
    stage, key = store.stage(entry.key, corpus.id, "labels"), labels_key(corpus, entry, subject, settings)
    path = stage.data_path(key, ".parquet")
    if stage.is_done(key):
        return FeatureLabels(pl.read_parquet(path), key), True
    store.require_writable()
    examples = open_examples(store, corpus.id, entry.key, examples_key(corpus, entry, subject))
    units = Units(corpus, subject)
    firings = read_firings(store, corpus, entry, subject, units, width=len(examples.features))
    refused = refusals(examples.features, settings.rules)
    labels = _propose(units, firings, refused, examples, subject, settings)
    log(f"feature labels: {sum(label.status == 'ok' for label in labels):,} of {len(labels):,} features explained by a rule")
    if settings.explainer.enabled:
        journal_path = stage.root / "journal.jsonl"
        with Journal(journal_path) as journal:
            seen = int(units.in_split("explain").sum())
            evidence = _evidence(entry, examples, refused, subject, limit=settings.llm_features, seen=seen)
            explanations = [_llm_label(e) for e in explain(evidence, settings.explainer, journal)]
        log(
            f"feature labels: {sum(label.status == 'ok' for label in explanations):,} of {len(explanations):,} asked for explained by {settings.explainer.model}"
        )
        labels = _with_llm(labels, explanations)
    table = label_table(labels)
    with atomic_path(path) as temporary:
        table.write_parquet(temporary)
    stage.commit(key, [path], {"features": len(examples.features), "by_status": FeatureLabels(table, key).by_status()})
    return FeatureLabels(table, key), False


def _propose(
    units: Units,
    firings: Firings,
    refused: dict[int, Status],
    examples: FeatureExamples,
    subject: SubjectModel,
    settings: LabelSettings,
) -> list[Label]:
    writes = writes_claims(examples.features, subject)
    provenance = json.dumps({"method": "rule", "version": STAGE_VERSION, "examples": examples.key.identity})
    labels = propose_rules(units, firings, refused, settings.rules)
    return [replace(label, writes=writes.get(label.feature, ""), provenance=provenance) for label in labels]


def writes_claims(features: pl.DataFrame, subject: SubjectModel) -> dict[int, str]:
    """What features claim to write: their strongest promoted tokens, where those stand out of the vocabulary."""
    strong = features.filter(pl.col("promoted_strength").list.first() >= WRITES_MIN_STRENGTH)
    claims = {}
    for row in strong.select("feature", "promoted").iter_rows(named=True):
        texts = token_texts(subject.tokenizer, row["promoted"][:WRITES_TOKENS])
        claims[row["feature"]] = "raises " + ", ".join(f'"{text}"' for text in texts)
    return claims


def _evidence(
    entry: SaeEntry, examples: FeatureExamples, refused: dict[int, Status], subject: SubjectModel, *, limit: int, seen: int
) -> Iterator[Evidence]:
    """What the LLM is shown of each feature: explain documents only, of which `seen` tokens were seen."""
    live = examples.features.filter(~pl.col("feature").is_in(list(refused)))
    asked = live.sort("explain_documents", "feature", descending=[True, False]).head(limit)
    windows = read_examples(examples.examples, asked["feature"].to_list()).filter(pl.col("split") == "explain")
    by_feature = windows.partition_by("feature", as_dict=True)
    for row in asked.iter_rows(named=True):
        mine = by_feature[(row["feature"],)].sort("peak", "context_id", descending=[True, False])
        mine = mine.head(EVIDENCE_EXAMPLES)
        yield Evidence(
            sae=entry.key,
            feature=row["feature"],
            examples=tuple(
                MarkedExample(mark(w["texts"], w["activations"], marks=("<<", ">>")), w["peak"] / mine["peak"][0])
                for w in mine.iter_rows(named=True)
            ),
            density=row["explain_tokens"] / seen,
            promoted=tuple(token_texts(subject.tokenizer, row["promoted"])),
            suppressed=tuple(token_texts(subject.tokenizer, row["suppressed"])),
            example_ids=tuple(str(i) for i in mine["context_id"]),
        )


def _llm_label(explanation: Explanation) -> Label:
    statuses: dict[str, Status] = {"ok": "ok", "dense": "dense", "positional": "positional", "error": "error"}
    names = ("model", "prompt_hash", "request_key", "example_ids", "prompt_tokens", "completion_tokens", "confidence", "error")
    provenance = {name: getattr(explanation, name) for name in names}
    provenance |= {"predicted_positive": explanation.predicted_positive, "predicted_negative": explanation.predicted_negative}
    return Label(
        explanation.feature,
        "llm",
        statuses.get(explanation.status, "unclear"),
        explanation.label,
        explanation.reads,
        explanation.writes,
        provenance=json.dumps(provenance, ensure_ascii=False),
    )


def _with_llm(rules: list[Label], explanations: list[Label]) -> list[Label]:
    """A rule that was chosen on select documents stays current; an LLM's label is current where no rule explains."""
    unexplained = {label.feature for label in rules if label.status != "ok"}
    promoted = {label.feature for label in explanations if label.status == "ok" and label.feature in unexplained}
    kept = [replace(label, current=label.feature not in promoted) for label in rules]
    return kept + [replace(label, current=label.feature in promoted) for label in explanations]
