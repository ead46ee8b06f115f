from dataclasses import replace

import numpy as np
import torch

from scopeatlas.dictionaries.releases import open_dictionary
from scopeatlas.mining import promoted
from scopeatlas.mining.promoted import TOKENS, promoted_tokens


def logit_effects(rows: torch.Tensor, subject, at: torch.Tensor) -> torch.Tensor:
    """How the logits move when a row is added to the final residual `at`, the norm's scale held: [F, vocabulary]."""
    norm, head = subject.model.model.norm, subject.model.lm_head

    def size(x):
        return x.square().mean(-1, keepdim=True).sqrt()

    with torch.no_grad():
        return head(norm(at + rows) * size(at + rows) / size(at)) - head(norm(at))


def readable(token: str, subject) -> bool:
    return not token.startswith("<unused") and token not in subject.tokenizer.all_special_tokens


def test_promoted_and_suppressed_tokens_are_those_whose_logits_move_most(small, subject):
    dictionary = open_dictionary(small.entry)
    found = promoted_tokens(dictionary, subject)
    at = torch.randn(640) * 50
    effects = logit_effects(dictionary.w_dec[:8] * 5, subject, at).double()
    strings = subject.tokenizer.convert_ids_to_tokens(list(range(len(subject.tokenizer))))
    allowed = torch.tensor([i for i, s in enumerate(strings) if readable(s, subject)])
    for feature in range(8):
        effect = effects[feature]
        for ids, sign in ((found.promoted[feature], 1), (found.suppressed[feature], -1)):
            cutoff = (sign * effect[allowed]).topk(TOKENS).values[-1]
            assert (sign * effect[ids] >= cutoff - 0.02 * cutoff.abs()).all()
            assert (np.diff(sign * effect[ids].numpy()) <= 0.02 * float(cutoff.abs())).all()
        z = (effect[found.promoted[feature]] - effect.mean()) / effect.std()
        assert np.allclose(found.strength[feature], z.numpy(), rtol=0.02)


def test_special_and_unused_tokens_are_never_promoted(small, subject):
    found = promoted_tokens(open_dictionary(small.entry), subject)
    shown = subject.tokenizer.convert_ids_to_tokens(np.unique(np.r_[found.promoted, found.suppressed]).tolist())
    assert all(readable(token, subject) for token in shown)


def test_the_row_of_a_token_promotes_that_token(small, subject):
    dictionary = open_dictionary(small.entry)
    gain = 1 + subject.model.model.norm.weight
    ids = subject.tokenizer.convert_tokens_to_ids(["▁January", "▁water", "▁Paris"])
    rows = subject.model.lm_head.weight[ids] / gain
    planted = replace(dictionary, w_dec=torch.cat([torch.nn.functional.normalize(rows, dim=1), dictionary.w_dec[3:]]))
    assert promoted_tokens(planted, subject).promoted[:3, 0].tolist() == ids


def test_feature_tiles_change_nothing(small, subject, monkeypatch):
    dictionary = open_dictionary(small.entry)
    whole = promoted_tokens(dictionary, subject)
    monkeypatch.setattr(promoted, "TILE_FEATURES", 37)
    tiled = promoted_tokens(dictionary, subject)
    assert (whole.promoted == tiled.promoted).mean() > 0.999 and np.allclose(whole.strength, tiled.strength, rtol=1e-4)


def test_a_dictionary_that_does_not_write_to_the_residual_stream_promotes_nothing(small, subject):
    dictionary = open_dictionary(small.entry)
    narrow = replace(dictionary, w_dec=torch.randn(dictionary.width, 1024), b_dec=torch.zeros(1024))
    assert promoted_tokens(narrow, subject) is None
