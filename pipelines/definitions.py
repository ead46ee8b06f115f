"""The code location: assets, jobs, sensors, schedules and the resources of the scenario in force.

Not here: the parts themselves. `build_defs` takes other resources, which is how tests run on a small corpus.
"""

import warnings

import dagster as dg

# backfill_policy is marked beta though the class is not; a user's first run should print no warning about it.
warnings.filterwarnings("ignore", category=dg.BetaWarning)

from assets import activations, catalog, corpus, examples, index, labels, scores  # noqa: E402
from pipelines.jobs import JOBS  # noqa: E402
from pipelines.logging import plain_console  # noqa: E402
from pipelines.schedules import refresh_catalog_hourly, retry_incomplete  # noqa: E402
from pipelines.sensors import new_saes  # noqa: E402
from resources.scenario import load_scenario, scenario_path  # noqa: E402


def build_defs(resources: dict[str, dg.ConfigurableResource] | None = None) -> dg.Definitions:
    """Definitions over `resources`, or over those of the scenario in force."""
    return dg.Definitions(
        assets=dg.load_assets_from_modules([catalog, corpus, activations, examples, labels, scores, index]),
        jobs=JOBS,
        schedules=[retry_incomplete, refresh_catalog_hourly],
        sensors=[new_saes],
        resources=resources if resources is not None else load_scenario(scenario_path()),
        loggers={"console": plain_console},
    )


@dg.definitions
def defs() -> dg.Definitions:
    return build_defs()
