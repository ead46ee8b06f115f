"""Batches: many requests as one file, answered by the provider within a day at half the price, or by our own runner.

What belongs here: input and output files, and a batch from its plan to its end over any number of runs. What does not:
requests one at a time (`runner.py`), what a request is (`requests.py`), what it costs (`budget.py`).
"""

import asyncio
import json
import uuid
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from pydantic import BaseModel, JsonValue

from scopeatlas.errors import ExplainerError
from scopeatlas.llm.budget import BATCH_PRICE, Budget
from scopeatlas.llm.client import open_client
from scopeatlas.llm.config import ServerConfig
from scopeatlas.llm.journal import Journal
from scopeatlas.llm.ledger import Reservation
from scopeatlas.llm.limits import backoff
from scopeatlas.llm.replies import NoCompletion, redacted, reply_of
from scopeatlas.llm.requests import ChatReply, ChatRequest, Rung, request_body
from scopeatlas.llm.runner import Problems, send_all
from scopeatlas.llm.sending import STOPPED
from scopeatlas.runner.local import Log
from scopeatlas.storage.files import atomic_path

if TYPE_CHECKING:
    from openai import AsyncOpenAI
    from openai.types import Batch

MAX_LINES, MAX_BYTES = 50_000, 200_000_000  # of one file, as the Batch API's documentation has them
FIRST_PAUSE, LONGEST_PAUSE = 2.0, 60.0  # seconds between two looks at a batch
FILE_SECONDS = 900.0  # for moving one file

T = TypeVar("T")

_TAG = "scopeatlas"  # the batch's metadata that carries the plan's name
_ENDPOINT = "/v1/chat/completions"
_ENDED = frozenset({"completed", "failed", "expired", "cancelled"})


async def run_batch(
    requests: Mapping[str, ChatRequest], config: ServerConfig, journal: Journal, *, rung: Rung, stopped: asyncio.Event, log: Log
) -> Problems:
    """Have `requests` (by key, none of them answered yet) answered as batches; the answers go into `journal`.

    Returns why a key is unanswered, by key. A batch that an earlier run left behind is waited for, and its requests are
    not sent again. `stopped`: return soon; a provider's batch goes on, and the next run fetches it. Files lie in
    `batches/` beside the journal. Raises ExplainerError if the server has no Batch API, refuses or stops working.
    """
    folder = journal.path.parent / "batches"
    if config.batch == "local":
        return await _run_locally(requests, config, journal, rung=rung, stopped=stopped, log=log, folder=folder)
    async with open_client(config) as client:
        return await _Provider(client, config, journal, stopped, log, folder).run(requests, rung)


def under_way(config: ServerConfig, journal: Journal) -> Problems:
    """The requests, by key, of batches at this server that have not ended, and why they are not to be sent another way."""
    problems: Problems = {}
    for plan in _unended(config, journal):
        problem = f'batch {plan.batch or plan.name} goes on at {config.url}; set batch to "provider" to fetch it'
        problems |= {key: problem for key in plan.keys if journal.open_sends(key)}
    return problems


# Files ----------------------------------------------------------------------------------------------------------------


def input_line(key: str, request: ChatRequest, config: ServerConfig, rung: Rung) -> bytes:
    """One line of an input file."""
    body = request_body(request, config, rung)
    return _line({"custom_id": key, "method": "POST", "url": _ENDPOINT, "body": body})


def output_line(key: str, reply: ChatReply) -> bytes:
    """One line of an output file: an answer."""
    message = {"role": "assistant", "content": reply.text, "refusal": reply.refusal or None}
    choice: dict[str, JsonValue] = {"index": 0, "finish_reason": reply.finish_reason, "message": message}
    if reply.logprobs:
        choice["logprobs"] = {"content": [_logprob(t.token, t.logprob, t.top) for t in reply.logprobs]}
    body: dict[str, JsonValue] = {"object": "chat.completion", "model": reply.model, "choices": [choice]}
    counts = {"prompt_tokens": reply.prompt_tokens, "completion_tokens": reply.completion_tokens}
    if None not in counts.values():
        body["usage"] = {**counts, "prompt_tokens_details": {"cached_tokens": reply.cached_tokens}}
    return _line({"custom_id": key, "response": {"status_code": 200, "body": body}, "error": None})


def error_line(key: str, problem: str) -> bytes:
    """One line of an error file: why a request has no answer."""
    return _line({"custom_id": key, "response": None, "error": {"code": "unanswered", "message": problem}})


