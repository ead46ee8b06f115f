"""The likely mistakes, tried: does a dictionary fit better if read in another way than its release says?

What belongs here: reconstructing a few tokens as specified and under each alternative (neighbouring layer, another
side of a norm, transposed skip, other input norm, first token left out), and what rounding to bfloat16 would change.
What does not: the verdict (`fidelity.py`).
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from scopeatlas.activations.reading import text_mask
from scopeatlas.corpus.contexts import Contexts
from scopeatlas.dictionaries.sparse import InputNorm, LayerWeights, LazyLayers, SparseDictionary
from scopeatlas.errors import DictionaryError
from scopeatlas.subject.capture import batches, capture
from scopeatlas.subject.loading import SubjectModel
from scopeatlas.subject.sites import Site, canonical_site, site_variants

if TYPE_CHECKING:
    import torch

PROBE_TOKENS = 1024
PROBE_BATCH = 8
NORM_NAMES: dict[InputNorm, str] = {
    "none": "its input not normalised",
    "token_norm": "its input scaled to unit mean square per token",
    "layer_norm": "its input layer-normalised",
}


@dataclass(frozen=True)
class Fit:
    """How well a dictionary reconstructs the probe tokens when read as `name` says.

    fvu: sum |y - y_hat|^2 / sum |y - mean(y)|^2, pooled over output sites. l0: mean active features a token. error: mean
    |y - y_hat|^2 a token, which compares readings of one site on different tokens, where FVU does not: a massive first
    token swells its denominator. other_tokens: whether it is such a reading.
    """

    name: str
    fvu: float
    l0: float
    error: float
    other_tokens: bool = False

    def relative_to(self, specified: "Fit") -> float:
        """What is left unexplained, as a share of what the specified reading leaves."""
        mine, others = (self.error, specified.error) if self.other_tokens else (self.fvu, specified.fvu)
        return mine / others if others > 0 else float("inf")


def try_alternatives(dictionary: SparseDictionary, contexts: Contexts, subject: SubjectModel) -> list[Fit]:
    """The fit as specified, first, then under every alternative that applies.

    contexts: PROBE_TOKENS of their tokens are used.
    """
    probe = _Probe(contexts, subject)
    readings = [("as specified", dictionary), *_readings(dictionary, subject)]
    probe.capture({site for _, read in readings for site in read.sites})
    fits = [probe.fit(name, read) for name, read in readings]
    is_first = probe.is_first
    if is_first.any() and not is_first.all():
        fits.append(probe.fit("the first token of each context left out", dictionary, keep=~is_first))
    return fits


def bf16_flips(dictionary: SparseDictionary, contexts: Contexts, subject: SubjectModel) -> float:
    """Share of activations that appear or disappear when input, encoder and threshold are rounded to bfloat16.

    Products are still summed in float32, as tensor cores do: what is lost is lost by storing and reading alone.
    """
    import torch

    def rounded(layer: LayerWeights) -> LayerWeights:
        threshold = None if layer.threshold is None else layer.threshold.bfloat16()
        return replace(layer, w_enc=layer.w_enc.bfloat16(), b_enc=layer.b_enc.bfloat16(), threshold=threshold)

    probe = _Probe(contexts, subject)
    probe.capture(dictionary.sites_in)
    x = [probe.at(site) for site in dictionary.sites_in]
    exact = dictionary.encode(x)
    coarse = _with_layers(dictionary, lambda layer, _: rounded(layer)).encode([x_td.bfloat16() for x_td in x])
    places = [acts.token * dictionary.width + acts.feature for acts in (exact, coarse)]
    same = int(torch.isin(places[0], places[1], assume_unique=True).sum())
    return (len(places[0]) + len(places[1]) - 2 * same) / max(len(places[0]), 1)


class _Probe:
    """Activations of a few tokens at any site."""

    def __init__(self, contexts: Contexts, subject: SubjectModel):
        self.subject = subject
        few = slice(max(1, PROBE_TOKENS // contexts.tokens.shape[1]))
        self.tokens, self.is_text = contexts.tokens[few], text_mask(contexts, subject)[few]
        self._seen: dict[Site, torch.Tensor] = {}

    @property
    def is_first(self) -> "torch.Tensor":
        """Which of the tokens that count open their context: none of them where a BOS does."""
        import torch

        first = np.zeros_like(self.is_text)
        first[:, 0] = True
        return torch.from_numpy(first[self.is_text])

    def capture(self, sites: Iterable[Site]) -> None:
        """Capture those of `sites` that are not captured yet, in one pass."""
        import torch

        wanted = set(sites) - self._seen.keys()
        if not wanted:
            return
        parts: dict[Site, list[torch.Tensor]] = {site: [] for site in wanted}
        for rows in batches(self.tokens, PROBE_BATCH):
            tokens = torch.from_numpy(self.tokens[rows]).long().to(self.subject.resolved_device)
            mask = torch.from_numpy(self.is_text[rows]).to(tokens.device)
            for site, acts in capture(self.subject.model, tokens, wanted).items():
                parts[site].append(acts[mask].float())
        self._seen |= {site: torch.cat(found) for site, found in parts.items()}

    def at(self, site: Site) -> "torch.Tensor":
        """float32 [tokens, d] at `site`, of the tokens that count."""
        self.capture([site])
        return self._seen[site]

    def fit(self, name: str, dictionary: SparseDictionary, keep: "torch.Tensor | None" = None) -> Fit:
        """The fit of `dictionary` at its own sites, on the tokens of `keep`."""
        import torch

        def kept(site: Site) -> "torch.Tensor":
            return self.at(site) if keep is None else self.at(site)[keep.to(self.subject.resolved_device)]

        x = [kept(site) for site in dictionary.sites_in]
        try:
            acts = dictionary.encode(x, max_l0=dictionary.plausible_l0)
        except DictionaryError:  # so many fire that there is nothing to compare
            return Fit(name, float("inf"), float("inf"), float("inf"), other_tokens=keep is not None)
        y = torch.stack([kept(site) for site in dictionary.sites_out], dim=1)
        error = float((y - dictionary.decode(acts, x).view(y.shape)).double().square().sum())
        variance = float((y - y.mean(0)).double().square().sum())
        tokens = max(len(y), 1)
        return Fit(
            name,
            error / variance if variance > 0 else float("inf"),
            len(acts.token) / tokens,
            error / tokens,
            other_tokens=keep is not None,
        )


def _readings(dictionary: SparseDictionary, subject: SubjectModel) -> Iterator[tuple[str, SparseDictionary]]:
    """The dictionary under every alternative reading of its release, with a name for each."""
    skip = dictionary.layers[0].skip
    if skip is not None and skip.shape[0] == skip.shape[1]:
        yield (
            "the affine skip transposed",
            _with_layers(dictionary, lambda layer, _: replace(layer, skip=_transposed(layer.skip))),
        )
    if dictionary.d_in == dictionary.d_out and not dictionary.is_multi_layer:
        for norm, name in NORM_NAMES.items():
            if norm != dictionary.norm:
                yield name, replace(dictionary, norm=norm)
    yield from _other_sites(dictionary, subject)


def _other_sites(dictionary: SparseDictionary, subject: SubjectModel) -> Iterator[tuple[str, SparseDictionary]]:
    sites_in, sites_out = _variants(dictionary.sites_in, subject), _variants(dictionary.sites_out, subject)
    for name, sites in sites_in.items():
        if dictionary.sites_in == dictionary.sites_out:
            yield name, replace(dictionary, sites_in=sites, sites_out=sites)
        elif name in sites_out and name.startswith("layer"):
            yield name, replace(dictionary, sites_in=sites, sites_out=sites_out[name])
        else:
            yield f"input {name}", replace(dictionary, sites_in=sites)
    if dictionary.sites_in != dictionary.sites_out:
        for name, sites in sites_out.items():
            if not name.startswith("layer"):
                yield f"output {name}", replace(dictionary, sites_out=sites)


def _variants(sites: Sequence[Site], subject: SubjectModel) -> dict[str, tuple[Site, ...]]:
    """The alternatives that every one of `sites` has, of the same size, by name (a layer's by its shift)."""
    own = {canonical_site(subject.model, site) for site in sites}
    per_site = [{_shift(name, site): other for name, other in site_variants(site, subject.model)} for site in sites]
    common: dict[str, tuple[Site, ...]] = {}
    for name in per_site[0]:
        if all(name in variants for variants in per_site):
            found = tuple(variants[name] for variants in per_site)
            if {canonical_site(subject.model, site) for site in found} != own:
                shown = f"layer {found[0].layer}" if name.startswith("shift") and len(sites) == 1 else name
                common[shown.replace("shift", "layers shifted by")] = found
    return common


def _shift(name: str, site: Site) -> str:
    """`layer 11` as the shift it is, so that several sites' neighbours are the same alternative."""
    return f"shift {int(name.split()[1]) - site.layer:+d}" if name.startswith("layer ") else name


def _transposed(matrix: "torch.Tensor | None") -> "torch.Tensor | None":
    return None if matrix is None else matrix.T


def _with_layers(dictionary: SparseDictionary, change: Callable[[LayerWeights, int], LayerWeights]) -> SparseDictionary:
    """The dictionary with each layer changed; streamed layers are changed as they are opened."""
    layers = dictionary.layers
    if isinstance(layers, LazyLayers):
        return replace(dictionary, layers=LazyLayers(lambda i: change(layers[i], i), len(layers)))
    return replace(dictionary, layers=tuple(change(layer, i) for i, layer in enumerate(layers)))
