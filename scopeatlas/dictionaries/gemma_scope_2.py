"""Gemma Scope 2's single-layer format: `params.safetensors` and mostly a `config.json`, one folder per dictionary.

What belongs here: this one file format, and what the names of Gemma Scope 2 say. What does not: arithmetic
(`sparse.py`), other formats, or the sharded kinds (`gemma_scope_2_multilayer.py`, which shares the names).
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from scopeatlas.dictionaries.layout import SaeFacts, SaeFiles, by_folder, inside, parse_width
from scopeatlas.dictionaries.reading import Settings, expect, map_safetensors, read_settings
from scopeatlas.dictionaries.shapes import bind_axes
from scopeatlas.dictionaries.sparse import Activation, Kind, LayerWeights, SparseDictionary
from scopeatlas.errors import DictionaryError
from scopeatlas.subject.sites import Site, parse_hook_point

FAMILY = "gemma_scope_2"
WEIGHT_FILE = "params.safetensors"
CONFIG_FILE = "config.json"
SKIP = "affine_skip_connection"

N_LAYERS = {"270m": 18, "1b": 26, "4b": 34, "12b": 48, "27b": 62}
"""Decoder layers of Gemma 3, by size."""

HOOKS: Mapping[str, tuple[str, str]] = {
    "resid_post": ("output", "output"),
    "attn_out": ("self_attn.o_proj.input", "self_attn.o_proj.input"),
    "mlp_out": ("post_feedforward_layernorm.output", "post_feedforward_layernorm.output"),
    "transcoder": ("pre_feedforward_layernorm.output", "post_feedforward_layernorm.output"),
    "clt": ("pre_feedforward_layernorm.output", "post_feedforward_layernorm.output"),
    "crosscoder": ("output", "output"),
}
"""What each kind of folder reads and writes, within a layer."""

_AXES = {"w_enc": "d_in F", "b_enc": "F", "threshold": "F", "w_dec": "F d_out", "b_dec": "d_out", SKIP: "d_in d_out"}
_RELEASE = re.compile(r"gemma-(?:scope-2|3)-(?P<size>270m|1b|4b|12b|27b)(?:-(?P<tuned>pt|it))?(?![a-z0-9])")
_FOLDER = re.compile(
    r"(?:^|/)(?P<site>resid_post|attn_out|mlp_out|transcoder)(?P<all>_all)?/layer_(?P<layer>\d+)_width_(?P<width>[^_/]+)"
    r"_l0_(?P<l0>small|medium|big)(?P<affine>_affine)?(?:_seed_\d+)?(?=/|$)"
)


@dataclass(frozen=True)
class Names:
    """What a folder's name inside its release says. all_layers: whether it is of a `*_all` folder."""

    site: str
    layer: int
    width: int | None
    l0: str
    all_layers: bool
    affine: bool

    @property
    def kind(self) -> Kind:
        return "transcoder" if self.site == "transcoder" else "sae"

    def target_l0(self, layers: int) -> float:
        """What training aimed at in a model of `layers` layers: the formulas that all published configs follow."""
        start, rise = {"small": (10, 10), "medium": (30, 30), "big": (60, 60 if self.all_layers else 90)}[self.l0]
        return float(int(start + rise * min(1.0, 3 * self.layer / layers)))


def find(files: Collection[str]) -> list[SaeFiles]:
    """Every folder with a params.safetensors, with or without a config."""
    return [
        SaeFiles(FAMILY, folder, inside(folder, WEIGHT_FILE), inside(folder, *({CONFIG_FILE} & names)))
        for folder, names in sorted(by_folder(files).items())
        if WEIGHT_FILE in names
    ]


def facts(files: SaeFiles, release: str) -> SaeFacts:
    """Kind, site (without `_all`), layer, width, target L0 and model, as far as the names say."""
    names, size, model = parse_folder(files.path), size_of(release), model_of(release)
    if names is None:
        return SaeFacts(model=model)
    l0 = names.target_l0(N_LAYERS[size]) if size else None
    return SaeFacts(names.kind, names.site, (names.layer,), names.width, l0, model)


def load(root: Path, files: SaeFiles, release: str) -> SparseDictionary:
    """One SAE or transcoder. Raises DictionaryError naming the file and what is wrong with it, or what is missing."""
    path = root / files.weights[0]
    tensors = map_safetensors(path)
    expect(path, tensors, _AXES.keys() - {SKIP}, [SKIP])
    if tensors["w_dec"].ndim == 3:
        raise DictionaryError(f"{path}: w_dec must be a matrix; this may be a shard of a multi-layer dictionary, renamed")
    sizes = bind_axes(path, {name: tensor.shape for name, tensor in tensors.items()}, _AXES)
    names = parse_folder(files.path)
    config_path = path.with_name(CONFIG_FILE)
    config = read_settings(config_path) if files.configs else _config_of(names, release, path)
    check_config(config, config_path, {"sae", "transcoder"}, sizes["F"], SKIP in tensors)
    site_in, site_out = (_site(config, f"hf_hook_point_{side}", config_path) for side in ("in", "out"))
    kind = _kind(config, site_in, site_out)
    if names is not None:
        _check_names(names, kind, site_in, SKIP in tensors, path)
    size = size_of(release)
    by_name = names.target_l0(N_LAYERS[size]) if names and size else None
    layer = LayerWeights(tensors["w_enc"], tensors["b_enc"], tensors["w_dec"][:, None], tensors["threshold"], tensors.get(SKIP))
    return SparseDictionary(
        kind=kind,
        sites_in=(site_in,),
        sites_out=(site_out,),
        model_name=clean_model_name(text(config, "model_name")) or model_of(release),
        layers=(layer,),
        b_dec=tensors["b_dec"][None],
        activation=Activation("jumprelu"),
        target_l0=number(config, "l0", config_path, by_name),
        family=FAMILY,
        notes=(*_notes(files, names, sizes["F"]), *model_notes(config)),
    )


