"""How features look: hits of a search, one feature with its evidence, pages of them.

What belongs here: from what the atlas and the store say of features to a terminal or a pipe. What does not: getting it.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from scopeatlas.dictionaries.sparse import MULTI_LAYER
from scopeatlas.rendering.labels import ARMS, OUTCOMES, SCORERS
from scopeatlas.rendering.text import interval, marked, number, plain, quoted, share, sites
from scopeatlas.subject.sites import parse_hook_points

if TYPE_CHECKING:
    import polars as pl

    from scopeatlas.atlas.hits import FeatureHit, SearchResults, Why
    from scopeatlas.evidence import FeatureEvidence, Window
    from scopeatlas.study.densities import Densities

SEARCH_SNIPPETS = 2
PLACES = {"text": "words", "token": "trigger", "promoted": "promoted", "coactivation": "fires with"}
"""Rankings, where they are not called by their own name."""
FIELDS = {"label": "label", "trigger_tokens": "trigger tokens", "promoted": "promoted tokens"}
BEST = {
    "label": "best similarity of a label",
    "label_with_word": "of one with a word in common",
    "examples": "of examples",
    "words": "share of the words in one feature",
}
BEST["text"] = BEST["words"]
SHOWN_SPLITS = {
    "report": "report documents: held out, what the label is scored on",
    "explain": "explain documents: what labels are proposed from",
}
TOP_PER_STRATUM = 4
"""One window from each stratum is shown for so many of the strongest."""
PARTNERS_SHOWN = 5
BAR = 50
"""Characters of the longest bar."""


def title(hit: "FeatureHit") -> Text:
    """A feature's label; where it has none, why, and the tokens it fires on."""
    if hit.label:
        return Text(plain(hit.label), style="bold")
    tokens = f"; fires on {quoted(hit.trigger_tokens)}" if hit.trigger_tokens else ""
    return Text(f"no label ({hit.status}){tokens}")


def score_line(hit: "FeatureHit") -> str:
    """What the test came to with its interval, and the control that says what it is worth."""
    if hit.f1 is None:
        return "not scored"
    return (
        f"F1 {interval(hit.f1, hit.f1_low, hit.f1_high)} against {number(hit.shuffled_f1)} of a shuffled label, balanced accuracy "
        f"{number(hit.balanced_accuracy)} against {number(hit.shuffled_balanced_accuracy)} ({SCORERS[hit.scorer]})"
    )


def where(kind: str, site: str, site_out: str) -> str:
    """What kind of feature it is, what it reads and, if that is another site, what it writes."""
    return f"{kind} at {site}" if site == site_out else f"{kind} reading {site}, writing {sites(_outputs(kind, site_out))}"


def _outputs(kind: str, site_out: str) -> list[str]:
    return [str(site) for site in parse_hook_points(site_out)] if kind in MULTI_LAYER else [site_out]


def _norms(hit: "FeatureHit") -> str:
    """The decoder norm at each output layer that a feature of a multi-layer kind writes to."""
    if hit.kind not in MULTI_LAYER:
        return ""
    norms = zip(parse_hook_points(hit.site_out), hit.decoder_norms, strict=True)
    return ", ".join(f"{norm:.3g} at layer {site.layer}" for site, norm in norms if norm > 0)


def why_line(why: "Why") -> str:
    """The rankings that a hit stands in with its place and value in each, and the query's words that it holds."""
    found = [f"{PLACES.get(name, name)} #{place.rank} ({place.value:.2f})" for name, place in why.places.items()]
    held = [f"{quoted(words)} in {FIELDS[field]}" for field, words in why.words.items()]
    return " · ".join([*found, *held])


def weakness(results: "SearchResults") -> str:
    """What the best of a search came to, each beside its cut-off; nothing passes the filters if there is no best."""
    if not results.nearest:
        return "no feature that passes the filters has anything of it"
    best, cutoffs = results.best, results.cutoffs
    return "; ".join(f"{said} {best[name]:.2f}, under {cutoffs[name]:.2f}" for name, said in BEST.items() if name in best)


def _shown(results: "SearchResults") -> "Sequence[FeatureHit]":
    """The hits, or where nothing was found what is nearest."""
    return results.nearest if results.is_weak else results.hits


