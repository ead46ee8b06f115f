"""The batch half of the test server: files, batches, and what can become of one.

What belongs here: /v1/files and /v1/batches. What does not: a single completion (`llm_server.py`).
"""

import json
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from email.parser import BytesParser
from email.policy import HTTP
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from tests.llm_server import Server


@dataclass(frozen=True)
class BatchBehaviour:
    """What becomes of batches. polls: how often one is looked at before it is done. outcome: how it ends; "failed" means
    at validation, with nothing done. share: of its lines, from the first, that are answered before it ends otherwise than
    completed. silent: how many, from the last, no file tells of. flaky: how many requests about batches get a 500 first.
    The server's faults apply to lines as to requests, but for those of the connection."""

    polls: int = 2
    outcome: Literal["completed", "failed", "expired", "cancelled"] = "completed"
    share: float = 1.0
    silent: int = 0
    flaky: int = 0


class Batches:
    """The files and batches of one server. Thread-safe."""

    def __init__(self, server: "Server", behaviour: BatchBehaviour):
        self.behaviour = behaviour
        self.files: dict[str, bytes] = {}
        self.batches: dict[str, dict[str, Any]] = {}
        self.looks = 0
        self._server, self._lock = server, threading.Lock()

    @property
    def inputs(self) -> list[list[dict[str, Any]]]:
        """The lines of every batch's input file."""
        files = (self.files[batch["input_file_id"]] for batch in self.batches.values())
        return [[json.loads(line) for line in file.splitlines()] for file in files]

    def handle(self, method: str, path: str, headers: Mapping[str, str], content: bytes) -> tuple[int, object]:
        """Status and answer (bytes are a file's content) of one request."""
        parts = path.strip("/").split("/")
        with self._lock:
            self.looks += 1
            if self.looks <= self.behaviour.flaky:
                return 500, {"error": {"message": "try again", "type": "error", "code": None}}
            if method == "POST" and parts == ["files"]:
                return 200, self._upload(headers["Content-Type"], content)
            if method == "POST" and parts == ["batches"]:
                return 200, self._create(json.loads(content))
            if method == "GET" and parts == ["batches"]:
                return 200, {"object": "list", "data": list(self.batches.values()), "has_more": False}
            if method == "GET" and parts[0] == "batches" and parts[1] in self.batches:
                return 200, self._poll(parts[1])
            if method == "GET" and parts[0] == "files" and parts[1] in self.files:
                return 200, self.files[parts[1]] if parts[2:] == ["content"] else self._file(parts[1])
        return 404, {"error": {"message": f"no such thing: {method} {path}", "type": "error", "code": "not_found"}}

    def _upload(self, kind: str, content: bytes) -> dict[str, Any]:
        form = BytesParser(policy=HTTP).parsebytes(f"Content-Type: {kind}\r\n\r\n".encode() + content)
        fields = {part.get_param("name", header="content-disposition"): part for part in form.iter_parts()}
        assert fields["purpose"].get_content().strip() == "batch", "only files for batches are taken"
        return self._store(fields["file"].get_payload(decode=True))

    def _store(self, content: bytes) -> dict[str, Any]:
        name = f"file-{len(self.files)}"
        self.files[name] = content
        return self._file(name)

    def _file(self, name: str) -> dict[str, Any]:
        size = len(self.files[name])
        return {"id": name, "object": "file", "bytes": size, "created_at": 0, "filename": "x.jsonl", "purpose": "batch"} | {
            "status": "processed"
        }

    def _create(self, asked: dict[str, Any]) -> dict[str, Any]:
        name = f"batch_{len(self.batches)}"
        known = ("input_file_id", "endpoint", "completion_window", "metadata")
        facts = {"id": name, "object": "batch", "created_at": 0, "status": "validating", "polls": 0}
        self.batches[name] = {**{field: asked.get(field) for field in known}, **facts}
        return self.batches[name]

    def _poll(self, name: str) -> dict[str, Any]:
        batch = self.batches[name]
        batch["polls"] += 1
        if batch["status"] in ("validating", "in_progress"):
            batch["status"] = "in_progress"
            if batch["polls"] > self.behaviour.polls:
                self._finish(batch)
        return batch

    def _finish(self, batch: dict[str, Any]) -> None:
        lines = [json.loads(line) for line in self.files[batch["input_file_id"]].splitlines() if line.strip()]
        batch["status"] = self.behaviour.outcome
        if self.behaviour.outcome == "failed":
            problem = {"code": "invalid_json_line", "message": "a line is not valid", "line": 1, "param": None}
            batch["errors"] = {"object": "list", "data": [problem]}
            return
        answered = round(self.behaviour.share * len(lines)) if self.behaviour.outcome != "completed" else len(lines)
        outcomes = [self._answer(line) for line in lines[:answered]]
        code = f"batch_{self.behaviour.outcome}"
        unanswered = {"code": code, "message": f"This request could not be executed before the batch {code[6:]}."}
        outcomes += [{"custom_id": line["custom_id"], "response": None, "error": unanswered} for line in lines[answered:]]
        self._publish(batch, outcomes[: len(outcomes) - self.behaviour.silent])

    def _publish(self, batch: dict[str, Any], outcomes: Sequence[dict[str, Any]]) -> None:
        """The output and the error file, neither in the order asked."""
        for field, wanted in (("output_file_id", True), ("error_file_id", False)):
            chosen = [o for o in outcomes if (o["response"] is not None and o["response"]["status_code"] == 200) is wanted]
            if chosen:
                lines = (json.dumps({"id": "r", **outcome}) + "\n" for outcome in reversed(chosen))
                batch[field] = self._store("".join(lines).encode())["id"]

    def _answer(self, line: dict[str, Any]) -> dict[str, Any]:
        call, fault = self._server.receive(line["body"], {})
        status, body, _ = self._server.respond(call, fault)
        if status == 200:
            self._server.note(call, answered=True)
        return {
            "custom_id": line["custom_id"],
            "response": {"status_code": status, "request_id": "q", "body": body},
            "error": None,
        }
