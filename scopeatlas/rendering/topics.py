"""How topics look: the topics of each text, then what each topic is made of, and words' beside those of features.

What belongs here: from `Topics` to a terminal, a pipe or a notebook. What does not: finding anything out (`study/topics.py`).
"""

from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from scopeatlas.rendering import html
from scopeatlas.rendering.text import number, plain
from scopeatlas.rendering.trace import percent

if TYPE_CHECKING:
    import polars as pl

    from scopeatlas.study.topics import RollUp, Topics

TOPICS, OF_A_TEXT, MEMBERS = 15, 3, 3
HEADINGS = {"features": "topics of features", "words": "topics of words (TF-IDF), the baseline"}


def print_topics(out: Console, found: "Topics", agreement: "pl.DataFrame | None") -> None:
    """Texts with their heaviest topics; the topics themselves; and, if groups are known, how well each description agrees."""
    shares = {name: _of_texts(roll_up) for name, roll_up in _both(found)}
    for at, text in enumerate(found.texts):
        out.print(Text(f"{at + 1}  ", style="cyan").append(plain(text)), soft_wrap=True)
        for name in HEADINGS:
            out.print(
                Text(f"   {name:<9}", style="dim").append(Text(shares[name].get(at, "nothing"), style="none")), soft_wrap=True
            )
    for name, roll_up in _both(found):
        out.print(Text(f"\n{HEADINGS[name]}", style="bold"))
        _print_roll_up(out, roll_up)
    if agreement is not None:
        out.print(Text("\nk-means on each description against the groups", style="bold"))
        _print_agreement(out, agreement)


def _both(found: "Topics") -> "list[tuple[str, RollUp]]":
    return [("features", found.features), ("words", found.words)]


def _of_texts(roll_up: "RollUp") -> dict[int, str]:
    """The heaviest topics of each text, in words."""
    shown: dict[int, list[str]] = {}
    for text, name, share in roll_up.by_text.select("text", "name", "share").iter_rows():
        shown.setdefault(text, []).append(f"{percent(share)} {plain(name)}")
    return {text: " · ".join(topics[:OF_A_TEXT]) for text, topics in shown.items()}


def _print_roll_up(out: Console, roll_up: "RollUp") -> None:
    table = Table(box=None, pad_edge=False)
    for name in ("topic", "share", "texts", "members", "name", "the heaviest members"):
        table.add_column(name, overflow="fold", justify="right" if name in {"topic", "share", "texts", "members"} else "left")
    for row in roll_up.topics.head(TOPICS).iter_rows(named=True):
        numbers = (str(row["topic"] + 1), f"{row['share'] * 100:.1f} %", str(row["texts"]), str(row["items"]))
        members = Text(" · ".join(plain(member) for member in row["members"][:MEMBERS]), style="dim")
        table.add_row(*numbers, Text(plain(row["name"])), members)
    out.print(table)
    left = roll_up.topics.height - TOPICS
    said = f"and {left:,} more; " if left > 0 else ""
    rest = percent(1 - sum(roll_up.topics["share"]))
    out.print(Text(f"{said}{rest} of the weight is in no topic", style="dim"))


def _print_agreement(out: Console, agreement: "pl.DataFrame") -> None:
    table = Table(box=None, pad_edge=False)
    for name in ("", "purity", "adjusted Rand [over seeds]", "mutual information"):
        table.add_column(name, justify="left" if not name else "right")
    for row in agreement.iter_rows(named=True):
        rand = f"{number(row['adjusted_rand'])} [{number(row['lowest'])}, {number(row['highest'])}]"
        table.add_row(row["description"], number(row["purity"]), rand, number(row["mutual_information"]))
    out.print(table)


def topics_html(found: "Topics") -> str:
    """Each text with its heaviest topics by features and by words, then the topics of features."""
    shares = {name: _of_texts(roll_up) for name, roll_up in _both(found)}
    texts = [(text, *(shares[name].get(at) for name in HEADINGS)) for at, text in enumerate(found.texts)]
    topics = [
        (row["topic"] + 1, percent(row["share"]), row["texts"], row["items"], row["name"], " · ".join(row["members"]))
        for row in found.features.topics.head(TOPICS).iter_rows(named=True)
    ]
    columns = ["topic", "share", "texts", "members", "name", "the heaviest members"]
    return html.table(["text", *HEADINGS.values()], texts) + html.table(columns, topics, caption=HEADINGS["features"])
