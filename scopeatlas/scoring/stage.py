"""The `scores` stage of one SAE on disk: its labels tested on report documents, every control in the same table.

What belongs here: what a generation of scores depends on, writing it, and going on with one that was left unfinished. What
does not: what is tested by which scorer (`run.py`). No label is ever changed here.
"""

from dataclasses import dataclass

import polars as pl

from scopeatlas.activations.nulls import NULL_VERSION
from scopeatlas.corpus.build import Corpus
from scopeatlas.dictionaries.releases import SaeEntry
from scopeatlas.errors import NotReadyError
from scopeatlas.hypotheses.labels import labels_of
from scopeatlas.labels.asking import Asking
from scopeatlas.labels.stage import LabelSettings, labels_key
from scopeatlas.llm.estimate import Estimate, estimate
from scopeatlas.llm.journal import open_journal, read_journal
from scopeatlas.runner.local import Log, silent
from scopeatlas.scoring.controls import with_q_values
from scopeatlas.scoring.outcomes import rule_outcomes
from scopeatlas.scoring.report import Report, read_report, report
from scopeatlas.scoring.retrieval import Embed
from scopeatlas.scoring.run import ScoreRun, ScoreSettings
from scopeatlas.scoring.table import own, score_table
from scopeatlas.storage.files import atomic_path, content_hash, read_json_if_there, write_json
from scopeatlas.storage.records import ShardKey, StageFolder
from scopeatlas.storage.store import Store
from scopeatlas.storage.uris import readable
from scopeatlas.subject.loading import SubjectModel

STAGE_VERSION = 5
_UNFINISHED = "unfinished.json"
"""By the identity of a generation, that of what there is of it so far."""


@dataclass(frozen=True)
class LabelScores:
    """A generation of scores: the table (`table.SCORE_SCHEMA`), texts on which labels were right and wrong
    (`outcomes.OUTCOME_SCHEMA`), and the report on both."""

    table: pl.DataFrame
    outcomes: pl.DataFrame
    report: Report
    key: ShardKey

    @property
    def scored(self) -> pl.DataFrame:
        """The labels' own rows that were scored."""
        return own(self.table).filter(pl.col("status") == "scored")


def scores_key(
    store: Store, corpus: Corpus, entry: SaeEntry, subject: SubjectModel, labels: LabelSettings, settings: ScoreSettings
) -> ShardKey:
    """The generation of scores that the rest of the chain reads: the finished one, or what there is of an unfinished one.

    It is determined by the labels (and through them by everything before) and by how they are tested.
    """
    stage = store.stage(entry.key, corpus.id, "scores")
    key = _finished_key(store, corpus, entry, subject, labels, settings)
    made = _unfinished(stage).get(key.identity)
    return key if made is None or stage.is_done(key) else ShardKey("scores", made)


def score_labels(
    store: Store,
    corpus: Corpus,
    entry: SaeEntry,
    subject: SubjectModel,
    *,
    labels: LabelSettings,
    settings: ScoreSettings,
    embed: Embed | None = None,
    log: Log = silent,
) -> tuple[LabelScores, bool]:
    """Test every label that is ok, current or not; returns the stage and whether it was there already.

    A new generation is written beside the older ones. One in which the judge has not answered everything (no budget is left,
    the server was busy) is written too, but the next run goes on with it. Raises NotReadyError if labels are missing,
    ConfigError if retrieval is asked for without `embed`, ExplainerError if a judge is configured and of no use at all.
    """
    stage = store.stage(entry.key, corpus.id, "scores")
    key = _finished_key(store, corpus, entry, subject, labels, settings)
    if stage.is_done(key):
        return _open(stage, key), True
    store.require_writable()
    label_rows = _labels(store, corpus, entry, subject, labels)
    run = _run(store, corpus, entry, subject, label_rows, settings, log)
    rows = run.executed() + run.random_directions(labels) + run.retrieved(embed) + run.steered()
    rows += run.random_model(labels) if settings.random_model else []
    outcomes = [rule_outcomes(run.units, run.firings, run.labels)]
    answered, unanswered = [], 0
    if settings.judge.enabled:
        with open_journal(store.root, log=log) as journal:
            asking = Asking(journal, {}, retry=False, log=log)
            judged, shown = run.judged(asking)
            rows, outcomes = rows + judged, [*outcomes, shown]
            answered = sorted({one.answer.key for one in asking.heard if one.answer.reply})
            unanswered = len({one.answer.key for one in asking.heard} - set(answered))
    table = with_q_values(score_table(rows))
    made = ShardKey("scores", content_hash(key.identity, answered)) if unanswered else key
    found = LabelScores(
        table,
        pl.concat(outcomes),
        report(table, label_rows, documents=run.documents(), null_densities=run.null_densities()),
        made,
    )
    if not stage.is_done(made):
        _commit(stage, found)
    log(f"label scores: {len(found.scored):,} tests of {found.scored['label_id'].n_unique():,} labels on report documents")
    if unanswered:
        log(f"label scores: {unanswered:,} of the judge's answers are missing; the next run goes on with them")
        write_json(stage.root / _UNFINISHED, {**_unfinished(stage), key.identity: made.identity})
    return _open(stage, made), False


