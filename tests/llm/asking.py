"""Questions for the tests of `scopeatlas.llm`: small, all different, with a schema that the test server can answer."""

import random
from pathlib import Path

from scopeatlas.llm.config import ServerConfig
from scopeatlas.llm.journal import Journal
from scopeatlas.llm.ledger import Reservation
from scopeatlas.llm.requests import Charge, ChatReply, ChatRequest

SCHEMA = {
    "name": "label",
    "strict": True,
    "schema": {
        "type": "object",
        "properties": {"label": {"type": "string"}},
        "required": ["label"],
        "additionalProperties": False,
    },
}
TEXT = '{"label": "words for ships"}'


def question(number: int, *, said: str = "", **changes: object) -> ChatRequest:
    messages = ({"role": "system", "content": "Say what these have in common."}, {"role": "user", "content": f"{number} {said}"})
    fields = {"purpose": "explain", "sae": "a", "feature": number, "messages": messages, "schema": SCHEMA}
    return ChatRequest(**{**fields, "max_output_tokens": 60, "prompt": "explain_v2@0123456789ab", **changes})


def answered(journal: Journal, key: str, *, tokens: tuple[int, int] = (30, 10), **changes: object) -> None:
    """Put an answer to `key` into the journal, as a run would."""
    reservation = journal.sent(question(0), Reservation(-1, key, "explain", 1, 100, 60, None, False), model="m", attempt=1)
    reply = ChatReply(TEXT, "stop", "", "m", *tokens)
    facts = {"rung": "json_schema", "charge": Charge(*tokens), "open_tokens": 0, "open_usd": 0.0, **changes}
    journal.received(reservation, facts.pop("reply", reply), **facts)


def journal_in(folder: Path) -> Journal:
    return Journal(folder / "llm" / "journal.jsonl")


def server_config(url: str, **settings: object) -> ServerConfig:
    return ServerConfig(**{"model": "m", "base_url": url, **settings})


def random_text(chance: random.Random, length: int) -> str:
    """Words, digits, blanks, scripts of many bytes, control characters, emoji and ligatures that normalisation expands."""
    kinds = [
        lambda: chance.choice(["the", "Hafen", "harbour", "of", "x1", "naïve", "don't", "!!!", "...", "\n", "  ", "\t"]),
        lambda: chr(chance.randrange(32, 127)),
        lambda: chr(chance.randrange(0x4E00, 0x9FFF)),
        lambda: chr(chance.choice([0xFDFA, 0xFB03, 0xBD, 0x1F600, 0xE000, 0x0, 0x1B, 0x202E, 0x0E33])),
        lambda: chr(chance.randrange(0xA0, 0xD7FF)),
        lambda: " ",
    ]
    return "".join(chance.choice(kinds)() for _ in range(length))
