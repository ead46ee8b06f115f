"""Texts through the real model and real SAEs, against what the cache stored and against dense float64."""

import numpy as np
import pytest
import torch

from scopeatlas.activations import probe as probe_module
from scopeatlas.activations.cache import activation_keys
from scopeatlas.activations.probe import Probe, TextActivations, checked_text, shared_activations
from scopeatlas.activations.shards import read_shard, round_values
from scopeatlas.dictionaries.releases import load_folder, open_dictionary
from scopeatlas.errors import ConfigError, SubjectModelError
from scopeatlas.subject.capture import counting_passes
from scopeatlas.subject.vocabulary import token_texts
from tests.conftest import REPOSITORY, Stored, entry_of
from tests.multi_layer import multi_layer_tensors, seen_at, write_multi_layer
from tests.study.lettered import LETTERS, MARKUP, letter_probe
from tests.study.tiny_opened import tiny_subject
from tests.tiny_models import tiny_tokenizer

DEMO = REPOSITORY / "demo" / "releases" / "scope-atlas-demo-gemma-3-270m" / "resid_post" / "layer_9_width_2k_l0_medium"


@pytest.fixture(scope="module")
def demo(subject) -> Probe:
    return Probe(load_folder(DEMO), subject)


@pytest.fixture(scope="module")
def texts(medium_corpus) -> list[str]:
    return [text[:400] for text in medium_corpus.corpus.documents["text"].to_list()[:6]]


def dense(found: TextActivations, width: int) -> np.ndarray:
    """The same as [tokens, width]."""
    table = np.zeros((len(found.tokens), width))
    table[found.position, found.feature] = found.value
    return table


def same(got: np.ndarray, expected: np.ndarray) -> bool:
    """Whether two tables fire alike, but for values that lie at a threshold, and agree to 16 bits where both do."""
    both = (got > 0) & (expected > 0)
    differ = ((got > 0) != (expected > 0)).sum()
    return bool(differ <= 1e-3 * (expected > 0).sum() and np.allclose(got[both], expected[both], rtol=3e-3, atol=1e-2))


def decoded(stored: Stored, subject, wanted: int) -> list[tuple[int, list[int], str]]:
    """Contexts of the first shard whose text is read back as the same tokens: row, ids without BOS, text."""
    tokens = stored.corpus.contexts(stored.corpus.shards[0]).tokens
    rows = []
    for row, context in enumerate(tokens):
        ids = context[context >= 0][1:].tolist()
        text = "".join(token_texts(subject.tokenizer, ids))
        if subject.tokenizer(text, add_special_tokens=False)["input_ids"] == ids:
            rows.append((row, ids, text))
    return rows[:wanted]


def test_a_text_fires_where_the_cache_stored_that_the_same_context_does(medium, subject):
    key = activation_keys(medium.corpus, medium.entry, subject)[0]
    stored = read_shard(medium.store.stage(medium.entry.key, medium.corpus.id, "activations").data_path(key, ".parquet"))
    length = medium.corpus.facts["context_length"]
    dictionary = open_dictionary(medium.entry)
    contexts = decoded(medium, subject, 12)
    assert len(contexts) == 12
    found = Probe(dictionary, subject).activations([text for _, _, text in contexts])
    for (row, ids, text), mine in zip(contexts, found, strict=True):
        assert "".join(mine.tokens) == text and len(mine.tokens) == len(ids)
        expected = np.zeros((len(ids), dictionary.width))
        here = stored.token // length == row
        expected[stored.token[here] % length - 1, stored.feature[here]] = stored.value[here]
        assert same(dense(mine, dictionary.width), expected)


def test_the_demo_sae_fires_as_a_plain_forward_pass_and_a_dense_float64_encoder_say(demo, subject, texts):
    layer = demo.dictionary.layers[0]
    for text, found in zip(texts, demo.activations(texts), strict=True):
        ids = torch.tensor([[subject.tokenizer.bos_token_id, *subject.tokenizer(text, add_special_tokens=False)["input_ids"]]])
        with torch.no_grad():
            hidden = subject.model(input_ids=ids, output_hidden_states=True, use_cache=False).hidden_states[10][0, 1:]
        pre = (hidden.double() @ layer.w_enc.double() + layer.b_enc.double()).numpy()
        expected = np.where(pre > layer.threshold.double().numpy(), pre, 0)
        assert same(dense(found, demo.dictionary.width), expected)
        scale = demo.dictionary.value_scale
        assert (round_values(found.value, scale).astype(np.float32) * np.float32(scale) == found.value).all()


