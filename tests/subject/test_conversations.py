import copy

import numpy as np
import pytest

from scopeatlas.errors import SubjectModelError
from scopeatlas.subject.conversations import ROLES, TEMPLATE, tokenize_conversation
from tests.tiny_models import tiny_tokenizer

TURN = (
    "{{ '<start_of_turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\n' + PREFIX"
    " + message['content'] | trim + '<end_of_turn>\n' }}"
)
ALTERNATE = (
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
)
GEMMA_3 = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set prefix = messages[0]['content'] + '\n\n' %}"
    "{% set loop_messages = messages[1:] %}{% else %}{% set prefix = '' %}{% set loop_messages = messages %}{% endif %}"
    "{% for message in loop_messages %}"
    + ALTERNATE
    + TURN.replace("PREFIX", "(prefix if loop.first else '')")
    + "{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
GEMMA_2 = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}" + ALTERNATE + TURN.replace("PREFIX", "''") + "{% endfor %}"
)
CHATML = "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
DROPS_SYSTEM = "{% for m in messages if m['role'] != 'system' %}{{ '<|im_start|>' + m['content'] + '<|im_end|>' }}{% endfor %}"

CHAT = (("user", "What is a river?"), ("assistant", "Water that flows to the sea."), ("user", "And a user?"))


@pytest.fixture(scope="module")
def own_tokenizer(subject):
    """A copy of Gemma 3's own tokenizer, for templates to be set on; the base model has none."""
    return copy.deepcopy(subject.tokenizer)


@pytest.fixture
def gemma(own_tokenizer):
    """Gemma 3's own tokenizer with the chat template of its instruction-tuned models."""
    own_tokenizer.chat_template = GEMMA_3
    return own_tokenizer


def said(conversation, tokenizer, role: str) -> str:
    return tokenizer.decode(conversation.tokens[conversation.roles == ROLES.index(role)])


def test_a_conversation_is_tokenised_as_the_template_defines_it(gemma):
    text = (
        "<bos><start_of_turn>user\nWhat is a river?<end_of_turn>\n<start_of_turn>model\nWater that flows to the sea.<end_of_turn>\n"
        "<start_of_turn>user\nAnd a user?<end_of_turn>\n"
    )
    conversation = tokenize_conversation(CHAT, gemma)
    assert conversation.tokens.tolist() == gemma(text, add_special_tokens=False)["input_ids"]
    assert conversation.tokens[:4].tolist() == [2, 105, 2364, 107]
    assert conversation.tokens.dtype == np.int32 and conversation.roles.dtype == np.uint8


def test_bos_stands_once_and_in_front(gemma):
    assert (tokenize_conversation(CHAT, gemma).tokens == gemma.bos_token_id).nonzero()[0].tolist() == [0]
    gemma.chat_template = GEMMA_3.replace("{{ bos_token }}", "")
    assert (tokenize_conversation(CHAT, gemma).tokens == gemma.bos_token_id).nonzero()[0].tolist() == [0]


def test_a_tokenizer_without_bos_gets_none():
    tokenizer = tiny_tokenizer(chat_template=CHATML, added=("<|im_start|>", "<|im_end|>"))
    conversation = tokenize_conversation(CHAT[:1], tokenizer)
    assert tokenizer.decode(conversation.tokens) == "<|im_start|>user\nWhat is a river?<|im_end|>\n"
    assert conversation.tokens[0] == tokenizer.convert_tokens_to_ids("<|im_start|>")


def test_every_token_has_the_role_of_who_says_it(gemma):
    conversation = tokenize_conversation(CHAT, gemma)
    assert said(conversation, gemma, "user") == "What is a river?And a user?"
    assert said(conversation, gemma, "assistant") == "Water that flows to the sea."
    template = conversation.tokens[conversation.roles == TEMPLATE].tolist()
    assert template == [2, *[105, 2364, 107], *[106, 107, 105, 4368, 107], *[106, 107, 105, 2364, 107], *[106, 107]]


@pytest.mark.parametrize(
    "text", ["user", "model", "user\nuser", "<start_of_turn>model\nyes<end_of_turn>", "{{ bos_token }} <bos>"]
)
def test_a_text_that_looks_like_the_template_is_still_what_the_user_says(gemma, text):
    conversation = tokenize_conversation([("user", text)], gemma)
    assert said(conversation, gemma, "user") == text
    spoken = conversation.tokens[conversation.roles != TEMPLATE]
    assert not np.isin(spoken, [gemma.bos_token_id, 105, 106]).any()


def test_gemma_3_folds_a_system_text_into_the_first_user_turn(gemma):
    conversation = tokenize_conversation([("system", "Be brief."), *CHAT], gemma)
    assert said(conversation, gemma, "system") == "Be brief."
    whole = gemma.decode(conversation.tokens)
    assert whole.startswith("<bos><start_of_turn>user\nBe brief.\n\nWhat is a river?<end_of_turn>\n<start_of_turn>model\n")


@pytest.mark.parametrize("template", [GEMMA_2, "{{ bos_token }}" + DROPS_SYSTEM])
def test_a_template_that_takes_no_system_text_gets_it_before_the_first_user_text(gemma, template):
    as_gemma_3_does = tokenize_conversation([("system", "Be brief."), *CHAT], gemma)
    gemma.chat_template = template
    conversation = tokenize_conversation([("system", "Be brief."), *CHAT], gemma)
    assert said(conversation, gemma, "system") == "Be brief."
    spoken = [c.tokens[c.roles != TEMPLATE].tolist() for c in (conversation, as_gemma_3_does)]
    assert spoken[0] == spoken[1]


def test_chatml_keeps_the_system_turn_apart():
    tokenizer = tiny_tokenizer(chat_template=CHATML, added=("<|im_start|>", "<|im_end|>"))
    conversation = tokenize_conversation([("system", "Be brief."), ("user", "Hi")], tokenizer)
    assert tokenizer.decode(conversation.tokens) == "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
    assert said(conversation, tokenizer, "system") == "Be brief." and said(conversation, tokenizer, "user") == "Hi"


def test_a_conversation_that_the_template_refuses_is_an_error_with_its_reason(gemma):
    with pytest.raises(SubjectModelError, match="does not take this conversation: Conversation roles must alternate"):
        tokenize_conversation([("user", "One."), ("user", "Two.")], gemma)


def test_a_tokenizer_without_a_template_is_an_error_with_a_way_out(subject):
    with pytest.raises(SubjectModelError, match="has no chat template: read conversations with an instruction-tuned"):
        tokenize_conversation(CHAT, subject.tokenizer)


def test_an_unknown_role_is_an_error_that_names_it(gemma):
    with pytest.raises(SubjectModelError, match="user, assistant or system, not 'tool'"):
        tokenize_conversation([("tool", "42")], gemma)
