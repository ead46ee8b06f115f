"""Attribution: which features of an SAE a next-token logit difference comes from, by activation times gradient.

What belongs here: that first-order account, what of it features explain, and how it stands beside real ablations. What
does not: ablations (`edits.py`, `intervene.py`).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import polars as pl

from scopeatlas.dictionaries.sparse import SparseActivations, SparseDictionary
from scopeatlas.errors import ConfigError
from scopeatlas.hypotheses.metrics import correlation
from scopeatlas.mining.steering import added_outputs
from scopeatlas.study.edits import Edit, Editor, unit_written
from scopeatlas.study.generation import Prompt, Within, read_prompt, token_id, unedited
from scopeatlas.study.opening import OpenSae
from scopeatlas.study.texts import Text
from scopeatlas.study.trace import name_of
from scopeatlas.subject.capture import adding, editing, next_token_logits, observing
from scopeatlas.subject.sites import Site
from scopeatlas.subject.vocabulary import token_texts

if TYPE_CHECKING:
    import torch
    from matplotlib.figure import Figure

CHUNK = 1024
"""Firings whose decoder rows are held at a time."""

FEATURE_ATTRIBUTION_ROW = pl.Schema(
    {
        "feature": pl.Int64,
        "key": pl.String,
        "name": pl.String,  # `name_of`
        "label": pl.String,  # "" where it has none
        "status": pl.String,
        "f1": pl.Float64,
        "attribution": pl.Float64,  # logits
        "tokens": pl.Int64,  # on which it fires
        "activation": pl.Float64,  # the greatest
        "measured": pl.Float64,  # what is lost when it is ablated; null where that was not measured
    }
)
PLACE_ATTRIBUTION_ROW = pl.Schema(
    {"position": pl.Int64, "token": pl.String, "feature": pl.Int64, "activation": pl.Float64, "attribution": pl.Float64}
)


@dataclass(frozen=True)
class Explained:
    """Where the linear total of an attribution lies, in logits; total = features + error + bias, up to rounding.

    features, error, bias: activation times gradient of what the features write, of the reconstruction error, and of the
    decoder's bias (with an affine skip, where there is one). share: of features and error, what features have, by absolute
    values token by token: it is 1 for an SAE without error, and does not depend on what cancels between tokens.
    measured: what the logit difference really loses when all that the features write is taken away at once.
    """

    total: float
    features: float
    error: float
    bias: float
    share: float
    measured: float


@dataclass(frozen=True, eq=False)
class Attribution:
    """What the features of an SAE contribute to one logit difference of a prompt.

    tokens: of the prompt, without BOS. target, against: the two tokens' texts; against is "" for the mean of all logits.
    difference: the logit difference itself. features: FEATURE_ATTRIBUTION_ROW, largest absolute attribution first; places:
    the same by token, PLACE_ATTRIBUTION_ROW. agreement: Pearson's correlation of attribution with measured ablation over the
    features where it was measured, None for fewer than three.
    """

    sae: str
    tokens: tuple[str, ...]
    target: str
    against: str
    difference: float
    explained: Explained
    features: pl.DataFrame
    places: pl.DataFrame
    agreement: float | None

    def to_polars(self) -> pl.DataFrame:
        """One row for each feature that fires."""
        return self.features

    def as_dict(self) -> dict[str, object]:
        """Everything, as JSON has it."""
        return {
            "sae": self.sae,
            "tokens": list(self.tokens),
            "target": self.target,
            "against": self.against,
            "difference": self.difference,
            "explained": asdict(self.explained),
            "agreement": self.agreement,
            "features": self.features.to_dicts(),
            "places": self.places.to_dicts(),
        }

    def plot(self) -> "Figure":
        """Bars of the largest attributions, measured ablations beside them."""
        from scopeatlas.plots.interventions import attributions

        return attributions(self.features, f"logits of {self.contrast}")

    @property
    def contrast(self) -> str:
        """What is attributed, in words."""
        return f"{self.target!r} over {f'{self.against!r}' if self.against else 'the mean token'}"

    @property
    def by_token(self) -> list[float]:
        """The sum of all attributions at each token."""
        sums = dict(self.places.group_by("position").agg(pl.col("attribution").sum()).iter_rows())
        return [float(sums.get(position, 0.0)) for position in range(len(self.tokens))]

    def _repr_html_(self) -> str:
        from scopeatlas.rendering.html import escaped, table, tokens

        shown = self.features.head(20).select("feature", "name", "attribution", "measured", "tokens", "activation")
        part = self.explained
        said = (
            f"{part.total:+.3g} = features {part.features:+.3g} + error {part.error:+.3g} + bias {part.bias:+.3g}; "
            f"features explain {part.share:.0%}"
        )
        strengths = [max(value, 0.0) for value in self.by_token]
        return f"<p>{tokens(self.tokens, strengths)}</p><p>{escaped(said)}</p>" + table(
            shown.columns, shown.rows(), caption=f"{self.contrast}: {self.difference:.3g} logits, features of {self.sae}"
        )


def attribute(
    opened: OpenSae,
    prompt: Text,
    *,
    target: str | int,
    against: str | int | None = None,
    position: int = -1,
    verify: int = 0,
) -> Attribution:
    """Attribute the logit of `target` less that of `against`, as the token after the prompt's token number `position`.

    The attribution of a feature is the sum over tokens of a * (decoder row . gradient), the gradient being that of the logit
    difference at the output site (attribution patching with a zero baseline: Syed et al. 2023; Marks et al. 2024): to
    first order, what ablating the feature would take away. BOS and what a chat template adds are left out. Without
    `against` the mean logit is taken off, as what raises all logits alike changes nothing. Of a CLT all output sites
    count, of a crosscoder the last. verify: ablate so many features of the largest attribution in earnest.
    Raises ConfigError for a token that is none or an empty prompt, SubjectModelError for a site that cannot be edited.
    Cost: one forward and one backward pass over the prompt, one more forward, and one for each feature verified.
    """
    import torch

    if verify < 0:
        raise ConfigError(f"cannot verify {verify} features: give 0 or more")
    subject, dictionary = opened.subject, opened.probe.dictionary
    read = read_prompt(subject, prompt).until(position)
    if not read.is_text.any():
        raise ConfigError(f"there is no text up to token {position} of the prompt: give a later one")
    ids = [token_id(subject, token) for token in (target, against) if token is not None]
    measure = partial(_difference, opened, read, ids)
    seen = _seen(opened, read, measure)
    along = _along_gradient(dictionary, seen)
    reconstruction, bias = (_decoded(dictionary, acts, seen) for acts in (seen.acts, _none_of(seen.acts)))
    with torch.no_grad():
        without = measure(lambda _mask: _adding(opened, seen.output_sites, bias - reconstruction, read))
    places = _places(read, seen.acts, along)
    features, agreement = _verified(opened, _by_feature(opened, places), read, seen.difference, measure, verify)
    texts = token_texts(subject.tokenizer, ids)
    return Attribution(
        sae=opened.key,
        tokens=read.tokens,
        target=texts[0],
        against="" if against is None else texts[1],
        difference=seen.difference,
        explained=_explained(seen, along, reconstruction, bias, measured=seen.difference - float(without)),
        features=features,
        places=places,
        agreement=agreement,
    )


def _difference(opened: OpenSae, prompt: Prompt, tokens: Sequence[int], within: Within) -> "torch.Tensor":
    """The logit of the first token after the prompt, less that of the second or the mean of all; a scalar."""
    import torch

    ids = torch.from_numpy(prompt.ids).to(opened.subject.resolved_device)
    with within(prompt.is_text):
        logits = next_token_logits(opened.subject.model, ids)
    return logits[tokens[0]] - (logits[tokens[1]] if len(tokens) > 1 else logits.mean())


@dataclass(frozen=True, eq=False)
class _Seen:
    """One prompt at an SAE's sites, over its T tokens that are text. acts: what fires. inputs: [T, d_in] of each input site.
    outputs, gradients: float64 [T, O, d_out] of the output sites."""

    difference: float
    acts: SparseActivations
    inputs: "list[torch.Tensor]"
    output_sites: tuple[Site, ...]
    outputs: "torch.Tensor"
    gradients: "torch.Tensor"


def _seen(opened: OpenSae, prompt: Prompt, measure: "Callable[[Within], torch.Tensor]") -> _Seen:
    """The pass that is attributed.

    A zero that wants its gradient is added at each output site, so that a site's gradient is the total one, through
    other output sites too.
    """
    import torch

    dictionary, model = opened.probe.dictionary, opened.subject.model
    sites = dictionary.sites_out[added_outputs(dictionary)]
    acts: dict[Site, torch.Tensor] = {}
    zeros: dict[Site, torch.Tensor] = {}

    def with_zero(site: Site, activation: "torch.Tensor") -> "torch.Tensor":
        zeros[site] = torch.zeros_like(activation, requires_grad=True)
        return activation + zeros[site]

    with ExitStack() as hooks:
        for site in dict.fromkeys([*dictionary.sites_in, *sites]):
            hooks.enter_context(observing(model, site, partial(acts.__setitem__, site)))
        for site in sites:
            hooks.enter_context(editing(model, site, partial(with_zero, site)))
        difference = measure(unedited)
    gradients = torch.autograd.grad(difference, [zeros[site] for site in sites])
    mask = torch.from_numpy(prompt.is_text).to(difference.device)
    inputs = [acts[site][0, mask] for site in dictionary.sites_in]
    return _Seen(
        difference=float(difference.detach()),
        acts=dictionary.encode(inputs),
        inputs=inputs,
        output_sites=sites,
        outputs=torch.stack([acts[site][0, mask].double() for site in sites], dim=1),
        gradients=torch.stack([gradient[0, mask].double() for gradient in gradients], dim=1),
    )


def _along_gradient(dictionary: SparseDictionary, seen: _Seen) -> "torch.Tensor":
    """What each firing contributes, a * (decoder row . gradient): float64 [n], in the order of `seen.acts`."""
    import torch

    outputs, acts = added_outputs(dictionary), seen.acts
    found = torch.zeros(len(acts.value), dtype=torch.float64, device=acts.value.device)
    layer_of = acts.feature // dictionary.features_per_layer
    for position in layer_of.unique().tolist():
        layer = dictionary.layers[position]
        unit = unit_written(dictionary, seen.inputs[position]).double()
        for part in (layer_of == position).nonzero().squeeze(1).split(CHUNK):
            token, index = acts.token[part], acts.feature[part] % dictionary.features_per_layer
            rows = layer.rows(index.to(layer.w_dec.device))[:, outputs].to(found.device, torch.float64)
            found[part] = acts.value[part] * unit[token] * (rows * seen.gradients[token]).sum((1, 2))
    return found


def _none_of(acts: SparseActivations) -> SparseActivations:
    return SparseActivations(acts.token[:0], acts.feature[:0], acts.value[:0], acts.tokens)


def _decoded(dictionary: SparseDictionary, acts: SparseActivations, seen: _Seen) -> "torch.Tensor":
    """The reconstruction at the output sites that count: float64 [T, O, d_out]."""
    decoded = dictionary.decode(acts, seen.inputs).view(acts.tokens, -1, dictionary.d_out)
    return decoded[:, added_outputs(dictionary)].double()


@contextmanager
def _adding(opened: OpenSae, sites: Sequence[Site], added_tod: "torch.Tensor", prompt: Prompt) -> Iterator[None]:
    """Within this context, `added_tod` [T, O, d_out] is added at the tokens of `prompt` that are text."""
    import torch

    mask = torch.from_numpy(prompt.is_text).to(added_tod.device)
    with ExitStack() as hooks:
        for output, site in enumerate(sites):
            added = added_tod.new_zeros(1, len(mask), added_tod.shape[2])
            added[0, mask] = added_tod[:, output]
            hooks.enter_context(editing(opened.subject.model, site, adding(added, mask[None])))
        yield


def _explained(
    seen: _Seen, along: "torch.Tensor", reconstruction: "torch.Tensor", bias: "torch.Tensor", *, measured: float
) -> Explained:
    def by_token(part: "torch.Tensor") -> "torch.Tensor":
        return (part * seen.gradients).sum((1, 2))

    features = along.new_zeros(seen.acts.tokens).index_add(0, seen.acts.token, along)
    error = by_token(seen.outputs - reconstruction)
    absolute = float(features.abs().sum()), float(error.abs().sum())
    return Explained(
        total=float(by_token(seen.outputs).sum()),
        features=float(features.sum()),
        error=float(error.sum()),
        bias=float(by_token(bias).sum()),
        share=absolute[0] / max(sum(absolute), 1e-300),
        measured=measured,
    )


def _places(prompt: Prompt, acts: SparseActivations, along: "torch.Tensor") -> pl.DataFrame:
    position = np.flatnonzero(prompt.is_text)[acts.token.cpu().numpy()] - prompt.first
    columns = (acts.feature, acts.value.double(), along)
    feature, activation, attribution = (column.cpu().numpy() for column in columns)
    texts = [prompt.tokens[i] for i in position]
    found = {"position": position, "token": texts, "feature": feature, "activation": activation, "attribution": attribution}
    return pl.DataFrame(found, schema=PLACE_ATTRIBUTION_ROW)


def _by_feature(opened: OpenSae, places: pl.DataFrame) -> pl.DataFrame:
    """FEATURE_ATTRIBUTION_ROW, largest absolute attribution first, nothing measured yet."""
    summed = places.group_by("feature").agg(
        pl.col("attribution").sum(), pl.len().alias("tokens"), pl.col("activation").max(), pl.lit(None).alias("measured")
    )
    named = opened.rows.select(pl.col("feature").cast(pl.Int64), "key", "label", "status", "trigger_tokens", "f1")
    found = summed.join(named, on="feature").sort(pl.col("attribution").abs(), "feature", descending=[True, False])
    names = [name_of(*row) for row in found.select("label", "status", "trigger_tokens").iter_rows()]
    found = found.with_columns(pl.Series("name", names, dtype=pl.String))
    return found.select(pl.col(name).cast(dtype) for name, dtype in FEATURE_ATTRIBUTION_ROW.items())


def _verified(
    opened: OpenSae,
    features: pl.DataFrame,
    prompt: Prompt,
    difference: float,
    measure: "Callable[[Within], torch.Tensor]",
    count: int,
) -> tuple[pl.DataFrame, float | None]:
    """`measured` of the first `count` features filled in, and its correlation with their attribution."""
    import torch

    chosen = features["feature"][:count].to_list()
    with torch.no_grad():
        editors = [Editor(opened.probe.dictionary, opened.subject.model, [Edit(feature)]) for feature in chosen]
        measured = np.array([difference - float(measure(editor.over)) for editor in editors])
    found = features.with_columns(pl.Series("measured", [*measured, *[None] * (features.height - len(chosen))], dtype=pl.Float64))
    if len(chosen) < 3:
        return found, None
    agreement = float(correlation(features["attribution"].to_numpy()[: len(chosen)], measured, np.ones((len(chosen), 1)))[0])
    return found, agreement if np.isfinite(agreement) else None
