import json

import pytest
from pydantic import BaseModel, ConfigDict

from scopeatlas.llm.config import ServerConfig
from scopeatlas.llm.replies import InvalidReply, NoCompletion, answered_by, fault, read_json, reply_of
from scopeatlas.llm.requests import Answer, ChatReply, TokenLogprob, request_body
from tests.llm.asking import TEXT, question

KEY = "sk-very-secret-0123456789"


class Label(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    label: str


def raw(content: object = TEXT, *, usage: object = None, logprobs: object = None, **message: object) -> bytes:
    choice = {"message": {"content": content, **message}, "finish_reason": "stop", "logprobs": logprobs}
    return json.dumps({"model": "m", "choices": [choice], "usage": usage}).encode()


def answer(reply: ChatReply) -> Answer:
    return Answer(question(1), "k", reply, fault(reply, "m"))


def test_a_completion_becomes_a_reply():
    usage = {"prompt_tokens": 9, "completion_tokens": 4, "prompt_tokens_details": {"cached_tokens": 3}}
    assert reply_of(raw(usage=usage)) == ChatReply(TEXT, "stop", "", "m", 9, 4, 3)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"null", b'{"choices": []}', b'{"ok": true}', b"[" * 100_000, b"\xff\xfe\x01"]
)
def test_anything_else_is_no_completion(content):
    with pytest.raises(NoCompletion):
        reply_of(content)


@pytest.mark.parametrize(
    "usage", [None, {}, {"prompt_tokens": -1}, {"prompt_tokens": True}, {"prompt_tokens": "9"}, {"prompt_tokens": 9.5}]
)
def test_usage_that_is_no_count_is_none(usage):
    assert reply_of(raw(usage=usage)).prompt_tokens is None


def test_log_probabilities_are_kept_token_by_token():
    content = [{"token": "a", "logprob": -0.1, "top_logprobs": [{"token": "b", "logprob": -2.0}]}, {"token": "c", "logprob": 0}]
    assert reply_of(raw(logprobs={"content": content})).logprobs == (
        TokenLogprob("a", -0.1, (("b", -2.0),)),
        TokenLogprob("c", 0.0),
    )


@pytest.mark.parametrize("content", [[{"token": "a"}], "ab", [None], [{"token": "a", "logprob": "x"}]])
def test_odd_log_probabilities_do_not_void_the_answer(content):
    reply = reply_of(raw(logprobs={"content": content}))
    assert (reply.text, reply.logprobs) == (TEXT, ())


def test_an_echoed_key_is_blotted_out_everywhere():
    pieces = [{"token": piece, "logprob": 0.0} for piece in ("key ", KEY[:9], KEY[9:])]
    reply = reply_of(raw(f"key {KEY}", refusal=KEY, logprobs={"content": pieces}), secret=KEY)
    assert (reply.text, reply.refusal, reply.logprobs) == ("key [key]", "[key]", ())


def test_a_good_answer_is_read():
    assert read_json(answer(ChatReply(TEXT, "stop", "", "m")), Label).label == "words for ships"


@pytest.mark.parametrize(
    ("reply", "problem"),
    [
        (ChatReply("", refusal="I cannot\nhelp"), "the model declined: I cannot help"),
        (ChatReply(TEXT, "length"), "cut off; raise reasoning_tokens"),
        (ChatReply(TEXT, model="other"), "answered as the model 'other', not as 'm'"),
        (ChatReply(""), "no JSON object"),
        (ChatReply("words for ships"), "no JSON object"),
        (ChatReply(f"```json\n{TEXT}\n```"), "no JSON object"),
        (ChatReply(TEXT[:-1]), "no JSON object"),
        (ChatReply(f"[{TEXT}]"), "no JSON object"),
        (ChatReply("[" * 100_000), "no JSON object"),
        (ChatReply('{"label": 3}'), "breaks the schema: label: "),
        (ChatReply('{"label": "x", "note": "y"}'), "breaks the schema: note: "),
        (ChatReply("{}"), "breaks the schema: label: "),
    ],
)
def test_what_is_no_answer_is_refused_in_one_line(reply, problem):
    with pytest.raises(InvalidReply) as caught:
        read_json(answer(reply), Label)
    assert problem in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_unanswered_request_is_refused_with_its_reason():
    with pytest.raises(InvalidReply, match="not sent: over budget"):
        read_json(Answer(question(1), "k", None, "not sent: over budget"), Label)


