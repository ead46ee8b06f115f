"""Intervening: what a prompt's next token and continuation become when named features are ablated, set, scaled or steered.

What belongs here: one prompt with and without edits. What does not: edits themselves (`edits.py`), generation
(`generation.py`), or what edits do on average over prompts (`causal.py`).
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import numpy as np
import polars as pl

from scopeatlas.errors import ConfigError
from scopeatlas.study.edits import Edit, Editor
from scopeatlas.study.generation import Continuation, Positions, generate, read_prompt
from scopeatlas.study.opening import OpenSae
from scopeatlas.study.texts import Text
from scopeatlas.subject.vocabulary import token_texts

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CONTINUATION = 40
MOVED_TOKENS = 10
"""Of the risers, and of the fallers."""

NEXT_TOKEN_ROW = pl.Schema(
    {
        "token_id": pl.Int64,
        "token": pl.String,
        "clean": pl.Float64,  # probability
        "edited": pl.Float64,
        "change": pl.Float64,
        "log_ratio": pl.Float64,  # of edited to clean, in nats
    }
)


@dataclass(frozen=True, eq=False)
class Intervention:
    """A prompt with and without edits.

    tokens: of the prompt, without BOS; edited_tokens: which of them were edited. edits: what was done (EDIT_ROW).
    next_tokens: the MOVED_TOKENS tokens whose probability after the prompt rises most and those whose falls most, in order
    of the change (NEXT_TOKEN_ROW). kl: KL(clean || edited) of the next token, in nats. clean, edited: how the model goes on.
    """

    sae: str
    tokens: tuple[str, ...]
    edited_tokens: tuple[bool, ...]
    edits: pl.DataFrame
    next_tokens: pl.DataFrame
    kl: float
    clean: Continuation
    edited: Continuation

    def to_polars(self) -> pl.DataFrame:
        """The next tokens that the edits move most."""
        return self.next_tokens

    def as_dict(self) -> dict[str, object]:
        """Everything, as JSON has it."""
        return {
            "sae": self.sae,
            "tokens": list(self.tokens),
            "edited_tokens": list(self.edited_tokens),
            "edits": self.edits.to_dicts(),
            "next_tokens": self.next_tokens.to_dicts(),
            "kl": self.kl,
            "clean": asdict(self.clean),
            "edited": asdict(self.edited),
        }

    def plot(self) -> "Figure":
        """Bars of the change in probability of the tokens that rise and fall most."""
        from scopeatlas.plots.interventions import probability_changes

        return probability_changes(self.next_tokens)

    def _repr_html_(self) -> str:
        from scopeatlas.rendering.html import escaped, table, tokens

        marks = [float(was_edited) for was_edited in self.edited_tokens]
        shown = self.edits.select("feature", "name", "change", "value", "tokens", "before", "after")
        moved = self.next_tokens.select("token", "clean", "edited", "change")
        return (
            f"<p>{tokens(self.tokens, marks)}</p>"
            + table(shown.columns, shown.rows(), caption=f"edits in {self.sae}")
            + table(moved.columns, moved.rows(), caption=f"the next token's probability (KL {self.kl:.3g} nats)")
            + f"<p><b>clean</b> {escaped(self.clean.text)}</p><p><b>edited</b> {escaped(self.edited.text)}</p>"
        )


def intervene(
    opened: OpenSae,
    prompt: Text,
    *,
    edits: Sequence[Edit],
    positions: Positions = "all",
    tokens: int = CONTINUATION,
    temperature: float = 0.0,
    seed: int = 0,
) -> Intervention:
    """Read `prompt` and go on with it, once as it is and once with `edits` made at `positions`.

    What is not edited stays exactly as it is, the reconstruction error included (`Editor`). tokens: how many each
    continuation has at most; they are greedy, or drawn with the same `seed` above temperature 0.
    Raises ConfigError for no edits, an empty prompt or a position that is none, SubjectModelError for a site that cannot be
    edited. Cost: two passes over the prompt, two of one token for each that is generated.
    """
    subject = opened.subject
    if not edits:
        raise ConfigError("nothing to intervene with: name a feature to edit")
    read = read_prompt(subject, prompt)
    editor = Editor(opened.probe.dictionary, subject.model, edits)
    clean_logits, clean = generate(subject, read, tokens=tokens, temperature=temperature, seed=seed)
    edited_logits, edited = generate(
        subject, read, tokens=tokens, within=editor.over, positions=positions, temperature=temperature, seed=seed
    )
    log_clean, log_edited = (logits.double().log_softmax(0).cpu().numpy() for logits in (clean_logits, edited_logits))
    return Intervention(
        sae=opened.key,
        tokens=read.tokens,
        edited_tokens=tuple(read.edited(positions)[read.first :].tolist()),
        edits=editor.report(opened),
        next_tokens=_moved(opened, log_clean, log_edited),
        kl=float((np.exp(log_clean) * (log_clean - log_edited)).sum()),
        clean=clean,
        edited=edited,
    )


def _moved(opened: OpenSae, log_clean: np.ndarray, log_edited: np.ndarray) -> pl.DataFrame:
    """The tokens whose probability rises most and those whose falls most, of log-probabilities [vocabulary]."""
    clean, edited = np.exp(log_clean), np.exp(log_edited)
    change = edited - clean
    order = np.argsort(-change, kind="stable")
    ids = [int(i) for i in order[:MOVED_TOKENS] if change[i] > 0] + [int(i) for i in order[-MOVED_TOKENS:] if change[i] < 0]
    known = len(opened.subject.tokenizer)
    texts = token_texts(opened.subject.tokenizer, [i if i < known else -1 for i in ids])
    log_ratio = log_edited - log_clean
    rows = [(i, text, clean[i], edited[i], change[i], log_ratio[i]) for i, text in zip(ids, texts, strict=True)]
    return pl.DataFrame(rows, schema=NEXT_TOKEN_ROW, orient="row")
