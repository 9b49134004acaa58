"""Retries behind one door: this module owns tenacity, nobody else imports it. *Shell.*

``retry`` repeats one awaitable call with exponential backoff and full jitter: the n-th wait is
drawn uniformly from [0, min(wait_s_max, wait_s_initial × 2^(n-1))], so that many callers that
failed together do not come back together. Both the number of attempts and the total time are
bounded unless the caller says ``UNBOUNDED`` (a worker that stays registered does, and nobody
else); the exceptions worth repeating must be named by the caller, because repeating a refusal is a
storm. Only RPCs are retried, never a collective: a second collective on some
participants is how a mesh desynchronises.

``no_waiting()`` removes the waits and caps the attempts, so that tests see every retry and sleep
never.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Awaitable, Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Final, TypeVar

import tenacity as _tenacity

Result = TypeVar("Result")

ATTEMPTS_MAX = 8
TOTAL_S_MAX = 30.0
WAIT_S_INITIAL = 0.05
UNBOUNDED: Final = math.inf
"""As ``attempts`` and ``total_s``: this call is repeated until it succeeds or is cancelled."""
WAIT_S_MAX = 5.0


@dataclass(frozen=True, slots=True)
class RetryDetails:
    """What a hook is told before each wait."""

    name: str
    attempt: int
    """The attempt that failed; the first is 1."""
    wait_s: float
    waited_s: float
    """Time since the first attempt began, waits included."""
    caused_by: BaseException


RetryHook = Callable[[RetryDetails], None]

_testing_attempts: ContextVar[int | None] = ContextVar("stagemesh_backoff_testing", default=None)


@contextlib.contextmanager
def no_waiting(*, attempts: int = 2) -> Iterator[None]:
    """No waits, and at most ``attempts`` attempts, inside the ``with`` block (and tasks begun in
    it)."""
    token = _testing_attempts.set(attempts)
    try:
        yield
    finally:
        _testing_attempts.reset(token)


def _attempted(attempts: float) -> _tenacity.stop.stop_base:
    if attempts == UNBOUNDED:
        return _tenacity.stop_never
    return _tenacity.stop_after_attempt(int(attempts))


async def retry(
    call: Callable[[], Awaitable[Result]],
    *,
    on: type[Exception] | tuple[type[Exception], ...],
    name: str,
    attempts: float = ATTEMPTS_MAX,
    total_s: float = TOTAL_S_MAX,
    wait_s_initial: float = WAIT_S_INITIAL,
    wait_s_max: float = WAIT_S_MAX,
    hook: RetryHook | None = None,
) -> Result:
    """Await ``call()`` until it succeeds, raises something not in ``on``, or a bound is reached.

    The last exception is raised unchanged. ``total_s`` bounds waiting, not a call that hangs: give
    the call its own deadline.
    """
    capped = _testing_attempts.get()
    wait: _tenacity.wait.wait_base = _tenacity.wait_random_exponential(
        multiplier=wait_s_initial, max=wait_s_max
    )
    if capped is not None:
        attempts, wait = min(attempts, capped), _tenacity.wait_none()

    def before_sleep(state: _tenacity.RetryCallState) -> None:
        if hook is None or state.outcome is None or state.next_action is None:
            return
        cause = state.outcome.exception()
        if cause is None:
            return
        waited_s = state.seconds_since_start or 0.0
        hook(RetryDetails(name, state.attempt_number, state.next_action.sleep, waited_s, cause))

    retrying = _tenacity.AsyncRetrying(
        retry=_tenacity.retry_if_exception_type(on),
        stop=_tenacity.stop_any(_attempted(attempts), _tenacity.stop_before_delay(total_s)),
        wait=wait,
        before_sleep=before_sleep,
        reraise=True,
    )

    async def attempt() -> Result:
        return await call()  # tenacity looks at the function: a lambda would not be awaited

    return await retrying(attempt)
