"""Finding SAEs: in local folders laid out as the Hub's, and in Hub repos at a revision; and their keys.

What belongs here: from a place to `SaeEntry`s and from an entry to a loaded dictionary. What does not: file formats
(one module each) or what has been done with an SAE (`storage/store.py`).
"""

import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

from scopeatlas.dictionaries import gemma_scope_2
from scopeatlas.dictionaries.sparse import SparseDictionary
from scopeatlas.errors import DictionaryError
from scopeatlas.storage.files import content_hash, file_sha256

# Dispatch is on the weight file: config.json alone does not identify a format (four families use that name).
_FORMATS = {gemma_scope_2.WEIGHT_FILE: gemma_scope_2}
HUB_FILES = ("config.json", gemma_scope_2.WEIGHT_FILE)
"""What is fetched of a Hub folder: never its examples.safetensors, which can be a gigabyte."""


@dataclass(frozen=True)
class SaeEntry:
    """One SAE on disk. key: its immutable name everywhere. path: its folder inside the release, with slashes.

    hashes: sha256 by file name. revision: provenance only (a Hub commit, or empty).
    """

    key: str
    release: str
    path: str
    folder: str
    hashes: dict[str, str]
    revision: str = ""

    def as_json(self) -> dict[str, object]:
        return asdict(self)


def sae_key(release: str, path: str, hashes: dict[str, str]) -> str:
    """Release name, path and the first 8 hex digits of the file hashes, as one slug of [a-z0-9._-]."""
    slug = re.sub(r"[^a-z0-9._]+", "-", f"{release}.{path.replace('/', '.')}".lower()).strip("-.")
    return f"{slug}.{content_hash(sorted(hashes.items()))[:8]}"


def find_saes(root: Path, *, release: str | None = None) -> list[SaeEntry]:
    """Every whole SAE folder under `root`, by path.

    With `release`, `root` is that release; otherwise each folder in `root` is a release. A folder whose files are not
    complete (a copy or download under way) is left out: it is found once it is whole.
    """
    if not root.is_dir():
        raise DictionaryError(f"{root} is not a folder; set saes.folders to folders that hold releases")
    entries = []
    for weights in sorted(p for name in _FORMATS for p in root.rglob(name)):
        relative = weights.parent.relative_to(root)
        name = release or relative.parts[0]
        path = relative if release else Path(*relative.parts[1:])
        if _FORMATS[weights.name].is_whole(weights.parent):
            entries.append(describe_sae(weights.parent, release=name, path=path.as_posix()))
    return entries


def refuse_incomplete(root: Path) -> None:
    """Raises DictionaryError about the first SAE folder under `root` whose files are not whole."""
    for weights in sorted(p for name in _FORMATS for p in root.rglob(name)):
        if not _FORMATS[weights.name].is_whole(weights.parent):
            load_folder(weights.parent)


def describe_sae(folder: Path, *, release: str, path: str, revision: str = "") -> SaeEntry:
    """The entry of the SAE in `folder`, its files hashed."""
    hashes = {name: _sha256_of((folder / name).resolve()) for name in HUB_FILES if (folder / name).exists()}
    return SaeEntry(sae_key(release, path, hashes), release, path, str(folder.resolve()), hashes, revision)


def _sha256_of(path: Path) -> str:
    """A file's hash, remembered while its size and time stay: a watched folder is looked at again and again."""
    facts = path.stat()
    return _remembered_sha256(path, facts.st_size, facts.st_mtime_ns)


@lru_cache(maxsize=4096)
def _remembered_sha256(path: Path, _size: int, _mtime_ns: int) -> str:
    return file_sha256(path)


def fetch_from_hub(repo: str, patterns: Iterable[str], *, revision: str = "main") -> list[SaeEntry]:
    """Fetch the SAE folders of a Hub repo that match `patterns` (globs on folder paths) and describe them.

    Downloads resume, land in the Hugging Face cache and leave out `examples.safetensors`. With HF_HUB_OFFLINE=1, what
    the cache holds is used. Raises DictionaryError if the repo cannot be reached or nothing matches.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    patterns = list(patterns)
    wanted = [f"{pattern.rstrip('/')}/{name}" for pattern in patterns for name in HUB_FILES]
    try:
        snapshot = Path(snapshot_download(repo, revision=revision, allow_patterns=wanted))
    except (HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError, OSError) as error:
        raise DictionaryError(
            f"cannot fetch {repo}@{revision}: {str(error).splitlines()[0]}; check saes.hub and the network"
        ) from error
    release = repo.rsplit("/", 1)[-1]
    entries = [
        describe_sae(
            weights.parent, release=release, path=weights.parent.relative_to(snapshot).as_posix(), revision=snapshot.name
        )
        for pattern in patterns
        for weights in sorted(snapshot.glob(f"{pattern.rstrip('/')}/{gemma_scope_2.WEIGHT_FILE}"))
    ]
    if not entries:
        raise DictionaryError(f"{repo}@{revision} has no SAE folder that matches {', '.join(patterns)}; check saes.hub patterns")
    return entries


def open_dictionary(entry: SaeEntry) -> SparseDictionary:
    """Load an SAE after checking that its files are still those that gave it its key.

    Raises DictionaryError if a file is missing, changed or damaged.
    """
    folder = Path(entry.folder)
    for name, digest in entry.hashes.items():
        path = folder / name
        if not path.exists():
            raise DictionaryError(f"{path} is gone; restore it, or drop the SAE {entry.key}")
        if file_sha256(path) != digest:
            load_folder(folder)  # a damaged file is named as such; a sound but different one falls through
            raise DictionaryError(
                f"{path} is not the file that {entry.key} was registered with; register it again under a new key"
            )
    return load_folder(folder)


def load_folder(folder: Path) -> SparseDictionary:
    """Load whatever single-layer dictionary a folder holds, by its weight file."""
    for weight_file, module in _FORMATS.items():
        if (folder / weight_file).exists():
            return module.load(folder)
    raise DictionaryError(f"{folder} holds no known weight file ({', '.join(_FORMATS)})")
