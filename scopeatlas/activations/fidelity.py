"""Fidelity: how much of the subject model an SAE keeps, from the pass's own moments and from splicing it in.

What belongs here: the figures, and the gate that blocks an SAE before anything is spent on labels. What does not: the
pass itself (`cache.py`).
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from scopeatlas.activations.cache import activation_keys, text_mask
from scopeatlas.activations.shards import read_shard
from scopeatlas.corpus.build import Corpus
from scopeatlas.corpus.documents import SPLITS
from scopeatlas.dictionaries.releases import SaeEntry, open_dictionary
from scopeatlas.dictionaries.sparse import SparseDictionary
from scopeatlas.errors import CorpusError
from scopeatlas.runner.local import Log, silent
from scopeatlas.storage.files import content_hash, read_json, write_json
from scopeatlas.storage.store import Store
from scopeatlas.subject.capture import batches, capture, editing, run_model
from scopeatlas.subject.loading import SubjectModel
from scopeatlas.subject.sites import Site

if TYPE_CHECKING:
    import torch

STAGE_VERSION = 2
SPLICE_TOKENS = 4096
ABLATION_TOKENS = 1024
"""The ablations cost a forward pass with logits each and differ from the clean loss by whole nats: fewer tokens do."""
SPLICE_BATCH = 4
DENSE_DENSITY = 0.1
MAX_L0_RATIO = 3.0
MAX_FVU = 1.0


@dataclass(frozen=True)
class Fidelity:
    """An SAE's figures over a corpus. Losses are mean next-token cross-entropies in nats on `splice_tokens` tokens.

    The ablated losses are measured on the first ABLATION_TOKENS of these tokens, as what they add to those tokens' clean
    loss. fvu: sum |y - y_hat|^2 / sum |y - mean(y)|^2 over unmasked tokens. l0: mean active features a token.
    report_fvu, report_l0: the same over report documents alone, which matters for an SAE that was trained on others
    of the corpus. dead: share of features that never fire; dense: share that fire on more than a tenth of the tokens.
    """

    tokens: int
    fvu: float
    l0: float
    report_fvu: float
    report_l0: float
    target_l0: float | None
    dead: float
    dense: float
    splice_tokens: int
    loss_clean: float
    loss_spliced: float
    loss_mean_ablated: float
    loss_zero_ablated: float

    @property
    def loss_added(self) -> float:
        return self.loss_spliced - self.loss_clean

    @property
    def recovered(self) -> float:
        """Share of the loss that zero-ablation destroys and the reconstruction keeps."""
        return 1 - self.loss_added / (self.loss_zero_ablated - self.loss_clean)

    @property
    def recovered_against_mean(self) -> float:
        """The same against mean-ablation, which destroys less and so is the harder yardstick."""
        return 1 - self.loss_added / (self.loss_mean_ablated - self.loss_clean)

    def blocks(self) -> str | None:
        """Why no money may be spent on this SAE's labels, or None."""
        if not self.fvu < MAX_FVU:  # NaN too
            return f"FVU {self.fvu:.2f} is no better than the mean: wrong site, normalisation or subject model?"
        if self.target_l0 and not 1 / MAX_L0_RATIO <= self.l0 / self.target_l0 <= MAX_L0_RATIO:
            return f"L0 {self.l0:.1f} is off the release's own {self.target_l0:g} by more than {MAX_L0_RATIO:g}x: wrong site or subject model?"
        return None


def measure_fidelity(
    store: Store,
    corpus: Corpus,
    entries: Sequence[SaeEntry],
    subject: SubjectModel,
    *,
    log: Log = silent,
) -> dict[str, Fidelity]:
    """Each SAE's fidelity over a finished activation cache; written to `fidelity.json`, and reused from there."""
    found: dict[str, Fidelity] = {}
    splices: _Splices | None = None
    for entry in entries:
        keys = activation_keys(corpus, entry, subject)
        identity = content_hash(STAGE_VERSION, SPLICE_TOKENS, ABLATION_TOKENS, [key.identity for key in keys])
        path = fidelity_path(store, corpus.id, entry.key)
        if path.exists() and (body := read_json(path))["identity"] == identity:
            found[entry.key] = Fidelity(**body["fidelity"])
            continue
        splices = splices or _Splices(corpus, subject, log)
        dictionary = open_dictionary(entry).to(subject.resolved_device)
        fidelity = Fidelity(
            **_moments(store, corpus, entry, subject),  # pyright: ignore[reportArgumentType]
            target_l0=dictionary.target_l0,
            **splices.losses(dictionary),
        )
        write_json(path, {"identity": identity, "fidelity": asdict(fidelity)})
        found[entry.key] = fidelity
    return found


