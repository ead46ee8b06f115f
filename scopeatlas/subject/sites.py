"""Sites: the tensors of a subject model that sparse dictionaries read and write.

What belongs here: parsing a release's hook strings, and finding the module and side that they mean in one
architecture. What does not: running the model, or computing a transform (`capture.py`).
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from scopeatlas.errors import DictionaryError, SubjectModelError

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

Side = Literal["input", "output"]
Transform = Literal["none", "rms_norm", "unscaled"]

EMBEDDING = -1
"""The `layer` of the token embedding's site."""


@dataclass(frozen=True, order=True)
class Site:
    """One tensor of a subject model: the input or output of a decoder layer, of one of its submodules, or the embedding.

    layer: the decoder layer, or EMBEDDING. module: a path inside the layer ("" is the layer itself), or a role that
    each architecture plays with a module of its own: `ln1` and `ln2`, the norms before attention and before the MLP,
    and, as outputs, the TransformerLens names of `_ROLES`. transform: `rms_norm` divides by the root mean square, with
    no gain (Gemma Scope 1's transcoders), `unscaled` by the model's embedding scale (its embedding SAEs).
    """

    layer: int
    module: str
    side: Side
    transform: Transform = "none"

    def __str__(self) -> str:
        """The site in the form that `parse_hook_point` reads."""
        if self.layer == EMBEDDING:
            parts = ("model.embed_tokens", self.module, self.side)
        elif self.side == "output" and self.module in _ROLES:
            parts = ("blocks", str(self.layer), self.module)
        else:
            parts = ("model.layers", str(self.layer), self.module, self.side)
        return ".".join(part for part in (*parts, "" if self.transform == "none" else self.transform) if part)


_ROLES = ("hook_resid_mid", "hook_attn_out", "hook_mlp_out", "attn.hook_z", "mlp.hook_pre", "mlp.hook_post")
"""TransformerLens names whose module depends on the architecture, kept in `Site.module` until a model is at hand."""

# What every other TransformerLens name that is one tensor [b, s, d] means, whatever the architecture.
# hook_mlp_in is the stream before the norm, mlp.hook_in the one after it; hook_normalized lies between norm and gain.
_LENS_NAMES: dict[str, tuple[str, Side, Transform]] = {
    "hook_resid_pre": ("", "input", "none"),
    "hook_resid_post": ("", "output", "none"),
    "hook_mlp_in": ("ln2", "input", "none"),
    "mlp.hook_in": ("mlp", "input", "none"),
    "mlp.hook_out": ("mlp", "output", "none"),
    "ln1.hook_normalized": ("ln1", "input", "rms_norm"),
    "ln2.hook_normalized": ("ln2", "input", "rms_norm"),
    **{role: (role, "output", "none") for role in _ROLES},
}

_LAYERS = r"(\d+|\{all\}|\{\d[\d, ]*\})"
_SUFFIX = r"(?:\.(rms_norm|unscaled))?"
_HUGGING_FACE = re.compile(rf"model\.layers\.{_LAYERS}\.(?:(\S+)\.)?(input|output){_SUFFIX}")
_LENS = re.compile(rf"blocks\.{_LAYERS}\.(\S+?){_SUFFIX}")
_EMBEDDING = re.compile(rf"(?:model\.embed_tokens\.output|hook_embed){_SUFFIX}")
_MODULE_PATH = re.compile(r"(?:(?:model|language_model|transformer|gpt_neox)\.)*(?:layers|h)\.(\d+)(?:\.(\S+))?")
_EMBEDDING_PATH = re.compile(r"(?:(?:model|language_model|transformer|gpt_neox)\.)*(?:embed_tokens|wte|embed_in)")


def parse_hook_point(text: str) -> Site:
    """The one site that a Hugging Face (`model.layers.12.mlp.output`) or TransformerLens hook string names.

    Raises DictionaryError for any other string, and for one that names several layers.
    """
    sites = parse_hook_points(text)
    if len(sites) != 1:
        raise DictionaryError(f"hook point '{text}' names several layers where one is wanted")
    return sites[0]


