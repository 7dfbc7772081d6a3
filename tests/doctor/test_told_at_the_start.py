"""Told at the start: what does nothing in a supervised run, teachers that are gone, judges that refuse."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from fnmatch import fnmatch
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from actors.cli.main import main
from actors.sft import sft
from system.config import load, without_rank
from system.doctor.preflight import look

DEAD = "http://127.0.0.1:9"
TAUGHT = ["learn.teacher=server", f"teacher.urls=[{DEAD}]"]
RANKLESS = "learn.lora.alpha=4.0 will do nothing: learn.lora.rank=0 trains the whole model"


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray does not start: a run gets as far as that."""

    def fail(**_: object) -> None:
        raise RuntimeError("it would start")

    monkeypatch.setattr("ray.init", fail)


def test_adapters_without_a_rank_are_told_by_a_supervised_run(
    started: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    words = [f"sft.path={tmp_path}/rows.jsonl", f"run.dir={tmp_path}/runs", "learn.lora.alpha=4"]
    with pytest.raises(Exception, match="it would start"):
        sft(load(None, ["model.path=", "task=quickstart", *words]), config_name="x", resume=None)
    assert RANKLESS in capsys.readouterr().out.splitlines()


def test_a_supervised_run_hears_of_adapters_alone() -> None:
    """The other settings that may do nothing are none of its."""
    assert [*without_rank(load(None, ["learn.lora.alpha=4", "learn.teacher_coef=0.5"]))] == [RANKLESS]
    assert [*without_rank(load(None, ["learn.lora.alpha=4", "learn.lora.rank=2", "model.path=x"]))] == []


def test_a_supervised_job_is_told_so_where_it_is_submitted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("system.cluster.submit.submit_run", lambda *_, **__: 0)
    monkeypatch.setattr("system.doctor.supervised.require", lambda *_, **__: None)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.yaml").write_text("{}")
    assert main(["submit", "a.yaml", "--sft", "learn.lora.alpha=4", "learn.teacher_coef=0.5"]) == 0
    told = capsys.readouterr().out
    assert RANKLESS in told
    assert "teacher_coef" not in told


class Grader(BaseHTTPRequestHandler):
    """It knows one path, one model and one key."""

    def do_GET(self) -> None:
        self.send_error(404)

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path != "/v1/chat/completions" or body["model"] != "grader":
            self.send_error(404)
        elif self.headers["Authorization"] != "Bearer sk-1":
            self.send_error(401)
        else:
            said = json.dumps({"choices": [{"message": {"content": '{"correctness": 1}'}}]}).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(said)))
            self.end_headers()
            self.wfile.write(said)

    def log_message(self, format: str, *args: object) -> None: ...


@pytest.fixture
def grader(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("RIGHT_KEY", "sk-1")
    monkeypatch.setenv("WRONG_KEY", "sk-2")
    with HTTPServer(("127.0.0.1", 0), Grader) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(
    ("path", "model", "key", "says"),
    [
        ("/v1", "grader", "RIGHT", ""),
        ("", "grader", "RIGHT", "base_url: HTTP 404 at {url}/chat/completions: *end it before /chat/*"),
        ("/v1", "another", "RIGHT", "base_url: HTTP 404 at *; * let model be one that it has"),
        ("/v1", "grader", "WRONG", "api_key_env: HTTP 401 at *; name the variable with a key that*"),
    ],
)
def test_a_judge_that_refuses_is_told_before_anything_starts(
    path: str, model: str, key: str, says: str, grader: str
) -> None:
    options = {"base_url": grader + path, "model": model, "api_key_env": f"{key}_KEY"}
    rewards = json.dumps([{"name": "judge", "options": options}, "f1"])
    told = [str(problem) for problem in look(load(None, [f"reward={rewards}"]))["servers"]]
    assert len(told) == bool(says)
    if says:
        assert fnmatch(told[0], f"reward.parts[[]0].options.{says.format(url=grader)}"), told


def test_a_teacher_that_does_not_answer_is_told_before_anything_starts() -> None:
    (told,) = (str(one) for one in look(load(None, TAUGHT))["servers"])
    assert told.startswith(f"teacher.urls={DEAD}: does not answer (")
    assert told.endswith("; start it, or correct the address")


def test_a_teacher_s_key_must_be_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    config = load(None, [*TAUGHT, "teacher.api_key_env=TEACHERS_KEY"])
    told = "teacher.api_key_env=TEACHERS_KEY: this environment variable is not set, or empty; export it"
    assert told in [str(one) for one in look(config)["servers"]]
    monkeypatch.setenv("TEACHERS_KEY", "sk-1")
    assert told not in [str(one) for one in look(config)["servers"]]
