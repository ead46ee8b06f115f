"""Every family and kind: found, opened, encoded and decoded as an independent writer says (`writers.py` beside this file)."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from scopeatlas.dictionaries import formats, sparse
from scopeatlas.dictionaries.layout import parse_width
from scopeatlas.dictionaries.releases import SaeEntry, find_saes, open_dictionary
from scopeatlas.dictionaries.sparse import SparseActivations, SparseDictionary
from scopeatlas.errors import DictionaryError
from scopeatlas.subject.names import canonical_model_name
from scopeatlas.subject.sites import parse_hook_point
from tests.dictionaries.writers import WRITERS
from tests.dictionaries.writers_gemma import gemma_scope_2
from tests.dictionaries.writing import Written

TOLERANCE = 1e-5
"""Of a token's largest value: what float32 arithmetic may differ by from float64."""
L0_CASES = [case for case in WRITERS if case.startswith("gemma_scope")]
SAES_IN_RELEASE = {"qwen_scope": 3, "openai_gpt2": 2, "circuit_tracer-plt": 3}
"""How many SAEs the writers put into one release, where it is not one."""


@dataclass(frozen=True)
class Opened:
    case: str
    seed: int
    written: Written
    entries: list[SaeEntry]
    entry: SaeEntry
    dictionary: SparseDictionary

    @property
    def x(self) -> torch.Tensor | list[torch.Tensor]:
        tensors = [torch.from_numpy(x) for x in self.written.x]
        return tensors if self.dictionary.is_multi_layer else tensors[0]


def open_case(case: str, folder: Path, seed: int) -> Opened:
    written = WRITERS[case](folder, np.random.default_rng(seed))
    entries = find_saes(written.root)
    entry = next((e for e in entries if e.path == written.path), entries[0] if entries else None)
    assert entry is not None, f"nothing found among {sorted(p.name for p in folder.rglob('*') if p.is_file())}"
    return Opened(case, seed, written, entries, entry, open_dictionary(entry))


@pytest.fixture(scope="module", params=WRITERS)
def release(request, tmp_path_factory) -> Opened:
    seed = int(np.random.SeedSequence().entropy % 2**32)  # pyright: ignore[reportOperatorIssue, reportOptionalOperand]
    print(f"seed of {request.param}: {seed}")
    return open_case(request.param, tmp_path_factory.mktemp(request.param), seed)


@pytest.fixture
def opened(release) -> Opened:
    print(f"seed of {release.case}: {release.seed}")
    return release


def dense(acts: SparseActivations, dictionary: SparseDictionary) -> np.ndarray:
    return acts.dense(dictionary.width).numpy()


def assert_close(found: np.ndarray, wanted: np.ndarray) -> None:
    scale = np.abs(wanted).reshape(len(wanted), -1).max(1).reshape(-1, *[1] * (wanted.ndim - 1))
    worst = float((np.abs(found - wanted) / np.maximum(scale, 1e-6)).max())
    assert found.shape == wanted.shape and worst <= TOLERANCE, f"off by {worst:.2g} of the token's largest"


# ------------------------------------------------------------------------------------------ what holds for every family


def test_the_sae_is_found_under_its_release_and_path(opened):
    count = next((n for start, n in SAES_IN_RELEASE.items() if opened.case.startswith(start)), 1)
    assert len(opened.entries) == len({entry.key for entry in opened.entries}) == count
    assert opened.entry.release == opened.written.release
    assert opened.written.path in ("", opened.entry.path)
    assert opened.dictionary.family == opened.entry.family


def test_kind_sites_and_model_are_those_of_the_release(opened):
    written, dictionary = opened.written, opened.dictionary
    assert dictionary.kind == written.kind
    assert dictionary.sites_in == tuple(parse_hook_point(site) for site in written.sites_in)
    assert dictionary.sites_out == tuple(parse_hook_point(site) for site in written.sites_out)
    if written.model_name is None:
        assert dictionary.model_name == ""
    else:
        assert canonical_model_name(dictionary.model_name) == canonical_model_name(written.model_name)


def test_encode_gives_the_formula_s_features_and_values(opened):
    acts = dense(opened.dictionary.encode(opened.x), opened.dictionary)
    assert np.array_equal(acts != 0, opened.written.acts != 0)
    assert_close(acts, opened.written.acts)


