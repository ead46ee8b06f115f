"""Schedules. Not here: jobs, or what counts as incomplete (scopeatlas/upkeep.py)."""

import dagster as dg

from assets.partitions import SAES_NAME
from pipelines.jobs import index_release, refresh_catalog
from pipelines.runs import busy_keys, chunk_requests
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
    busy = busy_keys(context.instance, order)
    # An SAE has a line for each corpus it was ever run on; one that is complete will do.
    complete = {line.sae for line in status(store.open()) if line.complete}
    registered = set(store.open().registered())
    incomplete = [key for key in order if key in registered and key not in complete and key not in busy]
    if not incomplete:
        return dg.SkipReason("every SAE is published, or in a run now")
    # Another part of them every night, so that some which fail again and again do not keep the others from their turn.
    day = context.scheduled_execution_time
    first = day.toordinal() * MAX_RETRIED % len(incomplete)
    tonight = (incomplete[first:] + incomplete[:first])[:MAX_RETRIED]
    return chunk_requests(tonight, order, per_run=saes.per_run, occasion=f"{day:%Y-%m-%d}:")


refresh_catalog_hourly = dg.ScheduleDefinition(
    name="refresh_catalog_hourly",
    job=refresh_catalog,
    cron_schedule="15 * * * *",
    execution_timezone="UTC",
    default_status=dg.DefaultScheduleStatus.STOPPED,
    description="Every hour, the catalog of SAEs.",
)
