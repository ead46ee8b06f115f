"""The `labels` stage of one SAE on disk: rule labels always, an LLM's and people's where there are any, one of them current.

What belongs here: what a generation of labels depends on, writing it, going on with one that was left unfinished, and what
the next one would cost. What does not: making the labels (`run.py`).
"""

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace

import polars as pl

from scopeatlas.corpus.build import Corpus
from scopeatlas.corpus.documents import Split
from scopeatlas.dictionaries.releases import SaeEntry
from scopeatlas.hypotheses.labels import Label, Status, label_table, labels_of
from scopeatlas.labels import versions
from scopeatlas.labels.annotations import read_annotations
from scopeatlas.labels.asking import Asking, Tally
from scopeatlas.labels.choosing import choose
from scopeatlas.labels.falsification import TESTS
from scopeatlas.labels.rule_labeller import RULES_VERSION
from scopeatlas.labels.run import LabelRun, LabelSettings
from scopeatlas.llm.estimate import Estimate
from scopeatlas.llm.journal import open_journal, read_journal
from scopeatlas.mining.examples import examples_key
from scopeatlas.runner.local import Log, silent
from scopeatlas.storage.files import atomic_path, content_hash, locked, read_json_if_there, write_json
from scopeatlas.storage.records import ShardKey, StageFolder
from scopeatlas.storage.store import Store
from scopeatlas.storage.uris import Location, readable
from scopeatlas.subject.loading import SubjectModel

STAGE_VERSION = 4


@dataclass(frozen=True)
class FeatureLabels:
    """A generation of labels: the table (`hypotheses.labels.LABEL_SCHEMA`), what running texts through the subject model
    said of them (`falsification.Falsification.table`, empty where nothing was tried), and what was asked of LLMs."""

    table: pl.DataFrame
    falsification: pl.DataFrame
    tally: Tally
    key: ShardKey

    @property
    def current(self) -> pl.DataFrame:
        return self.table.filter(pl.col("current"))

    @property
    def coverage(self) -> float:
        """The share of features with a label that is neither a refusal nor falsified."""
        return self.by_status().get("ok", 0) / max(len(self.current), 1)

    def by_status(self) -> dict[str, int]:
        return dict(Counter(self.current["status"]).most_common())


def labels_key(store: Store, corpus: Corpus, entry: SaeEntry, subject: SubjectModel, settings: LabelSettings) -> ShardKey:
    """The generation of labels that the rest of the chain reads: the finished one, or what there is of an unfinished one.

    It is determined by the examples (and through them the activations), the settings, the features that the explainer was
    asked about, the annotations that stand, and what other explainers said before.
    """
    stage = store.stage(entry.key, corpus.id, "labels")
    key = _finished_key(store, corpus, entry, subject, settings)
    unfinished = _read(stage.root / "unfinished.json")
    if stage.is_done(key) or key.identity not in unfinished:
        return key
    return ShardKey("labels", unfinished[key.identity])


def _finished_key(store: Store, corpus: Corpus, entry: SaeEntry, subject: SubjectModel, settings: LabelSettings) -> ShardKey:
    folder = store.stage(entry.key, corpus.id, "labels").root
    asked = _read(folder / "asked.json")
    used = [
        settings.identity(),
        asked.get("features", {}).get(settings.version, []) if settings.version else [],
        asked.get("attempts", {}) if settings.version or settings.judge.enabled else {},
        [versions.as_entry(label) for label in read_annotations(store, corpus.id, entry.key)],
        sorted(label.label_id for label in _earlier(folder, settings)),
    ]
    return ShardKey("labels", content_hash(STAGE_VERSION, RULES_VERSION, examples_key(corpus, entry, subject).identity, used))


