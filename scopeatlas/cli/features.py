"""`scopeatlas search`, `show` and `ls`: finding features and looking at them.

What belongs here: commands that read the atlas's rows. What does not: questions about new text (`trace.py` and the like).
"""

import os
import re

import click

from scopeatlas.cli.options import json_option, status_option, word_of
from scopeatlas.storage.uris import Location


@click.command()
@click.argument("query")
@click.option("-k", "k", type=click.IntRange(min=1), default=10, show_default=True, help="How many hits.")
@click.option("--sae", help="Only SAEs of this key, or whose keys begin with it or contain it.")
@click.option("--release", help="Only this release.")
@click.option("--layer", type=int, help="Only this layer.")
@click.option("--min-score", type=click.FloatRange(0, 1), help="Only labels with at least this F1.")
@status_option
@click.option("--method", callback=word_of("Method"), help="Only labels made this way: rule, llm, imported, human.")
@json_option
@click.pass_obj
def search(
    root: Location,
    query: str,
    k: int,
    sae: str | None,
    release: str | None,
    layer: int | None,
    min_score: float | None,
    status: str | None,
    method: str | None,
    as_json: bool,
) -> None:
    """Find the features whose descriptions mean most nearly what QUERY says."""
    # The embedder's progress bars would stand in the way of one line of text.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from dataclasses import asdict

    from scopeatlas.atlas.search import WEAK_SIMILARITY, open_reader
    from scopeatlas.rendering.features import print_hits
    from scopeatlas.rendering.text import console, print_json

    results = open_reader(root).search(
        query, k=k, sae=sae, release=release, layer=layer, min_score=min_score, status=status, method=method
    )
    if not as_json:
        print_hits(console(), results)
        return
    facts = {
        "query": query,
        "is_weak": results.is_weak,
        "best_similarity": results.best_similarity,
        "weak_below": WEAK_SIMILARITY,
    }
    print_json(facts | {"hits": [asdict(hit) for hit in results]})


def _feature_name(_ctx: click.Context, _parameter: click.Parameter, value: str) -> str:
    if not re.fullmatch(r"\d+(\.\d+)?", value):
        raise click.BadParameter(f"'{value}' is neither a feature's number nor, of a multi-layer SAE, LAYER.INDEX such as 7.123")
    return value


@click.command()
@click.argument("sae")
@click.argument("feature", callback=_feature_name)
@click.option("--examples", type=click.IntRange(min=1), default=5, show_default=True, help="Strongest windows per split.")
@click.option("--blind", is_flag=True, help="Only what a label may be proposed from: no label, no score, no held-out text.")
@json_option
@click.pass_obj
def show(root: Location, sae: str, feature: str, examples: int, blind: bool, as_json: bool) -> None:
    """Show one feature: its label, the test of it, and where it fires. SAE may be a part of a key; FEATURE is a number,
    or LAYER.INDEX of a crosscoder or CLT. Look with --blind before you annotate: who has seen the test cannot be tested."""
    from dataclasses import asdict

    from scopeatlas.atlas.search import open_reader
    from scopeatlas.evidence import blinded, read_evidence
    from scopeatlas.rendering.features import print_feature
    from scopeatlas.rendering.text import console, print_json
    from scopeatlas.storage.store import Store

    hit = open_reader(root).feature(sae, feature)
    evidence = read_evidence(Store(root), hit)
    if blind:
        hit, evidence = blinded(hit, evidence)
    if as_json:
        tables = {name: table.to_dicts() for name, table in vars(evidence).items() if name != "windows"}
        print_json({"feature": asdict(hit), **tables, "examples": [asdict(w) for w in evidence.windows]})
    else:
        print_feature(console(), hit, evidence, examples=examples)


@click.command("ls")
@click.argument("sae", required=False)
@status_option
@click.option("--limit", type=click.IntRange(min=1), default=50, show_default=True, help="Features on a page.")
@click.option("--offset", type=click.IntRange(min=0), default=0, help="Features to pass over.")
@json_option
@click.pass_obj
def list_features(root: Location, sae: str | None, status: str | None, limit: int, offset: int, as_json: bool) -> None:
    """List the SAEs of the atlas, or with SAE (or a part of its key) its features in order."""
    from scopeatlas.atlas.search import open_reader
    from scopeatlas.rendering.features import print_features
    from scopeatlas.rendering.stores import print_saes
    from scopeatlas.rendering.text import console, print_json

    atlas = open_reader(root)
    if sae is None:
        saes = atlas.saes()
        print_json(saes.to_dicts()) if as_json else print_saes(console(), saes)
        return
    key, features = atlas.features(sae, status=status)
    page = features.slice(offset, limit)
    if as_json:
        print_json({"sae": key, "total": features.height, "offset": offset, "features": page.to_dicts()})
    else:
        print_features(console(), key, page, offset=offset, total=features.height)
