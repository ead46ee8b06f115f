"""Labels whose predictions are run through the real model and the demo SAE; what needs the SAE is slow for its sake."""

import json
from dataclasses import dataclass, replace

import numpy as np
import polars as pl
import pytest
from scipy import stats

from scopeatlas.activations.cache import cache_activations
from scopeatlas.activations.probe import Probe
from scopeatlas.dictionaries.releases import describe_sae, open_dictionary
from scopeatlas.errors import LeakError
from scopeatlas.hypotheses.labels import Label
from scopeatlas.hypotheses.rules import REACH, Rule
from scopeatlas.hypotheses.samples import Windows, draw_windows
from scopeatlas.hypotheses.units import Firings, Units, read_firings
from scopeatlas.labels.edits import EDITS, PREFIX, PROMPT, SHOWN, Edit, Passage, edit_requests, read_edits, rule_edits
from scopeatlas.labels.falsification import _verdict, falsify
from scopeatlas.llm.replies import InvalidReply
from scopeatlas.llm.requests import Answer, ChatReply
from scopeatlas.storage.store import Store
from tests.conftest import REPOSITORY

RELEASE = REPOSITORY / "demo" / "releases" / "scope-atlas-demo-gemma-3-270m"
SAE = "resid_post/layer_9_width_2k_l0_medium"
RULES = 12


@dataclass(frozen=True)
class Demo:
    """The demo SAE on the medium corpus, and the features that fire on hardly anything but one token."""

    units: Units
    firings: Firings
    probe: Probe
    select: Windows
    rules: dict[int, Rule]

    def labels(self, rules: dict[int, Rule]) -> list[Label]:
        return [Label(f, "rule", "ok", label=r.short(), reads=r.sentence(), rule=r.to_json()) for f, r in rules.items()]


def token_features(units: Units, firings: Firings) -> dict[int, Rule]:
    """Features that fire at four of five places of one token and more, which are not all the places where they fire."""
    keys, texts = units.column("token")
    table = pl.DataFrame({"feature": firings.feature, "key": keys[firings.position]})
    total = pl.DataFrame({"key": keys[units.counted]}).group_by("key").agg(total=pl.len())
    hits = table.group_by("feature", "key").agg(n=pl.len()).with_columns(fired=pl.col("n").sum().over("feature"))
    good = hits.join(total, on="key").filter(pl.col("n") >= 0.8 * pl.col("total"), pl.col("n") >= 0.2 * pl.col("fired"))
    good = good.filter(pl.col("total") >= 15).sort("n", "feature", descending=[True, False])
    good = good.unique("key", maintain_order=True).unique("feature", maintain_order=True)
    return {row["feature"]: Rule("token", (texts[row["key"]],)) for row in good.head(RULES).iter_rows(named=True)}


@pytest.fixture(scope="module")
def demo(medium_corpus, subject, tmp_path_factory) -> Demo:
    store, corpus = Store(tmp_path_factory.mktemp("demo")), medium_corpus.corpus
    entry = describe_sae(RELEASE / SAE, release=RELEASE.name, path=SAE)
    cache_activations(store, corpus, [entry], subject)
    dictionary = open_dictionary(entry)
    units = Units(corpus, subject)
    firings = read_firings(store, corpus, entry, subject, units, width=dictionary.width)
    rules = token_features(units, firings)
    assert len(rules) >= 6
    select = draw_windows(units, firings, list(rules), split="select", neighbours=None)
    return Demo(units, firings, Probe(dictionary, subject), select, rules)


def shuffled(rules: dict[int, Rule]) -> dict[int, Rule]:
    """Every feature with the rule of the next."""
    features = list(rules)
    return {f: rules[g] for f, g in zip(features, [*features[1:], features[0]], strict=True)}


def own(demo: Demo, feature: int) -> pl.DataFrame:
    return demo.select.of(feature)


def rarest(demo: Demo) -> int:
    """The feature that leaves most windows silent."""
    return list(demo.rules)[-1]


