import json
import math
import resource
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import polars as pl
import pytest
import torch
from click.testing import CliRunner, Result

from scopeatlas.atlas.catalog import CatalogRow, record
from scopeatlas.atlas.embedding import Embedder, EmbeddingCache
from scopeatlas.atlas.publish import publish
from scopeatlas.atlas.rows import feature_vectors
from scopeatlas.cli import cli
from scopeatlas.scoring.table import score_table
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
        vectors = feature_vectors(rows, EmbeddingCache(root, embedder))
        publish(rows, vectors, root=root, folder=store.stage(sae, "c1", "publication").root, embedder=embedder)
        store.register(sae, {"key": sae})
    store.register(WAITING, {"key": WAITING})
    write_stage(store, "activations", "000", {".parquet": b"x" * BYTES})
    tables = {".windows.parquet": windows(), ".vocabulary.parquet": VOCABULARY, ".coactivation.parquet": partners()}
    write_stage(store, "examples", "examples", tables)
    write_stage(store, "labels", "labels", {".falsification.parquet": falsification()}, by_status={})
    write_stage(store, "scores", "scores", {".parquet": scores(), ".outcomes.parquet": outcomes()}, scored=1)
    return root


def write_stage(store: Store, stage: str, name: str, files: dict[str, bytes | pl.DataFrame], **facts: object) -> None:
    folder, key = store.stage(RES, "c1", stage), ShardKey(name, "0" * 64)
    folder.root.mkdir(parents=True)
    for suffix, content in files.items():
        path = folder.data_path(key, suffix)
        path.write_bytes(content) if isinstance(content, bytes) else content.write_parquet(path)
    folder.commit(key, [folder.data_path(key, suffix) for suffix in files], facts)


VOCABULARY = pl.DataFrame({"text": ["Our", " puppy", " [b]barks", "\n", "a", " hound", "the", " dog"]}).select(
    pl.int_range(pl.len(), dtype=pl.Int32).alias("token"), "text"
)


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
        tokens = [VOCABULARY["text"].to_list().index(text) for text in texts]
        return facts | {"peak_at": 1, "tokens": [*tokens, -1, -1][:4], "activations": activations}

    return pl.DataFrame(
        [
            window("report", "top", ["Our", " puppy", " [b]barks", "\n"], [0.0, 7.5, 6.0, 0.0]),
            window("report", "stratum", ["a", " hound"], [0.0, 2.0, 0.0, 0.0]),
            window("explain", "top", ["the", " dog"], [0.0, 5.0, 0.0, 0.0]),
        ],
        schema_overrides={"feature": pl.UInt32, "tokens": pl.Array(pl.Int32, 4), "activations": pl.List(pl.Float32)},
    )


def partners() -> pl.DataFrame:
    """Feature 14 fires with 7 most of all, then with 3; with 5 only by the other measure."""
    ranks = {"partner": [3, 5, 7], "jaccard": [0.2, 0.1, 0.31], "jaccard_rank": [1, None, 0], "pmi": [1.0, 4.0, 2.0]}
    return pl.DataFrame({"feature": [14] * 3, "both": [9, 2, 20], **ranks})


def scores() -> pl.DataFrame:
    shared = {
        "feature": 14,
        "label_id": "id14",
        "claim": "reads",
        "scorer": "rule_execution",
        "status": "scored",
        "unit": "token",
    }
    own = {"arm": "own", "documents": 9, "f1": 0.70, "f1_low": 0.61, "f1_high": 0.79, "recall": float("nan")}
    shuffled = {"arm": "shuffled", "documents": 9, "f1": 0.04, "f1_low": 0.01, "f1_high": 0.09}
    return score_table([shared | shuffled, shared | own, shared | own | {"label_id": "another"}])


def outcomes() -> pl.DataFrame:
    texts = {"false_alarm": "a hot «dog» stand", "hit": "our «puppy» barks", "miss": "two «hounds»"}
    rows = [{"label_id": "id14", "feature": 14, "outcome": name, "text": text} for name, text in texts.items()]
    return pl.DataFrame([*rows, {**rows[0], "label_id": "another", "text": "of another label"}])


def falsification() -> pl.DataFrame:
    facts = {"label_id": "id14", "feature": 14, "expected": True}
    return pl.DataFrame([facts | {"text": "A [b]terrier", "passed": False}, facts | {"text": "A poodle", "passed": True}])


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
    assert "F1 0.70 [0.70, 0.70] against 0.70 of a shuffled label" in block and "fires on 1 % of tokens" in block


