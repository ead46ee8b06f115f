"""The kills bench, small: everything that it claims of 2,000 features must hold of 60 too."""

import pytest

from bench import kills


@pytest.mark.slow
def test_what_is_paid_for_survives_every_kill_also_where_the_server_lies_low(tmp_path, smollm2, monkeypatch):
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    run = kills.bench(60, 1, "usage_low", tmp_path, kill_after=(0.2, 0.5), tokenizer=smollm2)
    assert [claim.text for claim in kills.claims(run) if not claim.holds] == []
    assert sum(life.killed for life in run.lives) >= 3
    assert any(life.in_flight for life in run.lives)
