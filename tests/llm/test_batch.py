"""Batches against a provider's Batch API on loopback, and the same files driven by our own runner."""

import asyncio
import json
import multiprocessing
import time
from pathlib import Path

import pytest

from scopeatlas.errors import ExplainerError
from scopeatlas.llm import batch
from scopeatlas.llm.batch import ingest, run_batch
from scopeatlas.llm.budget import Budget
from scopeatlas.llm.config import ServerConfig
from scopeatlas.llm.journal import Journal
from scopeatlas.llm.requests import Answer, ChatRequest
from scopeatlas.llm.runner import ask
from tests.llm_server import BatchBehaviour, Body, Failure, Server

SCHEMA = {
    "name": "number",
    "strict": True,
    "schema": {
        "type": "object",
        "properties": {"number": {"type": "integer"}},
        "required": ["number"],
        "additionalProperties": False,
    },
}


class Numbers:
    """Answers with the number that the request is about."""

    def answer(self, body: Body) -> str:
        return json.dumps({"number": int(body["messages"][-1]["content"].split()[-1])})


def number(feature: int) -> ChatRequest:
    messages = ({"role": "system", "content": "Say the number."}, {"role": "user", "content": f"It is {feature}"})
    return ChatRequest("explain", "sae", feature, messages, SCHEMA, max_output_tokens=20, prompt="number@1")


def numbers_of(answers: list[Answer]) -> list[int | None]:
    return [None if answer.reply is None else json.loads(answer.reply.text)["number"] for answer in answers]


@pytest.fixture(autouse=True)
def _no_long_waits(monkeypatch):
    monkeypatch.setattr(batch, "FIRST_PAUSE", 0.01)
    monkeypatch.setattr(batch, "backoff", lambda attempt: 0.01)


@pytest.fixture
def journal(tmp_path) -> Path:
    return tmp_path / "llm" / "journal.jsonl"


@pytest.fixture
def asked(journal):
    """Ask for the numbers below `count` from a server as a batch; the answers."""

    def asked(server: Server, count: int = 4, **settings) -> list[Answer]:
        config = ServerConfig(**{"model": "m", "base_url": server.url, "batch": "provider", **settings})
        with Journal(journal) as opened:
            return ask([number(n) for n in range(count)], config, opened)

    return asked


def provider(**behaviour) -> Server:
    return Server(Numbers(), batches=BatchBehaviour(**behaviour))


def spent(journal: Path):
    with Journal(journal) as opened:
        return opened.spent_by_purpose().get("explain")


def test_each_answer_comes_to_its_own_request_whatever_their_order(asked):
    with provider() as server:
        assert numbers_of(asked(server, 5)) == [0, 1, 2, 3, 4]


def test_requests_go_as_one_file_and_none_on_its_own(asked):
    with provider() as server:
        asked(server, 5)
        (lines,) = server.batches.inputs
    assert len(lines) == len(server.requests) == 5


@pytest.mark.parametrize("mode", ["local", "provider"])
def test_a_batch_gives_what_asking_directly_gives(tmp_path, mode):
    found = []
    for setting in ("off", mode):
        with provider() as server, Journal(tmp_path / setting / "j.jsonl") as opened:
            answers = ask([number(n) for n in range(4)], ServerConfig("m", server.url, batch=setting), opened)
            spent = opened.spent()
            found.append(([a.reply and a.reply.text for a in answers], spent.settled_tokens, spent.open_tokens))
    assert found[0] == found[1]


def test_both_kinds_of_batch_write_the_same_input_file(tmp_path):
    written = []
    for mode in ("local", "provider"):
        with provider() as server, Journal(tmp_path / mode / "j.jsonl") as opened:
            ask([number(n) for n in range(4)], ServerConfig("m", server.url, batch=mode), opened)
        (path,) = (p for p in (tmp_path / mode / "batches").glob("*.jsonl") if p.name.count(".") == 1)
        written.append(path.read_bytes())
    assert written[0] == written[1]
    assert [json.loads(line)["body"] for line in written[0].splitlines()] == server.requests


