"""`scopeatlas check` and `plan`: what an SAE's files hold, and what indexing releases would take.

What belongs here: commands that look at releases before anything is run. What does not: running (the pipeline).
"""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from scopeatlas.cli.options import json_option
from scopeatlas.errors import DictionaryError
from scopeatlas.storage.uris import Location

if TYPE_CHECKING:
    from scopeatlas.dictionaries.sparse import SparseDictionary


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@json_option
def check(folder: Path, as_json: bool) -> None:
    """Load the SAE in FOLDER and check its weights."""
    from scopeatlas.dictionaries.releases import load_folder
    from scopeatlas.rendering.text import console, print_facts, print_json

    if not folder.is_dir():
        raise DictionaryError(f"{folder} is not a folder; give the folder that holds an SAE's weights")
    facts: dict[str, object] = {"folder": str(folder), **_facts(load_folder(folder)), "outcome": "sound"}
    if as_json:
        print_json(facts)
    else:
        print_facts(console(), facts)


def _facts(dictionary: "SparseDictionary") -> dict[str, object]:
    """What `check` says of a dictionary that is sound."""
    thresholds = [layer.threshold.aminmax() for layer in dictionary.layers if layer.threshold is not None]
    activation = dictionary.activation
    return {
        "kind": dictionary.kind,
        "family": dictionary.family,
        "model": dictionary.model_name or None,
        "sites_in": [str(site) for site in dictionary.sites_in],
        "sites_out": [str(site) for site in dictionary.sites_out],
        "width": dictionary.width,
        "layers": len(dictionary.layers),
        "features_per_layer": dictionary.features_per_layer,
        "d_in": dictionary.d_in,
        "d_out": dictionary.d_out,
        "activation": activation.function if activation.k is None else f"{activation.function}, k = {activation.k}",
        "input_norm": dictionary.norm,
        "threshold_min": min((float(low) for low, _ in thresholds), default=None),
        "threshold_max": max((float(high) for _, high in thresholds), default=None),
        "target_l0": dictionary.target_l0,
        "measured_l0": dictionary.measured_l0,
        "bytes": dictionary.nbytes,
        "notes": list(dictionary.notes),
    }


@click.command()
@click.argument("releases", nargs=-1, required=True)
@click.option("--tokens", type=click.IntRange(min=1), default=1_000_000, show_default=True, help="Tokens of the corpus.")
@click.option("--context-length", type=click.IntRange(min=1), default=128, show_default=True, help="Tokens of a context.")
@click.option("--memory-gb", type=click.FloatRange(min=0), help="Memory besides the subject model [default: what is free].")
@click.option("--per-run", type=click.IntRange(min=1), default=16, show_default=True, help="SAEs that share a run.")
@click.option("--site", default="*", help="Only this site in the release's own word, such as resid_post; may be a glob.")
@click.option("--subject", help="The subject model, where a folder names none: a Hub id, a folder or package:NAME.")
@click.option(
    "--rates",
    "rates_file",
    type=click.Path(exists=True, path_type=Path),
    help="Measured rates [default: rates.json in the store].",
)
@click.option("--usd-per-hour", type=click.FloatRange(min=0), help="Price of the machine that the rates are of.")
@click.option(
    "--llm-features", type=click.IntRange(min=0), default=100, show_default=True, help="Features of each SAE for an LLM."
)
@click.option("--llm-tokens", type=click.IntRange(min=0), default=0, help="LLM tokens for each of them.")
@click.option("--usd-per-million", type=click.FloatRange(min=0), help="Price of a million LLM tokens.")
@json_option
@click.pass_obj
def plan(
    root: Location,
    releases: tuple[str, ...],
    tokens: int,
    context_length: int,
    memory_gb: float | None,
    per_run: int,
    site: str,
    subject: str | None,
    rates_file: Path | None,
    usd_per_hour: float | None,
    llm_features: int,
    llm_tokens: int,
    usd_per_million: float | None,
    as_json: bool,
) -> None:
    """What indexing RELEASES would take: passes, operations, bytes, hours and money, by shapes alone, with the arithmetic.
    Each is a folder of SAEs, or a release of Gemma Scope 2 by name: gemma-scope-2 is all of them."""
    from scopeatlas.costs import Prices
    from scopeatlas.planning import Work, model_shape, plan_releases
    from scopeatlas.rates import FILE, read_rates
    from scopeatlas.rendering.text import print_json

    memory = None if memory_gb is None else int(memory_gb * 1e9)
    shape = None if subject is None else model_shape(subject)
    work = Work(tokens, context_length, memory_bytes=memory, per_run=per_run, site=site, subject=shape)
    rates = read_rates(rates_file or root / FILE)
    prices = Prices(usd_per_hour, llm_features=llm_features, llm_tokens=llm_tokens, usd_per_million=usd_per_million)
    made = plan_releases(releases, work, store=root, rates=rates, prices=prices)
    if as_json:
        print_json(made.as_dict())
    else:
        click.echo("\n".join(made.lines()))
