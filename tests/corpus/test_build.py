import copy
import json
import re
import shutil
from dataclasses import replace

import pytest

from scopeatlas.corpus import build
from scopeatlas.corpus.build import CorpusSettings, build_corpus, open_corpus
from scopeatlas.corpus.contexts import ContextRules
from scopeatlas.corpus.sampling import Sampling
from scopeatlas.corpus.sources import Source
from scopeatlas.errors import CorpusError, NotReadyError, StoreError
from scopeatlas.storage.store import Store


@pytest.fixture(scope="module")
def texts(medium_corpus) -> list[str]:
    return medium_corpus.corpus.documents["text"].to_list()[:60]


@pytest.fixture
def settings(texts, tmp_path) -> CorpusSettings:
    """Sixty real articles in a file of their own."""
    path = tmp_path / "articles.jsonl"
    path.write_text("\n".join(json.dumps({"text": text[:2000]}) for text in texts), encoding="utf-8")
    return CorpusSettings("files", Source("files", (str(path),)), Sampling(shard_bits=3), ContextRules(64, 2))


@pytest.fixture
def store(tmp_path) -> Store:
    return Store(tmp_path / "store")


def stamps(store: Store) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in store.root.rglob("*.parquet")}


def test_a_corpus_reports_its_documents_and_tokens_by_split(store, settings, subject):
    corpus, reused = build_corpus(store, settings, subject)
    assert not reused
    tokens = dict.fromkeys(("explain", "select", "report"), 0)
    seen: dict[str, str] = {}
    for shard in corpus.shards:
        contexts = corpus.contexts(shard)
        for document, split, row in zip(contexts.document_ids, contexts.splits, contexts.tokens, strict=True):
            name = list(tokens)[split]
            tokens[name] += int((row[1:] >= 0).sum())
            assert seen.setdefault(document, name) == name
    assert corpus.facts["tokens_per_split"] == tokens and corpus.facts["tokens"] == sum(tokens.values())
    assert corpus.facts["contexts"] == sum(len(corpus.contexts(shard)) for shard in corpus.shards)
    assert {d["document_id"]: d["split"] for d in corpus.documents.iter_rows(named=True)}.items() >= seen.items()
    assert sum(corpus.facts["documents_per_split"].values()) == corpus.facts["documents"] == 60


def test_an_unchanged_request_reads_nothing(store, settings, subject, monkeypatch):
    built, _ = build_corpus(store, settings, subject)
    monkeypatch.setattr(build, "open_source", lambda _: pytest.fail("the source was read"))
    again, reused = build_corpus(store, settings, subject)
    assert reused and again == built


def test_growth_keeps_the_old_shards_and_adds_new_ones(store, settings, subject):
    small, _ = build_corpus(store, replace(settings, sampling=replace(settings.sampling, fraction=0.5)), subject)
    before = stamps(store)
    large, reused = build_corpus(store, settings, subject)
    assert not reused and large.id == small.id
    assert large.shards[: len(small.shards)] == small.shards and len(large.shards) > len(small.shards)
    assert stamps(store).items() >= before.items()
    assert set(small.documents["document_id"]) < set(large.documents["document_id"])


def test_a_new_document_changes_only_its_own_shard(store, settings, subject, tmp_path):
    first, _ = build_corpus(store, settings, subject)
    with (tmp_path / "articles.jsonl").open("a", encoding="utf-8") as file:
        file.write("\n" + json.dumps({"text": " ".join(f"word{i}" for i in range(300))}))
    second, reused = build_corpus(store, settings, subject)
    assert not reused and second.id == first.id
    assert len(set(second.shards) - set(first.shards)) == 1


def test_a_lost_file_of_a_shard_is_made_again(store, settings, subject):
    corpus, _ = build_corpus(store, settings, subject)
    lost = sorted((store.root / "corpus" / corpus.id).glob("*.contexts.parquet"))[2]
    content = lost.read_bytes()
    lost.unlink()
    again, reused = build_corpus(store, settings, subject)
    assert not reused and again == corpus and lost.read_bytes() == content