def test_a_feature_s_id_is_its_layer_s_position_times_the_width_plus_its_index(opened):
    acts = opened.dictionary.encode(opened.x)
    token, feature = opened.written.acts.nonzero()
    assert acts.token.tolist() == token.tolist() and acts.feature.tolist() == feature.tolist()
    per_layer = opened.written.acts.shape[1] // len(opened.written.x)
    assert all(opened.dictionary.place(n) == divmod(n, per_layer) for n in feature[:50].tolist())


def test_decode_gives_the_formula_s_reconstruction(opened):
    y = opened.dictionary.decode(opened.dictionary.encode(opened.x), opened.x)
    assert_close(y.numpy(), opened.written.y)


def test_encoding_in_narrow_feature_tiles_changes_no_feature(opened, monkeypatch):
    whole = opened.dictionary.encode(opened.x)
    monkeypatch.setitem(sparse.TILE_BYTES, "cpu", 4 * len(opened.written.acts) * 7)
    tiled = opened.dictionary.encode(opened.x)
    assert torch.equal(tiled.token, whole.token) and torch.equal(tiled.feature, whole.feature)
    assert_close(dense(tiled, opened.dictionary), opened.written.acts)


def test_a_steering_vector_is_the_decoder_row_at_each_output(opened, rng):
    rows = opened.written.rows
    for feature in rng.choice(len(rows), 12).tolist():
        found = [opened.dictionary.steering_vector(feature, output).numpy() for output in range(rows.shape[1])]
        np.testing.assert_allclose(np.stack(found), rows[feature], rtol=TOLERANCE, atol=1e-7)


# --------------------------------------------------------------------------------------------------- traps, one by one


@pytest.fixture
def written_as(tmp_path, rng):
    return lambda case: open_case(case, tmp_path, int(rng.integers(2**32)))


@pytest.mark.parametrize("case", ["gemma_scope_2-clt", "circuit_tracer-clt"])
def test_a_clt_feature_writes_nothing_before_its_layer_and_something_at_it(written_as, case):
    """Gemma Scope 2 indexes outputs absolutely, circuit-tracer from the feature's own layer."""
    dictionary = written_as(case).dictionary
    for layer in range(len(dictionary.layers)):
        vectors = [dictionary.steering_vector(layer * dictionary.features_per_layer, o) for o in range(len(dictionary.sites_out))]
        assert [bool(vector.any()) for vector in vectors] == [output >= layer for output in range(len(vectors))]


def test_a_gemma_scope_2_clt_stored_by_relative_output_is_refused(tmp_path, rng):
    written = WRITERS["gemma_scope_2-clt"](tmp_path, rng)
    for layer in range(18):
        path = written.folder / written.path / f"params_layer_{layer}.safetensors"
        tensors = load_file(path)
        save_file(tensors | {"w_dec": tensors["w_dec"].roll(-layer, 1)}, path)
    with pytest.raises(DictionaryError, match=r"params_layer_1\.safetensors.*relative"):
        open_dictionary(find_saes(tmp_path)[0])


def test_a_crosscoder_s_shards_count_positions_in_its_list_of_layers(written_as):
    opened = written_as("gemma_scope_2-crosscoder")
    dictionary, folder = opened.dictionary, opened.written.folder / opened.written.path
    assert [site.layer for site in dictionary.sites_in] == [site.layer for site in dictionary.sites_out] == [5, 9, 12, 15]
    for position in range(4):
        shard = load_file(folder / f"params_layer_{position}.safetensors")
        assert torch.equal(dictionary.reading_direction(position * 6 + 1), shard["w_enc"][:, 1])
        assert torch.equal(dictionary.b_dec[position], shard["b_dec"])


@pytest.mark.parametrize("case", L0_CASES)
def test_an_average_l0_is_a_measurement_and_a_config_s_l0_a_target(written_as, case):
    opened = written_as(case)
    found = (opened.dictionary.target_l0, opened.dictionary.measured_l0)
    assert found == (opened.written.target_l0, opened.written.measured_l0)


