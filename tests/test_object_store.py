"""A store in a bucket: every stage, the atlas and the command line, on a real S3-compatible server and a tiny model."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from upath import UPath

from scopeatlas import discovery
from scopeatlas.activations.cache import CacheResult, cache_activations
from scopeatlas.atlas.catalog import read_catalog
from scopeatlas.atlas.embedding import Embedder
from scopeatlas.atlas.publish import Publication, publish, republish
from scopeatlas.atlas.search import open_reader
from scopeatlas.atlas.stage import index_features
from scopeatlas.atlas.tables import FEATURES, PUBLICATIONS, VECTORS, open_table
from scopeatlas.corpus.build import CorpusSettings, build_corpus, open_corpus
from scopeatlas.corpus.contexts import ContextRules
from scopeatlas.corpus.sampling import Sampling
from scopeatlas.corpus.sources import Source, open_source
from scopeatlas.dictionaries.releases import SaeEntry
from scopeatlas.errors import ScopeAtlasError
from scopeatlas.evidence import read_evidence
from scopeatlas.labels.annotations import annotate, read_annotations, retract
from scopeatlas.labels.stage import LabelSettings, label_features
from scopeatlas.mining.examples import mine_examples
from scopeatlas.runner.processes import ProcessRunner
from scopeatlas.scoring.stage import ScoreSettings, score_labels
from scopeatlas.storage.files import file_sha256
from scopeatlas.storage.store import STAGES, Store
from scopeatlas.storage.uris import Location, location, sizes_under
from scopeatlas.subject.capture import capture
from scopeatlas.subject.loading import SubjectModel
from scopeatlas.subject.sites import parse_hook_point
from scopeatlas.upkeep import prune, status
from tests.atlas.conftest import TEXTS, feature_rows
from tests.conftest import RESIDUAL, entry_of, sae_tensors, text_mask, write_sae
from tests.multi_layer import detect
from tests.tiny_models import tiny_llama, tiny_tokenizer

REPOSITORY = Path(__file__).resolve().parents[1]
LETTER, FEATURE = "b", 7
"""What one feature of the tiny SAE is made to fire on."""


@dataclass(frozen=True)
class World:
    """A tiny subject model with a byte for a token, an SAE of it, and how its corpus is drawn."""

    subject: SubjectModel
    settings: CorpusSettings
    entry: SaeEntry


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    folder = tmp_path_factory.mktemp("world")
    tiny_llama().save_pretrained(folder / "model")
    tiny_tokenizer(bos="<s>").save_pretrained(folder / "model")
    with (folder / "texts.jsonl").open("w", encoding="utf-8") as stream:
        for document in open_source(Source("wikipedia-sample")):
            stream.write(json.dumps({"text": document.text[:600]}) + "\n")
    subject = SubjectModel(str(folder / "model"), device="cpu")
    source = Source("files", paths=(str(folder / "texts.jsonl"),))
    settings = CorpusSettings("tiny", source, Sampling(shard_bits=2), ContextRules(48, 4))
    corpus, _ = build_corpus(Store(folder / "scratch"), settings, subject)
    tokens = np.concatenate([corpus.contexts(shard).tokens for shard in corpus.shards])[:200]
    site, mask = parse_hook_point(RESIDUAL), text_mask(tokens, subject)
    x = capture(subject.model, torch.tensor(np.where(mask, tokens, 0)).long(), [site])[site][torch.from_numpy(mask)]
    tensors = sae_tensors(x, width=48, l0=3)
    is_letter = tokens[mask] == subject.tokenizer.convert_tokens_to_ids(LETTER)
    detect(tensors, FEATURE, x, torch.from_numpy(is_letter))
    return World(subject, settings, entry_of(write_sae(folder / "sae", tensors, model_name="")))


@dataclass(frozen=True)
class Made:
    """What a whole run left in a store."""

    store: Store
    corpus: str
    entry: SaeEntry
    publication: Publication

    def hashes(self, *parts: str) -> dict[str, str]:
        """Of every file but records, which also say how long it took, and locks, which only a folder has."""
        folder = self.store.root.joinpath(*parts)
        names = [name for name in sizes_under(folder, nested=True) if not name.endswith((".commit.json", ".lock"))]
        return {name: file_sha256(folder / name) for name in names}

    def recorded(self, stage: str) -> list[dict[str, dict]]:
        return [record.files for record in self.store.stage(self.entry.key, self.corpus, stage).records()]

    def rows(self) -> pl.DataFrame:
        return open_table(self.store.root, FEATURES).search().to_polars().sort("key")


def run_all(root: Location, world: World) -> Made:
    store, subject, entry = Store(root), world.subject, world.entry
    corpus, _ = build_corpus(store, world.settings, subject)
    store.register(entry.key, entry.as_json())
    assert not cache_activations(store, corpus, [entry], subject).failed
    there = store, corpus, entry, subject
    labels, scores = LabelSettings(), ScoreSettings()
    mine_examples(*there)
    label_features(*there, settings=labels)
    score_labels(*there, labels=labels, settings=scores)
    publication = index_features(*there, embedder=Embedder(), labels=labels, scores=scores)
    return Made(store, corpus.id, entry, publication)


@pytest.fixture(scope="module")
def local(world, tmp_path_factory) -> Made:
    return run_all(tmp_path_factory.mktemp("local") / "store", world)


@pytest.fixture(scope="module")
def remote(world, s3, tmp_path_factory) -> Made:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SCOPE_ATLAS_STATE", str(tmp_path_factory.mktemp("state")))
        return run_all(location(f"{s3}/whole"), world)


@pytest.fixture
def root(s3, request, tmp_path, monkeypatch) -> UPath:
    """An empty place in the bucket."""
    monkeypatch.setenv("SCOPE_ATLAS_STATE", str(tmp_path / "state"))
    place = location(f"{s3}/{request.node.name}")
    assert isinstance(place, UPath)
    return place


def command(root: Location, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The installed program in a process of its own."""
    program = [sys.executable, "-m", "scopeatlas.cli", "--store", str(root), *arguments]
    return subprocess.run(program, cwd=REPOSITORY, capture_output=True, text=True, timeout=120)


