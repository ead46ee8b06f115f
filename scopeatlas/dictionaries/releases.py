"""Finding SAEs in local releases, their keys, and opening them.

What belongs here: from a folder to `SaeEntry`s and from an entry to a loaded, checked dictionary. What does not: file
formats (`formats.py` and one module each), the Hub (`watching.py`, `downloads.py`), or what has been done with an SAE
(`storage/store.py`).
"""

import posixpath
import re
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path

from scopeatlas.dictionaries import formats
from scopeatlas.dictionaries.layout import SaeFiles
from scopeatlas.dictionaries.reading import read_settings, shapes_of
from scopeatlas.dictionaries.sparse import SparseDictionary
from scopeatlas.dictionaries.validation import validate
from scopeatlas.errors import DictionaryError
from scopeatlas.storage.files import content_hash, file_sha256

_CACHED_REPO = re.compile(r"models--(?:.+--)?(?P<name>.+)")


@dataclass(frozen=True)
class SaeEntry:
    """One SAE on disk. key: its immutable name everywhere. path: its identity inside the release.

    root: the release's folder, which weights and configs are relative to. hashes: sha256 by file name relative to the
    SAE's own folder. revision: provenance only (a Hub commit, or empty). repo: the Hub repo that its files are fetched
    from when a run needs them, or empty.
    """

    key: str
    release: str
    path: str
    root: str
    family: str
    weights: tuple[str, ...]
    configs: tuple[str, ...]
    hashes: dict[str, str]
    revision: str = ""
    repo: str = ""

    @property
    def files(self) -> SaeFiles:
        return SaeFiles(self.family, self.path, self.weights, self.configs)

    @property
    def folder(self) -> str:
        """The folder of its (first) weight file, for messages."""
        return str((Path(self.root) / self.weights[0]).parent)

    def as_json(self) -> dict[str, object]:
        return asdict(self)

    @classmethod
    def from_json(cls, body: Mapping[str, object]) -> "SaeEntry":
        """The entry that `as_json` wrote. Raises DictionaryError if it was written by an earlier version."""
        if "root" not in body:
            raise DictionaryError(f"SAE {body.get('key')} was registered by an earlier version; register it again (make run)")
        tuples = {name: tuple(body[name]) for name in ("weights", "configs")}  # type: ignore[arg-type]
        return cls(**{**body, **tuples})  # type: ignore[arg-type]


def sae_key(release: str, path: str, hashes: dict[str, str]) -> str:
    """Release name, path and the first 8 hex digits of the file hashes, as one slug of [a-z0-9._-]."""
    slug = re.sub(r"[^a-z0-9._]+", "-", f"{release}.{path.replace('/', '.')}".lower()).strip("-.")
    return f"{slug}.{content_hash(sorted(hashes.items()))[:8]}"


def find_saes(root: Path, *, release: str | None = None) -> list[SaeEntry]:
    """Every whole SAE under `root`, by path.

    With `release`, `root` is that release; otherwise each folder in `root` is a release (or a repo in the layout of
    the Hugging Face cache, whose newest snapshot is read). An SAE whose files are not complete (a copy or download
    under way) is left out: it is found once it is whole.
    """
    return [
        describe_files(folder, files, release=name, revision=revision)
        for folder, name, revision in _releases(root, release)
        for files in formats.find(files_under(folder), name)
        if not files.missing and _damage(folder, files) is None
    ]


def refuse_incomplete(root: Path) -> None:
    """Raises DictionaryError about the first SAE under `root` whose files are not whole."""
    for folder, name, _ in _releases(root, None):
        for files in formats.find(files_under(folder), name):
            if files.missing:
                raise DictionaryError(f"{folder / files.path} lacks {', '.join(files.missing)}; download the whole folder")
            damage = _damage(folder, files)
            if damage:
                raise damage


def _releases(root: Path, release: str | None) -> Iterator[tuple[Path, str, str]]:
    """Folder, name and revision of every release under `root`."""
    if not root.is_dir():
        raise DictionaryError(f"{root} is not a folder; set saes.folders to folders that hold releases")
    if release is not None:
        yield root, release, ""
        return
    for folder in sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith(".")):
        cached = _CACHED_REPO.fullmatch(folder.name)
        snapshots = sorted((folder / "snapshots").glob("*"), key=lambda p: p.stat().st_mtime) if cached else []
        if cached and snapshots:
            yield snapshots[-1], cached["name"], snapshots[-1].name
        else:
            yield folder, folder.name, ""


