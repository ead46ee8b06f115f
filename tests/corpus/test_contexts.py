import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from scopeatlas.corpus.contexts import MIN_CONTEXT_TOKENS, ContextRules, cut_contexts, read_contexts, write_contexts
from scopeatlas.corpus.documents import make_conversation, make_document
from scopeatlas.errors import CorpusError
from scopeatlas.storage.files import content_hash
from scopeatlas.subject.conversations import ROLES
from tests.tiny_models import tiny_tokenizer

CHATML = "{{ bos_token or '' }}{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"


@pytest.fixture(scope="module")
def documents(medium_corpus):
    return [
        (make_document(row["text"], source="w"), row["split"])
        for row in medium_corpus.corpus.documents.head(12).iter_rows(named=True)
    ]


def test_each_context_is_bos_and_consecutive_tokens_of_its_document(documents, subject):
    contexts = cut_contexts(documents, subject.tokenizer, ContextRules(64, 1000))
    texts = {document.id: document.text for document, _ in documents}
    for document, rows in ((d, contexts.tokens[[i == d for i in contexts.document_ids]]) for d in texts):
        tokens = subject.tokenizer(texts[document], add_special_tokens=False)["input_ids"]
        joined = [t for row in rows for t in row[1:].tolist() if t >= 0]
        assert joined == tokens[: len(joined)] and len(tokens) - len(joined) < MIN_CONTEXT_TOKENS


def test_each_context_has_exactly_one_bos_even_where_the_text_spells_one(subject):
    text = "A page about <bos> and <eos> and <start_of_turn> tokens, <bos> again. " * 20
    contexts = cut_contexts([(make_document(text, source="s"), "explain")], subject.tokenizer, ContextRules(64, 8))
    assert len(contexts) > 2
    assert (contexts.tokens[:, 0] == subject.tokenizer.bos_token_id).all()
    assert not np.isin(contexts.tokens[:, 1:], subject.tokenizer.all_special_ids).any()


def test_padding_stands_only_at_the_end(documents, subject):
    contexts = cut_contexts(documents, subject.tokenizer, ContextRules(100, 1000))
    lengths = contexts.lengths()
    assert lengths.min() >= MIN_CONTEXT_TOKENS + 1 and lengths.max() == 100 and (lengths < 100).any()
    assert all(((row >= 0) == (np.arange(100) < n)).all() for row, n in zip(contexts.tokens, lengths, strict=True))


def test_a_higher_cap_keeps_every_context_of_a_lower_one(documents, subject):
    kept = [set(cut_contexts(documents, subject.tokenizer, ContextRules(32, cap)).ids.tolist()) for cap in (1, 2, 5, 1000)]
    assert kept[0] < kept[1] < kept[2] < kept[3] and len(kept[0]) == len(documents)


def test_no_document_gives_more_contexts_than_the_cap(documents, subject):
    contexts = cut_contexts(documents, subject.tokenizer, ContextRules(32, 3))
    assert max(contexts.document_ids.count(d) for d in set(contexts.document_ids)) == 3


def test_the_chosen_contexts_do_not_favour_the_beginning(documents, subject):
    everything = cut_contexts(documents, subject.tokenizer, ContextRules(32, 1000))
    chosen = set(cut_contexts(documents, subject.tokenizer, ContextRules(32, 1)).ids.tolist())
    order = {}
    firsts = [order.setdefault(d, i) == i for i, d in enumerate(everything.document_ids)]
    assert sum(f and c in chosen for f, c in zip(firsts, everything.ids.tolist(), strict=True)) < len(documents) / 2


def test_a_context_has_the_same_id_whatever_is_cut_beside_it(documents, subject):
    together = cut_contexts(documents, subject.tokenizer, ContextRules(64, 4))
    apart = [cut_contexts([pair], subject.tokenizer, ContextRules(64, 4)) for pair in documents]
    assert together.ids.tolist() == [i for part in apart for i in part.ids.tolist()]
    assert len(set(together.ids.tolist())) == len(together) and (together.ids >= 0).all()


def test_a_text_too_short_for_a_context_gives_none(subject):
    assert len(cut_contexts([(make_document("Too short.", source="s"), "select")], subject.tokenizer, ContextRules())) == 0


def test_contexts_read_back_as_they_were_written(documents, subject, tmp_path):
    contexts = cut_contexts(documents, subject.tokenizer, ContextRules(64, 2))
    write_contexts(contexts, tmp_path / "c.parquet")
    back = read_contexts(tmp_path / "c.parquet")
    assert back.identity() == contexts.identity() and back.tokens.dtype == np.int32 and back.splits.dtype == np.uint8


@pytest.fixture
def chat():
    """A byte-level tokenizer with a chat template and a BOS."""
    return tiny_tokenizer(bos="<s>", chat_template=CHATML, added=("<|im_start|>", "<|im_end|>"))


def conversation(number: int, *, words: int = 20):
    turns = [("user", f"Question {number}? " + "please " * words), ("assistant", f"Answer {number}. " + "indeed " * words)]
    return make_conversation(turns, source="chats")


