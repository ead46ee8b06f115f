import json
import multiprocessing
import os
import random
import threading
import time

import pytest

from scopeatlas.errors import StoreError
from scopeatlas.llm.journal import JOURNAL, Journal, open_journal, read_journal
from scopeatlas.llm.ledger import Reservation, Spent
from scopeatlas.llm.requests import Charge, ChatReply, TokenLogprob
from tests.llm.asking import TEXT, answered, question

REPLY = ChatReply('{"a": "ä\ud800\\n"}', "stop", "", "m", 3, 2, None, (TokenLogprob("x", -0.5, (("y", -1.5), ("z", -9.0))),))


def send(journal: Journal, key: str, *, purpose: str = "explain", usd: float | None = None) -> Reservation:
    reservation = Reservation(-1, key, purpose, 1, 100, 60, usd, False)
    return journal.sent(question(1), reservation, model="m", attempt=1)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "deep" / "journal.jsonl"


def test_a_reply_is_found_again_unchanged_after_reopening(path):
    with Journal(path) as journal:
        answered(journal, "k", reply=REPLY)
    with Journal(path) as journal:
        assert journal.reply("k") == REPLY


def test_an_answer_keeps_its_rung_its_time_and_its_charge(path):
    charge = Charge(30, 10, 5, 0.25)
    with Journal(path) as journal:
        answered(journal, "k", rung="json_object", charge=charge)
        before = journal.entry("k")
    with Journal(path) as journal:
        entry = journal.entry("k")
    assert entry == before
    assert entry is not None
    assert (entry.rung, entry.charge, entry.time[:4]) == ("json_object", charge, f"{time.gmtime().tm_year}")


def test_states_follow_the_events(path):
    with Journal(path) as journal:
        sends = {key: send(journal, key) for key in "abc"}
        journal.failed(sends["a"], "429")
        journal.lost(sends["b"], "timeout")
        answered(journal, "d")
        answered(journal, "e")
        journal.invalid("e", "not JSON")
    with Journal(path) as journal:
        states = [journal.state(key) for key in "abcdef"]
    assert states == ["failed", "lost", "sent", "received", "invalid", None]


def test_an_answer_stays_an_answer_whatever_comes_of_another_attempt(path):
    with Journal(path) as journal:
        late = send(journal, "k")
        answered(journal, "k")
        journal.lost(late, "timeout")
        assert journal.state("k") == "received"


def test_the_first_answer_stays_and_a_second_one_is_paid_for_all_the_same(path):
    with Journal(path) as journal:
        answered(journal, "k")
        answered(journal, "k", reply=REPLY, charge=Charge(1, 1))
    with Journal(path) as journal:
        assert journal.reply("k") != REPLY
        assert journal.spent().settled_tokens == 42


def test_an_invalid_reply_is_kept_with_the_reason(path):
    with Journal(path) as journal:
        answered(journal, "k")
        journal.invalid("k", "not JSON")
    with Journal(path) as journal:
        entry = journal.entry("k")
    assert entry is not None
    assert (entry.reply.text, entry.invalid) == (TEXT, "not JSON")


def test_what_was_sent_without_an_end_stays_reserved_after_a_kill(path):
    with Journal(path) as journal:
        send(journal, "k", usd=0.5)
    with Journal(path) as journal:
        spent = journal.spent()
        assert (journal.reply("k"), [r.key for r in journal.open_sends("k")]) == (None, ["k"])
    assert (spent.open_tokens, spent.open_usd, spent.open_requests, spent.settled_tokens) == (160, 0.5, 1, 0)


def test_a_reservation_of_an_earlier_process_can_be_settled(path):
    with Journal(path) as journal:
        send(journal, "k")
    with Journal(path) as journal:
        (reservation,) = journal.open_sends("k")
        charge = {"charge": Charge(7, 2), "open_tokens": 0, "open_usd": 0.0}
        journal.received(reservation, REPLY, rung="json_schema", **charge)
        assert (journal.open_sends("k"), journal.spent()) == ([], Spent(7, 2, answers=1))


def test_an_attempt_ends_once(path):
    with Journal(path) as journal:
        reservation = send(journal, "k")
        journal.failed(reservation, "429")
        with pytest.raises(ValueError, match="has its end already"):
            journal.lost(reservation, "timeout")
    assert len(path.read_text().splitlines()) == 2


