from collections import Counter

import pytest

from scopeatlas.errors import RunnerError
from scopeatlas.runner.work import TRIES, Attempts


def test_shards_are_handed_out_once_and_in_order():
    attempts = Attempts(["a", "b"], print)
    assert [attempts.take("here", ["here"]) for _ in range(3)] == [0, 1, None]


def test_a_lost_shard_comes_before_the_others_and_the_log_says_which_and_how(capsys):
    attempts = Attempts(["a", "b"], print)
    attempts.take("here", ["here"])
    attempts.lose(0, "here", "killed by SIGKILL")
    assert attempts.take("here", ["here"]) == 0
    assert "here: the worker was lost (killed by SIGKILL); shard a is tried again" in capsys.readouterr().out


def test_a_lost_shard_is_left_to_another_place_while_there_is_one():
    attempts = Attempts(["a"], print)
    attempts.take("here", ["here", "there"])
    attempts.lose(0, "here", "gone")
    assert attempts.take("here", ["here", "there"]) is None
    assert attempts.take("there", ["here", "there"]) == 0


def test_a_shard_that_was_lost_everywhere_may_go_anywhere():
    attempts = Attempts(["a"], print)
    for place in ("here", "there"):
        assert attempts.take(place, ["here", "there"]) == 0
        attempts.lose(0, place, "gone")
    assert attempts.take("here", ["here", "there"]) == 0


def test_a_shard_is_given_up_after_so_many_losses_by_name():
    attempts = Attempts(["a", "b"], print)
    for _ in range(TRIES - 1):
        attempts.take("here", ["here"])
        attempts.lose(0, "here", "gone")
    attempts.take("here", ["here"])
    with pytest.raises(RunnerError, match=rf"shard a was lost with its worker {TRIES} times, at last on here: exit code 1"):
        attempts.lose(0, "here", "exit code 1")


def test_whatever_is_lost_where_every_shard_ends_or_is_given_up(rng):
    for _ in range(200):
        places = [f"place {n}" for n in range(rng.integers(1, 4))]
        attempts, taken, fragile = Attempts(range(12), lambda _: None), Counter(), rng.random()
        try:
            while attempts.unfinished:
                round_of = {place: attempts.take(place, places) for place in rng.permutation(places)}
                assert any(number is not None for number in round_of.values()), "all workers idle, and shards are left"
                for place, number in round_of.items():
                    if number is None:
                        continue
                    taken[number] += 1
                    if rng.random() < fragile * 0.5:
                        attempts.lose(number, place, "gone")
                    else:
                        attempts.finish()
            assert set(taken) == set(range(12)) and max(taken.values()) <= TRIES
        except RunnerError:
            assert max(taken.values()) == TRIES
