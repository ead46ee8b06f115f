"""`scopeatlas trace` and `topics`: what fires in texts of one's own, and what these are about.

What belongs here: commands about given texts, one by one or as a batch. What does not: sets of texts against each other
(`contrast.py`), changing what the model does (`intervene.py`).
"""

from pathlib import Path

import click

from scopeatlas.cli.options import json_option, plot_option
from scopeatlas.storage.uris import Location

_FILE = click.option("--file", help="A file of texts: one a line, or .jsonl with text or messages; - is stdin.")


@click.command()
@click.argument("sae")
@click.argument("texts", nargs=-1)
@_FILE
@click.option(
    "--top", type=click.IntRange(min=1), default=5, show_default=True, help="Features named: with a label, and without."
)
@click.option("--min-activation", type=click.FloatRange(min=0), default=0.0, help="What fires less is taken not to fire.")
@json_option
@plot_option
@click.pass_obj
def trace(
    root: Location,
    sae: str,
    texts: tuple[str, ...],
    file: str | None,
    top: int,
    min_activation: float,
    as_json: bool,
    plot: Path | None,
) -> None:
    """Show which features fire in TEXTS, and how much of that their labels explain. SAE may be a part of a key; several of
    one subject model have commas between them. The «marked» tokens are where the features named under a text fire most."""
    from scopeatlas.api import open_atlas
    from scopeatlas.plots.drawing import save
    from scopeatlas.rendering.text import console, print_json
    from scopeatlas.rendering.trace import print_trace
    from scopeatlas.study.texts import texts_from

    read = texts_from(texts, file)
    traced = open_atlas(root).trace(read, sae=sae.split(","), top=top, min_activation=min_activation)
    if plot:
        save(traced.plot(), plot)
    if as_json:
        print_json(traced.as_dict())
    else:
        print_trace(console(), traced)


@click.command()
@click.argument("sae")
@click.argument("texts", nargs=-1)
@_FILE
@click.option("--distance", type=click.FloatRange(0, 2), help="Cosine distance at which topics are cut apart.  [default: 0.6]")
@click.option("--groups", help="A file with a known group's name for each text, one a line: how well do topics agree with them?")
@json_option
@plot_option
@click.pass_obj
def topics(
    root: Location,
    sae: str,
    texts: tuple[str, ...],
    file: str | None,
    distance: float | None,
    groups: str | None,
    as_json: bool,
    plot: Path | None,
) -> None:
    """Say what a batch of TEXTS is about: the features that fire in some of them and not in all, rolled up into topics by
    what they mean, and beside it words by TF-IDF, rolled up the same way."""
    from scopeatlas.api import open_atlas
    from scopeatlas.plots.drawing import save
    from scopeatlas.rendering.text import console, print_json
    from scopeatlas.rendering.topics import print_topics
    from scopeatlas.study.texts import lines_from, texts_from
    from scopeatlas.study.topics import DISTANCE

    read = texts_from(texts, file, every_line=groups is not None)
    known = None if groups is None else lines_from(groups, every_line=True)
    found = open_atlas(root).topics(read, sae=sae, distance=DISTANCE if distance is None else distance)
    agreement = None if known is None else found.agreement(known)
    if plot:
        save(found.plot(), plot)
    if as_json:
        print_json(found.as_dict() | ({} if agreement is None else {"agreement": agreement.to_dicts()}))
    else:
        print_topics(console(), found, agreement)
