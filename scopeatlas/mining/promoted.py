"""Promoted and suppressed output tokens: decoder rows through the final norm and the unembedding.

What belongs here: the direct effect of a feature on the output vocabulary (VocabProj in Gur-Arieh et al., ACL 2025;
"logit lens" elsewhere). What does not: what a feature adds to the residual stream (`writing.py`), or what a label makes
of the effect (`labels/`).
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from scopeatlas.dictionaries.sparse import SparseDictionary
from scopeatlas.mining.writing import norm_gain, stream_writer
from scopeatlas.subject.loading import SubjectModel

if TYPE_CHECKING:
    import torch
    from torch import nn

TOKENS = 10
TILE_FEATURES = 512


@dataclass(frozen=True)
class PromotedTokens:
    """Per feature the TOKENS output tokens it raises and lowers most.

    promoted, suppressed: int32 [F, TOKENS]. strength: float32 [F, TOKENS], the promoted tokens' effects in standard
    deviations of that feature's effects over the vocabulary; 0 for a feature that has none.
    """

    promoted: np.ndarray
    suppressed: np.ndarray
    strength: np.ndarray


def promoted_tokens(dictionary: SparseDictionary, subject: SubjectModel) -> PromotedTokens | None:
    """Effects on the logits, to first order: what a feature adds to the stream, through the final norm's gain, times the
    unembedding. None where what it adds cannot be expressed (`stream_writer`).

    Special and unused tokens are left out. Layers are opened one at a time, and only a tile of their decoder is ever
    moved or converted. Cost: one product [F, d] x [d, vocabulary], in tiles of features.
    """
    import torch

    write = stream_writer(dictionary, subject.model)
    if write is None:
        return None
    unembedding = subject.model.get_output_embeddings().weight  # pyright: ignore[reportOptionalMemberAccess]  # [vocabulary, d]
    norm = _final_norm(subject)
    gain = norm_gain(norm, unembedding.shape[1])
    readable = readable_tokens(subject, len(unembedding))
    promoted, suppressed, strength = [], [], []
    with torch.no_grad():
        for layer in dictionary.layers:
            for rows_nod in layer.row_tiles(TILE_FEATURES):
                rows = write(rows_nod.to(unembedding.device, torch.float32))
                if isinstance(norm, torch.nn.LayerNorm):
                    rows = rows - rows.mean(1, keepdim=True)
                effect = ((rows * gain).to(unembedding.dtype) @ unembedding.T).float()
                deviation, mean = torch.std_mean(effect, dim=1, keepdim=True)
                effect[:, ~readable] = torch.nan
                highest = effect.nan_to_num(nan=-torch.inf).topk(TOKENS, dim=1)
                lowest = effect.nan_to_num(nan=torch.inf).topk(TOKENS, dim=1, largest=False)
                promoted.append(highest.indices.int().cpu().numpy())
                suppressed.append(lowest.indices.int().cpu().numpy())
                # A row of zeros moves no token: 0 / 0 would count as a strength above any other.
                strength.append(((highest.values - mean) / deviation).nan_to_num(nan=0.0).cpu().numpy())
    return PromotedTokens(np.concatenate(promoted), np.concatenate(suppressed), np.concatenate(strength))


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
