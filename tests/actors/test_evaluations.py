"""When a run evaluates, and what an evaluation on engines of its own leaves of training: everything."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from aiohttp import web

from actors import train
from actors.best_model import ModelChoice
from actors.evaluations import Evaluations
from system.config import load
from system.evals.record import Asked
from system.observe.jsonl import JsonlWriter, read_jsonl
from system.observe.recorder import Recorder
from system.observe.rundir import RunDir
from system.observe.sinks import RESUMED, RunFiles
from system.rollout.failure import RolloutFailed
from system.serving import AppServer, serve
from system.tree.builder import TreeBuilder
from system.tree.prompt import Prompt
from system.tree.record import Kind, Origin, Outcome
from system.tree.stats import TreeStats

WAIT_S = 60.0


class Engine:
    """What an engine says of itself; a push changes its version."""

    def __init__(self) -> None:
        self.version, self.paused, self.gone = 0, False, False
        self.server: AppServer | None = None

    async def start(self) -> str:
        app = web.Application()
        app.router.add_get("/model_info", self._info)
        app.router.add_get("/v1/loads", self._loads)
        app.router.add_get("/ready", self._ready)
        app.router.add_post("/continue_generation", self._go_on)
        self.server = await serve(app)
        return self.server.url

    async def _info(self, _: web.Request) -> web.Response:
        if self.gone:
            raise web.HTTPInternalServerError
        return web.json_response({"weight_version": str(self.version)})

    async def _loads(self, _: web.Request) -> web.Response:
        load = dict.fromkeys(("num_running_reqs", "num_waiting_reqs", "max_running_requests"), 1)
        return web.json_response({"loads": [load]})

    async def _ready(self, _: web.Request) -> web.Response:
        return web.json_response({}, status=503 if self.paused else 200)

    async def _go_on(self, _: web.Request) -> web.Response:
        self.paused = False
        return web.json_response({})


class Worker:
    """Answers once it may."""

    def __init__(self) -> None:
        self.may, self.asked = asyncio.Event(), asyncio.Event()
        self.failure: Exception | None = None
        self.right = True

    @property
    def answer(self) -> Any:
        return SimpleNamespace(remote=lambda prompt, *_: self._reply(prompt))

    async def _reply(self, prompt: Prompt) -> TreeStats:
        self.asked.set()
        await self.may.wait()
        if self.failure is not None:
            raise self.failure
        builder = TreeBuilder(prompt.id, prompt.kind, [1], 1)
        node = builder.node(0, Kind.MODEL)
        builder.extend(node, [3], [-1.0], None, 0)
        builder.leaf(node, Outcome.STOPPED, Origin.ROOT)
        builder.score(0, 1.0, self.right)
        return TreeStats.of(builder.close(1.0))


def write_model(path: Path, step: int) -> None:
    path.mkdir(parents=True)
    (path / "model").write_text(str(step))


class Learner:
    """Writes models that hold their step."""

    def __init__(self, run: Run) -> None:
        self._run = run

    async def save_hf(self, path: str) -> float:
        assert self._run.loop.weights.locked(), "nobody trains meanwhile"
        write_model(Path(path), self._run.loop.version)
        return 0.9


class Run:
    """A run around its evaluations: a learner that steps, and engines that take what it pushes."""

    def __init__(self, root: Path, *overrides: str, resumed: int | None = None, now: float = 0.0) -> None:
        config = load(None, [f"run.dir={root}", "run.name=run", *overrides])
        self.directory = RunDir(root / "run")
        if not self.directory.root.exists():
            RunDir.create(config)
        self.now = now
        self.recorder = Recorder(self.directory, config, [RunFiles(self.directory)], now=lambda: self.now)
        if resumed is not None:
            JsonlWriter(self.directory.metrics_path).write({RESUMED: resumed})
        self.loop = SimpleNamespace(version=resumed or 0, weights=asyncio.Lock())
        self.engine, self.worker = Engine(), Worker()
        self.pushed: list[tuple[int, Sequence[str]]] = []
        self.notes: list[str] = []
        self.config = config

    async def begin(self) -> Run:
        own: Any = None
        if self.config.eval.engines:
            url = await self.engine.start()
            own = SimpleNamespace(workers={"eval-rollout-0": self.worker}, engines={"eval-engine-0": url})
        pool = SimpleNamespace(evaluation=own, workers={"rollout-0": self.worker}, engines={})
        shown = SimpleNamespace(
            note=self.notes.append, phase=lambda *_, **__: None, advance=lambda *_, **__: None
        )
        made: Callable[..., Evaluations] = Evaluations
        asked = [Asked("", Prompt(f"q{i}", (), (), kind="calc"), 0, i) for i in range(3)]
        ready = SimpleNamespace(ready=self._ready)
        learner: Any = Learner(self)
        self.choice = ModelChoice(self.config, self.directory, learner)
        self.evaluations = made(
            *(self.config, SimpleNamespace(pool=pool), self.directory, self.recorder, shown, asked),
            *(self.loop, SimpleNamespace(push=self._push), ready, self.choice),
            clock=lambda: self.now,
            now=lambda: self.now,
        )
        return self

    async def _ready(self) -> None: ...

    async def _push(self, version: int, urls: Sequence[str]) -> dict[str, str]:
        assert self.loop.weights.locked(), "the learner pushes to one set of engines at a time"
        self.pushed.append((version, urls))
        self.engine.version = version
        return {}

    async def step(self) -> None:
        """A training step, after which the run looks whether to evaluate."""
        async with self.loop.weights:
            self.loop.version += 1
        await self.evaluations.look()

    @property
    def records(self) -> list[dict[str, Any]]:
        rows = [row for row in read_jsonl(self.directory.metrics_path) if "eval/which" in row]
        return [{"which": row["eval/which"], "step": row["step"]} for row in rows]

    @property
    def mishaps(self) -> dict[str, Any]:
        return self.recorder.summary()["causes"]

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(WAIT_S):
            while not condition():  # noqa: ASYNC110
                await asyncio.sleep(0.01)


@pytest.fixture
async def run(tmp_path: Path) -> AsyncIterator[Callable[..., Any]]:
    """Begin a run, or go on with it."""
    begun: list[Run] = []

    async def begin(*overrides: str, resumed: int | None = None, now: float = 0.0) -> Run:
        begun.append(Run(tmp_path, *overrides, resumed=resumed, now=now))
        return await begun[-1].begin()

    yield begin
    for one in begun:
        await one.evaluations.cut()
        if one.engine.server is not None:
            await one.engine.server.close()


async def test_training_goes_on_while_an_evaluation_is_held_open(run: Callable[..., Any]) -> None:
    one = await run("eval.engines=1", "eval.every=2")
    await one.evaluations.before()
    await one.evaluations.look()
    await one.worker.asked.wait()
    for _ in range(5):
        await one.step()
    assert (one.loop.version, one.engine.version, len(one.pushed)) == (5, 0, 1), "it keeps its weights"
    assert one.records == []
    one.worker.may.set()
    await one.until(lambda: bool(one.records))
    await one.step()  # step 2 is overdue, and step 4: one evaluation, of the newest weights
    await one.until(lambda: len(one.records) == 2)
    await one.step()
    assert [version for version, _ in one.pushed] == [0, 6], "the next is due at step 8"
    await one.step()
    await one.evaluations.after()
    assert one.records[:2] == [{"which": "before", "step": 0}, {"which": "during", "step": 6}]
    assert sorted(row["which"] for row in one.records[2:]) == ["after", "during"], "it waits for both"
    answers = one.directory.evals / "v000006.jsonl"
    assert len(list(read_jsonl(answers))) == 1 + 3
    summary = one.recorder.summary()["evaluation"]
    assert summary["count"] == 4


async def test_the_learner_waits_without_engines_of_its_own(run: Callable[..., Any]) -> None:
    one = await run("eval.every=2")
    stepping = asyncio.create_task(one.evaluations.before())
    await one.worker.asked.wait()
    assert not stepping.done()
    one.worker.may.set()
    await stepping
    for _ in range(4):
        await one.step()
    assert [row["step"] for row in one.records] == [0, 2, 4]
    assert one.pushed == []


async def test_by_time(run: Callable[..., Any]) -> None:
    one = await run("eval.every_s=100")
    one.worker.may.set()
    await one.evaluations.before()
    for one.now in (60.0, 110.0, 160.0, 210.0):
        await one.step()
    assert [row["step"] for row in one.records] == [0, 2, 4]
    again = await run("eval.every_s=100", resumed=4, now=300.0)  # 90 s after the last one began
    again.worker.may.set()
    for again.now in (305.0, 315.0):
        await again.step()
    assert [row["step"] for row in again.records] == [0, 2, 4, 6]


async def test_an_engine_that_is_started_again_costs_its_evaluation_alone(run: Callable[..., Any]) -> None:
    one = await run("eval.engines=1", "eval.every=1")
    await one.evaluations.look()
    await one.worker.asked.wait()
    one.engine.paused = True
    await one.until(lambda: "evaluation cut off" in one.mishaps)
    assert "was started again" in one.mishaps["evaluation cut off"]["first"]
    one.worker.may.set()
    await one.step()
    await one.until(lambda: bool(one.records))
    assert not one.engine.paused
    assert one.records == [{"which": "during", "step": 1}]


async def test_an_engine_that_is_lost_or_silent_costs_its_evaluation_alone(run: Callable[..., Any]) -> None:
    one = await run("eval.engines=1", "eval.every=1")
    one.worker.may.set()
    one.worker.failure = RolloutFailed("q", "engine lost", "refused")
    await one.evaluations.look()
    await one.until(lambda: "evaluation cut off" in one.mishaps)
    one.engine.gone = True
    await one.step()
    assert "step 1" in one.mishaps["evaluation left out"]["first"]
    assert [version for version, _ in one.pushed] == [0], "the learner sends it nothing"
    one.engine.gone, one.worker.failure = False, None
    await one.step()
    await one.until(lambda: bool(one.records))
    assert one.records == [{"which": "during", "step": 2}]


async def test_a_resumed_run_makes_again_what_was_cut_off(run: Callable[..., Any]) -> None:
    first = await run("eval.engines=1", "eval.every=2")
    first.worker.may.set()
    await first.evaluations.look()
    await first.until(lambda: bool(first.records))
    first.worker.may.clear()
    first.worker.asked.clear()
    await first.step()
    await first.step()
    await first.worker.asked.wait()
    await first.evaluations.cut()
    assert first.notes[-1] == "the evaluation of step 2 was cut off: the resumed run evaluates again"
    again = await run("eval.engines=1", "eval.every=2", resumed=3)
    again.worker.may.set()
    await again.evaluations.look()
    await again.until(lambda: len(again.records) == 2)
    assert again.records[1] == {"which": "during", "step": 3}
    await again.evaluations.look()
    assert [version for version, _ in again.pushed] == [3], "it is made again once"


async def test_an_evaluation_ends_with_a_run_that_fails(
    run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is held open for ever, and must not keep the run."""
    one = await run("eval.engines=1", "eval.every=1")

    class Failing:
        def __init__(self, *_: Any, **__: Any) -> None:
            self.evaluations, self.version = one.evaluations, 0
            self.loop = SimpleNamespace(stopping=asyncio.Event())

        spare = None

        async def nothing(self) -> None: ...

        save = bring_up = nothing

        async def run(self) -> bool:
            await one.evaluations.look()
            await one.worker.asked.wait()
            raise RuntimeError("the learner is lost")

    async def no_checkpoint(*_: Any) -> None: ...

    monkeypatch.setattr(train, "Conductor", Failing)
    monkeypatch.setattr(train, "restore_newest", no_checkpoint)
    about: Any = SimpleNamespace(
        config=one.config, run_dir=one.directory, task=None, recorder=one.recorder, asked=[],
        progress=SimpleNamespace(note=one.notes.append), ending=SimpleNamespace(stops=lambda *_: None),
    )  # fmt: skip
    actors: Any = SimpleNamespace(learner=None, places=SimpleNamespace())
    with pytest.raises(RuntimeError, match="the learner is lost"):
        await train._conduct(about, actors)
    assert [task.get_name() for task in asyncio.all_tasks() if "evaluation" in task.get_name()] == []
    assert one.notes == ["the evaluation of step 0 was cut off: the resumed run evaluates again"]


