"""Asking the Hub what a repo holds, within bounded time, and saying in one line why it did not answer.

What belongs here: one repo at one commit as `SeenSae`s, and what every call to the Hub has in common. What does not:
which repos matter and when they are settled (`watching.py`), or fetching files (`downloads.py`).
"""

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from scopeatlas.dictionaries import formats
from scopeatlas.dictionaries.layout import SaeFacts, SaeFiles
from scopeatlas.errors import DictionaryError
from scopeatlas.storage.files import content_hash

if TYPE_CHECKING:
    from huggingface_hub import HfApi

_TIMEOUT_S = 30.0
"""How long one answer may take; the library's listings would wait for ever."""


@dataclass(frozen=True)
class SeenSae:
    """One SAE of a Hub repo at one commit, known from its listing.

    digests: by file name (as in `files.all`), its bytes and its sha256 (64 hex) or, for small text files that the Hub
    keeps in git, its git blob id (40 hex). state: seen (exists, no rule selects it), other_model, too_large, incomplete,
    settling (whole, but the commit is new) or ready. reason: one line where the state needs one.
    """

    repo: str
    sha: str
    files: SaeFiles
    facts: SaeFacts
    digests: dict[str, tuple[int, str]]
    state: str = "seen"
    reason: str = ""

    @property
    def release(self) -> str:
        return self.repo.rsplit("/", 1)[-1]

    @property
    def path(self) -> str:
        return self.files.path

    @property
    def bytes(self) -> int:
        return sum(size for size, _ in self.digests.values())

    @property
    def identity(self) -> str:
        return files_identity(self.digests)


def files_identity(digests: Mapping[str, tuple[int, str]]) -> str:
    """What files are, whatever the commit, from their bytes and hashes as the Hub lists them: 16 hex digits."""
    return content_hash(sorted(digests.items()))[:16]


def endpoint() -> str:
    """The Hub's address: HF_ENDPOINT as it is now, not only as it was when huggingface_hub was imported."""
    from huggingface_hub import constants

    return (os.environ.get("HF_ENDPOINT") or constants.ENDPOINT).rstrip("/")


def api() -> "HfApi":
    """The library's client for `endpoint()`."""
    from huggingface_hub import HfApi

    return HfApi(endpoint=endpoint())


def resolve(repo: str, revision: str) -> str:
    """The commit that a branch or tag of `repo` stands at. Raises one of `hub_errors()`."""
    sha = api().model_info(repo, revision=revision, expand=["sha"], timeout=_TIMEOUT_S).sha
    if sha is None:
        raise DictionaryError(f"{endpoint()} does not say at which commit {repo}@{revision} is; give a commit as the revision")
    return sha


def list_saes(repo: str, sha: str) -> list[SeenSae]:
    """Every SAE in `repo` at a commit, by path, as `seen`; one call per thousand files. Raises one of `hub_errors()`.

    An empty file counts as missing: a release has held one where a shard should be.
    """
    listed: dict[str, tuple[int, str]] = {}
    for entry in api().list_repo_tree(repo, revision=sha, recursive=True):
        size = getattr(entry, "size", 0)  # folders have none
        if size:
            lfs = getattr(entry, "lfs", None)
            listed[entry.path] = (size, lfs.sha256 if lfs else getattr(entry, "blob_id", ""))
    release = repo.rsplit("/", 1)[-1]
    return [
        SeenSae(repo, sha, files, formats.facts(files, release), {name: listed[name] for name in files.all if name in listed})
        for files in formats.find(listed, release)
    ]


@contextmanager
def bounded_waits(seconds: float) -> Iterator[None]:
    """Within it, rate-limited calls wait at most `seconds` in all, and an answer that does not come ends after 30 s.

    The library obeys any Retry-After, five times over. Raises DictionaryError with the number when it would be too long.
    """
    from huggingface_hub import get_session

    left = seconds

    def limit(response) -> None:  # noqa: ANN001  (httpx or httpx2: huggingface_hub decides)
        nonlocal left
        wait = _asked_to_wait(response.headers) if response.status_code in (429, 503) else 0
        left -= wait
        if left < 0:
            raise DictionaryError(
                f"{endpoint()} limits the rate and asks to wait {wait} s; try again then, or log in (hf auth login)"
            )

    def time_out(request) -> None:  # noqa: ANN001
        request.extensions["timeout"] = {
            name: value or _TIMEOUT_S for name, value in request.extensions.get("timeout", {}).items()
        }

    hooks = get_session().event_hooks
    hooks["response"].append(limit)
    hooks["request"].append(time_out)
    try:
        yield
    finally:
        hooks["response"].remove(limit)
        hooks["request"].remove(time_out)


def _asked_to_wait(headers) -> int:  # noqa: ANN001
    """Seconds that an answer asks to wait, in either of the headers that the library obeys."""
    spent = re.search(r"\br\s*=\s*0\s*;\s*t\s*=\s*(\d+)", headers.get("ratelimit", ""))
    retry_after = headers.get("retry-after", "").strip()
    return int(spent[1]) if spent else int(retry_after) if retry_after.isdigit() else 0


def hub_errors() -> tuple[type[Exception], ...]:
    """Everything that a call to the Hub raises when it fails for reasons that lie outside this program."""
    from huggingface_hub.errors import HfHubHTTPError

    # The second class is the base of all transport errors in whichever HTTP library this huggingface_hub uses.
    return (DictionaryError, HfHubHTTPError, HfHubHTTPError.__mro__[1], OSError, ValueError)


def is_outage(error: Exception) -> bool:
    """Whether the next call would fail as well: the Hub is away or limits the rate, rather than one repo being at fault."""
    from huggingface_hub.errors import HfHubHTTPError

    return not isinstance(error, HfHubHTTPError) or error.response.status_code == 429 or error.response.status_code >= 500


def one_line(error: Exception, repo: str) -> str:
    """What went wrong with `repo` and what to do about it, in one line."""
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    if isinstance(error, DictionaryError):
        return str(error)
    if isinstance(error, LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
        error = error.__cause__
    where, status = f"{repo} on {endpoint()}", error.response.status_code if isinstance(error, HfHubHTTPError) else 0
    if isinstance(error, OfflineModeIsEnabled):
        return f"{repo} is not in the cache and HF_HUB_OFFLINE is set; unset it to ask the Hub"
    if isinstance(error, GatedRepoError):
        return f"{repo} is gated; accept its terms at {endpoint()}/{repo} and log in (hf auth login)"
    if isinstance(error, RevisionNotFoundError):
        return f"{where} has no such revision; give a branch, tag or commit that exists"
    if isinstance(error, EntryNotFoundError):
        return f"{where} lists a file that cannot be had; wait until its upload is finished, or tell its owners"
    if isinstance(error, RepositoryNotFoundError) or status in (401, 403, 404):
        return f"{where} does not exist or is private (status {status}); check its name, or log in (hf auth login)"
    if status == 429:
        return f"{endpoint()} limits the rate; ask less often, or log in (hf auth login)"
    if status:
        return f"{where} answered with status {status}; try again later"
    if isinstance(error, OSError) and error.errno:
        return f"{error.filename or repo}: {error.strerror}; free space, make it writable or set another cache"
    detail = (str(error).strip().splitlines() or [type(error).__name__])[0]
    if type(error) is OSError:
        return f"{where} sent something else than it announced ({detail}); try again"
    return f"{where} cannot be reached ({detail}); check the network and HF_ENDPOINT, or set HF_HUB_OFFLINE=1 to use the cache"
