"""The label scores asset. Not here: how labels are tested (scopeatlas/scoring)."""

import dagster as dg

from assets.labels import CHECKS, feature_labels, within_budget
from assets.partitions import OWNERS, SAES, SHARED_RUNS
from assets.previews import report_markdown, score_image, score_preview
from assets.support import Events, Outcome, each_sae, failures, open_run
from resources.corpus import CorpusResource
from resources.embedder import EmbedderResource
from resources.labelling import LabellingResource
from resources.store import StoreResource
from resources.subject import SubjectResource
from scopeatlas.dictionaries.releases import SaeEntry
from scopeatlas.llm.journal import read_journal
from scopeatlas.scoring import stage
from scopeatlas.scoring.report import Report


@dg.asset(
    deps=[feature_labels],
    partitions_def=SAES,
    backfill_policy=SHARED_RUNS,
    group_name="labels",
    kinds={"polars", "openai", "parquet"},
    owners=OWNERS,
    pool="llm",
    code_version=str(stage.STAGE_VERSION),
    check_specs=[
        dg.AssetCheckSpec("within_budget", asset="label_scores", blocking=True, description=CHECKS["within_budget"]),
    ],
    metadata={
        "dagster/column_schema": dg.TableSchema(
            columns=[
                dg.TableColumn("feature", "uint32", "Index of the feature."),
                dg.TableColumn("label_id", "string", "The label that is tested."),
                dg.TableColumn("claim", "string", "reads or writes."),
                dg.TableColumn(
                    "scorer", "string", "rule_execution, detection, fuzzing, intruder, simulation, retrieval, steering."
                ),
                dg.TableColumn("arm", "string", "own, or a control: shuffled, constant, trigger_tokens, random_direction, ..."),
                dg.TableColumn("status", "string", "scored, or why not."),
                dg.TableColumn("unit", "string", "token, context, window or prompt."),
                dg.TableColumn("balanced_accuracy", "float32", "With _low and _high: 95 % interval, bootstrap over documents."),
                dg.TableColumn("f1", "float32", "At the natural base rate."),
                dg.TableColumn("lift", "float32", "Above the shuffled label, paired."),
                dg.TableColumn("q_value", "float32", "False discovery rate at which the label is above the shuffled one."),
            ]
        )
    },
)
def label_scores(
    context: dg.AssetExecutionContext,
    store: StoreResource,
    corpus: CorpusResource,
    subject: SubjectResource,
    labelling: LabellingResource,
    embedder: EmbedderResource,
) -> Events:
    """Every label tested on report documents, with intervals over documents and every control in the same table."""
    with failures("label_scores"):
        run = open_run(context, store, corpus, subject)
    unanswered: list[int] = []

    def score(entry: SaeEntry) -> Outcome:
        scores, reused = stage.score_labels(
            run.store,
            run.corpus,
            entry,
            run.subject,
            labels=labelling.labels(),
            settings=labelling.scores(embedder.identity()),
            embed=embedder.open().embed,
            log=context.log.info,
        )
        for line in scores.report.lines():
            if not line.startswith(" "):  # the figures stand in the metadata, and in `scopeatlas report`
                context.log.info(f"label scores: {line}")
        unanswered.append(int((scores.table["status"] == "unanswered").sum()))
        return describe(scores), scores.key.identity, reused

    def checks() -> list[dg.AssetCheckResult]:
        judges = (labelling.judge.config(), labelling.second_judge.config())
        return [within_budget(read_journal(run.store.root).spent(), judges, sum(unanswered))]

    yield from each_sae(context, run, score, checks=checks)


def describe(scores: stage.LabelScores) -> dict[str, dg.MetadataValue]:
    """Scores as metadata: numbers that chart, each beside its control; the report, the picture, five features."""
    return {
        **numbers(scores.report),
        "report": report_markdown(scores.report),
        "distribution": score_image(scores.table),
        "preview": score_preview(scores.table, scores.outcomes),
    }


def numbers(report: Report) -> dict[str, dg.MetadataValue]:
    """Coverage, and per scorer the main metric beside every control."""
    found: dict[str, dg.MetadataValue] = {"labelled": dg.MetadataValue.int(report.labelled)}
    for summary in report.scorers:
        found[f"{summary.scorer}_tokens"] = dg.MetadataValue.int(summary.tokens)
        found[f"{summary.scorer}_discoveries"] = dg.MetadataValue.int(summary.discoveries)
        for shown in summary.comparisons:
            name = f"{shown.scorer}_{shown.metric}"
            found[name] = dg.MetadataValue.float(round(shown.own.value, 4))
            found[f"{name}_{shown.control}"] = dg.MetadataValue.float(round(shown.controlled.value, 4))
    return found
