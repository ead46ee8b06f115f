import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from scopeatlas.activations.cache import activation_keys, cache_activations
from scopeatlas.activations.fidelity import fidelity_path, measure_fidelity
from scopeatlas.atlas.embedding import Embedder
from scopeatlas.atlas.stage import index_features
from scopeatlas.corpus.build import build_corpus
from scopeatlas.errors import NotReadyError, UnknownSaeError
from scopeatlas.labels.rule_labeller import RuleSettings
from scopeatlas.labels.stage import LabelSettings, label_features
from scopeatlas.mining.examples import mine_examples
from scopeatlas.scoring.stage import ScoreSettings, score_labels
from scopeatlas.storage.store import STAGES, Store
from scopeatlas.upkeep import SaeStatus, prune, status
from tests.conftest import SMALL, WIDTH, Stored

LABELS = LabelSettings(RuleSettings(min_contexts=3, min_documents=2, min_lift=0.1))
SCORES = ScoreSettings(min_report_documents=1)


@dataclass(frozen=True)
class Chain(Stored):
    """A store with two SAEs over a few real articles: the first goes all the way, the second stays cached."""

    subject: object

    @property
    def there(self) -> tuple:
        return self.store, self.corpus, self.entry, self.subject

    @property
    def line(self) -> SaeStatus:
        """The status of the first SAE."""
        (line,) = [line for line in status(self.store) if line.sae == self.entry.key]
        return line

    def label(self, settings: LabelSettings = LABELS) -> None:
        label_features(*self.there, settings=settings)

    def score(self, settings: LabelSettings = LABELS) -> None:
        score_labels(*self.there, labels=settings, settings=SCORES)

    def publish(self, settings: LabelSettings = LABELS) -> Path:
        return index_features(*self.there, embedder=Embedder(), labels=settings, scores=SCORES).path

    def cache(self, *unneeded: str):
        return cache_activations(self.store, self.corpus, self.entries, self.subject, unneeded=unneeded)

    def files(self, stage: str, sae: int = 0) -> dict[str, bytes]:
        """The data of a stage, without its records and marks."""
        folder = self.store.stage(self.entries[sae].key, self.corpus.id, stage).root
        return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix in {".parquet", ".npz"}}


@pytest.fixture(scope="module")
def progress(two_saes, subject, tmp_path_factory) -> tuple[Chain, dict[str, SaeStatus]]:
    """The chain run to its end, and the status of its first SAE after each step."""
    store = Store(tmp_path_factory.mktemp("upkeep") / "store")
    for entry in two_saes:
        store.register(entry.key, entry.as_json())
    chain = Chain(store, build_corpus(store, SMALL, subject)[0], two_saes, subject)
    lines = {"registered": chain.line}
    steps = {
        "activations": chain.cache,
        "fidelity": lambda: measure_fidelity(store, chain.corpus, chain.entries[:1], subject),
        "examples": lambda: mine_examples(*chain.there),
        "labels": chain.label,
        "scores": chain.score,
        "published": chain.publish,
    }
    for name, step in steps.items():
        step()
        lines[name] = chain.line
    return chain, lines


@pytest.fixture
def chain(progress, tmp_path) -> Chain:
    """A copy of the finished chain, to be changed."""
    shutil.copytree(progress[0].store.root, tmp_path / "store")
    return replace(progress[0], store=Store(tmp_path / "store"))


def test_the_stage_of_an_sae_is_the_last_that_is_finished(progress):
    stages = {name: line.stage for name, line in progress[1].items()}
    assert stages == {**{name: name for name in stages}, "fidelity": "activations"}


def test_an_sae_that_nothing_was_done_for_has_a_line_without_a_corpus(progress):
    line = progress[1]["registered"]
    assert (line.corpus, line.shards, line.bytes, line.complete) == ("", 0, 0, False)


def test_shards_are_counted_as_they_are_cached(progress):
    chain, lines = progress
    assert (lines["activations"].shards_done, lines["activations"].shards) == (4, 4)
    assert lines["activations"].corpus == chain.corpus.id


def test_a_half_done_cache_is_no_finished_stage(chain):
    for name in STAGES[1:]:
        shutil.rmtree(chain.store.stage(chain.entry.key, chain.corpus.id, name).root)
    shutil.rmtree(chain.store.root / "atlas")
    stage = chain.store.stage(chain.entry.key, chain.corpus.id, "activations")
    stage.discard(next(stage.records()))
    assert (chain.line.stage, chain.line.shards_done, chain.line.shards) == ("registered", 3, 4)


def test_fidelity_is_told_once_it_was_measured(progress):
    _, lines = progress
    assert (lines["activations"].fvu, lines["activations"].l0) == (None, None)
    assert lines["fidelity"].fvu > 0 and 5 < lines["fidelity"].l0 < 20


def test_labels_scores_and_rows_are_counted(progress):
    chain, lines = progress
    assert (lines["examples"].labelled, lines["labels"].scored, lines["scores"].published) == (0, 0, 0)
    labels, _ = label_features(*chain.there, settings=LABELS)
    scores, _ = score_labels(*chain.there, labels=LABELS, settings=SCORES)
    assert lines["labels"].labelled == labels.by_status()["ok"] > 0
    assert lines["scores"].scored == len(scores.scored) > 0
    assert lines["published"].published == WIDTH


def test_only_a_published_sae_is_complete(progress):
    chain, lines = progress
    assert [name for name, line in lines.items() if line.complete] == ["published"]
    other = [line for line in status(chain.store) if line.sae == chain.entries[1].key]
    assert [(line.stage, line.complete) for line in other] == [("activations", False)]


