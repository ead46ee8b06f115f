"""`ask` against a real HTTP server on loopback that misbehaves on demand and knows what it billed."""

import random
import threading
import time

import pytest
from pydantic import BaseModel

from scopeatlas.errors import ConfigError, ExplainerError, StoreError
from scopeatlas.llm import limits, sending
from scopeatlas.llm.limits import Pace
from scopeatlas.llm.replies import InvalidReply, read_json
from scopeatlas.llm.requests import Answer
from scopeatlas.llm.runner import ask
from tests.llm.asking import answered, journal_in, question, random_text, server_config
from tests.llm_server import Call, Failure, Server, storms

KEY = "sk-very-secret-0123456789"


class Label(BaseModel):
    label: str


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(limits, "backoff", lambda attempt: 0.01)
    with Server() as server:
        yield server


@pytest.fixture
def run(server, tmp_path):
    """Ask `count` questions and return the answers."""

    def run(count: int = 1, *, changes: dict | None = None, **settings) -> list[Answer]:
        with journal_in(tmp_path) as journal:
            requests = [question(number, **(changes or {})) for number in range(count)]
            return ask(requests, server_config(server.url, **settings), journal)

    return run


@pytest.fixture
def spent(tmp_path):
    def spent():
        with journal_in(tmp_path) as journal:
            return journal.spent()

    return spent


def is_ok(answer: Answer) -> bool:
    return answer.reply is not None and not answer.problem


# Answers --------------------------------------------------------------------------------------------------------------


def test_answers_come_in_the_order_asked(server, run):
    server.latency = 0.01
    found = run(20, max_concurrency=8)
    assert [answer.request.feature for answer in found] == list(range(20))
    assert all(read_json(answer, Label).label for answer in found)


def test_an_answer_says_how_and_for_how_much_it_was_had(run):
    (answer,) = run()
    assert answer.reply is not None
    assert (answer.rung, answer.reused, answer.reply.model, len(answer.key)) == ("json_schema", False, "m", 64)
    usage = (answer.reply.prompt_tokens, answer.reply.completion_tokens)
    assert (answer.charge.prompt_tokens, answer.charge.completion_tokens) == usage
    assert answer.time


def test_a_second_run_sends_nothing_and_needs_neither_server_nor_key(server, run, monkeypatch):
    first = run(6)
    server.close()
    monkeypatch.setattr("scopeatlas.llm.client.open_client", None)
    second = run(6)
    assert [answer.reply for answer in second] == [answer.reply for answer in first]
    assert all(answer.reused and answer.charge == before.charge for answer, before in zip(second, first, strict=True))


def test_equal_requests_are_asked_once_whomever_they_are_for(server, tmp_path):
    twins = [question(1), question(1, purpose="edit"), question(2), question(1)]
    with journal_in(tmp_path) as journal:
        found = ask(twins, server_config(server.url), journal)
    assert len(server.requests) == 2
    assert len({answer.reply for answer in (found[0], found[1], found[3])}) == 1


def test_a_higher_attempt_asks_again(server, run):
    server.faults = lambda call: "schema_ignored" if call.number == 1 else "ok"
    with pytest.raises(InvalidReply):
        read_json(run()[0], Label)
    assert not is_ok(run()[0])
    assert is_ok(run(changes={"attempt": 1})[0])
    assert len(server.requests) == 2


def test_without_a_model_nothing_is_sent(server, run):
    assert [answer.problem for answer in run(2, model="")] == ["not sent: no model is configured"] * 2
    assert server.requests == []


def test_log_probabilities_are_asked_for_and_kept(server, run):
    (answer,) = run(changes={"logprobs": 3})
    assert server.requests[0]["top_logprobs"] == 3
    assert answer.reply is not None
    assert "".join(token.token for token in answer.reply.logprobs) == answer.reply.text


def test_it_can_be_called_where_an_event_loop_runs(run):
    import asyncio

    async def notebook() -> list[Answer]:
        return run(2)

    assert all(map(is_ok, asyncio.run(notebook())))


# One request's faults -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fault", ["429", "429_retry_after", "500", "503", Failure(408), Failure(409), Failure(502), "reset_before"]
)
def test_a_passing_failure_is_retried(server, run, fault):
    server.faults = lambda call: fault if call.number == 1 else "ok"
    assert is_ok(run()[0])
    assert len(server.requests) == 2


