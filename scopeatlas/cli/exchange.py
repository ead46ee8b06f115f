"""`scopeatlas delphi`: activations from and to the files of other tools.

What belongs here: commands about such files. What does not: the group they belong to and its errors (`__init__.py`), or the files
(`exchange/`).
"""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from scopeatlas.errors import ConfigError
from scopeatlas.storage.uris import Location

if TYPE_CHECKING:
    from scopeatlas.dictionaries.releases import SaeEntry
    from scopeatlas.storage.store import Store

_model = click.option("--model", required=True, help="The subject model: a Hub id, a folder, a .gguf file or package:NAME.")


@click.group()
def delphi() -> None:
    """Take in what delphi has cached, or write it for delphi to explain and score."""


@delphi.command("import")
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("sae")
@_model
@click.option("--name", default="delphi", show_default=True, help="What the corpus is called; a hash of its tokens is added.")
@click.option(
    "--documents",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="A text file with a line per row of the cache: the document that it is cut from.",
)
@click.pass_obj
def import_(root: Location, folder: Path, sae: str, model: str, name: str, documents: Path | None) -> None:
    """Make FOLDER, the cache of one hookpoint, a corpus and the activations of SAE: a key of the store, or a local folder."""
    from scopeatlas.exchange.delphi import import_delphi
    from scopeatlas.storage.store import Store
    from scopeatlas.subject.loading import SubjectModel

    store = Store(root)
    lines = None if documents is None else documents.read_text(encoding="utf-8").splitlines()
    entry = _entry(store, sae)
    made = import_delphi(store, folder, entry, SubjectModel(model), name=name, documents=lines, log=click.echo)
    facts = made.corpus.facts
    click.echo(f"{entry.key} over {made.corpus.id}: {made.nonzeros:,} non-zeros, {made.left_out:,} left out")
    click.echo(f"{facts['tokens']:,} tokens of {facts['documents']:,} documents")
    if facts["rows_that_begin_with_bos"] < facts["contexts"]:
        begin = f"{facts['rows_that_begin_with_bos']:,} of {facts['contexts']:,} rows"
        click.echo(f"{begin} begin with BOS: delphi took it out, so that first tokens stand where the model was not trained")


@delphi.command("export")
@click.argument("sae")
@click.argument("folder", type=click.Path(file_okay=False, path_type=Path))
@_model
@click.option("--corpus", help="The corpus; needed where the SAE has activations over several.")
@click.option("--splits", type=click.IntRange(min=1), default=5, show_default=True, help="How many files.")
@click.pass_obj
def export(root: Location, sae: str, folder: Path, model: str, corpus: str | None, splits: int) -> None:
    """Write the activations of SAE, a key of the store, into FOLDER as delphi caches them."""
    from scopeatlas.corpus.build import open_corpus
    from scopeatlas.exchange.delphi import export_delphi
    from scopeatlas.storage.store import Store
    from scopeatlas.subject.loading import SubjectModel

    store = Store(root)
    known = store.corpora_of(sae)
    if corpus is None and len(known) != 1:
        raise ConfigError(f"{sae} has activations over {', '.join(known) or 'no corpus'}; name one with --corpus")
    opened = open_corpus(store, corpus or known[0])
    target = export_delphi(store, opened, _entry(store, sae), SubjectModel(model), folder, splits=splits)
    click.echo(f"written: {target}")


def _entry(store: "Store", sae: str) -> "SaeEntry":
    """The SAE in a local folder, or the one that the store knows by this key."""
    from scopeatlas.dictionaries.releases import SaeEntry, describe_sae

    path = Path(sae).expanduser()
    if path.is_dir():
        return describe_sae(path, release=path.resolve().parent.name, path=path.resolve().name)
    return SaeEntry.from_json(store.entry(sae))
