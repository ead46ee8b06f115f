import numpy as np
import pytest

from scopeatlas.corpus.contexts import MIN_CONTEXT_TOKENS, ContextRules, cut_contexts, read_contexts, write_contexts
from scopeatlas.corpus.documents import make_document


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
