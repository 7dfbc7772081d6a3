from __future__ import annotations

import pytest

from system.tools.breaker import BreakerState, CircuitBreaker


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def breaker(clock: Clock) -> CircuitBreaker:
    return CircuitBreaker(threshold=3, pause_s=1.0, max_pause_s=3.0, clock=clock)


def open_up(breaker: CircuitBreaker) -> None:
    for _ in range(3):
        assert breaker.allow()
        breaker.failure()


def test_opens_after_failures_in_a_row(breaker: CircuitBreaker) -> None:
    breaker.failure()
    breaker.failure()
    breaker.success()
    breaker.failure()
    breaker.failure()
    assert breaker.state is BreakerState.CLOSED
    breaker.failure()
    assert breaker.state is BreakerState.OPEN
    assert not breaker.allow()


def test_one_call_tries_after_the_pause(breaker: CircuitBreaker, clock: Clock) -> None:
    open_up(breaker)
    clock.now = 0.99
    assert not breaker.allow()
    clock.now = 1.0
    assert breaker.allow()
    assert breaker.state is BreakerState.HALF_OPEN
    assert not breaker.allow()
    breaker.success()
    assert breaker.state is BreakerState.CLOSED
    assert breaker.allow()


def test_pauses_double_up_to_the_longest_and_start_over_after_success(
    breaker: CircuitBreaker, clock: Clock
) -> None:
    open_up(breaker)
    for pause in (1.0, 2.0, 3.0, 3.0):
        clock.now += pause - 0.01
        assert not breaker.allow()
        clock.now += 0.01
        assert breaker.allow()
        breaker.failure()
    clock.now += 3.0
    assert breaker.allow()
    breaker.success()
    open_up(breaker)
    clock.now += 1.0
    assert breaker.allow()


def test_a_try_that_is_cancelled_lets_another_try(breaker: CircuitBreaker, clock: Clock) -> None:
    open_up(breaker)
    clock.now = 1.0
    assert breaker.allow()
    breaker.abandon()
    assert breaker.state is BreakerState.OPEN
    assert breaker.allow()


def test_late_failures_do_not_prolong_the_pause(breaker: CircuitBreaker, clock: Clock) -> None:
    open_up(breaker)
    clock.now = 0.9
    breaker.failure()  # of a call that was let in before it opened
    clock.now = 1.0
    assert breaker.allow()
