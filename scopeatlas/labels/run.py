"""One run of the labels stage: everything between the examples of an SAE and its labels.

What belongs here: putting the labellers, falsification and the judge together for some features. What does not: what a run
leaves on disk and when it is done (`stage.py`), or how any of the parts works.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property, partial, reduce
from typing import Literal

import numpy as np
import polars as pl

from scopeatlas.activations.probe import Probe
from scopeatlas.corpus.build import Corpus
from scopeatlas.corpus.documents import SPLITS
from scopeatlas.dictionaries.releases import SaeEntry, open_dictionary
from scopeatlas.dictionaries.sparse import SparseDictionary
from scopeatlas.errors import ConfigError
from scopeatlas.hypotheses.counts import firing_counts
from scopeatlas.hypotheses.labels import Label, Status
from scopeatlas.hypotheses.neighbours import Neighbours, nearest_features
from scopeatlas.hypotheses.samples import Windows
from scopeatlas.hypotheses.units import Firings, Units, read_firings
from scopeatlas.judges import detection
from scopeatlas.judges.rounds import Claim, Round, judge_prompt
from scopeatlas.labels.asking import Asking, Heard, Question, numbered
from scopeatlas.labels.choosing import Trial, executed, select_windows, trial
from scopeatlas.labels.edits import PROMPT as EDITS_PROMPT
from scopeatlas.labels.edits import Edit, edit_requests, read_edits
from scopeatlas.labels.explainers import (
    MAX_OUTPUT_TOKENS,
    METHODS,
    ExplainMethod,
    Shown,
    gather,
    read_label,
    show,
    version_of,
)
from scopeatlas.labels.falsification import TESTS, Falsification, falsify
from scopeatlas.labels.outputs import read_outputs, steered, writes_claims
from scopeatlas.labels.rule_labeller import RULES_VERSION, RuleSettings, propose_rules, refusals
from scopeatlas.llm.config import ServerConfig
from scopeatlas.llm.estimate import Estimate, estimate
from scopeatlas.llm.ledger import Ledger
from scopeatlas.llm.replies import InvalidReply, fault
from scopeatlas.llm.requests import Answer, ChatRequest
from scopeatlas.mining.examples import FeatureExamples, examples_key, open_examples
from scopeatlas.runner.local import Log
from scopeatlas.storage.files import content_hash
from scopeatlas.storage.records import ShardKey
from scopeatlas.storage.store import Store
from scopeatlas.storage.uris import readable
from scopeatlas.subject.loading import SubjectModel


@dataclass(frozen=True)
class LabelSettings:
    """rules: the rule labeller's thresholds. explainer: the LLM that proposes, by `method`; judge: the one that reads text
    labels on select windows; each off unless it names a model. llm_features: how many features are shown to the explainer
    where none are named, those seen in most explain documents first. falsified_features: the labels of how many features at
    most are put to the test by running text through the subject model.
    """

    rules: RuleSettings = RuleSettings()
    explainer: ServerConfig = ServerConfig()
    judge: ServerConfig = ServerConfig()
    method: ExplainMethod = "combined"
    llm_features: int = 100
    falsified_features: int = 0

    @property
    def version(self) -> str:
        """Of the labels that the explainer proposes; empty where it is off."""
        return version_of(self.explainer, self.method) if self.explainer.enabled else ""

    def identity(self) -> list[object]:
        """What of the settings determines labels, but for which features are asked about; neither prices nor timeouts do."""
        return [
            asdict(self.rules),
            [self.version, *_answering(self.explainer)] if self.version else [],
            [self.judge.model, *_answering(self.judge), judge_prompt(detection.PROMPT).stamp] if self.judge.enabled else [],
            [self.falsified_features, EDITS_PROMPT.stamp] if self.falsified_features else [],
        ]


class LabelRun:
    """The labels of one SAE, from what is in the store, each part read when it is needed. folder: of the labels stage.

    Whatever reads a stage that is missing raises NotReadyError.
    """

    def __init__(
        self, store: Store, corpus: Corpus, entry: SaeEntry, subject: SubjectModel, settings: LabelSettings, *, log: Log
    ):
        self.store, self.corpus, self.entry, self.subject = store, corpus, entry, subject
        self.settings, self.log = settings, log
        self.stage = store.stage(entry.key, corpus.id, "labels")
        self.folder = self.stage.root

    @cached_property
    def examples(self) -> FeatureExamples:
        return open_examples(self.store, self.corpus.id, self.entry.key, examples_key(self.corpus, self.entry, self.subject))

    @cached_property
    def counts(self) -> pl.DataFrame:
        """`firing_counts`, from the stage's folder if an earlier run left them there: the firings may be pruned by now."""
        if self.stage.is_done(self.counts_key):
            return pl.read_parquet(readable(self.stage.data_path(self.counts_key, ".parquet")))
        return firing_counts(self.units, self.firings)

    @cached_property
    def counts_key(self) -> ShardKey:
        return ShardKey("counts", content_hash(RULES_VERSION, self.examples.key.identity))

    @cached_property
    def refused(self) -> dict[int, Status]:
        return refusals(self.counts, self.settings.rules)

    @cached_property
    def units(self) -> Units:
        return Units(self.corpus, self.subject)

    @cached_property
    def firings(self) -> Firings:
        width = len(self.examples.features)
        return read_firings(self.store, self.corpus, self.entry, self.subject, self.units, width=width)

    @cached_property
    def dictionary(self) -> SparseDictionary:
        return open_dictionary(self.entry)

    @cached_property
    def neighbours(self) -> Neighbours:
        return nearest_features(self.dictionary, self.examples)

    def by_evidence(self) -> list[int]:
        """The features that are not refused, those seen in most explain documents first."""
        live = self.counts.filter(~pl.col("feature").is_in(list(self.refused)))
        return live.sort("explain_documents", "feature", descending=[True, False])["feature"].to_list()

    def worth_asking(self, only: Sequence[int] | None) -> list[int]:
        """The features of `only` that are not refused, by default the `llm_features` with most evidence.

        Raises ConfigError for numbers that are no features, or if there is no explainer to ask about them.
        """
        if only is None:
            return self.by_evidence()[: self.settings.llm_features]
        if not self.settings.version:
            raise ConfigError("features were named for an LLM to explain, but none is configured: set the explainer's model")
        strange = [feature for feature in only if not 0 <= feature < len(self.examples.features)]
        if strange:
            raise ConfigError(f"{self.entry.key} has no feature {strange[0]}; the last is {len(self.examples.features) - 1}")
        known = [f"{feature} ({self.refused[feature]})" for feature in only if feature in self.refused]
        if known:
            self.log(f"feature labels: not asked about, for want of evidence: {', '.join(known)}")
        return [feature for feature in only if feature not in self.refused]

    def rules(self) -> list[Label]:
        """A rule or a refusal for every feature, with what it promotes as its claim on what is written."""
        writes = writes_claims(self.examples.features, self.subject)
        provenance = json.dumps({"examples": self.examples.key.identity})
        labels = propose_rules(self.units, self.firings, self.refused, self.settings.rules)
        self.log(
            f"feature labels: {sum(label.status == 'ok' for label in labels):,} of {len(labels):,} features explained by a rule"
        )
        return [replace(label, writes=writes.get(label.feature, ""), provenance=provenance) for label in labels]

    def questions(self, features: Sequence[int]) -> list[Question[Label]]:
        """What the explainer is asked about `features`, in order, and how its answers become labels."""
        shown = METHODS[self.settings.method]
        outputs = read_outputs(self.examples, self.subject, features, self._raised(features)) if shown.outputs else {}
        neighbours = self.neighbours if shown.near_misses else None
        material = gather(self.units, self.firings, features, neighbours=neighbours, outputs=outputs)
        asked = [show(self.entry.key, feature, material, method=self.settings.method) for feature in features]
        return [Question(one.request, partial(self._label, shown=one)) for one in asked]

    def _raised(self, features: Sequence[int]) -> dict[int, tuple[str, ...]]:
        return steered(
            self.folder / "raised.jsonl",
            self.examples.key.identity,
            features,
            corpus=self.corpus,
            subject=self.subject,
            dictionary=lambda: self.dictionary,
            log=self.log,
        )

    def explained(self, asking: Asking, features: Sequence[int]) -> list[Label]:
        """The explainer's labels of `features`; status error where there is no usable answer."""
        heard = asking.ask(self.questions(features), self.settings.explainer)
        labels = [one.value or self._unusable(one) for one in heard]
        good = sum(label.status == "ok" for label in labels)
        self.log(f"feature labels: {good:,} of {len(labels):,} asked for explained by {self.settings.explainer.model}")
        return labels

    def _label(self, answer: Answer, shown: Shown) -> Label:
        facts = _provenance(answer, self.settings)
        facts |= {"windows": [list(window) for window in shown.windows], "corpus": self.corpus.id}
        return read_label(answer, version=self.settings.version, provenance=facts)

    def _unusable(self, heard: Heard[Label]) -> Label:
        provenance = {**_provenance(heard.answer, self.settings), "error": heard.problem}
        feature = heard.answer.request.feature
        text = json.dumps(provenance, ensure_ascii=False, sort_keys=True)
        return Label(feature, "llm", "error", version=self.settings.version, provenance=text)

    def falsified(self, asking: Asking | None, labels: Sequence[Label], asked: Sequence[int]) -> tuple[list[Label], pl.DataFrame]:
        """The labels, those whose predictions fail with status falsified, and what was tried on the subject model.

        Tested are the labels of `falsified_features` features: `asked` ones first, then those with most evidence.
        """
        tested = self._tested(labels, asked)
        if not tested:
            return list(labels), pl.DataFrame(schema=TESTS)
        select = self._select(tested)
        edits = self._edits(asking, tested, select) if asking and self.settings.version else {}
        found = falsify(tested, select, Probe(self.dictionary, self.subject), edits=edits)
        self.log(f"feature labels: {len(found.demoted):,} of {len(tested):,} labels put to the test on the subject model failed")
        return _judged(labels, found), found.table

    def _tested(self, labels: Sequence[Label], asked: Sequence[int]) -> list[Label]:
        described = {label.feature for label in labels if label.status == "ok"}
        order = [feature for feature in dict.fromkeys([*asked, *self.by_evidence()]) if feature in described]
        chosen = set(order[: self.settings.falsified_features])
        return [label for label in labels if label.status == "ok" and label.feature in chosen]

    def _select(self, labels: Sequence[Label]) -> Windows[Literal["select"]]:
        features = sorted({label.feature for label in labels})
        return select_windows(self.units, self.firings, features, neighbours=self.neighbours)

    def _edits(self, asking: Asking, labels: Sequence[Label], select: Windows[Literal["select"]]) -> dict[str, list[Edit]]:
        asked = self._edit_requests(labels, select)
        questions = [Question(request, partial(read_edits, label=label, select=select)) for label, request in asked]
        heard = asking.ask(questions, self.settings.explainer)
        return {label.label_id: one.value for (label, _), one in zip(asked, heard, strict=True) if one.value}

    def _edit_requests(self, labels: Sequence[Label], select: Windows[Literal["select"]]) -> list[tuple[Label, ChatRequest]]:
        texts = [label for label in labels if label.method != "rule"]
        return [(label, request) for label in texts for request in edit_requests(self.entry.key, label, select)]

    def rounds(self, labels: Iterable[Label]) -> list[tuple[Label, pl.DataFrame, list[Round]]]:
        """What the judge is asked: each text label with the windows of its feature, and the rounds about them."""
        texts = [label for label in labels if label.method != "rule" and label.status == "ok" and label.reads]
        select = self._select(texts)
        asked = []
        for label in texts:
            windows, claim = select.of(label.feature), Claim(label.feature, label.label_id, label.reads)
            asked.append((label, windows, detection.requests(self.entry.key, claim, windows, seed=0)))
        return asked

    def tried(self, asking: Asking, labels: Sequence[Label]) -> dict[str, Trial]:
        """By label id, how the labels of every feature that has a text label do on select windows."""
        asked = self.rounds(labels)
        questions = [Question(one.request, partial(detection.read, round=one)) for _, _, rounds in asked for one in rounds]
        heard = iter(asking.ask(questions, self.settings.judge))
        trials: dict[str, Trial | None] = {}
        for label, windows, rounds in asked:
            claimed = np.full(len(windows), np.nan)
            for one in rounds:
                claimed[list(one.rows)] = next(heard).value or np.nan
            by = f"detection by {self.settings.judge.model}"
            trials[label.label_id] = None if np.isnan(claimed).any() else trial(windows, claimed.tolist(), by)
        described = {label.feature for label, _, _ in asked}
        rules = [label for label in labels if label.rule and label.status == "ok" and label.feature in described]
        found = executed(self.units, self._select(rules), rules)
        return found | {label_id: result for label_id, result in trials.items() if result is not None}

    def estimated(
        self, features: Sequence[int], others: Sequence[Label], attempts: Mapping[str, int], journal: Ledger
    ) -> Estimate:
        """What a run would ask at most about `features`, and of the judge about `others` too. Answers that are there already
        are read; a label that is not there yet is taken for a good one, and as long as it can be."""
        explainer, judge = self.settings.explainer, self.settings.judge
        requests, labels = [], list(others)
        for question in self.questions(features):
            requests.append(numbered(question.request, explainer, attempts))
            labels.append(_expected(question, requests[-1], explainer, journal))
        tested = self._tested(labels, features) if self.settings.version else []
        edits = self._edit_requests(tested, self._select(tested))
        requests += [numbered(request, explainer, attempts) for _, request in edits]
        rounds = self.rounds(labels) if judge.enabled else []
        judged = [numbered(one.request, judge, attempts) for _, _, asked in rounds for one in asked]
        servers = [(requests, explainer), (judged, judge)]
        # one that is off has no budget, which would pass for the smallest
        found = [estimate(asked, config, journal) for asked, config in servers if config.enabled]
        return reduce(_sum, found) if found else Estimate()

    def is_of_explain(self, label: Label) -> bool:
        """Whether every document that a label was proposed from is an explain document of this corpus, as it is now."""
        splits = dict(zip(self.units.documents, self._document_splits, strict=True))
        windows = json.loads(label.provenance).get("windows", [])
        return all(splits.get(document) == "explain" for document, _, _ in windows)

    @cached_property
    def _document_splits(self) -> list[str]:
        split = np.zeros(len(self.units.documents), dtype=np.int64)
        split[self.units.context_document] = self.units.context_split
        return [SPLITS[i] for i in split]


