"""Promoted and suppressed output tokens: decoder rows through the final norm and the unembedding.

What belongs here: the direct effect of a feature on the output vocabulary (VocabProj in Gur-Arieh et al., ACL 2025;
"logit lens" elsewhere). What does not: what a label makes of it (`labels/`).
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from scopeatlas.dictionaries.sparse import SparseDictionary
from scopeatlas.subject.loading import SubjectModel

if TYPE_CHECKING:
    import torch

TOKENS = 10
TILE_FEATURES = 512


@dataclass(frozen=True)
class PromotedTokens:
    """Per feature the TOKENS output tokens it raises and lowers most.

    promoted, suppressed: int32 [F, TOKENS]. strength: float32 [F, TOKENS], the promoted tokens' effects in standard
    deviations of that feature's effects over the vocabulary.
    """

    promoted: np.ndarray
    suppressed: np.ndarray
    strength: np.ndarray


def promoted_tokens(dictionary: SparseDictionary, subject: SubjectModel) -> PromotedTokens | None:
    """Effects on the logits, to first order: rows of w_dec, times the final norm's gain, times the unembedding.

    None for a dictionary that does not write into the residual stream (its output is of another size). Special and
    unused tokens are left out. Cost: one product [F, d] x [d, vocabulary], in tiles of features.
    """
    import torch

    unembedding = subject.model.get_output_embeddings().weight  # pyright: ignore[reportOptionalMemberAccess]  # [vocabulary, d]
    if unembedding.shape[1] != dictionary.d_out:
        return None
    gain = _final_norm_gain(subject)
    readable = _readable_tokens(subject, len(unembedding))
    promoted, suppressed, strength = [], [], []
    with torch.no_grad():
        for start in range(0, dictionary.width, TILE_FEATURES):
            rows = dictionary.w_dec[start : start + TILE_FEATURES] * gain
            effect = (rows.to(unembedding.dtype) @ unembedding.T).float()
            deviation, mean = torch.std_mean(effect, dim=1, keepdim=True)
            effect[:, ~readable] = torch.nan
            highest = effect.nan_to_num(nan=-torch.inf).topk(TOKENS, dim=1)
            lowest = effect.nan_to_num(nan=torch.inf).topk(TOKENS, dim=1, largest=False)
            promoted.append(highest.indices.int().cpu().numpy())
            suppressed.append(lowest.indices.int().cpu().numpy())
            strength.append(((highest.values - mean) / deviation).cpu().numpy())
    return PromotedTokens(np.concatenate(promoted), np.concatenate(suppressed), np.concatenate(strength))


def _final_norm_gain(subject: SubjectModel) -> "torch.Tensor":
    """The gain [d] of the norm before the unembedding, whatever its convention (Gemma's is 1 + weight).

    An RMS norm maps the unit vector e_i to sqrt(d) * gain_i * e_i, which gives the gain without reading its weights.
    """
    import torch

    base = subject.model.base_model
    text = getattr(base, "language_model", base)
    norm = next(getattr(text, name) for name in ("norm", "ln_f", "final_layer_norm") if hasattr(text, name))
    d = subject.model.get_output_embeddings().weight.shape[1]  # pyright: ignore[reportOptionalMemberAccess]
    identity = torch.eye(d, device=subject.resolved_device, dtype=subject.resolved_dtype)
    with torch.no_grad():
        return norm(identity).diagonal().float() / d**0.5


def _readable_tokens(subject: SubjectModel, vocabulary: int) -> "torch.Tensor":
    import torch

    special = set(subject.tokenizer.all_special_ids)
    strings = subject.tokenizer.convert_ids_to_tokens(list(range(min(vocabulary, len(subject.tokenizer)))))
    unused = [i for i, s in enumerate(strings) if i in special or s is None or s.startswith("<unused") or "�" in s]
    readable = torch.zeros(vocabulary, dtype=torch.bool, device=subject.resolved_device)
    readable[: len(strings)] = True
    readable[unused] = False
    return readable
