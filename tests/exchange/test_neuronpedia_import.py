"""Neuronpedia's explanations as imported labels: what is taken, kept, chosen and scored, and what is refused."""

import gzip
import json
import re
from pathlib import Path

import polars as pl
import pytest

from scopeatlas.errors import ExchangeError
from scopeatlas.labels.annotations import MAX_LENGTH, read_annotations
from scopeatlas.labels.stage import label_features
from tests.exchange.conftest import CROSS_WIDTH, LABELS, WIDTH, Built

MODEL_ID, SOURCE = "toy-4b", "1-someones-res"


def explanation(index: int = 3, **changes: object) -> dict[str, object]:
    """A line as Neuronpedia exports it."""
    return {
        "id": f"c{index:024d}",
        "modelId": MODEL_ID,
        "layer": SOURCE,
        "index": str(index),
        "authorId": "clkht01d40000jv08hvalcvly",
        "description": f"words about rivers, as in {index}",
        "embedding": None,
        "typeName": "np_max-act",
        "explanationModelName": "gpt-4o-mini",
        **dict.fromkeys(("umap_x", "umap_y", "umap_cluster", "umap_log_feature_sparsity")),
        **changes,
    }


def write(path: Path, *lines: object) -> Path:
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def take(built: Built, path: Path, number: int = 0, **options: str):
    return built.atlas.import_neuronpedia(built.entries[number].key, path, **options)


def standing(built: Built, number: int = 0):
    return read_annotations(built.store, built.corpus.id, built.entries[number].key)


def unlabelled(built: Built) -> list[int]:
    """Features that fire and have no label of ours."""
    return built.atlas.rows(built.entry.key)[1].filter(pl.col("status") == "incoherent")["feature"].to_list()


def test_an_explanation_becomes_an_imported_label_with_its_origin(fresh, tmp_path):
    line = explanation(7, description="the river,\n\x00 and\u202e the sea, at night, in winter, with snow")
    made = take(fresh, write(tmp_path / "batch-0.jsonl", line))
    (label,) = standing(fresh)
    assert (made.new, made.lines, made.features, made.empty) == (1, 1, 1, 0)
    assert (label.feature, label.method, label.status, label.version) == (
        7,
        "imported",
        "ok",
        f"imported:neuronpedia:{line['id']}",
    )
    assert label.reads == "the river, and the sea, at night, in winter, with snow"
    assert label.label == "the river, and the sea, at night, in"
    kept = ("id", "modelId", "layer", "index", "authorId", "typeName", "explanationModelName", "description")
    assert json.loads(label.provenance) == {"neuronpedia": {name: line[name] for name in kept}}


@pytest.mark.parametrize(
    "name", ["e.jsonl", "e.jsonl.gz", "e.json", "v1/llama/1-x/explanations/batch-0.jsonl.gz", "batch-1.jsonl"]
)
def test_a_folder_or_one_file_in_any_of_its_forms_is_read(fresh, tmp_path, name):
    path = tmp_path / "in" / name
    path.parent.mkdir(parents=True)
    lines = [explanation(1), explanation(2)]
    write(path, json.dumps(lines) if name.endswith(".json") else json.dumps(lines[0]) + "\n\n" + json.dumps(lines[1]))
    if "explanations" in name:
        write(path.parents[1] / "source.jsonl", {"id": "1-x"})
    assert take(fresh, path if name == "e.json" else tmp_path / "in").new == 2
    assert [label.feature for label in standing(fresh)] == [1, 2]


def test_several_explanations_of_a_feature_all_stand(fresh, tmp_path):
    take(fresh, write(tmp_path / "e.jsonl", explanation(4), explanation(4, id="c" + "a" * 24, description="stones")))
    assert [label.reads for label in standing(fresh)] == ["words about rivers, as in 4", "stones"]


def test_importing_again_changes_nothing_and_a_corrected_line_replaces_what_it_said(fresh, tmp_path):
    path = write(tmp_path / "e.jsonl", explanation(4), explanation(5))
    take(fresh, path)
    fresh.labelled()
    before = standing(fresh)
    assert take(fresh, path).new == 0 and standing(fresh) == before
    there = fresh.store, fresh.corpus, fresh.entry, fresh.subject
    assert label_features(*there, settings=LABELS)[1]
    assert take(fresh, write(path, explanation(4, description="cold stones"), explanation(5))).new == 1
    assert [label.reads for label in standing(fresh)] == ["cold stones", "words about rivers, as in 5"]


