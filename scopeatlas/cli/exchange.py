"""`scopeatlas export` and `scopeatlas import`: features, labels and activations to and from the files of other tools.

What belongs here: commands about such files. What does not: the group they belong to and its errors (`__init__.py`), or the files
(`exchange/`).
"""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from scopeatlas.cli.options import json_option
from scopeatlas.errors import ConfigError
from scopeatlas.storage.uris import Location

if TYPE_CHECKING:
    from scopeatlas.dictionaries.releases import SaeEntry
    from scopeatlas.storage.store import Store

_model = click.option("--model", required=True, help="The subject model: a Hub id, a folder, a .gguf file or package:NAME.")
_folder = click.argument("folder", type=click.Path(file_okay=False, path_type=Path))


@click.group()
def export() -> None:
    """Write what the atlas knows of an SAE for other tools."""


@click.group("import")
def import_() -> None:
    """Take in what other tools, or other atlases, know of an SAE."""


@export.command("neuronpedia")
@click.argument("sae")
@_folder
@click.option("--model-id", required=True, help="Neuronpedia's id of the subject model, such as gemma-3-270m.")
@click.option("--source-set", required=True, help="The source set's name, such as mylab-res-16k; the layer is put before it.")
@click.option("--creator", required=True, help="The name that pages show as the author.")
@click.option("--no-logits", is_flag=True, help="Leave effects on the logits out: the subject model is not loaded.")
@json_option
@click.pass_obj
def export_neuronpedia_command(
    root: Location, sae: str, folder: Path, model_id: str, source_set: str, creator: str, no_logits: bool, as_json: bool
) -> None:
    """Write SAE into FOLDER in Neuronpedia's bulk layout; several SAEs may share a folder."""
    from scopeatlas.api import open_atlas
    from scopeatlas.rendering.text import print_json
    from scopeatlas.runner.local import silent

    made = open_atlas(root).export_neuronpedia(
        sae,
        folder,
        model_id=model_id,
        source_set=source_set,
        creator=creator,
        logits=not no_logits,
        log=silent if as_json else click.echo,
    )
    if as_json:
        print_json(made.as_dict())
        return
    click.echo(f"written: {', '.join(f'{folder}/v1/{model_id}/{source}' for source in made.sources)}")
    click.echo(f"{made.features:,} features, {made.activations:,} activations, {made.explanations:,} explanations")
    click.echo("explanations have no embedding, so that Neuronpedia's search by meaning does not find them")


@export.command("parquet")
@click.argument("sae")
@_folder
@json_option
@click.pass_obj
def export_parquet_command(root: Location, sae: str, folder: Path, as_json: bool) -> None:
    """Write every table of SAE into FOLDER, which is new or empty, as parquet; SCHEMA.md says what is in them."""
    from scopeatlas.api import open_atlas

    _written(open_atlas(root).export_parquet(sae, folder), as_json)


@export.command("dataset")
@click.argument("sae")
@_folder
@click.option("--licence", default="", help="The dataset's licence as the Hub spells it, such as cc-by-4.0.")
@click.option("--title", default="", help="Its title; by default the SAE's key.")
@json_option
@click.pass_obj
def export_dataset_command(root: Location, sae: str, folder: Path, licence: str, title: str, as_json: bool) -> None:
    """Write SAE into FOLDER, which is new or empty, as a Hugging Face dataset with a card."""
    from scopeatlas.api import open_atlas

    _written(open_atlas(root).export_dataset(sae, folder, licence=licence, title=title), as_json)


@export.command("circuit-tracer")
@click.argument("sae")
@_folder
@click.option("--scan", required=True, help="The name of the set of transcoders: a folder in FOLDER that several SAEs share.")
@json_option
@click.pass_obj
def export_circuit_tracer_command(root: Location, sae: str, folder: Path, scan: str, as_json: bool) -> None:
    """Write a file for each feature of SAE that circuit-tracer's viewer shows (start-server --features_dir FOLDER)."""
    from scopeatlas.api import open_atlas
    from scopeatlas.rendering.text import print_json

    count = open_atlas(root).export_circuit_tracer(sae, folder, scan=scan)
    if as_json:
        print_json({"folder": str(folder / scan), "features": count})
    else:
        click.echo(f"written: {count:,} features in {folder / scan}")


