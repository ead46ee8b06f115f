"""Minimal edits of real text, after which a feature should fire or fall silent if its label is right.

What belongs here: making them, for rules by the rule itself and for claims in words by an LLM. What does not: running them
through the subject model and judging the label (`falsification.py`).
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from pathlib import Path
from typing import Literal

import polars as pl
from pydantic import BaseModel, JsonValue

from scopeatlas.hypotheses.labels import Label
from scopeatlas.hypotheses.rules import REACH, Rule
from scopeatlas.hypotheses.samples import Windows, require
from scopeatlas.llm.prompts import fenced, load_prompt
from scopeatlas.llm.replies import InvalidReply, read_json
from scopeatlas.llm.requests import Answer, ChatRequest, JsonSchema

EDITS = 6
"""Of each direction at most so many for a rule: if half of what it matches fires, none of six does in one case of 64."""
SHOWN = 3
"""Windows that fire, and as many silent ones, that an LLM is asked to edit."""
PREFIX = 16
"""Tokens of real text before the place that is edited."""
DONORS = 400
"""Of other features' windows so many are searched for text that a rule matches."""
SHARE_KEPT = 0.5
"""Of the words of a window at least so many have to come back, in order; else it was rewritten, not edited."""

PROMPT = load_prompt(Path(__file__).parent / "prompts", "edits_v1")
OUTPUT_TOKENS = 900


@dataclass(frozen=True)
class Passage:
    """A text, and the character from which on it matters whether the feature fires."""

    text: str
    place: int = 0


@dataclass(frozen=True)
class Edit:
    """A text made from a real one of document `document_id`. expected: whether the feature should fire in it.

    original: the text it was made from. The edit says something only if the feature does the opposite there, read alone;
    None where that does not matter, because the place is of other text.
    """

    edited: Passage
    expected: bool
    document_id: str
    original: Passage | None = None


def rule_edits(rule: Rule, own: pl.DataFrame, others: pl.DataFrame) -> list[Edit]:
    """Edits that a rule makes by itself; none for one about whole contexts, and none it cannot make by what stands before.

    own: windows of the feature; others: of any feature. Silencing: in a window that fires where the rule says so, one token
    is replaced so that the rule no longer does. Inserting: text that the rule matches, whole words of it, ends a window in
    which the feature is silent; it is taken from wherever the rule matches, whether the feature fires there or not, since
    text that is known to fire would prove nothing. All end at the place in question, since a language model sees nothing
    after it.
    """
    if rule.unit == "context":
        return []
    silent = own.filter(pl.col("kind") == "random")
    if not len(silent):
        return []
    positive = own.filter(pl.col("kind") == "positive")
    strange = others.filter(pl.col("feature") != own["feature"][0]).head(DONORS)
    donors = [*_matched(rule, strange), *_matched(rule, own)]
    return [*_silencing(rule, positive, silent), *_inserting(rule, silent, donors)]


def _silencing(rule: Rule, positive: pl.DataFrame, silent: pl.DataFrame) -> Iterator[Edit]:
    fires_on = {t for row in positive.iter_rows(named=True) for t, a in zip(row["texts"], row["activations"], strict=True) if a}
    spare = [t for t in dict.fromkeys(t for texts in silent["texts"] for t in texts) if t.strip() and t not in fires_on]
    made = 0
    for row in positive.iter_rows(named=True):
        tokens = row["texts"][max(0, row["focus"] - PREFIX) : row["focus"] + 1]
        replaced = _replaced(rule, tokens, spare, made) if rule.matches(tokens)[-1] else None
        if replaced is not None:
            yield Edit(_passage(replaced, 1), False, row["document_id"], _passage(tokens, 1))
            made += 1
            if made == EDITS:
                return


def _replaced(rule: Rule, tokens: list[str], spare: list[str], turn: int) -> list[str] | None:
    """`tokens` with one of the last replaced so that the rule does not match the last any more."""
    for at in range(len(tokens) - 1, max(-1, len(tokens) - 2 - REACH), -1):
        for token in _alike(tokens[at], spare, turn):
            changed = [*tokens[:at], token, *tokens[at + 1 :]]
            if not rule.matches(changed)[-1]:
                return changed
    return None


def _alike(token: str, spare: list[str], turn: int) -> list[str]:
    """Two spare tokens that are written like `token`: with a space before it or not, a word or not."""
    alike = [t for t in spare if (t[0] == " ", t.strip().isalpha()) == (token[:1] == " ", token.strip().isalpha())]
    return [alike[(turn * 2 + i) % len(alike)] for i in range(min(2, len(alike)))]