def label_features(
    store: Store,
    corpus: Corpus,
    entry: SaeEntry,
    subject: SubjectModel,
    *,
    settings: LabelSettings,
    only: Sequence[int] | None = None,
    retry_errors: bool = False,
    log: Log = silent,
) -> tuple[FeatureLabels, bool]:
    """Label every feature or refuse to; returns the stage and whether it was there already.

    only: ask the explainer about these features and those that it was asked about before, instead of the `llm_features`
    with most evidence. retry_errors: ask again where an answer was unusable. A new generation is written beside the older
    ones, which stay. One in which requests are unanswered (no budget is left, the server was busy) is written too, but the
    next run goes on with it.

    Raises NotReadyError if examples are missing, ExplainerError if an LLM is configured and of no use at all, ConfigError
    if `only` names what cannot be asked about.
    """
    run = LabelRun(store, corpus, entry, subject, settings, log=log)
    stage = store.stage(entry.key, corpus.id, "labels")
    if settings.version or only is not None:
        _remember(stage.root, settings.version, run.worth_asking(only))
    key = _finished_key(store, corpus, entry, subject, settings)
    if stage.is_done(key) and not (retry_errors and _open(stage, key).tally.invalid):
        return _open(stage, key), True
    store.require_writable()
    asked = set(_read(stage.root / "asked.json").get("features", {}).get(settings.version, []))
    with _asking(store, stage.root, settings, retry=retry_errors, log=log) as asking:
        table, falsification = _make(run, stage, asking, [f for f in run.by_evidence() if f in asked])
        tally = Tally.of(asking.heard) if asking else Tally()
        answered = sorted({one.answer.key for one in asking.heard if one.answer.reply}) if asking else []
    key = _finished_key(store, corpus, entry, subject, settings)  # a repeated request is part of it
    made = ShardKey("labels", content_hash(key.identity, answered)) if tally.unanswered else key
    if not stage.is_done(made):
        _commit(stage, FeatureLabels(table, falsification, tally, made))
    if tally.unanswered:
        log(f"feature labels: {tally.unanswered:,} of {tally.asked:,} requests are unanswered; the next run goes on with them")
    _update(stage.root / "unfinished.json", {key.identity: made.identity} if tally.unanswered else {})
    return _open(stage, made), False


def estimate_labels(
    store: Store,
    corpus: Corpus,
    entry: SaeEntry,
    subject: SubjectModel,
    *,
    settings: LabelSettings,
    only: Sequence[int] | None = None,
    log: Log = silent,
) -> Estimate:
    """What `label_features` with the same arguments would ask at most, of the explainer and of the judge. Asks nobody.

    Labels that are not there yet are taken for good and long ones. Raises as `label_features` does, but for the server.
    """
    run = LabelRun(store, corpus, entry, subject, settings, log=log)
    folder = store.stage(entry.key, corpus.id, "labels").root
    asked = _read(folder / "asked.json")
    wanted = {*run.worth_asking(only), *asked.get("features", {}).get(settings.version, [])} if settings.version else set()
    others = [label for label in (*_people(run, store), *_earlier(folder, settings)) if run.is_of_explain(label)]
    features = [feature for feature in run.by_evidence() if feature in wanted]
    return run.estimated(features, others, asked.get("attempts", {}), read_journal(store.root))


def documents_read(table: pl.DataFrame, falsification: pl.DataFrame | None = None) -> list[tuple[str, Split]]:
    """Every document that the labels of a table say they were proposed from or chosen on, and the split it was read as.

    falsification: `FeatureLabels.falsification`; with it, also those that texts were edited from to put labels to the test.
    """
    edited = [] if falsification is None else falsification["document_id"].to_list()
    found: set[tuple[str, Split]] = {(document, "select") for document in edited if document}
    for provenance in map(json.loads, table["provenance"]):
        found |= {(document, "explain") for document, _, _ in provenance.get("windows", [])}
        found |= {(document, "select") for document in provenance.get("choice", {}).get("documents", [])}
    return sorted(found)


def _make(run: LabelRun, stage: StageFolder, asking: Asking | None, features: Sequence[int]) -> tuple[pl.DataFrame, pl.DataFrame]:
    """The labels, and what was tried on the subject model. features: those that the explainer is asked about, in order."""
    settings = run.settings
    labels = _rules(run, stage)
    if asking and settings.version:
        explained = run.explained(asking, features)
        _keep(stage.root, [label for label in explained if label.status != "error"])
        labels += explained
    labels += _people(run, run.store) + [label for label in _earlier(stage.root, settings) if run.is_of_explain(label)]
    falsification = pl.DataFrame(schema=TESTS)
    if settings.falsified_features:
        labels, falsification = run.falsified(asking, labels, features)
    trials = run.tried(asking, labels) if asking and settings.judge.enabled else {}
    return label_table(_refusing_dead(choose(labels, trials, version=settings.version), run.refused)), falsification


