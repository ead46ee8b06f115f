"""One feature as a page of a notebook: its label, the test of it beside its controls, and where it fires.

What belongs here: the arrangement. What does not: the pieces (`html.py`), or the same for a terminal (`features.py`).
"""

from typing import TYPE_CHECKING

from scopeatlas.rendering.features import score_line, title, where
from scopeatlas.rendering.html import escaped, image, raw, table, tokens
from scopeatlas.rendering.labels import ARMS, OUTCOMES, SCORERS
from scopeatlas.rendering.text import interval, quoted, share

if TYPE_CHECKING:
    from scopeatlas.evidence import FeaturePage

WINDOWS = 5
METRICS = ("f1", "balanced_accuracy", "auprc")


def page(found: "FeaturePage") -> str:
    """The page as HTML."""
    hit, evidence = found.hit, found.evidence
    facts = [
        ("status", f"{hit.status}, by {hit.method}" if hit.method else hit.status),
        ("tested", score_line(hit)),
        ("site", f"{where(hit.kind, hit.site, hit.site_out)} of {hit.model}"),
        ("fires on", f"{share(hit.density)}, up to {hit.max_activation:.3g}"),
        ("promotes", quoted(hit.promoted)),
        ("suppresses", quoted(hit.suppressed)),
    ]
    parts = [f"<b>{escaped(title(hit).plain)}</b><br><code>{escaped(hit.key)}</code>", table(("", ""), facts)]
    if not evidence.scores.is_empty():
        rows = [
            (SCORERS[r["scorer"]], ARMS[r["arm"]], *(interval(r[m], r[f"{m}_low"], r[f"{m}_high"]) for m in METRICS))
            for r in evidence.scores.iter_rows(named=True)
        ]
        parts.append(table(("tested by", "arm", "F1", "balanced accuracy", "AUPRC"), rows, caption="tests and controls"))
    if not evidence.outcomes.is_empty():
        rows = [(OUTCOMES[r["outcome"]], r["text"]) for r in evidence.outcomes.iter_rows(named=True)]
        parts.append(table(("", "the label on report documents"), rows))
    for split, meaning in (("report", "held out"), ("explain", "what labels are proposed from")):
        mine = [window for window in evidence.windows if window.split == split and window.kind == "top"][:WINDOWS]
        strips = [(window.peak, tokens(window.tokens, window.activations, largest=hit.max_activation)) for window in mine]
        if strips:
            parts.append(table(("peak", f"{split} documents: {meaning}"), strips))
    parts.append(raw(image(found.plot())))
    return "".join(parts)
