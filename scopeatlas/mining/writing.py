"""What a feature writes: the norms of its decoder rows, and what it adds to the residual stream directly.

What belongs here: from decoder rows at any site to the stream. What does not: what that does to the logits
(`promoted.py`), or effects through later layers (which depend on the text).
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from scopeatlas.dictionaries.sparse import SparseDictionary
from scopeatlas.errors import SubjectModelError
from scopeatlas.subject.sites import EMBEDDING, Site, canonical_site, decoder_layers

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel

    Step = Callable[[torch.Tensor], torch.Tensor]

TILE_FEATURES = 4096


def decoder_norms(dictionary: SparseDictionary) -> np.ndarray:
    """The norm of each feature's decoder row at each output site: float32 [F, L_out]. Layers are opened one at a time."""
    import torch

    norms = [rows.float().norm(dim=-1) for layer in dictionary.layers for rows in layer.row_tiles(TILE_FEATURES)]
    return torch.cat(norms).cpu().numpy()


def stream_writer(dictionary: SparseDictionary, model: "PreTrainedModel") -> "Step | None":
    """From decoder rows [n, L_out, d_out] to what the features add to the residual stream: [n, d], float32 both.

    A CLT adds the sum over its output layers, each through its own site. A crosscoder's outputs are states of one and
    the same stream at several layers, not additions to it: only the last counts. Rows before an attention or MLP output
    projection go through it; before Gemma's norm of that output they take its gain, to first order (the norm also
    divides by a positive number that depends on the token). None if an output site is none that leads to the stream in
    this way, or its rows are of another size.
    """
    sites = dictionary.sites_out[-1:] if dictionary.kind == "crosscoder" else dictionary.sites_out
    steps = [_steps_to_stream(model, site) for site in sites]
    if any(found is None for found in steps) or _size_after(steps[0] or [], dictionary.d_out, model) != _stream_size(model):
        return None

    def write(rows_nod: "torch.Tensor") -> "torch.Tensor":
        total = 0
        for output, todo in zip(range(-len(sites), 0), steps, strict=True):
            rows = rows_nod[:, output]
            for step in todo or []:
                rows = step(rows)
            total = total + rows
        return total  # type: ignore[return-value]  # there is at least one site

    return write


def norm_gain(norm: "nn.Module", d: int) -> "torch.Tensor":
    """The gain [d] of a norm, whatever its convention (Gemma's is 1 + weight), float32.

    An RMS norm maps sqrt(d) * e_i, of mean square 1, to sqrt(d) * gain_i * e_i, and its negative to the negative; a
    layer norm does so nearly, and its bias cancels in their difference.
    """
    import torch

    weight = next(norm.parameters())
    scaled = torch.eye(d, device=weight.device, dtype=weight.dtype) * d**0.5
    with torch.no_grad():
        return (norm(scaled) - norm(-scaled)).diagonal().float() / (2 * d**0.5)


def _stream_size(model: "PreTrainedModel") -> int:
    return model.get_output_embeddings().weight.shape[1]  # pyright: ignore[reportOptionalMemberAccess, reportReturnType]


def _size_after(steps: "list[Step]", d: int, model: "PreTrainedModel") -> int | None:
    """The length of rows of length `d` after `steps`; None where they do not fit."""
    import torch

    rows = torch.zeros(1, d, device=next(model.parameters()).device)
    try:
        for step in steps:
            rows = step(rows)
    except RuntimeError:
        return None
    return rows.shape[1]


def _steps_to_stream(model: "PreTrainedModel", site: Site) -> "list[Step] | None":
    """What happens, to first order, to a row added at `site` until it is in the residual stream; None if that is unknown."""
    if site.transform == "rms_norm":
        return None
    if site.layer == EMBEDDING or not site.module:
        return []  # the stream itself, or its start, of which the embedding's scale is a multiple
    try:
        site = canonical_site(model, site)
        return _steps_within(model, site.layer).get((site.module, site.side))
    except SubjectModelError:  # an architecture whose modules play no known roles
        return None


def _steps_within(model: "PreTrainedModel", layer: int) -> "dict[tuple[str, str], list[Step]]":
    """Module and side -> the steps from there to the stream, of every site of a layer that leads to it directly."""

    def role(name: str, side: str = "output") -> str:
        return canonical_site(model, Site(layer, name, side)).module  # type: ignore[arg-type]

    module = decoder_layers(model)[layer].get_submodule
    found: dict[tuple[str, str], list[Step]] = {(role("ln1", "input"), "input"): [], (role("ln2", "input"), "input"): []}
    for inner, outer in (("attn.hook_z", "hook_attn_out"), ("mlp.hook_post", "hook_mlp_out")):
        projection, last = role(inner), role(outer)
        branch = projection.split(".")[0]
        # Gemma norms what attention and MLP give before it is added; elsewhere their output itself is added.
        normed = [] if last == branch else [_gain_of(module(last))]
        found |= {(projection, "input"): [_linear(module(projection)), *normed]}
        found |= {(name, "output"): normed for name in (projection, branch)}
        found |= {(last, "input"): normed, (last, "output"): []} if normed else {}
    return found


def _linear(projection: "nn.Module") -> "Step":
    """Rows through a linear map without its bias, whichever way round its weight is kept (GPT-2's is transposed)."""
    weight: torch.Tensor = projection.weight  # type: ignore[assignment]

    def step(rows: "torch.Tensor") -> "torch.Tensor":
        rows = rows.to(weight.device, weight.dtype)
        return (projection(rows) - projection(rows[:1] * 0)).float()

    return step


def _gain_of(norm: "nn.Module") -> "Step":
    gain = norm_gain(norm, len(next(norm.parameters())))
    return lambda rows: rows * gain
