"""Rewriting other conventions into `LayerWeights`, so that one encoder serves them all.

What belongs here: folds that more than one family needs, exact in real numbers and done in float64. What does not:
which family needs which (its module), or the encoder (`sparse.py`, with `fold_b_dec`).
"""

from dataclasses import replace
from typing import TYPE_CHECKING

from scopeatlas.dictionaries.sparse import LayerWeights

if TYPE_CHECKING:
    import torch


def scaled(tensor: "torch.Tensor", factor: "torch.Tensor | float") -> "torch.Tensor":
    """tensor * factor (a number, or one per element of the last axis), float32."""
    return (tensor.double() * factor).float()


def scale_by_decoder_norm(layer: LayerWeights) -> LayerWeights:
    """A single layer whose pre-activations are multiplied by the norms of its decoder rows, and its rows divided by them.

    A row of zeros stays, and its feature never fires: it wrote nothing before either.
    """
    norms = layer.w_dec[:, 0].double().norm(dim=1)
    w_dec = layer.w_dec.double() / norms.where(norms > 0, 1.0)[:, None, None]
    return replace(layer, w_enc=scaled(layer.w_enc, norms), b_enc=scaled(layer.b_enc, norms), w_dec=w_dec.float())


def gated_magnitude(
    r_mag: "torch.Tensor", gate_bias: "torch.Tensor", mag_bias: "torch.Tensor"
) -> "tuple[torch.Tensor, torch.Tensor]":
    """`LayerWeights.magnitude` of a gated SAE whose b_enc is `gate_bias`, all [F].

    Its magnitude is z @ (W * exp(r_mag)) + mag_bias (Rajamanoharan et al. 2024, equation 7), and z @ W is pre - gate_bias.
    """
    scale = r_mag.double().exp()
    return scale.float(), (mag_bias.double() - gate_bias.double() * scale).float()
