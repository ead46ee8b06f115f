"""The feature examples asset. Not here: sketches, windows, promoted tokens, co-activation (scopeatlas/mining)."""

import dagster as dg
import polars as pl

from assets.activations import activation_cache
from assets.partitions import OWNERS, SAES, SHARED_RUNS
from assets.previews import histogram_image
from assets.support import Events, Outcome, each_sae, failures, open_run
from resources.corpus import CorpusResource
from resources.store import StoreResource
from resources.subject import SubjectResource
from scopeatlas.dictionaries.releases import SaeEntry
from scopeatlas.mining import examples


@dg.asset(
    deps=[activation_cache],
    partitions_def=SAES,
    backfill_policy=SHARED_RUNS,
    group_name="features",
    kinds={"polars", "parquet"},
    owners=OWNERS,
    code_version=str(examples.STAGE_VERSION),
    metadata={
        "dagster/column_schema": dg.TableSchema(
            columns=[
                dg.TableColumn("feature", "uint32", "Index of the feature."),
                dg.TableColumn("split", "string", "explain, select or report."),
                dg.TableColumn("kind", "string", "top (strongest distinct documents) or stratum (by quantile of the peak)."),
                dg.TableColumn("peak", "float32", "Largest activation in the context."),
                dg.TableColumn("tokens", "int32[32]", "The window around the peak."),
                dg.TableColumn("activations", "float32[32]", "The feature's activation at each token of the window."),
            ]
        )
    },
)
def feature_examples(
    context: dg.AssetExecutionContext, store: StoreResource, corpus: CorpusResource, subject: SubjectResource
) -> Events:
    """Per feature: stratified examples by split, counts, density, histogram, promoted tokens, what fires on the same tokens."""
    with failures("feature_examples"):
        run = open_run(context, store, corpus, subject)

    def mine(entry: SaeEntry) -> Outcome:
        mined, reused = examples.mine_examples(run.store, run.corpus, entry, run.subject, log=context.log.info)
        features = mined.features
        live = features.filter(pl.col("tokens") > 0)
        metadata: dict[str, dg.MetadataValue] = {
            "features": dg.MetadataValue.int(len(features)),
            "dead_share": dg.MetadataValue.float(round(1 - len(live) / len(features), 4)),
            "median_density": dg.MetadataValue.float(float(live["density"].median() or 0.0)),  # type: ignore[arg-type]
            "densities": histogram_image(live["density"].log10(), "log10 of density (share of tokens)", "features"),
        }
        return metadata, mined.key.identity, reused

    yield from each_sae(context, run, mine)
