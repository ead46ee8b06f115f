"""A run that ends before its time, by a signal or a kill at every state of the journal, and the run after it."""

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from scopeatlas.llm.journal import Journal
from scopeatlas.llm.runner import ask
from tests.llm.asking import question, server_config
from tests.llm_server import Server, body_key

CHILD = """
import asyncio, os, signal, sys
from pathlib import Path
from types import SimpleNamespace
from scopeatlas.llm import limits, runner
from scopeatlas.llm.journal import Journal
from scopeatlas.llm.runner import ask
from tests.llm.asking import question, server_config
limits.backoff = lambda attempt: 0.01
class Telling(asyncio.Event):
    def set(self):
        super().set()
        print("nothing more is sent", flush=True)
runner.asyncio = SimpleNamespace(**vars(asyncio) | {"Event": Telling})
def run(url, path):
    with Journal(Path(path)) as journal:
        return ask([question(number) for number in range(40)], server_config(url, max_concurrency=4), journal)
"""

# Dies after, or in the middle of, writing an event of the given state; one child for each, forked from a warm process.
DYING = """
def die(state, number, torn, *job):
    append, seen = Journal._append, []
    def dying(self, event):
        seen.extend([event] if event["state"] == state else [])
        if len(seen) < number:
            return append(self, event)
        if torn:
            os.write(self._descriptor, b'{"state": "' + state.encode())
        else:
            append(self, event)
        os.kill(os.getpid(), signal.SIGKILL)
    Journal._append = dying
    run(*job)
import openai
for line in sys.stdin:
    state, number, torn, url, path = line.split()
    if (child := os.fork()) == 0:
        die(state, int(number), torn == "True", url, path)
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), *sys.path]), "NO_PROXY": "127.0.0.1"}


@pytest.fixture(scope="module")
def mortal():
    """Runs 40 questions in a process that dies at a state of the journal, and returns how it ended."""
    process = subprocess.Popen([sys.executable, "-c", CHILD + DYING], stdin=-1, stdout=-1, text=True, env=ENVIRONMENT)

    def run(*job: object) -> int:
        assert process.stdin and process.stdout
        process.stdin.write(" ".join(map(str, job)) + "\n")
        process.stdin.flush()
        return int(process.stdout.readline())

    yield run
    process.communicate(timeout=30)


def faults(call):
    """Every tenth request fails at first, every tenth is lost, every tenth is answered by another model."""
    if call.seen:
        return "ok"
    return {1: "500", 2: "reset_after", 3: "wrong_model"}.get(int(call.body["messages"][1]["content"]) % 10, "ok")


@pytest.mark.parametrize("torn", [False, True])
@pytest.mark.parametrize(
    ("state", "number"),
    [("sent", 1), ("note", 1), ("sent", 9), ("received", 1), ("received", 9), ("failed", 2), ("lost", 2), ("invalid", 2)],
)
def test_after_a_kill_at_any_state_no_journaled_answer_is_asked_for_again(tmp_path, mortal, state, number, torn):
    path = tmp_path / "journal.jsonl"
    with Server(faults=faults) as server:
        assert mortal(state, number, torn, server.url, path) == -signal.SIGKILL
        with Journal(path) as journal:
            config = server_config(server.url)
            kept = {question(n).key(config): n for n in range(40) if journal.reply(question(n).key(config)) is not None}
            assert journal.counts().get("sent", 0) <= 4  # what was in flight
        before, probes = len(server.ledger()), len(server.probes)
        with Journal(path) as journal:
            found = ask([question(n) for n in range(40)], config, journal)
            spent = journal.spent()
        again = {entry.key for entry in server.ledger()[before:]}
        bodies = {body_key(body): int(body["messages"][1]["content"]) for body in server.requests}
        true = server.true_tokens()
    assert again.isdisjoint(key for key, n in bodies.items() if n in kept.values())
    assert all(answer.reply is not None for answer in found)
    assert spent.settled_tokens <= true <= spent.settled_tokens + spent.open_tokens
    assert len(server.probes) - probes == ((state, number) == ("sent", 1) or (state, number, torn) == ("received", 1, True))


@pytest.mark.parametrize("signal_number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_lets_what_is_under_way_come_in_and_sends_nothing_more(tmp_path, signal_number):
    path = tmp_path / "journal.jsonl"
    with Server(faults=lambda call: "stall" if call.number > 5 else "ok") as server:
        child = subprocess.Popen(
            [sys.executable, "-c", CHILD + "run(*sys.argv[1:])", server.url, str(path)], env=ENVIRONMENT, stdout=-1, stderr=-1
        )
        while server.in_flight < 4 or len(server.requests) < 9:
            assert child.poll() is None
            threading.Event().wait(0.02)
        child.send_signal(signal_number)
        assert child.stdout and child.stdout.readline() == b"nothing more is sent\n"
        server.release()
        child.communicate(timeout=30)
        assert len(server.requests) == 9
        true = server.true_tokens()
    with Journal(path) as journal:
        spent = journal.spent()
    assert child.returncode == (-signal.SIGINT if signal_number == signal.SIGINT else 143)
    assert (spent.answers, spent.open_requests, spent.settled_tokens) == (10, 0, true)


def test_a_second_signal_does_not_wait(tmp_path):
    path = tmp_path / "journal.jsonl"
    with Server(faults=lambda call: "stall" if call.number > 5 else "ok") as server:
        child = subprocess.Popen(
            [sys.executable, "-c", CHILD + "run(*sys.argv[1:])", server.url, str(path)], env=ENVIRONMENT, stdout=-1, stderr=-1
        )
        while server.in_flight < 4 or len(server.requests) < 9:
            assert child.poll() is None
            threading.Event().wait(0.02)
        child.send_signal(signal.SIGINT)
        assert child.stdout and child.stdout.readline() == b"nothing more is sent\n"
        child.send_signal(signal.SIGINT)
        child.communicate(timeout=30)
    with Journal(path) as journal:
        assert (journal.spent().answers, journal.spent().open_requests) == (6, 4)


def test_a_journal_holds_no_secret_and_says_of_every_attempt_what_it_was(tmp_path):
    path = tmp_path / "journal.jsonl"
    with Server(faults=faults) as server, Journal(path) as journal:
        ask([question(number) for number in range(10)], server_config(server.url), journal)
    events = [json.loads(line) for line in path.read_text().splitlines()]
    assert {event["state"] for event in events} == {"sent", "received", "failed", "lost", "invalid", "note"}
    retried = [event for event in events if event["state"] == "sent" and event["attempt"] > 1]
    assert [event["feature"] for event in retried] in ([1, 2], [2, 1])
