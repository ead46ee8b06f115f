"""Discovery: looking at every source of releases, remembering what is there, and registering what is ready.

What belongs here: one look, the queue that the catalog is, and its states. What does not: how a Hub repo is polled
(`dictionaries/watching.py`), how a folder is searched (`dictionaries/releases.py`), or when runs start (`pipelines/`).

An SAE in a folder is `settling` at the first look and `ready` when a second finds the same files; one on the Hub once its
repo's commit has been the same over two polls. Ready SAEs wait in the catalog until `register_ready` takes them, so a
process that dies in between loses nothing.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import polars as pl

from scopeatlas.atlas.catalog import CATALOG, CatalogRow, Change, mark, read_catalog, record, retire
from scopeatlas.atlas.tables import has_table
from scopeatlas.dictionaries import formats
from scopeatlas.dictionaries.downloads import shortfall
from scopeatlas.dictionaries.hub import SeenSae, bounded_waits, hub_errors, list_saes, one_line
from scopeatlas.dictionaries.registration import announce
from scopeatlas.dictionaries.releases import SaeEntry, find_saes
from scopeatlas.dictionaries.watching import WatchRule, WatchState, poll
from scopeatlas.errors import DictionaryError, ScopeAtlasError
from scopeatlas.storage.files import content_hash, locked, read_json_if_there, write_json
from scopeatlas.storage.store import Store
from scopeatlas.storage.uris import Location
from scopeatlas.subject.loading import SubjectModel
from scopeatlas.upkeep import status

MAX_REPOS = 5
"""Repos listed in one look; the others have their turn in the next. A look must end within a sensor's minute."""
MAX_SECONDS = 20.0
"""For registering in one go; what is left waits."""

Place = tuple[str, str]
"""Release and path: what a row of the catalog is about."""


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
        errors: dict[str, str] = {}
        rows = list(_local_rows(store, folders, known, subject, errors))
        state_file = _state_file(store, rules, subject)
        polled = poll(rules, _read_state(store, state_file), max_repos=MAX_REPOS) if rules else None
        if polled is not None:
            rows += [_seen_row(sae, subject) for sae in polled.seen]
            errors |= polled.errors
        accepted = _accepted(rows, known, errors)
        record(store.root, accepted)
        if polled is not None:
            for repo in polled.gone_repos:
                retire(store.root, repo)
            for repo, path in polled.gone_saes:
                retire(store.root, repo, paths=[path])
            # Last, so that a look that dies before is looked again: what is recorded twice is the same.
            write_json(state_file, polled.state)
        return Look(_count(accepted), errors)


def register_ready(
    store: Store,
    folders: Sequence[Path],
    *,
    limit: int,
    cache: Path | None = None,
    quota_bytes: int | None = None,
) -> tuple[list[SaeEntry], dict[str, str]]:
    """Register at most `limit` ready SAEs, by release and path; returns them, and why others could not be.

    One on the Hub is registered by what the Hub lists; its weights are fetched by the run that needs them, and count
    against the quota from now on. What cannot be registered does not stand in the way of the rest.
    """
    ready = pl.concat([read_catalog(store.root, state=state) for state in ("ready", "deferred_by_quota")])
    if quota_bytes is not None:
        quota_bytes -= _promised(store)
    queue = _Queue(folders, cache, quota_bytes)
    changes: dict[Place, Change] = {}
    registered: list[SaeEntry] = []
    end = time.monotonic() + MAX_SECONDS
    with bounded_waits(MAX_SECONDS):
        for row in ready.sort("release", "path").iter_rows(named=True):
            if len(registered) == limit or time.monotonic() > end:
                break
            found = queue.take(row)
            if isinstance(found, SaeEntry):
                store.register(found.key, found.as_json())
                registered.append(found)
                found = Change("registered", sae=found.key)
            if found is not None:
                changes[row["release"], row["path"]] = found
    mark(store.root, changes)
    return registered, queue.errors


class _Queue:
    """Turns rows that wait into entries. errors: why a source could not be read; it is then left for another time."""

    def __init__(self, folders: Sequence[Path], cache: Path | None, quota_bytes: int | None):
        self.folders, self.cache, self.quota_bytes = folders, cache, quota_bytes
        self.errors: dict[str, str] = {}
        self._local: dict[Place, SaeEntry] | None = None
        self._listed: dict[tuple[str, str], dict[str, SeenSae]] = {}
        self._taken: list[SeenSae] = []

    def take(self, row: dict) -> SaeEntry | Change | None:
        """The entry of a row, or what becomes of the row instead; None leaves it in the queue."""
        if not row["repo"]:
            return self._take_local((row["release"], row["path"]))
        if row["repo"] in self.errors:
            return None
        try:
            return self._take_from_hub(row["repo"], row["revision"], row["path"])
        except hub_errors() as error:
            self.errors[row["repo"]] = one_line(error, row["repo"])
            return None

    def _take_local(self, place: Place) -> SaeEntry | Change:
        if self._local is None:
            entries = [entry for folder in self.folders if folder.is_dir() for entry in find_saes(folder)]
            self._local = {(entry.release, entry.path): entry for entry in entries}
        return self._local.get(place) or Change("retired", "no longer in its folder")

    def _take_from_hub(self, repo: str, revision: str, path: str) -> SaeEntry | Change:
        if (repo, revision) not in self._listed:
            self._listed[repo, revision] = {sae.path: sae for sae in list_saes(repo, revision)}
        sae = self._listed[repo, revision].get(path)
        if sae is None:
            return Change("retired", f"not in {repo} at {revision[:8]}")
        if refusal := shortfall([*self._taken, sae], cache=self.cache, quota_bytes=self.quota_bytes):
            return Change("deferred_by_quota", refusal)
        entry = announce(sae, cache=self.cache, max_wait_s=MAX_SECONDS)
        self._taken.append(sae)
        return entry


