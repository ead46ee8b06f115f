"""Prompts, positions in them and generation, on tiny models in float64."""

import numpy as np
import pytest
import torch

from scopeatlas.errors import ConfigError, SubjectModelError
from scopeatlas.study.edits import Edit, Editor
from scopeatlas.study.generation import generate, read_prompt, token_id
from tests.study.tiny_opened import PROMPT, tiny_opened, tiny_subject

CHAT = [{"role": "user", "content": "Hi"}]


def recomputed(opened, prompt, edits, count: int, *, generated: bool) -> list[int]:
    """Greedy tokens, the whole sequence read anew for each, edited by `edits` over the prompt and, if so, what follows."""
    ids, mask, special = prompt.ids, prompt.is_text, opened.subject.tokenizer.all_special_ids
    for _ in range(count):
        with torch.no_grad(), Editor(opened.dictionary, opened.subject.model, edits).over(mask):
            logits = opened.subject.model(input_ids=torch.from_numpy(ids)[None], use_cache=False).logits[0, -1]
        token = int(logits.argmax())
        ids, mask = np.append(ids, token), np.append(mask, generated and token not in special)
    return ids[len(prompt.ids) :].tolist()


def never_ending(opened):
    """Without tokens that end a text, so that lengths are known."""
    opened.subject.model.generation_config.eos_token_id = None
    opened.subject.tokenizer.eos_token = None
    return opened


@pytest.mark.parametrize("architecture", ["gemma3", "llama", "gpt2", "neox"])
@pytest.mark.parametrize("positions", ["all", "prompt"])
def test_edited_generation_with_kept_keys_and_values_equals_reading_everything_anew(rng, architecture, positions):
    opened = never_ending(tiny_opened(rng, architecture=architecture))
    prompt = read_prompt(opened.subject, PROMPT)
    edits = [Edit(1, "add", 3.0), Edit(2, "scale", -2.0)]
    editor = Editor(opened.dictionary, opened.subject.model, edits)
    _, found = generate(opened.subject, prompt, tokens=8, within=editor.over, positions=positions)
    assert list(found.ids) == recomputed(opened, prompt, edits, 8, generated=positions == "all")
    assert found.text == opened.subject.tokenizer.decode(found.ids)


def test_only_what_is_generated_is_edited_where_that_is_asked_for(rng):
    opened = never_ending(tiny_opened(rng))
    prompt = read_prompt(opened.subject, PROMPT)
    masks = []

    def within(mask):
        masks.append(mask.tolist())
        return Editor(opened.dictionary, opened.subject.model, [Edit(1, "add", 50.0)]).over(mask)

    clean, _ = generate(opened.subject, prompt, tokens=3)
    first, found = generate(opened.subject, prompt, tokens=3, within=within, positions="generated")
    assert torch.equal(first, clean)
    is_text = [token not in opened.subject.tokenizer.all_special_ids for token in found.ids]
    assert masks == [[False] * len(prompt.ids), [is_text[0]], [is_text[1]]]


def test_a_drawn_continuation_depends_on_the_seed_and_a_greedy_one_does_not(rng):
    opened = never_ending(tiny_opened(rng))
    prompt = read_prompt(opened.subject, PROMPT)

    def drawn(temperature: float, seed: int) -> tuple[int, ...]:
        return generate(opened.subject, prompt, tokens=12, temperature=temperature, seed=seed)[1].ids

    assert drawn(5.0, 1) == drawn(5.0, 1) != drawn(5.0, 2)
    assert drawn(0.0, 1) == drawn(0.0, 2)
    assert drawn(1e-310, 1) == drawn(0.0, 1)  # the limit, not a division to infinity
    for temperature, seed in ((-1.0, 0), (float("nan"), 0), (float("inf"), 0), (1.0, -1)):
        with pytest.raises(ConfigError, match="none below 0"):
            drawn(temperature, seed)


def test_generation_ends_with_a_token_that_ends_a_text_which_is_not_part_of_it(rng):
    opened = never_ending(tiny_opened(rng))
    prompt = read_prompt(opened.subject, PROMPT)
    _, whole = generate(opened.subject, prompt, tokens=10)
    opened.subject.model.generation_config.eos_token_id = [299, whole.ids[4]]
    _, ended = generate(opened.subject, prompt, tokens=10)
    assert ended.ids == whole.ids[: whole.ids.index(whole.ids[4])]


