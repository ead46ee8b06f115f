import numpy as np
import polars as pl
import pytest
import torch

from scopeatlas.corpus.documents import SPLITS
from scopeatlas.dictionaries.releases import open_dictionary
from scopeatlas.hypotheses.labels import Label
from scopeatlas.labels.outputs import writes_claims
from scopeatlas.mining.steering import auroc_of_tokens, token_changes
from scopeatlas.scoring.table import score_table
from scopeatlas.scoring.writes import PROMPT_TOKENS, claimed_tokens, report_prompts, steer_writes
from tests.conftest import entry_of, write_sae

SITE = "model.layers.16.output"
WORDS = (" Paris", " seven", " water")


@pytest.fixture(scope="module")
def dictionary(subject, tmp_path_factory):
    """Features that write the unembedding of a word each, near the end of the model."""
    tokens = [subject.tokenizer.encode(word, add_special_tokens=False)[0] for word in WORDS]
    rows = torch.nn.functional.normalize(subject.model.get_output_embeddings().weight[tokens].detach().float().cpu(), dim=1)
    tensors = {
        "w_enc": rows.T.contiguous(),
        "b_enc": torch.zeros(3),
        "threshold": torch.ones(3),
        "w_dec": rows,
        "b_dec": rows[0] * 0,
    }
    folder = write_sae(tmp_path_factory.mktemp("writers") / "sae", tensors, hf_hook_point_in=SITE, hf_hook_point_out=SITE)
    return open_dictionary(entry_of(folder))


def label_of(feature: int, writes: str) -> Label:
    return Label(feature, "llm", "ok", writes=writes)


@pytest.fixture(scope="module", autouse=True)
def _few_prompts():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("scopeatlas.scoring.writes.PROMPTS", 5)
        yield


@pytest.fixture(scope="module")
def rows(dictionary, subject, medium_corpus):
    labels = [label_of(f, f'raises "{word}"') for f, word in enumerate(WORDS)] + [label_of(1, "raises numbers")]
    made = steer_writes(dictionary, subject, medium_corpus.corpus, labels, min_documents=3, seed=0)
    return score_table(made)


@pytest.mark.slow
def test_a_feature_raises_the_token_that_it_writes_and_a_random_direction_does_not(rows):
    by_arm = {arm: rows.filter((rows["arm"] == arm) & (rows["status"] == "scored"))["auroc"] for arm in rows["arm"].unique()}
    assert set(by_arm) == {"own", "shuffled", "random_direction"}
    assert by_arm["own"].min() > 0.99 and by_arm["random_direction"].mean() < 0.9
    assert by_arm["shuffled"].max() < by_arm["own"].min()  # any word is raised more than most of the vocabulary, but less
    own = rows.filter((rows["arm"] == "own") & (rows["status"] == "scored"))
    assert (own["lift_low"] > 0).all() and set(rows["claim"]) == {"writes"} and set(own["unit"]) == {"prompt"}
    assert all("changes by +" in note for note in own["note"])


@pytest.mark.slow
def test_the_score_is_the_mean_auroc_over_prompts_of_report_documents(rows, dictionary, subject, medium_corpus):
    prompts, _ = report_prompts(medium_corpus.corpus)
    (change,) = token_changes(dictionary, subject, prompts, [2])
    expected = auroc_of_tokens(change.effects, claimed_tokens(f'raises "{WORDS[2]}"', subject)).mean()
    own = rows.row(by_predicate=(pl.col("feature") == 2) & (pl.col("arm") == "own"), named=True)
    assert own["auroc"] == pytest.approx(expected, abs=1e-5) and own["documents"] == len(prompts)


@pytest.mark.slow
def test_a_claim_that_names_no_token_cannot_be_tested(rows):
    left = rows.filter(rows["status"] == "not_applicable")
    assert left.select("feature", "arm", "note").rows() == [(1, "own", "the claim names no token")]


def test_prompts_begin_contexts_of_report_documents_one_of_each(medium_corpus):
    corpus = medium_corpus.corpus
    prompts, document = report_prompts(corpus)
    starts = {
        tuple(row[:PROMPT_TOKENS].tolist())
        for contexts in map(corpus.contexts, corpus.shards)
        for row, split in zip(contexts.tokens, contexts.splits, strict=True)
        if split == SPLITS.index("report")
    }
    assert len(prompts) >= 3 and {tuple(prompt.tolist()) for prompt in prompts} <= starts
    assert (prompts >= 0).all() and len(np.unique(document)) == len(prompts)
    assert len(prompts) <= corpus.documents.filter(corpus.documents["split"] == "report").height


def test_claimed_tokens_are_those_between_quotation_marks(subject):
    found = claimed_tokens('raises " Paris", "ing" and " Paris", never " supercalifragilistic"', subject)
    assert [subject.tokenizer.decode([token]) for token in found] == [" Paris", "ing"]
    assert claimed_tokens("raises numbers", subject) == []


def test_whatever_a_feature_is_claimed_to_write_is_read_back(subject):
    texts = ['"', "\\", "\n", "'", " Paris", "ing", ' "']
    ids = [subject.tokenizer.encode(text, add_special_tokens=False) for text in texts]
    assert all(len(found) == 1 for found in ids)
    tokens = [found[0] for found in ids]
    for start in range(len(tokens)):
        promoted = [*tokens[start:], *tokens[:start]][:5]
        table = pl.DataFrame({"feature": [0], "promoted": [promoted], "promoted_strength": [[9.0] * 5]})
        assert claimed_tokens(writes_claims(table, subject)[0], subject) == promoted


def test_a_claim_in_a_persons_own_words_may_hold_what_is_no_json(subject):
    found = claimed_tokens('raises "\n" as it is, "\\d" and " Paris"', subject)
    assert [subject.tokenizer.decode([token]) for token in found] == ["\n", " Paris"]


def test_labels_without_a_claim_on_what_is_written_cost_nothing(medium_corpus, subject, dictionary):
    assert steer_writes(dictionary, subject, medium_corpus.corpus, [label_of(0, "")], min_documents=3, seed=0) == []
