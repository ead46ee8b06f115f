"""The checks that every dictionary passes after loading, whatever format it came in.

What belongs here: shapes, finiteness, thresholds, decoder norms, causal zeros, and fit to a subject model. What does
not: what only one format can know (its module), or how well the dictionary reconstructs (`activations/fidelity.py`).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from scopeatlas.dictionaries.sparse import LayerWeights, SparseDictionary
from scopeatlas.errors import DictionaryError
from scopeatlas.subject.sites import Site

if TYPE_CHECKING:
    import torch

DECODER_NORM_TOLERANCE = 0.02
UNIT_NORM_FAMILIES = ("gemma_scope_1", "gemma_scope_2")
"""Single-layer Gemma Scope decoders have rows of unit norm; elsewhere it is only noted when they have not."""
TRANSPOSED_SHARE = 0.01
"""Of rows off unit norm: a few are odd latents, a transposed matrix has nearly all of them."""
BLOCK_BYTES = 64 << 20


def validate(dictionary: SparseDictionary, source: str, *, files: Sequence[str] = ()) -> SparseDictionary:
    """The dictionary with what was found added to its notes.

    files: of a sharded dictionary, where each layer came from, to be named instead of `source`.

    Raises DictionaryError naming `source` and the tensor on wrong shapes, values that are NaN or infinite, negative
    thresholds, a causal kind that writes backwards, or Gemma Scope decoder rows that are not of unit norm.
    """
    notes: list[str] = []
    for position, layer in enumerate(dictionary.layers):
        where = files[position] if files else source
        _check_shapes(dictionary, layer, where)
        for name, tensor in layer.tensors().items():
            _check_finite(tensor, name, where)
        if layer.threshold is not None and bool((layer.threshold < 0).any()):
            raise DictionaryError(
                f"{where}: negative thresholds; a JumpReLU dictionary has none, so the file is damaged or of another kind"
            )
        if dictionary.is_multi_layer:
            _check_causal(dictionary, layer, position, where)
        else:
            notes += _check_norms(dictionary, layer, where)
    _check_shape("b_dec", dictionary.b_dec, (len(dictionary.sites_out), dictionary.d_out), source)
    for output, bias in enumerate(dictionary.b_dec):
        _check_finite(bias, "b_dec", files[output] if files else source)
    return replace(dictionary, notes=(*dictionary.notes, *notes))


def _check_shapes(dictionary: SparseDictionary, layer: LayerWeights, source: str) -> None:
    d_in, width, d_out = dictionary.d_in, dictionary.features_per_layer, dictionary.d_out
    expected = {
        "w_enc": (d_in, width),
        "w_dec": (width, len(dictionary.sites_out) - layer.first_output, d_out),
        "skip": (d_in, d_out),
    }
    for name, tensor in layer.tensors().items():
        _check_shape(name, tensor, expected.get(name, (width,)), source)


def _check_shape(name: str, tensor: "torch.Tensor", shape: tuple[int, ...], source: str) -> None:
    if tuple(tensor.shape) != shape:
        raise DictionaryError(f"{source}: {name} has shape {tuple(tensor.shape)}, expected {shape}; download the file again")


def _blocks(tensor: "torch.Tensor") -> "Iterator[torch.Tensor]":
    """Row blocks: a mapped decoder of gigabytes must not be turned into a mask or a copy of as many elements at once."""
    yield from tensor.split(max(1, BLOCK_BYTES // max(tensor[:1].nbytes, 1)))


def _check_finite(tensor: "torch.Tensor", name: str, source: str) -> None:
    bad = sum(int((~block.isfinite()).sum()) for block in _blocks(tensor))
    if bad:
        raise DictionaryError(f"{source}: {name} holds {bad} value(s) that are NaN or infinite; download the file again")


def _check_norms(dictionary: SparseDictionary, layer: LayerWeights, source: str) -> list[str]:
    norms = layer.w_dec.float().norm(dim=-1)
    off = (norms - 1).abs() > DECODER_NORM_TOLERANCE
    if not bool(off.any()):
        return []
    if dictionary.family in UNIT_NORM_FAMILIES and float(off.float().mean()) > TRANSPOSED_SHARE:
        raise DictionaryError(
            f"{source}: {int(off.sum()):,} of {len(norms):,} decoder rows are not unit norm ({float(norms.min()):.3g} to "
            f"{float(norms.max()):.3g}); w_dec may be transposed or of another format"
        )
    return [
        f"{int(off.sum()):,} of {len(norms):,} decoder rows are not of unit norm ({float(norms.min()):.3g} to {float(norms.max()):.3g})"
    ]


def _check_causal(dictionary: SparseDictionary, layer: LayerWeights, position: int, source: str) -> None:
    own = position - layer.first_output
    backwards = max(float(block[:, :own].abs().max()) for block in _blocks(layer.w_dec)) if own > 0 else 0.0
    if backwards > 0:
        raise DictionaryError(
            f"{source}: w_dec writes to layers before its own (up to {backwards:.3g}); its output index may be relative, or "
            "the shards are out of order"
        )
    if own < 0 or not any(bool(block[:, own].any()) for block in _blocks(layer.w_dec)):
        raise DictionaryError(
            f"{source}: w_dec writes nothing to its own layer; its output index may be relative; download it again"
        )


def check_fits(dictionary: SparseDictionary, sizes: Mapping[Site, int], source: str, model_name: str) -> None:
    """Raises DictionaryError if a site's activations, of `sizes` in the subject model, are not the dictionary's."""
    for sites, size, verb in (
        (dictionary.sites_in, dictionary.d_in, "reads"),
        (dictionary.sites_out, dictionary.d_out, "writes"),
    ):
        for site in sites:
            if sizes[site] != size:
                raise DictionaryError(
                    f"{source}: {verb} activations of size {size}, but {site} of {model_name} has {sizes[site]}; "
                    f"it was trained on {dictionary.model_name or 'another model'}: set subject.name to that model"
                )
