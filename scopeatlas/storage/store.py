"""The layout of a store: one root that holds corpora, what is known of each SAE, and the atlas.

What belongs here: where things lie, and the registry of SAEs with their last errors. What does not: what is in them.

    corpus/<corpus id>/                 contexts and documents, `corpus.json`
    saes/<sae key>/sae.json             where the SAE's files are and their hashes
    saes/<sae key>/errors.json          the last error of each stage that failed
    saes/<sae key>/outputs/             what its features write, whatever the corpus
    saes/<sae key>/<corpus id>/<stage>/ activations, nulls, examples, labels, scores, publication
    atlas/  embeddings/                 LanceDB and the embedding cache
"""

import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scopeatlas.errors import StoreError, UnknownSaeError
from scopeatlas.storage.files import read_json_if_there, write_json
from scopeatlas.storage.records import StageFolder
from scopeatlas.storage.uris import Location, folders_in, reaching, read_all, sizes_under

STAGES = ("activations", "nulls", "examples", "labels", "scores", "publication")
OUTPUTS = "outputs"


@dataclass(frozen=True)
class Store:
    """One store. root: its folder, made when something is first written, or its place in an object store."""

    root: Location

    def corpus_folder(self, corpus_id: str) -> Location:
        return self.root / "corpus" / corpus_id

    def stage(self, sae: str, corpus_id: str, stage: str) -> StageFolder:
        return StageFolder(self.root / "saes" / sae / corpus_id / stage)

    def outputs(self, sae: str) -> StageFolder:
        """The one stage of an SAE that no corpus determines."""
        return StageFolder(self.root / "saes" / sae / OUTPUTS)

    def require_writable(self) -> None:
        """Raises StoreError before any work is spent if nothing can be written here."""
        try:
            if isinstance(self.root, Path):
                self.root.mkdir(parents=True, exist_ok=True)
            probe = self.root / f".tmp-probe-{uuid.uuid4().hex}"  # containers have the same process ids
            with reaching(probe):
                probe.write_bytes(b"x")
                probe.unlink(missing_ok=True)
        except OSError as error:
            said = f"cannot write to the store {self.root}: {error.strerror or error}"
            raise StoreError(f"{said}; make it writable or set store.root to another folder") from error

    def register(self, key: str, entry: dict[str, Any]) -> bool:
        """Remember an SAE under its key; returns whether it is new. A key always means the same files."""
        path = self._entry_path(key)
        known = read_json_if_there(path)
        if known != entry:
            write_json(path, entry)
        return known is None

    def registered(self) -> list[str]:
        """The keys of all SAEs known here."""
        keys = folders_in(self.root / "saes")
        entries = read_all([self._entry_path(key) for key in keys])
        return [key for key, entry in zip(keys, entries, strict=True) if entry is not None]

    def entry(self, sae: str) -> dict[str, Any]:
        """What was registered for a key. Raises UnknownSaeError listing some that exist."""
        entry = read_json_if_there(self._entry_path(sae))
        if entry is None:
            known = self.registered()
            listed = ", ".join(known[:3]) + (", ..." if len(known) > 3 else "") if known else "none yet"
            raise UnknownSaeError(f"no SAE '{sae}' in {self.root}; known: {listed}")
        return entry

    def _entry_path(self, sae: str) -> Location:
        return self.root / "saes" / sae / "sae.json"

    def corpora_of(self, sae: str) -> list[str]:
        """Corpus ids that an SAE has stages for."""
        return [name for name in folders_in(self.root / "saes" / sae) if name != OUTPUTS]

    def is_touched(self, sae: str) -> bool:
        """Whether anything was ever done for an SAE, if only an attempt."""
        return bool(self.corpora_of(sae) or self.errors(sae))

    def errors(self, sae: str) -> dict[str, str]:
        """The last error of each stage of an SAE that has failed and not since succeeded."""
        return read_json_if_there(self.root / "saes" / sae / "errors.json") or {}

    def record_error(self, sae: str, stage: str, message: str | None) -> None:
        """Remember (or, with None, forget) that `stage` of an SAE failed."""
        known = self.errors(sae)
        updated = {name: text for name, text in known.items() if name != stage}
        if message is not None:
            updated[stage] = message
        if updated != known:
            write_json(self.root / "saes" / sae / "errors.json", updated)

    def bytes_used(self, *parts: str) -> int:
        """Bytes under a folder of the store."""
        return sum(sizes_under(self.root.joinpath(*parts), nested=True).values())
