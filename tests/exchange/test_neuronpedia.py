"""The export to Neuronpedia: field by field against its schema, and each trap of its importer."""

import gzip
import json
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from scopeatlas.activations.cache import activation_keys
from scopeatlas.activations.shards import read_shard
from scopeatlas.dictionaries.releases import open_dictionary
from scopeatlas.errors import ExchangeError
from scopeatlas.exchange.neuronpedia import NeuronpediaExport, export_neuronpedia
from scopeatlas.exchange.neuronpedia_layout import batches, encoded, line_id
from scopeatlas.exchange.neuronpedia_lines import Embed
from scopeatlas.exchange.neuronpedia_numbers import activation_bars, logit_bars, nearest_rows, peak_intervals
from scopeatlas.exchange.tables import check_manifest, read_published
from scopeatlas.mining.examples import read_examples
from scopeatlas.mining.promoted import readable_tokens
from scopeatlas.mining.sketches import BINS_PER_OCTAVE, value_bins
from scopeatlas.mining.writing import norm_gain
from tests.exchange.conftest import CROSS_LAYERS, CROSS_WIDTH, DOCUMENTS, LENGTH, WIDTH, Built

CREATOR = "clkht01d40000jv08hvalcvly"
MODEL_ID, SET, SOURCE = "toy-4b", "toy-res-60", "1-toy-res-60"

NUMBERS, STRINGS = "numbers", "strings"
FEATURE = {
    **{"modelId": str, "layer": str, "index": str, "maxActApprox": float, "creatorId": str, "frac_nonzero": float},
    **{"freq_hist_data_bar_heights": NUMBERS, "freq_hist_data_bar_values": NUMBERS},
    **{"logits_hist_data_bar_heights": NUMBERS, "logits_hist_data_bar_values": NUMBERS},
    **{"neuron_alignment_indices": NUMBERS, "neuron_alignment_l1": NUMBERS, "neuron_alignment_values": NUMBERS},
    **{"correlated_neurons_indices": NUMBERS, "correlated_neurons_l1": NUMBERS, "correlated_neurons_pearson": NUMBERS},
    **{"decoder_weights_dist": NUMBERS, "neg_str": STRINGS, "neg_values": NUMBERS, "pos_str": STRINGS, "pos_values": NUMBERS},
    **{"sourceSetName": str, "topkCosSimIndices": NUMBERS, "topkCosSimValues": NUMBERS, "vector": NUMBERS},
    **{"vectorLabel": None, "hookName": None, "vectorDefaultSteerStrength": int, "hasVector": bool},
}
ACTIVATION = {
    **{"id": str, "modelId": str, "layer": str, "index": str, "creatorId": str, "dataSource": str, "tokens": STRINGS},
    **{"maxValue": float, "minValue": float, "values": NUMBERS, "maxValueTokenIndex": int, "dfaValues": NUMBERS},
    **{"dfaMaxValue": None, "dfaTargetIndex": None, "binContains": float, "binMin": float, "binMax": float},
    "qualifyingTokenIndex": int,
}
EXPLANATION = {
    **{"id": str, "modelId": str, "layer": str, "index": str, "authorId": str, "description": str, "embedding": None},
    **{"typeName": str, "explanationModelName": str, "notes": str},
    **{"umap_x": None, "umap_y": None, "umap_cluster": None, "umap_log_feature_sparsity": None},
}
ABOUT = {
    "source": "id, modelId, setName, creatorId, hasDashboards, inferenceEnabled, inferenceHosts, saelensConfig, saelensRelease, "
    "saelensSaeId, hfRepoId, hfFolderId, visibility, defaultOfModelId, hasUmap, hasUmapLogSparsity, hasUmapClusters, num_prompts, "
    "num_tokens_in_prompt, dataset, notes, createdAt",
    "sourceset": "modelId, name, creatorId, hasDashboards, visibility, description, type, creatorName, urls, creatorEmail, "
    "releaseName, defaultOfModelId, defaultRange, defaultShowBreaks, showDfa, showCorrelated, showHeadAttribution, showUmap, "
    "createdAt",
    "release": "name, description, creatorName, creatorId, visibility, isNewUi, featured, descriptionShort, urls, creatorEmail, "
    "creatorNameShort, defaultSourceSetName, defaultSourceId, defaultUmapSourceIds, createdAt",
    "model": "id, instruct, creatorId, displayNameShort, displayName, tlensId, dimension, visibility, defaultSourceSetName, "
    "defaultSourceId, inferenceEnabled, layers, neuronsPerLayer, createdAt, owner, updatedAt, website",
}


