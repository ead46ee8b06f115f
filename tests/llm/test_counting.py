"""The bounds are compared with real tokenizers, that of SmolLM2 (byte-level BPE) and of Gemma 3 (SentencePiece)."""

import random
import time

import pytest

from scopeatlas.errors import ConfigError
from scopeatlas.llm.counting import WordsAndBytes, token_counter
from tests.llm.asking import question, random_text, server_config

URL = "http://127.0.0.1:9/v1"


TEMPLATE = "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ m.role }}\n{{ m.content }}<end_of_turn>\n{% endfor %}"


@pytest.fixture(scope="module", params=["smollm2", "gemma"])
def tokenizer(request, smollm2, subject):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2 if request.param == "smollm2" else subject.folder)
    tokenizer.chat_template = tokenizer.chat_template or TEMPLATE  # the base model's file has none
    return tokenizer


@pytest.mark.parametrize("seed", range(4))
def test_a_prompt_has_at_most_and_at_least_as_many_tokens_as_said(tokenizer, seed):
    chance = random.Random(f"{time.time()} {seed}")
    for length in (0, 1, 5, 50, 400):
        asked = question(1, said=random_text(chance, length))
        text = tokenizer.apply_chat_template(asked.messages, tokenize=False, add_generation_prompt=True)
        true = len(tokenizer(text, add_special_tokens=False)["input_ids"])
        bounds = WordsAndBytes().prompt(asked, "json_schema")
        assert bounds.low <= true <= bounds.high


@pytest.mark.parametrize("seed", range(4))
def test_an_answer_has_at_least_as_many_tokens_as_said(tokenizer, seed):
    chance = random.Random(f"{time.time()} {seed}")
    for length in (0, 1, 5, 50, 400):
        text = random_text(chance, length)
        assert WordsAndBytes().completion(text) <= len(tokenizer(text, add_special_tokens=False)["input_ids"])


def test_english_is_expected_at_about_what_it_has(tokenizer):
    text = "The ferry left the harbour before noon, and nobody on the quay had expected it to. " * 20
    true = len(tokenizer(text, add_special_tokens=False)["input_ids"])
    assert 0.7 < WordsAndBytes().prompt(question(1, said=text), "json_schema").likely / true < 1.5


def test_with_the_servers_tokenizer_the_count_is_exact(smollm2):
    from transformers import AutoTokenizer

    tokenizer, asked = AutoTokenizer.from_pretrained(smollm2), question(1, said="naïve <|im_end|> ferry")
    ids = tokenizer.apply_chat_template(asked.messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    counter = token_counter(server_config(URL, tokenizer=smollm2))
    bounds = counter.prompt(asked, "json_schema")
    assert (counter.exact, bounds.low, bounds.likely, bounds.high) == (True, len(ids), len(ids), len(ids))


def test_the_schema_counts_where_it_is_stated(smollm2):
    for counter in (token_counter(server_config(URL, tokenizer=smollm2)), WordsAndBytes()):
        upper, lower = (counter.prompt(question(1), rung) for rung in ("json_schema", "json_object"))
        assert lower.high > upper.high
        assert lower.low > upper.low


def test_a_tokenizer_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ConfigError, match="nowhere"):
        token_counter(server_config(URL, tokenizer=str(tmp_path / "nowhere"), offline=True))