def test_a_text_fires_alike_whatever_is_asked_with_it(demo, texts):
    together = demo.activations(texts)
    for text, mine in zip(texts, together, strict=True):
        (alone,) = demo.activations([text])
        assert alone.tokens == mine.tokens and same(dense(alone, demo.dictionary.width), dense(mine, demo.dictionary.width))


def test_only_the_features_asked_for_are_given(demo, texts):
    (every,) = demo.activations(texts[:1])
    chosen = np.unique(every.feature)[::7].tolist()
    (some,) = demo.activations(texts[:1], features=chosen)
    kept = np.isin(every.feature, chosen)
    for column in ("feature", "position", "value"):
        assert (getattr(some, column) == getattr(every, column)[kept]).all()


def test_firings_are_sorted_by_position_then_feature(demo, texts):
    for found in demo.activations(texts):
        key = found.position.astype(np.int64) * demo.dictionary.width + found.feature
        assert (np.diff(key) > 0).all() and found.value.min() > 0
        assert (found.feature.dtype, found.position.dtype, found.value.dtype) == (np.uint32, np.int32, np.float32)


def test_an_empty_text_has_no_tokens_and_takes_no_place_from_others(demo, texts):
    first, nothing, second = demo.activations([texts[0], "", texts[1]])
    assert not nothing.tokens and not len(nothing.feature)
    assert "".join(first.tokens) == texts[0] and "".join(second.tokens) == texts[1]
    assert demo.activations([]) == [] and not demo.activations([""])[0].tokens


def test_a_long_text_is_read_in_consecutive_contexts(demo, texts, monkeypatch):
    monkeypatch.setattr(probe_module, "CONTEXT_TOKENS", 33)
    (long,) = demo.activations([texts[0]])
    assert "".join(long.tokens) == texts[0] and len(long.tokens) > 40
    parts = ["".join(long.tokens[s : s + 32]) for s in range(0, len(long.tokens), 32)]
    expected = np.concatenate([dense(part, demo.dictionary.width) for part in demo.activations(parts)])
    assert same(dense(long, demo.dictionary.width), expected)


def test_special_tokens_that_a_text_spells_are_plain_text(demo):
    (found,) = demo.activations(["a <eos> b <bos> c"])
    assert "".join(found.tokens) == "a <eos> b <bos> c" and "<eos>" not in found.tokens


@pytest.mark.parametrize("kind", ["crosscoder", "clt"])
def test_a_multi_layer_kind_is_read_at_all_its_sites(kind, small_corpus, subject, tmp_path, texts):
    seen = seen_at(kind, [0, 2], small_corpus, subject)
    shards = multi_layer_tensors(seen.xs)
    folder = write_multi_layer(tmp_path / kind, kind, [0, 2], shards)
    dictionary = open_dictionary(entry_of(folder))
    (found,) = Probe(dictionary, subject).activations(texts[:1])
    ids = torch.tensor([[subject.tokenizer.bos_token_id, *subject.tokenizer(texts[0], add_special_tokens=False)["input_ids"]]])
    inputs, handles = {}, []
    for layer in (0, 2):
        block = subject.model.model.layers[layer]
        module = block if kind == "crosscoder" else block.pre_feedforward_layernorm
        handles.append(module.register_forward_hook(lambda _m, _a, out, layer=layer: inputs.update({layer: out})))
    with torch.no_grad():
        subject.model(input_ids=ids, use_cache=False)
    for handle in handles:
        handle.remove()
    pre = torch.cat(
        [inputs[n][0, 1:].double() @ t["w_enc"].double() + t["b_enc"].double() for n, t in zip((0, 2), shards, strict=True)], 1
    )
    threshold = torch.cat([t["threshold"].double() for t in shards])
    assert same(dense(found, dictionary.width), torch.where(pre > threshold, pre, 0.0).numpy())


CHAT = [{"role": "system", "content": "c"}, {"role": "user", "content": "ab\nb"}, {"role": "assistant", "content": "a."}]


@pytest.fixture
def letters(rng) -> Probe:
    return letter_probe(tiny_subject(rng), {})


