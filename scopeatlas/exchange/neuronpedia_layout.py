"""Neuronpedia's bulk layout: its folders, files and columns; lines written to it and read from it.

What belongs here: what every file of the layout is like. What does not: what of ours becomes a line (`neuronpedia_lines.py`), or
what a line becomes here (`neuronpedia_import.py`).

It is the one that Neuronpedia exports and imports (hijohnnylin/neuronpedia, `utils/neuronpedia-utils/export-data.py`,
`apps/webapp/app/api/admin/import/route.ts`, `apps/webapp/prisma/schema.prisma`; read 2026-08). Its importer takes a file's
columns from the first line, so every line has the same keys; it lists at most 1,000 files of a folder; and it inserts, and
never updates.
"""

import gzip
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from hashlib import sha256
from pathlib import Path
from typing import Any

from scopeatlas.errors import ExchangeError
from scopeatlas.storage.files import atomic_path

CREATOR = "clkht01d40000jv08hvalcvly"
"""Neuronpedia's DEFAULT_CREATOR_ID: what others create is not shown to the public."""
LEAST_FEATURES, MOST_FILES = 1024, 1000
GZIP_LEVEL = 5
ID_LENGTH = 25
_NULL_ESCAPE = "\\u0000"
_ESCAPED_NULL = re.compile(r"\\+u0000")  # with every backslash: what is left of JSON within a string has to be JSON

Line = Mapping[str, object]

FEATURE_COLUMNS = (
    "modelId", "layer", "index", "sourceSetName", "creatorId", "maxActApprox", "frac_nonzero", "freq_hist_data_bar_heights",
    "freq_hist_data_bar_values", "logits_hist_data_bar_heights", "logits_hist_data_bar_values", "neuron_alignment_indices",
    "neuron_alignment_l1", "neuron_alignment_values", "correlated_neurons_indices", "correlated_neurons_l1",
    "correlated_neurons_pearson", "decoder_weights_dist", "neg_str", "neg_values", "pos_str", "pos_values", "topkCosSimIndices",
    "topkCosSimValues", "vector", "vectorLabel", "hookName", "vectorDefaultSteerStrength", "hasVector",
)  # fmt: skip
ACTIVATION_COLUMNS = (
    "id", "modelId", "layer", "index", "creatorId", "dataSource", "tokens", "maxValue", "minValue", "values",
    "maxValueTokenIndex", "dfaValues", "dfaMaxValue", "dfaTargetIndex", "binContains", "binMin", "binMax",
    "qualifyingTokenIndex",
)  # fmt: skip
EXPLANATION_COLUMNS = (
    "id", "modelId", "layer", "index", "authorId", "description", "embedding", "typeName", "explanationModelName", "notes",
    "umap_x", "umap_y", "umap_cluster", "umap_log_feature_sparsity",
)  # fmt: skip
SOURCE_COLUMNS = (
    "id", "modelId", "setName", "creatorId", "hasDashboards", "inferenceEnabled", "inferenceHosts", "saelensConfig",
    "saelensRelease", "saelensSaeId", "hfRepoId", "hfFolderId", "visibility", "defaultOfModelId", "hasUmap",
    "hasUmapLogSparsity", "hasUmapClusters", "num_prompts", "num_tokens_in_prompt", "dataset", "notes", "createdAt",
)  # fmt: skip
SOURCE_SET_COLUMNS = (
    "modelId", "name", "creatorId", "hasDashboards", "visibility", "description", "type", "creatorName", "urls",
    "creatorEmail", "releaseName", "defaultOfModelId", "defaultRange", "defaultShowBreaks", "showDfa", "showCorrelated",
    "showHeadAttribution", "showUmap", "createdAt",
)  # fmt: skip
RELEASE_COLUMNS = (
    "name", "description", "creatorName", "creatorId", "visibility", "isNewUi", "featured", "descriptionShort", "urls",
    "creatorEmail", "creatorNameShort", "defaultSourceSetName", "defaultSourceId", "defaultUmapSourceIds", "createdAt",
)  # fmt: skip
MODEL_COLUMNS = (
    "id", "instruct", "creatorId", "displayNameShort", "displayName", "tlensId", "dimension", "visibility",
    "defaultSourceSetName", "defaultSourceId", "inferenceEnabled", "layers", "neuronsPerLayer", "createdAt", "owner",
    "updatedAt", "website",
)  # fmt: skip
EXPLANATION_TYPE_COLUMNS = ("name", "displayName", "description", "featured", "isAttention", "url", "creatorName", "creatorId")
MODEL_TYPE_COLUMNS = ("name", "displayName", "description", "featured", "url", "creatorName")
CONFIG = ("explanation_type", "explanation_model_type", "explanation_score_type", "explanation_score_model", "eval_type")


