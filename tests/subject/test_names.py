import pytest

from scopeatlas.subject.names import canonical_model_name, names_same_model


@pytest.mark.parametrize(
    ("written", "canonical"),
    [
        ("google/gemma-3-4b-pt", "google/gemma-3-4b-pt"),
        ("gemma-3-4b-it", "google/gemma-3-4b-it"),
        ("gemma-v3-1b-pt", "google/gemma-3-1b-pt"),
        ("google/gemma-3-1b-it-v3", "google/gemma-3-1b-it"),
        ("gemma-3-270m-pt", "google/gemma-3-270m"),
        ("google/gemma-3-270m", "google/gemma-3-270m"),
        ("gemma-3-270m-it", "google/gemma-3-270m-it"),
        ("gemma-3-1b", "google/gemma-3-1b-pt"),
        ("gemma-2-2b", "google/gemma-2-2b"),
        ("gemma-2-9b-it", "google/gemma-2-9b-it"),
        ("gpt2-small", "openai-community/gpt2"),
        ("gpt2", "openai-community/gpt2"),
        ("pythia-70m-deduped", "eleutherai/pythia-70m-deduped"),
        ("EleutherAI/pythia-70m-deduped", "eleutherai/pythia-70m-deduped"),
        ("meta-llama/Meta-Llama-3.1-8B", "meta-llama/llama-3.1-8b"),
        ("Qwen3-1.7B", "qwen/qwen3-1.7b"),
        ("someone/Their-Model", "someone/their-model"),
        ("their-model", "their-model"),
        ("", ""),
    ],
)
def test_a_model_has_one_spelling(written, canonical):
    assert canonical_model_name(written) == canonical
    assert canonical_model_name(canonical) == canonical


def test_an_organisation_that_is_not_given_is_not_held_against_a_name():
    assert names_same_model("Their-Model", "someone/their-model")
    assert not names_same_model("someone-else/their-model", "someone/their-model")


def test_a_base_model_is_not_its_instruction_tuned_sibling():
    assert not names_same_model("gemma-2-2b", "google/gemma-2-2b-it")
