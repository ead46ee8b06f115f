"""Goodfire: one pickle, named by its model and layer (`Llama-3.1-8B-Instruct-SAE-l19.pth`), with two linear layers.

What belongs here: this one file format, also as others use it (qresearch's SAE of DeepSeek-R1). What does not: arithmetic
(`sparse.py`) or other formats.
"""

import re
from collections.abc import Collection
from pathlib import Path

from scopeatlas.dictionaries.layout import SaeFacts, SaeFiles
from scopeatlas.dictionaries.reading import expect, read_pickle
from scopeatlas.dictionaries.shapes import bind_axes
from scopeatlas.dictionaries.sparse import Activation, LayerWeights, SparseDictionary
from scopeatlas.subject.sites import Site

FAMILY = "goodfire"

_NAME = re.compile(r"(?:^|/)(?P<model>[^/]+)-SAE-l(?P<layer>\d+)(?=[./]|$)", re.IGNORECASE)
_OWNERS = {"llama": "meta-llama", "deepseek": "deepseek-ai"}
_PLAIN = {"encoder.weight": "F d", "encoder.bias": "F", "decoder.weight": "d F", "decoder.bias": "d"}
_LINEAR = {name.replace(".", "_linear."): axes for name, axes in _PLAIN.items()}


def find(files: Collection[str]) -> list[SaeFiles]:
    """Every .pt or .pth whose name, or folder's name, is MODEL-SAE-lN; the path is the file's without the suffix."""
    return [
        SaeFiles(FAMILY, file.rsplit(".", 1)[0], (file,))
        for file in sorted(files)
        if file.endswith((".pt", ".pth")) and _NAME.search(file)
    ]


def facts(files: SaeFiles, release: str) -> SaeFacts:
    """Layer and model, from the name."""
    match = _NAME.search(files.weights[0])
    assert match is not None, files
    owner = _OWNERS.get(re.split(r"[-_]", match["model"].lower())[0], "")
    model = f"{owner}/{match['model']}" if owner else match["model"]
    return SaeFacts("sae", "resid_post", (int(match["layer"]),), model=model)


def load(root: Path, files: SaeFiles, release: str) -> SparseDictionary:
    """One SAE. Raises DictionaryError naming the file and what is wrong with it."""
    import torch

    path, named = root / files.weights[0], facts(files, release)
    tensors = {str(name): tensor for name, tensor in read_pickle(path).items() if isinstance(tensor, torch.Tensor)}
    axes = _PLAIN if "encoder.weight" in tensors else _LINEAR
    expect(path, tensors, axes)
    bind_axes(path, {name: tensor.shape for name, tensor in tensors.items()}, axes)
    w_enc, b_enc, w_dec, b_dec = (tensors[name] for name in axes)
    site = Site(named.layers[0], "", "output")
    return SparseDictionary(
        kind="sae",
        sites_in=(site,),
        sites_out=(site,),
        model_name=named.model,
        layers=(LayerWeights(w_enc.T, b_enc, w_dec.T[:, None]),),
        b_dec=b_dec[None],
        activation=Activation("relu"),
        family=FAMILY,
        notes=("no config: model and layer are inferred from the file's name, and that it reads the layer's output",),
    )
