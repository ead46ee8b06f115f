"""`scopeatlas contrast`: what differs between two sets of texts.

What belongs here: the command about two sets. What does not: texts one by one (`trace.py`), two SAEs (`compare.py`).
"""

import click

from scopeatlas.cli.options import json_option
from scopeatlas.storage.uris import Location


@click.command()
@click.argument("sae")
@click.argument("a")
@click.argument("b")
@click.option("--pairs", is_flag=True, help="The n-th text of A belongs to the n-th of B.")
@click.option("--permutations", type=click.IntRange(min=1), default=10_000, show_default=True, help="Of the documents, at most.")
@click.option(
    "--alpha",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    default=0.05,
    show_default=True,
    help="The chance of any false report.",
)
@click.option(
    "--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of permutations, folds and bootstrap draws."
)
@click.option(
    "--top", type=click.IntRange(min=1), default=20, show_default=True, help="Features printed or drawn; --json has all."
)
@json_option
@click.option("--plot", type=click.Path(dir_okay=False), help="Draw a forest plot into this PNG file.")
@click.pass_obj
def contrast(
    root: Location,
    sae: str,
    a: str,
    b: str,
    pairs: bool,
    permutations: int,
    alpha: float,
    seed: int,
    top: int,
    as_json: bool,
    plot: str | None,
) -> None:
    """Show which features differ between the texts of file A and those of file B, beside words, a linear probe and the texts'
    length. A file has one text a line, or is .jsonl with text or messages. SAE may be a part of a key."""
    from scopeatlas.api import open_atlas
    from scopeatlas.plots.drawing import save
    from scopeatlas.rendering.contrast import print_contrast
    from scopeatlas.rendering.text import console, print_json
    from scopeatlas.study.texts import texts_from

    first, second = (texts_from((), file, every_line=pairs) for file in (a, b))
    found = open_atlas(root).contrast(first, second, sae=sae, pairs=pairs, permutations=permutations, seed=seed, alpha=alpha)
    if plot:
        save(found.plot(top=top), plot)
    if as_json:
        print_json(found.as_dict())
    else:
        print_contrast(console(), found, top=top)
