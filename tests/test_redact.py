"""No secret is shown: by the name it has, by its look, by its place; whatever setting it stands in."""

from __future__ import annotations

import contextlib
import json
import operator
import stat
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as bounded
from hypothesis import strategies as st

from actors.cli.main import main
from system.cluster.submit import submit_run
from system.config import Config, load, settings, to_dict
from system.observe.jsonl import JsonlWriter
from system.observe.recorder import Recorder
from system.observe.rundir import RunDir
from system.observe.views import sinks
from system.redact import HIDDEN, redact

TEXT = "hunter2-Zq9"  # nothing about it looks like a secret

BY_LOOK = [
    "sk-proj-abcdefghijklmnop",
    "hf_abcdefghijklmnopqrst",
    "ghp_abcdefghijklmnopqrst",
    "AKIAABCDEFGHIJKLMNOP",
    "AIzaSyA1234567890abcdefghijklmnopqrstuv",
    "Bearer abcdefghijklmnop",
    "0123456789abcdef0123456789abcdef01234567",
    "eyJhbGciOiJI.eyJzdWIiOiIx.c2ln",
    "tvly-abcdefghijklmnop",
    "-----BEGIN RSA PRIVATE KEY-----\nMIIE\n-----END RSA PRIVATE KEY-----",
]
IN_TEXT = [
    "export WANDB_API_KEY={}",
    "export WANDB_API_KEY='{}'",
    'export HF_TOKEN="{} and more"',
    "PGPASSWORD={} psql -h db",
    "export PGPASSWORD={}",
    "export MYSQL_PWD={}",
    "export DB_PWD={},x",
    "export AWS_SECRET_ACCESS_KEY={}",
    "DefaultEndpointsProtocol=https;AccountName=a;AccountKey={};EndpointSuffix=core.windows.net",
    'curl -H "X-Api-Key: {}" https://h/a',
    "curl -H 'Authorization: Token {}' https://h/a",
    "curl -u me:{} https://h",
    "docker login --password {} registry",
    "docker login -u me -p {} registry",
    "docker login \\\n    -p'{}' registry",
    "podman login -p={}",
    "helm registry login -p={} registry",
    "Cookie: session={}; theme=dark",
    "helm registry login -u me -p {}",
    "az login --service-principal -u me -p {}",
    "sshpass -p {} ssh h",
    "mysql -u root -p{} db",
    "redis-cli -h h -a {}",
    "curl -su me:{} https://h",
    "curl -ume:{} https://h",
    "curl -u 'me:two words, {}' https://h",
    "curl -u 'CORP\\alice:{}' https://h",
    "curl -u CORP\\alice:{} https://h",
    "curl --proxy-user 'CORP\\alice:{}' https://h",
    "smbclient --user='CORP\\bob:{}' //h/share",
    "curl -u 'me:\\{}\\' https://h",
    "curl --proxy-user=me:{} https://h",
    "curl -b 'sid={}; a=b' https://h",
    "curl --cookie sid={} https://h",
    "curl -H 'Cookie: theme=dark; sid={}' https://h",
    "Set-Cookie: sid={}; Path=/; HttpOnly",
    '{{"Cookie": "theme=dark; sid={}"}}',
    "Authorization: Basic {}",
    "tool --api-key={} --quiet",
    "--export=ALL,API_KEY={}",
    "machine h login me password {}",
    "https://me:{}@host/a",
    "https://me:x@{}@host/a",
    "postgres://me:x/{}@host/a",
    "export DB_PASS={}",
    "GH_PAT={} git push",
    "SSHPASS={} sshpass -e ssh h",
    "https://h/a?q=1&api_key={}&k=2",
    '{{"client_secret": "{}"}}',
    '{{"note": "{{\\"client_secret\\": \\"two words, {}\\"}}"}}',
]
HARMLESS = [
    "max_response_tokens=256",
    "write key=value, for example flow.staleness=0",
    "learn.aggregate=token-mean",
    "engine.api_key_env=OPENAI_KEY",
    "unknown key: foo",
    "https://host/a@b?q=key",
    "cd $PWD; OLDPWD=/a",
    "desk-abcdefghijkl risk_adjusted_reward",
    "--ntasks=4 --exclusive",
    "models/Qwen3-0.6B",
    "docker run -p 8080:80 -u 1000:1000 image",
    "ssh -p 8080 host",
    "after the login it ran ssh -p 22",
    "cookie_policy: strict",
    "docker login h && docker run -p 8080:80 image",
    "docker login h\nssh -p 2222 h",
    "docker login --password-stdin h",
    "mkdir -p runs; serve -p 8080",
    "mysql -P 3306 -p db",
    "curl -sSfL -b jar.txt https://h:80/a",
    "a cookie: it is baked; cookies: two",
]


