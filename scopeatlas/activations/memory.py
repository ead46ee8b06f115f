"""What one shared pass would need, before it runs: bytes per SAE, per batch, on the device and on disk.

What belongs here: the estimate, and which SAEs go through the subject model together. What does not: the pass itself
(`cache.py`).
"""

import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from scopeatlas.activations.shards import SPILL_BYTES
from scopeatlas.dictionaries import sparse
from scopeatlas.dictionaries.sparse import SparseDictionary
from scopeatlas.storage.files import human_bytes
from scopeatlas.storage.uris import Location
from scopeatlas.subject.sites import Site

if TYPE_CHECKING:
    import torch

FLOAT = 4
BYTES_HELD = 8
"""In memory, for each non-zero of the shard under way, until SPILL_BYTES of an SAE are full (`shards.py`)."""
MERGE_BYTES = 64 << 20
"""At most, while a shard is merged and written, one SAE after the other."""
BYTES_PER_NONZERO = 3.0
"""On disk, of a shard: 2.3 on the demo release, 3.0 at a width of 65k and an L0 of 50 (`bench/shards.py`)."""
USUAL_L0 = 100.0
"""Assumed of a dictionary that does not say."""
NULL_FEATURES = 256
"""Random directions that go through a pass beside each SAE (`nulls.py`)."""
NULL_TOKENS = 4096
"""Tokens that they are calibrated on."""
SHARE_OF_FREE = 0.8
"""The rest is for what is not counted: the allocator, the model's own intermediate tensors, other processes."""


@dataclass(frozen=True)
class Footprint:
    """What a dictionary needs of memory, from its shapes alone: no weight is read.

    stored: bytes on disk. resident: bytes in float32 while it serves; of a streamed dictionary, one layer's. sites:
    their sizes. temporary: bytes per token of a batch while it encodes and decodes, less the tile. tile: bytes per token
    of one full-width row of pre-activations. l0: active features a token. nulls: bytes for its null features, while they
    are calibrated and while they are encoded beside it.
    """

    stored: int
    resident: int
    streamed: bool
    features: int
    sites: Mapping[Site, int]
    temporary: int
    tile: int
    l0: float
    nulls: int = 0

    def working(self, tokens: int) -> int:
        """Bytes while a batch of so many tokens is encoded and decoded, besides weights and site activations."""
        return self.temporary * tokens + 2 * min(max(sparse.TILE_BYTES.values()), self.tile * tokens)


def footprint_of(dictionary: SparseDictionary) -> Footprint:
    """The footprint of an opened dictionary."""
    per_layer = [sum(t.numel() for t in layer.tensors().values()) * FLOAT for layer in dictionary.layers]
    sizes = dict.fromkeys(dictionary.sites_in, dictionary.d_in) | dict.fromkeys(dictionary.sites_out, dictionary.d_out)
    return Footprint(
        stored=dictionary.nbytes,
        resident=max(per_layer) if dictionary.is_lazy else sum(per_layer),
        streamed=dictionary.is_lazy,
        features=dictionary.width,
        sites=sizes,
        # The reconstruction of every output; and of one its target, error and square in float64.
        temporary=FLOAT * (len(dictionary.sites_out) + 6) * dictionary.d_out,
        tile=FLOAT * dictionary.features_per_layer,
        l0=dictionary.measured_l0 or dictionary.target_l0 or USUAL_L0,
        nulls=0 if dictionary.is_multi_layer else FLOAT * NULL_FEATURES * (2 * dictionary.d_in + NULL_TOKENS),
    )


@dataclass(frozen=True)
class PassPlan:
    """Which SAEs share a pass of the subject model. refused: sae key -> why it cannot be run here, with the number.

    footprints, disk: of every SAE asked for. batch, held: bytes of a batch and of a shard's non-zeros, by chunk.
    """

    chunks: list[list[str]]
    refused: dict[str, str]
    footprints: Mapping[str, Footprint]
    disk: Mapping[str, int]
    batch: list[int]
    held: list[int]
    batch_tokens: int
    available: int
    device: str

    def lines(self) -> Iterator[str]:
        """The plan as people read it, before work starts."""
        count = sum(len(chunk) for chunk in self.chunks)
        yield (
            f"memory plan: {count} SAEs in {len(self.chunks)} pass{'es' if len(self.chunks) != 1 else ''} of the subject model, "
            f"{human_bytes(self.available)} available on {self.device}, batches of {self.batch_tokens:,} tokens"
        )
        for number, (chunk, batch, held) in enumerate(zip(self.chunks, self.batch, self.held, strict=True), start=1):
            weights = sum(self.footprints[sae].resident for sae in chunk)
            disk = sum(self.disk[sae] for sae in chunk)
            yield (
                f"memory plan: pass {number}: weights {human_bytes(weights)}, batch {human_bytes(batch)}, "
                f"a shard's non-zeros in main memory about {human_bytes(held)}, activations on disk about {human_bytes(disk)}"
            )
            for sae in chunk:
                f = self.footprints[sae]
                streamed = f" of {human_bytes(f.stored)}, streamed by layer" if f.streamed else ""
                yield f"memory plan:   {sae}: weights {human_bytes(f.resident)}{streamed}, on disk about {human_bytes(self.disk[sae])}"
        for sae, reason in self.refused.items():
            yield f"memory plan:   {sae}: {reason}"


