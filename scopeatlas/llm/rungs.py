"""Finding out how a server keeps to a schema, before anything is spent on it: a probe per server and model.

What belongs here: the probe and its verdict, remembered in the journal. What does not: checking each reply all the same
(`replies.py`).
"""

import json
from itertools import count

from scopeatlas.errors import ExplainerError
from scopeatlas.llm.config import ServerConfig
from scopeatlas.llm.journal import Journal
from scopeatlas.llm.ledger import Ledger
from scopeatlas.llm.replies import fault
from scopeatlas.llm.requests import ChatReply, ChatRequest, Message, Rung
from scopeatlas.llm.sending import Sender, Unanswered
from scopeatlas.storage.files import content_hash

PROBES = 3  # one that keeps to the schema is proof; one that does not may be an accident
PROBE_SCHEMA = "schema_probe"

_RUNGS: tuple[Rung, ...] = ("json_schema", "json_object")
_NOTE = "rung"
# the upper one must be disobeyed for the schema's sake; the lower one goes with the schema that is stated after it
_SAYS: dict[Rung, str] = {
    "json_schema": 'Say hello to the reader. Answer with exactly this JSON object: {"greeting": "hello"}',
    "json_object": "This tests whether you keep to a schema.",
}


def known_rung(config: ServerConfig, ledger: Ledger) -> Rung | None:
    """How this server and model keep to a schema, if a probe of an earlier run found out."""
    noted = ledger.noted(_NOTE).get(_server(config))
    return next((rung for rung in _RUNGS if rung == noted), None)


def probe(config: ServerConfig, rung: Rung, number: int) -> tuple[ChatRequest, str]:
    """The `number`th probe, and the code that its schema admits as the only answer and nobody could guess."""
    code = content_hash(_server(config), rung, number)[:12]
    schema = {
        "type": "object",
        "properties": {"code": {"type": "string", "enum": [code]}},
        "required": ["code"],
        "additionalProperties": False,
    }
    message: Message = {"role": "user", "content": _SAYS[rung]}
    envelope = {"name": PROBE_SCHEMA, "strict": True, "schema": schema}
    # room for a model that thinks before it answers
    return ChatRequest("probe", "", -1, (message,), envelope, 512, f"{PROBE_SCHEMA}@{code}"), code


async def find_rung(sender: Sender, config: ServerConfig, journal: Journal) -> Rung:
    """The highest rung that the server keeps to, from the journal or by probing.

    Raises ExplainerError for a server that keeps to none or cannot be used at all, Unanswered where the budget or a
    stop leaves no room for a probe.
    """
    if known := known_rung(config, journal):
        return known
    said = ""
    for rung in _RUNGS:
        kept, said = await _keeps_to(rung, sender, config, journal)
        if kept:
            journal.note(_NOTE, _server(config), rung)
            return rung
    where = f"{config.url} (model {config.model})"
    message = f"{where} keeps neither to response_format json_schema nor to a schema it is told (to the last probe: {said})"
    raise ExplainerError(f"{message}; use a server or model that does, or start it with structured output turned on")


async def _keeps_to(rung: Rung, sender: Sender, config: ServerConfig, journal: Journal) -> tuple[bool, str]:
    """Whether one of the probes so far, or of a few new ones, came back as its schema asks; and the last that did not."""
    said, new = "", 0
    for number in count():
        request, code = probe(config, rung, number)
        key = request.key(config)
        if journal.reply(key) is None:
            if new == PROBES:
                break
            new += 1
            try:
                await sender.answer(request, rung)
            except Unanswered as problem:
                if problem.why == "refused":
                    return False, str(problem)
                if problem.why == "failed":
                    hint = f"check that base_url {config.url} is an API's, often ending in /v1, or run again later"
                    raise ExplainerError(f"{problem}: {hint}") from problem
                raise
        reply = journal.reply(key)
        assert reply is not None, "an answered request stands in the journal"
        said = _disobedience(reply, code, config)
        if not said:
            return True, ""
    return False, said


def _disobedience(reply: ChatReply, code: str, config: ServerConfig) -> str:
    problem = fault(reply, config.model)
    if not problem and json.loads(reply.text) != {"code": code}:
        return " ".join(reply.text.split())[:100]
    return problem


def _server(config: ServerConfig) -> str:
    return content_hash(config.url, config.model)