@pytest.mark.parametrize(
    "key",
    [
        *("api_key", "apiKey", "token", "hf_token", "access-token", "password", "clientSecret", "AUTH"),
        *(
            "Cookie",
            "set-cookie",
            "AUTHORIZATION",
            "PGPASSWORD",
            "MYSQL_PWD",
            "AccountKey",
            "X-Api-Key",
            "GITHUBTOKEN",
            "api_keys",
        ),
    ],
)
def test_secrets_by_the_name_of_their_key(key: str):
    assert redact({key: "hunter2"}) == {key: HIDDEN}
    assert redact({key: ["hunter2", "hunter3"]}) == {key: [HIDDEN, HIDDEN]}
    assert redact({key: {"value": "hunter2"}}) == {key: {"value": HIDDEN}}


@pytest.mark.parametrize(
    "key",
    [
        *("password", "db_passwd", "PGPASSWORD", "clientSecret", "api_key", "apiKey", "search-api-key"),
        *("MYSQL_PWD", "DB_PASS", "AccountKey", "aws_secret_access_key"),
    ],
)
def test_a_number_may_be_a_secret(key: str):
    assert redact({"search": {key: 12345678}}) == {"search": {key: HIDDEN}}
    assert redact({key: [12345678]}) == {key: [HIDDEN]}
    assert redact(f"{key}=12345678") == f"{key}={HIDDEN}"


@pytest.mark.parametrize(
    "key",
    [
        *("max_tokens", "max_token", "token", "token_budget", "tokens_per_key", "key", "auth", "num_keys"),
        *("api_keys", "secrets", "password_length", "api_key_env", "top_pass_rate", "passes", "compass"),
    ],
)
def test_a_number_is_most_often_none(key: str):
    assert redact({"search": {key: 512}, key: [0.5]}) == {"search": {key: 512}, key: [0.5]}
    assert redact({"password": True, "secret": None}) == {"password": True, "secret": None}


@pytest.mark.parametrize("value", BY_LOOK)
def test_secrets_by_their_look(value: str):
    assert redact({"note": value}) == {"note": HIDDEN}


@pytest.mark.parametrize("form", IN_TEXT)
def test_secrets_in_a_text(form: str):
    text = redact(form.format(TEXT))
    assert TEXT not in text
    assert HIDDEN in text
    assert redact(text) == text


@pytest.mark.parametrize("form", IN_TEXT)
def test_secrets_in_a_text_that_is_quoted(form: str):
    """As messages quote a setting that they refuse."""
    text = form.format(TEXT)
    for quoted in (repr(f'k=["{text}"]'), repr(f"k={json.dumps([text])}"), json.dumps(json.dumps([text]))):
        assert TEXT not in redact(f"override {quoted}")


@pytest.mark.parametrize("text", HARMLESS)
def test_what_is_no_secret_stays(text: str):
    assert redact(text) == text


def test_urls_lose_their_credentials_and_nothing_else():
    assert redact({"url": "http://me:pw@host:1/a"}) == {"url": f"http://{HIDDEN}@host:1/a"}
    assert redact({"url": "https://host/a?q=1&api_key=xyz&k=2#f"}) == {
        "url": f"https://host/a?q=1&api_key={HIDDEN}&k=2#f"
    }
    assert redact({"url": "https://host/a@b?q=key"}) == {"url": "https://host/a@b?q=key"}


def test_a_configuration_without_secrets_is_unchanged():
    """Keys such as ``max_response_tokens`` and ``task`` are no secrets."""
    config = to_dict(Config())
    config["model"]["path"] = "models/Qwen3-0.6B"
    config["engine"]["api_key_env"] = "OPENAI_API_KEY"
    assert redact(config) == config
    assert redact({"token": 3, "key": None, "password": ""}) == {"token": 3, "key": None, "password": ""}


@given(st.text(max_size=200))
def test_any_text_is_taken(text: str):
    assert redact(redact(text)) == redact(text)


LONG = (
    "login -",
    "--user=",
    "curl -u \\'a",
    "docker login ",
    "mysql ",
    "curl ",
    "curl -u ",
    "curl -b ",
    " -u a:",
    "cookie: ",
    "cookie:a",
)


