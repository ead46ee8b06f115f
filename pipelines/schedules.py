"""Schedules. Not here: jobs, or what counts as incomplete (scopeatlas/upkeep.py)."""

import dagster as dg

from assets.partitions import SAES_NAME
from pipelines.jobs import index_release, refresh_catalog
from pipelines.runs import chunk_requests
from resources.sae import SaeSourceResource
from resources.store import StoreResource
from scopeatlas.upkeep import status

MAX_RETRIED = 20
"""A night's budget of SAEs."""


@dg.schedule(
    job=index_release,
    cron_schedule="0 2 * * *",
    execution_timezone="UTC",
    default_status=dg.DefaultScheduleStatus.STOPPED,
    description="Every night, run again what is not published or failed last; finished stages cost nothing.",
)
def retry_incomplete(
    context: dg.ScheduleEvaluationContext, store: StoreResource, saes: SaeSourceResource
) -> list[dg.RunRequest] | dg.SkipReason:
    order = list(context.instance.get_dynamic_partitions(SAES_NAME))
    incomplete = sorted({line.sae for line in status(store.open()) if line.sae in set(order) and not line.complete})
    if not incomplete:
        return dg.SkipReason("every SAE is published")
    day = context.scheduled_execution_time.strftime("%Y-%m-%d")
    return chunk_requests(incomplete[:MAX_RETRIED], per_run=saes.per_run, all_keys=order, occasion=f"{day}:")


refresh_catalog_hourly = dg.ScheduleDefinition(
    name="refresh_catalog_hourly",
    job=refresh_catalog,
    cron_schedule="15 * * * *",
    execution_timezone="UTC",
    default_status=dg.DefaultScheduleStatus.STOPPED,
    description="Every hour, the catalog of SAEs.",
)
