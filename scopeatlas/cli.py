"""`scopeatlas`: a thin face over the library.

What belongs here: commands, their options, and turning errors into one line. What does not: finding things out (the
library) or how they look (`rendering.py`). Imports that take time are inside the commands, so that --help is instant.
"""

import io
import os
import re
import sys
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar, get_args

import click

from scopeatlas import __version__
from scopeatlas.cli_exchange import delphi
from scopeatlas.cli_labels import annotate, report, spent
from scopeatlas.errors import DictionaryError, ScopeAtlasError, StoreError
from scopeatlas.storage.uris import Location, location, reaching

if TYPE_CHECKING:
    from scopeatlas.dictionaries.sparse import SparseDictionary
    from scopeatlas.storage.store import Store

STORE_VARIABLE = "SCOPE_ATLAS_STORE"
COMMANDS = "scopeatlas.commands"
_Command = TypeVar("_Command", bound=Callable[..., object])


class _Group(click.Group):
    """Ends with one line and exit code 2, never with a traceback, on errors that the library raises on purpose. Takes in
    commands that installed packages offer under `scopeatlas.commands`."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted({*super().list_commands(ctx), *entry_points(group=COMMANDS).names})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        offered = entry_points(group=COMMANDS, name=cmd_name)
        return super().get_command(ctx, cmd_name) or next((offer.load() for offer in offered), None)

    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except ScopeAtlasError as error:
            click.echo(f"error: {' '.join(str(error).split())}", err=True)
            ctx.exit(2)


def _word_of(name: str) -> Callable[[click.Context, click.Parameter, str | None], str | None]:
    """A callback that refuses a word which is not one of `hypotheses.labels.<name>`."""

    def check(_ctx: click.Context, _parameter: click.Parameter, value: str | None) -> str | None:
        if value is None:
            return None
        from scopeatlas.hypotheses import labels

        words = get_args(getattr(labels, name))
        if value not in words:
            raise click.BadParameter(f"'{value}' is none of {', '.join(words)}")
        return value

    return check


def _json_option(command: _Command) -> _Command:
    return click.option("--json", "as_json", is_flag=True, help="Print one JSON document instead.")(command)


def _status_option(command: _Command) -> _Command:
    return click.option("--status", callback=_word_of("Status"), help="Only features of this status: ok, dead, rare, ...")(
        command
    )


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--store",
    "root",
    envvar=STORE_VARIABLE,
    show_envvar=True,
    default="store",
    show_default=True,
    help="The folder that holds everything, or a URI such as s3://bucket/prefix.",
)
@click.version_option(__version__, prog_name="scopeatlas")
@click.pass_context
def cli(ctx: click.Context, root: str) -> None:
    """Search features of sparse autoencoders by meaning, see the evidence, judge the score."""
    ctx.obj = location(root)


@cli.command()
@click.argument("query")
@click.option("-k", "k", type=click.IntRange(min=1), default=10, show_default=True, help="How many hits.")
@click.option("--sae", help="Only SAEs of this key, or whose keys begin with it or contain it.")
@click.option("--release", help="Only this release.")
@click.option("--layer", type=int, help="Only this layer.")
@click.option("--min-score", type=click.FloatRange(0, 1), help="Only labels with at least this F1.")
@_status_option
@click.option("--method", callback=_word_of("Method"), help="Only labels made this way: rule, llm, imported, human.")
@_json_option
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

    from scopeatlas import rendering
    from scopeatlas.atlas.search import WEAK_SIMILARITY, open_atlas

    results = open_atlas(root).search(
        query, k=k, sae=sae, release=release, layer=layer, min_score=min_score, status=status, method=method
    )
    if not as_json:
        rendering.print_hits(rendering.console(), results)
        return
    facts = {
        "query": query,
        "is_weak": results.is_weak,
        "best_similarity": results.best_similarity,
        "weak_below": WEAK_SIMILARITY,
    }
    rendering.print_json(facts | {"hits": [asdict(hit) for hit in results]})


def _feature_name(_ctx: click.Context, _parameter: click.Parameter, value: str) -> str:
    if not re.fullmatch(r"\d+(\.\d+)?", value):
        raise click.BadParameter(f"'{value}' is neither a feature's number nor, of a multi-layer SAE, LAYER.INDEX such as 7.123")
    return value


@cli.command()
@click.argument("sae")
@click.argument("feature", callback=_feature_name)
@click.option("--examples", type=click.IntRange(min=1), default=5, show_default=True, help="Strongest windows per split.")
@click.option("--blind", is_flag=True, help="Only what a label may be proposed from: no label, no score, no held-out text.")
@_json_option
@click.pass_obj
def show(root: Location, sae: str, feature: str, examples: int, blind: bool, as_json: bool) -> None:
    """Show one feature: its label, the test of it, and where it fires. SAE may be a part of a key; FEATURE is a number,
    or LAYER.INDEX of a crosscoder or CLT. Look with --blind before you annotate: who has seen the test cannot be tested."""
    from dataclasses import asdict

    from scopeatlas import rendering
    from scopeatlas.atlas.search import open_atlas
    from scopeatlas.evidence import blinded, read_evidence
    from scopeatlas.storage.store import Store

    hit = open_atlas(root).feature(sae, feature)
    evidence = read_evidence(Store(root), hit)
    if blind:
        hit, evidence = blinded(hit, evidence)
    if as_json:
        tables = {name: table.to_dicts() for name, table in vars(evidence).items() if name != "windows"}
        rendering.print_json({"feature": asdict(hit), **tables, "examples": [asdict(w) for w in evidence.windows]})
    else:
        rendering.print_feature(rendering.console(), hit, evidence, examples=examples)


@cli.command("ls")
@click.argument("sae", required=False)
@_status_option
@click.option("--limit", type=click.IntRange(min=1), default=50, show_default=True, help="Features on a page.")
@click.option("--offset", type=click.IntRange(min=0), default=0, help="Features to pass over.")
@_json_option
@click.pass_obj
def list_features(root: Location, sae: str | None, status: str | None, limit: int, offset: int, as_json: bool) -> None:
    """List the SAEs of the atlas, or with SAE (or a part of its key) its features in order."""
    from scopeatlas import rendering
    from scopeatlas.atlas.search import open_atlas

    atlas = open_atlas(root)
    if sae is None:
        saes = atlas.saes()
        rendering.print_json(saes.to_dicts()) if as_json else rendering.print_saes(rendering.console(), saes)
        return
    key, features = atlas.features(sae, status=status)
    page = features.slice(offset, limit)
    if as_json:
        rendering.print_json({"sae": key, "total": features.height, "offset": offset, "features": page.to_dicts()})
    else:
        rendering.print_features(rendering.console(), key, page, offset=offset, total=features.height)


@cli.command()
@_json_option
@click.pass_obj
def status(root: Location, as_json: bool) -> None:
    """Where each SAE stands: its last finished stage, counts, size, and what failed."""
    from scopeatlas import rendering
    from scopeatlas.upkeep import status as read_status

    lines = read_status(_store(root))
    if as_json:
        rendering.print_json([line.as_dict() for line in lines])
    elif lines:
        rendering.print_status(rendering.console(), lines)
    else:
        click.echo(f"no SAE is registered in {root}")


@cli.command()
@click.option("--sae", help="Only this SAE, by its whole key.")
@click.option("--dry-run", is_flag=True, help="Only say what would be freed.")
@_json_option
@click.pass_obj
def prune(root: Location, sae: str | None, dry_run: bool, as_json: bool) -> None:
    """Free the activations of published SAEs, and generations that newer ones replaced."""
    from scopeatlas import rendering
    from scopeatlas.storage.files import human_bytes
    from scopeatlas.upkeep import prune as free

    freed = free(_store(root), sae=sae, dry_run=dry_run)
    if as_json:
        rendering.print_json({"dry_run": dry_run, "freed_bytes": freed, "total_bytes": sum(freed.values())})
    elif freed:
        rendering.print_table(rendering.console(), ((key, human_bytes(size)) for key, size in freed.items()))
        click.echo(f"{human_bytes(sum(freed.values()))} {'would be freed' if dry_run else 'freed'}")
    else:
        click.echo(f"nothing to free in {root}")


@cli.command()
@click.argument("folder", type=click.Path(path_type=Path))
@_json_option
def check(folder: Path, as_json: bool) -> None:
    """Load the SAE in FOLDER and check its weights."""
    from scopeatlas import rendering
    from scopeatlas.dictionaries.releases import load_folder

    if not folder.is_dir():
        raise DictionaryError(f"{folder} is not a folder; give the folder that holds an SAE's weights")
    facts: dict[str, object] = {"folder": str(folder), **_facts(load_folder(folder)), "outcome": "sound"}
    if as_json:
        rendering.print_json(facts)
    else:
        rendering.print_facts(rendering.console(), facts)


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


@cli.command()
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
@_json_option
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
    from scopeatlas import rendering
    from scopeatlas.costs import Prices
    from scopeatlas.planning import Work, model_shape, plan_releases
    from scopeatlas.rates import FILE, read_rates

    memory = None if memory_gb is None else int(memory_gb * 1e9)
    shape = None if subject is None else model_shape(subject)
    work = Work(tokens, context_length, memory_bytes=memory, per_run=per_run, site=site, subject=shape)
    rates = read_rates(rates_file or root / FILE)
    prices = Prices(usd_per_hour, llm_features=llm_features, llm_tokens=llm_tokens, usd_per_million=usd_per_million)
    made = plan_releases(releases, work, store=root, rates=rates, prices=prices)
    if as_json:
        rendering.print_json(made.as_dict())
    else:
        click.echo("\n".join(made.lines()))


@cli.command()
@click.option("--model", help="Only SAEs of this model: gemma-3-1b is both of google/gemma-3-1b-pt and -it.")
@click.option("--site", help="Only this site in the release's own word, such as resid_post; may be a glob.")
@click.option("--width", help="Only this width: 16k, 1m or a number.")
@click.option("--kind", help="Only this kind: sae, transcoder, crosscoder, clt.")
@click.option("--state", help="Only SAEs in this state: ready, registered, published, ...")
@click.option("--release", help="Only this release; may be a glob.")
@_json_option
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
    from scopeatlas import rendering
    from scopeatlas.atlas.catalog import read_catalog

    rows = read_catalog(_store(root).root, model=model, site=site, width=width, kind=kind, state=state, release=release)
    if as_json:
        rendering.print_json(rows.to_dicts())
    elif rows.is_empty():
        click.echo("no SAE in the catalog matches")
    else:
        rendering.print_catalog(rendering.console(), rows)


def _store(root: Location) -> "Store":
    """The store, which must exist: a mistyped folder is not an empty store."""
    from scopeatlas.storage.store import Store

    with reaching(root):
        is_there = root.is_dir()
    if not is_there:
        raise StoreError(f"no store at {root}; run the pipeline first, or set --store or {STORE_VARIABLE}")
    return Store(root)


cli.add_command(annotate)
cli.add_command(delphi)
cli.add_command(report)
cli.add_command(spent)


def main() -> None:
    """The entry point."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # corpus text on a terminal that is not UTF-8
    cli(prog_name="scopeatlas")


if __name__ == "__main__":
    main()
