"""The feature labels asset. Not here: how labels are proposed (scopeatlas/labels)."""

import dagster as dg

from assets.examples import feature_examples
from assets.partitions import OWNERS, SAES, SHARED_RUNS
from assets.previews import label_preview
from assets.support import Events, Outcome, each_sae, failures, open_run
from resources.corpus import CorpusResource
from resources.labelling import LabellingResource
from resources.store import StoreResource
from resources.subject import SubjectResource
from scopeatlas.dictionaries.releases import SaeEntry
from scopeatlas.labels import stage
from scopeatlas.mining.examples import examples_key, open_examples


@dg.asset(
    deps=[feature_examples],
    partitions_def=SAES,
    backfill_policy=SHARED_RUNS,
    group_name="labels",
    kinds={"openai", "parquet"},
    owners=OWNERS,
    pool="llm",
    code_version=str(stage.STAGE_VERSION),
    metadata={
        "dagster/column_schema": dg.TableSchema(
            columns=[
                dg.TableColumn("feature", "uint32", "Index of the feature."),
                dg.TableColumn("method", "string", "rule or llm."),
                dg.TableColumn("status", "string", "ok, or why there is no label: dead, rare, dense, incoherent, ..."),
                dg.TableColumn("label", "string", "A few words; empty when refused."),
                dg.TableColumn("reads", "string", "What it fires on, as a sentence."),
                dg.TableColumn("writes", "string", "What it promotes in the output."),
                dg.TableColumn("rule", "string", "The rule as data, to be run again on any text."),
                dg.TableColumn("current", "bool", "Whether this is the label shown."),
            ]
        )
    },
)
def feature_labels(
    context: dg.AssetExecutionContext,
    store: StoreResource,
    corpus: CorpusResource,
    subject: SubjectResource,
    labelling: LabellingResource,
) -> Events:
    """A label or a typed refusal for every feature: rules proposed on explain documents, chosen on select ones; an LLM if configured."""
    with failures("feature_labels"):
        run = open_run(context, store, corpus, subject)

    def label(entry: SaeEntry) -> Outcome:
        settings = labelling.labels()
        labels, reused = stage.label_features(run.store, run.corpus, entry, run.subject, settings=settings, log=context.log.info)
        statuses = labels.by_status()
        total = sum(statuses.values())
        windows = open_examples(run.store, run.corpus.id, entry.key, examples_key(run.corpus, entry, run.subject)).examples
        metadata: dict[str, dg.MetadataValue] = {
            "labelled_share": dg.MetadataValue.float(round(statuses.get("ok", 0) / total, 4)),
            **{f"status_{name}": dg.MetadataValue.int(count) for name, count in statuses.items()},
            "preview": label_preview(labels.current, windows),
        }
        return metadata, labels.key.identity, reused

    yield from each_sae(context, run, label)