@export.command("graph")
@click.argument("graph", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("target", type=click.Path(dir_okay=False, path_type=Path))
@click.argument("saes", nargs=-1, required=True)
@click.option("--scan", help="Have the viewer read the features that `export circuit-tracer` wrote under this name.")
@json_option
@click.pass_obj
def export_graph_command(
    root: Location, graph: Path, target: Path, saes: tuple[str, ...], scan: str | None, as_json: bool
) -> None:
    """Write circuit-tracer's GRAPH to TARGET with the labels of SAES, which read a layer each, on its nodes."""
    from scopeatlas.api import open_atlas
    from scopeatlas.rendering.text import print_json

    made = open_atlas(root).label_graph(saes, graph, target, scan=scan)
    if as_json:
        print_json(made.as_dict())
    else:
        click.echo(f"written: {made.path}")
        click.echo(f"{made.labelled:,} labels on {made.nodes:,} features, of which {made.known:,} are of these SAEs")


@import_.command("neuronpedia")
@click.argument("sae")
@click.argument("path", type=click.Path(exists=True, path_type=Path))
@click.option("--model-id", help="Take lines of this model of Neuronpedia's for the SAE's own.")
@click.option("--source", help="Take lines of this source alone, such as 6-res-jb, whatever layer its number says.")
@json_option
@click.pass_obj
def import_neuronpedia_command(
    root: Location, sae: str, path: Path, model_id: str | None, source: str | None, as_json: bool
) -> None:
    """Make the explanations in PATH, a folder or one file, labels of SAE. They are tested like any other when the labels are
    next made."""
    from scopeatlas.api import open_atlas
    from scopeatlas.labels.annotations import MAX_LENGTH
    from scopeatlas.rendering.text import print_json

    made = open_atlas(root).import_neuronpedia(sae, path, model_id=model_id, source=source)
    if as_json:
        print_json(made.as_dict())
        return
    click.echo(f"{made.sae}: {made.new:,} new labels of {made.lines:,} explanations, about {made.features:,} features")
    if made.empty:
        click.echo(f"{made.empty:,} explanations without text are left out")
    if made.too_long:
        click.echo(f"{made.too_long:,} explanations of more than {MAX_LENGTH:,} characters are left out")


@import_.command("dataset")
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@json_option
@click.pass_obj
def import_dataset_command(root: Location, folder: Path, as_json: bool) -> None:
    """Publish the SAE in FOLDER, which `scopeatlas export dataset` wrote, in this store's atlas."""
    from scopeatlas.exchange.hub_dataset import import_dataset
    from scopeatlas.rendering.text import print_json
    from scopeatlas.storage.store import Store

    made = import_dataset(Store(root), folder)
    if as_json:
        print_json({"sae": made.sae, "features": made.rows, "reused": made.reused})
    else:
        click.echo(f"{made.sae}: {made.rows:,} features {'were there already' if made.reused else 'published'}")


@import_.command("delphi")
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("sae")
@_model
@click.option("--name", default="delphi", show_default=True, help="What the corpus is called; a hash of its tokens is added.")
@click.option(
    "--documents",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="A text file with a line per row of the cache: the document that it is cut from.",
)
@json_option
@click.pass_obj
def import_delphi_command(
    root: Location, folder: Path, sae: str, model: str, name: str, documents: Path | None, as_json: bool
) -> None:
    """Make FOLDER, delphi's cache of one hookpoint, a corpus and the activations of SAE: a key, or a local folder."""
    from scopeatlas.exchange.delphi import import_delphi
    from scopeatlas.rendering.text import print_json
    from scopeatlas.runner.local import silent
    from scopeatlas.storage.store import Store
    from scopeatlas.subject.loading import SubjectModel

    store = Store(root)
    lines = None if documents is None else documents.read_text(encoding="utf-8").splitlines()
    entry = _entry(store, sae)
    log = silent if as_json else click.echo
    made = import_delphi(store, folder, entry, SubjectModel(model), name=name, documents=lines, log=log)
    facts = made.corpus.facts
    if as_json:
        counted = {"nonzeros": made.nonzeros, "left_out": made.left_out}
        print_json({"sae": entry.key, "corpus": made.corpus.id, **counted, **facts})
        return
    click.echo(f"{entry.key} over {made.corpus.id}: {made.nonzeros:,} non-zeros, {made.left_out:,} left out")
    click.echo(f"{facts['tokens']:,} tokens of {facts['documents']:,} documents")
    if facts["rows_that_begin_with_bos"] < facts["contexts"]:
        begin = f"{facts['rows_that_begin_with_bos']:,} of {facts['contexts']:,} rows"
        click.echo(f"{begin} begin with BOS: delphi took it out, so that first tokens stand where the model was not trained")


@export.command("delphi")
@click.argument("sae")
@_folder
@_model
@click.option("--corpus", help="The corpus; needed where the SAE has activations over several.")
@click.option("--splits", type=click.IntRange(min=1), default=5, show_default=True, help="How many files.")
@json_option
@click.pass_obj
def export_delphi_command(
    root: Location, sae: str, folder: Path, model: str, corpus: str | None, splits: int, as_json: bool
) -> None:
    """Write the activations of SAE, a key of the store, into FOLDER as delphi caches them."""
    from scopeatlas.corpus.build import open_corpus
    from scopeatlas.exchange.delphi import export_delphi
    from scopeatlas.rendering.text import print_json
    from scopeatlas.storage.store import Store
    from scopeatlas.subject.loading import SubjectModel

    store = Store(root)
    known = store.corpora_of(sae)
    if corpus is None and len(known) != 1:
        raise ConfigError(f"{sae} has activations over {', '.join(known) or 'no corpus'}; name one with --corpus")
    opened = open_corpus(store, corpus or known[0])
    target = export_delphi(store, opened, _entry(store, sae), SubjectModel(model), folder, splits=splits)
    if as_json:
        print_json({"folder": str(target), "sae": sae, "corpus": opened.id, "splits": splits})
    else:
        click.echo(f"written: {target}")


def _entry(store: "Store", sae: str) -> "SaeEntry":
    """The SAE in a local folder, or the one that the store knows by this key."""
    from scopeatlas.dictionaries.releases import SaeEntry, describe_sae

    path = Path(sae).expanduser()
    if path.is_dir():
        return describe_sae(path, release=path.resolve().parent.name, path=path.resolve().name)
    return SaeEntry.from_json(store.entry(sae))


def _written(folder: Path, as_json: bool) -> None:
    """Say what an export to parquet wrote: rows of each table."""
    from scopeatlas.exchange.tables import check_manifest
    from scopeatlas.rendering.text import console, print_json, print_table

    rows = {name: facts["rows"] for name, facts in check_manifest(folder).items() if "rows" in facts}
    if as_json:
        print_json({"folder": str(folder), "rows": rows})
        return
    click.echo(f"written: {folder}")
    print_table(console(), ((name, f"{count:,}") for name, count in rows.items()))
