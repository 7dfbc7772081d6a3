"""``espalier prompt``: the exact prompt, before anything is started."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from chat_templates import FAMILIES
from chat_tokenizers import chatml

from actors.cli.main import main

ROOT = Path(__file__).resolve().parents[2]
HOSTILE = "\x1b[2J[bold]Who?\u202e"


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """A model's tokenizer, four rows of which one is of no use, and a recipe that names them."""
    chatml().save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text('{"eos_token_id": 256}')
    rows = [
        {"problem": HOSTILE, "answer": "so\n#### 12", "level": 3},
        {"problem": "2+2?", "answer": None},
        {"problem": "2+2?", "answer": ["4", "four"]},
        {"problem": "3+3?", "answer": 6.0},
    ]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = tmp_path / "small.yaml"
    path.write_text(
        f"task: {{name: jsonl, path: {tmp_path}/data.jsonl}}\nmodel: {{path: {tmp_path}/model}}\n"
    )
    return path


def test_the_first_questions_are_shown_as_the_model_gets_them(
    recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["prompt", str(recipe), "2", "task.tools_in_prompt=none"]) == 0
    out = capsys.readouterr().out
    assert "training data: 3 rows of" in out
    assert "in words of its own" not in out
    assert "1 skipped, the first:" in out
    assert "line 2: no answer" in out
    assert "ends at: <|endoftext|> (256), <|im_end|> (258)" in out
    assert "a tool call ends at:      </search>, </python>" in out
    assert "question 1 of 3: data/1 (default)" in out
    assert "gold:   12\n  extra:  answer, level\n  tools:  the prompt does not mention them (task" in out
    assert "question 2 of 3: data/3" in out
    assert "gold:   4 | four" in out
    assert "question 3" not in out
    assert "<|im_start|>user\n␛[2J[bold]Who?␦<|im_end|>\n<|im_start|>assistant\n" in out
    assert not set("\x1b\u202e") & set(out)
    tokens = len(f"{HOSTILE}".encode()) + 3 + len("user\n\nassistant\n")
    assert f"tokens: {tokens}; engine.max_context=1024 leaves {1024 - tokens}\n" in out


def test_it_says_that_an_agent_asks_in_words_of_its_own(
    recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["prompt", str(recipe), "agent.command=true", "branching=none", "tools.names=[]"]) == 0
    assert "the agent asks the model in words of its own" in capsys.readouterr().out


def test_it_says_who_tells_of_the_tools_and_how_little_room_is_left(
    recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["prompt", "engine.max_context=300", str(recipe)]) == 0
    out = capsys.readouterr().out
    assert "tools:  told by the call syntax's words, in the system message" in out
    assert "Call it as <search> query </search>." in out
    assert out.count("Reason between <think> and </think>.") == 1
    assert ", less than rollout.max_response_tokens=256" in out
    assert main(["prompt", "rollout.call_limit=0", str(recipe)]) == 0
    assert "tools:  none (rollout.call_limit=0)" in capsys.readouterr().out


def test_a_question_that_the_template_refuses_is_named(
    recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    template = recipe.parent / "model" / "chat_template.jinja"
    template.write_text("{{ raise_exception('no system') if messages[0].role == 'system' else 'x' }}")
    assert main(["prompt", str(recipe)]) == 2
    assert "question data/1: the chat template refuses the messages: no system" in capsys.readouterr().err


def test_it_says_what_stands_around_answers(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    FAMILIES["qwen3"].tokenizer().save_pretrained(recipe.parent / "model")
    asked = ["prompt", str(recipe), "rollout.syntax=hermes", "task.template={enable_thinking: false}"]
    assert main(asked) == 0
    out = capsys.readouterr().out
    (line,) = [line for line in out.splitlines() if line.startswith("answers stand in:")]
    assert "the chat template's; tool: behind [user, assistant with a thought], " in line
    assert r"<|im_end|>\n<|im_start|>user\n<tool_response>\n<0>\n</tool_response><|im_end|>" in line
    assert line.endswith(r"<think>\n\n</think>\n\n'")
    assert main([*asked, "rollout.calls_per_turn=many"]) == 0
    out = capsys.readouterr().out
    assert "a tool call ends at:      </tool_call>, where the turn goes on" in out
    assert out.count("answers stand in:") == 2
    assert main([*asked, "rollout.answers=syntax"]) == 0
    assert "answers stand in:         the call syntax's words (rollout.answers)" in capsys.readouterr().out


def test_the_quickstart_keeps_its_tokens(capsys: pytest.CaptureFixture[str]) -> None:
    """The model learned its task with the bare question; nothing else may be in its prompt."""
    assert main(["prompt", str(ROOT / "configs" / "quickstart.yaml"), "3", "--held-out"]) == 0
    out = capsys.readouterr().out
    assert "ends at: <eos> (1)" in out
    texts = out.split("─" * 72)[1::2]
    assert len(texts) == 3
    assert all(text.startswith("\nQ: ") and text.endswith(" ?\n") for text in texts)
    assert out.count("the prompt does not mention them") == 3
