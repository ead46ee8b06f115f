"""Gemma Scope 1 (Gemma 2): `layer_{L}/width_{W}/average_l0_{N}/params.npz`, and nothing beside it.

What belongs here: this one file format, whose names say everything that the arrays do not. What does not: arithmetic
(`sparse.py`) or other formats. Source: the model cards and Lieberum et al. 2024 (arXiv 2408.05147).
"""

import re
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

from scopeatlas.dictionaries.layout import SaeFacts, SaeFiles, by_folder, inside, parse_width
from scopeatlas.dictionaries.reading import expect, read_npz
from scopeatlas.dictionaries.shapes import bind_axes
from scopeatlas.dictionaries.sparse import Activation, LayerWeights, SparseDictionary
from scopeatlas.errors import DictionaryError
from scopeatlas.subject.sites import EMBEDDING, Site

if TYPE_CHECKING:
    import torch

FAMILY = "gemma_scope_1"
WEIGHT_FILE = "params.npz"

_RELEASE = re.compile(r"gemma-scope-(?P<size>2b|9b|27b)-(?P<tuned>pt|it)(?:-(?P<site>res|mlp|att|transcoders))?(?![\w-])")
_FOLDER = re.compile(r"(?:layer_(?P<layer>\d+)|(?P<embedding>embedding))/width_(?P<width>\w+)/average_l0_(?P<l0>[\d.]+)(?=/|$)")
_AXES = {"W_enc": "d_in F", "b_enc": "F", "threshold": "F", "W_dec": "F d_out", "b_dec": "d_out"}
_ATTENTION_SIZES = (2048, 4096)
"""n_heads * head_dim of 2b and 9b, which is no residual stream's size: it tells attention SAEs without a name."""


def find(files: Collection[str]) -> list[SaeFiles]:
    """Every folder with a params.npz."""
    folders = by_folder(files)
    return [SaeFiles(FAMILY, folder, inside(folder, WEIGHT_FILE)) for folder in sorted(folders) if WEIGHT_FILE in folders[folder]]


def facts(files: SaeFiles, release: str) -> SaeFacts:
    """Kind, site, layer, width and measured L0, as far as the names of the release and folders say."""
    name = f"{release}/{files.path}"
    folder = _FOLDER.search(name)
    if folder is None:
        return SaeFacts(model=_model(name))
    site = "embedding" if folder["embedding"] else _site_word(name)
    return SaeFacts(
        kind="transcoder" if site == "transcoders" else "sae" if site else "",
        site=site,
        layers=() if folder["embedding"] else (int(folder["layer"]),),
        width=parse_width(folder["width"]),
        l0=float(folder["l0"]),
        model=_model(name),
    )


def load(root: Path, files: SaeFiles, release: str) -> SparseDictionary:
    """One SAE or transcoder. Raises DictionaryError naming the file and what is wrong, or what its names lack."""
    path = root / files.weights[0]
    arrays = _arrays(path)
    sizes = bind_axes(path, {name: array.shape for name, array in arrays.items()}, _AXES)
    # The names may be those of the release or, for a folder opened by itself, of the folders it lies in.
    name = f"{release}/{files.path}" if _FOLDER.search(files.path) else f"{release}/{path.parent.as_posix()}"
    folder = _FOLDER.search(name)
    if folder is None:
        raise DictionaryError(
            f"{path}: the layer cannot be known: it must lie in layer_L/width_W/average_l0_N or embedding/width_W/average_l0_N"
        )
    site = "embedding" if folder["embedding"] else _site_word(name) or ("att" if sizes["d_in"] in _ATTENTION_SIZES else "")
    site_in, site_out = _sites(site, int(folder["layer"] or EMBEDDING), path)
    layer = LayerWeights(arrays["W_enc"], arrays["b_enc"], arrays["W_dec"][:, None], arrays["threshold"])
    return SparseDictionary(
        kind="transcoder" if site == "transcoders" else "sae",
        sites_in=(site_in,),
        sites_out=(site_out,),
        model_name=_model(name),
        layers=(layer,),
        b_dec=arrays["b_dec"][None],
        activation=Activation("jumprelu"),
        measured_l0=float(folder["l0"]),
        family=FAMILY,
        notes=_notes(name, folder, site, sizes["F"]),
    )


def _arrays(path: Path) -> "dict[str, torch.Tensor]":
    arrays = {f"W_{name[2:]}" if name.startswith("w_") else name: array for name, array in read_npz(path).items()}
    expect(path, arrays, _AXES, ["scaling_factor"])
    scaling = arrays.pop("scaling_factor", None)
    if scaling is not None and not bool(((scaling - 1).abs() < 1e-5).all()):
        raise DictionaryError(
            f"{path}: its scaling_factor is not 1, and what it scales is not documented; use a file without one"
        )
    return arrays


def _site_word(name: str) -> str:
    """res, mlp, att or transcoders: from a Hub name, or from that word in any folder's name."""
    release = _RELEASE.search(name)
    if release and release["site"]:
        return release["site"]
    words = {word for part in name.split("/") for word in re.split(r"[-_.]", part)} & {"res", "mlp", "att", "transcoders"}
    return words.pop() if len(words) == 1 else ""


def _model(name: str) -> str:
    release = _RELEASE.search(name)
    return "" if release is None else f"google/gemma-2-{release['size']}{'-it' if release['tuned'] == 'it' else ''}"


def _sites(site: str, layer: int, path: Path) -> tuple[Site, Site]:
    if site == "transcoders":
        # The gain of the norm before the MLP was folded into the MLP: these read the normalised stream without it.
        return (
            Site(layer, "pre_feedforward_layernorm", "input", "rms_norm"),
            Site(layer, "post_feedforward_layernorm", "output"),
        )
    sites = {
        "res": Site(layer, "", "output"),
        "mlp": Site(layer, "post_feedforward_layernorm", "output"),
        "att": Site(layer, "self_attn.o_proj", "input"),
        "embedding": Site(EMBEDDING, "", "output", "unscaled"),
    }
    if site not in sites:
        raise DictionaryError(
            f"{path}: no name says whether it reads the residual stream, the MLP or attention; name the release's folder "
            "as on the Hub, such as gemma-scope-2b-pt-res"
        )
    return sites[site], sites[site]


def _notes(name: str, folder: re.Match[str], site: str, width: int) -> tuple[str, ...]:
    notes = []
    release = _RELEASE.search(name)
    if site != "embedding" and not (release and release["site"]):
        hint = "a folder's name holds that word" if _site_word(name) else "its input has that size"
        notes.append(f"read as '{site}' because {hint}: no name of a Gemma Scope release says so")
    if not _model(name):
        notes.append("the release's name does not say which model it was trained on")
    if parse_width(folder["width"]) != width:
        notes.append(f"its folder says width_{folder['width']}, its arrays hold {width} features")
    return tuple(notes)
