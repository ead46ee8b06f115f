"""Contexts through the subject model in batches: the activations of the positions that count, at some sites.

What belongs here: what the shared pass, the calibration of null directions and the probing of texts have in common. What
does not: what is encoded from those activations (`cache.py`, `nulls.py`, `probe.py`).
"""

from collections.abc import Collection
from typing import TYPE_CHECKING

import numpy as np

from scopeatlas.corpus.contexts import Contexts
from scopeatlas.subject.capture import capture
from scopeatlas.subject.loading import SubjectModel

if TYPE_CHECKING:
    import torch

    from scopeatlas.subject.sites import Site

BATCH_CONTEXTS = 16


def text_mask(contexts: Contexts, subject: SubjectModel) -> np.ndarray:
    """Which positions [n, length] count in statistics: not padding, BOS (where a model has none, the first token), another
    special token or a chat template's."""
    counted = contexts.counted(subject.tokenizer.all_special_ids)
    if subject.tokenizer.bos_token_id is None:
        counted[:, 0] = False  # what BOS is elsewhere: the first token's norm is an outlier that no SAE was trained on
    return counted


def read_sites(
    contexts: Contexts, rows: slice, subject: SubjectModel, sites: "Collection[Site]"
) -> "tuple[dict[Site, torch.Tensor], np.ndarray]":
    """The activations [tokens, d] of some contexts at each site, of the positions that count, and those positions (of the
    flattened table, int64 [tokens]). One forward pass to the last site."""
    import torch

    device = subject.resolved_device
    seen = capture(subject.model, torch.from_numpy(contexts.tokens[rows]).long().to(device), sites)
    is_text = text_mask(contexts, subject)[rows]
    mask = torch.from_numpy(is_text).to(device)
    positions = np.flatnonzero(is_text) + rows.start * contexts.tokens.shape[1]
    return {site: acts_bsd[mask] for site, acts_bsd in seen.items()}, positions
