"""The kills bench, small: everything that it claims of 2,000 features must hold of 60 too."""

import random
from dataclasses import replace

import pytest

from bench import kills
from scopeatlas.llm.config import ServerConfig
from scopeatlas.llm.counting import token_counter
from tests.llm_books import tokenizer_counts


@pytest.mark.slow
def test_what_is_paid_for_survives_every_kill_also_where_the_server_lies_low(tmp_path, smollm2, monkeypatch):
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    run = kills.bench(60, 1, "usage_low", tmp_path, kill_after=(0.2, 0.5), tokenizer=smollm2)
    assert [claim.text for claim in kills.claims(run) if not claim.holds] == []
    assert sum(life.killed for life in run.lives) >= 3
    assert any(life.in_flight for life in run.lives)


def test_client_and_server_count_the_same_tokens(smollm2):
    ours, theirs = token_counter(ServerConfig("m", tokenizer=smollm2)), tokenizer_counts(smollm2)
    chance = random.Random(7)
    pieces = ["a", "the ", " ", "\n", "  ", "9", "é", "漢", "🙂", "<|im_end|>", "<|im_start|>", "don't"]
    for _ in range(100):
        texts = ["".join(chance.choices(pieces, k=chance.randrange(15))) for _ in range(chance.randint(1, 4))]
        roles = [chance.choice(["system", "user"]), *chance.choices(["user", "assistant"], k=len(texts) - 1)]
        messages = tuple({"role": role, "content": text} for role, text in zip(roles, texts, strict=True))
        request = replace(kills.requests_for(1)[0], messages=messages)
        assert theirs.prompt(messages) == ours.prompt(request, "json_schema").high
        assert theirs.completion(texts[0]) == ours.completion(texts[0])
