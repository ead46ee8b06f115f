"""From an SAE seen on the Hub to a registered entry, and from the entry to its files, when a run needs them.

What belongs here: the key of an SAE whose weights are still on the Hub, and fetching what entries lack. What does not:
listing and polling (`hub.py`, `watching.py`), or how a file is fetched (`downloads.py`).
"""

import posixpath
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from scopeatlas.dictionaries.downloads import MAX_WAIT_S, default_cache, fetch
from scopeatlas.dictionaries.hub import SeenSae, bounded_waits, hub_errors, list_saes, one_line
from scopeatlas.dictionaries.releases import SaeEntry, sae_key
from scopeatlas.errors import DictionaryError
from scopeatlas.runner.local import Log, silent
from scopeatlas.storage.files import file_sha256

_SHA256 = re.compile(r"[0-9a-f]{64}")


def announce(sae: SeenSae, *, cache: Path | None = None, max_wait_s: float = MAX_WAIT_S) -> SaeEntry:
    """The entry of an SAE on the Hub, without its weights: the Hub lists their hashes, and only configs are fetched.

    The key is the one that the same files have in a local folder. Raises DictionaryError if a config cannot be fetched.
    """
    unhashed = [name for name in sae.files.all if not _SHA256.fullmatch(sae.digests[name][1])]
    few = replace(
        sae.files,
        weights=tuple(name for name in sae.files.weights if name in unhashed),
        configs=tuple(name for name in sae.files.configs if name in unhashed),
    )
    root = fetch(replace(sae, files=few), cache=cache, max_wait_s=max_wait_s)
    own = posixpath.dirname(sae.files.weights[0])
    hashes = {
        posixpath.relpath(name, own or "."): file_sha256(root / name) if name in unhashed else sae.digests[name][1]
        for name in sae.files.all
    }
    return SaeEntry(
        key=sae_key(sae.release, sae.path, hashes),
        release=sae.release,
        path=sae.path,
        root=str(root.resolve()),
        family=sae.files.family,
        weights=sae.files.weights,
        configs=sae.files.configs,
        hashes=hashes,
        revision=sae.sha,
        repo=sae.repo,
    )


def fetch_missing(
    entries: Sequence[SaeEntry], *, cache: Path | None = None, quota_bytes: int | None = None, log: Log = silent
) -> dict[str, str]:
    """Fetch what announced entries lack on this disk; returns, by key, why an SAE could not be fetched.

    Entries of local releases, and those that are whole, cost nothing.
    """
    failed: dict[str, str] = {}
    listed: dict[tuple[str, str], dict[str, SeenSae]] = {}
    for entry in entries:
        if not entry.repo or all((Path(entry.root) / name).exists() for name in entry.files.all):
            continue
        try:
            at = (entry.repo, entry.revision)
            if at not in listed:
                with bounded_waits(MAX_WAIT_S):
                    listed[at] = {sae.path: sae for sae in list_saes(*at)}
            sae = listed[at].get(entry.path)
            if sae is None:
                raise DictionaryError(f"{entry.repo} at {entry.revision[:8]} holds no {entry.path}; register the SAE again")
            log(f"fetching {entry.repo} {entry.path}, {sae.bytes:,} bytes")
            fetch(sae, cache=cache or default_cache(), quota_bytes=quota_bytes, log=log)
        except hub_errors() as error:
            failed[entry.key] = str(error) if isinstance(error, DictionaryError) else one_line(error, entry.repo)
    return failed
