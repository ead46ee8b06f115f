"""Promoted and suppressed output tokens: decoder rows through the final norm and the unembedding.

What belongs here: the direct effect of a feature on the output vocabulary (VocabProj in Gur-Arieh et al., ACL 2025;
"logit lens" elsewhere). What does not: what a feature adds to the residual stream (`writing.py`), keeping it
(`outputs.py`), or what a label makes of the effect (`labels/`).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from scopeatlas.dictionaries.sparse import SparseDictionary
from scopeatlas.mining.writing import norm_gain, stream_writer
from scopeatlas.subject.loading import SubjectModel

if TYPE_CHECKING:
    import torch
    from torch import nn

    Effects = Callable[[torch.Tensor], torch.Tensor]
    Promotion = Callable[[torch.Tensor], "PromotedTokens"]

TOKENS = 10
TILE_FEATURES = 256
BLOCK = 512
"""Tokens of which only the strongest effect is looked at first."""


@dataclass(frozen=True)
class PromotedTokens:
    """Per feature the TOKENS output tokens it raises and lowers most.

    promoted, suppressed: int32 [F, TOKENS]. strength: float32 [F, TOKENS], the promoted tokens' effects in standard
    deviations of that feature's effects over the vocabulary; 0 for a feature that has none.
    """

    promoted: np.ndarray
    suppressed: np.ndarray
    strength: np.ndarray


def logit_effects(dictionary: SparseDictionary, subject: SubjectModel) -> "Effects | None":
    """From decoder rows [n, L_out, d_out] of `dictionary` to their effects on the logits, float32 [n, vocabulary].

    To first order: what a feature adds to the stream, through the final norm's gain, times the unembedding. None where what
    a feature adds cannot be expressed (`stream_writer`).
    """
    import torch

    write = stream_writer(dictionary, subject.model)
    if write is None:
        return None
    unembedding = subject.model.get_output_embeddings().weight  # pyright: ignore[reportOptionalMemberAccess]  # [vocabulary, d]
    norm = _final_norm(subject)
    gain = norm_gain(norm, unembedding.shape[1])

    def effects(rows_nod: "torch.Tensor") -> "torch.Tensor":
        with torch.no_grad():
            rows = write(rows_nod.to(unembedding.device, torch.float32))
            if isinstance(norm, torch.nn.LayerNorm):
                rows = rows - rows.mean(1, keepdim=True)
            return ((rows * gain).to(unembedding.dtype) @ unembedding.T).float()

    return effects


def promotion(dictionary: SparseDictionary, subject: SubjectModel) -> "Promotion | None":
    """From decoder rows [n, L_out, d_out] of `dictionary` to what they promote: the extremes of `logit_effects`, and None where
    there are none. Special and unused tokens are left out. Cost: one product [n, d] x [d, vocabulary], in tiles of
    TILE_FEATURES.
    """
    import torch

    effects = logit_effects(dictionary, subject)
    if effects is None:
        return None
    vocabulary = len(subject.model.get_output_embeddings().weight)  # pyright: ignore[reportOptionalMemberAccess]
    unreadable = (~readable_tokens(subject, vocabulary)).nonzero().squeeze(1)

    def promoted(rows_nod: "torch.Tensor") -> PromotedTokens:
        with torch.no_grad():
            tiles = [_of_tile(tile) for tile in rows_nod.split(TILE_FEATURES)]
        return PromotedTokens(*(torch.cat(column).cpu().numpy() for column in zip(*tiles, strict=True)))

    def _of_tile(rows_nod: "torch.Tensor") -> "tuple[torch.Tensor, ...]":
        effect = effects(rows_nod)
        deviation, mean = torch.std_mean(effect, dim=1, keepdim=True)
        highest, raised = _largest(effect.index_fill_(1, unreadable, -torch.inf))
        _, lowered = _largest(effect.index_fill_(1, unreadable, torch.inf).neg_())
        # A row of zeros moves no token: 0 / 0 would count as a strength above any other.
        return raised.int(), lowered.int(), ((highest - mean) / deviation).nan_to_num(nan=0.0)

    return promoted


def promoted_tokens(dictionary: SparseDictionary, subject: SubjectModel) -> PromotedTokens | None:
    """`promotion` of every feature. Layers are opened one at a time, and only a tile of a decoder is moved or converted."""
    promoted = promotion(dictionary, subject)
    if promoted is None:
        return None
    tiles = [promoted(rows) for layer in dictionary.layers for rows in layer.row_tiles(TILE_FEATURES)]
    columns = zip(*((tile.promoted, tile.suppressed, tile.strength) for tile in tiles), strict=True)
    return PromotedTokens(*(np.concatenate(column) for column in columns))


def _largest(effect: "torch.Tensor") -> "tuple[torch.Tensor, torch.Tensor]":
    """The TOKENS largest of each row [n, vocabulary] and where they are, both [n, TOKENS], largest first.

    They lie in the TOKENS blocks of the largest maxima: finding those reads each effect once, where sorting it would cost
    more than the product that it comes from.
    """
    import torch

    whole = effect.shape[1] // BLOCK * BLOCK
    blocks = min(TOKENS, whole // BLOCK)
    best = effect[:, :whole].unflatten(1, (-1, BLOCK)).amax(2).topk(blocks, dim=1).indices
    inside = (best.unsqueeze(2) * BLOCK + torch.arange(BLOCK, device=effect.device)).flatten(1)
    rest = torch.arange(whole, effect.shape[1], device=effect.device).expand(len(effect), -1)
    at = torch.cat([inside, rest], dim=1)
    value, place = effect.gather(1, at).topk(TOKENS, dim=1)
    return value, at.gather(1, place)


def _final_norm(subject: SubjectModel) -> "nn.Module":
    """The norm before the unembedding."""
    base = subject.model.base_model
    text = getattr(base, "language_model", base)
    return next(getattr(text, name) for name in ("norm", "ln_f", "final_layer_norm") if hasattr(text, name))


def readable_tokens(subject: SubjectModel, vocabulary: int) -> "torch.Tensor":
    import torch

    special = set(subject.tokenizer.all_special_ids)
    strings = subject.tokenizer.convert_ids_to_tokens(list(range(min(vocabulary, len(subject.tokenizer)))))
    unused = [i for i, s in enumerate(strings) if i in special or s is None or s.startswith("<unused") or "�" in s]
    readable = torch.zeros(vocabulary, dtype=torch.bool, device=subject.resolved_device)
    readable[: len(strings)] = True
    readable[unused] = False
    return readable
