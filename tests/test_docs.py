"""What the documentation promises of itself: executed notebooks, links that lead somewhere, commands that exist."""

import re
from pathlib import Path

import click
import nbformat
import pytest

from scopeatlas.cli import cli
from tests.conftest import REPOSITORY

NOTEBOOKS = sorted((REPOSITORY / "docs" / "notebooks").glob("*.ipynb"))
PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]


def named(path: Path) -> str:
    return path.name


@pytest.mark.parametrize("path", NOTEBOOKS, ids=named)
def test_a_notebook_was_executed_from_top_to_bottom_without_an_error(path):
    cells = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert outputs and not [output for output in outputs if output.output_type == "error"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=named)
def test_a_notebook_tells_nothing_of_the_machine_it_was_executed_on(path):
    for cell in nbformat.read(path, as_version=4).cells:
        for output in cell.get("outputs", []):
            assert output.output_type != "stream" or output.name == "stdout"
            text = str(output.get("text", "")) + str(output.get("data", {}).get("text/plain", ""))
            assert not re.search(r"(?<![\w.])/(home|root|tmp|usr|work)/", text)


@pytest.mark.parametrize("path", PAGES, ids=named)
def test_links_lead_somewhere(path):
    targets = re.findall(r"\]\((?!https?:)([^)#]+)(?:#[^)]*)?\)", path.read_text(encoding="utf-8"))
    assert [target for target in targets if not (path.parent / target).exists()] == []


@pytest.mark.parametrize("path", PAGES, ids=named)
def test_commands_that_are_named_exist(path):
    context = click.Context(cli)
    for words in re.findall(r"(?:bin/|`|^ *)scopeatlas ([a-z][a-z -]*)", path.read_text(encoding="utf-8"), re.MULTILINE):
        first, *rest = words.split()
        command = cli.get_command(context, first)
        assert command is not None, f"scopeatlas {first}"
        if isinstance(command, click.Group) and rest:
            assert command.get_command(context, rest[0]) is not None, f"scopeatlas {first} {rest[0]}"