@pytest.mark.parametrize("warm", [False, True])
async def test_the_first_evaluation_is_made_again_where_its_weights_are(
    run: Callable[..., Any], warm: bool
) -> None:
    one = await run("eval.engines=1", f"warmstart.steps={10 * warm}", resumed=3)
    one.worker.may.set()
    await one.evaluations.look()
    if warm:
        assert one.notes == ["the evaluation of step 0 was cut off, and its weights are gone: it is left out"]
        return
    await one.until(lambda: bool(one.records))
    assert one.records == [{"which": "before", "step": 0}]
    assert one.pushed == [], "its engines hold them since their start"


@pytest.mark.parametrize("engines", [0, 1])
async def test_the_model_of_the_best_evaluation_is_left(run: Callable[..., Any], engines: int) -> None:
    settings = (f"eval.engines={engines}", "eval.every=1", "eval.choose=accuracy")
    one = await run(*settings)
    one.worker.may.set()
    await (one.evaluations.look() if engines else one.evaluations.before())
    await one.until(lambda: len(one.records) == 1)
    for number, right in enumerate((False, True, True, False), start=2):
        one.worker.right = right
        await one.step()
        await one.until(lambda expected=number: len(one.records) == expected)
    await one.until(lambda: one.evaluations._task is None or one.evaluations._task.done())
    candidates = one.directory.candidates
    assert [path.name for path in candidates.iterdir()] == ["step-000003"], "of equals the latest"
    # A session that is lost during an evaluation leaves weights that nobody has scored.
    (candidates / "step-000004").mkdir()
    again = await run(*settings, resumed=4)
    again.worker.right = False
    again.worker.may.set()
    await again.evaluations.after()
    told = again.choice.leave(again.evaluations.records, again.recorder)
    assert told == "model of step 3: the highest accuracy, 1.000"
    assert (one.directory.model / "model").read_text() == "3"
    summary = again.recorder.summary()
    assert summary["chosen"] == {"step": 3, "by": "accuracy", "value": 1.0}
    assert summary["model"] == {"lora_kept": 0.9}
    assert (candidates / "step-000003").is_dir(), "a run that goes on may choose it again"
