"""Edits: named features of an SAE ablated, set, scaled or steered inside the subject model, everything else left as it was.

What belongs here: what an edit is, and applying some of them to forward passes. What does not: what the passes are for
(`generation.py`, `intervene.py`).
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
import polars as pl

from scopeatlas.dictionaries.sparse import MULTI_LAYER, SparseActivations, SparseDictionary
from scopeatlas.errors import AtlasError, ConfigError, SubjectModelError
from scopeatlas.mining.steering import added_outputs
from scopeatlas.study.opening import OpenSae
from scopeatlas.study.trace import name_of
from scopeatlas.subject.capture import adding, editing, observing
from scopeatlas.subject.sites import Site

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

Change = Literal["ablate", "set", "scale", "add"]

EDIT_ROW = pl.Schema(
    {
        "feature": pl.Int64,
        "key": pl.String,
        "name": pl.String,  # `name_of`
        "label": pl.String,  # "" where it has none
        "status": pl.String,
        "change": pl.String,
        "value": pl.Float64,
        "tokens": pl.Int64,  # at which it was edited
        "fired": pl.Int64,  # of these, where it was active before
        "before": pl.Float64,  # mean activation over the tokens edited; null where there are none
        "after": pl.Float64,
    }
)


@dataclass(frozen=True)
class Edit:
    """What becomes of one feature's activation a: 0 (ablate), value (set), a * value (scale) or a + value (add).

    feature: the flat id. value: in units of activation, as `max_activation` is; of scale, a factor.
    """

    feature: int
    change: Change = "ablate"
    value: float = 0.0

    def __post_init__(self) -> None:
        if self.change not in get_args(Change):
            raise ConfigError(f"no edit is called {self.change!r}; there are {', '.join(get_args(Change))}")
        if not np.isfinite(self.value):
            raise ConfigError(f"feature {self.feature} cannot be edited by {self.value}: give a finite number")

    def difference(self, value: "torch.Tensor") -> "torch.Tensor":
        """a' - a for activations of any shape."""
        import torch

        if self.change == "add":
            return torch.full_like(value, self.value)
        if self.change == "scale":
            return value * (self.value - 1)
        return (self.value if self.change == "set" else 0.0) - value


def edits_of(
    opened: OpenSae,
    *,
    ablate: Sequence[int | str] = (),
    steer: Mapping[int | str, float] | None = None,
    edits: Sequence[Edit] = (),
) -> tuple[Edit, ...]:
    """All edits asked for, features by id or name (`7.123`). A steering strength is in units of the feature's greatest
    activation over the corpus.

    Raises AtlasError for a feature that the SAE does not have, ConfigError if there is no edit at all, if one feature has
    several, or if a feature is steered that never fired.
    """
    asked = [Edit(feature_id(opened, name)) for name in ablate]
    for name, strength in (steer or {}).items():
        feature = feature_id(opened, name)
        asked.append(Edit(feature, "add", strength * max_activation(opened, feature)))
    asked += [replace(edit, feature=feature_id(opened, edit.feature)) for edit in edits]
    features = [edit.feature for edit in asked]
    if not asked or len(set(features)) < len(features):
        raise ConfigError("each feature is edited once, and at least one: name the features, each with one edit")
    return tuple(asked)


def feature_id(opened: OpenSae, name: int | str) -> int:
    """The flat id of a feature by that id, or by `7.123` of a multi-layer SAE. Raises AtlasError if there is none."""
    rows, text = opened.rows, str(name)
    if re.fullmatch(r"\d{1,9}", text) and int(text) < rows.height:
        return int(text)
    if re.fullmatch(r"\d+\.\d+", text) and rows["kind"][0] in MULTI_LAYER:
        found = rows.filter(pl.col("key") == f"{opened.key}/{text}")
        if not found.is_empty():
            return int(found["feature"][0])
    raise AtlasError(f"{opened.key} has no feature {name}; its features are 0 to {rows.height - 1}")


def max_activation(opened: OpenSae, feature: int) -> float:
    """The feature's greatest activation over the corpus. Raises ConfigError for one that never fired there."""
    greatest = float(opened.rows["max_activation"][feature])
    if greatest <= 0:
        raise ConfigError(
            f"feature {feature} never fired in the corpus, so it has no strength of its own: give an Edit with a value"
        )
    return greatest


def decoder_rows(dictionary: SparseDictionary, feature: int) -> "torch.Tensor":
    """What one unit of a feature adds at each site of `added_outputs`: float32 [outputs, d_out]."""
    layer, index = dictionary.place(feature)
    return dictionary.layers[layer].rows(index)[added_outputs(dictionary)].float()


def unit_written(dictionary: SparseDictionary, x_td: "torch.Tensor") -> "torch.Tensor":
    """By how much a token's input norm multiplies what features write at it (`SparseDictionary.decode`): float32 [tokens]."""
    if dictionary.norm == "token_norm":
        return x_td.float().norm(dim=1) / x_td.shape[1] ** 0.5
    return x_td.float().std(1) if dictionary.norm == "layer_norm" else x_td.new_ones(len(x_td)).float()


