"""Each behaviour of the service around a tool, against a scripted tool, in virtual time."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import json
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from system.config import Config, ToolsConfig
from system.foreign import LET_GO_S
from system.observe.jsonl import JsonlWriter
from system.observe.recorder import Recorder
from system.observe.rundir import RunDir
from system.tools.http_tools import PythonTool, SearchTool
from system.tools.outcome import CallContext, ToolOutcome, ToolSpec, ToolStatus
from system.tools.service import Patience, ToolService, ToolStartError, build_tools
from system.tools.tool import CallRefused, ToolUnavailable
from system.twin.clock import run

FAST = Patience(backoff_s=0.02, breaker_pause_s=0.1)
ANY = CallContext()
Step = Callable[[Mapping[str, Any]], Awaitable[str]]


class Scripted:
    """A tool whose every run is a function of the arguments; counts runs and how many are under way."""

    def __init__(self, step: Step, *, pure: bool = False, name: str = "scripted"):
        self.spec = ToolSpec(
            name,
            "",
            {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]},
            "x",
            pure,
        )
        self.step = step
        self.runs = self.now = self.most = self.cancelled = 0
        self.contexts: list[CallContext] = []

    async def run(self, arguments: Mapping[str, Any], context: CallContext) -> ToolOutcome:
        self.runs += 1
        self.now += 1
        self.most = max(self.most, self.now)
        self.contexts.append(context)
        try:
            return ToolOutcome(ToolStatus.OK, await self.step(arguments))
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.now -= 1

    async def check(self) -> None:
        return None


def sleeping(seconds: float) -> Step:
    async def step(arguments: Mapping[str, Any]) -> str:
        await asyncio.sleep(seconds)
        return f"answer {arguments['x']}"

    return step


def stubborn(seconds: float) -> Step:
    """Sleeps on when it is cancelled, and then fails."""

    async def step(arguments: Mapping[str, Any]) -> str:
        until = now() + seconds
        while now() < until:
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.sleep(until - now())
        raise ValueError("nobody hears this")

    return step


def failing(times: int, *, retryable: bool = True, delivered: bool = False) -> Step:
    """Unavailable ``times`` times, then fine."""
    left = times

    async def step(arguments: Mapping[str, Any]) -> str:
        nonlocal left
        if left > 0:
            left -= 1
            raise ToolUnavailable("down", retryable=retryable, delivered=delivered)
        return "fine"

    return step


def service(tool: Scripted, **changes: Any) -> ToolService:
    """``changes``: of settings and of what is not one."""
    patience = replace(FAST, **{name: changes.pop(name) for name in [*changes] if hasattr(FAST, name)})
    return ToolService([tool], ToolsConfig(**{"deadline_s": 2.0, **changes}), patience=patience, clock=now)


def now() -> float:
    return asyncio.get_running_loop().time()


def virtual(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """``test`` on a clock that jumps: deadlines are exact, whatever else the machine does."""

    @functools.wraps(test)
    def play(*args: Any, **kwargs: Any) -> None:
        run(test(*args, **kwargs))

    return play


async def call(tools: ToolService, x: Any = 0, context: CallContext = ANY) -> ToolOutcome:
    return await tools.call("scripted", {"x": x}, context)


# --- calls and their outcomes ------------------------------------------------------------------------------


@virtual
async def test_a_call() -> None:
    tools = service(Scripted(sleeping(0.05)))
    outcome = await call(tools, 7)
    assert (outcome.status, outcome.text, outcome.attempts) == (ToolStatus.OK, "answer 7", 1)
    assert outcome.latency_s == pytest.approx(0.05)


@virtual
async def test_malformed_calls_are_rejected_without_a_run() -> None:
    tool = Scripted(sleeping(0))
    tools = service(tool)
    unknown = await tools.call("serch", {}, ANY)
    assert unknown.status is ToolStatus.REJECTED
    assert "serch" in unknown.text
    assert "scripted" in unknown.text
    assert (await call(tools, "one")).status is ToolStatus.REJECTED
    missing = await tools.call("scripted", {}, ANY)
    assert (missing.status, missing.text) == (
        ToolStatus.REJECTED,
        "scripted: 'x' is a required property.",
    )
    assert tool.runs == 0


@virtual
async def test_an_exception_in_a_tool_is_an_outcome() -> None:
    async def broken(arguments: Mapping[str, Any]) -> str:
        raise ZeroDivisionError("oh")

    tool = Scripted(broken)
    outcome = await call(service(tool))
    assert outcome.status is ToolStatus.ERROR
    assert "ZeroDivisionError: oh" in outcome.text
    assert "Traceback" in outcome.detail
    assert tool.runs == 1


# --- deadline ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pure", [False, True])
@virtual
async def test_deadline_of_the_tool_and_of_the_call(pure: bool) -> None:
    tool = Scripted(sleeping(60), pure=pure)
    tools = service(tool, deadline_s=0.2)
    outcome = await call(tools)
    assert outcome.status is ToolStatus.TIMEOUT
    assert "0.2 s" in outcome.text
    outcome = await call(tools, 1, CallContext(deadline_s=0.05))
    assert outcome.status is ToolStatus.TIMEOUT
    assert now() == pytest.approx(0.25)
    await asyncio.sleep(0.01)
    assert (tool.now, tool.cancelled) == (0, 2)


@virtual
async def test_the_tool_is_told_how_long_it_has() -> None:
    tool = Scripted(failing(1))
    await call(service(tool, backoff_s=0.2), 0, CallContext(deadline_s=1.0))
    first, second = (context.deadline_s for context in tool.contexts)
    assert first == 1.0
    assert second is not None
    assert 0.8 <= second <= 0.9  # less the back-off, of which up to half is left to chance


@virtual
async def test_deadline_includes_retries() -> None:
    tool = Scripted(failing(1000))
    outcome = await call(service(tool, deadline_s=0.3, retries=1000, backoff_s=0.1))
    assert outcome.status is ToolStatus.TIMEOUT
    assert now() == pytest.approx(0.3)
    assert 2 <= tool.runs <= 3


@virtual
async def test_deadline_includes_waiting_for_a_slot() -> None:
    tool = Scripted(sleeping(0.3))
    tools = service(tool, concurrency=1)
    first = asyncio.ensure_future(call(tools, 0))
    await asyncio.sleep(0)
    second = await call(tools, 1, CallContext(deadline_s=0.1))
    assert second.status is ToolStatus.TIMEOUT
    assert (await first).status is ToolStatus.OK
    assert tool.runs == 1


@pytest.mark.parametrize("pure", [False, True])
@virtual
async def test_a_tool_that_ignores_its_cancellation_is_left_behind(pure: bool) -> None:
    """It times out like any other, soon after its deadline; the next call, and who is cancelled, go on."""
    unheard = list[Any]()
    asyncio.get_running_loop().set_exception_handler(lambda _, context: unheard.append(context))
    tool = Scripted(stubborn(500), pure=pure)
    tools = service(tool, deadline_s=10, concurrency=1)
    outcome = await call(tools, 0, CallContext(deadline_s=4))
    assert outcome.status is ToolStatus.TIMEOUT
    assert outcome.text.startswith("The tool 'scripted' did not answer within 4 s.")
    assert now() == pytest.approx(4, abs=LET_GO_S)
    impatient = asyncio.ensure_future(call(tools, 1))
    await asyncio.sleep(2 * LET_GO_S)
    impatient.cancel()
    with pytest.raises(asyncio.CancelledError):
        await impatient
    tool.step = sleeping(0)
    assert (await call(tools, 2)).text == "answer 2"
    assert now() <= 4 + 4 * LET_GO_S
    assert (tool.runs, tool.now) == (3, 2), "two are still there"
    await asyncio.sleep(600)
    assert tool.now == 0
    gc.collect()
    assert unheard == []


@virtual
async def test_a_tool_whose_check_ignores_its_cancellation_cannot_work() -> None:
    tool = Scripted(sleeping(0))
    tool.check = lambda: stubborn(500)({})  # type: ignore[assignment,return-value]
    with pytest.raises(ToolStartError, match="'scripted': its check did not end within 2 s"):
        await service(tool).check()
    assert now() == pytest.approx(2 + LET_GO_S)
    await asyncio.sleep(600)


# --- concurrency and rate ----------------------------------------------------------------------------------


@virtual
async def test_concurrency_is_limited() -> None:
    tool = Scripted(sleeping(0.02))
    tools = service(tool, concurrency=3)
    await asyncio.gather(*(call(tools, i) for i in range(12)))
    assert (tool.runs, tool.most) == (12, 3)


@virtual
async def test_one_slow_call_delays_no_other() -> None:
    async def step(arguments: Mapping[str, Any]) -> str:
        await asyncio.sleep(60 if arguments["x"] == 0 else 0.001)
        return "done"

    tools = service(Scripted(step), concurrency=16, deadline_s=60)
    slow = asyncio.ensure_future(call(tools, 0))
    await asyncio.gather(*(call(tools, i) for i in range(1, 300)))
    assert now() == pytest.approx(0.020)  # 299 calls by the 15 other places
    assert not slow.done()
    slow.cancel()
    await asyncio.gather(slow, return_exceptions=True)


@pytest.mark.parametrize(("rate", "calls", "at_least_s"), [(20.0, 41, 2.0), (2.5, 5, 1.2), (0.0, 500, 0.0)])
async def test_rate_is_limited(rate: float, calls: int, at_least_s: float) -> None:
    """At most ceil(rate) starts in any ceil(rate)/rate seconds."""
    tools = service(Scripted(sleeping(0)), rate_per_s=rate, deadline_s=10)
    started = time.monotonic()
    outcomes = await asyncio.gather(*(call(tools, i) for i in range(calls)))
    assert all(outcome.status is ToolStatus.OK for outcome in outcomes)
    assert time.monotonic() - started >= at_least_s


# --- retries and the breaker -------------------------------------------------------------------------------


@virtual
async def test_retries_then_succeeds() -> None:
    tool = Scripted(failing(2))
    tools = service(tool, retries=2)
    outcome = await call(tools)
    assert (outcome.status, outcome.attempts, tool.runs) == (ToolStatus.OK, 3, 3)
    assert tools.counters["tools/scripted/retries"] == 2


@virtual
async def test_retries_then_gives_up() -> None:
    tool = Scripted(failing(9))
    outcome = await call(service(tool, retries=2))
    assert (outcome.status, outcome.attempts, tool.runs) == (ToolStatus.UNAVAILABLE, 3, 3)
    assert outcome.detail == "down"


@virtual
async def test_what_will_not_pass_is_not_retried() -> None:
    tool = Scripted(failing(1, retryable=False))
    outcome = await call(service(tool))
    assert (outcome.status, tool.runs) == (ToolStatus.UNAVAILABLE, 1)


@pytest.mark.parametrize(
    ("kind", "runs"), [({}, 1), ({"idempotent": True}, 2), ({"pure": True}, 2)], ids=["acts", "again", "pure"]
)
@virtual
async def test_what_may_have_been_delivered_is_sent_again_only_where_that_does_no_harm(
    kind: dict[str, bool], runs: int
) -> None:
    tool = Scripted(failing(1, delivered=True))
    tool.spec = replace(tool.spec, **kind)
    outcome = await call(service(tool))
    assert tool.runs == runs
    if not kind:
        assert outcome.status is ToolStatus.UNAVAILABLE
        assert "may have taken effect; it was not sent again" in outcome.text


@virtual
async def test_a_call_that_was_under_way_when_a_run_ended_is_not_made_twice() -> None:
    tool = Scripted(sleeping(0))
    outcome = await call(service(tool), 0, CallContext(again=True))
    assert (outcome.status, tool.runs) == (ToolStatus.UNAVAILABLE, 0)
    assert "was interrupted. It may have taken effect" in outcome.text
    tool.spec = replace(tool.spec, pure=True)
    assert (await call(service(tool), 0, CallContext(again=True))).status is ToolStatus.OK


@virtual
async def test_a_timeout_says_that_a_call_may_have_taken_effect() -> None:
    tool = Scripted(sleeping(60))
    assert "may have taken effect" in (await call(service(tool, deadline_s=0.1))).text
    tool.spec = replace(tool.spec, idempotent=True)
    assert "may have taken effect" not in (await call(service(tool, deadline_s=0.1))).text


@virtual
async def test_refused_calls_are_the_calls_fault_and_open_no_circuit() -> None:
    async def step(arguments: Mapping[str, Any]) -> str:
        if arguments["x"] < 0:
            raise CallRefused("too small")
        return "fine"

    tools = service(Scripted(step), breaker_threshold=2)
    for _ in range(5):
        outcome = await call(tools, -1)
        assert (outcome.status, outcome.attempts) == (ToolStatus.REJECTED, 1)
        assert outcome.text == "The tool 'scripted' refused the call: too small"
    assert (await call(tools, 1)).text == "fine"
    assert tools.counters["tools/scripted/breaker_opened"] == 0


@virtual
async def test_limits_of_ones_own() -> None:
    slow, quick = Scripted(sleeping(1), name="slow"), Scripted(sleeping(1), name="quick")
    limits = ToolsConfig(deadline_s=2.0)
    tools = ToolService([slow, quick], limits, own={"quick": ToolsConfig(deadline_s=0.5)}, clock=now)
    assert (await tools.call("slow", {"x": 1}, ANY)).status is ToolStatus.OK
    assert (await tools.call("quick", {"x": 1}, ANY)).status is ToolStatus.TIMEOUT


@virtual
async def test_back_off_grows_and_is_jittered_reproducibly() -> None:
    def waits(seed: int) -> list[float]:
        tools = ToolService([Scripted(failing(0))], ToolsConfig(), patience=FAST, seed=seed)
        guarded = tools._guarded["scripted"]
        return [guarded._backoff(attempt) for attempt in (1, 2, 3)]

    for attempt, wait in enumerate(waits(0)):
        assert FAST.backoff_s * 2**attempt / 2 <= wait <= FAST.backoff_s * 2**attempt
    assert waits(0) == waits(0) != waits(1)


@virtual
async def test_breaker_opens_refuses_tries_and_closes() -> None:
    tool = Scripted(failing(4))
    tools = service(tool, retries=0, breaker_threshold=3, breaker_pause_s=0.1)
    for _ in range(3):
        assert (await call(tools)).status is ToolStatus.UNAVAILABLE
    assert tools._guarded["scripted"].breaker.state == "open"
    refused = await call(tools)
    assert (refused.status, refused.detail, refused.attempts) == (ToolStatus.UNAVAILABLE, "circuit open", 0)
    assert tool.runs == 3
    await asyncio.sleep(0.12)
    assert (await call(tools)).attempts == 1  # the try, which fails: the pause doubles
    await asyncio.sleep(0.12)
    assert (await call(tools)).detail == "circuit open"
    await asyncio.sleep(0.12)
    assert (await call(tools)).status is ToolStatus.OK
    assert tools._guarded["scripted"].breaker.state == "closed"


@virtual
async def test_a_cancelled_try_does_not_keep_the_breaker_half_open() -> None:
    tool = Scripted(failing(1))
    tools = service(tool, retries=0, breaker_threshold=1, breaker_pause_s=0.05)
    await call(tools)
    await asyncio.sleep(0.06)
    tool.step = sleeping(60)
    attempt = asyncio.ensure_future(call(tools))
    await asyncio.sleep(0.02)
    assert tools._guarded["scripted"].breaker.state == "half-open"
    attempt.cancel()
    await asyncio.gather(attempt, return_exceptions=True)
    tool.step = sleeping(0)
    assert (await call(tools)).status is ToolStatus.OK


# --- cache and single flight -------------------------------------------------------------------------------


@virtual
async def test_pure_results_are_cached_impure_ones_not() -> None:
    for pure, runs in ((True, 1), (False, 2)):
        tool = Scripted(sleeping(0), pure=pure)
        tools = service(tool)
        first, second = await call(tools, 1), await call(tools, 1)
        assert (first.text, first.cached) == ("answer 1", False)
        assert (second.text, second.cached) == ("answer 1", pure)
        assert tool.runs == runs
        assert tools.counters["tools/scripted/cache_hits"] == int(pure)


@virtual
async def test_the_least_recently_used_entry_leaves_the_cache() -> None:
    tool = Scripted(sleeping(0), pure=True)
    tools = service(tool, cache_size=2)
    for x in (1, 2, 1, 3):  # 2 leaves
        await call(tools, x)
    assert tool.runs == 3
    assert [(await call(tools, x)).cached for x in (1, 3, 2)] == [True, True, False]


@virtual
async def test_a_cache_of_size_zero() -> None:
    tool = Scripted(sleeping(0), pure=True)
    tools = service(tool, cache_size=0)
    await call(tools)
    await call(tools)
    assert tool.runs == 2


@virtual
async def test_failures_are_not_cached() -> None:
    tool = Scripted(failing(1, retryable=False), pure=True)
    tools = service(tool)
    assert (await call(tools)).status is ToolStatus.UNAVAILABLE
    assert (await call(tools)).status is ToolStatus.OK


@virtual
async def test_equal_calls_in_flight_share_one_run() -> None:
    tool = Scripted(sleeping(0.05), pure=True)
    tools = service(tool)
    outcomes = await asyncio.gather(*(call(tools, i % 2) for i in range(20)))
    assert tool.runs == 2
    assert {outcome.text for outcome in outcomes} == {"answer 0", "answer 1"}
    assert tools.counters["tools/scripted/joins"] == 18


@virtual
async def test_impure_calls_share_nothing() -> None:
    tool = Scripted(sleeping(0.01))
    tools = service(tool)
    await asyncio.gather(*(call(tools, 0) for _ in range(5)))
    assert tool.runs == 5


@virtual
async def test_a_cancelled_leader_leaves_its_followers_flying() -> None:
    tool = Scripted(sleeping(0.1), pure=True)
    tools = service(tool)
    leader = asyncio.ensure_future(call(tools))
    await asyncio.sleep(0.02)
    follower = asyncio.ensure_future(call(tools))
    await asyncio.sleep(0.02)
    leader.cancel()
    with pytest.raises(asyncio.CancelledError):
        await leader
    assert (await follower).text == "answer 0"
    assert (tool.runs, tool.cancelled) == (1, 0)


@virtual
async def test_a_leader_with_a_short_deadline_does_not_shorten_its_followers() -> None:
    tool = Scripted(sleeping(0.2), pure=True)
    tools = service(tool)
    leader = asyncio.ensure_future(call(tools, 0, CallContext(deadline_s=0.05)))
    await asyncio.sleep(0.01)
    follower = asyncio.ensure_future(call(tools))
    assert (await leader).status is ToolStatus.TIMEOUT
    assert (await follower).status is ToolStatus.OK
    assert tool.runs == 1


@virtual
async def test_a_flight_nobody_waits_for_is_cancelled_and_not_joined() -> None:
    tool = Scripted(sleeping(60), pure=True)
    tools = service(tool)
    only = asyncio.ensure_future(call(tools))
    await asyncio.sleep(0.02)
    only.cancel()
    await asyncio.gather(only, return_exceptions=True)
    tool.step = sleeping(0)
    assert (await call(tools)).status is ToolStatus.OK
    assert (tool.runs, tool.cancelled, tool.now) == (2, 1, 0)


@virtual
async def test_cancelling_a_call_cancels_its_run_and_frees_its_slot() -> None:
    tool = Scripted(sleeping(60))
    tools = service(tool, concurrency=1)
    task = asyncio.ensure_future(call(tools))
    await asyncio.sleep(0.02)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert (tool.cancelled, tool.now) == (1, 0)
    tool.step = sleeping(0)
    assert (await call(tools)).status is ToolStatus.OK


@virtual
async def test_close_leaves_no_flight_behind() -> None:
    tool = Scripted(sleeping(60), pure=True)
    tools = service(tool)
    waiting = asyncio.ensure_future(call(tools))
    await asyncio.sleep(0.02)
    await tools.close()
    assert (tool.cancelled, tool.now) == (1, 0)
    with pytest.raises(asyncio.CancelledError):
        await waiting


# --- metrics -----------------------------------------------------------------------------------------------


@virtual
async def test_what_the_service_does_unseen_reaches_record_and_summary(tmp_path: Path) -> None:
    """Retries, shared flights, cache hits and an open circuit, summed over two workers and a restart."""
    config = Config()
    config.run.dir = str(tmp_path)
    run_dir = RunDir.create(config, "tools")
    recorder = Recorder(run_dir, config, [JsonlWriter(run_dir.metrics_path)])

    def tell(worker: str, tools: ToolService) -> None:
        for name, total in tools.counters.items():
            recorder.running_total(worker, name, total)

    pure = service(Scripted(failing(2), pure=True), retries=2)
    await asyncio.gather(call(pure), call(pure), call(pure))  # one run, twice tried again; two join it
    await call(pure)
    tell("rollout-0", pure)
    tell("rollout-0", pure)  # the same totals again: nothing has happened meanwhile
    down = service(Scripted(failing(9)), retries=0, breaker_threshold=2)
    for _ in range(5):
        await call(down)
    tell("rollout-1", down)
    recorder.flush(1)
    again = service(Scripted(failing(1)), retries=1)
    await call(again)
    tell("rollout-0", again)  # its worker was restarted
    record = json.loads(run_dir.metrics_path.read_text())
    assert {key: record[key] for key in pure.counters} == {
        "tools/scripted/retries": 2,
        "tools/scripted/joins": 2,
        "tools/scripted/cache_hits": 1,
        "tools/scripted/breaker_opened": 1,
        "tools/scripted/breaker_rejected": 3,
    }
    recorder.finish(ended=True)
    assert json.loads(run_dir.summary_path.read_text())["tools"] == {
        "scripted/breaker_opened": 1,
        "scripted/breaker_rejected": 3,
        "scripted/cache_hits": 1,
        "scripted/joins": 2,
        "scripted/retries": 3,
    }


# --- start -------------------------------------------------------------------------------------------------


@virtual
async def test_a_check_that_hangs_or_breaks_is_named() -> None:
    class Hangs(Scripted):
        async def check(self) -> None:
            await asyncio.sleep(60)

    class Breaks(Scripted):
        async def check(self) -> None:
            raise KeyError("TOKEN")

    tools = ToolService(
        [Hangs(sleeping(0), name="hangs"), Breaks(sleeping(0), name="breaks"), Scripted(sleeping(0))],
        ToolsConfig(deadline_s=0.1),
    )
    with pytest.raises(ToolStartError) as caught:
        await tools.check()
    assert "tool 'hangs': its check did not end within 0.1 s" in str(caught.value)
    assert "tool 'breaks': its check failed: KeyError: 'TOKEN'" in str(caught.value)
    assert "scripted" not in str(caught.value)


class Custom(Scripted):
    def __init__(self) -> None:
        super().__init__(sleeping(0), name="custom")


async def test_a_tool_of_ones_own_by_dotted_path() -> None:
    tools = build_tools(ToolsConfig(names=[f"{__name__}:Custom"]), {})
    assert list(tools.specs) == ["custom"]
    assert (await tools.call("custom", {"x": 1}, ANY)).text == "answer 1"
    await tools.close()


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["serch"], "tool 'serch': unknown"),
        (["search"], "tool 'search': no server"),
        (["python"], "tool 'python': no server"),
        (["nowhere:Tool"], "tool 'nowhere:Tool': cannot be made: ModuleNotFoundError"),
        ([f"{__name__}:Missing"], "cannot be made: AttributeError"),
        (["collections:OrderedDict"], "not a tool"),
        ([f"{__name__}:Custom", f"{__name__}:Custom"], "tool 'custom': configured twice"),
    ],
)
async def test_names_that_cannot_be_made_into_tools(names: list[str], message: str) -> None:
    with pytest.raises(ToolStartError, match=message):
        build_tools(ToolsConfig(names=names), {})


def test_specs_tell_what_tag_syntax_fills() -> None:
    assert (SearchTool.spec.primary, SearchTool.spec.pure) == ("query", True)
    assert (PythonTool.spec.primary, PythonTool.spec.pure) == ("code", False)
    assert PythonTool.spec.repeatable
