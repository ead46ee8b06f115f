"""The label scores asset. Not here: how labels are tested (scopeatlas/scoring)."""

import dagster as dg

from assets.labels import feature_labels
from assets.partitions import OWNERS, SAES, SHARED_RUNS
from assets.previews import histogram_image, score_table
from assets.support import Events, Outcome, each_sae, failures, open_run
from resources.corpus import CorpusResource
from resources.labelling import LabellingResource
from resources.store import StoreResource
from resources.subject import SubjectResource
from scopeatlas.dictionaries.releases import SaeEntry
from scopeatlas.scoring import stage


@dg.asset(
    deps=[feature_labels],
    partitions_def=SAES,
    backfill_policy=SHARED_RUNS,
    group_name="labels",
    kinds={"polars", "parquet"},
    owners=OWNERS,
    code_version=str(stage.STAGE_VERSION),
    metadata={
        "dagster/column_schema": dg.TableSchema(
            columns=[
                dg.TableColumn("feature", "uint32", "Index of the feature."),
                dg.TableColumn("status", "string", "scored, or too_few_documents."),
                dg.TableColumn("unit", "string", "token, or context for topics."),
                dg.TableColumn("f1", "float32", "With f1_low and f1_high: 95 % interval, bootstrap over documents."),
                dg.TableColumn("shuffled_f1", "float32", "Another feature's rule on this feature: the control."),
                dg.TableColumn("lift", "float32", "F1 above the constant answer's, as a share of what could be gained."),
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
) -> Events:
    """Every rule label executed on report documents, with intervals over documents and the shuffled-label control beside it."""
    with failures("label_scores"):
        run = open_run(context, store, corpus, subject)

    def score(entry: SaeEntry) -> Outcome:
        scores, reused = stage.score_labels(
            run.store,
            run.corpus,
            entry,
            run.subject,
            labels=labelling.labels(),
            settings=labelling.scores(),
            log=context.log.info,
        )
        scored = scores.scored
        metadata: dict[str, dg.MetadataValue] = {
            "scored": dg.MetadataValue.int(len(scored)),
            "refused": dg.MetadataValue.int(len(scores.table) - len(scored)),
        }
        if len(scored):
            for name in ("f1", "shuffled_f1", "lift", "precision", "recall", "balanced_accuracy"):
                metadata[f"mean_{name}"] = dg.MetadataValue.float(round(float(scored[name].mean()), 4))  # type: ignore[arg-type]
            metadata["f1_histogram"] = histogram_image(
                scored["f1"], "F1 on report documents", "labels", control=scored["shuffled_f1"]
            )
            metadata["best_and_worst"] = score_table(scored)
        return metadata, scores.key.identity, reused

    yield from each_sae(context, run, score)