def files_under(folder: Path) -> list[str]:
    """The names of all files under a folder, relative to it and with slashes: what `formats.find` is asked with."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def _damage(root: Path, files: SaeFiles) -> DictionaryError | None:
    """What is wrong with the files as files (cut off, unreadable), without reading the weights."""
    try:
        for config in files.configs:
            read_settings(root / config)
        for name in files.weights:
            path = root / name
            if path.suffix == ".safetensors":
                shapes_of(path)
            elif path.stat().st_size == 0 or (path.suffix == ".npz" and not zipfile.is_zipfile(path)):
                raise DictionaryError(f"{path} is truncated; download it again")
    except DictionaryError as error:
        return error
    return None


def describe_files(root: Path, files: SaeFiles, *, release: str, revision: str = "") -> SaeEntry:
    """The entry of the SAE that consists of `files` under `root`, each of them hashed."""
    own = posixpath.dirname(files.weights[0])
    hashes = {posixpath.relpath(name, own or "."): _sha256_of((root / name).resolve()) for name in files.all}
    key = sae_key(release, files.path, hashes)
    return SaeEntry(key, release, files.path, str(root.resolve()), files.family, files.weights, files.configs, hashes, revision)


def describe_sae(folder: Path, *, release: str, path: str, revision: str = "") -> SaeEntry:
    """The entry of the one SAE in `folder`, its files hashed."""
    return describe_files(folder, replace(_only(folder), path=path), release=release, revision=revision)


def _only(folder: Path) -> SaeFiles:
    found = formats.find(files_under(folder))
    if len(found) != 1:
        known = ", ".join(sorted(module.FAMILY for module in formats.MODULES))
        what = f"{len(found)} SAEs; name the folder of one of them" if found else f"no known weight file of any family ({known})"
        raise DictionaryError(f"{folder} holds {what}")
    return found[0]


def _sha256_of(path: Path) -> str:
    """A file's hash, remembered while its size and time stay: a watched folder is looked at again and again.

    In the Hugging Face cache a large file's name is its hash, which the download has verified.
    """
    if path.parent.name == "blobs" and re.fullmatch(r"[0-9a-f]{64}", path.name):
        return path.name
    facts = path.stat()
    return _remembered_sha256(path, facts.st_size, facts.st_mtime_ns)


@lru_cache(maxsize=4096)
def _remembered_sha256(path: Path, _size: int, _mtime_ns: int) -> str:
    return file_sha256(path)


def reopen_dictionary(entry: SaeEntry) -> SparseDictionary:
    """Load an SAE that this run has checked already: nothing is read before it is used, where the format allows."""
    return formats.load(Path(entry.root), entry.files, entry.release)


def open_dictionary(entry: SaeEntry) -> SparseDictionary:
    """Load an SAE after checking that its files are still those that gave it its key, and all that `validate` checks.

    Raises DictionaryError if a file is missing, changed or damaged.
    """
    root, own = Path(entry.root), posixpath.dirname(entry.weights[0])
    for name in entry.files.all:
        path = root / name
        if not path.exists():
            raise DictionaryError(f"{path} is gone; restore it, or drop the SAE {entry.key}")
        if _sha256_of(path.resolve()) != entry.hashes[posixpath.relpath(name, own or ".")]:
            _load(root, entry.files, entry.release)  # a damaged file is named as such; a sound but different one falls through
            raise DictionaryError(
                f"{path} is not the file that {entry.key} was registered with; register it again under a new key"
            )
    return _load(root, entry.files, entry.release)


def load_folder(folder: Path) -> SparseDictionary:
    """Load the one dictionary a folder holds, by its weight file; names are taken from the folder's own path."""
    folder = folder.resolve()
    files = _only(folder)
    if files.missing:
        raise DictionaryError(f"{folder} lacks {', '.join(files.missing)}; download the whole folder")
    return _load(folder, replace(files, path="/".join(folder.parts[-2:])), folder.parts[-3] if len(folder.parts) > 3 else "")


def _load(root: Path, files: SaeFiles, release: str) -> SparseDictionary:
    times = tuple((root / name).stat().st_mtime_ns for name in files.all)
    return _loaded(root, files, release, times)


@lru_cache(maxsize=1)
def _loaded(root: Path, files: SaeFiles, release: str, _times: tuple[int, ...]) -> SparseDictionary:
    """Remembered, because each stage opens the same SAE again and checking one reads all of its bytes."""
    dictionary = formats.load(root, files, release)
    weights = [str(root / name) for name in files.weights]
    each = len(weights) // len(dictionary.layers)  # an encoder layer's files, where every layer has its own
    shards = [" and ".join(weights[i : i + each]) for i in range(0, len(weights), each)] if each and len(weights) > 1 else []
    return validate(dictionary, weights[0], files=shards)