def test_a_conversation_gives_one_context_from_its_beginning(chat):
    contexts = cut_contexts([(conversation(i), "explain") for i in range(5)], chat, ContextRules(512, 8))
    assert len(contexts) == 5 and (contexts.tokens == chat.bos_token_id).sum(axis=1).tolist() == [1] * 5
    for number, (row, length) in enumerate(zip(contexts.tokens, contexts.lengths(), strict=True)):
        assert chat.decode(row[:length]).startswith(f"<s><|im_start|>user\nQuestion {number}? please")


def test_a_long_conversation_is_cut_to_the_context_length(chat):
    long = conversation(1, words=500)
    short, longer = (cut_contexts([(long, "explain")], chat, ContextRules(n, 8)) for n in (100, 300))
    assert short.lengths().tolist() == [100] and longer.lengths().tolist() == [300]
    assert (short.tokens[0] == longer.tokens[0, :100]).all() and (short.roles[0] == longer.roles[0, :100]).all()
    assert short.ids.tolist() == longer.ids.tolist()


def test_what_counts_in_a_conversation_is_what_is_said(chat):
    talk = conversation(3)
    contexts = cut_contexts([(talk, "explain")], chat, ContextRules(512, 8))
    counted = contexts.counted(chat.all_special_ids)
    assert chat.decode(contexts.tokens[counted]) == "".join(text for _, text in talk.turns)
    for role, text in talk.turns:
        assert chat.decode(contexts.tokens[contexts.roles == ROLES.index(role)]) == text
    assert set(np.unique(contexts.roles)) == {0, 1, 2} and contexts.roles.dtype == np.uint8


def test_what_counts_in_plain_text_is_all_but_padding_and_special_tokens(documents, subject):
    contexts = cut_contexts(documents, subject.tokenizer, ContextRules(100, 8))
    expected = contexts.tokens >= 0
    expected[:, 0] = False
    assert (contexts.counted(subject.tokenizer.all_special_ids) == expected).all()


def test_plain_text_beside_conversations_counts_too(chat):
    plain = make_document("Just a text of some length. " * 3, source="s")
    contexts = cut_contexts([(plain, "explain"), (conversation(1), "select")], chat, ContextRules(512, 8))
    counted = contexts.counted(chat.all_special_ids)
    assert chat.decode(contexts.tokens[0][counted[0]]) == plain.text
    alone = cut_contexts([(plain, "explain")], chat, ContextRules(512, 8))
    assert (alone.tokens[0] == contexts.tokens[0]).all() and alone.ids[0] == contexts.ids[0]


def test_roles_are_kept_on_disk_and_are_part_of_the_identity(chat, tmp_path):
    contexts = cut_contexts([(conversation(i), "explain") for i in range(3)], chat, ContextRules(128, 8))
    write_contexts(contexts, tmp_path / "c.parquet")
    back = read_contexts(tmp_path / "c.parquet")
    assert (back.roles == contexts.roles).all() and back.roles.dtype == np.uint8
    assert back.identity() == contexts.identity()
    back.roles[0, 20] += 1
    assert back.identity() != contexts.identity()


def test_plain_text_is_written_and_identified_as_if_there_were_no_conversations(documents, subject, tmp_path):
    contexts = cut_contexts(documents, subject.tokenizer, ContextRules(64, 2))
    assert contexts.roles is None
    parts = (contexts.ids.tolist(), contexts.document_ids, contexts.splits.tolist(), contexts.tokens.tolist())
    assert contexts.identity() == content_hash(*parts)
    columns = {
        "context_id": pa.array(parts[0], pa.int64()),
        "document_id": pa.array(parts[1], pa.string()),
        "split": pa.array(parts[2], pa.uint8()),
        "tokens": pa.array(parts[3], pa.list_(pa.int32(), 64)),
    }
    pq.write_table(pa.table(columns), tmp_path / "expected.parquet", compression="zstd")
    write_contexts(contexts, tmp_path / "c.parquet")
    assert (tmp_path / "c.parquet").read_bytes() == (tmp_path / "expected.parquet").read_bytes()
    assert read_contexts(tmp_path / "c.parquet").roles is None


def test_a_conversation_in_which_little_is_said_gives_no_context(chat):
    brief = make_conversation([("user", "Hi"), ("assistant", "Hello")], source="chats")
    assert len(cut_contexts([(brief, "select")], chat, ContextRules())) == 0


def test_a_conversation_that_cannot_be_read_is_named(subject):
    talk = conversation(1)
    with pytest.raises(CorpusError, match=f"conversation {talk.id} of chats: .* has no chat template"):
        cut_contexts([(talk, "explain")], subject.tokenizer, ContextRules())


@pytest.mark.parametrize("bos", [None, "<|endoftext|>"])
def test_a_tokenizer_without_a_bos_of_its_own_cuts_texts(bos):
    tokenizer = tiny_tokenizer(bos=bos)
    text = "A text that goes on and on. " * 4
    contexts = cut_contexts([(make_document(text, source="s"), "explain")], tokenizer, ContextRules(32, 8))
    firsts = contexts.tokens[:, 0] == tokenizer.eos_token_id
    assert firsts.all() if bos else not firsts.any()
    assert tokenizer.decode(contexts.tokens[contexts.counted(tokenizer.all_special_ids)]) == text[: contexts.counted([256]).sum()]