def test_search_as_json(shell):
    found = shell.json("search", "puppies", "-k", "2")
    assert found["hits"][0]["key"] == f"{RES}/14" and len(found["hits"]) == found["found"] == 1
    places = found["hits"][0]["why"]["places"]
    assert found["best"]["label"] == places["label"]["value"] > found["cutoffs"]["label"] and found["is_weak"] is False
    assert found["by"] == "hybrid" and places["text"]["rank"] == 1 and found["hits"][0]["why"]["words"]["label"] == ["puppies"]
    further = shell.json("search", "puppies", "-k", "1", "--offset", "1")
    assert further["hits"] == [] and not further["is_weak"]


def test_a_hit_says_how_it_was_found(shell):
    block = shell("search", "puppies", "-k", "1").stdout
    assert "found by: label #1 (" in block and '"puppies" in label' in block


@pytest.mark.parametrize(("by", "query", "first"), [("token", "german", 6), ("text", "PUPPY", 14), ("label", "dogs", 14)])
def test_what_is_compared_can_be_chosen(shell, by, query, first):
    assert shell.json("search", query, "--by", by, "--sae", RES)["hits"][0]["feature"] == first


def test_what_no_feature_promotes_is_not_found(shell):
    assert "Nothing was found" in shell("search", "zebra", "--by", "promoted").stdout


def test_searches_can_be_narrowed(shell):
    assert {hit["sae"] for hit in shell.json("search", "cars", "-k", "40", "--sae", "mlp")["hits"]} == {MLP}
    assert {hit["layer"] for hit in shell.json("search", "cars", "--layer", "7", "--release", MLP[:8])["hits"]} == {7}
    assert all(hit["f1"] >= 0.5 for hit in shell.json("search", "dogs", "--min-score", "0.5", "--method", "rule")["hits"])
    assert "no feature that passes the filters" in shell("search", "dogs", "--status", "dead").stdout
    for filters in (
        ("--kind", "clt"),
        ("--site", "mlp"),
        ("--min-density", "0.5"),
        ("--max-density", "0.001"),
        ("--where", "lift > 2"),
    ):
        assert shell.json("search", "dogs", *filters)["nearest"] == []
    assert len(shell.json("search", "dogs", "--min-score-low", "0.7", "--where", "feature < 15", "--sae", RES)["hits"]) == 1


def test_a_condition_that_is_no_sql_ends_in_one_line(shell):
    assert "no condition on features: 'lift >'" in shell.error("search", "dogs", "--where", "lift >")


def test_where_nothing_is_found_it_says_so_and_shows_what_is_nearest(shell):
    output = shell("search", "qwx zzkj vbnq fhgt").stdout
    assert output.startswith('Nothing was found for "qwx zzkj vbnq fhgt": best similarity of a label 0.')
    assert "under 0.60; of examples" in output and "The nearest, probably unrelated:" in output and "found by" in output
    found = shell.json("search", "dogs", "--status", "rare")
    assert found["is_weak"] and found["hits"] == found["nearest"] == [] and found["best"] == {"words": 0.0}


def test_more_of_the_same_meaning(shell):
    assert f"{RES}/14" not in shell("similar", RES, "14", "-k", "3").stdout
    found = shell.json("similar", RES, "14", "--within", "mlp", "-k", "40")
    assert found["by"] == "meaning" and {hit["sae"] for hit in found["hits"]} == {MLP}


def test_text_from_the_corpus_is_never_markup(shell):
    output = shell("search", "puppies", "-k", "1").stdout
    assert "[bold]«the»[/bold] [link=file:///etc/passwd]x[/]  [31mred :smile:" in output
    assert "«puppy [b]barks»" in shell("show", RES, "14").stdout


def test_show_prints_all_that_is_known(shell):
    output = shell("show", "res-l3", "14").stdout
    assert output.startswith(f"{RES}/14\n{TEXTS[RES][14]}\n") and 'suppresses  "the"' in output
    lines = [" ".join(line.split()) for line in output.splitlines()]
    assert "fires with 7 (31%), 3 (20%)" in lines
    assert "the rule executed, reads this label 0.70 [0.61, 0.79] - - - tokens of 9 documents" in lines
    assert "a shuffled label 0.04 [0.01, 0.09] - - - tokens of 9 documents" in lines
    held_out, proposed = output.index("report documents: held out"), output.index("explain documents:")
    assert held_out < output.index("puppy [b]barks") < output.index("a «hound»") < proposed < output.index("the «dog»")
    found = shell.json("show", RES, "14")
    assert [window["split"] for window in found["examples"]] == ["report", "report", "explain"]
    own = next(row for row in found["scores"] if row["arm"] == "own")
    assert own["f1_low"] == pytest.approx(0.61) and own["recall"] is None and len(found["scores"]) == 2


