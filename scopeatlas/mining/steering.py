"""Steering: how next-token probabilities change when a feature's decoder direction is added to the subject model's activations.

What belongs here: the measured effect of a feature on the output (TokenChange in Gur-Arieh et al., ACL 2025), and that of a
random direction beside it. What does not: the effect to first order (`promoted.py`), or a claim about it (`scoring/`).
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from scopeatlas.dictionaries.sparse import SparseDictionary
from scopeatlas.mining.promoted import readable_tokens
from scopeatlas.subject.capture import adding, batches, capture, editing, run_model
from scopeatlas.subject.loading import SubjectModel
from scopeatlas.subject.sites import Site

if TYPE_CHECKING:
    import torch

STEERING_SCALE = 1.0
"""Norm of what is added, in units of the mean norm of the activations that it is added to."""
BATCH_TOKENS = 128
"""Of prompts at a time: each token has a quarter of a million logits in float32."""


@dataclass(frozen=True)
class TokenChange:
    """What steering with one feature does. effects: float32 [prompts, vocabulary], the change in log-probability of each
    token as the next one, averaged over the positions of a prompt that were steered."""

    feature: int
    effects: np.ndarray


def token_changes(
    dictionary: SparseDictionary,
    subject: SubjectModel,
    prompts: np.ndarray,
    features: Sequence[int],
    *,
    scale: float = STEERING_SCALE,
) -> Iterator[TokenChange]:
    """Steer with each feature: its decoder row is added at its output site, at every position of every prompt.

    prompts: int [n, length], BOS in front, padded at the end with -1; special tokens are left alone. What is added has
    `scale` times the mean norm of the clean activations there, so that features are compared at equal strength. A CLT is
    added at all its output sites in the proportions of its rows; a crosscoder, whose outputs are states of one stream, at
    the last. Raises SubjectModelError for a site that cannot be edited. Cost: one forward pass with logits over the prompts
    per feature, and one for all.
    """
    steering = _Steering(dictionary, subject, prompts, scale)
    for feature in features:
        yield TokenChange(feature, steering.effects(steering.rows(feature)))


def random_direction_changes(
    dictionary: SparseDictionary,
    subject: SubjectModel,
    prompts: np.ndarray,
    features: Sequence[int],
    *,
    scale: float = STEERING_SCALE,
    seed: int = 0,
) -> Iterator[TokenChange]:
    """The control for `token_changes`: for each feature a random direction, uniform on the sphere, of the same norm at each
    site. It depends on `seed` and the feature alone."""
    steering = _Steering(dictionary, subject, prompts, scale)
    for feature in features:
        yield TokenChange(feature, steering.effects(_random_like(steering.rows(feature), [seed, feature])))


def added_outputs(dictionary: SparseDictionary) -> slice:
    """Where in `sites_out` what a feature writes is added: everywhere; of a crosscoder, whose outputs are states of one and
    the same stream, at the last alone."""
    return slice(-1 if dictionary.kind == "crosscoder" else 0, None)


def auroc_of_tokens(effects: np.ndarray, tokens: Sequence[int]) -> np.ndarray:
    """How often a claimed token gains more than another of the vocabulary, ties counted half: float32 [prompts].

    effects: [prompts, vocabulary] of a TokenChange. tokens: the claimed ids, at least one, not all.
    """
    claimed = list(dict.fromkeys(tokens))
    ranks = np.zeros(len(effects))
    for token in claimed:
        own = effects[:, token : token + 1]
        ranks += (effects < own).sum(axis=1) + ((effects == own).sum(axis=1) + 1) / 2
    positives, others = len(claimed), effects.shape[1] - len(claimed)
    return ((ranks - positives * (positives + 1) / 2) / (positives * others)).astype(np.float32)


def raised_tokens(change: TokenChange, subject: SubjectModel, *, count: int = 10) -> list[tuple[int, float]]:
    """The `count` tokens that steering raises most on average over prompts, special and unused ones left out, each with its
    change in log-probability."""
    mean = change.effects.mean(axis=0, dtype=np.float64)
    mean[~readable_tokens(subject, len(mean)).cpu().numpy()] = -np.inf
    best = np.argsort(-mean, kind="stable")[:count]
    return [(int(token), float(mean[token])) for token in best]


class _Steering:
    """The prompts with their clean log-probabilities, and the sites where a dictionary is added."""

    def __init__(self, dictionary: SparseDictionary, subject: SubjectModel, prompts: np.ndarray, scale: float):
        self.dictionary, self.subject, self.prompts, self.scale = dictionary, subject, prompts, scale
        self.outputs = added_outputs(dictionary)
        self.sites = dictionary.sites_out[self.outputs]
        self.steered = (prompts >= 0) & ~np.isin(prompts, subject.tokenizer.all_special_ids)
        self.norms = self._mean_norms()
        self.clean = self._log_probabilities({})

    def rows(self, feature: int) -> "torch.Tensor":
        """What the feature adds at each site, float32 [sites, d_out], of the norm that `scale` asks for."""
        layer, index = self.dictionary.place(feature)
        rows = self.dictionary.layers[layer].rows(index)[self.outputs].float().to(self.norms.device)
        written = rows.norm(dim=1) > 0
        if not written.any():
            return rows
        return rows * (self.scale * self.norms[written].norm() / rows.norm())

    def effects(self, rows: "torch.Tensor") -> np.ndarray:
        """The change of mean log-probabilities when `rows` [sites, d_out] are added: float32 [prompts, vocabulary]."""
        return self._log_probabilities(dict(zip(self.sites, rows, strict=True))) - self.clean

    def _mean_norms(self) -> "torch.Tensor":
        """The mean norm of the clean activations at each site over what is steered, float32 [sites]."""
        import torch

        total = torch.zeros(len(self.sites), device=self.subject.resolved_device)
        for tokens, mask in self._batches():
            seen = capture(self.subject.model, tokens, self.sites)
            total += torch.stack([seen[site][mask].float().norm(dim=1).sum() for site in self.sites])
        return total / self.steered.sum()

    def _log_probabilities(self, added: "Mapping[Site, torch.Tensor]") -> np.ndarray:
        """Mean next-token log-probabilities of each prompt over what is steered, float32 [prompts, vocabulary]."""
        import torch

        model, means = self.subject.model, []
        for tokens, mask in self._batches():
            with torch.no_grad(), ExitStack() as edits:
                for site, row in added.items():
                    edits.enter_context(editing(model, site, adding(row, mask)))
                logits = run_model(model, tokens, logits=True)
                weights = mask.float() / mask.sum(1, keepdim=True).clamp(min=1)
                mean = torch.einsum("bsv,bs->bv", logits, weights) - (logits.logsumexp(2) * weights).sum(1, keepdim=True)
            means.append(mean.cpu().numpy())
        return np.concatenate(means)

    def _batches(self) -> "Iterator[tuple[torch.Tensor, torch.Tensor]]":
        """Tokens int64 [b, length] and what of them is steered, bool [b, length]."""
        import torch

        device = self.subject.resolved_device
        for rows in batches(self.prompts, max(1, BATCH_TOKENS // self.prompts.shape[1])):
            yield torch.from_numpy(self.prompts[rows]).long().to(device), torch.from_numpy(self.steered[rows]).to(device)


def _random_like(rows: "torch.Tensor", seed: list[int]) -> "torch.Tensor":
    """Random directions of the norms of `rows` [sites, d]."""
    import torch

    drawn = torch.from_numpy(np.random.default_rng(seed).standard_normal(rows.shape, dtype=np.float32)).to(rows.device)
    return drawn * (rows.norm(dim=1, keepdim=True) / drawn.norm(dim=1, keepdim=True))
