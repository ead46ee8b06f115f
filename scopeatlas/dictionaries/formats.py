"""The file formats that are read, and which one a file belongs to.

What belongs here: the order of the format modules, and dispatch on weight files. What does not: the formats themselves
(one module each), releases on disk (`releases.py`), or the checks that hold for all of them (`validation.py`).
"""

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from scopeatlas.dictionaries import (
    circuit_tracer,
    dictionary_learning,
    gemma_scope_1,
    gemma_scope_2,
    gemma_scope_2_multilayer,
    goodfire,
    llama_scope,
    openai_gpt2,
    qwen_scope,
    saelens,
    sparsify,
)
from scopeatlas.dictionaries.layout import SaeFacts, SaeFiles, inside
from scopeatlas.dictionaries.sparse import SparseDictionary
from scopeatlas.errors import DictionaryError


class Format(Protocol):
    """What every format module has."""

    @property
    def FAMILY(self) -> str:
        """The name under which `SaeFiles.family` and the catalog have it."""
        ...

    def find(self, files: Collection[str]) -> list[SaeFiles]:
        """The family's SAEs among the names of a whole release's files, recognised by their weight files."""
        ...

    def facts(self, files: SaeFiles, release: str) -> SaeFacts:
        """What the names say. release: the repo's name without its owner, or the folder's name."""
        ...

    def load(self, root: Path, files: SaeFiles, release: str) -> SparseDictionary:
        """The dictionary, from files under `root`. Raises DictionaryError naming the file, the fault and the fix."""
        ...


MODULES: tuple[Format, ...] = (
    gemma_scope_1,
    gemma_scope_2,
    gemma_scope_2_multilayer,
    saelens,
    sparsify,
    dictionary_learning,
    llama_scope,
    qwen_scope,
    goodfire,
    openai_gpt2,
    circuit_tracer,
)
"""In the order in which they are asked: a weight file that two of them know belongs to the first."""

_BY_FAMILY = {module.FAMILY: module for module in MODULES}


def find(files: Collection[str], release: str = "") -> list[SaeFiles]:
    """Every SAE among the names of a release's files (relative, with slashes), by path.

    release: its name, where it is known; it tells how many shards an SAE should have.
    """
    found: list[SaeFiles] = []
    claimed: set[str] = set()
    for module in MODULES:
        found += [_with_absent_shards(sae, release) for sae in module.find(files) if claimed.isdisjoint(sae.weights)]
        claimed.update(name for sae in found for name in sae.weights)
    return sorted(found, key=lambda sae: sae.path)


def _with_absent_shards(sae: SaeFiles, release: str) -> SaeFiles:
    """`sae`, lacking the last shards that its name promises: the files that are there cannot tell that there are more."""
    expected = len(facts(sae, release).layers)
    if sae.family != gemma_scope_2_multilayer.FAMILY or sae.missing or len(sae.weights) >= expected:
        return sae
    folder = sae.weights[0].rpartition("/")[0]
    absent = inside(folder, *(f"params_layer_{number}.safetensors" for number in range(len(sae.weights), expected)))
    return replace(sae, missing=absent)


def facts(files: SaeFiles, release: str) -> SaeFacts:
    """What the names of an SAE's files and of its release say."""
    return _format_of(files).facts(files, release)


def load(root: Path, files: SaeFiles, release: str) -> SparseDictionary:
    """Open an SAE whose files lie under `root`. Raises DictionaryError naming the file, the fault and the fix."""
    return _format_of(files).load(root, files, release)


def _format_of(files: SaeFiles) -> Format:
    if files.family not in _BY_FAMILY:
        raise DictionaryError(
            f"{files.path}: family '{files.family}' is not one of {', '.join(_BY_FAMILY)}; register the SAE again"
        )
    return _BY_FAMILY[files.family]