@pytest.mark.parametrize("fault", ["truncated_body", "reset_after", Failure(504)])
def test_what_may_have_been_billed_stays_reserved(server, run, spent, fault):
    server.faults = lambda call: fault if call.number == 1 else "ok"
    assert is_ok(run()[0])
    assert spent().open_requests == 1
    assert spent().settled_tokens <= server.true_tokens() <= spent().settled_tokens + spent().open_tokens


@pytest.mark.parametrize("fault", ["429", "500", "503", Failure(400), Failure(409)])
def test_what_cannot_have_been_billed_does_not(server, run, spent, fault):
    server.faults = lambda call: fault if call.number == 1 else "ok"
    run()
    assert spent().open_requests == 0
    assert spent().settled_tokens == server.true_tokens()


def test_a_slow_drip_ends_with_the_whole_requests_time(server, run, spent):
    server.drip_seconds = 3.0
    server.faults = lambda call: "slow_drip" if call.number == 1 else "ok"
    assert is_ok(run(timeout_seconds=0.6)[0])
    assert spent().open_requests == 1


@pytest.mark.parametrize("fault", ["truncated_json", "schema_ignored", "cut_off", "wrong_model"])
def test_an_invalid_answer_is_kept_paid_for_and_never_read(server, run, spent, fault):
    server.faults = lambda call: fault if call.number == 1 else "ok"
    found = run(2)
    bad = [answer for answer in found if answer.problem]
    assert len(bad) == 1
    assert bad[0].reply is not None
    with pytest.raises(InvalidReply):
        read_json(bad[0], Label)
    assert spent().settled_tokens == server.true_tokens()


def test_a_failure_that_stays_fails_that_request_alone(server, run):
    server.faults = lambda call: "500" if "1 " in call.body["messages"][1]["content"] else "ok"
    found = run(3, max_attempts=2)
    assert [is_ok(answer) for answer in found] == [True, False, True]
    assert (found[1].reply, "500" in found[1].problem) == (None, True)


def test_a_failed_request_is_sent_again_by_the_next_run(server, run):
    server.faults = lambda call: "500" if call.number == 1 else "ok"
    assert not is_ok(run(max_attempts=1)[0])
    assert is_ok(run()[0])


def test_a_retry_after_beyond_patience_is_not_waited_for(server, run):
    server.faults = lambda call: Failure(429, "come back", headers={"Retry-After": "86400"})
    assert "429" in run()[0].problem
    assert len(server.requests) == 1


def test_retry_after_holds_back_every_request(server, run, monkeypatch):
    arrivals: list[float] = []
    told, pause = threading.Event(), Pace.pause
    monkeypatch.setattr(Pace, "pause", lambda pace, until: (pause(pace, until), told.set()))

    def busy_at_first(call: Call):
        arrivals.append(time.monotonic())
        if call.number == 2:
            told.wait(30)  # answered once the other one has been told to wait
        return Failure(429, headers={"Retry-After": "1"}) if call.number == 1 else "ok"

    server.faults = busy_at_first
    assert all(map(is_ok, run(4, max_concurrency=2)))
    assert arrivals[2] - arrivals[0] >= 1


@pytest.mark.parametrize("said", ["This model's maximum context length is 4096 tokens", "blocked by content management policy"])
def test_a_prompts_own_fault_says_nothing_of_the_server(server, run, said):
    server.faults = lambda call: Failure(400, said) if call.number > 1 else "ok"
    found = run(30)
    assert [is_ok(answer) for answer in found].count(True) == 1
    assert len(server.requests) == 30


def test_text_that_cannot_be_sent_fails_alone(run, server, tmp_path):
    with journal_in(tmp_path) as journal:
        found = ask([question(1, said="\ud800"), question(2)], server_config(server.url), journal)
        assert journal.spent().open_requests == 0
    assert [is_ok(answer) for answer in found] == [False, True]


# The server's faults --------------------------------------------------------------------------------------------------


def test_a_server_that_keeps_failing_ends_the_run(server, run):
    server.faults = lambda call: "500"
    with pytest.raises(ExplainerError, match="in a row failed"):
        run(100, max_attempts=1, max_concurrency=1)
    assert len(server.requests) == sending.FAILURES_IN_A_ROW


