"""`scopeatlas ablate`, `steer`, `attribute` and `causal-check`: what features do to what the model says.

What belongs here: commands that change what the model does, or ask where it comes from. What does not: looking on
(`trace.py`).
"""

import re
from typing import TYPE_CHECKING

import click

from scopeatlas.cli.options import json_option
from scopeatlas.storage.uris import Location

if TYPE_CHECKING:
    from scopeatlas.study.generation import Positions
    from scopeatlas.study.intervene import Intervention
    from scopeatlas.study.texts import Text

_PLOT = click.option("--plot", type=click.Path(dir_okay=False), help="Draw it into this PNG file.")
_CHAT = click.option("--chat", is_flag=True, help="PROMPT is what a user says; the model answers through its chat template.")
_SEED = click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of what is drawn at random.")
_TOKENS = click.option("-n", "--tokens", type=click.IntRange(min=0), default=40, show_default=True, help="Of each continuation.")
_TEMPERATURE = click.option(
    "--temperature", type=click.FloatRange(min=0), default=0.0, show_default=True, help="0 takes the likeliest token each time."
)
_FEATURE = re.compile(r"(\d+(?:\.\d+)?)(?:=([+-]?\d*\.?\d+(?:[eE][+-]?\d+)?))?")


def _positions(_ctx: click.Context, _parameter: click.Parameter, value: str) -> "Positions":
    if value in ("all", "prompt", "generated", "last"):
        return value  # type: ignore[return-value]
    try:
        return [int(part) for part in value.split(",")]
    except ValueError:
        raise click.BadParameter(
            f"'{value}' is none of all, prompt, generated, last, nor numbers of tokens such as 0,3,-1"
        ) from None


def _features(_ctx: click.Context, _parameter: click.Parameter, value: str | tuple[str, ...]) -> dict[str, float | None]:
    """Names and strengths, None where none is given."""
    parts = value.split(",") if isinstance(value, str) else value
    found: dict[str, float | None] = {}
    for part in parts:
        match = _FEATURE.fullmatch(part.strip())
        if not match:
            raise click.BadParameter(f"'{part}' is no feature: give its number, or LAYER.INDEX, and =STRENGTH to steer it")
        if match[1] in found:
            raise click.BadParameter(f"feature {match[1]} is named twice; each is edited once")
        found[match[1]] = None if match[2] is None else float(match[2])
    return found


_AT = click.option(
    "--at",
    "positions",
    default="all",
    show_default=True,
    callback=_positions,
    help="Which tokens are edited: all, prompt, generated, last (of the prompt), or numbers such as 0,3,-1.",
)


@click.command()
@click.argument("sae")
@click.argument("features", callback=_features)
@click.argument("prompt")
@_CHAT
@_AT
@_TOKENS
@_TEMPERATURE
@_SEED
@json_option
@_PLOT
@click.pass_obj
def ablate(
    root: Location,
    sae: str,
    features: dict[str, float | None],
    prompt: str,
    chat: bool,
    positions: "Positions",
    tokens: int,
    temperature: float,
    seed: int,
    as_json: bool,
    plot: str | None,
) -> None:
    """Show what becomes of PROMPT's next token and continuation without FEATURES, numbers with commas between them. What else
    the SAE says of a token, and what it leaves unexplained, stays as it is."""
    from scopeatlas.api import open_atlas

    if any(strength is not None for strength in features.values()):
        raise click.BadParameter("a feature that is ablated has no strength; scopeatlas steer takes one")
    found = open_atlas(root).intervene(
        _prompt(prompt, chat),
        sae=sae,
        ablate=list(features),
        positions=positions,
        tokens=tokens,
        temperature=temperature,
        seed=seed,
    )
    _show(found, as_json, plot)


@click.command()
@click.argument("sae")
@click.argument("features", nargs=-1, required=True, callback=_features, metavar="FEATURE[=STRENGTH]...")
@click.argument("prompt")
@_CHAT
@_AT
@_TOKENS
@_TEMPERATURE
@_SEED
@json_option
@_PLOT
@click.pass_obj
def steer(
    root: Location,
    sae: str,
    features: dict[str, float | None],
    prompt: str,
    chat: bool,
    positions: "Positions",
    tokens: int,
    temperature: float,
    seed: int,
    as_json: bool,
    plot: str | None,
) -> None:
    """Show what becomes of PROMPT's next token and continuation when features are raised. STRENGTH is in units of the
    feature's greatest activation in the corpus, 1 where it is not given; below 0 a feature is lowered."""
    from scopeatlas.api import open_atlas

    found = open_atlas(root).intervene(
        _prompt(prompt, chat),
        sae=sae,
        steer={name: 1.0 if strength is None else strength for name, strength in features.items()},
        positions=positions,
        tokens=tokens,
        temperature=temperature,
        seed=seed,
    )
    _show(found, as_json, plot)


