"""Places: a folder, or a prefix in an object store.

What belongs here: turning text into a place, reading from one whatever it is, what of a store is kept on this machine, and
errors of drivers in our words. What does not: writing (`files.py`), or where things lie within a store (`store.py`).
"""

import hashlib
import io
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, cast
from urllib.parse import urlsplit

from upath import UPath

from scopeatlas.errors import ConfigError, StoreError

Location = Path | UPath
"""A local path, or one in an object store: what is below it is reached by `/` in both."""

STATE_VARIABLE = "SCOPE_ATLAS_STATE"
_INSTALL = {
    "s3": 'pip install "scope-atlas[s3]"',
    "gs": "pip install gcsfs",
    "az": 'pip install "adlfs>=2024.12.0"',
}  # adlfs: before it, no conditional put
_READ_WHOLE = 1 << 20  # bytes: up to here a file is fetched in one request, larger ones by ranges


def location(text: str) -> Location:
    """The place that `text` names: a folder, or a URI such as `s3://bucket/prefix` (s3, gs or az).

    Credentials and endpoints come from the environment alone (AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL, ...). Raises ConfigError
    for a URI of another kind, one that carries a password or a wildcard, or one whose driver is not installed.
    """
    if "://" not in text:
        return Path(text).expanduser()
    uri = urlsplit(text)
    if uri.scheme == "file":
        return Path(uri.path)
    if "@" in uri.netloc:
        raise ConfigError(
            f"a store's URI must not carry credentials; name {uri.scheme}://BUCKET/PREFIX and put them in the environment"
        )
    if uri.scheme not in _INSTALL or not uri.netloc:
        raise ConfigError(
            f"no store at {text!r}: give a folder, or a URI as {', '.join(f'{s}://BUCKET/PREFIX' for s in _INSTALL)}"
        )
    if wild := sorted(set("*?[") & set(text)):
        raise ConfigError(f"a store's URI must not contain {' '.join(wild)}, which drivers take for a pattern; rename {text}")
    import fsspec

    try:
        fsspec.get_filesystem_class(uri.scheme)
    except ImportError as error:
        raise ConfigError(f"the store {text} needs a driver that is not installed: {_INSTALL[uri.scheme]}") from error
    return UPath(text.rstrip("/"), use_listings_cache=False)  # a cached listing hides what others write


def readable(path: Location) -> Path | IO[bytes]:
    """What pyarrow, polars and numpy open: a local path itself, else a file object that fetches what is read of it.

    Raises FileNotFoundError if there is no such file, StoreError if the store cannot be reached.
    """
    if isinstance(path, Path):
        return path
    with reaching(path):
        if path.stat().st_size <= _READ_WHOLE:
            return io.BytesIO(path.read_bytes())
        return path.open("rb", cache_type="none")  # the readers ask for whole pages, and ask once


def read_all(paths: Sequence[Location]) -> list[bytes | None]:
    """The content of small files, in order, fetched at the same time where they are far; None for one that is not there."""
    if all(isinstance(path, Path) for path in paths):
        return [path.read_bytes() if path.exists() else None for path in paths]
    remote = [path for path in paths if isinstance(path, UPath)]
    with reaching(remote[0]):
        found = cast("dict[str, bytes | Exception]", remote[0].fs.cat([path.path for path in remote], on_error="return"))
        contents = [found[path.path] for path in remote]
        for content in contents:
            if isinstance(content, Exception) and not isinstance(content, FileNotFoundError):
                raise content
    return [None if isinstance(content, Exception) else content for content in contents]


def sizes_under(folder: Location, *, nested: bool = False) -> dict[str, int]:
    """Bytes of each file in `folder` by its name, or with `nested` of all below it by their paths from it."""
    if isinstance(folder, Path):
        files = (path for path in (folder.rglob("*") if nested else folder.glob("*")) if path.is_file())
        return {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}
    with reaching(folder):
        found = cast("dict[str, dict]", folder.fs.find(folder.path, maxdepth=None if nested else 1, detail=True))
    return {name.removeprefix(folder.path).lstrip("/"): facts["size"] for name, facts in found.items()}


def folders_in(folder: Location) -> list[str]:
    """Names of the folders in `folder`, sorted; none if it is not there."""
    if isinstance(folder, Path):
        return sorted(path.name for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
    with reaching(folder):
        try:
            listed = folder.fs.ls(folder.path, detail=True)
        except (FileNotFoundError, NotADirectoryError):
            return []
    return sorted(facts["name"].rstrip("/").rsplit("/", 1)[-1] for facts in listed if facts["type"] == "directory")


def local_state(path: Location) -> Path:
    """Where this machine keeps what belongs to `path` and cannot lie in an object store: locks, and files under way.

    A local path is its own. Of a remote one it is a folder under $SCOPE_ATLAS_STATE (by default in the user's home), told
    apart by URI and endpoint.
    """
    if isinstance(path, Path):
        return path
    default = Path.home() / ".local" / "state" / "scopeatlas"
    identity = hashlib.sha256(f"{endpoint()}\0{path}".encode()).hexdigest()
    return Path(os.environ.get(STATE_VARIABLE) or default) / identity[:16]


def endpoint() -> str:
    """The S3 server that the environment names, as the drivers look it up; nothing where it is AWS itself."""
    return os.environ.get("AWS_ENDPOINT_URL_S3", os.environ.get("AWS_ENDPOINT_URL", ""))


@contextmanager
def reaching(path: Location) -> Iterator[None]:
    """Turn what the drivers of a remote place raise into a StoreError that names it; FileNotFoundError passes for the file
    that it is about, and a local path's errors pass as they are."""
    try:
        yield
    except Exception as error:
        if isinstance(path, Path) or not isinstance(error, (OSError, *_driver_errors())) or isinstance(error, _PASSING):
            raise
        raise StoreError(f"cannot use {path}: {_said(error)}") from error


_PASSING = (FileExistsError, FileNotFoundError, IsADirectoryError, NotADirectoryError)


def _said(error: Exception) -> str:
    first = (str(error).strip().splitlines() or [type(error).__name__])[0]
    if isinstance(error, PermissionError) or "redentials" in first:
        return f"{first}; check the credentials in the environment and what they may do there"
    return f"{first}; check the network, the bucket's name and the endpoint (AWS_ENDPOINT_URL)"


def _driver_errors() -> tuple[type[Exception], ...]:
    """Errors of drivers that are no OSError, of those drivers that are loaded."""
    named = {
        "botocore.exceptions": ("BotoCoreError", "ClientError"),
        "azure.core.exceptions": ("AzureError",),
        "aiohttp": ("ClientError",),
    }
    return tuple(getattr(sys.modules[module], name) for module, names in named.items() if module in sys.modules for name in names)
