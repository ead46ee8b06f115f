"""`scopeatlas ablate`, `steer`, `attribute` and `causal-check`, on a tiny model."""

import json

import polars as pl
import pytest
from click.testing import CliRunner, Result

from scopeatlas.api import Atlas
from scopeatlas.cli import cli
from scopeatlas.study.edits import Edit
from scopeatlas.study.opening import OpenSae
from tests.study.tiny_opened import PROMPT, WIDTH, tiny_opened, with_rows

HOSTILE = "[bold]x[/] \x1b[31mred"


class _Held(Atlas):
    """An atlas of one opened SAE and no tables."""

    def __init__(self, opened: OpenSae):
        self.opened = opened

    def open(self, sae: str) -> OpenSae:
        assert sae == "toy"
        return self.opened


@pytest.fixture
def opened(rng) -> OpenSae:
    return with_rows(tiny_opened(rng), label=pl.Series([HOSTILE] * WIDTH))


@pytest.fixture
def shell(opened, monkeypatch):
    monkeypatch.setattr("scopeatlas.api.open_atlas", lambda _root: _Held(opened))

    def run(*arguments: str) -> Result:
        result = CliRunner().invoke(cli, arguments, catch_exceptions=False)
        assert "\x1b" not in result.output
        return result

    return run


def test_steering_prints_the_edit_what_moves_and_both_texts(shell, opened):
    result = shell("steer", "toy", "3=2.5", "5", PROMPT, "-n", "5")
    found = _Held(opened).intervene(PROMPT, sae="toy", steer={3: 2.5, 5: 1.0}, tokens=5)
    assert result.exit_code == 0, result.output
    assert f"«{PROMPT}»" in result.output and "[bold]x[/]" in result.output
    assert f"raised by {2.5 * 1.3:.4g}" in result.output and f"raised by {1.5:.4g}" in result.output
    assert f"KL {found.kl:.3g} nats" in result.output
    assert result.output.count("->") >= found.next_tokens.height
    assert "\nclean   " in result.output and "\nedited  " in result.output


def test_ablation_at_some_tokens_marks_them_and_json_has_everything(shell, opened):
    result = shell("ablate", "toy", "3,5", PROMPT, "--at", "2,3,-1", "-n", "0")
    assert "A «ri»ver runs«.»" in result.output and result.output.count("ablated") == 2
    assert "clean" not in result.output  # nothing was generated
    found = json.loads(shell("ablate", "toy", "3,5", PROMPT, "--at", "2,3,-1", "-n", "0", "--json").stdout)
    same = _Held(opened).intervene(PROMPT, sae="toy", ablate=["3", "5"], positions=[2, 3, -1], tokens=0)
    assert found == json.loads(json.dumps(same.as_dict()))
    assert [edit["feature"] for edit in found["edits"]] == [3, 5]


def test_a_conversation_is_answered_through_the_chat_template(shell):
    assert "user" in shell("steer", "toy", "3", "Hi", "--chat", "-n", "1").output
    tokens = json.loads(shell("steer", "toy", "3", "Hi", "--chat", "-n", "1", "--json").stdout)["tokens"]
    assert "".join(tokens).endswith("<|im_start|>assistant\n")


def test_attribution_prints_features_and_what_they_explain(shell, opened):
    result = shell("attribute", "toy", PROMPT, "--target", "a", "--against", "b", "--verify", "3", "--top", "4")
    found = _Held(opened).attribute(PROMPT, sae="toy", target="a", against="b", verify=3)
    assert f"'a' over 'b': {found.difference:+.3f} logits" in result.output
    first = found.features.row(0, named=True)
    assert f"{first['attribution']:+.4f}" in result.output and f"ablated {first['measured']:+.4f}" in result.output
    assert f"features explain {found.explained.share * 100:.0f} %" in result.output and "correlate at" in result.output
    told = json.loads(shell("attribute", "toy", PROMPT, "--target", "a", "--json").stdout)
    assert told["against"] == "" and len(told["features"]) == found.features.height


def test_a_causal_check_ablates_features_and_steers_those_with_a_strength(shell, opened, tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("One more.\nAnother\n", encoding="utf-8")
    arguments = ("causal-check", "toy", "3,5=2", PROMPT, "--file", str(file), "--token", "a", "--against", "b", "--controls", "3")
    result, found = shell(*arguments), json.loads(shell(*arguments, "--json").stdout)
    assert found["verdict"] in result.output and len(found["prompts"]) == 3 and len(found["controls"]) == 3
    assert [edit["change"] for edit in found["edits"]] == ["ablate", "add"] and found["edits"][1]["value"] == pytest.approx(3.0)
    same = _Held(opened).causal_check(
        [PROMPT, "One more.", "Another"], sae="toy", tokens=["a"], against=["b"], edits=[Edit(3), Edit(5, "add", 3.0)], controls=3
    )
    assert found["change"]["mean"] == pytest.approx(same.change[0])


@pytest.mark.parametrize(
    "arguments",
    [
        ("steer", "toy", "3", PROMPT, "-n", "1"),
        ("ablate", "toy", "3", PROMPT, "-n", "1"),
        ("attribute", "toy", PROMPT, "--target", "a"),
        ("causal-check", "toy", "3", PROMPT, "--token", "a", "--controls", "2"),
    ],
)
def test_each_is_drawn_into_a_png(shell, tmp_path, arguments):
    assert shell(*arguments, "--plot", str(tmp_path / "drawn.png")).exit_code == 0
    assert (tmp_path / "drawn.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("steer", "toy", "x", PROMPT), "is no feature"),
        (("ablate", "toy", "3=2", PROMPT), "has no strength"),
        (("ablate", "toy", "3", PROMPT, "--at", "first"), "none of all, prompt, generated, last"),
        (("ablate", "toy", "3", PROMPT, "--at", "99"), "error: no position 99"),
        (("ablate", "toy", "999", PROMPT), "error: toy has no feature 999"),
        (("steer", "toy", "0", PROMPT), "error: feature 0 never fired"),
        (("attribute", "toy", PROMPT, "--target", "river"), "is not one token"),
        (("steer", "toy", "3", ""), "error: the prompt has no text"),
        (("steer", "toy", "3=2", "3=5", PROMPT), "feature 3 is named twice"),
        (("ablate", "toy", "3,5,3", PROMPT), "feature 3 is named twice"),
        (("steer", "toy", "3", PROMPT, "--seed", "-1"), "x>=0"),
        (("contrast", "toy", "a.txt", "b.txt", "--seed", "-1"), "x>=0"),
    ],
)
def test_mistakes_are_told_in_a_line_and_end_with_2(shell, arguments, words):
    result = shell(*arguments)
    assert result.exit_code == 2 and words in result.stderr and result.stdout == ""
