"""What our script on TRL shows TRL and the reward; and a whole run of it, where TRL is installed."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from system.bench.engine import TUNED
from system.bench.processes import run_to_end
from system.bench.trl import CHECKOUT, PYTHON, trl_settings
from system.bench.trl_parts import CHAT_TEMPLATE, CONTINUOUS, RESPONSE_TEMPLATE, branch_of, calculate
from system.bench.trl_work import BenchQuestion, of_trl
from system.config import load
from system.rollout.chat import Chat
from system.rollout.rewards.arpo import ArpoReward
from system.rollout.syntax.base import ParsedCall
from system.rollout.syntax.tags import TagSyntax
from system.tasks.base import HasCorpus, make_task
from system.tasks.quickstart import vocabulary
from system.tasks.tiny_model import create_model
from system.tools.http_tools import PythonTool, SearchTool
from system.tree.prompt import Prompt
from system.tree.record import Kind

CALL = " <think> Alda </think> <search> person Alda </search>"


@pytest.fixture
def tokenizer() -> Any:
    made = vocabulary.build()
    made.chat_template, made.response_template = CHAT_TEMPLATE, RESPONSE_TEMPLATE
    return made


def test_a_prompt_is_the_tokens_that_espalier_makes_of_it(tokenizer: Any) -> None:
    messages = [{"role": "user", "content": "Q: Alda 's residence 's spires over 12 ?"}]
    ours = Chat(vocabulary.build()).encode(messages).tolist()
    theirs = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=False
    )
    assert theirs == ours


def test_trl_reads_the_call_that_espalier_reads(tokenizer: Any) -> None:
    prompt = "Q: Alda 's residence ?"
    specs = {tool.spec.name: tool.spec for tool in (SearchTool, PythonTool)}
    assert TagSyntax(specs).parse(CALL) == ParsedCall("search", {"query": "person Alda"})
    read = tokenizer.parse_response(CALL, prefix=prompt)
    call = {"type": "function", "function": {"name": "search", "arguments": {"text": "person Alda"}}}
    assert read["tool_calls"] == [call]
    answered = tokenizer.parse_response(
        " <think> done </think> <answer> \\boxed{47 } </answer><eos>", prefix=prompt + CALL
    )
    assert "tool_calls" not in answered
    assert answered["content"] == "<think> done </think> <answer> \\boxed{47 } </answer>"


def test_trl_writes_a_result_as_espalier_does(tokenizer: Any) -> None:
    """What TRL takes as the tokens behind a call: the difference that the message of a tool makes."""
    text = "person Alda: born: Tolmouth home: Karkeep\nwork Ironsong: author: Alda"
    call = {"type": "function", "function": {"name": "search", "arguments": {}}}
    before = [
        {"role": "user", "content": "dummy"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
    ]
    after = [*before, {"role": "tool", "name": "search", "content": text}]
    shorter, longer = (
        tokenizer.apply_chat_template(
            one, add_generation_prompt=one is after, tokenize=True, return_dict=False
        )
        for one in (before, after)
    )
    assert longer[: len(shorter)] == shorter
    ours = vocabulary.build().encode(TagSyntax({}).render_result(text), add_special_tokens=False)
    assert longer[len(shorter) :] == ours


def test_a_call_by_another_argument_is_shown_whole(tokenizer: Any) -> None:
    call = {"type": "function", "function": {"name": "lookup", "arguments": {"key": "value"}}}
    shown = tokenizer.apply_chat_template(
        [{"role": "assistant", "content": "", "tool_calls": [call]}], tokenize=False
    )
    assert shown == " <lookup> key=value </lookup>"


def test_a_completion_is_scored_as_espalier_scores_it() -> None:
    results = ["figures Alda: age:47", "57"]
    said = [CALL, " <think> age:47 plus </think> <python> print(47+10) </python>"]
    final = " <think> done </think> <answer> \\boxed{57 } </answer>"
    text = (
        "".join(one + TagSyntax({}).render_result(two) for one, two in zip(said, results, strict=True))
        + final
    )
    messages = [
        {"role": "assistant", "content": "", "tool_calls": [{}]},
        {"role": "tool", "name": "search", "content": results[0]},
        {"role": "assistant", "content": "", "tool_calls": [{}]},
        {"role": "tool", "name": "python", "content": results[1]},
        {"role": "assistant", "content": final},
    ]
    branch = branch_of(text, messages, lambda tool, text: "ok", str)
    assert [kind for kind, _ in branch.segments] == [Kind.MODEL, Kind.TOOL, Kind.MODEL, Kind.TOOL, Kind.MODEL]
    assert branch.text == text
    assert branch.tools == (("search", "ok"), ("python", "ok"))
    assert ArpoReward().score(Prompt("q", (), ("57",)), branch).value == pytest.approx(1.1)  # two tools
    failed = branch_of(text, messages, lambda tool, text: "error", str)
    assert ArpoReward().score(Prompt("q", (), ("57",)), failed).value == 1.0
    unknown = branch_of(
        " <a> <result>\n<unk>\n</result> <b>",
        [messages[1]],
        lambda *_: "ok",
        lambda _: " <result>\n<unk>\n</result>",
    )
    assert [text for _, text in unknown.segments] == [" <a>", " <result>\n<unk>\n</result>", " <b>"]
    with pytest.raises(ValueError, match="does not stand in the completion"):
        branch_of(final, messages, lambda tool, text: "ok", str)


@pytest.mark.parametrize(
    ("code", "status", "text"),
    [
        ("print(47+10)", "ok", "57"),
        (" print(47//10) ", "ok", "4"),
        ("print(-3, 2*4)", "ok", "-3 8"),
        ("print(1//0)", "error", "ZeroDivisionError: integer division or modulo by zero"),
        ("print(9**9)", "error", "ValueError: only whole numbers, +, -, * and //"),
        ("print(True)", "error", "ValueError: only whole numbers, +, -, * and //"),
        ("open('x')", "error", "ValueError: only print(…) of whole numbers"),
    ],
)
def test_the_calculator_executes_nothing(code: str, status: str, text: str) -> None:
    assert calculate(code) == {"status": status, "text": text}


def test_the_calculator_tells_what_is_no_program() -> None:
    assert calculate("print(")["text"].startswith("SyntaxError: ")


def test_continuous_batching_has_the_settings_of_the_benchmark_of_engines() -> None:
    assert {name: getattr(TUNED, name) for name in CONTINUOUS} == CONTINUOUS


@pytest.mark.slow
@pytest.mark.skipif(not os.access(PYTHON, os.X_OK), reason="TRL is not installed: make bench-trl")
@pytest.mark.timeout(600)
@pytest.mark.parametrize("continuous", [False, True])
async def test_trl_trains_on_the_questions_that_it_is_given(continuous: bool, tmp_path: Path) -> None:
    config = load(CHECKOUT / "configs" / "quickstart.yaml")
    task = make_task(config)
    assert isinstance(task, HasCorpus)
    create_model(tmp_path / "model", vocabulary.build(), config.model, seed=0)
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in task.corpus()))
    chat, asked = Chat(vocabulary.build()), []
    for prompt in task.train()[:4]:
        messages = [dict(message) for message in prompt.messages]
        asked.append(BenchQuestion(prompt.id, messages, list(prompt.answers), chat.encode(messages).tolist()))
    settings = trl_settings(config) | {"batch_leaves": 4, "leaves": 2, "tokens": 12}
    job = {
        **settings,
        "model": str(tmp_path / "model"),
        "questions": [
            {"id": one.id, "messages": one.messages, "answers": one.answers, "token_ids": one.token_ids}
            for one in asked
        ],
        "steps": 2,
        "continuous": continuous,
        "search_url": "",
        "python_url": "",
        "corpus": str(tmp_path / "corpus.jsonl"),
        "delay_s": 0.0,
        "out": str(tmp_path),
    }
    (tmp_path / "job.json").write_text(json.dumps(job))
    await run_to_end(
        "system.bench.trl_train",
        str(tmp_path / "job.json"),
        log=tmp_path / "log",
        limit_s=500,
        python=str(PYTHON),
        variables={"PYTHONPATH": str(CHECKOUT), "HF_HUB_OFFLINE": "1"},
    )
    lines = [json.loads(line) for line in (tmp_path / "steps.jsonl").read_text().splitlines()]
    result = json.loads((tmp_path / "result.json").read_bytes())
    work = of_trl(lines, result, asked, leaves=2)
    assert work.problems == []
    assert (len(work.ends), work.completions) == (2, 4)
    assert (tmp_path / "model" / "model.safetensors").is_file()
