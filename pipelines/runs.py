"""How SAEs are put into runs: one run over a stretch of partitions shares the subject model's forward passes.

What belongs here: stretches, the requests of such runs, and which SAEs are in one now. What does not: when runs start
(sensors, schedules).
"""

from collections.abc import Mapping, Sequence

import dagster as dg

from scopeatlas.storage.files import content_hash

RANGE_START, RANGE_END = "dagster/asset_partition_range_start", "dagster/asset_partition_range_end"
_PARTITION = "dagster/partition"
_UNFINISHED = [
    dg.DagsterRunStatus.QUEUED,
    dg.DagsterRunStatus.NOT_STARTED,
    dg.DagsterRunStatus.STARTING,
    dg.DagsterRunStatus.STARTED,
    dg.DagsterRunStatus.CANCELING,
]


def stretches(keys: Sequence[str], all_keys: Sequence[str], *, longest: int | None = None) -> list[list[str]]:
    """The unbroken stretches of `keys` in `all_keys`, of at most `longest` keys each."""
    wanted = set(keys)
    runs: list[list[str]] = []
    for place, key in enumerate(all_keys):
        if key not in wanted:
            continue
        if runs and all_keys[place - 1] == runs[-1][-1] and len(runs[-1]) != longest:
            runs[-1].append(key)
        else:
            runs.append([key])
    return runs


def chunk_requests(
    keys: Sequence[str], all_keys: Sequence[str], *, per_run: int, at_most: int | None = None, occasion: str = ""
) -> list[dg.RunRequest]:
    """One run request for each stretch of at most `per_run` of `keys`; the first `at_most` of them.

    all_keys: every partition in its order. occasion: what sets these requests apart from earlier ones for the same keys,
    which are otherwise requested once.
    """
    requests = []
    for chunk in stretches(keys, all_keys, longest=per_run)[:at_most]:
        if len(chunk) == 1:
            run_key, tags, partition = f"{occasion}{chunk[0]}", {"scope_atlas/sae": chunk[0]}, chunk[0]
        else:
            run_key, tags, partition = (
                f"{occasion}{content_hash(chunk)[:16]}",
                {RANGE_START: chunk[0], RANGE_END: chunk[-1]},
                None,
            )
        requests.append(dg.RunRequest(run_key=run_key, partition_key=partition, tags=tags))
    return requests


def keys_of(request: dg.RunRequest, all_keys: Sequence[str]) -> list[str]:
    """The partitions that a request of `chunk_requests` is for."""
    return _keys_of_tags({**request.tags, **({_PARTITION: request.partition_key} if request.partition_key else {})}, all_keys)


def busy_keys(instance: dg.DagsterInstance, all_keys: Sequence[str]) -> set[str]:
    """Partitions of runs that are queued or under way."""
    runs = instance.get_runs(filters=dg.RunsFilter(statuses=_UNFINISHED))
    return {key for run in runs for key in _keys_of_tags(run.tags, all_keys)}


def _keys_of_tags(tags: Mapping[str, str], all_keys: Sequence[str]) -> list[str]:
    if _PARTITION in tags:
        return [tags[_PARTITION]]
    ends = tags.get(RANGE_START), tags.get(RANGE_END)
    if not all(end in all_keys for end in ends):
        return []
    first, last = (all_keys.index(end) for end in ends if end is not None)
    return list(all_keys[first : last + 1])