class Editor:
    """Edits of some features of one dictionary, applied to the forward passes of its subject model.

    Within `over(mask)`, x + sum over features of (a' - a) * decoder row takes the place of the activation x at the output
    site: the features that are not edited and the reconstruction error stay exactly as they are. a is read from the
    edited pass itself. A CLT is edited at all its output sites, a crosscoder at its last (`added_outputs`).
    """

    def __init__(
        self,
        dictionary: SparseDictionary,
        model: "PreTrainedModel",
        edits: Sequence[Edit],
        *,
        rows: "Mapping[int, torch.Tensor] | None" = None,
    ):
        """rows: written in place of a feature's own decoder rows, [outputs, d_out] by feature (`decoder_rows`)."""
        import torch

        self.dictionary, self.model, self.edits = dictionary, model, tuple(edits)
        self.sites = dictionary.sites_out[added_outputs(dictionary)]
        layers = [dictionary.place(edit.feature)[0] for edit in edits]
        self._by_layer = {layer: [e for e, at in zip(edits, layers, strict=True) if at == layer] for layer in sorted(set(layers))}
        self._weights = {layer: replace(dictionary, layers=(dictionary.layers[layer],)) for layer in self._by_layer}
        own = {edit.feature: decoder_rows(dictionary, edit.feature) for edit in edits}
        self._rows = own | dict(rows or {})
        self._before = [torch.zeros(0, len(edits))]

    @contextmanager
    def over(self, mask_t: np.ndarray) -> Iterator[None]:
        """Edit forward passes over one sequence at the positions where `mask_t`, bool [t], holds.

        Raises SubjectModelError for a site that cannot be edited, or that is computed before what is read of it.
        """
        import torch

        if not mask_t.any():
            yield
            return
        device = next(self.model.parameters()).device
        mask = torch.from_numpy(mask_t).to(device)
        values: dict[int, torch.Tensor] = {}
        pending: dict[Site, torch.Tensor] = {}

        def read(layer: int) -> Callable[["torch.Tensor"], None]:
            def record(acts: torch.Tensor) -> None:
                x_td = acts[0][mask]
                edits = self._by_layer[layer]
                values[layer] = self._values(layer, x_td)
                unit = unit_written(self.dictionary, x_td)
                for column, edit in enumerate(edits):
                    amount = edit.difference(values[layer][:, column]) * unit
                    for site, row in zip(self.sites, self._rows[edit.feature].to(device), strict=True):
                        pending[site] = pending.get(site, 0) + amount[:, None] * row

            return record

        def write(site: Site, readers: set[int]) -> Callable[["torch.Tensor"], "torch.Tensor"]:
            def add(acts: torch.Tensor) -> torch.Tensor:
                if readers - values.keys():
                    raise SubjectModelError(
                        f"{site} is computed before what the features there are read from; it cannot be edited"
                    )
                added = pending[site].new_zeros(acts.shape)
                added[0, mask] = pending[site]
                return adding(added, mask[None])(acts)

            return add

        with ExitStack() as hooks:
            for layer in self._by_layer:
                hooks.enter_context(observing(self.model, self.dictionary.sites_in[layer], read(layer)))
            for site, readers in self._readers().items():
                hooks.enter_context(editing(self.model, site, write(site, readers)))
            yield
        self._before.append(torch.cat([values[layer] for layer in self._by_layer], dim=1).cpu())

    def _readers(self) -> dict[Site, set[int]]:
        """Each site that an edited feature writes to, and the encoder layers that such features are read by."""
        found: dict[Site, set[int]] = {}
        for layer, edits in self._by_layer.items():
            for edit in edits:
                for site, row in zip(self.sites, self._rows[edit.feature], strict=True):
                    if row.any():
                        found.setdefault(site, set()).add(layer)
        return found

    def _values(self, layer: int, x_td: "torch.Tensor") -> "torch.Tensor":
        """Activations of the edited features of one encoder layer: float32 [tokens, features]."""
        import torch

        indices = [self.dictionary.place(edit.feature)[1] for edit in self._by_layer[layer]]
        return columns(self._weights[layer].encode(x_td), torch.tensor(indices, device=x_td.device))

    def report(self, opened: OpenSae) -> pl.DataFrame:
        """What was edited in all passes so far (EDIT_ROW), in the order of the edits."""
        import torch

        before = torch.cat(self._before).double()
        ordered = [edit for layer in self._by_layer.values() for edit in layer]
        found = []
        for edit in self.edits:
            value = before[:, ordered.index(edit)]
            means = [float(part.mean()) if len(value) else None for part in (value, value + edit.difference(value))]
            row = opened.rows.row(edit.feature, named=True)
            name = name_of(row["label"], row["status"], row["trigger_tokens"])
            named = (edit.feature, row["key"], name, row["label"], row["status"], edit.change, edit.value)
            found.append((*named, len(value), int((value != 0).sum()), *means))
        return pl.DataFrame(found, schema=EDIT_ROW, orient="row")


def columns(acts: SparseActivations, features: "torch.Tensor") -> "torch.Tensor":
    """The activations of a few features, int64 [n], as a table: float32 [tokens, n]."""
    found = acts.value.new_zeros(acts.tokens, len(features))
    which, column = (acts.feature[:, None] == features).nonzero(as_tuple=True)
    found[acts.token[which], column] = acts.value[which]
    return found
