"""A poll of the Hub: what is wanted, whole and settled, from a server that speaks the Hub's endpoints."""

import json
import time
from types import SimpleNamespace

import pytest

from scopeatlas.dictionaries.watching import PollResult, WatchRule, poll
from scopeatlas.errors import ConfigError
from tests.hub_server import sae_files

REPO = "google/gemma-scope-2-270m-pt"
RULE = WatchRule("google", "gemma-scope-2-*")
RESIDUAL, OTHER = "resid_post/layer_12_width_16k_l0_medium", "attn_out_all/layer_3_width_262k_l0_small"
CLT = "clt/width_262k_l0_medium"


@pytest.fixture
def waits(monkeypatch) -> list[float]:
    """How long the library wanted to wait between its retries; it is not made to."""
    waited: list[float] = []
    monkeypatch.setattr("huggingface_hub.utils._http.time", SimpleNamespace(sleep=waited.append, time=time.time))
    return waited


def states(result: PollResult) -> dict[str, str]:
    return {sae.path: sae.state for sae in result.seen}


def polls(count: int, rules=(RULE,), state=None, **limits) -> list[PollResult]:
    """Results of polls one after the other, the state carried over as JSON."""
    results, state = [], state or {}
    for _ in range(count):
        results.append(poll(rules, state, **limits))
        state = json.loads(json.dumps(results[-1].state))
    return results


def test_an_sae_settles_for_one_poll_is_ready_once_and_then_costs_one_list_call(hub, rng):
    sha = hub.commit(REPO, sae_files(rng, RESIDUAL))
    first, second = polls(2)
    assert states(first) == {RESIDUAL: "settling"}
    assert states(second) == {RESIDUAL: "ready"}
    (sae,) = second.ready
    assert (sae.repo, sae.sha, sae.release) == (REPO, sha, "gemma-scope-2-270m-pt")
    assert (sae.facts.kind, sae.facts.site, sae.facts.layers, sae.facts.width) == ("sae", "resid_post", (12,), 16384)
    hub.requests.clear()
    assert polls(3, state=second.state)[-1].seen == []
    assert hub.requests == {"GET /api/models": 3}


def test_what_is_seen_are_the_sizes_and_hashes_of_exactly_the_saes_own_files(hub, rng):
    files = sae_files(rng, RESIDUAL)
    hub.commit(REPO, files)
    (sae,) = polls(1)[0].seen
    assert sae.digests.keys() == {f"{RESIDUAL}/params.safetensors", f"{RESIDUAL}/config.json"}
    assert sae.bytes == sum(len(files[name]) for name in sae.digests)
    assert {len(digest) for _, digest in sae.digests.values()} == {64, 40}


def test_a_push_in_many_commits_is_ready_only_when_whole_and_the_same_over_two_polls(hub, rng):
    shards = {f"{CLT}/config.json": b"{}"} | {f"{CLT}/params_layer_{i}.safetensors": rng.bytes(100) for i in range(18)}
    names, state, history = list(shards), {}, []
    for start in range(0, 19, 6):
        hub.commit(REPO, {name: shards[name] for name in names[start : start + 6]})
        (result,) = polls(1, state=state)
        history.append(states(result)[CLT])
        state = result.state
    assert history == ["incomplete", "incomplete", "incomplete", "settling"]
    assert states(poll([RULE], state)) == {CLT: "ready"}


def test_what_an_incomplete_sae_lacks_is_named_however_long_it_stays_so(hub, rng):
    hub.commit(REPO, {f"{CLT}/params_layer_{i}.safetensors": rng.bytes(100) for i in range(18) if i != 7})
    for result in polls(2):
        assert states(result) == {CLT: "incomplete"}
        assert "params_layer_7.safetensors" in result.seen[0].reason


def test_an_empty_shard_is_a_missing_one(hub, rng):
    hub.commit(REPO, {f"{CLT}/params_layer_{i}.safetensors": rng.bytes(100) if i else b"" for i in range(18)})
    assert "params_layer_0.safetensors" in polls(2)[-1].seen[0].reason


