from collections import Counter
from typing import get_args

import numpy as np
import polars as pl
import pytest

from scopeatlas.corpus.documents import SPLITS
from scopeatlas.hypotheses.columns import COLUMNS
from scopeatlas.hypotheses.rules import PAIR, Rule, RuleKind
from scopeatlas.hypotheses.surface import ZONES, in_zone, shape_of, spelling_of
from scopeatlas.hypotheses.units import (
    Firings,
    Units,
    claims,
    claims_at,
    count_keys,
    document_counts,
    key_hits,
    key_totals,
    read_firings,
)
from scopeatlas.subject.vocabulary import token_texts

ALL_KINDS = get_args(RuleKind)
TOKEN_KINDS = [kind for kind in ALL_KINDS if kind not in {"topic", "and", "or", "and_not"}]
WIDTH = 3 * len(ALL_KINDS) + 7
"""Features, so that each kind is tried three times or more."""


@pytest.fixture(scope="module")
def units(medium_corpus, subject) -> Units:
    return Units(medium_corpus.corpus, subject)


@pytest.fixture(scope="module")
def plain(medium_corpus, subject) -> list[tuple[str, str, list[str]]]:
    """The corpus as plain data: per context its document, its split and its tokens' texts, BOS and padding left out."""
    contexts = []
    for shard in medium_corpus.corpus.shards:
        loaded = medium_corpus.corpus.contexts(shard)
        for document, split, tokens in zip(loaded.document_ids, loaded.splits, loaded.tokens, strict=True):
            contexts.append((document, SPLITS[split], token_texts(subject.tokenizer, [t for t in tokens[1:].tolist() if t >= 0])))
    return contexts


@pytest.fixture
def firings(units, rng) -> Firings:
    """Random firings at counted positions, commoner for some features than for others."""
    counted = np.flatnonzero(units.counted)
    picks = [rng.choice(counted, rng.integers(5, 600), replace=False) for _ in range(WIDTH)]
    feature = np.repeat(np.arange(WIDTH, dtype=np.uint32), [len(p) for p in picks])
    return Firings(feature, np.concatenate(picks), WIDTH, value=rng.lognormal(size=len(feature)).astype(np.float32))


def random_rule(kind: str, units: Units, plain, rng) -> Rule:
    """A rule of a kind, of one to six keys that the corpus holds, and now and then one that it does not."""
    if kind in {"and", "or", "and_not"}:
        one, other = (random_rule(str(rng.choice(TOKEN_KINDS)), units, plain, rng) for _ in range(2))
        return Rule(kind, parts=(one, other))
    texts = [tokens for _, _, tokens in plain]
    words = [t.strip().casefold() for tokens in texts for t in tokens if t.strip().isalpha() and len(t.strip()) > 4]
    topics = units.topic_words[1]

    def key() -> str:
        tokens = texts[rng.integers(len(texts))]
        at = int(rng.integers(1, len(tokens)))
        word = words[rng.integers(len(words))]
        return {
            "word": word,
            "near": word,
            "bigram": f"{spelling_of(tokens[at - 1])}{PAIR}{spelling_of(tokens[at])}",
            "prefix": word[: rng.integers(2, 5)],
            "suffix": word[-rng.integers(2, 5) :],
            "position": str(rng.integers(1, units.length)),
            "topic": topics[rng.integers(len(topics))],
            "format": list(ZONES)[rng.integers(len(ZONES))],
        }.get(kind, shape_of(tokens[at]) if "shape" in kind else tokens[at])

    keys = {key() for _ in range(rng.integers(1, 7))}
    if "shape" not in kind and kind not in {"format", "position"} and rng.random() < 0.2:
        keys.add("qz")
    return Rule(kind, tuple(sorted(keys)))


def random_rules(units: Units, plain, rng) -> dict[int, Rule]:
    """Rules of every kind in turn."""
    return {feature: random_rule(ALL_KINDS[feature % len(ALL_KINDS)], units, plain, rng) for feature in range(WIDTH)}


