"""Fidelity: how much of the subject model an SAE keeps, and the gate that blocks it before anything is spent on labels.

What belongs here: the figures and the verdict. What does not: the pass (`cache.py`), the losses (`splicing.py`), how
else an SAE might be read (`alternatives.py`).
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

from scopeatlas.activations.alternatives import PROBE_TOKENS, Fit, bf16_flips, try_alternatives
from scopeatlas.activations.cache import activation_keys
from scopeatlas.activations.shards import read_tiles
from scopeatlas.activations.splicing import ABLATION_TOKENS, SPLICE_TOKENS, Splices
from scopeatlas.corpus.build import Corpus
from scopeatlas.corpus.documents import SPLITS
from scopeatlas.dictionaries.releases import SaeEntry, open_dictionary
from scopeatlas.errors import NotReadyError, said
from scopeatlas.runner.local import Log, silent
from scopeatlas.storage.files import content_hash, read_json_if_there, write_json
from scopeatlas.storage.store import Store
from scopeatlas.storage.uris import Location, readable
from scopeatlas.subject.capture import counting_passes
from scopeatlas.subject.loading import SubjectModel

STAGE_VERSION = 3
DENSE_DENSITY = 0.1
MAX_L0_RATIO = 3.0
MAX_FVU = 1.0
CLEARLY_BETTER = 0.7
"""An alternative that leaves less than this share of the error as specified unexplained fits clearly better."""


@dataclass(frozen=True)
class Fidelity:
    """An SAE's figures over a corpus. Losses are mean next-token cross-entropies in nats on `splice_tokens` tokens.

    The ablated losses are measured on the first ABLATION_TOKENS of these tokens, as what they add to those tokens' clean
    loss. fvu: sum |y - y_hat|^2 / sum |y - mean(y)|^2 over unmasked tokens, pooled over output sites; fvu_per_output has
    it for each. l0: mean active features a token. report_fvu, report_l0: the same over report documents alone, which
    matters for an SAE that was trained on others of the corpus. target_l0, measured_l0: the release's own. dead: share of
    features that never fire; dense: share that fire on more than a tenth of the tokens. bf16_flips: share of activations
    that appear or disappear under bfloat16. fits: on PROBE_TOKENS, as specified and under each alternative reading.
    """

    tokens: int
    fvu: float
    fvu_per_output: list[float]
    l0: float
    report_fvu: float
    report_l0: float
    target_l0: float | None
    measured_l0: float | None
    dead: float
    dense: float
    bf16_flips: float
    fits: list[Fit]
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

    @property
    def expected_l0(self) -> float | None:
        """The release's own figure: what its publisher measured, or else what training aimed at."""
        return self.measured_l0 or self.target_l0

    def better_fit(self) -> Fit | None:
        """The alternative that fits clearly better than the specification, if there is one: the likeliest mistake."""
        if not self.fits:
            return None
        specified, *others = self.fits
        better = [fit for fit in others if fit.fvu < MAX_FVU and not self._is_off(fit.l0)]
        if np.isfinite(specified.fvu):
            better = [fit for fit in better if fit.relative_to(specified) < CLEARLY_BETTER]
        return min(better, key=lambda fit: fit.relative_to(specified), default=None)

    def _is_off(self, l0: float) -> bool:
        return bool(self.expected_l0) and not 1 / MAX_L0_RATIO <= l0 / self.expected_l0 <= MAX_L0_RATIO  # type: ignore[operator]

    def blocks(self) -> str | None:
        """Why no money may be spent on this SAE's labels, with the likeliest cause, or None."""
        better = self.better_fit()
        if not self.fvu < MAX_FVU:  # NaN too
            reason = f"FVU {self.fvu:.2f} is no better than the mean"
        elif self._is_off(self.l0):
            figure = "measured" if self.measured_l0 else "target"
            reason = f"L0 {self.l0:.1f} is off the release's own {figure} of {self.expected_l0:g} by more than {MAX_L0_RATIO:g}x"
        elif better is not None:
            reason = f"FVU {self.fits[0].fvu:.2f} and L0 {self.fits[0].l0:.1f} on {PROBE_TOKENS:,} tokens as specified"
        else:
            return None
        if better is None:
            return f"{reason}; no alternative tried fits better: another subject model, or a damaged file?"
        return f"{reason}; likeliest cause: it fits with {better.name} (FVU {better.fvu:.2f}, L0 {better.l0:.1f})"


@dataclass(frozen=True)
class FidelityResult:
    """What measuring gave: figures by SAE key; why others could not be measured; and the passes that it cost."""

    found: dict[str, Fidelity]
    failed: dict[str, str]
    forward_passes: int


