"""Sensors. Not here: finding SAEs (scopeatlas/dictionaries/releases.py) or what a run does."""

import json

import dagster as dg

from assets.partitions import SAES, SAES_NAME
from pipelines.jobs import index_release
from resources.sae import SaeSourceResource
from resources.store import StoreResource

MAX_NEW_PER_TICK = 5


@dg.sensor(
    job=index_release,
    minimum_interval_seconds=30,
    default_status=dg.DefaultSensorStatus.STOPPED,
    description="Watches the release folders: an SAE that is whole and unchanged over two looks becomes a partition and a run.",
)
def new_saes(context: dg.SensorEvaluationContext, saes: SaeSourceResource, store: StoreResource) -> dg.SensorResult:
    known = set(context.instance.get_dynamic_partitions(SAES_NAME))
    unknown = {entry.key: entry for entry in saes.local() if entry.key not in known}
    seen_before = set(json.loads(context.cursor or "[]"))
    stable = [entry for key, entry in sorted(unknown.items()) if key in seen_before][:MAX_NEW_PER_TICK]
    cursor = json.dumps(sorted(unknown))
    if not stable:
        waiting = f"; waiting for {', '.join(sorted(unknown))} to stay unchanged" if unknown else ""
        reason = f"no new SAE in {', '.join(saes.folders) or 'no folder'}{waiting}"
        return dg.SensorResult(skip_reason=reason, cursor=cursor)
    for entry in stable:
        store.open().register(entry.key, entry.as_json())
    keys = [entry.key for entry in stable]
    context.log.info(f"new: {', '.join(keys)}")
    return dg.SensorResult(
        dynamic_partitions_requests=[SAES.build_add_request(keys)],
        run_requests=[dg.RunRequest(run_key=key, partition_key=key, tags={"scope_atlas/sae": key}) for key in keys],
        cursor=cursor,
    )
