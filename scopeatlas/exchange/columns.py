"""What the tables of an export are and what their columns mean, in words for people who have only the files.

What belongs here: names and sentences. What does not: making the tables (`tables.py`).
"""

from collections.abc import Mapping
from pathlib import Path

import polars as pl

TABLES = {
    "features": "One row per feature, as the atlas shows it: its status, the label in use, that label's test, the evidence.",
    "labels": "Every label that a feature was ever given and every refusal; `current` says which one is in use.",
    "falsification": "Predictions of labels that were tried by running edited text through the subject model.",
    "scores": "Every test of every label on report documents: a row for each label, scorer and arm, the own one and controls.",
    "outcomes": "Texts on which labels were right and wrong on report documents.",
    "examples": "Windows of text around activations: the strongest of distinct documents, and a few of each quantile stratum.",
    "statistics": "Per feature: exact counts over the corpus, moments of its activations, the ids of the tokens that it promotes.",
    "histogram": "Activations in log-spaced bins, per feature and split.",
    "coactivation": "Each feature's partners: those that fire on the same tokens of explain documents.",
}

_INTERVAL = "95 % interval by a bootstrap over documents (a confidence sequence where testing stops early)"
MEANINGS = {
    "key": "the feature's one name: SAE, slash, number (of a multi-layer kind layer.number)",
    "release": "the published collection that the SAE is of",
    "sae": "the SAE's key: release, path and the first 8 hex digits of its files' hashes",
    "model": "the subject model, as the release names it",
    "corpus": "id of the corpus that the features were studied on",
    "kind": "sae, transcoder, crosscoder or clt",
    "site": "the tensor of the subject model that the feature reads",
    "site_out": "the tensor or tensors that it writes",
    "layer": "the model's layer that the feature reads",
    "index": "the feature's number within the encoder of that layer",
    "feature": "the feature's flat number over all layers",
    "status": "of a feature or label: ok, or why there is none (dead, rare, ...); of a score: scored, or why not",
    "method": "who proposed the label: rule, llm, imported or human; empty where there is none",
    "label_id": "a hash of what the label claims; labels, scores and outcomes are joined by it",
    "label": "the label in a few words; empty where it was refused",
    "reads": "what the feature fires on, by its label",
    "writes": "what the feature promotes, by its label",
    "trigger_tokens": "the tokens at its strongest peaks, most frequent first",
    "trigger_shares": "the share of those peaks that each trigger token has",
    "promoted": "output tokens that it raises most (in `statistics` their ids)",
    "suppressed": "output tokens that it lowers most (in `statistics` their ids)",
    "decoder_norms": "norms of its decoder row at each output site",
    "density": "share of tokens on which it fires",
    "max_activation": "the largest activation seen",
    "scorer": "what tested the label",
    "unit": "what was counted: token, context, window or prompt",
    "report_documents": "report documents that it fires in (a sketch's count, which saturates at 16 or a little above)",
    "snippets": "its top windows, report documents first, « » around the tokens that fire",
    "search_text": "the text that is embedded for search: the label and the words that describe it",
    "example_text": "the snippets as plain text, which is embedded for search too",
    "version": "which proposer in which version",
    "scope": "what `reads` is about: token, phrase or document; empty where nobody said",
    "rule": "the rule as JSON, for a label that can be run",
    "confidence": "as the explainer said it, in [0, 1]",
    "predicted_positive": "sentences on which the feature should fire, by its explainer",
    "predicted_negative": "sentences on which it should stay silent",
    "select_score": "what the label was chosen by, on select documents",
    "current": "whether this label is the one in use",
    "provenance": "JSON: who, when, from which documents, by which prompt and model, at what cost",
    "origin": "who made the edit: a rule, an LLM, or a prediction of the label itself",
    "text": "the text that was tried or judged",
    "place": "the character from which on it matters whether the feature fires",
    "expected": "whether the label says that it fires",
    "fired": "whether it did",
    "passed": "whether the label's prediction held",
    "claim": "which claim was tested: reads or writes",
    "arm": "own, or which control: shuffled, constant, trigger_tokens, random_direction, random_model, second_judge",
    "documents": "report documents that the feature fires in, or whose text was used where it need not fire",
    "positives": "units in which the feature fires",
    "negatives_random": "silent units drawn at random",
    "negatives_trigger": "silent units that hold one of its trigger tokens",
    "negatives_neighbour": "silent units in which a neighbouring feature fires",
    "first_round": "where testing may stop early: the main metric on the first round alone",
    "against": "trigger_tokens arm: the own arm's main metric on the same windows",
    "specificity_random": "share of random negatives that are not claimed",
    "specificity_trigger": "share of trigger negatives that are not claimed",
    "specificity_neighbour": "share of neighbour negatives that are not claimed",
    "recall_by_decile": "recall within each tenth of the firings, weakest first",
    "p_value": "of the lift, by a test over documents",
    "q_value": "the false discovery rate at which this label would count as a discovery, across features",
    "prompt_tokens": "sent to the judge",
    "completion_tokens": "received from the judge",
    "usd": "what the judge cost",
    "note": "what else there is to say of the test",
    "outcome": "hit, miss or false alarm",
    "stratum": "the quantile stratum of the peak within its split, 0 the weakest",
    "rank": "place within kind and stratum, 0 first",
    "context_id": "id of the context that the window is cut from",
    "peak": "the largest activation (of a window: of its context)",
    "split": "explain, select or report, a property of the document (in `histogram` 0, 1, 2)",
    "document_id": "id of the document",
    "peak_at": "the token of the window at which the peak is",
    "tokens": "token ids of a window, -1 past its end; elsewhere a count of tokens",
    "activations": "of each token of a window",
    "texts": "the tokens of a window as text",
    "early_share": "share of its firings at the first positions of a context",
    "mean_activation": "mean over the tokens on which it fires",
    "std_activation": "standard deviation over the tokens on which it fires",
    "promoted_strength": "effects of the promoted tokens in standard deviations of its effects over the vocabulary",
    "bin": "floor(2 * log2(activation))",
    "contexts": "contexts whose peak is in the bin",
    "partner": "the other feature",
    "both": "tokens of the sample on which both fire",
    "pmi": "pointwise mutual information in bits",
    "jaccard": "tokens on which both fire over those on which either does",
    "pmi_rank": "place among the feature's partners by PMI; null beyond the first 10",
    "jaccard_rank": "place among the feature's partners by Jaccard index; null beyond the first 10",
    **{
        f"{split}_{unit}": f"{unit} of {split} documents that it fires in"
        for split in ("explain", "select", "report")
        for unit in ("contexts", "tokens")
    },
    **{
        f"{split}_documents": f"{split} documents that it fires in (saturates at 16 or a little above)"
        for split in ("explain", "select")
    },
    **{
        f"{name}{part}": f"{text}{f': {end} end of the {_INTERVAL}' if end else ''}"
        for name, text in {
            "f1": "harmonic mean of precision and recall",
            "precision": "share of claimed units in which the feature fires",
            "recall": "share of units in which it fires that are claimed",
            "balanced_accuracy": "mean of recall and specificity; chance is 0.5",
            "auprc": "area under the precision-recall curve",
            "auroc": "area under the ROC curve; chance is 0.5",
            "correlation": "of simulated and true activations; chance is 0",
            "lift": "the main metric less that of another feature's label (the shuffled arm)",
        }.items()
        for part, end in (("", ""), ("_low", "lower"), ("_high", "upper"))
    },
    "shuffled_f1": "F1 of another feature's label on this feature's units: the control",
    "shuffled_balanced_accuracy": "balanced accuracy of another feature's label: the control",
}


def schema_text(files: Mapping[str, Path]) -> str:
    """Tables and columns of parquet files as markdown: type and meaning of each."""
    parts = [
        "# Tables",
        "",
        "Joined by `feature`, labels and scores by `label_id`. Numbers are as they were measured; null is: not measured.",
    ]
    for name, path in files.items():
        parts += ["", f"## {name}.parquet", "", TABLES[name], "", "| column | type | meaning |", "|---|---|---|"]
        parts += [
            f"| {column} | {dtype} | {MEANINGS.get(column, '')} |" for column, dtype in pl.read_parquet_schema(path).items()
        ]
    return "\n".join(parts) + "\n"