def test_a_local_batch_leaves_an_output_file_that_can_be_read_as_a_providers(journal, asked, tmp_path):
    with Server(Numbers()) as server:
        answers = asked(server, 3, batch="local")
    (path,) = (journal.parent / "batches").glob("*.output.jsonl")
    config = ServerConfig("m", server.url)
    with Journal(tmp_path / "other.jsonl") as other:
        budget = Budget(config, other)
        held = {answer.key: budget.reserve(answer.request, "json_schema") for answer in answers}
        ingest([path], held.get, budget, "json_schema", secret="")
        assert [other.reply(answer.key) for answer in answers] == [answer.reply for answer in answers]


def test_what_is_answered_is_not_asked_again(asked):
    with provider() as server:
        first = asked(server)
        second = asked(server)
        assert len(server.batches.batches) == 1
    assert numbers_of(second) == numbers_of(first)
    assert all(answer.reused for answer in second)


@pytest.mark.parametrize(("limit", "value"), [("MAX_LINES", 3), ("MAX_BYTES", 1500)])
def test_more_than_a_file_can_hold_goes_into_several(asked, monkeypatch, limit, value):
    monkeypatch.setattr(batch, limit, value)
    with provider() as server:
        answers = asked(server, 7)
        sizes = [len(lines) for lines in server.batches.inputs]
        lengths = [len(file) for name, file in server.batches.files.items() if b'"method"' in file]
    assert numbers_of(answers) == list(range(7))
    assert sum(sizes) == 7
    assert max(sizes if limit == "MAX_LINES" else lengths) <= value


def test_a_providers_batch_costs_half(tmp_path):
    dollars = []
    for mode in ("off", "provider"):
        prices = {"usd_per_million_input": 1000.0, "usd_per_million_output": 4000.0}
        with provider() as server, Journal(tmp_path / mode) as opened:
            ask([number(n) for n in range(4)], ServerConfig("m", server.url, batch=mode, **prices), opened)
            dollars.append(opened.spent_by_purpose()["explain"].settled_usd)
    assert dollars[1] == pytest.approx(dollars[0] / 2)
    assert dollars[0] > 0


@pytest.mark.parametrize("outcome", ["expired", "cancelled"])
def test_a_batch_that_ends_early_gives_what_it_has_and_the_rest_can_be_asked_again(asked, journal, outcome):
    with provider(outcome=outcome, share=0.5) as server:
        answers = asked(server, 4)
        assert numbers_of(answers) == [0, 1, None, None]
        assert all(outcome in answer.problem for answer in answers[2:])
        assert spent(journal).open_tokens == 0
        server.batches.behaviour = BatchBehaviour()
        assert numbers_of(asked(server, 4)) == [0, 1, 2, 3]
        assert [len(lines) for lines in server.batches.inputs] == [4, 2]


def test_a_batch_that_fails_costs_nothing_and_says_why(asked, journal):
    with provider(outcome="failed") as server:
        answers = asked(server)
    assert numbers_of(answers) == [None] * 4
    assert all("a line is not valid" in answer.problem for answer in answers)
    assert (spent(journal).settled_tokens, spent(journal).open_tokens) == (0, 0)


def test_a_request_with_a_fault_of_its_own_fails_alone(asked, journal):
    with provider() as server:
        server.faults = lambda call: Failure(400, "too long", "context_length_exceeded") if call.number == 2 else "ok"
        answers = asked(server)
    assert numbers_of(answers) == [0, None, 2, 3]
    assert "too long" in answers[1].problem
    assert spent(journal).open_tokens == 0


def test_an_answer_that_ignores_the_schema_is_kept_and_is_none(asked, journal):
    with provider() as server:
        server.faults = lambda call: "schema_ignored" if call.number == 2 else "ok"
        answers = asked(server)
    assert [bool(answer.problem) for answer in answers] == [False, True, False, False]
    assert answers[1].reply is not None
    assert spent(journal).answers == 4


def test_what_no_file_tells_of_stays_reserved(asked, journal):
    with provider(silent=1) as server:
        answers = asked(server)
    assert numbers_of(answers) == [0, 1, 2, None]
    assert spent(journal).open_requests == 1