def export(
    built: Built,
    folder: Path,
    number: int = 0,
    *,
    source_set: str = SET,
    with_model: bool = True,
    embed: Embed | None = None,
) -> NeuronpediaExport:
    return export_neuronpedia(
        built.atlas,
        built.entries[number].key,
        folder,
        model_id=MODEL_ID,
        source_set=source_set,
        creator="a lab",
        subject=built.subject if with_model else None,
        embed=embed,
    )


def lines(path: Path) -> list[dict]:
    content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    return [json.loads(line) for line in content.decode("utf-8").splitlines()]


def of(folder: Path, kind: str, source: str = SOURCE) -> list[dict]:
    """Every line of a kind, as Neuronpedia's importer would take it: columns from the first line of each file."""
    found = []
    for path in sorted((folder / "v1" / MODEL_ID / source / kind).glob("*.jsonl.gz")):
        read = lines(path)
        found += [{name: line[name] for name in read[0]} for line in read]
    return found


@pytest.fixture(scope="module")
def folder(built, tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("neuronpedia") / "out"
    export(built, root)
    return root


@pytest.fixture(scope="module")
def published(built):
    return read_published(built.atlas, built.entry.key)


@pytest.fixture(scope="module")
def firings(built) -> tuple[np.ndarray, np.ndarray]:
    """Feature and value of every activation of the SAE, straight from its shards."""
    stage = built.store.stage(built.entry.key, built.corpus.id, "activations")
    keys = activation_keys(built.corpus, built.entry, built.subject)
    shards = [read_shard(stage.data_path(key, ".parquet")) for key in keys]
    return np.concatenate([s.feature for s in shards]), np.concatenate([s.value for s in shards])


def fits(value: object, expected: object) -> bool:
    if expected is None:
        return value is None
    if expected == NUMBERS:
        return isinstance(value, list) and all(type(item) in (int, float) for item in value)
    if expected == STRINGS:
        return isinstance(value, list) and all(type(item) is str for item in value)
    return type(value) in ((int, float) if expected is float else (expected,))


@pytest.mark.parametrize(("kind", "columns"), [("features", FEATURE), ("activations", ACTIVATION), ("explanations", EXPLANATION)])
def test_every_line_has_exactly_the_columns_of_the_schema_in_their_types(folder, kind, columns):
    found = of(folder, kind)
    assert found
    for line in found:
        assert line.keys() == columns.keys()
        assert [name for name, value in line.items() if not fits(value, columns[name])] == []


@pytest.mark.parametrize("name", ABOUT)
def test_the_lines_about_a_source_have_exactly_the_columns_of_the_schema(folder, name):
    (line,) = lines(folder / "v1" / MODEL_ID / SOURCE / f"{name}.jsonl")
    assert set(line) == set(ABOUT[name].replace(" ", "").split(","))


def test_the_files_lie_where_the_importer_looks_and_nowhere_else(folder, built):
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    config = ("explanation_type", "explanation_model_type", "explanation_score_type", "explanation_score_model", "eval_type")
    beside = ("labels.jsonl.gz", "scores.jsonl.gz", "provenance.json", "manifest.json")
    assert found == {
        *(f"v1/config/{name}.jsonl" for name in config),
        *(f"v1/{MODEL_ID}/{SOURCE}/{name}.jsonl" for name in ABOUT),
        *(f"v1/{MODEL_ID}/{SOURCE}/{kind}/batch-0.jsonl.gz" for kind in ("features", "activations", "explanations")),
        *(f"scope-atlas/{built.entry.key}/{name}" for name in beside),
    }


@pytest.mark.parametrize("width", [1, 60, 1023, 1024, 1025, 2047, 2048, 16_384, 131_072, 1_048_576, 5_000_000])
def test_a_folder_never_has_more_than_1000_files_nor_a_file_fewer_than_1024_features(width):
    ranges = batches(width)
    assert [i for r in ranges[:3] for i in r] == list(range(ranges[min(2, len(ranges) - 1)].stop))
    assert ranges[0].start == 0 and ranges[-1].stop == width
    assert all(one.stop == other.start for one, other in zip(ranges, ranges[1:], strict=False))
    assert len(ranges) <= 1000 and min(map(len, ranges)) >= min(width, 1024)


def test_what_the_importer_takes_for_null_characters_never_reaches_it():
    line = {"index": "1", "tokens": ["a\x00b", "c\\u0000d", "é\n"], "value": 1.5, "none": None}
    text = encoded(line)
    assert b"\\u0000" not in text and b"\x00" not in text
    kept = {"text": "spelt out \\u0000, and \x00 itself"}
    assert json.loads(json.loads(encoded({"provenance": json.dumps(kept)}))["provenance"]).keys() == kept.keys()
    assert json.loads(text) == {**line, "tokens": ["a b", "c d", "é\n"]}


def test_a_number_that_json_has_no_word_for_is_never_written():
    with pytest.raises(ValueError, match="not JSON compliant"):
        encoded({"value": float("nan")})


def test_ids_are_unique_of_25_characters_and_depend_on_what_they_name_alone(folder):
    ids = [line["id"] for kind in ("activations", "explanations") for line in of(folder, kind)]
    assert len(set(ids)) == len(ids) and all(re.fullmatch("c[0-9a-z]{24}", one) for one in ids)
    assert line_id("a", 1) == line_id("a", 1) != line_id("a", 2)


def test_exporting_again_writes_the_same_bytes(built, folder, tmp_path):
    export(built, tmp_path / "again")
    first = {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    again = {p.relative_to(tmp_path / "again"): p.read_bytes() for p in (tmp_path / "again").rglob("*") if p.is_file()}
    assert first == again


def test_gzip_is_of_level_5_and_without_a_time(folder):
    for path in folder.rglob("*.gz"):
        content = path.read_bytes()
        assert content[4:8] == b"\0\0\0\0"
        assert len(content) <= len(gzip.compress(gzip.decompress(content), 5)) + 64


def test_everything_is_made_by_the_creator_whom_the_public_is_shown(folder):
    made = [line for path in sorted(folder.glob("v1/**/*.jsonl*")) for line in lines(path)]
    assert {line[name] for line in made for name in ("creatorId", "authorId") if name in line} == {CREATOR}
    about = [lines(folder / "v1" / MODEL_ID / SOURCE / f"{name}.jsonl")[0] for name in ABOUT]
    assert {line["visibility"] for line in about} == {"PUBLIC"}


def test_types_and_models_of_explanations_are_in_the_configuration(folder):
    config = folder / "v1" / "config"
    types = {line["name"]: line for line in lines(config / "explanation_type.jsonl")}
    models = {line["name"]: line for line in lines(config / "explanation_model_type.jsonl")}
    explanations = of(folder, "explanations")
    assert {line["typeName"] for line in explanations} == set(types) == {"scope-atlas_rule"}
    assert {line["explanationModelName"] for line in explanations} == set(models)
    for line in (*types.values(), *models.values()):
        assert line["displayName"] and line["description"] and line["creatorName"] == "a lab"


def test_the_names_of_the_hierarchy_refer_to_each_other(folder):
    about = {name: lines(folder / "v1" / MODEL_ID / SOURCE / f"{name}.jsonl")[0] for name in ABOUT}
    assert about["model"]["id"] == about["source"]["modelId"] == about["sourceset"]["modelId"] == MODEL_ID
    assert about["source"]["id"] == about["release"]["defaultSourceId"] == SOURCE
    assert about["source"]["setName"] == about["sourceset"]["name"] == SET
    assert about["sourceset"]["releaseName"] == about["release"]["name"] == "toy"
    assert {(line["modelId"], line["layer"], line["sourceSetName"]) for line in of(folder, "features")} == {
        (MODEL_ID, SOURCE, SET)
    }
    assert (about["model"]["layers"], about["model"]["dimension"], about["model"]["neuronsPerLayer"]) == (3, 32, 48)


def test_embeddings_are_null_or_the_256_numbers_that_neuronpedia_searches(built, folder, tmp_path, rng):
    assert all(line["embedding"] is None for line in of(folder, "explanations"))
    vectors: dict[str, np.ndarray] = {}

    def embed(texts):
        return np.array([vectors.setdefault(text, rng.normal(size=256)) for text in texts])

    export(built, tmp_path / "embedded", embed=embed, with_model=False)
    for line in of(tmp_path / "embedded", "explanations"):
        assert line["embedding"] == np.round(vectors[line["description"]], 9).tolist()
    with pytest.raises(ExchangeError, match=r"\[n, 256\]"):
        export(built, tmp_path / "short", embed=lambda texts: np.zeros((len(texts), 384)), with_model=False)


def test_every_feature_has_a_line_with_its_exact_counts(folder, firings, built):
    feature, value = firings
    found = of(folder, "features")
    assert [line["index"] for line in found] == [str(index) for index in range(WIDTH)]
    counted = np.bincount(feature, minlength=WIDTH)
    for line, tokens in zip(found, counted, strict=True):
        mine = value[feature == int(line["index"])]
        assert line["frac_nonzero"] == tokens / built.corpus.facts["tokens"]
        assert line["maxActApprox"] == mine.max(initial=0)
        assert sum(line["freq_hist_data_bar_heights"]) == tokens
        assert len(line["freq_hist_data_bar_values"]) == len(line["freq_hist_data_bar_heights"]) == (50 if tokens else 0)


def test_bars_spread_each_bin_evenly_and_lose_nothing(rng):
    for _ in range(50):
        value = rng.lognormal(0, rng.uniform(0.1, 2), rng.integers(1, 400)).astype(np.float32)
        bins, tokens = np.unique(value_bins(value), return_counts=True)
        bars = activation_bars(bins.astype(np.int64), tokens, float(value.max()))
        assert sum(bars.heights) == len(value) and min(bars.heights) >= 0
        edges = np.linspace(0, float(value.max()), 51)
        exact = np.zeros(50)
        for b, count in zip(bins, tokens, strict=True):
            low, high = 2.0 ** (b / BINS_PER_OCTAVE), min(2.0 ** ((b + 1) / BINS_PER_OCTAVE), float(value.max()))
            inside = np.maximum(np.minimum(edges[1:], high) - np.maximum(edges[:-1], low), 0)
            exact += count * (inside / (high - low) if high > low else np.arange(50) == 49)
        assert np.abs(np.array(bars.heights) - exact).max() <= 1 + 1e-6
        assert np.allclose(bars.values, (edges[:-1] + edges[1:]) / 2, atol=1e-6)


def test_effects_on_the_logits_are_those_of_the_decoder_through_the_norm_and_the_unembedding(folder, built):
    model, dictionary = built.subject.model, open_dictionary(built.entry)
    gain = norm_gain(model.model.norm, 32).double()
    unembedding = model.lm_head.weight.double()
    readable = readable_tokens(built.subject, len(unembedding))
    for line in of(folder, "features")[:20]:
        row = dictionary.steering_vector(int(line["index"])).double()
        effect = (unembedding @ (row * gain))[readable]
        top, bottom = effect.sort(descending=True).values[:10], effect.sort().values[:10]
        assert np.allclose(line["pos_values"], top, atol=1e-4) and np.allclose(line["neg_values"], bottom, atol=1e-4)
        assert len(line["pos_str"]) == len(line["neg_str"]) == 10
        heights, values = line["logits_hist_data_bar_heights"], line["logits_hist_data_bar_values"]
        assert len(heights) == len(values) == 50 and sum(heights) == len(effect)
        width = (effect.max() - effect.min()).item() / 50
        assert np.allclose(np.diff(values), width, atol=1e-5) and abs(values[0] - effect.min().item() - width / 2) < 1e-4


def test_the_histogram_of_effects_is_numpys(rng):
    effect = rng.normal(size=(70, 300)) * rng.lognormal(size=(70, 1))
    readable = torch.from_numpy(rng.random(300) < 0.9)
    ids = rng.integers(0, 300, (70, 3))
    rows = torch.arange(70).reshape(70, 1, 1)
    found = logit_bars(lambda tile: torch.from_numpy(effect[tile[:, 0, 0]]).float(), rows, readable, ids, ids[:, :2])
    flips = 0
    for at, one in enumerate(found):
        heights, edges = np.histogram(effect[at][readable.numpy()], 50)
        flips += np.abs(np.array(one.bars.heights) - heights).sum()
        assert np.allclose(one.bars.values, (edges[:-1] + edges[1:]) / 2, atol=1e-4)
        assert np.allclose(one.promoted, effect[at][ids[at]], atol=1e-4) and len(one.suppressed) == 2
    assert flips <= 40  # of 21,000: float32 puts a value that is on an edge on its other side


def test_without_the_model_effects_are_empty_and_the_rest_is_the_same(built, folder, tmp_path):
    export(built, tmp_path / "out", with_model=False)
    effects = {name for name in FEATURE if name.startswith(("logits_hist", "pos_", "neg_"))}
    for with_model, without in zip(of(folder, "features"), of(tmp_path / "out", "features"), strict=True):
        assert without == with_model | dict.fromkeys(effects, [])


def test_the_nearest_features_are_those_of_largest_cosine_itself_first(folder, built):
    rows = open_dictionary(built.entry).layers[0].w_dec[:, 0].double().numpy()
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    cosine = unit @ unit.T
    for line in of(folder, "features"):
        index = int(line["index"])
        assert line["topkCosSimIndices"][0] == index and line["topkCosSimValues"][0] == pytest.approx(1, abs=1e-5)
        assert np.allclose(line["topkCosSimValues"], np.sort(cosine[index])[::-1][:10], atol=1e-5)
        assert np.allclose(cosine[index, line["topkCosSimIndices"]], line["topkCosSimValues"], atol=1e-5)


def test_nearest_rows_meet_every_tile(built, rng, monkeypatch):
    monkeypatch.setattr("scopeatlas.exchange.neuronpedia_numbers.TILE_ROWS", 7)
    layer = open_dictionary(built.entry).layers[0]
    place, value = nearest_rows(layer, range(20, 33))
    whole = torch.nn.functional.normalize(layer.w_dec[:, 0].float(), dim=1)
    expected = (whole[20:33] @ whole.T).topk(10, dim=1)
    assert np.allclose(value, expected.values.numpy(), atol=1e-6) and np.array_equal(place[:, 0], np.arange(20, 33))


def test_every_example_is_an_activation_with_its_tokens_and_values(folder, published):
    windows = read_examples(published.examples.examples)
    found = of(folder, "activations")
    assert len(found) == len(windows)
    expected = sorted(
        (str(row["feature"]), row["texts"], list(row["activations"][: len(row["texts"])]), row["split"])
        for row in windows.iter_rows(named=True)
    )
    assert sorted((x["index"], x["tokens"], x["values"], x["dataSource"].rpartition("/")[2]) for x in found) == expected
    for line in found:
        assert (line["maxValue"], line["minValue"]) == (max(line["values"]), min(line["values"]))
        assert line["values"][line["maxValueTokenIndex"]] == line["maxValue"] > 0


def test_the_strongest_are_in_bin_minus_one_and_others_in_the_one_interval_of_their_peak(folder):
    by_feature: dict[str, list[dict]] = {}
    for line in of(folder, "activations"):
        by_feature.setdefault(line["index"], []).append(line)
    for mine in by_feature.values():
        top = [line for line in mine if line["binContains"] == -1]
        others = [line for line in mine if line["binContains"] != -1]
        assert top and all(line["binMin"] == -1 and line["binMax"] == line["maxValue"] for line in top)
        intervals = sorted({(line["binMin"], line["binMax"], line["binContains"]) for line in others})
        assert all(one[1] <= other[0] for one, other in zip(intervals, intervals[1:], strict=False))
        assert sum(share for _, _, share in intervals) <= 1 + 1e-9
        assert all(line["binMin"] <= line["maxValue"] <= line["binMax"] for line in others)


def test_intervals_are_quartiles_of_the_peaks_cut_at_bins(rng):
    for _ in range(30):
        peaks = rng.lognormal(0, 2, rng.integers(4, 500)).astype(np.float32)
        values = np.concatenate([peaks, (peaks * 0.3).astype(np.float32)])
        bins = np.unique(value_bins(values)).astype(np.int64)
        tokens = np.array([(value_bins(values) == b).sum() for b in bins])
        contexts = np.array([(value_bins(peaks) == b).sum() for b in bins])
        intervals = peak_intervals(bins, tokens, contexts, float(peaks.max()))
        assert intervals.share.sum() == pytest.approx(1) and intervals.bounds[-1, 1] == peaks.max()
        for peak in peaks[:20]:
            low, high, share = intervals.of(float(peak))
            assert low <= peak * (1 + 1e-6) and peak <= high * (1 + 1e-6)
            begin = np.rint(np.log2(low) * BINS_PER_OCTAVE)
            end = np.inf if high == peaks.max() else np.rint(np.log2(high) * BINS_PER_OCTAVE)
            assert share == pytest.approx(tokens[(bins >= begin) & (bins < end)].sum() / tokens.sum())


def test_explanations_are_the_labels_with_their_scores_in_words(folder, published):
    labels = {row["feature"]: row for row in published.labels.to_dicts() if row["status"] == "ok"}
    rows = {row["feature"]: row for row in published.rows.to_dicts()}
    found = of(folder, "explanations")
    assert {int(line["index"]): line["description"] for line in found} == {f: row["reads"] for f, row in labels.items()}
    for line in found:
        assert f"f1 {rows[int(line['index'])]['f1']:.3f} [" in line["notes"] and "held-out documents" in line["notes"]
        assert "auroc" in line["notes"]


def test_scores_labels_and_provenance_lie_beside_it_whole(folder, published, built):
    beside = folder / "scope-atlas" / built.entry.key
    for name, table in (("scores", published.scores), ("labels", published.labels)):
        assert lines(beside / f"{name}.jsonl.gz") == json.loads(json.dumps(table.to_dicts()))
    provenance = json.loads((beside / "provenance.json").read_text("utf-8"))
    assert provenance["sae"]["hashes"] == built.entry.hashes and provenance["corpus"]["facts"]["documents"] == DOCUMENTS
    assert built.entry.root not in json.dumps(provenance)


def test_the_source_says_where_it_comes_from(folder, built, published):
    (source,) = lines(folder / "v1" / MODEL_ID / SOURCE / "source.jsonl")
    notes = json.loads(source["notes"])
    assert notes["weights_sha256"] == built.entry.hashes and notes["sae"] == built.entry.key
    assert notes["stages"] == {name: record.key.identity for name, record in published.records.items()}
    assert (source["dataset"], source["num_prompts"], source["num_tokens_in_prompt"]) == (
        built.corpus.id,
        built.corpus.facts["contexts"],
        LENGTH,
    )


def test_a_multi_layer_kind_is_one_source_for_each_encoder_layer(built, tmp_path):
    made = export(built, tmp_path, number=1, source_set="toy-cross", with_model=False)
    assert made.sources == tuple(f"{layer}-toy-cross" for layer in CROSS_LAYERS)
    statistics = read_published(built.atlas, built.entries[1].key).examples.features
    for position, source in enumerate(made.sources):
        found = of(tmp_path, "features", source)
        assert [line["index"] for line in found] == [str(index) for index in range(CROSS_WIDTH)]
        mine = statistics[position * CROSS_WIDTH : (position + 1) * CROSS_WIDTH]
        assert [line["frac_nonzero"] for line in found] == mine["density"].to_list()
        assert {line["layer"] for line in of(tmp_path, "activations", source)} == {source}
        assert all(max(line["topkCosSimIndices"]) < CROSS_WIDTH for line in found)


def test_several_saes_share_a_folder_and_its_configuration(built, folder, tmp_path):
    export(built, tmp_path, number=1, source_set="toy-cross", with_model=False)
    export(built, tmp_path, with_model=False)
    assert len(list((tmp_path / "v1" / MODEL_ID).iterdir())) == 3
    for name in ("explanation_type", "explanation_model_type"):
        path = f"v1/config/{name}.jsonl"
        assert (tmp_path / path).read_bytes() == (folder / path).read_bytes()
    assert len(list((tmp_path / "scope-atlas").glob("*/manifest.json"))) == 2


def test_a_source_that_is_there_is_not_written_over(built, folder):
    with pytest.raises(ExchangeError, match=f"{SOURCE} is there already; delete it"):
        export(built, folder)


def test_only_an_export_that_finished_has_a_manifest_and_it_knows_every_file(built, folder, tmp_path, monkeypatch):
    name = f"scope-atlas/{built.entry.key}/manifest.json"
    known = check_manifest(folder, name=name)
    outside = {"v1/config", name}
    expected = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    assert set(known) == {path for path in expected if not path.startswith(tuple(outside))}
    assert known[f"v1/{MODEL_ID}/{SOURCE}/features/batch-0.jsonl.gz"]["rows"] == WIDTH

    def killed(*_args: object, **_options: object) -> Iterator[None]:
        raise KeyboardInterrupt

    monkeypatch.setattr("scopeatlas.exchange.neuronpedia.config_lines", killed)
    with pytest.raises(KeyboardInterrupt):
        export(built, tmp_path, with_model=False)
    assert not (tmp_path / name).exists()