def measure_fidelity(
    store: Store,
    corpus: Corpus,
    entries: Sequence[SaeEntry],
    subject: SubjectModel,
    *,
    log: Log = silent,
) -> FidelityResult:
    """Each SAE's fidelity over a finished activation cache; written to `fidelity.json`, and reused from there.

    An SAE that cannot be measured is named in `failed`; the others go on.
    """
    found: dict[str, Fidelity] = {}
    failed: dict[str, str] = {}
    splices = Splices(corpus, subject, log)
    with counting_passes() as made:
        for entry in entries:
            try:
                found[entry.key] = _fidelity(store, corpus, entry, subject, splices)
            except Exception as error:  # whatever it is, it is about this SAE alone
                failed[entry.key] = said(error)
    if made.passes:
        log(f"fidelity: {made.passes:,} forward passes of its own: clean, spliced, ablated, and for other readings")
    return FidelityResult(found, failed, made.passes)


def _fidelity(store: Store, corpus: Corpus, entry: SaeEntry, subject: SubjectModel, splices: Splices) -> Fidelity:
    keys = activation_keys(corpus, entry, subject)
    chosen = (SPLICE_TOKENS, ABLATION_TOKENS, PROBE_TOKENS)
    identity = content_hash(STAGE_VERSION, chosen, [key.identity for key in keys])
    path = fidelity_path(store, corpus.id, entry.key)
    body = read_json_if_there(path)
    if body is not None and body["identity"] == identity:
        return _from_json(body["fidelity"])
    dictionary = open_dictionary(entry).to(subject.resolved_device)
    fidelity = Fidelity(
        **_moments(store, corpus, entry, subject, dictionary.width),  # pyright: ignore[reportArgumentType]
        target_l0=dictionary.target_l0,
        measured_l0=dictionary.measured_l0,
        bf16_flips=bf16_flips(dictionary, splices.contexts, subject),
        fits=try_alternatives(dictionary, splices.contexts, subject),
        **splices.losses(dictionary),  # pyright: ignore[reportArgumentType]
    )
    write_json(path, {"identity": identity, "fidelity": asdict(fidelity)})
    return fidelity


def _from_json(body: dict) -> Fidelity:
    return Fidelity(**{**body, "fits": [Fit(**fit) for fit in body["fits"]]})


def fidelity_path(store: Store, corpus_id: str, sae: str) -> Location:
    return store.stage(sae, corpus_id, "activations").root / "fidelity.json"


def read_fidelity(store: Store, corpus_id: str, sae: str) -> Fidelity | None:
    """The fidelity measured last, if any."""
    body = read_json_if_there(fidelity_path(store, corpus_id, sae))
    if body is None or "fits" not in body["fidelity"]:  # an earlier version's is measured again
        return None
    return _from_json(body["fidelity"])


def _moments(
    store: Store, corpus: Corpus, entry: SaeEntry, subject: SubjectModel, width: int
) -> dict[str, float | int | list[float]]:
    """FVU, L0, dead and dense shares from the records and moments of the shards."""
    stage = store.stage(entry.key, corpus.id, "activations")
    total: dict[str, np.ndarray] = {}
    fired = np.zeros(width, dtype=np.int64)
    for key in activation_keys(corpus, entry, subject):
        path = stage.data_path(key, ".moments.npz")
        if path.name not in stage.record(key).files:
            raise NotReadyError(f"the activations of shard {key.name} were imported without the moments that fidelity needs")
        with np.load(readable(path)) as moments:
            total = {name: total.get(name, 0) + moments[name] for name in moments.files}
        for tile in read_tiles(stage.data_path(key, ".parquet")):
            fired += np.bincount(tile.feature, minlength=width)
    report = {name: moment[SPLITS.index("report")] for name, moment in total.items()}
    whole = {name: moment.sum(axis=0) for name, moment in total.items()}
    return {
        "tokens": int(whole["tokens"]),
        "fvu": _fvu(whole),
        "fvu_per_output": [
            _fvu({name: m if name == "tokens" else m[[output]] for name, m in whole.items() if name != "nonzeros"})
            for output in range(len(whole["sum_y2"]))
        ],
        "l0": float(whole["nonzeros"] / whole["tokens"]),
        "report_fvu": _fvu(report),
        "report_l0": float(report["nonzeros"] / max(report["tokens"], 1)),
        "dead": float((fired == 0).mean()),
        "dense": float((fired > DENSE_DENSITY * whole["tokens"]).mean()),
    }


def _fvu(moments: dict[str, np.ndarray]) -> float:
    """Pooled over the output sites that `moments` hold."""
    variance = moments["sum_y2"].sum() - np.square(moments["sum_y"]).sum() / max(moments["tokens"], 1)
    return float(moments["sum_error2"].sum() / variance) if variance > 0 else float("nan")
