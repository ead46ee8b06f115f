"""More like this: features by their decoder rows and by the tokens on which they fire together.

What belongs here: what needs an SAE's weights or its stages. What does not: likeness of meaning, which the atlas's vectors
tell (`atlas/search.py`).
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np
import polars as pl

from scopeatlas.atlas.hits import FeatureHit, SearchResults, Why
from scopeatlas.atlas.ranking import ranked
from scopeatlas.atlas.stage import live_generation, publication_facts
from scopeatlas.dictionaries.sparse import SparseDictionary
from scopeatlas.errors import AtlasError, NotReadyError
from scopeatlas.storage.records import ShardKey
from scopeatlas.storage.uris import readable
from scopeatlas.study.cosines import different_spaces
from scopeatlas.study.opening import OpenSae

if TYPE_CHECKING:
    import torch

SimilarBy = Literal["meaning", "decoder", "coactivation"]
TILE_FEATURES = 4096


def decoder_row(dictionary: SparseDictionary, feature: int) -> "torch.Tensor":
    """What a feature writes, by its flat id: float32 [L_out, d_out]."""
    layer, index = divmod(feature, dictionary.features_per_layer)
    return dictionary.layers[layer].rows(index).float()


def by_vector(opened: OpenSae, vector: "Sequence[float] | np.ndarray | torch.Tensor", *, k: int, offset: int) -> SearchResults:
    """The features whose decoder rows point most nearly where `vector` does, by cosine; exact, ties by feature.

    vector: [d_out], such as a steering vector, of an SAE that writes one site; else [L_out, d_out]. Tensors may be of any
    real dtype, on any device, and part of a model.
    Raises AtlasError on another shape, or a vector that is zero, not finite or no real numbers.
    """
    return _by_row(opened, _numbers(vector), query="the vector", k=k, offset=offset)


def by_decoder(opened: OpenSae, feature: int, *, within: OpenSae, k: int, offset: int) -> SearchResults:
    """The features of `within` whose decoder rows point most nearly where this feature's does, itself left out.

    Raises AtlasError for two SAEs whose directions do not compare (`cosines.different_spaces`).
    """
    if within.key != opened.key and (why := different_spaces(opened, within)):
        raise AtlasError(f"decoder rows of {opened.key} and {within.key} do not compare: {why}")
    row, query = decoder_row(opened.dictionary, feature), opened.rows["key"][feature]
    return _by_row(within, row, query=query, k=k, offset=offset, but=feature if within.key == opened.key else None)


def by_coactivation(opened: OpenSae, feature: int, *, k: int, offset: int) -> SearchResults:
    """The features that fire on the same tokens as this one, by Jaccard index; `mining.coactivation` keeps the likest ten.

    Raises NotReadyError if the examples that the publication was made from are not in the store.
    """
    facts = publication_facts(opened.store, opened.key, opened.corpus, live_generation(opened.store, opened.key))
    stage = opened.store.stage(opened.key, opened.corpus, "examples")
    paths = [stage.data_path(ShardKey("examples", i), ".coactivation.parquet") for i in facts.get("uses", {}).get("examples", [])]
    if not paths or not paths[0].exists():
        raise NotReadyError(f"the store does not hold what features of {opened.key} fire together; run its examples stage")
    mine = pl.scan_parquet(readable(paths[0])).filter(feature=feature).filter(pl.col("jaccard_rank").is_not_null()).collect()
    found = dict(mine.select("partner", "jaccard").iter_rows())
    return _results(opened, found, query=opened.rows["key"][feature], by="coactivation", k=k, offset=offset)


def _numbers(vector: "Sequence[float] | np.ndarray | torch.Tensor") -> "torch.Tensor":
    """A vector as people have them: float64, on the CPU."""
    import torch

    if isinstance(vector, torch.Tensor) and not vector.is_complex():
        return vector.detach().cpu().double()
    try:
        found = np.asarray(vector)
    except (TypeError, ValueError):  # rows of different lengths
        found = np.array(None)
    if found.dtype.kind not in "fiub":
        raise AtlasError("a vector is real numbers in a row: give a list, an array or a tensor of them")
    return torch.from_numpy(found.astype(np.float64))


def _by_row(opened: OpenSae, row: "torch.Tensor", *, query: str, k: int, offset: int, but: int | None = None) -> SearchResults:
    import torch

    dictionary = opened.dictionary
    shape = dictionary.b_dec.shape
    row = row.reshape(1, -1) if row.ndim == 1 else row
    if row.shape != shape:
        raise AtlasError(f"{query} is of shape {[*row.shape]}, but the rows of {opened.key} of {[*shape]}")
    if not torch.isfinite(row).all():
        raise AtlasError(f"{query} is not finite, so it has no direction")
    if not row.any():
        raise AtlasError(f"{query} is zero, so it has no direction")
    # by its largest number first, so that neither a tiny vector nor a huge one is lost in its norm
    wanted = torch.nn.functional.normalize((row / row.abs().max()).flatten().double(), dim=0).to(dictionary.b_dec.device).float()
    tiles = (tile for layer in dictionary.layers for tile in layer.row_tiles(TILE_FEATURES))
    cosines = torch.cat([torch.nn.functional.normalize(tile.float().flatten(1), dim=1) @ wanted for tile in tiles]).cpu().numpy()
    nearest = np.argsort(-cosines, kind="stable")
    found = {int(f): float(cosines[f]) for f in nearest[: k + offset + 1] if f != but}
    return _results(opened, found, query=query, by="decoder", k=k, offset=offset)


def _results(opened: OpenSae, values: dict[int, float], *, query: str, by: SimilarBy, k: int, offset: int) -> SearchResults:
    """One page of features of an SAE, by flat id, with what they are ranked by."""
    if k < 1 or offset < 0:
        raise AtlasError(f"cannot show {k} features after {offset}: give a k of 1 or more")
    names = opened.rows["key"].gather(list(values)).to_list()
    feature_of = dict(zip(names, values, strict=True))
    places = ranked((name, values[feature], -float(feature)) for name, feature in feature_of.items())
    page = list(places.items())[offset : offset + k]
    hits = tuple(FeatureHit.of(opened.rows.row(feature_of[key], named=True), why=Why({by: place})) for key, place in page)
    return SearchResults(query, by, hits, {by: max(values.values())} if values else {}, {}, offset=offset)