def source_id(layer: int, source_set: str) -> str:
    return f"{layer}-{source_set}"


def batches(features: int) -> list[range]:
    """The features of each file: LEAST_FEATURES or more where there are as many, and at most MOST_FILES files."""
    files = max(1, min(features // LEAST_FEATURES, MOST_FILES))
    bounds = [features * number // files for number in range(files + 1)]
    return [range(first, stop) for first, stop in zip(bounds, bounds[1:], strict=False)]


def line_id(*parts: object) -> str:
    """An id of ID_LENGTH characters in the shape of a cuid, of these parts alone: exporting again gives the same."""
    return "c" + sha256(json.dumps(parts, ensure_ascii=False).encode("utf-8", "surrogatepass")).hexdigest()[: ID_LENGTH - 1]


def line_of(columns: Sequence[str], values: Line) -> dict[str, object]:
    """A line with exactly these keys, in their order. Raises KeyError for one that `values` does not have."""
    return {name: values[name] for name in columns}


def encoded(line: Line) -> bytes:
    """One line of JSON, without U+0000, which Postgres has no place for: a space, as in Neuronpedia's importer.

    The importer looks for the escape in the raw line, so that text which spells it out would break the line: a space too.
    """
    text = _dumped(line)
    if _NULL_ESCAPE in text:
        text = _dumped({name: _without_null(value) for name, value in line.items()})
    return text.encode("utf-8", errors="replace") + b"\n"


def _dumped(line: Line) -> str:
    return json.dumps(line, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def _without_null(value: object) -> object:
    if isinstance(value, list):
        return [_without_null(item) for item in value]
    return _ESCAPED_NULL.sub(" ", value.replace("\x00", " ")) if isinstance(value, str) else value


def write_lines(path: Path, lines: Iterable[Line]) -> int:
    """Write lines to a file, gzipped if its name ends so, the same bytes for the same lines; returns how many."""
    count = 0
    with atomic_path(path) as temporary, temporary.open("wb") as raw, ExitStack() as stack:
        is_packed = path.suffix == ".gz"
        stream = stack.enter_context(gzip.GzipFile("", "wb", GZIP_LEVEL, raw, mtime=0)) if is_packed else raw
        for line in lines:
            stream.write(encoded(line))
            count += 1
    return count


def merge_config(folder: Path, name: str, lines: Sequence[Line]) -> None:
    """Add lines to a file of v1/config, whose key is `name`, in place of any of the same name; other lines stay."""
    path = folder / f"{name}.jsonl"
    known = {str(line["name"]): line for _, line in (read_lines(path) if path.exists() else ())}
    known |= {str(line["name"]): line for line in lines}
    write_lines(path, [known[key] for key in sorted(known)])


def explanation_files(path: Path) -> list[Path]:
    """The files with explanations at `path`: itself, those in its `explanations` folders, or else those right in it.

    Raises ExchangeError if there is none.
    """
    if path.is_file():
        return [path]
    nested = [file for file in sorted(path.rglob("*")) if file.parent.name == "explanations" and file.is_file()]
    found = [file for file in nested or sorted(path.glob("*")) if file.name.endswith((".jsonl", ".jsonl.gz", ".json"))]
    if not found:
        raise ExchangeError(f"{path} holds no explanations: name a .jsonl, .jsonl.gz or .json file, or a folder of such")
    return found


def read_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The lines of a .jsonl or .jsonl.gz file with their numbers, or the objects of a .json file that is one array.

    Raises ExchangeError with file and line for what is no JSON object.
    """
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        text = content.decode("utf-8")
    except (OSError, EOFError, ValueError) as error:
        raise ExchangeError(f"cannot read {path}: {error}; download or export it again") from error
    for number, value in _values(path, text):
        if not isinstance(value, dict):
            raise ExchangeError(f"line {number} of {path} is no JSON object; correct or delete it")
        yield number, value


def _values(path: Path, text: str) -> Iterator[tuple[int, object]]:
    if text.lstrip()[:1] == "[":
        try:
            yield from enumerate(json.loads(text), start=1)
        except ValueError as error:
            raise ExchangeError(f"{path} is no JSON: {error}; download it again") from error
        return
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except ValueError as error:
                raise ExchangeError(f"line {number} of {path} is no JSON: {error}; correct or delete it") from error