def test_nothing_is_generated_beyond_the_next_token_where_nothing_is_asked_for(rng):
    from scopeatlas.subject.capture import counting_passes

    opened = tiny_opened(rng)
    prompt = read_prompt(opened.subject, PROMPT)
    with counting_passes() as count:
        logits, continuation = generate(opened.subject, prompt, tokens=0)
    assert (count.passes, count.tokens, continuation.ids, continuation.text) == (1, len(prompt.ids), (), "")
    expected = opened.subject.model(input_ids=torch.from_numpy(prompt.ids)[None]).logits[0, -1]
    assert torch.allclose(logits, expected)


def test_a_plain_prompt_has_bos_in_front_which_is_no_position_and_never_edited(rng):
    subject = tiny_subject(rng)
    prompt = read_prompt(subject, "River <s>")
    bos = subject.tokenizer.bos_token_id
    assert prompt.ids[0] == bos and (prompt.ids[1:] != bos).all()  # a spelled BOS is text
    assert "".join(prompt.tokens) == "River <s>" and prompt.is_text.tolist() == [False] + [True] * 9
    assert np.flatnonzero(prompt.edited([0, -1, 2])).tolist() == [1, 3, 9]
    assert np.flatnonzero(prompt.edited("last")).tolist() == [9] and not prompt.edited("generated").any()
    assert prompt.until(2).tokens == ("R", "i", "v") and prompt.until(-1).ids.tolist() == prompt.ids.tolist()
    for asked in (prompt.edited, lambda positions: prompt.until(positions[0])):
        with pytest.raises(ConfigError, match="no position 9 in a prompt of 9 tokens"):
            asked([9])
        for wrong in (1.5, True, "2"):
            with pytest.raises(ConfigError, match="a position is a whole number"):
                asked([wrong])
        asked([np.int64(2)])
    with pytest.raises(ConfigError, match="no positions are called 'first'"):
        prompt.edited("first")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="no text"):
        read_prompt(subject, "")


def test_a_conversation_ends_where_the_models_turn_begins_and_its_template_is_not_edited(rng):
    subject = tiny_subject(rng)
    prompt = read_prompt(subject, CHAT)
    assert subject.tokenizer.decode(prompt.ids) == "<s><|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert [token for token, text in zip(prompt.tokens, prompt.is_text[prompt.first :], strict=True) if text] == ["H", "i"]
    assert (prompt.edited("all") == prompt.is_text).all() and prompt.edited("last").sum() == 1
    with pytest.raises(ConfigError, match="is no text"):
        prompt.edited([0])
    subject.tokenizer.chat_template = None
    with pytest.raises(SubjectModelError, match="no chat template"):
        read_prompt(subject, CHAT)


@pytest.mark.parametrize(
    "prompt", [[], ["a", "b"], [{"content": "x"}], {"role": "user", "content": "x"}, [{"role": "user", "content": 3}], 7]
)
def test_what_is_neither_a_text_nor_a_conversation_is_refused(rng, prompt):
    with pytest.raises(ConfigError, match="a conversation is turns like"):
        read_prompt(tiny_subject(rng), prompt)


def test_half_a_character_is_read_as_a_question_mark(rng):
    subject = tiny_subject(rng)
    assert read_prompt(subject, "a\udcff b").tokens == tuple("a? b")
    assert "?" in read_prompt(subject, [{"role": "user", "content": "a\udcff b"}]).tokens


def test_the_first_token_of_a_model_without_bos_is_not_edited(rng):
    subject = tiny_subject(rng)
    subject.tokenizer.bos_token = None
    prompt = read_prompt(subject, "River")
    assert prompt.tokens == tuple("River") and prompt.is_text.tolist() == [False, True, True, True, True]


def test_a_token_is_named_by_its_text_or_its_id(rng):
    subject = tiny_subject(rng)
    assert token_id(subject, "R") == subject.tokenizer.convert_tokens_to_ids("R") and token_id(subject, 7) == 7
    with pytest.raises(ConfigError, match=r"not one token .* \['R', 'i'\]"):
        token_id(subject, "Ri")
    with pytest.raises(ConfigError, match="no token 300"):
        token_id(subject, 300)
    assert token_id(subject, np.int64(7)) == 7
    for wrong in (True, 7.0, None):
        with pytest.raises(ConfigError, match="a token is a whole number"):
            token_id(subject, wrong)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="is no text"):
        token_id(subject, "\udcff")
