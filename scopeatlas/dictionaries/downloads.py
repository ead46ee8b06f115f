"""Fetching an SAE's files from the Hub into the Hugging Face cache: exactly those, verified, within a quota.

What belongs here: downloads, what they would take, and what the cache holds already. What does not: what a repo holds
(`hub.py`), or what the files mean (`releases.py`).
"""

import hashlib
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from scopeatlas.dictionaries import formats
from scopeatlas.dictionaries.hub import SeenSae, bounded_waits, endpoint, hub_errors, list_saes, one_line, resolve
from scopeatlas.dictionaries.layout import SaeFiles
from scopeatlas.dictionaries.releases import SaeEntry, describe_files, files_under
from scopeatlas.errors import DictionaryError
from scopeatlas.runner.local import Log, silent
from scopeatlas.storage.files import atomic_path, file_sha256

MAX_WAIT_S = 600.0
"""How long one fetch waits for rate limits in all; the Hub's windows are five minutes."""


@dataclass(frozen=True)
class CachedRelease:
    """A repo at a commit in a folder of the Hugging Face cache. root: its snapshot."""

    repo: str
    sha: str
    root: Path


def default_cache() -> Path:
    """Where huggingface_hub keeps its files (HF_HUB_CACHE, HF_HOME)."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def cached_releases(cache: Path | None = None) -> list[CachedRelease]:
    """Every snapshot in a Hugging Face cache folder that has files, by repo, the newest of a repo last."""
    return [
        CachedRelease(folder.name.removeprefix("models--").replace("--", "/", 1), snapshot.name, snapshot)
        for folder in sorted((cache or default_cache()).glob("models--*"))
        for snapshot in sorted((folder / "snapshots").glob("*"), key=lambda path: path.stat().st_mtime)
        if any(path.is_file() for path in snapshot.rglob("*"))
    ]


def shortfall(saes: Sequence[SeenSae], *, cache: Path | None = None, quota_bytes: int | None = None) -> str | None:
    """Why fetching `saes` would not fit, in one line with the numbers; None if it fits.

    quota_bytes: the most that the cache folder may hold, all of its files counted.
    """
    cache = cache or default_cache()
    needed = sum(size for sae in saes for name, (size, digest) in sae.digests.items() if not _has(cache, sae, name, digest))
    if not needed:
        return None
    what = saes[0].path if len(saes) == 1 else f"{len(saes)} SAEs"
    held = sum(path.stat().st_size for path in cache.rglob("*") if path.is_file() and not path.is_symlink())
    if quota_bytes is not None and held + needed > quota_bytes:
        return (
            f"{what} of {saes[0].repo} needs {needed} bytes, but {cache} holds {held} of the {quota_bytes} that the quota"
            " allows; raise the quota or delete releases from the cache"
        )
    existing = next(folder for folder in (cache, *cache.absolute().parents) if folder.exists())
    free = shutil.disk_usage(existing).free
    if needed > free:
        return f"{what} of {saes[0].repo} needs {needed} bytes, but {existing} has {free} free; free space or set another cache"
    return None


def fetch(
    sae: SeenSae,
    *,
    cache: Path | None = None,
    quota_bytes: int | None = None,
    max_wait_s: float = MAX_WAIT_S,
    log: Log = silent,
) -> Path:
    """Download the files of one SAE at its commit, by name, and return the snapshot that is the release's root.

    What is in the cache is used, offline as well; a lost connection is resumed. Each file is verified by size and hash;
    a wrong one is deleted and fetched once more. Raises DictionaryError if the SAE is not whole, does not fit the quota
    or the disk, cannot be fetched, or does not arrive as listed.
    """
    cache = cache or default_cache()
    if sae.files.missing:
        raise DictionaryError(f"{sae.repo} lacks {', '.join(sae.files.missing)} of {sae.path}; wait until it is uploaded")
    if refusal := shortfall([sae], cache=cache, quota_bytes=quota_bytes):
        raise DictionaryError(refusal)
    with bounded_waits(max_wait_s):
        for name in sae.files.all:
            try:
                _fetch_file(sae, name, cache, log)
            except hub_errors() as error:
                if isinstance(error, DictionaryError):
                    raise
                raise DictionaryError(f"cannot fetch {name}: {one_line(error, sae.repo)}") from error
    return _snapshot(cache, sae.repo, sae.sha)


def fetch_from_hub(
    repo: str,
    patterns: Sequence[str],
    *,
    revision: str = "main",
    cache: Path | None = None,
    quota_bytes: int | None = None,
    log: Log = silent,
) -> list[SaeEntry]:
    """Fetch the SAEs of a Hub repo whose paths match `patterns` (globs) and describe them.

    With HF_HUB_OFFLINE=1, what the cache holds of that revision is used. Raises DictionaryError if the repo cannot be
    reached, nothing matches, a match is not whole, or all of them together do not fit.
    """
    from huggingface_hub.errors import OfflineModeIsEnabled

    cache = cache or default_cache()
    try:
        with bounded_waits(MAX_WAIT_S):
            sha = resolve(repo, revision)
            listed = [sae for sae in list_saes(repo, sha) if _matches(sae.path, patterns)]
    except OfflineModeIsEnabled:
        release = _cached_release(cache, repo, revision)
        files = [
            f
            for f in formats.find(files_under(release.root), repo.rsplit("/", 1)[-1])
            if not f.missing and _matches(f.path, patterns)
        ]
        return _described(release, files, patterns)
    except hub_errors() as error:
        raise DictionaryError(f"cannot fetch {repo}@{revision}: {one_line(error, repo)}") from error
    if refusal := shortfall(listed, cache=cache, quota_bytes=quota_bytes):
        raise DictionaryError(refusal)
    for sae in listed:
        fetch(sae, cache=cache, quota_bytes=quota_bytes, log=log)
    if listed and revision != sha:
        _remember_revision(cache, repo, revision, sha)
    return _described(CachedRelease(repo, sha, _snapshot(cache, repo, sha)), [sae.files for sae in listed], patterns)


def _matches(path: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(path, pattern.rstrip("/")) for pattern in patterns)


def _described(release: CachedRelease, files: list[SaeFiles], patterns: Sequence[str]) -> list[SaeEntry]:
    if not files:
        where = f"{release.repo}@{release.sha}"
        raise DictionaryError(
            f"{where} has no whole SAE whose path matches {', '.join(patterns)}; check the patterns of saes.hub"
        )
    name = release.repo.rsplit("/", 1)[-1]
    return [describe_files(release.root, each, release=name, revision=release.sha) for each in files]


def _repo_folder(cache: Path, repo: str) -> Path:
    return cache / f"models--{repo.replace('/', '--')}"


def _snapshot(cache: Path, repo: str, sha: str) -> Path:
    return _repo_folder(cache, repo) / "snapshots" / sha


def _remember_revision(cache: Path, repo: str, revision: str, sha: str) -> None:
    """As the library does when asked for a branch, so that the branch can be found offline; we ask for the commit."""
    with atomic_path(_repo_folder(cache, repo) / "refs" / revision) as path:
        path.write_text(sha, encoding="utf-8")


def _cached_release(cache: Path, repo: str, revision: str) -> CachedRelease:
    reference = _repo_folder(cache, repo) / "refs" / revision
    sha = reference.read_text(encoding="utf-8").strip() if reference.is_file() else revision
    if not _snapshot(cache, repo, sha).is_dir():
        raise DictionaryError(f"{cache} does not hold {repo}@{revision} and HF_HUB_OFFLINE is set; unset it to ask the Hub")
    return CachedRelease(repo, sha, _snapshot(cache, repo, sha))


def _has(cache: Path, sae: SeenSae, name: str, digest: str) -> bool:
    """Whether a file need not be downloaded: it is there at this commit, or was at an earlier one."""
    return (_snapshot(cache, sae.repo, sae.sha) / name).exists() or (_repo_folder(cache, sae.repo) / "blobs" / digest).exists()


def _fetch_file(sae: SeenSae, name: str, cache: Path, log: Log) -> None:
    from huggingface_hub import hf_hub_download

    size, digest = sae.digests[name]
    for _ in range(2):
        path = Path(hf_hub_download(sae.repo, name, revision=sae.sha, cache_dir=cache, endpoint=endpoint()))
        if path.stat().st_size == size and _digest(path, digest) == digest:
            return
        log(f"{sae.repo}/{name} arrived with other bytes than listed; deleted and fetched once more")
        path.resolve().unlink()
        with suppress(FileNotFoundError):
            path.unlink()
    raise DictionaryError(
        f"{sae.repo}/{name} at {sae.sha} does not arrive as the {size} bytes of hash {digest[:12]} that the Hub lists;"
        " try again later, or through another network"
    )


def _digest(path: Path, like: str) -> str:
    """The sha256 of a file or, where `like` is as short as one, its git blob id."""
    if len(like) == 64:
        return file_sha256(path)
    content = path.read_bytes()
    return hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()