@pytest.mark.parametrize("text", ["", " \n", "\x00", "\u2028\x1b"])
def test_a_line_without_text_is_left_out_and_counted(fresh, tmp_path, text):
    made = take(fresh, write(tmp_path / "e.jsonl", explanation(1, description=text), explanation(2)))
    assert (made.lines, made.new, made.empty, made.too_long) == (2, 1, 1, 0)
    assert [label.feature for label in standing(fresh)] == [2]


def test_a_line_with_too_long_a_text_is_left_out_and_counted(fresh, tmp_path):
    whole = explanation(3, description="x" * MAX_LENGTH + "\n" * 9)
    made = take(fresh, write(tmp_path / "e.jsonl", explanation(1, description="x" * (MAX_LENGTH + 1)), explanation(2), whole))
    assert (made.lines, made.new, made.empty, made.too_long) == (3, 2, 0, 1)
    assert [label.feature for label in standing(fresh)] == [2, 3]


def test_half_a_surrogate_pair_is_no_reason_to_stop(fresh, tmp_path):
    odd = {name: f"a{chr(0xD800)}b" for name in ("id", "description", "authorId", "typeName", "notes")}
    path = write(tmp_path / "e.jsonl", explanation(4, **odd), explanation(5, id=None, description=f"c{chr(0xDFFF)}"))
    assert take(fresh, path).new == 2
    assert [label.reads for label in standing(fresh)] == ["a?b", "c?"]
    fresh.labelled()
    assert take(fresh, path).new == 0


def test_of_several_lines_of_one_id_the_last_stands_and_importing_again_changes_nothing(fresh, tmp_path):
    path = write(tmp_path / "e.jsonl", explanation(7, description="rivers"), explanation(7, description="stones"))
    for new in (1, 0):
        made = take(fresh, path)
        assert (made.lines, made.new) == (2, new)
        assert [label.reads for label in standing(fresh)] == ["stones"]


@pytest.mark.parametrize("identity", ["c\x1b[31m", "a b", "a:b", "a\n", "é", "x" * 65, [1, 2], {"a": "\x1b"}, 12])
def test_an_id_that_could_do_harm_stands_in_the_version_as_a_hash(fresh, tmp_path, identity):
    lines = [explanation(7, id=identity), explanation(7, id="other\x1b")]
    take(fresh, write(tmp_path / "e.jsonl", *lines))
    versions = [label.version for label in standing(fresh)]
    assert len(set(versions)) == 2 and all(re.fullmatch(r"imported:neuronpedia:[\w.-]{1,64}", name, re.A) for name in versions)
    assert {json.loads(label.provenance)["neuronpedia"]["id"] for label in standing(fresh)} == {str(identity), "other\x1b"}
    take(fresh, write(tmp_path / "e.jsonl", {**lines[0], "description": "stones"}))
    assert sorted(label.reads for label in standing(fresh)) == ["stones", "words about rivers, as in 7"]


def test_imported_labels_are_scored_by_our_scorer_and_shown_where_we_have_none(fresh, tmp_path):
    feature, ruled = unlabelled(fresh)[0], fresh.atlas.rows(fresh.entry.key)[1].filter(pl.col("method") == "rule")["feature"][0]
    take(fresh, write(tmp_path / "e.jsonl", explanation(feature, description="the letter e"), explanation(ruled)))
    labels = fresh.labelled()
    imported = labels.table.filter(pl.col("method") == "imported")
    assert dict(imported.select("feature", "current").iter_rows()) == {feature: True, ruled: False}
    scores = fresh.scored()
    tested = scores.scored.filter(pl.col("label_id").is_in(imported["label_id"].to_list()))
    assert set(tested["scorer"]) == {"retrieval"} and set(tested["feature"]) == {feature, ruled}
    assert tested["auroc"].null_count() == 0 and tested["documents"].min() >= 3  # type: ignore[operator]
    fresh.publish(fresh.entry)
    shown = fresh.atlas.feature(fresh.entry.key, feature)
    assert (shown.method, shown.label, shown.status) == ("imported", "the letter e", "ok")
    assert fresh.atlas.feature(fresh.entry.key, ruled).method == "rule"


