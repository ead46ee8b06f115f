"""What the test server answers: the protocol of a brain, and one that fills in any schema.

What belongs here: answers and JSON schemas. What does not: the wire and its faults (`llm_server.py`).
"""

import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import jsonschema

Body = dict[str, Any]
PROSE = "Sure! Here is what I think about it: it seems to be about several things."


@dataclass(frozen=True)
class Said:
    """An answer with token log-probabilities, as the protocol's `logprobs.content` has them."""

    text: str
    logprobs: Sequence[dict[str, Any]] | None = None


class Brain(Protocol):
    """What is answered. `body` is the whole request; an exception here is the server's 500."""

    def answer(self, body: Body) -> str | Said: ...


class SchemaBrain:
    """Any JSON that the asked schema allows, the same for the same body."""

    def answer(self, body: Body) -> str:
        schema = asked_schema(body)
        return PROSE if schema is None else json.dumps(example_of(schema, random.Random(body_key(body))))


def asked_schema(body: Body) -> dict[str, Any] | None:
    """The JSON schema of response_format; for json_object the one stated in the last message's last line."""
    asked = body.get("response_format") or {}
    if asked.get("type") == "json_schema":
        return asked["json_schema"]["schema"]
    if asked.get("type") != "json_object":
        return None
    try:
        return json.loads(body["messages"][-1]["content"].rsplit("\n", 1)[-1])
    except ValueError:
        return None


def example_of(schema: dict[str, Any], chance: random.Random, root: dict[str, Any] | None = None) -> Any:
    """A value that `schema` (the subset that structured output allows) accepts."""
    root = schema if root is None else root
    if "$ref" in schema:
        return example_of(root["$defs"][schema["$ref"].rsplit("/", 1)[1]], chance, root)
    if "const" in schema or "enum" in schema:
        return chance.choice(schema.get("enum") or [schema["const"]])
    if "anyOf" in schema:
        return example_of(schema["anyOf"][0], chance, root)
    kind = schema.get("type", "object")
    kind = kind[0] if isinstance(kind, list) else kind
    if kind == "object":
        return {name: example_of(inner, chance, root) for name, inner in schema.get("properties", {}).items()}
    if kind == "array":
        fewest = schema.get("minItems", 1)
        return [example_of(schema["items"], chance, root) for _ in range(min(fewest, schema.get("maxItems", fewest)))]
    low, high = schema.get("minimum", 0), schema.get("maximum", schema.get("minimum", 0) + 1)
    if kind == "string":
        words = " ".join(chance.choices(["harbour", "ferry", "number", "clause", "tide"], k=3))
        return words[: schema.get("maxLength", 40)].ljust(schema.get("minLength", 0), "x")
    return {"integer": chance.randint(int(low), int(high)), "number": low + (high - low) / 2, "boolean": True}.get(kind)


def body_key(body: Body) -> str:
    """The ledger's key: the SHA-256 of the request's body in canonical form."""
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def keeps_to(text: str, schema: dict[str, Any]) -> bool:
    """Whether `text` is JSON that `schema` accepts."""
    try:
        jsonschema.validate(json.loads(text), schema)
    except (ValueError, jsonschema.ValidationError):
        return False
    return True
