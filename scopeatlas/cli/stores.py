"""`scopeatlas status`, `catalog`, `prune` and `rollback`: what a store holds, and what of it is live.

What belongs here: commands about a whole store. What does not: commands about features (`features.py`).
"""

import click

from scopeatlas.cli.options import json_option, store_at
from scopeatlas.storage.uris import Location


@click.command()
@json_option
@click.pass_obj
def status(root: Location, as_json: bool) -> None:
    """Where each SAE stands: its last finished stage, counts, size, and what failed."""
    from scopeatlas.rendering.stores import print_status
    from scopeatlas.rendering.text import console, print_json
    from scopeatlas.upkeep import status as read_status

    lines = read_status(store_at(root))
    if as_json:
        print_json([line.as_dict() for line in lines])
    elif lines:
        print_status(console(), lines)
    else:
        click.echo(f"no SAE is registered in {root}")


@click.command()
@click.option("--sae", help="Only this SAE, by its whole key.")
@click.option("--dry-run", is_flag=True, help="Only say what would be freed.")
@json_option
@click.pass_obj
def prune(root: Location, sae: str | None, dry_run: bool, as_json: bool) -> None:
    """Free the activations of published SAEs, and generations that newer ones replaced."""
    from scopeatlas.rendering.text import console, print_json, print_table
    from scopeatlas.storage.files import human_bytes
    from scopeatlas.upkeep import prune as free

    freed = free(store_at(root), sae=sae, dry_run=dry_run)
    if as_json:
        print_json({"dry_run": dry_run, "freed_bytes": freed, "total_bytes": sum(freed.values())})
    elif freed:
        print_table(console(), ((key, human_bytes(size)) for key, size in freed.items()))
        click.echo(f"{human_bytes(sum(freed.values()))} {'would be freed' if dry_run else 'freed'}")
    else:
        click.echo(f"nothing to free in {root}")


@click.command()
@click.option("--model", help="Only SAEs of this model: gemma-3-1b is both of google/gemma-3-1b-pt and -it.")
@click.option("--site", help="Only this site in the release's own word, such as resid_post; may be a glob.")
@click.option("--width", help="Only this width: 16k, 1m or a number.")
@click.option("--kind", help="Only this kind: sae, transcoder, crosscoder, clt.")
@click.option("--state", help="Only SAEs in this state: ready, registered, published, ...")
@click.option("--release", help="Only this release; may be a glob.")
@json_option
@click.pass_obj
def catalog(
    root: Location,
    model: str | None,
    site: str | None,
    width: str | None,
    kind: str | None,
    state: str | None,
    release: str | None,
    as_json: bool,
) -> None:
    """List every SAE that was ever seen, on the Hub or in a folder, and what became of it."""
    from scopeatlas.atlas.catalog import read_catalog
    from scopeatlas.rendering.stores import print_catalog
    from scopeatlas.rendering.text import console, print_json

    rows = read_catalog(store_at(root).root, model=model, site=site, width=width, kind=kind, state=state, release=release)
    if as_json:
        print_json(rows.to_dicts())
    elif rows.is_empty():
        click.echo("no SAE in the catalog matches")
    else:
        print_catalog(console(), rows)


@click.command()
@click.argument("sae")
@click.option("--to", help="A generation, or the beginning of its name [default: the one before what is live].")
@json_option
@click.pass_obj
def rollback(root: Location, sae: str, to: str | None, as_json: bool) -> None:
    """Publish the previous generation of SAE again. Other SAEs stay as they are; what was rolled back is not published again
    by a run unless its labels or scores have changed."""
    from scopeatlas.atlas.history import roll_back
    from scopeatlas.atlas.search import open_reader
    from scopeatlas.rendering.text import print_json

    key, _ = open_reader(root).published(sae)
    made = roll_back(store_at(root), key, to=to)
    if as_json:
        print_json({"sae": key, "generation": made.generation, "rows": made.rows, "table_version": made.table_version})
    else:
        click.echo(f"live now: generation {made.generation} of {key}, {made.rows:,} features")