def parse_hook_points(text: str, *, layers: int | None = None) -> tuple[Site, ...]:
    """The sites that a hook string names: one, one of each listed layer (`{5,9}`), or of all `layers` (`{all}`).

    Raises DictionaryError for a string of no known form, and for `{all}` where `layers` is not given.
    """
    if match := _EMBEDDING.fullmatch(text):
        return (Site(EMBEDDING, "", "output", match[1] or "none"),)  # pyright: ignore[reportArgumentType]
    if match := _HUGGING_FACE.fullmatch(text):
        numbers, module, side, transform = match.groups()
    elif match := _LENS.fullmatch(text):
        numbers, name, suffix = match.groups()
        if name not in _LENS_NAMES:
            raise DictionaryError(f"hook point '{text}': of TransformerLens' names these are read: {', '.join(_LENS_NAMES)}")
        module, side, transform = _LENS_NAMES[name]
        transform = suffix or transform
    else:
        raise DictionaryError(
            f"hook point '{text}' is not of the form model.layers.N[.module].input|output, "
            "blocks.N.hook_NAME or model.embed_tokens.output"
        )
    found = Site(0, module or "", side, transform or "none")  # pyright: ignore[reportArgumentType]
    return tuple(replace(found, layer=number) for number in _layer_numbers(numbers, layers, text))


def _layer_numbers(numbers: str, layers: int | None, text: str) -> list[int]:
    if numbers != "{all}":
        return [int(number) for number in numbers.strip("{}").split(",") if number.strip()]
    if layers is None:
        raise DictionaryError(f"hook point '{text}' names all layers, and how many there are is not known")
    return list(range(layers))


def parse_module_path(text: str) -> Site:
    """The output of the module that a path relative to the base model names, as sparsify's folders do (`layers.5.mlp`).

    Raises DictionaryError for any other string.
    """
    if match := _MODULE_PATH.fullmatch(text):
        return Site(int(match[1]), match[2] or "", "output")
    if _EMBEDDING_PATH.fullmatch(text):
        return Site(EMBEDDING, "", "output")
    raise DictionaryError(f"module path '{text}' is not of the form layers.N[.module], h.N[.module] or embed_tokens")


def module_input(site: Site) -> Site:
    """The input of the module whose output `site` is."""
    return replace(site, side="input")


def decoder_layers(model: "PreTrainedModel") -> "nn.ModuleList":
    """The list of decoder layers of a text model or of the text half of a vision-language model."""
    for path in _LAYER_LISTS:
        try:
            return model.get_submodule(path)  # type: ignore[return-value]
        except AttributeError:
            continue
    raise SubjectModelError(f"{type(model).__name__} has no known list of decoder layers; looked for {', '.join(_LAYER_LISTS)}")


# Vision-wrapped models come first: their text layers lie under `language_model`, and the vision tower's own `layers`
# must never be matched. A base model alone (AutoModel) comes last.
_LAYER_LISTS = (
    "model.language_model.layers",
    "language_model.layers",
    "model.layers",
    "transformer.h",
    "gpt_neox.layers",
    "layers",
    "h",
)

_LLAMA_LAYER = frozenset({"input_layernorm", "self_attn", "post_attention_layernorm", "mlp"})
_GEMMA_LAYER = _LLAMA_LAYER | {"pre_feedforward_layernorm", "post_feedforward_layernorm"}
_GPT2_LAYER = frozenset({"ln_1", "attn", "ln_2", "mlp"})
_NEOX_LAYER = frozenset(
    {"input_layernorm", "attention", "post_attention_layernorm", "mlp", "post_attention_dropout", "post_mlp_dropout"}
)