def brute_counts(units: Units, plain, firings: Firings, rules: dict[int, Rule], split: str) -> dict[tuple[int, str], list[int]]:
    """(feature, document) -> hits, claimed, fired, units, by running each rule on each context."""
    fired_at = {f: set(firings.position[firings.feature == f].tolist()) for f in rules}
    counts: dict[tuple[int, str], list[int]] = {}
    for number, (document, of, tokens) in enumerate(plain):
        if of != split:
            continue
        for feature, rule in rules.items():
            claims = rule.matches(tokens)
            fires = [number * units.length + 1 + i in fired_at[feature] for i in range(len(tokens))]
            if rule.unit == "context":
                claims, fires = [claims[0]], [any(fires)]
            row = counts.setdefault((feature, document), [0, 0, 0, 0])
            row[0] += sum(c and f for c, f in zip(claims, fires, strict=True))
            row[1] += sum(claims)
            row[2] += sum(fires)
            row[3] += len(claims)
    return counts


def assert_counts_agree(units: Units, plain, firings: Firings, rules: dict[int, Rule], split: str) -> None:
    features = sorted(rules)
    found = document_counts(units, firings.within(units, split), rules, features, split=split)
    documents = [units.documents[d] for d in np.unique(units.context_document[units.context_split == SPLITS.index(split)])]
    expected = brute_counts(units, plain, firings, rules, split)
    for i, feature in enumerate(features):
        for j, document in enumerate(documents):
            parts = (found.true_positive, found.claimed, found.fired, found.units)
            got = [int(np.broadcast_to(part, found.claimed.shape)[i, j]) for part in parts]
            assert got == expected[feature, document], (rules[feature], document)
    assert len(expected) == len(features) * len(documents)


@pytest.mark.parametrize("split", SPLITS)
def test_counts_per_document_are_those_of_running_each_rule_token_by_token(units, plain, firings, rng, split):
    assert_counts_agree(units, plain, firings, random_rules(units, plain, rng), split)


def test_counts_agree_on_the_firings_of_a_real_sae(medium, units, plain, subject, rng):
    firings = read_firings(medium.store, medium.corpus, medium.entry, subject, units, width=96)
    assert_counts_agree(units, plain, firings, random_rules(units, plain, rng), "report")


def test_a_token_that_two_keys_match_is_claimed_once(units, plain, firings):
    rules = {0: Rule("prefix", ("co", "con", "cons")), 1: Rule("suffix", ("ing", "ng", "ning")), 2: Rule("word", ("the", "the"))}
    assert_counts_agree(units, plain, firings, rules, "report")


def test_affixes_of_any_length_are_counted(units, plain, firings):
    rules = {
        0: Rule("prefix", ("c",)),
        1: Rule("suffix", ("ation",)),
        2: Rule("prefix", ("international",)),
        3: Rule("suffix", ("hippopotamus",)),
    }
    assert_counts_agree(units, plain, firings, rules, "report")


def test_topics_need_not_be_words_that_the_labeller_would_choose(units, plain, firings):
    assert not {"the", "of"} & set(units.topic_words[1])
    rules = {0: Rule("topic", ("the",)), 1: Rule("topic", ("of", "river")), 2: Rule("topic", ("unheard",))}
    assert_counts_agree(units, plain, firings, rules, "report")


def test_tokens_of_one_text_are_one_key(units):
    for column in COLUMNS:
        keys, texts = units.column(column)
        used = [texts[key] for key in np.unique(keys[keys >= 0])]
        assert len(used) == len(set(used)), column


def test_every_key_of_a_column_is_one_that_its_rule_matches_there_and_none_is_missing(units, plain, rng):
    for column in COLUMNS:
        kind, _, size = column.partition(":")
        texts = units.column(column)[1]
        for number in rng.choice(len(plain), 12, replace=False):
            tokens = plain[number][2]
            found = units.keys_at(column, number * units.length + 1 + np.arange(len(tokens)))
            for i, row in enumerate(found):
                held = [texts[key] for key in row if key >= 0]
                assert len(held) == len(set(held))
                assert all(Rule(kind, (text,)).matches(tokens)[i] for text in held), (column, held)
                assert set(held) == expected_keys(kind, size, tokens, i), (column, i)


