"""What one pass gathers of a dictionary over one shard, and how it is written and committed.

What belongs here: non-zeros, and the moments that fidelity needs. What does not: the pass itself (`cache.py`), or the format of
a shard (`shards.py`).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from scopeatlas.activations.shards import round_values, write_shard
from scopeatlas.corpus.contexts import Contexts
from scopeatlas.corpus.documents import SPLITS
from scopeatlas.dictionaries.sparse import SparseActivations, SparseDictionary
from scopeatlas.storage.files import atomic_path
from scopeatlas.storage.records import ShardKey, StageFolder

if TYPE_CHECKING:
    import torch

    from scopeatlas.subject.sites import Site


class _NonZeros:
    """The activations of one dictionary on one shard, gathered batch by batch."""

    def __init__(self, scale: float):
        self.scale = scale
        self.columns: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []

    def add(self, acts: SparseActivations, positions: np.ndarray) -> None:
        """positions: of the batch's tokens in the shard.

        Evidence is of features that fire: what a signed dictionary makes negative, and what 16 bits round to nothing, is
        left out.
        """
        rounded = round_values(acts.value.cpu().numpy(), self.scale)
        fires = rounded > 0
        feature = acts.feature.cpu().numpy()[fires].astype(np.uint32)
        self.columns.append((feature, positions[acts.token.cpu().numpy()[fires]].astype(np.uint32), rounded[fires]))

    def write(self, path: Path) -> int:
        """Write the shard; returns how many non-zeros it holds."""
        feature, token, rounded = (np.concatenate(column) for column in zip(*self.columns, strict=True))
        write_shard(path, feature, token, rounded, scale=self.scale)
        return len(feature)


class NullAccumulator:
    """The non-zeros of an SAE's null features over one shard."""

    def __init__(self, dictionary: SparseDictionary):
        self.dictionary, self.sites = dictionary, dictionary.sites_in
        self.nonzeros = _NonZeros(dictionary.value_scale)

    def add(self, flat: "Mapping[Site, torch.Tensor]", positions: np.ndarray) -> None:
        """flat: unmasked activations [tokens, d] at every site; positions: their places in the shard."""
        self.nonzeros.add(self.dictionary.encode([flat[site] for site in self.sites]), positions)

    def write(self, stage: StageFolder, key: ShardKey, facts: dict[str, object]) -> None:
        data = stage.data_path(key, ".parquet")
        stage.commit(key, [data], {"nonzeros": self.nonzeros.write(data), **facts})


class ShardAccumulator:
    """One SAE's non-zeros and, per split and output site, moments over one shard."""

    def __init__(self, dictionary: SparseDictionary, contexts: Contexts):
        self.dictionary, self.contexts, self.sites = dictionary, contexts, dictionary.sites
        self.nonzeros = _NonZeros(dictionary.value_scale)
        n, outputs = len(SPLITS), len(dictionary.sites_out)
        self.moments = {
            "tokens": np.zeros(n, dtype=np.int64),
            "nonzeros": np.zeros(n, dtype=np.int64),
            "sum_y": np.zeros((n, outputs, dictionary.d_out)),
            "sum_y2": np.zeros((n, outputs)),
            "sum_error2": np.zeros((n, outputs)),
        }

    def add(self, flat: "Mapping[Site, torch.Tensor]", positions: np.ndarray) -> None:
        """flat: unmasked activations [tokens, d] at every site; positions: their places in the shard."""
        x = [flat[site] for site in self.dictionary.sites_in]
        acts = self.dictionary.encode(x, max_l0=self.dictionary.plausible_l0)
        y_tod = self.dictionary.decode(acts, x).view(len(positions), len(self.dictionary.sites_out), self.dictionary.d_out)
        token = acts.token.cpu().numpy()
        split = self.contexts.splits[positions // self.contexts.tokens.shape[1]]
        present = [(index, split == index) for index in np.unique(split)]
        for index, mine in present:
            self.moments["tokens"][index] += mine.sum()
            self.moments["nonzeros"][index] += mine[token].sum()
        for output, site in enumerate(self.dictionary.sites_out):
            target = flat[site].float()
            error2 = (target - y_tod[:, output]).double().square().sum(1).cpu().numpy()
            targets = target.double().cpu().numpy()
            for index, mine in present:
                self.moments["sum_y"][index, output] += targets[mine].sum(axis=0)
                self.moments["sum_y2"][index, output] += np.square(targets[mine]).sum()
                self.moments["sum_error2"][index, output] += error2[mine].sum()
        self.nonzeros.add(acts, positions)

    def write(self, stage: StageFolder, key: ShardKey, facts: dict[str, object]) -> None:
        data, moments = stage.data_path(key, ".parquet"), stage.data_path(key, ".moments.npz")
        nonzeros = self.nonzeros.write(data)
        with atomic_path(moments) as temporary, temporary.open("wb") as stream:
            np.savez(stream, **self.moments)
        stage.commit(key, [data, moments], {"tokens": int(self.moments["tokens"].sum()), "nonzeros": nonzeros, **facts})