def test_an_sae_that_failed_last_is_not_complete(chain):
    chain.store.record_error(chain.entry.key, "feature_labels", "the server is gone")
    assert (chain.line.complete, chain.line.last_error) == (False, "feature_labels: the server is gone")
    chain.store.record_error(chain.entry.key, "feature_labels", None)
    assert chain.line.complete


def test_pruning_frees_the_activations_of_a_published_sae_alone(chain):
    other = chain.files("activations", sae=1)
    before = sum(len(data) for stage in ("activations", "nulls") for data in chain.files(stage).values())
    assert prune(chain.store) == {chain.entry.key: before}
    assert chain.files("activations") == chain.files("nulls") == {} and chain.files("activations", sae=1) == other


def test_pruning_leaves_everything_downstream(chain):
    kept = {stage: chain.files(stage) for stage in STAGES if stage not in {"activations", "nulls"}}
    prune(chain.store)
    assert {stage: chain.files(stage) for stage in kept} == kept
    assert fidelity_path(chain.store, chain.corpus.id, chain.entry.key).exists()


def test_a_pruned_sae_is_complete_all_the_same(chain):
    before = chain.line
    freed = prune(chain.store)[chain.entry.key]
    line = chain.line
    assert (line.pruned, line.complete, line.shards_done) == (True, True, 4)
    assert before.bytes - line.bytes == freed


def test_stages_of_a_pruned_sae_are_reused(chain):
    prune(chain.store)
    assert mine_examples(*chain.there)[1] and label_features(*chain.there, settings=LABELS)[1]
    assert score_labels(*chain.there, labels=LABELS, settings=SCORES)[1]
    assert index_features(*chain.there, embedder=Embedder(), labels=LABELS, scores=SCORES).reused


def test_a_dry_run_says_what_would_be_freed_and_frees_nothing(chain):
    before = chain.store.bytes_used()
    would = prune(chain.store, dry_run=True)
    assert chain.store.bytes_used() == before and not chain.line.pruned
    assert prune(chain.store) == would


def test_pruning_twice_frees_nothing_more(chain):
    prune(chain.store)
    assert prune(chain.store) == {}


def test_an_unpublished_sae_is_not_pruned_even_by_name(chain):
    before = chain.store.bytes_used()
    assert prune(chain.store, sae=chain.entries[1].key) == {}
    assert chain.store.bytes_used() == before


def test_one_sae_is_pruned_by_name(chain):
    assert list(prune(chain.store, sae=chain.entry.key)) == [chain.entry.key]


def test_an_unknown_sae_is_an_error(chain):
    with pytest.raises(UnknownSaeError, match="no SAE 'nope'"):
        prune(chain.store, sae="nope")


def test_pruned_shards_are_not_made_again_while_nothing_needs_them(chain):
    prune(chain.store)
    result = chain.cache(chain.entry.key)
    assert (result.reused, result.shards_reused, result.tokens) == (True, 8, 0)
    assert chain.files("activations") == {} and chain.line.pruned


def test_labels_with_new_settings_ask_for_the_pruned_shards(chain):
    prune(chain.store)
    with pytest.raises(NotReadyError, match="was pruned .* run that stage again to restore it"):
        chain.label(LabelSettings())


def test_pruned_shards_are_made_again_byte_for_byte_when_they_are_needed(chain):
    before = chain.files("activations")
    prune(chain.store)
    result = chain.cache()
    assert (result.shards_done, result.shards_reused) == (4, 4)
    assert chain.files("activations") == before and not chain.line.pruned
    chain.label(LabelSettings())


def test_what_is_made_again_can_be_pruned_again(chain):
    freed = prune(chain.store)
    chain.cache()
    assert prune(chain.store) == freed


def test_the_live_generation_of_a_publication_and_one_to_go_back_to_are_kept(chain):
    first = chain.publish()
    paths = []
    for lift in (0.2, 0.5):
        settings = replace(LABELS, rules=replace(LABELS.rules, min_lift=lift))
        chain.label(settings)
        chain.score(settings)
        paths.append(chain.publish(settings))
    assert len({first, *paths}) == 3
    prune(chain.store)
    assert [path.exists() for path in (first, *paths)] == [False, True, True]


def test_every_generation_of_labels_and_scores_is_kept(chain):
    chain.label(LabelSettings())
    chain.score(LabelSettings())
    before = {stage: chain.files(stage) for stage in ("labels", "scores")}
    prune(chain.store)
    assert {stage: chain.files(stage) for stage in before} == before
    for stage in before:
        records = chain.store.stage(chain.entry.key, chain.corpus.id, stage).records()
        assert sum(record.key.name == stage for record in records) == 2


def test_of_activations_those_published_are_freed_the_newest_kept_and_others_forgotten(chain):
    stage = chain.store.stage(chain.entry.key, chain.corpus.id, "activations")
    (published, *_) = activation_keys(chain.corpus, chain.entry, chain.subject)
    between, newest = (replace(published, identity=digit * 64) for digit in "ef")
    for key in (between, newest):
        path = stage.data_path(key, ".parquet")
        path.write_bytes(b"newer")
        stage.commit(key, [path], {})
    prune(chain.store)
    assert [stage.is_pruned(key) for key in (published, newest)] == [True, False]
    known = [record.key for record in stage.records()]
    assert published in known and newest in known and between not in known and stage.is_done(newest)
