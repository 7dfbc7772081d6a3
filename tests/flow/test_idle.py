from __future__ import annotations

from contextlib import AbstractContextManager

import pytest
from hypothesis import given
from hypothesis import strategies as st

from system.flow.idle import BUSY, IdleClock


class Watch:
    """An idle clock whose time is told to it: intervals begin and end at given seconds."""

    def __init__(self) -> None:
        self.now = 0.0
        self.clock = IdleClock(lambda: self.now)
        self.open: dict[tuple[str, str], list[AbstractContextManager[None]]] = {}

    def enter(self, actor: str, cause: str, now: float) -> None:
        self.now = now
        waiting = self.clock.during(actor, cause)
        waiting.__enter__()
        self.open.setdefault((actor, cause), []).append(waiting)

    def leave(self, actor: str, cause: str, now: float) -> None:
        self.now = now
        self.open[actor, cause].pop().__exit__(None, None, None)

    def idle(self, now: float) -> dict[str, dict[str, float]]:
        self.now = now
        return self.clock.idle()


def test_overlapping_waits_share_the_wall_time() -> None:
    clock = Watch()
    clock.enter("learner", "batch", 0.0)
    clock.enter("learner", "weights", 4.0)
    clock.leave("learner", "batch", 6.0)
    clock.leave("learner", "weights", 10.0)
    clock.enter("learner", "batch", 15.0)  # 5 s of nothing
    assert clock.idle(16.0) == {"learner": {"batch": 4 + 1 + 1, "weights": 1 + 4}}


def test_many_waits_for_one_cause_are_one_idle_time() -> None:
    clock = Watch()
    for _ in range(3):
        clock.enter("rollout", "search", 0.0)
    clock.leave("rollout", "search", 1.0)
    assert clock.idle(2.0)["rollout"] == {"search": 2.0}


def test_a_busy_actor_is_not_idle_however_much_it_waits() -> None:
    clock = Watch()
    clock.enter("rollout", "search", 0.0)
    clock.enter("rollout", BUSY, 1.0)
    clock.leave("rollout", BUSY, 3.0)
    clock.enter("engine", "queue", 3.0)
    assert clock.idle(4.0) == {"rollout": {"search": 2.0, BUSY: 2.0}, "engine": {"queue": 1.0}}


def test_time_does_not_run_backwards() -> None:
    clock = Watch()
    clock.enter("learner", "batch", 5.0)
    with pytest.raises(ValueError, match="backwards"):
        clock.leave("learner", "batch", 4.0)


@given(
    st.lists(
        st.tuples(st.sampled_from(["a", "b", BUSY]), st.integers(0, 50), st.integers(1, 20)),
        min_size=1,
        max_size=12,
    )
)
def test_time_adds_up_second_by_second(waits: list[tuple[str, int, int]]) -> None:
    """Against counting whole seconds: each goes to BUSY, or in equal parts to what was waited for."""
    moves = [(begin, True, cause) for cause, begin, _ in waits]
    moves += [(begin + length, False, cause) for cause, begin, length in waits]
    clock = Watch()
    for now, entering, cause in sorted(moves, key=lambda m: (m[0], not m[1])):
        (clock.enter if entering else clock.leave)("actor", cause, float(now))
    expected: dict[str, float] = {}
    for second in range(80):
        open_ = {cause for cause, begin, length in waits if begin <= second < begin + length}
        blamed = [BUSY] if BUSY in open_ else sorted(open_)
        for cause in blamed:
            expected[cause] = expected.get(cause, 0.0) + 1 / len(blamed)
    spent = {cause: seconds for cause, seconds in clock.idle(80.0)["actor"].items() if seconds}
    assert spent == pytest.approx(expected)