# What plays each role, told by the exact submodules of a decoder layer: another architecture that happens to share
# a name or two has its Hugging Face sites alone, rather than wrong ones. A module without a side takes the site's.
_LAYOUTS: Mapping[frozenset[str], Mapping[str, tuple[str, Side | None]]] = {
    _GEMMA_LAYER: {
        "ln1": ("input_layernorm", None),
        "ln2": ("pre_feedforward_layernorm", None),
        "hook_resid_mid": ("pre_feedforward_layernorm", "input"),
        "hook_attn_out": ("post_attention_layernorm", "output"),
        "hook_mlp_out": ("post_feedforward_layernorm", "output"),
        "attn.hook_z": ("self_attn.o_proj", "input"),
        "mlp.hook_pre": ("mlp.gate_proj", "output"),
        "mlp.hook_post": ("mlp.down_proj", "input"),
    },
    _LLAMA_LAYER: {
        "ln1": ("input_layernorm", None),
        "ln2": ("post_attention_layernorm", None),
        "hook_resid_mid": ("post_attention_layernorm", "input"),
        "hook_attn_out": ("self_attn", "output"),
        "hook_mlp_out": ("mlp", "output"),
        "attn.hook_z": ("self_attn.o_proj", "input"),
        "mlp.hook_pre": ("mlp.gate_proj", "output"),
        "mlp.hook_post": ("mlp.down_proj", "input"),
    },
    _GPT2_LAYER: {
        "ln1": ("ln_1", None),
        "ln2": ("ln_2", None),
        "hook_resid_mid": ("ln_2", "input"),
        "hook_attn_out": ("attn", "output"),
        "hook_mlp_out": ("mlp", "output"),
        "attn.hook_z": ("attn.c_proj", "input"),
        "mlp.hook_pre": ("mlp.c_fc", "output"),
        "mlp.hook_post": ("mlp.c_proj", "input"),
    },
    _NEOX_LAYER: {
        "ln1": ("input_layernorm", None),
        "ln2": ("post_attention_layernorm", None),
        "hook_resid_mid": ("post_attention_layernorm", "input"),
        "hook_attn_out": ("attention", "output"),
        "hook_mlp_out": ("mlp", "output"),
        "attn.hook_z": ("attention.dense", "input"),
        "mlp.hook_pre": ("mlp.dense_h_to_4h", "output"),
        "mlp.hook_post": ("mlp.dense_4h_to_h", "input"),
    },
}


def canonical_site(model: "PreTrainedModel", site: Site) -> Site:
    """The same tensor, its role replaced by the module that plays it in `model`.

    Raises SubjectModelError, listing the sites there are, for a role that nothing plays.
    """
    if site.layer == EMBEDDING or not (site.module in ("ln1", "ln2") or (site.side == "output" and site.module in _ROLES)):
        return site
    layer = _layer_of(model, site)
    if site.module == "hook_resid_mid" and getattr(layer, "use_parallel_residual", False):
        raise SubjectModelError(
            f"no site {site}: {type(model).__name__} adds attention and MLP to the residual stream in parallel, "
            "so there is no stream between them; use hook_resid_pre or hook_resid_post"
        )
    roles = _LAYOUTS.get(frozenset(name for name, _ in layer.named_children()), {})
    if site.module not in roles:
        raise _unknown_site(model, site)
    module, side = roles[site.module]
    return replace(site, module=module, side=side or site.side)


def resolve(model: "PreTrainedModel", site: Site) -> "tuple[nn.Module, Side]":
    """The module whose input or output `site` is, and which. Raises SubjectModelError listing the sites there are."""
    if site.layer == EMBEDDING:
        if site.module or site.side == "input":
            raise _unknown_site(model, site)
        return model.get_input_embeddings(), "output"  # type: ignore[return-value]
    site = canonical_site(model, site)
    layer = _layer_of(model, site)
    try:
        return layer.get_submodule(site.module), site.side
    except AttributeError:
        raise _unknown_site(model, site) from None