@click.command()
@click.argument("sae")
@click.argument("prompt")
@click.option("--target", required=True, help="The token whose logit is attributed; spaces count: ' Paris' is not 'Paris'.")
@click.option("--against", help="The token whose logit is taken off it; by default the mean of all.")
@_CHAT
@click.option(
    "--position", type=int, default=-1, show_default=True, help="After which token of the prompt, from 0; -1: the last."
)
@click.option("--verify", type=click.IntRange(min=0), default=0, show_default=True, help="Ablate so many of the first features.")
@click.option("--top", type=click.IntRange(min=1), default=20, show_default=True, help="Features printed; --json has all.")
@json_option
@_PLOT
@click.pass_obj
def attribute(
    root: Location,
    sae: str,
    prompt: str,
    target: str,
    against: str | None,
    chat: bool,
    position: int,
    verify: int,
    top: int,
    as_json: bool,
    plot: str | None,
) -> None:
    """Show which features make the model expect the target token after PROMPT, and how much of that features explain."""
    from scopeatlas.api import open_atlas
    from scopeatlas.plots.drawing import save
    from scopeatlas.rendering.intervene import print_attribution
    from scopeatlas.rendering.text import console, print_json

    found = open_atlas(root).attribute(
        _prompt(prompt, chat), sae=sae, target=target, against=against, position=position, verify=verify
    )
    if plot:
        save(found.plot(), plot)
    if as_json:
        print_json(found.as_dict())
    else:
        print_attribution(console(), found, top=top)


@click.command("causal-check")
@click.argument("sae")
@click.argument("features", callback=_features)
@click.argument("prompts", nargs=-1)
@click.option("--file", help="A file of prompts: one a line, or .jsonl with text or messages; - is stdin.")
@click.option("--token", "tokens", multiple=True, required=True, help="A next token that is measured; several add up.")
@click.option("--against", multiple=True, help="A token over which they are measured; several add up.")
@click.option("--controls", type=click.IntRange(min=1), default=20, show_default=True, help="Draws of random features.")
@_AT
@_SEED
@json_option
@_PLOT
@click.pass_obj
def check_cause(
    root: Location,
    sae: str,
    features: dict[str, float | None],
    prompts: tuple[str, ...],
    file: str | None,
    tokens: tuple[str, ...],
    against: tuple[str, ...],
    controls: int,
    positions: "Positions",
    seed: int,
    as_json: bool,
    plot: str | None,
) -> None:
    """Measure what FEATURES do to the next token on average over PROMPTS, beside random features of the same norm. FEATURES are
    numbers with commas between them, ablated, or steered where one has =STRENGTH."""
    from scopeatlas.api import open_atlas
    from scopeatlas.plots.drawing import save
    from scopeatlas.rendering.intervene import print_causal_check
    from scopeatlas.rendering.text import console, print_json
    from scopeatlas.study.texts import texts_from

    found = open_atlas(root).causal_check(
        texts_from(prompts, file),
        sae=sae,
        ablate=[name for name, strength in features.items() if strength is None],
        steer={name: strength for name, strength in features.items() if strength is not None},
        tokens=tokens,
        against=against,
        positions=positions,
        controls=controls,
        seed=seed,
    )
    if plot:
        save(found.plot(), plot)
    if as_json:
        print_json(found.as_dict())
    else:
        print_causal_check(console(), found)


def _prompt(prompt: str, chat: bool) -> "Text":
    return [{"role": "user", "content": prompt}] if chat else prompt


def _show(found: "Intervention", as_json: bool, plot: str | None) -> None:
    from scopeatlas.plots.drawing import save
    from scopeatlas.rendering.intervene import print_intervention
    from scopeatlas.rendering.text import console, print_json

    if plot:
        save(found.plot(), plot)
    if as_json:
        print_json(found.as_dict())
    else:
        print_intervention(console(), found)
