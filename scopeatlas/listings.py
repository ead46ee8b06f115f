"""Releases that are known without asking the Hub: their SAEs as shapes, and the sizes of their subject models.

What belongs here: from the tables in `data/` to dictionaries without weights. What does not: what a run over them would
cost (`planning.py`), or releases that were seen on the Hub or in a folder (`discovery.py`).
"""

from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from scopeatlas.dictionaries import formats, gemma_scope_2, gemma_scope_2_multilayer
from scopeatlas.dictionaries.layout import SaeFiles
from scopeatlas.dictionaries.sparse import Activation, LayerWeights, LazyLayers, SparseDictionary
from scopeatlas.errors import DictionaryError
from scopeatlas.subject.sites import decoder_layers, parse_hook_point

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig

_TABLE = Path(__file__).parent / "data" / "gemma_scope_2.yaml"


@dataclass(frozen=True)
class ModelShape:
    """What the cost of a language model's forward pass follows from.

    layers: decoder layers. layer_weights: parameters of the matrices in one of them (their mean). attention: heads x head size.
    """

    layers: int
    layer_weights: int
    attention: int

    def layer_flop(self, context_length: int) -> int:
        """Floating-point operations of one layer for one token: two for each weight, and two products of attention with
        the whole context, masked or not (Kaplan et al. 2020, table 1, for causal attention computed densely)."""
        return 2 * self.layer_weights + 4 * self.attention * context_length


def gemma_3(size: str) -> ModelShape:
    """The shape of Gemma 3 of a size such as 270m: query, key, value and output projections, and a gated MLP of three
    matrices. Raises DictionaryError for a size that there is not."""
    models = _table()["models"]
    if size not in models:
        raise DictionaryError(f"there is no Gemma 3 of size '{size}'; there are {', '.join(models)}")
    m = models[size]
    attention, keys = m["heads"] * m["head_dim"], m["kv_heads"] * m["head_dim"]
    weights = m["d_model"] * (2 * attention + 2 * keys + 3 * m["d_mlp"])
    return ModelShape(m["layers"], weights, attention)


def shape_of(name: str) -> ModelShape | None:
    """The shape of a model by its Hub id (google/gemma-3-1b-pt), or None for one that is not in the table."""
    size = gemma_scope_2.size_of(name)
    return gemma_3(size) if size else None


def shape_of_config(config: "PreTrainedConfig") -> ModelShape:
    """The shape of a model with this configuration, by building it without numbers; every expert of a mixture counts."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        layers = decoder_layers(AutoModelForCausalLM.from_config(config))
    weights = sum(p.numel() for p in layers.parameters() if p.ndim > 1)
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return ModelShape(len(layers), weights // len(layers), config.num_attention_heads * head)


def listed_releases() -> list[str]:
    """The repos that are known."""
    table = _table()
    return [table["repo"].format(size=size, tuned=tuned) for size in table["models"] for tuned in table["tuned"]]


def releases_named(name: str) -> list[str]:
    """The known repos that a name, its beginning up to a dash, or a glob stands for; with or without organisation."""
    asked = name.lower()
    return [
        repo
        for repo in listed_releases()
        if any(n == asked or n.startswith(f"{asked}-") or fnmatchcase(n, asked) for n in (repo, repo.rsplit("/", 1)[-1]))
    ]


def listed_saes(repo: str) -> dict[str, SparseDictionary]:
    """The SAEs of a known repo by path, in the order in which they are registered, their weights float32 on the meta device:
    shapes without numbers.

    Raises DictionaryError for a repo that is not known.
    """
    if repo not in listed_releases():
        raise DictionaryError(f"no table says what '{repo}' holds; there is one for {', '.join(listed_releases())}")
    return {path: _dictionary(repo, path) for path in sorted(_paths(gemma_scope_2.size_of(repo)))}


@lru_cache(maxsize=1)
def _table() -> dict:
    return yaml.safe_load(_TABLE.read_text(encoding="utf-8"))


def _paths(size: str) -> list[str]:
    """The folders of a repo of a model of this size."""
    table = _table()
    four = table["four_layers"][size]
    given = {"four": four, "all": range(table["models"][size]["layers"]), "joined": ["_".join(map(str, four))]}
    paths = []
    for row in table["folders"]:
        if size not in row.get("sizes", [size]):
            continue
        choices = {name: values for name, values in (given | row).items() if f"{{{name}}}" in row["path"]}
        paths += [row["path"].format(**dict(zip(choices, chosen, strict=True))) for chosen in product(*choices.values())]
    return [path for path in paths if path not in table["absent"].get(size, [])]


def _dictionary(repo: str, path: str) -> SparseDictionary:
    """What opening this folder would give, without the numbers."""
    import torch

    site = path.split("/")[0].removesuffix("_all")
    is_multi = site in ("crosscoder", "clt")
    family = gemma_scope_2_multilayer.FAMILY if is_multi else gemma_scope_2.FAMILY
    facts = formats.facts(SaeFiles(family, path, ()), repo)
    model = _table()["models"][gemma_scope_2.size_of(repo)]
    d = model["heads"] * model["head_dim"] if site == "attn_out" else model["d_model"]
    width = _table()["clt_features"][path.split("_")[1]] if site == "clt" else facts.width
    assert width is not None  # every path of the table names one
    count = len(facts.layers)
    layer = _layer(d, width // count, outputs=count, skip=path.endswith("_affine"))
    sites_in, sites_out = (
        tuple(parse_hook_point(f"model.layers.{n}.{hook}") for n in facts.layers) for hook in gemma_scope_2.HOOKS[site]
    )
    return SparseDictionary(
        kind=facts.kind,  # pyright: ignore[reportArgumentType]  # one of the four words
        sites_in=sites_in,
        sites_out=sites_out,
        model_name=facts.model,
        layers=LazyLayers(lambda _: layer, count) if is_multi else (layer,),
        b_dec=torch.empty(count, d, device="meta"),
        activation=Activation("jumprelu"),
        target_l0=facts.l0,
        family=family,
    )


def _layer(d: int, features: int, *, outputs: int, skip: bool) -> LayerWeights:
    def empty(*shape: int) -> "torch.Tensor":
        import torch

        return torch.empty(shape, device="meta")

    affine = empty(d, d) if skip else None
    return LayerWeights(empty(d, features), empty(features), empty(features, outputs, d), empty(features), affine)