def test_long_texts_take_time_in_proportion():
    """However fast the machine: four times the text takes four times as long, not sixteen times."""

    def seconds(length: int) -> float:
        began = time.process_time()
        for part in ("a", "a.", "--", '"', "?key", "login ", "x://", "a=", '="', "\\", '\\"', *LONG):
            redact(part * (length // len(part)))
            redact("password=" + part * (length // len(part)))
        return time.process_time() - began

    assert seconds(100_000) < 8 * seconds(25_000)


# Wherever a secret is put -------------------------------------------------------------------------

SETTINGS = [one for one in settings().values() if isinstance(one.of(Config()), str | list | dict)]


def with_secret(key: str, text: str) -> Config:
    """A configuration whose setting ``key`` holds ``text``, whether it could run or not."""
    config = Config()
    section, name = key.rsplit(".", 1)
    part = operator.attrgetter(section)(config)
    default = getattr(part, name)
    nested = {"search": {"note": text}} if key == "tools.options" else {"note": text}
    value: Any = [text] if isinstance(default, list) else nested if isinstance(default, dict) else text
    setattr(part, name, value)
    return config


@pytest.mark.parametrize("one", SETTINGS, ids=lambda one: one.key)
def test_records_of_a_run_hold_no_secret_of_any_setting(one: Any):
    for form in IN_TEXT:
        assert TEXT not in json.dumps(redact(to_dict(with_secret(one.key, form.format(TEXT)))))


@given(one=st.sampled_from(SETTINGS), form=st.sampled_from(IN_TEXT))
@bounded(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_secret_in_any_setting_is_shown_nowhere(
    one: Any, form: str, tmp_path_factory: pytest.TempPathFactory, capsys: pytest.CaptureFixture[str]
):
    secret, root = form.format(TEXT), tmp_path_factory.mktemp("secret")
    config = with_secret(one.key, secret)
    run = RunDir(root / "run")
    for part in (run.root, run.logs):
        part.mkdir()
    run.write_config(config)
    assert stat.S_IMODE(run.config_path.stat().st_mode) == 0o600  # the run itself needs it
    summary = Recorder(run, config, [JsonlWriter(run.metrics_path)]).finish(ended=True)
    assert TEXT not in json.dumps(summary)
    assert TEXT not in run.summary_path.read_text()
    assert TEXT not in json.dumps(redact(to_dict(config)))
    with contextlib.suppress(Exception):  # most settings cannot have such a value
        submit_run(config, "c", resume=None, dry_run=True)
    main(["config", str(run.config_path)])
    main(["train", f"{one.key}={secret}"])  # refused: no recipe, or a value that cannot be
    main(["config", f"{one.key}={json.dumps(to_dict(config)[one.section][one.key.split('.')[1]])}"])
    assert TEXT not in "".join(capsys.readouterr())


def test_the_script_keeps_what_the_job_needs_to_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    from system.cluster import submit

    jobs: list[Path] = []
    monkeypatch.setattr(submit.slurm, "sbatch", lambda script, options=(): jobs.append(script) or "17")
    setup = f"slurm.setup=['export WANDB_API_KEY={TEXT}']"
    config = load(None, [setup, f"slurm.env={{DB_PWD: {TEXT}}}", f"run.dir={tmp_path}", "run.name=r"])
    submit_run(config, "c", resume=None, dry_run=True)
    out = capsys.readouterr().out
    assert TEXT not in out
    assert f"export WANDB_API_KEY={HIDDEN}" in out
    submit_run(config, "c", resume=None, dry_run=False)
    (script,) = jobs
    assert script.read_text().count(TEXT) == 2
    assert stat.S_IMODE(script.stat().st_mode) == 0o600
    assert TEXT not in "".join(capsys.readouterr())
    plain = RunDir.create(load(None, [f"run.dir={tmp_path}", "run.name=plain"]))
    assert stat.S_IMODE(plain.config_path.stat().st_mode) & 0o044  # without a secret, others may read it


def test_weights_and_biases_gets_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    config = with_secret("slurm.setup", f"export WANDB_API_KEY={TEXT}")
    sent: list[Any] = []

    def init(**options: Any) -> Any:
        sent.append(options["config"])
        raise RuntimeError(f"api_key={TEXT} refused")

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init, Settings=dict))
    run = RunDir(tmp_path)
    for sink in sinks(run, config):
        sink.close()
    assert sent
    assert TEXT not in json.dumps(sent)