def _logprob(token: str, logprob: float, top: Iterable[tuple[str, float]]) -> JsonValue:
    return {"token": token, "logprob": logprob, "top_logprobs": [{"token": t, "logprob": value} for t, value in top]}


def _line(value: Mapping[str, JsonValue]) -> bytes:
    # ASCII escapes keep even half a surrogate pair, which a text may hold and UTF-8 may not
    return json.dumps(value).encode("ascii") + b"\n"


def _write(path: Path, lines: Iterable[bytes]) -> None:
    with atomic_path(path) as target, target.open("wb") as stream:
        stream.writelines(lines)


@dataclass(frozen=True)
class _Outcome:
    """One line of an output or error file: the body of a completion, or the problem. lost: it may have been billed."""

    key: str
    body: bytes = b""
    problem: str = ""


def _outcomes(path: Path, secret: str) -> Iterator[_Outcome]:
    """The lines of an output or error file. One that is no JSON tells nothing, not even whose it is, and is left out."""
    with path.open("rb") as stream:
        for line in stream:
            try:
                found = json.loads(line)
                key, response = found["custom_id"], found.get("response") or {"status_code": "", "body": {}}
                if response["status_code"] == 200:
                    yield _Outcome(key, body=json.dumps(response["body"]).encode())
                    continue
                error = found.get("error") or response["body"]["error"]
                said = f"{error.get('code') or response['status_code']}: {error.get('message')}"
                problem = " ".join(redacted(said, secret).split())[:300]
            except (ValueError, LookupError, TypeError, AttributeError):
                continue
            yield _Outcome(key, problem=problem)


def ingest(
    paths: Iterable[Path], reservation: Callable[[str], Reservation | None], budget: Budget, rung: Rung, *, secret: str
) -> Problems:
    """Journal what output and error files hold. reservation: that of a request, None if it has been settled already.

    Returns why a key is unanswered, by key. Reading a file twice changes nothing.
    """
    problems: Problems = {}
    for path in paths:
        for outcome in _outcomes(path, secret):
            found = reservation(outcome.key)
            if outcome.problem:
                problems[outcome.key] = outcome.problem
                if found is not None:
                    budget.release(found, outcome.problem)
            elif found is not None:
                try:
                    budget.settle(found, reply_of(outcome.body, secret=secret), rung)
                except NoCompletion as error:
                    problems[outcome.key] = str(error)
                    budget.lose(found, str(error))
    return problems


# Our own runner -------------------------------------------------------------------------------------------------------


async def _run_locally(
    requests: Mapping[str, ChatRequest],
    config: ServerConfig,
    journal: Journal,
    *,
    rung: Rung,
    stopped: asyncio.Event,
    log: Log,
    folder: Path,
) -> Problems:
    """The same files for a server without a Batch API. An answer is journaled when it comes, since a kill must not lose it."""
    path = folder / f"{uuid.uuid4().hex}.jsonl"
    _write(path, (input_line(key, request, config, rung) for key, request in requests.items()))
    problems = await send_all(requests, config, journal, rung=rung, stopped=stopped, log=log)
    replies = ((key, journal.reply(key)) for key in requests)
    output, errors = path.with_suffix(".output.jsonl"), path.with_suffix(".errors.jsonl")
    _write(output, (output_line(key, reply) for key, reply in replies if reply is not None))
    _write(errors, (error_line(key, problem) for key, problem in problems.items()))
    log(f"the batch's answers are in {output}")
    return ingest([output, errors], lambda key: None, Budget(config, journal), rung, secret=config.api_key())


# The provider ---------------------------------------------------------------------------------------------------------


class _Plan(BaseModel, frozen=True):
    """One batch, as it is noted in the journal before anything is reserved for it.

    before: attempts at its requests that were open already, by key. batch: the provider's id, "" until it is known to be
    made. ended: how it ended, "" until its answers are journaled.
    """

    name: str
    url: str
    rung: Rung
    keys: tuple[str, ...]
    before: dict[str, list[int]]
    batch: str = ""
    ended: str = ""


def _unended(config: ServerConfig, journal: Journal) -> list[_Plan]:
    noted = [_Plan.model_validate(value) for value in journal.noted("batch").values()]
    return [plan for plan in noted if not plan.ended and plan.url == config.url]


