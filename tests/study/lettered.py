"""An SAE of a tiny model's token embeddings whose features each read one letter: what fires in a text is known beforehand."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import polars as pl
import torch

from scopeatlas.activations.probe import Probe
from scopeatlas.dictionaries.releases import SaeEntry
from scopeatlas.dictionaries.sparse import Activation, LayerWeights, SparseDictionary
from scopeatlas.storage.store import Store
from scopeatlas.study.opening import OpenSae
from scopeatlas.subject.loading import SubjectModel
from scopeatlas.subject.sites import parse_hook_point
from tests.study.tiny_opened import tiny_subject

LETTERS = "abcdefgh ."
MARKUP = len(LETTERS)
"""The feature that fires on BOS, on the chat template's special tokens and on a line break."""


def letter_probe(subject: SubjectModel, gains: Mapping[str, float]) -> Probe:
    """Feature i fires on LETTERS[i] and nothing else, with that letter's gain (1 by default); MARKUP fires with 1."""
    tokenizer = subject.tokenizer
    ids = [tokenizer(letter, add_special_tokens=False)["input_ids"][0] for letter in (*LETTERS, "\n")]
    ids += tokenizer.convert_tokens_to_ids(["<s>", "<|im_start|>", "<|im_end|>"])
    with torch.no_grad():
        read = subject.model.get_input_embeddings()(torch.tensor(ids)).double()  # [14, 32]: independent, so any target is met
    wanted = torch.zeros(len(ids), MARKUP + 1, dtype=torch.float64)
    for i in range(len(ids)):
        wanted[i, min(i, MARKUP)] = gains.get(LETTERS[i], 1.0) if i < MARKUP else 1.0
    w_enc = torch.linalg.lstsq(read, wanted).solution.float()
    threshold = torch.full((MARKUP + 1,), 0.5)
    layer = LayerWeights(w_enc, torch.zeros(MARKUP + 1), torch.zeros(MARKUP + 1, 1, 32), threshold)
    site = (parse_hook_point("model.embed_tokens.output"),)
    return Probe(SparseDictionary("sae", site, site, "", (layer,), torch.zeros(1, 32), Activation("jumprelu")), subject)


def letter_sae(
    rng: np.random.Generator,
    root: Path = Path("nowhere"),
    *,
    gains: Mapping[str, float] | None = None,
    subject: SubjectModel | None = None,
    key: str = "letters",
    **columns: Mapping[str, object],
) -> OpenSae:
    """Opened by hand. columns: for some letters, other values of a column of the rows."""
    subject = subject or tiny_subject(rng)
    values = {
        "label": dict.fromkeys(LETTERS, ""),
        "status": {},
        "f1": {},
        "density": {},
        "decoder_norms": {},
        "max_activation": {},
        "example_text": {},
        "trigger_tokens": {},
    } | columns
    usual = {"label": "", "status": "incoherent", "f1": None, "density": 0.1, "decoder_norms": [1.0], "max_activation": 4.0}
    usual |= {"example_text": "", "trigger_tokens": ["t"]}
    names = [*LETTERS, "MARKUP"]
    rows = {name: [of.get(letter, usual[name]) for letter in names] for name, of in values.items()}
    schema = {"f1": pl.Float32, "density": pl.Float32, "decoder_norms": pl.List(pl.Float32), "max_activation": pl.Float32}
    table = pl.DataFrame(rows, schema_overrides=schema).with_columns(
        sae=pl.lit(key),
        feature=pl.int_range(pl.len(), dtype=pl.Int32),
        key=pl.format("{}/{}", pl.lit(key), pl.int_range(pl.len())),
        f1_low=pl.col("f1") - 0.1,
        f1_high=pl.col("f1") + 0.1,
    )
    opened = OpenSae(Store(root), key, "corpus", SaeEntry.__new__(SaeEntry), subject, table)
    vars(opened)["probe"] = letter_probe(subject, gains or {})
    return opened
