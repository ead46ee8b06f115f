"""`scopeatlas compare` and `diff`: one feature beside another, one release beside another.

What belongs here: the two commands. What does not: what they find (`study/compare.py`, `study/diff.py`).
"""

import click

from scopeatlas.cli.options import feature_name, json_option
from scopeatlas.storage.uris import Location


@click.command()
@click.argument("sae_a")
@click.argument("feature_a", callback=feature_name)
@click.argument("sae_b")
@click.argument("feature_b", callback=feature_name)
@json_option
@click.pass_obj
def compare(root: Location, sae_a: str, feature_a: str, sae_b: str, feature_b: str, as_json: bool) -> None:
    """Compare two features: their decoder directions, where they fire, and each one's rule on the other. SAEs may be parts of
    keys; a feature is a number, or LAYER.INDEX of a crosscoder or CLT."""
    from scopeatlas.api import open_atlas
    from scopeatlas.rendering.compare import print_comparison
    from scopeatlas.rendering.text import console, print_json

    found = open_atlas(root).compare(sae_a, feature_a, sae_b, feature_b)
    print_json(found.as_dict()) if as_json else print_comparison(console(), found)


@click.command()
@click.argument("sae_a")
@click.argument("sae_b")
@click.option("--transfer", "transfer_labels", is_flag=True, help="Test SAE_A's labels on their matches in SAE_B.")
@click.option("--tokens", type=click.IntRange(min=1), help="Match on so many tokens at most (2**18 by default).")
@click.option("--examples", type=click.IntRange(min=0), default=5, show_default=True, help="Features shown of each status.")
@click.option("--plot", type=click.Path(dir_okay=False), help="Draw it into this PNG file.")
@json_option
@click.pass_obj
def diff(
    root: Location,
    sae_a: str,
    sae_b: str,
    transfer_labels: bool,
    tokens: int | None,
    examples: int,
    plot: str | None,
    as_json: bool,
) -> None:
    """Say what became of SAE_A's features in SAE_B: kept, changed, split, merged, vanished; and what appeared. The two may
    differ in seed, width, layer or fine-tune, as long as their models read the same tokens."""
    from scopeatlas.api import open_atlas
    from scopeatlas.plots.drawing import save
    from scopeatlas.rendering.compare import print_diff
    from scopeatlas.rendering.text import console, print_json
    from scopeatlas.study.shared_tokens import TOKENS

    found = open_atlas(root).diff(sae_a, sae_b, tokens=tokens or TOKENS, transfer_labels=transfer_labels)
    if plot:
        save(found.plot(), plot)
    print_json(found.as_dict()) if as_json else print_diff(console(), found, examples=examples)
