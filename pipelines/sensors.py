"""Sensors. Not here: finding SAEs (scopeatlas/discovery.py) or what a run does."""

import dagster as dg

from assets.partitions import SAES, SAES_NAME
from pipelines.jobs import index_release
from pipelines.runs import busy_keys, chunk_requests, keys_of
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
    opened, folders = store.open(), saes.folder_paths()
    try:
        found = discovery.look(opened, folders, saes.rules(), subject=subject.open())
        limits = {"limit": saes.per_run * saes.runs_per_tick, "cache": saes.cache_folder(), "quota_bytes": saes.quota_bytes()}
        _, failed = discovery.register_ready(opened, folders, **limits)
        ours = discovery.registered_for(opened, subject.open())
    except ScopeAtlasError as error:
        return dg.SensorResult(skip_reason=str(error))
    problems = found.errors | failed
    for source, reason in problems.items():
        context.log.warning(f"{source}: {reason}")
    known = list(context.instance.get_dynamic_partitions(SAES_NAME))
    new = [key for key in ours if key not in known]
    # A tick may die after it registered an SAE, or the daemon after it made the partition: what nothing was done for yet
    # and no run is about to do is asked for again; its run key sees to it that this starts one run only.
    busy = busy_keys(context.instance, known)
    forgotten = [key for key in ours if key in known and key not in busy and not opened.is_touched(key)]
    order = known + new
    requests = chunk_requests([*forgotten, *new], order, per_run=saes.per_run, at_most=saes.runs_per_tick)
    if not requests:
        said = "".join(f"; {source}: {reason}" for source, reason in problems.items())
        return dg.SensorResult(skip_reason=f"no SAE is new and ready: {found}{said}")
    asked = [key for request in requests for key in keys_of(request, order)]
    context.log.info(f"new: {', '.join(asked)}")
    added = [key for key in asked if key not in known]
    return dg.SensorResult(dynamic_partitions_requests=[SAES.build_add_request(added)] if added else [], run_requests=requests)