@pytest.mark.slow
def test_a_rule_silences_windows_that_fire_and_ends_silent_ones_with_what_it_matches(demo):
    tokenizer = demo.probe.subject.tokenizer
    for feature, rule in demo.rules.items():
        windows = own(demo, feature)
        edits = rule_edits(rule, windows, demo.select.table)
        assert any(edit.expected for edit in edits) and any(not edit.expected for edit in edits)
        texts = {"".join(t) for t in windows["texts"]}
        for edit in edits:
            last = edit.edited.text[edit.edited.place :]
            assert rule.matches([last]) == [edit.expected]
            assert len(tokenizer(edit.edited.text, add_special_tokens=False)["input_ids"]) <= PREFIX + REACH + 4
            if edit.original is None:
                assert edit.expected and any(edit.edited.text.startswith("".join(t[:PREFIX])) for t in windows["texts"])
            else:
                assert not edit.expected and any(edit.original.text in text for text in texts)
                assert edit.original.text[: edit.original.place] == edit.edited.text[: edit.edited.place]
                assert rule.matches([edit.original.text[edit.original.place :]]) == [True]


def windows_of(*rows: tuple[str, list[str], int]) -> pl.DataFrame:
    """Windows by hand: kind, tokens and where the feature fires."""
    return pl.DataFrame(
        [
            {"kind": k, "texts": t, "focus": f, "activations": [float(k == "positive" and i == f) for i in range(len(t))]}
            for k, t, f in rows
        ]
    ).with_columns(document_id=pl.lit("d"), feature=pl.lit(0))


BY_HAND = windows_of(
    ("positive", ["The", " lake", " of", " Geneva", " is"], 3),
    ("random", ["A", " small", " boat", " with", " Red", " sails"], 2),
)


def test_a_rule_about_the_token_before_is_turned_around_there_and_the_place_stays():
    silencing, inserting = rule_edits(Rule("previous", (" of",)), BY_HAND, BY_HAND.head(0))
    assert silencing.original == Passage("The lake of Geneva", len("The lake of")) and not silencing.expected
    assert silencing.edited.text[silencing.edited.place :] == " Geneva" and " of" not in silencing.edited.text
    assert inserting.edited == Passage("A small boat with Red sails of Geneva", len("A small boat with Red sails of"))


def test_a_composition_takes_with_it_all_that_it_needs():
    rule = Rule("and", parts=(Rule("near", ("lake",)), Rule("shape", ("capitalised",))))
    *_, inserting = rule_edits(rule, BY_HAND, BY_HAND.head(0))
    assert inserting.edited.text == "A small boat with Red sails lake of Geneva" and inserting.expected


def test_a_rule_that_matches_none_of_its_own_windows_takes_text_from_those_of_others():
    others = windows_of(("positive", ["It", " was", " cold"], 0)).with_columns(feature=pl.lit(1))
    (inserting,) = rule_edits(Rule("token", (" cold",)), BY_HAND, others)
    assert inserting.edited.text == "A small boat with Red sails cold" and inserting.expected


def test_what_is_inserted_is_of_many_documents_and_not_chosen_because_the_feature_fires_there():
    """Its own windows, in which it fires on what the rule matches, come after those of other features."""
    strange = [(f"d{i // 4}", ["It", " was", f" so{i}", " Geneva"]) for i in range(12)]
    rows = [{"feature": 1, "kind": "positive", "document_id": d, "texts": t, "focus": 0} for d, t in strange]
    others = pl.concat([BY_HAND, pl.DataFrame(rows)], how="diagonal_relaxed")
    inserted = [edit.edited.text for edit in rule_edits(Rule("token", (" Geneva",)), BY_HAND, others) if edit.expected]
    hosts = "A small boat with Red sails"
    assert inserted == [f"{hosts} Geneva"] * EDITS
    before = Rule("and", parts=(Rule("near", ("was",)), Rule("token", (" Geneva",))))
    inserted = [edit.edited.text for edit in rule_edits(before, BY_HAND, others) if edit.expected]
    assert inserted == [f"{hosts} was so{i} Geneva" for i in (0, 4, 8, 1, 5, 9)]


