"""The lines of a Neuronpedia export that are about the source as a whole, and those that its explanations refer to.

What belongs here: model, release, source set, source, and the configuration's types and models. What does not: lines about
features (`neuronpedia_lines.py`).
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass

import polars as pl

from scopeatlas import __version__
from scopeatlas.dictionaries.sparse import SparseDictionary
from scopeatlas.exchange import neuronpedia_layout as layout
from scopeatlas.exchange.tables import Published
from scopeatlas.subject.loading import SubjectModel

_METHODS = {
    "rule": "A rule about tokens, proposed from activations and executed on held-out documents.",
    "llm": "Proposed by a language model from examples, and tested on held-out documents.",
    "human": "Written by a person.",
    "imported": "Taken over from elsewhere, and tested on held-out documents.",
}


@dataclass(frozen=True)
class Names:
    """What Neuronpedia calls things: its id of the model, the source set's name, who made it, since when (ISO 8601)."""

    model: str
    source_set: str
    creator: str
    created: str


def type_of(label: Mapping[str, object]) -> str:
    """An explanation's typeName: of one that came from Neuronpedia its own, else our method."""
    origin = json.loads(str(label["provenance"])).get("neuronpedia", {})
    return origin.get("typeName") or f"scope-atlas_{label['method']}"


def model_of(label: Mapping[str, object]) -> str:
    """An explanation's explanationModelName: the LLM that proposed it, else what version of what."""
    provenance = json.loads(str(label["provenance"]))
    origin = provenance.get("neuronpedia", {})
    return origin.get("explanationModelName") or str(provenance.get("model") or label["version"] or label["method"])


def source_lines(
    published: Published, dictionary: SparseDictionary, names: Names, position: int, subject: SubjectModel | None
) -> dict[str, layout.Line]:
    """By file name without its ending, the one line of each file about the source of an encoder layer."""
    source = layout.source_id(dictionary.sites_in[position].layer, names.source_set)
    made = {
        "release": (layout.RELEASE_COLUMNS, _release(published, names, source)),
        "model": (layout.MODEL_COLUMNS, _model(dictionary, names, source, subject)),
        "sourceset": (layout.SOURCE_SET_COLUMNS, _source_set(published, names)),
        "source": (layout.SOURCE_COLUMNS, _source(published, names, source)),
    }
    return {name: layout.line_of(columns, line) for name, (columns, line) in made.items()}


def _by(names: Names) -> dict[str, object]:
    return {"creatorId": layout.CREATOR, "visibility": "PUBLIC", "createdAt": names.created}


def _release(published: Published, names: Names, source: str) -> layout.Line:
    entry = published.entry
    return _by(names) | {
        "name": entry.release,
        "description": f"{entry.release}, labelled and scored by Scope Atlas {__version__}",
        "descriptionShort": entry.release,
        "creatorName": names.creator,
        "creatorNameShort": names.creator,
        "creatorEmail": None,
        "isNewUi": True,
        "featured": False,
        "urls": _urls(published),
        "defaultSourceSetName": names.source_set,
        "defaultSourceId": source,
        "defaultUmapSourceIds": [],
    }


def _model(dictionary: SparseDictionary, names: Names, source: str, subject: SubjectModel | None) -> layout.Line:
    """Neuronpedia makes a model only if it has none of this id; without `subject` its sizes are those that the SAE shows."""
    name = dictionary.model_name or names.model
    config = subject.config if subject else None
    return _by(names) | {
        "id": names.model,
        "instruct": name.endswith("-it"),
        "displayNameShort": names.model,
        "displayName": name,
        "tlensId": None,
        "dimension": config.hidden_size if config else dictionary.d_in,
        "layers": config.num_hidden_layers if config else max(site.layer for site in dictionary.sites) + 1,
        "neuronsPerLayer": getattr(config, "intermediate_size", 0),
        "defaultSourceSetName": names.source_set,
        "defaultSourceId": source,
        "inferenceEnabled": False,
        "owner": name.partition("/")[0],
        "updatedAt": names.created,
        "website": None,
    }


def _source_set(published: Published, names: Names) -> layout.Line:
    row = published.rows.row(0, named=True)
    return _by(names) | {
        "modelId": names.model,
        "name": names.source_set,
        "hasDashboards": True,
        "description": f"{row['kind']} of {published.entry.release}",
        "type": row["kind"],
        "creatorName": names.creator,
        "creatorEmail": None,
        "urls": _urls(published),
        "releaseName": published.entry.release,
        "defaultOfModelId": None,
        "defaultRange": 1,
        "defaultShowBreaks": True,
        "showDfa": False,
        "showCorrelated": False,
        "showHeadAttribution": False,
        "showUmap": False,
    }


def _source(published: Published, names: Names, source: str) -> layout.Line:
    entry, provenance = published.entry, published.provenance()
    facts = provenance["corpus"]["facts"]
    notes = {
        "scope_atlas": __version__,
        "sae": entry.key,
        "revision": entry.revision,
        "weights_sha256": entry.hashes,
        "subject": provenance["subject"],
        "corpus": published.corpus,
        "tokens": facts.get("tokens"),
        "documents_per_split": facts.get("documents_per_split"),
        "stages": {name: record.key.identity for name, record in published.records.items()},
        "label_versions": provenance["label_versions"],
    }
    return _by(names) | {
        "id": source,
        "modelId": names.model,
        "setName": names.source_set,
        "hasDashboards": True,
        "inferenceEnabled": False,
        "inferenceHosts": [],
        "saelensConfig": None,
        "saelensRelease": None,
        "saelensSaeId": None,
        "hfRepoId": entry.repo or None,
        "hfFolderId": entry.path if entry.repo else None,
        "defaultOfModelId": None,
        "hasUmap": False,
        "hasUmapLogSparsity": False,
        "hasUmapClusters": False,
        "num_prompts": facts.get("contexts"),
        "num_tokens_in_prompt": facts.get("context_length"),
        "dataset": published.corpus,
        "notes": json.dumps(notes, ensure_ascii=False),
    }


def _urls(published: Published) -> list[str]:
    return [f"https://huggingface.co/{published.entry.repo}"] if published.entry.repo else []


def config_lines(labels: pl.DataFrame, names: Names) -> dict[str, list[layout.Line]]:
    """By file of v1/config, the lines that explanations made of `labels` refer to; no line where there is nothing of ours."""
    types: dict[str, layout.Line] = {}
    models: dict[str, layout.Line] = {}
    for label in labels.select("method", "version", "provenance").iter_rows(named=True):
        name, model = type_of(label), model_of(label)
        about = {"featured": False, "url": None, "creatorName": names.creator}
        types[name] = layout.line_of(
            layout.EXPLANATION_TYPE_COLUMNS,
            about
            | {"name": name, "displayName": name, "description": _METHODS[label["method"]]}
            | {"isAttention": False, "creatorId": layout.CREATOR},
        )
        described = f"What proposed labels of type {name}"
        models[model] = layout.line_of(
            layout.MODEL_TYPE_COLUMNS, about | {"name": model, "displayName": model, "description": described}
        )
    ours = {"explanation_type": list(types.values()), "explanation_model_type": list(models.values())}
    return {name: ours.get(name, []) for name in layout.CONFIG}
