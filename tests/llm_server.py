"""A server on this machine that speaks the OpenAI protocol, misbehaves on demand and knows what it has billed.

What belongs here: the wire (chat completions, files, batches, models), its faults, the true token count, the ledger. What
does not: what is answered, which a `Brain` decides; judging answers. By hand: `python -m tests.llm_server --port-file FILE`.
"""

import argparse
import json
import random
import re
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from tests.llm_batches import BatchBehaviour, Batches
from tests.llm_books import Counts, Entry, Ledger, WordCounts, read_ledger, tokenizer_counts
from tests.llm_brain import PROSE, Body, Brain, Said, SchemaBrain, asked_schema, body_key, keeps_to

__all__ = ["BatchBehaviour", "Brain", "Call", "Entry", "Failure", "Said", "SchemaBrain", "Server", "body_key", "read_ledger"]


FaultKind = Literal[
    "ok",
    "429",  # no Retry-After
    "429_retry_after",  # with one, in seconds; `Server.retry_after` says how many
    "500",
    "503",
    "quota",  # 429 insufficient_quota
    "truncated_json",  # the message's text ends in the middle; billed
    "truncated_body",  # the HTTP body ends in the middle; billed
    "schema_ignored",  # prose with status 200; billed
    "cut_off",  # finish_reason length; billed
    "usage_low",  # a tenth of the truth
    "usage_high",  # three times the truth
    "usage_missing",
    "slow_drip",  # byte by byte over `Server.drip_seconds`; billed
    "stall",  # billed and held back until `Server.release()`
    "reset_before",  # the connection is reset before any work; not billed
    "reset_after",  # reset when the work is done; billed
    "wrong_model",  # another model's name in the answer; billed
    "echo_key",  # the caller's key in the answer's text; billed
    "echo_key_error",  # the caller's key in an error message, status 500
]
Usage = Literal["honest", "usage_low", "usage_high", "usage_missing"]
Schemas = Literal["enforced", "json_object", "ignored", "rejected"]


@dataclass(frozen=True)
class Failure:
    """An HTTP error to answer with; never billed."""

    status: int
    message: str = "it went wrong"
    code: str = ""
    headers: Mapping[str, str] = field(default_factory=dict)

    def content(self) -> dict[str, Any]:
        """The error as the protocol writes it."""
        return {"error": {"message": self.message, "type": self.code or "error", "code": self.code or None, "param": None}}


Fault = FaultKind | Failure


@dataclass(frozen=True)
class Call:
    """One chat request: its number in order of arrival (from 1), the hash of its body, how often that body came before.

    entry: its number in the ledger, where the client's probes stand too; they meet no faults and have number 0.
    """

    number: int
    key: str
    seen: int
    body: Body
    entry: int


Faults = Callable[[Call], Fault]


def script(*faults: Fault, then: Fault = "ok") -> Faults:
    """The nth request meets the nth fault, every later one `then`."""
    return lambda call: faults[call.number - 1] if call.number <= len(faults) else then


def storms(seed: int, rates: Mapping[FaultKind, float], *, at_most: int = 3, burst: tuple[int, int] = (0, 0)) -> Faults:
    """Faults drawn by (seed, body, how often it came), hence in any order of arrival the same; none after `at_most`.

    burst (every, length): besides, of every `every` requests the first `length` that arrive get a 429.
    """
    kinds, weights = list(rates), list(rates.values())
    assert sum(weights) <= 1, "the rates are probabilities"

    def draw(call: Call) -> Fault:
        every, length = burst
        if every and call.number > every and call.number % every < length:
            return "429"
        if call.seen >= at_most:
            return "ok"
        chance = random.Random(f"{seed} {call.key} {call.seen}")
        return chance.choices([*kinds, "ok"], [*weights, 1 - sum(weights)])[0]

    return draw


# The server -----------------------------------------------------------------------------------------------------------