def print_hits(out: Console, results: "SearchResults") -> None:
    """One block per hit; a weak search says so and shows what is nearest."""
    if results.is_weak:
        what = f'Nothing was found for "{plain(results.query)}": {weakness(results)}.'
        out.print(Text(what + (" The nearest, probably unrelated:\n" if results.nearest else "")), soft_wrap=True)
    elif not results.hits:
        out.print(Text(f'No further hits for "{plain(results.query)}" after {results.offset}.'), soft_wrap=True)
    for place, hit in enumerate(_shown(results), start=results.offset + 1):
        out.print(Text(f"{place:>3}   ").append(hit.key, style="cyan"), soft_wrap=True)
        out.print(Text("      ").append(title(hit)), soft_wrap=True)
        facts = (score_line(hit), f"fires on {share(hit.density)}", where(hit.kind, hit.site, hit.site_out))
        out.print(Text("      " + " · ".join(facts), style="dim"), soft_wrap=True)
        if hit.why:
            out.print(Text("      found by: " + why_line(hit.why), style="dim"), soft_wrap=True)
        for snippet in hit.snippets[:SEARCH_SNIPPETS]:
            out.print(Text("      ").append(marked(snippet)), soft_wrap=True)
        out.print()


def hits_html(results: "SearchResults") -> str:
    """The hits of a search as a table for a notebook."""
    from scopeatlas.rendering.html import escaped, raw, table

    of = f" of {results.found:,}" if results.found is not None else ""
    said = f'{len(results)}{of} features for "{results.query}"'
    if results.is_weak:
        said = f'nothing was found for "{results.query}": {weakness(results)}; the nearest'
    rows = []
    for place, hit in enumerate(_shown(results), start=results.offset + 1):
        snippets = [escaped(snippet).replace("«", "<b>«").replace("»", "»</b>") for snippet in hit.snippets[:SEARCH_SNIPPETS]]
        found = why_line(hit.why) if hit.why else ""
        rows.append(
            (place, hit.key, title(hit).plain, interval(hit.f1, hit.f1_low, hit.f1_high), found, raw("<br>".join(snippets)))
        )
    return table(("", "feature", "label", "F1", "found by", "fires on"), rows, caption=said)


def print_feature(out: Console, hit: "FeatureHit", evidence: "FeatureEvidence", *, examples: int) -> None:
    """Everything known of one feature."""
    out.print(Text(plain(hit.key), style="cyan"), soft_wrap=True)
    out.print(title(hit), soft_wrap=True)
    facts = [
        ("status", f"{hit.status}, by {hit.method}" if hit.method else hit.status),
        ("reads", hit.reads),
        ("writes", hit.writes),
        ("site", f"{where(hit.kind, hit.site, hit.site_out)} of {hit.model}"),
        ("norms", _norms(hit)),
        ("corpus", hit.corpus),
        ("fires on", f"{share(hit.density)}, up to {hit.max_activation:.3g}"),
        ("promotes", quoted(hit.promoted)),
        ("suppresses", quoted(hit.suppressed)),
        ("fires with", _partners(evidence.partners)),
    ]
    for name, value in facts:
        if value:
            out.print(Text(f"{name:<12}", style="dim").append(Text(plain(value), style="none")), soft_wrap=True)
    out.print()
    _print_scores(out, hit, evidence.scores)
    _print_outcomes(out, evidence)
    _print_windows(out, hit, evidence.windows, examples)


def _partners(partners: "pl.DataFrame") -> str:
    """The likest few, each with the share of the tokens on which either fires that are tokens of both."""
    return ", ".join(f"{row['partner']} ({row['jaccard']:.0%})" for row in partners.head(PARTNERS_SHOWN).iter_rows(named=True))


def _print_scores(out: Console, hit: "FeatureHit", scores: "pl.DataFrame") -> None:
    """Every test of the label shown: its own figures, and each control's, in one table."""
    if scores.is_empty():
        out.print(Text("not scored" if hit.f1 is None else score_line(hit)))
        return
    table = Table(box=None, pad_edge=False)
    for name in ("tested by", "arm", "F1", "balanced accuracy", "AUPRC", "AUROC", "on"):
        table.add_column(name, overflow="fold")
    order = _ordered(scores)
    for row in order:
        named = [
            interval(row[name], row[f"{name}_low"], row[f"{name}_high"]) for name in ("f1", "balanced_accuracy", "auprc", "auroc")
        ]
        what = f"{row['unit']}s of {row['documents']} documents" if row["status"] == "scored" else row["status"].replace("_", " ")
        own = row["arm"] == "own"
        scorer = f"{SCORERS[row['scorer']]}, {row['claim']}" if own else ""
        table.add_row(scorer, Text(ARMS[row["arm"]], style="bold" if own else "dim"), *named, what)
    out.print(table)


def _ordered(scores: "pl.DataFrame") -> list[dict[str, Any]]:
    """Rows by scorer, the label's own before its controls."""
    return sorted(
        scores.iter_rows(named=True), key=lambda row: (list(SCORERS).index(row["scorer"]), list(ARMS).index(row["arm"]))
    )