def test_a_repo_that_changes_between_polls_is_never_ready(hub, rng):
    results, state = [], {}
    for _ in range(4):
        hub.commit(REPO, sae_files(rng, RESIDUAL))
        results += polls(1, state=state)
        state = results[-1].state
    assert [states(result) for result in results] == [{RESIDUAL: "settling"}] * 4


def test_a_commit_of_the_readme_makes_nothing_new(hub, rng):
    hub.commit(REPO, sae_files(rng, RESIDUAL))
    before = polls(2)[-1]
    hub.commit(REPO, {"README.md": rng.bytes(50)})
    assert [states(result) for result in polls(3, state=before.state)] == [{}, {}, {}]


def test_other_bytes_under_the_same_name_are_another_sae(hub, rng):
    hub.commit(REPO, sae_files(rng, RESIDUAL, OTHER))
    before = polls(2)[-1]
    hub.commit(REPO, {f"{RESIDUAL}/params.safetensors": rng.bytes(4000)})
    settling, ready = polls(2, state=before.state)
    assert (states(settling), states(ready)) == ({RESIDUAL: "settling"}, {RESIDUAL: "ready"})
    assert ready.seen[0].identity != next(sae for sae in before.seen if sae.path == RESIDUAL).identity


@pytest.mark.parametrize(
    ("wish", "expected"),
    [
        ({"paths": ("resid_post/*",)}, "seen"),
        ({"kinds": ("transcoder",)}, "seen"),
        ({"sites": ("resid_post",)}, "seen"),
        ({"widths": ("16k", 65536)}, "seen"),
        ({"models": ("gemma-3-1b*",)}, "other_model"),
        ({"max_bytes": 1000}, "too_large"),
        ({"sites": ("attn_out",), "widths": ("262k",), "models": ("*270m*",), "max_bytes": 9000}, "ready"),
        ({"widths": (262144,), "models": ("google/gemma-3-270m",), "paths": ("attn*",), "kinds": ("sae",)}, "ready"),
    ],
)
def test_a_rule_wants_what_it_says_and_the_rest_is_seen_with_the_reason(hub, rng, wish, expected):
    hub.commit(REPO, sae_files(rng, OTHER))
    (sae,) = polls(2, [WatchRule("google", **wish)])[-1].seen
    assert sae.state == expected
    assert bool(sae.reason) == (expected != "ready")


def test_repos_that_no_rule_names_are_not_asked_about(hub, rng):
    for repo in ("google/gemma-3-270m", "google/gemma-scope-2b-pt-res", "other/gemma-scope-2-270m-pt"):
        hub.commit(repo, sae_files(rng, RESIDUAL))
    assert polls(2)[-1].seen == []
    assert hub.requests == {"GET /api/models": 2}


def test_what_one_of_two_rules_wants_is_wanted(hub, rng):
    hub.commit(REPO, sae_files(rng, RESIDUAL, OTHER))
    rules = [WatchRule("google", sites=("resid_post",)), WatchRule("google", sites=("mlp_out",))]
    assert states(polls(2, rules)[-1]) == {RESIDUAL: "ready", OTHER: "seen"}


def test_a_wider_rule_finds_more_in_a_repo_that_has_not_changed(hub, rng):
    hub.commit(REPO, sae_files(rng, RESIDUAL, OTHER))
    before = polls(2, [WatchRule("google", sites=("resid_post",))])[-1]
    assert states(poll([RULE], before.state)) == {OTHER: "ready"}


