"""`scopeatlas annotate`, `history`, `report` and `spent`: what is said of features, and what testing that showed and cost.

What belongs here: commands about labels. What does not: the group they belong to and its errors (`__init__.py`).
"""

from typing import Any

import click

from scopeatlas.cli.options import feature_name, json_option
from scopeatlas.errors import NotReadyError
from scopeatlas.storage.uris import Location


@click.command()
@click.argument("sae")
@click.argument("feature")
@click.argument("reads", default="")
@click.option("--writes", default="", help="What the feature promotes in the output.")
@click.option("--label", default="", help="A few words; by default the first of READS.")
@click.option("--author", default="", help="Who says so; each author has one label of a feature.")
@click.option("--retract", is_flag=True, help="Take this author's label back instead.")
@json_option
@click.pass_obj
def annotate(
    root: Location, sae: str, feature: str, reads: str, writes: str, label: str, author: str, retract: bool, as_json: bool
) -> None:
    """Write down what FEATURE of SAE READS, in your own words. It is tested like any other label when the labels are next
    made (make run, or `scopeatlas label`)."""
    from scopeatlas.atlas.search import open_reader
    from scopeatlas.labels import annotations
    from scopeatlas.rendering.text import print_json
    from scopeatlas.storage.store import Store

    hit = open_reader(root).feature(sae, feature)
    there = Store(root), hit.corpus, hit.sae, hit.feature
    if retract:
        said = annotations.retract(*there, author=author)
    else:
        said = annotations.annotate(*there, reads=reads, writes=writes, label=label, author=author)
    if as_json:
        claim = {name: getattr(said, name) for name in ("label_id", "version", "label", "reads", "writes")}
        print_json({"key": hit.key, **claim, "retracted": retract})
    else:
        click.echo(f"taken back: {hit.key}: {said.reads or said.writes}" if retract else f"{hit.key}: {said.label}")


@click.command()
@click.argument("sae")
@click.argument("feature", callback=feature_name)
@json_option
@click.pass_obj
def history(root: Location, sae: str, feature: str, as_json: bool) -> None:
    """What FEATURE of SAE was said to be, publication by publication, and every label it was ever given with its test."""
    from scopeatlas.api import open_atlas
    from scopeatlas.rendering.labels import print_history
    from scopeatlas.rendering.text import console, print_json

    found = open_atlas(root).history(sae, feature)
    print_json(found.as_dict()) if as_json else print_history(console(), found)


@click.command()
@click.argument("sae")
@click.option(
    "--examples", type=click.IntRange(min=0), default=0, help="Also so many labels, drawn at random, with hits and misses."
)
@click.option("--seed", type=int, default=0, show_default=True, help="Of that draw.")
@json_option
@click.pass_obj
def report(root: Location, sae: str, examples: int, seed: int, as_json: bool) -> None:
    """Say how many features of SAE have a label, why the others have none, and how the labels fare beside every control."""
    from scopeatlas.atlas.search import open_reader
    from scopeatlas.rendering.labels import print_labels
    from scopeatlas.rendering.text import console, print_json
    from scopeatlas.scoring.report import read_report
    from scopeatlas.storage.store import Store
    from scopeatlas.upkeep import record_in_use

    key, corpus = open_reader(root).published(sae)
    record = record_in_use(Store(root), key, corpus, "scores")
    if record is None:
        raise NotReadyError(f"{key} has no scores in {root}; run the pipeline first")
    stage = Store(root).stage(key, corpus, "scores")
    found = read_report(stage.data_path(record.key, ".report.json"))
    drawn = draw_labels(stage.data_path(record.key, ".parquet"), stage.data_path(record.key, ".outcomes.parquet"), examples, seed)
    if as_json:
        print_json(found.as_dict() | {"examples": drawn})
        return
    click.echo(key)
    for line in found.lines():
        click.echo(line)
    print_labels(console(), drawn)


def draw_labels(scores: Location, outcomes: Location, count: int, seed: int) -> list[dict[str, Any]]:
    """`count` tested labels drawn at random from all of them, whatever their score: each with the outcomes of its test."""
    import polars as pl

    from scopeatlas.storage.uris import readable

    if not count:
        return []
    own = pl.read_parquet(readable(scores)).filter(
        (pl.col("arm") == "own") & (pl.col("claim") == "reads") & (pl.col("status") == "scored")
    )
    own = own.filter(pl.col("balanced_accuracy").is_not_null())
    drawn = own.sample(min(count, len(own)), seed=seed, shuffle=True)
    shown = pl.read_parquet(readable(outcomes))
    return [
        row | {"outcomes": shown.filter((pl.col("label_id") == row["label_id"]) & (pl.col("scorer") == row["scorer"])).to_dicts()}
        for row in drawn.iter_rows(named=True)
    ]


@click.command()
@json_option
@click.pass_obj
def spent(root: Location, as_json: bool) -> None:
    """Say what the LLM has cost so far, by purpose: answers, and what is reserved for requests whose answer never came."""
    from scopeatlas.llm.journal import read_journal
    from scopeatlas.rendering.labels import print_spent
    from scopeatlas.rendering.text import console, print_json

    purposes = read_journal(root).spent_by_purpose()
    if as_json:
        print_json({name: vars(cost) for name, cost in purposes.items()})
    elif purposes:
        print_spent(console(), purposes)
    else:
        click.echo("no LLM was ever asked")
