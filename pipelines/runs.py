"""How SAEs are put into runs: one run over a stretch of partitions shares the subject model's forward passes.

What belongs here: stretches, and the tags and requests of such runs. What does not: when they start (sensors, schedules).
"""

from collections.abc import Sequence

import dagster as dg

from scopeatlas.storage.files import content_hash

RANGE_START, RANGE_END = "dagster/asset_partition_range_start", "dagster/asset_partition_range_end"


def stretches(keys: Sequence[str], all_keys: Sequence[str], *, longest: int | None = None) -> list[tuple[str, str]]:
    """First and last key of each unbroken stretch of `keys` in `all_keys`, of at most `longest` keys each."""
    wanted, runs, size = set(keys), [], 0
    for place, key in enumerate(all_keys):
        if key not in wanted:
            continue
        if runs and place and all_keys[place - 1] == runs[-1][1] and size != longest:
            runs[-1] = (runs[-1][0], key)
            size += 1
        else:
            runs.append((key, key))
            size = 1
    return runs


def chunk_requests(
    keys: Sequence[str], *, per_run: int, all_keys: Sequence[str] | None = None, occasion: str = ""
) -> list[dg.RunRequest]:
    """One run request for each stretch of at most `per_run` of `keys`.

    all_keys: every partition in its order; by default `keys` are new and stand next to each other. occasion: what sets
    these requests apart from earlier ones for the same keys; a key is otherwise requested once.
    """
    requests = []
    for first, last in stretches(keys, all_keys if all_keys is not None else keys, longest=per_run):
        run_key = f"{occasion}{first}" if first == last else f"{occasion}{first}:{content_hash(first, last, list(keys))[:8]}"
        if first == last:
            requests.append(dg.RunRequest(run_key=run_key, partition_key=first, tags={"scope_atlas/sae": first}))
        else:
            requests.append(dg.RunRequest(run_key=run_key, tags={RANGE_START: first, RANGE_END: last}))
    return requests