def _answering(config: ServerConfig) -> list[float]:
    """What of a server's settings determines its answers, beside the model."""
    return [config.temperature, config.reasoning_tokens]


def _expected(question: Question[Label], request: ChatRequest, config: ServerConfig, journal: Ledger) -> Label:
    """The label that was given in answer to a request, or one of the length that fills an answer."""
    entry = journal.entry(request.key(config))
    if entry is None:
        return Label(request.feature, "llm", "ok", "not there yet", "word " * MAX_OUTPUT_TOKENS)
    try:
        return question.read(Answer(request, request.key(config), entry.reply, fault(entry.reply, config.model)))
    except InvalidReply:
        return Label(request.feature, "llm", "error")


def _sum(one: Estimate, other: Estimate) -> Estimate:
    """Both together, within the smaller budget."""
    priced = [usd for usd in (one.usd, other.usd) if usd is not None]
    added = {f.name: getattr(one, f.name) + getattr(other, f.name) for f in fields(Estimate) if f.name not in ("usd", "room")}
    return Estimate(**added, usd=sum(priced) if priced else None, room=min(one.room, other.room))


def _judged(labels: Sequence[Label], found: Falsification) -> list[Label]:
    """The labels with their verdicts in their provenance, and those that failed with status falsified."""
    verdicts = {row.pop("label_id"): row for row in found.verdicts.drop("feature").to_dicts()}
    made = []
    for label in labels:
        verdict = verdicts.get(label.label_id) if label.status == "ok" else None
        provenance = {**json.loads(label.provenance), "falsification": verdict} if verdict else json.loads(label.provenance)
        text = json.dumps(provenance, ensure_ascii=False, sort_keys=True) if verdict else label.provenance
        made.append(replace(label, status="falsified" if label.label_id in found.demoted else label.status, provenance=text))
    return made


def _provenance(answer: Answer, settings: LabelSettings) -> dict[str, object]:
    return {
        "model": settings.explainer.model,
        "model_said": answer.reply.model if answer.reply else "",
        "prompt": answer.request.prompt,
        "method": settings.method,
        "request_key": answer.key,
        "rung": answer.rung,
        "time": answer.time,
        **asdict(answer.charge),
    }