def expected_keys(kind: str, size: str, tokens: list[str], i: int) -> set[str]:
    """What a column should hold at a token, said once more without the code under test."""
    around = ["", "", *tokens, ""]
    second, before, token, after = around[i : i + 4]
    word = token.strip().casefold()
    affix = word.isalpha() and size.isdigit() and len(word) > int(size)
    keys = {
        "token": [token],
        "word": [word],
        "previous": [before],
        "next": [after],
        "skip": [second],
        "shape": [shape_of(token)],
        "previous_shape": [shape_of(before)] if before else [],
        "next_shape": [shape_of(after)] if after else [],
        "bigram": [f"{before.strip().casefold() or before}{PAIR}{word or token}"] if before else [],
        "prefix": [word[: int(size)]] if kind == "prefix" and affix else [],
        "suffix": [word[-int(size) :]] if kind == "suffix" and affix else [],
        "near": [t.strip().casefold() for t in tokens[max(i - 8, 0) : i]],
        "position": [str(i + 1)],
        "format": [size] if kind == "format" and in_zone(size, tokens)[i] else [],
    }[kind]
    return {key for key in keys if key}


def test_hits_and_totals_of_keys_equal_counting(units, plain, firings):
    for column in ("token", "word", "previous", "bigram", "suffix:3", "near", "skip"):
        texts = units.column(column)[1]
        found = key_hits(units, firings, column)
        some = found.filter(pl.col("key") % 3 == 0)
        assert sorted(key_hits(units, firings, column, among=some).rows()) == sorted(some.rows()) != []
        hits = {(f, texts[k]): n for f, k, n in found.select("feature", "key", "hits").rows()}
        plainly = Counter(
            (int(f), texts[key])
            for f, p in zip(firings.feature, firings.position, strict=True)
            for key in set(units.keys_at(column, np.array([p]))[0].tolist())
            if key >= 0
        )
        assert hits == dict(plainly)
        totals = {texts[k]: n for k, n in key_totals(units, "select", column).select("key", "total").rows()}
        claims = {
            text: sum(sum(Rule(column.partition(":")[0], (text,)).matches(t)) for _, s, t in plain if s == "select")
            for text in list(totals)[:25]
        }
        assert claims == {text: totals[text] for text in claims}


def test_counts_of_keys_are_the_same_however_few_places_are_counted_at_once(units, firings, rng, monkeypatch):
    def counted(column: str) -> list[list[tuple]]:
        keys = units.keys_at(column, firings.position)
        tables = [
            count_keys(firings.feature % 5, keys, hits=fires),
            count_keys(firings.feature, keys),
            key_hits(units, firings, column),
            key_hits(units, firings, column, least=2),
            key_totals(units, "explain", column),
        ]
        return [sorted(table.rows()) for table in tables]

    fires = rng.random(len(firings.feature)) < 0.5
    shuffled = rng.permutation(len(firings.feature))
    firings = Firings(firings.feature[shuffled], firings.position[shuffled], WIDTH + 3, value=firings.value[shuffled])
    columns = ("token", "near")
    whole = [counted(column) for column in columns]
    assert all(table for tables in whole for table in tables)
    assert all(row[2] >= 2 for tables in whole for row in tables[3])
    assert all({row for row in tables[2] if row[2] >= 2} == set(tables[3]) for tables in whole)
    for at_once in (1000, int(rng.integers(50, 500))):
        monkeypatch.setattr("scopeatlas.hypotheses.units.COUNTED_AT_ONCE", at_once)
        assert [counted(column) for column in columns] == whole


def test_no_firings_have_no_hits(units):
    nothing = Firings(np.zeros(0, np.uint32), np.zeros(0, np.int64), 4, value=np.zeros(0, np.float32))
    assert key_hits(units, nothing, "near").is_empty()
    table = count_keys(np.zeros(0, np.int64), np.zeros((0, 1), np.int32), hits=np.zeros(0, bool))
    assert table.is_empty() and table.columns == ["group", "key", "count", "hits"]


def test_the_positions_that_rules_claim_are_those_that_they_match(units, plain, rng):
    rules = [rule for rule in random_rules(units, plain, rng).values() if rule.unit == "token"]
    row, position = claims(units, rules, "select")
    found = list(zip(row.tolist(), position.tolist(), strict=True))
    expected = [
        (number, context * units.length + 1 + i)
        for number, rule in enumerate(rules)
        for context, (_, split, tokens) in enumerate(plain)
        if split == "select"
        for i, matches in enumerate(rule.matches(tokens))
        if matches
    ]
    assert found == expected


