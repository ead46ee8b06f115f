"""Splicing: the subject model's loss with a site left alone, replaced by a reconstruction, by its mean and by zero.

What belongs here: those losses on fixed tokens. What does not: what is made of them (`fidelity.py`).
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from scopeatlas.activations.reading import text_mask
from scopeatlas.corpus.build import Corpus
from scopeatlas.corpus.contexts import Contexts, join_contexts
from scopeatlas.corpus.documents import SPLITS
from scopeatlas.dictionaries.sparse import SparseDictionary
from scopeatlas.errors import CorpusError
from scopeatlas.runner.local import Log
from scopeatlas.subject.capture import batches, capture, editing, run_model
from scopeatlas.subject.loading import SubjectModel
from scopeatlas.subject.sites import Site

if TYPE_CHECKING:
    import torch

SPLICE_TOKENS = 4096
ABLATION_TOKENS = 1024
"""The ablations cost a forward pass with logits each and differ from the clean loss by whole nats: fewer tokens do."""
SPLICE_BATCH = 4

Replace = Callable[["Mapping[Site, torch.Tensor]"], "Mapping[Site, torch.Tensor]"]
"""From activations [batch, sequence, d] at the sites captured to what takes their place."""


class Splices:
    """Losses on fixed tokens, mean next-token cross-entropies in nats.

    The tokens are the report contexts of lowest id, so they are the same in every run and no SAE of ours trained on
    them. The clean loss is shared by all SAEs, the ablations by all SAEs of the same output sites. A dictionary of
    several output sites has all of them replaced at once, each by its reconstruction from the clean pass.
    """

    def __init__(self, corpus: Corpus, subject: SubjectModel, log: Log):
        self.corpus, self.subject, self.log = corpus, subject, log
        self._ablations: dict[tuple[Site, ...], tuple[float, float]] = {}
        self._clean: tuple[float, float] | None = None  # on all tokens, on those of the ablations

    @cached_property
    def contexts(self) -> Contexts:
        """The fixed tokens, read when something has to be measured on them."""
        return fixed_contexts(self.corpus, SPLICE_TOKENS)

    @property
    def tokens(self) -> np.ndarray:
        return self.contexts.tokens

    @cached_property
    def _is_text(self) -> np.ndarray:
        return text_mask(self.contexts, self.subject)

    @property
    def _few(self) -> np.ndarray:
        return self.tokens[: max(1, ABLATION_TOKENS // self.tokens.shape[1])]

    def losses(self, dictionary: SparseDictionary) -> dict[str, float | int]:
        """The loss figures of one dictionary, as `Fidelity` names them."""
        sites = dictionary.sites_out
        where = str(sites[0]) if len(sites) == 1 else f"{len(sites)} sites, {sites[0]} to {sites[-1]}"
        self.log(f"fidelity: splicing the reconstruction in at {where}, {self.tokens.size:,} tokens")
        if self._clean is None:
            per_context = self._losses(self.tokens)
            self._clean = _mean_loss(per_context, self.tokens), _mean_loss(per_context[: len(self._few)], self._few)
        if sites not in self._ablations:
            self._ablations[sites] = self._ablated(sites)
        clean, clean_few = self._clean
        mean_ablated, zero_ablated = (clean + loss - clean_few for loss in self._ablations[sites])

        def reconstruct(seen: "Mapping[Site, torch.Tensor]") -> "Mapping[Site, torch.Tensor]":
            x = [seen[site].flatten(0, 1) for site in dictionary.sites_in]
            shape = (*seen[dictionary.sites_in[0]].shape[:2], len(sites), dictionary.d_out)
            y = dictionary.decode(dictionary.encode(x), x).view(shape)
            return {site: y[:, :, output] for output, site in enumerate(sites)}

        spliced = _mean_loss(self._losses(self.tokens, dictionary.sites_in, reconstruct), self.tokens)
        return {
            "splice_tokens": int((self.tokens >= 0).sum()),
            "loss_clean": clean,
            "loss_spliced": spliced,
            "loss_mean_ablated": mean_ablated,
            "loss_zero_ablated": zero_ablated,
        }

    def _ablated(self, sites: Sequence[Site]) -> tuple[float, float]:
        """Losses on the few tokens with every site replaced by its mean, and by zero."""
        means = self._means(sites)

        def mean(seen: "Mapping[Site, torch.Tensor]") -> "Mapping[Site, torch.Tensor]":
            return {site: means[site].expand_as(seen[site]) for site in sites}

        def zero(seen: "Mapping[Site, torch.Tensor]") -> "Mapping[Site, torch.Tensor]":
            return {site: seen[site] * 0 for site in sites}

        return (
            _mean_loss(self._losses(self._few, sites, mean), self._few),
            _mean_loss(self._losses(self._few, sites, zero), self._few),
        )

    def _losses(self, tokens: np.ndarray, sites: Sequence[Site] = (), replace: Replace | None = None) -> np.ndarray:
        """Summed cross-entropy of each context, float64 [n], with what `replace` gives for the activations at `sites`.

        BOS and padding keep their activations.
        """
        import torch

        model, device = self.subject.model, self.subject.resolved_device
        sums = []
        for rows in batches(tokens, SPLICE_BATCH):
            batch = torch.from_numpy(tokens[rows]).long().to(device)
            mask = torch.from_numpy(self._is_text[rows]).to(device).unsqueeze(-1)
            with torch.no_grad(), ExitStack() as edits:
                if replace is not None:
                    for site, value in replace(capture(model, batch, sites)).items():
                        edits.enter_context(editing(model, site, _put(value, mask)))
                logits = run_model(model, batch, logits=True)
                targets = batch[:, 1:]
                # logsumexp and gather instead of cross_entropy: a quarter of a million logits a token are read, never copied.
                chosen = logits[:, :-1].gather(2, targets.clamp(min=0).unsqueeze(2)).squeeze(2)
                loss = torch.where(targets >= 0, logits[:, :-1].logsumexp(2) - chosen, 0.0)
            sums.append(loss.double().sum(1).cpu().numpy())
        return np.concatenate(sums)

    def _means(self, sites: Sequence[Site]) -> "dict[Site, torch.Tensor]":
        """The mean activation [d] at each site over the fixed tokens, BOS left out."""
        import torch

        total, count = dict.fromkeys(sites, 0.0), 0
        for rows in batches(self.tokens, SPLICE_BATCH):
            tokens = torch.from_numpy(self.tokens[rows]).long().to(self.subject.resolved_device)
            mask = torch.from_numpy(self._is_text[rows]).to(tokens.device)
            for site, acts in capture(self.subject.model, tokens, sites).items():
                total[site] = total[site] + acts[mask].double().sum(0)  # type: ignore[assignment]
            count += int(mask.sum())
        return {site: (total[site] / count).float() for site in sites}  # type: ignore[union-attr]


def _put(value: "torch.Tensor", mask: "torch.Tensor") -> "Callable[[torch.Tensor], torch.Tensor]":
    """An edit that puts `value` where `mask` holds."""
    import torch

    return lambda acts: torch.where(mask, value.to(acts.dtype), acts)


def _mean_loss(sums: np.ndarray, tokens: np.ndarray) -> float:
    return float(sums.sum() / (tokens[:, 1:] >= 0).sum())


def fixed_contexts(corpus: Corpus, tokens: int) -> Contexts:
    """The report contexts of lowest id, `tokens` tokens in all (fewer if there are not so many)."""
    every = join_contexts([corpus.contexts(shard) for shard in corpus.shards])
    report = np.flatnonzero(every.splits == SPLITS.index("report"))
    if not len(report):
        raise CorpusError("no report documents in the corpus: raise corpus.fraction or the report share of corpus.splits")
    chosen = report[np.argsort(every.ids[report], kind="stable")][: max(1, tokens // every.tokens.shape[1])]
    return every.take(np.sort(chosen))
