"""Commit records: how a stage knows which of its shards are done, and readers which files to trust.

What belongs here: `StageFolder`, the one protocol every stage on disk follows. What does not: what a stage computes,
or where its folder lies (`store.py`).

A shard's data file is written first (atomically), its record after it. The record is created only if absent and
carries size and hash of every data file, so a half-written shard has no record and is simply done again. The
identity in a file's name is the hash of all that determines its bytes; a changed input gives another name, never
another content.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scopeatlas.errors import NotReadyError, StoreError
from scopeatlas.storage.files import atomic_path, content_hash, file_sha256, read_json

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

    def __init__(self, root: Path):
        self.root = root

    def data_path(self, key: ShardKey, suffix: str) -> Path:
        return self.root / f"{key.stem}{suffix}"

    def _record_path(self, key: ShardKey) -> Path:
        return self.root / f"{key.stem}.commit.json"

    def commit(self, key: ShardKey, files: Iterable[Path], facts: dict[str, Any]) -> CommitRecord:
        """Record `key` as done. Files must already be in place. A record that exists already wins."""
        described = {p.name: {"bytes": p.stat().st_size, "sha256": file_sha256(p)} for p in files}
        path = self._record_path(key)
        self._pruned_mark(key).unlink(missing_ok=True)
        if not path.exists():
            body = {"name": key.name, "identity": key.identity, "files": described, "facts": facts}
            with atomic_path(path) as temporary:
                temporary.write_text(json.dumps(body, indent=1, sort_keys=True), encoding="utf-8")
        return self.record(key)

    def record(self, key: ShardKey) -> CommitRecord:
        """The record of `key`. Raises NotReadyError if the shard is not done, StoreError if its files are gone."""
        path = self._record_path(key)
        if not path.exists():
            raise NotReadyError(f"{self.root.name} shard {key.name} is not done: no {path}; run that stage first")
        if self._pruned_mark(key).exists():
            raise NotReadyError(
                f"{self.root.name} shard {key.name} was pruned from {self.root}; run that stage again to restore it"
            )
        return self._load(path)

    def _load(self, path: Path) -> CommitRecord:
        body = read_json(path)
        try:
            return CommitRecord(ShardKey(body["name"], body["identity"]), body["files"], body["facts"])
        except (KeyError, TypeError) as error:
            raise StoreError(f"{path} is not a commit record ({error}); delete it and run the stage again") from error

    def is_done(self, key: ShardKey, *, or_pruned: bool = False) -> bool:
        """Whether `key` has a record and all its files are there with the recorded sizes.

        or_pruned: a shard whose data was pruned counts as done too, for a caller that needs none of it.
        """
        path = self._record_path(key)
        if not path.exists():
            return False
        if self._pruned_mark(key).exists():
            return or_pruned
        files = self._load(path).files
        intact = all((f := self.root / name).exists() and f.stat().st_size == d["bytes"] for name, d in files.items())
        if not intact:
            path.unlink()  # the shard is to be made again, and its record with it
        return intact

    def prune(self, record: CommitRecord) -> int:
        """Delete a shard's data but remember that it was done; returns the bytes freed."""
        self._pruned_mark(record.key).touch()
        return self._delete_data(record)

    def is_pruned(self, key: ShardKey) -> bool:
        """Whether a shard was done and its data deleted since."""
        return self._pruned_mark(key).exists()

    def _pruned_mark(self, key: ShardKey) -> Path:
        return self.root / f"{key.stem}.pruned"

    def pending(self, keys: Iterable[ShardKey]) -> list[ShardKey]:
        """Those of `keys` still to be done, in order."""
        return [key for key in keys if not self.is_done(key)]

    def records(self) -> Iterator[CommitRecord]:
        """Every record in the folder, of whatever generation, by name."""
        for path in sorted(self.root.glob("*.commit.json")):
            yield self._load(path)

    def manifest(self, keys: Iterable[ShardKey]) -> list[CommitRecord]:
        """The records of `keys`. Raises NotReadyError naming the first that is missing."""
        return [self.record(key) for key in keys]

    def stale(self, keys: Iterable[ShardKey]) -> list[CommitRecord]:
        """Records of shards that are none of `keys`: earlier generations that pruning may delete."""
        wanted = {key.identity for key in keys}
        return [record for record in self.records() if record.key.identity not in wanted]

    def discard(self, record: CommitRecord) -> int:
        """Delete a shard, record first; returns the bytes freed."""
        self._record_path(record.key).unlink(missing_ok=True)
        self._pruned_mark(record.key).unlink(missing_ok=True)
        return self._delete_data(record)

    def _delete_data(self, record: CommitRecord) -> int:
        freed = 0
        for name in record.files:
            path = self.root / name
            if path.exists():
                freed += path.stat().st_size
                path.unlink()
        return freed


def generation(keys: Iterable[ShardKey]) -> str:
    """The data version of a stage over `keys`: changes exactly when one of its shards does."""
    return content_hash(sorted(key.identity for key in keys))
