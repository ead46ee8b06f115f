"""Sites: the tensors of a subject model that sparse dictionaries read and write.

What belongs here: parsing a release's hook strings and finding the module they mean. What does not: running the model
(`capture.py`).
"""

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from scopeatlas.errors import DictionaryError, SubjectModelError

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

Side = Literal["input", "output"]

_HOOK_POINT = re.compile(r"^model\.layers\.(\d+)\.(?:(.+)\.)?(input|output)$")

# Where each architecture keeps its decoder layers. Vision-wrapped models come first: their text layers lie under
# `language_model`, and the vision tower's own `layers` must never be matched.
_LAYER_LISTS = ("model.language_model.layers", "language_model.layers", "model.layers", "transformer.h", "gpt_neox.layers")


@dataclass(frozen=True, order=True)
class Site:
    """One tensor of a decoder layer: a submodule's (or, with an empty `module`, the layer's own) input or output."""

    layer: int
    module: str
    side: Side

    def __str__(self) -> str:
        return ".".join(part for part in ("model.layers", str(self.layer), self.module, self.side) if part)


def parse_hook_point(text: str) -> Site:
    """The site that a Gemma Scope 2 `hf_hook_point_*` string names. Raises DictionaryError for any other string."""
    match = _HOOK_POINT.match(text)
    if not match:
        raise DictionaryError(f"hook point '{text}' is not of the form model.layers.N[.module].input|output")
    layer, module, side = match.groups()
    return Site(int(layer), module or "", "input" if side == "input" else "output")


def decoder_layers(model: "PreTrainedModel") -> "nn.ModuleList":
    """The list of decoder layers of a text model or of the text half of a vision-language model."""
    for path in _LAYER_LISTS:
        try:
            return model.get_submodule(path)  # type: ignore[return-value]
        except AttributeError:
            continue
    raise SubjectModelError(f"{type(model).__name__} has no known list of decoder layers; looked for {', '.join(_LAYER_LISTS)}")


def resolve_site(model: "PreTrainedModel", site: Site) -> "nn.Module":
    """The module whose input or output is `site`. Raises SubjectModelError listing the sites the model has."""
    layers = decoder_layers(model)
    if site.layer >= len(layers):
        raise SubjectModelError(f"no site {site}: {type(model).__name__} has layers 0 to {len(layers) - 1}")
    layer = layers[site.layer]
    try:
        return layer.get_submodule(site.module) if site.module else layer
    except AttributeError as error:
        known = ", ".join(name for name, _ in layer.named_modules() if name)
        raise SubjectModelError(f"no site {site}: a layer of {type(model).__name__} has the modules {known}") from error
