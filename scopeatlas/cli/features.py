"""`scopeatlas search`, `search-vector`, `similar`, `show` and `ls`: finding features and looking at them.

What belongs here: commands that read the atlas's rows. What does not: questions about new text (`trace.py` and the like).
"""

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from scopeatlas.cli.options import feature_name, json_option, plot_option, status_option, word_of
from scopeatlas.storage.uris import Location

if TYPE_CHECKING:
    import numpy as np

    from scopeatlas.atlas.hits import SearchResults
    from scopeatlas.atlas.search import SearchBy
    from scopeatlas.study.similar import SimilarBy

SEARCH_BY = ("hybrid", "dense", "label", "examples", "text", "token", "promoted")
SIMILAR_BY = ("meaning", "decoder", "coactivation")


@click.command()
@click.argument("query")
@click.option("--by", type=click.Choice(SEARCH_BY), default="hybrid", show_default=True, help="What is compared with QUERY.")
@click.option("-k", "k", type=click.IntRange(min=1), default=10, show_default=True, help="How many hits.")
@click.option("--offset", type=click.IntRange(min=0), default=0, help="Hits to pass over.")
@click.option(
    "--version", type=click.IntRange(min=1), help="Of the atlas, as --json says: pages of one search stay as they were."
)
@click.option("--sae", help="Only SAEs of this key, or whose keys begin with it or contain it.")
@click.option("--release", help="Only this release.")
@click.option("--layer", type=int, help="Only this layer.")
@click.option("--kind", help="Only this kind: sae, transcoder, crosscoder, clt.")
@click.option("--site", help="Only features that read a site with this in its name, such as mlp.")
@click.option("--min-score", type=click.FloatRange(0, 1), help="Only labels with at least this F1.")
@click.option("--min-score-low", type=click.FloatRange(0, 1), help="Only labels whose F1 has a 95 % interval from at least this.")
@click.option("--min-density", type=click.FloatRange(0, 1), help="Only features that fire on at least this share of tokens.")
@click.option("--max-density", type=click.FloatRange(0, 1), help="Only features that fire on at most this share of tokens.")
@click.option("--where", help="A further condition on the columns as SQL, such as \"lift > 0.2 AND label LIKE '%war%'\".")
@status_option
@click.option("--method", callback=word_of("Method"), help="Only labels made this way: rule, llm, imported, human.")
@json_option
@click.pass_obj
def search(
    root: Location,
    query: str,
    by: "SearchBy",
    min_density: float | None,
    max_density: float | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Find the features that QUERY is about.

    \b
    --by hybrid    label, examples and text together
         dense     label and examples together
         label     by meaning: what the feature is said to be
         examples  by meaning: the text that it fires on
         text      by words in labels, trigger tokens and promoted tokens
         token     features that fire on just this token
         promoted  features that promote just this token
    """
    # The embedder's progress bars would stand in the way of one line of text.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from scopeatlas.atlas.search import open_reader

    _print(open_reader(root).search(query, by=by, density=(min_density, max_density), **options), as_json)


@click.command()
@click.argument("sae")
@click.argument("feature", callback=feature_name)
@click.option("--by", type=click.Choice(SIMILAR_BY), default="meaning", show_default=True, help="What makes features alike.")
@click.option("-k", "k", type=click.IntRange(min=1), default=10, show_default=True, help="How many hits.")
@click.option("--offset", type=click.IntRange(min=0), default=0, help="Hits to pass over.")
@click.option("--within", help="Only SAEs of this key or a part of it. By decoder: one other SAE of the same model's sites.")
@json_option
@click.pass_obj
def similar(root: Location, sae: str, feature: str, by: "SimilarBy", as_json: bool, **options: Any) -> None:
    """Find features like FEATURE of SAE: by what their labels and examples mean, by the cosine of their decoder rows, or by
    the tokens on which both fire."""
    from scopeatlas.api import open_atlas

    _print(open_atlas(root).similar(sae, feature, by=by, **options), as_json)


@click.command("search-vector")
@click.argument("sae")
@click.argument("file", type=click.Path(dir_okay=False, allow_dash=True, path_type=Path))
@click.option("-k", "k", type=click.IntRange(min=1), default=10, show_default=True, help="How many hits.")
@click.option("--offset", type=click.IntRange(min=0), default=0, help="Hits to pass over.")
@json_option
@click.pass_obj
def search_vector(root: Location, sae: str, file: Path, as_json: bool, **options: Any) -> None:
    """Find the features of SAE whose decoder rows point most nearly where the vector in FILE does, such as a steering vector.
    FILE is .npy or a list of numbers as JSON (of an SAE that writes several sites a list for each); - is stdin, as JSON."""
    from scopeatlas.api import open_atlas

    vector = _vector(file)
    _print(open_atlas(root).by_vector(sae, vector, **options), as_json)


def _vector(file: Path) -> "np.ndarray":
    """The numbers in a file, float32. Raises ConfigError if it holds anything else."""
    import numpy as np

    from scopeatlas.errors import ConfigError

    try:
        if file.suffix == ".npy":
            return np.asarray(np.load(file, allow_pickle=False), dtype=np.float32)
        text = sys.stdin.read() if str(file) == "-" else file.read_text(encoding="utf-8")
        return np.asarray(json.loads(text), dtype=np.float32)
    except (OSError, ValueError, TypeError, EOFError) as error:
        said = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"no vector in {file}: {said}; give a .npy file or numbers as JSON, such as [0.5, -1]") from error


def _print(results: "SearchResults", as_json: bool) -> None:
    from scopeatlas.rendering.features import print_hits
    from scopeatlas.rendering.text import console, print_json

    print_json(results.as_dict()) if as_json else print_hits(console(), results)


@click.command()
@click.argument("sae")
@click.argument("feature", callback=feature_name)
@click.option("--examples", type=click.IntRange(min=1), default=5, show_default=True, help="Strongest windows per split.")
@click.option("--blind", is_flag=True, help="Only what a label may be proposed from: no label, no score, no held-out text.")
@plot_option
@json_option
@click.pass_obj
def show(root: Location, sae: str, feature: str, examples: int, blind: bool, plot: Path | None, as_json: bool) -> None:
    """Show one feature: its label, the test of it, and where it fires. SAE may be a part of a key; FEATURE is a number,
    or LAYER.INDEX of a crosscoder or CLT. Look with --blind before you annotate: who has seen the test cannot be tested."""
    from scopeatlas.atlas.search import open_reader
    from scopeatlas.evidence import FeaturePage, blinded, read_evidence
    from scopeatlas.plots.drawing import save
    from scopeatlas.rendering.features import print_feature
    from scopeatlas.rendering.text import console, print_json
    from scopeatlas.storage.store import Store

    hit = open_reader(root).feature(sae, feature)
    page = FeaturePage(hit, read_evidence(Store(root), hit))
    if blind:
        page = FeaturePage(*blinded(page.hit, page.evidence))
    print_json(page.as_dict()) if as_json else print_feature(console(), page.hit, page.evidence, examples=examples)
    if plot:
        save(page.plot(), plot)


@click.command("densities")
@click.argument("sae")
@plot_option
@json_option
@click.pass_obj
def show_densities(root: Location, sae: str, plot: Path | None, as_json: bool) -> None:
    """How often the features of SAE fire, as a histogram, and how many of them have labels."""
    from scopeatlas.atlas.search import open_reader
    from scopeatlas.plots.drawing import save
    from scopeatlas.rendering.features import print_densities
    from scopeatlas.rendering.text import console, print_json
    from scopeatlas.study.densities import densities

    found = densities(*open_reader(root).rows(sae))
    print_json(found.as_dict()) if as_json else print_densities(console(), found)
    if plot:
        save(found.plot(), plot)


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