@pytest.mark.parametrize("seed", range(5))
def test_what_is_spent_is_the_sum_over_all_attempts(path, seed):
    chance = random.Random(f"{time.time()} {seed}")
    expected: dict[str, list[float]] = {}
    with Journal(path) as journal:
        for _ in range(200):
            key, purpose = f"k{chance.randrange(60)}", chance.choice(["explain", "detection"])
            sums = expected.setdefault(purpose, [0.0] * 5)
            reservation = send(journal, key, purpose=purpose, usd=chance.random())
            end = chance.choice(["failed", "lost", "sent", "received"])
            cost = [0.0] * 5
            if end == "received":
                cost = [chance.randrange(50), chance.randrange(50), chance.choice([0, 9]), chance.random(), chance.random()]
                charge = Charge(int(cost[0]), int(cost[1]), usd=cost[3])
                journal.received(
                    reservation, REPLY, rung="json_schema", charge=charge, open_tokens=int(cost[2]), open_usd=cost[4]
                )
            elif end == "failed":
                journal.failed(reservation, "x")
            else:
                cost[2], cost[4] = reservation.tokens, reservation.usd or 0.0
                if end == "lost":
                    journal.lost(reservation, "x")
            for place, value in enumerate(cost):
                sums[place] += value
        live = journal.spent_by_purpose()
    with Journal(path) as journal:
        assert journal.spent_by_purpose() == live
        for purpose, sums in expected.items():
            found = live[purpose]
            values = [found.prompt_tokens, found.completion_tokens, found.open_tokens, found.settled_usd, found.open_usd]
            assert values == pytest.approx(sums)
        total = journal.spent()
        assert total.settled_tokens == sum(sums[0] + sums[1] for sums in expected.values())


def test_a_note_is_found_again_and_a_later_one_takes_its_place(path):
    with Journal(path) as journal:
        journal.note("batch", "b1", {"keys": ["k"]})
        journal.note("batch", "b1", "done")
        journal.note("rung", "b1", 1)
    with Journal(path) as journal:
        assert (journal.noted("batch"), journal.noted("rung"), journal.noted("x")) == ({"b1": "done"}, {"b1": 1}, {})


@pytest.mark.parametrize("cut", [1, 2, 40])
def test_a_torn_last_line_is_dropped_and_the_rest_kept(path, cut):
    with Journal(path) as journal:
        answered(journal, "whole")
        answered(journal, "torn")
    os.truncate(path, path.stat().st_size - cut)
    with Journal(path) as journal:
        assert [journal.state(key) for key in ("whole", "torn")] == ["received", "sent"]


def test_writing_goes_on_after_a_torn_line(path):
    with Journal(path) as journal:
        answered(journal, "torn")
    os.truncate(path, path.stat().st_size - 5)
    with Journal(path) as journal:
        answered(journal, "next")
    with Journal(path) as journal:
        assert journal.reply("next") is not None


@pytest.mark.parametrize(
    "line", ['{"state": "rec', "[]", '{"state": "failed", "key": "k", "send": -1}', '{"state": "odd", "key": "k"}']
)
def test_damage_before_the_last_line_is_named(path, line):
    with Journal(path) as journal:
        answered(journal, "k")
    path.write_bytes(line.encode() + b"\n" + path.read_bytes())
    with pytest.raises(StoreError, match=r"line 1 of the journal .*journal\.jsonl"):
        Journal(path)


ENDS = ("received", "open", "failed", "lost", "received", "open")


@pytest.mark.parametrize("advice", ["{}\n", ""])
@pytest.mark.parametrize("damaged", range(2 * len(ENDS) - ENDS.count("open")))
def test_a_damaged_line_that_is_replaced_as_advised_or_left_out_costs_no_other_answer_and_frees_nothing(path, damaged, advice):
    with Journal(path) as journal:
        sends = [send(journal, f"k{number}", usd=0.5) for number in range(len(ENDS))]
        for reservation, end in zip(sends, ENDS, strict=True):
            if end == "received":
                charge = Charge(30, 10, usd=0.1)
                journal.received(reservation, REPLY, rung="json_schema", charge=charge, open_tokens=0, open_usd=0.0)
            elif end != "open":
                getattr(journal, end)(reservation, "x")
        before = journal.spent()
    lines = path.read_text().splitlines(keepends=True)
    event = json.loads(lines[damaged])
    path.write_text("".join([*lines[:damaged], lines[damaged][:20] + "\n", *lines[damaged + 1 :]]))
    with pytest.raises(StoreError, match=rf"line {damaged + 1} of the journal .* is damaged; put {{}} in the place of that line"):
        Journal(path)
    path.write_text("".join([*lines[:damaged], advice, *lines[damaged + 1 :]]))
    kept = {f"k{n}" for n, end in enumerate(ENDS) if end == "received"} - (
        {event["key"]} if event["state"] == "received" else set()
    )
    for _ in range(2):  # what is written after the repair is read again
        with Journal(path) as journal:
            after = journal.spent()
            assert {f"k{n}" for n in range(len(ENDS)) if journal.reply(f"k{n}") == REPLY} == kept
            if advice:  # nothing tells of a last line that is left out
                assert after.settled_tokens + after.open_tokens >= before.settled_tokens + before.open_tokens
                assert after.settled_usd + after.open_usd >= before.settled_usd + before.open_usd - 1e-9
            answered(journal, "next")
            assert journal.spent().settled_tokens == after.settled_tokens + 40
            before = journal.spent()