# A whole run ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("part", ["corpus", *STAGES])
def test_every_stage_holds_the_same_bytes_as_in_a_folder(local, remote, part):
    parts = ("corpus", local.corpus) if part == "corpus" else ("saes", local.entry.key, local.corpus, part)
    assert remote.hashes(*parts) == local.hashes(*parts) != {}
    assert part == "corpus" or remote.recorded(part) == local.recorded(part) != []


def test_the_atlas_holds_the_same_rows(local, remote):
    assert remote.rows().equals(local.rows()) and remote.rows().height == 48


def test_what_was_planted_is_labelled_scored_and_shown_with_its_evidence(remote):
    hit = open_reader(remote.store.root).feature(remote.entry.key, str(FEATURE))
    assert hit.status == "ok" and LETTER in hit.reads and hit.f1 is not None
    evidence = read_evidence(remote.store, hit)
    assert evidence.windows and evidence.labels.height and evidence.scores.height and evidence.outcomes.height


def test_a_finished_store_does_no_work(remote, world):
    there = remote.store, open_corpus(remote.store, remote.corpus), remote.entry, world.subject
    assert build_corpus(remote.store, world.settings, world.subject)[1]
    assert cache_activations(there[0], there[1], [remote.entry], world.subject).reused
    assert mine_examples(*there)[1] and label_features(*there, settings=LabelSettings())[1]
    done = index_features(*there, embedder=Embedder(), labels=LabelSettings(), scores=ScoreSettings())
    assert done.reused and done.generation == remote.publication.generation


def test_status_says_of_both_the_same(local, remote):
    (ours,), (theirs,) = status(remote.store), status(local.store)
    assert replace(ours, bytes=theirs.bytes) == theirs and ours.complete
    assert ours.bytes == pytest.approx(theirs.bytes, abs=500)  # records say how many seconds their shard took


