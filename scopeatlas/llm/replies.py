"""Reading what a server sent: the bytes into a reply, and a reply into the validated model its schema describes.

What belongs here: every check of an answer that needs no knowledge of what was asked for. What does not: asking again
(the caller does, with a higher `attempt`), what an answer costs (`budget.py`).
"""

import json
import re
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from scopeatlas.llm.requests import Answer, ChatReply, TokenLogprob

Model = TypeVar("Model", bound=BaseModel)

_SHORTEST_SECRET = 8  # a shorter one would blot out ordinary text
# what a server may add to the name it was asked for: a date or build, "latest", a revision
_VERSION = re.compile(r"[-:](\d{3,}(-\d+)*|latest)|@[\w.-]+")


class NoCompletion(ValueError):
    """The bytes that came with status 200 are no chat completion."""


class InvalidReply(ValueError):
    """An answer that is not what the schema asks for; the message says why in one line."""


def redacted(text: object, secret: str) -> str:
    """`text` on its way to a journal, a label or a message, without the key should a server echo it."""
    clean = text if isinstance(text, str) else ""
    return clean.replace(secret, "[key]") if len(secret) >= _SHORTEST_SECRET else clean


def reply_of(raw: bytes, *, secret: str = "") -> ChatReply:
    """The reply in a response's body, with `secret` blotted out. Raises NoCompletion for anything but a completion."""
    try:
        answer = json.loads(raw)
        choice, usage = answer["choices"][0], answer.get("usage") or {}
        message = choice["message"]
        return ChatReply(
            text=redacted(message.get("content"), secret),
            finish_reason=redacted(choice.get("finish_reason"), secret),
            refusal=redacted(message.get("refusal"), secret),
            model=redacted(answer.get("model"), secret),
            prompt_tokens=_count(usage.get("prompt_tokens")),
            completion_tokens=_count(usage.get("completion_tokens")),
            cached_tokens=_count((usage.get("prompt_tokens_details") or {}).get("cached_tokens")),
            logprobs=_logprobs((choice.get("logprobs") or {}).get("content") or [], secret),
        )
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise NoCompletion("the server's answer is no chat completion") from error


def _count(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None


def _logprobs(content: list[dict[str, Any]], secret: str) -> tuple[TokenLogprob, ...]:
    """The tokens of an answer; none where they are not of the protocol's form, which does not make the answer void."""
    try:
        tokens = tuple(
            TokenLogprob(
                str(item["token"]),
                float(item["logprob"]),
                tuple((str(other["token"]), float(other["logprob"])) for other in item.get("top_logprobs") or []),
            )
            for item in content
        )
    except (ValueError, LookupError, TypeError, AttributeError):
        return ()
    # a key in pieces could be put together again
    whole = "".join(token.token for token in tokens)
    return () if redacted(whole, secret) != whole else tokens


def fault(reply: ChatReply, model: str) -> str:
    """What plainly makes `reply` no answer from `model`, in one line; "" if nothing does. The schema is not looked at."""
    if not answered_by(reply.model, model):
        return f"the server answered as the model {_one_line(reply.model)!r}, not as {model!r}"
    if reply.refusal:
        return f"the model declined: {_one_line(reply.refusal)}"
    if reply.finish_reason == "length":
        return "the answer was cut off; raise reasoning_tokens"
    try:
        whole = isinstance(json.loads(reply.text), dict)
    except (ValueError, RecursionError):
        whole = False
    return "" if whole else f"the answer breaks the schema: no JSON object: {_one_line(reply.text)!r}"


def answered_by(echoed: str, asked: str) -> bool:
    """Whether a server that says `echoed` used the model `asked`: the name, a version of it, or a path's last part.

    A server that echoes nothing is believed, since some do not.
    """
    if not echoed:
        return True
    name, said = (text.rstrip("/").rsplit("/", 1)[-1].lower() for text in (asked, echoed))
    name = name.removesuffix("-latest")
    return said == name or (said.startswith(name) and _VERSION.fullmatch(said[len(name) :]) is not None)


def read_json(answer: Answer, model: type[Model]) -> Model:
    """The validated content of `answer`. Raises InvalidReply, or for an unanswered one too, saying in one line why."""
    if answer.problem or answer.reply is None:
        raise InvalidReply(answer.problem)
    try:
        return model.model_validate_json(answer.reply.text)
    except ValidationError as error:
        faults = [f"{'.'.join(map(str, fault['loc'])) or 'answer'}: {fault['msg']}" for fault in error.errors()]
        raise InvalidReply(f"the answer breaks the schema: {_one_line('; '.join(faults))}") from error


def _one_line(text: str) -> str:
    return " ".join(text.split())[:300]