class _Provider:
    """The Batch API of one server."""

    def __init__(
        self, client: "AsyncOpenAI", config: ServerConfig, journal: Journal, stopped: asyncio.Event, log: Log, folder: Path
    ):
        self._client, self._config, self._journal = client, config, journal
        self._stopped, self._log, self._folder = stopped, log, folder
        self._budget = Budget(config, journal, price=BATCH_PRICE)

    async def run(self, requests: Mapping[str, ChatRequest], rung: Rung) -> Problems:
        """See `run_batch`."""
        pending = [plan for plan in _unended(self._config, self._journal) if not requests.keys().isdisjoint(plan.keys)]
        pending = [plan for plan in [await self._find(plan) for plan in pending] if not plan.ended]
        waited_for = {key for plan in pending for key in plan.keys}
        problems: Problems = {}
        for lines in _files({key: request for key, request in requests.items() if key not in waited_for}, self._config, rung):
            if not self._stopped.is_set():
                plan, refused = self._plan(lines, requests, rung)
                problems |= refused
                if plan.keys:
                    pending.append(await self._submit(plan, lines))
        problems |= await self._follow(pending)
        return {key: problems.get(key, STOPPED) for key in requests if self._journal.reply(key) is None}

    def _note(self, plan: _Plan) -> _Plan:
        self._journal.note("batch", plan.name, plan.model_dump(mode="json"))
        return plan

    def _reservation(self, plan: _Plan, key: str) -> Reservation | None:
        """What is reserved for `key` in `plan`, and not settled."""
        found = self._journal.open_sends(key)
        return found[-1] if found and found[-1].send not in plan.before.get(key, ()) else None

    def _plan(self, lines: Mapping[str, bytes], requests: Mapping[str, ChatRequest], rung: Rung) -> tuple[_Plan, Problems]:
        """Note a batch of `lines` and reserve for it; those that the budget has no room for fall out, and why."""
        before = {key: [held.send for held in self._journal.open_sends(key)] for key in lines}
        before = {key: sends for key, sends in before.items() if sends}
        plan = self._note(_Plan(name=uuid.uuid4().hex, url=self._config.url, rung=rung, keys=tuple(lines), before=before))
        refused: Problems = {}
        for key in lines:
            if self._budget.reserve(requests[key], rung) is None:
                refused[key] = self._budget.refusal(requests[key], rung)
        plan = plan.model_copy(update={"keys": tuple(key for key in lines if key not in refused)})
        return (plan if plan.keys else self._note(plan.model_copy(update={"ended": "over budget"}))), refused

    async def _submit(self, plan: _Plan, lines: Mapping[str, bytes]) -> _Plan:
        """Upload the file and make the batch. Raises ExplainerError if the server refuses; then nothing stays reserved."""
        path = self._folder / f"{plan.name}.jsonl"
        _write(path, (lines[key] for key in plan.keys))
        try:
            file = await self._ask(lambda: self._client.files.create(file=path, purpose="batch", timeout=FILE_SECONDS))
            plan = await self._create(plan, file.id)
        except _Refused as error:
            problem = f"{self._config.url} takes no batch: {error}"
            self._give_up(plan, problem)
            raise ExplainerError(f'{problem}; check the key and the limits there, or set batch to "local" or "off"') from error
        self._log(f"batch {plan.batch}: {len(plan.keys)} requests handed over to {self._config.url}")
        return plan

    async def _create(self, plan: _Plan, file: str) -> _Plan:
        async def once() -> str:
            made = await self._made(plan)  # an attempt whose answer was lost may have made it
            asked = {"endpoint": _ENDPOINT, "completion_window": "24h", "metadata": {_TAG: plan.name}}
            return made or (await self._client.batches.create(input_file_id=file, **asked)).id

        return self._note(plan.model_copy(update={"batch": await self._ask(once)}))

    async def _made(self, plan: _Plan) -> str:
        """The id of the batch that was made for `plan`, "" if there is none."""
        async for batch in self._client.batches.list(limit=100):
            if (batch.metadata or {}).get(_TAG) == plan.name:
                return batch.id
        return ""

    async def _find(self, plan: _Plan) -> _Plan:
        """`plan` with its batch; one that was cut off before its batch was made is given up, for nothing was billed."""
        if plan.batch:
            return plan
        try:
            made = await self._ask(lambda: self._made(plan))
        except _Refused as error:
            raise ExplainerError(f"{self._config.url} does not list its batches: {error}; check the key and base_url") from error
        if made:
            return self._note(plan.model_copy(update={"batch": made}))
        return self._give_up(plan, "cut off before the batch was made")

    def _give_up(self, plan: _Plan, problem: str) -> _Plan:
        for key in plan.keys:
            if (held := self._reservation(plan, key)) is not None:
                self._budget.release(held, problem)
        return self._note(plan.model_copy(update={"ended": problem}))

    async def _follow(self, plans: Sequence[_Plan]) -> Problems:
        """Wait until the batches end and journal what they brought; why a key is unanswered, by key."""
        pending, pause, problems = list(plans), FIRST_PAUSE, Problems()
        while pending:
            for plan in list(pending):
                problem = f"batch {plan.batch} goes on at {self._config.url}; run again to fetch it"
                problems |= dict.fromkeys(plan.keys, problem)
                ended, found = await self._look(plan)
                if ended:
                    pending.remove(plan)
                    problems |= dict.fromkeys(plan.keys, "") | found
            if pending:
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._stopped.wait(), pause)
                    break
                pause = min(1.5 * pause, LONGEST_PAUSE)
        return problems

    async def _look(self, plan: _Plan) -> tuple[bool, Problems]:
        """Whether the batch has ended, and if so why which of its requests are unanswered; the answers are journaled."""
        try:
            batch = await self._ask(lambda: self._client.batches.retrieve(plan.batch))
            counts = batch.request_counts
            done = f", {counts.completed + counts.failed} of {counts.total} done" if counts else ""
            self._log(f"batch {plan.batch}: {batch.status}{done}")
            return (True, await self._collect(plan, batch)) if batch.status in _ENDED else (False, {})
        except _Refused as error:
            message = f"{self._config.url} does not hand out batch {plan.batch}: {error}"
            raise ExplainerError(f"{message}; check the key, then run again: it stays reserved until it is fetched") from error

    async def _collect(self, plan: _Plan, batch: "Batch") -> Problems:
        paths = []
        for file, ending in ((batch.output_file_id, ".output.jsonl"), (batch.error_file_id, ".errors.jsonl")):
            if file:
                found = await self._ask(partial(self._client.files.content, file, timeout=FILE_SECONDS))
                paths.append(self._folder / f"{plan.name}{ending}")
                _write(paths[-1], [found.content])
        secret = self._config.api_key()
        problems = ingest(paths, partial(self._reservation, plan), self._budget, plan.rung, secret=secret)
        faults = (batch.errors.data if batch.errors else None) or []
        said = redacted("; ".join(f"{fault.code}: {fault.message}" for fault in faults), secret)
        for key in plan.keys:
            if (held := self._reservation(plan, key)) is None or key in problems:
                continue
            problems[key] = f"the batch {batch.status} without an answer to this request. {said}".strip()
            if batch.status == "failed":  # it did not get past validation
                self._budget.release(held, problems[key])
            else:
                self._budget.lose(held, problems[key])
        self._note(plan.model_copy(update={"ended": batch.status}))
        return problems

    async def _ask(self, send: Callable[[], Awaitable[T]]) -> T:
        """What `send` brings; transient errors are tried again. Raises _Refused, or ExplainerError if they do not pass."""
        import openai

        problem = ""
        for attempt in range(1, self._config.max_attempts + 1):
            try:
                return await send()
            except openai.APIStatusError as error:
                problem = f"{error.status_code} {redacted(error.message, self._config.api_key())[:300]}"
                is_transient = error.status_code in (408, 409, 429) or error.status_code >= 500
                if not is_transient or "insufficient_quota" in f"{error.code} {error.type} {error.message}":
                    raise _Refused(problem) from error
            except openai.APIConnectionError as error:
                problem = str(error.__cause__ or error)[:300]
            await asyncio.sleep(backoff(attempt))
        message = f"{self._config.url} does not answer about batches ({problem})"
        raise ExplainerError(f"{message}; run again later: what it has taken on goes on there")


class _Refused(Exception):
    """The server will not do it, however often it is asked."""


def _files(requests: Mapping[str, ChatRequest], config: ServerConfig, rung: Rung) -> Iterator[dict[str, bytes]]:
    """The input lines by key, in portions that one file can hold."""
    lines: dict[str, bytes] = {}
    size = 0
    for key, request in requests.items():
        line = input_line(key, request, config, rung)
        if len(lines) == MAX_LINES or (lines and size + len(line) > MAX_BYTES):
            yield lines
            lines, size = {}, 0
        lines[key] = line
        size += len(line)
    if lines:
        yield lines
