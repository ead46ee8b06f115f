"""How often the features of an SAE fire: the spread of their densities, and which of them have labels.

What belongs here: counting published rows. What does not: drawing (`plots/densities.py`).
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import polars as pl

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BINS_PER_DECADE = 4


@dataclass(frozen=True)
class Densities:
    """The features of one SAE by how often they fire.

    bins: a row for each quarter of a decade of density (share of tokens): low, high, features, labelled; without gaps.
    silent: features that never fired in this corpus. statuses: status, features.
    """

    sae: str
    bins: pl.DataFrame
    silent: int
    statuses: pl.DataFrame

    @property
    def features(self) -> int:
        return int(self.bins["features"].sum()) + self.silent

    def to_polars(self) -> pl.DataFrame:
        return self.bins

    def as_dict(self) -> dict[str, object]:
        told: dict[str, object] = {"sae": self.sae, "features": self.features, "silent": self.silent}
        return told | {"statuses": self.statuses.to_dicts(), "bins": self.bins.to_dicts()}

    def plot(self) -> "Figure":
        """The histogram, labelled features darker."""
        from scopeatlas.plots.densities import draw

        return draw(self)

    def _repr_html_(self) -> str:
        from scopeatlas.rendering.html import image, table

        return image(self.plot()) + table(self.statuses.columns, self.statuses.iter_rows(), caption=self.sae)


def densities(sae: str, rows: pl.DataFrame) -> Densities:
    """The densities of an SAE's published rows (FEATURE_ROW, one per feature)."""
    alive = rows.filter(pl.col("density") > 0)
    place = (alive["density"].cast(pl.Float64).log10() * BINS_PER_DECADE).floor().cast(pl.Int64)
    labelled = (alive["label"] != "").to_numpy()
    first, last = (int(place.min()), int(place.max())) if len(place) else (0, -1)  # type: ignore[arg-type]
    at, count = place.to_numpy() - first, last - first + 1
    edges = 10.0 ** (np.arange(first, last + 2) / BINS_PER_DECADE)
    bins = pl.DataFrame(
        {
            "low": edges[:-1],
            "high": edges[1:],
            "features": np.bincount(at, minlength=count).astype(np.int64),
            "labelled": np.bincount(at[labelled], minlength=count).astype(np.int64),
        }
    )
    statuses = rows.group_by("status").agg(features=pl.len().cast(pl.Int64)).sort("features", "status", descending=[True, False])
    return Densities(sae, bins, rows.height - alive.height, statuses)