@pytest.mark.parametrize(
    ("counts", "verdict"),
    [
        ((6, 0, 6, 0), "failed"),  # 0.5 ** 6 of right labels
        ((5, 0, 0, 0), "failed"),
        ((4, 0, 4, 0), "untested"),  # 0.5 ** 4 is more than one in twenty
        ((2, 0, 2, 2), "untested"),
        ((6, 1, 6, 1), "untested"),
        ((10, 1, 10, 0), "failed"),
        ((3, 3, 3, 0), "held"),
        ((6, 6, 6, 1), "held"),
        ((6, 6, 6, 6), "untested"),
        ((4, 0, 4, 4), "failed"),  # fires where it should not
        ((40, 40, 40, 40), "failed"),  # fires everywhere
        ((40, 12, 40, 0), "failed"),
        ((40, 18, 40, 0), "untested"),  # a little less than half, perhaps half
    ],
)
def test_a_verdict_needs_more_than_chance(counts, verdict):
    assert _verdict(*counts, None) == verdict


def test_a_label_at_the_border_is_demoted_by_each_test_in_one_case_of_twenty_at_most():
    for positives, negatives in ((3, 3), (6, 6), (12, 7)):
        for share in (0.25, 0.4, 0.5):
            chance = 0.0
            for fired in range(positives + 1):
                for anyway in range(negatives + 1):
                    p = stats.binom.pmf(fired, positives, share + 0.25) * stats.binom.pmf(anyway, negatives, share)
                    chance += p * (_verdict(positives, fired, negatives, anyway, None) == "failed")
            assert chance <= 2 * 0.05


def test_a_piece_of_a_word_is_inserted_with_the_word_it_ends():
    others = windows_of(("positive", ["In", " ", "1", "9", "0"], 0)).with_columns(feature=pl.lit(1))
    (inserting,) = rule_edits(Rule("token", ("0",)), BY_HAND, others)
    assert inserting.edited == Passage("A small boat with Red sails 190", len("A small boat with Red sails 19"))


@pytest.mark.parametrize("rule", [Rule("topic", ("lake",)), Rule("next", (" is",))])
def test_what_depends_on_more_than_the_tokens_before_is_left_alone(rule):
    assert rule_edits(rule, BY_HAND, BY_HAND) == []


@pytest.mark.slow
def test_right_rules_hold_and_those_of_other_features_are_demoted(demo):
    right, wrong = demo.labels(demo.rules), demo.labels(shuffled(demo.rules))
    found = falsify([*right, *wrong], demo.select, demo.probe, edits={})
    by_verdict = {row["label_id"]: row["verdict"] for row in found.verdicts.iter_rows(named=True)}
    of_wrong, of_right = ([by_verdict[label.label_id] for label in labels] for labels in (wrong, right))
    assert of_wrong.count("failed") >= 0.8 * len(wrong) and "held" not in of_wrong
    assert of_right.count("held") >= 0.8 * len(right) and "failed" not in of_right


@pytest.mark.slow
def test_the_table_keeps_every_text_and_its_counts_are_those_of_the_verdicts(demo):
    labels = demo.labels(demo.rules)[:3]
    found = falsify(labels, demo.select, demo.probe, edits={})
    alone = demo.probe.activations(found.table["text"].to_list())
    for row, fires in zip(found.table.iter_rows(named=True), alone, strict=True):
        assert row["passed"] == (row["fired"] == row["expected"]) and row["fired"] == (row["peak"] > 0)
        assert demo.select.document_splits[row["document_id"]] == "select" and row["origin"] == "edit"
        ends = np.cumsum([len(token) for token in fires.tokens])
        matters = (ends[fires.position] > row["place"]) & (fires.feature == row["feature"])
        assert row["peak"] == pytest.approx(fires.value[matters].max(initial=0), rel=1e-2)
    for row in found.verdicts.iter_rows(named=True):
        mine = found.table.filter(pl.col("label_id") == row["label_id"])
        assert row["positives"] == mine["expected"].sum() and row["negatives"] == (~mine["expected"]).sum()
        assert row["positives_fired"] == (mine["expected"] & mine["fired"]).sum()


def text_label(demo: Demo, feature: int, positive: list[str], negative: list[str], **changes: object) -> Label:
    label = Label(feature, "llm", "ok", "words", "Fires on words.", version="llm:m")
    return replace(label, predicted_positive=tuple(positive), predicted_negative=tuple(negative), **changes)


