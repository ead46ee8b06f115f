"""Decoder cosines of two dictionaries: whether they mean anything, of given pairs, and each feature's nearest.

What belongs here: directions alone. What does not: what fires where (`shared_tokens.py`).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from scopeatlas.dictionaries.sparse import SparseDictionary
from scopeatlas.study.opening import OpenSae
from scopeatlas.subject.sites import Site

if TYPE_CHECKING:
    import torch

TILE_ROWS = 2048


@dataclass(frozen=True)
class Nearest:
    """Of each feature the one of the other dictionary with the highest decoder cosine: feature int64 [F], cosine float32 [F]."""

    feature: np.ndarray
    cosine: np.ndarray


def different_spaces(a: OpenSae, b: OpenSae) -> str:
    """Why decoder cosines between two SAEs would mean nothing; "" where they do.

    Directions are comparable at one site of one architecture (a model and its fine-tunes keep their bases), and between layers of
    the residual stream, to which every layer adds in the same basis.
    """
    one, other = a.dictionary, b.dictionary
    shapes = [(sae.subject.config.model_type, sae.subject.d_model, sae.subject.config.num_hidden_layers) for sae in (a, b)]
    if shapes[0] != shapes[1]:
        return f"{a.subject.name} and {b.subject.name} are models of different shape"
    same = len(one.sites_out) == len(other.sites_out) and all(map(_same_space, one.sites_out, other.sites_out))
    if not same:
        return f"one writes {_listed(one.sites_out)}, the other {_listed(other.sites_out)}"
    return ""


def _same_space(one: Site, other: Site) -> bool:
    is_stream = one.module == other.module == "" and one.transform == other.transform
    return one == other or is_stream


def _listed(sites: tuple[Site, ...]) -> str:
    return str(sites[0]) if len(sites) == 1 else f"{len(sites)} sites from {sites[0]} on"


def pair_cosines(a: SparseDictionary, b: SparseDictionary, of_a: np.ndarray, of_b: np.ndarray) -> np.ndarray:
    """The decoder cosine of of_a[i] and of_b[i], features of a and of b: float32 [n]."""
    found = np.zeros(len(of_a), dtype=np.float32)
    for start in range(0, len(of_a), TILE_ROWS):
        tile = slice(start, start + TILE_ROWS)
        found[tile] = (_unit_rows(a, of_a[tile]) * _unit_rows(b, of_b[tile])).sum(dim=1).cpu().numpy()
    return found


def nearest_directions(a: SparseDictionary, b: SparseDictionary) -> tuple[Nearest, Nearest]:
    """For each feature of a its nearest of b, and for each of b its nearest of a; ties go to the lower index.

    Never dense [F_a, F_b]: unit decoder rows, flattened over the outputs, meet in tiles of TILE_ROWS. F_a * F_b * d multiplications.
    """
    best = [Nearest(np.full(of.width, -1, dtype=np.int64), np.full(of.width, -np.inf, dtype=np.float32)) for of in (a, b)]
    for mine, rows in _tiles(a):
        for others, columns in _tiles(b):
            cosine = rows @ columns.T
            for axis, (nearest, at, among) in enumerate(((best[0], mine, others), (best[1], others, mine))):
                value, place = (part.cpu().numpy() for part in cosine.max(dim=1 - axis))
                better = value > nearest.cosine[at]
                nearest.cosine[at[better]], nearest.feature[at[better]] = value[better], among[place[better]]
    return best[0], best[1]


def _tiles(dictionary: SparseDictionary) -> "Iterator[tuple[np.ndarray, torch.Tensor]]":
    for start in range(0, dictionary.width, TILE_ROWS):
        features = np.arange(start, min(start + TILE_ROWS, dictionary.width))
        yield features, _unit_rows(dictionary, features)


def _unit_rows(dictionary: SparseDictionary, features: np.ndarray) -> "torch.Tensor":
    """Unit decoder rows of features, whichever layers they are of: float32 [n, outputs * d]."""
    import torch

    layer, index = np.divmod(features, dictionary.features_per_layer)
    rows = torch.empty(len(features), len(dictionary.sites_out) * dictionary.d_out, device=dictionary.b_dec.device)
    for position in np.unique(layer).tolist():
        at = np.flatnonzero(layer == position)
        weights = dictionary.layers[position]
        picked = weights.w_dec[torch.from_numpy(index[at]).to(weights.w_dec.device)]
        rows[torch.from_numpy(at)] = (
            torch.nn.functional.pad(picked.float(), (0, 0, weights.first_output, 0)).flatten(1).to(rows.device)
        )
    return torch.nn.functional.normalize(rows, dim=1)