def test_misses_and_false_alarms_are_shown_next_to_hits(shell):
    lines = [" ".join(line.split()) for line in shell("show", RES, "14").stdout.splitlines()]
    at = lines.index("hit our «puppy» barks")
    assert lines[at + 1 : at + 3] == ["missed two «hounds»", "false alarm a hot «dog» stand"]
    assert not any("of another label" in line for line in lines)


def test_predictions_that_failed_are_shown(shell):
    output = shell("show", RES, "14").stdout
    assert "silent      A [b]terrier" in output and "poodle" not in output


def test_show_without_examples_or_a_label(shell):
    output = shell("show", MLP, "3").stdout
    assert "no examples in this store" in output and f"«{TEXTS[MLP][3]}» and more" in output
    assert "no label (dead)" in shell("show", RES, "19").stdout


def test_a_transcoder_is_shown_with_what_it_reads_and_what_it_writes(tmp_path):
    row = {"kind": "transcoder", "site": "model.layers.0.mlp.input", "site_out": "model.layers.0.mlp.output"}
    rows = feature_rows("tc-dddd4444", ["dogs and puppies"]).with_columns(**{name: pl.lit(text) for name, text in row.items()})
    vectors = feature_vectors(rows, EmbeddingCache(tmp_path, Embedder()))
    publish(rows, vectors, root=tmp_path, folder=tmp_path / "tc", embedder=Embedder())
    place = "transcoder reading model.layers.0.mlp.input, writing model.layers.0.mlp.output"
    shown = [" ".join(line.split()) for line in Shell(tmp_path)("show", "tc", "0").stdout.splitlines()]
    assert f"site {place} of toy" in shown and not any(line.startswith("norms") for line in shown)
    assert place in Shell(tmp_path)("search", "dogs").stdout and place in Shell(tmp_path)("ls", "tc").stdout


@pytest.mark.parametrize("name", ["seven", "7.", "7.1.2", "7,1"])
def test_a_feature_is_named_by_a_number_or_layer_and_index(shell, name):
    result = shell("show", RES, name)
    assert result.exit_code == 2 and "LAYER.INDEX" in result.stderr


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
    assert shell("ls", RES).stdout.startswith(f"{RES}\nsae at model.layers.3.output\n")
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


@pytest.fixture
def sound(tmp_path) -> Path:
    """A release with one small SAE, in Gemma Scope 2's layout."""
    from tests.conftest import write_sae

    tensors = {
        "w_enc": torch.zeros(4, 6),
        "b_enc": torch.zeros(6),
        "threshold": torch.arange(6) / 4,
        "w_dec": torch.nn.functional.normalize(torch.ones(6, 4), dim=1),
        "b_dec": torch.zeros(4),
    }
    return write_sae(tmp_path / "gemma-scope-2-270m-pt" / "resid_post" / "layer_1_width_7k_l0_small", tensors)


def test_check_says_what_a_folder_holds(sound, tmp_path):
    facts = Shell(tmp_path).json("check", str(sound))
    assert (facts["kind"], facts["family"], facts["model"]) == ("sae", "gemma_scope_2", "google/gemma-3-270m")
    assert (facts["width"], facts["d_in"], facts["d_out"], facts["activation"]) == (6, 4, 4, "jumprelu")
    assert (facts["target_l0"], facts["measured_l0"], facts["bytes"]) == (10, None, 4 * (4 * 6 * 2 + 6 + 6 + 4))
    assert facts["sites_in"] == facts["sites_out"] == ["model.layers.1.output"]
    assert (facts["threshold_min"], facts["threshold_max"], facts["outcome"]) == (0, 1.25, "sound")
    lines = [" ".join(line.split()) for line in Shell(tmp_path)("check", str(sound)).stdout.splitlines()]
    assert {"kind sae", "sites in model.layers.1.output", "threshold max 1.25", "outcome sound"} <= set(lines)
    assert f"notes {facts['notes'][0]}" in lines and "7168" in facts["notes"][0]


def test_check_of_several_layers_condenses_its_sites(tmp_path, rng):
    from tests.multi_layer import multi_layer_tensors, write_multi_layer

    xs = [torch.from_numpy(rng.standard_normal((50, 8))).float() for _ in range(3)]
    folder = write_multi_layer(tmp_path / "clt", "clt", [0, 1, 2], multi_layer_tensors(xs, width=5, l0=3))
    lines = [" ".join(line.split()) for line in Shell(tmp_path)("check", str(folder)).stdout.splitlines()]
    hook = "model.layers.{}.pre_feedforward_layernorm.output"
    assert {f"sites in 3 sites, {hook.format(0)} to {hook.format(2)}", "width 15", "features per layer 5", "layers 3"} <= set(
        lines
    )
    assert len(Shell(tmp_path).json("check", str(folder))["sites_out"]) == 3