def test_an_attempt_whose_line_is_gone_stays_reserved_until_its_end_is_told(path):
    with Journal(path) as journal:
        send(journal, "k", usd=0.5)
    path.write_text("{}\n")
    with Journal(path) as journal:
        assert send(journal, "large", usd=0.5).send == 1
        assert (journal.spent().open_tokens, journal.spent().open_requests) == (320, 2)
        assert sum(spent.open_tokens for spent in journal.spent_by_purpose().values()) == 320
    with Journal(path) as journal:
        assert (journal.spent().open_tokens, journal.spent().open_usd) == (320, 1.0)


def _hold(path, opened, release):
    with Journal(path):
        opened.set()
        release.wait(30)


def test_opening_waits_for_another_process_and_says_so(path):
    context = multiprocessing.get_context("fork")
    opened, release = context.Event(), context.Event()
    other = context.Process(target=_hold, args=(path, opened, release))
    other.start()
    assert opened.wait(30)
    said = []

    def log(message: str) -> None:
        said.append(message)
        release.set()

    with Journal(path, log=log):
        other.join(30)
    assert (len(said), "waiting for another run" in said[0], str(path) in said[0]) == (1, True, True)


def test_reading_does_not_wait_and_changes_nothing(tmp_path):
    assert read_journal(tmp_path).counts() == {}
    with open_journal(tmp_path) as journal:
        answered(journal, "k")
        with (tmp_path / JOURNAL).open("ab") as stream:
            stream.write(b'{"half')
        before = (tmp_path / JOURNAL).read_bytes()
        assert read_journal(tmp_path).reply("k") == journal.reply("k")
    assert (tmp_path / JOURNAL).read_bytes() == before


def test_opening_reports_what_an_earlier_run_left_open(tmp_path):
    said = []
    with open_journal(tmp_path, log=said.append) as journal:
        assert said == []
        send(journal, "k")
    with open_journal(tmp_path, log=said.append):
        assert "1 earlier requests" in said[0]
        assert "160 tokens stay reserved" in said[0]


def test_an_unwritable_place_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot write the journal"):
        Journal(tmp_path / "file" / "journal.jsonl")


def test_a_failed_write_leaves_no_half_line(path, monkeypatch):
    write = os.write
    with Journal(path) as journal:
        answered(journal, "first")
        monkeypatch.setattr(os, "write", lambda descriptor, line: write(descriptor, line[:10]))
        with pytest.raises(StoreError, match="free some space"):
            answered(journal, "lost")
        monkeypatch.undo()
        answered(journal, "last")
    with Journal(path) as journal:
        assert [journal.state(key) for key in ("first", "lost", "last")] == ["received", None, "received"]


def test_every_line_is_on_the_disk_before_the_call_returns(path, monkeypatch):
    synced = []
    fsync = os.fsync
    with Journal(path) as journal:
        monkeypatch.setattr(os, "fsync", lambda descriptor: (synced.append(path.read_bytes()), fsync(descriptor)))
        answered(journal, "k")
    assert [len(content.splitlines()) for content in synced] == [1, 2]


def test_threads_do_not_mix_lines(path):
    def work(name: int) -> None:
        for number in range(10):
            answered(journal, f"{name}-{number}")

    with Journal(path) as journal:
        threads = [threading.Thread(target=work, args=(name,)) for name in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    with Journal(path) as journal:
        assert journal.counts() == {"received": 80}
        assert journal.spent().answers == 80


def test_every_line_says_when_and_the_first_for_whom(path):
    with Journal(path) as journal:
        answered(journal, "k")
    sent, received = map(json.loads, path.read_text().splitlines())
    assert all("time" in event for event in (sent, received))
    named = ("model", "prompt", "sae", "feature", "purpose", "attempt")
    assert [sent[name] for name in named] == ["m", "explain_v2@0123456789ab", "a", 0, "explain", 1]
