"""Atomic files and content hashes.

What belongs here: writing one file so that it is either whole or absent, locks, and hashing content. What does not: what a
place is and reading from it (`uris.py`), which files make up a stage (`records.py`) or where they lie (`store.py`).
"""

import fcntl
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from upath import UPath

from scopeatlas.errors import StoreError
from scopeatlas.storage.uris import Location, local_state, reaching

_CHUNK = 1 << 20


@contextmanager
def atomic_path(target: Location) -> Iterator[Path]:
    """Yield a temporary local path; on success put what was written there in the place of `target`.

    Beside a local target it is fsynced and renamed: a crash at any moment leaves either the old file, the new file or a
    `.tmp-*` file that nobody reads. To an object store it is put whole. Raises StoreError if the place cannot be written.
    """
    if isinstance(target, Path):
        with _renamed(target) as temporary:
            yield temporary
        return
    with tempfile.TemporaryDirectory(prefix="scopeatlas-") as folder:
        temporary = Path(folder) / target.name
        try:
            yield temporary
        except OSError as error:
            said = f"cannot write {temporary}, from where {target} is put: {error.strerror or error}"
            raise StoreError(f"{said}; free space there or set TMPDIR") from error
        _put(temporary, target)


@contextmanager
def _renamed(target: Path) -> Iterator[Path]:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=target.parent, prefix=".tmp-", suffix=target.suffix)
    except OSError as error:
        raise StoreError(f"cannot write {target}: {error.strerror}; make the folder writable or set another store") from error
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o644)  # mkstemp made it private; the store is for everyone who may read the folder
        with temporary.open("rb+") as stream:
            os.fsync(stream.fileno())
        temporary.replace(target)
        _fsync_folder(target.parent)
    except OSError as error:
        raise StoreError(f"cannot write {target}: {error.strerror or error}; free space or set another store") from error
    finally:
        temporary.unlink(missing_ok=True)


_put_here: dict[str, dict[str, Any]] = {}
"""What this process has put into an object store and not described yet: it need not be fetched again to be hashed."""


def _put(source: Path, target: UPath) -> None:
    facts = {"bytes": source.stat().st_size, "sha256": file_sha256(source)}
    try:
        with reaching(target):
            target.fs.put_file(str(source), target.path)
    except FileNotFoundError as error:
        raise StoreError(f"cannot write {target}: {error}; make the bucket or set another store") from error
    _put_here[str(target)] = facts


def described(path: Location) -> dict[str, Any]:
    """Bytes and SHA-256 of a file, as commit records hold them."""
    facts = _put_here.pop(str(path), None)
    return facts or {"bytes": path.stat().st_size, "sha256": file_sha256(path)}


def create_once(target: Location, content: bytes) -> bool:
    """Write a small file unless there is one already, which then stays; whether it was written.

    Of several machines that try it in an object store exactly one succeeds (a conditional put). Raises StoreError if the
    place cannot be written.
    """
    if isinstance(target, Path):
        if not target.exists():
            with _renamed(target) as temporary:
                temporary.write_bytes(content)
            return True
        return False
    try:
        with reaching(target):
            target.fs.pipe_file(target.path, content, mode="create")
    except FileExistsError:
        return False
    except FileNotFoundError as error:
        raise StoreError(f"cannot write {target}: {error}; make the bucket or set another store") from error
    return True


@contextmanager
def locked(path: Location, *, wait: bool = True) -> Iterator[bool]:
    """Hold a lock against every other process on this machine; a killed holder frees it. Object stores know no locks: what
    lies there is locked by a file in this machine's own state, and writers on other machines are not kept out.

    Yields False if it is not to be had and `wait` is False.
    """
    place = local_state(path)
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        stream = place.open("w")
    except OSError as error:
        raise StoreError(f"cannot lock {path} by {place}: {error.strerror}; make its folder writable") from error
    with stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        yield True


def _fsync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(target: Location, value: Any) -> None:
    """Write `value` as readable JSON, atomically."""
    with atomic_path(target) as path:
        path.write_text(json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: Location) -> Any:
    """Read a JSON file. Raises StoreError naming the file if it is missing or damaged."""
    found = read_json_if_there(path)
    if found is None:
        raise StoreError(f"cannot read {path}: no such file")
    return found


def read_json_if_there(path: Location) -> Any | None:
    """Read a JSON file, or None if there is no such file. Raises StoreError naming the file if it is damaged."""
    try:
        with reaching(path):
            return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise StoreError(f"cannot read {path}: {error}") from error


def file_sha256(path: Location) -> str:
    """SHA-256 of a file's bytes, hex."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(_CHUNK):
            digest.update(block)
    return digest.hexdigest()


def content_hash(*parts: Any) -> str:
    """SHA-256 of the canonical JSON of `parts`, hex: the identity of anything described by plain data."""
    canonical = json.dumps(parts, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


def unit_hash(salt: str, key: str) -> float:
    """A uniform number in [0, 1) that depends on `salt` and `key` alone."""
    digest = hashlib.sha256(f"{salt}\0{key}".encode()).digest()
    return int.from_bytes(digest[:7], "big") / float(1 << 56)


def stable_id(salt: str, key: str) -> int:
    """A non-negative 63-bit integer that depends on `salt` and `key` alone (fits a signed int64 column)."""
    digest = hashlib.sha256(f"{salt}\0{key}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def human_bytes(count: int) -> str:
    """1.5 MB, in powers of 1,000."""
    size = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"
