"""Sensors. Not here: finding SAEs (scopeatlas/discovery.py) or what a run does."""

import dagster as dg

from assets.partitions import SAES, SAES_NAME
from pipelines.jobs import index_release
from pipelines.runs import chunk_requests
from resources.sae import SaeSourceResource
from resources.store import StoreResource
from resources.subject import SubjectResource
from scopeatlas import discovery
from scopeatlas.errors import ScopeAtlasError


@dg.sensor(
    job=index_release,
    minimum_interval_seconds=30,
    default_status=dg.DefaultSensorStatus.STOPPED,
    description="Watches folders and the Hub: SAEs that are whole and unchanged over two looks become partitions, and runs "
    "of saes.per_run of them, which share the subject model's forward passes.",
)
def new_saes(
    context: dg.SensorEvaluationContext, saes: SaeSourceResource, subject: SubjectResource, store: StoreResource
) -> dg.SensorResult:
    opened, limit = store.open(), saes.per_run * saes.runs_per_tick
    known = set(context.instance.get_dynamic_partitions(SAES_NAME))
    folders = saes.folder_paths()
    try:
        found = discovery.look(opened, folders, saes.rules(), subject=subject.open())
        limits = {"cache": saes.cache_folder(), "quota_bytes": saes.quota_bytes()}
        _, failed = discovery.register_ready(opened, folders, limit=limit, **limits)
    except ScopeAtlasError as error:
        return dg.SensorResult(skip_reason=str(error))
    for source, reason in (found.errors | failed).items():
        context.log.warning(f"{source}: {reason}")
    # Whatever is registered and no partition yet, so that a tick that died after registering is made good.
    keys = [key for key in opened.registered() if key not in known][:limit]
    if not keys:
        problems = "".join(f"; {source}: {reason}" for source, reason in (found.errors | failed).items())
        return dg.SensorResult(skip_reason=f"no SAE is new and ready: {found}{problems}")
    context.log.info(f"new: {', '.join(keys)}")
    return dg.SensorResult(
        dynamic_partitions_requests=[SAES.build_add_request(keys)], run_requests=chunk_requests(keys, per_run=saes.per_run)
    )
