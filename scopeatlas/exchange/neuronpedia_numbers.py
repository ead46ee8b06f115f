"""The numbers of a Neuronpedia page that our stages do not keep in that form: histograms of 50 bars, cosines, bins of examples.

What belongs here: arithmetic on arrays. What does not: lines and files (`neuronpedia.py`, `neuronpedia_layout.py`).
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from scopeatlas.dictionaries.sparse import LayerWeights
from scopeatlas.mining.choosing import STRATA
from scopeatlas.mining.sketches import BINS_PER_OCTAVE, value_bins

if TYPE_CHECKING:
    import torch

    from scopeatlas.mining.promoted import Effects

BARS = 50
NEAREST = 10
TILE_ROWS, TILE_EFFECTS = 2048, 64
DECIMALS = 6


@dataclass(frozen=True)
class Bars:
    """A histogram: the middle of each bar and how much is in it. Both empty where there is nothing to count."""

    values: list[float]
    heights: list[int]


@dataclass(frozen=True)
class LogitEffects:
    """What one feature does to the logits: a histogram over the readable vocabulary, and the effect on each token asked for."""

    bars: Bars
    promoted: list[float]
    suppressed: list[float]


def activation_bars(bins: np.ndarray, tokens: np.ndarray, largest: float) -> Bars:
    """BARS equal bars from 0 to `largest` of activations that were counted in log-spaced bins.

    bins [n], of the sketch, at least one; tokens [n], how many firings each holds. The firings of a bin are spread evenly over
    its range, which ends at `largest` at most, and running totals are rounded, so that bars add up to exactly all of them.
    """
    low = 2.0 ** (bins / BINS_PER_OCTAVE)
    width = np.minimum(2.0 ** ((bins + 1) / BINS_PER_OCTAVE), largest) - low
    edges = np.linspace(0, largest, BARS + 1)
    # A bin of no width holds nothing but `largest` itself, and belongs to the last bar.
    share = np.where(width > 0, np.clip((edges[:, None] - low) / np.where(width > 0, width, 1), 0, 1), 0)
    below = np.rint(share @ tokens)
    below[-1] = tokens.sum()
    return Bars(_rounded((edges[:-1] + edges[1:]) / 2), np.diff(below).astype(int).tolist())


@dataclass(frozen=True)
class Intervals:
    """Quartiles of the contexts that a feature fires in, by their peaks, cut between the sketch's bins.

    bounds: float [STRATA, 2], where each begins and ends. share: float [STRATA], of the firing tokens with a value in it.
    """

    first_bins: np.ndarray
    bounds: np.ndarray
    share: np.ndarray

    def of(self, peak: float) -> tuple[float, float, float]:
        """Begin, end and share of the interval that a peak is in."""
        at = int(np.searchsorted(self.first_bins, value_bins(np.array([peak], dtype=np.float32))[0], side="right")) - 1
        return float(self.bounds[at, 0]), float(self.bounds[at, 1]), float(self.share[at])


def peak_intervals(bins: np.ndarray, tokens: np.ndarray, contexts: np.ndarray, largest: float) -> Intervals:
    """The intervals of one feature, of its histogram over all splits: bins (ascending), and what each holds, [n] all."""
    middle = np.cumsum(contexts) - contexts / 2
    stratum = (middle / contexts.sum() * STRATA).astype(int).clip(0, STRATA - 1)
    present, first = np.unique(stratum, return_index=True)
    first_bins = bins[first].astype(np.int64)
    edges = np.append(2.0 ** (first_bins / BINS_PER_OCTAVE), largest)
    counted = np.bincount(stratum, tokens)[present]
    return Intervals(first_bins, np.stack([edges[:-1], edges[1:]], axis=1), counted / tokens.sum())


def nearest_rows(layer: LayerWeights, features: range, *, k: int = NEAREST) -> tuple[np.ndarray, np.ndarray]:
    """The `k` features of a layer whose decoder rows have the largest cosine with each of `features`, itself among them: ids
    int64 and cosines float32, [n, k], largest first. Rows are flattened over the outputs and meet a tile at a time."""
    import torch

    def unit(rows_nod: "torch.Tensor") -> "torch.Tensor":
        return torch.nn.functional.normalize(rows_nod.float().flatten(1), dim=1)

    with torch.no_grad():
        mine = unit(layer.rows(slice(features.start, features.stop)))
        value = torch.zeros(len(mine), 0, device=mine.device)
        place = torch.zeros(len(mine), 0, dtype=torch.int64, device=mine.device)
        start = 0
        for tile in layer.row_tiles(TILE_ROWS):
            others = torch.arange(start, start + len(tile), device=mine.device).expand(len(mine), -1)
            value, place = torch.cat([value, mine @ unit(tile).T], dim=1), torch.cat([place, others], dim=1)
            value, at = value.topk(min(k, value.shape[1]), dim=1)
            place = place.gather(1, at)
            start += len(tile)
    return place.cpu().numpy(), np.nan_to_num(value.cpu().numpy())


def logit_bars(
    effects: "Effects", rows_nod: "torch.Tensor", readable: "torch.Tensor", promoted: np.ndarray, suppressed: np.ndarray
) -> list[LogitEffects]:
    """Of each decoder row [n, L_out, d_out] its effects: BARS equal bars from the least to the largest over the readable tokens
    (bool [vocabulary]), and those on its promoted and suppressed tokens, ids [n, m] both."""
    import torch

    found = []
    for start in range(0, len(rows_nod), TILE_EFFECTS):
        tile = slice(start, start + TILE_EFFECTS)
        effect = effects(rows_nod[tile]).nan_to_num_()
        ids = torch.from_numpy(np.concatenate([promoted[tile], suppressed[tile]], axis=1).astype(np.int64)).to(effect.device)
        shown = effect.gather(1, ids).cpu().numpy()
        effect = effect[:, readable]
        low, high = effect.amin(1, keepdim=True), effect.amax(1, keepdim=True)
        width = (high - low).clamp(min=torch.finfo(torch.float32).tiny)
        bar = effect.sub_(low).mul_(BARS / width).long().clamp_(max=BARS - 1)
        bar += torch.arange(len(bar), device=bar.device)[:, None] * BARS
        heights = torch.bincount(bar.flatten(), minlength=len(bar) * BARS).reshape(-1, BARS).cpu().numpy()
        middle = low + (high - low) * ((torch.arange(BARS, device=low.device) + 0.5) / BARS)
        split = promoted.shape[1]
        found += [
            LogitEffects(Bars(_rounded(values), counts.tolist()), _rounded(row[:split]), _rounded(row[split:]))
            for values, counts, row in zip(middle.cpu().numpy(), heights, shown, strict=True)
        ]
    return found


def _rounded(values: np.ndarray) -> list[float]:
    return np.round(values.astype(np.float64), DECIMALS).tolist()
