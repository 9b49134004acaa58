"""Retries: bounded twice, jittered, and only what is named."""

import pytest

from coordinator.backoff import UNBOUNDED, RetryDetails, no_waiting, retry


class Flaky:
    """Fails ``failures`` times with ``error``, then answers."""

    def __init__(self, failures, error=ConnectionError):
        self.failures, self.error, self.calls = failures, error, 0

    async def __call__(self):
        self.calls += 1
        if self.calls <= self.failures:
            raise self.error(f"attempt {self.calls}")
        return "answer"


async def test_a_call_is_repeated_until_it_succeeds():
    call = Flaky(2)
    with no_waiting(attempts=5):
        assert await retry(call, on=ConnectionError, name="call") == "answer"
    assert call.calls == 3


async def test_attempts_are_bounded_and_the_last_error_comes_out_unchanged():
    call = Flaky(99)
    with no_waiting(attempts=3), pytest.raises(ConnectionError, match="attempt 3"):
        await retry(call, on=ConnectionError, name="call")
    assert call.calls == 3


async def test_an_error_that_was_not_named_is_not_repeated():
    call = Flaky(1, ValueError)
    with no_waiting(attempts=5), pytest.raises(ValueError, match="attempt 1"):
        await retry(call, on=(ConnectionError, TimeoutError), name="call")
    assert call.calls == 1


async def test_total_time_is_bounded_whatever_the_attempts():
    call = Flaky(99)
    with pytest.raises(ConnectionError):
        await retry(
            call,
            on=ConnectionError,
            name="call",
            attempts=10_000,
            total_s=0.02,
            wait_s_initial=0.01,
            wait_s_max=0.01,
        )
    assert call.calls < 100


async def test_a_hook_hears_of_every_wait_with_its_cause():
    heard: list[RetryDetails] = []
    with no_waiting(attempts=3):
        await retry(Flaky(2), on=ConnectionError, name="dial", hook=heard.append)
    assert [(one.name, one.attempt, str(one.caused_by)) for one in heard] == [
        ("dial", 1, "attempt 1"),
        ("dial", 2, "attempt 2"),
    ]


async def test_waits_are_drawn_from_all_of_a_doubling_bound():
    """Full jitter: of many callers that failed together, each waits another part of the bound."""
    bounds = [0.0005, 0.001, 0.002, 0.002]
    shares: list[list[float]] = []
    for _ in range(24):
        heard: list[RetryDetails] = []
        with pytest.raises(ConnectionError):
            await retry(
                Flaky(99),
                on=ConnectionError,
                name="dial",
                attempts=5,
                wait_s_initial=0.0005,
                wait_s_max=0.002,
                hook=heard.append,
            )
        shares.append([one.wait_s / bound for one, bound in zip(heard, bounds, strict=True)])
    for of_wait in zip(*shares, strict=True):
        assert 0 <= min(of_wait) < 0.4, "P = 0.6^24 otherwise"
        assert 0.6 < max(of_wait) <= 1
        assert len(set(of_wait)) > 20


async def test_a_caller_may_ask_for_no_bound_and_says_so():
    call = Flaky(60)
    answer = await retry(
        call,
        on=ConnectionError,
        name="register",
        attempts=UNBOUNDED,
        total_s=UNBOUNDED,
        wait_s_initial=0.0,
    )
    assert (answer, call.calls) == ("answer", 61)
