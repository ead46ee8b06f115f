"""Headless set-up and runs: `python -m pipelines.bootstrap` registers, `--run` materialises too.

What belongs here: partitions, pool limits, one in-process run per stretch of keys. Not here: what the run does, or the
webserver.
"""

import argparse
import fcntl
import logging
import os
import sys
import time
import uuid
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import dagster as dg

from assets.partitions import SAES_NAME
from pipelines.runs import RANGE_END, RANGE_START, stretches
from resources.scenario import VARIABLE, load_scenario, scenario_path
from scopeatlas.errors import ConfigError, ScopeAtlasError

POOLS = {"gpu": 1, "llm": 4, "atlas": 1}
PROCESS_LOCK = "scope_atlas/process_lock"


def register(instance: dg.DagsterInstance, resources: dict) -> list[str]:
    """Make a partition of every SAE of the scenario, set the pool limits; returns the SAE keys. Idempotent."""
    store = resources["store"].open()
    store.require_writable()
    entries = resources["saes"].everything()
    for entry in entries:
        store.register(entry.key, entry.as_json())
    known = set(instance.get_dynamic_partitions(SAES_NAME))
    instance.add_dynamic_partitions(SAES_NAME, [entry.key for entry in entries if entry.key not in known])
    for pool, limit in POOLS.items():
        instance.event_log_storage.set_concurrency_slots(pool, limit)
    return [entry.key for entry in entries]


@contextmanager
def alive(instance: dg.DagsterInstance) -> Iterator[str]:
    """Hold a lock for as long as this process lives; yields its path, which marks this process's runs."""
    folder = Path(instance.root_directory) / ".dagster" / "headless"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{uuid.uuid4()}.lock"
    with path.open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield str(path)
    path.unlink()


def release_dead_runs(instance: dg.DagsterInstance) -> list[str]:
    """Fail the headless runs whose process was killed and free the pool slots they hold; returns their ids.

    Run monitoring does this for runs of the daemon. Without one, the next run would wait for those slots for ever.
    """
    unfinished = [dg.DagsterRunStatus.STARTING, dg.DagsterRunStatus.STARTED]
    released = []
    for run in instance.get_runs(filters=dg.RunsFilter(statuses=unfinished)):
        lock = run.tags.get(PROCESS_LOCK)
        if lock is not None and not _is_held(Path(lock)):
            instance.report_run_failed(run, "its process was killed; a new run continues where it stopped")
            instance.event_log_storage.free_concurrency_slots_for_run(run.run_id)
            released.append(run.run_id)
    return released


def _is_held(lock: Path) -> bool:
    if not lock.exists():
        return False
    with lock.open("r") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def materialise(
    instance: dg.DagsterInstance, resources: dict, keys: list[str], *, job: str = "index_release", ops: dict | None = None
) -> bool:
    """Run a job for `keys` in this process, with the config `ops` for its steps; returns whether every run succeeded."""
    from pipelines.definitions import build_defs

    for run_id in release_dead_runs(instance):
        print(f"run {run_id[:8]} was killed; its place is freed and its finished shards are reused")
    with alive(instance) as lock:
        return _run(build_defs(resources).resolve_job_def(job), instance, keys, lock, ops or {})


def _run(job: dg.JobDefinition, instance: dg.DagsterInstance, keys: list[str], lock: str, ops: dict) -> bool:
    chunks = stretches(keys, list(instance.get_dynamic_partitions(SAES_NAME)))
    tags = [{RANGE_START: chunk[0], RANGE_END: chunk[-1], PROCESS_LOCK: lock} for chunk in chunks]
    return all([execute(job, instance, ops=ops, tags=chosen) for chosen in tags])


def execute(job: dg.JobDefinition, instance: dg.DagsterInstance, *, ops: dict, tags: dict[str, str]) -> bool:
    """One run of a job in this process, its failures said in one line each; returns whether it succeeded."""
    config = {"loggers": {"console": {"config": {"log_level": "INFO"}}}, "ops": ops}
    result = job.execute_in_process(run_config=config, instance=instance, tags=tags, raise_on_error=False)
    for event in result.all_events:
        if event.event_type == dg.DagsterEventType.STEP_FAILURE:
            data = event.step_failure_data
            reason = data.user_failure_data.description if data.user_failure_data else None
            print(
                f"error: {event.step_key}: {reason or (data.error.message if data.error else 'failed')}".strip(),
                file=sys.stderr,
            )
    return result.success


def main() -> int:
    parser = argparse.ArgumentParser(description="Register the scenario's SAEs; with --run, index them.")
    parser.add_argument("--config", type=Path, help=f"scenario YAML; default ${VARIABLE}, else configs/demo.yaml")
    parser.add_argument("--run", action="store_true", help="materialise everything for these SAEs in this process")
    arguments = parser.parse_args()
    if arguments.config:
        os.environ[VARIABLE] = str(arguments.config)
    started = time.monotonic()
    try:
        resources = load_scenario(scenario_path())
        with open_instance() as instance:
            keys = register(instance, resources)
            print(f"{len(keys)} SAEs registered: {', '.join(keys)}")
            if not arguments.run:
                return 0
            succeeded = materialise(instance, resources, keys)
    except ScopeAtlasError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{'finished' if succeeded else 'failed'} after {time.monotonic() - started:.0f} s")
    return 0 if succeeded else 1


@contextmanager
def open_instance() -> Iterator[dg.DagsterInstance]:
    """The instance of $DAGSTER_HOME, on a quiet console. Raises ConfigError where that is not set."""
    if not os.environ.get("DAGSTER_HOME"):
        raise ConfigError("DAGSTER_HOME is not set: history would be lost; use make, or export DAGSTER_HOME=$PWD")
    with dg.DagsterInstance.get() as instance:
        _quieten()
        yield instance


def _quieten() -> None:
    """Keep the console to our own progress lines: bars and warnings of libraries say nothing a user can act on."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")
    warnings.filterwarnings("ignore", category=dg.BetaWarning)
    logging.getLogger("alembic").setLevel(logging.WARNING)


if __name__ == "__main__":
    sys.exit(main())