def test_failures_between_answers_do_not_end_the_run(server, run):
    server.faults = lambda call: "500" if call.number % 2 else "ok"
    found = run(40, max_attempts=1, max_concurrency=1)
    assert sum(map(is_ok, found)) == 20 > sending.FAILURES_IN_A_ROW


def test_an_exhausted_quota_is_not_retried_and_the_answers_stay(server, run, tmp_path):
    server.faults = lambda call: "quota" if call.number > 3 else "ok"
    with pytest.raises(ExplainerError, match="no quota left"):
        run(9, max_concurrency=1)
    assert len(server.requests) == 4
    with journal_in(tmp_path) as journal:
        assert journal.spent_by_purpose()["explain"].answers == 3


@pytest.mark.parametrize("status", [401, 402, 403, 404])
def test_a_refused_key_or_model_ends_the_run(server, run, status):
    server.faults = lambda call: Failure(status, "no")
    with pytest.raises(ExplainerError, match=str(status) if status != 402 else "no quota left"):
        run(9, max_concurrency=1)
    assert len(server.requests) == 1


def test_when_the_run_ends_what_is_under_way_still_comes_in(server, run, tmp_path):
    def end_on_the_last(call: Call):
        if call.number < 4:
            time.sleep(0.5)
            return "ok"
        return "quota"

    server.faults = end_on_the_last
    with pytest.raises(ExplainerError):
        run(9, max_concurrency=4)
    with journal_in(tmp_path) as journal:
        assert (journal.spent_by_purpose()["explain"].answers, journal.spent().open_requests) == (3, 0)


def test_an_unreachable_server_is_named_in_one_line(server, run, spent):
    server.close()
    with pytest.raises(ExplainerError, match="cannot reach the LLM") as caught:
        run(5)
    assert server.url in str(caught.value)
    assert "\n" not in str(caught.value)
    assert spent().open_tokens == 0


def test_a_server_that_goes_away_ends_the_run(run, server):
    run(1)
    server.close()
    with pytest.raises(ExplainerError, match="cannot reach"):
        run(50, max_attempts=2)


