"""The cache on a pool of processes: the same bytes as in this one, whoever dies."""

import os
import pickle
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from scopeatlas.activations.cache import activation_keys
from scopeatlas.activations.encoding import Encoding, Job, Product
from scopeatlas.activations.nulls import Calibration
from scopeatlas.activations.reading import packed
from scopeatlas.errors import SubjectModelError
from scopeatlas.runner.local import LocalRunner
from scopeatlas.runner.processes import ProcessRunner
from scopeatlas.storage.records import ShardKey
from scopeatlas.storage.store import Store
from tests.conftest import REPOSITORY, entry_of, sae_tensors, write_sae
from tests.runner.tiny_cache import CacheRun, tiny_cache
from tests.runner.works import Noting, gone

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def local(tmp_path_factory) -> CacheRun:
    """A cache made in this process, with one torch thread as in each process of the pool."""
    seed = int(np.random.SeedSequence().entropy % 2**32)
    print(f"seed of local: {seed}")
    made = tiny_cache(tmp_path_factory.mktemp("tiny"), np.random.default_rng(seed))
    threads = torch.get_num_threads()
    made.run(LocalRunner(threads=1))
    torch.set_num_threads(threads)
    return made


@pytest.fixture
def pool() -> ProcessRunner:
    return ProcessRunner(["cpu", "cpu"], threads=1)


def test_a_pool_gives_the_bytes_that_this_process_gives(local, pool, tmp_path):
    elsewhere, said = local.at(tmp_path), []
    result = elsewhere.run(pool, log=said.append)
    assert not result.failed and result.shards_done == 2 * len(local.corpus.shards) == result.nulls_done
    assert elsewhere.data() == local.data() and len(local.data()) == 2 * (3 * len(local.corpus.shards) + 1)
    assert any("2 SAEs in 1 pass of the subject model" in line for line in said)
    assert elsewhere.run(pool).reused


def passes_over(cache: CacheRun, shards) -> int:
    """Batches that the subject model is run on for these shards."""
    lengths = [cache.corpus.contexts(shard).lengths() for shard in shards]
    return sum(len(list(packed(of_shard, cache.subject.batch_tokens))) for of_shard in lengths)


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_shard_that_dies_with_its_process_is_done_again_unless_it_was_committed(local, pool, tmp_path, when):
    elsewhere = local.at(tmp_path / "store")
    lost = local.corpus.shards[3]
    noting = Noting(pool, tmp_path / "notes", deadly={lost.name: 1}, when=when)
    result = elsewhere.run(noting, memory_bytes=10**9)
    runs = {shard: len(noting.runs(shard.name)) for shard in local.corpus.shards}
    assert runs == {shard: 2 if shard == lost else 1 for shard in local.corpus.shards}
    assert elsewhere.data() == local.data() and not result.failed
    assert result.shards_done == 2 * len(local.corpus.shards) == result.nulls_done
    # The process that died has told of none; the second to have the shard finds it committed, or has all of it to do.
    told = [shard for shard in local.corpus.shards if when == "before" or shard != lost]
    assert result.forward_passes == passes_over(local, told)


def test_an_sae_that_fails_in_a_process_stops_only_itself(local, pool, tmp_path):
    elsewhere = local.at(tmp_path / "store")
    x = torch.randn(500, 32)
    tensors = sae_tensors(x) | {"threshold": torch.full((96,), 1e-12)}  # the scale follows the threshold, and overflows
    bad = entry_of(write_sae(tmp_path / "bad", tensors))
    result = replace(elsewhere, entries=[bad, *local.entries]).run(pool, memory_bytes=10**9)
    assert result.failed.keys() == {bad.key} and "does not fit 16 bits" in result.failed[bad.key]
    assert elsewhere.store.errors(bad.key) == {"activation_cache": result.failed[bad.key]}
    assert {name: data for name, data in elsewhere.data().items() if bad.key not in name} == local.data()


