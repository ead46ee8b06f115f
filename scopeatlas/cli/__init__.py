"""`scopeatlas`: a thin face over the library.

What belongs here: the group of all commands, and turning errors into one line. What does not: a command (the modules
beside this one), finding things out (the library) or how they look (`rendering/`). Imports that take time are inside the
commands, so that --help is instant.
"""

import io
import sys
from importlib.metadata import entry_points

import click

from scopeatlas import __version__
from scopeatlas.cli import compare, contrast, exchange, features, intervene, labels, releases, stores, trace
from scopeatlas.cli.options import STORE_VARIABLE
from scopeatlas.errors import ScopeAtlasError
from scopeatlas.storage.uris import location

COMMANDS = "scopeatlas.commands"


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
            from scopeatlas.rendering.text import plain

            click.echo(f"error: {plain(' '.join(str(error).split()))}", err=True)
            ctx.exit(2)


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


for _command in (
    *(features.search, features.search_vector, features.similar, features.show, features.list_features, features.show_densities),
    *(labels.annotate, labels.history, labels.report, labels.spent),
    *(stores.status, stores.catalog, stores.prune, stores.rollback),
    *(releases.check, releases.plan),
    *(trace.trace, trace.topics),
    contrast.contrast,
    *(intervene.ablate, intervene.steer, intervene.attribute, intervene.check_cause),
    *(compare.compare, compare.diff),
    *(exchange.export, exchange.import_),
):
    cli.add_command(_command)


def main() -> None:
    """The entry point."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # corpus text on a terminal that is not UTF-8
    cli(prog_name="scopeatlas")
