import pytest

from scopeatlas.llm.budget import Budget
from scopeatlas.llm.estimate import estimate
from scopeatlas.llm.requests import ChatRequest
from scopeatlas.llm.runner import ask
from tests.llm.asking import journal_in, question, server_config
from tests.llm_books import TokenizerCounts
from tests.llm_server import Server

PRICES = {"usd_per_million_input": 2.0, "usd_per_million_output": 8.0}


def questions(count: int) -> list[ChatRequest]:
    return [question(number, said="a ferry " * number) for number in range(count)]


@pytest.fixture
def journal(tmp_path):
    with journal_in(tmp_path) as journal:
        yield journal


def test_it_contacts_nobody_and_records_nothing(journal):
    config = server_config("http://127.0.0.1:9/v1")
    assert estimate(questions(5), config, journal).requests == 5
    assert journal.path.read_bytes() == b""


def test_what_is_answered_or_asked_twice_costs_nothing(journal):
    with Server() as server:
        config = server_config(server.url)
        ask(questions(3), config, journal)
        found = estimate([*questions(5), *questions(5)], config, journal)
        assert (found.requests, found.answered) == (10, 8)
        again = estimate(questions(3), config, journal)
        assert (again.requests, again.answered, again.prompt_tokens, again.max_output_tokens) == (3, 3, 0, 0)


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("schemas", ["enforced", "rejected"])
def test_what_is_then_spent_is_within_it(journal, smollm2, exact, schemas):
    with Server(schemas=schemas) as server:
        server.counts = TokenizerCounts(smollm2)
        config = server_config(server.url, tokenizer=smollm2 if exact else None, **PRICES)
        found = estimate(questions(12), config, journal)
        ask(questions(12), config, journal)
        spent = journal.spent()
    assert spent.prompt_tokens <= found.prompt_tokens
    assert spent.completion_tokens <= found.max_output_tokens
    assert found.usd is not None
    assert 0 < spent.settled_usd <= found.usd
    if exact and schemas == "rejected":
        assert spent.prompt_tokens == found.prompt_tokens
    if schemas == "rejected":
        assert 0.5 < found.likely_prompt_tokens / spent.prompt_tokens < 2


def test_a_batch_costs_half_apart_from_the_probe(journal):
    config = server_config("http://127.0.0.1:9/v1", **PRICES)
    batch = server_config("http://127.0.0.1:9/v1", batch="provider", **PRICES)
    more = [estimate(questions(count), each, journal).usd or 0.0 for each in (config, batch) for count in (1, 8)]
    assert more[3] - more[2] == pytest.approx((more[1] - more[0]) / 2)


def test_room_for_reasoning_is_reserved_and_estimated(journal):
    plain, reasoning = (server_config("http://127.0.0.1:9/v1", reasoning_tokens=tokens, **PRICES) for tokens in (0, 1000))
    probes_and_requests = 6
    less, more = (estimate(questions(5), config, journal) for config in (plain, reasoning))
    assert more.max_output_tokens - less.max_output_tokens == probes_and_requests * 1000
    assert (more.usd or 0) - (less.usd or 0) == pytest.approx(probes_and_requests * 1000 * 8.0 / 1e6)
    needed = [Budget(config, journal).needed(question(1), "json_schema").tokens for config in (plain, reasoning)]
    assert needed[1] - needed[0] == 1000


def test_it_reads_as_one_line(journal):
    line = str(estimate(questions(5), server_config("http://127.0.0.1:9/v1", **PRICES), journal))
    assert line.startswith("5 of 5 requests are new: about ")
    assert "at most $0.0" in line
    assert "2,000,000" in line


def test_without_prices_it_says_nothing_of_money(journal):
    found = estimate(questions(2), server_config("http://127.0.0.1:9/v1"), journal)
    assert (found.usd, "$" in str(found)) == (None, False)
