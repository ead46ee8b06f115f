"""circuit-tracer's feature files and graphs with our labels."""

import json

import polars as pl
import pytest

from scopeatlas.errors import ExchangeError
from scopeatlas.exchange.circuit_tracer import cantor, caption, export_circuit_tracer, label_graph
from scopeatlas.exchange.tables import read_published
from scopeatlas.mining.examples import read_examples
from tests.exchange.conftest import CROSS_LAYERS, CROSS_WIDTH, WIDTH


def unpaired(number: int) -> tuple[int, int]:
    """The viewer's `cantorUnpair`, by search."""
    return next((s - i, i) for s in range(10_000) for i in range(s + 1) if s * (s + 1) // 2 + i == number)


@pytest.fixture(scope="module")
def features(built, tmp_path_factory):
    folder = tmp_path_factory.mktemp("features")
    assert export_circuit_tracer(built.atlas, built.entry.key, folder, scan="toys") == WIDTH
    return folder / "toys"


@pytest.mark.parametrize("place", [(0, 0), (0, 391), (2, 14696), (25, 7)])
def test_layer_and_index_pair_as_the_viewer_unpairs_them(place):
    assert cantor(0, 391) == 77027  # a node of a graph that circuit-tracer wrote
    if cantor(*place) < 100_000:
        assert unpaired(cantor(*place)) == place
    assert cantor(2, 14696) == 108037647


def test_every_feature_has_the_file_that_its_nodes_name(features):
    assert {unpaired(int(path.stem)) for path in features.glob("*.json")} == {(1, index) for index in range(WIDTH)}


def test_a_file_holds_what_the_viewer_reads(features, built):
    published = read_published(built.atlas, built.entry.key)
    windows = read_examples(published.examples.examples)
    for row in published.rows.to_dicts():
        body = json.loads((features / f"{cantor(1, row['index'])}.json").read_text("utf-8"))
        assert (body["index"], body["act_min"], body["act_max"]) == (row["index"], 0, row["max_activation"])
        assert (body["top_logits"], body["bottom_logits"]) == (row["promoted"], row["suppressed"])
        assert (body["activation_frequency"], len(body["histogram"])) == (row["density"], 50)
        assert body["quantile_values"] == sorted(body["quantile_values"])
        quantiles = body["examples_quantiles"]
        assert quantiles[0]["quantile_name"] == "Top activations"
        shown = [example for quantile in quantiles for example in quantile["examples"]]
        assert len(shown) == len(windows.filter(pl.col("feature") == row["feature"]))
        for example in shown:
            assert example.keys() == {"tokens", "tokens_acts_list", "train_token_ind", "is_repeated_datapoint"}
            assert len(example["tokens"]) == len(example["tokens_acts_list"])
            assert example["tokens_acts_list"][example["train_token_ind"]] == max(example["tokens_acts_list"]) > 0


def test_a_file_says_the_label_and_its_score(features, built):
    rows = built.atlas.rows(built.entry.key)[1]
    labelled = rows.filter(pl.col("label") != "").to_dicts()
    assert labelled
    for row in rows.to_dicts():
        body = json.loads((features / f"{cantor(1, row['index'])}.json").read_text("utf-8"))
        said = (
            f"{row['label']} (f1 {row['f1']:.2f} [{row['f1_low']:.2f}, {row['f1_high']:.2f}])"
            if row["label"]
            else f"[{row['status']}]"
        )
        assert body["label"] == caption(row) == said
        assert body["scope_atlas"]["status"] == row["status"] and body["scope_atlas"]["f1"] == row["f1"]


def test_several_saes_go_into_one_scan(built, features):
    export_circuit_tracer(built.atlas, built.entries[1].key, features.parent, scan="both")
    found = {unpaired(int(path.stem)) for path in (features.parent / "both").glob("*.json")}
    assert found == {(layer, index) for layer in CROSS_LAYERS for index in range(CROSS_WIDTH)}


def node(layer: object, index: int, kind: str = "cross layer transcoder", **more: object) -> dict[str, object]:
    return {
        "node_id": f"{layer}_{index}_4",
        "layer": str(layer),
        "feature": 1,
        "ctx_idx": 4,
        "feature_type": kind,
        "clerp": "",
        **more,
    }


@pytest.mark.parametrize("said", [{"feature": -1, "feature_type": None}, {"feature_type": "mlp reconstruction error"}])
def test_a_reconstruction_error_is_told_by_its_number_or_its_type(built, tmp_path, said):
    (labelled, *_) = built.atlas.rows(built.entry.key)[1].filter(pl.col("label") != "")["index"]
    graph = {"metadata": {}, "nodes": [node(1, labelled, **said)]}
    (tmp_path / "graph.json").write_text(json.dumps(graph), encoding="utf-8")
    made = label_graph(built.atlas, [built.entry.key], tmp_path / "graph.json", tmp_path / "out.json")
    assert (made.nodes, json.loads((tmp_path / "out.json").read_text("utf-8"))) == (0, graph)


def test_a_graph_has_labels_on_the_nodes_of_features_and_nothing_else_is_touched(built, tmp_path):
    rows = {row["index"]: row for row in built.atlas.rows(built.entry.key)[1].to_dicts()}
    labelled = next(index for index, row in rows.items() if row["label"])
    refused = next(index for index, row in rows.items() if not row["label"])
    nodes = [
        node(1, labelled),
        node(1, refused),
        node(1, labelled, clerp="mine"),
        node(0, 3),
        node(7, 3),
        node(1, -1, "mlp reconstruction error"),
        node(1, labelled, "mlp reconstruction error", feature=-1),  # layer 4's, as older versions name it
        node("E", 5, "embedding"),
        node(1, labelled, "logit", clerp='Output "x"'),
    ]
    graph = {
        "metadata": {"slug": "s", "scan": "org/repo", "transcoder_list": []},
        "qParams": {},
        "nodes": nodes,
        "links": [{"weight": 1.5}],
    }
    (tmp_path / "graph.json").write_text(json.dumps(graph), encoding="utf-8")
    saes = [entry.key for entry in built.entries]
    made = label_graph(built.atlas, saes, tmp_path / "graph.json", tmp_path / "out.json", scan="toys")
    out = json.loads((tmp_path / "out.json").read_text("utf-8"))
    captions = [caption(rows[labelled]), f"[{rows[refused]['status']}]", "mine", "[dense]", "", "", "", "", 'Output "x"']
    assert [one["clerp"] for one in out["nodes"]] == captions
    assert (made.nodes, made.known, made.labelled) == (5, 4, 2)
    assert out["metadata"] == {"slug": "s", "scan": "./features/toys", "transcoder_list": []}
    unlabelled = [{**one, "clerp": ""} for one in out["nodes"]]
    assert {**out, "nodes": unlabelled, "metadata": 0} == {
        **graph,
        "nodes": [{**one, "clerp": ""} for one in nodes],
        "metadata": 0,
    }


def test_two_saes_of_one_layer_cannot_both_name_its_nodes(fresh, tmp_path):
    (tmp_path / "graph.json").write_text('{"metadata": {}, "nodes": []}', encoding="utf-8")
    rows = fresh.atlas.rows(fresh.entry.key)[1]

    class Twice:
        def rows(self, sae: str) -> tuple[str, pl.DataFrame]:
            return sae, rows

    with pytest.raises(ExchangeError, match="b and a both read layer 1"):
        label_graph(Twice(), ["a", "b"], tmp_path / "graph.json", tmp_path / "out.json")  # type: ignore[arg-type]


@pytest.mark.parametrize("content", ["", "[]", '{"nodes": []}', '{"metadata": {}, "nodes": [{}]}'])
def test_what_is_no_graph_is_refused(built, tmp_path, content):
    (tmp_path / "graph.json").write_text(content, encoding="utf-8")
    with pytest.raises(ExchangeError, match=r"graph\.json"):
        label_graph(built.atlas, [built.entry.key], tmp_path / "graph.json", tmp_path / "out.json")
    assert not (tmp_path / "out.json").exists()