def test_check_of_a_damaged_or_missing_folder_is_one_line(sound, tmp_path):
    weights = sound / "params.safetensors"
    weights.write_bytes(weights.read_bytes()[:-40])
    assert f"{weights} is truncated" in Shell(tmp_path).error("check", str(sound))
    assert "is not a folder" in Shell(tmp_path).error("check", str(tmp_path / "none"))


def test_plan_says_what_a_pass_would_need(sound, tmp_path):
    release = sound.parents[1]
    arguments = ("plan", str(release), "--tokens", "1000", "--context-length", "16", "--memory-gb")
    made = Shell(tmp_path).json(*arguments, "1")
    name = f"{release.name}/resid_post/{sound.name}"
    assert made["chunks"] == [[name]] and made["refused"] == {} and made["available"] == 10**9
    footprint = made["footprints"][name]
    assert footprint["resident"] == 4 * (4 * 6 * 2 + 6 + 6) and footprint["disk"] == 1000 * 10 * 3
    assert footprint["sites"] == {"model.layers.1.output": 4}
    output = Shell(tmp_path)(*arguments, "1").stdout
    assert "1 SAEs in 1 pass" in output and name in output and "batches of 2,048 tokens" in output
    assert "needs" in Shell(tmp_path)(*arguments, "0.000001").stdout


def test_plan_of_an_saes_own_folder_names_it_like_its_release_does(sound, tmp_path):
    name = f"{sound.parents[1].name}/resid_post/{sound.name}"
    assert list(Shell(tmp_path).json("plan", str(sound))["footprints"]) == [name]


def test_plan_reads_no_weights(sound, tmp_path):
    """A hole of 4 GiB stands for the weights: reading them would take as much memory."""
    weights = sound / "params.safetensors"
    wide = {"w_enc": [4, 1 << 27], "b_enc": [1 << 27], "threshold": [1 << 27], "w_dec": [1 << 27, 4], "b_dec": [4]}
    header, end = {}, 0
    for name, shape in wide.items():
        size = 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    with weights.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        stream.truncate(8 + len(text) + end)
    (sound / "config.json").unlink()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    made = Shell(tmp_path).json("plan", str(sound), "--memory-gb", "1")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 19  # kilobytes
    assert list(made["refused"].values())[0].startswith("needs")
    assert list(made["footprints"].values())[0]["stored"] == end


@pytest.mark.parametrize(("folder", "message"), [("nowhere", "is not a folder"), ("empty", "holds no known weight file")])
def test_a_plan_of_nothing_is_one_line(tmp_path, folder, message):
    (tmp_path / "empty").mkdir()
    assert message in Shell(tmp_path).error("plan", str(tmp_path / folder))


@pytest.fixture
def seen(tmp_path) -> Shell:
    """A store whose catalog holds three SAEs."""
    rows = [
        CatalogRow("gemma-scope-2-1b-pt", "resid_post/a", "ready", kind="sae", site="resid_post", layers=(12,), width=16384),
        CatalogRow("gemma-scope-2-1b-pt", "clt/b", "too_large", kind="clt", site="clt", layers=tuple(range(26)), width=262144),
        CatalogRow("gpt2-saes", "c", "registered", kind="sae", site="mlp", sae="gpt2-saes.c.12345678"),
    ]
    models = ("google/gemma-3-1b-pt", "google/gemma-3-1b-pt", "openai-community/gpt2")
    record(tmp_path, [replace(row, model=m, bytes=2048, reason="too big") for row, m in zip(rows, models, strict=True)])
    return Shell(tmp_path)


def test_catalog_lists_what_was_seen_and_can_be_narrowed(seen):
    assert [row["path"] for row in seen.json("catalog")] == ["clt/b", "resid_post/a", "c"]
    asked = ("catalog", "--model", "gemma-3-1b", "--site", "resid_post", "--width", "16k")
    assert [row["path"] for row in seen.json(*asked)] == ["resid_post/a"]
    for option, value in (("--kind", "clt"), ("--state", "too_large"), ("--width", "262144")):
        assert [row["path"] for row in seen.json("catalog", option, value)] == ["clt/b"]
    assert [row["path"] for row in seen.json("catalog", "--release", "gpt2*")] == ["c"]
    lines = [" ".join(line.split()) for line in seen("catalog").stdout.splitlines()]
    assert "gemma-scope-2-1b-pt clt/b google/gemma-3-1b-pt clt clt 0 to 25 262,144 - 2.0 kB too_large" in lines
    assert "too_large gemma-scope-2-1b-pt/clt/b: too big" in lines
    assert "no SAE in the catalog matches" in seen("catalog", "--kind", "crosscoder").stdout
    assert "is no width" in seen.error("catalog", "--width", "wide")


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
