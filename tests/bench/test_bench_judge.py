"""The slow judge's benchmark: its servers, the figures of a run, what is compared, the report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from system.bench.judge import (
    AT_ONCE,
    CASES,
    QUICKSTART,
    RULE,
    SETTINGS,
    SLOW,
    TEACH,
    compared,
    figures,
    write_report,
)
from system.bench.slow_judge import create_app
from system.config import load
from system.serving import serve
from system.twin.agent import AgentModel
from system.twin.clock import run
from system.twin.dist import Constant
from system.twin.judge import JudgeModel
from system.twin.speeds import LinearEngine, LinearLearner
from system.twin.tools import ToolModel
from system.twin.world import Models, Twin

ASKED = "<gold-{mark}>Paris</gold-{mark}> <answer-{mark}>{answer}</answer-{mark}>"


def twin(judge: JudgeModel | None) -> Twin:
    models = Models(
        LinearEngine(0.002, 0.0004),
        LinearLearner(0.2, 0.0),
        AgentModel(segment_tokens=Constant(10), prompt_tokens=Constant(20)),
        {"search": ToolModel(Constant(0.02), Constant(20))},
        publish_s=0.05,
    )
    config = load(QUICKSTART, [*SETTINGS, CASES["η = 1"]])
    played = Twin(config, models, 10, judge=judge)
    run(played.run())
    return played


def row(judge: JudgeModel | None) -> dict[str, Any]:
    played = twin(judge)
    return figures(played.records[4:], played.totals)


@pytest.mark.parametrize("case", CASES)
def test_every_case_is_a_valid_configuration(case: str) -> None:
    assert load(QUICKSTART, [*SETTINGS, *TEACH, CASES[case]]).flow.staleness == int(case.split()[-1])


@pytest.mark.parametrize(("failures", "status"), [(0.0, 200), (1.0, 500)])
async def test_its_judge_knows_the_reference_word_for_word_or_fails(failures: float, status: int) -> None:
    server = await serve(create_app(0.0, failures))
    try:
        async with aiohttp.ClientSession() as session:
            for answer, grade in (("Paris", 1), ("Rome", 0)):
                asked = ASKED.format(mark="0123456789abcdef", answer=answer)
                body = {"messages": [{"role": "user", "content": asked}]}
                async with session.post(f"{server.url}/v1/chat/completions", json=body) as reply:
                    assert reply.status == status
                    if status == 200:
                        said = (await reply.json())["choices"][0]["message"]["content"]
                        assert json.loads(said)["correctness"] == grade
    finally:
        await server.close()


def test_a_run_says_where_its_trees_in_flight_were() -> None:
    without, beside = row(None), row(JudgeModel(1.0, 0.0))
    assert without["may_fly"] == beside["may_fly"] == 16
    assert without["judged"] == 0
    assert beside["close_wait_s"] == pytest.approx(1.0, abs=0.1)
    assert beside["judged"] == pytest.approx(beside["trees_per_s"] * beside["close_wait_s"])
    for one in (without, beside):
        known = one["growing"] + one["judged"] + one["trained"]
        assert 10 < known < 17  # the others wait for their batch
    assert beside["engine_idle"] > without["engine_idle"] + 0.1
    assert beside["untrained"] <= 16


def test_what_is_compared_tells_requests_from_latency(tmp_path: Path) -> None:
    slow = JudgeModel(1.0, 0.01)
    rows = [
        {"case": "η = 1", "way": way, **row(judge), "server_cpu_s": 0.0}
        for way, judge in ((RULE, None), (AT_ONCE, JudgeModel(0.0, 0.0)), (SLOW, slow))
    ]
    found = compared([*rows, {"case": "η = 2"}], "η = 1", {RULE: 0.1, SLOW: 0.4})
    assert found["points"] == pytest.approx(found["points of requests"] + found["points of latency"])
    assert abs(found["points of requests"]) < 1  # on the virtual clock they cost nothing
    assert found["points of latency"] > 10
    assert found["virtual points"] == pytest.approx(30)
    assert found["versions of latency"] == pytest.approx(rows[2]["close_wait_s"] / rows[0]["step_s"])
    about = {"steps": 10, "left_out": 4, "seconds": 1.0, "failures": 0.01}
    write_report({**about, "runs": rows, "compared": [found]}, tmp_path)
    assert json.loads((tmp_path / "judge.json").read_text())["compared"][0]["case"] == "η = 1"
    assert "versions of latency" in (tmp_path / "judge.html").read_text()