@pytest.fixture(scope="module")
def sentences(demo) -> dict[int, tuple[list[str], list[str]]]:
    """Of each feature, up to four select windows that fire when read alone, and four that do not."""
    table = demo.select.table.filter(pl.col("kind").is_in(["positive", "random"]))
    texts = list(dict.fromkeys("".join(tokens) for tokens in table["texts"]))
    fires = dict(zip(texts, (set(found.feature.tolist()) for found in demo.probe.activations(texts)), strict=True))
    given = {}
    for feature in demo.rules:
        mine = ["".join(tokens) for tokens in own(demo, feature)["texts"]]
        given[feature] = (
            [t for t in mine if feature in fires.get(t, ())][:4],
            [t for t in mine if feature not in fires.get(t, {feature})][:4],
        )
    return given


@pytest.mark.slow
def test_predicted_sentences_decide_a_claim_in_words(demo, sentences):
    right = [text_label(demo, f, positive, negative) for f, (positive, negative) in sentences.items()]
    wrong = [text_label(demo, f, negative, positive, label="wrong") for f, (positive, negative) in sentences.items()]
    found = falsify([*right, *wrong], demo.select, demo.probe, edits={})
    enough = {f for f, texts in sentences.items() if min(map(len, texts)) >= 3}
    assert len(enough) >= 3
    assert {label.label_id for label in wrong if label.feature in enough} <= found.demoted <= {label.label_id for label in wrong}
    assert set(found.table["origin"]) == {"predicted"} and set(found.table["document_id"]) == {""}


@pytest.mark.slow
def test_without_negatives_a_feature_has_to_beat_chance(demo, sentences):
    labels = [text_label(demo, f, positive, []) for f, (positive, _) in sentences.items()]
    found = falsify(labels, demo.select, demo.probe, edits={})
    chances = found.verdicts["chance"].to_list()
    assert found.verdicts["positives_fired"].to_list() == found.verdicts["positives"].to_list()
    for row, chance in zip(found.verdicts.iter_rows(named=True), chances, strict=True):
        held = row["positives"] >= 3 and chance ** row["positives"] <= 0.05
        assert row["verdict"] == ("held" if held else "untested")
    assert set(found.verdicts["verdict"]) == {"held", "untested"} and not found.demoted


@pytest.mark.slow
def test_chance_is_how_often_a_feature_fires_on_the_positives_of_others(demo, sentences):
    labels = [text_label(demo, f, positive, negative) for f, (positive, negative) in sentences.items()]
    found = falsify(labels, demo.select, demo.probe, edits={})
    pairs = [(f, text) for f, (positive, _) in sentences.items() for text in positive]
    fires = [set(hit.feature.tolist()) for hit in demo.probe.activations([text for _, text in pairs])]
    for feature, chance in found.verdicts.select("feature", "chance").iter_rows():
        strange = [feature in hit for (f, _), hit in zip(pairs, fires, strict=True) if f != feature]
        assert chance == pytest.approx(np.mean(strange), abs=0.03)


@pytest.mark.slow
def test_too_few_predictions_leave_a_label_untested(demo, sentences):
    feature, (positive, negative) = next(iter(sentences.items()))
    silent = text_label(demo, feature, negative[:1], positive)
    refused = text_label(demo, feature, negative, positive, status="unclear")
    found = falsify([silent, refused], demo.select, demo.probe, edits={})
    assert not found.demoted and found.verdicts["verdict"].to_list() == ["untested"]
    assert set(found.table["label_id"]) == {silent.label_id}
    nothing = falsify([text_label(demo, feature, [], [])], demo.select, demo.probe, edits={})
    assert not len(nothing.table) and not nothing.demoted


@pytest.mark.slow
def test_an_edit_of_text_that_does_not_fire_by_itself_says_nothing(demo, sentences):
    feature, (positive, negative) = next(iter(sentences.items()))
    label = text_label(demo, feature, positive, [])
    sound = Edit(Passage(negative[0]), False, "d", Passage(positive[0]))
    void = Edit(Passage(positive[0]), False, "d", Passage(negative[0]))
    found = falsify([label], demo.select, demo.probe, edits={label.label_id: [sound, void]})
    assert found.table.filter(pl.col("origin") == "edit")["text"].to_list() == [negative[0]]