@pytest.mark.parametrize(
    ("asked", "echoed"),
    [
        ("gpt-5-mini", "gpt-5-mini"),
        ("gpt-5-mini", "gpt-5-mini-2025-08-07"),
        ("gpt-4", "gpt-4-0613"),
        ("openai/gpt-4o", "gpt-4o-2024-08-06"),
        ("gpt-4o", "openai/gpt-4o"),
        ("/models/SmolLM2-135M-Instruct/", "SmolLM2-135M-Instruct"),
        ("SmolLM2", "/models/smollm2@main"),
        ("llama3.2", "llama3.2:latest"),
        ("claude-3-5-sonnet-latest", "claude-3-5-sonnet-20241022"),
        ("m", ""),
    ],
)
def test_a_version_or_a_path_of_the_asked_model_is_that_model(asked, echoed):
    assert answered_by(echoed, asked)


@pytest.mark.parametrize(
    ("asked", "echoed"),
    [
        ("gpt-4o", "gpt-4o-mini"),
        ("gpt-4", "gpt-4.1"),
        ("gpt-4", "gpt-4o"),
        ("m", "another-model"),
        ("llama-3", "llama-3-70b"),
        ("a", "b/c"),
    ],
)
def test_another_model_is_not(asked, echoed):
    assert not answered_by(echoed, asked)


def test_a_key_names_everything_that_determines_the_answer_and_nothing_else():
    config, first = ServerConfig("m", "http://localhost:1/v1"), question(1)
    same = [question(1, purpose="edit", sae="b"), question(1, purpose="probe")]
    assert {request.key(config) for request in [first, *same]} == {first.key(config)}
    assert first.key(ServerConfig("m", "http://localhost:2/v1", max_tokens_total=9)) == first.key(config)
    changed = [
        {"attempt": 1},
        {"max_output_tokens": 61},
        {"logprobs": 5},
        {"prompt": "p"},
        {"schema": {"schema": {}}},
        {"said": "x"},
    ]
    keys = [question(1, **change).key(config) for change in changed]
    keys += [first.key(ServerConfig("n")), first.key(ServerConfig("m", temperature=0.5)), first.key(config)]
    assert len(set(keys)) == 9


def test_a_key_can_be_had_for_any_text():
    assert len(question(1, said="\ud800").key(ServerConfig("m"))) == 64


def test_the_upper_rung_sends_the_schema_for_the_server_to_enforce():
    body = request_body(question(1), ServerConfig("m", "http://localhost:1/v1"), "json_schema")
    assert body["response_format"] == {"type": "json_schema", "json_schema": question(1).schema}
    assert (body["max_tokens"], body["temperature"], "logprobs" in body) == (60, 0.0, False)
    assert body["messages"] == list(question(1).messages)


def test_the_lower_rung_states_the_schema_after_everything_else():
    request = question(1)
    body = request_body(request, ServerConfig("m", "http://localhost:1/v1"), "json_object")
    assert body["response_format"] == {"type": "json_object"}
    messages = body["messages"]
    assert isinstance(messages, list)
    assert messages[0] == request.messages[0]
    last = str(messages[-1]["content"])
    assert last.startswith(request.messages[-1]["content"])
    assert json.loads(last.splitlines()[-1]) == request.schema["schema"]


def test_openai_itself_is_sent_its_own_name_for_the_limit():
    body = request_body(question(1, logprobs=5), ServerConfig("m"), "json_schema")
    assert (body["max_completion_tokens"], body["logprobs"], body["top_logprobs"]) == (60, True, 5)


def test_a_model_that_reasons_is_given_room_for_it_and_asked_anew_for_more():
    plain, reasoning, more = (ServerConfig("m", "http://localhost:1/v1", reasoning_tokens=tokens) for tokens in (0, 1000, 2000))
    assert request_body(question(1), reasoning, "json_schema")["max_tokens"] == 1060
    assert request_body(question(1), plain, "json_schema")["max_tokens"] == 60
    assert len({question(1).key(config) for config in (plain, reasoning, more)}) == 3
    assert question(1).key(plain) == question(1).key(ServerConfig("m"))
