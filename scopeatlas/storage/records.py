"""Commit records: how a stage knows which of its shards are done, and readers which files to trust.

What belongs here: `StageFolder`, the one protocol every stage on disk follows. What does not: what a stage computes,
or where its folder lies (`store.py`).

A shard's data file is written first (atomically), its record after it. The record is created only if absent (in an object
store by a conditional put, so that of several machines one wins) and carries size and hash of every data file, so a
half-written shard has no record and is simply done again. The identity in a file's name is the hash of all that determines
its bytes; a changed input gives another name, never another content.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from scopeatlas.errors import NotReadyError, StoreError
from scopeatlas.storage.files import content_hash, create_once, described
from scopeatlas.storage.uris import Location, reaching, read_all, sizes_under

_RECORD, _PRUNED = ".commit.json", ".pruned"

IDENTITY_LENGTH = 16


@dataclass(frozen=True)
class ShardKey:
    """A unit of work: a readable name and the hash of everything that determines its result."""

    name: str
    identity: str

    @property
    def stem(self) -> str:
        return f"{self.name}-{self.identity[:IDENTITY_LENGTH]}"


@dataclass(frozen=True)
class CommitRecord:
    """One finished shard: its data files (bytes, sha256) and the numbers its stage wants to remember."""

    key: ShardKey
    files: dict[str, dict[str, Any]]
    facts: dict[str, Any]


class StageFolder:
    """One stage's folder: data files, commit records, and the manifest that follows from the records."""

    def __init__(self, root: Location):
        self.root = root

    def data_path(self, key: ShardKey, suffix: str) -> Location:
        return self.root / f"{key.stem}{suffix}"

    def _record_path(self, key: ShardKey) -> Location:
        return self.root / f"{key.stem}{_RECORD}"

    def _pruned_mark(self, key: ShardKey) -> Location:
        return self.root / f"{key.stem}{_PRUNED}"

    def commit(self, key: ShardKey, files: Iterable[Location], facts: dict[str, Any]) -> CommitRecord:
        """Record `key` as done. Files must already be in place. A record that exists already wins."""
        with reaching(self.root):
            body = {"name": key.name, "identity": key.identity, "files": {p.name: described(p) for p in files}, "facts": facts}
            self._pruned_mark(key).unlink(missing_ok=True)
            create_once(self._record_path(key), json.dumps(body, indent=1, sort_keys=True).encode())
        return self.record(key)

    def record(self, key: ShardKey) -> CommitRecord:
        """The record of `key`. Raises NotReadyError if the shard is not done, StoreError if it cannot be read."""
        return self._present(key, self._read([key])[0], self._size)

    def manifest(self, keys: Iterable[ShardKey]) -> list[CommitRecord]:
        """The records of `keys`. Raises NotReadyError naming the first that is missing."""
        keys = list(keys)
        records, size = self._read_then_list(keys)
        return [self._present(key, record, size) for key, record in zip(keys, records, strict=True)]

    def is_done(self, key: ShardKey, *, or_pruned: bool = False) -> bool:
        """Whether `key` has a record and all its files are there with the recorded sizes.

        or_pruned: a shard whose data was pruned counts as done too, for a caller that needs none of it.
        """
        return self._is_done(key, self._read([key])[0], self._size, or_pruned)

    def pending(self, keys: Iterable[ShardKey], *, or_pruned: bool = False) -> list[ShardKey]:
        """Those of `keys` still to be done, in order; the folder is listed once for all."""
        keys = list(keys)
        records, size = self._read_then_list(keys)
        return [key for key, record in zip(keys, records, strict=True) if not self._is_done(key, record, size, or_pruned)]

    def prune(self, record: CommitRecord) -> int:
        """Delete a shard's data but remember that it was done; returns the bytes freed."""
        with reaching(self.root):
            self._pruned_mark(record.key).touch()
        return self._delete_data(record)

    def is_pruned(self, key: ShardKey) -> bool:
        """Whether a shard was done and its data deleted since."""
        return self._size(self._pruned_mark(key).name) is not None

    def records(self) -> Iterator[CommitRecord]:
        """Every record in the folder, of whatever generation, by name."""
        paths = [self.root / name for name in sorted(sizes_under(self.root)) if name.endswith(_RECORD)]
        for path, content in zip(paths, read_all(paths), strict=True):
            if content is not None:
                yield _parsed(path, content)

    def discard(self, record: CommitRecord) -> int:
        """Delete a shard, record first; returns the bytes freed."""
        with reaching(self.root):
            self._record_path(record.key).unlink(missing_ok=True)
            self._pruned_mark(record.key).unlink(missing_ok=True)
        return self._delete_data(record)

    def bytes_of(self, record: CommitRecord) -> int:
        """What a shard's data takes: nothing if it is gone."""
        return sum(self._size(name) or 0 for name in record.files)

    def _size(self, name: str) -> int | None:
        """Bytes of a file of this folder, None if it is not there."""
        with reaching(self.root):
            try:
                return (self.root / name).stat().st_size
            except (FileNotFoundError, NotADirectoryError):
                return None

    def _read(self, keys: Sequence[ShardKey]) -> list[CommitRecord | None]:
        paths = [self._record_path(key) for key in keys]
        contents = zip(paths, read_all(paths), strict=True)
        return [None if content is None else _parsed(path, content) for path, content in contents]

    def _read_then_list(self, keys: Sequence[ShardKey]) -> tuple[list[CommitRecord | None], Callable[[str], int | None]]:
        """Records and the sizes of all files, in this order: data come before their record, so what is recorded is listed,
        though another machine commits meanwhile."""
        records = self._read(keys)
        return records, sizes_under(self.root).get

    def _present(self, key: ShardKey, record: CommitRecord | None, size: Callable[[str], int | None]) -> CommitRecord:
        if record is None:
            missing = self._record_path(key)
            raise NotReadyError(f"{self.root.name} shard {key.name} is not done: no {missing}; run that stage first")
        if size(self._pruned_mark(key).name) is not None:
            message = f"{self.root.name} shard {key.name} was pruned from {self.root}"
            raise NotReadyError(f"{message}; run that stage again to restore it")
        return record

    def _is_done(self, key: ShardKey, record: CommitRecord | None, size: Callable[[str], int | None], or_pruned: bool) -> bool:
        if record is None:
            return False
        if size(self._pruned_mark(key).name) is not None:
            return or_pruned
        intact = all(size(name) == facts["bytes"] for name, facts in record.files.items())
        if not intact:
            with reaching(self.root):
                self._record_path(key).unlink(missing_ok=True)  # the shard is to be made again, and its record with it
        return intact

    def _delete_data(self, record: CommitRecord) -> int:
        freed = self.bytes_of(record)
        with reaching(self.root):
            for name in record.files:
                (self.root / name).unlink(missing_ok=True)
        return freed


def _parsed(path: Location, content: bytes) -> CommitRecord:
    try:
        body = json.loads(content)
    except ValueError as error:
        raise StoreError(f"cannot read {path}: {error}") from error
    try:
        return CommitRecord(ShardKey(body["name"], body["identity"]), body["files"], body["facts"])
    except (KeyError, TypeError) as error:
        raise StoreError(f"{path} is not a commit record ({error}); delete it and run the stage again") from error


def generation(keys: Iterable[ShardKey]) -> str:
    """The data version of a stage over `keys`: changes exactly when one of its shards does."""
    return content_hash(sorted(key.identity for key in keys))
