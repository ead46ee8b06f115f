import random
import time
from email.utils import formatdate

import pytest

from scopeatlas.llm.limits import Pace, TokenBucket, backoff, retry_after


def test_waits_double_and_stay_below_half_a_minute():
    waits = [[backoff(attempt) for _ in range(50)] for attempt in range(1, 12)]
    assert all(0.25 * 2**n <= min(found) and max(found) <= 0.5 * 2**n for n, found in enumerate(waits[:6]))
    assert max(map(max, waits)) <= 30
    assert len(set(waits[0])) > 1


@pytest.mark.parametrize(("value", "low", "high"), [("3", 3, 3.3), ("0.5", 0.5, 0.8), ("-7", 0, 0.3)])
def test_retry_after_in_seconds(value, low, high):
    assert low <= (retry_after({"retry-after": value}) or 0) <= high


def test_retry_after_as_a_date():
    assert 15 <= (retry_after({"retry-after": formatdate(time.time() + 20, usegmt=True)}) or 0) <= 21
    assert (retry_after({"retry-after": formatdate(time.time() - 20, usegmt=True)}) or 0) <= 0.3


@pytest.mark.parametrize("headers", [{}, {"retry-after": ""}, {"retry-after": "soon"}, {"retry-after": "nan"}])
def test_without_a_usable_retry_after_there_is_none(headers):
    assert retry_after(headers) is None


@pytest.mark.parametrize("seed", range(10))
def test_a_bucket_never_lets_more_through_than_the_rate_and_one_burst(seed):
    chance = random.Random(f"{time.time()} {seed}")
    per_minute = chance.choice([6, 60, 5000])
    bucket, now, taken = TokenBucket(per_minute), 0.0, 0.0
    burst = max(per_minute / 6, 1)
    for _ in range(500):
        amount = chance.uniform(0, burst)
        wait = bucket.take(amount, now)
        if wait:
            now += wait * chance.choice([0.5, 1.0, 1.0])
        else:
            taken += amount
        assert taken <= per_minute / 60 * now + burst + 1e-6


def test_a_bucket_that_is_waited_for_lets_through():
    bucket = TokenBucket(60)
    assert [bucket.take(10, 0.0), bucket.take(2, 0.0), bucket.take(2, 2.0)] == [0.0, pytest.approx(2), 0.0]


def test_what_is_larger_than_a_burst_goes_through_and_is_waited_off():
    bucket = TokenBucket(60)
    assert bucket.take(100, 0.0) == 0.0
    assert bucket.take(1, 0.0) == pytest.approx(91)


def test_what_is_given_back_can_be_taken_again():
    bucket = TokenBucket(60)
    bucket.take(10, 0.0)
    bucket.give_back(8)
    assert bucket.take(8, 0.0) == 0.0


def test_pace_halves_for_a_throttled_request_and_grows_by_one_for_as_many_answers():
    pace = Pace(16)
    pace.throttled(sent_at=0.0, now=1.0)
    assert pace.limit == 8
    for _ in range(9):
        pace.answered()
    assert pace.limit == 9


def test_requests_sent_before_a_cut_do_not_cut_again():
    pace = Pace(16)
    for _ in range(5):
        pace.throttled(sent_at=0.0, now=1.0)
    assert pace.limit == 8
    pace.throttled(sent_at=2.0, now=3.0)
    assert pace.limit == 4


def test_pace_stays_between_one_and_the_most():
    pace = Pace(4)
    for time_ in range(20):
        pace.throttled(sent_at=time_, now=time_)
    assert (pace.limit, pace.has_place) == (1, True)
    pace.enter()
    assert not pace.has_place
    for _ in range(1000):
        pace.answered()
    assert pace.limit == 4


def test_a_pause_is_for_everybody_and_the_longest_counts():
    pace = Pace(4)
    pace.pause(until=10.0)
    pace.pause(until=5.0)
    assert (pace.pause_left(4.0), pace.pause_left(11.0)) == (6.0, 0.0)
