"""One run of the scores stage: every scorer on the labels of one SAE.

What belongs here: which labels are tested by which scorer, and on what. What does not: the scorers (a module each), or what a
run leaves on disk and when it is done (`stage.py`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

import numpy as np
import polars as pl

from scopeatlas.activations.cache import cache_activations
from scopeatlas.activations.nulls import null_matches
from scopeatlas.corpus.build import Corpus
from scopeatlas.corpus.documents import SPLITS
from scopeatlas.dictionaries.releases import SaeEntry, open_dictionary
from scopeatlas.dictionaries.sparse import SparseDictionary
from scopeatlas.errors import ConfigError
from scopeatlas.hypotheses.counts import firing_counts
from scopeatlas.hypotheses.labels import Label, labels_of
from scopeatlas.hypotheses.neighbours import Neighbours, nearest_features
from scopeatlas.hypotheses.nulls import null_firings
from scopeatlas.hypotheses.samples import Windows, draw_windows, trigger_tokens
from scopeatlas.hypotheses.units import Firings, Units, read_firings
from scopeatlas.labels.asking import Asking
from scopeatlas.labels.stage import LabelSettings, label_features
from scopeatlas.llm.config import ServerConfig
from scopeatlas.llm.requests import ChatRequest
from scopeatlas.mining.examples import examples_key, mine_examples, open_examples
from scopeatlas.runner.local import Log
from scopeatlas.scoring.execution import execute_rules
from scopeatlas.scoring.judged import Judges, judge_labels, judge_prompts, make_trials
from scopeatlas.scoring.random_directions import random_direction_rows
from scopeatlas.scoring.retrieval import Embed, retrieve
from scopeatlas.scoring.table import Cell, Scorer
from scopeatlas.scoring.writes import steer_writes
from scopeatlas.storage.files import unit_hash
from scopeatlas.storage.store import Store
from scopeatlas.subject.loading import SubjectModel

RANDOM_SEED = 0
"""Of the randomly initialised subject model."""


@dataclass(frozen=True)
class ScoreSettings:
    """What is tested how. A rule is always executed, and its text put before no judge; every other scorer tests the labels of
    some features.

    min_report_documents: a label whose feature fires in fewer report documents is refused. judge: the LLM that reads text
    labels, second_judge another that reads some of them too, each off unless it names a model. scorers: what the judge is
    asked (of `judged.JUDGED`). judged_features, retrieved_features, steered_features: of so many features at most, 0 is off;
    those that a person or an LLM labelled first, then others at random. positives, random, trigger, neighbour: windows of
    each kind that a judge or the embedder is shown. stop_early: stop asking once the answers decide. random_model: also run
    the whole chain on a randomly initialised subject model, which costs as much again. embedder: what `embed` is, so that
    another one gives other scores. seed: of every draw.
    """

    min_report_documents: int = 3
    judge: ServerConfig = field(default_factory=ServerConfig)
    second_judge: ServerConfig = field(default_factory=ServerConfig)
    scorers: tuple[Scorer, ...] = ("detection", "fuzzing", "intruder")
    judged_features: int = 1000
    retrieved_features: int = 0
    steered_features: int = 0
    positives: int = 50
    random: int = 20
    trigger: int = 15
    neighbour: int = 15
    stop_early: bool = True
    random_model: bool = False
    embedder: str = ""
    seed: int = 0

    @property
    def judges(self) -> Judges:
        return Judges(self.judge, self.second_judge, self.scorers, stop_early=self.stop_early)

    def identity(self) -> list[object]:
        """What of the settings determines scores; neither prices nor limits do."""
        drawn = [self.positives, self.random, self.trigger, self.neighbour, self.seed]
        models = [
            [config.model, config.temperature, config.reasoning_tokens]
            for config in (self.judge, self.second_judge)
            if config.enabled
        ]
        judged = [models, self.scorers, self.judged_features, self.stop_early, judge_prompts()] if self.judge.enabled else []
        retrieved = [self.retrieved_features, self.embedder] if self.retrieved_features else []
        return [self.min_report_documents, drawn, judged, retrieved, self.steered_features, self.random_model]


class ScoreRun:
    """The scores of one SAE's labels, from what is in the store, each part read when it is needed.

    labels: those that are ok, current or not. Whatever reads a stage that is missing raises NotReadyError.
    """

    def __init__(
        self,
        store: Store,
        corpus: Corpus,
        entry: SaeEntry,
        subject: SubjectModel,
        labels: Sequence[Label],
        *,
        settings: ScoreSettings,
        width: int,
        log: Log,
    ):
        self.store, self.corpus, self.entry, self.subject = store, corpus, entry, subject
        self.labels, self.settings, self.width, self.log = labels, settings, width, log

    @cached_property
    def units(self) -> Units:
        return Units(self.corpus, self.subject)

    @cached_property
    def firings(self) -> Firings:
        return read_firings(self.store, self.corpus, self.entry, self.subject, self.units, width=self.width)

    @cached_property
    def dictionary(self) -> SparseDictionary:
        return open_dictionary(self.entry)

    @cached_property
    def neighbours(self) -> Neighbours:
        key = examples_key(self.corpus, self.entry, self.subject)
        return nearest_features(self.dictionary, open_examples(self.store, self.corpus.id, self.entry.key, key))

    @cached_property
    def nulls(self) -> Firings | None:
        """The firings of random directions; None where none were encoded."""
        return null_firings(self.store, self.corpus, self.entry, self.subject, self.units)

    def documents(self) -> dict[str, int]:
        """Documents of the corpus, by split."""
        units = self.units
        return {
            split: len(np.unique(units.context_document[units.context_split == number])) for number, split in enumerate(SPLITS)
        }

    def sampled(self, count: int, *, of: Callable[[Label], str]) -> list[Label]:
        """The labels with a claim (`of`) of at most `count` features: those that a person or an LLM labelled first, then by
        chance."""
        claiming = [label for label in self.labels if of(label)]
        described = {label.feature for label in claiming if label.method != "rule"}
        chance = {label.feature: unit_hash("scored", f"{self.settings.seed}:{label.feature}") for label in claiming}
        order = sorted(chance, key=lambda feature: (feature not in described, chance[feature]))
        chosen = set(order[:count])
        return [label for label in claiming if label.feature in chosen]

    def windows(self, labels: Sequence[Label]) -> Windows[Literal["report"]]:
        """What the labels are tested on, where the unit is a window."""
        settings = self.settings
        return draw_windows(
            self.units,
            self.firings,
            sorted({label.feature for label in labels}),
            split="report",
            neighbours=self.neighbours,
            positives=settings.positives,
            random=settings.random,
            trigger=settings.trigger,
            neighbour=settings.neighbour,
            seed=settings.seed,
        )

    def triggers(self, labels: Sequence[Label]) -> dict[int, list[str]]:
        """The texts of each feature's trigger tokens, most frequent first."""
        texts, found = self.units.column("token")[1], {label.feature: [] for label in labels}
        for feature, key in trigger_tokens(self.units, self.firings, sorted(found)).select("feature", "key").iter_rows():
            found[feature].append(texts[key])
        return found

    def executed(self) -> list[dict[str, Cell]]:
        """Every rule, run."""
        settings, bar = self.settings, self.settings.min_report_documents
        rows = execute_rules(
            self.units, self.firings, self.labels, neighbours=self.neighbours, min_documents=bar, seed=settings.seed
        )
        self.log(f"label scores: {sum(row['arm'] == 'own' for row in rows):,} rules executed on report documents")
        return rows

    def random_directions(self, labels: LabelSettings) -> list[dict[str, Cell]]:
        """What the rule labeller explains of random directions; nothing where none were encoded."""
        if self.nulls is None:
            return []
        matched = null_matches(self.store, self.corpus, self.entry, self.subject)
        bar, seed = self.settings.min_report_documents, self.settings.seed
        return random_direction_rows(self.units, self.nulls, matched, rules=labels.rules, min_documents=bar, seed=seed)

    def null_densities(self) -> tuple[float, float] | None:
        """The lowest and highest density, on explain and select documents, of the features that random directions match."""
        if self.nulls is None:
            return None
        matched = null_matches(self.store, self.corpus, self.entry, self.subject)
        density = firing_counts(self.units, self.firings)["density"].to_numpy()[matched]
        return float(density.min()), float(density.max())

    def to_judge(self) -> list[Label]:
        """The labels that the judge is asked about: those of text alone, since a rule can be run."""
        return self.sampled(self.settings.judged_features, of=lambda label: "" if label.rule else _text(label))

    def questions(self) -> list[ChatRequest]:
        """Everything that the judge would be asked if nothing stopped early."""
        labels = self.to_judge()
        trials = make_trials(
            labels,
            self.windows(labels),
            {},
            sae=self.entry.key,
            judges=self.settings.judges,
            min_documents=self.settings.min_report_documents,
            seed=self.settings.seed,
        )
        every = [rounds for mine in trials.values() for trial in mine for rounds in trial.rounds.values()]
        return [one.request for rounds in every for one in rounds]

    def judged(self, asking: Asking) -> tuple[list[dict[str, Cell]], pl.DataFrame]:
        """The judge's verdicts on text claims, and what detection was right and wrong on."""
        labels = self.to_judge()
        self.log(f"label scores: {len(labels):,} labels before {self.settings.judge.model}")
        return judge_labels(
            labels,
            self.windows(labels),
            self.triggers(labels),
            sae=self.entry.key,
            asking=asking,
            judges=self.settings.judges,
            min_documents=self.settings.min_report_documents,
            seed=self.settings.seed,
        )

    def retrieved(self, embed: Embed | None) -> list[dict[str, Cell]]:
        """Embedding retrieval of text claims. Raises ConfigError if it is asked for and there is no embedder."""
        if not self.settings.retrieved_features:
            return []
        if embed is None:
            raise ConfigError(
                "labels are to be tested by embedding retrieval, but no embedder is given: set retrieved_features to 0"
            )
        labels = self.sampled(self.settings.retrieved_features, of=_text)
        self.log(f"label scores: {len(labels):,} labels tested by embedding retrieval")
        triggers = self.triggers(labels)
        said = [", ".join(triggers[label.feature]) for label in labels]
        bar, seed = self.settings.min_report_documents, self.settings.seed
        return retrieve(labels, self.windows(labels), said, embed, min_documents=bar, seed=seed)

    def steered(self) -> list[dict[str, Cell]]:
        """The claims on what is written, tested on the subject model."""
        labels = self.sampled(self.settings.steered_features, of=lambda label: label.writes)
        if not labels:
            return []
        self.log(f"label scores: {len(labels):,} claims on what is written tested by steering")
        bar, seed = self.settings.min_report_documents, self.settings.seed
        return steer_writes(self.dictionary, self.subject, self.corpus, labels, min_documents=bar, seed=seed)

    def random_model(self, labels: LabelSettings) -> list[dict[str, Cell]]:
        """What rules explain of the same SAE on a randomly initialised subject model: rows in arm "random_model".

        The whole chain is run in a store of its own inside this one (Heap et al., ICLR 2026: much of what is scored on a
        trained model is scored on a random one too).
        """
        inside = Store(self.store.root / "controls" / f"random-model-{RANDOM_SEED}")
        inside.register(self.entry.key, self.entry.as_json())
        random = replace(self.subject, random_seed=RANDOM_SEED)
        self.log("label scores: the chain on a randomly initialised subject model")
        cache_activations(inside, self.corpus, [self.entry], random, log=self.log)
        mine_examples(inside, self.corpus, self.entry, random, log=self.log)
        rules_only = LabelSettings(rules=labels.rules)
        made, _ = label_features(inside, self.corpus, self.entry, random, settings=rules_only, log=self.log)
        described = [label for label in labels_of(made.table) if label.status == "ok" and label.rule]
        other = ScoreRun(
            inside, self.corpus, self.entry, random, described, settings=self.settings, width=self.width, log=self.log
        )
        of_own = {"lift", "lift_low", "lift_high", "p_value"}
        return [
            {name: cell for name, cell in row.items() if name not in of_own} | {"arm": "random_model"}
            for row in other.executed()
            if row["arm"] == "own"
        ]


def _text(label: Label) -> str:
    return label.reads or label.label