def _promised(store: Store) -> int:
    """Bytes of SAEs that are registered and not fetched yet."""
    waiting = read_catalog(store.root, state="registered").filter(pl.col("repo") != "")
    total = 0
    for row in waiting.iter_rows(named=True):
        try:
            entry = SaeEntry.from_json(store.entry(row["sae"]))
        except ScopeAtlasError:
            continue
        total += 0 if all((Path(entry.root) / name).exists() for name in entry.weights) else row["bytes"]
    return total


def registered_for(store: Store, subject: SubjectModel) -> list[str]:
    """Keys of the registered SAEs that are of this subject model: another scenario may share the store."""
    keys = []
    for key in store.registered():
        try:
            entry = SaeEntry.from_json(store.entry(key))
        except ScopeAtlasError:
            continue
        if subject.matches(formats.facts(entry.files, entry.release).model):
            keys.append(key)
    return keys


def refresh_states(store: Store) -> int:
    """Bring registered SAEs' rows up to what was done with them (published, failed and why); returns how many changed.

    A row that is about other files by now (a newer version waits in the queue) is left alone.
    """
    standing: dict[str, Change] = {}
    for line in status(store):
        state = "failed" if line.last_error else "published" if line.stage == "published" else "registered"
        if line.sae not in standing or standing[line.sae].state != "published":
            standing[line.sae] = Change(state, line.last_error)
    known = _catalog(store)
    missing: dict[Place, CatalogRow] = {}
    changes: dict[Place, Change] = {}
    for sae, change in standing.items():
        try:
            entry = SaeEntry.from_json(store.entry(sae))
        except ScopeAtlasError:
            continue  # of an earlier version of this program
        place = (entry.release, entry.path)
        row = known.get(place)
        if row is None:
            found = CatalogRow.of_entry(entry, state=change.state, repo=entry.repo)
            missing[place] = replace(found, reason=change.reason)
        elif row["sae"] == sae and row["state"] in ("registered", "published", "failed"):
            changes[place] = change
    return mark(store.root, changes) + (record(store.root, missing.values()) if missing else 0)


def _catalog(store: Store) -> dict[Place, dict]:
    return {(row["release"], row["path"]): row for row in read_catalog(store.root).iter_rows(named=True)}


def _local_rows(
    store: Store, folders: Sequence[Path], known: dict[Place, dict], subject: SubjectModel, errors: dict[str, str]
) -> Iterator[CatalogRow]:
    """A row for each SAE of the folders that is not registered: settling, then ready."""
    registered = set(store.registered())
    for folder in folders:
        try:
            entries = find_saes(folder)
        except DictionaryError as error:
            errors[str(folder)] = str(error)
            continue
        for entry in entries:
            if entry.key in registered:
                continue
            before = known.get((entry.release, entry.path))
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


def _accepted(rows: Sequence[CatalogRow], known: dict[Place, dict], errors: dict[str, str]) -> list[CatalogRow]:
    """One row for each release and path, without those that would take something back from others.

    A scenario of another subject model says nothing about rows that one of the right model has; and of two repos that
    differ only in their owner, the first keeps the name.
    """
    accepted: dict[Place, CatalogRow] = {}
    for row in rows:
        place = (row.release, row.path)
        before = known.get(place)
        owner = accepted[place].repo if place in accepted else before["repo"] if before else row.repo
        if row.state == "other_model" and before is not None and before["state"] not in ("seen", "other_model"):
            continue
        if row.repo and owner and row.repo != owner:
            errors[row.repo] = f"has the name and paths of {owner}, which came first; watch one of them in a store of its own"
            continue
        accepted[place] = row
    return list(accepted.values())


def _count(rows: Sequence[CatalogRow]) -> dict[str, int]:
    return {state: sum(row.state == state for row in rows) for state in {row.state for row in rows}}


def _state_file(store: Store, rules: Sequence[WatchRule], subject: SubjectModel) -> Location:
    """What was polled, by what was asked: scenarios that share a store do not forget each other's repos."""
    asked = content_hash([asdict(rule) for rule in rules], subject.name, list(subject.serves))
    return store.root / "discovery" / f"{asked[:16]}.json"


def _read_state(store: Store, path: Location) -> WatchState:
    """An atlas that was lost takes the queue with it, so everything is looked at anew."""
    state = read_json_if_there(path)
    return state if state is not None and has_table(store.root, CATALOG) else WatchState()