def fidelity_path(store: Store, corpus_id: str, sae: str) -> Path:
    return store.stage(sae, corpus_id, "activations").root / "fidelity.json"


def read_fidelity(store: Store, corpus_id: str, sae: str) -> Fidelity | None:
    """The fidelity measured last, if any."""
    path = fidelity_path(store, corpus_id, sae)
    return Fidelity(**read_json(path)["fidelity"]) if path.exists() else None


def _moments(store: Store, corpus: Corpus, entry: SaeEntry, subject: SubjectModel) -> dict[str, float | int]:
    """FVU, L0, dead and dense shares from the records and moments of the shards."""
    stage = store.stage(entry.key, corpus.id, "activations")
    total: dict[str, np.ndarray] = {}
    width = open_dictionary(entry).width
    fired = np.zeros(width, dtype=np.int64)
    for key in activation_keys(corpus, entry, subject):
        stage.record(key)
        with np.load(stage.data_path(key, ".moments.npz")) as moments:
            total = {name: total.get(name, 0) + moments[name] for name in moments.files}
        fired += np.bincount(read_shard(stage.data_path(key, ".parquet")).feature, minlength=width)
    report = {name: moment[SPLITS.index("report")] for name, moment in total.items()}
    whole = {name: moment.sum(axis=0) for name, moment in total.items()}
    return {
        "tokens": int(whole["tokens"]),
        "fvu": _fvu(whole),
        "l0": float(whole["nonzeros"] / whole["tokens"]),
        "report_fvu": _fvu(report),
        "report_l0": float(report["nonzeros"] / max(report["tokens"], 1)),
        "dead": float((fired == 0).mean()),
        "dense": float((fired > DENSE_DENSITY * whole["tokens"]).mean()),
    }


def _fvu(moments: dict[str, np.ndarray]) -> float:
    variance = moments["sum_y2"] - np.square(moments["sum_y"]).sum() / max(moments["tokens"], 1)
    return float(moments["sum_error2"] / variance) if variance > 0 else float("nan")


