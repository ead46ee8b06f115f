"""The journal of a store in a bucket: what one machine paid for, every machine has."""

import os
import signal
import subprocess
import sys
from dataclasses import replace

import pytest

from scopeatlas.errors import StoreError
from scopeatlas.llm import journal as journal_module
from scopeatlas.llm.journal import Journal, open_journal, read_journal
from scopeatlas.llm.ledger import Reservation, Spent
from scopeatlas.llm.requests import Charge, ChatReply
from scopeatlas.llm.runner import ask
from scopeatlas.storage.segments import read_segments
from scopeatlas.storage.uris import location, sizes_under
from tests.llm.asking import TEXT, answered, question, server_config
from tests.llm_server import Server


class Machines:
    """Several machines that use one store, told apart by where they keep their state."""

    def __init__(self, root, folder, monkeypatch):
        self.root, self.folder, self.monkeypatch = root, folder, monkeypatch

    def use(self, name: str):
        self.monkeypatch.setenv("SCOPE_ATLAS_STATE", str(self.folder / name))
        return self.root

    def open(self, name: str, **options) -> Journal:
        return open_journal(self.use(name), **options)

    def read(self, name: str = "new"):
        return read_journal(self.use(name))


@pytest.fixture
def machines(s3, request, tmp_path, monkeypatch) -> Machines:
    return Machines(location(f"{s3}/{request.node.name.replace('[', '-').rstrip(']')}"), tmp_path, monkeypatch)


def killed(journal: Journal) -> None:
    """As a kill leaves it: what was written is on the disk, the lock is free, nothing more is done."""
    os.close(journal._descriptor)
    journal._descriptor = -1


def test_an_answer_paid_for_on_one_machine_is_there_on_another(machines):
    with machines.open("a") as journal:
        answered(journal, "k")
    with machines.open("b") as journal:
        assert journal.reply("k") is not None and journal.spent() == Spent(30, 10, answers=1)
        answered(journal, "l")
    assert machines.read().spent() == Spent(60, 20, answers=2) == machines.read("a").spent()


def test_after_a_kill_this_machine_has_all_and_another_what_was_put(machines, monkeypatch):
    journal = machines.open("a")
    answered(journal, "early")
    monkeypatch.setattr(journal_module, "_SEGMENT_SECONDS", 0.0)
    answered(journal, "put")
    monkeypatch.undo()
    answered(journal, "late")
    killed(journal)
    assert [machines.read(name).reply("late") is not None for name in "ab"] == [True, False]
    with machines.open("b") as journal:
        assert journal.reply("early") and journal.reply("put") and not journal.reply("late")
    with machines.open("a") as journal:
        assert journal.reply("late") and journal.spent().answers == 3
    assert machines.read().spent().answers == 3


def test_a_process_that_is_really_killed_loses_no_line_on_its_machine(machines):
    root = machines.use("a")
    code = f"""
import os, signal
from scopeatlas.llm.journal import open_journal
from scopeatlas.storage.uris import location
from tests.llm.asking import answered
journal = open_journal(location('{root}'))
for number in range(20): answered(journal, str(number))
os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == -signal.SIGKILL
    assert machines.read("b").spent().answers == 0
    machines.open("a").close()
    assert machines.read("b").spent().answers == 20


def test_a_kill_between_putting_and_striking_off_counts_nothing_twice(machines, monkeypatch):
    journal = machines.open("a")
    answered(journal, "k")
    content = journal.path.read_bytes()
    journal.close()
    journal.path.write_bytes(content)
    assert machines.read("a").spent().answers == 1
    with machines.open("a") as journal:
        assert journal.spent().answers == 1
    assert machines.read().spent().answers == 1


def test_a_store_out_of_reach_at_the_end_costs_nothing(machines, monkeypatch):
    said = []
    journal = machines.open("a", log=said.append)
    answered(journal, "k")

    def refuse(*_):
        raise StoreError("no network")

    monkeypatch.setattr(journal_module, "append_segment", refuse)
    journal.close()
    assert said == [f"the journal's last lines are in {journal.path} alone: no network"]
    monkeypatch.undo()
    machines.open("a").close()
    assert machines.read("b").spent().answers == 1


def test_a_segment_that_arrives_though_its_answer_is_lost_counts_once(machines, monkeypatch):
    with machines.open("a") as journal:
        answered(journal, "k")
        journal.sent(question(1), Reservation(-1, "open", "explain", 1, 100, 60, None, False), model="m", attempt=1)
        store = machines.root.fs
        put = store.pipe_file

        def unanswered(*arguments, **options):
            put(*arguments, **options)
            raise ConnectionResetError("reset by peer")

        with monkeypatch.context() as patch:
            patch.setattr(store, "pipe_file", unanswered)
            patch.setattr(journal_module, "_SEGMENT_SECONDS", 0.0)
            answered(journal, "l")
        answered(journal, "m")
        spent = journal.spent()
    assert len(read_segments(machines.root / "llm" / "journal")) > 1
    assert machines.read().spent() == spent == Spent(90, 30, open_tokens=160, answers=3, open_requests=1)
    with machines.open("b") as journal:
        answered(journal, "n")
    assert machines.read("a").spent() == spent + Spent(30, 10, answers=1)


def test_a_session_without_events_leaves_no_segment(machines):
    for _ in range(3):
        machines.open("a").close()
    assert sizes_under(machines.root, nested=True) == {}


def test_a_segment_is_put_when_there_is_much_to_put(machines, monkeypatch):
    monkeypatch.setattr(journal_module, "_SEGMENT_BYTES", 2000)
    with machines.open("a") as journal:
        for number in range(20):
            answered(journal, str(number))
        segments = read_segments(machines.root / "llm" / "journal")
        assert len(segments) > 3 and journal.path.stat().st_size <= 2000
        assert machines.read().spent().answers >= 15


def test_one_process_at_a_time_uses_the_journal_of_a_machine(machines):
    code = f"""
