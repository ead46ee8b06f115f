import os
import threading

import pytest

from scopeatlas.errors import StoreError
from scopeatlas.labels.journal import ChatReply, Journal

REPLY = ChatReply(text='{"a": "ä\ud800\\n"}', finish_reason="stop", prompt_tokens=3, completion_tokens=2)


def _send(journal: Journal, key: str) -> None:
    journal.sent(key, model="m", prompt_hash="p", sae="s", feature=1)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "deep" / "journal.jsonl"


def test_a_reply_is_found_again_unchanged_after_reopening(path):
    with Journal(path) as journal:
        _send(journal, "k")
        journal.received("k", REPLY)
    with Journal(path) as journal:
        assert journal.reply("k") == REPLY


def test_states_follow_the_events(path):
    with Journal(path) as journal:
        for key in "abc":
            _send(journal, key)
        journal.received("b", REPLY)
        journal.received("c", REPLY)
        journal.invalid("c", "not JSON")
    with Journal(path) as journal:
        assert [journal.state(key) for key in "abcd"] == ["sent", "received", "invalid", None]


def test_an_invalid_reply_is_kept(path):
    with Journal(path) as journal:
        journal.received("k", REPLY)
        journal.invalid("k", "not JSON")
    with Journal(path) as journal:
        assert journal.reply("k") == REPLY


def test_only_sent_is_no_reply(path):
    with Journal(path) as journal:
        _send(journal, "k")
    with Journal(path) as journal:
        assert journal.reply("k") is None


@pytest.mark.parametrize("cut", [1, 2, 40])
def test_a_torn_last_line_is_dropped_and_the_rest_kept(path, cut):
    with Journal(path) as journal:
        journal.received("whole", REPLY)
        journal.received("torn", REPLY)
    os.truncate(path, path.stat().st_size - cut)
    with Journal(path) as journal:
        assert (journal.reply("whole"), journal.reply("torn")) == (REPLY, None)


def test_writing_goes_on_after_a_torn_line(path):
    with Journal(path) as journal:
        journal.received("torn", REPLY)
    os.truncate(path, path.stat().st_size - 5)
    with Journal(path) as journal:
        journal.received("next", REPLY)
    with Journal(path) as journal:
        assert journal.reply("next") == REPLY


def test_damage_before_the_last_line_is_named(path):
    with Journal(path) as journal:
        journal.received("k", REPLY)
    path.write_bytes(b'{"state": "rec\n' + path.read_bytes())
    with pytest.raises(StoreError, match=r"line 1 of the journal .*journal\.jsonl"):
        Journal(path)


def test_a_journal_that_another_holds_is_refused(path):
    with Journal(path), pytest.raises(StoreError, match="in use by another run"):
        Journal(path)


def test_an_unwritable_place_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot write the journal"):
        Journal(tmp_path / "file" / "journal.jsonl")


def test_a_failed_write_leaves_no_half_line(path, monkeypatch):
    write = os.write
    with Journal(path) as journal:
        journal.received("first", REPLY)
        monkeypatch.setattr(os, "write", lambda descriptor, line: write(descriptor, line[:10]))
        with pytest.raises(StoreError, match="free some space"):
            journal.received("lost", REPLY)
        monkeypatch.undo()
        journal.received("last", REPLY)
    with Journal(path) as journal:
        assert [journal.state(key) for key in ("first", "lost", "last")] == ["received", None, "received"]


def test_threads_do_not_mix_lines(path):
    def work(name: int) -> None:
        for number in range(10):
            journal.received(f"{name}-{number}", REPLY)

    with Journal(path) as journal:
        threads = [threading.Thread(target=work, args=(name,)) for name in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    with Journal(path) as journal:
        assert journal.counts() == {"received": 80}
