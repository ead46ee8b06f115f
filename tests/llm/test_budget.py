import random
import time
from dataclasses import replace

import pytest

from scopeatlas.llm.budget import BATCH_PRICE, Budget
from scopeatlas.llm.counting import token_counter
from scopeatlas.llm.requests import Charge, ChatReply
from tests.llm.asking import TEXT, journal_in, question, random_text, server_config

URL = "http://127.0.0.1:9/v1"
PRICES = {"usd_per_million_input": 2.0, "usd_per_million_cached": 0.5, "usd_per_million_output": 8.0}
REPLY = ChatReply(TEXT, "stop", "", "m", 30, 10)


@pytest.fixture
def journal(tmp_path):
    with journal_in(tmp_path) as journal:
        yield journal


def settled(journal, reply: ChatReply, **settings) -> Charge:
    budget = Budget(server_config(URL, **settings), journal)
    reservation = budget.reserve(question(1), "json_schema")
    assert reservation is not None
    return budget.settle(reservation, reply, "json_schema")


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("exact", [True, False])
def test_settled_never_passes_the_truth_nor_the_truth_what_is_settled_or_open(journal, smollm2, seed, exact):
    """Truth: SmolLM2's tokenizer. A server that reports less is found out only by a count with its own tokenizer."""
    chance = random.Random(f"{time.time()} {seed}")
    config = server_config(URL, tokenizer=smollm2 if exact else None, max_tokens_total=12_000 if exact else 60_000)
    truth, budget, true_total, refused = token_counter(server_config(URL, tokenizer=smollm2)), Budget(config, journal), 0, 0
    held = []
    for number in range(150):
        request = question(number, said=random_text(chance, chance.randrange(120)))
        if (reservation := budget.reserve(request, "json_schema")) is not None:
            held.append((request, reservation))
        else:
            refused += 1
        chance.shuffle(held)
        while held and (len(held) > 8 or chance.random() < 0.5):
            request, reservation = held.pop()
            text = random_text(chance, chance.randrange(30))
            true = (truth.prompt(request, "json_schema").high, min(truth.completion(text), request.max_output_tokens))
            end = chance.choice(
                ["told", "told", "untold", "low", "billed", "lost", "failed"] if exact else ["told", "untold", "billed"]
            )
            if end in ("told", "untold", "low"):
                true_total += sum(true)
                share = chance.random() if end == "low" else 1.0
                usage = (None, None) if end == "untold" else tuple(int(count * share) for count in true)
                budget.settle(reservation, ChatReply(text, "stop", "", "m", *usage), "json_schema")
            elif end == "failed":
                budget.release(reservation, "429")
            else:
                true_total += sum(true) if end == "billed" else 0
                budget.lose(reservation, "timeout")
            spent = journal.spent()
            assert spent.settled_tokens <= true_total
            assert true_total <= spent.settled_tokens + spent.open_tokens <= config.max_tokens_total
    assert refused > 0


def test_an_answer_is_charged_what_an_honest_server_reports(journal):
    assert settled(journal, REPLY) == Charge(30, 10)


def test_an_answer_is_charged_our_own_count_where_the_report_is_lower(journal, smollm2):
    counter = token_counter(server_config(URL, tokenizer=smollm2))
    own = Charge(counter.prompt(question(1), "json_schema").high, counter.completion(TEXT))
    assert settled(journal, replace(REPLY, prompt_tokens=1, completion_tokens=1), tokenizer=smollm2) == own


def test_an_answer_is_charged_the_report_where_that_is_higher(journal, smollm2):
    charge = settled(journal, replace(REPLY, prompt_tokens=5000, completion_tokens=900), tokenizer=smollm2)
    assert charge == Charge(5000, 900)


def test_an_untold_answer_leaves_what_it_may_have_used_reserved(journal):
    reservation = Budget(server_config(URL, **PRICES), journal).needed(question(1), "json_schema")
    charge = settled(journal, replace(REPLY, prompt_tokens=None, completion_tokens=None), **PRICES)
    spent = journal.spent()
    assert spent.settled_tokens + spent.open_tokens == reservation.tokens
    assert spent.settled_usd + spent.open_usd == pytest.approx(reservation.usd)
    assert (charge.prompt_tokens, charge.completion_tokens) == (reservation.prompt_low, 4)


def test_with_the_servers_tokenizer_an_untold_answer_leaves_nothing_open(journal, smollm2):
    settled(journal, replace(REPLY, prompt_tokens=None, completion_tokens=None), tokenizer=smollm2)
    assert journal.spent().open_tokens == 0


def test_cutting_a_text_into_tokens_again_charges_no_more_than_was_allowed(journal, smollm2):
    text = "\ufffd" * 100  # what an answer that was cut in the middle of a character decodes to
    assert settled(journal, replace(REPLY, text=text), tokenizer=smollm2).completion_tokens == question(1).max_output_tokens


def test_money_is_charged_by_the_tokens_charged(journal):
    charge = settled(journal, replace(REPLY, prompt_tokens=1000, completion_tokens=50, cached_tokens=400), **PRICES)
    assert charge.usd == pytest.approx((600 * 2.0 + 400 * 0.5 + 50 * 8.0) / 1e6)
    assert journal.spent().settled_usd == charge.usd


def test_a_batch_is_reserved_and_charged_at_its_price(journal):
    config = server_config(URL, **PRICES)
    full = Budget(config, journal).needed(question(1), "json_schema").usd
    budget = Budget(config, journal, price=BATCH_PRICE)
    reservation = budget.reserve(question(1), "json_schema")
    assert reservation is not None
    assert reservation.usd == pytest.approx(full * 0.5)
    assert budget.settle(reservation, REPLY, "json_schema").usd == pytest.approx((30 * 2.0 + 10 * 8.0) / 2e6)


@pytest.mark.parametrize("setting", [{"max_tokens_total": 1500}, {"max_usd_total": 0.003, **PRICES}])
def test_what_would_pass_the_budget_is_not_recorded_and_the_refusal_names_the_setting(journal, setting):
    budget = Budget(server_config(URL, **setting), journal)
    found = [budget.reserve(question(number), "json_schema") for number in range(3)]
    assert [reservation is None for reservation in found] == [False, True, True]
    assert journal.counts() == {"sent": 1}
    assert f"raise {next(iter(setting))}" in budget.refusal(question(2), "json_schema")


def test_the_budget_counts_what_earlier_runs_and_other_models_used(tmp_path):
    with journal_in(tmp_path) as journal:
        Budget(server_config(URL, model="other"), journal).reserve(question(1), "json_schema")
    with journal_in(tmp_path) as journal:
        assert Budget(server_config(URL, max_tokens_total=1500), journal).reserve(question(2), "json_schema") is None


def test_a_plainly_invalid_answer_is_charged_and_recorded_as_such(journal):
    charge = settled(journal, replace(REPLY, model="other"))
    entry = journal.entry(question(1).key(server_config(URL)))
    assert (charge.prompt_tokens, "answered as the model" in entry.invalid) == (30, True)