def estimate_scores(
    store: Store,
    corpus: Corpus,
    entry: SaeEntry,
    subject: SubjectModel,
    *,
    labels: LabelSettings,
    settings: ScoreSettings,
    log: Log = silent,
) -> Estimate:
    """What `score_labels` would ask of the judge if nothing stopped early. Asks nobody. Raises NotReadyError without labels."""
    if not settings.judge.enabled:
        return Estimate()
    run = _run(store, corpus, entry, subject, _labels(store, corpus, entry, subject, labels), settings, log)
    return estimate(run.questions(), settings.judge, read_journal(store.root))


def _finished_key(
    store: Store, corpus: Corpus, entry: SaeEntry, subject: SubjectModel, labels: LabelSettings, settings: ScoreSettings
) -> ShardKey:
    tested = labels_key(store, corpus, entry, subject, labels).identity
    return ShardKey("scores", content_hash(STAGE_VERSION, NULL_VERSION, tested, settings.identity()))


def _labels(store: Store, corpus: Corpus, entry: SaeEntry, subject: SubjectModel, settings: LabelSettings) -> pl.DataFrame:
    stage, key = store.stage(entry.key, corpus.id, "labels"), labels_key(store, corpus, entry, subject, settings)
    if not stage.is_done(key):
        raise NotReadyError(f"{entry.key} has no labels to score with these settings: materialise feature_labels first")
    return pl.read_parquet(readable(stage.data_path(key, ".parquet")))


def _run(
    store: Store,
    corpus: Corpus,
    entry: SaeEntry,
    subject: SubjectModel,
    label_rows: pl.DataFrame,
    settings: ScoreSettings,
    log: Log,
) -> ScoreRun:
    ok = labels_of(label_rows.filter(pl.col("status") == "ok"))
    width = int(label_rows["feature"].max()) + 1  # type: ignore[arg-type]  # every feature has a row, be it a refusal
    return ScoreRun(store, corpus, entry, subject, ok, settings=settings, width=width, log=log)


def _unfinished(stage: StageFolder) -> dict[str, str]:
    return read_json_if_there(stage.root / _UNFINISHED) or {}


def _commit(stage: StageFolder, scores: LabelScores) -> None:
    paths = [stage.data_path(scores.key, suffix) for suffix in (".parquet", ".outcomes.parquet", ".report.json")]
    for path, table in zip(paths, (scores.table, scores.outcomes), strict=False):
        with atomic_path(path) as temporary:
            table.write_parquet(temporary)
    write_json(paths[-1], scores.report.as_dict())
    facts = {"labels": scores.table["label_id"].n_unique(), "scored": scores.scored["feature"].n_unique()}
    stage.commit(scores.key, paths, facts)


def _open(stage: StageFolder, key: ShardKey) -> LabelScores:
    paths = (stage.data_path(key, suffix) for suffix in (".parquet", ".outcomes.parquet"))
    table, outcomes = (pl.read_parquet(readable(path)) for path in paths)
    return LabelScores(table, outcomes, read_report(stage.data_path(key, ".report.json")), key)