def plan_pass(
    footprints: Mapping[str, Footprint],
    *,
    tokens: Mapping[str, int],
    batch_tokens: int,
    shard_tokens: int,
    device: str,
    available: int,
    store: Location,
) -> PassPlan:
    """Group SAEs, in order, into chunks that fit into memory together; refuse those that do not fit alone or on disk.

    tokens: of each SAE, still to be encoded. shard_tokens: of the largest shard, whose non-zeros are held in main memory
    until it is written. available: bytes on `device` for weights and batch besides the subject model; `free_memory` says
    what is free now. On a CPU the non-zeros count against it too.
    """

    def needs(together: list[Footprint]) -> int:
        on_host = held_bytes(together, shard_tokens) if device == "cpu" else 0
        return sum(f.resident + f.nulls for f in together) + batch_bytes(together, batch_tokens) + on_host

    disk = {sae: int(tokens[sae] * f.l0 * BYTES_PER_NONZERO) for sae, f in footprints.items()}
    room = int(shutil.disk_usage(_existing(store)).free * SHARE_OF_FREE) if isinstance(store, Path) else sys.maxsize
    chunks: list[list[str]] = []
    refused: dict[str, str] = {}
    for sae, footprint in footprints.items():
        alone, held = needs([footprint]), held_bytes([footprint], shard_tokens)
        if alone > available:
            refused[sae] = (
                f"needs {human_bytes(alone)} of memory (weights {human_bytes(footprint.resident)}, "
                f"null features {human_bytes(footprint.nulls)}, "
                f"batch {human_bytes(batch_bytes([footprint], batch_tokens))}, a shard's non-zeros {human_bytes(held)}), "
                f"and {human_bytes(available)} are available: run it on a larger device, or raise subject.memory_gb"
            )
        elif disk[sae] > room:
            refused[sae] = (
                f"its activations need about {human_bytes(disk[sae])} on disk, and {human_bytes(max(room, 0))} are free there: prune, or lower corpus.fraction"
            )
        else:
            room -= disk[sae]
            together = [footprints[other] for other in chunks[-1]] + [footprint] if chunks else []
            if together and needs(together) <= available:
                chunks[-1].append(sae)
            else:
                chunks.append([sae])
    batch = [batch_bytes([footprints[sae] for sae in chunk], batch_tokens) for chunk in chunks]
    held = [held_bytes([footprints[sae] for sae in chunk], shard_tokens) for chunk in chunks]
    return PassPlan(chunks, refused, footprints, disk, batch, held, batch_tokens, available, device)


def held_bytes(together: Iterable[Footprint], shard_tokens: int) -> int:
    """Bytes of main memory for the non-zeros of a shard: of every SAE while they gather, and what merging one takes."""
    each = [int(BYTES_HELD * f.l0 * shard_tokens) for f in together]
    return sum(min(held, SPILL_BYTES) for held in each) + min(max(each), MERGE_BYTES)


def batch_bytes(together: Iterable[Footprint], batch_tokens: int) -> int:
    """Bytes of one batch: the sites' activations, shared, and the largest working set, as SAEs take their turns."""
    together = list(together)
    sites: dict[Site, int] = {}
    for footprint in together:
        sites.update(footprint.sites)
    return FLOAT * batch_tokens * sum(sites.values()) + max(f.working(batch_tokens) for f in together)


def free_memory(device: "torch.device") -> int:
    """SHARE_OF_FREE of the bytes that are free on a device now: of use once the subject model is loaded there."""
    if device.type == "cuda":
        import torch

        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # held by the allocator, unused
        return int((torch.cuda.mem_get_info(device)[0] + cached) * SHARE_OF_FREE)
    import psutil

    return int(psutil.virtual_memory().available * SHARE_OF_FREE)


def _existing(path: Path) -> Path:
    """The path or its nearest ancestor that exists."""
    path = path.resolve()
    while not path.exists():
        path = path.parent
    return path
