"""An environment of ``verifiers``: questions, two tools, a rubric.  It knows nothing of Espalier's training.

    make verifiers; cd examples; espalier train verifiers_search.yaml

This file runs in the interpreter that has verifiers: a taskset whose tasks score themselves, and the harness
that plays them, a loop in the same process.  (verifiers' own harnesses start a program for each episode.)
"""

import json
import operator
import random
import re
import sys
from functools import cache
from pathlib import Path

import verifiers.v1 as vf
from openai import AsyncOpenAI

sys.path.append(
    str(Path(__file__).resolve().parents[1])
)  # the quickstart's world, where you have your own data
from system.tasks.quickstart import questions, world

OPERATORS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "//": operator.floordiv}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": told,
            "parameters": {"type": "object", "properties": {key: {"type": "string"}}, "required": [key]},
        },
    }
    for name, told, key in (
        ("search", "Look something up.", "query"),
        ("python", "Calculate: print(1+2).", "code"),
    )
]


@cache
def facts():
    return world.generate(seed=0)


@cache
def search(query):
    """The two documents that have most of the words."""
    words = set(query.split())
    ranked = sorted(
        facts().documents(), key=lambda one: -len(words & set(f"{one['title']} {one['text']}".split()))
    )
    return "\n".join(f"{one['title']}: {one['text']}" for one in ranked[:2])


def python(code):
    """Of a language, the little that these questions need."""
    found = re.fullmatch(r"\s*print\(\s*(-?\d+)\s*(\+|-|\*|//)\s*(-?\d+)\s*\)\s*", code)
    if found is None:
        return "SyntaxError"
    left, sign, right = found.groups()
    return str(OPERATORS[sign](int(left), int(right)))


@cache
def client():
    return AsyncOpenAI(base_url="http://nowhere", api_key="none")  # to make one takes 30 ms


class Data(vf.TaskData):
    answer: str
    kind: str


class SearchTask(vf.Task[Data]):
    @vf.reward
    async def right(self, trace) -> float:
        """The box holds the answer."""
        said = trace.branches[-1].messages[-1].content if trace.branches else ""
        boxes = re.findall(r"\\boxed\{(.*?)\}", said or "")
        return float([one.strip() for one in boxes[-1:]] == [self.data.answer])

    @vf.reward(weight=0.05)
    async def tidy(self, trace) -> float:
        """It came to an end, with two searches or fewer."""
        return float(sum(message.role == "tool" for message in trace.branches[-1].messages) <= 2)

    @vf.metric
    async def calls(self, trace) -> float:
        return float(sum(message.role == "tool" for message in trace.branches[-1].messages))


class Config(vf.TasksetConfig):
    most: int = 2248


class Searches(vf.Taskset[SearchTask, Config]):
    def load(self):
        rng, seen = random.Random("eval-0"), set()  # so the first 200 are those that the quickstart holds out
        while len(seen) < self.config.most:
            kind = rng.choices(list(questions.KINDS), list(questions.KINDS.values()))[0]
            question = questions.draw(kind, rng)
            if question.text not in seen:
                seen.add(question.text)
                data = Data(prompt=question.text, answer=question.answer(facts()), kind=kind)
                yield SearchTask(data, self.config.task)


class Loop(vf.Harness[vf.HarnessConfig]):
    """Asks, calls the tools, until there is an answer."""

    EXECUTES_CODE = NEEDS_CONTAINER = False

    async def launch(self, ctx, trace, runtime, endpoint, secret, mcp_urls, data):
        messages = [{"role": "user", "content": data.prompt}]
        model = client().with_options(base_url=endpoint, api_key=secret)
        for _ in range(5):
            reply = await model.chat.completions.create(model=ctx.model, messages=messages, tools=TOOLS)
            message = reply.choices[0].message
            messages.append(message.model_dump(exclude_none=True))
            if not message.tool_calls:
                break
            for call in message.tool_calls:
                arguments = json.loads(call.function.arguments)
                use = {"search": search, "python": python}[call.function.name]
                result = use(*arguments.values())
                messages.append({"role": "tool", "tool_call_id": call.id, "content": result})
        return vf.ProgramResult(exit_code=0, stdout="", stderr="")


__all__ = ["Loop", "Searches"]