class Server:
    """Serves on 127.0.0.1 until closed. `url` ends in /v1; `requests`, `headers`: of the chat requests, as they came;
    `probes`: the client's questions whether schemas are kept to, apart from those and spared the faults, but billed.

    faults: what each chat request meets, a list standing for `script(*list)`. usage: how answers report their usage where
    no fault says otherwise. schemas: whether response_format is kept to ("json_object": only that older form is; "ignored":
    prose with 200; "rejected": status 400). tokenizer: the folder whose count is the true one; without, a word is a token.
    latency: seconds that an answer takes. batches: None for a server without /v1/files and /v1/batches.
    """

    def __init__(
        self,
        brain: Brain | None = None,
        faults: Faults | Sequence[Fault] = (),
        *,
        model: str = "m",
        usage: Usage = "honest",
        schemas: Schemas = "enforced",
        logprobs: bool = True,
        tokenizer: str | None = None,
        ledger: Path | None = None,
        latency: float = 0.0,
        retry_after: float = 0.05,
        drip_seconds: float = 0.5,
        batches: BatchBehaviour | None = None,
        port: int = 0,
    ):
        self.brain = brain or SchemaBrain()
        self.faults = faults if callable(faults) else script(*faults)
        self.model, self.usage, self.schemas, self.logprobs = model, usage, schemas, logprobs
        self.counts: Counts = tokenizer_counts(tokenizer) if tokenizer else WordCounts()
        self.latency, self.retry_after, self.drip_seconds = latency, retry_after, drip_seconds
        self.requests: list[Body] = []
        self.probes: list[Body] = []
        self.headers: list[dict[str, str]] = []
        self.in_flight = self.most_in_flight = 0
        self.is_closed = False
        self._ledger, self._seen, self._lock = Ledger(ledger), Counter[str](), threading.Lock()
        self._released = threading.Event()
        self.batches = Batches(self, batches) if batches else None
        self._http = _Http(("127.0.0.1", port), type("Handler", (_Handler,), {"server_": self}))
        self.url = f"http://127.0.0.1:{self._http.server_port}/v1"
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self._thread.start()

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Be unreachable, on connections that are open as well; what is stalled is let go."""
        if not self.is_closed:
            self.is_closed = True
            self.release()
            self._http.shutdown()
            self._http.server_close()
            self._thread.join()

    def release(self) -> None:
        """Let go what is stalled, now and later."""
        self._released.set()

    def hold(self) -> None:
        """Keep back until `release`."""
        self._released.wait()

    def ledger(self) -> list[Entry]:
        """What the server knows of each chat request and each batch line, in order of arrival."""
        return self._ledger.entries()

    def true_tokens(self) -> int:
        """All that was ever billed."""
        return sum(entry.tokens for entry in self.ledger())

    def receive(self, body: Body, headers: Mapping[str, str]) -> tuple[Call, Fault]:
        """Enter a request into the books, and say what it meets."""
        key = body_key(body)
        with self._lock:
            is_probe = _is_probe(body)
            (self.probes if is_probe else self.requests).append(body)
            if not is_probe:
                self.headers.append({name.lower(): value for name, value in headers.items()})
            number, entry = (0 if is_probe else len(self.requests)), len(self.requests) + len(self.probes)
            call = Call(number, key, self._seen[key], body, entry)
            self._seen[key] += 1
            fault = "ok" if is_probe else self.faults(call)
            self._ledger.note(entry, key=key, fault=fault if isinstance(fault, str) else str(fault.status))
        return call, fault

    def note(self, call: Call, **facts: object) -> None:
        self._ledger.note(call.entry, **facts)

    def count_in_flight(self, change: int) -> None:
        with self._lock:
            self.in_flight += change
            self.most_in_flight = max(self.most_in_flight, self.in_flight)

    def complete(self, call: Call, fault: Fault, key: str = "") -> dict[str, Any]:
        """The completion for a request; it is billed when this returns."""
        said = self._say(call.body, fault, key)
        text = self._within(said.text, call.body.get("max_completion_tokens") or call.body.get("max_tokens"))
        true = (self.counts.prompt(call.body["messages"]), self.counts.completion(text))
        self.note(call, prompt_tokens=true[0], completion_tokens=true[1])
        is_cut = fault == "cut_off" or len(text) < len(said.text)
        choice: dict[str, Any] = {"index": 0, "finish_reason": "length" if is_cut else "stop"}
        choice["message"] = {"role": "assistant", "content": text}
        if call.body.get("logprobs") and self.logprobs:
            choice["logprobs"] = {"content": list(said.logprobs or _certain(text)), "refusal": None}
        answer = {"id": f"chatcmpl-{call.entry}", "object": "chat.completion", "created": 0, "choices": [choice]}
        answer["model"] = "another-model" if fault == "wrong_model" else call.body["model"]
        lie = fault if fault in ("usage_low", "usage_high", "usage_missing") else self.usage
        if lie != "usage_missing":
            told = [{"usage_low": count // 10, "usage_high": 3 * count}.get(lie, count) for count in true]
            answer["usage"] = {"prompt_tokens": told[0], "completion_tokens": told[1], "total_tokens": sum(told)}
        return answer

    def _within(self, text: str, longest: int | None) -> str:
        """`text`, cut where it has more than `longest` tokens."""
        while longest is not None and self.counts.completion(text) > longest:
            text = text[: min(len(text) - 1, len(text) * longest // self.counts.completion(text))]
        return text

    def respond(self, call: Call, fault: Fault, key: str = "") -> tuple[int, dict[str, Any], Mapping[str, str]]:
        """Status, content and headers of what a request gets, apart from how it gets there."""
        failure = fault if isinstance(fault, Failure) else _failures(self.retry_after, key).get(fault)
        asked = (call.body.get("response_format") or {}).get("type")
        if failure is None and asked == "json_schema" and self.schemas == "rejected":
            failure = Failure(400, "response_format json_schema is not supported", "invalid_request_error")
        if failure is None:
            try:
                return 200, self.complete(call, fault, key), {}
            except Exception as error:  # a brain that cannot answer
                failure = Failure(500, repr(error))
        return failure.status, failure.content(), failure.headers

    def _say(self, body: Body, fault: Fault, key: str) -> Said:
        schema = asked_schema(body)
        asked = (body.get("response_format") or {}).get("type")
        if fault == "schema_ignored" or (asked and self.schemas == "ignored"):
            return Said(PROSE)
        if asked == "json_schema" and self.schemas == "json_object":
            return Said(PROSE)
        answer = (SchemaBrain() if _is_probe(body) else self.brain).answer(body)
        said = Said(answer) if isinstance(answer, str) else answer
        if schema is not None and not keeps_to(said.text, schema):
            said = Said(SchemaBrain().answer(body))  # what enforcement means: nothing else can be said
        if fault in ("truncated_json", "cut_off"):
            return Said(said.text[: len(said.text) // 2])
        return Said(f"{said.text} {key}") if fault == "echo_key" else said


def _is_probe(body: Body) -> bool:
    """Whether this is the client's question whether a schema is kept to: one that asks for a code and nothing else."""
    return list((asked_schema(body) or {}).get("properties", {})) == ["code"]