class _Splices:
    """Losses on fixed tokens with the site left alone, replaced by the reconstruction, by the mean and by zero.

    The tokens are the report contexts of lowest id, so they are the same in every run and no SAE of ours trained on
    them. The clean loss is shared by all SAEs, the ablations by all SAEs of a site.
    """

    def __init__(self, corpus: Corpus, subject: SubjectModel, log: Log):
        self.subject, self.log = subject, log
        self.tokens = _fixed_tokens(corpus)
        self._few = self.tokens[: max(1, ABLATION_TOKENS // self.tokens.shape[1])]
        self._ablations: dict[Site, tuple[float, float]] = {}
        self._clean: tuple[float, float] | None = None  # on all tokens, on those of the ablations

    def losses(self, dictionary: SparseDictionary) -> dict[str, float | int]:
        """The loss figures of one dictionary, as `Fidelity` names them."""
        site = dictionary.site_out
        self.log(f"fidelity: splicing the reconstruction in at {site}, {self.tokens.size:,} tokens")
        if self._clean is None:
            per_context = self._losses(self.tokens)
            self._clean = _mean_loss(per_context, self.tokens), _mean_loss(per_context[: len(self._few)], self._few)
        if site not in self._ablations:
            mean = self._mean(site)
            self._ablations[site] = (
                _mean_loss(self._losses(self._few, site, lambda acts, _: mean.expand_as(acts)), self._few),
                _mean_loss(self._losses(self._few, site, lambda acts, _: acts * 0), self._few),
            )
        clean, clean_few = self._clean
        mean_ablated, zero_ablated = (clean + loss - clean_few for loss in self._ablations[site])

        def reconstruct(acts: "torch.Tensor", inputs: "torch.Tensor") -> "torch.Tensor":
            x = inputs.reshape(-1, inputs.shape[-1])
            return dictionary.decode(dictionary.encode(x), x).reshape(acts.shape)

        spliced = _mean_loss(self._losses(self.tokens, site, reconstruct, dictionary.site_in), self.tokens)
        return {
            "splice_tokens": int((self.tokens >= 0).sum()),
            "loss_clean": clean,
            "loss_spliced": spliced,
            "loss_mean_ablated": mean_ablated,
            "loss_zero_ablated": zero_ablated,
        }

    def _losses(
        self,
        tokens: np.ndarray,
        site: Site | None = None,
        replace: "Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None" = None,
        site_in: Site | None = None,
    ) -> np.ndarray:
        """Summed cross-entropy of each context, float64 [n], with `replace(activation, input activation)` at `site`.

        BOS and padding keep their activations.
        """
        import torch

        model, device = self.subject.model, self.subject.resolved_device
        sums = []
        for rows in batches(tokens, SPLICE_BATCH):
            batch = torch.from_numpy(tokens[rows]).long().to(device)
            mask = torch.from_numpy(text_mask(tokens[rows], self.subject)).to(device)
            with torch.no_grad():
                if site is None or replace is None:
                    logits = run_model(model, batch, logits=True)
                else:
                    inputs = capture(model, batch, [site_in])[site_in] if site_in and site_in != site else None
                    with editing(model, site, _masked(replace, mask, inputs)):
                        logits = run_model(model, batch, logits=True)
                targets = batch[:, 1:]
                # logsumexp and gather instead of cross_entropy: a quarter of a million logits a token are read, never copied.
                chosen = logits[:, :-1].gather(2, targets.clamp(min=0).unsqueeze(2)).squeeze(2)
                loss = torch.where(targets >= 0, logits[:, :-1].logsumexp(2) - chosen, 0.0)
            sums.append(loss.double().sum(1).cpu().numpy())
        return np.concatenate(sums)

    def _mean(self, site: Site) -> "torch.Tensor":
        """The mean activation at a site over the fixed tokens, BOS left out."""
        import torch

        total, count = 0.0, 0
        for rows in batches(self.tokens, SPLICE_BATCH):
            tokens = torch.from_numpy(self.tokens[rows]).long().to(self.subject.resolved_device)
            mask = torch.from_numpy(text_mask(self.tokens[rows], self.subject)).to(tokens.device)
            acts = capture(self.subject.model, tokens, [site])[site][mask].double()
            total, count = total + acts.sum(0), count + len(acts)
        return (total / count).float()  # type: ignore[union-attr]


def _masked(
    replace: "Callable[[torch.Tensor, torch.Tensor], torch.Tensor]", mask: "torch.Tensor", inputs: "torch.Tensor | None"
) -> "Callable[[torch.Tensor], torch.Tensor]":
    """An edit that replaces activations where `mask` holds; `inputs` are those of another site, if it reads one."""

    def edit(acts: "torch.Tensor") -> "torch.Tensor":
        import torch

        return torch.where(mask.unsqueeze(-1), replace(acts, acts if inputs is None else inputs).to(acts.dtype), acts)

    return edit


def _mean_loss(sums: np.ndarray, tokens: np.ndarray) -> float:
    return float(sums.sum() / (tokens[:, 1:] >= 0).sum())


def _fixed_tokens(corpus: Corpus) -> np.ndarray:
    """Tokens [n, length] of the report contexts of lowest id, SPLICE_TOKENS in all (fewer if there are not so many)."""
    loaded = [corpus.contexts(shard) for shard in corpus.shards]
    ids = np.concatenate([c.ids for c in loaded])
    splits = np.concatenate([c.splits for c in loaded])
    tokens = np.concatenate([c.tokens for c in loaded])
    report = np.flatnonzero(splits == SPLITS.index("report"))
    if not len(report):
        raise CorpusError("no report documents in the corpus: raise corpus.fraction or the report share of corpus.splits")
    chosen = report[np.argsort(ids[report], kind="stable")][: max(1, SPLICE_TOKENS // tokens.shape[1])]
    return tokens[np.sort(chosen)]