def test_damaged_strange_and_repeated_lines_change_nothing(tmp_path):
    config = ServerConfig("m", "http://127.0.0.1:1/v1")
    whole = batch.output_line("k", _reply('{"number": 1}'))
    lines = [b"\n", b"[1]\n", b'{"custom_id": "k"}\n', batch.output_line("nobody", _reply("{}")), whole, whole, whole[:50]]
    (tmp_path / "output").write_bytes(b"".join(lines))
    request = number(1)
    with Journal(tmp_path / "j") as opened:
        budget = Budget(config, opened)
        held = budget.reserve(request, "json_schema")
        open_now = lambda key: held if key == "k" and opened.open_sends(request.key(config)) else None  # noqa: E731
        assert ingest([tmp_path / "output"], open_now, budget, "json_schema", secret="") == {}
        assert (opened.spent().answers, opened.spent().open_tokens) == (1, 0)


def test_a_line_that_is_no_completion_may_have_been_billed(tmp_path):
    config = ServerConfig("m", "http://127.0.0.1:1/v1")
    line = {"custom_id": "k", "response": {"status_code": 200, "body": {"choices": []}}, "error": None}
    (tmp_path / "output").write_text(json.dumps(line) + "\n")
    with Journal(tmp_path / "j") as opened:
        budget = Budget(config, opened)
        held = budget.reserve(number(1), "json_schema")
        problems = ingest([tmp_path / "output"], lambda key: held, budget, "json_schema", secret="")
        assert "no chat completion" in problems["k"]
        assert opened.spent().open_tokens == held.tokens


def test_a_key_in_an_error_line_is_not_passed_on(tmp_path):
    error = {"code": "oops", "message": "cannot use sk-very-secret-0123456789"}
    (tmp_path / "errors").write_text(json.dumps({"custom_id": "k", "response": None, "error": error}) + "\n")
    with Journal(tmp_path / "j") as opened:
        budget = Budget(ServerConfig("m", "http://127.0.0.1:1/v1"), opened)
        problems = ingest([tmp_path / "errors"], lambda key: None, budget, "json_schema", secret="sk-very-secret-0123456789")
    assert problems == {"k": "oops: cannot use [key]"}


def _reply(text: str):
    from scopeatlas.llm.requests import ChatReply

    return ChatReply(text, "stop", model="m", prompt_tokens=5, completion_tokens=3)


def test_the_budget_decides_what_goes_into_the_file(asked):
    with provider() as server:
        answers = asked(server, 6, max_tokens_total=3000)
        (lines,) = server.batches.inputs
    missing = [answer for answer in answers if answer.reply is None]
    assert 0 < len(lines) == 6 - len(missing) < 6
    assert all("max_tokens_total=3000" in answer.problem for answer in missing)


def test_a_server_without_batches_is_named_and_nothing_stays_reserved(asked, journal):
    with Server(Numbers()) as server, pytest.raises(ExplainerError, match=r'127\.0\.0\.1.*set batch to "local"'):
        asked(server)
    assert spent(journal).open_tokens == 0


def test_passing_trouble_with_the_batch_endpoints_is_waited_out(asked):
    with provider(flaky=3) as server:
        assert numbers_of(asked(server)) == [0, 1, 2, 3]


def test_lasting_trouble_ends_the_run_and_not_the_batch(asked):
    with provider(polls=10**6) as server:
        server.batches.behaviour = BatchBehaviour(flaky=10**6)
        with pytest.raises(ExplainerError, match="run again later"):
            asked(server)
        server.batches.behaviour = BatchBehaviour()
        assert numbers_of(asked(server)) == [0, 1, 2, 3]
        assert len(server.requests) == 4


def test_stopping_leaves_the_batch_at_the_provider_for_the_next_run(asked, journal):
    with provider(polls=10**6) as server:
        config = ServerConfig("m", server.url, batch="provider")
        requests = [number(n) for n in range(4)]
        with Journal(journal) as opened:
            problems = _stopped_while_it_waits(server, requests, config, opened)
        message = f"batch batch_0 goes on at {server.url}; run again to fetch it"
        assert problems == dict.fromkeys((request.key(config) for request in requests), message)
        server.batches.behaviour = BatchBehaviour()
        assert numbers_of(asked(server)) == [0, 1, 2, 3]
        assert len(server.batches.batches) == 1