def size_of(release: str) -> str:
    """The size of the model in a release's name (`4b` of gemma-scope-2-4b-pt), or nothing."""
    match = _RELEASE.search(release.lower())
    return match["size"] if match else ""


def model_of(release: str) -> str:
    """The Hub id of the model in a release's name, or nothing. Gemma 3 270M has no -pt on the Hub."""
    match = _RELEASE.search(release.lower())
    if match is None or (match["tuned"] is None and match["size"] != "270m"):
        return ""
    return clean_model_name(f"gemma-3-{match['size']}-{match['tuned'] or 'pt'}")


def clean_model_name(name: str) -> str:
    """A config's model name as the Hub has it: some lack the owner, say gemma-v3, or name a 270m-pt that is none."""
    name = name.replace("-v3", "-3")
    if name.endswith("gemma-3-270m-pt"):
        name = name.removesuffix("-pt")
    return f"google/{name}" if name and "/" not in name else name


def parse_folder(path: str) -> Names | None:
    """What the name of a single-layer folder says, or None if it is not one of Gemma Scope 2's."""
    match = _FOLDER.search(path)
    if match is None:
        return None
    width = parse_width(match["width"])
    return Names(match["site"], int(match["layer"]), width, match["l0"], bool(match["all"]), bool(match["affine"]))


def check_config(config: Settings, path: Path, kinds: set[str], width: int, skip: bool) -> None:
    """Raises DictionaryError where a config is not of Gemma Scope 2, or does not go with the weights beside it."""
    kind = config.get("type", "sae")
    if kind not in kinds:
        raise DictionaryError(f"{path}: type '{kind}' is not one of {', '.join(sorted(kinds))}, which these weights can be")
    if config.get("architecture", "jump_relu") != "jump_relu":
        raise DictionaryError(f"{path}: architecture '{config['architecture']}' is not jump_relu")
    if config.get("affine_connection", skip) != skip:
        raise DictionaryError(f"{path}: it and the weights disagree about an {SKIP}; download both again")
    if config.get("width") not in (None, width):
        raise DictionaryError(f"{path}: says {config['width']} features, the weights have {width}; download both again")


def text(config: Settings, name: str) -> str:
    """A setting that is text, or nothing."""
    value = config.get(name)
    return value if isinstance(value, str) else ""


def number(config: Settings, name: str, path: Path, otherwise: float | None) -> float | None:
    """A setting that is a number, or `otherwise` where it is absent. Raises DictionaryError if it is something else."""
    value = config.get(name)
    if value is None:
        return otherwise
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise DictionaryError(f"{path}: {name} '{value}' is not a number; download it again")
    return float(value)


def model_notes(config: Settings) -> list[str]:
    """What was mended of the config's model name."""
    name = text(config, "model_name")
    clean = clean_model_name(name)
    return [f"config.json calls the model '{name}': read as {clean}"] if clean != name else []


def _config_of(names: Names | None, release: str, path: Path) -> Settings:
    if names is None:
        raise DictionaryError(
            f"{path.with_name(CONFIG_FILE)} is missing; download the whole folder, or name it as on the Hub, such as "
            f"resid_post/layer_12_width_16k_l0_medium: {path.parent.name} does not say what it reads"
        )
    hook_in, hook_out = (f"model.layers.{names.layer}.{hook}" for hook in HOOKS[names.site])
    return {"type": names.kind, "hf_hook_point_in": hook_in, "hf_hook_point_out": hook_out, "model_name": model_of(release)}


def _kind(config: Settings, site_in: Site, site_out: Site) -> Kind:
    if config.get("type") is None:
        return "sae" if site_in == site_out else "transcoder"
    return "transcoder" if config["type"] == "transcoder" else "sae"


def _site(config: Settings, name: str, path: Path) -> Site:
    hook = text(config, name)
    if not hook:
        raise DictionaryError(f"{path} lacks '{name}': the site cannot be known; download it again")
    try:
        return parse_hook_point(hook)
    except DictionaryError as error:
        raise DictionaryError(f"{path}: {error}") from error


def _check_names(names: Names, kind: Kind, site_in: Site, skip: bool, path: Path) -> None:
    said = parse_hook_point(f"model.layers.{names.layer}.{HOOKS[names.site][0]}")
    if said != site_in or kind != names.kind:
        raise DictionaryError(
            f"{path}: its folder's name says a {names.kind} of {said}, config.json a {kind} of {site_in}; download the folder again"
        )
    if names.affine != skip:
        raise DictionaryError(f"{path}: its folder's name and its tensors disagree about an {SKIP}; download the folder again")


def _notes(files: SaeFiles, names: Names | None, width: int) -> list[str]:
    notes = [] if files.configs else ["no config.json: site, kind, model and target L0 are inferred from the names"]
    if names is not None and names.width not in (None, width):
        notes.append(f"its folder's name says {names.width} features, its tensors hold {width}")
    return notes