@pytest.mark.slow
def test_the_command_line_searches_a_uri(local, remote):
    found = command(remote.store.root, "search", f"the letter {LETTER}", "--json")
    assert found.returncode == 0, found.stderr
    keys = [hit["key"] for hit in json.loads(found.stdout)["hits"]]
    expected = json.loads(command(local.store.root, "search", f"the letter {LETTER}", "--json").stdout)
    assert keys == [hit["key"] for hit in expected["hits"]] and f"{remote.entry.key}/{FEATURE}" in keys


@pytest.mark.slow
def test_the_command_line_names_a_uri_that_holds_no_store(s3):
    missing = command(location(f"{s3}/nothing"), "status")
    assert missing.returncode == 2 and missing.stderr.startswith(f"error: no store at {s3}/nothing")
    refused = command(location("s3://no-such-bucket/x"), "search", "x")
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1 and "s3://no-such-bucket/x" in refused.stderr


# Going on -------------------------------------------------------------------------------------------------------------


def test_a_put_that_fails_costs_its_shard_and_no_other(world, local, root, monkeypatch):
    store = Store(root)
    corpus, _ = build_corpus(store, world.settings, world.subject)
    puts = []
    plain: Callable[[str, str], None] = root.fs.put_file

    def failing(source: str, target: str) -> None:
        puts.extend([target] * ("/activations/" in target and target.endswith(".parquet")))
        if len(puts) == 3:
            raise OSError(5, "the connection was reset")
        plain(source, target)

    def cached() -> CacheResult:
        return cache_activations(store, corpus, [world.entry], world.subject)

    monkeypatch.setattr(root.fs, "put_file", failing)
    try:
        said = str(cached().failed)
    except ScopeAtlasError as error:
        said = str(error)
    assert "the connection was reset" in said and f"{root}" in said
    before = set(sizes_under(root / "saes", nested=True))
    committed = [name for name in before if "/activations/" in name and name.endswith(".commit.json")]
    assert 0 < len(committed) < len(corpus.shards)
    monkeypatch.undo()
    result = cached()
    assert (result.shards_done, result.shards_reused) == (len(corpus.shards) - len(committed), len(committed))
    made = Made(store, corpus.id, world.entry, local.publication)
    for stage in ("activations", "nulls"):
        parts = ("saes", world.entry.key, corpus.id, stage)
        assert made.hashes(*parts) == local.hashes(*parts)


@pytest.mark.slow
def test_processes_of_their_own_write_the_same_bytes_into_the_bucket(world, local, root):
    store = Store(root)
    corpus, _ = build_corpus(store, world.settings, world.subject)
    runner = ProcessRunner(["cpu", "cpu"], threads=torch.get_num_threads())
    assert cache_activations(store, corpus, [world.entry], world.subject, runner=runner).shards_done == len(corpus.shards)
    made = Made(store, corpus.id, world.entry, local.publication)
    for stage in ("activations", "nulls"):
        parts = ("saes", world.entry.key, corpus.id, stage)
        expected = {name: digest for name, digest in local.hashes(*parts).items() if name != "fidelity.json"}
        assert made.hashes(*parts) == expected and made.recorded(stage) == local.recorded(stage)


def test_pruning_frees_what_is_published_and_it_is_made_again_when_asked_for(world, remote, root):
    root.fs.copy(remote.store.root.path, root.path, recursive=True)
    made = replace(remote, store=Store(root))
    before = made.hashes("saes", made.entry.key, made.corpus, "activations")
    used = made.store.bytes_used()
    assert prune(made.store, dry_run=True) == (freed := prune(made.store)) and freed[made.entry.key] > 0
    assert used - made.store.bytes_used() >= freed[made.entry.key] and status(made.store)[0].pruned
    there = made.store, open_corpus(made.store, made.corpus), made.entry, world.subject
    assert mine_examples(*there)[1]
    cache_activations(there[0], there[1], [made.entry], world.subject)
    assert made.hashes("saes", made.entry.key, made.corpus, "activations") == before


