"""What several commands share: options, and the store that they are about.

What belongs here: decorators and callbacks of click. What does not: a command.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar, get_args

import click

from scopeatlas.errors import StoreError
from scopeatlas.storage.uris import Location, reaching

if TYPE_CHECKING:
    from scopeatlas.storage.store import Store

STORE_VARIABLE = "SCOPE_ATLAS_STORE"
_Command = TypeVar("_Command", bound=Callable[..., object])


def word_of(name: str) -> Callable[[click.Context, click.Parameter, str | None], str | None]:
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


def json_option(command: _Command) -> _Command:
    return click.option("--json", "as_json", is_flag=True, help="Print one JSON document instead.")(command)


def plot_option(command: _Command) -> _Command:
    return click.option("--plot", type=click.Path(dir_okay=False, path_type=Path), help="Draw it into this PNG file.")(command)


def status_option(command: _Command) -> _Command:
    return click.option("--status", callback=word_of("Status"), help="Only features of this status: ok, dead, rare, ...")(command)


def feature_name(_ctx: click.Context, _parameter: click.Parameter, value: str) -> str:
    """A callback that refuses what cannot be the name of a feature."""
    if not re.fullmatch(r"\d+(\.\d+)?", value):
        raise click.BadParameter(f"'{value}' is neither a feature's number nor, of a multi-layer SAE, LAYER.INDEX such as 7.123")
    return value


def store_at(root: Location) -> "Store":
    """The store, which must exist: a mistyped folder is not an empty store."""
    from scopeatlas.storage.store import Store

    with reaching(root):
        is_there = root.is_dir()
    if not is_there:
        raise StoreError(f"no store at {root}; run the pipeline first, or set --store or {STORE_VARIABLE}")
    return Store(root)
