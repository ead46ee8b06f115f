"""What a run over some SAEs would cost, before it runs.

What belongs here: from folders to the plan of a pass, by shapes alone. What does not: the estimate itself
(`activations/memory.py`), or the pass (`activations/cache.py`).
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from scopeatlas.activations.cache import BATCH_CONTEXTS
from scopeatlas.activations.memory import Footprint, PassPlan, footprint_of, free_memory, plan_pass
from scopeatlas.dictionaries import formats
from scopeatlas.errors import DictionaryError

USUAL_SHARDS = 16
"""Of a corpus, by default (`corpus.shard_bits`: 4)."""


def plan_folders(
    folders: Sequence[Path], *, tokens: int, context_length: int, store: Path, memory_bytes: int | None = None
) -> PassPlan:
    """The plan of a pass over every SAE of some folders, each a release or one SAE, on `tokens` tokens of a corpus.

    memory_bytes: besides the subject model; None takes what is free on this machine's accelerator, or in its memory.
    Formats that can be mapped have no weight read. An SAE that cannot be opened is among the refused. Raises DictionaryError if
    a folder holds no SAE at all.
    """
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    footprints: dict[str, Footprint] = {}
    refused: dict[str, str] = {}
    for folder in folders:
        for name, found in _footprints(folder):
            name = str(folder / name) if name in footprints or name in refused else name
            if isinstance(found, Footprint):
                footprints[name] = found
            else:
                refused[name] = found
    plan = plan_pass(
        footprints,
        tokens=dict.fromkeys(footprints, tokens),
        batch_tokens=BATCH_CONTEXTS * context_length,
        shard_tokens=tokens // USUAL_SHARDS,
        device=device.type,
        available=free_memory(device) if memory_bytes is None else memory_bytes,
        store=store,
    )
    return replace(plan, refused=refused | plan.refused)


def _footprints(folder: Path) -> Iterator[tuple[str, Footprint | str]]:
    """The name of each SAE under a folder, and its footprint or why it has none."""
    if not folder.is_dir():
        raise DictionaryError(f"{folder} is not a folder; give folders of releases or of single SAEs")
    root = folder.resolve()
    found = formats.find(sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()))
    if not found:
        raise DictionaryError(f"{folder} holds no known weight file; give folders of releases or of single SAEs")
    for files in found:
        release = root.name
        if not files.path:  # an SAE's own folder: names that stand for a missing config are those of the folders around it
            files, release = replace(files, path="/".join(root.parts[-2:])), root.parent.parent.name
        name = f"{release}/{files.path}"
        if files.missing:
            yield name, f"lacks {', '.join(files.missing)}; download the whole folder"
            continue
        try:
            yield name, footprint_of(formats.load(root, files, release))
        except DictionaryError as error:
            yield name, str(error)
