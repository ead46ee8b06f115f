"""Discovery: looking at every source of releases, remembering what is there, and registering what is ready.

What belongs here: one look, the queue that the catalog is, and its states. What does not: how a Hub repo is polled
(`dictionaries/watching.py`), how a folder is searched (`dictionaries/releases.py`), or when runs start (`pipelines/`).

An SAE in a folder is `settling` at the first look and `ready` when a second finds the same files; one on the Hub once its
repo's commit has been the same over two polls. Ready SAEs wait in the catalog until `register_ready` takes them, so a
process that dies in between loses nothing.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import polars as pl

from scopeatlas.atlas.catalog import CatalogRow, mark, read_catalog, record, retire
from scopeatlas.dictionaries.downloads import shortfall
from scopeatlas.dictionaries.hub import SeenSae, hub_errors, list_saes, one_line
from scopeatlas.dictionaries.registration import announce
from scopeatlas.dictionaries.releases import SaeEntry, find_saes
from scopeatlas.dictionaries.watching import WatchRule, WatchState, poll
from scopeatlas.storage.files import locked, read_json, write_json
from scopeatlas.storage.store import Store
from scopeatlas.subject.loading import SubjectModel
from scopeatlas.upkeep import status

STATE_FILE = "discovery.json"


@dataclass(frozen=True)
class Look:
    """What one look found: SAEs by state, and one line for each source that could not be read."""

    states: dict[str, int] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return ", ".join(f"{count:,} {state}" for state, count in sorted(self.states.items())) or "nothing new"


def look(store: Store, folders: Sequence[Path], rules: Sequence[WatchRule], *, subject: SubjectModel) -> Look:
    """Look at every source once and bring the catalog up to date; cheap where nothing has changed."""
    store.require_writable()
    with locked(store.root / ".locks" / "discovery.lock"):
        known = _catalog(store)
        rows = list(_local_rows(store, folders, known, subject))
        polled = poll(rules, _read_state(store)) if rules else None
        if polled is not None:
            rows += [_seen_row(sae, subject) for sae in polled.seen]
        record(store.root, {row.key: row for row in rows}.values())
        if polled is None:
            return Look(_count(rows))
        for repo in polled.gone_repos:
            retire(store.root, repo)
        for repo, path in polled.gone_saes:
            retire(store.root, repo, paths=[path])
        # Last, so that a look that dies before is looked again: what is recorded twice is the same.
        write_json(store.root / STATE_FILE, polled.state)
        return Look(_count(rows), polled.errors)


def register_ready(
    store: Store,
    folders: Sequence[Path],
    *,
    limit: int,
    cache: Path | None = None,
    quota_bytes: int | None = None,
) -> tuple[list[SaeEntry], dict[str, str]]:
    """Register at most `limit` ready SAEs, by release and path; returns them, and why others could not be.

    One on the Hub is registered by what the Hub lists; its weights are fetched by the run that needs them.
    """
    ready = pl.concat([read_catalog(store.root, state=state) for state in ("ready", "deferred_by_quota")])
    local = {(e.release, e.path): e for folder in folders for e in find_saes(folder)} if (ready["repo"] == "").any() else {}
    listed: dict[tuple[str, str], dict[str, SeenSae]] = {}
    registered: list[SaeEntry] = []
    failed: dict[str, str] = {}
    for row in ready.sort("release", "path").head(limit).iter_rows(named=True):
        place = (row["release"], row["path"])
        try:
            if row["repo"]:
                at = (row["repo"], row["revision"])
                if at not in listed:
                    listed[at] = {sae.path: sae for sae in list_saes(*at)}
                sae = listed[at][row["path"]]
                if refusal := shortfall([sae], cache=cache, quota_bytes=quota_bytes):
                    mark(store.root, [place], "deferred_by_quota", reason=refusal)
                    continue
                entry = announce(sae, cache=cache)
            elif place in local:
                entry = local[place]
            else:
                continue  # gone since the look; the next one says so
        except hub_errors() as error:
            failed["/".join(place)] = one_line(error, row["repo"])
            continue
        store.register(entry.key, entry.as_json())
        mark(store.root, [place], "registered", sae=entry.key)
        registered.append(entry)
    return registered, failed


def refresh_states(store: Store) -> int:
    """Bring registered SAEs' rows up to what was done with them (published, failed and why); returns how many changed."""
    standing: dict[str, tuple[str, str]] = {}
    for line in status(store):
        state = "failed" if line.last_error else "published" if line.stage == "published" else "registered"
        if standing.get(line.sae, ("", ""))[0] != "published":
            standing[line.sae] = (state, line.last_error)
    rows = {row["sae"]: row for row in read_catalog(store.root).iter_rows(named=True)}
    missing: list[CatalogRow] = []
    changed: dict[tuple[str, str], list[tuple[str, str]]] = {}
    for sae, (state, reason) in standing.items():
        row = rows.get(sae)
        if row is None:
            missing.append(_entry_row(SaeEntry.from_json(store.entry(sae)), state, reason))
        elif (row["state"], row["reason"]) != (state, reason) and row["state"] != "retired":
            changed.setdefault((state, reason), []).append((row["release"], row["path"]))
    marked = sum(mark(store.root, places, state, reason=reason) for (state, reason), places in changed.items())
    return marked + (record(store.root, missing) if missing else 0)


def _catalog(store: Store) -> dict[tuple[str, str], dict]:
    return {(row["release"], row["path"]): row for row in read_catalog(store.root).iter_rows(named=True)}


def _local_rows(
    store: Store, folders: Sequence[Path], known: dict[tuple[str, str], dict], subject: SubjectModel
) -> Iterator[CatalogRow]:
    """A row for each SAE of the folders that is not registered: settling, then ready."""
    registered = set(store.registered())
    for folder in folders:
        for entry in find_saes(folder):
            before = known.get((entry.release, entry.path))
            if entry.key in registered:
                continue
            state = "ready" if before is not None and before["sae"] == entry.key else "settling"
            row = CatalogRow.of_entry(entry, state=state)
            yield row if subject.matches(row.model) else _other_model(row, subject)


def _seen_row(sae: SeenSae, subject: SubjectModel) -> CatalogRow:
    row = CatalogRow.of_seen(sae)
    return row if row.state not in ("ready", "settling") or subject.matches(row.model) else _other_model(row, subject)


def _other_model(row: CatalogRow, subject: SubjectModel) -> CatalogRow:
    return replace(
        row, state="other_model", reason=f"was trained on {row.model}; this scenario's subject model is {subject.name}"
    )


def _entry_row(entry: SaeEntry, state: str, reason: str) -> CatalogRow:
    return replace(CatalogRow.of_entry(entry, state=state, repo=entry.repo), reason=reason)


def _count(rows: Sequence[CatalogRow]) -> dict[str, int]:
    return {state: sum(row.state == state for row in rows) for state in {row.state for row in rows}}


def _read_state(store: Store) -> WatchState:
    path = store.root / STATE_FILE
    return read_json(path) if path.exists() else WatchState()
