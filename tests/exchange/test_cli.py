"""`scopeatlas export` and `scopeatlas import`: the same as the library, in one line each."""

import json

import pytest
from click.testing import CliRunner

from scopeatlas.cli import cli
from scopeatlas.labels.annotations import read_annotations
from tests.exchange.conftest import WIDTH, Built


def run(built: Built, *arguments: object, code: int = 0) -> str:
    result = CliRunner().invoke(cli, ["--store", str(built.store.root), *map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == code, result.output
    return result.stderr if code else result.stdout


def test_neuronpedia_out_and_in(fresh, tmp_path):
    names = ("--model-id", "toy-4b", "--source-set", "toy", "--creator", "a lab")
    said = run(fresh, "export", "neuronpedia", "toy.res", tmp_path / "out", *names, "--no-logits")
    assert "v1/toy-4b/1-toy" in said and f"{WIDTH} features" in said and "no embedding" in said
    made = json.loads(run(fresh, "export", "neuronpedia", "toy.res", tmp_path / "two", *names, "--json"))
    assert made["sources"] == ["1-toy"] and made["features"] == WIDTH
    said = run(fresh, "import", "neuronpedia", "toy.res", tmp_path / "out")
    assert f"{made['explanations']} new labels of {made['explanations']} explanations" in said
    again = json.loads(run(fresh, "import", "neuronpedia", "toy.res", tmp_path / "out", "--json"))
    assert (again["new"], again["lines"]) == (0, made["explanations"])


def test_what_an_import_leaves_out_is_said(fresh, tmp_path):
    from tests.exchange.test_neuronpedia_import import explanation, write

    texts = ("\x00", "rivers", "x" * 2500)
    path = write(tmp_path / "e.jsonl", *(explanation(number, description=text) for number, text in enumerate(texts)))
    said = run(fresh, "import", "neuronpedia", "toy.res", path)
    assert "1 new labels of 3 explanations" in said and "1 explanations without text are left out" in said
    assert "1 explanations of more than 2,000 characters are left out" in said
    made = json.loads(run(fresh, "import", "neuronpedia", "toy.res", path, "--json"))
    assert (made["new"], made["empty"], made["too_long"]) == (0, 1, 1)


def test_annotating_and_taking_it_back_as_json(fresh):
    by = ("--author", "ann", "--json")
    made = json.loads(run(fresh, "annotate", "toy.res", 3, "names of\nrivers", *by))
    (label,) = read_annotations(fresh.store, fresh.corpus.id, fresh.entry.key)
    assert made == {
        "key": f"{fresh.entry.key}/3",
        "label_id": label.label_id,
        "version": "human:ann",
        "label": "names of rivers",
        "reads": "names of rivers",
        "writes": "",
        "retracted": False,
    }
    assert json.loads(run(fresh, "annotate", "toy.res", 3, "--retract", *by)) == {**made, "retracted": True}
    assert read_annotations(fresh.store, fresh.corpus.id, fresh.entry.key) == []


def test_logits_are_written_unless_they_are_left_out(built, tmp_path):
    from tests.exchange.test_neuronpedia import lines

    names = ("--model-id", "toy-4b", "--source-set", "toy", "--creator", "a lab")
    for folder, more in (("with", ()), ("without", ("--no-logits",))):
        run(built, "export", "neuronpedia", "toy.res", tmp_path / folder, *names, *more)
        found = lines(tmp_path / folder / "v1/toy-4b/1-toy/features/batch-0.jsonl.gz")
        assert all(bool(line["pos_str"]) == (folder == "with") for line in found)


def test_parquet_and_datasets_out_and_in(built, tmp_path):
    assert "features.parquet" in run(built, "export", "parquet", "toy.res", tmp_path / "parquet")
    made = json.loads(run(built, "export", "dataset", "toy.res", tmp_path / "dataset", "--licence", "mit", "--json"))
    assert made["rows"]["data/features.parquet"] == WIDTH
    other = Built(**{**vars(built), "store": type(built.store)(tmp_path / "other")})
    assert f"{WIDTH} features published" in run(other, "import", "dataset", tmp_path / "dataset")
    assert json.loads(run(other, "import", "dataset", tmp_path / "dataset", "--json"))["reused"]
    assert "toy.res" in run(other, "show", "toy.res", 3)


def test_circuit_tracer_features_and_graph(built, tmp_path):
    assert f"{WIDTH} features" in run(built, "export", "circuit-tracer", "toy.res", tmp_path, "--scan", "toys")
    (tmp_path / "g.json").write_text('{"metadata": {}, "nodes": [{"node_id": "1_3_0"}]}', encoding="utf-8")
    said = run(built, "export", "graph", tmp_path / "g.json", tmp_path / "out.json", "toy.res", "--scan", "toys")
    assert "of which 1 are of these SAEs" in said
    assert json.loads((tmp_path / "out.json").read_text("utf-8"))["metadata"]["scan"] == "./features/toys"


@pytest.mark.parametrize(
    "arguments",
    [
        ("export", "parquet", "nothing.such", "{out}"),
        ("import", "neuronpedia", "toy.res", "{bad}"),
        ("import", "dataset", "{folder}"),
        ("export", "graph", "{bad}", "{out}", "toy.res"),
    ],
)
def test_what_cannot_be_done_is_one_line_and_code_2(built, tmp_path, arguments):
    (tmp_path / "bad.json").write_text("{", encoding="utf-8")
    places = {"out": tmp_path / "out", "bad": tmp_path / "bad.json", "folder": tmp_path}
    said = run(built, *(argument.format(**places) for argument in arguments), code=2)
    assert said.startswith("error: ") and said.count("\n") == 1
