"""From a push to a Hub to a searchable atlas with nobody at the keyboard, and what that cost.

    python -m demo.train_release --set sites --out RELEASE     # twelve small SAEs, 3 sites x 4 layers; half an hour
    python -m demo.unattended RELEASE --work FOLDER

What belongs here: a local Hub that serves RELEASE as a Gemma Scope 2 repo, pushed in several commits, with a thirteenth
SAE that is corrupt; a real Dagster daemon with the release sensor on; waiting, and printing what came of it. What does
not: anything the project itself does.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import dagster as dg
import yaml
from safetensors.torch import load_file, save_file

from assets.partitions import SAES_NAME
from tests.hub_server import HubServer

ROOT = Path(__file__).resolve().parents[1]
REPO = "local/gemma-scope-2-270m-pt"
BAD = "resid_post/layer_5_width_1k_l0_corrupt"
CHAIN = ("activation_cache", "feature_examples", "feature_labels", "label_scores", "feature_index")
FINISHED = (dg.DagsterRunStatus.SUCCESS, dg.DagsterRunStatus.FAILURE, dg.DagsterRunStatus.CANCELED)


def corrupt_copy(release: Path, work: Path) -> Path:
    """One of the SAEs with a NaN among its weights: a sound file of unsound numbers, as a broken upload leaves it."""
    target = work / "corrupt"
    shutil.copytree(next((release / "resid_post").iterdir()), target, dirs_exist_ok=True)
    tensors = load_file(target / "params.safetensors")
    tensors["w_enc"][3, 7] = float("nan")
    save_file(tensors, target / "params.safetensors")
    return target


def push(hub: HubServer, release: Path, bad: Path) -> None:
    """The repo in four commits: configs before weights, as uploads go."""
    files = {p.relative_to(release).as_posix(): p for p in sorted(release.rglob("*")) if p.is_file()}
    files |= {f"{BAD}/{p.name}": p for p in bad.iterdir()}
    weights = [name for name in files if name.endswith(".safetensors")]
    hub.commit(REPO, {name: path for name, path in files.items() if name not in weights} | {"README.md": b"twelve SAEs"})
    for part in (weights[:5], weights[5:10], weights[10:]):
        hub.commit(REPO, {name: files[name] for name in part})


def set_up(work: Path, contexts_per_document: int) -> dict[str, str]:
    """An instance and a scenario of their own; returns the environment of every process."""
    home = work / "home"
    home.mkdir(parents=True, exist_ok=True)
    instance = (ROOT / "dagster.yaml").read_text(encoding="utf-8").replace(".dagster/", f"{home}/.dagster/")
    (home / "dagster.yaml").write_text(instance, encoding="utf-8")
    scenario = yaml.safe_load((ROOT / "configs" / "demo.yaml").read_text(encoding="utf-8"))
    scenario["store"]["root"] = str(work / "store")
    scenario["corpus"]["contexts_per_document"] = contexts_per_document
    owner, _, name = REPO.partition("/")
    scenario["saes"] = {"watch": [{"author": owner, "name": name}], "cache": str(work / "hub-cache"), "quota_gb": 2}
    (work / "scenario.yaml").write_text(yaml.safe_dump(scenario), encoding="utf-8")
    return {"DAGSTER_HOME": str(home), "SCOPE_ATLAS_CONFIG": str(work / "scenario.yaml")}


@contextmanager
def daemon(log: Path) -> Iterator[None]:
    """The daemon as a user would leave it running, the release sensor switched on."""
    tool = Path(sys.executable).parent
    with log.open("w") as stream:
        process = subprocess.Popen(
            [tool / "dagster-daemon", "run", "-w", "workspace.yaml"], cwd=ROOT, stdout=stream, stderr=stream
        )
        try:
            subprocess.run([tool / "dagster", "sensor", "start", "new_saes", "-w", "workspace.yaml"], cwd=ROOT, check=True)
            yield
        finally:
            process.terminate()
            process.wait()


def wait_for_runs(instance: dg.DagsterInstance, *, seconds: float) -> list[dg.DagsterRun]:
    """The runs that the sensor asked for, once all are finished."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        runs = instance.get_runs()
        if runs and all(run.status in FINISHED for run in runs):
            return list(runs)
        time.sleep(5)
    raise SystemExit(f"no end after {seconds:.0f} s; see daemon.log")


def report(instance: dg.DagsterInstance, runs: list[dg.DagsterRun]) -> None:
    keys = list(instance.get_dynamic_partitions(SAES_NAME))
    print(f"{len(keys)} partitions, {len(runs)} run(s): {', '.join(run.status.value for run in runs)}")
    for asset in CHAIN:
        done = instance.get_materialized_partitions(dg.AssetKey(asset))
        print(f"  {asset}: {len(done)} materialised; not: {', '.join(k for k in keys if k not in done) or 'none'}")
    for run in runs:
        for entry in instance.all_logs(run.run_id):
            text = entry.user_message
            if re.search(r"forward passes|memory plan|reason|stopped|is left out", text) and "Traceback" not in text:
                print(f"  {entry.step_key or 'run'}: {text.splitlines()[0]}")


def passes_of_one(environment: dict[str, str], work: Path) -> int:
    """Forward passes of caching one of the SAEs alone over the same corpus, in a store of its own."""
    from resources.scenario import load_scenario
    from scopeatlas.activations.cache import cache_activations
    from scopeatlas.corpus.build import build_corpus
    from scopeatlas.dictionaries.releases import SaeEntry
    from scopeatlas.storage.store import Store

    resources = load_scenario(Path(environment["SCOPE_ATLAS_CONFIG"]))
    filled, alone = Store(work / "store"), Store(work / "store-of-one")
    entries = [SaeEntry.from_json(filled.entry(key)) for key in filled.registered()]
    entry = next(e for e in entries if e.path.endswith("resid_post/layer_15_width_1k_l0_medium"))
    subject = resources["subject"].open()  # type: ignore[attr-defined]
    corpus, _ = build_corpus(alone, resources["corpus"].settings(), subject)  # type: ignore[attr-defined]
    return cache_activations(alone, corpus, [entry], subject).forward_passes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("release", type=Path)
    parser.add_argument("--work", type=Path, required=True, help="an empty folder for the instance, the store and the cache")
    parser.add_argument("--contexts-per-document", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=3600, help="give up after so long")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    environment = set_up(arguments.work.resolve(), arguments.contexts_per_document)
    started = time.monotonic()
    with HubServer() as hub:
        os.environ.update(environment, HF_ENDPOINT=hub.url)
        with dg.DagsterInstance.get() as instance, daemon(arguments.work / "daemon.log"):
            push(hub, arguments.release, corrupt_copy(arguments.release, arguments.work))
            print(f"pushed {REPO} to {hub.url}; waiting", flush=True)
            runs = wait_for_runs(instance, seconds=arguments.seconds)
            print(f"all runs finished after {time.monotonic() - started:.0f} s")
            report(instance, runs)
    print(f"caching one SAE alone: {passes_of_one(environment, arguments.work)} forward passes")


if __name__ == "__main__":
    main()