# By hand: t = min(1, 3 L / n); small 10 + 10 t, medium 30 + 30 t, big 60 + 90 t, or 60 + 60 t in the `_all` folders.
@pytest.mark.parametrize(
    ("release", "path", "l0"),
    [
        ("gemma-scope-2-1b-pt", "resid_post/layer_7_width_16k_l0_small", 18),  # n 26, t 21/26
        ("gemma-scope-2-1b-pt", "resid_post/layer_7_width_16k_l0_medium", 54),
        ("gemma-scope-2-1b-pt", "resid_post/layer_7_width_16k_l0_big", 132),
        ("gemma-scope-2-1b-pt", "resid_post_all/layer_7_width_16k_l0_big", 108),
        ("gemma-scope-2-270m-it", "mlp_out_all/layer_3_width_16k_l0_small", 15),  # n 18, t 1/2
        ("gemma-scope-2-270m-it", "mlp_out_all/layer_3_width_16k_l0_big", 90),
        ("gemma-scope-2-27b-pt", "attn_out/layer_53_width_16k_l0_big", 150),  # t 1
        ("gemma-scope-2-27b-pt", "attn_out_all/layer_53_width_16k_l0_big", 120),
    ],
)
def test_without_a_config_the_target_l0_follows_from_the_names(tmp_path, rng, release, path, l0):
    gemma_scope_2(tmp_path, rng, release=release, path=path, config=None)
    (entry,) = find_saes(tmp_path)
    assert open_dictionary(entry).target_l0 == l0
    assert formats.facts(entry.files, entry.release).l0 == l0


def test_a_config_s_l0_goes_before_the_names(tmp_path, rng):
    gemma_scope_2(tmp_path, rng, config={"l0": 47})
    assert open_dictionary(find_saes(tmp_path)[0]).target_l0 == 47


def test_with_a_config_the_release_s_folder_may_have_any_name(tmp_path, rng):
    gemma_scope_2(tmp_path, rng, release="downloads")
    dictionary = open_dictionary(find_saes(tmp_path)[0])
    assert (dictionary.model_name, dictionary.sites_in) == ("google/gemma-3-270m", (parse_hook_point("model.layers.12.output"),))


def test_a_width_of_65k_is_65536(tmp_path, rng):
    gemma_scope_2(tmp_path, rng, path="resid_post/layer_5_width_65k_l0_small", config=None)
    (entry,) = find_saes(tmp_path)
    assert open_dictionary(entry).width == formats.facts(entry.files, entry.release).width == parse_width("65k") == 65536


def test_names_alone_tell_what_is_inside(written_as):
    opened = written_as("gemma_scope_2-no_config_it")
    facts = formats.facts(opened.entry.files, opened.entry.release)
    assert (facts.kind, facts.site, facts.layers, facts.width) == ("sae", "attn_out", (7,), 16384)
    assert (facts.l0, facts.model) == (54, "google/gemma-3-1b-it")


@pytest.mark.parametrize("case", ["gemma_scope_2-no_prefix", "gemma_scope_2-270m_pt", "gemma_scope_2-v3"])
def test_defects_of_a_config_s_model_name_are_mended(written_as, case):
    opened = written_as(case)
    assert opened.dictionary.model_name == opened.written.model_name


def test_the_examples_beside_the_weights_are_no_sae(tmp_path, rng):
    written = gemma_scope_2(tmp_path, rng)
    save_file({"activations": torch.zeros(4, 10)}, written.folder / written.path / "examples.safetensors")
    (entry,) = find_saes(tmp_path)
    assert [Path(name).name for name in entry.weights] == ["params.safetensors"]


def test_a_repo_that_only_points_at_another_s_transcoders_holds_none(tmp_path):
    (tmp_path / "gemma-scope-2-1b-pt").mkdir()
    text = (
        "model_kind: transcoder_set\ntranscoders:\n- hf://google/gemma-scope-2-1b-pt/transcoder_all/layer_0_width_16k_l0_small\n"
    )
    (tmp_path / "gemma-scope-2-1b-pt" / "config.yaml").write_text(text, encoding="utf-8")
    assert find_saes(tmp_path) == []


@pytest.mark.parametrize(
    ("case", "word"),
    [
        ("gemma_scope_2-no_config", "config.json"),
        ("gemma_scope_2-v3", "gemma-v3-4b-pt"),
        ("saelens-expected_average_only_in", "expected_average_only_in"),
        ("sparsify-sae", "b_dec"),
        ("sparsify-skip_transcoder-unsaid", "transcode"),
        ("dictionary_learning-BatchTopKSAE-unset", "threshold"),
        ("llama_scope-R", "threshold"),
        ("goodfire-8b", "unit norm"),
    ],
)
def test_what_loading_inferred_or_mended_is_noted(written_as, case, word):
    notes = written_as(case).dictionary.notes
    assert any(word in note for note in notes), notes