def _certain(text: str) -> list[dict[str, Any]]:
    """Log-probabilities of a brain that gives none: each piece of text, certain."""
    pieces = re.findall(r"\s*\w+|\s*[^\w\s]|\s+$", text)
    found = [{"token": piece, "logprob": 0.0, "bytes": list(piece.encode())} for piece in pieces]
    return [{**piece, "top_logprobs": [piece]} for piece in found]


class _Http(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request: object, client_address: object) -> None:
        pass  # clients that are killed leave broken pipes behind


class _Handler(BaseHTTPRequestHandler):
    server_: Server
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        self._route("GET", b"")

    def do_POST(self) -> None:
        self._route("POST", self.rfile.read(int(self.headers.get("Content-Length", "0"))))

    def _route(self, method: str, content: bytes) -> None:
        if self.server_.is_closed:
            self.close_connection = True
            return
        path = urlsplit(self.path).path.removeprefix("/v1")
        if (method, path) == ("POST", "/chat/completions"):
            self._chat(json.loads(content))
        elif (method, path) == ("GET", "/models"):
            models = [{"id": self.server_.model, "object": "model", "created": 0, "owned_by": "tests"}]
            self._send(200, {"object": "list", "data": models})
        elif self.server_.batches and path.startswith(("/files", "/batches")):
            status, answer = self.server_.batches.handle(method, path, self.headers, content)
            self._send(status, answer)
        else:
            self._send(404, Failure(404, f"no such path: {self.path}").content())

    def _chat(self, body: Body) -> None:
        server = self.server_
        call, fault = server.receive(body, dict(self.headers))
        server.count_in_flight(+1)
        try:
            self._meet(call, fault)
        finally:
            server.count_in_flight(-1)

    def _meet(self, call: Call, fault: Fault) -> None:
        server = self.server_
        key = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if fault == "reset_before":
            self._reset()
            return
        time.sleep(server.latency)
        status, answer, headers = server.respond(call, fault, key)
        if fault == "stall":
            server.hold()
        if fault == "reset_after" or server.is_closed:
            self._reset()
        else:
            self._send(status, answer, fault, headers)
            server.note(call, answered=status == 200 and fault != "truncated_body")

    def _send(self, status: int, answer: object, fault: Fault = "ok", headers: Mapping[str, str] | None = None) -> None:
        content = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if fault == "truncated_body":
            self.wfile.write(content[: len(content) // 2])
            self.close_connection = True
        elif fault == "slow_drip":
            for start in range(len(content)):
                self.wfile.write(content[start : start + 1])
                time.sleep(self.server_.drip_seconds / len(content))
        else:
            self.wfile.write(content)

    def _reset(self) -> None:
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()  # the reset goes out when the handler lets go of its streams
        self.close_connection = True


def _failures(retry_after: float, key: str) -> dict[FaultKind, Failure]:
    return {
        "429": Failure(429, "slow down", "rate_limit_exceeded"),
        "429_retry_after": Failure(429, "slow down", "rate_limit_exceeded", {"Retry-After": f"{retry_after:g}"}),
        "500": Failure(500),
        "503": Failure(503, "overloaded"),
        "quota": Failure(429, "You exceeded your current quota", "insufficient_quota"),
        "echo_key_error": Failure(500, f"no idea what to do with {key}"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port-file", type=Path, required=True, help="written, with the URL, once the server listens")
    parser.add_argument("--ledger", type=Path)
    parser.add_argument("--tokenizer", help="the folder whose count is the true one")
    parser.add_argument("--usage", default="honest", choices=["honest", "usage_low", "usage_high", "usage_missing"])
    parser.add_argument("--latency", type=float, default=0.0)
    arguments = parser.parse_args()
    server = Server(usage=arguments.usage, tokenizer=arguments.tokenizer, ledger=arguments.ledger, latency=arguments.latency)
    arguments.port_file.write_text(server.url, encoding="utf-8")
    threading.Event().wait()


if __name__ == "__main__":
    main()
