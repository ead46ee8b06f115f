"""The feature index asset. Not here: rows, vectors, the upsert (scopeatlas/atlas)."""

import dagster as dg
import polars as pl

from assets.partitions import OWNERS, SAES, SHARED_RUNS
from assets.previews import feature_preview
from assets.scores import label_scores
from assets.support import Events, Outcome, each_sae, failures, open_run
from resources.corpus import CorpusResource
from resources.embedder import EmbedderResource
from resources.labelling import LabellingResource
from resources.store import StoreResource
from resources.subject import SubjectResource
from scopeatlas.atlas import stage
from scopeatlas.atlas.indexes import EXACT_ROWS, LEAST_RECALL, RECALL_AT, IndexRecall, index_recall
from scopeatlas.atlas.tables import FEATURE_ROW
from scopeatlas.dictionaries.releases import SaeEntry
from scopeatlas.storage.uris import readable

RECALL = f"The vector indexes find {LEAST_RECALL:.0%} of the {RECALL_AT} nearest; passes where the table is too small for one."


@dg.asset(
    deps=[label_scores],
    partitions_def=SAES,
    backfill_policy=SHARED_RUNS,
    group_name="atlas",
    kinds={"lancedb", "huggingface"},
    owners=OWNERS,
    pool="atlas",
    code_version=str(stage.STAGE_VERSION),
    check_specs=[dg.AssetCheckSpec("index_finds_the_nearest", asset="feature_index", description=RECALL)],
    metadata={
        "dagster/table_name": "features",
        "dagster/column_schema": dg.TableSchema(
            columns=[dg.TableColumn(name, str(dtype).lower()) for name, dtype in FEATURE_ROW.items()]
        ),
    },
)
def feature_index(
    context: dg.AssetExecutionContext,
    store: StoreResource,
    corpus: CorpusResource,
    subject: SubjectResource,
    labelling: LabellingResource,
    embedder: EmbedderResource,
) -> Events:
    """Every feature with its label, score and evidence, embedded and upserted into LanceDB as one generation per SAE."""
    with failures("feature_index"):
        run = open_run(context, store, corpus, subject)

    def index(entry: SaeEntry) -> Outcome:
        published = stage.index_features(
            run.store,
            run.corpus,
            entry,
            run.subject,
            embedder=embedder.open(),
            labels=labelling.labels(),
            scores=labelling.scores(embedder.identity()),
            log=context.log.info,
        )
        rows = pl.read_parquet(readable(published.path))
        metadata: dict[str, dg.MetadataValue] = {
            "dagster/partition_row_count": dg.MetadataValue.int(published.rows),
            "labelled_share": dg.MetadataValue.float(round(float((rows["label"] != "").mean()), 4)),  # type: ignore[arg-type]
            "generation": dg.MetadataValue.text(published.generation),
            "table_version": dg.MetadataValue.int(published.table_version),
            "preview": feature_preview(rows),
        }
        return metadata, published.generation, published.reused

    yield from each_sae(context, run, index, checks=lambda: [finds_the_nearest(index_recall(run.store.root))])


def finds_the_nearest(measured: IndexRecall) -> dg.AssetCheckResult:
    """What the indexes find of what there is."""
    return dg.AssetCheckResult(
        check_name="index_finds_the_nearest",
        passed=measured.is_enough,
        severity=dg.AssetCheckSeverity.WARN,
        metadata={
            "rows": measured.rows,
            "indexed": bool(measured.recall) or f"no vector index up to {EXACT_ROWS:,} rows: search is exact",
            **{f"recall_{column}": round(recall, 4) for column, recall in measured.recall.items()},
        },
    )