def test_a_journal_that_cannot_be_written_ends_the_run(server, run, monkeypatch):
    run(1)
    monkeypatch.setattr("os.fsync", lambda descriptor: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(StoreError):
        run(5)


# Limits and budget ----------------------------------------------------------------------------------------------------


def test_no_more_requests_than_allowed_are_under_way(server, run):
    server.latency = 0.03
    run(20, max_concurrency=3)
    assert 1 < server.most_in_flight <= 3


def test_a_storm_of_429_slows_the_run_down_and_loses_nothing(server, run, monkeypatch):
    lowest = []

    class Watched(limits.Pace):
        def throttled(self, sent_at: float, now: float) -> None:
            super().throttled(sent_at, now)
            lowest.append(self.limit)

    monkeypatch.setattr(sending, "Pace", Watched)
    server.faults = storms(7, {"429": 0.5}, at_most=3, burst=(12, 4))
    assert all(map(is_ok, run(60, max_concurrency=16)))
    assert min(lowest) <= 8


def test_a_server_that_is_busy_is_given_longer_than_one_that_fails(server, run):
    server.faults = lambda call: "429" if call.number <= 7 else "ok"
    assert is_ok(run(max_attempts=2)[0])
    server.faults = lambda call: "500"
    assert not is_ok(run(2, max_attempts=2)[1])
    assert len(server.requests) == 8 + 2


def test_what_goes_out_is_taken_from_the_minutes_allowance(server, run, monkeypatch, spent):
    taken: dict[float, float] = {}

    class Bucket(limits.TokenBucket):
        def __init__(self, per_minute: float):
            super().__init__(per_minute)
            self.name = per_minute

        def take(self, amount: float, now: float) -> float:
            wait = super().take(amount, now)
            taken[self.name] = taken.get(self.name, 0) + (0 if wait else amount)
            return wait

        def give_back(self, amount: float) -> None:
            super().give_back(amount)
            taken[self.name] -= amount

    monkeypatch.setattr(sending, "TokenBucket", Bucket)
    run(14, requests_per_minute=6000, tokens_per_minute=60_000, max_concurrency=8)
    assert taken == {6000: 15, 60_000: spent().settled_tokens}  # the probe is one more


@pytest.mark.parametrize("usage", ["honest", "usage_low", "usage_missing"])
def test_the_budget_is_never_passed_with_many_under_way(server, run, spent, smollm2, usage):
    from tests.llm_books import TokenizerCounts

    server.counts, server.usage, server.latency = TokenizerCounts(smollm2), usage, 0.02
    found = run(60, max_tokens_total=1800, max_concurrency=16, tokenizer=smollm2)
    assert server.true_tokens() == spent().settled_tokens <= 1800
    unsent = [answer for answer in found if not is_ok(answer)]
    assert 0 < len(unsent) < 60
    assert all("raise max_tokens_total" in answer.problem for answer in unsent)


def test_what_a_request_leaves_of_its_reservation_is_used_by_others(server, run):
    assert all(map(is_ok, run(12, max_tokens_total=4000, max_concurrency=8)))


def test_a_budget_too_small_for_one_request_sends_nothing(server, run):
    assert "not sent" in run(3, max_tokens_total=500)[0].problem
    assert server.requests == server.probes == []


def test_the_next_run_goes_on_where_the_budget_ended(server, run):
    assert not all(map(is_ok, run(40, max_tokens_total=1500)))
    assert all(map(is_ok, run(40)))
    assert len(server.requests) == 40


def test_a_budget_of_money_is_kept(server, run, spent):
    prices = {"usd_per_million_input": 10.0, "usd_per_million_output": 100.0}
    found = run(60, max_usd_total=0.065, **prices)
    assert 0 < spent().settled_usd + spent().open_usd <= 0.065
    assert any("raise max_usd_total" in answer.problem for answer in found)


@pytest.mark.slow
@pytest.mark.parametrize("usage", ["honest", "usage_low", "usage_missing"])
def test_under_every_fault_settled_and_open_bound_the_truth(server, run, spent, smollm2, usage):
    from tests.llm_books import TokenizerCounts

    chance = random.Random(time.time())
    faults = [
        "429",
        "500",
        "truncated_json",
        "truncated_body",
        "schema_ignored",
        "reset_before",
        "reset_after",
        "wrong_model",
        "cut_off",
    ]
    server.counts, server.usage = TokenizerCounts(smollm2), usage
    server.faults = storms(chance.randrange(10**6), dict.fromkeys(faults, 0.07), at_most=4)
    found = run(80, max_concurrency=16, tokenizer=smollm2, changes={"said": random_text(chance, 200).replace("\x00", "")})
    assert sum(map(is_ok, found)) > 15
    assert spent().settled_tokens <= server.true_tokens() <= spent().settled_tokens + spent().open_tokens


# Keys -----------------------------------------------------------------------------------------------------------------


def test_the_key_reaches_the_server_and_never_the_journal(server, run, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    server.faults = lambda call: "echo_key" if call.number % 2 else "echo_key_error"
    found = run(4, max_attempts=2, changes={"logprobs": 2})
    assert server.headers[0]["authorization"] == f"Bearer {KEY}"
    assert KEY not in (tmp_path / "llm" / "journal.jsonl").read_text() + repr(found)
    assert "[key]" in repr(found)


def test_the_key_never_reaches_an_error(server, run, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    server.faults = lambda call: Failure(401, f"bad key {KEY}")
    with pytest.raises(ExplainerError) as caught:
        run()
    assert KEY not in str(caught.value)


def test_offline_reuses_answers_and_contacts_nobody(tmp_path):
    config = server_config("https://llm.example/v1", offline=True)
    with journal_in(tmp_path) as journal:
        answered(journal, question(1).key(config))
        assert is_ok(ask([question(1)], config, journal)[0])
        with pytest.raises(ConfigError, match="offline"):
            ask([question(2)], config, journal)


def test_two_threads_may_ask_with_one_journal(server, tmp_path):
    found: dict[int, list[Answer]] = {}
    with journal_in(tmp_path) as journal:

        def work(start: int) -> None:
            found[start] = ask([question(number) for number in range(start, start + 10)], server_config(server.url), journal)

        threads = [threading.Thread(target=work, args=(start,)) for start in (0, 100)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert journal.spent().settled_tokens == server.true_tokens()
    assert all(is_ok(answer) for answers in found.values() for answer in answers)