def test_two_builds_are_byte_identical(store, settings, subject, tmp_path):
    corpus, _ = build_corpus(store, settings, subject)
    other = Store(tmp_path / "other")
    build_corpus(other, settings, subject)
    files = {path.relative_to(store.root): path.read_bytes() for path in store.root.rglob("*") if path.is_file()}
    assert files == {path.relative_to(other.root): path.read_bytes() for path in other.root.rglob("*") if path.is_file()}
    assert len(files) == 3 * len(corpus.shards) + 1


def test_the_id_of_a_corpus_names_it_and_changes_with_what_is_in_it(settings, subject):
    same = [settings, replace(settings, sampling=replace(settings.sampling, fraction=0.1))]
    others = [
        replace(settings, rules=ContextRules(128, 2)),
        replace(settings, sampling=replace(settings.sampling, splits=(0.4, 0.3, 0.3))),
        replace(settings, source=replace(settings.source, min_characters=1)),
    ]
    ids = {s.corpus_id(subject) for s in same}
    assert len(ids) == 1 and re.fullmatch(r"files-[0-9a-f]{8}", next(iter(ids)))
    assert len({s.corpus_id(subject) for s in others} | ids) == 4


def test_an_empty_source_is_an_error_and_leaves_no_corpus(store, settings, subject):
    starved = replace(settings, source=replace(settings.source, min_characters=10**6))
    with pytest.raises(CorpusError, match="the corpus is empty"):
        build_corpus(store, starved, subject)
    with pytest.raises(NotReadyError, match="has not been built"):
        open_corpus(store, starved.corpus_id(subject))


def test_a_store_that_cannot_be_written_is_an_error(settings, subject, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StoreError, match="cannot write to the store"):
        build_corpus(Store(tmp_path / "file" / "x"), settings, subject)


def test_a_built_corpus_may_be_moved_with_its_store(store, settings, subject, tmp_path):
    corpus, _ = build_corpus(store, settings, subject)
    shutil.move(store.root, tmp_path / "moved")
    moved = open_corpus(Store(tmp_path / "moved"), corpus.id)
    assert moved.shards == corpus.shards and len(moved.documents) == 60


def test_a_conversation_that_the_chat_template_does_not_take_is_left_out_and_counted(subject, tmp_path):
    template = "{{ bos_token }}{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}<start_of_turn>{{ m['role'] }}\n{{ m['content'] }}<end_of_turn>\n{% endfor %}"
    said: list[str] = []
    words = "The quick brown fox jumps over the lazy dog while {} other animals look on from the edge of the wood in silence."
    turns = [[("user", words.format(n)), ("assistant", words.format(n + 100))] for n in range(8)]
    turns.append([("user", words.format(50)), ("user", words.format(51))])
    rows = [json.dumps({"messages": [{"role": r, "content": c} for r, c in talk]}) for talk in turns]
    (tmp_path / "talk.jsonl").write_text("\n".join(rows))
    tokenizer = copy.deepcopy(subject.tokenizer)
    tokenizer.chat_template = template
    tuned = replace(subject)
    tuned.__dict__["tokenizer"] = tokenizer
    source = Source("files", paths=(str(tmp_path / "talk.jsonl"),), text_field="messages", min_characters=10)
    settings = CorpusSettings("talk", source, Sampling(shard_bits=0), ContextRules(64, 1))
    corpus, _ = build_corpus(Store(tmp_path / "store"), settings, tuned, log=said.append)
    assert corpus.facts["refused_conversations"] == 1 and corpus.facts["contexts"] == corpus.facts["documents"] - 1
    assert any("1 conversations left out" in line and "alternate" in line for line in said)
    assert corpus.contexts(corpus.shards[0]).roles is not None
