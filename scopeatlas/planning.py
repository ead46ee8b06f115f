"""What a run over some SAEs would cost, before it runs.

What belongs here: from folders to the plan of a pass, by shapes alone. What does not: the estimate itself
(`activations/memory.py`), or the pass (`activations/cache.py`).
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from scopeatlas.activations.cache import BATCH_CONTEXTS
from scopeatlas.activations.memory import Footprint, PassPlan, footprint_of, free_memory, plan_pass
from scopeatlas.dictionaries import formats
from scopeatlas.errors import DictionaryError


def plan_folders(
    folders: Sequence[Path], *, tokens: int, context_length: int, store: Path, memory_bytes: int | None = None
) -> PassPlan:
    """The plan of a pass over every SAE of some folders, each a release or one SAE, on `tokens` tokens of a corpus.

    memory_bytes: besides the subject model; None takes what is free on this machine's accelerator, or in its memory.
    Formats that can be mapped have no weight read. Raises DictionaryError if a folder holds no SAE, or one that lacks
    files.
    """
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    footprints = {name: footprint for folder in folders for name, footprint in _footprints(folder).items()}
    return plan_pass(
        footprints,
        tokens=dict.fromkeys(footprints, tokens),
        batch_tokens=BATCH_CONTEXTS * context_length,
        device=device.type,
        available=free_memory(device) if memory_bytes is None else memory_bytes,
        store=store,
    )


def _footprints(folder: Path) -> dict[str, Footprint]:
    """The footprint of each SAE under a folder, by its path from there (an SAE's own folder: by that)."""
    if not folder.is_dir():
        raise DictionaryError(f"{folder} is not a folder; give folders of releases or of single SAEs")
    root = folder.resolve()
    found = formats.find(sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()))
    if not found:
        raise DictionaryError(f"{folder} holds no known weight file; give folders of releases or of single SAEs")
    footprints = {}
    for files in found:
        if files.missing:
            raise DictionaryError(f"{root / files.path} lacks {', '.join(files.missing)}; download the whole folder")
        release = root.name
        if not files.path:  # an SAE's own folder: names that stand for a missing config are those of the folders around it
            files, release = replace(files, path="/".join(root.parts[-2:])), root.parent.parent.name
        footprints[f"{release}/{files.path}"] = footprint_of(formats.load(root, files, release))
    return footprints