def _inserting(rule: Rule, silent: pl.DataFrame, donors: Iterable[list[str]]) -> Iterator[Edit]:
    hosts = silent.rows(named=True)
    made = 0
    for tokens in donors:
        host = hosts[made % len(hosts)]
        before = host["texts"][:PREFIX]
        for length in range(_last_word(tokens), len(tokens) + 1):
            if rule.matches([*before, *tokens[-length:]])[-1]:
                yield Edit(_passage([*before, *tokens[-length:]], 1), True, host["document_id"])
                made += 1
                break
        if made == EDITS:
            return


def _last_word(tokens: list[str]) -> int:
    """How many tokens the last word is made of: a digit or an ending without what it follows would be no real text."""
    return next((n for n in range(1, len(tokens)) if tokens[-n][:1].isspace()), len(tokens))


def _matched(rule: Rule, windows: pl.DataFrame) -> list[list[str]]:
    """Text that a rule matches at its end, of each window at most once: that of many documents first."""
    turns: dict[str, int] = {}
    found = []
    for document, texts in windows.select("document_id", "texts").iter_rows():
        hits = [i for i, hit in enumerate(rule.matches(texts)) if hit]
        if hits:
            at = hits[len(found) % len(hits)]  # of a window with several places not always the first
            found.append((turns.setdefault(document, 0), texts[max(0, at - REACH) : at + 1]))
            turns[document] += 1
    return [tokens for _, tokens in sorted(found, key=lambda pair: pair[0])]


def _passage(tokens: Sequence[str], last: int) -> Passage:
    """The text of `tokens`, in which the `last` ones count."""
    return Passage("".join(tokens), len("".join(tokens[:-last])))


class _Edited(BaseModel):
    id: str
    text: str


class _Reply(BaseModel):
    edits: list[_Edited]


def edit_requests(sae: str, label: Label, select: Windows[Literal["select"]]) -> list[ChatRequest]:
    """What is asked of an LLM to edit windows of select documents by a claim in words: one request, or none without windows
    or a claim. Raises LeakError for windows of another split."""
    require(select, "select")
    shown = _shown(label, select)
    if not label.reads or not shown:
        return []
    values: list[JsonValue] = [{"id": name, "text": "".join(row["texts"]), "fires_on": _peak(row)} for name, row in shown.items()]
    data = fenced({"CLAIM": [label.reads], "WINDOWS": values}, closing="Answer with the JSON object of edited windows.")
    messages = ({"role": "system", "content": PROMPT.text}, {"role": "user", "content": data})
    return [ChatRequest("edit", sae, label.feature, messages, _schema(list(shown)), OUTPUT_TOKENS, PROMPT.stamp)]


def read_edits(answer: Answer, label: Label, select: Windows[Literal["select"]]) -> list[Edit]:
    """The edits of an answer, those left out that are no edit: unchanged, or mostly rewritten.

    Raises InvalidReply for an answer that breaks the schema, names a window twice or one that was not shown.
    """
    shown = _shown(label, select)
    given = read_json(answer, _Reply).edits
    names = [edit.id for edit in given]
    if len(set(names)) < len(names) or not set(names) <= shown.keys():
        raise InvalidReply(f"edits of {', '.join(names)}, where each of {', '.join(shown)} was to be edited once at most")
    edits = []
    for name, text in ((edit.id, edit.text.strip()) for edit in given):
        original = "".join(shown[name]["texts"])
        if _is_edit(original.split(), text.split()):
            fires = shown[name]["kind"] == "positive"
            edits.append(Edit(Passage(text), not fires, shown[name]["document_id"], Passage(original)))
    return edits


def _shown(label: Label, select: Windows) -> dict[str, dict]:
    """The windows put before the LLM, by the name that each has there."""
    own = select.of(label.feature)
    chosen = {kind: own.filter(pl.col("kind") == kind).head(SHOWN).rows(named=True) for kind in ("positive", "random")}
    names = {"positive": "fires", "random": "silent"}
    return {f"{names[kind]}-{i}": row for kind, rows in chosen.items() for i, row in enumerate(rows, start=1)}


def _peak(row: dict) -> str:
    return row["texts"][row["focus"]] if row["kind"] == "positive" else ""


def _is_edit(original: list[str], text: list[str]) -> bool:
    kept = sum(block.size for block in SequenceMatcher(None, original, text, autojunk=False).get_matching_blocks())
    return text != original and kept >= SHARE_KEPT * max(len(original), len(text), 1)


def _schema(names: Iterable[str]) -> JsonSchema:
    entry: JsonSchema = {
        "type": "object",
        "properties": {"id": {"type": "string", "enum": list(names)}, "text": {"type": "string"}},
        "required": ["id", "text"],
        "additionalProperties": False,
    }
    body: JsonSchema = {
        "type": "object",
        "properties": {"edits": {"type": "array", "items": entry}},
        "required": ["edits"],
        "additionalProperties": False,
    }
    return {"name": "edits", "strict": True, "schema": body}