def test_a_batch_that_others_wait_for_is_left_alone(asked, journal):
    with provider(polls=10**6) as server:
        config = ServerConfig("m", server.url, batch="provider")
        with Journal(journal) as opened:
            _stopped_while_it_waits(server, [number(7)], config, opened)
        server.batches.behaviour = BatchBehaviour()
        assert numbers_of(asked(server, 2)) == [0, 1]
        assert len(server.requests) == 2


@pytest.mark.parametrize("mode", ["off", "local"])
def test_what_a_batch_goes_on_with_is_not_sent_another_way(asked, journal, mode):
    with provider(polls=10**6) as server:
        config = ServerConfig("m", server.url, batch="provider")
        with Journal(journal) as opened:
            _stopped_while_it_waits(server, [number(0), number(1)], config, opened)
        answers = asked(server, 3, batch=mode)
        assert numbers_of(answers) == [None, None, 2]
        message = f'batch batch_0 goes on at {server.url}; set batch to "provider" to fetch it'
        assert [answer.problem for answer in answers] == [message, message, ""]
        assert len(server.requests) == 1
        server.batches.behaviour = BatchBehaviour()
        assert numbers_of(asked(server, 3)) == [0, 1, 2]
        assert numbers_of(asked(server, 3, batch=mode)) == [0, 1, 2]
        assert len(server.requests) == 3


def _stopped_while_it_waits(
    server: Server, requests: list[ChatRequest], config: ServerConfig, journal: Journal
) -> dict[str, str]:
    """What is said of requests whose run is stopped once it has asked for the first time how their batch goes."""

    async def stop(stopped: asyncio.Event) -> None:
        while not any(found["polls"] for found in server.batches.batches.values()):
            await asyncio.sleep(0.02)
        stopped.set()

    async def run() -> dict[str, str]:
        stopped = asyncio.Event()
        by_key = {request.key(config): request for request in requests}
        waiting = run_batch(by_key, config, journal, rung="json_schema", stopped=stopped, log=print)
        return (await asyncio.gather(waiting, stop(stopped)))[0]

    return asyncio.run(run())


def _ask_until_killed(url: str, path: Path) -> None:
    with Journal(path) as opened:
        ask([number(n) for n in range(4)], ServerConfig("m", url, batch="provider"), opened)


def test_a_run_killed_while_it_waits_is_taken_up_and_nothing_uploaded_twice(asked, journal):
    with provider(polls=10**6) as server:
        client = multiprocessing.get_context("spawn").Process(target=_ask_until_killed, args=(server.url, journal))
        client.start()
        while not any(found["polls"] for found in server.batches.batches.values()):
            time.sleep(0.05)
        client.kill()
        client.join()
        server.batches.behaviour = BatchBehaviour()
        assert numbers_of(asked(server)) == [0, 1, 2, 3]
        assert (len(server.batches.batches), len(server.requests)) == (1, 4)
        assert len([file for file in server.batches.files.values() if b'"method"' in file]) == 1


class Killed(BaseException):
    pass


class MortalJournal(Journal):
    """Dies instead of writing its `last`th line from now on, and every one after it."""

    last = 10**9

    def _append(self, event):
        self.last -= 1
        if self.last < 0:
            raise Killed
        super()._append(event)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["provider", "local"])
def test_killed_at_any_line_of_the_journal_each_request_is_still_answered_and_its_cost_known(tmp_path, smollm2, mode):
    requests = [number(n) for n in range(3)]
    deaths = 0
    while True:
        with Server(Numbers(), usage="usage_low", tokenizer=smollm2, batches=BatchBehaviour(polls=0)) as server:
            config = ServerConfig("m", server.url, batch=mode, tokenizer=smollm2, max_concurrency=1)
            path = tmp_path / f"{deaths}.jsonl"
            with MortalJournal(path) as opened:
                opened.last = deaths
                try:
                    ask(requests, config, opened)
                    break
                except Killed:
                    pass
            with Journal(path) as opened:
                assert numbers_of(ask(requests, config, opened)) == [0, 1, 2]
                spent = opened.spent()
            assert spent.settled_tokens <= server.true_tokens() <= spent.settled_tokens + spent.open_tokens
            times_asked = [server.requests.count(body) for body in server.requests]
            # where the answer comes at once it can be lost with the line that should have told of it
            assert max(times_asked) <= (1 if mode == "provider" else 2)
            deaths += 1
    assert deaths > 7
