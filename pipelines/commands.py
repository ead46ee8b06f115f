"""`scopeatlas label`: commands that need a scenario, and so the resources of the project.

What belongs here: commands that start a run. What does not: commands that only read or write a store (scopeatlas/cli/).
"""

import os
from pathlib import Path

import click

from scopeatlas.errors import UnknownSaeError


@click.command()
@click.argument("sae")
@click.option("--features", default="", help="Features by number, such as 12,40-48.")
@click.option("--query", default="", help="The features that a search for these words finds.")
@click.option("--text", default="", help="The features that fire most on this text.")
@click.option(
    "--count", type=click.IntRange(min=1), default=20, show_default=True, help="Features that a query or text stands for."
)
@click.option("--retry-errors", is_flag=True, help="Ask again, and pay again, where an answer was not usable.")
@click.option("--dry-run", is_flag=True, help="Only say what it would cost.")
@click.option("--config", type=click.Path(path_type=Path), help="Scenario YAML [default: $SCOPE_ATLAS_CONFIG, else the demo's].")
def label(
    sae: str, features: str, query: str, text: str, count: int, retry_errors: bool, dry_run: bool, config: Path | None
) -> None:
    """Have the LLM of the scenario explain some features of SAE (a key, or a part of one), test the labels and publish them.

    Without --features, --query or --text: those that the scenario asks for anyway. What was asked before is not paid again.
    """
    from pipelines.bootstrap import execute, materialise, open_instance, register
    from pipelines.definitions import build_defs
    from resources.scenario import VARIABLE, load_scenario, scenario_path

    if dry_run and retry_errors:
        raise click.UsageError("what asking again would cost is not known beforehand; leave one of the two out")
    if config:
        os.environ[VARIABLE] = str(config)
    resources = load_scenario(scenario_path())
    wanted = {"features": features, "query": query, "text": text, "count": count}
    with open_instance() as instance:
        key = _one(sae, register(instance, resources))
        if dry_run:
            job = build_defs(resources).resolve_job_def("label_cost")
            succeeded = execute(job, instance, ops={"observe_label_cost": {"config": wanted | {"sae": key}}}, tags={})
        else:
            ops = {"feature_labels": {"config": wanted | {"retry_errors": retry_errors}}}
            succeeded = materialise(instance, resources, [key], job="relabel", ops=ops)
    raise SystemExit(0 if succeeded else 1)


def _one(sae: str, keys: list[str]) -> str:
    """The key that `sae` stands for. Raises UnknownSaeError if it is none or several of the scenario's."""
    matches = [key for key in keys if key == sae] or [key for key in keys if sae.casefold() in key.casefold()]
    if len(matches) != 1:
        problem = "matches no SAE" if not matches else f"matches {len(matches)} SAEs"
        raise UnknownSaeError(f"'{sae}' {problem} of the scenario; it has {', '.join(keys[:5])}")
    return matches[0]
