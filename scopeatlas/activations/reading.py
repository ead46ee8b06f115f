"""Contexts through the subject model in batches: the activations of the positions that count, at some sites.

What belongs here: what the shared pass, the calibration of null directions and the probing of texts have in common. What
does not: what is encoded from those activations (`accumulators.py`, `nulls.py`, `probe.py`).
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from scopeatlas.corpus.contexts import Contexts
from scopeatlas.subject.capture import capture
from scopeatlas.subject.loading import SubjectModel

if TYPE_CHECKING:
    import torch

    from scopeatlas.subject.sites import Site


@dataclass(frozen=True)
class SiteBatch:
    """The tokens of one batch that count, T of them.

    acts: at each site [T, d], in the model's dtype, on its device. positions: int64 [T], their places in the flattened table of
    contexts.
    """

    acts: "dict[Site, torch.Tensor]"
    positions: np.ndarray


def text_mask(contexts: Contexts, subject: SubjectModel) -> np.ndarray:
    """Which positions [n, length] count in statistics: not padding, BOS (where a model has none, the first token), another
    special token or a chat template's."""
    counted = contexts.counted(subject.tokenizer.all_special_ids)
    if subject.tokenizer.bos_token_id is None:
        counted[:, 0] = False  # what BOS is elsewhere: the first token's norm is an outlier that no SAE was trained on
    return counted


def packed(lengths: np.ndarray, batch_tokens: int) -> Iterator[np.ndarray]:
    """Rows of contexts of like length together, longest first, as many at a time as make `batch_tokens` with their padding.

    lengths: int [n]. Yields int64 [rows], each row once, at least one at a time. It depends on nothing but the two arguments.
    """
    order = np.argsort(-lengths, kind="stable")
    start = 0
    while start < len(order):
        stop = start + max(1, batch_tokens // max(int(lengths[order[start]]), 1))
        yield order[start:stop]
        start = stop


def read_batches(contexts: Contexts, subject: SubjectModel, sites: "Collection[Site]") -> Iterator[SiteBatch]:
    """All contexts through the subject model, packed by length, one forward pass to the last site for each batch."""
    import torch

    device = subject.resolved_device
    counted, lengths, width = text_mask(contexts, subject), contexts.lengths(), contexts.tokens.shape[1]
    for rows in packed(lengths, subject.batch_tokens):
        longest = int(lengths[rows].max())
        seen = capture(subject.model, torch.from_numpy(contexts.tokens[rows, :longest]).long().to(device), sites)
        is_text = counted[rows, :longest]
        row, column = is_text.nonzero()
        mask = torch.from_numpy(is_text).to(device)
        acts = {site: acts_bsd[mask] for site, acts_bsd in seen.items()}
        yield SiteBatch(acts, rows[row] * width + column)
