import io
import json
from types import SimpleNamespace

import pytest
from click.testing import CliRunner

from scopeatlas.cli import cli
from scopeatlas.errors import ConfigError
from scopeatlas.study.texts import as_texts, lines_from, texts_from

CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]


def written(tmp_path, name: str, content: str | bytes) -> str:
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def test_texts_come_from_arguments_then_from_the_lines_of_a_file(tmp_path):
    file = written(tmp_path, "texts.txt", "\ufefffirst\r\n\n  second \n")
    assert texts_from(["own"], file) == ["own", "first", "second"]
    assert lines_from(file) == ["first", "second"]


def test_only_a_line_feed_ends_a_text(tmp_path):
    assert texts_from([], written(tmp_path, "t.txt", "one\u2028still one\x0cand still\ntwo")) == [
        "one\u2028still one\x0cand still",
        "two",
    ]


def test_a_jsonl_file_holds_texts_and_conversations(tmp_path):
    rows = [{"text": "plain\nwith a break", "other": 1}, {"messages": [turn | {"name": "x"} for turn in CHAT]}]
    file = written(tmp_path, "t.jsonl", "\n".join(json.dumps(row) for row in rows))
    assert texts_from([], file) == ["plain\nwith a break", CHAT]


def test_a_dash_is_stdin(monkeypatch):
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(b'{"a": 1}\nb\n')))
    assert texts_from([], "-") == ['{"a": 1}', "b"]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("{", "is no JSON"),
        ('{"txt": "a"}', 'has neither: "text"'),
        ('["a"]', "has neither"),
        ('{"text": 3}', "has neither"),
        ('{"messages": []}', "has neither"),
        ('{"messages": [{"role": "user"}]}', "has neither"),
        ('{"messages": [{"role": "user", "content": ["a"]}]}', "has neither"),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(tmp_path, row, reason):
    file = written(tmp_path, "bad.jsonl", '{"text": "good"}\n\n' + row)
    with pytest.raises(ConfigError, match=rf"bad\.jsonl, line 3 {reason}"):
        texts_from([], file)


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"cannot read .*absent\.txt: No such file"):
        texts_from([], str(tmp_path / "absent.txt"))
    with pytest.raises(ConfigError, match="cannot read .*: Is a directory"):
        texts_from([], str(tmp_path))
    with pytest.raises(ConfigError, match=r"latin\.txt is not UTF-8 text: byte 3"):
        texts_from([], written(tmp_path, "latin.txt", "caf\xe9".encode("latin-1")))


def test_no_text_at_all_is_said(tmp_path):
    with pytest.raises(ConfigError, match="name some, or a file with --file"):
        texts_from([], None)
    with pytest.raises(ConfigError, match=r"no text in .*empty\.txt"):
        texts_from([], written(tmp_path, "empty.txt", "\n \n"))


def test_half_a_surrogate_becomes_a_question_mark(tmp_path):
    assert texts_from(["a\udcff"], None) == ["a?"]
    file = written(tmp_path, "t.jsonl", r'{"messages": [{"role": "user", "content": "\ud800b"}]}')
    assert texts_from([], file) == [[{"role": "user", "content": "?b"}]]


def test_where_lines_belong_together_a_blank_one_is_refused_by_its_number(tmp_path):
    for name, content, line in (
        ("a.txt", "a1\n\na3", 2),
        ("b.txt", "\r\nb2\n", 1),
        ("c.jsonl", '{"text": "c1"}\n \n{"text": "c3"}', 2),
    ):
        file = written(tmp_path, name, content)
        assert len(texts_from([], file)) == content.count("\n") + 1 - content.endswith("\n") - 1
        with pytest.raises(ConfigError, match=rf"{name}, line {line} is blank"):
            texts_from([], file, every_line=True)
    with pytest.raises(ConfigError, match=r"b\.txt, line 1 is blank"):
        lines_from(str(tmp_path / "b.txt"), every_line=True)


def test_commands_that_take_lines_together_refuse_a_blank_one(tmp_path):
    whole, gap = written(tmp_path, "whole.txt", "a\nb\nc"), written(tmp_path, "gap.txt", "a\n\nc\nd")
    for arguments in (
        ("contrast", "toy", whole, gap, "--pairs"),
        ("contrast", "toy", gap, whole, "--pairs"),
        ("topics", "toy", "--file", gap, "--groups", whole),
        ("topics", "toy", "--file", whole, "--groups", gap),
    ):
        result = CliRunner().invoke(cli, ["--store", str(tmp_path), *arguments])
        assert result.exit_code == 2 and result.stderr.startswith(f"error: {gap}, line 2 is blank")


def test_blank_lines_after_the_last_text_shift_nothing(tmp_path):
    assert texts_from([], written(tmp_path, "a.txt", "a1\na2\n\n\n"), every_line=True) == ["a1", "a2"]


def test_one_text_or_conversation_is_taken_for_a_list_of_it():
    assert as_texts("abc") == ["abc"] and as_texts(CHAT) == [CHAT]
    assert as_texts(["abc", CHAT]) == ["abc", CHAT] and as_texts([CHAT]) == [CHAT] and as_texts(("a", "b")) == ["a", "b"]
    assert as_texts(part for part in ("a", "b")) == ["a", "b"] and as_texts(turn for turn in CHAT) == [CHAT]


@pytest.mark.parametrize("wrong", [CHAT[0], ["abc", CHAT[0]], [["abc"]], [3], None, 3], ids=str)
def test_what_is_no_text_is_refused(wrong):
    with pytest.raises(ConfigError, match='a conversation is turns like {"role": "user"'):
        as_texts(wrong)