SCRIPT = """
import sys
from pathlib import Path
from scopeatlas.activations.cache import cache_activations
from scopeatlas.corpus.build import open_corpus
from scopeatlas.dictionaries.releases import describe_sae
from scopeatlas.runner.processes import ProcessRunner
from scopeatlas.storage.store import Store
from scopeatlas.subject.loading import SubjectModel
from tests.runner.works import Noting

if __name__ == "__main__":
    root, corpus, notes, model, *folders = sys.argv[1:]
    store, subject = Store(Path(root)), SubjectModel(model, device="cpu", batch_tokens=256)
    entries = [describe_sae(Path(folder), release="toy", path=Path(folder).name) for folder in folders]
    runner = Noting(ProcessRunner(["cpu", "cpu"], threads=1), Path(notes), slow=0.3)
    cache_activations(store, open_corpus(store, corpus), entries, subject, runner=runner, memory_bytes=10**9)
"""


def test_when_all_is_killed_what_was_committed_is_not_done_again(local, pool, tmp_path):
    elsewhere, script = local.at(tmp_path / "store"), tmp_path / "script.py"
    script.write_text(SCRIPT, encoding="utf-8")
    notes, folders = tmp_path / "notes", [entry.folder for entry in local.entries]
    arguments = [elsewhere.store.root, local.corpus.id, notes, local.subject.name, *folders]
    parent = subprocess.Popen(
        [sys.executable, script, *arguments], cwd=REPOSITORY, env=os.environ | {"PYTHONPATH": str(REPOSITORY)}
    )
    while len(elsewhere.committed()) < 8:
        assert parent.poll() is None
        time.sleep(0.02)
    parent.kill()
    parent.wait()
    workers = Noting(pool, notes).workers()
    assert all(gone(process) for process in workers)
    committed = elsewhere.committed()
    result = elsewhere.run(pool, memory_bytes=10**9)
    assert 8 <= len(committed) == result.shards_reused < 2 * len(local.corpus.shards)
    assert {place: when for place, when in elsewhere.committed().items() if place in committed} == committed
    assert elsewhere.data() == local.data()


@pytest.fixture
def work(local) -> Encoding:
    """The work of a pass over both SAEs; their null features have been drawn."""
    calibration = Calibration(local.corpus, local.subject)
    products = tuple(Product(entry.key, stage) for entry in local.entries for stage in ("activations", "nulls"))
    directions = {entry.key: calibration.keys(entry).directions for entry in local.entries}
    _ = local.subject.model
    return Encoding(local.store, local.corpus, tuple(local.entries), products, directions, local.subject)


def test_work_travels_without_what_is_loaded_and_finds_its_files_from_anywhere(work, local, tmp_path, monkeypatch):
    monkeypatch.chdir(local.store.root.parent)
    relative = replace(work, store=Store(Path("store")), subject=replace(local.subject, name="model"))
    sent = pickle.dumps(relative)
    assert len(sent) < 10_000
    monkeypatch.chdir(tmp_path)
    there = pickle.loads(sent)
    job = Job(local.corpus.shards[0], {product: key_of(local, product) for product in work.products})
    encoded = there.open("cpu")(job)
    assert not encoded.failed and set(encoded.committed) == set(work.products)


def key_of(local: CacheRun, product: Product) -> ShardKey:
    """The key of a product on the first shard."""
    entry = next(entry for entry in local.entries if entry.key == product.sae)
    if product.stage == "nulls":
        return Calibration(local.corpus, local.subject).keys(entry).shards[0]
    return activation_keys(local.corpus, entry, local.subject)[0]


def test_a_worker_that_finds_another_model_under_the_same_name_refuses(work, local, tmp_path):
    shutil.copytree(local.subject.name, tmp_path / "model")
    sent = pickle.dumps(replace(work, subject=replace(local.subject, name=str(tmp_path / "model"))))
    weights = load_file(tmp_path / "model" / "model.safetensors")
    save_file({name: tensor + 1 for name, tensor in weights.items()}, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    with pytest.raises(SubjectModelError, match="is not the same model here as where the run was started"):
        pickle.loads(sent).open("cpu")
