import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import polars as pl
import pytest
import torch
from click.testing import CliRunner, Result

from scopeatlas.atlas.embedding import Embedder, EmbeddingCache
from scopeatlas.atlas.publish import publish
from scopeatlas.cli import cli
from scopeatlas.storage.records import ShardKey
from scopeatlas.storage.store import Store
from tests.atlas.conftest import MLP, RES, TEXTS, feature_rows

WAITING = "waiting-sae-cccc3333"
HOSTILE = "[bold]«the»[/bold] [link=file:///etc/passwd]x[/] \x1b[31mred :smile:"
BYTES = 2048


@dataclass(frozen=True)
class Shell:
    """Runs commands against one store."""

    root: Path

    def __call__(self, *arguments: str) -> Result:
        result = CliRunner().invoke(cli, ["--store", str(self.root), *arguments], catch_exceptions=False)
        assert "\x1b" not in result.output
        return result

    def json(self, *arguments: str):
        result = self(*arguments, "--json")
        assert result.exit_code == 0, result.stderr
        return json.loads(result.stdout)

    def error(self, *arguments: str) -> str:
        """The one line that a failing command prints."""
        for extra in ((), ("--json",)):
            result = self(*arguments, *extra)
            assert result.exit_code == 2 and result.stdout == "" and result.stderr.count("\n") == 1
            assert result.stderr.startswith("error: ")
        return result.stderr


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A store with two published SAEs, one of which still has its activations, examples and scores; and one registered."""
    root = tmp_path_factory.mktemp("store")
    store, embedder = Store(root), Embedder()
    for sae in (RES, MLP):
        rows = feature_rows(sae)
        if sae == RES:  # feature 14 is scored by the scores stage too, and its evidence tries to be markup
            hostile = pl.when(pl.col("feature") == 14).then(pl.lit([HOSTILE], dtype=pl.List(pl.String))).otherwise("snippets")
            rows = rows.with_columns(snippets=hostile)
        vectors = EmbeddingCache(root, embedder).embed(rows["search_text"].to_list())
        publish(rows, vectors, root=root, folder=store.stage(sae, "c1", "publication").root, embedder=embedder)
        store.register(sae, {"key": sae})
    store.register(WAITING, {"key": WAITING})
    write_stage(store, "activations", "000", ".parquet", b"x" * BYTES)
    write_stage(store, "examples", "examples", ".windows.parquet", windows())
    write_stage(store, "scores", "scores", ".parquet", scores(), scored=1)
    return root


def write_stage(store: Store, stage: str, name: str, suffix: str, content: bytes | pl.DataFrame, **facts: int) -> None:
    folder, key = store.stage(RES, "c1", stage), ShardKey(name, "0" * 64)
    folder.root.mkdir(parents=True)
    path = folder.data_path(key, suffix)
    path.write_bytes(content) if isinstance(content, bytes) else content.write_parquet(path)
    folder.commit(key, [path], facts)


def windows() -> pl.DataFrame:
    def window(split: str, kind: str, texts: list[str], activations: list[float]) -> dict[str, object]:
        facts = {
            "feature": 14,
            "split": split,
            "kind": kind,
            "stratum": 3,
            "rank": 0,
            "document_id": "d",
            "peak": max(activations),
        }
        return facts | {"peak_at": 1, "tokens": [7] * 4, "texts": texts, "activations": activations}

    return pl.DataFrame(
        [
            window("report", "top", ["Our", " puppy", " [b]barks", "\n"], [0.0, 7.5, 6.0, 0.0]),
            window("report", "stratum", ["a", " hound"], [0.0, 2.0, 0.0, 0.0]),
            window("explain", "top", ["the", " dog"], [0.0, 5.0, 0.0, 0.0]),
        ],
        schema_overrides={"feature": pl.UInt32, "activations": pl.List(pl.Float32)},
    )


def scores() -> pl.DataFrame:
    f1 = feature_rows(RES)["f1"][14]
    names = {"f1": f1, "f1_low": 0.61, "f1_high": 0.79, "shuffled_f1": 0.04, "shuffled_f1_low": 0.01, "shuffled_f1_high": 0.09}
    return pl.DataFrame([{"feature": 14, "unit": "token", "documents": 9, **names, "recall": float("nan")}])


@pytest.fixture(scope="module")
def shell(built) -> Shell:
    return Shell(built)


@pytest.fixture
def own(built, tmp_path) -> Shell:
    """A shell over a copy that a test may change."""
    return Shell(shutil.copytree(built, tmp_path / "store"))


def test_search_prints_the_right_hit_first(shell):
    block = shell("search", "puppies", "-k", "3").stdout.split("\n\n")[0]
    assert f"{RES}/14" in block and TEXTS[RES][14] in block
    assert "F1 0.70 [0.70, 0.70], shuffled control 0.70" in block and "fires on 1 % of tokens" in block


def test_search_as_json(shell):
    found = shell.json("search", "puppies", "-k", "2")
    assert found["hits"][0]["key"] == f"{RES}/14" and len(found["hits"]) == 2
    assert found["best_similarity"] == found["hits"][0]["similarity"] > found["weak_below"] and found["is_weak"] is False


def test_searches_can_be_narrowed(shell):
    assert {hit["sae"] for hit in shell.json("search", "dogs", "-k", "40", "--sae", "mlp")["hits"]} == {MLP}
    assert {hit["layer"] for hit in shell.json("search", "dogs", "--layer", "7", "--release", MLP[:8])["hits"]} == {7}
    assert all(hit["f1"] >= 0.5 for hit in shell.json("search", "dogs", "--min-score", "0.5", "--method", "rule")["hits"])
    assert "no feature passes the filters" in shell("search", "dogs", "--status", "dead").stdout


def test_a_weak_search_says_so(shell):
    output = shell("search", "qwx zzkj vbnq fhgt").stdout
    assert output.startswith('Nothing close was found for "qwx zzkj vbnq fhgt": the best similarity is 0.')
    assert "under the cut-off of 0.5" in output
    assert "no feature passes the filters" in shell("search", "dogs", "--status", "rare").stdout
    assert shell.json("search", "dogs", "--status", "rare") == {
        "query": "dogs",
        "is_weak": True,
        "best_similarity": 0.0,
        "weak_below": 0.5,
        "hits": [],
    }


def test_text_from_the_corpus_is_never_markup(shell):
    output = shell("search", "puppies", "-k", "1").stdout
    assert "[bold]«the»[/bold] [link=file:///etc/passwd]x[/]  [31mred :smile:" in output
    assert "«puppy [b]barks»" in shell("show", RES, "14").stdout


def test_show_prints_all_that_is_known(shell):
    output = shell("show", "res-l3", "14").stdout
    assert output.startswith(f"{RES}/14\n{TEXTS[RES][14]}\n") and 'suppresses  "the"' in output
    lines = [" ".join(line.split()) for line in output.splitlines()]
    assert "F1 0.70 [0.61, 0.79]" in lines and "F1 of a shuffled label (control) 0.04 [0.01, 0.09]" in lines
    assert "on 9 report documents, unit: token" in lines
    held_out, proposed = output.index("report documents: held out"), output.index("explain documents:")
    assert held_out < output.index("puppy [b]barks") < output.index("a «hound»") < proposed < output.index("the «dog»")
    found = shell.json("show", RES, "14")
    assert [window["split"] for window in found["examples"]] == ["report", "report", "explain"]
    assert found["score"]["f1_low"] == 0.61 and found["score"]["recall"] is None


def test_show_without_examples_or_a_label(shell):
    output = shell("show", MLP, "3").stdout
    assert "no examples in this store" in output and f"«{TEXTS[MLP][3]}» and more" in output
    assert "no label (dead)" in shell("show", RES, "19").stdout


def test_colours_come_by_activation(built, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLORTERM", "truecolor")
    monkeypatch.setenv("TERM", "xterm")
    output = CliRunner().invoke(cli, ["--store", str(built), "show", RES, "14"], color=True).stdout
    assert "48;2;0;150;0mpuppy" in output and "48;2;0;69;0mhound" in output


def test_ls_lists_saes_then_features_by_pages(shell):
    assert RES in (output := shell("ls").stdout) and MLP in output
    assert [sae["sae"] for sae in shell.json("ls")] == [MLP, RES]
    assert [f["feature"] for f in shell.json("ls", RES, "--offset", "17", "--limit", "2")["features"]] == [17, 18]
    page = shell("ls", "res-l3", "--limit", "4").stdout
    assert TEXTS[RES][3] in page and TEXTS[RES][4] not in page and "features 1 to 4 of 20; --offset 4 shows more" in page
    assert [f["feature"] for f in shell.json("ls", RES, "--status", "dead")["features"]] == [19]
    assert "none of 20 features on this page" in shell("ls", RES, "--offset", "99").stdout


def test_status_has_a_line_for_an_sae_nothing_was_done_for(shell):
    lines = {line["sae"]: line for line in shell.json("status")}
    assert (lines[WAITING]["stage"], lines[WAITING]["bytes"]) == ("registered", 0)
    assert (lines[RES]["stage"], lines[RES]["published"], lines[RES]["scored"]) == ("published", 20, 1)
    row = next(line for line in shell("status").stdout.splitlines() if line.startswith(WAITING))
    assert row.split()[1:] == ["-", "registered", "0/0", "0", "0", "0", "0", "B"]


def test_status_prints_errors_whole_and_on_one_line(own):
    Store(own.root).record_error(WAITING, "activations", "[red]out of memory\n" + "far " * 100 + "too wide")
    assert f"{WAITING}: activations: [red]out of memory {'far ' * 100}too wide\n" in own("status").stdout


def test_prune_frees_only_when_it_is_meant(own):
    before = Store(own.root).bytes_used()
    dry = own.json("prune", "--dry-run")
    assert dry == {"dry_run": True, "freed_bytes": {RES: BYTES}, "total_bytes": BYTES}
    assert "2.0 kB would be freed" in own("prune", "--dry-run").stdout and Store(own.root).bytes_used() == before
    assert "nothing to free" in own("prune", "--sae", MLP).stdout
    assert own("prune").stdout == f"{RES}  2.0 kB\n2.0 kB freed\n"
    assert Store(own.root).bytes_used() == before - BYTES and "nothing to free" in own("prune").stdout
    assert "(pruned)" not in own("status").stdout  # no corpus here says that the shard was one of its own


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("search", "dogs", "--sae", "gpt9"), "no SAE in the atlas matches 'gpt9'"),
        (("search", "  "), "give some words"),
        (("show", "gpt9", "0"), "no SAE in the atlas matches 'gpt9'"),
        (("show", "demo", "0"), "matches 2 SAEs"),
        (("show", RES, "99"), "has no feature 99"),
        (("ls", "gpt9"), "no SAE in the atlas matches 'gpt9'"),
        (("prune", "--sae", "gpt9"), "no SAE 'gpt9'"),
    ],
)
def test_a_wrong_name_is_one_line(shell, arguments, message):
    assert message in shell.error(*arguments)


@pytest.mark.parametrize("arguments", [("status",), ("prune",), ("search", "dogs"), ("show", RES, "1"), ("ls",)])
def test_a_missing_store_is_one_line_and_stays_missing(tmp_path, arguments):
    missing = tmp_path / "nowhere"
    assert str(missing) in Shell(missing).error(*arguments) and not missing.exists()


def test_an_empty_store_is_no_error(tmp_path):
    assert Shell(tmp_path)("status").stdout == f"no SAE is registered in {tmp_path}\n"
    assert Shell(tmp_path).json("status") == [] and "nothing to free" in Shell(tmp_path)("prune").stdout


def test_a_mistyped_status_lists_the_words(shell):
    result = shell("ls", RES, "--status", "daed")
    assert result.exit_code == 2 and "too_few_documents" in result.stderr


def test_check_says_what_a_folder_holds(tmp_path):
    from tests.conftest import write_sae

    w_dec = torch.nn.functional.normalize(torch.ones(6, 4), dim=1)
    tensors = {
        "w_enc": torch.zeros(4, 6),
        "b_enc": torch.zeros(6),
        "threshold": torch.arange(6) / 4,
        "w_dec": w_dec,
        "b_dec": torch.zeros(4),
    }
    folder = write_sae(tmp_path / "sae", tensors)
    facts = Shell(tmp_path).json("check", str(folder))
    assert (facts["kind"], facts["width"], facts["d_in"], facts["target_l0"]) == ("sae", 6, 4, 10)
    assert (facts["site_in"], facts["threshold_max"]) == ("model.layers.1.output", 1.25)
    assert "0 to 1.25" in Shell(tmp_path)("check", str(folder)).stdout

    weights = folder / "params.safetensors"
    weights.write_bytes(weights.read_bytes()[:-40])
    assert f"{weights} is truncated" in Shell(tmp_path).error("check", str(folder))
    assert "is not a folder" in Shell(tmp_path).error("check", str(tmp_path / "none"))


def test_the_entry_point_is_quick_and_reads_the_environment(built):
    code = "import sys; from scopeatlas.cli import main\ntry: main()\nfinally: print(*sorted({'torch', 'polars', 'lancedb', 'rich'} & set(sys.modules)))"
    helped = subprocess.run([sys.executable, "-c", code, "--help"], capture_output=True, text=True, check=True)
    assert helped.stdout.endswith("\n\n")  # none of them imported
    environment = {"PATH": "", "SCOPE_ATLAS_STORE": str(built), "PYTHONIOENCODING": "ascii"}
    command = [sys.executable, "-m", "scopeatlas.cli"]
    listed = subprocess.run([*command, "show", RES, "14"], capture_output=True, text=True, check=True, env=environment)
    assert "?dog?" in listed.stdout and listed.stderr == ""
    wrong = subprocess.run([*command, "ls", "gpt9"], capture_output=True, text=True, env=environment)
    assert wrong.returncode == 2 and wrong.stderr.count("\n") == 1