def test_an_annotation_is_kept_and_taken_back(remote, root):
    store = Store(root)
    store.register("sae", {})
    for author in ("ann", "bob"):
        annotate(store, "corpus", "sae", 3, reads=f"what {author} saw", author=author)
    retract(store, "corpus", "sae", 3, author="ann")
    assert [label.reads for label in read_annotations(store, "corpus", "sae")] == ["what bob saw"]


def test_what_is_found_in_a_folder_waits_in_the_catalog_and_is_registered(world, root):
    store, folder = Store(root), Path(world.entry.root).parent
    for _ in range(2):
        discovery.look(store, [folder], [], subject=world.subject)
    (entry,), failed = discovery.register_ready(store, [folder], limit=9)
    assert store.registered() == [entry.key] and not failed
    assert read_catalog(root)["state"].to_list() == ["registered"] and discovery.refresh_states(store) == 0


# The atlas ------------------------------------------------------------------------------------------------------------

ONE, TWO = TEXTS


def published(root: Location, sae: str, texts: list[str]) -> Publication:
    rows = feature_rows(sae, texts)
    vectors = dict.fromkeys(VECTORS, np.eye(384, dtype=np.float32)[np.arange(len(rows)) % 384])
    return publish(rows, vectors, root=root, folder=root / "saes" / sae, embedder=Embedder())


def test_an_earlier_generation_is_brought_back_and_no_other_sae_is_touched(root):
    first = published(root, ONE, TEXTS[ONE])
    published(root, ONE, ["another", *TEXTS[ONE][1:]])
    published(root, TWO, TEXTS[TWO])
    republish(first.generation, root=root, folder=root / "saes" / ONE)
    rows = open_table(root, FEATURES).search().select(["sae", "label", "generation"]).to_polars()
    assert rows.filter(sae=ONE)["label"].to_list().count("another") == 0
    assert rows.filter(sae=ONE)["generation"].unique().to_list() == [first.generation] and rows.height == 40
    assert open_table(root, PUBLICATIONS).count_rows() == 4


def test_words_are_found_by_the_full_text_index(root):
    published(root, ONE, TEXTS[ONE])
    table = open_table(root, FEATURES)
    assert {"terms", "key", "sae"} <= {column for index in table.list_indices() for column in index.columns}
    found = table.search("earthquake", query_type="fts").select(["feature", "_score"]).limit(3).to_arrow()
    assert found["feature"].to_pylist() == [TEXTS[ONE].index("earthquakes and volcanoes")]


@pytest.mark.slow
def test_machines_that_publish_at_the_same_time_double_no_key(root, tmp_path):
    """Two SAEs by two machines and one of them by a third, each with its own state, so that no lock keeps them apart."""
    code = f"""
import sys
import numpy as np
from scopeatlas.atlas.embedding import Embedder
from scopeatlas.atlas.publish import publish
from scopeatlas.atlas.tables import VECTORS
from scopeatlas.storage.uris import location
from tests.atlas.conftest import TEXTS, feature_rows
root, sae = location('{root}'), sys.argv[1]
for number in range(2):
    rows = feature_rows(sae, [f'{{number}} {{text}}' if text else '' for text in TEXTS[sae]])
    vectors = dict.fromkeys(VECTORS, np.eye(384, dtype=np.float32)[: len(rows)])
    publish(rows, vectors, root=root, folder=root / 'saes' / sae, embedder=Embedder())
"""
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", code, sae],
            cwd=REPOSITORY,
            env={**os.environ, "SCOPE_ATLAS_STATE": str(tmp_path / str(number))},
            stderr=subprocess.PIPE,
            text=True,
        )
        for number, sae in enumerate((ONE, TWO, ONE))
    ]
    said = [writer.communicate(timeout=200)[1] for writer in writers]
    assert [writer.returncode for writer in writers] == [0, 0, 0], said
    rows = open_table(root, FEATURES).search().select(["key", "sae", "generation"]).to_polars()
    assert rows.height == 40 == rows["key"].n_unique()
    assert rows.group_by("sae").agg(pl.col("generation").n_unique())["generation"].to_list() == [1, 1]
