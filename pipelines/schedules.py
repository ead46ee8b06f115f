"""Schedules. Not here: jobs, or what counts as incomplete (scopeatlas/upkeep.py)."""

import dagster as dg

from assets.partitions import SAES_NAME
from pipelines.jobs import index_release
from resources.store import StoreResource
from scopeatlas.upkeep import status

MAX_RETRIED = 20
"""A night's budget of runs."""


@dg.schedule(
    job=index_release,
    cron_schedule="0 2 * * *",
    execution_timezone="UTC",
    default_status=dg.DefaultScheduleStatus.STOPPED,
    description="Every night, run again what is not published or failed last; finished stages cost nothing.",
)
def retry_incomplete(context: dg.ScheduleEvaluationContext, store: StoreResource) -> list[dg.RunRequest] | dg.SkipReason:
    known = set(context.instance.get_dynamic_partitions(SAES_NAME))
    incomplete = sorted({line.sae for line in status(store.open()) if line.sae in known and not line.complete})
    if not incomplete:
        return dg.SkipReason("every SAE is published")
    day = context.scheduled_execution_time.strftime("%Y-%m-%d")
    return [
        dg.RunRequest(run_key=f"{day}:{key}", partition_key=key, tags={"scope_atlas/sae": key})
        for key in incomplete[:MAX_RETRIED]
    ]