def test_whether_a_rule_claims_a_place_is_what_running_it_there_says(units, plain, rng):
    rules = random_rules(units, plain, rng)
    position = rng.choice(np.flatnonzero(units.counted), 3000)
    feature = rng.choice(list(rules), 3000)
    matched = {(f, c): rules[f].matches(plain[c][2]) for f, c in {*zip(feature, position // units.length, strict=True)}}
    expected = [matched[f, p // units.length][p % units.length - 1] for f, p in zip(feature, position, strict=True)]
    assert claims_at(units, rules, feature, position).tolist() == expected
    assert not claims_at(units, {3: Rule("token")}, np.full(5, 3), position[:5]).any()


def test_a_context_is_spelled_as_it_was_tokenised(units, plain):
    for number, (_, _, tokens) in enumerate(plain):
        assert units.text_of(number, 0, len(tokens) + 1) == ["", *tokens]
        assert set(units.text_of(number, len(tokens) + 1, units.length)) <= {""}
        assert units.text_of(number, 2, 5) == tokens[1:4]


def test_topic_words_are_content_words_of_several_explain_documents(units, plain):
    held, words = units.topic_words
    documents: dict[str, set[str]] = {}
    contexts: Counter[str] = Counter()
    explain = [(document, tokens) for document, split, tokens in plain if split == "explain"]
    for document, tokens in explain:
        for word in {t.strip().casefold() for t in tokens}:
            documents.setdefault(word, set()).add(document)
            contexts[word] += 1
    common = {w for w in contexts if contexts[w] > 0.2 * len(explain)}
    expected = {w for w in contexts.keys() - common if w.isalpha() and len(w) >= 3 and len(documents[w]) >= 3}
    assert set(words) == expected
    for number in range(0, len(plain), 23):
        present = {t.strip().casefold() for t in plain[number][2]} & expected
        assert {words[i] for i in held[number].nonzero()[1]} == present


def test_positions_know_their_split_and_document(units, plain):
    assert units.contexts == len(plain)
    assert [units.documents[d] for d in units.context_document] == [document for document, _, _ in plain]
    for split in SPLITS:
        assert units.in_split(split).sum() == sum(len(tokens) for _, of, tokens in plain if of == split)


def test_firings_of_the_store_are_the_non_zeros_of_its_shards(medium, units, subject):
    from scopeatlas.activations.cache import activation_keys
    from scopeatlas.activations.shards import read_shard

    firings = read_firings(medium.store, medium.corpus, medium.entry, subject, units, width=96)
    stage = medium.store.stage(medium.entry.key, medium.corpus.id, "activations")
    expected, before = {}, 0
    for shard, key in zip(medium.corpus.shards, activation_keys(medium.corpus, medium.entry, subject), strict=True):
        acts = read_shard(stage.data_path(key, ".parquet"))
        expected |= {(int(f), before + int(t)): v for f, t, v in zip(acts.feature, acts.token, acts.value, strict=True)}
        before += medium.corpus.contexts(shard).tokens.size
    places = zip(firings.feature.tolist(), firings.position.tolist(), strict=True)
    assert dict(zip(places, firings.value, strict=True)) == expected and firings.value.dtype == np.float32
    assert units.counted[firings.position].all()


def test_firings_split_and_gather_by_context(units, firings):
    matrix = firings.in_contexts(units).toarray()
    expected = np.zeros((WIDTH, units.contexts))
    expected[firings.feature, firings.position // units.length] = 1
    assert (matrix == expected).all()
    parts = [firings.within(units, split) for split in SPLITS]
    assert sum(len(part.feature) for part in parts) == len(firings.feature)
    assert all((units.split[part.position] == i).all() for i, part in enumerate(parts))
    strength = dict(zip(zip(firings.feature, firings.position, strict=True), firings.value, strict=True))
    assert all(strength[f, p] == v for part in parts for f, p, v in zip(part.feature, part.position, part.value, strict=True))