def export(built: Built, folder: Path) -> Path:
    built.atlas.export_neuronpedia(
        built.entry.key, folder, model_id=MODEL_ID, source_set="toy-res-60", creator="a lab", logits=False
    )
    return folder


def explanations(folder: Path) -> dict[str, tuple[str, ...]]:
    (path,) = folder.glob(f"v1/{MODEL_ID}/1-toy-res-60/explanations/*.gz")
    lines = [json.loads(line) for line in gzip.decompress(path.read_bytes()).splitlines()]
    found = {line["id"]: tuple(line[n] for n in ("index", "description", "typeName", "explanationModelName")) for line in lines}
    assert len(found) == len(lines)
    return found


def test_explanations_come_back_as_they_were_after_a_round_trip(fresh, tmp_path):
    ours = export(fresh, tmp_path / "ours")
    foreign = explanation(unlabelled(fresh)[1], layer="1-toy-res-60", description="first line\n  second\tline ", id="c d")
    take(fresh, ours)
    take(fresh, write(tmp_path / "e.jsonl", foreign))
    fresh.labelled()
    fresh.scored()
    fresh.publish(fresh.entry)
    added = {str(foreign["id"]): tuple(str(foreign[n]) for n in ("index", "description", "typeName", "explanationModelName"))}
    assert explanations(export(fresh, tmp_path / "again")) == explanations(ours) | added


def test_explanations_of_a_multi_layer_kind_find_the_feature_of_their_layer(fresh, tmp_path):
    path = write(tmp_path / "e.jsonl", explanation(3, layer="0-cross"), explanation(5, layer="2-cross"))
    take(fresh, path, number=1)
    assert [label.feature for label in standing(fresh, number=1)] == [3, CROSS_WIDTH + 5]


def test_another_model_or_source_is_taken_when_it_is_named(fresh, tmp_path):
    path = write(
        tmp_path / "e.jsonl", explanation(1, layer="2-res-jb", modelId="lama"), explanation(2, layer="9-res", modelId="lama")
    )
    made = take(fresh, path, model_id="lama", source="2-res-jb")
    assert made.lines == 1 and [label.feature for label in standing(fresh)] == [1]
    with pytest.raises(ExchangeError, match="no explanation of source 3-res"):
        take(fresh, path, model_id="lama", source="3-res")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{not json", "is no JSON"),
        ("[1]", "is no JSON object"),
        ("7", "is no JSON object"),
        (explanation(1, modelId="gemma-2-2b"), "is of model gemma-2-2b and .* of tiny/toy-4b; .*--model-id gemma-2-2b"),
        (explanation(1, layer="12-res"), "is of source 12-res and .* reads layer 1; .*--source 12-res"),
        (explanation(1, layer="nonsense"), "is of source nonsense"),
        (explanation(WIDTH), f"is of feature {WIDTH}, which layer 1 of .* does not have"),
        (explanation() | {"index": "-1"}, "is of feature -1"),
        (explanation() | {"index": "9" * 5000}, "is of feature 999"),
        (explanation() | {"index": None}, "has no index"),
        (explanation(1, modelId="\x1b[31mred"), r"is of model \[31mred and"),
        (explanation(1, description=None), "has no description"),
    ],
)
def test_a_line_that_cannot_be_taken_is_named_and_nothing_is(fresh, tmp_path, line, said):
    path = write(tmp_path / "e.jsonl", explanation(2), line)
    with pytest.raises(ExchangeError, match=said) as caught:
        take(fresh, path)
    assert f"line 2 of {path}" in str(caught.value) and "\n" not in str(caught.value)
    assert standing(fresh) == []


def test_damaged_or_empty_files_are_refused(fresh, tmp_path):
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(b"{}" * 100)[:20])
    with pytest.raises(ExchangeError, match=r"cannot read .*cut.jsonl.gz"):
        take(fresh, tmp_path / "cut.jsonl.gz")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ExchangeError, match="holds no explanations: name a .jsonl"):
        take(fresh, tmp_path / "empty")
    with pytest.raises(ExchangeError, match="holds no explanation with text"):
        take(fresh, write(tmp_path / "nothing.jsonl", explanation(1, description=""), explanation(2, description="x" * 3000)))
