"""What our script on TRL is made of that needs no TRL: the job, the templates by which TRL asks and reads,
one tool, and how a completion is shown to the reward.
"""

from __future__ import annotations

import ast
import json
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from system.rollout.reward import BranchView
from system.rollout.syntax.tags import TagSyntax
from system.tree.record import Kind, Outcome

TOOLS = ("search", "python")
CALLS = "|".join(TOOLS)
_OPEN, _CLOSE = json.dumps(TagSyntax.result_open), json.dumps(TagSyntax.result_close)
# Contents as they stand; a call as its tag, a result between result tags: what the model was taught.  (A call
# by another argument than a tag holds shows its name, too: TRL wants to see what it asks a template for.)
CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{%- if message['role'] == 'tool' %}"
    f"{{{{ {_OPEN} + message['content'] + {_CLOSE} }}}}"
    "{%- else %}{{ message['content'] }}"
    "{%- for call in message['tool_calls'] or [] %}"
    "{{ ' <' + call['function']['name'] + '>' }}"
    "{%- for key, value in call['function']['arguments'].items() %}"
    "{{ ' ' + (key + '=' if key != 'text' else '') + value }}"
    "{%- endfor %}"
    "{{ ' </' + call['function']['name'] + '>' }}"
    "{%- endfor %}{%- endif %}{%- endfor %}"
)
RESPONSE_TEMPLATE: dict[str, Any] = {
    "defaults": {"role": "assistant"},
    "start_anchor_pattern": r"[\s\S]*",  # all that stands before the turn
    "fields": {
        "tool_calls": {
            "open_pattern": rf" ?<(?P<name>{CALLS})>\s*",
            "close_pattern": rf"\s*</(?:{CALLS})>",
            "repeats": True,
            "content": "text",
            "transform": {
                "type": "function",
                "function": {"name": "{name}", "arguments": {"text": "{content}"}},
            },
        },
        "content": {"close": "<eos>", "content": "text"},
    },
}
# The best that `espalier bench engine` found for a CPU; by default the cache takes half of the memory.
CONTINUOUS = {"page_size": 32, "num_blocks": 1024, "max_batch_tokens": 1024, "use_async_batching": False}
_OPERATORS: dict[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
}


@dataclass(frozen=True, slots=True)
class TrlJob:
    """What to train, on what."""

    model: str  # directory in Hugging Face format
    questions: list[dict[str, Any]]  # in the order of training: id, messages, answers, token_ids
    steps: int
    leaves: int  # completions per question
    batch_leaves: int  # completions per step
    tokens: int  # of a completion, tool results included
    result_tokens: int  # of a tool result
    calls: int  # rounds of tool calls
    top_k: int  # documents per search
    learn: dict[str, float]  # lr, weight_decay, beta1, beta2, eps, grad_clip, clip_low, clip_high
    continuous: bool  # transformers' continuous batching, not static generate
    search_url: str  # empty: in this process
    python_url: str  # likewise
    corpus: str  # for a search in this process
    delay_s: float  # that a search in this process takes longer
    out: str  # directory for what it leaves: steps.jsonl, result.json, model/


def calculate(code: str) -> dict[str, str]:
    """``print(A+B)`` of whole numbers, as a tool in the trainer's process: a model's text is not executed."""
    try:
        tree = ast.parse(code.strip(), mode="eval").body
        if not (isinstance(tree, ast.Call) and isinstance(tree.func, ast.Name) and tree.func.id == "print"):
            raise ValueError("only print(…) of whole numbers")
        return {"status": "ok", "text": " ".join(str(_value(argument)) for argument in tree.args)}
    except (SyntaxError, ValueError, ArithmeticError, RecursionError) as error:
        return {"status": "error", "text": f"{type(error).__name__}: {error}"}


def _value(node: ast.expr) -> int:
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return node.value
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        return _OPERATORS[type(node.op)](_value(node.left), _value(node.right))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_value(node.operand)
    raise ValueError("only whole numbers, +, -, * and //")


def branch_of(
    text: str,
    messages: Sequence[Mapping[str, Any]],
    status: Callable[[str, str], str],
    shown: Callable[[str], str],
) -> BranchView:
    """A completion as Espalier's reward sees one: ``text``, all of it, parted at the results in ``messages``.

    ``status``: of a tool's answer; ``shown``: a text as its tokens are decoded, with what the tokenizer does
    not know.  Raises ValueError where a result does not stand in the text.
    """
    segments: list[tuple[Kind, str]] = []
    tools: list[tuple[str, str]] = []
    for message in messages:
        if message["role"] != "tool":
            continue
        result = shown(f"{TagSyntax.result_open}{message['content']}{TagSyntax.result_close}")
        said, found, text = text.partition(result)
        if not found:
            raise ValueError(f"the result {result!r} does not stand in the completion")
        segments += [(Kind.MODEL, said), (Kind.TOOL, result)]
        tools.append((message["name"], status(message["name"], message["content"])))
    if text:
        segments.append((Kind.MODEL, text))
    return BranchView(tuple(segments), Outcome.STOPPED, tuple(tools))
