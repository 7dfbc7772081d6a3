"""ARPO's 13 benchmarks: the recipe is the protocol, and runs on tiny data with stand-ins for its servers."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from actors.cli.main import main
from system.config import eval_sets, load, rewards, scored

RECIPE = Path(__file__).parents[2] / "configs" / "benchmarks" / "arpo.yaml"
JUDGED = ("aime24", "aime25", "math500", "gsm8k", "math", "webwalker", "gaia", "hle", "xbench")
BY_F1 = ("hotpotqa", "2wiki", "musique", "bamboogle")
DRAWN = ("webwalker", "hotpotqa", "2wiki", "musique")  # 200 of each
SAYS = {"apples": "forty-two", "pears": "7", "capital": "Paris, France", "level": "42"}


def test_it_is_the_protocol() -> None:
    config = load(RECIPE)
    sets = {one.name: one for one in eval_sets(config.eval)}
    assert {*sets} == {*JUDGED, *BY_F1}
    assert [one.name for one in rewards(config.reward)] == ["judge"]
    own = {name: scored(config, one) for name, one in sets.items()}
    assert {name: it.reward.name for name, it in own.items() if it} == dict.fromkeys(BY_F1, "f1")
    assert {name for name, one in sets.items() if one.questions == 200} == {*DRAWN}
    rollout = config.rollout
    assert (config.eval.temperature, rollout.top_p, rollout.call_limit) == (0.6, 0.95, 15)
    assert rollout.concurrency * rollout.leaves == 50
    assert rollout.tree_deadline_s == 1500
    assert (config.tools.search_top_k, config.tools.python_wall_s) == (10, 120)
    assert config.reward.options["model"] == "Qwen2.5-72B-Instruct"
    assert "\\boxed{" in config.task.system_prompt


def test_every_set_stands_in_the_document() -> None:
    text = (RECIPE.parents[2] / "docs" / "evaluation.md").read_text(encoding="utf-8")
    assert [name for name in (*JUDGED, *BY_F1) if f"| `{name}` |" not in text] == []


class Servers(BaseHTTPRequestHandler):
    """The model that is measured, and the judge, which takes forty-two for 42."""

    asked: list[dict[str, Any]]

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.asked.append(body)
        text = body["messages"][-1]["content"]
        if body["model"] == "measured":
            answer = next(said for word, said in SAYS.items() if word in text)
            said = f"<think> hm </think> <answer> \\boxed{{{answer}}} </answer>"
        else:
            said = "Correct" if re.search(r"<answer-\w+>forty-two</answer", text) else "Incorrect"
        choice = {"message": {"role": "assistant", "content": said}, "finish_reason": "stop"}
        reply = json.dumps({"choices": [choice], "usage": {"completion_tokens": 5}}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(reply)))
        self.end_headers()
        self.wfile.write(reply)

    def do_GET(self) -> None:
        """They are there, which is looked at before anything is asked."""
        self.send_response(404)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        del format, args


@pytest.fixture
def servers() -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Their address, and what they were asked."""
    handler = type("Mine", (Servers,), {"asked": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1", handler.asked  # type: ignore[attr-defined]
    server.shutdown()
    server.server_close()


def test_three_sets_on_tiny_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, servers: tuple[str, list[dict[str, Any]]]
) -> None:
    url, asked = servers
    monkeypatch.chdir(tmp_path)
    data = tmp_path / "data" / "benchmarks"
    data.mkdir(parents=True)
    apples, pears = ("How many apples?", "So many. #### 42"), ("How many pears?", "So few. #### 8")
    rows = {
        "gsm8k": [{"question": question, "answer": answer} for question, answer in (apples, pears)],
        "hotpotqa": [{"question": "Which capital?", "golden_answers": ["Rome", "Paris"]}],
        "gaia": [{"Question": "Which level?", "Final answer": "42", "Level": 2}],
    }
    for name, each in rows.items():
        (data / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in each))
    words = ["eval", "--endpoint", url, "--model", "measured", "--config", str(RECIPE)]
    words += ["--sets", "gsm8k,hotpotqa,gaia", "--answers", "answers.jsonl", "tools.names=[]"]
    words += [f"reward.options.base_url={url}"]
    assert main([*words, "--out", "result.json"]) == 0
    of_model = [one for one in asked if one["model"] == "measured"]
    to_judge = [one for one in asked if one["model"] != "measured"]
    assert len(of_model) == 4
    assert {(one["temperature"], one["top_p"], one["max_tokens"]) for one in of_model} == {(0.6, 0.95, 28672)}
    assert all("\\boxed{answer here}" in one["messages"][0]["content"] for one in of_model)
    trial, *told = [one["messages"][-1]["content"] for one in to_judge]
    assert "What is 1 + 1?" in trial, "each start asks the judge for one grade"
    assert len(told) == 2, "an answer that is the reference, and a set by F1, need no judge"
    assert {("apples" in one, "pears" in one) for one in told} == {(True, False), (False, True)}
    sets = json.loads(Path("result.json").read_text())["sets"]
    assert {name: (one["questions"], one["accuracy"]) for name, one in sets.items()} == {
        "gsm8k": (2, 0.5),
        "hotpotqa": (1, 0.0),
        "gaia": (1, 1.0),
    }
    assert sets["hotpotqa"]["reward"] == pytest.approx(2 / 3)
    assert sets["gsm8k"]["reward_low"] < sets["gsm8k"]["reward"] == 0.5 < sets["gsm8k"]["reward_high"]
    assert [*sets["gaia"]["kinds"]] == ["2"]
    assert main([*words, "--out", "result.md"]) == 0
    assert len(asked) == 7 + 1, "all answers are known; the judge is tried at the start"
    (of_set,) = [line for line in Path("result.md").read_text().splitlines() if "hotpotqa" in line]
    assert of_set.startswith("| hotpotqa | 1 | 0.0% (0.0% to 79.3%) | 0.667 | ")


def test_a_set_that_there_is_not(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["eval", "--endpoint", "http://a/v1", "--model", "m", "--config", str(RECIPE)]
    assert main([*words, "--sets", "gsm8k,hotpot"]) == 2
    assert "--sets hotpot: there are held-out, aime24" in (told := capsys.readouterr().err)
    assert "did you mean hotpotqa?" in told