def _refusing_dead(labels: Sequence[Label], refused: Mapping[int, Status]) -> list[Label]:
    """The same labels, with the refusal of every dead feature current: nothing that anybody says of it can be tested."""
    return [replace(label, current=label.status == "dead") if refused.get(label.feature) == "dead" else label for label in labels]


def _rules(run: LabelRun, stage: StageFolder) -> list[Label]:
    """The rule labels, made once for all generations that share them; with them, the counts that refusals follow from."""
    _write(stage, run.counts_key, lambda: run.counts)
    key = ShardKey("rules", content_hash(RULES_VERSION, run.examples.key.identity, asdict(run.settings.rules)))
    _write(stage, key, lambda: label_table(run.rules()))
    return labels_of(pl.read_parquet(readable(stage.data_path(key, ".parquet"))))


def _write(stage: StageFolder, key: ShardKey, make: Callable[[], pl.DataFrame]) -> None:
    path = stage.data_path(key, ".parquet")
    if not stage.is_done(key):
        table = make()
        with atomic_path(path) as temporary:
            table.write_parquet(temporary)
        stage.commit(key, [path], {})


def _people(run: LabelRun, store: Store) -> list[Label]:
    standing = read_annotations(store, run.corpus.id, run.entry.key)
    return [label for label in standing if label.feature < len(run.examples.features)]


def _keep(folder: Location, labels: Sequence[Label]) -> None:
    """Remember what an LLM said, for the generations in which another one is asked."""
    path = folder / "proposals.jsonl"
    known = {versions.from_entry(entry).label_id for entry in versions.read(path)}
    versions.append(path, [versions.as_entry(label) for label in labels if label.label_id not in known])


def _earlier(folder: Location, settings: LabelSettings) -> list[Label]:
    """What explainers other than the present one said, the last first."""
    said = [versions.from_entry(entry) for entry in reversed(versions.read(folder / "proposals.jsonl"))]
    return [label for label in said if label.version != settings.version]


@contextmanager
def _asking(store: Store, folder: Location, settings: LabelSettings, *, retry: bool, log: Log) -> Iterator[Asking | None]:
    """Somebody to ask, if there is an LLM; how often what was asked is remembered, also when the run fails."""
    if not (settings.version or settings.judge.enabled):
        yield None
        return
    with open_journal(store.root, log=log) as journal:
        attempts = dict(_read(folder / "asked.json").get("attempts", {}))
        asking = Asking(journal, attempts, retry=retry, log=log)
        try:
            yield asking
        finally:
            _update(folder / "asked.json", {"attempts": asking.attempts})


def _remember(folder: Location, version: str, features: Sequence[int]) -> None:
    """Add to the features that an explainer is asked about in every run from now on."""
    known = _read(folder / "asked.json").get("features", {})
    _update(folder / "asked.json", {"features": {version: sorted({*known.get(version, []), *features})}})


def _update(path: Location, changes: dict[str, object]) -> None:
    """Merge `changes`, two levels deep, into a JSON file; several processes of this machine may do so."""
    with locked(path.with_suffix(".lock")):
        known = _read(path)
        merged = {k: {**known.get(k, {}), **v} if isinstance(v, dict) else v for k, v in changes.items()}
        if {**known, **merged} != known:
            write_json(path, {**known, **merged})


def _read(path: Location) -> dict:
    return read_json_if_there(path) or {}


def _commit(stage: StageFolder, labels: FeatureLabels) -> None:
    paths = [stage.data_path(labels.key, suffix) for suffix in (".parquet", ".falsification.parquet")]
    for path, table in zip(paths, (labels.table, labels.falsification), strict=True):
        with atomic_path(path) as temporary:
            table.write_parquet(temporary)
    facts = {"features": len(labels.current), "by_status": labels.by_status(), "tally": labels.tally.as_dict()}
    stage.commit(labels.key, paths, facts)


def _open(stage: StageFolder, key: ShardKey) -> FeatureLabels:
    facts = stage.record(key).facts
    paths = (stage.data_path(key, suffix) for suffix in (".parquet", ".falsification.parquet"))
    table, falsification = (pl.read_parquet(readable(path)) for path in paths)
    return FeatureLabels(table, falsification, Tally(**facts["tally"]), key)