def test_every_token_of_a_conversation_has_the_role_of_who_says_it(letters):
    text, chat = letters.activations(["ab", CHAT])
    assert text.roles == ("text", "text") and len(chat.roles) == len(chat.tokens)
    by_role = {role: "".join(t for t, r in zip(chat.tokens, chat.roles, strict=True) if r == role) for role in set(chat.roles)}
    assert by_role["system"] == "c" and by_role["user"] == "ab\nb" and by_role["assistant"] == "a."
    turns = [f"<|im_start|>{name}\n{{}}<|im_end|>\n".format("") for name in ("system", "user", "assistant")]
    assert by_role["template"] == "".join(turns)


def test_what_the_template_adds_never_fires_and_the_same_text_said_does(letters):
    (chat,) = letters.activations([CHAT])
    fired = [(chat.tokens[at], chat.roles[at], feature) for at, feature in zip(chat.position, chat.feature, strict=True)]
    said = [("c", "system", 2), *(("a", "user", 0), ("b", "user", 1), ("\n", "user", MARKUP), ("b", "user", 1))]
    assert fired == [*said, ("a", "assistant", 0), (".", "assistant", LETTERS.index("."))]


def test_a_long_conversation_is_read_in_consecutive_contexts(letters, monkeypatch):
    (whole,) = letters.activations([CHAT])
    monkeypatch.setattr(probe_module, "CONTEXT_TOKENS", 9)
    (cut,) = letters.activations([CHAT])
    assert len(whole.tokens) > 30 and (cut.tokens, cut.roles) == (whole.tokens, whole.roles)
    for column in ("feature", "position", "value"):
        assert (getattr(cut, column) == getattr(whole, column)).all()


def test_without_bos_the_first_token_of_a_context_does_not_count(rng, monkeypatch):
    subject = tiny_subject(rng)
    probe = letter_probe(subject, {})
    vars(subject)["tokenizer"] = tiny_tokenizer()
    monkeypatch.setattr(probe_module, "CONTEXT_TOKENS", 3)
    (found,) = probe.activations(["ababa"])
    assert found.tokens == list("ababa") and found.roles == ("template", "text", "text", "template", "text")
    assert found.position.tolist() == [1, 2, 4]


TURN = {"role": "user", "content": "ab"}


@pytest.mark.parametrize(
    "wrong",
    [[], TURN, [{"role": "user"}], [{"content": "a"}], [TURN, {"role": "user", "content": ["a"]}], ["a", "b"], None, 3, b"ab"],
    ids=str,
)
def test_what_is_neither_text_nor_conversation_is_refused_by_its_number(letters, wrong):
    with pytest.raises(ConfigError, match='^a conversation is turns like {"role": "user"'):
        checked_text(wrong)
    with pytest.raises(ConfigError, match="^text 1: a conversation is turns like"):
        letters.activations(["a", wrong])


def test_a_role_that_nobody_has_is_refused_by_the_texts_number(letters):
    with pytest.raises(SubjectModelError, match="text 0: a turn's role is user, assistant or system, not 'tool'"):
        letters.activations([[{"role": "tool", "content": "a"}]])


def test_half_a_surrogate_is_read_as_a_question_mark(letters):
    assert checked_text("a\udcff") == "a?" and checked_text("\U0001f642") == "\U0001f642"
    assert checked_text(({"role": "user", "content": "\ud800b", "name": "x"},)) == [{"role": "user", "content": "?b"}]
    text, chat = letters.activations(["a\udcff b", [{"role": "user", "content": "\ud800b"}]])
    assert "".join(text.tokens) == "a? b" and "?b" in "".join(chat.tokens)


def test_several_saes_are_read_in_one_pass(letters):
    other = letter_probe(letters.subject, {"a": 4.0})
    with counting_passes() as passes:
        together = shared_activations(["ab", CHAT], [letters, other])
    assert passes.passes == 1
    for found, probe in zip(together, (letters, other), strict=True):
        for mine, alone in zip(found, probe.activations(["ab", CHAT]), strict=True):
            assert mine.tokens == alone.tokens and (mine.value == alone.value).all() and (mine.feature == alone.feature).all()


def test_whoever_looks_on_sees_every_token_that_counts_once(letters):
    seen = []
    letters.activations(["abc", "", CHAT], seen=lambda batch, text: seen.extend(text.tolist()))
    assert sorted(seen) == [0] * 3 + [2] * len("cab\nba.")
