"""The activation cache asset and its blocking fidelity check. Not here: the pass or the figures (scopeatlas/activations)."""

import dagster as dg

from assets.corpus import corpus_sample
from assets.partitions import OWNERS, SAES, SHARED_RUNS
from assets.support import SaeRun, failures, for_each_sae, open_run
from resources.corpus import CorpusResource
from resources.labelling import LabellingResource
from resources.store import StoreResource
from resources.subject import SubjectResource
from scopeatlas.activations import cache
from scopeatlas.activations.fidelity import Fidelity, measure_fidelity
from scopeatlas.dictionaries.releases import SaeEntry
from scopeatlas.scoring.stage import scores_key
from scopeatlas.storage.records import generation


@dg.asset(
    deps=[corpus_sample],
    partitions_def=SAES,
    backfill_policy=SHARED_RUNS,
    group_name="activations",
    kinds={"pytorch", "parquet"},
    owners=OWNERS,
    pool="gpu",
    code_version=str(cache.STAGE_VERSION),
    check_specs=[
        dg.AssetCheckSpec(
            "fidelity",
            asset="activation_cache",
            blocking=True,
            description="FVU below 1 and L0 within a factor of three of the release's own: otherwise no label is worth anything.",
        )
    ],
    metadata={
        "dagster/column_schema": dg.TableSchema(
            columns=[
                dg.TableColumn("feature", "uint32", "Index of the feature."),
                dg.TableColumn("token", "uint32", "Context row of the shard times context length, plus position."),
                dg.TableColumn("value", "float16", "Activation, in units of the SAE's scale (in the file's footer)."),
            ]
        )
    },
)
def activation_cache(
    context: dg.AssetExecutionContext,
    store: StoreResource,
    corpus: CorpusResource,
    subject: SubjectResource,
    labelling: LabellingResource,
) -> dg.MaterializeResult:
    """Non-zero activations of every SAE of the run from one shared pass of the subject model, as feature-sorted shards."""
    with failures("activation_cache", store.open(), list(context.partition_keys)):
        run = open_run(context, store, corpus, subject)
        done = [e.key for e in run.entries if _is_scored(run, e, labelling)]
        result = cache.cache_activations(run.store, run.corpus, run.entries, run.subject, unneeded=done, log=context.log.info)
        sound = [e for e in run.entries if e.key not in result.failed]
        found = measure_fidelity(run.store, run.corpus, sound, run.subject, log=context.log.info)
    blocked = dict(result.failed)
    for key, fidelity in found.items():
        reason = fidelity.blocks()
        run.store.record_error(key, "fidelity", reason)
        if reason:
            blocked[key] = reason
    checked = SaeRun(run.store, run.corpus, run.subject, run.entries, result.failed)

    def describe(entry: SaeEntry) -> tuple[dict[str, dg.MetadataValue], str, bool]:
        keys = cache.activation_keys(run.corpus, entry, run.subject)
        fidelity = found[entry.key]
        context.log.info(f"fidelity: {entry.key}: {summary(fidelity)}")
        metadata = fidelity_metadata(fidelity)
        if result.tokens:
            metadata["tokens_per_second"] = dg.MetadataValue.float(round(result.tokens / result.seconds, 1))
        return metadata, generation(keys), result.reused

    outcome = for_each_sae(context, checked, describe)
    return dg.MaterializeResult(data_version=outcome.data_version, check_results=[_check(blocked, len(run.entries))])


def _is_scored(run: SaeRun, entry: SaeEntry, labelling: LabellingResource) -> bool:
    """Whether everything that reads activations is finished, so that pruned ones need not come back."""
    key = scores_key(run.corpus, entry, run.subject, labelling.labels(), labelling.scores())
    return run.store.stage(entry.key, run.corpus.id, "scores").is_done(key)


def _check(blocked: dict[str, str], total: int) -> dg.AssetCheckResult:
    """Fails, and so halts the run, only if no SAE of it passed; a blocked one among good ones is a warning."""
    return dg.AssetCheckResult(
        check_name="fidelity",
        passed=not blocked,
        severity=dg.AssetCheckSeverity.ERROR if len(blocked) == total else dg.AssetCheckSeverity.WARN,
        description="; ".join(f"{key}: {reason}" for key, reason in blocked.items()) or "all SAEs of the run are within bounds",
        metadata={"blocked": len(blocked), "saes": total},
    )


def summary(f: Fidelity) -> str:
    """Fidelity as one line."""
    return (
        f"FVU {f.fvu:.3f} ({f.report_fvu:.3f} on report documents), L0 {f.l0:.1f}, {f.dead:.1%} dead, "
        f"+{f.loss_added:.2f} nats spliced in, {f.recovered:.1%} of the loss recovered"
    )


def fidelity_metadata(f: Fidelity) -> dict[str, dg.MetadataValue]:
    """Fidelity as numbers that Dagster charts."""
    numbers = {
        "fvu": f.fvu,
        "report_fvu": f.report_fvu,
        "l0": f.l0,
        "dead_share": f.dead,
        "dense_share": f.dense,
        "loss_added": f.loss_added,
        "loss_recovered": f.recovered,
        "loss_recovered_against_mean": f.recovered_against_mean,
    }
    metadata: dict[str, dg.MetadataValue] = {name: dg.MetadataValue.float(round(value, 4)) for name, value in numbers.items()}
    return {**metadata, "tokens": dg.MetadataValue.int(f.tokens)}
