"""The causal check: what edits of features do to a quantity of the next token, on average over prompts, against chance.

What belongs here: that average, and random features of the same norm beside it. What does not: one prompt looked at closely
(`intervene.py`), or which features to check (`contrast.py`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import polars as pl

from scopeatlas.errors import ConfigError
from scopeatlas.hypotheses.metrics import interval, unit_weights
from scopeatlas.study.edits import Edit, Editor, decoder_rows
from scopeatlas.study.generation import Positions, Prompt, Within, generate, read_prompt, token_id, unedited
from scopeatlas.study.opening import OpenSae
from scopeatlas.study.texts import Text, as_texts
from scopeatlas.subject.vocabulary import token_texts

if TYPE_CHECKING:
    import torch
    from matplotlib.figure import Figure

CONTROLS = 20
ALPHA = 0.05
Estimate = tuple[float, float | None, float | None]
"""A mean and its 95 % interval."""
_MEAN = ("mean", "low", "high")


@dataclass(frozen=True, eq=False)
class CausalCheck:
    """What edits do to a quantity of the next token, on average over prompts, beside the same with random features.

    quantity: what was measured, in words. edits: EDIT_ROW over all prompts. prompts: prompt, clean, edited, change, control
    (the mean change under the controls). change and excess (change less control): means over prompts with 95 % intervals
    of a bootstrap over prompts, which are None for one prompt. controls: the mean change of each draw of random features.
    p_value: the share of draws, own counted among them, that move the quantity as far as the edits do, in either direction.
    """

    sae: str
    quantity: str
    edits: pl.DataFrame
    prompts: pl.DataFrame
    change: Estimate
    excess: Estimate
    controls: tuple[float, ...]
    p_value: float

    @property
    def is_more(self) -> bool | None:
        """Whether the edits move the quantity more than random features of the same norm do; None for one prompt.

        They do where they move it further than these on average, the interval of the excess leaves 0 out, so that other prompts
        would say so too, and the p-value is at most ALPHA, so that few features would.
        """
        excess, low, high = self.excess
        if low is None or high is None:
            return None
        further = abs(self.change[0]) > abs(self.change[0] - excess)
        return further and (low > 0 or high < 0) and self.p_value <= ALPHA

    @property
    def verdict(self) -> str:
        """In words, whether the edits do more than random features of the same norm do."""
        moved = f"the edits move {self.quantity} by {_said(self.change)}"
        beyond = f"by {_said(self.excess)} beyond random features of the same norm (p {self.p_value:.3g})"
        if self.is_more is None:
            return f"{moved}, {beyond}; one prompt has no interval: give more to tell whether it is more than chance"
        return f"{moved}, {'more' if self.is_more else 'no more'} than random features of the same norm: {beyond}"

    def to_polars(self) -> pl.DataFrame:
        """One row for each prompt."""
        return self.prompts

    def as_dict(self) -> dict[str, object]:
        """Everything, as JSON has it."""
        return {
            "sae": self.sae,
            "quantity": self.quantity,
            "edits": self.edits.to_dicts(),
            "prompts": self.prompts.to_dicts(),
            "change": dict(zip(_MEAN, self.change, strict=True)),
            "excess": dict(zip(_MEAN, self.excess, strict=True)),
            "controls": list(self.controls),
            "p_value": self.p_value,
            "is_more": self.is_more,
            "verdict": self.verdict,
        }

    def plot(self) -> "Figure":
        """The change in each prompt, and where random features would have moved it."""
        from scopeatlas.plots.interventions import changes_by_prompt

        return changes_by_prompt(self.prompts, self.controls, self.quantity)

    def _repr_html_(self) -> str:
        from scopeatlas.rendering.html import escaped, table

        shown = self.edits.select("feature", "name", "change", "value", "tokens", "fired")
        return (
            f"<p>{escaped(self.verdict)}</p>"
            + table(shown.columns, shown.rows(), caption=f"edits in {self.sae}")
            + table(self.prompts.columns, self.prompts.rows())
        )


def causal_check(
    opened: OpenSae,
    prompts: Text | Sequence[Text],
    *,
    edits: Sequence[Edit],
    tokens: Sequence[str | int],
    against: Sequence[str | int] = (),
    positions: Positions = "prompt",
    controls: int = CONTROLS,
    seed: int = 0,
) -> CausalCheck:
    """Whether features do what a contrast or a label suggests: the mean change of a quantity over prompts under `edits`.

    The quantity is the probability that the next token is one of `tokens`; with `against`, the log-odds of `tokens` over
    `against`, which for one token each is the difference of their logits. A control writes random features of the same
    encoder layer that have fired in the corpus in place of the edited ones, as long, and by as much at each token. A token
    that is named twice counts once. Of fewer than 1 / ALPHA - 1 controls nothing is more than chance.
    Raises ConfigError for no prompts or edits, a token that is none, or one measured against itself. Cost: 2 + controls passes over each prompt.
    """
    prompts = as_texts(prompts)
    if not prompts or not edits or not tokens or controls < 1:
        raise ConfigError("a causal check takes at least one prompt, one edit, one token and one control")
    if seed < 0:
        raise ConfigError(f"a seed is 0 or more, not {seed}")
    if positions == "generated":
        raise ConfigError("a causal check generates nothing: edit the prompt, or its last token")
    subject, dictionary = opened.subject, opened.probe.dictionary
    ids, others = (list(dict.fromkeys(token_id(subject, token) for token in given)) for given in (tokens, against))
    if set(ids) & set(others):
        both = token_texts(subject.tokenizer, sorted(set(ids) & set(others)))
        raise ConfigError(f"{', '.join(map(repr, both))} cannot be measured against itself: name it in one of the two")
    own = Editor(dictionary, subject.model, edits)
    drawn = [Editor(dictionary, subject.model, edits, rows=rows) for rows in _random_rows(opened, edits, controls, seed)]
    found = np.zeros((len(prompts), 2 + controls))
    for row, prompt in zip(found, prompts, strict=True):
        read = read_prompt(subject, prompt)
        ways: list[Within] = [unedited, own.over, *(editor.over for editor in drawn)]
        row[:] = [_measured(opened, read, way, positions, ids, others) for way in ways]
    change = found[:, 1:] - found[:, :1]
    weights = unit_weights(np.arange(len(prompts)), seed=seed)
    as_far = int((np.abs(change[:, 1:].mean(axis=0)) >= abs(change[:, 0].mean())).sum())
    return CausalCheck(
        sae=opened.key,
        quantity=_named(opened, ids, others),
        edits=own.report(opened),
        prompts=pl.DataFrame(
            {
                "prompt": range(len(prompts)),
                "clean": found[:, 0],
                "edited": found[:, 1],
                "change": change[:, 0],
                "control": change[:, 1:].mean(axis=1),
            }
        ),
        change=_mean(change[:, 0], weights),
        excess=_mean(change[:, 0] - change[:, 1:].mean(axis=1), weights),
        controls=tuple(change[:, 1:].mean(axis=0).tolist()),
        p_value=(1 + as_far) / (1 + controls),
    )


def _measured(
    opened: OpenSae, prompt: Prompt, within: Within, positions: Positions, tokens: list[int], against: list[int]
) -> float:
    """The quantity of a causal check on one prompt."""
    logits, _ = generate(opened.subject, prompt, tokens=0, within=within, positions=positions)
    log_p = logits.double().log_softmax(0)
    if not against:
        return float(log_p[tokens].exp().sum())
    return float(log_p[tokens].logsumexp(0) - log_p[against].logsumexp(0))


def _said(estimate: Estimate) -> str:
    mean, low, high = estimate
    return f"{mean:+.3g}" if low is None or high is None else f"{mean:+.3g} [{low:.3g}, {high:.3g}]"


def _named(opened: OpenSae, tokens: list[int], against: list[int]) -> str:
    first, second = (" or ".join(map(repr, token_texts(opened.subject.tokenizer, ids))) for ids in (tokens, against))
    return f"the log-odds of {first} over {second}" if against else f"the probability of {first}"


def _random_rows(opened: OpenSae, edits: Sequence[Edit], draws: int, seed: int) -> "list[dict[int, torch.Tensor]]":
    """For each draw, the decoder row of another feature in place of each edited one's, of the same norm (jointly, over the
    output sites). Raises ConfigError if no other feature of the layer has fired."""
    dictionary = opened.probe.dictionary
    rng = np.random.default_rng(seed)
    fired = np.flatnonzero(opened.rows["max_activation"].to_numpy() > 0)
    fired = np.setdiff1d(fired, [edit.feature for edit in edits])
    found: list[dict[int, torch.Tensor]] = [{} for _ in range(draws)]
    for edit in edits:
        layer, _ = dictionary.place(edit.feature)
        candidates = fired[fired // dictionary.features_per_layer == layer]
        if not len(candidates):
            raise ConfigError(f"no other feature beside {edit.feature} has fired in the corpus, so there is no control for it")
        own = decoder_rows(dictionary, edit.feature).norm()
        for rows, other in zip(found, rng.choice(candidates, draws), strict=True):
            drawn = decoder_rows(dictionary, int(other))
            rows[edit.feature] = drawn * (own / drawn.norm().clamp(min=1e-12))
    return found


def _mean(values: np.ndarray, weights: np.ndarray) -> Estimate:
    """The mean of values [n] and its 95 % interval, from the bootstrap weights [n, 1 + B] of `unit_weights`."""
    if len(values) == 1:
        return float(values[0]), None, None
    means = values @ weights / weights.sum(axis=0)
    low, high = interval(means[None, 1:])[0]
    return float(means[0]), float(low), float(high)