from scopeatlas.llm.journal import open_journal
from scopeatlas.storage.uris import location
open_journal(location('{machines.use("a")}'), log=lambda line: print(line, flush=True))
"""
    with machines.open("a"):
        other = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        assert other.stdout is not None and other.stdout.readline().startswith("waiting for another run")
        assert other.poll() is None
    assert other.wait(60) == 0


def test_a_damaged_line_is_named_where_it_is(machines):
    journal = machines.open("a")
    answered(journal, "k")
    killed(journal)
    lines = journal.path.read_bytes().splitlines(keepends=True)
    journal.path.write_bytes(b"".join([lines[0], b"{half\n", *lines[2:]]))
    with pytest.raises(StoreError, match=f"line 2 of the journal {journal.path} is damaged; put {{}} in the place"):
        machines.open("a")
    (machines.root / "llm" / "journal" / "00000000.segment").write_bytes(lines[0] + b"{half\n")
    with pytest.raises(StoreError, match="line 2 of segment 0 of the journal s3://.*/llm/journal is damaged"):
        machines.read("b")


@pytest.mark.parametrize("damage", [b"{half\n", b"{}\n"])
def test_a_damaged_first_line_is_put_nowhere_and_can_be_mended_as_is_said(machines, damage):
    journal = machines.open("a")
    answered(journal, "k")
    killed(journal)
    _, *lines = journal.path.read_bytes().splitlines(keepends=True)
    journal.path.write_bytes(b"".join([damage, *lines]))
    with pytest.raises(StoreError, match='line 1 of the journal .* is damaged; put {"session": "NAME", "base": N} in the'):
        machines.open("a")
    assert read_segments(machines.root / "llm" / "journal") == []
    journal.path.write_bytes(b"".join([b'{"session": "mended", "base": 0}\n', *lines]))
    machines.open("a").close()
    assert machines.read().spent().answers == 1


def test_what_one_machine_asked_another_does_not_ask_again(machines):
    requests = [question(number) for number in range(5)]
    with Server() as server:
        billed = []
        for name in ("a", "b"):
            with machines.open(name) as journal:
                answers = ask(requests, server_config(server.url), journal)
            billed.append(len(server.ledger()))
    assert [answer.reused for answer in answers] == [True] * 5 and all(answer.reply for answer in answers)
    assert billed[0] == billed[1] >= 5


@pytest.mark.slow
def test_machines_at_the_same_time_lose_nothing_and_count_nothing_twice(machines, rng, monkeypatch):
    """Random attempts on three machines, two often at once, segments at random moments, kills, and attempts that another
    machine ends: in the end every attempt is accounted for exactly once."""
    cost: dict[str, tuple[str, int]] = {}  # by key, each of one attempt: how it stands, and its tokens
    running: dict[str, Journal] = {}
    for number in range(150):
        name = "abc"[rng.integers(3)]
        monkeypatch.setattr(journal_module, "_SEGMENT_BYTES", 0 if rng.random() < 0.1 else 1 << 20)
        if name not in running:
            running[name] = machines.open(name)
        journal = running[name]
        machines.use(name)
        if rng.random() < 0.1:
            killed(journal) if rng.random() < 0.5 else journal.close()
            del running[name]
        elif rng.random() < 0.6:
            key, tokens = f"k{number}", int(rng.integers(1, 1000))
            reservation = Reservation(-1, key, "explain", 0, tokens, 0, None, False)
            journal.sent(question(1), reservation, model="m", attempt=1)
            cost[key] = ("open", tokens)
        else:
            known = [held for key in cost for held in journal.open_sends(key)]
            if known:
                ended(journal, known[rng.integers(len(known))], cost, failed=bool(rng.random() < 0.3))
    for journal in running.values():
        journal.close()
    for name in "abc":
        machines.open(name).close()
    spent = machines.read().spent()
    settled = [tokens for state, tokens in cost.values() if state == "received"]
    still = [tokens for state, tokens in cost.values() if state == "open"]
    assert (spent.settled_tokens, spent.answers) == (sum(settled), len(settled))
    assert (spent.open_tokens, spent.open_requests) == (sum(still), len(still))


def ended(journal: Journal, held: Reservation, cost: dict[str, tuple[str, int]], *, failed: bool) -> None:
    """End an attempt, as another machine may have before: then both heard the same of it."""
    state, tokens = cost[held.key]
    if state == "failed" or (state == "open" and failed):
        cost[held.key] = ("failed", tokens)
        journal.failed(held, "429")
        return
    cost[held.key] = ("received", tokens)
    reply = replace(ChatReply(TEXT, "stop", "", "m", 0, 0), prompt_tokens=tokens)
    journal.received(held, reply, rung="json_schema", charge=Charge(tokens, 0), open_tokens=0, open_usd=0.0)
