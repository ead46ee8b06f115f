"""What one pass gathers of a dictionary over one shard, and how it is written and committed.

What belongs here: non-zeros, and the moments that fidelity needs. What does not: the pass itself (`cache.py`), or the format of
a shard (`shards.py`).
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from scopeatlas.activations.reading import SiteBatch
from scopeatlas.activations.shards import ShardWriter, round_values
from scopeatlas.corpus.contexts import Contexts
from scopeatlas.corpus.documents import SPLITS
from scopeatlas.dictionaries.sparse import SparseActivations, SparseDictionary
from scopeatlas.storage.files import atomic_path
from scopeatlas.storage.records import ShardKey, StageFolder
from scopeatlas.storage.uris import Location

if TYPE_CHECKING:
    import torch


class _NonZeros:
    """The activations of one dictionary on one shard, gathered batch by batch.

    What a GPU found of one batch is copied while it works on the next.
    """

    def __init__(self, scale: float):
        self.scale, self.writer = scale, ShardWriter(scale=scale)
        self._coming: Callable[[], None] | None = None

    def add(self, acts: SparseActivations, positions: np.ndarray) -> None:
        """positions: of the batch's tokens in the shard.

        Evidence is of features that fire: what a signed dictionary makes negative, and what 16 bits round to nothing, is
        left out.
        """
        arrive = _to_host(acts.feature.int(), acts.token.int(), acts.value)

        def take() -> None:
            feature, token, value = arrive()
            rounded = round_values(value, self.scale)
            fires = rounded > 0
            if not fires.all():
                feature, token, rounded = feature[fires], token[fires], rounded[fires]
            self.writer.add(feature, positions[token], rounded)

        self._take()
        self._coming = take

    def _take(self) -> None:
        if self._coming is not None:
            self._coming()
        self._coming = None

    def write(self, path: Location) -> int:
        """Write the shard; returns how many non-zeros it holds."""
        self._take()
        return self.writer.write(path)

    def close(self) -> None:
        """Drop what was gathered."""
        self.writer.close()


def _to_host(*columns: "torch.Tensor") -> Callable[[], list[np.ndarray]]:
    """Begin to copy tensors to main memory; the function returned waits for them."""
    import torch

    if columns[0].device.type != "cuda":
        return lambda: [column.cpu().numpy() for column in columns]
    pinned = [torch.empty_like(column, device="cpu", pin_memory=True).copy_(column, non_blocking=True) for column in columns]
    copied = torch.cuda.Event()
    copied.record(torch.cuda.current_stream(columns[0].device))  # which need not be the current device

    def arrived() -> list[np.ndarray]:
        copied.synchronize()
        return [column.numpy() for column in pinned]

    return arrived


class NullAccumulator:
    """The non-zeros of an SAE's null features over one shard."""

    def __init__(self, dictionary: SparseDictionary):
        self.dictionary, self.sites = dictionary, dictionary.sites_in
        self.nonzeros = _NonZeros(dictionary.value_scale)

    def add(self, batch: SiteBatch) -> None:
        self.nonzeros.add(self.dictionary.encode([batch.acts[site] for site in self.sites]), batch.positions)

    def write(self, stage: StageFolder, key: ShardKey, facts: dict[str, object]) -> None:
        data = stage.data_path(key, ".parquet")
        stage.commit(key, [data], {"nonzeros": self.nonzeros.write(data), **facts})

    def close(self) -> None:
        self.nonzeros.close()


class ShardAccumulator:
    """One SAE's non-zeros and, per split and output site, moments over one shard.

    Moments are summed in float64 where the batch is, and leave the device once, at the end: tokens and nonzeros [splits],
    sum_y [splits, outputs, d_out], sum_y2 and sum_error2 [splits, outputs].
    """

    def __init__(self, dictionary: SparseDictionary, contexts: Contexts):
        import torch

        self.dictionary, self.contexts, self.sites = dictionary, contexts, dictionary.sites
        self.nonzeros = _NonZeros(dictionary.value_scale)
        n, outputs, device = len(SPLITS), len(dictionary.sites_out), dictionary.b_dec.device
        shapes = {"tokens": (n,), "nonzeros": (n,), "sum_y": (n, outputs, dictionary.d_out)}
        shapes |= {"sum_y2": (n, outputs), "sum_error2": (n, outputs)}
        self.sums = {name: torch.zeros(shape, dtype=torch.float64, device=device) for name, shape in shapes.items()}

    def add(self, batch: SiteBatch) -> None:
        x = [batch.acts[site] for site in self.dictionary.sites_in]
        acts = self.dictionary.encode(x, max_l0=self.dictionary.plausible_l0)
        self.nonzeros.add(acts, batch.positions)
        self._add_moments(batch, acts, self.dictionary.decode(acts, x))

    def _add_moments(self, batch: SiteBatch, acts: SparseActivations, y: "torch.Tensor") -> None:
        """y: the reconstruction, [T, d_out] or [T, outputs, d_out]."""
        import torch

        split = self.contexts.splits[batch.positions // self.contexts.tokens.shape[1]].astype(np.int64)
        split_t = torch.from_numpy(split).to(y.device)
        of_split_st = torch.nn.functional.one_hot(split_t, len(SPLITS)).T.double()
        y_tod = y.view(len(split), len(self.dictionary.sites_out), self.dictionary.d_out)
        self.sums["tokens"] += of_split_st.sum(1)
        self.sums["nonzeros"] += torch.bincount(split_t[acts.token], minlength=len(SPLITS))
        for output, site in enumerate(self.dictionary.sites_out):
            target = batch.acts[site].double()
            error = target - y_tod[:, output]
            self.sums["sum_y"][:, output] += of_split_st @ target
            self.sums["sum_y2"][:, output] += of_split_st @ target.square().sum(1)
            self.sums["sum_error2"][:, output] += of_split_st @ error.square_().sum(1)

    def write(self, stage: StageFolder, key: ShardKey, facts: dict[str, object]) -> None:
        data, path = stage.data_path(key, ".parquet"), stage.data_path(key, ".moments.npz")
        nonzeros = self.nonzeros.write(data)
        moments = {name: total.cpu().numpy() for name, total in self.sums.items()}
        moments |= {name: moments[name].astype(np.int64) for name in ("tokens", "nonzeros")}
        with atomic_path(path) as temporary, temporary.open("wb") as stream:
            np.savez(stream, **moments)  # pyright: ignore[reportArgumentType]
        stage.commit(key, [data, path], {"tokens": int(moments["tokens"].sum()), "nonzeros": nonzeros, **facts})

    def close(self) -> None:
        self.nonzeros.close()