def _layer_of(model: "PreTrainedModel", site: Site) -> "nn.Module":
    layers = decoder_layers(model)
    if not 0 <= site.layer < len(layers):
        raise SubjectModelError(f"no site {site}: {type(model).__name__} has layers 0 to {len(layers) - 1}")
    return layers[site.layer]


def _unknown_site(model: "PreTrainedModel", site: Site) -> SubjectModelError:
    layers = decoder_layers(model)
    modules = [name for name, _ in layers[0].named_modules() if name]
    roles = _LAYOUTS.get(frozenset(name for name, _ in layers[0].named_children()), {})
    parallel = getattr(layers[0], "use_parallel_residual", False)
    lens = [
        name
        for name, (module, _, _) in _LENS_NAMES.items()
        if (module in roles or module in ("", "mlp")) and not (name == "hook_resid_mid" and parallel)
    ]
    return SubjectModelError(
        f"no site {site}: {type(model).__name__} has model.embed_tokens.output and, of layers 0 to {len(layers) - 1}, "
        f"model.layers.N[.MODULE].input|output with the modules {', '.join(modules)}, and blocks.N. with {', '.join(lens)}"
    )


def site_variants(site: Site, model: "PreTrainedModel | None" = None) -> list[tuple[str, Site]]:
    """The sites that `site` is likeliest to be mistaken for, each with a few words that say how it differs.

    The same tensor of the neighbouring layers; beside a norm, what it reads and gives with and without its gain; for the
    embedding, with and without its scale. With a `model`, only sites that it has, their roles resolved.
    """
    if model is not None:
        site = canonical_site(model, site)
    variants = _embedding_variants(site) if site.layer == EMBEDDING else _neighbours(site) + _norm_variants(site)
    if model is None:
        return variants
    return [(name, canonical_site(model, variant)) for name, variant in variants if _has(model, variant)]


def _embedding_variants(site: Site) -> list[tuple[str, Site]]:
    if site.transform == "unscaled":
        return [("with the embedding's scale", replace(site, transform="none"))]
    return [("without the embedding's scale", replace(site, transform="unscaled"))]


def _neighbours(site: Site) -> list[tuple[str, Site]]:
    return [(f"layer {n}", replace(site, layer=n)) for n in (site.layer - 1, site.layer + 1) if n >= 0]


def _norm_variants(site: Site) -> list[tuple[str, Site]]:
    if (site.module, site.side) == ("mlp", "input"):  # what the norm before the MLP gives
        site = replace(site, module="ln2", side="output")
    if not re.search(r"(norm|\bln_?\d)$", site.module):
        return []
    before = replace(site, side="input", transform="none")
    variants = {
        "with the norm's gain": replace(before, side="output"),
        "without the norm's gain": replace(before, transform="rms_norm"),
        "before the norm": before,
    }
    return [(name, variant) for name, variant in variants.items() if variant != site]


def _has(model: "PreTrainedModel", site: Site) -> bool:
    try:
        resolve(model, site)
        transform_constant(model, site)
    except SubjectModelError:
        return False
    return True


def transform_constant(model: "PreTrainedModel", site: Site) -> float:
    """The number that the transform of `site` needs: the norms' epsilon, the embedding's scale, 1 for none.

    Raises SubjectModelError where the model has no such norm or no such scale.
    """
    if site.transform == "none":
        return 1.0
    if site.transform == "rms_norm":
        epsilon = getattr(model.config.get_text_config(), "rms_norm_eps", None)
        if epsilon is None:
            raise SubjectModelError(f"no site {site}: {type(model).__name__} has no RMS norms")
        return float(epsilon)
    scale = getattr(model.get_input_embeddings(), "embed_scale", None)
    if scale is None or site.layer != EMBEDDING:
        raise SubjectModelError(f"no site {site}: {type(model).__name__} scales no embedding there")
    # The scale is rounded to the weights' precision before it multiplies them.
    return float(scale.to(model.dtype))
