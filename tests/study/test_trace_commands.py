"""`scopeatlas trace` and `topics` on a published SAE of the real model."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from scopeatlas.api import open_atlas
from scopeatlas.cli import cli

pytestmark = pytest.mark.slow
TEXT = "the river and the sea"


@pytest.fixture
def run(published):
    def invoke(*arguments: str) -> Result:
        return CliRunner().invoke(cli, ["--store", str(published.store.root), *arguments], catch_exceptions=False)

    return invoke


def written(path: Path, *lines: str) -> str:
    path.write_text("\n".join(lines))
    return str(path)


def test_a_trace_is_printed_and_drawn(run, tmp_path):
    more, picture = written(tmp_path / "more.txt", "the city was"), tmp_path / "strips.png"
    plain = run("trace", "toy", TEXT, "--file", more, "--plot", str(picture)).stdout
    assert plain.startswith("1  the") and "«" in plain.splitlines()[0] and "\n2  " in plain
    assert "labels explain" in plain and "in 2 texts" in plain and picture.read_bytes()[:4] == b"\x89PNG"


def test_a_trace_as_json_is_what_the_library_gives(run, published, subject):
    found = json.loads(run("trace", "toy", TEXT, "--json").stdout)
    expected = open_atlas(published.store.root, subject=subject).trace(TEXT, sae="toy").as_dict()
    assert found == json.loads(json.dumps(expected)) and found["texts"][0]["tokens"][0] == "the"


def test_without_a_text_one_line_says_what_to_give(run):
    result = run("trace", "toy")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == "error: no text given; name some, or a file with --file\n"


def test_topics_are_printed_drawn_and_given_as_json(run, tmp_path):
    sentences = ("The river was long.", "The sea is deep.", "A city has streets.", "Houses and roads.")
    texts, picture = written(tmp_path / "texts.txt", *sentences), tmp_path / "topics.png"
    groups = written(tmp_path / "groups.txt", "water", "water", "city", "city")
    plain = run("topics", "toy", "--file", texts, "--groups", groups, "--plot", str(picture)).stdout
    assert "1  The river was long." in plain and "topics of words (TF-IDF), the baseline" in plain and "adjusted Rand" in plain
    assert picture.read_bytes()[:4] == b"\x89PNG"
    found = json.loads(run("topics", "toy", *sentences, "--groups", groups, "--json").stdout)
    assert found["texts"] == list(sentences) and set(found["words"]) == {"topics", "by_text", "weights"}
    assert found["agreement"][0]["description"] == "features"