@pytest.mark.slow
def test_an_edit_that_should_fire_counts_only_if_its_original_is_silent_when_read_alone(demo, sentences):
    feature, (positive, negative) = next(iter(sentences.items()))
    label = text_label(demo, feature, positive, [])
    sound = Edit(Passage(positive[0]), True, "d", Passage(negative[0]))
    void = Edit(Passage(positive[1]), True, "d", Passage(positive[2]))
    found = falsify([label], demo.select, demo.probe, edits={label.label_id: [sound, void]})
    assert found.table.filter(pl.col("origin") == "edit")["text"].to_list() == [positive[0]]


@pytest.mark.slow
def test_windows_of_another_split_are_refused(demo):
    report = draw_windows(demo.units, demo.firings, list(demo.rules), split="report", neighbours=None)
    with pytest.raises(LeakError):
        falsify(demo.labels(demo.rules), report, demo.probe, edits={})
    with pytest.raises(LeakError):
        edit_requests("sae", demo.labels(demo.rules)[0], report)


def answered(label: Label, demo: Demo, edits: list[dict[str, str]]) -> Answer:
    (request,) = edit_requests("sae", label, demo.select)
    return Answer(request, "key", ChatReply(json.dumps({"edits": edits}), "stop", model="m"))


@pytest.mark.slow
def test_an_llm_is_shown_the_claim_and_windows_of_both_kinds_and_nothing_of_other_splits(demo):
    feature = rarest(demo)
    label = text_label(demo, feature, [], [])
    (request,) = edit_requests("sae", label, demo.select)
    assert request.purpose == "edit" and request.prompt == PROMPT.stamp and request.messages[0]["content"] == PROMPT.text
    data = request.messages[1]["content"]
    lines = [json.loads(line) for line in data.splitlines() if line.startswith('{"id"')]
    assert [line["id"] for line in lines] == [f"{kind}-{i}" for kind in ("fires", "silent") for i in range(1, SHOWN + 1)]
    windows = own(demo, feature)
    for line in lines:
        kind = "positive" if line["id"].startswith("fires") else "random"
        assert line["text"] in {"".join(t) for t in windows.filter(pl.col("kind") == kind)["texts"]}
    assert json.dumps(label.reads) in data
    assert edit_requests("sae", replace(label, reads=""), demo.select) == []
    assert edit_requests("sae", replace(label, feature=2**20), demo.select) == []


@pytest.mark.slow
def test_the_prompt_is_long_enough_to_be_cached(demo):
    assert len(demo.probe.subject.tokenizer(PROMPT.text)["input_ids"]) >= 1024


@pytest.mark.slow
def test_edits_are_read_back_with_their_document_and_what_is_expected(demo):
    feature = rarest(demo)
    label = text_label(demo, feature, [], [])
    windows = own(demo, feature)
    fires, silent = (windows.filter(pl.col("kind") == kind).row(1, named=True) for kind in ("positive", "random"))
    texts = ["".join(row["texts"]) for row in (fires, silent)]
    given = [{"id": "fires-2", "text": f"{texts[0]} again"}, {"id": "silent-2", "text": f"{texts[1]} again"}]
    first, second = read_edits(answered(label, demo, given), label, demo.select)
    assert first == Edit(Passage(f"{texts[0]} again".strip()), False, fires["document_id"], Passage(texts[0]))
    assert second == Edit(Passage(f"{texts[1]} again".strip()), True, silent["document_id"], Passage(texts[1]))


@pytest.mark.slow
def test_what_is_no_edit_is_left_out_and_what_breaks_the_contract_is_no_answer(demo):
    label = text_label(demo, rarest(demo), [], [])
    text = "".join(own(demo, label.feature).filter(pl.col("kind") == "positive").row(0, named=True)["texts"])
    unchanged, rewritten = {"id": "fires-1", "text": text}, {"id": "silent-1", "text": "Something else altogether."}
    assert read_edits(answered(label, demo, [unchanged, rewritten]), label, demo.select) == []
    for bad in ([unchanged, unchanged], [{"id": "fires-9", "text": text}], [{"id": "fires-1"}]):
        with pytest.raises(InvalidReply):
            read_edits(answered(label, demo, bad), label, demo.select)