def _print_outcomes(out: Console, evidence: "FeatureEvidence") -> None:
    """Where the label was right and where it was not, next to each other; and what disproved a label."""
    if not evidence.outcomes.is_empty():
        out.print(Text("\nthe label on report documents", style="bold"))
        for outcome, meaning in OUTCOMES.items():
            for text in evidence.outcomes.filter(evidence.outcomes["outcome"] == outcome)["text"]:
                out.print(Text(f"  {meaning:<12}").append(marked(text)), soft_wrap=True)
    if not evidence.counter_examples.is_empty():
        out.print(Text("\npredictions that failed", style="bold"))
        for text, expected in evidence.counter_examples.select("text", "expected").iter_rows():
            out.print(Text(f"  {'silent' if expected else 'fires':<12}").append(plain(text)), soft_wrap=True)


def _print_windows(out: Console, hit: "FeatureHit", windows: Sequence["Window"], examples: int) -> None:
    if not windows:
        out.print("\nno examples in this store")
        for snippet in hit.snippets:
            out.print(Text("  ").append(marked(snippet)), soft_wrap=True)
        return
    for split, meaning in SHOWN_SPLITS.items():
        mine = [window for window in windows if window.split == split]
        top = [window for window in mine if window.kind == "top"][:examples]
        strata = [w for w in mine if w.kind == "stratum" and w.rank < math.ceil(examples / TOP_PER_STRATUM)]
        out.print(Text(f"\n{meaning}", style="bold"))
        if not mine:
            out.print("  it fires in none")
        for heading, group in (("strongest", top), ("from each quarter of its range", sorted(strata, key=lambda w: -w.peak))):
            if group:
                out.print(Text(f"  {heading}", style="dim"))
            for window in group:
                out.print(Text(f"  {window.peak:>8.3g}  ").append(_coloured(window, hit.max_activation)), soft_wrap=True)


def _coloured(window: "Window", largest: float) -> Text:
    """The window as one line, each token that fires on green as strong as its activation; «» for where there is no colour."""
    line, at = marked(window.text), 0
    for token, activation in zip(window.tokens, window.activations, strict=True):
        word = plain(" ".join(token.split()))
        start = line.plain.find(word, at) if word else -1
        if start < 0:
            continue
        at = start + len(word)
        if activation > 0:
            strength = min(1.0, activation / largest) if largest > 0 else 1.0
            line.stylize(f"white on rgb(0,{40 + round(110 * strength)},0)", start, at)
    return line


def print_features(out: Console, sae: str, page: "pl.DataFrame", *, offset: int, total: int) -> None:
    """One page of an SAE's features, each by its name."""
    table = Table(box=None, pad_edge=False)
    for name in ("feature", "status", "F1", "density", "label"):
        table.add_column(name, overflow="fold", justify="right" if name in {"feature", "F1", "density"} else "left")
    for row in page.iter_rows(named=True):
        numbers = (row["key"].rpartition("/")[2], row["status"], number(row["f1"]), f"{row['density'] * 100:.3g} %")
        table.add_row(*numbers, Text(plain(row["label"])))
    out.print(Text(sae, style="cyan"), soft_wrap=True)
    if page.height:
        first = page.row(0, named=True)
        out.print(Text(_heading(first["kind"], first["site"], first["site_out"]), style="dim"), soft_wrap=True)
        out.print(table)
    last = offset + page.height
    what = f"features {offset + 1:,} to {last:,} of {total:,}" if page.height else f"none of {total:,} features on this page"
    out.print(Text(what + (f"; --offset {last} shows more" if page.height and last < total else ""), style="dim"))


def _heading(kind: str, site: str, site_out: str) -> str:
    """What a page of features is of; those of a multi-layer kind read sites of their own."""
    if kind in MULTI_LAYER:
        return f"{kind} writing {sites(_outputs(kind, site_out))}; 7.123 is feature 123 of the encoder of layer 7"
    return where(kind, site, site_out)


def print_densities(out: Console, found: "Densities") -> None:
    """The histogram as bars of text: a hash for labelled features, a dot for the others."""
    out.print(Text(found.sae, style="cyan"), soft_wrap=True)
    most = max(found.bins["features"], default=1)
    for low, high, features, labelled in found.bins.iter_rows():
        bar = round(BAR * features / most)
        named = round(BAR * labelled / most)
        line = Text(f"{low:8.1e} to {high:7.1e}  {features:>7,}  {labelled:>7,}  ")
        out.print(line.append("#" * named, style="green").append("." * (bar - named), style="dim"), soft_wrap=True)
    out.print(
        Text(
            f"{found.features:,} features, {found.silent:,} never fired; by share of tokens, all and (#) with a label",
            style="dim",
        )
    )
    out.print(Text(", ".join(f"{status} {count:,}" for status, count in found.statuses.iter_rows()), style="dim"))