def test_a_poll_lists_at_most_so_many_repos_and_the_rest_have_their_turn(hub, rng):
    repos = [f"google/gemma-scope-2-{size}-pt" for size in ("1b", "270m", "4b", "12b", "27b")]
    for repo in repos:
        hub.commit(repo, sae_files(rng, RESIDUAL))
    hub.fail(403, times=10**6, ending=f"{min(repos)}/tree/{hub.heads()[min(repos)].sha}")  # the first is always due
    results = polls(12, max_repos=1)
    assert all(len({sae.repo for sae in result.seen}) <= 1 for result in results)
    assert len(results[0].waiting) == 4
    assert sorted(sae.repo for result in results for sae in result.ready) == sorted(set(repos) - {min(repos)})


def test_a_repo_that_cannot_be_read_has_one_line_and_keeps_its_state(hub, rng):
    hub.commit(REPO, sae_files(rng, RESIDUAL))
    before = polls(1)[-1]
    hub.fail(403, ending=f"{REPO}/tree/{before.state['repos'][REPO]['sha']}")
    failed, after = polls(2, state=before.state)
    assert list(failed.errors) == [REPO] and "403" in failed.errors[REPO] and "\n" not in failed.errors[REPO]
    assert failed.state["repos"] == before.state["repos"]
    assert states(after) == {RESIDUAL: "ready"}


def test_an_unreachable_hub_has_one_line_and_keeps_the_state(hub, rng, waits):
    hub.commit(REPO, sae_files(rng, RESIDUAL))
    before = polls(2)[-1]
    hub.close()
    result = poll([RULE, WatchRule("other")], before.state)
    assert list(result.errors) == ["google/gemma-scope-2-*"]  # the other author's is not waited for as well
    assert (
        "cannot be reached" in result.errors["google/gemma-scope-2-*"]
        and "HF_ENDPOINT" in result.errors["google/gemma-scope-2-*"]
    )
    assert result.state == before.state and result.gone_repos == []


def test_a_rate_limit_is_waited_for_as_long_as_it_asks(hub, rng, waits):
    hub.commit(REPO, sae_files(rng, RESIDUAL))
    hub.fail(429, times=2, retry_after=5)
    result = poll([RULE], {})
    assert states(result) == {RESIDUAL: "settling"}
    assert waits == [6, 6]  # the library adds one second


def test_a_rate_limit_that_asks_for_too_long_ends_the_poll_with_the_number(hub, rng, waits):
    hub.commit(REPO, sae_files(rng, RESIDUAL))
    hub.fail(429, times=6, retry_after=3600)
    result = poll([RULE], {})
    assert "3600 s" in result.errors["google/gemma-scope-2-*"]
    assert waits == []
    assert hub.requests.total() == 1


def test_an_answer_that_never_comes_ends_the_poll(hub, rng, waits, monkeypatch):
    monkeypatch.setattr("scopeatlas.dictionaries.hub._TIMEOUT_S", 0.1)
    hub.commit(REPO, sae_files(rng, RESIDUAL))
    hub.stall(times=6)
    assert "cannot be reached" in poll([RULE], {}).errors["google/gemma-scope-2-*"]


def test_a_repo_gone_from_the_hub_is_told_once(hub, rng):
    hub.commit(REPO, sae_files(rng, RESIDUAL))
    before = polls(2)[-1]
    hub.remove(REPO)
    gone, after = polls(2, state=before.state)
    assert (gone.gone_repos, after.gone_repos) == ([REPO], [])


def test_an_sae_deleted_from_its_repo_is_told(hub, rng):
    hub.commit(REPO, sae_files(rng, RESIDUAL, OTHER))
    before = polls(2)[-1]
    hub.commit(REPO, {name: None for name in sae_files(rng, OTHER)})
    gone, after = polls(2, state=before.state)
    assert (gone.gone_saes, after.gone_saes) == ([(REPO, OTHER)], [])


def test_a_rule_without_an_author_or_with_a_width_that_is_none_is_refused():
    with pytest.raises(ConfigError, match="author"):
        WatchRule("")
    with pytest.raises(ConfigError, match="'wide'.*16k"):
        WatchRule("google", widths=("16k", "wide"))
